//! The disk of production: one `sled` tree, and a file for the snapshot.
//!
//! Three properties of sled 0.34 shape this. `flush` ends in `sync_file_range`, which is no barrier: `sync_data` on our own handle of its
//! file is. Large pages go to blob files that are never synced: large segments and values under [`PART_BYTES`] keep them from
//! occurring, so a longer entry is cut into parts. A batch is recovered whole or not at all: each change is one.
//!
//! A record that sled finds damaged it takes for the torn end of its log, and forgets it and all that came after. So each change has a
//! number, and a file beside sled's, the witness, holds that of the last change that was made durable: a log that ends earlier is refused. The
//! witness is written after the barrier and has none of its own, so it never promises too much; after a power cut it may lag by what the
//! system had not written yet.
//!
//! Keys: `w` number of the last change, `i` identity, `a` admission, `h` hard state, `s` snapshot, `t` truncated, `l` + index + part (big-endian) an entry. Each value begins with the CRC-32
//! of its key and the rest, so that a record that is damaged or misplaced is named and never believed.

use std::fs::File;
use std::io::Read as _;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use prost::Message as _;
use protobuf::Message as _;
use raft::eraftpb::{Entry, HardState};
use sled::{Batch, Db, IVec};

use super::log::{Admission, Change, Disk, Error, Identity, Image, Position};
use super::snapshot_file::{self, SnapshotRecord};

const SEGMENT_BYTES: usize = 8 << 20;
const CACHE_BYTES: u64 = 32 << 20;
/// Most bytes of an entry in one value.
const PART_BYTES: usize = 48 << 10;
const CHECKSUM_BYTES: usize = 4;
const WITNESS: &str = "witness";
/// A predecessor that is ending, and sled's own threads, let go of the lock a moment late.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// A directory that belongs to this process for as long as this value lives.
#[derive(Debug)]
pub struct SledDisk {
    directory: PathBuf,
    db: Db,
    /// Our own handle of sled's file, for the barrier.
    file: File,
    syncs: Arc<AtomicU64>,
    /// Of the last change.
    number: u64,
    witness: File,
}

#[derive(Clone, PartialEq, prost::Message)]
struct IdentityRecord {
    #[prost(string, tag = "1")]
    cluster: String,
    #[prost(uint64, tag = "2")]
    member: u64,
    #[prost(uint64, repeated, tag = "3")]
    voters: Vec<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AdmissionRecord {
    #[prost(uint64, tag = "1")]
    birth: u64,
    #[prost(bool, tag = "2")]
    joining: bool,
}

impl SledDisk {
    /// Opens or makes the directory, which no other process may use. Blocks.
    ///
    /// # Errors
    /// It cannot be read and written, or another process has it.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let action = || format!("open the data directory {}", directory.display());
        std::fs::create_dir_all(directory).map_err(|error| Error::disk(action(), error))?;
        let path = directory.join("log");
        let config = sled::Config::new()
            .path(&path)
            .segment_size(SEGMENT_BYTES)
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(None);
        let started = Instant::now();
        let db = loop {
            match config.open() {
                Ok(db) => break db,
                Err(error) if !is_lock(&error) => return Err(Error::disk(action(), error)),
                Err(_) if started.elapsed() > LOCK_TIMEOUT => {
                    return Err(Error::disk(action(), "another process is using it"));
                }
                Err(_) => std::thread::sleep(LOCK_PAUSE),
            }
        };
        let file = File::open(path.join("db")).map_err(|error| Error::disk(action(), error))?;
        let witness = directory.join(WITNESS);
        let is_used = !db.is_empty() || witness.exists();
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(false);
        let witness = options.open(witness).map_err(|error| Error::disk(action(), error))?;
        for made in [&path, directory] {
            snapshot_file::sync_directory(made)?;
        }
        let directory = directory.to_owned();
        let mut disk = SledDisk { directory, db, file, syncs: Arc::default(), number: 0, witness };
        if is_used {
            disk.hear_witness()?;
        }
        Ok(disk)
    }

    /// How many times a change was made durable.
    #[must_use]
    pub fn syncs(&self) -> Arc<AtomicU64> {
        self.syncs.clone()
    }

    fn get(&self, key: &[u8], record: &str) -> Result<Option<IVec>, Error> {
        let value =
            self.db.get(key).map_err(|error| Error::disk(format!("read {record}"), error))?;
        value.map(|value| unseal(key, &value, record)).transpose()
    }

