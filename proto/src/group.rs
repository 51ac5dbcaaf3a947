//! How much a caller knows of the group of coordinators (docs/protocol.md 12.7): a member that knows less refuses whatever it asks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::Invalid;

/// Metadata of a request: position in the coordinators' log of the newest change of their group that the caller heard of.
const METADATA: &str = "downpour-coordinators";

/// A connection to a coordinator, which is told with each call what its caller knows.
pub type Connection = InterceptedService<Channel, Known>;

/// The newest change of the group that this process heard of. All clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Known(Arc<AtomicU64>);

impl Known {
    /// The group changed at this position in its log.
    pub fn raise(&self, version: u64) {
        self.0.fetch_max(version, Ordering::Relaxed);
    }

    /// The highest that was heard of; 0: of none.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Over this connection.
    #[must_use]
    pub fn over(&self, channel: Channel) -> Connection {
        InterceptedService::new(channel, self.clone())
    }
}

impl Interceptor for Known {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let version = self.now();
        if version > 0 {
            request.metadata_mut().insert(METADATA, MetadataValue::from(version));
        }
        Ok(request)
    }
}

/// What the caller knows; 0: of no change.
///
/// # Errors
/// It is no position.
pub fn known(metadata: &MetadataMap) -> Result<u64, Invalid> {
    let Some(value) = metadata.get(METADATA) else { return Ok(0) };
    let position = value.to_str().ok().and_then(|text| text.parse().ok());
    position.ok_or_else(|| Invalid::new(METADATA, format!("{value:?} is no position in the log")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_tells_the_highest_position_that_was_heard_of_and_nonsense_is_refused() {
        let known_here = Known::default();
        let tell = || known_here.clone().call(Request::new(())).expect("never refused");
        assert_eq!(known(tell().metadata()), Ok(0));
        known_here.raise(7);
        known_here.raise(5);
        assert_eq!(known(tell().metadata()), Ok(7));
        let mut request = tell();
        for nonsense in ["", "-1", "7 ", "99999999999999999999"] {
            request.metadata_mut().insert(METADATA, nonsense.parse().expect("ASCII"));
            assert_eq!(known(request.metadata()).unwrap_err().field, METADATA, "{nonsense}");
        }
    }
}
