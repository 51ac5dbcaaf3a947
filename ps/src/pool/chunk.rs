//! Memory of the system, in chunks of one huge page.
//!
//! The system takes milliseconds, sometimes tens of them, to find and clear a huge page. A thread waits for that ahead, so that no push does: a few chunks
//! are always spare. When growth is faster than that thread, chunks get small pages, which come one by one; it makes huge pages of them later.
// tidy: not simulated: the thread has memory ready that nobody can tell from other memory.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::PAGE_BYTES;

/// Bytes of a chunk, and what it is aligned to.
pub(crate) const CHUNK_BYTES: usize = 2 << 20;

/// Chunks that are spare: one for so many that are used, within these bounds.
const SPARE_PART: u64 = 16;
const SPARES_MIN: u64 = 4;
const SPARES_MAX: u64 = 16;
/// After a burst of this many, the next spare chunk is made only so much later: without that, a server that grows for long waits for memory on every core.
const SPARE_BURST: u32 = 128;
const SPARE_PAUSE: Duration = Duration::from_millis(5);

/// Bytes that all chunks and large slabs of the process have now.
pub(crate) fn mapped_bytes() -> u64 {
    MAPPED.load(Ordering::Relaxed)
}

static MAPPED: AtomicU64 = AtomicU64::new(0);

/// Chunks whose memory is there already.
static SPARES: Spares = Spares::new();

/// A chunk: a spare one, which is a huge page, if there is any.
pub(super) fn spare_chunk() -> Mapping {
    SPARES.take()
}

struct Spares {
    state: Mutex<SpareState>,
    taken: Condvar,
}

struct SpareState {
    ready: Vec<Mapping>,
    /// Where chunks of small pages are, or were.
    small: Vec<usize>,
    /// The thread that fills them up exists.
    started: bool,
}

impl Spares {
    const fn new() -> Self {
        let state = SpareState { ready: Vec::new(), small: Vec::new(), started: false };
        Spares { state: Mutex::new(state), taken: Condvar::new() }
    }

    fn take(&'static self) -> Mapping {
        let mut state = self.state.lock();
        if !state.started && !cfg!(miri) {
            state.started = true;
            // Without it there are no spares, and growing pauses longer.
            let _ = thread::Builder::new().name("spare chunks".into()).spawn(|| self.fill_up());
        }
        let chunk = state.ready.pop().unwrap_or_else(|| {
            let chunk = Mapping::new(CHUNK_BYTES, Pages::Small);
            state.small.push(chunk.start.addr().get());
            chunk
        });
        drop(state);
        self.taken.notify_one();
        chunk
    }

    fn fill_up(&self) {
        let mut burst = SPARE_BURST;
        let mut state = self.state.lock();
        loop {
            let chunks = mapped_bytes() / CHUNK_BYTES as u64;
            let wanted = (chunks / SPARE_PART).clamp(SPARES_MIN, SPARES_MAX);
            if state.ready.len() as u64 >= wanted && state.small.is_empty() {
                let since = Instant::now();
                self.taken.wait(&mut state);
                let earned = since.elapsed().as_millis() / SPARE_PAUSE.as_millis();
                burst = burst.saturating_add(earned as u32).min(SPARE_BURST);
                continue;
            }
            let small = if state.ready.len() as u64 >= wanted { state.small.pop() } else { None };
            drop(state);
            let spare = match small {
                Some(chunk) => {
                    sys::make_huge(chunk);
                    None
                }
                None => Mapping::try_new(CHUNK_BYTES, Pages::Huge).map(Mapping::touched),
            };
            if small.is_some() || burst == 0 {
                thread::sleep(SPARE_PAUSE);
            } else {
                burst -= 1;
            }
            state = self.state.lock();
            state.ready.extend(spare);
        }
    }
}

/// What memory comes in: huge pages come slowly and are read fast.
#[derive(Clone, Copy)]
pub(super) enum Pages {
    Small,
    Huge,
}

