//! Where the row of a key is: a hash table that grows page by page.
//!
//! **Layout.** A page of 4 KiB is 64 buckets of one cache line. A bucket has room for 12 rows: for each the number and ten bits of its hash, the
//! tag. A row is in the bucket that its hash names or, when that was full, in a later one of the page (in the order of `place`).
//!
//! **Growth** is linear hashing with partial expansions (P.-Å. Larson, 1980), by pages. The hash space is cut into `groups` (a power of two)
//! ranges of one length, and each range into as many pages of one length as its group has: `pages_each`, and one more in the groups before
//! `frontier`. A step gives the group at the frontier one page more: it spreads some thousand rows anew and touches no other group. When every group
//! has had its step, `pages_each` rises; groups of `2 * PAGES_MIN` pages are cut in half, for which no row has to move. So the pause of a step is as short in a
//! table of any size, and pages are never much emptier than others: between `PAGES_MIN / (PAGES_MIN + 1)` and all of [`PAGE_ROWS`] on average.
//!
//! **Invariants.**
//! - A row is on the page of its hash, or in `spilled` if that page was full when it came; it is never in both, and never twice.
//! - A bucket that comes before the one that has a row, in the order of the row's hash, is full and says so (`PASSED`), so a search ends at the first that does not.
//! - Rows leave no bucket but by a step, which writes all pages of the group anew.
//!
//! The hash must be a bijection of the key: it stands for the key in `spilled`.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use crate::pool::{Line as Bucket, PAGE_BYTES, PAGE_LINES as BUCKETS, Page};

/// "No row".
pub(crate) const NONE: u32 = u32::MAX;

/// Pages of a group after it was cut in half. More would make steps rarer in a fuller table: this gives at most 7.1 bytes of index a row, and each row is
/// spread anew about eight times while its table doubles.
const PAGES_MIN: usize = 6;
/// Most pages of a group: room for it in the list of pages.
const PAGES_MAX: usize = 2 * PAGES_MIN;
/// Rows on a page, on average over the fullest groups. A page has slots for 768; that its own rows are more happens to one page in ten thousand.
const PAGE_ROWS: usize = 676;

/// Rows of a bucket.
const SLOTS: usize = 12;
/// Word of the first row number. Before it are the low bytes of the tags, three words, and one with the count of rows, [`PASSED`] and the high bits of the tags.
const ROWS: usize = 4;
const STATE: usize = 3;
/// A row was put into a later bucket because this one was full.
const PASSED: u32 = 1 << 7;
/// Bit of the state at which the high bits of the tags begin, two for each slot: three in four of the lookups that a byte alone would lead to another row find
/// the right one at once.
const HIGH_TAGS: u32 = 8;

/// Row numbers by hash.
#[derive(Debug)]
pub(crate) struct Index {
    /// Groups, as a power of two.
    depth: u32,
    pages_each: usize,
    frontier: usize,
    /// `PAGES_MAX` places for each group, of which the first `pages_of` are taken.
    pages: Vec<Option<Page>>,
    len: usize,
    /// Rows that make the next step due.
    step_at: usize,
    /// By hash, the rows that found their page full.
    spilled: HashMap<u64, u32>,
}

impl Default for Index {
    fn default() -> Self {
        Index {
            depth: 0,
            pages_each: 1,
            frontier: 0,
            pages: Vec::new(),
            len: 0,
            step_at: PAGE_ROWS,
            spilled: HashMap::new(),
        }
    }
}

impl Index {
    /// Bytes of the pages and of their list.
    pub(crate) fn bytes(&self) -> usize {
        let pages = self.pages.iter().flatten().count() * PAGE_BYTES;
        let spilled = self.spilled.capacity() * size_of::<(u64, u32)>();
        pages + self.pages.capacity() * size_of::<Option<Page>>() + spilled
    }

    /// Asks for the bucket of a hash, and returns the page that it is on for [`Index::candidate`].
    #[inline]
    pub(crate) fn prefetch(&self, hash: u64) -> u32 {
        let number = self.page_number(hash);
        if let Some(Some(page)) = self.pages.get(number) {
            page.prefetch(place(hash, 0));
        }
        number as u32
    }

