//! The directory or bucket that checkpoints are in.
//!
//! Nothing is ever overwritten. A directory: temporary file, fsync, hard link to the name (which fails where the name is taken), fsync of the directory.
//! A bucket: `If-None-Match: *`; a file too large for one request goes up in parts, which S3 cannot make conditional everywhere: it is looked
//! for first, and its name, with epoch, position and attempt, is nobody else's.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use downpour_core::planted::{Bug, planted};
use downpour_proto::threads;
use futures::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3Builder, S3CopyIfNotExists};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    MultipartUpload, ObjectStore, ObjectStoreExt, PutMode, PutPayload, RetryConfig,
};
use tokio::sync::mpsc;

use crate::Error;
use crate::write::Scratch;

/// Bytes of one part of a large file.
const PART_BYTES: usize = 8 << 20;
/// Up to here a file is one request.
const SINGLE_BYTES_MAX: u64 = 16 << 20;
/// Requests to a bucket are repeated for so long.
const RETRY_TIMEOUT: Duration = Duration::from_secs(60);
const RETRIES_MAX: usize = 6;

/// Where checkpoints are.
#[derive(Clone, Debug)]
pub struct Store {
    uri: String,
    objects: Arc<dyn ObjectStore>,
    /// Of everything in a bucket that belongs to this store.
    prefix: Path,
    /// Given for a directory: parts become a file only when all are there, and only under a name that is free.
    files: Option<Arc<LocalFileSystem>>,
}

/// What is to be done with a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It must exist.
    Read,
    /// A directory is made if it is not there.
    Write,
}

/// What was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Size.
    pub bytes: u64,
    /// Checksum.
    pub crc32: u32,
}

