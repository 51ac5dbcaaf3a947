//! Lets every binary, test, example and doc test of this package find LibTorch without
//! LD_LIBRARY_PATH.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    // `.cargo/config.toml` has a default. Whoever builds with LIBTORCH_USE_PYTORCH instead sets
    // the loader's path too.
    if let Ok(prefix) = std::env::var("LIBTORCH") {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{prefix}/lib");
    }
}
