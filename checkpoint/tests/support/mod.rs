//! A job of two shards with a table and a dense variable, as cuts of it.

#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use downpour_checkpoint::catalog::Catalog;
use downpour_checkpoint::head::Owner;
use downpour_checkpoint::manifest::Manifest;
use downpour_checkpoint::name::CheckpointName;
use downpour_checkpoint::store::{Access, Store};
use downpour_checkpoint::write::{Progress, Scratch, ShardFile, ShardWriter};
use downpour_core::cells::ClosedSessions;
use downpour_core::consistency::Consistency;
use downpour_core::id::{Epoch, Lsn, ShardId, VariableId};
use downpour_core::init::Init;
use downpour_core::optimizer::Adam;
use downpour_core::routing::shard_of;
use downpour_core::spec::{DenseSpec, JobSpec, Shape, TableSpec, Variable, VariableSpec};
use downpour_proto::v1;
use downpour_proto::v1::cut_piece::Piece;

pub const JOB: &str = "ctr";
pub const SHARDS: u32 = 2;
pub const DIM: usize = 3;
/// Beside the weights: Adam's two.
const SLOTS: usize = 2;

pub fn variables() -> Vec<Variable> {
    let adam = Adam { learning_rate: 0.1, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
    let table = Shape::Table(TableSpec::new(DIM as u32, Init::Zeros, "g"));
    let dense = Shape::Dense(DenseSpec { shape: vec![3, 7], block_floats: 4 });
    let variable = |id, name: &str, shape| Variable {
        id: VariableId(id),
        spec: VariableSpec { name: name.into(), optimizer: adam.into(), shape },
    };
    // Names that look like paths and like a tensor of another one.
    vec![
        variable(1, "data.0", table.clone()),
        variable(2, "data.0/keys", dense),
        variable(3, "../-", table),
    ]
}

/// The position of a shard after so many records.
pub fn at(count: u64) -> Lsn {
    Lsn::new(Epoch(2), count)
}

/// A cut with `rows` rows in each table and all blocks, or only what is newer than an increment's base.
pub fn pieces(shard: ShardId, newer_than: Lsn, rows: u64) -> Vec<Piece> {
    let lsn = if newer_than == Lsn::ZERO { at(rows) } else { Lsn(newer_than.0 + rows) };
    let keys =
        |salt| (0u64..).map(|key| key * 3).filter(move |&key| shard_of(key, salt, SHARDS) == shard);
    let floats = |from: u64, count: usize| {
        (0..count as u64)
            .flat_map(|at| ((from * 100 + at) as f32).to_le_bytes())
            .collect::<Vec<_>>()
    };
    let small = v1::CutSmall {
        lsn: lsn.0,
        newer_than: newer_than.0,
        clock: 12,
        variables: variables()
            .iter()
            .map(|variable| v1::CutVariable { variable: Some(variable.into()), steps: rows })
            .collect(),
        epochs: vec![v1::CutEpoch { epoch: 2, previous_lsn: 0 }],
        closed: Some(v1::ClosedSessions { high_water: 4, open: vec![3] }),
        numbering: 0,
        board: None,
    };
    let cells = (5..305).map(|session| v1::CutCell {
        session,
        last: 9,
        lsn: lsn.0,
        refusals: vec![v1::CutRefusal {
            sequence: 8,
            refusal: Some(v1::Refusal { reason: 1, variable: 1 }),
        }],
    });
    let mut all = vec![Piece::Small(small), Piece::Cells(v1::CutCells { cells: cells.collect() })];
    let (mut lines, mut blocks) = (0, 0);
    for variable in variables() {
        let id = variable.id.0;
        let salt = variable.spec.routing_salt();
        match &variable.spec.shape {
            Shape::Table(_) => {
                let keys: Vec<u64> = keys(salt).take(rows as usize).collect();
                for keys in keys.rchunks(700) {
                    lines += keys.len() as u64;
                    all.push(Piece::Rows(v1::CutRows {
                        variable: id,
                        keys: keys
                            .iter()
                            .flat_map(|key| key.to_le_bytes())
                            .collect::<Vec<_>>()
                            .into(),
                        lsns: keys
                            .iter()
                            .flat_map(|_| lsn.0.to_le_bytes())
                            .collect::<Vec<_>>()
                            .into(),
                        floats: keys
                            .iter()
                            .flat_map(|&key| floats(key, DIM * (1 + SLOTS)))
                            .collect::<Vec<_>>()
                            .into(),
                    }));
                }
            }
            Shape::Dense(dense) => {
                let mine = (0..dense.blocks())
                    .filter(|&block| shard_of(block.into(), salt, SHARDS) == shard);
                // The last one is shorter, and first.
                for block in mine.rev() {
                    blocks += 1;
                    let floats = floats(block.into(), dense.block_len(block) * (1 + SLOTS));
                    let (blocks, lsns) = (vec![block], vec![lsn.0]);
                    all.push(Piece::Blocks(v1::CutBlocks {
                        variable: id,
                        blocks,
                        lsns,
                        floats: floats.into(),
                    }));
                }
            }
        }
    }
    all.push(Piece::End(v1::CutEnd { rows: lines, blocks }));
    all
}

pub fn owner(shard: ShardId) -> Owner {
    Owner { job: JOB.into(), shard, shards: SHARDS, seed: 7 }
}

pub fn write(shard: ShardId, pieces: &[Piece], scratch: Scratch) -> ShardFile {
    let mut writer = ShardWriter::new(owner(shard), scratch);
    for piece in pieces {
        match writer.take(piece.clone()).unwrap() {
            Progress::More(more) => writer = more,
            Progress::Whole(file) => return file,
        }
    }
    panic!("there was no end");
}

pub fn bytes_of(mut file: ShardFile) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.content.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, file.content.size());
    bytes
}

