//! Checkpoints as those who take them and begin from them see it, with others at the same place (docs/protocol.md 8.6).

mod support;

use std::path::{Path, PathBuf};

use downpour_core::init::Init;
use downpour_core::optimizer::{OptimizerSpec, Sgd};
use downpour_core::spec::{Shape, TableSpec, VariableSpec};
use downpour_proto::v1;
use support::{Group, eventually, get_cluster, unique};
use tempfile::TempDir;
use tonic::{Code, Status};

const JOB: &str = "ctr";

/// A group of one, a job of one shard with a table, and where its checkpoints go.
struct World {
    group: Group,
    job: u64,
    place: TempDir,
}

impl World {
    async fn new() -> World {
        let calm = |config: &mut downpour_coordinator::Config| config.failure_timeout_ms = 600_000;
        let group = Group::start_with(1, calm).await;
        group.register("ps-0", "").await;
        let job = group.create_job(JOB, 1, 1).await.job;
        let opening = v1::OpenSessionRequest {
            job,
            name: "worker".into(),
            kind: v1::SessionKind::Worker.into(),
            request_id: unique(),
        };
        let session = group.client(1).open_session(opening).await.unwrap().into_inner().session;
        let table = VariableSpec {
            name: "items".into(),
            optimizer: OptimizerSpec::from(Sgd { learning_rate: 0.1 }),
            shape: Shape::Table(TableSpec::new(4, Init::Zeros, "g")),
        };
        let variables = vec![v1::VariableSpec::from(&table)];
        let request = v1::DefineVariablesRequest { job, session, variables };
        group.client(1).define_variables(request).await.unwrap();
        World { group, job, place: tempfile::tempdir().unwrap() }
    }

    fn uri(&self) -> String {
        format!("file://{}", self.place.path().display())
    }

    fn folder(&self, checkpoint: &str) -> PathBuf {
        self.place.path().join(JOB).join(checkpoint)
    }

    async fn begin(&self) -> v1::CreateCheckpointReply {
        let request = v1::CreateCheckpointRequest {
            job: self.job,
            uri: self.uri(),
            incremental: true,
            request_id: unique(),
        };
        self.group.client(1).create_checkpoint(request).await.unwrap().into_inner()
    }

    /// Its only shard is stored; how it ended.
    async fn end(&self, checkpoint: &str) -> v1::EndedCheckpoint {
        let saved = v1::ShardSaved { epoch: 1, lsn: 1 << 40 | 1, attempt: 1, ..Default::default() };
        let (job, saved) = (self.job, vec![saved]);
        let report = v1::ReportSavedRequest { job, checkpoint: checkpoint.into(), saved };
        self.group.client(1).report_saved(report).await.unwrap();
        eventually("it has ended", || async {
            let job = get_cluster(&self.group.client(1)).await?.jobs.remove(0);
            let v1::JobCheckpoints { whole, failed, .. } = job.checkpoints.unwrap_or_default();
            let mut ended = [whole, failed].into_iter().flatten();
            let ended = ended.find(|ended| ended.checkpoint == checkpoint);
            ended.ok_or_else(|| Status::unavailable("it is being taken"))
        })
        .await
    }

    async fn taken(&self) -> v1::CreateCheckpointReply {
        let begun = self.begin().await;
        let ended = self.end(&begun.checkpoint).await;
        assert_eq!(ended.error, "");
        begun
    }
}

fn write(folder: &Path, file: &str, text: &str) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join(file), text).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_whose_manifest_is_there_and_is_none_ends_and_the_next_one_can_be_taken() {
    let world = World::new().await;
    for mark in [true, false] {
        let begun = world.begin().await.checkpoint;
        let folder = world.folder(&begun);
        if mark {
            // Whoever deleted it died between the two.
            write(&folder, "deleted", "");
        }
        write(&folder, "manifest.json", "{}");
        let ended = world.end(&begun).await;
        assert!(ended.error.contains(if mark { "deleted" } else { "damaged" }), "{ended:?}");
    }
    world.taken().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_base_was_deleted_a_full_checkpoint_is_taken() {
    let world = World::new().await;
    let (full, one, two) = (world.taken().await, world.taken().await, world.taken().await);
    assert_eq!([full.chain, one.chain, two.chain], [0, 1, 2]);
    write(&world.folder(&full.checkpoint), "deleted", "");
    let next = [world.taken().await.chain, world.taken().await.chain];
    assert_eq!(next, [0, 1], "and increments again on that one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_for_the_newest_checkpoint_is_not_told_that_there_is_none_where_its_base_or_its_place_is_gone()
 {
    let world = World::new().await;
    let restore = v1::RestoreJobRequest {
        uri: world.uri(),
        job: JOB.into(),
        name: "again".into(),
        ..Default::default()
    };
    let restored = || async {
        let restored = world.group.client(1).restore_job(restore.clone()).await;
        restored.map(|_| ()).map_err(|status| status.code())
    };
    assert_eq!(restored().await, Err(Code::NotFound), "it may begin from nothing");
    let (full, _) = (world.taken().await, world.taken().await);
    let manifest = world.folder(&full.checkpoint).join("manifest.json");
    let text = std::fs::read(&manifest).unwrap();
    std::fs::remove_file(&manifest).unwrap();
    assert_eq!(restored().await, Err(Code::FailedPrecondition));
    std::fs::write(&manifest, text).unwrap();
    // The leader does not see the place, or it is not what it was.
    let elsewhere = world.place.path().with_extension("elsewhere");
    std::fs::rename(world.place.path(), &elsewhere).unwrap();
    assert_eq!(restored().await, Err(Code::FailedPrecondition));
    std::fs::create_dir(world.place.path()).unwrap();
    assert_eq!(restored().await, Err(Code::FailedPrecondition));
    std::fs::remove_dir(world.place.path()).unwrap();
    std::fs::rename(&elsewhere, world.place.path()).unwrap();
    assert_eq!(restored().await, Ok(()));
}
