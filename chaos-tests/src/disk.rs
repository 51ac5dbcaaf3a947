//! Small disks for coordinators, which can be filled, and files that can be damaged.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Several times what the log of a coordinator takes in a run.
const SIZE: &str = "128m";
const BALLAST: &str = "ballast";

/// A file system of its own at a directory. Dropped, it is unmounted.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts an empty one.
    ///
    /// # Errors
    /// This process may not.
    pub fn mount(at: &Path) -> Result<Self> {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={SIZE}"), "downpour-chaos"]).arg(at);
        let output = mount.output().context("run mount")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "mount a small disk at {}: {said}", at.display());
        Ok(Self(at.to_owned()))
    }

    /// Leaves no room on it.
    ///
    /// # Errors
    /// It cannot be written for another reason.
    pub fn fill(&self) -> Result<()> {
        let mut ballast = File::create(self.0.join(BALLAST)).context("make a ballast")?;
        for size in [1 << 20, 1 << 12, 1] {
            let block = vec![0; size];
            loop {
                match ballast.write_all(&block) {
                    Ok(()) => {}
                    Err(error) if error.kind() == ErrorKind::StorageFull => break,
                    Err(error) => return Err(error).context("fill a disk"),
                }
            }
        }
        Ok(())
    }

    /// Makes room again.
    ///
    /// # Errors
    /// The system does not let it.
    pub fn free(&self) -> Result<()> {
        fs::remove_file(self.0.join(BALLAST)).context("remove the ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process that is just dying may still hold a file.
        match Command::new("umount").arg("--lazy").arg(&self.0).status() {
            Ok(status) if status.success() => {}
            _ => eprintln!("{} is still mounted: umount it", self.0.display()),
        }
    }
}

/// Whether this process may mount: found out by doing it, for a right that the kernel grants may still be withheld by a container.
#[must_use]
pub fn may_mount() -> bool {
    let trial = std::env::temp_dir().join(format!("downpour-mount-{}", std::process::id()));
    let mounted = fs::create_dir_all(&trial).is_ok() && SmallDisk::mount(&trial).is_ok();
    // An empty directory that cannot be removed is no reason to fail.
    _ = fs::remove_dir(&trial);
    mounted
}

/// Flips a bit of what a coordinator wrote below `directory`, at a place that `draw` chooses; gives the file.
///
/// # Errors
/// There is nothing that could be damaged.
pub fn damage(directory: &Path, draw: u64) -> Result<PathBuf> {
    let path = directory.join("log/db");
    let mut file = OpenOptions::new().read(true).write(true).open(&path);
    let file =
        file.as_mut().map_err(|error| anyhow::anyhow!("open {}: {error}", path.display()))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    // Most of the file is room that nobody reads: damage a byte that says something.
    let written: Vec<usize> = (0..bytes.len()).filter(|&at| bytes[at] != 0).collect();
    ensure!(!written.is_empty(), "{} is empty", path.display());
    let at = written[draw as usize % written.len()];
    file.seek(SeekFrom::Start(at as u64))?;
    file.write_all(&[bytes[at] ^ 0x40])?;
    file.sync_all()?;
    Ok(path)
}
