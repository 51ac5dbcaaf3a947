//! A slow network in front of a server that is started with `--advertise 127.0.0.1:7999`:
//!
//!     cargo run -p downpour-chaos-tests --example slow_network -- 127.0.0.1:7999 127.0.0.1:7171 10
//!
//! gives every byte to and from 127.0.0.1:7171 a delay of 10 ms, until it is killed.

use std::time::Duration;

use anyhow::{Context as _, bail};
use downpour_chaos_tests::proxy::Proxy;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [listen, target, delay_ms] = arguments.as_slice() else {
        bail!("usage: slow_network LISTEN TARGET MILLISECONDS");
    };
    let delay = Duration::from_millis(delay_ms.parse().context("MILLISECONDS")?);
    let proxy = Proxy::start(listen, delay)?;
    proxy.forward_to(target);
    loop {
        std::thread::park();
    }
}
