//! `downpour-ps`: a parameter server.

use std::process::ExitCode;

use downpour_node::config::{self, Program};
use downpour_node::{listen, process};
use downpour_ps::{Config, run};

fn main() -> ExitCode {
    let program = Program {
        name: "downpour-ps",
        about: "A parameter server of Downpour: holds shards, applies pushes, answers pulls",
    };
    let config: Config = config::load(program);
    let common = config.common.clone();
    process::run("downpour-ps", &common, move |node| async move {
        let listener =
            listen::bind("listen", &config.common.listen, config.common.insecure).await?;
        run(config, listener, node).await
    })
}
