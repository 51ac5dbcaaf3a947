//! The command line: arguments in, [`Command`] or an error out.

use std::ffi::OsString;

use crate::Result;
use crate::gate::{STEPS, Step};

pub(crate) const USAGE: &str = "\
Usage: cargo xtask <command>

  demo [-o text|json]           fetch, build, start a cluster on this machine and train DeepFM on it
  train <arguments>             fetch, build, and pass the arguments to `psctl local`
  bench [--quick] [--train] [-o text|json]
                                build for release and measure speed beside the floor; --train trains too
  chaos --scenario <NAME> <arguments>
                                build for release and disturb a cluster on this machine, for example
                                `cargo xtask chaos --scenario mixed --seconds 60 --seed 7 -o json`; --help tells more
  sim [--seeds A..B | --seed N] <arguments>
                                simulate clusters under faults, each from one seed; --help tells more
  test [--only STEP]... [--list]
                                everything that CI checks; changes nothing in the repository
  libtorch                      fetch LibTorch into .cache/libtorch (an exported LIBTORCH is respected)
  help                          this text";

pub(crate) enum Command {
    Help,
    Libtorch,
    Test { steps: Vec<&'static Step> },
    ListSteps,
    Demo { output: Output },
    Train { args: Vec<OsString> },
    Chaos { args: Vec<OsString> },
    Sim { args: Vec<OsString> },
    Bench(Bench),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bench {
    pub(crate) quick: bool,
    /// Which needs the worker, and so LibTorch.
    pub(crate) train: bool,
    pub(crate) output: Output,
}

/// The form of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    Text,
    Json,
}

pub(crate) fn parse(args: impl Iterator<Item = OsString>) -> Result<Command> {
    let mut args = args;
    let Some(name) = args.next() else { return Err("a command is missing".into()) };
    if name == "train" {
        // Not looked at here, nor those of chaos and sim: the program's own parser knows them.
        return Ok(Command::Train { args: args.collect() });
    }
    if name == "chaos" {
        return Ok(Command::Chaos { args: args.collect() });
    }
    if name == "sim" {
        return Ok(Command::Sim { args: args.collect() });
    }
    let rest = args
        .map(|arg| arg.into_string().map_err(|arg| format!("not UTF-8: {}", arg.display())))
        .collect::<Result<Vec<String>>>()?;
    match name.to_str() {
        Some("help" | "--help" | "-h") => Ok(Command::Help),
        Some("libtorch") => none(rest).map(|()| Command::Libtorch),
        Some("test") => test(rest),
        Some("demo") => demo(rest),
        Some("bench") => bench(rest),
        _ => Err(format!("unknown command `{}`", name.display())),
    }
}

fn none(rest: Vec<String>) -> Result<()> {
    rest.first().map_or(Ok(()), |arg| Err(format!("unexpected argument `{arg}`")))
}

fn test(rest: Vec<String>) -> Result<Command> {
    let mut only = Vec::new();
    let mut rest = rest.into_iter();
    while let Some(arg) = rest.next() {
        match arg.as_str() {
            "--list" => return none(rest.collect()).map(|()| Command::ListSteps),
            "--only" => {
                let name = rest.next().ok_or("--only wants the name of a step")?;
                let step = STEPS.iter().find(|step| step.name == name);
                only.push(step.ok_or_else(|| format!("no step `{name}`; --list shows them"))?);
            }
            _ => return none(vec![arg]).map(|()| Command::Help),
        }
    }
    let steps = if only.is_empty() { STEPS.iter().collect() } else { only };
    Ok(Command::Test { steps })
}

fn demo(rest: Vec<String>) -> Result<Command> {
    let mut form = Output::Text;
    let mut rest = rest.into_iter();
    while let Some(arg) = rest.next() {
        match output(&arg, &mut rest)? {
            Some(given) => form = given,
            None => return none(vec![arg]).map(|()| Command::Help),
        }
    }
    Ok(Command::Demo { output: form })
}

fn bench(rest: Vec<String>) -> Result<Command> {
    let mut bench = Bench { quick: false, train: false, output: Output::Text };
    let mut rest = rest.into_iter();
    while let Some(arg) = rest.next() {
        match arg.as_str() {
            "--quick" => bench.quick = true,
            "--train" => bench.train = true,
            _ => match output(&arg, &mut rest)? {
                Some(given) => bench.output = given,
                None => return none(vec![arg]).map(|()| Command::Help),
            },
        }
    }
    Ok(Command::Bench(bench))
}

/// What `-o`, `--output` or `--output=` says; `None` if `arg` is neither.
fn output(arg: &str, rest: &mut impl Iterator<Item = String>) -> Result<Option<Output>> {
    let form = match arg {
        "-o" | "--output" => rest.next().ok_or("--output wants text or json")?,
        _ => match arg.strip_prefix("--output=") {
            Some(form) => form.to_owned(),
            None => return Ok(None),
        },
    };
    match form.as_str() {
        "text" => Ok(Some(Output::Text)),
        "json" => Ok(Some(Output::Json)),
        _ => Err(format!("--output is text or json, not `{form}`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(line: &str) -> Result<Command> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn test_without_only_runs_every_step_in_order() {
        let Ok(Command::Test { steps }) = parse_words("test") else { panic!("not a test command") };
        let names: Vec<_> = steps.iter().map(|step| step.name).collect();
        assert_eq!(names, STEPS.iter().map(|step| step.name).collect::<Vec<_>>());
    }

    #[test]
    fn only_keeps_the_named_steps() {
        let Ok(Command::Test { steps }) = parse_words("test --only tidy --only fmt") else {
            panic!("not a test command")
        };
        assert_eq!(steps.iter().map(|step| step.name).collect::<Vec<_>>(), ["tidy", "fmt"]);
    }

    #[test]
    fn train_passes_everything_through() {
        let Ok(Command::Train { args }) = parse_words("train --help -- -o json --only x") else {
            panic!("not a train command")
        };
        assert_eq!(args, ["--help", "--", "-o", "json", "--only", "x"]);
    }

    #[test]
    fn chaos_passes_everything_through() {
        let Ok(Command::Chaos { args }) = parse_words("chaos --scenario mixed -o json --help")
        else {
            panic!("not a chaos command")
        };
        assert_eq!(args, ["--scenario", "mixed", "-o", "json", "--help"]);
    }

    #[test]
    fn sim_passes_everything_through() {
        let Ok(Command::Sim { args }) = parse_words("sim --seeds 1..3 -o json --help") else {
            panic!("not a sim command")
        };
        assert_eq!(args, ["--seeds", "1..3", "-o", "json", "--help"]);
    }

    #[test]
    fn demo_takes_either_form_of_output() {
        for line in ["demo -o json", "demo --output json", "demo --output=json"] {
            assert!(
                matches!(parse_words(line), Ok(Command::Demo { output: Output::Json })),
                "{line}"
            );
        }
        assert!(matches!(parse_words("demo"), Ok(Command::Demo { output: Output::Text })));
    }

    #[test]
    fn bench_takes_its_options_in_any_order() {
        let bench = |quick, train, output| Bench { quick, train, output };
        for (line, wanted) in [
            ("bench", bench(false, false, Output::Text)),
            ("bench -o json --quick", bench(true, false, Output::Json)),
            ("bench --train --output=json", bench(false, true, Output::Json)),
        ] {
            assert!(matches!(parse_words(line), Ok(Command::Bench(found)) if found == wanted));
        }
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (line, name) in [
            ("", "command is missing"),
            ("tets", "tets"),
            ("test --only", "--only"),
            ("test --only nothing", "nothing"),
            ("test --fast", "--fast"),
            ("test --list more", "more"),
            ("demo -o", "--output"),
            ("demo -o yaml", "yaml"),
            ("bench --slow", "--slow"),
            ("bench -o", "--output"),
            ("libtorch now", "now"),
        ] {
            let error = parse_words(line).err().unwrap_or_else(|| panic!("accepted `{line}`"));
            assert!(error.contains(name), "`{line}`: {error}");
        }
    }
}
