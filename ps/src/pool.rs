//! Memory for the rows and indexes of all tables of the process: slabs, cut from chunks that are one huge page each.
//!
//! A shard's table is often smaller than a huge page (2 MiB) and would get none of its own; one pool for the process gives them to all
//! (measured in docs/performance.md, "The table"). A slab that is dropped goes back to its chunk, and a chunk without slabs to the system.
//!
//! This module and [`chunk`] are the only ones of the crate with `unsafe` in them: a [`Slab`] is the unique owner of its words, which always hold some value.

#![allow(unsafe_code)]

mod chunk;

use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;

use downpour_core::prefetch::prefetch;
use parking_lot::Mutex;

pub(crate) use chunk::{CHUNK_BYTES, mapped_bytes};
use chunk::{Mapping, Pages, spare_chunk};

/// Bytes of the smallest slab; a memory page, and a page of an index.
pub(crate) const PAGE_BYTES: usize = 4 << 10;
/// Bytes of a slab of a table that has outgrown pages.
pub(crate) const MEDIUM_BYTES: usize = 32 << 10;
/// Bytes of a slab of a large table.
pub(crate) const LARGE_BYTES: usize = 256 << 10;

/// Words of a cache line.
pub(crate) const LINE_WORDS: usize = 16;

/// Lines of the smallest slab.
pub(crate) const PAGE_LINES: usize = PAGE_BYTES / size_of::<Line>();

/// 64 bytes; in a slab, one cache line.
pub(crate) type Line = [u32; LINE_WORDS];

/// Words of `u32` that belong to their owner alone. What they hold at first is arbitrary: zeros, or what the last owner left.
#[derive(Debug)]
pub(crate) struct Slab {
    start: NonNull<u32>,
    bytes: usize,
}

// SAFETY: a slab owns its words like a `Box<[u32]>`, and shares nothing with another slab.
unsafe impl Send for Slab {}
// SAFETY: as above; `&Slab` gives only `&[u32]`.
unsafe impl Sync for Slab {}

impl Slab {
    /// Of [`slab_bytes`]`(bytes)`, aligned to a page.
    pub(crate) fn new(bytes: usize) -> Slab {
        let start = match Class::of(bytes) {
            Some(class) => class.pool().lock().take(class),
            None => Mapping::new(slab_bytes(bytes), Pages::Small).into_start(),
        };
        Slab { start: start.cast(), bytes: slab_bytes(bytes) }
    }

    /// Its bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// What it holds.
    #[inline]
    pub(crate) fn words(&self) -> &[u32] {
        // SAFETY: `start` points at `bytes` initialized bytes, aligned to a page, that nobody else has a reference to while `self` lives.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes / size_of::<u32>()) }
    }

    /// What it holds, to be changed.
    #[inline]
    pub(crate) fn words_mut(&mut self) -> &mut [u32] {
        // SAFETY: as in `words`, and `self` is borrowed mutably.
        unsafe {
            std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes / size_of::<u32>())
        }
    }

    /// Asks for the cache line of a word. It changes nothing but speed; a word that is not there is ignored.
    #[inline(always)]
    pub(crate) fn prefetch(&self, word: usize) {
        prefetch(self.start.as_ptr().wrapping_add(word));
    }
}

/// A slab of one page.
#[derive(Debug)]
pub(crate) struct Page(NonNull<[Line; PAGE_LINES]>);

// SAFETY: a page owns its lines like a `Box`.
unsafe impl Send for Page {}
// SAFETY: as above; `&Page` gives only `&[Line]`.
unsafe impl Sync for Page {}

impl Page {
    /// All zeros.
    pub(crate) fn new() -> Page {
        let mut page = Page(Class::Page.pool().lock().take(Class::Page).cast());
        page.lines_mut().as_flattened_mut().fill(0);
        page
    }

    /// What it holds.
    #[inline(always)]
    pub(crate) fn lines(&self) -> &[Line; PAGE_LINES] {
        // SAFETY: a slab of `PAGE_BYTES` initialized bytes, aligned to as many, that nobody else has a reference to while `self` lives.
        unsafe { self.0.as_ref() }
    }

    /// What it holds, to be changed.
    #[inline(always)]
    pub(crate) fn lines_mut(&mut self) -> &mut [Line; PAGE_LINES] {
        // SAFETY: as in `lines`, and `self` is borrowed mutably.
        unsafe { self.0.as_mut() }
    }

    /// Asks for a line.
    #[inline(always)]
    pub(crate) fn prefetch(&self, line: usize) {
        prefetch(self.0.as_ptr().cast::<Line>().wrapping_add(line));
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        Class::Page.pool().lock().give(Class::Page, self.0.cast());
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        match Class::of(self.bytes) {
            Some(class) => class.pool().lock().give(class, self.start.cast()),
            // SAFETY: `new` mapped exactly this, and no reference outlives `self`.
            None => drop(unsafe { Mapping::from_start(self.start.cast(), self.bytes) }),
        }
    }
}

/// Bytes of the slab that `bytes` get: the next of the three sizes, or whole chunks.
pub(crate) fn slab_bytes(bytes: usize) -> usize {
    Class::of(bytes).map_or_else(|| bytes.next_multiple_of(CHUNK_BYTES), Class::bytes)
}

