//! Files of shards and the checkpoints that they make, through a directory.

mod support;

use downpour_checkpoint::Error;
use downpour_checkpoint::catalog::{Catalog, links};
use downpour_checkpoint::export::{DENSE_FILE, export};
use downpour_checkpoint::manifest::Manifest;
use downpour_checkpoint::name::CheckpointName;
use downpour_checkpoint::read::ShardReader;
use downpour_checkpoint::store::{Access, Store, Stored};
use downpour_checkpoint::write::Scratch;
use downpour_core::id::{Lsn, ShardId, VariableId};
use downpour_core::spec::{DenseSpec, Shape, Variable, VariableSpec};
use std::fs;
use std::io::Cursor;
use support::{JOB, bytes_of, checkpoint, pieces, sorted, store_in, write};

#[test]
fn what_was_written_is_read_whatever_waited_on_the_disk() {
    for memory_bytes_max in [0, 1 << 20] {
        let written = pieces(ShardId(1), Lsn(0), 5_000);
        let scratch = Scratch { memory_bytes_max, ..Scratch::default() };
        let file = bytes_of(write(ShardId(1), &written, scratch));
        let mut reader = ShardReader::open("f", file.len() as u64, Cursor::new(file)).unwrap();
        let mut read = Vec::new();
        while let Some(piece) = reader.next_piece().unwrap() {
            read.push(piece);
        }
        assert_eq!(sorted(&read), sorted(&written));
    }
}

