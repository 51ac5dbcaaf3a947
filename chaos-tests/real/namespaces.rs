//! Hosts with links of their own: what the kernel's TCP makes of links that go down and of machines that nobody hears loses nothing and repeats nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use downpour_chaos_tests::hosts::{Hosts, Program};
use downpour_client::Coordinators;
use downpour_core::id::ShardId;
use downpour_core::view::JobView;
use downpour_proto::v1;
use downpour_psctl::local::binary;
use downpour_psctl::probe::{self, Probe, wait_for};
use tokio::runtime::Runtime;

const JOB: &str = "namespaces";
const SHARDS: u32 = 8;
const COORDINATORS: usize = 3;
const SERVERS: usize = 3;
const DEADLINE: Duration = Duration::from_secs(60);
const PORT: u16 = 7070;

struct Cluster {
    hosts: Hosts,
    programs: Vec<Program>,
    runtime: Runtime,
    coordinators: Coordinators,
}

impl Cluster {
    fn start(hosts: Hosts, dir: &std::path::Path) -> Result<Self> {
        let at = |host: usize| format!("{}:{PORT}", hosts.address(host));
        let all: Vec<String> = (0..COORDINATORS).map(at).collect();
        let peers: Vec<String> = (1..).zip(&all).map(|(id, at)| format!("{id}={at}")).collect();
        let mut programs = Vec::new();
        for host in 0..COORDINATORS + SERVERS {
            let (name, mut args) = if host < COORDINATORS {
                let data = dir.join(format!("coordinator-{}", host + 1));
                let args =
                    ["--id".into(), (host + 1).to_string(), "--peers".into(), peers.join(",")];
                let data = ["--data-dir".into(), data.display().to_string()];
                ("downpour-coordinator", [args.to_vec(), data.to_vec()].concat())
            } else {
                let name = format!("ps-{}", host - COORDINATORS);
                ("downpour-ps", vec!["--name".into(), name, "--coordinators".into(), all.join(",")])
            };
            args.extend(["--listen".into(), at(host), "--insecure".into()]);
            let log = dir.join(format!("host-{host}.log")).display().to_string();
            let program = binary(name, None)?.display().to_string();
            programs.push(hosts.start(host, &program, &args, &log)?);
        }
        let coordinators = Coordinators::parse(&all.join(","))?;
        Ok(Self { hosts, programs, runtime: Runtime::new()?, coordinators })
    }

    /// What `look` makes of the committed state, once it makes anything of it.
    fn until<T>(
        &self,
        what: &str,
        look: impl Fn(&v1::GetClusterReply, &JobView) -> Option<T>,
    ) -> Result<T> {
        let seen = || async {
            let state = self.coordinators.cluster().await.ok()?;
            let view = self.coordinators.job(JOB).await.ok()?;
            look(&state, &view)
        };
        self.runtime.block_on(wait_for(what, DEADLINE, seen))
    }

    /// Hosts of the primaries of all shards, once all sets are full and all servers alive.
    fn whole(&self) -> Result<Vec<usize>> {
        self.until("full in-sync sets", |state, view| {
            let alive = state.nodes.iter().filter(|node| node.alive).count();
            let full = view.shards.iter().all(|route| route.in_sync.len() == 2);
            let host = |node: u32| {
                let view = state.nodes.iter().find(|view| view.node == node)?;
                let number: usize = view.name.strip_prefix("ps-")?.parse().ok()?;
                Some(COORDINATORS + number)
            };
            let primaries = view.shards.iter().map(|route| host(route.primary?.node.0));
            (alive == SERVERS && full).then(|| primaries.collect())?
        })
    }

    fn leader(&self) -> Result<usize> {
        self.until("a leader", |state, _| {
            state.members.iter().find(|member| member.leader).map(|one| one.id as usize - 1)
        })
    }

    /// Cuts a server off until its shards are somebody else's, and a leading coordinator until another one leads.
    fn disturb(&mut self, cut: impl Fn(&Hosts, usize, bool) -> Result<()>) -> Result<()> {
        let primaries = self.whole()?;
        let server = *primaries.first().context("the job has shards")?;
        let epoch = |view: &JobView| view.route(ShardId(0)).map(|route| route.epoch);
        let before = self.until("a route", |_, view| epoch(view))?;
        cut(&self.hosts, server, true)?;
        self.until("a promotion", |_, view| epoch(view).filter(|&now| now > before))?;
        cut(&self.hosts, server, false)?;
        self.whole()?;
        let leader = self.leader()?;
        cut(&self.hosts, leader, true)?;
        self.until("another leader", |state, _| {
            state.members.iter().find(|one| one.leader && one.id as usize - 1 != leader).map(drop)
        })?;
        cut(&self.hosts, leader, false)?;
        self.programs.iter_mut().try_for_each(Program::check)
    }
}

#[test]
fn nothing_is_lost_when_links_go_down_and_when_a_machine_is_heard_by_nobody() -> Result<()> {
    let hosts = match Hosts::new(COORDINATORS + SERVERS) {
        Ok(hosts) => hosts,
        Err(error) => {
            eprintln!(
                "NOT RUN: this test needs network namespaces (root, or CAP_NET_ADMIN and CAP_SYS_ADMIN; iproute2): {error:#}"
            );
            return Ok(());
        }
    };
    let mut dir = tempfile::Builder::new().prefix("downpour-hosts-").tempdir()?;
    let disturbed = disturbed(hosts, dir.path());
    if disturbed.is_err() {
        dir.disable_cleanup(true);
        eprintln!("the logs are in {}", dir.path().display());
    }
    disturbed
}

fn disturbed(hosts: Hosts, dir: &std::path::Path) -> Result<()> {
    let mut cluster = Cluster::start(hosts, dir)?;
    let (job, coordinators) = (probe::job(JOB, SHARDS, 2), cluster.coordinators.clone());
    let join = || async { Probe::join(&coordinators, &job, 0).await.ok() };
    let mut probe = cluster.runtime.block_on(wait_for("a job", DEADLINE, join))?;
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let pushing = cluster.runtime.spawn(async move {
        probe.push_until(|_| stopped.load(Ordering::Relaxed)).await?;
        anyhow::Ok(probe)
    });
    let done = cluster.disturb(Hosts::cut_off).context("links that are down");
    let done = done.and_then(|()| cluster.disturb(Hosts::mute).context("machines nobody hears"));
    stop.store(true, Ordering::Relaxed);
    let probe = cluster.runtime.block_on(pushing)??;
    done?;
    let tally = cluster.runtime.block_on(probe::verify_all(vec![probe]))?;
    ensure!((tally.lost, tally.duplicated, tally.client_errors) == (0, 0, 0), "{tally:?}");
    ensure!(tally.acknowledged > 100, "{tally:?}");
    Ok(())
}
