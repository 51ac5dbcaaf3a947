//! Wire ↔ domain: the only place where bytes from outside become types that the rest trusts.

mod ledger;

use std::collections::BTreeSet;

use downpour_core::cells::{ClosedSessions, Refusal, RefusalReason};
use downpour_core::checkpoint::{CheckpointOrder, Orders, RestoreOrder, SetBack};
use downpour_core::id::{
    Epoch, Incarnation, JobId, Lsn, NodeId, ServerRef, SessionId, ShardId, VariableId,
};
use downpour_core::init::Init;
use downpour_core::optimizer::{
    Adagrad, Adam, AdamW, Course, Ftrl, Momentum, OptimizerSpec, RmsProp, RowwiseAdagrad, Rule,
    Scaling, Schedule, Sgd,
};
use downpour_core::routing::{Move, ShardRoute};
use downpour_core::row_format::RowFormat;
use downpour_core::spec::{
    DenseSpec, InvalidSpec, JobSpec, Shape, TableSpec, Variable, VariableSpec, check_name,
};
use downpour_core::view::{Admission, JobView, NodeView};

use crate::{Invalid, v1};

/// Most members of an in-sync set on the wire: a set may be wider than `replicas` while a shard moves.
const IN_SYNC_MAX: usize = 16;

fn given<T>(field: &'static str, value: Option<T>) -> Result<T, Invalid> {
    value.ok_or_else(|| Invalid::new(field, "is not given"))
}

impl From<RowFormat> for v1::RowFormat {
    fn from(format: RowFormat) -> Self {
        match format {
            RowFormat::F32 => v1::RowFormat::F32,
            RowFormat::Bf16 => v1::RowFormat::Bf16,
        }
    }
}

impl From<InvalidSpec> for Invalid {
    fn from(invalid: InvalidSpec) -> Self {
        Invalid { field: invalid.field, problem: invalid.problem }
    }
}

impl From<ServerRef> for v1::ServerRef {
    fn from(server: ServerRef) -> Self {
        v1::ServerRef { node: server.node.0, incarnation: server.incarnation.0 }
    }
}

impl TryFrom<v1::ServerRef> for ServerRef {
    type Error = Invalid;

    fn try_from(server: v1::ServerRef) -> Result<Self, Invalid> {
        if server.node == 0 || server.incarnation == 0 {
            return Err(Invalid::new("server", "names no node or no incarnation"));
        }
        Ok(ServerRef { node: NodeId(server.node), incarnation: Incarnation(server.incarnation) })
    }
}

/// A server that a message must name.
///
/// # Errors
/// It is not given or not a server.
pub fn server(field: &'static str, server: Option<v1::ServerRef>) -> Result<ServerRef, Invalid> {
    given(field, server)?.try_into()
}

impl From<&Init> for v1::Init {
    fn from(init: &Init) -> Self {
        use v1::init::Kind;
        v1::Init {
            kind: Some(match *init {
                Init::Zeros => Kind::Constant(0.0),
                Init::Constant(value) => Kind::Constant(value),
                Init::Uniform { low, high } => Kind::Uniform(v1::UniformInit { low, high }),
                Init::Normal { mean, std } => Kind::Normal(v1::NormalInit { mean, std }),
            }),
        }
    }
}

impl TryFrom<v1::Init> for Init {
    type Error = Invalid;

    fn try_from(init: v1::Init) -> Result<Self, Invalid> {
        use v1::init::Kind;
        let init = match given("table.init", init.kind)? {
            Kind::Constant(0.0) => Init::Zeros,
            Kind::Constant(value) => Init::Constant(value),
            Kind::Uniform(v1::UniformInit { low, high }) => Init::Uniform { low, high },
            Kind::Normal(v1::NormalInit { mean, std }) => Init::Normal { mean, std },
        };
        init.validate().map_err(InvalidSpec::from)?;
        Ok(init)
    }
}

impl From<&OptimizerSpec> for v1::Optimizer {
    fn from(optimizer: &OptimizerSpec) -> Self {
        let &OptimizerSpec { ref rule, schedule, staleness, clip_row_norm, l2_decay } = optimizer;
        v1::Optimizer {
            kind: Some(rule.into()),
            schedule: (schedule != Schedule::default()).then(|| schedule.into()),
            clip_row_norm,
            l2_decay,
            staleness: scaling(staleness),
        }
    }
}

