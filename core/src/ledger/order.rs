//! The order of the tasks in a pass: a permutation that needs no list.

use crate::mix::mix64;

/// Which task is at which position of a pass. A function of the number of tasks, the seed and the pass, the same on every machine.
///
/// A Feistel network over the smallest even number of bits that holds all tasks; what falls outside is put through it again ("cycle walking": Black and Rogaway,
/// "Ciphers with arbitrary finite domains", 2002). Less than four rounds through it for each task on average.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    tasks: u32,
    /// None: in the dataset's own order.
    key: Option<u64>,
    half_bits: u32,
}

const ROUNDS: u64 = 6;

impl Order {
    /// Of so many tasks, in the dataset's own order where there is no seed.
    #[must_use]
    pub fn new(tasks: u32, seed: Option<u64>, pass: u64) -> Self {
        let bits = u32::BITS - tasks.saturating_sub(1).leading_zeros();
        let key = seed.map(|seed| mix64(mix64(seed.wrapping_add(GOLDEN)) ^ pass.wrapping_add(1)));
        Order { tasks, key, half_bits: bits.div_ceil(2).max(1) }
    }

    /// The task at a position, which is below the number of tasks.
    #[must_use]
    pub fn task(&self, position: u32) -> u32 {
        let Some(key) = self.key else { return position };
        let mut at = u64::from(position);
        loop {
            at = self.permute(key, at);
            if at < u64::from(self.tasks) {
                return at as u32;
            }
        }
    }

    fn permute(&self, key: u64, at: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (at >> self.half_bits, at & mask);
        for round in 1..=ROUNDS {
            let mixed = mix64(key ^ mix64(right.wrapping_add(round.wrapping_mul(GOLDEN))));
            (left, right) = (right, left ^ (mixed & mask));
        }
        left << self.half_bits | right
    }
}

/// 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn each_task_has_one_position(tasks in 1u32..3000, seed: u64, pass: u64) {
            let order = Order::new(tasks, Some(seed), pass);
            let mut seen: Vec<u32> = (0..tasks).map(|position| order.task(position)).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..tasks).collect::<Vec<_>>());
        }
    }

    #[test]
    fn seeds_and_passes_make_different_orders_and_no_seed_the_datasets_own() {
        let order = |seed, pass| {
            let order = Order::new(1000, seed, pass);
            (0..1000).map(|position| order.task(position)).collect::<Vec<u32>>()
        };
        assert_eq!(order(None, 3), (0..1000).collect::<Vec<_>>());
        assert_eq!(order(Some(1), 0), order(Some(1), 0));
        assert_ne!(order(Some(1), 0), order(Some(1), 1));
        assert_ne!(order(Some(1), 0), order(Some(2), 0));
        // Few stay where they were, or beside who was beside them: a random order has one of each on average.
        let mixed = order(Some(1), 0);
        let fixed = mixed.iter().zip(0..).filter(|(task, position)| *task == position).count();
        let beside = mixed.windows(2).filter(|pair| pair[0] + 1 == pair[1]).count();
        assert!(fixed < 8 && beside < 8, "{fixed} {beside}");
    }

    #[test]
    fn the_order_is_part_of_the_contract() {
        let order = Order::new(10, Some(7), 1);
        let order: Vec<u32> = (0..10).map(|position| order.task(position)).collect();
        assert_eq!(order, [0, 7, 2, 5, 3, 4, 8, 9, 1, 6]);
    }
}
