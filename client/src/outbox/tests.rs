//! The outbox against model servers that redirect, refuse, crash and answer late.

use std::collections::{BTreeMap, VecDeque};

use downpour_core::cells::{RefusalReason, SessionCells, Verdict};
use downpour_core::id::VariableId;
use downpour_proto::validate;
use proptest::prelude::*;

use super::*;
use crate::state::tests::server;

const MESSAGE_BYTES: usize = 1 << 20;
const SHARDS: u32 = 4;
const SERVERS: u32 = 3;
const SESSION: SessionId = SessionId(9);

/// A shard as its replicas agree on it: what was applied survives every change of primary, until all replicas die at once.
#[derive(Clone, Default)]
struct Shard {
    numbering: u64,
    cells: SessionCells,
    lsn: Lsn,
    /// Marks of the pushes whose parts were applied or refused, in order.
    consumed: Vec<u32>,
    refused: Vec<u32>,
}

/// A stream with what is under way in both directions.
struct Wire {
    server: ServerRef,
    requests: VecDeque<v1::PushRequest>,
    replies: VecDeque<v1::PushReply>,
}

struct World {
    outbox: Outbox,
    now: Duration,
    shards: Vec<Shard>,
    /// What a checkpoint holds of each.
    saved: Vec<Shard>,
    /// Requests on connections that the client gave up and servers did not.
    late: VecDeque<(ServerRef, v1::PushRequest)>,
    rolled_back: Vec<RolledBack>,
    /// Where shards are, and where the client believes they are.
    routes: Vec<Route>,
    known: Vec<Route>,
    wires: BTreeMap<LinkId, Wire>,
    /// By push: its mark and shards.
    pushed: BTreeMap<PushId, (u32, Vec<ShardId>)>,
    outcomes: BTreeMap<PushId, PushOutcome>,
}

/// What a server does with the parts of a request that it could take.
#[derive(Clone, Copy, Debug)]
enum Mood {
    Takes,
    /// Not ready for the first part (and ready for the rest).
    RefusesFirst,
    Overloaded,
    /// Finds the gradients not finite.
    RefusesForGood,
}

#[derive(Clone, Debug)]
enum Step {
    Push(Vec<u32>),
    Deliver(usize, Mood),
    Answer(usize),
    Break(usize),
    Move(u32, u32),
    /// A checkpoint of a shard; and every replica dies, and it goes on from there.
    Save(u32),
    SetBack(u32, u32),
    /// A server reads what lies in a connection that the client gave up.
    Late,
    Learn,
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let mood = prop_oneof![
        6 => Just(Mood::Takes),
        1 => Just(Mood::RefusesFirst),
        1 => Just(Mood::Overloaded),
        1 => Just(Mood::RefusesForGood),
    ];
    prop_oneof![
        6 => prop::sample::subsequence((0..SHARDS).collect::<Vec<_>>(), 0..=SHARDS as usize)
            .prop_map(Step::Push),
        10 => (any::<usize>(), mood).prop_map(|(wire, mood)| Step::Deliver(wire, mood)),
        10 => any::<usize>().prop_map(Step::Answer),
        1 => any::<usize>().prop_map(Step::Break),
        1 => (0..SHARDS, 1..=SERVERS).prop_map(|(shard, node)| Step::Move(shard, node)),
        1 => (0..SHARDS).prop_map(Step::Save),
        1 => (0..SHARDS, 1..=SERVERS).prop_map(|(shard, node)| Step::SetBack(shard, node)),
        2 => Just(Step::Late),
        2 => Just(Step::Learn),
        4 => (0u64..150).prop_map(Step::Wait),
    ]
}