impl TryFrom<v1::Optimizer> for OptimizerSpec {
    type Error = Invalid;

    fn try_from(optimizer: v1::Optimizer) -> Result<Self, Invalid> {
        let v1::Optimizer { kind, schedule, clip_row_norm, l2_decay, staleness } = optimizer;
        let optimizer = OptimizerSpec {
            rule: given("optimizer", kind)?.into(),
            schedule: schedule.map(Schedule::from).unwrap_or_default(),
            staleness: staleness.map_or(Ok(Scaling::None), Scaling::try_from)?,
            clip_row_norm,
            l2_decay,
        };
        optimizer.validate().map_err(InvalidSpec::from)?;
        Ok(optimizer)
    }
}

impl From<&Rule> for v1::optimizer::Kind {
    fn from(rule: &Rule) -> Self {
        match *rule {
            Rule::Sgd(Sgd { learning_rate }) => Self::Sgd(v1::Sgd { learning_rate }),
            Rule::Momentum(Momentum { learning_rate, momentum, nesterov }) => {
                Self::Momentum(v1::Momentum { learning_rate, momentum, nesterov })
            }
            Rule::Adagrad(Adagrad { learning_rate, epsilon, initial_accumulator }) => {
                Self::Adagrad(v1::Adagrad { learning_rate, epsilon, initial_accumulator })
            }
            Rule::RowwiseAdagrad(RowwiseAdagrad {
                learning_rate,
                epsilon,
                initial_accumulator,
            }) => Self::RowwiseAdagrad(v1::Adagrad { learning_rate, epsilon, initial_accumulator }),
            Rule::RmsProp(RmsProp { learning_rate, alpha, epsilon, momentum }) => {
                Self::RmsProp(v1::RmsProp { learning_rate, alpha, epsilon, momentum })
            }
            Rule::Adam(Adam { learning_rate, beta1, beta2, epsilon }) => {
                Self::Adam(v1::Adam { learning_rate, beta1, beta2, epsilon })
            }
            Rule::AdamW(AdamW { learning_rate, beta1, beta2, epsilon, weight_decay }) => {
                Self::AdamW(v1::AdamW { learning_rate, beta1, beta2, epsilon, weight_decay })
            }
            Rule::Ftrl(Ftrl { learning_rate, beta, l1, l2 }) => {
                Self::Ftrl(v1::Ftrl { learning_rate, beta, l1, l2 })
            }
        }
    }
}

impl From<v1::optimizer::Kind> for Rule {
    fn from(kind: v1::optimizer::Kind) -> Self {
        use v1::optimizer::Kind;
        match kind {
            Kind::Sgd(v1::Sgd { learning_rate }) => Self::Sgd(Sgd { learning_rate }),
            Kind::Momentum(v1::Momentum { learning_rate, momentum, nesterov }) => {
                Self::Momentum(Momentum { learning_rate, momentum, nesterov })
            }
            Kind::Adagrad(v1::Adagrad { learning_rate, epsilon, initial_accumulator }) => {
                Self::Adagrad(Adagrad { learning_rate, epsilon, initial_accumulator })
            }
            Kind::RowwiseAdagrad(v1::Adagrad { learning_rate, epsilon, initial_accumulator }) => {
                Self::RowwiseAdagrad(RowwiseAdagrad { learning_rate, epsilon, initial_accumulator })
            }
            Kind::RmsProp(v1::RmsProp { learning_rate, alpha, epsilon, momentum }) => {
                Self::RmsProp(RmsProp { learning_rate, alpha, epsilon, momentum })
            }
            Kind::Adam(v1::Adam { learning_rate, beta1, beta2, epsilon }) => {
                Self::Adam(Adam { learning_rate, beta1, beta2, epsilon })
            }
            Kind::AdamW(v1::AdamW { learning_rate, beta1, beta2, epsilon, weight_decay }) => {
                Self::AdamW(AdamW { learning_rate, beta1, beta2, epsilon, weight_decay })
            }
            Kind::Ftrl(v1::Ftrl { learning_rate, beta, l1, l2 }) => {
                Self::Ftrl(Ftrl { learning_rate, beta, l1, l2 })
            }
        }
    }
}

