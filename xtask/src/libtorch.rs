//! Gets LibTorch: the headers and the two libraries that `torch-sys` needs, out of PyPI's wheels.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::wheels::{self, Keep, Package, Wheel};
use crate::{Result, process};

/// The version that `tch` 0.24.0 belongs to. The wheel is the CUDA one, whose `libtorch_cpu.so`
/// loads the two small CUDA libraries, GPU or not.
const LIBTORCH: Package = Package {
    name: "libtorch",
    wheels: &[
        Wheel {
            requirement: "torch==2.11.0",
            sha256: "0f68f4ac6d95d12e896c3b7a912b5871619542ec54d3649cf48cc1edd4dd2756",
        },
        Wheel {
            requirement: "nvidia-cuda-runtime==13.0.96",
            sha256: "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
        },
        Wheel {
            requirement: "nvidia-cuda-cupti==13.0.85",
            sha256: "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
        },
    ],
    keep: &[
        Keep { from: "torch/include/", to: "include/" },
        Keep { from: "torch/lib/libtorch_cpu.so", to: "lib/libtorch_cpu.so" },
        Keep { from: "torch/lib/libc10.so", to: "lib/libc10.so" },
        Keep { from: "torch/lib/libgomp.so.1", to: "lib/libgomp.so.1" },
        Keep { from: "nvidia/cu13/lib/libcudart.so.13", to: "lib/libcudart.so.13" },
        Keep { from: "nvidia/cu13/lib/libcupti.so.13", to: "lib/libcupti.so.13" },
        Keep { from: "torch-2.11.0.dist-info/licenses/", to: "licenses/" },
    ],
    announcement: "\
Getting LibTorch 2.11.0 from the Python package index into .cache/libtorch.
  download  544 MB (torch 531 MB, parts of CUDA 13 MB), checksums verified
  disk      1.6 GB while it runs, 0.5 GB afterwards
  time      about 20 s at 50 MB/s, 1 min at 10 MB/s, 9 min at 1 MB/s; once",
    finish: |prefix| {
        // `torch-sys` names libtorch.so when it links; nothing needs what is in it.
        let mut compiler = Command::new(std::env::var_os("CC").unwrap_or_else(|| "gcc".into()));
        compiler
            .args(["-shared", "-x", "c", "/dev/null", "-o"])
            .arg(prefix.join("lib/libtorch.so"));
        process::run_to_stderr(&mut compiler)
            .map_err(|error| format!("make an empty libtorch.so: {error}; is gcc installed?"))
    },
};

/// Makes sure that LibTorch is there and returns where.
pub(crate) fn ensure(root: &Path) -> Result<PathBuf> {
    match exported(root) {
        Some(prefix) => checked(prefix),
        None if wheels::SUPPORTED => LIBTORCH.ensure(root),
        None => Err("LibTorch is fetched for Linux on x86-64 alone: get LibTorch 2.11.0 from \
                     pytorch.org and export LIBTORCH with the path of its folder"
            .into()),
    }
}

/// The LIBTORCH that the user exported, as against the default that `.cargo/config.toml` gives.
pub(crate) fn exported(root: &Path) -> Option<PathBuf> {
    let prefix = PathBuf::from(std::env::var_os("LIBTORCH")?);
    (prefix != root.join(".cache").join(LIBTORCH.name)).then_some(prefix)
}

fn checked(prefix: PathBuf) -> Result<PathBuf> {
    let library = prefix.join("lib/libtorch_cpu.so");
    if library.exists() {
        return Ok(prefix);
    }
    Err(format!(
        "LIBTORCH is set to `{}` and `{}` is not there: correct LIBTORCH, or unset it to use the \
         LibTorch that `cargo xtask libtorch` fetches",
        prefix.display(),
        library.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtorch_is_pinned_by_version_and_content() {
        wheels::tests::assert_pinned(&LIBTORCH);
    }

    #[test]
    fn an_exported_libtorch_that_is_not_one_is_named() {
        let error = checked("/nonexistent/libtorch".into()).unwrap_err();
        assert!(error.contains("/nonexistent/libtorch/lib/libtorch_cpu.so"), "{error}");
    }
}