impl World {
    fn new() -> Self {
        let route = |shard: u32| Route {
            epoch: Epoch(1),
            primary: Some(server(1 + shard % SERVERS, u64::from(1 + shard % SERVERS))),
        };
        let routes: Vec<Route> = (0..SHARDS).map(route).collect();
        World {
            outbox: Outbox::new(JobId(1), SESSION, MESSAGE_BYTES, 2, routes.iter().copied()),
            now: Duration::ZERO,
            shards: vec![Shard::default(); SHARDS as usize],
            saved: vec![Shard::default(); SHARDS as usize],
            late: VecDeque::new(),
            rolled_back: Vec::new(),
            known: routes.clone(),
            routes,
            wires: BTreeMap::new(),
            pushed: BTreeMap::new(),
            outcomes: BTreeMap::new(),
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Push(shards) => {
                let mark = self.pushed.len() as u32 + 1;
                let shards: Vec<ShardId> = shards.into_iter().map(ShardId).collect();
                let parts = shards.iter().map(|&shard| part(shard, mark, 100)).collect();
                let push = self.outbox.push(mark.into(), 1, parts);
                self.pushed.insert(push, (mark, shards));
            }
            Step::Deliver(wire, mood) => {
                if let Some(link) = self.pick(wire) {
                    self.deliver(link, mood);
                }
            }
            Step::Answer(wire) => {
                if let Some(link) = self.pick(wire) {
                    self.answer(link);
                }
            }
            Step::Break(wire) => {
                if let Some(link) = self.pick(wire)
                    && let Some(wire) = self.wires.remove(&link)
                {
                    let late = wire.requests.into_iter().map(|request| (wire.server, request));
                    self.late.extend(late);
                    self.outbox.link_down(link, self.now);
                }
            }
            Step::Move(shard, node) => {
                let route = &mut self.routes[shard as usize];
                route.epoch = Epoch(route.epoch.0 + 1);
                route.primary = Some(server(node, node.into()));
            }
            Step::Save(shard) => {
                self.saved[shard as usize] = self.shards[shard as usize].clone();
            }
            Step::SetBack(shard, node) => {
                self.step(Step::Move(shard, node));
                let mut state = self.saved[shard as usize].clone();
                state.numbering = self.routes[shard as usize].epoch.0;
                self.shards[shard as usize] = state;
            }
            Step::Late => {
                if let Some((server, request)) = self.late.pop_front() {
                    self.take(server, &request, Mood::Takes);
                }
            }
            Step::Learn => {
                self.known.clone_from(&self.routes);
                self.reroute();
                let numbering = |shard: ShardId| self.shards[shard.0 as usize].numbering;
                let set_back = |shard| Some(Epoch(numbering(shard))).filter(|epoch| epoch.0 > 0);
                self.outbox.set_back(set_back);
            }
            Step::Wait(ms) => self.now += Duration::from_millis(ms),
        }
        self.send();
    }

    fn pick(&self, index: usize) -> Option<LinkId> {
        let links: Vec<LinkId> = self.wires.keys().copied().collect();
        Some(*links.get(index.checked_rem(links.len())?)?)
    }

    fn send(&mut self) {
        for send in self.outbox.sends(self.now) {
            validate::push_request(&send.request).expect("a well-formed request");
            assert!(!send.request.parts.is_empty());
            let wire = self.wires.entry(send.link).or_insert_with(|| Wire {
                server: send.server,
                requests: VecDeque::new(),
                replies: VecDeque::new(),
            });
            assert_eq!(wire.server, send.server);
            wire.requests.push_back(send.request);
        }
        self.rolled_back.extend(self.outbox.take_rolled_back());
        for (push, outcome) in self.outbox.take_completed() {
            let outcome = outcome.expect("nothing failed for good");
            if self.pushed.contains_key(&push) {
                let again = self.outcomes.insert(push, outcome);
                assert_eq!(again, None, "a push has one outcome");
            }
        }
    }

    fn reroute(&mut self) {
        let known = &self.known;
        self.outbox.reroute(|shard| known[shard.0 as usize]);
    }

    fn deliver(&mut self, link: LinkId, mood: Mood) {
        let Some(wire) = self.wires.get_mut(&link) else { return };
        let Some(request) = wire.requests.pop_front() else { return };
        let server = wire.server;
        let parts = self.take(server, &request, mood);
        let Some(wire) = self.wires.get_mut(&link) else { return };
        wire.replies.push_back(v1::PushReply { request: request.request, parts });
    }

    fn take(
        &mut self,
        server: ServerRef,
        request: &v1::PushRequest,
        mood: Mood,
    ) -> Vec<v1::PushPartReply> {
        let parts = request.parts.iter().enumerate().map(|(index, part)| {
            let route = self.routes[part.shard as usize];
            let shard = &mut self.shards[part.shard as usize];
            let ready = match mood {
                Mood::Overloaded => false,
                Mood::RefusesFirst => index > 0,
                Mood::Takes | Mood::RefusesForGood => true,
            };
            let result = if (route.primary, route.epoch.0) != (Some(server), part.epoch) {
                PartResult::Redirect(v1::Redirect {
                    epoch: route.epoch.0,
                    primary: route.primary.map(Into::into),
                })
            } else if !ready {
                PartResult::Retry(v1::Retry { reason: v1::RetryReason::Overloaded.into() })
            } else {
                let refuse = matches!(mood, Mood::RefusesForGood);
                take(shard, part, route.epoch, refuse)
            };
            v1::PushPartReply { shard: part.shard, sequence: part.sequence, result: Some(result) }
        });
        parts.collect()
    }

