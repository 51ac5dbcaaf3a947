//! A Downpour cluster, through its client.

use anyhow::bail;
use downpour_client::{
    Arrangement, Coordinators, DenseCache, DenseTensor, Error, Job, PushBatch, RowGradients,
    Session, SessionOptions, TableRows,
};
use downpour_core::id::VariableId;
use downpour_core::init::Init;
use downpour_core::mix::mix64;
use downpour_core::spec::{DenseSpec, JobSpec, Shape, TableSpec, VariableSpec};
use tokio::runtime::{Builder, Runtime};

use super::{DensePeer, SparsePeer, Worker};
use crate::dedup::SortedSet;
use crate::protocol::{Command, Inbox, Peer};
use crate::workload::{Dense, Optimizer, Sparse};

/// A session with one variable. Everything runs on the calling thread, so that no answer is handed from thread to thread.
pub(crate) struct Cluster {
    runtime: Runtime,
    coordinators: Coordinators,
    session: Session,
    variable: VariableId,
    /// Steps pushed.
    clock: u64,
    set: SortedSet,
    /// Of the table, where there is one.
    arrangement: Option<Arrangement>,
    /// Of a tensor.
    cache: Option<DenseCache>,
}

impl Cluster {
    /// Joins the job and defines the table of S.
    pub(crate) fn table(peer: &Peer, workload: &Sparse) -> anyhow::Result<Self> {
        let table = TableSpec::new(workload.dim, Init::Zeros, "table");
        let variable = VariableSpec {
            name: "table".into(),
            optimizer: workload.optimizer.spec(),
            shape: Shape::Table(table),
        };
        Self::join(peer, workload.seed, &variable)
    }

    /// Joins the job, defines the tensor of D and fills it with zeros.
    pub(crate) fn tensor(peer: &Peer, workload: &Dense) -> anyhow::Result<Self> {
        let dense =
            DenseSpec { shape: vec![workload.floats as u64], block_floats: workload.block_floats };
        let variable = VariableSpec {
            name: "tensor".into(),
            optimizer: Optimizer::Sgd.spec(),
            shape: Shape::Dense(dense),
        };
        let mut cluster = Self::join(peer, 0, &variable)?;
        let Self { runtime, session, variable, .. } = &cluster;
        let variable = *variable;
        runtime.block_on(async {
            let zeros = vec![0.0; workload.floats];
            let values = vec![DenseTensor { variable, floats: &zeros }];
            let batch = PushBatch { values, ..PushBatch::default() };
            session.push(&batch).await?.await?.applied()?;
            session.mark_initialized(&[variable]).await
        })?;
        cluster.cache = Some(cluster.session.dense_cache(&[variable])?);
        Ok(cluster)
    }

    fn join(peer: &Peer, seed: u64, variable: &VariableSpec) -> anyhow::Result<Self> {
        let Peer::Cluster { coordinators, job, shards, replicas, transport } = peer else {
            bail!("not a cluster: {peer:?}");
        };
        let (shards, replicas) = (*shards, *replicas);
        let spec = JobSpec { name: job.clone(), shards, replicas, min_in_sync: 1, seed };
        let coordinators = Coordinators::parse(coordinators)?;
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (session, variable) = runtime.block_on(async {
            let options = SessionOptions {
                transport: transport.parse()?,
                ..SessionOptions::worker(format!("bench-{}", std::process::id()))
            };
            let session = Session::open(&coordinators, &Job::Create(spec), options).await?;
            let defined = session.define(std::slice::from_ref(variable)).await?;
            Ok::<_, Error>((session, defined[0].variable.id))
        })?;
        let (set, cache) = (SortedSet::default(), None);
        let arrangement = session.arrangement(variable).ok();
        Ok(Self { runtime, coordinators, session, variable, clock: 0, set, arrangement, cache })
    }

    fn push_batch(&mut self, batch: PushBatch<'_>) -> anyhow::Result<()> {
        self.clock += 1;
        let batch = PushBatch { clock: self.clock, ..batch };
        let session = &self.session;
        self.runtime.block_on(async { session.push(&batch).await?.await?.applied() })?;
        Ok(())
    }
}

impl SparsePeer for Cluster {
    fn key(&self, id: u32) -> u64 {
        mix64(id.into())
    }

    fn begins_empty(&self) -> bool {
        true
    }

    fn unique(&mut self, ids: &[u32], keys: &mut Vec<u64>) {
        self.set.keys_of(ids, keys);
        if let Some(arrangement) = self.arrangement {
            arrangement.arrange(keys);
        }
    }

    fn pull(&mut self, keys: &[u64], rows: &mut [f32]) -> anyhow::Result<()> {
        let (session, variable) = (&self.session, self.variable);
        let rows = TableRows { variable, keys, values: rows };
        self.runtime.block_on(session.pull(&mut [rows], None))?;
        Ok(())
    }

    fn push(&mut self, keys: &[u64], gradients: &[f32]) -> anyhow::Result<()> {
        let rows = vec![RowGradients { variable: self.variable, keys, gradients }];
        self.push_batch(PushBatch { rows, ..PushBatch::default() })
    }
}

impl DensePeer for Cluster {
    /// Into the client's cache, where blocks that did not change would stay: every push changes all.
    fn pull<'a>(&'a mut self, room: &'a mut [f32]) -> anyhow::Result<&'a [f32]> {
        let Self { runtime, session, variable, cache, .. } = self;
        let Some(cache) = cache.as_mut() else { return Ok(room) };
        runtime.block_on(session.pull(&mut [], Some(&mut *cache)))?;
        Ok(cache.values(*variable).unwrap_or(room))
    }

    fn push(&mut self, gradient: &[f32]) -> anyhow::Result<()> {
        let dense = vec![DenseTensor { variable: self.variable, floats: gradient }];
        self.push_batch(PushBatch { dense, ..PushBatch::default() })
    }
}

impl Worker for Cluster {
    fn next_command(&mut self, inbox: &mut Inbox) -> anyhow::Result<Option<Command>> {
        self.runtime.block_on(inbox.next())
    }

    fn clean_up(&mut self) -> anyhow::Result<()> {
        self.runtime.block_on(self.coordinators.delete_job(self.session.job()))?;
        Ok(())
    }
}
