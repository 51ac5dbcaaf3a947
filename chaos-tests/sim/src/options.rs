//! The command line.

use std::ops::Range;

use downpour_core::planted::Bug;

pub(crate) const USAGE: &str = "\
Usage: cargo xtask sim [--seeds A..B | --seed N] [--plant BUG] [--until-found] [-o text|json]

  --seeds A..B   every seed from A up to B (without B), two processes side by side; without it 1..21
  --seed N       one seed; RUST_LOG=debug tells what happens on stderr
  --plant BUG    put a bug back that must be found: see docs/simulation.md
  --until-found  stop at the first seed that fails
  -o json        one object on stdout";

pub(crate) struct Options {
    pub(crate) work: Work,
    pub(crate) bug: Option<(&'static str, Bug)>,
    pub(crate) until_found: bool,
    pub(crate) json: bool,
}

pub(crate) enum Work {
    Help,
    One(u64),
    Many(Range<u64>),
}

pub(crate) fn parse(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options =
        Options { work: Work::Many(1..21), bug: None, until_found: false, json: false };
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} wants a value"));
        match arg.as_str() {
            "--help" | "-h" => options.work = Work::Help,
            "--seed" => {
                let seed = value()?;
                let seed = seed.parse().map_err(|_| format!("{seed} is no seed"))?;
                options.work = Work::One(seed);
            }
            "--seeds" => {
                let seeds = value()?;
                let bounds = seeds.split_once("..").and_then(|(first, end)| {
                    Some(first.parse::<u64>().ok()?..end.parse::<u64>().ok()?)
                });
                let bounds = bounds.filter(|bounds| !bounds.is_empty());
                options.work =
                    Work::Many(bounds.ok_or_else(|| format!("{seeds} is not like 1..21"))?);
            }
            "--plant" => {
                let name = value()?;
                let bug = Bug::ALL.into_iter().find(|(known, _)| *known == name);
                let names = Bug::ALL.map(|(name, _)| name).join(", ");
                options.bug = Some(bug.ok_or_else(|| format!("no bug {name}: there are {names}"))?);
            }
            "--until-found" => options.until_found = true,
            "-o" | "--output" => match value()?.as_str() {
                "json" => options.json = true,
                "text" => options.json = false,
                form => return Err(format!("--output is text or json, not {form}")),
            },
            _ => return Err(format!("unexpected argument {arg}")),
        }
    }
    Ok(options)
}
