//! Keys of a batch: each key of a table once, and where every occurrence of it went. Pure.

use downpour_data::Pool;

/// Keys that occur in a batch, each once, rising (the order of the wire).
pub(crate) type UniqueKeys = Vec<u64>;

/// The unique keys of several lists, and for each list the position of every key among them.
pub(crate) fn unique(lists: &[&[u64]]) -> (UniqueKeys, Vec<Vec<i64>>) {
    let mut positions: Vec<Vec<i64>> = lists.iter().map(|list| vec![0; list.len()]).collect();
    let mut occurrences: Vec<(u64, u32, u32)> =
        Vec::with_capacity(lists.iter().map(|l| l.len()).sum());
    for (l, list) in lists.iter().enumerate() {
        occurrences.extend(list.iter().enumerate().map(|(i, &key)| (key, l as u32, i as u32)));
    }
    occurrences.sort_unstable();
    let mut keys = UniqueKeys::new();
    for (key, list, i) in occurrences {
        if keys.last() != Some(&key) {
            keys.push(key);
        }
        positions[list as usize][i as usize] = keys.len() as i64 - 1;
    }
    (keys, positions)
}

/// How the rows of a bag become one vector: row `i` is the sum of `coefficients × rows[positions]` over `offsets[i]..offsets[i+1]`.
#[derive(Debug, PartialEq)]
pub(crate) struct Bags {
    pub(crate) positions: Vec<i64>,
    /// One more than there are bags.
    pub(crate) offsets: Vec<i64>,
    /// Empty where each is 1.
    pub(crate) coefficients: Vec<f32>,
}

impl Bags {
    /// `weights` is empty or has one for each key.
    pub(crate) fn new(pool: Pool, positions: Vec<i64>, offsets: &[u32], weights: &[f32]) -> Self {
        let offsets: Vec<i64> = offsets.iter().map(|&offset| offset.into()).collect();
        let coefficients = coefficients(pool, &offsets, weights);
        Self { positions, offsets, coefficients }
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

    /// The bags as a matrix of `width` columns: (positions, coefficients, mask). A place without a key has position, coefficient
    /// and mask 0.
    pub(crate) fn padded(&self, width: usize) -> (Vec<i64>, Vec<f32>, Vec<f32>) {
        let places = self.len() * width;
        let (mut positions, mut coefficients, mut mask) =
            (vec![0; places], vec![0.0; places], vec![0.0; places]);
        for (bag, pair) in self.offsets.windows(2).enumerate() {
            for (column, i) in (pair[0] as usize..pair[1] as usize).take(width).enumerate() {
                positions[bag * width + column] = self.positions[i];
                coefficients[bag * width + column] =
                    self.coefficients.get(i).copied().unwrap_or(1.0);
                mask[bag * width + column] = 1.0;
            }
        }
        (positions, coefficients, mask)
    }
}

fn coefficients(pool: Pool, offsets: &[i64], weights: &[f32]) -> Vec<f32> {
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
        let (keys, positions) = unique(&[&[9, 3, 9], &[], &[u64::MAX, 3]]);
        assert_eq!(keys, [3, 9, u64::MAX]);
        assert_eq!(positions, [vec![1, 0, 1], vec![], vec![2, 0]]);
        assert_eq!(unique(&[]), (vec![], vec![]));
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