fn scaling(scaling: Scaling) -> Option<v1::StalenessScaling> {
    use v1::staleness_scaling::Counted;
    let counted = match scaling {
        Scaling::None => return None,
        Scaling::Clocks { per } => Counted::Clocks(per),
        Scaling::Records { per } => Counted::Records(per),
    };
    Some(v1::StalenessScaling { counted: Some(counted) })
}

impl TryFrom<v1::StalenessScaling> for Scaling {
    type Error = Invalid;

    fn try_from(scaling: v1::StalenessScaling) -> Result<Self, Invalid> {
        use v1::staleness_scaling::Counted;
        Ok(match given("staleness", scaling.counted)? {
            Counted::Clocks(per) => Scaling::Clocks { per },
            Counted::Records(per) => Scaling::Records { per },
        })
    }
}

impl From<Schedule> for v1::Schedule {
    fn from(schedule: Schedule) -> Self {
        use v1::schedule::Then;
        let then = match schedule.then {
            Course::Constant => None,
            Course::Step { every, factor } => Some(Then::Step(v1::StepSchedule { every, factor })),
            Course::Cosine { steps, floor } => {
                Some(Then::Cosine(v1::CosineSchedule { steps, floor }))
            }
        };
        v1::Schedule { warm_up_steps: schedule.warm_up_steps, then }
    }
}

impl From<v1::Schedule> for Schedule {
    fn from(schedule: v1::Schedule) -> Self {
        use v1::schedule::Then;
        let then = match schedule.then {
            None => Course::Constant,
            Some(Then::Step(v1::StepSchedule { every, factor })) => Course::Step { every, factor },
            Some(Then::Cosine(v1::CosineSchedule { steps, floor })) => {
                Course::Cosine { steps, floor }
            }
        };
        Schedule { warm_up_steps: schedule.warm_up_steps, then }
    }
}

impl From<&JobSpec> for v1::JobSpec {
    fn from(spec: &JobSpec) -> Self {
        v1::JobSpec {
            name: spec.name.clone(),
            shards: spec.shards,
            replicas: spec.replicas,
            min_in_sync: spec.min_in_sync,
            seed: spec.seed,
        }
    }
}

impl TryFrom<v1::JobSpec> for JobSpec {
    type Error = Invalid;

    fn try_from(spec: v1::JobSpec) -> Result<Self, Invalid> {
        let v1::JobSpec { name, shards, replicas, min_in_sync, seed } = spec;
        let spec = JobSpec { name, shards, replicas, min_in_sync, seed };
        spec.validate()?;
        Ok(spec)
    }
}

impl From<&VariableSpec> for v1::VariableSpec {
    fn from(spec: &VariableSpec) -> Self {
        use v1::variable_spec::Shape as Wire;
        let shape = match &spec.shape {
            Shape::Table(table) => Wire::Table(v1::TableSpec {
                dim: table.dim,
                init: Some((&table.init).into()),
                group: table.group.clone(),
                row_format: v1::RowFormat::from(table.row_format).into(),
            }),
            Shape::Dense(dense) => Wire::Dense(v1::DenseSpec {
                shape: dense.shape.clone(),
                block_floats: dense.block_floats,
            }),
        };
        v1::VariableSpec {
            name: spec.name.clone(),
            optimizer: Some((&spec.optimizer).into()),
            shape: Some(shape),
        }
    }
}

impl TryFrom<v1::VariableSpec> for VariableSpec {
    type Error = Invalid;

    fn try_from(spec: v1::VariableSpec) -> Result<Self, Invalid> {
        use v1::variable_spec::Shape as Wire;
        let shape = match given("shape", spec.shape)? {
            Wire::Table(table) => Shape::Table(TableSpec {
                dim: table.dim,
                init: given("table.init", table.init)?.try_into()?,
                row_format: match table.row_format() {
                    v1::RowFormat::F32 if table.row_format == 0 => RowFormat::F32,
                    v1::RowFormat::Bf16 => RowFormat::Bf16,
                    v1::RowFormat::F32 => {
                        let problem = format!("is {}, which nothing has", table.row_format);
                        return Err(Invalid::new("table.row_format", problem));
                    }
                },
                group: if table.group.is_empty() { spec.name.clone() } else { table.group },
            }),
            Wire::Dense(dense) => {
                Shape::Dense(DenseSpec { shape: dense.shape, block_floats: dense.block_floats })
            }
        };
        let optimizer = given("optimizer", spec.optimizer)?.try_into()?;
        let spec = VariableSpec { name: spec.name, optimizer, shape };
        spec.validate()?;
        Ok(spec)
    }
}

