//! The data plane without HTTP/2: frames on a plain TCP connection, a message layer that does no I/O.
//!
//! A connection begins with a [`Hello`] from the client, which no HTTP/2 connection begins with, so a server tells the two apart on one port. Then
//! frames follow in both directions: a header of 16 bytes (length of the body, [`Kind`], three zeros, number of the request; little-endian)
//! and the body, a message of `shard.proto` or `replica.proto`. Requests of one connection are answered in their order, each under its own number; a server that
//! cannot read a request any more says why ([`Kind::Failed`]) and closes. Pulls, pushes and the log of one server for another travel on connections of their own.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::Invalid;
use crate::transport::MESSAGE_BYTES_MAX;

/// Begins a [`Hello`]. The first byte alone tells it from HTTP/2, whose preface begins with `PRI`.
pub const MAGIC: [u8; 8] = *b"DOWNPOU1";

/// Bytes of a [`Hello`].
pub const HELLO_BYTES: usize = MAGIC.len() + size_of::<u64>() + size_of::<u32>();

/// Lanes of a client to one server: each has a connection for pulls and one for pushes. A shard's requests keep to the lane `shard % LANES`, so they stay
/// in order, and two threads of the server work for one client. Servers have as many to each other.
pub const LANES: u32 = 2;

/// Set in [`Hello::session`] where a server sends its log: the rest is the number of its node.
pub const SERVER: u64 = 1 << 63;

/// What a client begins a connection with after [`MAGIC`]. It tells the server which of its threads serves the connection, and proves nothing: each
/// request names its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Connections of one session and lane are served by one thread. A server says [`SERVER`] and who it is.
    pub session: u64,
    /// Lanes of one session are served by threads next to each other.
    pub lane: u32,
}

impl Hello {
    /// As it is sent.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        let mut rest = &mut bytes[..];
        rest.put_slice(&MAGIC);
        rest.put_u64_le(self.session);
        rest.put_u32_le(self.lane);
        bytes
    }

    /// As it arrived.
    ///
    /// # Errors
    /// It is no hello of this version.
    pub fn from_bytes(bytes: [u8; HELLO_BYTES]) -> Result<Self, Invalid> {
        match bytes.split_first_chunk() {
            Some((&MAGIC, mut rest)) => {
                Ok(Hello { session: rest.get_u64_le(), lane: rest.get_u32_le() })
            }
            _ => Err(Invalid::new("hello", "is not that of this version")),
        }
    }
}

/// Bytes before each body.
pub const HEADER_BYTES: usize = 16;

/// What a body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `PullRequest`.
    Pull,
    /// `PushRequest`.
    Push,
    /// `PullReply`.
    Pulled,
    /// `PushReply`.
    Pushed,
    /// `ReplicateRequest`.
    Replicate,
    /// `ReplicateReply`.
    Replicated,
    /// `Failure`, in place of a reply.
    Failed,
}

impl Kind {
    const ALL: [Kind; 7] = [
        Kind::Pull,
        Kind::Push,
        Kind::Pulled,
        Kind::Pushed,
        Kind::Replicate,
        Kind::Replicated,
        Kind::Failed,
    ];

    fn code(self) -> u8 {
        self as u8 + 1
    }

    fn from_code(code: u8) -> Option<Self> {
        Kind::ALL.into_iter().find(|kind| kind.code() == code)
    }
}

/// One frame as it arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What the body is.
    pub kind: Kind,
    /// Chosen by who asks, repeated in the answer.
    pub request: u64,
    /// A message; it shares the receive buffer.
    pub body: Bytes,
}

/// Appends the header of a frame whose body has `body_bytes`.
///
/// # Panics
/// If the body is larger than [`MESSAGE_BYTES_MAX`], which every sender checks before.
pub fn put_header(out: &mut BytesMut, kind: Kind, request: u64, body_bytes: usize) {
    assert!(body_bytes <= MESSAGE_BYTES_MAX, "a body of {body_bytes} bytes");
    out.put_u32_le(body_bytes as u32);
    out.put_u8(kind.code());
    out.put_bytes(0, 3);
    out.put_u64_le(request);
}

