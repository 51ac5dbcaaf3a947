//! One suite that every kind of disk must pass under the log.

use std::collections::BTreeMap;
use std::path::Path;

use downpour_coordinator::raft::log::{Admission, Disk, Error, Identity, Log};
use downpour_coordinator::raft::mem_disk::{MemDisk, Platters};
use downpour_coordinator::raft::sled_disk::SledDisk;
use proptest::prelude::*;
use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{GetEntriesContext, Storage};

fn identity() -> Identity {
    Identity { cluster: "test".into(), member: 1, voters: vec![1, 2, 3] }
}

fn entry(index: u64, term: u64, bytes: usize) -> Entry {
    Entry { index, term, data: vec![index as u8; bytes].into(), ..Entry::default() }
}

fn entries(indexes: std::ops::RangeInclusive<u64>, term: u64) -> Vec<Entry> {
    indexes.map(|index| entry(index, term, 100)).collect()
}

fn hard_state(term: u64, vote: u64, commit: u64) -> HardState {
    HardState { term, vote, commit, ..HardState::default() }
}

fn snapshot(index: u64, term: u64, data: &[u8]) -> Snapshot {
    let mut snapshot = Snapshot::default();
    snapshot.set_data(data.to_vec().into());
    let metadata = snapshot.mut_metadata();
    (metadata.index, metadata.term) = (index, term);
    metadata.set_conf_state(ConfState::from((vec![1, 2, 3], vec![])));
    snapshot
}

fn all<D: Disk>(log: &Log<D>) -> Vec<Entry> {
    let (first, last) = (log.first_index().unwrap(), log.last_index().unwrap());
    if first > last {
        return Vec::new();
    }
    log.entries(first, last + 1, None, GetEntriesContext::empty(false)).unwrap()
}

/// Something that can be opened again after the process that had it is gone.
trait Kind {
    type Disk: Disk;
    fn disk(&self) -> Self::Disk;

    fn open(&self) -> Log<Self::Disk> {
        Log::open(self.disk(), &identity(), Admission::default()).unwrap()
    }
}

impl Kind for Platters {
    type Disk = MemDisk;

    fn disk(&self) -> MemDisk {
        MemDisk::new(self)
    }
}

impl Kind for tempfile::TempDir {
    type Disk = SledDisk;

    fn disk(&self) -> SledDisk {
        SledDisk::open(self.path()).unwrap()
    }
}

fn what_is_appended_is_read_again_after_a_crash(kind: &impl Kind) {
    let mut log = kind.open();
    assert_eq!((log.first_index().unwrap(), log.last_index().unwrap()), (1, 0));
    assert_eq!(log.initial_state().unwrap().conf_state.voters, [1, 2, 3]);
    log.persist(&entries(1..=5, 1), Some(&hard_state(1, 2, 0)), true).unwrap();
    log.persist(&entries(6..=9, 2), Some(&hard_state(2, 3, 4)), true).unwrap();
    let written = all(&log);
    assert_eq!(written.len(), 9);
    drop(log);
    let log = kind.open();
    assert_eq!(all(&log), written);
    assert_eq!(log.initial_state().unwrap().hard_state, hard_state(2, 3, 4));
    assert_eq!((log.term(5).unwrap(), log.term(6).unwrap()), (1, 2));
    assert!(log.term(10).is_err());
}

fn an_overwritten_tail_is_gone(kind: &impl Kind) {
    let mut log = kind.open();
    log.persist(&entries(1..=9, 1), None, true).unwrap();
    log.persist(&[entry(4, 2, 200_000)], None, true).unwrap();
    log.persist(&entries(4..=5, 3), None, true).unwrap();
    let expected: Vec<Entry> = [entries(1..=3, 1), entries(4..=5, 3)].concat();
    assert_eq!(all(&log), expected);
    drop(log);
    assert_eq!(all(&kind.open()), expected);
}