impl From<&Variable> for v1::Variable {
    fn from(variable: &Variable) -> Self {
        v1::Variable { id: variable.id.0, spec: Some((&variable.spec).into()) }
    }
}

impl TryFrom<v1::Variable> for Variable {
    type Error = Invalid;

    fn try_from(variable: v1::Variable) -> Result<Self, Invalid> {
        if variable.id == 0 {
            return Err(Invalid::new("variable.id", "is not given"));
        }
        let spec = given("variable.spec", variable.spec)?.try_into()?;
        Ok(Variable { id: VariableId(variable.id), spec })
    }
}

/// The wire form of a shard's route.
#[must_use]
pub fn shard_route(shard: ShardId, route: &ShardRoute) -> v1::ShardRoute {
    v1::ShardRoute {
        shard: shard.0,
        epoch: route.epoch.0,
        set_version: route.set_version,
        primary: route.primary.map(Into::into),
        in_sync: route.in_sync.iter().map(|&server| server.into()).collect(),
        lost: route.lost(),
        joining: route.joining.map(Into::into),
        moving: route.moving.map(Into::into),
    }
}

impl From<Move> for v1::ShardMove {
    fn from(moving: Move) -> Self {
        v1::ShardMove { from: Some(moving.from.into()), to: Some(moving.to.into()) }
    }
}

impl TryFrom<v1::ShardMove> for Move {
    type Error = Invalid;

    fn try_from(moving: v1::ShardMove) -> Result<Self, Invalid> {
        let (from, to) = (server("moving.from", moving.from)?, server("moving.to", moving.to)?);
        if from.node == to.node {
            return Err(Invalid::new("moving.to", "is where the copy is"));
        }
        Ok(Move { from, to })
    }
}

impl TryFrom<v1::ShardRoute> for ShardRoute {
    type Error = Invalid;

    fn try_from(route: v1::ShardRoute) -> Result<Self, Invalid> {
        if route.epoch == 0 || Epoch(route.epoch) > Lsn::EPOCH_MAX {
            return Err(Invalid::new("route.epoch", "is out of range"));
        }
        if route.in_sync.len() > IN_SYNC_MAX {
            return Err(Invalid::new(
                "route.in_sync",
                format!("has more than {IN_SYNC_MAX} members"),
            ));
        }
        let mut in_sync =
            route.in_sync.into_iter().map(ServerRef::try_from).collect::<Result<Vec<_>, _>>()?;
        in_sync.sort_unstable();
        in_sync.dedup();
        let primary = route.primary.map(ServerRef::try_from).transpose()?;
        match primary {
            Some(primary) if !in_sync.contains(&primary) => {
                return Err(Invalid::new("route.primary", "is not in the in-sync set"));
            }
            None if !route.lost => return Err(Invalid::new("route.primary", "is not given")),
            _ => {}
        }
        let joining = route.joining.map(ServerRef::try_from).transpose()?;
        if joining.is_some_and(|server| primary.is_none() || in_sync.contains(&server)) {
            return Err(Invalid::new(
                "route.joining",
                "is in the in-sync set, or the shard is lost",
            ));
        }
        let moving = route.moving.map(Move::try_from).transpose()?;
        if moving.is_some_and(|moving| !in_sync.contains(&moving.from)) {
            return Err(Invalid::new("route.moving", "is not from the in-sync set"));
        }
        Ok(ShardRoute {
            epoch: Epoch(route.epoch),
            set_version: route.set_version,
            primary,
            in_sync,
            joining,
            moving,
        })
    }
}

impl From<&ClosedSessions> for v1::ClosedSessions {
    fn from(sessions: &ClosedSessions) -> Self {
        v1::ClosedSessions {
            high_water: sessions.high_water,
            open: sessions.open.iter().map(|session| session.0).collect(),
        }
    }
}

impl TryFrom<v1::ClosedSessions> for ClosedSessions {
    type Error = Invalid;

    fn try_from(sessions: v1::ClosedSessions) -> Result<Self, Invalid> {
        let open: BTreeSet<SessionId> = sessions.open.into_iter().map(SessionId).collect();
        if open.last().is_some_and(|last| last.0 > sessions.high_water) {
            return Err(Invalid::new("sessions.open", "names a session above the high water"));
        }
        Ok(ClosedSessions { high_water: sessions.high_water, open })
    }
}

