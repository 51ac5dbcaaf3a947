//! The checkpoints in a store: finding, proving, deleting.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use downpour_core::id::{Lsn, ShardId};
use downpour_proto::threads;

use crate::manifest::{Manifest, ShardEntry};
use crate::name::{CheckpointName, DELETED, MANIFEST, job_folder, job_of_folder};
use crate::read::ShardReader;
use crate::store::{Store, Stored};
use crate::write::{Scratch, ShardFile};
use crate::{Error, Malformed};

/// Largest manifest: of 65,536 shards and 4,096 variables.
const MANIFEST_BYTES_MAX: u64 = 64 << 20;

/// The checkpoints of one store.
#[derive(Clone, Debug)]
pub struct Catalog {
    store: Store,
}

/// One file of what a shard is restored from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// The checkpoint that it is in.
    pub checkpoint: CheckpointName,
    /// What its manifest says.
    pub entry: ShardEntry,
}

/// What [`Catalog::keep`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// What stays, oldest first.
    pub kept: Vec<CheckpointName>,
    /// What was deleted, newest first.
    pub deleted: Vec<CheckpointName>,
}

/// The checkpoints of a job, by whether they are to be kept.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sorted {
    /// What stays, oldest first.
    pub kept: Vec<CheckpointName>,
    /// What is older than that and not needed, newest first: an increment before what it builds on.
    pub surplus: Vec<Manifest>,
}

impl Catalog {
    /// Of a store.
    #[must_use]
    pub fn new(store: Store) -> Self {
        Catalog { store }
    }

    /// Where it is.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Jobs that have a folder here.
    ///
    /// # Errors
    /// The place failed.
    pub async fn jobs(&self) -> Result<Vec<String>, Error> {
        let folders = self.store.folders("").await?;
        Ok(folders.iter().filter_map(|folder| job_of_folder(folder)).collect())
    }

    /// The checkpoints of a job that have a folder, oldest first; those that were never finished have no manifest.
    ///
    /// # Errors
    /// The place failed.
    pub async fn names(&self, job: &str) -> Result<Vec<CheckpointName>, Error> {
        let folders = self.store.folders(&self.folder(job)?).await?;
        Ok(folders.into_iter().filter_map(|name| CheckpointName::new(name).ok()).collect())
    }

    /// The whole checkpoints of a job, oldest first. A manifest that is damaged is an error in its place.
    ///
    /// # Errors
    /// The place failed.
    pub async fn list(
        &self,
        job: &str,
    ) -> Result<Vec<(CheckpointName, Result<Manifest, Error>)>, Error> {
        let mut listed = Vec::new();
        for name in self.names(job).await? {
            match self.manifest(job, &name).await {
                Err(Error::Missing(_)) => {}
                Err(error @ (Error::Store { .. } | Error::Io { .. })) => return Err(error),
                manifest => listed.push((name, manifest)),
            }
        }
        Ok(listed)
    }

    /// What a checkpoint consists of.
    ///
    /// # Errors
    /// It is missing, deleted or damaged.
    pub async fn manifest(&self, job: &str, name: &CheckpointName) -> Result<Manifest, Error> {
        let manifest = self.manifest_even_if_marked(job, name).await?;
        // Looked for last: deleting marks first, so a manifest without a mark was whole when it was read.
        if self.store.exists(&self.object(job, name, DELETED)?).await? {
            return Err(Error::Missing(self.store.full_name(&self.object(job, name, MANIFEST)?)));
        }
        Ok(manifest)
    }

    async fn manifest_even_if_marked(
        &self,
        job: &str,
        name: &CheckpointName,
    ) -> Result<Manifest, Error> {
        let object = self.object(job, name, MANIFEST)?;
        let text = self.store.read(&object, MANIFEST_BYTES_MAX).await?;
        let bad = |bad: Malformed| bad.of(self.store.full_name(&object));
        let manifest = Manifest::from_json(&text).map_err(bad)?;
        if manifest.checkpoint != *name || manifest.job.name != job {
            let found = format!("{} of job {:?}", manifest.checkpoint, manifest.job.name);
            let problem = format!("is of {found}, but lies in the folder of another");
            return Err(bad(Malformed::new("checkpoint", problem)));
        }
        Ok(manifest)
    }

