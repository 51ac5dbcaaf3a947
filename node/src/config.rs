//! Options of a binary: defaults < TOML file (`--config`) < environment (`DOWNPOUR_<FIELD>`) < flags.
//!
//! A binary declares one struct with `serde` and `clap::Args` ([`Options`]); the name of a field is its key in the file, in upper case
//! its environment variable, with dashes its flag. Its defaults are those of `Default` alone: an `#[arg]` takes no
//! `default_value`, because a flag that was not given must leave the other layers as they are. A `bool` is written
//! `#[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set)]`
//! for the same reason (and can then be turned off again with `--field=false`).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;

use clap::{Arg, ArgAction, Command};
use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::Table;

mod common;
#[cfg(test)]
mod tests;

pub use common::{Common, LogFormat, check_host_port};

/// The one struct of options of a binary.
pub trait Options: clap::Args + Serialize + DeserializeOwned + Default {
    /// Everything that is wrong with these options, not only the first.
    fn problems(&self) -> Vec<Problem>;
}

/// One thing wrong with one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    field: &'static str,
    problem: String,
}

impl Problem {
    /// `field` as in the file; `problem` reads on from the field's name: "must not be 0".
    pub fn new(field: &'static str, problem: impl Into<String>) -> Self {
        Self { field, problem: problem.into() }
    }
}

/// What `--help` and `--version` say of a binary.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// Name of the binary.
    pub name: &'static str,
    /// One sentence.
    pub about: &'static str,
}

/// Where the value of a field came from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    Default,
    File(String),
    Environment(String),
    Flag(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("not given"),
            Self::File(path) => write!(f, "file {path}"),
            Self::Environment(variable) => write!(f, "environment variable {variable}"),
            Self::Flag(flag) => write!(f, "flag {flag}"),
        }
    }
}

/// Why there are no options to run with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line is wrong, or asked for help or the version.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    /// One line for each problem, with the source and the field.
    #[error("{}", .0.join("\n"))]
    Invalid(Vec<String>),
}

/// What the command line asked for.
#[derive(Debug)]
pub enum Outcome<C> {
    /// Run with these.
    Run(C),
    /// Print this TOML (`--dump-config`) and exit.
    Dump(String),
}

/// The options of this process; for `main`. Prints and exits on `--help`, `--version` and `--dump-config` (status 0) and on errors (status 2).
pub fn load<C: Options>(program: Program) -> C {
    let outcome = parse(program, std::env::args_os(), |name| std::env::var_os(name));
    match outcome {
        Ok(Outcome::Run(options)) => options,
        Ok(Outcome::Dump(text)) => {
            print!("{text}");
            std::process::exit(0)
        }
        Err(Error::Usage(error)) => error.exit(),
        Err(Error::Invalid(problems)) => {
            for problem in problems {
                eprintln!("{}: {problem}", program.name);
            }
            std::process::exit(2)
        }
    }
}

/// As [`load`], without touching the process. `args` begins with the name of the program.
pub fn parse<C: Options>(
    program: Program,
    args: impl IntoIterator<Item = OsString>,
    environment: impl Fn(&str) -> Option<OsString>,
) -> Result<Outcome<C>, Error> {
    // An empty variable counts as absent: deployment templates leave such behind.
    let environment = |name: &str| environment(name).filter(|value| !value.is_empty());
    let fields = fields::<C>();
    let flags = command::<C>(program, &fields).try_get_matches_from(args)?;

    let mut problems = Vec::new();
    let mut sources = BTreeMap::new();
    let mut options = C::default();
    let file =
        flags.get_one::<OsString>("config").cloned().or_else(|| environment("DOWNPOUR_CONFIG"));
    if let Some(path) = file {
        let path = path.to_string_lossy().into_owned();
        match read_file(&path, &fields) {
            Ok((read, keys)) => {
                options = read;
                sources.extend(keys.into_iter().map(|key| (key, Source::File(path.clone()))));
            }
            Err(found) => {
                problems.extend(found.into_iter().map(|problem| format!("file {path}: {problem}")));
            }
        }
    }
    for field in &fields {
        let variable = format!("DOWNPOUR_{}", field.to_uppercase());
        let Some(value) = environment(&variable) else { continue };
        match set_from_text(&mut options, field, value) {
            Ok(()) => drop(sources.insert(field.clone(), Source::Environment(variable))),
            Err(problem) => problems.push(format!("environment variable {variable}: {problem}")),
        }
    }
    options.update_from_arg_matches(&flags)?;
    for field in fields.iter().filter(|field| flags.contains_id(field)) {
        sources.insert(field.clone(), Source::Flag(flag_of(field)));
    }

    // With a layer missing, what the options lack says nothing.
    if problems.is_empty() {
        problems.extend(options.problems().into_iter().map(|Problem { field, problem }| {
            let source = sources.get(field).unwrap_or(&Source::Default);
            format!(
                "{field} {problem} ({source}; set it with {}, DOWNPOUR_{} or in the file)",
                flag_of(field),
                field.to_uppercase()
            )
        }));
    }
    if !problems.is_empty() {
        return Err(Error::Invalid(problems));
    }
    if flags.get_flag("dump-config") {
        return Ok(Outcome::Dump(toml::to_string(&table(&options)).expect("a TOML table is TOML")));
    }
    Ok(Outcome::Run(options))
}