impl From<&JobView> for v1::JobView {
    fn from(view: &JobView) -> Self {
        let shards = (0..).map(ShardId).zip(&view.shards);
        v1::JobView {
            job: view.job.0,
            spec: Some((&view.spec).into()),
            version: view.version,
            variables: view.variables.iter().map(Into::into).collect(),
            shards: shards.map(|(shard, route)| shard_route(shard, route)).collect(),
            sessions: Some((&view.sessions).into()),
            checkpoint: view.orders.checkpoint.as_ref().map(Into::into),
            restore: view.orders.restore.as_ref().map(Into::into),
            set_back: view.orders.set_back.iter().map(Into::into).collect(),
            paused: view.orders.paused,
            evicted: view.orders.evicted.iter().map(|session| session.0).collect(),
            consistency: Some((&view.consistency).into()),
        }
    }
}

impl TryFrom<v1::JobView> for JobView {
    type Error = Invalid;

    fn try_from(view: v1::JobView) -> Result<Self, Invalid> {
        if view.job == 0 {
            return Err(Invalid::new("job", "is not given"));
        }
        let spec: JobSpec = given("spec", view.spec)?.try_into()?;
        if view.shards.len() != spec.shards as usize {
            return Err(Invalid::new("shards", "are not as many as the job has"));
        }
        let variables =
            (view.variables.into_iter().map(Variable::try_from)).collect::<Result<Vec<_>, _>>()?;
        if !variables.iter().zip(1..).all(|(variable, id)| variable.id.0 == id) {
            return Err(Invalid::new("variables", "are not numbered in order from 1"));
        }
        if !view.shards.iter().zip(0..).all(|(route, shard)| route.shard == shard) {
            return Err(Invalid::new("shards", "are not in order"));
        }
        Ok(JobView {
            job: JobId(view.job),
            spec,
            version: view.version,
            variables,
            shards: (view.shards.into_iter().map(ShardRoute::try_from))
                .collect::<Result<_, _>>()?,
            sessions: view.sessions.unwrap_or_default().try_into()?,
            orders: Orders {
                checkpoint: view.checkpoint.map(Into::into),
                restore: view.restore.map(Into::into),
                set_back: view.set_back.into_iter().map(Into::into).collect(),
                paused: view.paused,
                evicted: (view.evicted.into_iter().take(Orders::EVICTED_MAX))
                    .map(SessionId)
                    .collect(),
            },
            consistency: view.consistency.unwrap_or_default().try_into()?,
        })
    }
}

impl From<&CheckpointOrder> for v1::CheckpointOrder {
    fn from(order: &CheckpointOrder) -> Self {
        let CheckpointOrder { uri, checkpoint, newer_than } = order.clone();
        let newer_than = newer_than.into_iter().map(|lsn| lsn.0).collect();
        v1::CheckpointOrder { uri, checkpoint, newer_than }
    }
}

impl From<v1::CheckpointOrder> for CheckpointOrder {
    fn from(order: v1::CheckpointOrder) -> Self {
        let v1::CheckpointOrder { uri, checkpoint, newer_than } = order;
        let newer_than = newer_than.into_iter().map(Lsn).collect();
        CheckpointOrder { uri, checkpoint, newer_than }
    }
}

impl From<&RestoreOrder> for v1::RestoreOrder {
    fn from(order: &RestoreOrder) -> Self {
        let RestoreOrder { uri, job, checkpoint, epoch } = order.clone();
        v1::RestoreOrder { uri, job, checkpoint, epoch: epoch.0 }
    }
}

impl From<v1::RestoreOrder> for RestoreOrder {
    fn from(order: v1::RestoreOrder) -> Self {
        let v1::RestoreOrder { uri, job, checkpoint, epoch } = order;
        RestoreOrder { uri, job, checkpoint, epoch: Epoch(epoch) }
    }
}

impl From<&SetBack> for v1::SetBack {
    fn from(back: &SetBack) -> Self {
        let SetBack { uri, job, checkpoint, shards } = back.clone();
        let shard =
            |(shard, epoch): (ShardId, Epoch)| v1::SetBackShard { shard: shard.0, epoch: epoch.0 };
        v1::SetBack { uri, job, checkpoint, shards: shards.into_iter().map(shard).collect() }
    }
}