    /// The row that most likely has this hash, or [`NONE`]: its tag is right, and the caller looks whether its key is. If not, [`Index::find`] tells.
    #[inline]
    pub(crate) fn candidate(&self, hash: u64, page: u32) -> u32 {
        let Some(Some(page)) = self.pages.get(page as usize) else { return NONE };
        let buckets = page.lines();
        for probe in 0..BUCKETS {
            let bucket = &buckets[place(hash, probe)];
            if let Some(row) = candidates(bucket, hash).next() {
                return row;
            }
            if bucket[STATE] & PASSED == 0 {
                break;
            }
        }
        NONE
    }

    /// The row of a hash; `same` tells it from others with its tag.
    pub(crate) fn find(&self, hash: u64, same: impl Fn(u32) -> bool) -> Option<u32> {
        let buckets = self.page(hash)?.lines();
        for probe in 0..BUCKETS {
            let bucket = &buckets[place(hash, probe)];
            if let Some(row) = candidates(bucket, hash).find(|&row| same(row)) {
                return Some(row);
            }
            if bucket[STATE] & PASSED == 0 {
                break;
            }
        }
        // Nearly always empty.
        self.spilled.get(&hash).copied().filter(|&row| same(row))
    }

    /// Adds a row whose hash is not here. `hash_of` gives the hashes of the rows that are, some thousand when a step is due; each is announced
    /// to `soon` some time before.
    pub(crate) fn insert(
        &mut self,
        hash: u64,
        row: u32,
        soon: impl Fn(u32),
        hash_of: impl Fn(u32) -> u64,
    ) {
        if self.pages.is_empty() {
            self.pages.resize_with(PAGES_MAX, || None);
            self.pages[0] = Some(Page::new());
        }
        self.put(hash, row);
        self.len += 1;
        if self.len >= self.step_at {
            self.step(soon, hash_of);
        }
    }

    /// Rows on the pages of the hashes whose low word is in `range`, and some of other hashes with them.
    pub(crate) fn near(&self, range: RangeInclusive<u32>) -> impl Iterator<Item = u32> + '_ {
        let pages = match self.pages.is_empty() {
            true => 0..0,
            false => {
                let number = |word: &u32| self.page_number(u64::from(*word));
                number(range.start())..number(range.end()) + 1
            }
        };
        let buckets = self.pages[pages].iter().flatten().flat_map(Page::lines);
        let here = buckets.flat_map(|bucket| bucket[ROWS..ROWS + count(bucket)].iter().copied());
        here.chain(self.spilled.values().copied())
    }

    fn put(&mut self, hash: u64, row: u32) {
        let at = self.page_number(hash);
        let page = self.pages[at].as_mut().expect("a page that a hash names exists");
        if !put(page.lines_mut(), hash, row) {
            self.spilled.insert(hash, row);
        }
    }

    /// One page more for the group at the frontier.
    fn step(&mut self, soon: impl Fn(u32), hash_of: impl Fn(u32) -> u64) {
        const AHEAD: usize = 24;
        let first = self.frontier * PAGES_MAX;
        let group = &mut self.pages[first..first + PAGES_MAX];
        let mut rows = Vec::with_capacity(self.pages_each * PAGE_ROWS);
        for page in group.iter_mut().flatten() {
            for bucket in page.lines_mut() {
                rows.extend_from_slice(&bucket[ROWS..ROWS + count(bucket)]);
                bucket.fill(0);
            }
        }
        group[self.pages_each] = Some(Page::new());
        self.frontier += 1;
        for (at, &row) in rows.iter().enumerate() {
            rows.get(at + AHEAD).into_iter().for_each(|&row| soon(row));
            self.put(hash_of(row), row);
        }
        if self.frontier == 1 << self.depth {
            self.begin_round();
        }
        self.step_at = self.next_step();
    }

    /// Every group has `pages_each + 1` pages.
    fn begin_round(&mut self) {
        (self.pages_each, self.frontier) = (self.pages_each + 1, 0);
        if self.pages_each < PAGES_MAX {
            return;
        }
        (self.pages_each, self.depth) = (PAGES_MIN, self.depth + 1);
        let whole = std::mem::take(&mut self.pages);
        self.pages.reserve_exact(2 * whole.len());
        let mut whole = whole.into_iter();
        while whole.len() > 0 {
            for _half in 0..2 {
                self.pages.extend(whole.by_ref().take(PAGES_MIN));
                self.pages.extend(std::iter::repeat_with(|| None).take(PAGES_MAX - PAGES_MIN));
            }
        }
    }

    /// Rows at which the group at the frontier must have its step: so that the last one of the round has it when its pages have [`PAGE_ROWS`] rows on
    /// average, and the steps of a round are evenly spread over the rows that come.
    fn next_step(&self) -> usize {
        let groups = 1usize << self.depth;
        let halves = if self.pages_each == PAGES_MIN && self.depth > 0 { 1 } else { 2 };
        let end = PAGE_ROWS * groups * self.pages_each;
        let round = PAGE_ROWS * groups * halves / 2;
        end - round + (self.frontier + 1) * (PAGE_ROWS * halves / 2)
    }

    #[inline]
    fn page(&self, hash: u64) -> Option<&Page> {
        self.pages.get(self.page_number(hash))?.as_ref()
    }

    /// Place of the page that a hash belongs on: its low word, as a fraction of the hash space, names the group and the page in it.
    #[inline]
    fn page_number(&self, hash: u64) -> usize {
        let place = (hash & 0xFFFF_FFFF) << self.depth;
        let (group, rest) = ((place >> 32) as usize, place & 0xFFFF_FFFF);
        let pages = self.pages_each + usize::from(group < self.frontier);
        group * PAGES_MAX + ((rest * pages as u64) >> 32) as usize
    }
}

