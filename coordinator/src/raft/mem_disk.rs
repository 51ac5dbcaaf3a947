//! A disk in memory, for tests and simulation: what was not synced is lost when its owner dies.

use std::sync::Arc;

use parking_lot::Mutex;

use super::log::{Change, Disk, Error, Image};

/// The platters: they survive the process.
#[derive(Clone, Debug, Default)]
pub struct Platters(Arc<Mutex<Image>>);

/// A disk drive with a cache.
#[derive(Debug)]
pub struct MemDisk {
    platters: Platters,
    cache: Image,
}

impl MemDisk {
    /// A drive that finds what was synced to these platters.
    #[must_use]
    pub fn new(platters: &Platters) -> Self {
        MemDisk { platters: platters.clone(), cache: platters.0.lock().clone() }
    }
}

impl Disk for MemDisk {
    fn load(&mut self) -> Result<Image, Error> {
        Ok(self.cache.clone())
    }

    fn write(&mut self, change: &Change<'_>) -> Result<(), Error> {
        let image = &mut self.cache;
        if let Some(identity) = change.identity {
            image.identity = Some(identity.clone());
        }
        if let Some(admission) = change.admission {
            image.admission = admission;
        }
        if let Some(snapshot) = change.snapshot {
            image.snapshot = Some(snapshot.clone());
        }
        if let Some(removed) = &change.removed {
            image.entries.retain(|entry| !removed.contains(&entry.index));
        }
        if let Some(truncated) = change.truncated {
            image.truncated = truncated;
        }
        if let Some(first) = change.entries.first() {
            image.entries.retain(|entry| entry.index < first.index);
            image.entries.extend(change.entries.iter().cloned());
        }
        if let Some(hard_state) = change.hard_state {
            image.hard_state = hard_state.clone();
        }
        if change.sync {
            *self.platters.0.lock() = image.clone();
        }
        Ok(())
    }
}