impl Store {
    /// Opens `file:///folder` or `s3://bucket/prefix`. Credentials, region and endpoint of a bucket come from the environment (`AWS_ACCESS_KEY_ID`,
    /// `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT`, `AWS_ALLOW_HTTP`, …).
    ///
    /// # Errors
    /// The place is not written so, or is not there.
    pub fn open(uri: &str, access: Access) -> Result<Store, Error> {
        let invalid = |problem: &str| Error::Uri { uri: uri.into(), problem: problem.into() };
        if let Some(folder) = uri.strip_prefix("file://") {
            if !folder.starts_with('/') {
                return Err(invalid("a folder must be absolute"));
            }
            return Self::folder(uri, PathBuf::from(folder), access);
        }
        #[cfg(downpour_sim)]
        if uri.starts_with("s3://") {
            return Ok(Self::simulated(uri));
        }
        let Some(place) = uri.strip_prefix("s3://") else {
            return Err(invalid("is neither file:// nor s3://"));
        };
        let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
        if bucket.is_empty() {
            return Err(invalid("names no bucket"));
        }
        // Fails where the process has chosen one before, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let retry = RetryConfig {
            max_retries: RETRIES_MAX,
            retry_timeout: RETRY_TIMEOUT,
            ..RetryConfig::default()
        };
        let bucket = AmazonS3Builder::from_env()
            .with_bucket_name(bucket)
            .with_copy_if_not_exists(S3CopyIfNotExists::Multipart)
            .with_retry(retry)
            .build()
            .map_err(|error| invalid(&error.to_string()))?;
        let prefix =
            Path::parse(prefix.trim_matches('/')).map_err(|error| invalid(&error.to_string()))?;
        Ok(Store { uri: trimmed(uri), objects: Arc::new(bucket), prefix, files: None })
    }

    fn folder(uri: &str, folder: PathBuf, access: Access) -> Result<Store, Error> {
        let failed = |source| Error::Io { object: uri.into(), source };
        if access == Access::Write {
            std::fs::create_dir_all(&folder).map_err(failed)?;
        } else if !folder.is_dir() {
            return Err(Error::Missing(uri.into()));
        }
        let files = LocalFileSystem::new_with_prefix(&folder)
            .map_err(|source| Error::Store { object: uri.into(), source })?
            .with_fsync(true)
            .with_automatic_cleanup(true);
        let (files, prefix) = (Arc::new(files), Path::default());
        Ok(Store {
            uri: trimmed(uri),
            objects: Arc::clone(&files) as _,
            prefix,
            files: Some(files),
        })
    }

    /// One bucket for the whole simulation: it outlives whoever writes to it.
    #[cfg(downpour_sim)]
    fn simulated(uri: &str) -> Store {
        use object_store::memory::InMemory;
        static OBJECTS: std::sync::LazyLock<Arc<InMemory>> = std::sync::LazyLock::new(Arc::default);
        let (objects, prefix) = (Arc::clone(&OBJECTS) as Arc<dyn ObjectStore>, Path::default());
        Store { uri: trimmed(uri), objects, prefix, files: None }
    }

    /// As it was opened, without a slash at the end.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// How `object` is told to people.
    #[must_use]
    pub fn full_name(&self, object: &str) -> String {
        format!("{}/{object}", self.uri)
    }

    /// Stores what `content` gives under a name that is free. The memory that it takes is some parts, however large the file.
    ///
    /// # Errors
    /// The name is taken, or the place or the content failed; nothing is there under the name then.
    pub async fn create(
        &self,
        object: &str,
        content: impl Read + Send + 'static,
    ) -> Result<Stored, Error> {
        let (send, mut parts) = mpsc::channel(1);
        let reading = threads::blocking(move || read_parts(content, &send));
        let stored = self.put(object, &mut parts).await;
        // A reader that waits for room ends.
        drop(parts);
        let broken = |source| Error::Io { object: self.full_name(object), source };
        // What was stored of a content that broke off is half a file.
        match (reading.await.map_err(|error| broken(io::Error::other(error)))?, stored) {
            (_, Err(error)) => Err(error),
            (Ok(()), Ok(stored)) => Ok(stored),
            (Err(error), Ok(_)) => Err(broken(error)),
        }
    }

    async fn put(
        &self,
        object: &str,
        parts: &mut mpsc::Receiver<io::Result<Bytes>>,
    ) -> Result<Stored, Error> {
        let failed = |source| self.failed(object, source);
        let broken = |source| Error::Io { object: self.full_name(object), source };
        let path = self.path(object);
        let mut crc32 = crc32fast::Hasher::new();
        let mut bytes = 0;
        let mut waiting = Vec::new();
        let mut upload: Option<Box<dyn MultipartUpload>> = None;
        let staged =
            if self.files.is_some() { Path::from(format!("{path}.part")) } else { path.clone() };
        while let Some(part) = parts.recv().await {
            let part = match part {
                Ok(part) => part,
                Err(error) => {
                    if let Some(mut upload) = upload {
                        let _ = upload.abort().await;
                    }
                    return Err(broken(error));
                }
            };
            crc32.update(&part);
            bytes += part.len() as u64;
            waiting.push(part);
            if bytes <= SINGLE_BYTES_MAX {
                continue;
            }
            if upload.is_none() {
                if self.exists(object).await? {
                    return Err(Error::Exists(self.full_name(object)));
                }
                upload = Some(self.objects.put_multipart(&staged).await.map_err(failed)?);
            }
            if let Some(upload) = &mut upload {
                for part in waiting.drain(..) {
                    if let Err(error) = upload.put_part(PutPayload::from(part)).await {
                        let _ = upload.abort().await;
                        return Err(failed(error));
                    }
                }
            }
        }
        match upload {
            None => {
                let payload = PutPayload::from_iter(waiting);
                #[cfg(downpour_sim)]
                simulated_wait().await;
                let stale = planted(Bug::StaleCheckpoint);
                let mode = if stale { PutMode::Overwrite } else { PutMode::Create };
                let put = self.objects.put_opts(&path, payload, mode.into()).await;
                put.map_err(failed)?;
            }
            Some(mut upload) => {
                upload.complete().await.map_err(failed)?;
                if self.files.is_some() {
                    self.objects.rename_if_not_exists(&staged, &path).await.map_err(failed)?;
                }
            }
        }
        self.uncache(&path).await;
        Ok(Stored { bytes, crc32: crc32.finalize() })
    }

    /// Gives the system back the memory in which it keeps what was just written to a directory: nobody reads it soon, the next file needs as much, and
    /// memory that is not its own yet is dear (docs/performance.md). It is on the disk, so nothing is lost with it; where this fails it stays.
    async fn uncache(&self, path: &Path) {
        let Some(files) = &self.files else { return };
        let Ok(file) = files.path_to_filesystem(path) else { return };
        let uncached = threads::blocking(move || {
            let file = File::open(file)?;
            rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?;
            io::Result::Ok(())
        });
        _ = uncached.await;
    }

    /// A small object, whole.
    ///
    /// # Errors
    /// It is not there, or larger than `bytes_max`.
    pub async fn read(&self, object: &str, bytes_max: u64) -> Result<Bytes, Error> {
        let failed = |source| self.failed(object, source);
        let answer = self.objects.get(&self.path(object)).await.map_err(failed)?;
        let bytes = answer.meta.size;
        if bytes > bytes_max {
            return Err(Error::Size { object: self.full_name(object), bytes, expected: bytes_max });
        }
        answer.bytes().await.map_err(failed)
    }

    /// Brings a file here, and refuses it unless it is what was stored.
    ///
    /// # Errors
    /// It is missing, cut off, or not the bytes that were written.
    pub async fn fetch(
        &self,
        object: &str,
        expected: Stored,
        scratch: &Scratch,
    ) -> Result<tempfile::SpooledTempFile, Error> {
        let failed = |source| self.failed(object, source);
        let answer = self.objects.get(&self.path(object)).await.map_err(failed)?;
        let size =
            |bytes| Error::Size { object: self.full_name(object), bytes, expected: expected.bytes };
        if answer.meta.size != expected.bytes {
            return Err(size(answer.meta.size));
        }
        let (send, mut receive) = mpsc::channel::<Bytes>(4);
        let (memory, folder) = (scratch.memory_bytes_max, scratch.folder.clone());
        let writing = threads::blocking(move || {
            let mut file = tempfile::spooled_tempfile_in(memory, folder);
            let (mut crc32, mut bytes) = (crc32fast::Hasher::new(), 0);
            while let Some(chunk) = threads::receive(&mut receive) {
                crc32.update(&chunk);
                bytes += chunk.len() as u64;
                file.write_all(&chunk)?;
            }
            file.seek(SeekFrom::Start(0))?;
            Ok::<_, io::Error>((file, Stored { bytes, crc32: crc32.finalize() }))
        });
        let mut chunks = answer.into_stream();
        let mut left = expected.bytes;
        while let Some(chunk) = chunks.try_next().await.map_err(failed)? {
            left = left.saturating_sub(chunk.len() as u64);
            // The writer ends only with an error of its own.
            if send.send(chunk).await.is_err() || left == 0 {
                break;
            }
        }
        drop(send);
        let broken = |source| Error::Io { object: self.full_name(object), source };
        let written = writing.await.map_err(|error| broken(io::Error::other(error)))?;
        let (file, stored) = written.map_err(broken)?;
        if stored.bytes != expected.bytes {
            return Err(size(stored.bytes));
        }
        if stored.crc32 != expected.crc32 {
            return Err(Error::Checksum {
                object: self.full_name(object),
                crc32: stored.crc32,
                expected: expected.crc32,
            });
        }
        Ok(file)
    }

    /// Folders in `folder` (empty: of the store), by name.
    ///
    /// # Errors
    /// The place failed.
    pub async fn folders(&self, folder: &str) -> Result<Vec<String>, Error> {
        let path = self.path(folder);
        let listed = self.objects.list_with_delimiter(Some(&path)).await;
        let listed = listed.map_err(|source| self.failed(folder, source))?;
        let names = listed.common_prefixes.iter().filter_map(Path::filename);
        let mut names: Vec<String> = names.map(str::to_owned).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Deletes an object.
    ///
    /// # Errors
    /// The place failed. That it is not there is no error.
    pub async fn delete(&self, object: &str) -> Result<(), Error> {
        match self.objects.delete(&self.path(object)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(self.failed(object, source)),
        }
    }

    /// Whether an object is there.
    ///
    /// # Errors
    /// The place failed.
    pub async fn exists(&self, object: &str) -> Result<bool, Error> {
        match self.objects.head(&self.path(object)).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(source) => Err(self.failed(object, source)),
        }
    }

    /// Deletes everything in a folder but the object `kept` of it.
    ///
    /// # Errors
    /// The place failed.
    pub async fn delete_folder(&self, folder: &str, kept: Option<&str>) -> Result<(), Error> {
        let kept = kept.map(|kept| self.path(&format!("{folder}/{kept}")));
        let all = self.objects.list(Some(&self.path(folder))).map_ok(|meta| meta.location);
        let all = all.try_filter(move |path| std::future::ready(Some(path) != kept.as_ref()));
        let mut deleted = self.objects.delete_stream(all.boxed());
        while let Some(one) = deleted.next().await {
            match one {
                Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                Err(source) => return Err(self.failed(folder, source)),
            }
        }
        Ok(())
    }

    /// Names that are checked have no characters that a path could take for something else.
    fn path(&self, object: &str) -> Path {
        let parts = self.prefix.parts().map(|part| part.as_ref().to_owned());
        Path::from_iter(
            parts.chain(object.split('/').filter(|part| !part.is_empty()).map(Into::into)),
        )
    }

    fn failed(&self, object: &str, source: object_store::Error) -> Error {
        let name = self.full_name(object);
        match source {
            object_store::Error::NotFound { .. } => Error::Missing(name),
            object_store::Error::AlreadyExists { .. }
            | object_store::Error::Precondition { .. } => Error::Exists(name),
            source => Error::Store { object: name, source },
        }
    }
}

/// A bucket takes its time.
#[cfg(downpour_sim)]
async fn simulated_wait() {
    use std::hash::{BuildHasher as _, RandomState};
    let drawn = RandomState::new().hash_one("wait") % 300;
    tokio::time::sleep(Duration::from_millis(10 + drawn)).await;
}

fn trimmed(uri: &str) -> String {
    uri.trim_end_matches('/').to_owned()
}

/// Sends what is read in parts of one size, but for the last.
fn read_parts(mut content: impl Read, parts: &mpsc::Sender<io::Result<Bytes>>) -> io::Result<()> {
    loop {
        let mut part = Vec::with_capacity(PART_BYTES);
        match content.by_ref().take(PART_BYTES as u64).read_to_end(&mut part) {
            Ok(0) => return Ok(()),
            Ok(_) => {
                // Nobody wants the rest: the store failed, and says so.
                if !threads::send(parts, Ok(part.into())) {
                    return Ok(());
                }
            }
            Err(error) => {
                threads::send(parts, Err(io::Error::new(error.kind(), error.to_string())));
                return Err(error);
            }
        }
    }
}
