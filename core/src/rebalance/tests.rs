use proptest::prelude::*;

use super::*;
use crate::id::Incarnation;

const OPTIONS: Options =
    Options { start: 1.1, goal: 1.05, steps_max: 1000, promotions_only: false };

fn server(node: u32) -> ServerRef {
    ServerRef { node: NodeId(node), incarnation: Incarnation(u64::from(node) + 100) }
}

fn open(node: u32) -> Server {
    let (memory, memory_limit, capacity) = (0, 0, 0);
    let server = server(node);
    Server { server, zone: String::new(), open: true, memory, memory_limit, capacity }
}

fn shard(number: u32, members: &[u32], rows_per_s: f64, bytes: u64) -> Shard {
    Shard {
        job: JobId(1),
        shard: ShardId(number),
        primary: server(members[0]),
        members: members.iter().map(|node| server(*node)).collect(),
        bytes,
        rows_per_s,
        settled: true,
    }
}

/// What the steps make of the shards.
fn applied(shards: &[Shard], steps: &[Step]) -> Vec<Shard> {
    let mut shards = shards.to_vec();
    for step in steps {
        let shard = &mut shards[step.shard];
        match step.change {
            Change::Promote(to) => {
                assert!(shard.members.contains(&to) && shard.primary != to);
                shard.primary = to;
            }
            Change::Move(Move { from, to }) => {
                assert!(shard.members.iter().all(|member| member.node != to.node));
                let at = shard.members.iter().position(|one| *one == from).expect("a member moves");
                shard.members[at] = to;
                if shard.primary == from {
                    shard.primary = to;
                }
            }
        }
    }
    shards
}

fn objective(servers: &[Server], shards: &[Shard]) -> f64 {
    Board::new(servers, shards).loads.iter().map(|load| load.cost()).sum()
}

fn rows_of(servers: &[Server], shards: &[Shard]) -> f64 {
    let led = |server: &Server| {
        let led = shards.iter().filter(|shard| shard.primary == server.server);
        led.map(|shard| shard.rows_per_s).sum::<f64>()
    };
    let rows: Vec<f64> = servers.iter().map(led).collect();
    let mean = rows.iter().sum::<f64>() / rows.len() as f64;
    rows.into_iter().fold(0.0, f64::max) / mean
}

/// 8 of 64 shards carry 60 % of the rows, and all 8 are on the first of 4 servers, with `beside` others; the rest is spread evenly.
fn hot(replicas: u32, beside: u32) -> (Vec<Server>, Vec<Shard>) {
    let servers: Vec<_> = (1..=4).map(open).collect();
    let shards = (0..64).map(|number| {
        let first = if number < 8 + beside { 1 } else { number % 3 + 2 };
        let members: Vec<u32> =
            (0..replicas).map(|copy| (first - 1 + copy * (1 + number / 4 % 3)) % 4 + 1).collect();
        let rows = if number < 8 { 0.6 / 8.0 } else { 0.4 / 56.0 };
        shard(number, &members, rows * 1e6, 1 << 25)
    });
    (servers, shards.collect())
}

#[test]
fn eight_hot_shards_on_one_of_four_servers_are_spread_in_at_most_twelve_moves_and_then_nothing_moves()
 {
    for (replicas, beside) in [(1, 4), (1, 8), (1, 14), (2, 8), (2, 14)] {
        let (servers, shards) = hot(replicas, beside);
        assert!(rows_of(&servers, &shards) >= 1.8);
        let Plan { steps, after, .. } = plan(&servers, &shards, OPTIONS);
        let shards = applied(&shards, &steps);
        // With backups their work counts too.
        let work = after.iter().copied().fold(0.0, f64::max);
        let worst = if replicas == 1 { rows_of(&servers, &shards) } else { work };
        let found = format!("{replicas}, {beside}: {} steps to {worst}: {after:?}", steps.len());
        assert!(steps.len() <= 12 && worst <= 1.15, "{found}");
        assert_eq!(plan(&servers, &shards, OPTIONS).steps, [], "{found}");
        // What is measured fluctuates.
        let noisy = shards.iter().enumerate().map(|(number, shard)| {
            let rows_per_s = shard.rows_per_s * (0.95 + (number * 7 % 11) as f64 / 100.0);
            Shard { rows_per_s, ..shard.clone() }
        });
        let noisy: Vec<_> = noisy.collect();
        let automatic = Options { start: 1.15, ..OPTIONS };
        assert_eq!(plan(&servers, &noisy, automatic).steps, [], "{found}");
    }
}

#[test]
fn primaries_that_a_failover_left_on_one_server_are_spread_without_a_copy() {
    let servers: Vec<_> = (1..=3).map(open).collect();
    let shards: Vec<_> =
        (0..24).map(|number| shard(number, &[1, 2 + number % 2], 1000.0, 1 << 20)).collect();
    let options = Options { promotions_only: true, ..OPTIONS };
    let Plan { steps, before, after } = plan(&servers, &shards, options);
    assert!(
        !steps.is_empty() && steps.iter().all(|step| matches!(step.change, Change::Promote(_)))
    );
    assert!(before[0] > 2.0 && after.iter().all(|work| *work < 1.1), "{before:?} {after:?}");
}

