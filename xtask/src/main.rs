//! What a newcomer or CI runs: `cargo xtask <command>`.
//!
//! Follow one command: [`args`] parses it, [`libtorch`] makes sure that LibTorch is there (through
//! [`wheels`], which downloads pinned wheels), [`process`] runs the compiler and the programs.
//! [`gate`] is `cargo xtask test`, step by step; [`tidy`] holds its rules about the text of the
//! repository, [`kubernetes`] checks `deploy/k8s`. [`cluster`] is `demo`, `train`, `bench` and `chaos`;
//! [`sim`] builds the simulation.
//!
//! There are no dependencies here: the first line is printed seconds after a fresh clone.

mod args;
mod cluster;
mod gate;
mod kubernetes;
mod libtorch;
mod process;
mod python;
mod sim;
mod tidy;
mod wheels;

use std::path::Path;
use std::process::ExitCode;

/// What went wrong, for a person. Nothing here is recovered from, so a type would tell no more.
type Result<T, E = String> = std::result::Result<T, E>;

fn main() -> ExitCode {
    let command = match args::parse(std::env::args_os().skip(1)) {
        Ok(command) => command,
        Err(error) => {
            eprintln!("error: {error}\n\n{}", args::USAGE);
            return ExitCode::from(2);
        }
    };
    match run(&command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &args::Command) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace");
    match command {
        args::Command::Help => println!("{}", args::USAGE),
        args::Command::Libtorch => {
            let prefix = libtorch::ensure(root)?;
            eprintln!("LibTorch is ready in {}", prefix.display());
        }
        args::Command::Test { steps } => gate::run(root, steps)?,
        args::Command::ListSteps => {
            gate::STEPS.iter().for_each(|step| println!("{:10} {}", step.name, step.what));
        }
        args::Command::Demo { output } => cluster::demo(root, *output)?,
        args::Command::Bench(bench) => cluster::bench(root, *bench)?,
        args::Command::Train { args } => cluster::train(root, args)?,
        args::Command::Chaos { args } => cluster::chaos(root, args)?,
        args::Command::Sim { args } => process::exec(sim::built(root)?.args(args))?,
    }
    Ok(())
}
