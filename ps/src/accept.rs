//! One port for both ways to reach this server: gRPC, and frames on plain TCP. A connection's first byte tells which.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use downpour_proto::frame::MAGIC;
use downpour_proto::transport::tune;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use crate::frames;
use crate::life::Process;
use crate::membership::Current;
use crate::threads::DataThreads;

/// A connection that says nothing for this long is closed.
const FIRST_BYTE_PATIENCE: Duration = Duration::from_secs(10);
/// After an accept that failed for want of descriptors, for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Who takes accepted connections.
#[derive(Clone)]
pub(crate) struct Takers {
    pub(crate) process: Arc<Process>,
    pub(crate) current: Current,
    pub(crate) threads: Arc<DataThreads>,
    pub(crate) grpc: mpsc::Sender<io::Result<TcpStream>>,
}

/// Accepts until the process stops.
pub(crate) async fn run(listener: TcpListener, takers: Takers) {
    let token = takers.process.shutdown.token();
    let accepting = async {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let takers = takers.clone();
                    let token = token.clone();
                    takers.process.clone().shutdown.spawn("new connection", async move {
                        token.run_until_cancelled(takers.deal(stream)).await;
                    });
                }
                Err(error) => {
                    warn!(%error, "a connection could not be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    token.run_until_cancelled(accepting).await;
}

impl Takers {
    async fn deal(&self, stream: TcpStream) {
        let mut first = [0];
        match timeout(FIRST_BYTE_PATIENCE, stream.peek(&mut first)).await {
            Ok(Ok(1)) => {}
            // It left, or a probe that only looks whether somebody listens.
            _ => return,
        }
        let dealt = tune(&stream).and_then(|()| {
            if first[0] != MAGIC[0] {
                // Full or closed: nobody serves gRPC any more, or it is flooded.
                return self.grpc.try_send(Ok(stream)).map_err(io::Error::other);
            }
            let (process, current) = (Arc::clone(&self.process), Arc::clone(&self.current));
            self.threads.spawn(stream, |stream| frames::serve(process, current, stream))
        });
        if let Err(error) = dealt {
            debug!(%error, "connection refused");
        }
    }
}
