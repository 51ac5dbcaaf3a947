//! The pure half of a pull: what to ask whom in which message, and where an answer's bytes go.

use std::collections::BTreeMap;

use bytes::BytesMut;
use downpour_core::id::{Epoch, JobId, Lsn, ServerRef, ShardId};
use downpour_core::row_format::RowFormat;
use downpour_core::tensor_bytes::FLOAT_BYTES;
use downpour_core::view::JobView;
use downpour_proto::tensor::{KEY_BYTES, get_rows, put_keys_at};
use downpour_proto::v1;

use super::TableRows;
use crate::Error;
use crate::dense::DenseCache;
use crate::encode::{Columns, check_floats, table};
use crate::partition::Partition;
use crate::state::Route;

/// One table or one dense variable on one shard.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Work {
    shard: ShardId,
    what: What,
    reply_bytes: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    /// The shard's keys from `start` to `end` of the `table`th table of the plan.
    Rows { table: usize, start: usize, end: usize },
    /// The `tensor`th of the cache, on the `at`th of its shards.
    Dense { tensor: usize, at: usize },
}

/// One request to one server, with about `message_bytes` of answer.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) server: ServerRef,
    /// Of all its shards.
    pub(crate) lane: u32,
    pub(crate) parts: Vec<Part>,
    reply_bytes: usize,
}

/// What a message asks of one shard.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) shard: ShardId,
    pub(crate) epoch: Epoch,
    pub(crate) work: Vec<Work>,
}

/// Keys dealt to shards, tables in order of their variables.
#[derive(Debug)]
pub(crate) struct Plan {
    tables: Vec<Table>,
}

#[derive(Debug)]
struct Table {
    /// Position among the caller's tables.
    index: usize,
    dim: usize,
    format: RowFormat,
    partition: Partition,
}

