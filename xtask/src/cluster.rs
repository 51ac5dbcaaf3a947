//! `demo`, `train`, `bench` and `chaos`: builds the programs, then becomes `psctl` or `downpour-chaos`, which starts a cluster on this
//! machine, works on it and stops it.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use crate::args::{Bench, Output};
use crate::{Result, libtorch, process};

/// The programs of a cluster; `psctl local` finds the others beside itself.
const PACKAGES: [&str; 3] = ["downpour-coordinator", "downpour-ps", "downpour-psctl"];
/// Needs LibTorch.
const WORKER: &str = "downpour";
const CHAOS: &str = "downpour-chaos-tests";
const DATA: &str = "downpour-data";

/// What `cargo xtask demo` runs, from the root of the repository. The numbers are those of docs/quality.md.
const DEMO: &str = "local --coordinators 3 --servers 2 --workers 2 --replicas 2 -- \
                    train --model deepfm --schema data/datasets/census-income.toml \
                    --train data/datasets/census-income/train.parquet \
                    --test data/datasets/census-income/test.parquet --batch 512 --epochs 3 \
                    --hidden 64,32 --lr-table 0.02 --initial-accumulator 0.01 --lr-dense 0.002";

pub(crate) fn demo(root: &Path, output: Output) -> Result<()> {
    eprintln!(
        "Downpour's demo: a cluster of 3 coordinators, 2 parameter servers and 2 workers on this \
         machine trains DeepFM on Census-Income (in the repository).\n\
         \x20 fetches   LibTorch (544 MB) and the crates of Cargo.lock (100 MB), unless they are there\n\
         \x20 disk      3 GB at most, in .cache/ and target/\n\
         \x20 time      on 2 cores 6 min to compile and 15 s to train; the next time only to train"
    );
    let mut psctl = psctl(root, "demo", true)?;
    if output == Output::Json {
        psctl.args(["-o", "json"]);
    }
    process::exec(psctl.args(DEMO.split_whitespace()))
}

pub(crate) fn train(root: &Path, args: &[OsString]) -> Result<()> {
    process::exec(psctl(root, "demo", true)?.arg("local").args(args))
}

/// Release binaries, since figures are quoted.
pub(crate) fn bench(root: &Path, bench: Bench) -> Result<()> {
    let mut psctl = psctl(root, "release", bench.train)?;
    if bench.output == Output::Json {
        psctl.args(["-o", "json"]);
    }
    psctl.args(["bench", "all", "--local"]);
    psctl.args(bench.quick.then_some("--quick")).args(bench.train.then_some("--train"));
    process::exec(&mut psctl)
}

/// Release binaries: their timing is what users have.
pub(crate) fn chaos(root: &Path, args: &[OsString]) -> Result<()> {
    let trains = args.iter().any(|arg| arg == "workers" || arg == "--scenario=workers");
    if trains {
        libtorch::ensure(root)?;
    }
    let training = [DATA, WORKER].into_iter().filter(|_| trains);
    let packages = PACKAGES.iter().copied().chain([CHAOS]).chain(training);
    process::exec(built(root, "release", packages, "downpour-chaos")?.args(args))
}

fn psctl(root: &Path, profile: &str, with_worker: bool) -> Result<Command> {
    if with_worker {
        libtorch::ensure(root)?;
    }
    let packages = PACKAGES.iter().copied().chain(with_worker.then_some(WORKER));
    built(root, profile, packages, "psctl")
}

/// A program that is up to date, and so are those that it will start.
fn built<'a>(
    root: &Path,
    profile: &str,
    packages: impl Iterator<Item = &'a str>,
    program: &str,
) -> Result<Command> {
    let packages: Vec<&str> = packages.collect();
    eprintln!("Building {}", packages.join(", "));
    let packages = packages.iter().flat_map(|package| ["--package", package]);
    let mut build = process::cargo(root);
    process::run(build.args(["build", "--locked", "--bins", "--profile", profile]).args(packages))?;
    Ok(process::command(root, process::binaries(profile)?.join(program)))
}