/// Memory of the system, zeroed, aligned to a chunk.
pub(super) struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a mapping owns its memory.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Whole chunks. Aborts like every allocation when the system has none.
    pub(super) fn new(bytes: usize, pages: Pages) -> Mapping {
        Mapping::try_new(bytes, pages).unwrap_or_else(|| {
            let layout = std::alloc::Layout::from_size_align(bytes, CHUNK_BYTES);
            std::alloc::handle_alloc_error(layout.expect("chunks are a valid layout"))
        })
    }

    fn try_new(bytes: usize, pages: Pages) -> Option<Mapping> {
        let start = sys::map(bytes, pages)?;
        MAPPED.fetch_add(bytes as u64, Ordering::Relaxed);
        Some(Mapping { start, bytes })
    }

    /// With all its memory there: the system gives it page by page, when it is written to.
    fn touched(self) -> Mapping {
        for page in (0..self.bytes).step_by(PAGE_BYTES) {
            // SAFETY: it lies in the mapping, which nobody else has yet. Volatile, for nobody reads this zero.
            unsafe { self.start.add(page).write_volatile(0) };
        }
        self
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub(super) fn into_start(self) -> NonNull<u8> {
        std::mem::ManuallyDrop::new(self).start
    }

    /// # Safety
    /// `start` and `bytes` are of a mapping that was taken apart by `into_start`, and nobody uses its memory any more.
    pub(super) unsafe fn from_start(start: NonNull<u8>, bytes: usize) -> Mapping {
        Mapping { start, bytes }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        MAPPED.fetch_sub(self.bytes as u64, Ordering::Relaxed);
        // SAFETY: `new` got exactly this from `map`, and its users are gone.
        unsafe { sys::unmap(self.start, self.bytes) };
    }
}

#[cfg(not(miri))]
mod sys {
    use std::ptr::{NonNull, null_mut};

    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

    use super::{CHUNK_BYTES, Pages};

    /// Maps `bytes` aligned to a chunk: maps a chunk more, and gives the ends back.
    pub(super) fn map(bytes: usize, pages: Pages) -> Option<NonNull<u8>> {
        let advice = match pages {
            Pages::Small => Advice::LinuxNoHugepage,
            Pages::Huge => Advice::LinuxHugepage,
        };
        let mapped = bytes.checked_add(CHUNK_BYTES)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new private mapping where the system likes touches no memory that is in use.
        let start =
            unsafe { mmap_anonymous(null_mut(), mapped, access, MapFlags::PRIVATE) }.ok()?;
        let start = start.cast::<u8>();
        let head = start.align_offset(CHUNK_BYTES);
        // SAFETY: all of it lies in what was just mapped and nobody else knows of. That the advice is not taken, or that the ends stay
        // mapped (they are never touched), is no error.
        unsafe {
            let chunks = start.add(head);
            if head > 0 {
                let _ = munmap(start.cast(), head);
            }
            let _ = munmap(chunks.add(bytes).cast(), CHUNK_BYTES - head);
            let _ = madvise(chunks.cast(), bytes, advice);
            NonNull::new(chunks)
        }
    }

    /// Makes one huge page of a chunk's small ones. It is advice: the chunk may be gone, or the system may not be able to.
    pub(super) fn make_huge(chunk: usize) {
        let chunk = std::ptr::without_provenance_mut::<libc::c_void>(chunk);
        // SAFETY: neither advice changes what any memory holds, whoever has it now.
        unsafe {
            libc::madvise(chunk, CHUNK_BYTES, libc::MADV_HUGEPAGE);
            libc::madvise(chunk, CHUNK_BYTES, libc::MADV_COLLAPSE);
        }
    }

    /// # Safety
    /// `start` and `bytes` are of one `map`, and nobody uses the memory any more.
    pub(super) unsafe fn unmap(start: NonNull<u8>, bytes: usize) {
        // SAFETY: by the caller.
        let unmapped = unsafe { munmap(start.as_ptr().cast(), bytes) };
        debug_assert!(unmapped.is_ok(), "a whole mapping can be unmapped");
    }
}

/// Miri knows no `mmap` with an alignment.
#[cfg(miri)]
mod sys {
    use std::alloc::{Layout, alloc_zeroed, dealloc};
    use std::ptr::NonNull;

    use super::{CHUNK_BYTES, Pages};

    pub(super) fn make_huge(_: usize) {}

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, CHUNK_BYTES).expect("chunks are a valid layout")
    }

    pub(super) fn map(bytes: usize, _: Pages) -> Option<NonNull<u8>> {
        // SAFETY: the layout is not empty.
        NonNull::new(unsafe { alloc_zeroed(layout(bytes)) })
    }

    /// # Safety
    /// `start` and `bytes` are of one `map`, and nobody uses the memory any more.
    pub(super) unsafe fn unmap(start: NonNull<u8>, bytes: usize) {
        // SAFETY: by the caller.
        unsafe { dealloc(start.as_ptr(), layout(bytes)) };
    }
}