fn a_snapshot_takes_the_place_of_a_prefix_but_for_what_is_kept(kind: &impl Kind) {
    let mut log = kind.open();
    log.persist(&entries(1..=20, 1), Some(&hard_state(1, 1, 20)), true).unwrap();
    assert!(log.snapshot(1, 2).is_err(), "there is none yet");
    log.compact(15, b"state at 15".to_vec(), 5).unwrap();
    let check = |log: &Log<_>| {
        assert_eq!((log.first_index().unwrap(), log.last_index().unwrap()), (11, 20));
        assert_eq!(log.term(10).unwrap(), 1, "the entry before the first keeps its term");
        assert!(log.term(9).is_err());
        let snapshot = log.snapshot(15, 2).unwrap();
        assert_eq!(&snapshot.data[..], b"state at 15");
        assert_eq!(snapshot.get_metadata().get_conf_state().voters, [1, 2, 3]);
        assert!(log.snapshot(16, 2).is_err(), "not new enough");
    };
    check(&log);
    drop(log);
    let mut log = kind.open();
    check(&log);
    log.compact(20, b"state at 20".to_vec(), 0).unwrap();
    drop(log);
    let log = kind.open();
    assert_eq!((log.first_index().unwrap(), log.last_index().unwrap()), (21, 20));
    assert_eq!(&log.snapshot(20, 2).unwrap().data[..], b"state at 20");
}

fn a_snapshot_of_the_leader_takes_the_place_of_everything(kind: &impl Kind) {
    let mut log = kind.open();
    log.persist(&entries(1..=4, 1), Some(&hard_state(1, 1, 2)), true).unwrap();
    log.install(&snapshot(50, 7, b"all of it"), Some(&hard_state(8, 3, 2))).unwrap();
    log.persist(&entries(51..=52, 8), None, true).unwrap();
    drop(log);
    let log = kind.open();
    assert_eq!(all(&log), entries(51..=52, 8));
    assert_eq!(log.term(50).unwrap(), 7);
    assert_eq!(log.initial_state().unwrap().hard_state, hard_state(8, 3, 50));
    assert_eq!(&log.snapshot(50, 2).unwrap().data[..], b"all of it");
}

fn a_directory_belongs_to_one_member_of_one_cluster(kind: &impl Kind) {
    drop(kind.open());
    let others = [
        Identity { cluster: "other".into(), ..identity() },
        Identity { member: 2, ..identity() },
        Identity { voters: vec![1], ..identity() },
    ];
    for other in others {
        let error = Log::open(kind.disk(), &other, Admission::default()).err().expect("refused");
        assert!(matches!(error, Error::Stranger { .. }), "{error}");
        assert!(error.to_string().contains("cluster \"test\""), "{error}");
    }
}

#[test]
fn disks_keep_what_is_appended() {
    what_is_appended_is_read_again_after_a_crash(&Platters::default());
    what_is_appended_is_read_again_after_a_crash(&tempfile::tempdir().unwrap());
}

#[test]
fn disks_forget_an_overwritten_tail() {
    an_overwritten_tail_is_gone(&Platters::default());
    an_overwritten_tail_is_gone(&tempfile::tempdir().unwrap());
}

#[test]
fn disks_compact() {
    a_snapshot_takes_the_place_of_a_prefix_but_for_what_is_kept(&Platters::default());
    a_snapshot_takes_the_place_of_a_prefix_but_for_what_is_kept(&tempfile::tempdir().unwrap());
}

#[test]
fn disks_install_snapshots() {
    a_snapshot_of_the_leader_takes_the_place_of_everything(&Platters::default());
    a_snapshot_of_the_leader_takes_the_place_of_everything(&tempfile::tempdir().unwrap());
}

#[test]
fn disks_know_their_owner() {
    a_directory_belongs_to_one_member_of_one_cluster(&Platters::default());
    a_directory_belongs_to_one_member_of_one_cluster(&tempfile::tempdir().unwrap());
}