impl From<v1::SetBack> for SetBack {
    fn from(back: v1::SetBack) -> Self {
        let v1::SetBack { uri, job, checkpoint, shards } = back;
        let shards = shards.into_iter().map(|one| (ShardId(one.shard), Epoch(one.epoch))).collect();
        SetBack { uri, job, checkpoint, shards }
    }
}

impl From<&NodeView> for v1::NodeView {
    fn from(node: &NodeView) -> Self {
        v1::NodeView {
            node: node.server.node.0,
            name: node.name.clone(),
            incarnation: node.server.incarnation.0,
            address: node.address.clone(),
            zone: node.zone.clone(),
            alive: node.alive,
            admission: v1::Admission::from(node.admission).into(),
        }
    }
}

impl From<Admission> for v1::Admission {
    fn from(admission: Admission) -> Self {
        match admission {
            Admission::Open => v1::Admission::Open,
            Admission::Cordoned => v1::Admission::Cordoned,
            Admission::Draining => v1::Admission::Draining,
        }
    }
}

impl From<v1::Admission> for Admission {
    fn from(admission: v1::Admission) -> Self {
        match admission {
            v1::Admission::Open => Admission::Open,
            v1::Admission::Cordoned => Admission::Cordoned,
            v1::Admission::Draining => Admission::Draining,
        }
    }
}

impl TryFrom<v1::NodeView> for NodeView {
    type Error = Invalid;

    fn try_from(node: v1::NodeView) -> Result<Self, Invalid> {
        check_name("node.name", &node.name)?;
        let unknown = |_| Invalid::new("node.admission", "is not known");
        let admission = v1::Admission::try_from(node.admission).map_err(unknown)?.into();
        let server = v1::ServerRef { node: node.node, incarnation: node.incarnation };
        Ok(NodeView {
            admission,
            name: node.name,
            server: server.try_into()?,
            address: node.address,
            zone: node.zone,
            alive: node.alive,
        })
    }
}

impl From<Refusal> for v1::Refusal {
    fn from(refusal: Refusal) -> Self {
        let reason = match refusal.reason {
            RefusalReason::NotFinite => v1::RefusalReason::NotFinite,
            RefusalReason::UnknownVariable => v1::RefusalReason::UnknownVariable,
            RefusalReason::WrongShape => v1::RefusalReason::WrongShape,
            RefusalReason::MemoryLimit => v1::RefusalReason::MemoryLimit,
            RefusalReason::RoundOver => v1::RefusalReason::RoundOver,
            RefusalReason::RoundTooLarge => v1::RefusalReason::RoundTooLarge,
        };
        v1::Refusal { reason: reason.into(), variable: refusal.variable.0 }
    }
}

impl TryFrom<v1::Refusal> for Refusal {
    type Error = Invalid;

