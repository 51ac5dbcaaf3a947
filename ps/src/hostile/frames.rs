//! The same over a connection of frames.
// tidy: not simulated: tests.

use bytes::BytesMut;
use downpour_proto::frame::{self, Frame, HEADER_BYTES, Kind};
use downpour_proto::gather::{Gather, Segments};
use downpour_proto::transport::MESSAGE_BYTES_MAX;
use proptest::prelude::*;
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// A client that may say anything.
struct Client {
    stream: TcpStream,
    received: BytesMut,
}

impl Client {
    /// Connected to a server of its own, past the hello.
    async fn connect() -> Client {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let stream = TcpStream::connect(listener.local_addr().expect("bound")).await;
        let (served, _) = listener.accept().await.expect("accept");
        let (life, current) = serving();
        tokio::spawn(crate::frames::serve(Arc::clone(&life.process), current, served));
        Client { stream: stream.expect("connect"), received: BytesMut::new() }
    }

    async fn send(&mut self, bytes: &[u8]) {
        // A server that has refused reads no more.
        _ = self.stream.write_all(bytes).await;
    }

    /// The next answer, or nothing where the server closed the connection.
    async fn answer(&mut self) -> Option<Frame> {
        let read = async {
            loop {
                if let Ok(frame) = frame::take(&mut self.received).expect("a server sends frames") {
                    return Some(frame);
                }
                match self.stream.read_buf(&mut self.received).await {
                    Ok(0) | Err(_) => return None,
                    Ok(_) => {}
                }
            }
        };
        timeout(PATIENCE, read).await.expect("an answer or the end")
    }

    /// The next answer, which is a failure.
    async fn failure(&mut self) -> (u64, v1::Failure) {
        let Frame { kind, request, body } = self.answer().await.expect("an answer");
        assert_eq!(kind, Kind::Failed);
        (request, v1::Failure::decode(body).expect("a failure"))
    }

    async fn pulls(&mut self) -> Vec<f32> {
        self.send(&framed(Kind::Pull, 77, &a_pull())).await;
        let Frame { kind, request, body } = self.answer().await.expect("an answer");
        assert_eq!((kind, request), (Kind::Pulled, 77));
        let reply = v1::PullReply::decode(body).expect("a reply");
        let Some(PullResult::Pulled(pulled)) = &reply.parts[0].result else { panic!("{reply:?}") };
        downpour_core::tensor_bytes::floats(&pulled.rows[0]).collect()
    }
}

fn framed(kind: Kind, request: u64, message: &impl Gather) -> Vec<u8> {
    let mut segments = Segments::default();
    segments.frame(kind, request, message);
    let mut bytes = Vec::new();
    bytes::BufMut::put(&mut bytes, segments.outgoing());
    bytes
}

fn header(kind: Kind, body_bytes: usize) -> BytesMut {
    let mut header = BytesMut::new();
    frame::put_header(&mut header, kind, 5, body_bytes);
    header
}

#[tokio::test]
async fn pushes_and_pulls_arrive_one_byte_at_a_time_or_many_at_once() {
    let mut client = Client::connect().await;
    for byte in framed(Kind::Push, 3, &a_push()) {
        client.send(&[byte]).await;
    }
    let Frame { kind, request, body } = client.answer().await.expect("an answer");
    assert_eq!((kind, request), (Kind::Pushed, 3));
    let reply = v1::PushReply::decode(body).expect("a reply");
    assert!(matches!(&reply.parts[0].result, Some(PushResult::Done(done)) if !done.repeated));
    let repeats = framed(Kind::Push, 4, &a_push()).repeat(100);
    client.send(&repeats).await;
    for _ in 0..100 {
        let Frame { kind, body, .. } = client.answer().await.expect("an answer");
        assert_eq!(kind, Kind::Pushed);
        let reply = v1::PushReply::decode(body).expect("a reply");
        assert!(matches!(&reply.parts[0].result, Some(PushResult::Done(done)) if done.repeated));
    }
    assert_eq!(client.pulls().await, [1.0, 2.0]);
}

