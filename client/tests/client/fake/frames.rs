//! The fake server on connections of frames, beside gRPC on the same port.

use std::io;

use bytes::{Buf, BytesMut};
use downpour_proto::frame::{self, Frame, HELLO_BYTES, Hello, Kind, MAGIC};
use downpour_proto::gather::{Gather, Segments};
use downpour_proto::v1::shard_server::Shard;
use downpour_proto::v1::{Failure, PullRequest, PushRequest};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tonic::{Request, Status};

use super::shard::{Server, handle};

/// Accepts for both: what is not a connection of frames goes to `grpc`.
pub(crate) async fn accept(
    listener: TcpListener,
    server: Server,
    grpc: mpsc::Sender<io::Result<TcpStream>>,
) {
    while let Ok((stream, _)) = listener.accept().await {
        let (server, grpc) = (server.clone(), grpc.clone());
        tokio::spawn(async move {
            stream.set_nodelay(true).expect("a socket");
            let mut first = [0];
            if stream.peek(&mut first).await.is_ok_and(|read| read == 1) {
                if first[0] == MAGIC[0] {
                    _ = serve(stream, server).await;
                } else {
                    _ = grpc.send(Ok(stream)).await;
                }
            }
        });
    }
}

async fn serve(mut stream: TcpStream, server: Server) -> io::Result<()> {
    let mut received = BytesMut::new();
    let mut greeted = false;
    loop {
        if stream.read_buf(&mut received).await? == 0 {
            return Ok(());
        }
        if !greeted && let Some(hello) = received.first_chunk() {
            Hello::from_bytes(*hello).expect("a client says hello");
            received.advance(HELLO_BYTES);
            greeted = true;
        }
        while greeted && let Ok(Frame { kind, request, body }) = take(&mut received) {
            let answered = match kind {
                Kind::Pull => {
                    let pull = PullRequest::decode(body).expect("a pull");
                    let reply = server.pull(Request::new(pull)).await;
                    match reply {
                        Ok(reply) => {
                            answer(&mut stream, Kind::Pulled, request, &reply.into_inner()).await
                        }
                        Err(status) => fail(&mut stream, request, &status).await,
                    }
                }
                Kind::Push => {
                    let push = PushRequest::decode(body).expect("a push");
                    match handle(&server.cluster, server.server, &push) {
                        Ok(_) if server.cluster.state.lock().hold_replies => Ok(()),
                        Ok(reply) => answer(&mut stream, Kind::Pushed, request, &reply).await,
                        Err(status) => {
                            fail(&mut stream, request, &status).await?;
                            return Ok(());
                        }
                    }
                }
                _ => panic!("a client sends no {kind:?}"),
            };
            answered?;
        }
    }
}

fn take(received: &mut BytesMut) -> Result<Frame, usize> {
    frame::take(received).expect("a client sends frames")
}

async fn answer(
    stream: &mut TcpStream,
    kind: Kind,
    request: u64,
    reply: &impl Gather,
) -> io::Result<()> {
    let mut segments = Segments::default();
    segments.frame(kind, request, reply);
    stream.write_all_buf(segments.outgoing()).await
}

async fn fail(stream: &mut TcpStream, request: u64, status: &Status) -> io::Result<()> {
    let failure = Failure { code: status.code() as u32, message: status.message().into() };
    answer(stream, Kind::Failed, request, &failure).await
}