/// Cuts the next frame off `buffer`, or says how many bytes are missing until it is whole.
///
/// # Errors
/// The bytes are no frame: nothing that follows can be read.
pub fn take(buffer: &mut BytesMut) -> Result<Result<Frame, usize>, Invalid> {
    let Some(mut header) = buffer.get(..HEADER_BYTES) else {
        return Ok(Err(HEADER_BYTES - buffer.len()));
    };
    let body_bytes = header.get_u32_le() as usize;
    let (code, zeros) = (header.get_u8(), header.get_uint_le(3));
    let request = header.get_u64_le();
    let Some(kind) = Kind::from_code(code).filter(|_| zeros == 0) else {
        return Err(Invalid::new("frame.kind", format!("is {code}, which nothing has")));
    };
    if body_bytes > MESSAGE_BYTES_MAX {
        let problem = format!("is {body_bytes} bytes, at most {MESSAGE_BYTES_MAX} are allowed");
        return Err(Invalid::new("frame.length", problem));
    }
    let missing = (HEADER_BYTES + body_bytes).saturating_sub(buffer.len());
    if missing > 0 {
        return Ok(Err(missing));
    }
    buffer.advance(HEADER_BYTES);
    Ok(Ok(Frame { kind, request, body: buffer.split_to(body_bytes).freeze() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_arrive_whole_and_in_order_however_the_bytes_are_cut(
            frames in prop::collection::vec((0usize..7, any::<u64>(), any::<Vec<u8>>()), 0..10),
            cuts in prop::collection::vec(1usize..40, 1..20),
        ) {
            let mut wire = BytesMut::new();
            for (kind, request, body) in &frames {
                put_header(&mut wire, Kind::ALL[*kind], *request, body.len());
                wire.extend_from_slice(body);
            }
            let (mut buffer, mut cuts) = (BytesMut::new(), cuts.into_iter().cycle());
            let mut arrived = Vec::new();
            while !wire.is_empty() {
                let piece = wire.split_to(cuts.next().unwrap().min(wire.len()));
                buffer.extend_from_slice(&piece);
                loop {
                    match take(&mut buffer).unwrap() {
                        Ok(frame) => arrived.push((frame.kind, frame.request, frame.body.to_vec())),
                        Err(missing) => {
                            prop_assert!(missing > 0);
                            break;
                        }
                    }
                }
            }
            let sent = frames.into_iter().map(|(kind, request, body)| (Kind::ALL[kind], request, body));
            prop_assert_eq!(arrived, sent.collect::<Vec<_>>());
            prop_assert!(buffer.is_empty());
        }

        #[test]
        fn any_bytes_are_frames_or_an_error(bytes: Vec<u8>) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Ok(_)) = take(&mut buffer) {}
        }
    }

    #[test]
    fn a_hello_is_read_back_and_another_version_is_refused() {
        let hello = Hello { session: u64::MAX - 1, lane: 7 };
        let mut bytes = hello.to_bytes();
        assert_eq!(Hello::from_bytes(bytes), Ok(hello));
        bytes[7] += 1;
        assert_eq!(Hello::from_bytes(bytes).map_err(|invalid| invalid.field), Err("hello"));
    }

    #[test]
    fn what_cannot_be_a_frame_is_refused_by_field() {
        let refused = |header: [u8; HEADER_BYTES]| {
            take(&mut BytesMut::from(&header[..])).map_err(|invalid| invalid.field)
        };
        let mut header = [0; HEADER_BYTES];
        assert_eq!(refused(header), Err("frame.kind"));
        header[4] = 1;
        assert!(refused(header).is_ok());
        header[5] = 1;
        assert_eq!(refused(header), Err("frame.kind"));
        header[5] = 0;
        header[..4].copy_from_slice(&(MESSAGE_BYTES_MAX as u32 + 1).to_le_bytes());
        assert_eq!(refused(header), Err("frame.length"));
    }
}
