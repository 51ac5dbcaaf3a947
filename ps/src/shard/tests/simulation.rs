//! Replicas of one shard, a scripted coordinator and two clients, over a network that loses, repeats and reorders; servers crash and return empty.
//!
//! Checked at every step: acknowledgements never come from an epoch below one that has acknowledged (invariant 2 of the design), and replicas
//! at one LSN are equal (3). At the end, with faults over, the shard serves again and the probe of docs/protocol.md 10 holds (1): every push was
//! counted once. One seed decides everything.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use downpour_core::id::{Epoch, Incarnation, Lsn, ServerRef, SessionId};
use downpour_core::mix::mix64;
use downpour_core::routing::ShardRoute;
use downpour_core::view::JobView;

use super::fixture::*;
use crate::record::Record;
use crate::shard::{
    Ack, Fenced, Incoming, Promotion, Pushed, Redirect, Role, Room, Settled, Shard, Ticket,
};

const SERVERS: u32 = 4;
const CLIENTS: u64 = 2;
const PUSHES: u64 = 60;
const FAULTY_STEPS: u32 = 2_000;
const IN_FLIGHT_MAX: usize = 40;
const CALM_STEPS: u32 = 20_000;

#[derive(Clone, Debug)]
enum Message {
    View(Arc<JobView>),
    Route(ShardRoute),
    Push {
        client: u64,
        sequence: u64,
        epoch: Epoch,
    },
    Replicate(Incoming),
    Ack {
        from: ServerRef,
        ack: Ack,
    },
    Fence {
        epoch: Epoch,
        candidate: ServerRef,
    },
    Fenced {
        epoch: Epoch,
        from: ServerRef,
        answer: Fenced,
    },
    Fetch {
        epoch: Epoch,
        candidate: ServerRef,
        after: Lsn,
    },
    Fetched {
        epoch: Epoch,
        records: Vec<Record>,
    },
    /// The primary asks for the removal of a member.
    Remove {
        epoch: Epoch,
        set_version: u64,
        primary: ServerRef,
        member: ServerRef,
    },
}

/// One life of a server.
struct Server {
    me: ServerRef,
    shard: Option<Shard>,
    waiting: Vec<(u64, u64, Ticket)>,
}

struct Client {
    session: SessionId,
    /// Where it believes the primary is.
    route: (Epoch, Option<ServerRef>),
    acknowledged: BTreeSet<u64>,
}