impl Plan {
    /// The plan and all of its work. Checks the caller's tables against the job's variables.
    pub(crate) fn new(
        view: &JobView,
        tables: &[TableRows<'_>],
        dense: Option<&DenseCache>,
        message_bytes: usize,
    ) -> Result<(Self, Vec<Work>), Error> {
        let mut order: Vec<usize> = (0..tables.len()).collect();
        order.sort_unstable_by_key(|&index| tables[index].variable);
        let variable = |index: usize| tables[index].variable;
        if let Some(pair) = order.windows(2).find(|pair| variable(pair[0]) == variable(pair[1])) {
            let problem = format!("table {} appears twice in one pull", variable(pair[0]));
            return Err(Error::invalid("variable", problem));
        }
        let mut plan = Plan { tables: Vec::with_capacity(order.len()) };
        let mut work = Vec::new();
        for index in order {
            let TableRows { variable, keys, values } = &tables[index];
            let Columns { dim, arrangement, format } = table(view, *variable)?;
            check_floats("values", values.len(), keys.len() * dim)?;
            let partition = Partition::new(keys, arrangement)?;
            let rows_max = (message_bytes / format.row_bytes(dim)).max(1);
            for (shard, keys) in partition.shards() {
                for start in (0..keys.len()).step_by(rows_max) {
                    let end = (start + rows_max).min(keys.len());
                    let reply_bytes = (end - start) * format.row_bytes(dim);
                    let what = What::Rows { table: plan.tables.len(), start, end };
                    work.push(Work { shard, what, reply_bytes });
                }
            }
            plan.tables.push(Table { index, dim, format, partition });
        }
        for (tensor, cached) in dense.iter().flat_map(|dense| dense.tensors.iter().enumerate()) {
            for (at, (shard, blocks)) in cached.layout.shards.iter().enumerate() {
                let reply_bytes = cached.layout.floats_of(blocks) * FLOAT_BYTES;
                work.push(Work { shard: *shard, what: What::Dense { tensor, at }, reply_bytes });
            }
        }
        Ok((plan, work))
    }

    /// Puts work into messages; what has no server now stays in `work`.
    pub(crate) fn messages(
        work: &mut Vec<Work>,
        message_bytes: usize,
        lanes: u32,
        route: impl Fn(ShardId) -> Route,
    ) -> Vec<Message> {
        let mut all = std::mem::take(work);
        // By shard, tables before dense variables, both in order of their variables: the order that the contract asks for.
        all.sort_unstable();
        let mut open: BTreeMap<(ServerRef, u32), Message> = BTreeMap::new();
        let mut full = Vec::new();
        for item in all {
            let Route { epoch, primary } = route(item.shard);
            let Some(server) = primary else {
                work.push(item);
                continue;
            };
            let lane = item.shard.0 % lanes;
            let empty = || Message { server, lane, parts: Vec::new(), reply_bytes: 0 };
            let message = open.entry((server, lane)).or_insert_with(empty);
            let too_much = message.reply_bytes + item.reply_bytes > message_bytes;
            // So a part names each table once, as it must: all but the last range of a table are full, and nothing of it fits beside one.
            if !message.parts.is_empty() && too_much {
                full.push(std::mem::replace(message, empty()));
            }
            message.reply_bytes += item.reply_bytes;
            match message.parts.last_mut().filter(|part| part.shard == item.shard) {
                Some(part) => part.work.push(item),
                None => message.parts.push(Part { shard: item.shard, epoch, work: vec![item] }),
            }
        }
        full.extend(open.into_values());
        full
    }

    /// The wire form of a message.
    pub(crate) fn request(
        &self,
        job: JobId,
        message: &Message,
        tables: &[TableRows<'_>],
        dense: Option<&DenseCache>,
    ) -> v1::PullRequest {
        let parts = message.parts.iter().map(|part| {
            let mut wire =
                v1::PullPart { shard: part.shard.0, epoch: part.epoch.0, ..Default::default() };
            for work in &part.work {
                match &work.what {
                    What::Rows { table, start, end } => {
                        let table = &self.tables[*table];
                        let rows = &tables[table.index];
                        let mut bytes = BytesMut::with_capacity((end - start) * KEY_BYTES);
                        let places = table.partition.on(part.shard).part(*start..*end);
                        put_keys_at(&mut bytes, rows.keys, &places);
                        let keys = bytes.freeze();
                        wire.rows.push(v1::PullRows { variable: rows.variable.0, keys });
                    }
                    What::Dense { tensor, at } => {
                        if let Some(dense) = dense {
                            let tensor = &dense.tensors[*tensor];
                            let variable = tensor.layout.variable.0;
                            let have_lsn = tensor.shards[*at].have.0;
                            wire.dense.push(v1::PullDense { variable, have_lsn });
                        }
                    }
                }
            }
            wire
        });
        v1::PullRequest {
            job: job.0,
            incarnation: message.server.incarnation.0,
            parts: parts.collect(),
        }
    }

    /// Puts the values of one part where they belong.
    ///
    /// # Errors
    /// What is wrong with the answer.
    pub(crate) fn take(
        &self,
        part: &Part,
        pulled: &v1::PulledPart,
        tables: &mut [TableRows<'_>],
        dense: Option<&mut DenseCache>,
    ) -> Result<(), String> {
        let is_rows = |work: &&Work| matches!(work.what, What::Rows { .. });
        let asked = part.work.iter().filter(is_rows).count();
        if (asked, part.work.len() - asked) != (pulled.rows.len(), pulled.dense.len()) {
            return Err("not as many tables or dense variables as were asked for".into());
        }
        let mut no_dense = DenseCache::new(Vec::new());
        let dense = dense.unwrap_or(&mut no_dense);
        let (mut rows, mut blocks) = (pulled.rows.iter(), pulled.dense.iter());
        for work in &part.work {
            match &work.what {
                What::Rows { table, start, end } => {
                    let table = &self.tables[*table];
                    let places = table.partition.on(part.shard).part(*start..*end);
                    let bytes = rows.next().ok_or("rows are missing")?;
                    let values = &mut *tables[table.index].values;
                    get_rows("rows", bytes, table.format, table.dim, &places, values)
                        .map_err(|error| error.to_string())?;
                }
                What::Dense { tensor, at } => {
                    let pulled_dense = blocks.next().ok_or("dense values are missing")?;
                    let tensor = dense.tensors.get_mut(*tensor).ok_or("no cache")?;
                    tensor.take(*at, Lsn(pulled.lsn), pulled_dense)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dense::Layouts;
    use crate::state::tests::{server, view};
    use downpour_core::id::VariableId;
    use downpour_core::init::Init;
    use downpour_core::optimizer::{OptimizerSpec, Sgd};
    use downpour_core::spec::{DenseSpec, Shape, TableSpec, Variable, VariableSpec};
    use downpour_proto::tensor::{Keys, put_floats};
    use downpour_proto::validate;
    use proptest::prelude::*;

    const MESSAGE_BYTES: usize = 1 << 20;
    const DIM: u32 = 40_000;
    const NET: VariableId = VariableId(3);

    /// Variables 1 and 2 are tables with rows of 160 kB, variable 3 is a tensor of 50 floats in blocks of 8.
    fn job(shards: u32) -> JobView {
        let table = || Shape::Table(TableSpec::new(DIM, Init::Zeros, "t"));
        let dense = Shape::Dense(DenseSpec { shape: vec![50], block_floats: 8 });
        let shapes = [("one", table()), ("two", table()), ("net", dense)];
        let optimizer = OptimizerSpec::Sgd(Sgd { learning_rate: 1.0 });
        let variables = (1..).map(VariableId).zip(shapes).map(|(id, (name, shape))| Variable {
            id,
            spec: VariableSpec { name: name.into(), optimizer, shape },
        });
        let mut view = view(1);
        view.spec.shards = shards;
        view.shards = (0..shards).map(|_| view.shards[0].clone()).collect();
        JobView { variables: variables.collect(), ..view }
    }

    fn route(shard: ShardId) -> Route {
        let node = shard.0 % 3;
        Route { epoch: Epoch(4), primary: (node != 0).then(|| server(node, node.into())) }
    }

    /// The value that a fake server has for element 0 of a row.
    fn value(variable: u32, key: u64) -> f32 {
        variable as f32 * 1000.0 + key as f32
    }

    fn answer(part: &v1::PullPart, cache: &DenseCache) -> v1::PulledPart {
        let mut pulled = v1::PulledPart { lsn: 9, ..Default::default() };
        for rows in &part.rows {
            let mut out = BytesMut::new();
            for key in Keys::trusted(&rows.keys).iter() {
                put_floats(&mut out, &vec![value(rows.variable, key); DIM as usize]);
            }
            pulled.rows.push(out.freeze());
        }
        for _ in &part.dense {
            let layout = &cache.tensors[0].layout;
            let own = layout.shards.iter().find(|own| own.0.0 == part.shard).unwrap();
            let mut out = BytesMut::new();
            for &block in &own.1 {
                put_floats(&mut out, &vec![block as f32; layout.range(block).len()]);
            }
            let blocks = own.1.clone();
            let values = out.freeze();
            pulled.dense.push(v1::PulledDense { blocks, values, uninitialized: 0 });
        }
        pulled
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        #[test]
        fn every_row_is_asked_for_once_and_lands_in_its_place(
            keys: [std::collections::BTreeSet<u8>; 2],
        ) {
            let job = job(7);
            let keys = keys.map(|keys| keys.into_iter().take(24).map(u64::from).collect::<Vec<_>>());
            let mut values = [0, 1].map(|at: usize| vec![f32::NAN; keys[at].len() * DIM as usize]);
            let [first, second] = &mut values;
            // In the wrong order, on purpose.
            let mut tables = [
                TableRows { variable: VariableId(2), keys: &keys[1], values: second },
                TableRows { variable: VariableId(1), keys: &keys[0], values: first },
            ];
            let mut cache = DenseCache::new(vec![Layouts::default().get(&job, NET).unwrap()]);
            let (plan, mut work) = Plan::new(&job, &tables, Some(&cache), MESSAGE_BYTES).unwrap();
            let mut messages = Plan::messages(&mut work, MESSAGE_BYTES, 2, route);
            prop_assert!(work.iter().all(|work| work.shard.0.is_multiple_of(3)), "no primary: later");
            let anywhere = |_| Route { epoch: Epoch(5), primary: Some(server(9, 9)) };
            messages.extend(Plan::messages(&mut work, MESSAGE_BYTES, 2, anywhere));
            prop_assert!(work.is_empty());
            for message in &messages {
                let request = plan.request(JobId(1), message, &tables, Some(&cache));
                prop_assert_eq!(validate::pull_request(&request), Ok(()));
                prop_assert!(message.reply_bytes <= MESSAGE_BYTES);
                for (part, wire) in message.parts.iter().zip(&request.parts) {
                    let pulled = answer(wire, &cache);
                    plan.take(part, &pulled, &mut tables, Some(&mut cache)).unwrap();
                }
            }
            for (at, variable) in [0, 1].into_iter().zip(1..) {
                let wanted = keys[at].iter().map(|&key| value(variable, key));
                prop_assert!(values[at].chunks(DIM as usize).map(|row| row[0]).eq(wanted));
            }
            let wanted: Vec<f32> = (0..50).map(|at| (at / 8) as f32).collect();
            prop_assert_eq!(cache.values(NET).unwrap(), &wanted[..]);
        }
    }

    #[test]
    fn an_answer_that_does_not_fit_the_question_is_refused_and_changes_nothing() {
        let job = job(1);
        let mut values = vec![7.0; DIM as usize];
        let mut tables = [TableRows { variable: VariableId(1), keys: &[1], values: &mut values }];
        let mut cache = DenseCache::new(vec![Layouts::default().get(&job, NET).unwrap()]);
        let (plan, mut work) = Plan::new(&job, &tables, Some(&cache), MESSAGE_BYTES).unwrap();
        let everywhere = |_| Route { epoch: Epoch(1), primary: Some(server(1, 1)) };
        let message = Plan::messages(&mut work, MESSAGE_BYTES, 2, everywhere).remove(0);
        let request = plan.request(JobId(1), &message, &tables, Some(&cache));
        let good = answer(&request.parts[0], &cache);
        let mut refused = |change: &dyn Fn(&mut v1::PulledPart)| {
            let mut bad = good.clone();
            change(&mut bad);
            let taken = plan.take(&message.parts[0], &bad, &mut tables, Some(&mut cache));
            taken.expect_err("it does not fit")
        };
        refused(&|bad| bad.rows.clear());
        refused(&|bad| bad.rows[0] = bad.rows[0].slice(4..));
        refused(&|bad| bad.dense.push(v1::PulledDense::default()));
        refused(&|bad| bad.dense[0].blocks.swap(0, 1));
        refused(&|bad| bad.dense[0].blocks[6] = 99);
        refused(&|bad| bad.dense[0].values = bad.dense[0].values.slice(1..));
        refused(&|bad| bad.dense[0].uninitialized = 8);
        assert_eq!(cache.values(NET), Some(&[0.0; 50][..]));
    }
}
