//! Lets every binary, test, example and doc test of this package find LibTorch without
//! LD_LIBRARY_PATH, and says what to do where there is none.

use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    println!("cargo::rerun-if-env-changed=LIBTORCH_USE_PYTORCH");
    if std::env::var_os("LIBTORCH_USE_PYTORCH").is_some() {
        return; // Whoever asks for an installed PyTorch sets the loader's path as well.
    }
    // `.cargo/config.toml` has a default for builds in this repository.
    let Ok(prefix) = std::env::var("LIBTORCH") else {
        println!("cargo::error=LIBTORCH must name the folder of LibTorch 2.11.0");
        return;
    };
    let library = Path::new(&prefix).join("lib/libtorch_cpu.so");
    println!("cargo::rerun-if-changed={}", library.display());
    if !library.exists() {
        println!(
            "cargo::error=no LibTorch in {prefix}: run `cargo xtask libtorch`, or set LIBTORCH"
        );
    }
    println!("cargo::rustc-link-arg=-Wl,-rpath,{prefix}/lib");
}