#[tokio::test]
async fn a_pull_that_is_malformed_is_refused_by_field_and_the_next_is_answered() {
    let mut client = Client::connect().await;
    let malformed = v1::PullRequest { job: 0, ..a_pull() };
    client.send(&framed(Kind::Pull, 6, &malformed)).await;
    let (request, failure) = client.failure().await;
    assert_eq!((request, failure.code), (6, Code::InvalidArgument as u32));
    assert!(failure.message.starts_with("job:"), "{}", failure.message);
    client.send(&header(Kind::Pull, 3)).await;
    client.send(&[0xff; 3]).await;
    assert_eq!(client.failure().await.1.code, Code::InvalidArgument as u32);
    assert_eq!(client.pulls().await, [0.0, 0.0]);
}

fn some_replication() -> v1::ReplicateRequest {
    let incarnation = server(1).incarnation.0;
    v1::ReplicateRequest {
        source: Some(server(2).into()),
        incarnation,
        shards: vec![some_records()],
    }
}

#[tokio::test]
async fn records_are_answered_shard_by_shard_and_those_for_another_life_end_the_connection() {
    let mut client = Client::connect().await;
    client.send(&framed(Kind::Replicate, 5, &some_replication())).await;
    let Frame { kind, request, body } = client.answer().await.expect("an answer");
    assert_eq!((kind, request), (Kind::Replicated, 5));
    let reply = v1::ReplicateReply::decode(body).expect("a reply");
    // It is the primary itself.
    assert!(matches!(&reply.shards[..], [ack] if ack.not_ready && ack.epoch == 1), "{reply:?}");
    let another = v1::ReplicateRequest { incarnation: 77, ..some_replication() };
    client.send(&framed(Kind::Replicate, 6, &another)).await;
    let (request, failure) = client.failure().await;
    assert_eq!((request, failure.code), (6, Code::FailedPrecondition as u32));
    assert_eq!(client.answer().await, None);
}

#[tokio::test]
async fn what_cannot_be_followed_ends_the_connection_with_its_reason() {
    let mut too_long = header(Kind::Push, 0);
    too_long[..4].copy_from_slice(&(MESSAGE_BYTES_MAX as u32 + 1).to_le_bytes());
    let mut unknown = header(Kind::Push, 0);
    unknown[4] = 99;
    let malformed = v1::PushRequest { session: 0, ..a_push() };
    let nobodys = v1::ReplicateRequest { source: None, ..some_replication() };
    for (sent, field) in [
        (too_long.to_vec(), "frame.length:"),
        (unknown.to_vec(), "frame.kind:"),
        (header(Kind::Pulled, 0).to_vec(), "frame.kind:"),
        (framed(Kind::Push, 8, &malformed), "session:"),
        (header(Kind::Replicated, 0).to_vec(), "frame.kind:"),
        (framed(Kind::Replicate, 8, &nobodys), "source:"),
    ] {
        let mut client = Client::connect().await;
        client.send(&sent).await;
        let (_, failure) = client.failure().await;
        assert_eq!(failure.code, Code::InvalidArgument as u32);
        assert!(failure.message.starts_with(field), "{}", failure.message);
        assert_eq!(client.answer().await, None);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn spoilt_frames_end_in_answers_or_the_end_of_the_connection(
        spoils in prop::collection::vec((0..3, changes()), 4),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            for (which, changes) in spoils {
                let mut client = Client::connect().await;
                let mut bytes = match which {
                    0 => framed(Kind::Pull, 1, &a_pull()),
                    1 => framed(Kind::Push, 1, &a_push()),
                    _ => framed(Kind::Replicate, 1, &some_replication()),
                };
                // A length that was spoilt would have the server wait for the rest.
                let (start, len) = (4, bytes.len());
                for (at, byte) in changes {
                    bytes[start + at % (len - start)] = byte;
                }
                assert!(len > HEADER_BYTES);
                client.send(&bytes).await;
                client.stream.shutdown().await.expect("nothing more is sent");
                while client.answer().await.is_some() {}
            }
        });
    }
}
