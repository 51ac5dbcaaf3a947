//! How a member that was added while the group runs finds out who it is: it asks the group for its number, with a data directory that has a birth
//! already, so that one number never begins with two directories.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::bail;
use downpour_proto::transport::{self, LEADER_METADATA};
use downpour_proto::v1;
use downpour_proto::v1::raft_client::RaftClient;
use tonic::{Code, Status};
use tracing::{info, warn};

use super::log::{Admission, Change, Disk, Error, Identity, Log};
use super::peers::Group;

/// For one answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two questions.
const PAUSE: Duration = Duration::from_millis(250);

/// A disk, and what it has of a member.
#[derive(Debug)]
pub(crate) enum Directory<D> {
    /// The log of a member.
    Of(Box<Log<D>>, Identity),
    /// Nobody's yet; its birth is durable.
    Nobodys(D, u64),
}

/// Looks whose `disk` is; gives an unused one a birth, `drawn` if it has none.
///
/// # Errors
/// The disk fails, or belongs to another cluster.
pub(crate) fn look<D: Disk>(mut disk: D, cluster: &str, drawn: u64) -> Result<Directory<D>, Error> {
    let image = disk.load()?;
    let Some(found) = image.identity else {
        let birth = if image.admission.birth == 0 { drawn } else { image.admission.birth };
        let admission = Some(Admission { birth, joining: false });
        disk.write(&Change { admission, sync: true, ..Change::default() })?;
        return Ok(Directory::Nobodys(disk, birth));
    };
    if found.cluster != cluster {
        let expected = Identity { cluster: cluster.into(), ..found.clone() };
        return Err(Error::Stranger { found, expected });
    }
    let log = Log::open(disk, &found, image.admission)?;
    Ok(Directory::Of(Box::new(log), found))
}

/// Asks the members at `addresses` until one that leads says which member is at `own`.
///
/// # Errors
/// It may not be a member with this data directory.
pub(crate) async fn ask(
    addresses: &[String],
    cluster: &str,
    own: &str,
    birth: u64,
) -> anyhow::Result<Group> {
    let mut said = String::new();
    let mut turn = 0;
    let mut hinted: Option<String> = None;
    loop {
        let address = hinted.take().unwrap_or_else(|| addresses[turn % addresses.len()].clone());
        turn += 1;
        let request = v1::JoinRequest { cluster: cluster.into(), address: own.into(), birth };
        let status = match join(&address, request).await {
            Ok(reply) => {
                let v1::JoinReply { member: me, founders, members } = reply;
                let members: BTreeMap<_, _> =
                    members.into_iter().map(|one| (one.id, one.address)).collect();
                info!(member = me, ?members, "this process is a member that was added");
                return Ok(Group {
                    cluster: cluster.into(),
                    me,
                    address: own.into(),
                    members,
                    founders,
                });
            }
            Err(status) => status,
        };
        match status.code() {
            Code::FailedPrecondition | Code::InvalidArgument | Code::Unimplemented => {
                bail!("{address} does not let this process join: {}", status.message())
            }
            _ => {}
        }
        hinted = status
            .metadata()
            .get(LEADER_METADATA)
            .and_then(|leader| leader.to_str().ok())
            .filter(|leader| *leader != address)
            .map(str::to_owned);
        if hinted.is_none() {
            if said != status.message() {
                status.message().clone_into(&mut said);
                warn!(asked = address, answer = said, "waiting to be let into the group");
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

async fn join(address: &str, request: v1::JoinRequest) -> Result<v1::JoinReply, Status> {
    let mut client = RaftClient::new(transport::channel(address)?);
    match tokio::time::timeout(PATIENCE, client.join(request)).await {
        Ok(reply) => Ok(reply?.into_inner()),
        Err(_) => Err(Status::deadline_exceeded("no answer")),
    }
}
