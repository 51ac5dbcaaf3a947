//! `downpour-ps`: a parameter server; as `downpour-ps bench-table`, a benchmark of its tables.

use std::process::ExitCode;

use downpour_node::config::{self, Program};
use downpour_node::{listen, process};
use downpour_ps::{Config, bench_table, run};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == "bench-table") {
        return bench_table(arguments);
    }
    let program = Program {
        name: "downpour-ps",
        about: "A parameter server of Downpour: holds shards, applies pushes, answers pulls (`downpour-ps bench-table --help`: measures its tables)",
    };
    let config: Config = config::load(program);
    let common = config.common.clone();
    process::run("downpour-ps", &common, move |node| async move {
        let listener =
            listen::bind("listen", &config.common.listen, config.common.insecure).await?;
        run(config, listener, node).await
    })
}
