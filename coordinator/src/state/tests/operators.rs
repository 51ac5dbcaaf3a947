//! What operators do to jobs and workers.

use super::*;

#[test]
fn a_job_is_paused_once_and_its_view_and_snapshot_say_so() {
    let (mut machine, _) = Machine::with_job(1, 1);
    let view = |machine: &Machine| machine.state.cluster().job(JOB).unwrap().view.clone();
    assert_eq!(machine.apply(Command::PauseJob(JOB, true)), Ok(Reply::Changed(true)));
    let paused = view(&machine);
    assert!(paused.orders.paused && paused.version == machine.index);
    assert_eq!(machine.apply(Command::PauseJob(JOB, true)), Ok(Reply::Changed(false)));
    assert_eq!(view(&machine).version, paused.version, "nobody needs to hear of it again");
    assert_eq!(State::restore(&machine.state.snapshot()).unwrap(), machine.state);
    assert_eq!(machine.apply(Command::PauseJob(JOB, false)), Ok(Reply::Changed(true)));
    assert!(!view(&machine).orders.paused);
    let unknown = machine.apply(Command::PauseJob(JobId(9), true));
    assert!(matches!(unknown, Err(Refused::NotFound(_))));
}

#[test]
fn an_evicted_session_is_closed_and_its_worker_can_tell_why() {
    let (mut machine, _) = Machine::with_job(1, 1);
    let (stays, goes) = (machine.open(JOB), machine.open(JOB));
    assert_eq!(machine.apply(Command::EvictSession(JOB, goes)), Ok(Reply::Changed(true)));
    let view = machine.state.cluster().job(JOB).unwrap().view.clone();
    assert!(view.sessions.contains(goes) && !view.sessions.contains(stays));
    assert_eq!((view.orders.evicted, view.version), (vec![goes], machine.index));
    assert_eq!(machine.apply(Command::EvictSession(JOB, goes)), Ok(Reply::Changed(false)));
    let never = machine.apply(Command::EvictSession(JOB, SessionId(99)));
    assert!(matches!(never, Err(Refused::NotFound(_))));
    assert_eq!(State::restore(&machine.state.snapshot()).unwrap(), machine.state);

    // Only so many are remembered.
    for _ in 0..100 {
        let session = machine.open(JOB);
        machine.apply(Command::EvictSession(JOB, session)).unwrap();
    }
    let evicted = &machine.state.cluster().job(JOB).unwrap().view.orders.evicted;
    assert_eq!((evicted.len(), evicted.contains(&goes)), (64, false));
}