#[test]
fn a_file_that_is_not_as_it_must_be_is_refused_by_the_part() {
    let written = pieces(ShardId(1), Lsn(0), 50);
    let file = bytes_of(write(ShardId(1), &written, Scratch::default()));
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let text = String::from_utf8(file[8..8 + length].to_vec()).unwrap();
    let refused = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        assert!(text.contains(from), "{from} in {text}");
        let header = text.replacen(from, to, 1);
        let broken = [&file[..8], header.as_bytes(), &file[8 + length..]].concat();
        let opened = ShardReader::open("f", broken.len() as u64, Cursor::new(broken));
        match opened.and_then(ShardReader::check) {
            Err(Error::Structure { object, field, .. }) if object == "f" => field,
            other => panic!("{from} to {to}: {other:?}"),
        }
    };
    assert_eq!(refused("U64", "U32"), "../-/keys");
    assert_eq!(refused(r#""data.0/keys":{"#, r#""data.0/kyes":{"#), "data.0/keys");
    assert_eq!(refused(r#"\"shard\":1"#, r#"\"shard\":0"#), "data.0/keys", "keys of another shard");
    assert_eq!(refused(r#"\"format\":1"#, r#"\"format\":9"#), "format");
    assert_eq!(refused("\"__metadata__\"", "\"_-metadata__\""), "__metadata__");
    assert_eq!(refused(r#"\"newer_than\":0"#, r#"\"newer_than\":x"#), "__metadata__.downpour");
    for cut in [0, 4, 8, 100, length, file.len() - 1] {
        let opened = ShardReader::open("f", cut as u64, Cursor::new(file[..cut].to_vec()));
        assert!(matches!(opened, Err(Error::Structure { .. })), "{cut}");
    }
    let endless = [&u64::MAX.to_le_bytes()[..], &file[8..]].concat();
    let opened = ShardReader::open("f", endless.len() as u64, Cursor::new(endless));
    assert!(matches!(opened, Err(Error::Structure { field, .. }) if field == "header"));
    // The last tensor ends the file.
    let mut infinite = file.clone();
    let end = infinite.len();
    infinite[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let opened = ShardReader::open("f", end as u64, Cursor::new(infinite));
    assert!(matches!(opened.and_then(ShardReader::check), Err(Error::Structure { .. })));
}

#[tokio::test]
async fn torn_truncated_flipped_and_missing_files_are_refused_by_name_and_the_one_before_is_found()
{
    let folder = tempfile::tempdir().unwrap();
    let catalog = Catalog::new(store_in(folder.path()));
    let first = checkpoint(&catalog, 1, &[], 400).await;
    let second = checkpoint(&catalog, 2, &[], 500).await;
    let verify = |manifest| catalog.verify(manifest, &SCRATCH, |_| {});
    verify(first.clone()).await.unwrap();
    verify(second.clone()).await.unwrap();

    let name = second.files[1].object(ShardId(1));
    let path = folder.path().join(JOB).join(second.checkpoint.as_str()).join(&name);
    let whole = fs::read(&path).unwrap();
    let about = |error: Error, kind: &str| {
        let text = error.to_string();
        assert!(text.contains(&name) && text.contains(kind), "{text}");
    };
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    about(verify(second.clone()).await.unwrap_err(), "bytes");
    let mut torn = whole.clone();
    let half = torn.len() / 2;
    torn[half..].fill(0);
    fs::write(&path, &torn).unwrap();
    about(verify(second.clone()).await.unwrap_err(), "checksum");
    for at in [0, 9, whole.len() / 2, whole.len() - 1] {
        let mut flipped = whole.clone();
        flipped[at] ^= 4;
        fs::write(&path, &flipped).unwrap();
        about(verify(second.clone()).await.unwrap_err(), "checksum");
    }
    fs::remove_file(&path).unwrap();
    about(verify(second.clone()).await.unwrap_err(), "not there");
    verify(first.clone()).await.unwrap();

    assert_eq!(catalog.latest(JOB).await.unwrap(), second);
    let manifest = path.with_file_name("manifest.json");
    let text = fs::read(&manifest).unwrap();
    for at in 0..text.len() - 1 {
        let mut flipped = text.clone();
        flipped[at] ^= 1;
        fs::write(&manifest, &flipped).unwrap();
        let error = catalog.manifest(JOB, &second.checkpoint).await.unwrap_err();
        assert!(error.to_string().contains("manifest.json"), "{error}");
    }
    assert_eq!(catalog.latest(JOB).await.unwrap(), first);
}

#[tokio::test]
async fn nothing_is_overwritten_and_what_broke_off_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_in(folder.path());
    // One request, and many parts.
    for bytes in [10, 40 << 20] {
        let name = format!("job/f-{bytes}");
        let content = |byte: u8| Cursor::new(vec![byte; bytes]);
        let stored = store.create(&name, content(1)).await.unwrap();
        let again = store.create(&name, content(2)).await;
        assert!(matches!(again, Err(Error::Exists(_))), "{again:?}");
        store.fetch(&name, stored, &SCRATCH).await.unwrap();
        let broken = std::io::Read::chain(content(3), Broken);
        let failed = store.create("job/broken", broken).await;
        assert!(matches!(failed, Err(Error::Io { .. })), "{failed:?}");
    }
    let left: Vec<_> = fs::read_dir(folder.path().join("job")).unwrap().collect();
    assert_eq!(left.len(), 2, "{left:?}");
    let absent = store.fetch("job/broken", Stored { bytes: 1, crc32: 0 }, &SCRATCH).await;
    assert!(matches!(absent, Err(Error::Missing(_))));
}

#[tokio::test]
async fn an_increment_needs_its_base_and_the_base_stays_as_long_as_it() {
    let folder = tempfile::tempdir().unwrap();
    let catalog = Catalog::new(store_in(folder.path()));
    let full = checkpoint(&catalog, 1, &[], 4_000).await;
    let one = checkpoint(&catalog, 2, &[&full], 30).await;
    let two = checkpoint(&catalog, 3, &[&full, &one], 30).await;
    let other = checkpoint(&catalog, 4, &[], 400).await;
    assert!(two.bytes() < full.bytes() / 2);

    let chain = catalog.chain(two.clone()).await.unwrap();
    let order: Vec<_> =
        links(&chain, ShardId(0)).unwrap().iter().map(|link| link.1.entry.lsn).collect();
    assert_eq!(order, [full.files[0].lsn, one.files[0].lsn, two.files[0].lsn]);
    assert!(links(&[full.clone(), two.clone()], ShardId(0)).is_err(), "a gap");
    catalog.verify(two.clone(), &SCRATCH, |_| {}).await.unwrap();

    let needed = catalog.delete(JOB, &full.checkpoint).await;
    assert!(matches!(&needed, Err(Error::Needed { by, .. }) if *by == one.checkpoint.to_string()));
    let kept = catalog.keep(JOB, 2, &[]).await.unwrap();
    assert_eq!((kept.kept.len(), kept.deleted.len()), (4, 0));
    catalog.delete(JOB, &two.checkpoint).await.unwrap();
    let used = std::slice::from_ref(&one.checkpoint);
    let kept = catalog.keep(JOB, 1, used).await.unwrap();
    assert_eq!((kept.kept.len(), kept.deleted.len()), (3, 0), "somebody loads it");
    let kept = catalog.keep(JOB, 1, &[]).await.unwrap();
    assert_eq!(kept.kept, std::slice::from_ref(&other.checkpoint));
    assert_eq!(kept.deleted, [one.checkpoint, full.checkpoint]);
    assert_eq!(catalog.list(JOB).await.unwrap().len(), 1);
    catalog.sweep(JOB, &other.checkpoint).await.unwrap();
    assert_eq!(catalog.names(JOB).await.unwrap(), [other.checkpoint], "their marks are gone");
}

#[tokio::test]
async fn a_leader_that_slept_cannot_bring_back_what_was_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let catalog = Catalog::new(store_in(folder.path()));
    let deleted = checkpoint(&catalog, 1, &[], 40).await;
    let kept = checkpoint(&catalog, 2, &[], 40).await;
    catalog.delete(JOB, &deleted.checkpoint).await.unwrap();
    let late = catalog.create_manifest(&deleted).await;
    assert!(matches!(late, Err(Error::Missing(_))), "{late:?}");
    // It sleeps again before it looks.
    let object = format!("{JOB}/{}/manifest.json", deleted.checkpoint);
    let content = std::io::Cursor::new(deleted.to_json());
    catalog.store().create(&object, content).await.unwrap();
    let listed = catalog.list(JOB).await.unwrap();
    assert_eq!(listed.iter().map(|(name, _)| name).collect::<Vec<_>>(), [&kept.checkpoint]);
    let found = catalog.manifest(JOB, &deleted.checkpoint).await;
    assert!(matches!(found, Err(Error::Missing(_))), "{found:?}");
}

#[tokio::test]
async fn without_a_manifest_there_is_no_checkpoint_and_what_there_is_can_be_discarded() {
    let folder = tempfile::tempdir().unwrap();
    let catalog = Catalog::new(store_in(folder.path()));
    assert!(matches!(catalog.latest(JOB).await, Err(Error::Missing(_))));
    let whole = checkpoint(&catalog, 1, &[], 40).await;
    let name = CheckpointName::at(2, 0);
    let file = write(ShardId(0), &pieces(ShardId(0), Lsn(0), 40), Scratch::default());
    catalog.create_file(JOB, &name, ShardId(0), 1, file).await.unwrap();
    assert_eq!(catalog.list(JOB).await.unwrap().len(), 1);
    assert_eq!(catalog.names(JOB).await.unwrap().len(), 2);
    let needed = catalog.delete_all(JOB, std::slice::from_ref(&name)).await.unwrap();
    assert_eq!(needed, []);
    // A server that is late writes on.
    let file = write(ShardId(0), &pieces(ShardId(0), Lsn(0), 40), Scratch::default());
    catalog.create_file(JOB, &name, ShardId(0), 2, file).await.unwrap();
    assert_eq!(catalog.list(JOB).await.unwrap().len(), 1);
    catalog.sweep(JOB, &CheckpointName::at(3, 0)).await.unwrap();
    assert_eq!(catalog.names(JOB).await.unwrap(), std::slice::from_ref(&whole.checkpoint));
    assert_eq!(catalog.jobs().await.unwrap(), [JOB]);
    // It was given up before its manifest was there.
    catalog.delete_all(JOB, std::slice::from_ref(&whole.checkpoint)).await.unwrap();
    assert_eq!(catalog.list(JOB).await.unwrap().len(), 0);
}

#[tokio::test]
async fn of_who_deletes_a_base_and_who_writes_an_increment_on_it_one_sees_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let catalog = Catalog::new(store_in(folder.path()));
    let full = checkpoint(&catalog, 1, &[], 400).await;
    let one = checkpoint(&catalog, 2, &[&full], 30).await;
    // Who deletes looked before the increment was there, and looks again after its mark.
    let base = std::slice::from_ref(&full.checkpoint);
    let needed = catalog.delete_all(JOB, base).await.unwrap();
    assert_eq!(needed, [(full.checkpoint.clone(), one.checkpoint.clone())]);
    catalog.verify(one.clone(), &SCRATCH, |_| {}).await.expect("it stays");

    // Who writes looked before the mark, and looks again after its manifest. Another who deletes may have looked before either increment was there, and goes on.
    let two = Manifest {
        checkpoint: CheckpointName::at(3, 0),
        chain: vec![full.checkpoint.clone()],
        ..one.clone()
    };
    let late = catalog.create_manifest(&two).await;
    assert!(
        matches!(&late, Err(Error::Missing(base)) if base.contains(full.checkpoint.as_str())),
        "{late:?}"
    );
    let listed = catalog.list(JOB).await.unwrap();
    assert_eq!(listed.len(), 1, "an increment without its base is none: {listed:?}");
}

#[tokio::test]
async fn a_base_that_was_marked_by_who_died_then_is_there_for_those_who_build_on_it() {
    let folder = tempfile::tempdir().unwrap();
    let catalog = Catalog::new(store_in(folder.path()));
    let full = checkpoint(&catalog, 1, &[], 400).await;
    let one = checkpoint(&catalog, 2, &[&full], 30).await;
    assert_eq!(catalog.base(JOB, &one.checkpoint).await.unwrap(), one);
    let mark = format!("{JOB}/{}/deleted", full.checkpoint);
    catalog.store().create(&mark, std::io::empty()).await.unwrap();
    catalog.sweep(JOB, &CheckpointName::at(9, 0)).await.unwrap();
    catalog.verify(one.clone(), &SCRATCH, |_| {}).await.expect("nothing is gone");
    let base = catalog.base(JOB, &one.checkpoint).await;
    assert!(matches!(base, Err(Error::Missing(_))), "nobody builds on it any more: {base:?}");
    catalog.delete(JOB, &one.checkpoint).await.unwrap();
    catalog.sweep(JOB, &CheckpointName::at(9, 0)).await.unwrap();
    assert!(catalog.names(JOB).await.unwrap().is_empty());
}

#[tokio::test]
async fn who_finds_a_manifest_that_another_wrote_looks_for_marks_in_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let catalog = Catalog::new(store_in(folder.path()));
    let full = checkpoint(&catalog, 1, &[], 400).await;
    let one = checkpoint(&catalog, 2, &[&full], 30).await;
    let there = catalog.create_manifest(&one).await;
    assert!(matches!(there, Err(Error::Exists(_))), "{there:?}");
    // Marked before it was written, and about to be gone: who wrote it died before it looked.
    let mark = format!("{JOB}/{}/deleted", full.checkpoint);
    catalog.store().create(&mark, std::io::empty()).await.unwrap();
    let again = catalog.create_manifest(&one).await;
    assert!(matches!(again, Err(Error::Missing(_))), "{again:?}");
    catalog.manifest(JOB, &one.checkpoint).await.expect("it is for others to say that it is none");
}

#[test]
fn a_place_that_is_none_is_refused() {
    for uri in ["/tmp/x", "file://x", "gs://b/c", "s3://", "file:///not/there/at/all"] {
        assert!(Store::open(uri, Access::Read).is_err(), "{uri}");
    }
}

static SCRATCH: std::sync::LazyLock<Scratch> = std::sync::LazyLock::new(Scratch::default);

struct Broken;

impl std::io::Read for Broken {
    fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
        Err(std::io::Error::other("broke off"))
    }
}

#[tokio::test]
async fn a_manifest_that_speaks_of_huge_dense_variables_takes_no_memory_when_it_is_exported() {
    let folder = tempfile::tempdir().unwrap();
    let catalog = Catalog::new(store_in(folder.path()));
    let mut manifest = checkpoint(&catalog, 1, &[], 40).await;
    let exported = async |manifest: &Manifest, into: &str| {
        let into = folder.path().join(into);
        std::fs::create_dir(&into).unwrap();
        let chain = [manifest.clone()];
        let tables = export(&catalog, &chain, &into, &SCRATCH, |_| ()).await;
        (tables, into.join(DENSE_FILE))
    };
    let (tables, dense) = exported(&manifest, "right").await;
    assert_eq!(tables.unwrap().len(), 2);
    let bytes = std::fs::read(dense).unwrap();
    let head = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    assert_eq!(bytes.len() - 8 - head, 3 * 7 * 4, "every block in its place");
    // Defined after the shards were cut, as far as the files can tell: the largest that there may be, a thousand times.
    let huge = Shape::Dense(DenseSpec { shape: vec![1 << 32], block_floats: 1 << 20 });
    for id in 4..1004 {
        let name = format!("huge-{id}");
        let spec = VariableSpec { name, shape: huge.clone(), ..manifest.variables[1].spec.clone() };
        manifest.variables.push(Variable { id: VariableId(id), spec });
    }
    let (refused, _) = exported(&manifest, "wrong").await;
    assert!(refused.unwrap_err().to_string().contains("huge-4"));
}
