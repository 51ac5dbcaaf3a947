//! `psctl`: the operator's command line.
//!
//! Each leaf command is a file `commands/<noun>/<verb>.rs` with its arguments and a `run`. What a cluster says is turned into
//! [`model`]s, which are the JSON that scripts see and the rows of the tables that people see ([`output`]).
//! stdout carries data, stderr everything else. Exit status: 0 done, 1 failed, 2 wrong usage, 3 a condition that was asked for
//! does not hold.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;

mod cli;
mod commands;
mod model;
mod output;
mod plan;

fn main() -> ExitCode {
    match cli::Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("psctl: {error:#}");
            match error.downcast_ref() {
                Some(cli::Exit::Usage(_)) => ExitCode::from(2),
                Some(cli::Exit::Condition(_)) => ExitCode::from(3),
                None => ExitCode::FAILURE,
            }
        }
    }
}