struct Simulation {
    seed: u64,
    draws: u64,
    view: Arc<JobView>,
    lost: bool,
    incarnations: u64,
    servers: Vec<Server>,
    clients: Vec<Client>,
    network: Vec<(Option<ServerRef>, Message)>,
    acknowledging: Epoch,
    digests: BTreeMap<Lsn, u64>,
    moves: u32,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let members: Vec<u32> = (1..=SERVERS).collect();
        let view = view(1, route(1, 1, 1, &members));
        let idle = |node| Server { me: server(node), shard: None, waiting: Vec::new() };
        let client = |session| Client {
            session: SessionId(session),
            route: (Epoch(1), Some(server(1))),
            acknowledged: BTreeSet::new(),
        };
        Simulation {
            seed,
            draws: 0,
            view,
            lost: false,
            incarnations: 1000,
            servers: members.into_iter().map(idle).collect(),
            clients: (1..=CLIENTS).map(client).collect(),
            network: Vec::new(),
            acknowledging: Epoch(0),
            digests: BTreeMap::new(),
            moves: 0,
        }
    }

    fn draw(&mut self, below: usize) -> usize {
        self.draws += 1;
        (mix64(self.seed << 32 ^ self.draws) % below.max(1) as u64) as usize
    }

    fn route(&self) -> &ShardRoute {
        &self.view.shards[0]
    }

    fn send(&mut self, to: ServerRef, message: Message) {
        self.network.push((Some(to), message));
    }

    fn run(mut self) -> (bool, u32) {
        for _ in 0..FAULTY_STEPS {
            match self.draw(1000) {
                _ if self.network.len() > IN_FLIGHT_MAX => self.drop_one(),
                0 => self.crash(),
                1..8 => self.change_primary(),
                8 | 9 => self.ask_for_removal(),
                10..40 => self.rewind(),
                40..150 => self.send_pushes(),
                150..250 => self.publish(),
                250..500 => self.tick(),
                500..540 => self.drop_one(),
                540..600 => self.repeat_one(),
                _ => self.deliver(),
            }
            if self.lost {
                return (false, self.moves);
            }
        }
        for _ in 0..CALM_STEPS {
            match self.draw(10) {
                _ if self.network.len() > IN_FLIGHT_MAX => self.deliver(),
                0 => self.send_pushes(),
                1 => self.publish(),
                2 | 3 => self.tick(),
                4 => self.rewind(),
                _ => self.deliver(),
            }
            if self.finished() {
                self.probe();
                return (true, self.moves);
            }
        }
        panic!("seed {}: the shard does not serve after the faults ended", self.seed);
    }

    /// A process dies and its successor registers: the committed command removes the old incarnation from the set.
    fn crash(&mut self) {
        let index = self.draw(SERVERS as usize);
        let old = self.servers[index].me;
        self.incarnations += 1;
        let me = ServerRef { node: old.node, incarnation: Incarnation(self.incarnations) };
        self.servers[index] = Server { me, shard: None, waiting: Vec::new() };
        if !self.route().in_sync.contains(&old) {
            return;
        }
        if self.route().in_sync == [old] {
            self.lost = true;
            return;
        }
        let next = if self.route().primary == Some(old) { self.other_member() } else { None };
        self.commit(next, Some(old));
    }

    /// The coordinator judges the primary dead, rightly or not, or moves the shard on purpose.
    fn change_primary(&mut self) {
        let next = self.other_member();
        if next.is_some() {
            let dead = if self.draw(3) == 0 { self.route().primary } else { None };
            self.commit(next, dead);
        }
    }

    fn other_member(&mut self) -> Option<ServerRef> {
        let primary = self.route().primary?;
        let others: Vec<_> = self.route().others(primary).collect();
        let index = self.draw(others.len());
        others.get(index).copied()
    }

    fn commit(&mut self, primary: Option<ServerRef>, removed: Option<ServerRef>) {
        self.view = changed(&self.view, |view| {
            view.version += 1;
            let route = &mut view.shards[0];
            route.set_version += 1;
            if primary.is_some() {
                route.epoch.0 += 1;
                route.primary = primary;
            }
            route.in_sync.retain(|member| Some(*member) != removed);
        });
    }

    fn publish(&mut self) {
        let index = self.draw(SERVERS as usize);
        let (to, view) = (self.servers[index].me, Arc::clone(&self.view));
        self.send(to, Message::View(view));
        let index = self.draw(CLIENTS as usize);
        let known = (self.route().epoch, self.route().primary);
        let client = &mut self.clients[index];
        client.route = client.route.max(known);
    }

    fn leading(&self, index: usize) -> Option<&Shard> {
        self.servers[index].shard.as_ref().filter(|shard| shard.wait_set().is_some())
    }

    /// A primary that got no answer for some time reports a member.
    fn ask_for_removal(&mut self) {
        let index = self.draw(SERVERS as usize);
        let Some(shard) = self.leading(index) else { return };
        let members: Vec<_> = shard.members().collect();
        let Some((member, _)) = members.first() else { return };
        let message = Message::Remove {
            epoch: shard.epoch(),
            set_version: shard.set_version(),
            primary: shard.me,
            member: *member,
        };
        self.network.push((None, message));
    }

    fn rewind(&mut self) {
        let index = self.draw(SERVERS as usize);
        let Some(shard) = self.servers[index].shard.as_mut() else { return };
        let members: Vec<_> = shard.members().map(|(m, _)| m).collect();
        members.into_iter().for_each(|member| shard.rewind(member));
    }

    fn send_pushes(&mut self) {
        let index = self.draw(CLIENTS as usize);
        let client = &self.clients[index];
        let (epoch, Some(primary)) = client.route else { return };
        // Everything that is not acknowledged, in order, a few at a time.
        let pending = (1..=PUSHES).filter(|sequence| !client.acknowledged.contains(sequence));
        let pending: Vec<_> = pending.take(3).collect();
        for sequence in pending {
            self.send(primary, Message::Push { client: index as u64, sequence, epoch });
        }
    }

    /// A server does what its state machine asks for.
    fn tick(&mut self) {
        let index = self.draw(SERVERS as usize);
        let me = self.servers[index].me;
        let bytes = 200 + self.draw(400);
        let Some(shard) = self.servers[index].shard.as_mut() else { return };
        let epoch = shard.epoch();
        let mut out = Vec::new();
        match shard.promotion() {
            Promotion::Fence(members) => {
                let fence = Message::Fence { epoch, candidate: me };
                out.extend(members.into_iter().map(|member| (member, fence.clone())));
            }
            Promotion::Fetch { from, after } => {
                out.push((from, Message::Fetch { epoch, candidate: me, after }));
            }
            Promotion::Level(_) | Promotion::Over => {}
        }
        assert_eq!(shard.diverged(), [], "seed {}", self.seed);
        let members: Vec<_> = shard.members().map(|(m, _)| m).collect();
        for member in members {
            if let Some(batch) = shard.batch(member, Room::Whole(bytes)) {
                let incoming = Incoming {
                    epoch: batch.epoch,
                    source: me,
                    commit: batch.commit,
                    records: owned(&batch.records),
                };
                out.push((member, Message::Replicate(incoming)));
            }
        }
        out.into_iter().for_each(|(to, message)| self.send(to, message));
        self.settle(index);
    }

    fn settle(&mut self, index: usize) {
        let server = &mut self.servers[index];
        let Some(shard) = server.shard.as_ref() else { return };
        let acknowledging = &mut self.acknowledging;
        let clients = &mut self.clients;
        server.waiting.retain(|(client, sequence, ticket)| match shard.settle(ticket, true) {
            Settled::Pending => true,
            Settled::Declined(_) => false,
            Settled::Acknowledged => {
                let epoch = shard.epoch();
                assert!(epoch >= *acknowledging, "seed {}: two primaries", self.seed);
                *acknowledging = epoch;
                // The reply may be lost on its way like anything else; a repeat brings it again.
                let lost = mix64(self.seed ^ ticket.lsn.0).is_multiple_of(4);
                if !lost || ticket.repeated {
                    clients[*client as usize].acknowledged.insert(*sequence);
                }
                false
            }
        });
    }

    fn drop_one(&mut self) {
        let index = self.draw(self.network.len());
        if index < self.network.len() {
            self.network.swap_remove(index);
        }
    }

    fn repeat_one(&mut self) {
        let index = self.draw(self.network.len());
        if let Some(message) = self.network.get(index).cloned() {
            self.network.push(message);
        }
    }

    fn deliver(&mut self) {
        let index = self.draw(self.network.len());
        if index >= self.network.len() {
            return;
        }
        let (to, message) = self.network.swap_remove(index);
        let Some(to) = to else { return self.coordinate(message) };
        let Some(index) = self.servers.iter().position(|server| server.me == to) else { return };
        if let Message::View(view) = &message
            && self.servers[index].shard.is_none()
            && view.shards[0].in_sync.contains(&to)
        {
            self.servers[index].shard = Some(replica(to, view));
        }
        let Some(shard) = self.servers[index].shard.as_mut() else { return };
        let before = shard.last();
        let mut out = Vec::new();
        match message {
            Message::View(view) => shard.on_view(view),
            Message::Route(route) => shard.on_route(&route),
            Message::Push { client, sequence, epoch } => {
                let session = self.clients[client as usize].session;
                let push = counting_of(session, sequence);
                match shard.push(epoch, 0, push, true, u64::MAX) {
                    Pushed::Logged(ticket) => {
                        self.servers[index].waiting.push((client, sequence, ticket));
                    }
                    Pushed::Declined(crate::shard::Declined::Redirect(Redirect {
                        epoch,
                        primary,
                    })) => {
                        let client = &mut self.clients[client as usize];
                        client.route = client.route.max((epoch, primary));
                    }
                    Pushed::SessionClosed => panic!("no session ends"),
                    Pushed::Declined(_) | Pushed::Gap { .. } => {}
                }
            }
            Message::Replicate(incoming) => {
                let source = incoming.source;
                let (ack, _) = shard.replicate(incoming);
                out.push((source, Message::Ack { from: to, ack }));
            }
            Message::Ack { from, ack } => {
                shard.acked(from, ack).unwrap_or_else(|e| panic!("seed {}: {e}", self.seed));
            }
            Message::Fence { epoch, candidate } => {
                let answer = shard.fence(epoch, candidate);
                out.push((candidate, Message::Fenced { epoch, from: to, answer }));
            }
            Message::Fenced { epoch, from, answer } => {
                let fenced = shard.fenced(epoch, from, answer);
                fenced.unwrap_or_else(|e| panic!("seed {}: {e}", self.seed));
            }
            Message::Fetch { epoch, candidate, after } => {
                if let Ok(records) = shard.fetch(epoch, after, 500) {
                    let records = owned(&records);
                    out.push((candidate, Message::Fetched { epoch, records }));
                }
            }
            Message::Fetched { epoch, records } => {
                // Reordered answers do not continue the history; the candidate asks again.
                let _ = shard.fetched(epoch, records);
            }
            Message::Remove { .. } => unreachable!("goes to the coordinator"),
        }
        out.into_iter().for_each(|(to, message)| self.send(to, message));
        self.compare(index, before);
        self.settle(index);
    }

    fn coordinate(&mut self, message: Message) {
        let Message::Remove { epoch, set_version, primary, member } = message else { return };
        let route = self.route();
        if (route.epoch, route.set_version, route.primary) == (epoch, set_version, Some(primary)) {
            self.commit(None, Some(member));
        }
        let route = self.route().clone();
        self.send(primary, Message::Route(route));
    }

    /// Replicas at one LSN are equal.
    fn compare(&mut self, index: usize, before: Lsn) {
        let Some(shard) = self.servers[index].shard.as_ref() else { return };
        if shard.last() == before || matches!(shard.role(), Role::Removed) {
            return;
        }
        self.moves += 1;
        // Positions are never used twice, so one digest each; one in eight is enough and spares most of the time.
        if !mix64(shard.last().0).is_multiple_of(8) {
            return;
        }
        let digest = *self.digests.entry(shard.last()).or_insert_with(|| shard.state().digest());
        assert_eq!(digest, shard.state().digest(), "seed {}: at {}", self.seed, shard.last());
    }

    fn finished(&self) -> bool {
        self.clients.iter().all(|client| client.acknowledged.len() as u64 == PUSHES)
    }

    /// Each push has a row of its own, and one row counts them all.
    fn probe(&self) {
        let primary = self.route().primary.expect("not lost");
        let serving = self.servers.iter().find(|server| server.me == primary);
        let shard = serving.and_then(|server| server.shard.as_ref()).expect("it acknowledged");
        assert!(matches!(shard.role(), Role::Primary(_)), "seed {}", self.seed);
        for session in self.clients.iter().map(|client| client.session) {
            for sequence in 1..=PUSHES {
                let counted = count(shard, serial(session, sequence));
                assert_eq!(counted, 1.0, "seed {}: {session}/{sequence}", self.seed);
            }
        }
        assert_eq!(count(shard, 0), (CLIENTS * PUSHES) as f32, "seed {}", self.seed);
    }
}

fn serial(session: SessionId, sequence: u64) -> u64 {
    session.0 << 32 | sequence
}

fn counting_of(session: SessionId, sequence: u64) -> crate::record::Push {
    push_of(session, sequence, vec![rows(COUNTS, 1, &[0, serial(session, sequence)], 1.0)])
}

#[test]
fn acknowledged_pushes_survive_crashes_moves_and_a_bad_network_exactly_once() {
    let (mut served, mut moves) = (0, 0);
    for seed in 1..=200 {
        let (alive, applied) = Simulation::new(seed).run();
        served += u32::from(alive);
        moves += applied;
    }
    // The schedules must be rough, and not so rough that nothing is left to check.
    assert!(
        served > 100 && moves > 20_000,
        "{served} runs served to the end, {moves} steps of a log"
    );
}
