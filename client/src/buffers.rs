//! Memory of pushes on their way: taken again once they are acknowledged.

use bytes::BytesMut;

/// Smallest buffer, so that small pushes share one.
const BUFFER_BYTES_MIN: usize = 64 << 10;
/// Buffers that are kept. More only hold memory that nobody uses again soon.
const BUFFERS_MAX: usize = 64;

/// Buffers that are taken in turns. Fresh memory costs more than copying into it, and so does memory that has left the cache, so there are no more
/// of them than pushes are unacknowledged at a time.
#[derive(Debug, Default)]
pub(crate) struct Buffers(Vec<BytesMut>);

impl Buffers {
    /// A buffer with room for `bytes`, of which everything that was cut off before is gone.
    pub(crate) fn with_room(&mut self, bytes: usize) -> &mut BytesMut {
        let free = self.0.iter_mut().position(|buffer| {
            buffer.capacity() - buffer.len() >= bytes || buffer.try_reclaim(bytes)
        });
        let at = free.unwrap_or_else(|| {
            if self.0.len() == BUFFERS_MAX {
                self.0.remove(0);
            }
            self.0.push(BytesMut::with_capacity(bytes.max(BUFFER_BYTES_MIN)));
            self.0.len() - 1
        });
        &mut self.0[at]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_back_once_nothing_refers_to_it() {
        let mut buffers = Buffers::default();
        let mut held = Vec::new();
        for _ in 0..3 {
            let buffer = buffers.with_room(100_000);
            buffer.resize(100_000, 1);
            held.push(buffer.split().freeze());
        }
        assert_eq!(buffers.0.len(), 3);
        let first = held.remove(0);
        let place = first.as_ptr();
        drop(first);
        let buffer = buffers.with_room(100_000);
        buffer.resize(100_000, 2);
        assert_eq!(buffer.split().freeze().as_ptr(), place);
        assert!(held.iter().all(|bytes| bytes.iter().all(|&byte| byte == 1)));
        drop(held);
        for _ in 0..100 {
            buffers.with_room(1000).resize(1000, 0);
            buffers.0.iter_mut().for_each(|buffer| drop(buffer.split()));
        }
        assert_eq!(buffers.0.len(), 3);
    }
}