#[test]
fn what_was_not_synced_may_be_lost_and_nothing_else() {
    let platters = Platters::default();
    let mut log = platters.open();
    log.persist(&entries(1..=3, 1), Some(&hard_state(1, 1, 0)), true).unwrap();
    log.set_commit(3).unwrap();
    drop(log);
    let log = platters.open();
    assert_eq!(all(&log), entries(1..=3, 1));
    assert_eq!(log.initial_state().unwrap().hard_state.commit, 0);
}

#[test]
fn large_entries_make_no_blob_files() {
    let directory = tempfile::tempdir().unwrap();
    let mut log = directory.open();
    let written: Vec<Entry> =
        (1..=40).map(|index| entry(index, 1, 40_000 * (index as usize % 8))).collect();
    for entry in &written {
        log.persist(std::slice::from_ref(entry), None, true).unwrap();
    }
    log.compact(30, vec![7; 3 << 20], 20).unwrap();
    drop(log);
    let log = directory.open();
    assert_eq!(all(&log), written[10..]);
    assert_eq!(log.snapshot(30, 1).unwrap().data.len(), 3 << 20);
    let blobs = std::fs::read_dir(directory.path().join("log/blobs")).unwrap();
    assert_eq!(blobs.count(), 0, "blob files are never synced");
}

#[test]
fn only_the_newest_snapshot_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let mut log = directory.open();
    log.persist(&entries(1..=9, 1), None, true).unwrap();
    for index in [3, 6, 9] {
        log.compact(index, vec![index as u8], 0).unwrap();
    }
    let names = std::fs::read_dir(directory.path()).unwrap().map(|file| file.unwrap().file_name());
    let snapshots = names.filter(|name| name.to_string_lossy().starts_with("snapshot-"));
    assert_eq!(snapshots.count(), 1);
}

#[test]
fn a_directory_in_use_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let _log = directory.open();
    let error = SledDisk::open(directory.path()).unwrap_err();
    assert!(error.to_string().contains("another process is using it"), "{error}");
}

/// Changes one byte of a record.
fn damage(directory: &Path, key: &[u8]) {
    let config = sled::Config::new().path(directory.join("log")).segment_size(8 << 20);
    // Sled's threads let go of its lock a moment after its owner is gone.
    let db = std::iter::repeat_with(|| config.open()).take(1_000_000).find_map(Result::ok).unwrap();
    let mut value = db.get(key).unwrap().expect("the record exists").to_vec();
    *value.last_mut().unwrap() ^= 1;
    db.insert(key, value).unwrap();
    db.flush().unwrap();
}

#[test]
fn a_damaged_record_is_named_and_not_believed() {
    let entry_key = [b"l".as_slice(), &7u64.to_be_bytes(), &0u16.to_be_bytes()].concat();
    let records: [(&[u8], &str); 4] = [
        (&entry_key, "entry 7"),
        (b"h", "the hard state"),
        (b"s", "the snapshot's record"),
        (b"i", "the identity"),
    ];
    for (key, name) in records {
        let directory = tempfile::tempdir().unwrap();
        let mut log = directory.open();
        log.persist(&entries(1..=9, 1), Some(&hard_state(1, 1, 1)), true).unwrap();
        log.compact(2, b"state".to_vec(), 0).unwrap();
        drop(log);
        damage(directory.path(), key);
        let error =
            Log::open(directory.disk(), &identity(), Admission::default()).expect_err("refused");
        assert!(matches!(error, Error::Corrupted { .. }), "{error}");
        assert!(error.to_string().starts_with(name), "{error}");
    }
}

#[test]
fn a_damaged_snapshot_is_named_and_not_believed() {
    let directory = tempfile::tempdir().unwrap();
    let mut log = directory.open();
    log.persist(&entries(1..=9, 1), None, true).unwrap();
    log.compact(9, b"state".to_vec(), 0).unwrap();
    drop(log);
    let file = std::fs::read_dir(directory.path()).unwrap().map(|file| file.unwrap().path());
    let snapshot = file.into_iter().find(|path| path.to_string_lossy().contains("snapshot-"));
    std::fs::write(snapshot.unwrap(), b"stale").unwrap();
    let error =
        Log::open(directory.disk(), &identity(), Admission::default()).expect_err("refused");
    assert!(error.to_string().contains("its checksum differs"), "{error}");
}