    fn answer(&mut self, link: LinkId) {
        let Some(wire) = self.wires.get_mut(&link) else { return };
        let Some(reply) = wire.replies.pop_front() else { return };
        let redirects = self.outbox.reply(link, reply, self.now);
        for Redirected { shard, epoch, primary } in redirects.expect("an honest server") {
            let known = &mut self.known[shard.0 as usize];
            if epoch > known.epoch {
                *known = Route { epoch, primary };
            }
        }
        self.reroute();
    }

    /// Faults are over: everything must arrive.
    fn settle(&mut self) {
        self.step(Step::Learn);
        for _ in 0..10_000 {
            if self.outbox.settled(self.outbox.newest()) {
                return;
            }
            self.step(Step::Wait(5));
            for wire in 0..self.wires.len() {
                self.step(Step::Deliver(wire, Mood::Takes));
                self.step(Step::Answer(wire));
            }
        }
        panic!("pushes are stuck: {:#?}", self.outbox);
    }

    fn check(&self) {
        assert_eq!(self.outcomes.len(), self.pushed.len(), "each push has its outcome");
        for (push, (_, shards)) in &self.pushed {
            let outcome = &self.outcomes[push];
            assert_eq!(&outcome.lsns.keys().copied().collect::<Vec<_>>(), shards);
        }
        for (id, shard) in (0..).map(ShardId).zip(&self.shards) {
            let wanted = self.pushed.values().filter(|(_, shards)| shards.contains(&id));
            let mut wanted: Vec<u32> = wanted.map(|(mark, _)| *mark).collect();
            let mut lost = Vec::new();
            for back in self.rolled_back.iter().filter(|back| back.shard == id) {
                let (first, last) = back.clocks.expect("few runs");
                let start =
                    wanted.iter().position(|mark| u64::from(*mark) == first).expect("named");
                let end = wanted.iter().position(|mark| u64::from(*mark) == last).expect("named");
                let gone = wanted.drain(start..=end);
                lost.extend(gone);
            }
            assert_eq!(
                shard.consumed, wanted,
                "shard {id} takes each part once and in order, but for those that it says it lost"
            );
            let refused = self.outcomes.values().flat_map(|outcome| &outcome.refusals);
            let refused = refused.filter(|(shard, _)| *shard == id);
            let refused = refused.map(|(_, refusal)| refusal.variable.0);
            let refused: Vec<u32> = refused.filter(|mark| !lost.contains(mark)).collect();
            assert_eq!(shard.refused, refused, "shard {id}: each refusal is told");
        }
    }
}

/// A primary's check and apply.
fn take(shard: &mut Shard, part: &v1::PushPart, epoch: Epoch, refuse: bool) -> PartResult {
    let numbering = shard.numbering;
    if part.numbering != numbering {
        let expected = shard.cells.next(SESSION);
        return PartResult::Gap(v1::Gap { expected, numbering });
    }
    match shard.cells.check(SESSION, part.sequence) {
        Verdict::Apply => {
            let mark = part.updates.first().map_or(0, |update| update.variable);
            let refuse = refuse && mark > 0;
            let variable = VariableId(mark);
            let refusal = refuse.then_some(Refusal { reason: RefusalReason::NotFinite, variable });
            shard.lsn = shard.lsn.next_in(epoch);
            shard.cells.record(SESSION, part.sequence, shard.lsn, refusal);
            shard.consumed.extend(Some(mark).filter(|mark| *mark > 0));
            shard.refused.extend(refuse.then_some(mark));
            let refusal = refusal.map(Into::into);
            PartResult::Done(v1::PushOutcome { lsn: shard.lsn.0, refusal, ..Default::default() })
        }
        Verdict::Repeat { lsn, refusal } => {
            let refusal = refusal.map(Into::into);
            PartResult::Done(v1::PushOutcome {
                lsn: lsn.0,
                repeated: true,
                refusal,
                ..Default::default()
            })
        }
        Verdict::Gap { expected } => PartResult::Gap(v1::Gap { expected, numbering }),
        Verdict::Closed => PartResult::SessionClosed(v1::SessionClosed {}),
    }
}

