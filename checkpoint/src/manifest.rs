//! The manifest: what a checkpoint consists of.
//!
//! ```text
//! {"crc32":"1f3c0a77","manifest":{"format":1,"checkpoint":"20261122T224110-123-0badcafe","job":{…},…}}
//! ```
//!
//! The checksum is that of the text of `manifest`, byte by byte.

use std::collections::BTreeMap;

use downpour_core::cells::ClosedSessions;
use downpour_core::consistency::Consistency;
use downpour_core::id::{Lsn, ShardId, VariableId};
use downpour_core::ledger::Ledger;
use downpour_core::spec::{JobSpec, Variable, check_range};
use downpour_proto::v1;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::Malformed;
use crate::head::{FORMAT, Head, check_format, check_unique_names};
use crate::name::{CheckpointName, shard_object};

/// Most checkpoints of a chain: a restore reads each.
pub const CHAIN_MAX: usize = 256;

/// A whole checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// Its name.
    pub checkpoint: CheckpointName,
    /// Milliseconds since 1970 when it began.
    pub created_ms: u64,
    /// The job: its name, shards and seed.
    pub job: JobSpec,
    /// In order of definition.
    pub variables: Vec<Variable>,
    /// Dense variables that had their first values.
    pub initialized: Vec<VariableId>,
    /// The job's labels.
    pub labels: BTreeMap<String, String>,
    /// Sessions that had ended.
    pub sessions: ClosedSessions,
    /// Checkpoints that this one builds on, the full one first. Empty: it is full.
    pub chain: Vec<CheckpointName>,
    /// A file for each shard, in order.
    pub files: Vec<ShardEntry>,
    /// What was trained of the job's data, nothing of it held: what is done is in every shard.
    pub ledger: Option<Ledger>,
    /// How far its workers were allowed to drift apart.
    pub consistency: Consistency,
}

/// The file of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardEntry {
    /// The shard is here.
    pub lsn: Lsn,
    /// The file holds what is newer; [`Lsn::ZERO`]: everything.
    pub newer_than: Lsn,
    /// Which attempt wrote it.
    pub attempt: u32,
    /// Size.
    pub bytes: u64,
    /// Checksum (CRC-32, IEEE).
    pub crc32: u32,
    /// Rows in it.
    pub rows: u64,
    /// Blocks in it.
    pub blocks: u64,
}