    /// The newest checkpoint whose manifest is whole.
    ///
    /// # Errors
    /// There is none, or the place failed.
    pub async fn latest(&self, job: &str) -> Result<Manifest, Error> {
        for name in self.names(job).await?.iter().rev() {
            match self.manifest(job, name).await {
                Ok(manifest) => return Ok(manifest),
                Err(Error::Missing(_) | Error::Structure { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::Missing(format!(
            "{}: a whole checkpoint",
            self.store.full_name(&self.folder(job)?)
        )))
    }

    /// Stores the file of a shard and says what the manifest has to say of it.
    ///
    /// # Errors
    /// The name is taken, or the place failed.
    pub async fn create_file(
        &self,
        job: &str,
        name: &CheckpointName,
        shard: ShardId,
        attempt: u32,
        file: ShardFile,
    ) -> Result<ShardEntry, Error> {
        let ShardFile { lsn, newer_than, content, rows, blocks } = file;
        let entry = ShardEntry { lsn, newer_than, attempt, bytes: 0, crc32: 0, rows, blocks };
        let object = self.object(job, name, &entry.object(shard))?;
        let Stored { bytes, crc32 } = self.store.create(&object, content).await?;
        Ok(ShardEntry { bytes, crc32, ..entry })
    }

    /// Makes a checkpoint one. Its files must be there.
    ///
    /// # Errors
    /// It is one already, it was deleted meanwhile or what it builds on was, or the place failed.
    pub async fn create_manifest(&self, manifest: &Manifest) -> Result<(), Error> {
        let Manifest { checkpoint, job, .. } = manifest;
        let object = self.object(&job.name, checkpoint, MANIFEST)?;
        let created = match self.store.create(&object, io::Cursor::new(manifest.to_json())).await {
            // Who wrote it may have died before it looked.
            created @ (Ok(_) | Err(Error::Exists(_))) => created.map(drop),
            Err(error) => return Err(error),
        };
        // Whoever writes may have slept since it had the right to, while another wrote and deleted the same one. And whoever deletes marks first and looks then who builds on that.
        for one in [checkpoint].into_iter().chain(&manifest.chain) {
            let mark = self.object(&job.name, one, DELETED)?;
            if self.store.exists(&mark).await? {
                // What another wrote may count already: that is decided elsewhere.
                if created.is_ok() {
                    self.mark(&job.name, checkpoint).await?;
                    self.erase(&job.name, checkpoint).await?;
                }
                return Err(Error::Missing(self.store.full_name(&self.of(&job.name, one)?)));
            }
        }
        created
    }

    /// The manifests that `manifest` builds on, oldest first, and itself. Of one that others build on a mark means nothing but that nothing new builds on it.
    ///
    /// # Errors
    /// One is missing or damaged, or they do not belong together.
    pub async fn chain(&self, manifest: Manifest) -> Result<Vec<Manifest>, Error> {
        let mut chain = Vec::with_capacity(manifest.chain.len() + 1);
        for name in &manifest.chain {
            let base = self.manifest_even_if_marked(&manifest.job.name, name).await?;
            let whole = base.chain == manifest.chain[..chain.len()];
            if !whole
                || base.job.shards != manifest.job.shards
                || base.job.seed != manifest.job.seed
            {
                let object = self.object(&manifest.job.name, name, MANIFEST)?;
                let problem = format!("is not what {} builds on", manifest.checkpoint);
                return Err(Malformed::new("chain", problem).of(self.store.full_name(&object)));
            }
            chain.push(base);
        }
        chain.push(manifest);
        Ok(chain)
    }

    /// A checkpoint that another one may build on.
    ///
    /// # Errors
    /// It or what it builds on is missing, marked as deleted or damaged.
    pub async fn base(&self, job: &str, name: &CheckpointName) -> Result<Manifest, Error> {
        let base = self.manifest(job, name).await?;
        for one in &base.chain {
            self.manifest(job, one).await?;
        }
        Ok(base)
    }

    /// Opens a file of a checkpoint, its bytes and its structure proved.
    ///
    /// # Errors
    /// Names the file: missing, cut off, corrupt, or of another checkpoint.
    pub async fn open_file(
        &self,
        manifest: &Manifest,
        shard: ShardId,
        scratch: &Scratch,
    ) -> Result<ShardReader, Error> {
        let Some(entry) = manifest.files.get(shard.0 as usize) else {
            return Err(Error::Missing(format!("shard {shard} of {}", manifest.checkpoint)));
        };
        let object = self.object(&manifest.job.name, &manifest.checkpoint, &entry.object(shard))?;
        let expected = Stored { bytes: entry.bytes, crc32: entry.crc32 };
        let file = self.store.fetch(&object, expected, scratch).await?;
        let name = self.store.full_name(&object);
        let bytes = entry.bytes;
        let opened = {
            let name = name.clone();
            threads::blocking(move || ShardReader::open(&name, bytes, file)).await
        };
        let opened = opened.map_err(|error| Error::Io {
            object: name.clone(),
            source: io::Error::other(error),
        })??;
        manifest.check_head(shard, opened.head()).map_err(|bad| bad.of(name))?;
        Ok(opened)
    }

    /// Reads every byte of a checkpoint and of what it builds on. `progress` is told the bytes of each file that is right.
    ///
    /// # Errors
    /// Names the first file that is not.
    pub async fn verify(
        &self,
        manifest: Manifest,
        scratch: &Scratch,
        mut progress: impl FnMut(u64),
    ) -> Result<(), Error> {
        let chain = self.chain(manifest).await?;
        let shards = chain.last().map_or(0, |manifest| manifest.job.shards);
        for shard in (0..shards).map(ShardId) {
            for (manifest, link) in links(&chain, shard).map_err(|bad| bad.of(self.store.uri()))? {
                let reader = self.open_file(manifest, shard, scratch).await?;
                let checked = threads::blocking(move || reader.check()).await;
                let object = self.store.full_name(&link.entry.object(shard));
                checked
                    .map_err(|error| Error::Io { object, source: io::Error::other(error) })??;
                progress(link.entry.bytes);
            }
        }
        Ok(())
    }

    /// Deletes a checkpoint: its manifest first, so that it is never listed without its files.
    ///
    /// # Errors
    /// Another one builds on it, or the place failed.
    pub async fn delete(&self, job: &str, name: &CheckpointName) -> Result<(), Error> {
        for (other, manifest) in self.list(job).await? {
            if manifest.is_ok_and(|manifest| manifest.chain.contains(name)) {
                return Err(Error::Needed { object: name.to_string(), by: other.to_string() });
            }
        }
        match self.delete_all(job, std::slice::from_ref(name)).await?.pop() {
            Some((name, by)) => Err(Error::Needed { object: name.to_string(), by: by.to_string() }),
            None => Ok(()),
        }
    }

    /// Which checkpoints of a job are beyond the newest `count`, those that are `used`, and what these build on.
    ///
    /// # Errors
    /// The place failed.
    pub async fn sort(
        &self,
        job: &str,
        count: usize,
        used: &[CheckpointName],
    ) -> Result<Sorted, Error> {
        let listed = self.list(job).await?;
        let whole: BTreeMap<CheckpointName, Manifest> = listed
            .into_iter()
            .filter_map(|(name, manifest)| Some((name, manifest.ok()?)))
            .collect();
        let newest = whole.values().rev().take(count);
        let used = used.iter().filter_map(|name| whole.get(name));
        let needed: BTreeSet<CheckpointName> = newest
            .chain(used)
            .flat_map(|manifest| manifest.chain.iter().chain([&manifest.checkpoint]))
            .cloned()
            .collect();
        let (kept, surplus): (Vec<_>, Vec<_>) =
            whole.into_iter().partition(|(name, _)| needed.contains(name));
        Ok(Sorted {
            kept: kept.into_iter().map(|(name, _)| name).collect(),
            surplus: surplus.into_iter().rev().map(|(_, manifest)| manifest).collect(),
        })
    }

    /// Deletes what [`Catalog::sort`] finds to be surplus.
    ///
    /// # Errors
    /// The place failed.
    pub async fn keep(
        &self,
        job: &str,
        count: usize,
        used: &[CheckpointName],
    ) -> Result<Kept, Error> {
        let Sorted { mut kept, surplus } = self.sort(job, count, used).await?;
        let mut deleted: Vec<_> = surplus.into_iter().map(|manifest| manifest.checkpoint).collect();
        for (name, _) in self.delete_all(job, &deleted).await? {
            deleted.retain(|one| *one != name);
            kept.push(name);
        }
        kept.sort_unstable();
        Ok(Kept { kept, deleted })
    }

    /// Deletes what there is of checkpoints, whole or not, but for those that others build on: it returns these, each with one that does.
    ///
    /// # Errors
    /// The place failed.
    pub async fn delete_all(
        &self,
        job: &str,
        names: &[CheckpointName],
    ) -> Result<Vec<(CheckpointName, CheckpointName)>, Error> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        for name in names {
            self.mark(job, name).await?;
        }
        // Only now: who writes an increment looks for marks after it has written its manifest, so one of the two sees the other.
        let listed = self.list(job).await?;
        let mut needed = Vec::new();
        for name in names {
            let builds_on = |manifest: &Manifest| manifest.chain.contains(name);
            let mut others = listed.iter();
            match others.find(|(_, manifest)| manifest.as_ref().is_ok_and(builds_on)) {
                None => self.erase(job, name).await?,
                // The mark stays: others may have looked before that one was there, and delete it still.
                Some((by, _)) => needed.push((name.clone(), by.clone())),
            }
        }
        Ok(needed)
    }

    /// Deletes what is left of the checkpoints before `before` that are none, or none any more: files that a server wrote too late, and marks.
    /// `before` must be so long ago that nobody who began then still writes. What others build on stays, marked or not.
    ///
    /// # Errors
    /// The place failed.
    pub async fn sweep(&self, job: &str, before: &CheckpointName) -> Result<(), Error> {
        let mut none = Vec::new();
        for name in self.names(job).await?.into_iter().filter(|name| name < before) {
            if let Err(Error::Missing(_)) = self.manifest(job, &name).await {
                none.push(name);
            }
        }
        if none.is_empty() {
            return Ok(());
        }
        let listed = self.list(job).await?;
        let whole = listed.iter().filter_map(|(_, manifest)| manifest.as_ref().ok());
        let bases: BTreeSet<&CheckpointName> = whole.flat_map(|one| &one.chain).collect();
        for name in none.iter().filter(|name| !bases.contains(name)) {
            self.store.delete_folder(&self.of(job, name)?, None).await?;
        }
        Ok(())
    }

    /// Marks a checkpoint as deleted: a manifest that somebody writes later, who was to write it long ago, is none.
    async fn mark(&self, job: &str, name: &CheckpointName) -> Result<(), Error> {
        match self.store.create(&self.object(job, name, DELETED)?, io::empty()).await {
            Ok(_) | Err(Error::Exists(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Deletes what is marked: its manifest first, so that it is never listed without its files.
    async fn erase(&self, job: &str, name: &CheckpointName) -> Result<(), Error> {
        self.store.delete(&self.object(job, name, MANIFEST)?).await?;
        self.store.delete_folder(&self.of(job, name)?, Some(DELETED)).await
    }

    fn of(&self, job: &str, name: &CheckpointName) -> Result<String, Error> {
        Ok(format!("{}/{name}", self.folder(job)?))
    }

    fn folder(&self, job: &str) -> Result<String, Error> {
        job_folder(job).map_err(|bad| bad.of(self.store.uri()))
    }

    fn object(&self, job: &str, name: &CheckpointName, file: &str) -> Result<String, Error> {
        Ok(format!("{}/{file}", self.of(job, name)?))
    }
}

/// What a shard is restored from, in order: the newest file that holds everything, and the increments after it. Each increment begins where the one
/// before it ended.
///
/// # Errors
/// There is a gap.
pub fn links(chain: &[Manifest], shard: ShardId) -> Result<Vec<(&Manifest, Link)>, Malformed> {
    let link = |manifest: &Manifest| {
        let entry = manifest.files.get(shard.0 as usize)?.clone();
        Some(Link { checkpoint: manifest.checkpoint.clone(), entry })
    };
    let mut links = Vec::new();
    for (manifest, link) in chain.iter().filter_map(|manifest| Some((manifest, link(manifest)?))) {
        if link.entry.newer_than == Lsn::ZERO {
            links.clear();
        }
        let before = links.last().map_or(Lsn::ZERO, |(_, link): &(_, Link)| link.entry.lsn);
        if link.entry.newer_than != before {
            let (from, name) = (link.entry.newer_than, &link.checkpoint);
            let problem = format!(
                "shard {shard} of {name} begins at {from}, and what it builds on ends at {before}"
            );
            return Err(Malformed::new("chain", problem));
        }
        links.push((manifest, link));
    }
    Ok(links)
}