/// A part that is recognised by its mark.
fn part(shard: ShardId, mark: u32, bytes: usize) -> OutPart {
    let body = v1::update::Body::Values(v1::DenseBlocks::default());
    OutPart { shard, updates: vec![v1::Update { variable: mark, body: Some(body) }], bytes }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn each_part_is_applied_once_and_in_order_and_each_push_has_one_outcome(
        steps in prop::collection::vec(step(), 0..200),
    ) {
        let mut world = World::new();
        steps.into_iter().for_each(|step| world.step(step));
        world.settle();
        world.check();
    }

    #[test]
    fn a_refusal_for_good_reaches_its_push_even_if_the_answer_was_lost(lose: bool) {
        let mut world = World::new();
        world.step(Step::Push(vec![0]));
        world.step(Step::Deliver(0, Mood::RefusesForGood));
        if lose {
            world.step(Step::Break(0));
        }
        world.settle();
        world.check();
        let outcome = world.outcomes.values().next().unwrap();
        prop_assert_eq!(outcome.refusals.len(), 1);
    }
}

fn one_shard() -> Outbox {
    let route = Route { epoch: Epoch(1), primary: Some(server(1, 1)) };
    Outbox::new(JobId(1), SESSION, MESSAGE_BYTES, 1, [route].into_iter())
}

fn sequences(sends: &[Send]) -> Vec<u64> {
    sends.iter().flat_map(|send| &send.request.parts).map(|part| part.sequence).collect()
}

fn reply(send: &Send, result: &PartResult) -> v1::PushReply {
    let part = |part: &v1::PushPart| v1::PushPartReply {
        shard: part.shard,
        sequence: part.sequence,
        result: Some(*result),
    };
    let parts = send.request.parts.iter().map(part).collect();
    v1::PushReply { request: send.request.request, parts }
}

fn done(lsn: u64) -> PartResult {
    PartResult::Done(v1::PushOutcome { lsn, ..Default::default() })
}

const OVERLOADED: PartResult =
    PartResult::Retry(v1::Retry { reason: v1::RetryReason::Overloaded as i32 });
const START: Duration = Duration::ZERO;
const LATER: Duration = Duration::from_secs(1);

#[test]
fn parts_of_one_push_for_one_server_travel_together_up_to_the_size_of_a_message() {
    let route = Route { epoch: Epoch(1), primary: Some(server(1, 1)) };
    let mut outbox = Outbox::new(JobId(1), SESSION, MESSAGE_BYTES, 1, [route; 3].into_iter());
    let shards = || (0..3).map(ShardId);
    outbox.push(7, 3, shards().map(|shard| part(shard, 1, 100)).collect());
    let sends = outbox.sends(START);
    assert_eq!(sends.len(), 1);
    let v1::PushRequest { clock, view_version, incarnation, .. } = sends[0].request;
    assert_eq!((clock, view_version, incarnation), (7, 3, 1));
    outbox.push(8, 3, shards().map(|shard| part(shard, 2, MESSAGE_BYTES / 2)).collect());
    let sends = outbox.sends(START);
    let parts: Vec<usize> = sends.iter().map(|send| send.request.parts.len()).collect();
    assert_eq!(parts, [2, 1]);
    for mark in [3, 4] {
        outbox.push(9, 3, shards().map(|shard| part(shard, mark, 100)).collect());
    }
    let sends = outbox.sends(START);
    let parts: Vec<usize> = sends.iter().map(|send| send.request.parts.len()).collect();
    assert_eq!(parts, [3, 3], "one request for each push, also when they were waiting");
}

#[test]
fn half_of_the_outcome_window_is_on_its_way_at_most() {
    let mut outbox = one_shard();
    for mark in 0..OUTCOME_WINDOW as u32 {
        outbox.push(1, 1, vec![part(ShardId(0), mark + 1, 1)]);
    }
    let sends = outbox.sends(START);
    assert_eq!(sequences(&sends), (1..=WINDOW as u64).collect::<Vec<_>>());
    assert!(outbox.sends(LATER).is_empty());
    outbox.reply(sends[0].link, reply(&sends[0], &done(1)), START).unwrap();
    assert_eq!(sequences(&outbox.sends(START)), [WINDOW as u64 + 1]);
}