impl ShardEntry {
    /// Its name in the checkpoint's folder.
    #[must_use]
    pub fn object(&self, shard: ShardId) -> String {
        shard_object(shard, self.lsn, self.attempt)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<'a> {
    crc32: String,
    #[serde(borrow)]
    manifest: &'a RawValue,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    format: u32,
    checkpoint: String,
    created_ms: u64,
    job: v1::JobSpec,
    variables: Vec<v1::Variable>,
    initialized: Vec<u32>,
    labels: BTreeMap<String, String>,
    sessions: v1::ClosedSessions,
    chain: Vec<String>,
    files: Vec<FileText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ledger: Option<v1::LedgerRecord>,
    /// Not given: everything is asynchronous.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    consistency: Option<v1::Consistency>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileText {
    shard: u32,
    /// For people and scripts; follows from the rest.
    object: String,
    epoch: u64,
    lsn: u64,
    newer_than: u64,
    attempt: u32,
    bytes: u64,
    crc32: String,
    rows: u64,
    blocks: u64,
}

impl Manifest {
    /// As it is stored.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let file = |(entry, shard): (&ShardEntry, u32)| FileText {
            shard,
            object: entry.object(ShardId(shard)),
            epoch: entry.lsn.epoch().0,
            lsn: entry.lsn.0,
            newer_than: entry.newer_than.0,
            attempt: entry.attempt,
            bytes: entry.bytes,
            crc32: format!("{:08x}", entry.crc32),
            rows: entry.rows,
            blocks: entry.blocks,
        };
        let text = Text {
            format: FORMAT,
            checkpoint: self.checkpoint.to_string(),
            created_ms: self.created_ms,
            job: (&self.job).into(),
            variables: self.variables.iter().map(Into::into).collect(),
            initialized: self.initialized.iter().map(|variable| variable.0).collect(),
            labels: self.labels.clone(),
            sessions: (&self.sessions).into(),
            chain: self.chain.iter().map(ToString::to_string).collect(),
            files: self.files.iter().zip(0..).map(file).collect(),
            ledger: self.ledger.as_ref().map(Into::into),
            consistency: (self.consistency != Consistency::default())
                .then(|| (&self.consistency).into()),
        };
        let text = serde_json::to_string(&text).expect("numbers and text are JSON");
        let crc32 = crc32fast::hash(text.as_bytes());
        format!("{{\"crc32\":\"{crc32:08x}\",\"manifest\":{text}}}\n").into_bytes()
    }

    /// Reads and checks what [`Manifest::to_json`] wrote.
    ///
    /// # Errors
    /// Names the field.
    pub fn from_json(json: &[u8]) -> Result<Manifest, Malformed> {
        let broken = |error: serde_json::Error| Malformed::new("manifest", error.to_string());
        let envelope: Envelope<'_> = serde_json::from_slice(json).map_err(broken)?;
        let crc32 = format!("{:08x}", crc32fast::hash(envelope.manifest.get().as_bytes()));
        if crc32 != envelope.crc32 {
            let problem =
                format!("is {}, but the manifest's is {crc32}: it is corrupt", envelope.crc32);
            return Err(Malformed::new("crc32", problem));
        }
        let text: Text = serde_json::from_str(envelope.manifest.get()).map_err(broken)?;
        check_format(text.format)?;
        let job = JobSpec::try_from(text.job)?;
        let variables = text.variables.into_iter().map(Variable::try_from);
        let variables = variables.collect::<Result<Vec<_>, _>>()?;
        for (variable, id) in variables.iter().zip(1..) {
            check_range("variables.id", variable.id.0.into(), id, id)?;
        }
        check_unique_names(&variables)?;
        check_range("chain", text.chain.len() as u64, 0, CHAIN_MAX as u64)?;
        let chain =
            text.chain.into_iter().map(CheckpointName::new).collect::<Result<Vec<_>, _>>()?;
        check_range("files", text.files.len() as u64, job.shards.into(), job.shards.into())?;
        let files =
            text.files.into_iter().zip(0..).map(|(file, shard)| entry(file, ShardId(shard)));
        let files = files.collect::<Result<Vec<_>, _>>()?;
        let checkpoint = CheckpointName::new(text.checkpoint)?;
        if chain.contains(&checkpoint) {
            return Err(Malformed::new("chain", "must not hold the checkpoint itself"));
        }
        if chain.is_empty() && files.iter().any(|file| file.newer_than != Lsn::ZERO) {
            return Err(Malformed::new("chain", "is empty, but a file is an increment"));
        }
        Ok(Manifest {
            checkpoint,
            created_ms: text.created_ms,
            job,
            variables,
            initialized: text.initialized.into_iter().map(VariableId).collect(),
            labels: text.labels,
            sessions: text.sessions.try_into()?,
            chain,
            files,
            ledger: text.ledger.map(Ledger::try_from).transpose()?,
            consistency: text.consistency.unwrap_or_default().try_into()?,
        })
    }

    /// Bytes of all its files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// Rows in its files.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.files.iter().map(|file| file.rows).sum()
    }

    /// Whether a file with this head is the one that the manifest means.
    ///
    /// # Errors
    /// Names the field in which they differ.
    pub fn check_head(&self, shard: ShardId, head: &Head) -> Result<(), Malformed> {
        let entry = self.files.get(shard.0 as usize);
        let entry = entry.ok_or_else(|| Malformed::new("shard", "is not in the manifest"))?;
        let (of, variables) = (&head.owner, head.variables());
        let same = [
            ("job", of.job == self.job.name),
            ("shards", of.shards == self.job.shards),
            ("shard", of.shard == shard),
            ("seed", of.seed == self.job.seed),
            ("lsn", head.lsn() == entry.lsn),
            ("newer_than", head.newer_than() == entry.newer_than),
            // Some may have been defined after the shard's cut.
            ("variables", self.variables.starts_with(variables)),
        ];
        match same.into_iter().find(|(_, same)| !same) {
            Some((field, _)) => Err(Malformed::new(field, "is not what the manifest says")),
            None => Ok(()),
        }
    }
}

fn entry(text: FileText, shard: ShardId) -> Result<ShardEntry, Malformed> {
    let bad =
        |field: &str, problem: &str| Malformed::new(format!("files[{}].{field}", shard.0), problem);
    let crc32 = u32::from_str_radix(&text.crc32, 16)
        .ok()
        .filter(|_| text.crc32.len() == 8)
        .ok_or_else(|| bad("crc32", "is not 8 hexadecimal digits"))?;
    let entry = ShardEntry {
        lsn: Lsn(text.lsn),
        newer_than: Lsn(text.newer_than),
        attempt: text.attempt,
        bytes: text.bytes,
        crc32,
        rows: text.rows,
        blocks: text.blocks,
    };
    if text.shard != shard.0 {
        return Err(bad("shard", "the files must be in the order of their shards, one each"));
    }
    if text.epoch != entry.lsn.epoch().0 || text.object != entry.object(shard) {
        return Err(bad("object", "must follow from shard, epoch, lsn and attempt"));
    }
    if entry.newer_than > entry.lsn {
        return Err(bad("newer_than", "must not be after lsn"));
    }
    Ok(entry)
}