fn flag_of(field: &str) -> String {
    format!("--{}", field.replace('_', "-"))
}

/// Names of all fields, those of flattened structs too.
fn fields<C: Options>() -> Vec<String> {
    let command = C::augment_args_for_update(Command::new("fields"));
    command.get_arguments().map(|arg| arg.get_id().to_string()).collect()
}

fn table<C: Serialize>(options: &C) -> Table {
    Table::try_from(options).expect("options are a struct of TOML values")
}

/// The command line: every field with its variable and default named in the help, and the two flags that every binary has.
fn command<C: Options>(program: Program, fields: &[String]) -> Command {
    let defaults = table(&C::default());
    let mut command = C::augment_args_for_update(
        Command::new(program.name).about(program.about).version(env!("CARGO_PKG_VERSION")),
    );
    for field in fields {
        let mut note = format!(" [env: DOWNPOUR_{}]", field.to_uppercase());
        if let Some(value) = defaults.get(field).map(default_text).filter(|text| !text.is_empty()) {
            note += &format!(" [default: {value}]");
        }
        command = command.mut_arg(field, |arg| {
            assert!(
                matches!(arg.get_action(), ArgAction::Set | ArgAction::Append)
                    && arg.get_default_values().is_empty(),
                "option {field}: a default of clap would override the file",
            );
            let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
            let long_help = arg.get_long_help().map(ToString::to_string);
            let arg = arg.help(format!("{help}{note}"));
            match long_help {
                Some(long_help) => arg.long_help(format!("{long_help}{note}")),
                None => arg,
            }
        });
    }
    command
        .arg(
            Arg::new("config")
                .long("config")
                .value_name("FILE")
                .value_parser(clap::value_parser!(OsString))
                .help("TOML file with any of these options, dashes as underscores [env: DOWNPOUR_CONFIG]"),
        )
        .arg(
            Arg::new("dump-config")
                .long("dump-config")
                .action(ArgAction::SetTrue)
                .help("Print the resulting options as TOML and exit"),
        )
}

fn default_text(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Array(values) => values.iter().map(default_text).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// The defaults overlaid with a file, and the keys that the file has; or every problem of the file.
fn read_file<C: Options>(path: &str, fields: &[String]) -> Result<(C, Vec<String>), Vec<String>> {
    let text = std::fs::read_to_string(path).map_err(|error| vec![error.to_string()])?;
    let file: Table = toml::from_str(&text).map_err(|error| vec![error.to_string()])?;
    let mut merged = table(&C::default());
    let mut problems = Vec::new();
    for (key, value) in &file {
        if !fields.contains(key) {
            problems.push(format!("unknown option {key}"));
            continue;
        }
        // Alone over the defaults, so that an error has a name: serde loses it in flattened structs.
        let previous = merged.insert(key.clone(), value.clone());
        if let Err(error) = merged.clone().try_into::<C>() {
            problems.push(format!("{key}: {}", error.message()));
            match previous {
                Some(previous) => drop(merged.insert(key.clone(), previous)),
                None => drop(merged.remove(key)),
            }
        }
    }
    match merged.try_into() {
        Ok(options) if problems.is_empty() => Ok((options, file.keys().cloned().collect())),
        Ok(_) => Err(problems),
        Err(error) => Err(vec![error.message().to_owned()]),
    }
}

/// Sets one field the way its flag would.
fn set_from_text<C: Options>(options: &mut C, field: &str, value: OsString) -> Result<(), String> {
    let mut flag = OsString::from(flag_of(field));
    flag.push("=");
    flag.push(value);
    let command = C::augment_args_for_update(Command::new("environment").no_binary_name(true));
    command
        .try_get_matches_from([flag])
        .and_then(|matches| options.update_from_arg_matches(&matches))
        .map_err(|error| {
            let text = error.to_string();
            text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
        })
}
