//! The one place where errors become gRPC statuses.

use downpour_proto::transport::LEADER_METADATA;
use tonic::Status;
use tonic::metadata::MetadataValue;

use super::Service;
use crate::raft::Error;
use crate::state::Refused;

impl Service {
    pub(super) fn status(&self, error: Error) -> Status {
        let message = error.to_string();
        match error {
            Error::NotLeader { leader } => {
                let mut status = Status::unavailable(message);
                let address = leader.and_then(|leader| self.group.members.get(&leader));
                if let Some(value) = address.and_then(|one| MetadataValue::try_from(one).ok()) {
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
        }
    }
}
