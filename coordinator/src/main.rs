//! The coordinator's process.

use std::process::ExitCode;

use downpour_coordinator::Config;
use downpour_node::config::{self, Program};
use downpour_node::process::{self, Node};

const PROGRAM: Program = Program {
    name: "downpour-coordinator",
    about: "A member of the control plane of Downpour: it knows where every shard of every job lives",
};

async fn serve(config: Config, node: Node) -> anyhow::Result<()> {
    let Config { ref common, .. } = config;
    let listener = downpour_node::listen::bind("listen", &common.listen, common.insecure).await?;
    downpour_coordinator::run(config, listener, node).await
}

fn main() -> ExitCode {
    let config: Config = config::load(PROGRAM);
    let common = config.common.clone();
    process::run(PROGRAM.name, &common, move |node| serve(config, node))
}
