//! Keys of a batch: each key of a table once, and where every occurrence of it went. Pure.

use downpour_client::Arrangement;
use downpour_core::mix::mix64;
use downpour_data::Pool;

/// Keys that occur in a batch, each once, in the order in which they travel best.
pub(crate) type UniqueKeys = Vec<u64>;

/// The unique keys of several lists of a table, and for each list the position of every key among them.
pub(crate) fn unique(arrangement: Arrangement, lists: &[&[u64]]) -> (UniqueKeys, Vec<Vec<u32>>) {
    let count = lists.iter().map(|list| list.len()).sum();
    let mut seen = Seen::new(count);
    let mut positions: Vec<Vec<u32>> =
        lists.iter().map(|list| list.iter().map(|&key| seen.place(key)).collect()).collect();
    let (keys, ranks) = seen.arranged(arrangement);
    for place in positions.iter_mut().flatten() {
        *place = ranks[*place as usize];
    }
    (keys, positions)
}

/// Keys in the order in which they came first, and a hash table of where each is: only what is unique is sorted then.
struct Seen {
    keys: Vec<u64>,
    /// One more than an index of `keys`, or 0 where nothing is.
    slots: Vec<u32>,
    shift: u32,
}

impl Seen {
    /// For at most so many keys.
    fn new(count: usize) -> Self {
        // Twice as many slots as keys keep the probes short.
        let bits = (count * 2).next_power_of_two().trailing_zeros().max(1);
        Self { keys: Vec::new(), slots: vec![0; 1 << bits], shift: 64 - bits }
    }

    fn place(&mut self, key: u64) -> u32 {
        let mut slot = (mix64(key) >> self.shift) as usize;
        loop {
            match self.slots[slot] {
                0 => {
                    let place = self.keys.len() as u32;
                    self.keys.push(key);
                    self.slots[slot] = place + 1;
                    return place;
                }
                known if self.keys[known as usize - 1] == key => return known - 1,
                _ => slot = (slot + 1) & (self.slots.len() - 1),
            }
        }
    }

    /// The keys in their order, and for each place the position there.
    fn arranged(mut self, arrangement: Arrangement) -> (UniqueKeys, Vec<u32>) {
        let mut keys = self.keys.clone();
        keys.sort_unstable();
        arrangement.arrange(&mut keys);
        let mut ranks = vec![0; keys.len()];
        for (rank, &key) in (0..).zip(&keys) {
            ranks[self.place(key) as usize] = rank;
        }
        (keys, ranks)
    }
}

/// How the rows of a bag become one vector: row `i` is the sum of `coefficients × rows[positions]` over `offsets[i]..offsets[i+1]`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Bags {
    pub(crate) positions: Vec<u32>,
    /// One more than there are bags.
    pub(crate) offsets: Vec<u32>,
    /// Empty where each is 1.
    pub(crate) coefficients: Vec<f32>,
}

impl Bags {
    /// `weights` is empty or has one for each key.
    pub(crate) fn new(pool: Pool, positions: Vec<u32>, offsets: &[u32], weights: &[f32]) -> Self {
        let coefficients = coefficients(pool, offsets, weights);
        Self { positions, offsets: offsets.to_vec(), coefficients }
    }

    /// One key each.
    pub(crate) fn single(positions: Vec<u32>) -> Self {
        let offsets = (0..=positions.len() as u32).collect();
        Self { positions, offsets, coefficients: Vec::new() }
    }

    pub(crate) fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Every bag holds exactly one key, and it counts as it is.
    pub(crate) fn one_each(&self) -> bool {
        self.coefficients.is_empty()
            && self.positions.len() == self.len()
            && self.offsets.windows(2).all(|pair| pair[1] - pair[0] == 1)
    }

    /// No bag holds more than one key.
    pub(crate) fn at_most_one(&self) -> bool {
        self.offsets.windows(2).all(|pair| pair[1] - pair[0] <= 1)
    }

    /// Calls `each` with (place, position, coefficient) for every key, in order: its place is its bag, or with a `width` its cell in a matrix of
    /// so many columns.
    pub(crate) fn for_each(&self, width: Option<usize>, mut each: impl FnMut(usize, usize, f32)) {
        for (bag, pair) in self.offsets.windows(2).enumerate() {
            let keys = pair[0] as usize..pair[1] as usize;
            for (column, i) in keys.take(width.unwrap_or(usize::MAX)).enumerate() {
                let place = width.map_or(bag, |width| bag * width + column);
                let coefficient = self.coefficients.get(i).copied().unwrap_or(1.0);
                each(place, self.positions[i] as usize, coefficient);
            }
        }
    }