#[test]
fn what_an_older_send_complains_about_does_not_repeat_the_newer_one() {
    let mut outbox = one_shard();
    let mut old = Vec::new();
    for mark in 1..=3 {
        outbox.push(1, 1, vec![part(ShardId(0), mark, 1)]);
        old.extend(outbox.sends(START));
    }
    outbox.reply(old[0].link, reply(&old[0], &OVERLOADED), START).unwrap();
    assert!(outbox.sends(START).is_empty(), "it waits a little");
    assert!(outbox.wake().is_some_and(|wake| wake > START && wake < LATER));
    let new = outbox.sends(LATER);
    assert_eq!(sequences(&new), [1], "the first goes ahead alone");
    let gap = PartResult::Gap(v1::Gap { expected: 1, numbering: 0 });
    outbox.reply(old[1].link, reply(&old[1], &gap), LATER).unwrap();
    outbox.reply(old[2].link, reply(&old[2], &gap), LATER).unwrap();
    assert!(outbox.sends(LATER + LATER).is_empty(), "the new send is already on its way");
    outbox.reply(new[0].link, reply(&new[0], &done(1)), LATER).unwrap();
    let rest = outbox.sends(LATER);
    assert_eq!(sequences(&rest), [2, 3]);
    for (send, lsn) in rest.iter().zip(2..) {
        outbox.reply(send.link, reply(send, &done(lsn)), LATER).unwrap();
    }
    assert_eq!(outbox.take_completed().len(), 3);
}

#[test]
fn a_shard_without_a_primary_waits_for_its_route() {
    let mut outbox = one_shard();
    outbox.reroute(|_| Route { epoch: Epoch(2), primary: None });
    outbox.push(1, 1, vec![part(ShardId(0), 1, 1)]);
    assert!(outbox.sends(LATER).is_empty());
    assert_eq!(outbox.wake(), None);
    outbox.reroute(|_| Route { epoch: Epoch(3), primary: Some(server(2, 2)) });
    let sends = outbox.sends(LATER);
    assert_eq!((sends[0].server, sends[0].request.parts[0].epoch), (server(2, 2), 3));
}

#[test]
fn an_end_makes_every_open_push_unknown_and_nothing_is_sent_again() {
    let mut outbox = one_shard();
    let push = outbox.push(1, 1, vec![part(ShardId(0), 1, 1)]);
    let sends = outbox.sends(START);
    let closed = PartResult::SessionClosed(v1::SessionClosed {});
    outbox.reply(sends[0].link, reply(&sends[0], &closed), START).unwrap();
    let completed = outbox.take_completed();
    assert!(matches!(&completed[..], [(id, Err(Error::Unknown { .. }))] if *id == push));
    assert!(matches!(outbox.failed(), Some(Error::SessionClosed(SESSION))));
    outbox.push(2, 1, vec![part(ShardId(0), 2, 1)]);
    assert!(outbox.sends(LATER).is_empty());
    assert!(matches!(&outbox.take_completed()[..], [(_, Err(Error::SessionClosed(_)))]));
}

#[test]
fn a_shard_that_forgot_an_acknowledged_push_ends_the_session() {
    let mut outbox = one_shard();
    for mark in 1..=2 {
        outbox.push(1, 1, vec![part(ShardId(0), mark, 1)]);
    }
    let sends = outbox.sends(START);
    let link = sends[0].link;
    outbox.reply(link, reply(&sends[0], &done(1)), START).unwrap();
    let gap = PartResult::Gap(v1::Gap { expected: 1, numbering: 0 });
    outbox.reply(link, reply(&sends[1], &gap), START).unwrap();
    let rolled_back = Some(&Error::RolledBack { shard: ShardId(0), expected: 1, acknowledged: 1 });
    assert_eq!(outbox.failed().map(ToString::to_string), rolled_back.map(ToString::to_string));
}

#[test]
fn an_answer_to_something_else_is_found_out() {
    let mut outbox = one_shard();
    outbox.push(1, 1, vec![part(ShardId(0), 1, 1)]);
    let sends = outbox.sends(START);
    let link = sends[0].link;
    let mut other = reply(&sends[0], &done(1));
    other.parts[0].sequence = 2;
    assert!(outbox.reply(link, other, START).is_err());
    outbox.link_down(link, START);
    let again = outbox.sends(LATER);
    assert_ne!(again[0].link, link);
    assert_eq!(sequences(&again), [1]);
    let stranger = v1::PushReply { request: 999, parts: Vec::new() };
    assert!(outbox.reply(again[0].link, stranger, LATER).is_err());
}

