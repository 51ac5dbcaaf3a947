//! A snapshot's bytes, in a file of their own: temporary, fsync, rename, fsync of the directory. The record in the log names it with length
//! and checksum.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use raft::eraftpb::{ConfState, Snapshot};

use super::log::Error;

const PREFIX: &str = "snapshot-";

/// What the log keeps of a snapshot.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SnapshotRecord {
    #[prost(uint64, tag = "1")]
    index: u64,
    #[prost(uint64, tag = "2")]
    term: u64,
    #[prost(uint64, repeated, tag = "3")]
    voters: Vec<u64>,
    #[prost(uint64, tag = "4")]
    bytes: u64,
    #[prost(uint32, tag = "5")]
    crc32: u32,
    /// Members that do not vote yet.
    #[prost(uint64, repeated, tag = "6")]
    learners: Vec<u64>,
}

impl SnapshotRecord {
    fn file_name(&self) -> String {
        format!("{PREFIX}{:020}-{:020}", self.index, self.term)
    }
}

/// Writes the snapshot's file; durable on return.
pub(super) fn write(directory: &Path, snapshot: &Snapshot) -> Result<SnapshotRecord, Error> {
    let metadata = snapshot.get_metadata();
    let record = SnapshotRecord {
        index: metadata.index,
        term: metadata.term,
        voters: metadata.get_conf_state().voters.clone(),
        learners: metadata.get_conf_state().learners.clone(),
        bytes: snapshot.data.len() as u64,
        crc32: crc32fast::hash(&snapshot.data),
    };
    let path = directory.join(record.file_name());
    let temporary = path.with_extension("tmp");
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(&snapshot.data)?;
        file.sync_all()?;
        fs::rename(&temporary, &path)
    });
    written.map_err(|error| Error::disk(format!("write {}", path.display()), error))?;
    sync_directory(directory)?;
    Ok(record)
}

/// Reads the snapshot that the record names.
pub(super) fn read(directory: &Path, record: &SnapshotRecord) -> Result<Snapshot, Error> {
    let path = directory.join(record.file_name());
    let name = || format!("snapshot {}", path.display());
    let data = fs::read(&path).map_err(|error| Error::disk(format!("read {}", name()), error))?;
    if data.len() as u64 != record.bytes {
        let problem = format!("it has {} bytes and not {}", data.len(), record.bytes);
        return Err(Error::corrupted(name(), problem));
    }
    if crc32fast::hash(&data) != record.crc32 {
        return Err(Error::corrupted(name(), "its checksum differs"));
    }
    let mut snapshot = Snapshot::default();
    snapshot.set_data(data.into());
    let metadata = snapshot.mut_metadata();
    (metadata.index, metadata.term) = (record.index, record.term);
    metadata.set_conf_state(ConfState::from((record.voters.clone(), record.learners.clone())));
    Ok(snapshot)
}

/// Removes all snapshots but this one, whose record is durable.
pub(super) fn remove_others(directory: &Path, kept: &SnapshotRecord) -> Result<(), Error> {
    let kept = kept.file_name();
    let remove = || -> std::io::Result<()> {
        for file in fs::read_dir(directory)? {
            let file = file?;
            let name = file.file_name();
            if name.to_string_lossy().starts_with(PREFIX) && name.to_string_lossy() != kept {
                fs::remove_file(file.path())?;
            }
        }
        Ok(())
    };
    remove().map_err(|error| Error::disk("remove old snapshots", error))
}

/// Makes the names in a directory durable.
pub(super) fn sync_directory(directory: &Path) -> Result<(), Error> {
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(|error| Error::disk(format!("sync {}", directory.display()), error))
}
