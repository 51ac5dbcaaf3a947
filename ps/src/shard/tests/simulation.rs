//! Replicas of one shard, a scripted coordinator and two clients, over a network that loses, repeats and reorders; servers crash and return empty, and
//! become members again by a cut and the log after it. Copies move from server to server meanwhile; in one test each party of a move dies at each of its steps.
//!
//! Checked at every step: whoever acknowledges in an epoch has everything that any epoch acknowledged, also what an older one acknowledges later
//! because an answer was long on its way (invariant 2 of the design), and replicas at one LSN are equal (3). At the end, with faults over, the shard serves again and the probe of docs/protocol.md 10 holds (1): every push was
//! counted once. One seed decides everything.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use downpour_core::id::{Epoch, Incarnation, Lsn, ServerRef, SessionId};
use downpour_core::mix::mix64;
use downpour_core::routing::{Move, MoveStep, ShardRoute};
use downpour_core::view::JobView;

use super::fixture::*;
use crate::cut::Loader;
use crate::record::Record;
use crate::shard::{
    Ack, Contact, Copy, Fenced, Incoming, Promotion, Proposal, Pushed, Redirect, Role, Room,
    Settled, Shard, Ticket,
};

const SERVERS: u32 = 5;
/// As in the job of the fixture. The other servers are there to move to.
const REPLICAS: usize = 3;
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
    /// The primary asks for the addition of who is joining.
    Add {
        proposal: Proposal,
        primary: ServerRef,
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

/// A copy on its way: a stream, in order, which may break.
struct Copying {
    from: ServerRef,
    copy: Copy,
    loader: Loader,
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
    /// The newest tenure that acknowledged anything.
    acknowledging: (Epoch, ServerRef),
    acknowledged: BTreeSet<Lsn>,
    digests: BTreeMap<Lsn, u64>,
    copies: Vec<Copying>,
    seen: Seen,
    /// No more faults, and nothing new is begun.
    calm: bool,
    /// So many steps without a leader of the coordinators.
    leaderless: u32,
}

/// What happened, to know that the schedules are worth something.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    served: u32,
    moves: u32,
    copies: u32,
    added: u32,
    promoted: u32,
    checks: u32,
    moved: u32,
    moves_undone: u32,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let members: Vec<u32> = (1..=SERVERS).collect();
        let view = view(1, route(1, 1, 1, &members[..REPLICAS]));
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
            acknowledging: (Epoch(0), server(1)),
            acknowledged: BTreeSet::new(),
            digests: BTreeMap::new(),
            copies: Vec::new(),
            seen: Seen::default(),
            calm: false,
            leaderless: 0,
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

    fn run(mut self) -> Seen {
        for _ in 0..FAULTY_STEPS {
            match self.draw(1000) {
                _ if self.network.len() > IN_FLIGHT_MAX => self.drop_one(),
                0..2 => self.crash(),
                2..10 => self.change_primary(),
                10..14 => self.ask_for_removal(),
                14 => self.break_copies(),
                15..20 => self.drop_learners(),
                20..30 => self.check_soon(),
                30..40 => self.rewind(),
                40..150 => self.send_pushes(),
                150..250 => self.publish(),
                250..500 => self.tick(),
                500..540 => self.drop_one(),
                540..600 => self.repeat_one(),
                _ => self.deliver(),
            }
            if self.lost {
                return self.seen;
            }
        }
        self.calm = true;
        for _ in 0..CALM_STEPS {
            self.calm_step();
            if self.finished() {
                self.probe();
                self.seen.served = 1;
                return self.seen;
            }
        }
        panic!("seed {}: the shard does not serve after the faults ended", self.seed);
    }

    fn calm_step(&mut self) {
        match self.draw(10) {
            _ if self.network.len() > IN_FLIGHT_MAX => self.deliver(),
            0 => self.send_pushes(),
            1 => self.publish(),
            2 | 3 => self.tick(),
            4 => self.rewind(),
            _ => self.deliver(),
        }
    }

    /// A process dies and its successor registers: the committed command removes the old incarnation from the set.
    fn crash(&mut self) {
        let index = self.draw(SERVERS as usize);
        self.crash_server(index);
    }

    fn crash_server(&mut self, index: usize) {
        let old = self.servers[index].me;
        self.incarnations += 1;
        let me = ServerRef { node: old.node, incarnation: Incarnation(self.incarnations) };
        self.servers[index] = Server { me, shard: None, waiting: Vec::new() };
        if !self.route().in_sync.contains(&old) {
            let moves = self.route().moving.is_some_and(|moving| moving.to == old);
            if self.route().joining == Some(old) || moves {
                self.commit(None, Some(old));
            }
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
            self.seen.promoted += 1;
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
                route.joining = None;
            }
            route.joining = route.joining.filter(|server| Some(*server) != removed);
            route.in_sync.retain(|member| Some(*member) != removed);
        });
        if removed.is_some() && self.route().moving.map(|moving| moving.to) == removed {
            self.seen.moves_undone += 1;
            self.view = changed(&self.view, |view| view.shards[0].moving = None);
        }
        self.end_move();
    }

    /// The route forgets a move that is over.
    fn end_move(&mut self) {
        let Some(Move { from, to }) = self.route().moving else { return };
        let (in_sync, lives) =
            (&self.route().in_sync, |server| self.servers.iter().any(|one| one.me == server));
        let done = !in_sync.contains(&from);
        if done || (!in_sync.contains(&to) && !lives(to)) {
            if done && in_sync.contains(&to) {
                self.seen.moved += 1;
            } else {
                self.seen.moves_undone += 1;
            }
            self.view = changed(&self.view, |view| view.shards[0].moving = None);
        }
    }

    /// What the coordinator's leader does about a move: begins one, has the new member join, has it promoted, or gives it up.
    fn plan_move(&mut self) {
        let route = self.route().clone();
        match (route.moving, route.step()) {
            (None, _) if route.joining.is_none() && !self.calm => {
                let from = route.in_sync[self.draw(route.in_sync.len())];
                let lives = self.servers.iter().map(|one| one.me);
                let free: Vec<_> = lives.filter(|one| !route.in_sync.contains(one)).collect();
                if let Some(&to) = free.get(self.draw(free.len())) {
                    self.change(|route| route.moving = Some(Move { from, to }));
                }
            }
            (Some(Move { to, .. }), Some(MoveStep::Queued)) if route.joining.is_none() => {
                self.change(|route| route.joining = Some(to));
            }
            (Some(Move { to, .. }), Some(MoveStep::Promotion)) => self.commit(Some(to), None),
            (Some(Move { from, to }), _)
                if !self.calm && self.draw(40) == 0 && route.primary != Some(to) =>
            {
                self.seen.moves_undone += 1;
                if route.in_sync.contains(&to) {
                    self.change(|route| route.moving = Some(Move { from: to, to: from }));
                } else {
                    self.change(|route| (route.moving, route.joining) = (None, None));
                }
            }
            _ => {}
        }
    }

    fn change(&mut self, change: impl FnOnce(&mut ShardRoute)) {
        self.view = changed(&self.view, |view| {
            view.version += 1;
            view.shards[0].set_version += 1;
            change(&mut view.shards[0]);
        });
    }

    /// The coordinator has a server join where a member is missing.
    fn plan_join(&mut self) {
        if let Some(joining) = self.route().joining {
            // It is not heard; soon it may be again.
            if !self.calm && self.draw(16) == 0 {
                self.commit(None, Some(joining));
            }
            return;
        }
        let route = self.route();
        if route.staying().count() >= REPLICAS {
            return;
        }
        let free: Vec<_> = self
            .servers
            .iter()
            .map(|one| one.me)
            .filter(|me| !route.in_sync.contains(me))
            .collect();
        let Some(&joining) = free.get(self.draw(free.len())) else { return };
        self.view = changed(&self.view, |view| {
            view.version += 1;
            let route = &mut view.shards[0];
            route.set_version += 1;
            route.joining = Some(joining);
        });
    }

    fn break_copies(&mut self) {
        for Copying { from, copy, .. } in std::mem::take(&mut self.copies) {
            if let Some(shard) = self.shard_of(from) {
                shard.drop_copy(copy.cut);
            }
        }
        (0..SERVERS as usize).for_each(|index| self.settle(index));
    }

    /// A copy that makes no progress is given up.
    fn drop_learners(&mut self) {
        let index = self.draw(SERVERS as usize);
        if let Some(shard) = self.servers[index].shard.as_mut() {
            shard.drop_learner(|_| true);
        }
        self.settle(index);
    }

    fn check_soon(&mut self) {
        let index = self.draw(SERVERS as usize);
        if let Some(shard) = self.servers[index].shard.as_mut() {
            shard.check_soon();
        }
    }

    fn shard_of(&mut self, server: ServerRef) -> Option<&mut Shard> {
        self.servers.iter_mut().find(|one| one.me == server)?.shard.as_mut()
    }

    /// One piece of each copy arrives.
    fn copy(&mut self) {
        for mut one in std::mem::take(&mut self.copies) {
            let bytes = 100 + self.draw(400);
            let (from, copy) = (one.from, one.copy);
            let Some(shard) = self.shard_of(from) else { continue };
            let Ok(piece) = shard.read_cut(copy.cut, bytes) else { continue };
            if !one.loader.take(piece).expect("a cut fits together") {
                self.copies.push(one);
                continue;
            }
            self.seen.copies += 1;
            let state = one.loader.finish().expect("it is whole");
            let view = Arc::clone(&self.view);
            let Some(target) = self.servers.iter_mut().find(|server| server.me == copy.server)
            else {
                continue;
            };
            let gives_way = |shard: &Shard| match shard.role() {
                Role::Joining | Role::Removed => shard.epoch() <= copy.epoch,
                _ => false,
            };
            if target.shard.as_ref().is_none_or(gives_way) {
                let tenure = (copy.epoch, copy.set_version);
                target.shard = Some(Shard::joining(target.me, LOG_BYTES_MAX, view, state, tenure));
                if let Some(shard) = self.shard_of(from) {
                    shard.copied(copy.cut);
                }
            } else if let Some(shard) = self.shard_of(from) {
                shard.drop_copy(copy.cut);
            }
        }
    }

    fn publish(&mut self) {
        if self.draw(4) == 0 && self.leaderless == 0 {
            self.plan_join();
        }
        if self.draw(2) == 0 && self.leaderless == 0 {
            self.plan_move();
        }
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
        let learner = shard.learner().map(crate::shard::Learner::server);
        let members: Vec<_> = shard.members().map(|(member, _)| member).chain(learner).collect();
        let (epoch, set_version, primary) = (shard.epoch(), shard.set_version(), shard.me);
        let member = self.draw(members.len());
        let Some(&member) = members.get(member) else { return };
        let message = Message::Remove { epoch, set_version, primary, member };
        self.network.push((None, message));
    }

    fn rewind(&mut self) {
        let index = self.draw(SERVERS as usize);
        let Some(shard) = self.servers[index].shard.as_mut() else { return };
        let peers: Vec<_> = shard.peers().map(|(peer, _)| peer).collect();
        peers.into_iter().for_each(|peer| shard.rewind(peer));
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
        if let Some(copy) = shard.begin_copy() {
            let loader = Loader::new(shard.state().identity());
            self.copies.push(Copying { from: me, copy, loader });
        }
        if let Some(member) = shard.retiring() {
            let (set_version, primary) = (shard.set_version(), me);
            self.network.push((None, Message::Remove { epoch, set_version, primary, member }));
        }
        if let Some(proposal) = shard.proposal() {
            self.network.push((None, Message::Add { proposal, primary: me }));
        }
        let members: Vec<_> = shard.peers().map(|(peer, _)| peer).collect();
        for member in members {
            if let Some(batch) = shard.batch(member, Room::Whole(bytes)) {
                let incoming = Incoming {
                    epoch: batch.epoch,
                    source: me,
                    commit: batch.commit,
                    records: owned(&batch.records),
                    check: batch.check,
                };
                out.push((member, Message::Replicate(incoming)));
            }
        }
        out.into_iter().for_each(|(to, message)| self.send(to, message));
        self.settle(index);
        self.copy();
        (0..SERVERS as usize).for_each(|index| self.settle(index));
    }

    fn settle(&mut self, index: usize) {
        let mut waiting = std::mem::take(&mut self.servers[index].waiting);
        let mut acknowledged = Vec::new();
        let Some(shard) = self.servers[index].shard.as_ref() else { return };
        let (me, epoch) = (shard.me, shard.epoch());
        waiting.retain(|(client, sequence, ticket)| match shard.settle(ticket, Contact::Leased) {
            Settled::Pending => true,
            Settled::Declined(_) => false,
            Settled::Acknowledged => {
                acknowledged.push(ticket.lsn);
                // The reply may be lost on its way like anything else; a repeat brings it again.
                let lost = mix64(self.seed ^ ticket.lsn.0).is_multiple_of(4);
                if !lost || ticket.repeated {
                    self.clients[*client as usize].acknowledged.insert(*sequence);
                }
                false
            }
        });
        self.servers[index].waiting = waiting;
        if acknowledged.is_empty() {
            return;
        }
        self.acknowledged.extend(acknowledged);
        let before = self.acknowledging;
        self.acknowledging = before.max((epoch, me));
        // All that was ever acknowledged, once for each epoch; then what is new.
        let (seed, (_, newest)) = (self.seed, self.acknowledging);
        if before.0 != epoch
            && let Some(shard) = self.servers.iter().find(|server| server.me == newest)
            && let Some(shard) = shard.shard.as_ref()
            && shard.wait_set().is_some()
        {
            let has = |lsn: &Lsn| shard.state().lineage().contains(*lsn);
            assert!(self.acknowledged.iter().all(has), "seed {seed}: {newest} lacks a push");
        }
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
                match shard.push(basis(epoch, 0), push, Contact::Leased, u64::MAX) {
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
                self.seen.checks += u32::from(incoming.check.is_some());
                let (ack, _) = shard.replicate(incoming, Contact::Leased);
                assert!(!ack.differs, "seed {}: {to} differs from {source}", self.seed);
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
            Message::Remove { .. } | Message::Add { .. } => unreachable!("goes to the coordinator"),
        }
        out.into_iter().for_each(|(to, message)| self.send(to, message));
        self.compare(index, before);
        self.settle(index);
    }

    fn coordinate(&mut self, message: Message) {
        if self.leaderless > 0 {
            return;
        }
        let (epoch, set_version, primary) = match &message {
            Message::Remove { epoch, set_version, primary, .. } => (*epoch, *set_version, *primary),
            Message::Add { proposal, primary } => (proposal.epoch, proposal.set_version, *primary),
            _ => return,
        };
        let route = self.route();
        if (route.epoch, route.set_version, route.primary) == (epoch, set_version, Some(primary)) {
            match message {
                Message::Remove { member, .. } if member != primary => {
                    self.commit(None, Some(member));
                }
                Message::Add { proposal, .. } if route.joining == Some(proposal.server) => {
                    self.seen.added += 1;
                    self.view = changed(&self.view, |view| {
                        view.version += 1;
                        let route = &mut view.shards[0];
                        route.set_version += 1;
                        route.joining = None;
                        route.in_sync.push(proposal.server);
                        route.in_sync.sort_unstable();
                    });
                }
                _ => {}
            }
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
        self.seen.moves += 1;
        // Positions are never used twice, so one digest each; one in eight is enough and spares most of the time.
        if !mix64(shard.last().0).is_multiple_of(8) {
            return;
        }
        let digest = *self.digests.entry(shard.last()).or_insert_with(|| shard.state().digest());
        assert_eq!(digest, shard.state().digest(), "seed {}: at {}", self.seed, shard.last());
    }

    /// Every push was acknowledged, and no move is left half done.
    fn finished(&self) -> bool {
        let primary = self.servers.iter().find(|server| Some(server.me) == self.route().primary);
        let role = primary.and_then(|server| server.shard.as_ref()).map(Shard::role);
        self.clients.iter().all(|client| client.acknowledged.len() as u64 == PUSHES)
            && self.route().moving.is_none()
            && matches!(role, Some(Role::Primary(_)))
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

/// The steps of a move (docs/protocol.md 5), each reached when the one before is over and this one is not.
const STEPS: std::ops::RangeInclusive<u32> = 1..=8;

/// Who dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Party {
    Old,
    New,
    Other,
    /// What it was told and did not commit is lost, and there is no other one for a while.
    Leader,
}

impl Simulation {
    /// Whether a move from server 1 (the primary) or 2 to server 4 has come to this step.
    fn reached(&self, step: u32) -> bool {
        let to = server(4);
        let role = self.servers.iter().find(|one| one.me == to).and_then(|one| one.shard.as_ref());
        let role = role.map(Shard::role);
        let arrived = self.route().in_sync.contains(&to);
        match step {
            1 => self.route().moving.is_some(),
            2 => !self.copies.is_empty(),
            3 => matches!(role, Some(Role::Joining)),
            4 => self.network.iter().any(|(_, message)| matches!(message, Message::Add { .. })),
            5 => arrived,
            6 => matches!(role, Some(Role::Promoting(_))),
            7 => matches!(role, Some(Role::Primary(_))),
            _ => arrived && self.route().moving.is_none(),
        }
    }

    fn lose(&mut self, party: Party, from: ServerRef) {
        let victim = match party {
            Party::Old => from,
            Party::New => server(4),
            Party::Other => server(3),
            Party::Leader => {
                self.network.retain(|(to, _)| to.is_some());
                self.leaderless = 200;
                return;
            }
        };
        if let Some(index) = self.servers.iter().position(|one| one.me == victim) {
            self.crash_server(index);
        }
    }

    /// Moves a copy while clients push; `party` dies when the move has come to `step`.
    fn run_move(mut self, from: ServerRef, step: u32, party: Party) -> Seen {
        self.calm = true;
        while !self.servers[0]
            .shard
            .as_ref()
            .is_some_and(|one| matches!(one.role(), Role::Primary(_)))
        {
            self.calm_step();
        }
        self.change(|route| route.moving = Some(Move { from, to: server(4) }));
        let mut lost = false;
        for _ in 0..CALM_STEPS {
            if !lost && self.reached(step) {
                lost = true;
                self.lose(party, from);
            }
            self.leaderless = self.leaderless.saturating_sub(1);
            self.calm_step();
            if lost
                && self.finished()
                && self.leaderless == 0
                && self.route().in_sync.len() >= REPLICAS
            {
                self.probe();
                self.seen.served = 1;
                let primaries = self.servers.iter().filter_map(|one| one.shard.as_ref());
                let primaries = primaries.filter(|shard| {
                    matches!(shard.role(), Role::Primary(_)) && shard.epoch() == self.route().epoch
                });
                assert_eq!(primaries.count(), 1);
                return self.seen;
            }
        }
        panic!("seed {}: {party:?} died at step {step}: {:?}", self.seed, self.route());
    }
}

#[test]
fn a_move_ends_done_or_undone_whoever_dies_at_whichever_step() {
    for from in [server(1), server(2)] {
        // Where a backup moves nobody is promoted.
        for step in STEPS.filter(|step| from == server(1) || !(6..8).contains(step)) {
            for party in [Party::Old, Party::New, Party::Other, Party::Leader] {
                let (mut moved, mut undone) = (0, 0);
                for seed in 1..=4 {
                    let seen = Simulation::new(seed).run_move(from, step, party);
                    (moved, undone) = (moved + seen.moved, undone + seen.moves_undone);
                }
                let told = format!(
                    "{party:?} of the move from {from} died at step {step}: {moved} done, {undone} undone"
                );
                assert_eq!(moved + undone, 4, "{told}");
                let lives_on = matches!(party, Party::Other | Party::Leader) || step == 8;
                assert!(!lives_on || moved == 4, "{told}");
            }
        }
    }
}

#[test]
fn acknowledged_pushes_survive_crashes_moves_and_a_bad_network_exactly_once() {
    let mut all = Seen::default();
    for seed in 1..=200 {
        let one = Simulation::new(seed).run();
        all = Seen {
            served: all.served + one.served,
            moves: all.moves + one.moves,
            copies: all.copies + one.copies,
            added: all.added + one.added,
            promoted: all.promoted + one.promoted,
            checks: all.checks + one.checks,
            moved: all.moved + one.moved,
            moves_undone: all.moves_undone + one.moves_undone,
        };
    }
    // The schedules must be rough, and not so rough that nothing is left to check.
    let Seen { served, moves, copies, added, checks, moved, moves_undone, .. } = all;
    assert!(
        served > 100 && moves > 20_000 && copies > 500 && added > 300 && checks > 100,
        "{all:?}"
    );
    assert!(moved > 50 && moves_undone > 100, "{all:?}");
}
