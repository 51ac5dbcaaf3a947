//! A replica at an LSN equals its primary at that LSN, byte for byte (invariant 3 of the design).

use downpour_core::cells::ClosedSessions;
use downpour_core::id::{SessionId, VariableId};
use proptest::prelude::*;

use super::fixture;
use super::fixture::*;
use crate::record::{Change, Push, Record, Update};
use crate::shard::{Pushed, Role, Room, Shard};
use downpour_proto::v1;

#[derive(Clone, Debug)]
enum Step {
    Push {
        session: u64,
        updates: Vec<Update>,
    },
    /// The backup gets what there is.
    Replicate,
    /// The backup takes over, and the old primary follows.
    SwitchPrimary,
    /// All sessions up to this one end, but for the odd ones.
    Close(u64),
}

fn gradient() -> impl Strategy<Value = f32> {
    prop_oneof![8 => -2.0f32..2.0, 1 => Just(f32::MAX), 1 => Just(f32::NAN)]
}

fn an_update() -> impl Strategy<Value = Update> {
    let keys = proptest::collection::btree_set(0u64..40, 0..6);
    let table = |id: VariableId, dim: usize| {
        (keys.clone(), proptest::collection::vec(gradient(), 6 * 3)).prop_map(
            move |(keys, gradients)| {
                let keys: Vec<u64> = keys.into_iter().collect();
                let gradients = raw_floats(gradients.into_iter().take(keys.len() * dim));
                update(id, Change::Rows { keys: raw_keys(&keys), gradients })
            },
        )
    };
    let dense = (proptest::collection::btree_set(0u32..4, 0..4), gradient(), any::<bool>());
    prop_oneof![
        4 => table(COUNTS, 1),
        4 => table(EMBEDDING, 3),
        1 => table(VariableId(9), 1),
        1 => table(EMBEDDING, 2),
        4 => dense.prop_map(|(numbers, value, first)| {
            let numbers: Vec<u32> = numbers.into_iter().collect();
            let len = numbers.iter().map(|&number| if number == 2 { 5 } else { 8 }).sum();
            let blocks = blocks(&numbers, len, value);
            update(DENSE, if first { Change::Values(blocks) } else { Change::Gradients(blocks) })
        }),
    ]
}

fn a_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => (1u64..9, proptest::collection::vec(an_update(), 0..4)).prop_map(|(session, mut updates)| {
            updates.sort_by_key(|update| update.variable);
            updates.dedup_by_key(|update| update.variable);
            Step::Push { session, updates }
        }),
        3 => Just(Step::Replicate),
        1 => Just(Step::SwitchPrimary),
        1 => (0u64..6).prop_map(Step::Close),
    ]
}

/// The next number of a session, as a well-behaved client would send it.
fn next(shard: &mut Shard, push: Push) -> Push {
    match fixture::push(shard, Push { sequence: u64::MAX, ..push.clone() }) {
        Pushed::Gap { expected, .. } => Push { sequence: expected, ..push },
        _ => push,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_backup_at_an_lsn_equals_its_primary_byte_for_byte(
        steps in proptest::collection::vec(a_step(), 1..40)
    ) {
        let [mut primary, mut backup] = cluster();
        let mut version = 1;
        for step in steps {
            match step {
                Step::Push { session, updates } => {
                    let push = push_of(SessionId(session), 1, updates);
                    let push = next(&mut primary, push);
                    fixture::push(&mut primary, push);
                }
                Step::Replicate => {
                    replicate(&mut primary, &mut backup);
                    prop_assert_eq!(primary.last(), backup.last());
                    prop_assert_eq!(encoded(&primary), encoded(&backup));
                    prop_assert_eq!(primary.state().digest(), backup.state().digest());
                }
                Step::SwitchPrimary => {
                    version += 1;
                    let epoch = primary.epoch().0 + 1;
                    let node = backup.me.node.0;
                    let view = changed(&primary.view, |view| {
                        view.shards[0] = route(epoch, version, node, &[1, 2]);
                    });
                    backup.on_view(view);
                    promote(&mut backup, std::slice::from_mut(&mut primary));
                    prop_assert!(matches!(backup.role(), Role::Primary(_)));
                    std::mem::swap(&mut primary, &mut backup);
                }
                Step::Close(high_water) => {
                    let odd = (1..=high_water).filter(|session| session % 2 == 1).map(SessionId);
                    let sessions = ClosedSessions { high_water, open: odd.collect() };
                    let view = changed(&primary.view, |view| view.sessions = sessions);
                    primary.on_view(view);
                }
            }
        }
        replicate(&mut primary, &mut backup);
        prop_assert_eq!(encoded(&primary), encoded(&backup));
    }

    #[test]
    fn what_the_log_says_survives_the_wire(updates in proptest::collection::vec(an_update(), 1..4)) {
        let [mut primary, _] = cluster();
        let mut updates = updates;
        updates.sort_by_key(|update| update.variable);
        updates.dedup_by_key(|update| update.variable);
        fixture::push(&mut primary, push_of(SESSION, 1, updates));
        let batch = primary.batch(server(2), Room::Whole(usize::MAX)).expect("something to send");
        for record in batch.records {
            let wire = v1::Record::from(&*record);
            prop_assert_eq!(Record::try_from(wire), Ok(Record::clone(&record)));
        }
    }
}
