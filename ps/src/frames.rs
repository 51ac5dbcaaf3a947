//! Serves one connection of frames (`downpour_proto::frame`): the same requests as the `Shard` service, by the same code, and the logs of other servers.

use std::io;
use std::pin::Pin;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use downpour_proto::frame::{self, Frame, Kind};
use downpour_proto::gather::{Gather, Segments};
use downpour_proto::net::TcpStream;
use downpour_proto::{Invalid, v1};
use futures::future::FutureExt;
use futures::stream::{FuturesOrdered, StreamExt};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Status;
use tracing::debug;

use crate::bounded::{self, PULL, PUSH, REPLICATE};
use crate::life::Process;
use crate::membership::Current;
use crate::{pull, push, replica};

/// Room that is kept for what arrives next.
const READ_BYTES: usize = 256 << 10;

/// Why a connection ended early.
#[derive(Debug, Error)]
enum Broken {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Invalid(#[from] Invalid),
}

struct Connection {
    process: Arc<Process>,
    current: Current,
    stream: TcpStream,
    received: BytesMut,
    /// Memory of pulled values.
    values: BytesMut,
    segments: Segments,
    /// Pushes that wait for the backups, in their order.
    waiting: FuturesOrdered<Pin<Box<dyn Future<Output = Reply> + Send>>>,
}

/// An answer and the number of its request.
struct Reply {
    request: u64,
    reply: v1::PushReply,
}

/// Serves a connection after its hello, until the client leaves, sends what is no request, or the process stops.
pub(crate) async fn serve(process: Arc<Process>, current: Current, stream: TcpStream) {
    let token = process.shutdown.token();
    let mut connection = Connection {
        process,
        current,
        stream,
        received: BytesMut::with_capacity(READ_BYTES),
        values: BytesMut::new(),
        segments: Segments::default(),
        waiting: FuturesOrdered::new(),
    };
    if let Some(Err(broken)) = token.run_until_cancelled(connection.run()).await {
        debug!(%broken, "connection ended");
    }
}

impl Connection {
    async fn run(&mut self) -> Result<(), Broken> {
        loop {
            let missing = self.requests().await?;
            self.flush().await?;
            let full = self.waiting.len() >= self.process.config.push_requests_max;
            self.received.reserve(missing.max(READ_BYTES));
            tokio::select! {
                Some(Reply { request, reply }) = self.waiting.next() => {
                    self.segments.frame(Kind::Pushed, request, &reply);
                }
                read = self.stream.read_buf(&mut self.received), if !full => {
                    if read? == 0 {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Takes the requests that have arrived whole. Returns how many bytes the next one lacks.
    async fn requests(&mut self) -> Result<usize, Broken> {
        while self.waiting.len() < self.process.config.push_requests_max {
            let frame = match frame::take(&mut self.received) {
                Ok(Ok(frame)) => frame,
                Ok(Err(missing)) => return Ok(missing),
                Err(invalid) => {
                    self.fail(0, &invalid.clone().into()).await?;
                    return Err(invalid.into());
                }
            };
            let Frame { kind, request, body } = frame;
            match kind {
                Kind::Pull => match self.pull(body).await {
                    Ok(reply) => self.answer(Kind::Pulled, request, &reply).await?,
                    Err(status) => self.fail(request, &status).await?,
                },
                Kind::Push => {
                    if let Err(status) = self.push(request, body).await {
                        // What follows would be a gap.
                        self.fail(request, &status).await?;
                        return Err(Invalid::new("push", status.message()).into());
                    }
                }
                Kind::Replicate => match self.replicate(body).await {
                    Ok(reply) => self.segments.frame(Kind::Replicated, request, &reply),
                    Err(status) => {
                        self.fail(request, &status).await?;
                        return Err(Invalid::new("records", status.message()).into());
                    }
                },
                Kind::Pulled | Kind::Pushed | Kind::Replicated | Kind::Failed => {
                    let invalid = Invalid::new("frame.kind", "is that of an answer");
                    self.fail(request, &invalid.clone().into()).await?;
                    return Err(invalid.into());
                }
            }
        }
        Ok(0)
    }

    async fn pull(&mut self, body: Bytes) -> Result<v1::PullReply, Status> {
        let _timer = self.process.metrics.pull_seconds.start_timer();
        let request = bounded::decode(PULL, body)?;
        let life = self.current.load_full();
        pull::answer(life.as_ref(), request, &mut self.values).await
    }

    async fn replicate(&mut self, body: Bytes) -> Result<v1::ReplicateReply, Status> {
        replica::take(&self.current, bounded::decode(REPLICATE, body)?).await
    }

    async fn push(&mut self, request: u64, body: Bytes) -> Result<(), Status> {
        let message = bounded::decode(PUSH, body)?;
        let taken = push::take(&self.process, &self.current, message).await?;
        let process = Arc::clone(&self.process);
        let settled = async move { Reply { request, reply: taken.settle(&process).await } };
        self.waiting.push_back(Box::pin(settled));
        // Without backups it is settled already.
        while let Some(Some(Reply { request, reply })) = self.waiting.next().now_or_never() {
            self.segments.frame(Kind::Pushed, request, &reply);
        }
        Ok(())
    }

    async fn answer(&mut self, kind: Kind, request: u64, reply: &impl Gather) -> io::Result<()> {
        self.segments.frame(kind, request, reply);
        self.flush().await
    }

    async fn fail(&mut self, request: u64, status: &Status) -> io::Result<()> {
        let code = status.code() as i32 as u32;
        let failure = v1::Failure { code, message: status.message().to_owned() };
        self.answer(Kind::Failed, request, &failure).await
    }

    async fn flush(&mut self) -> io::Result<()> {
        self.stream.write_all_buf(self.segments.outgoing()).await
    }
}
