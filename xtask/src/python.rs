//! Python packages that tests need: readers of safetensors and Parquet, a server that speaks S3, and the schemas of Kubernetes. In `.cache/python`, a folder for `PYTHONPATH`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Result, process};

/// Versions and checksums, as pip reads them.
const PINS: &str = include_str!("python.txt");

/// Makes sure that the packages are there and returns where.
pub(crate) fn ensure(root: &Path) -> Result<PathBuf> {
    let folder = root.join(".cache/python");
    let stamp = folder.join("stamp");
    if fs::read_to_string(&stamp).is_ok_and(|found| found == PINS) {
        return Ok(folder);
    }
    eprintln!("Getting Python packages for tests into .cache/python: 115 MB, once.");
    if folder.exists() {
        fs::remove_dir_all(&folder)
            .map_err(|error| format!("remove {}: {error}", folder.display()))?;
    }
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--require-hashes", "--only-binary=:all:"])
        .args(["--disable-pip-version-check", "--no-deps", "--root-user-action=ignore"])
        .arg("--target")
        .arg(&folder)
        .arg("--requirement")
        .arg(root.join("xtask/src/python.txt"));
    process::run_to_stderr(&mut pip).map_err(|error| {
        format!("{error}\nPython 3.11 to 3.13 with pip is needed (Debian, Ubuntu: `apt install python3-pip`)")
    })?;
    fs::write(&stamp, PINS).map_err(|error| format!("write {}: {error}", stamp.display()))?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_package_is_pinned_by_version_and_content() {
        let lines: Vec<_> = PINS.replace("\\\n", "").lines().map(str::to_owned).collect();
        for line in lines.iter().filter(|line| !line.starts_with('#')) {
            assert!(line.contains("==") && line.contains("--hash=sha256:"), "{line}");
        }
    }
}
