//! Who asks, on a connection of frames: what is appended leaves while there is room, and what arrives is cut into frames.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Code, Status};

use crate::frame::{self, Frame, Hello, Kind};
use crate::gather::{Gather, Segments};
use crate::net::TcpStream;
use crate::{Invalid, transport, v1};

/// Room that is kept for what arrives next.
const READ_BYTES: usize = 256 << 10;

/// A connection to a server.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    out: Segments,
    received: BytesMut,
    /// Of the next frame, as far as is known.
    missing: usize,
}

impl Connection {
    /// Connects; the hello leaves with the first [`Connection::turn`].
    ///
    /// # Errors
    /// Nobody answers at `address` (host:port) in time.
    pub async fn open(address: &str, hello: Hello) -> io::Result<Self> {
        let stream = transport::connect(address).await?;
        let mut out = Segments::default();
        out.raw(&hello.to_bytes());
        Ok(Connection { stream, out, received: BytesMut::new(), missing: 0 })
    }

    /// Appends a request.
    ///
    /// # Panics
    /// If it is larger than a frame may be; who builds a message checks that.
    pub fn send(&mut self, kind: Kind, request: u64, message: &impl Gather) {
        self.out.frame(kind, request, message);
    }

    /// Bytes that have not left yet.
    pub fn waiting(&mut self) -> usize {
        self.out.outgoing().remaining()
    }

    /// Writes or reads, whichever goes first. May be cancelled: nothing is lost.
    ///
    /// # Errors
    /// The connection broke, or the other side closed it.
    pub async fn turn(&mut self) -> io::Result<()> {
        self.received.reserve(self.missing.max(READ_BYTES));
        let (mut read, mut write) = self.stream.split();
        let outgoing = self.out.outgoing();
        tokio::select! {
            written = write.write_buf(outgoing), if outgoing.has_remaining() => {
                written?;
            }
            read = read.read_buf(&mut self.received) => {
                if read? == 0 {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection"));
                }
            }
        }
        Ok(())
    }

    /// The next frame that has arrived whole.
    ///
    /// # Errors
    /// What arrived is no frame: nothing that follows can be read.
    pub fn take(&mut self) -> Result<Option<Frame>, Invalid> {
        Ok(match frame::take(&mut self.received)? {
            Ok(frame) => Some(frame),
            Err(missing) => {
                self.missing = missing;
                None
            }
        })
    }
}

/// What a server said instead of an answer, from the body of [`Kind::Failed`].
#[must_use]
pub fn failure(body: Bytes) -> Status {
    match v1::Failure::decode(body) {
        Ok(failure) => Status::new(Code::from_i32(failure.code as i32), failure.message),
        Err(error) => Status::internal(error.to_string()),
    }
}
