//! One port for both ways to reach this server: gRPC, and frames on plain TCP. A connection's first byte tells which.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use downpour_proto::frame::{HELLO_BYTES, Hello, MAGIC};
use downpour_proto::net::{TcpListener, TcpStream, peek};
use downpour_proto::transport::tune;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use crate::frames;
use crate::life::Process;
use crate::membership::Current;

/// A connection that says nothing for this long is closed.
const FIRST_BYTES_PATIENCE: Duration = Duration::from_secs(10);
/// After an accept that failed for want of descriptors, for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Who takes accepted connections.
#[derive(Clone)]
pub(crate) struct Takers {
    pub(crate) process: Arc<Process>,
    pub(crate) current: Current,
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
    async fn deal(&self, mut stream: TcpStream) {
        let mut first = [0];
        match timeout(FIRST_BYTES_PATIENCE, peek(&mut stream, &mut first)).await {
            Ok(Ok(1)) => {}
            // It left, or a probe that only looks whether somebody listens.
            _ => return,
        }
        let taken = match tune(&stream) {
            Ok(()) if first[0] == MAGIC[0] => self.take_frames(stream).await,
            // Full or closed: gRPC is flooded, or nobody serves it any more.
            Ok(()) => self.grpc.try_send(Ok(stream)).map_err(io::Error::other),
            Err(error) => Err(error),
        };
        if let Err(error) = taken {
            debug!(%error, "connection refused");
        }
    }

    async fn take_frames(&self, mut stream: TcpStream) -> io::Result<()> {
        let mut hello = [0; HELLO_BYTES];
        timeout(FIRST_BYTES_PATIENCE, stream.read_exact(&mut hello)).await??;
        let hello = Hello::from_bytes(hello).map_err(io::Error::other)?;
        let (process, current) = (Arc::clone(&self.process), Arc::clone(&self.current));
        self.process.threads.spawn(hello, stream, |stream| frames::serve(process, current, stream))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;
    use crate::hostile::serving;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn the_first_bytes_tell_where_a_connection_goes() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("bound");
        let (life, current) = serving();
        let process = Arc::clone(&life.process);
        let (grpc, mut accepted) = mpsc::channel(1);
        let takers = Takers { process: Arc::clone(&process), current, grpc };
        tokio::spawn(run(listener, takers));

        let mut http = TcpStream::connect(address).await.expect("connect");
        http.write_all(b"PRI * HTTP/2.0").await.expect("send");
        let taken = timeout(PATIENCE, accepted.recv()).await.expect("in time");
        let mut first = [0; 3];
        let mut taken = taken.expect("open").expect("a connection");
        taken.read_exact(&mut first).await.expect("nothing of it was taken");
        assert_eq!(&first, b"PRI");

        let mut stranger = TcpStream::connect(address).await.expect("connect");
        stranger.write_all(b"DOWNPOU9 quite another").await.expect("send");
        let end = timeout(PATIENCE, stranger.read(&mut first)).await.expect("in time");
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");

        let mut framed = TcpStream::connect(address).await.expect("connect");
        framed.write_all(&Hello { session: 7, lane: 1 }.to_bytes()).await.expect("send");
        framed.write_all(&[0xff; 16]).await.expect("send");
        // What follows the hello is no frame, and that is what the answer is about.
        let mut answer = Vec::new();
        _ = timeout(PATIENCE, framed.read_to_end(&mut answer)).await.expect("in time");
        assert!(answer.windows(11).any(|bytes| bytes == b"frame.kind:"), "{answer:?}");
        process.shutdown.token().cancel();
    }
}