    fn try_from(refusal: v1::Refusal) -> Result<Self, Invalid> {
        let reason = match refusal.reason() {
            v1::RefusalReason::NotFinite => RefusalReason::NotFinite,
            v1::RefusalReason::UnknownVariable => RefusalReason::UnknownVariable,
            v1::RefusalReason::WrongShape => RefusalReason::WrongShape,
            v1::RefusalReason::MemoryLimit => RefusalReason::MemoryLimit,
            v1::RefusalReason::RoundOver => RefusalReason::RoundOver,
            v1::RefusalReason::RoundTooLarge => RefusalReason::RoundTooLarge,
            v1::RefusalReason::Unspecified => {
                return Err(Invalid::new("refusal.reason", "is not given"));
            }
        };
        Ok(Refusal { reason, variable: VariableId(refusal.variable) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message;

    use super::*;
    use downpour_core::consistency::{Consistency, Mode};

    fn view() -> JobView {
        let server = |node, incarnation| ServerRef {
            node: NodeId(node),
            incarnation: Incarnation(incarnation),
        };
        let table = VariableSpec {
            name: "user".into(),
            optimizer: OptimizerSpec {
                schedule: Schedule {
                    warm_up_steps: 10,
                    then: Course::Cosine { steps: 100, floor: 0.01 },
                },
                staleness: Scaling::Records { per: 3.0 },
                clip_row_norm: Some(1.5),
                l2_decay: 0.001,
                ..Adam { learning_rate: 0.1, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }.into()
            },
            shape: Shape::Table(TableSpec {
                dim: 8,
                init: Init::Normal { mean: 0.0, std: 0.01 },
                group: "people".into(),
                row_format: RowFormat::Bf16,
            }),
        };
        let dense = VariableSpec {
            name: "net/weight".into(),
            optimizer: OptimizerSpec::Sgd(Sgd { learning_rate: 0.5 }),
            shape: Shape::Dense(DenseSpec { shape: vec![3, 4], block_floats: 5 }),
        };
        let route = ShardRoute {
            epoch: Epoch(3),
            set_version: 4,
            primary: Some(server(2, 9)),
            in_sync: vec![server(1, 7), server(2, 9)],
            joining: Some(server(3, 8)),
            moving: Some(Move { from: server(1, 7), to: server(3, 8) }),
        };
        let lost = ShardRoute {
            epoch: Epoch(5),
            set_version: 6,
            primary: None,
            in_sync: vec![],
            joining: None,
            moving: None,
        };
        JobView {
            job: JobId(1),
            spec: JobSpec { name: "ctr".into(), shards: 2, replicas: 2, min_in_sync: 1, seed: 7 },
            version: 11,
            variables: vec![
                Variable { id: VariableId(1), spec: table },
                Variable { id: VariableId(2), spec: dense },
            ],
            shards: vec![route, lost],
            sessions: ClosedSessions { high_water: 9, open: [SessionId(4)].into() },
            orders: Orders { paused: true, evicted: vec![SessionId(8)], ..Orders::default() },
            consistency: Consistency {
                variables: [(VariableId(1), Mode::Ssp { bound: 3 })].into(),
                ..Consistency::hybrid(2)
            },
        }
    }

    fn refused(change: impl FnOnce(&mut v1::JobView)) -> &'static str {
        let mut wire = v1::JobView::from(&view());
        change(&mut wire);
        JobView::try_from(wire).unwrap_err().field
    }

    #[test]
    fn a_view_survives_the_wire() {
        let wire = v1::JobView::from(&view()).encode_to_vec();
        let back = JobView::try_from(v1::JobView::decode(wire.as_slice()).unwrap()).unwrap();
        assert_eq!(back, view());
    }

    #[test]
    fn every_optimizer_and_schedule_survives_the_wire() {
        let (learning_rate, epsilon, initial_accumulator, momentum) = (0.1, 1e-8, 0.2, 0.7);
        let (beta1, beta2, weight_decay) = (0.9, 0.999, 0.3);
        let optimizers: [OptimizerSpec; 8] = [
            Sgd { learning_rate }.into(),
            Momentum { learning_rate, momentum, nesterov: true }.into(),
            Adagrad { learning_rate, epsilon, initial_accumulator }.into(),
            RowwiseAdagrad { learning_rate, epsilon, initial_accumulator }.into(),
            RmsProp { learning_rate, alpha: 0.99, epsilon, momentum }.into(),
            Adam { learning_rate, beta1, beta2, epsilon }.into(),
            AdamW { learning_rate, beta1, beta2, epsilon, weight_decay }.into(),
            Ftrl { learning_rate, beta: 1.0, l1: 0.2, l2: 0.3 }.into(),
        ];
        let courses = [
            Course::Constant,
            Course::Step { every: 3, factor: 0.5 },
            Course::Cosine { steps: 4, floor: 0.25 },
        ];
        for (spec, then) in optimizers.iter().flat_map(|spec| courses.map(|then| (spec, then))) {
            for (warm_up_steps, clip_row_norm, staleness) in [
                (0, None, Scaling::None),
                (7, Some(2.0), Scaling::Clocks { per: 2.0 }),
                (7, None, Scaling::Records { per: 0.5 }),
            ] {
                let schedule = Schedule { warm_up_steps, then };
                let spec = OptimizerSpec { schedule, staleness, clip_row_norm, ..*spec };
                let wire = v1::Optimizer::from(&spec).encode_to_vec();
                let back = v1::Optimizer::decode(wire.as_slice()).unwrap();
                assert_eq!(OptimizerSpec::try_from(back), Ok(spec));
            }
        }
    }

    #[test]
    fn a_view_that_cannot_be_is_refused_by_field() {
        assert_eq!(refused(|view| view.job = 0), "job");
        assert_eq!(refused(|view| view.spec = None), "spec");
        assert_eq!(refused(|view| drop(view.shards.pop())), "shards");
        assert_eq!(refused(|view| view.shards.swap(0, 1)), "shards");
        assert_eq!(refused(|view| view.variables[1].id = 1), "variables");
        assert_eq!(refused(|view| view.shards[0].epoch = 1 << 24), "route.epoch");
        assert_eq!(refused(|view| view.shards[0].primary = None), "route.primary");
        assert_eq!(refused(|view| view.shards[0].in_sync.clear()), "route.primary");
        let member = |view: &mut v1::JobView| view.shards[0].joining = view.shards[0].primary;
        assert_eq!(refused(member), "route.joining");
        assert_eq!(refused(|view| view.shards[0].in_sync[0].incarnation = 0), "server");
        let none = v1::ClosedSessions { high_water: 3, open: vec![4] };
        assert_eq!(refused(|view| view.sessions = Some(none)), "sessions.open");
    }

    #[test]
    fn a_definition_that_cannot_work_is_refused_by_field() {
        let refused = |change: fn(&mut v1::VariableSpec)| {
            let mut wire = v1::VariableSpec::from(&view().variables[0].spec);
            change(&mut wire);
            VariableSpec::try_from(wire).unwrap_err().field
        };
        assert_eq!(refused(|spec| spec.optimizer = None), "optimizer");
        fn optimizer(spec: &mut v1::VariableSpec) -> &mut v1::Optimizer {
            spec.optimizer.as_mut().expect("it has one")
        }
        assert_eq!(refused(|spec| optimizer(spec).kind = None), "optimizer");
        assert_eq!(refused(|spec| optimizer(spec).clip_row_norm = Some(0.0)), "clip_row_norm");
        assert_eq!(refused(|spec| optimizer(spec).l2_decay = f32::NAN), "l2_decay");
        let uncounted = |spec: &mut v1::VariableSpec| {
            optimizer(spec).staleness = Some(v1::StalenessScaling::default());
        };
        assert_eq!(refused(uncounted), "staleness");
        let by_nothing = |spec: &mut v1::VariableSpec| {
            let counted = Some(v1::staleness_scaling::Counted::Clocks(0.0));
            optimizer(spec).staleness = Some(v1::StalenessScaling { counted });
        };
        assert_eq!(refused(by_nothing), "staleness.clocks");
        assert_eq!(
            refused(|spec| {
                let step = v1::StepSchedule { every: 0, factor: 0.5 };
                let then = Some(v1::schedule::Then::Step(step));
                optimizer(spec).schedule = Some(v1::Schedule { warm_up_steps: 0, then });
            }),
            "schedule.step.every"
        );
        assert_eq!(
            refused(|spec| {
                let dense = v1::DenseSpec { shape: vec![2], block_floats: 1 };
                spec.shape = Some(v1::variable_spec::Shape::Dense(dense));
            }),
            "optimizer",
            "clipping by row is for tables"
        );
        assert_eq!(refused(|spec| spec.shape = None), "shape");
        assert_eq!(refused(|spec| spec.name.clear()), "name");
        assert_eq!(
            refused(|spec| {
                optimizer(spec).clip_row_norm = None;
                let dense = v1::DenseSpec { shape: vec![u64::MAX, 2], block_floats: 1 };
                spec.shape = Some(v1::variable_spec::Shape::Dense(dense));
            }),
            "dense.shape (product)"
        );
    }

    proptest! {
        /// Also of bytes that are nearly a view: one byte of a good one replaced.
        #[test]
        fn any_bytes_are_a_value_or_an_error(bytes: Vec<u8>, at: prop::sample::Index, byte: u8) {
            let mut nearly = v1::JobView::from(&view()).encode_to_vec();
            let at = at.index(nearly.len());
            nearly[at] = byte;
            for bytes in [bytes, nearly] {
                if let Ok(wire) = v1::JobView::decode(bytes.as_slice()) {
                    let _ = JobView::try_from(wire);
                }
                if let Ok(wire) = v1::NodeView::decode(bytes.as_slice()) {
                    let _ = NodeView::try_from(wire);
                }
                if let Ok(wire) = v1::VariableSpec::decode(bytes.as_slice()) {
                    let _ = VariableSpec::try_from(wire);
                }
            }
        }
    }
}
