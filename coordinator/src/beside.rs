//! Work that goes on beside other work, one piece at a time for each key: a disk or a bucket that hangs holds up nothing else.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::Duration;

use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

/// What takes longer is broken off; whoever looks next begins it again.
const PATIENCE: Duration = Duration::from_secs(900);

/// See the module. All of it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Beside<K> {
    tasks: JoinSet<()>,
    running: BTreeMap<K, AbortHandle>,
}

impl<K: Ord> Beside<K> {
    pub(crate) fn new() -> Self {
        Beside { tasks: JoinSet::new(), running: BTreeMap::new() }
    }

    /// Whether there is work of this key.
    pub(crate) fn is_busy(&self, key: &K) -> bool {
        self.running.get(key).is_some_and(|task| !task.is_finished())
    }

    /// Begins `work`, unless there is some of this key.
    pub(crate) fn begin(&mut self, key: K, work: impl Future<Output = ()> + Send + 'static) {
        while self.tasks.try_join_next().is_some() {}
        self.running.retain(|_, task| !task.is_finished());
        if let Entry::Vacant(free) = self.running.entry(key) {
            free.insert(self.tasks.spawn(async { _ = timeout(PATIENCE, work).await }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc;

    #[tokio::test]
    async fn what_hangs_holds_up_its_own_key_alone() {
        let (told, mut heard) = mpsc::unbounded_channel();
        let mut beside = Beside::new();
        let work = |key, hangs: bool| {
            let told = told.clone();
            async move {
                told.send(key).expect("heard");
                if hangs {
                    std::future::pending::<()>().await;
                }
            }
        };
        beside.begin("bucket", work("bucket", true));
        assert_eq!(heard.recv().await, Some("bucket"));
        for _ in 0..3 {
            beside.begin("bucket", work("bucket", true));
            beside.begin("disk", work("disk", false));
            assert_eq!(heard.recv().await, Some("disk"), "and the bucket's not twice");
            while beside.is_busy(&"disk") {
                tokio::task::yield_now().await;
            }
        }
        assert!(beside.is_busy(&"bucket"));
    }
}
