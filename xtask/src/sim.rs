//! The simulation (docs/simulation.md): the same code with other clocks, networks and disks, so it is compiled apart from everything else.

use std::path::Path;
use std::process::Command;

use crate::{Result, process};

/// `tokio_unstable` lets a runtime's own choices follow from a seed.
const FLAGS: &str = "--cfg downpour_sim --cfg tokio_unstable";
const PROFILE: &str = "sim";
const SEEDS: &str = "1..21";
/// Bugs that are found at once, put back one after the other: the simulation itself is tested so.
const PLANTED: [&str; 5] = [
    "ack-before-backup",
    "drop-closed-mark",
    "slots-of-another-moment",
    "forget-cells",
    "forget-isolation",
];

/// The program, up to date.
pub(crate) fn built(root: &Path) -> Result<Command> {
    // Other flags, another folder: neither build throws the other away.
    let target = process::binaries("sim")?;
    eprintln!("Building downpour-sim");
    let mut build = process::cargo(root);
    build.args(["build", "--locked", "--package", "downpour-sim", "--profile", PROFILE]);
    build.arg("--target-dir").arg(&target).env("RUSTFLAGS", FLAGS);
    process::run(&mut build)?;
    Ok(process::command(root, target.join(PROFILE).join("downpour-sim")))
}

/// What CI checks.
pub(crate) fn check(root: &Path) -> Result<()> {
    let mut lint = process::cargo(root);
    lint.args(["clippy", "--locked", "--package", "downpour-sim", "--profile", PROFILE]);
    lint.arg("--target-dir").arg(process::binaries("sim")?).env("RUSTFLAGS", FLAGS);
    process::run(lint.args(["--", "--deny=warnings"]))?;
    process::run(built(root)?.args(["--seeds", SEEDS]))?;
    same_seed_same_bytes(root)?;
    for bug in PLANTED {
        let mut run = built(root)?;
        run.args(["--seeds", SEEDS, "--until-found", "--plant", bug]);
        if process::run(run.stderr(std::process::Stdio::null())).is_ok() {
            return Err(format!("{bug} was put back and not found"));
        }
    }
    Ok(())
}

fn same_seed_same_bytes(root: &Path) -> Result<()> {
    let run = || {
        let output = built(root)?.args(["--seed", "1", "-o", "json"]).output();
        output.map(|output| output.stdout).map_err(|error| error.to_string())
    };
    if run()? == run()? { Ok(()) } else { Err("seed 1 went another way the second time".into()) }
}
