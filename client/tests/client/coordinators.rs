//! The coordinator handle against members that do not lead, lie, hang or are gone.

use std::time::Duration;

use downpour_client::{Coordinators, Error, Job, Refused, Session, SessionOptions};
use downpour_core::init::Init;
use downpour_core::optimizer::{OptimizerSpec, Sgd};
use downpour_core::spec::{JobSpec, Shape, TableSpec, VariableSpec};

use crate::fake::{self, Cluster, Manner, wait_for, wait_for_state};

fn coordinators(cluster: &Cluster) -> Coordinators {
    Coordinators::new(cluster.addresses()).expect("addresses")
}

fn item(dim: u32) -> VariableSpec {
    VariableSpec {
        name: "item".into(),
        optimizer: OptimizerSpec::Sgd(Sgd { learning_rate: 1.0 }),
        shape: Shape::Table(TableSpec::new(dim, Init::Zeros, "item")),
    }
}

#[tokio::test]
async fn the_leader_is_found_by_its_hint_and_asked_first_from_then_on() {
    let cluster = Cluster::start(3, 1).await;
    cluster.state.lock().leader = 2;
    let coordinators = Coordinators::new([cluster.addresses().remove(0)]).unwrap();
    for _ in 0..5 {
        coordinators.create_job(&fake::job()).await.unwrap();
    }
    assert_eq!(cluster.state.lock().calls, [1, 0, 5]);
}

#[tokio::test]
async fn a_new_leader_is_found_while_there_is_none() {
    let cluster = Cluster::start(3, 1).await;
    let coordinators = coordinators(&cluster);
    coordinators.create_job(&fake::job()).await.unwrap();
    cluster.state.lock().manners = vec![Manner::Leaderless; 3];
    let call = tokio::spawn(async move { coordinators.create_job(&fake::job()).await });
    wait_for("each member was asked", || cluster.state.lock().calls.iter().all(|&calls| calls > 0))
        .await;
    {
        let mut state = cluster.state.lock();
        (state.leader, state.manners) = (1, vec![Manner::Usual; 3]);
    }
    assert!(!call.await.unwrap().unwrap().1, "it was created before");
}

#[tokio::test]
async fn members_that_name_each_other_end_in_a_deadline_and_not_in_a_busy_loop() {
    let cluster = Cluster::start(2, 1).await;
    cluster.state.lock().manners = vec![Manner::Misleads(1), Manner::Misleads(0)];
    let coordinators = coordinators(&cluster).with_deadline(Duration::from_secs(1));
    let error = coordinators.create_job(&fake::job()).await.unwrap_err();
    assert!(matches!(error, Error::Deadline { what: "create job", .. }), "{error}");
    assert!(error.to_string().contains("not the leader"), "{error}");
    assert!(cluster.state.lock().calls.iter().sum::<u64>() < 100);
}

#[tokio::test]
async fn a_member_that_hangs_or_is_gone_is_left_for_another() {
    let cluster = Cluster::start(2, 1).await;
    {
        let mut state = cluster.state.lock();
        (state.leader, state.manners) = (1, vec![Manner::Hangs, Manner::Usual]);
    }
    let gone = "127.0.0.1:1".to_owned();
    let addresses = std::iter::once(gone).chain(cluster.addresses());
    let coordinators = Coordinators::new(addresses).unwrap();
    assert!(coordinators.create_job(&fake::job()).await.unwrap().1);
}

#[tokio::test]
async fn a_job_or_variable_that_differs_is_refused_by_field() {
    let cluster = Cluster::start(1, 1).await;
    let coordinators = coordinators(&cluster);
    coordinators.create_job(&fake::job()).await.unwrap();
    let other = JobSpec { seed: 7, ..fake::job() };
    let error = coordinators.create_job(&other).await.unwrap_err();
    assert_eq!(error.to_string(), "job \"job\" exists with seed = 1, not 7");
    let error = coordinators.job("other").await.unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");

    let job = Job::Existing("job".into());
    let session = Session::open(&coordinators, &job, SessionOptions::worker("test")).await.unwrap();
    session.define(&[item(2)]).await.unwrap();
    let error = session.define(&[item(3)]).await.unwrap_err();
    assert_eq!(error.to_string(), "variable \"item\" exists with dim = 2, not 3");
}

#[tokio::test]
async fn a_watch_goes_on_at_another_member() {
    let cluster = Cluster::start(3, 1).await;
    let job = Job::Create(fake::job());
    let options = SessionOptions::worker("test");
    let session = Session::open(&coordinators(&cluster), &job, options).await.unwrap();
    wait_for_state(&session, "the watch has begun", |state| state.version > 0).await;
    for member in [1, 2] {
        {
            let mut state = cluster.state.lock();
            state.leader = member;
            state.manners = vec![Manner::Leaderless; 3];
            state.manners[member] = Manner::Usual;
        }
        // Ends the streams of the others; the change after it can only come from this member.
        cluster.changed();
        cluster.change_view(|view| view.shards[0].set_version = 70 + member as u64);
        let changed = |state: &downpour_client::JobState| {
            state.view.shards[0].set_version == 70 + member as u64
        };
        wait_for_state(&session, "the remaining member tells", changed).await;
    }
}

#[tokio::test]
async fn a_watch_that_fell_silent_is_left_when_something_newer_is_known_to_be_there() {
    let cluster = Cluster::start(2, 1).await;
    let job = Job::Create(fake::job());
    let options = SessionOptions::worker("test");
    let session = Session::open(&coordinators(&cluster), &job, options).await.unwrap();
    wait_for_state(&session, "the watch has begun", |state| state.version > 0).await;
    {
        let mut state = cluster.state.lock();
        let watched = state.watched;
        state.manners[watched] = Manner::Mute;
    }
    session.define(&[item(2)]).await.unwrap();
    assert!(session.state().variable_named("item").is_some());
}

#[tokio::test]
async fn a_dropped_session_is_closed() {
    let cluster = Cluster::start(1, 1).await;
    let job = Job::Create(fake::job());
    let options = SessionOptions::worker("test");
    let session = Session::open(&coordinators(&cluster), &job, options).await.unwrap();
    let id = session.id();
    drop(session);
    wait_for("the session is closed", || cluster.state.lock().closed.contains(&id)).await;
}

#[tokio::test]
async fn a_checkpoint_waits_for_one_that_ends_while_nobody_looks() {
    let cluster = Cluster::start(1, 1).await;
    let coordinators = coordinators(&cluster);
    let job = coordinators.create_job(&fake::job()).await.unwrap().0.job;
    cluster.state.lock().checkpoints_in_the_way = 3;
    let refused = coordinators.create_checkpoint(job, "file:///there", true).await.unwrap_err();
    assert!(matches!(refused, Error::Refused { code: Refused::Conflict, .. }), "{refused}");
    let patience = Duration::from_secs(60);
    let taken = coordinators.take_checkpoint(job, "file:///there", true, patience).await;
    assert_eq!(taken.unwrap().checkpoint, "1");
    assert_eq!(cluster.state.lock().checkpoints_asked, 4);
}
