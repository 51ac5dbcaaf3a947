use downpour_core::consistency::{Consistency, Mode};
use downpour_core::id::VariableId;
use downpour_proto::v1::set_consistency_request::Change;

use super::*;
use crate::command::{Body, ConsistencyChange};

fn table(name: &str) -> VariableSpec {
    let shape = Shape::Table(TableSpec::new(1, Init::Zeros, name));
    let optimizer = OptimizerSpec::Sgd(Sgd { learning_rate: 1.0 });
    VariableSpec { name: name.into(), optimizer, shape }
}

#[test]
fn a_change_of_mode_is_in_the_view_and_in_a_snapshot_and_what_is_so_already_changes_nothing() {
    let (mut machine, _) = Machine::with_job(1, 1);
    let session = machine.open(JOB);
    let defined = machine.apply(Command::DefineVariables(JOB, session, vec![table("t")]));
    assert!(defined.is_ok());
    let view = |machine: &Machine| machine.state.cluster().job(JOB).unwrap().view.clone();
    assert_eq!(view(&machine).consistency, Consistency::default());

    let all = |consistency| Command::SetConsistency(JOB, ConsistencyChange::All(consistency));
    let Ok(Reply::Viewed(version)) = machine.apply(all(Consistency::hybrid(1))) else {
        panic!("refused");
    };
    assert_eq!(
        (view(&machine).version, view(&machine).consistency),
        (version, Consistency::hybrid(1))
    );
    assert_eq!(machine.apply(all(Consistency::hybrid(1))), Ok(Reply::Viewed(version)));

    let one = |variable| {
        let change = ConsistencyChange::Variable(VariableId(variable), Mode::Ssp { bound: 4 });
        Command::SetConsistency(JOB, change)
    };
    assert!(matches!(machine.apply(one(2)), Err(Refused::NotFound(_))));
    assert!(machine.apply(one(1)).is_ok());
    let wanted = Consistency {
        variables: [(VariableId(1), Mode::Ssp { bound: 4 })].into(),
        ..Consistency::hybrid(1)
    };
    assert_eq!(view(&machine).consistency, wanted);
    let restored = State::restore(&machine.state.snapshot()).expect("a snapshot");
    assert_eq!(restored.cluster().job(JOB).unwrap().view, view(&machine));
    let told = machine.state.cluster().events.back().expect("an event").text.clone();
    assert_eq!(told, "job ctr: hybrid(1) becomes hybrid(1), variable 1 ssp(4)");
}

#[test]
fn a_change_of_mode_out_of_bounds_never_enters_the_log() {
    let field = |change| {
        let request = v1::SetConsistencyRequest { job: 1, change };
        Body::SetConsistency(request).to_log(0).unwrap_err().field
    };
    assert_eq!(field(None), "change");
    let mode = |mode| v1::ConsistencyMode { mode: Some(mode) };
    let of = |variable, one| Some(Change::Variable(v1::VariableMode { variable, mode: Some(one) }));
    use v1::consistency_mode::Mode as Wire;
    assert_eq!(field(of(0, mode(Wire::Async(true)))), "consistency.variables.variable");
    assert_eq!(field(of(1, mode(Wire::Async(false)))), "consistency.mode");
    assert_eq!(field(of(1, mode(Wire::Ssp(u32::MAX)))), "ssp.bound");
    assert_eq!(field(of(1, mode(Wire::Sync(u32::MAX)))), "sync.backup_workers");
}
