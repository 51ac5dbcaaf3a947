//! Who knows more of the group than this member is told nothing by it (docs/protocol.md 12.7).

use downpour_proto::group;
use tonic::service::Interceptor;
use tonic::{Request, Status};

use crate::raft::Handle;

/// Refuses whoever heard of a change of the group that this member has not applied: it is behind, or has lost its disk and founded a group anew. "Fenced", or "there is no such
/// session", would be said of what it does not know.
#[derive(Clone, Debug)]
pub struct Behind(pub(super) Handle);

impl Interceptor for Behind {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let (known, own) = (group::known(request.metadata())?, self.0.cluster().members.version);
        if own < known {
            return Err(Status::unavailable(format!(
                "the group of coordinators changed at {known} of its log, and this member knows of no change after {own}: ask another. If there is no other and the group \
                 was founded anew, start again whatever knew the old one"
            )));
        }
        Ok(request)
    }
}
