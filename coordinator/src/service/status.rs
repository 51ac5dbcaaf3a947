//! The one place where errors become gRPC statuses.

use downpour_proto::transport::LEADER_METADATA;
use tonic::Status;
use tonic::metadata::MetadataValue;

use super::Service;
use crate::raft::Error;
use crate::raft::peers::Group;
use crate::state::{Cluster, Refused, Reply};

impl Service {
    pub(super) fn status(&self, error: Error) -> Status {
        of(error, &self.handle.cluster(), &self.group)
    }
}

/// The status of an error; one that sends the caller to the leader says where that is.
pub(crate) fn of(error: Error, cluster: &Cluster, group: &Group) -> Status {
    let message = error.to_string();
    match error {
        Error::NotLeader { leader } => {
            let mut status = Status::unavailable(message);
            let members = group.now(cluster).list;
            let member = leader.and_then(|leader| members.get(&leader));
            let value = member.and_then(|member| MetadataValue::try_from(&member.address).ok());
            if let Some(value) = value {
                status.metadata_mut().insert(LEADER_METADATA, value);
            }
            status
        }
        Error::Overwritten | Error::Unknown | Error::Overloaded | Error::Stopped => {
            Status::unavailable(message)
        }
        Error::Invalid(_) => Status::invalid_argument(message),
        // A job may be asked for before its servers have started.
        Error::Refused(Refused::TooFewServers(_) | Refused::Later(_)) => {
            Status::unavailable(message)
        }
        Error::Refused(Refused::NotFound(_)) => Status::not_found(message),
        Error::Refused(Refused::AlreadyExists(_)) => Status::already_exists(message),
        Error::Refused(Refused::FailedPrecondition(_)) => Status::failed_precondition(message),
        Error::Refused(Refused::Conflict(_)) => Status::aborted(message),
    }
}

/// A reply of another kind than the command asks for: a mistake in the state machine.
pub(crate) fn mismatch(reply: &Reply) -> Status {
    Status::internal(format!("the state machine answered {reply:?}"))
}