#[derive(Clone, Copy, Debug)]
enum Class {
    Page,
    Medium,
    Large,
}

static POOLS: [Mutex<Pool>; 3] = [const { Mutex::new(Pool::new()) }; 3];

impl Class {
    /// The smallest that holds `bytes`.
    fn of(bytes: usize) -> Option<Class> {
        [Class::Page, Class::Medium, Class::Large].into_iter().find(|class| bytes <= class.bytes())
    }

    fn bytes(self) -> usize {
        match self {
            Class::Page => PAGE_BYTES,
            Class::Medium => MEDIUM_BYTES,
            Class::Large => LARGE_BYTES,
        }
    }

    fn pool(self) -> &'static Mutex<Pool> {
        &POOLS[self as usize]
    }
}

/// Chunks that hold slabs of one size.
struct Pool {
    /// By address.
    chunks: BTreeMap<usize, Chunk>,
    /// Those with room.
    vacant: BTreeSet<usize>,
}

struct Chunk {
    mapping: Mapping,
    taken: Vec<bool>,
    count: usize,
}

impl Pool {
    const fn new() -> Self {
        Pool { chunks: BTreeMap::new(), vacant: BTreeSet::new() }
    }

    /// A slab of the chunk with the lowest address that has room, so that the others may empty.
    fn take(&mut self, class: Class) -> NonNull<u8> {
        let address = self.vacant.first().copied().unwrap_or_else(|| {
            let chunk = Chunk {
                mapping: spare_chunk(),
                taken: vec![false; CHUNK_BYTES / class.bytes()],
                count: 0,
            };
            let address = chunk.mapping.start().addr().get();
            self.chunks.insert(address, chunk);
            self.vacant.insert(address);
            address
        });
        let chunk = self.chunks.get_mut(&address).expect("a vacant chunk exists");
        let slot = chunk.taken.iter().position(|taken| !taken).expect("a vacant chunk has room");
        chunk.taken[slot] = true;
        chunk.count += 1;
        if chunk.count == chunk.taken.len() {
            self.vacant.remove(&address);
        }
        // SAFETY: the slot ends inside the mapping.
        unsafe { chunk.mapping.start().add(slot * class.bytes()) }
    }

    fn give(&mut self, class: Class, start: NonNull<u8>) {
        let at = start.addr().get();
        let address = at & !(CHUNK_BYTES - 1);
        let chunk = self.chunks.get_mut(&address).expect("a slab lies in a chunk of its pool");
        let was_taken = std::mem::take(&mut chunk.taken[(at - address) / class.bytes()]);
        debug_assert!(was_taken, "a slab is given back once");
        chunk.count -= 1;
        if chunk.count == 0 {
            self.chunks.remove(&address);
            self.vacant.remove(&address);
        } else {
            self.vacant.insert(address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slabs_do_not_overlap_and_keep_what_was_written() {
        let sizes = [1, PAGE_BYTES, PAGE_BYTES + 1, MEDIUM_BYTES + 1, LARGE_BYTES + 1];
        let mut slabs: Vec<Slab> =
            sizes.iter().cycle().take(40).map(|&bytes| Slab::new(bytes)).collect();
        for (mark, slab) in slabs.iter_mut().enumerate() {
            let words = slab.words_mut();
            *words.first_mut().expect("not empty") = mark as u32;
            *words.last_mut().expect("not empty") = mark as u32;
        }
        // Every other one goes, and its place is taken anew.
        let mut mark = 0;
        slabs.retain(|_| {
            mark += 1;
            mark % 2 == 0
        });
        slabs.extend((0..20).map(|_| {
            let mut slab = Slab::new(PAGE_BYTES);
            slab.words_mut().fill(99);
            slab
        }));
        for (at, slab) in slabs.iter().enumerate() {
            let expected = if at < 20 { 2 * at as u32 + 1 } else { 99 };
            assert_eq!(
                (slab.words().first(), slab.words().last()),
                (Some(&expected), Some(&expected))
            );
            assert!(slab.start.addr().get().is_multiple_of(PAGE_BYTES));
        }
    }

    #[test]
    fn a_slab_has_the_next_size() {
        for (bytes, expected) in [
            (1, PAGE_BYTES),
            (PAGE_BYTES, PAGE_BYTES),
            (PAGE_BYTES + 1, MEDIUM_BYTES),
            (LARGE_BYTES, LARGE_BYTES),
            (LARGE_BYTES + 1, CHUNK_BYTES),
            (CHUNK_BYTES + 1, 2 * CHUNK_BYTES),
        ] {
            assert_eq!(Slab::new(bytes).bytes(), expected, "{bytes}");
        }
    }

    #[test]
    fn an_empty_chunk_goes_back_and_a_full_one_is_followed_by_another() {
        let mut pool = Pool::new();
        let slots = CHUNK_BYTES / LARGE_BYTES;
        let taken: Vec<_> = (0..=slots).map(|_| pool.take(Class::Large)).collect();
        assert_eq!((pool.chunks.len(), pool.vacant.len()), (2, 1));
        for start in taken {
            pool.give(Class::Large, start);
        }
        assert_eq!((pool.chunks.len(), pool.vacant.len()), (0, 0));
    }
}