/// The buckets of a hash on its page: the one that it names, the other one of that pair of cache lines (which processors like to fetch as one), and so on
/// pair by pair. The sixteen highest bits of a hash are the shard's (`routing::shard_of`): much the same in all keys of a table.
#[inline]
fn place(hash: u64, probe: usize) -> usize {
    (((hash >> 32) as usize ^ (probe & 1)) + (probe & !1)) % BUCKETS
}

/// The low byte of a tag: never 0, which an empty slot has.
#[inline]
fn tag(hash: u64) -> u8 {
    ((hash >> 38) as u8).max(1)
}

/// The high bits of a tag.
#[inline]
fn high_tag(hash: u64) -> u32 {
    (hash >> 46) as u32 & 3
}

/// Where the high bits of a slot's tag are in the state.
#[inline]
fn high_tag_at(slot: usize) -> u32 {
    HIGH_TAGS + 2 * slot as u32
}

#[inline]
fn count(bucket: &Bucket) -> usize {
    (bucket[STATE] & (PASSED - 1)) as usize
}

/// The rows of a bucket that have the tag of this hash.
#[inline]
fn candidates(bucket: &Bucket, hash: u64) -> impl Iterator<Item = u32> + '_ {
    let mut matches = matches(bucket, tag(hash));
    std::iter::from_fn(move || {
        while matches != 0 {
            let slot = slot_of(matches);
            matches &= matches - 1;
            if bucket[STATE] >> high_tag_at(slot) & 3 == high_tag(hash) {
                return Some(bucket[ROWS + slot]);
            }
        }
        None
    })
}

/// False if no bucket of the page has room.
fn put(buckets: &mut [Bucket; BUCKETS], hash: u64, row: u32) -> bool {
    for probe in 0..BUCKETS {
        let bucket = &mut buckets[place(hash, probe)];
        let slot = count(bucket);
        if slot < SLOTS {
            bucket[slot / 4] |= u32::from(tag(hash)) << (slot % 4 * 8);
            bucket[ROWS + slot] = row;
            bucket[STATE] += 1 + (high_tag(hash) << high_tag_at(slot));
            return true;
        }
        bucket[STATE] |= PASSED;
    }
    false
}

/// The slots of a bucket that have this tag: the high bit of byte `slot` of the result.
#[inline]
fn matches(bucket: &Bucket, tag: u8) -> u128 {
    const LOW: u128 = u128::from_ne_bytes([0x7F; 16]);
    let tags = (0..STATE).fold(0, |tags, word| tags | u128::from(bucket[word]) << (32 * word));
    // A byte is 0 where the tags are the same, and not 0 in the last word, where no tag is.
    let differences = tags ^ u128::from_ne_bytes([tag; 16]);
    // No byte carries into the next.
    !(((differences & LOW) + LOW) | differences | LOW)
}