/// (variable, key or block) to (LSN, floats).
pub type Lines = BTreeMap<(u32, u64), (u64, Vec<u8>)>;

/// What a cut says, however it was cut into pieces.
pub fn sorted(pieces: &[Piece]) -> (String, Vec<v1::CutCell>, Lines, String) {
    let (mut small, mut cells, mut lines, mut end) =
        (String::new(), Vec::new(), BTreeMap::new(), String::new());
    for piece in pieces {
        match piece {
            Piece::Small(one) => small = format!("{one:?}"),
            Piece::Cells(some) => cells.extend(some.cells.iter().cloned()),
            Piece::Contribution(_) => panic!("no file has any"),
            Piece::Rows(rows) => {
                let words = |bytes: &[u8]| {
                    bytes
                        .chunks_exact(8)
                        .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
                        .collect::<Vec<_>>()
                };
                let (keys, lsns) = (words(&rows.keys), words(&rows.lsns));
                let width = rows.floats.len() / keys.len();
                for ((key, lsn), row) in keys.iter().zip(lsns).zip(rows.floats.chunks_exact(width))
                {
                    assert!(lines.insert((rows.variable, *key), (lsn, row.to_vec())).is_none());
                }
            }
            Piece::Blocks(one) => {
                assert_eq!(one.blocks.len(), 1);
                lines.insert(
                    (one.variable, one.blocks[0].into()),
                    (one.lsns[0], one.floats.to_vec()),
                );
            }
            Piece::End(one) => end = format!("{one:?}"),
        }
    }
    (small, cells, lines, end)
}

pub fn store_in(folder: &Path) -> Store {
    Store::open(&format!("file://{}", folder.display()), Access::Write).unwrap()
}

/// Number `number` of the job, full or on top of `chain`.
pub async fn checkpoint(
    catalog: &Catalog,
    number: u64,
    chain: &[&Manifest],
    rows: u64,
) -> Manifest {
    let name = CheckpointName::at(number, 0);
    let mut files = Vec::new();
    for shard in (0..SHARDS).map(ShardId) {
        let base = chain.last().map_or(Lsn::ZERO, |base| base.files[shard.0 as usize].lsn);
        let file = write(shard, &pieces(shard, base, rows), Scratch::default());
        files.push(catalog.create_file(JOB, &name, shard, 1, file).await.unwrap());
    }
    let job = JobSpec { name: JOB.into(), shards: SHARDS, replicas: 2, min_in_sync: 1, seed: 7 };
    let manifest = Manifest {
        checkpoint: name,
        created_ms: number,
        job,
        variables: variables(),
        initialized: vec![VariableId(2)],
        labels: BTreeMap::from([("a".into(), "b".into())]),
        sessions: ClosedSessions { high_water: 4, open: [downpour_core::id::SessionId(3)].into() },
        chain: chain.iter().map(|base| base.checkpoint.clone()).collect(),
        files,
        ledger: None,
        consistency: Consistency::hybrid(1),
    };
    catalog.create_manifest(&manifest).await.unwrap();
    assert_eq!(catalog.manifest(JOB, &manifest.checkpoint).await.unwrap(), manifest);
    manifest
}

/// Where Python finds the packages of the tests: `cargo xtask test` puts them there and says so. Without it the test is not run, and says so.
pub fn python() -> Option<String> {
    let path = std::env::var("DOWNPOUR_TEST_PYTHONPATH").ok();
    if path.is_none() {
        eprintln!(
            "NOT RUN: this test needs Python packages. `cargo xtask test --only test` installs them \
             and runs it; or set DOWNPOUR_TEST_PYTHONPATH to a folder with safetensors, numpy and moto[s3]"
        );
    }
    path
}
