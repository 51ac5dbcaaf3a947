//! A whole cluster in one thread, from one seed (docs/simulation.md): three coordinators, three servers and their clients run the code that is
//! shipped; only the clock, the network and the disks are simulated. What happens follows from the seed alone, to the byte.
//!
//! Follow one seed (`run`): `system` takes the clock and the random numbers away from the system, `cluster` makes the hosts, `faults` says what
//! goes wrong, `inject` does it. `clients` push what can be counted, `zombie` pushes again after its session was closed, `monitor` watches
//! the committed state. Each file of `invariants` is one promise. `many` runs seeds side by side, a process for each.
//!
//! Built without `--cfg downpour_sim` it is nothing: `cargo xtask sim` builds it.

#[cfg(downpour_sim)]
mod clients;
#[cfg(downpour_sim)]
mod cluster;
#[cfg(downpour_sim)]
mod draw;
#[cfg(downpour_sim)]
mod faults;
#[cfg(downpour_sim)]
mod inject;
#[cfg(downpour_sim)]
mod invariants;
#[cfg(downpour_sim)]
mod many;
#[cfg(downpour_sim)]
mod monitor;
#[cfg(downpour_sim)]
mod options;
#[cfg(downpour_sim)]
mod report;
#[cfg(downpour_sim)]
mod run;
#[cfg(downpour_sim)]
mod shared;
#[cfg(downpour_sim)]
mod system;
#[cfg(downpour_sim)]
mod zombie;

#[cfg(downpour_sim)]
fn main() -> std::process::ExitCode {
    use options::Work;

    let options = match options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(problem) => {
            eprintln!("downpour-sim: {problem}\n\n{}", options::USAGE);
            return std::process::ExitCode::from(2);
        }
    };
    match options.work {
        Work::Help => {
            println!("{}", options::USAGE);
            std::process::ExitCode::SUCCESS
        }
        Work::One(seed) => run::one(seed, &options),
        Work::Many(ref seeds) => many::run(seeds.clone(), &options),
    }
}

#[cfg(not(downpour_sim))]
fn main() -> std::process::ExitCode {
    eprintln!(
        "downpour-sim: built without `--cfg downpour_sim`; `cargo xtask sim` builds and runs it"
    );
    std::process::ExitCode::from(2)
}
