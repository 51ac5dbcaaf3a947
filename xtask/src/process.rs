//! Child processes: the compiler and the programs that it built.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{Result, libtorch};

/// `cargo`, in the root of the repository.
pub(crate) fn cargo(root: &Path) -> Command {
    command(root, std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// A program in the root of the repository, with the environment that a person's own would have.
///
/// `cargo run`, which started this program, exports the `[env]` of `.cargo/config.toml` and the
/// package it runs. With those left in place a build started here and one started by hand would
/// differ in their environment, and build scripts would run again at each change between them.
pub(crate) fn command(root: &Path, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root);
    for (name, _) in std::env::vars_os() {
        let package = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"];
        if name.to_str().is_some_and(|name| package.iter().any(|prefix| name.starts_with(prefix))) {
            command.env_remove(name);
        }
    }
    if libtorch::exported(root).is_none() {
        command.env_remove("LIBTORCH");
    }
    command
}

/// Runs it to its end; anything but success is an error that shows the command line.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().map_err(|error| format!("{}: {error}", line(command)))?;
    if status.success() { Ok(()) } else { Err(format!("{status} from: {}", line(command))) }
}

/// As [`run`], with the child's stdout on our stderr: ours carries data alone.
pub(crate) fn run_to_stderr(command: &mut Command) -> Result<()> {
    use std::os::fd::AsFd;
    let stderr = std::io::stderr().as_fd().try_clone_to_owned();
    run(command.stdout(stderr.map_or_else(|_| Stdio::null(), Stdio::from)))
}

/// Becomes the other program, so that signals and the exit status are its own.
pub(crate) fn exec(command: &mut Command) -> Result<()> {
    use std::os::unix::process::CommandExt;
    let error = command.exec();
    Err(format!("{}: {error}", line(command)))
}

/// Where `cargo build --profile <profile>` puts binaries: beside the folder of this one, which
/// holds for CARGO_TARGET_DIR and every other way of moving the target directory.
pub(crate) fn binaries(profile: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().map_err(|error| format!("find own binary: {error}"))?;
    let target =
        own.parent().and_then(Path::parent).ok_or("own binary is not in a target folder")?;
    Ok(target.join(profile))
}

fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_is_shown_with_its_status() {
        let error = run(Command::new("sh").args(["-c", "exit 3"])).unwrap_err();
        assert!(error.contains('3') && error.contains("sh -c exit 3"), "{error}");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = run(&mut Command::new("no-such-program")).unwrap_err();
        assert!(error.contains("no-such-program"), "{error}");
    }
}
