//! Asking for memory before it is needed.

#![allow(unsafe_code)]

/// Floats of a cache line.
const LINE_FLOATS: usize = 16;

/// Asks for the cache line of `place`, which may be anything: it changes nothing but speed. Into the second cache: more such requests can be on their way
/// than into the first.
#[inline(always)]
pub fn prefetch<T>(place: *const T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: SSE is part of x86-64, and a prefetch neither faults nor reads what the program can see.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T2, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T2>(place.cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = place;
}

/// Asks for the row `position` of a matrix with `dim` columns.
#[inline(always)]
pub fn prefetch_row(matrix: &[f32], dim: usize, position: u32) {
    let start = matrix.as_ptr().wrapping_add(position as usize * dim);
    for float in (0..dim).step_by(LINE_FLOATS) {
        prefetch(start.wrapping_add(float));
    }
}