#[test]
fn an_acknowledgement_that_was_overtaken_by_a_move_counts() {
    let mut outbox = one_shard();
    let push = outbox.push(1, 1, vec![part(ShardId(0), 1, 1)]);
    let old = outbox.sends(START);
    outbox.reroute(|_| Route { epoch: Epoch(2), primary: Some(server(2, 2)) });
    let new = outbox.sends(START);
    assert_eq!(sequences(&new), [1]);
    outbox.reply(old[0].link, reply(&old[0], &done(5)), START).unwrap();
    assert_eq!(outbox.take_completed()[0].0, push);
    outbox.reply(new[0].link, reply(&new[0], &done(5)), START).unwrap();
    assert!(outbox.take_completed().is_empty(), "once");
    assert!(outbox.settled(push));
}

#[test]
fn what_a_shard_lost_is_named_and_the_rest_is_numbered_on_from_there() {
    let mut outbox = one_shard();
    let mut sends = Vec::new();
    for mark in 1..=6 {
        outbox.push(10 + u64::from(mark), 1, vec![part(ShardId(0), mark, 1)]);
        sends.extend(outbox.sends(START));
    }
    for send in &sends[..4] {
        outbox.reply(send.link, reply(send, &done(1)), START).unwrap();
    }
    outbox.reroute(|_| Route { epoch: Epoch(2), primary: Some(server(2, 2)) });
    let probe = outbox.sends(START);
    assert_eq!(sequences(&probe), [5]);
    let gap = PartResult::Gap(v1::Gap { expected: 3, numbering: 2 });
    outbox.reply(probe[0].link, reply(&probe[0], &gap), START).unwrap();
    let (shard, epoch) = (ShardId(0), Epoch(2));
    let lost = RolledBack { shard, epoch, first: 3, last: 4, clocks: Some((13, 14)) };
    assert_eq!(outbox.take_rolled_back(), [lost]);
    // The old primary's acknowledgement comes late: its number means another push by now.
    outbox.reply(sends[4].link, reply(&sends[4], &done(1)), START).unwrap();
    let again = outbox.sends(LATER);
    let part = &again[0].request.parts[0];
    assert_eq!((part.sequence, part.numbering, part.updates[0].variable), (3, 2, 5));
    outbox.reply(again[0].link, reply(&again[0], &done(9)), LATER).unwrap();
    assert_eq!(sequences(&outbox.sends(LATER)), [4]);
    assert!(outbox.failed().is_none());
    let nonsense = PartResult::Gap(v1::Gap { expected: 9, numbering: 7 });
    let mut outbox = one_shard();
    outbox.push(1, 1, vec![self::part(ShardId(0), 1, 1)]);
    let sends = outbox.sends(START);
    outbox.reply(sends[0].link, reply(&sends[0], &nonsense), START).unwrap();
    assert!(matches!(outbox.failed(), Some(Error::Protocol { .. })));
}

#[test]
fn a_part_names_what_its_shard_had_when_it_was_read_also_when_it_is_sent_again() {
    let route = Route { epoch: Epoch(1), primary: Some(server(1, 1)) };
    let mut outbox = Outbox::new(JobId(1), SESSION, MESSAGE_BYTES, 1, [route; 2].into_iter());
    let read = Pulled { lsns: [(ShardId(1), Lsn(9))].into(), clocks: [(ShardId(1), 4)].into() };
    let parts = (0..2).map(|shard| part(ShardId(shard), 1, 1)).collect();
    let push = outbox.push_read(7, 1, Some(Arc::new(read)), parts);
    let named = |sends: &[Send]| {
        let parts = sends.iter().flat_map(|send| &send.request.parts);
        parts.map(|part| (part.shard, part.read)).collect::<Vec<_>>()
    };
    let sends = outbox.sends(START);
    let expected = [(0, None), (1, Some(v1::Read { lsn: 9, clock: 4 }))];
    assert_eq!(named(&sends), expected, "of shard 0 nothing was read");
    outbox.link_down(sends[0].link, START);
    let sends = outbox.sends(LATER);
    assert_eq!(named(&sends), expected);
    let stale = |stale_clocks| {
        PartResult::Done(v1::PushOutcome { lsn: 10, stale_clocks, ..Default::default() })
    };
    let mut answer = reply(&sends[0], &stale(Some(3)));
    answer.parts[0].result = Some(stale(None));
    outbox.reply(sends[0].link, answer, LATER).expect("an honest reply");
    let completed = outbox.take_completed();
    let [(done, Ok(outcome))] = &completed[..] else { panic!("{completed:?}") };
    assert_eq!((*done, outcome.stale_clocks), (push, Some(3)));
}