/// What sled finds damaged it silently takes for the end of its log.
#[test]
fn a_flipped_bit_in_a_file_is_named_or_does_no_harm() {
    let directory = tempfile::tempdir().unwrap();
    let mut log = directory.open();
    for index in 1..=20 {
        let hard_state = hard_state(1, 1, index - 1);
        log.persist(&[entry(index, 1, 300)], Some(&hard_state), true).unwrap();
    }
    let written = log.image().clone();
    drop(log);
    let mut refused = 0;
    for file in ["log/db", "witness"] {
        let path = directory.path().join(file);
        let whole = std::fs::read(&path).unwrap();
        let used: Vec<usize> = (0..whole.len()).filter(|&at| whole[at] != 0).collect();
        for at in used.iter().step_by(used.len() / 12 + 1).chain(used.last()) {
            let mut damaged = whole.clone();
            damaged[*at] ^= 0x40;
            std::fs::write(&path, damaged).unwrap();
            let opened = SledDisk::open(directory.path())
                .and_then(|disk| Log::open(disk, &identity(), Admission::default()));
            match opened {
                Ok(log) => assert_eq!(*log.image(), written, "{file}, byte {at}"),
                Err(error) => {
                    assert!(error.to_string().contains("move this member's data"), "{error}");
                    refused += 1;
                }
            }
            std::fs::write(&path, &whole).unwrap();
        }
    }
    assert!(refused > 10, "only {refused} were found");
}

#[derive(Clone, Debug)]
enum Step {
    /// Appends so many from so far before the end, under a higher term.
    Append {
        back: u64,
        count: u64,
    },
    Compact {
        back: u64,
        keep: u64,
    },
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u64..6, 1u64..6).prop_map(|(back, count)| Step::Append { back, count }),
        1 => (0u64..6, 0u64..6).prop_map(|(back, keep)| Step::Compact { back, keep }),
        1 => Just(Step::Reopen),
    ]
}

fn follows_the_model(kind: &impl Kind, steps: &[Step]) {
    let mut model: BTreeMap<u64, Entry> = BTreeMap::new();
    let (mut first, mut last, mut snapshot) = (1u64, 0u64, 0u64);
    let mut log = Some(kind.open());
    for (term, step) in (1..).zip(steps) {
        match *step {
            Step::Append { back, count } => {
                let start = (last + 1).saturating_sub(back).max(first).max(snapshot + 1);
                let entries = entries(start..=start + count - 1, term);
                log.as_mut().unwrap().persist(&entries, None, true).unwrap();
                model.split_off(&start);
                model.extend(entries.into_iter().map(|entry| (entry.index, entry)));
                last = start + count - 1;
            }
            Step::Compact { back, keep } => {
                let index = last.saturating_sub(back);
                if index <= snapshot || index < first {
                    continue;
                }
                log.as_mut().unwrap().compact(index, vec![1], keep).unwrap();
                snapshot = index;
                first = first.max(index.saturating_sub(keep) + 1);
                model = model.split_off(&first);
            }
            Step::Reopen => {
                drop(log.take());
                log = Some(kind.open());
            }
        }
        let log = log.as_ref().unwrap();
        assert_eq!((log.first_index().unwrap(), log.last_index().unwrap()), (first, last));
        assert_eq!(all(log), model.values().cloned().collect::<Vec<_>>());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn disks_follow_a_model_through_overwriting_compacting_and_reopening(
        steps in prop::collection::vec(step(), 1..24),
    ) {
        follows_the_model(&Platters::default(), &steps);
        follows_the_model(&tempfile::tempdir().unwrap(), &steps);
    }
}