#[test]
fn a_new_server_gets_its_part_although_nothing_is_pushed() {
    let servers: Vec<_> = (1..=3).map(open).collect();
    let shards: Vec<_> = (0..24)
        .map(|number| shard(number, &[1 + number % 2, 2 - number % 2], 0.0, 1 << 20))
        .collect();
    let mut after = shards;
    for _ in 0..3 {
        let Plan { steps, .. } = plan(&servers, &after, OPTIONS);
        after = applied(&after, &steps);
    }
    assert_eq!(plan(&servers, &after, OPTIONS).steps, []);
    let copies = |node| after.iter().filter(|shard| shard.members.contains(&server(node))).count();
    assert!((10..=18).contains(&copies(3)), "{}", copies(3));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn a_plan_keeps_the_rules_and_lowers_the_sum_and_soon_there_is_none(
        servers in prop::collection::vec((0u8..3, prop::bool::weighted(0.8), 0u64..3), 2..7),
        shards in prop::collection::vec((0u32..1000, any::<u32>(), 1usize..=3, 0u64..1 << 24, prop::bool::weighted(0.9)), 1..50),
    ) {
        let servers: Vec<Server> = (1..).zip(&servers).map(|(node, (zone, open, limit))| Server {
            server: server(node),
            zone: format!("zone-{zone}"),
            open: *open,
            memory: 1 << 24,
            memory_limit: limit * (1 << 25),
            capacity: 0,
        }).collect();
        let count = servers.len();
        let shards: Vec<Shard> = (0..).zip(&shards).map(|(number, (rows, first, copies, bytes, settled))| {
            let members: Vec<u32> = (0..(*copies).min(count)).map(|copy| ((*first as usize + copy) % count) as u32 + 1).collect();
            Shard { settled: *settled, ..shard(number, &members, f64::from(*rows), *bytes) }
        }).collect();
        let Plan { steps, .. } = plan(&servers, &shards, OPTIONS);
        let mut touched: Vec<_> = steps.iter().map(|step| step.shard).collect();
        touched.sort_unstable();
        prop_assert!(touched.windows(2).all(|pair| pair[0] != pair[1]), "each is based on what is committed");
        let find = |one: ServerRef| servers.iter().find(|server| server.server == one).unwrap();
        let mut now = shards.clone();
        let mut coming = std::collections::BTreeMap::new();
        for step in &steps {
            let before = objective(&servers, &now);
            let next = applied(&now, std::slice::from_ref(step));
            prop_assert!(objective(&servers, &next) < before);
            prop_assert!(shards[step.shard].settled);
            let to = match step.change { Change::Promote(to) | Change::Move(Move { to, .. }) => to };
            prop_assert!(find(to).open);
            if let Change::Move(moving) = step.change {
                let bytes = coming.entry(to).or_insert_with(|| find(to).memory);
                *bytes += shards[step.shard].bytes;
                prop_assert!(find(to).memory_limit == 0 || *bytes <= find(to).memory_limit);
                let others = now[step.shard].members.iter().filter(|one| **one != moving.from);
                let zones: Vec<_> = others.map(|one| &find(*one).zone).collect();
                let beside = |one: ServerRef| zones.iter().filter(|zone| **zone == &find(one).zone).count();
                prop_assert!(beside(to) <= beside(moving.from), "copies in different zones stay so");
            }
            now = next;
        }
        for shard in &now {
            let mut nodes: Vec<_> = shard.members.iter().map(|member| member.node).collect();
            nodes.sort_unstable();
            nodes.dedup();
            prop_assert_eq!(nodes.len(), shard.members.len());
            prop_assert!(shard.members.contains(&shard.primary));
        }
        // Each plan lowers the sum, until there is none.
        let mut left = 100;
        loop {
            let memory = |one: &Server| Server { memory: coming.get(&one.server).copied().unwrap_or(one.memory), ..one.clone() };
            let later: Vec<_> = servers.iter().map(memory).collect();
            let Plan { steps, .. } = plan(&later, &now, OPTIONS);
            if steps.is_empty() {
                break;
            }
            left -= 1;
            prop_assert!(left > 0, "it does not end");
            for step in &steps {
                if let Change::Move(moving) = step.change {
                    *coming.entry(moving.to).or_insert_with(|| find(moving.to).memory) += shards[step.shard].bytes;
                }
            }
            now = applied(&now, &steps);
        }
    }
}

#[test]
fn any_number_that_a_server_reports_is_taken() {
    let full = Server { memory: u64::MAX, memory_limit: 1, ..open(3) };
    let shards: Vec<Shard> = (0..4).map(|one| shard(one, &[1], 1.0, u64::MAX)).collect();
    let Plan { steps, .. } = plan(&[open(1), open(2), full], &shards, OPTIONS);
    assert!(!steps.is_empty());
    for step in steps {
        assert!(matches!(step.change, Change::Move(Move { to, .. }) if to == server(2)));
    }
}

#[test]
fn a_server_is_given_no_more_than_it_has_room_for() {
    let shards: Vec<Shard> = (0..12).map(|one| shard(one, &[1], 100.0, 1 << 20)).collect();
    for (capacity, copies) in [(0, 6), (1 << 22, 4), ((1 << 20) - 1, 0)] {
        let servers = [open(1), Server { capacity, ..open(2) }];
        let Plan { steps, .. } = plan(&servers, &shards, OPTIONS);
        let after = applied(&shards, &steps);
        let there = after.iter().filter(|shard| shard.members == [server(2)]).count();
        assert_eq!(there, copies, "with room for {capacity} bytes");
    }
}
