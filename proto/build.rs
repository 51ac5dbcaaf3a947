//! Compiles the `.proto` files without an installed `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["types", "coordinator", "raft", "shard", "replica"]
        .map(|name| format!("downpour/v1/{name}.proto"));
    for file in &files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(&files, ["."])?;
    // `bytes` fields become `Bytes`: slices of the receive buffer, not copies.
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