/// The first slot that [`matches`] found.
#[inline]
fn slot_of(matches: u128) -> usize {
    matches.trailing_zeros() as usize / 8
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use downpour_core::mix::mix64;
    use proptest::prelude::*;

    use super::*;

    /// An index over rows whose hashes are listed.
    #[derive(Default)]
    struct Model {
        index: Index,
        hashes: Vec<u64>,
    }

    impl Model {
        fn insert(&mut self, hash: u64) {
            let row = self.hashes.len() as u32;
            self.hashes.push(hash);
            let hashes = &self.hashes;
            self.index.insert(
                hash,
                row,
                |row| assert!(hashes.len() > row as usize),
                |row| hashes[row as usize],
            );
        }

        fn find(&self, hash: u64) -> Option<u32> {
            let found = self.index.find(hash, |row| self.hashes[row as usize] == hash);
            let candidate = self.index.candidate(hash, self.index.page_number(hash) as u32);
            assert!(candidate == NONE || (candidate as usize) < self.hashes.len());
            found
        }

        fn check(&self) {
            for (row, &hash) in self.hashes.iter().enumerate() {
                assert_eq!(self.find(hash), Some(row as u32), "{hash:x} of {}", self.hashes.len());
            }
            self.check_near(0..=u32::MAX);
            self.check_near(1 << 30..=3 << 30);
        }

        fn check_near(&self, range: RangeInclusive<u32>) {
            let inside = |row: &u32| range.contains(&(self.hashes[*row as usize] as u32));
            let mut near: Vec<u32> = self.index.near(range.clone()).filter(inside).collect();
            near.sort_unstable();
            let wanted: Vec<u32> = (0..self.hashes.len() as u32).filter(inside).collect();
            assert_eq!(near, wanted);
        }
    }

    #[test]
    fn every_row_is_found_before_and_after_each_step() {
        let mut model = Model::default();
        let mut seen = (0, 0, 0);
        for key in 0..15_000 {
            model.insert(mix64(key));
            let index = &model.index;
            let state = (index.depth, index.pages_each, index.frontier);
            if state != seen {
                seen = state;
                model.check();
            }
            assert_eq!(model.find(mix64(key)), Some(key as u32));
            assert_eq!(model.find(mix64(!key)), None);
        }
        assert!(seen.0 >= 1, "groups were cut in half: {seen:?}");
    }

    #[test]
    fn an_index_of_any_size_has_at_most_eight_bytes_a_row_and_no_page_is_overfull() {
        let mut model = Model::default();
        let mut worst = 0.0f64;
        for key in 0..200_000u64 {
            model.insert(mix64(key));
            if key > 30_000 && key % 100 == 0 {
                worst = worst.max(model.index.bytes() as f64 / key as f64);
            }
        }
        assert!(worst < 7.5, "{worst}");
        assert!(model.index.spilled.len() < 200, "{} spilled", model.index.spilled.len());
    }

    #[test]
    fn hashes_that_all_want_one_page_are_found_too() {
        let mut model = Model::default();
        // The low word names the page: all of them want the first.
        for key in 0..3000u64 {
            model.insert(key << 32);
        }
        assert!(model.index.spilled.len() > 1000);
        model.check();
        assert_eq!(model.find(5000 << 32), None);
    }

    proptest! {
        #[test]
        fn an_index_is_a_map(hashes: Vec<u64>, narrow: bool) {
            let mut model = Model::default();
            let mut map = BTreeMap::new();
            // Narrow: few buckets, few tags, so that all ways of probing are taken.
            let hashes = hashes.iter().flat_map(|&hash| (0..20).map(move |n| mix64(hash ^ n)));
            for hash in hashes.map(|hash| if narrow { hash & 0x0000_0103_8000_03FF } else { hash }) {
                prop_assert_eq!(model.find(hash), map.get(&hash).copied());
                map.entry(hash).or_insert_with(|| {
                    model.insert(hash);
                    model.hashes.len() as u32 - 1
                });
            }
            model.check();
        }
    }
}