    /// See the module.
    fn hear_witness(&mut self) -> Result<(), Error> {
        if let Some(value) = self.get(b"w", "the number of the last change")? {
            let malformed =
                || Error::corrupted("the number of the last change", "it has another length");
            self.number = u64::from_be_bytes(value.as_ref().try_into().map_err(|_| malformed())?);
        }
        let mut said = Vec::new();
        let mut witness = &self.witness;
        witness.read_to_end(&mut said).map_err(|error| Error::disk("read the witness", error))?;
        let durable = match said.split_first_chunk() {
            // Nothing was durable yet, or a power cut took the word away.
            None if said.is_empty() => 0,
            Some((sum, rest)) if *sum == checksum(b"witness", rest) && rest.len() == 8 => {
                rest.iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
            }
            _ => return Err(Error::corrupted("the witness", "its checksum differs")),
        };
        if durable > self.number {
            let problem =
                format!("it ends with change {}, and change {durable} was durable", self.number);
            return Err(Error::corrupted(
                self.directory.join("log/db").display().to_string(),
                problem,
            ));
        }
        Ok(())
    }

    fn load_entries(&self, image: &mut Image) -> Result<(), Error> {
        let mut expected = image.truncated.index + 1;
        let mut bytes = Vec::new();
        let mut parts = 0;
        for item in self.db.scan_prefix(b"l") {
            let (key, value) = item.map_err(|error| Error::disk("read the log", error))?;
            let (index, part) = parse_key(&key)?;
            let record = format!("entry {index}");
            if (index, part) != (expected, parts) {
                let problem = format!("part {parts} of entry {expected} is missing");
                return Err(Error::corrupted("the log", problem));
            }
            let value = unseal(&key, &value, &record)?;
            let Some((&more, rest)) = value.split_first() else {
                return Err(Error::corrupted(record, "it is empty"));
            };
            bytes.extend_from_slice(rest);
            if more == 0 {
                let entry = Entry::parse_from_bytes(&bytes)
                    .map_err(|error| Error::corrupted(&record, error))?;
                if entry.index != index {
                    return Err(Error::corrupted(record, format!("it is entry {}", entry.index)));
                }
                image.entries.push_back(entry);
                bytes.clear();
                (expected, parts) = (index + 1, 0);
            } else {
                parts += 1;
            }
        }
        if parts > 0 {
            return Err(Error::corrupted(format!("entry {expected}"), "its end is missing"));
        }
        Ok(())
    }

    fn remove(&self, batch: &mut Batch, removed: RangeInclusive<u64>) -> Result<(), Error> {
        for key in self.db.range(key(*removed.start(), 0)..=key(*removed.end(), u16::MAX)).keys() {
            batch.remove(key.map_err(|error| Error::disk("read the log", error))?);
        }
        Ok(())
    }

    /// The barrier: what was written before is on the disk after.
    fn sync(&self) -> Result<(), Error> {
        self.db.flush().map_err(|error| Error::disk("flush the log", error))?;
        self.file.sync_data().map_err(|error| Error::disk("sync the log", error))?;
        self.syncs.fetch_add(1, Ordering::Relaxed);
        let number = self.number.to_be_bytes();
        let word = [checksum(b"witness", &number).as_slice(), &number].concat();
        self.witness.write_all_at(&word, 0).map_err(|error| Error::disk("write the witness", error))
    }
}

impl Disk for SledDisk {
    fn load(&mut self) -> Result<Image, Error> {
        let mut image = Image::default();
        if let Some(value) = self.get(b"i", "the identity")? {
            let IdentityRecord { cluster, member, voters } = IdentityRecord::decode(&value[..])
                .map_err(|error| Error::corrupted("the identity", error))?;
            image.identity = Some(Identity { cluster, member, voters });
        }
        if let Some(value) = self.get(b"a", "the admission")? {
            let AdmissionRecord { birth, joining } = AdmissionRecord::decode(&value[..])
                .map_err(|error| Error::corrupted("the admission", error))?;
            image.admission = Admission { birth, joining };
        }
        if let Some(value) = self.get(b"h", "the hard state")? {
            image.hard_state = HardState::parse_from_bytes(&value)
                .map_err(|error| Error::corrupted("the hard state", error))?;
        }
        if let Some(value) = self.get(b"t", "the start of the log")? {
            image.truncated = parse_position(&value)?;
        }
        if let Some(value) = self.get(b"s", "the snapshot's record")? {
            let record = SnapshotRecord::decode(&value[..])
                .map_err(|error| Error::corrupted("the snapshot's record", error))?;
            image.snapshot = Some(snapshot_file::read(&self.directory, &record)?);
        }
        self.load_entries(&mut image)?;
        Ok(image)
    }

