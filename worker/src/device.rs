//! Where a model computes: `cpu`, `cuda`, `cuda:1` or `auto`.
//!
//! The binary links LibTorch's CPU library only, so that one binary runs everywhere. For a GPU it loads `libtorch_cuda.so` at run
//! time, from a PyTorch of the same version (2.11.0): from the folder in `DOWNPOUR_TORCH_LIB`, or else from the `torch` package of
//! the `python3` on the PATH.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use tch::Device;

use crate::{Error, Result};

/// What a user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The CPU.
    #[default]
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
    /// A GPU where one can be used, otherwise the CPU.
    Auto,
}

/// The folder of `libtorch_cuda.so`.
pub const TORCH_LIB: &str = "DOWNPOUR_TORCH_LIB";

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(Choice::Cpu),
            None if text == "auto" => Ok(Choice::Auto),
            None if text == "cuda" => Ok(Choice::Cuda(0)),
            Some(("cuda", number)) if number.parse::<usize>().is_ok() => {
                Ok(Choice::Cuda(number.parse().unwrap_or_default()))
            }
            _ => Err(format!("{text:?} is not a device: write cpu, cuda, cuda:1 or auto")),
        }
    }
}

impl Choice {
    /// The device, with CUDA loaded where it is needed. Call it before anything else of LibTorch, which looks for CUDA only once.
    pub fn device(self) -> Result<Device> {
        match self {
            Choice::Cpu => Ok(Device::Cpu),
            Choice::Cuda(number) => cuda(number),
            Choice::Auto => Ok(cuda(0).unwrap_or_else(|why_not| {
                tracing::info!("computing on the CPU: {why_not}");
                Device::Cpu
            })),
        }
    }
}

fn cuda(number: usize) -> Result<Device> {
    // LibTorch looks for CUDA once, at the first question about it, and remembers the answer: so load first and ask then.
    let loaded = load_cuda();
    let count = tch::Cuda::device_count();
    if !tch::Cuda::is_available() || count <= 0 {
        loaded?;
        return Err(Error::usage(
            "cuda: libtorch_cuda.so is loaded and finds no GPU; check `nvidia-smi`, or use --device cpu",
        ));
    }
    if number as i64 >= count {
        return Err(Error::usage(format!(
            "cuda:{number}: this machine has {count} GPUs, from cuda:0"
        )));
    }
    Ok(Device::Cuda(number))
}

fn load_cuda() -> Result<()> {
    let folder = match std::env::var_os(TORCH_LIB) {
        Some(folder) => PathBuf::from(folder),
        None => folder_of_python().ok_or_else(|| {
            Error::usage(format!(
                "cuda: no PyTorch found: set {TORCH_LIB} to the `torch/lib` folder of PyTorch 2.11.0 with CUDA, \
                 or put a python3 that has it on the PATH"
            ))
        })?,
    };
    // Registers itself with the LibTorch that is loaded already, so its own dependencies resolve to that one by their names.
    load(&folder, "libc10_cuda.so")?;
    load(&folder, "libtorch_cuda.so")
}

/// Where `python3` would import `torch` from, without importing it (which takes seconds).
fn folder_of_python() -> Option<PathBuf> {
    const FIND: &str = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0])";
    let output = Command::new("python3").args(["-c", FIND]).output().ok()?;
    let package = String::from_utf8(output.stdout).ok()?;
    (output.status.success()).then(|| Path::new(package.trim()).join("lib"))
}

#[allow(unsafe_code, reason = "loading a library runs its code; there is no other way to it")]
fn load(folder: &Path, name: &str) -> Result<()> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    let path = folder.join(name);
    // SAFETY: loading runs the library's initialisers. These are PyTorch's own, made to be loaded into a process with LibTorch.
    let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) };
    match library {
        Ok(library) => {
            // For the life of the process: LibTorch keeps pointers into it.
            std::mem::forget(library);
            Ok(())
        }
        Err(error) => Err(Error::usage(format!(
            "cuda: cannot load {}: {}; it must belong to PyTorch 2.11.0 (set {TORCH_LIB})",
            path.display(),
            std::error::Error::source(&error)
                .map_or_else(|| error.to_string(), ToString::to_string)
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_read_as_pytorch_writes_it() {
        assert_eq!("cuda:3".parse(), Ok(Choice::Cuda(3)));
        assert_eq!("cuda".parse(), Ok(Choice::Cuda(0)));
        assert_eq!("auto".parse(), Ok(Choice::Auto));
        for wrong in ["gpu", "cuda:", "cuda:-1", "cpu:0", ""] {
            assert!(wrong.parse::<Choice>().unwrap_err().contains("auto"), "{wrong:?}");
        }
    }
}