    /// The bags as a matrix of `width` columns: (positions, coefficients, mask). A place without a key has position, coefficient
    /// and mask 0.
    pub(crate) fn padded(&self, width: usize) -> (Vec<i64>, Vec<f32>, Vec<f32>) {
        let places = self.len() * width;
        let (mut positions, mut coefficients, mut mask) =
            (vec![0; places], vec![0.0; places], vec![0.0; places]);
        self.for_each(Some(width), |place, position, coefficient| {
            (positions[place], coefficients[place], mask[place]) =
                (position as i64, coefficient, 1.0);
        });
        (positions, coefficients, mask)
    }
}

fn coefficients(pool: Pool, offsets: &[u32], weights: &[f32]) -> Vec<f32> {
    let plain = matches!(pool, Pool::Sum | Pool::Padded);
    let single = offsets.windows(2).all(|pair| pair[1] - pair[0] <= 1);
    if plain || (single && weights.is_empty()) {
        return weights.to_vec();
    }
    let count = offsets.last().map_or(0, |&last| last as usize);
    let mut coefficients = if weights.is_empty() { vec![1.0; count] } else { weights.to_vec() };
    for pair in offsets.windows(2) {
        let bag = &mut coefficients[pair[0] as usize..pair[1] as usize];
        let divisor = match pool {
            Pool::Mean => bag.iter().sum::<f32>(),
            _ => bag.iter().map(|weight| weight * weight).sum::<f32>().sqrt(),
        };
        // A bag whose weights cancel is a zero vector, as an empty one is.
        let factor = if divisor == 0.0 { 0.0 } else { 1.0 / divisor };
        bag.iter_mut().for_each(|weight| *weight *= factor);
    }
    coefficients
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_keys_of_several_lists_share_a_position() {
        let one_shard = Arrangement { salt: 0, shards: 1 };
        let (keys, positions) = unique(one_shard, &[&[9, 3, 9], &[], &[u64::MAX, 3]]);
        assert_eq!(keys, [3, 9, u64::MAX]);
        assert_eq!(positions, [vec![1, 0, 1], vec![], vec![2, 0]]);
        assert_eq!(unique(one_shard, &[]), (vec![], vec![]));
    }

    #[test]
    fn coefficients_follow_the_pool() {
        let of = |pool, weights: &[f32]| {
            Bags::new(pool, vec![0; 3], &[0, 2, 2, 3], weights).coefficients
        };
        assert!(of(Pool::Sum, &[]).is_empty());
        assert_eq!(of(Pool::Sum, &[2.0, 3.0, 4.0]), [2.0, 3.0, 4.0]);
        assert_eq!(of(Pool::Mean, &[]), [0.5, 0.5, 1.0]);
        assert_eq!(of(Pool::Mean, &[1.0, 3.0, 0.0]), [0.25, 0.75, 0.0]);
        assert_eq!(of(Pool::Sqrtn, &[3.0, 4.0, 2.0]), [0.6, 0.8, 1.0]);
    }

    #[test]
    fn a_bag_of_one_needs_no_coefficient() {
        let bags = Bags::new(Pool::Mean, vec![4, 5], &[0, 1, 2], &[]);
        assert!(bags.one_each());
        assert!(!Bags::new(Pool::Mean, vec![4], &[0, 0, 1], &[]).one_each(), "one is empty");
        assert!(!Bags::new(Pool::Sum, vec![4, 5], &[0, 2, 2], &[]).one_each());
    }

    #[test]
    fn padding_has_no_weight() {
        let bags = Bags::new(Pool::Padded, vec![7, 8, 9], &[0, 3, 3], &[1.0, 2.0, 3.0]);
        let (positions, coefficients, mask) = bags.padded(2);
        assert_eq!(positions, [7, 8, 0, 0]);
        assert_eq!(coefficients, [1.0, 2.0, 0.0, 0.0]);
        assert_eq!(mask, [1.0, 1.0, 0.0, 0.0]);
    }
}