    fn write(&mut self, change: &Change<'_>) -> Result<(), Error> {
        let mut batch = Batch::default();
        self.number += 1;
        let number = self.number.to_be_bytes();
        let mut put = |key: &[u8], value: &[u8]| batch.insert(key, seal(key, value));
        put(b"w", &number);
        if let Some(Identity { cluster, member, voters }) = change.identity {
            let (cluster, voters) = (cluster.clone(), voters.clone());
            put(b"i", &IdentityRecord { cluster, member: *member, voters }.encode_to_vec());
        }
        if let Some(Admission { birth, joining }) = change.admission {
            put(b"a", &AdmissionRecord { birth, joining }.encode_to_vec());
        }
        if let Some(hard_state) = change.hard_state {
            put(b"h", &encode(hard_state)?);
        }
        if let Some(Position { index, term }) = change.truncated {
            put(b"t", &[index.to_be_bytes(), term.to_be_bytes()].concat());
        }
        let mut snapshot = None;
        if let Some(newer) = change.snapshot {
            let record = snapshot_file::write(&self.directory, newer)?;
            put(b"s", &record.encode_to_vec());
            snapshot = Some(record);
        }
        if let Some(removed) = change.removed.clone() {
            self.remove(&mut batch, removed)?;
        }
        for entry in change.entries {
            // A longer entry may have been there.
            self.remove(&mut batch, entry.index..=entry.index)?;
            let bytes = encode(entry)?;
            let parts = bytes.chunks(PART_BYTES).count();
            for (part, bytes) in bytes.chunks(PART_BYTES).enumerate() {
                let key = key(entry.index, part as u16);
                let more = u8::from(part + 1 < parts);
                batch.insert(&key[..], seal(&key, &[&[more], bytes].concat()));
            }
        }
        self.db.apply_batch(batch).map_err(|error| Error::disk("write the log", error))?;
        if change.sync {
            self.sync()?;
        }
        if let Some(record) = snapshot {
            snapshot_file::remove_others(&self.directory, &record)?;
        }
        Ok(())
    }
}

fn is_lock(error: &sled::Error) -> bool {
    matches!(error, sled::Error::Io(error) if error.to_string().contains("lock"))
}

fn encode(message: &impl protobuf::Message) -> Result<Vec<u8>, Error> {
    message.write_to_bytes().map_err(|error| Error::disk("encode a record", error))
}

fn key(index: u64, part: u16) -> [u8; 11] {
    let mut key = [b'l'; 11];
    key[1..9].copy_from_slice(&index.to_be_bytes());
    key[9..].copy_from_slice(&part.to_be_bytes());
    key
}

fn parse_key(key: &[u8]) -> Result<(u64, u16), Error> {
    let malformed = || Error::corrupted("the log", format!("{key:02x?} is no key of an entry"));
    let rest = key.strip_prefix(b"l").ok_or_else(malformed)?;
    let (index, part) = rest.split_first_chunk().ok_or_else(malformed)?;
    let part = part.try_into().map_err(|_| malformed())?;
    Ok((u64::from_be_bytes(*index), u16::from_be_bytes(part)))
}

fn parse_position(value: &[u8]) -> Result<Position, Error> {
    let malformed = || Error::corrupted("the start of the log", "it has another length");
    let (index, term) = value.split_first_chunk().ok_or_else(malformed)?;
    let term = term.try_into().map_err(|_| malformed())?;
    Ok(Position { index: u64::from_be_bytes(*index), term: u64::from_be_bytes(term) })
}

fn checksum(key: &[u8], rest: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(key);
    hasher.update(rest);
    hasher.finalize().to_le_bytes()
}

fn seal(key: &[u8], rest: &[u8]) -> Vec<u8> {
    [&checksum(key, rest), rest].concat()
}

fn unseal(key: &[u8], value: &IVec, record: &str) -> Result<IVec, Error> {
    match value.split_first_chunk() {
        Some((sum, rest)) if *sum == checksum(key, rest) => {
            Ok(value.subslice(CHECKSUM_BYTES, rest.len()))
        }
        _ => Err(Error::corrupted(record, "its checksum differs")),
    }
}
