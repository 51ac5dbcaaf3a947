//! Calls to the control plane, at whichever member answers.

use std::collections::HashMap;
use std::future::Future;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use downpour_core::id::{JobId, SessionId, VariableId};
use downpour_core::mix::mix64;
use downpour_core::spec::{JobSpec, VariableSpec};
use downpour_core::view::JobView;
use downpour_proto::group::{Connection, Known};
use downpour_proto::transport::{self, LEADER_METADATA, MESSAGE_BYTES_MAX};
use downpour_proto::v1::{self, coordinator_client::CoordinatorClient};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::Error;
use crate::backoff::Backoff;

/// The generated client of one member.
pub type Member = CoordinatorClient<Connection>;

/// For one call, retries included.
const DEADLINE_DEFAULT: Duration = Duration::from_secs(10);
/// For one attempt: a member that hangs is left for another.
const ATTEMPT: Duration = Duration::from_secs(2);
const BACKOFF: Backoff =
    Backoff { first: Duration::from_millis(10), max: Duration::from_millis(500) };
/// Members that a leader hint may add to those the caller gave.
const HINTED_MAX: usize = 16;

/// The coordinator group. A cheap clone; all clones share connections and what they know of the leader.
///
/// Each call goes to the member that led last, follows the hint of one that does not lead, goes on to the next member when one fails, and
/// waits a little longer each time, until its deadline.
#[derive(Clone)]
pub struct Coordinators {
    shared: Arc<Shared>,
    deadline: Duration,
}

struct Shared {
    addresses: Vec<String>,
    seed: u64,
    calls: AtomicU64,
    members: Mutex<Members>,
    /// Told with each call: who knows less of the group refuses it.
    known: Known,
}

struct Members {
    channels: HashMap<String, Channel>,
    /// Whom the next attempt asks.
    target: String,
    /// Where the members are: as the group last said, then those of the caller's that it did not name.
    addresses: Vec<String>,
    /// Position in the coordinators' log of what it said.
    version: u64,
}

impl Coordinators {
    /// The members at these addresses (`host:port`); some are enough, the leader is found through them. Connects when first used.
    ///
    /// # Errors
    /// There is no address.
    pub fn new<A: Into<String>>(addresses: impl IntoIterator<Item = A>) -> Result<Self, Error> {
        let addresses: Vec<String> = addresses.into_iter().map(Into::into).collect();
        let Some(target) = addresses.first().cloned() else {
            return Err(Error::invalid("coordinators", "no address is given"));
        };
        // Differs between processes and between handles, which is all that jitter needs.
        let seed = RandomState::new().hash_one(std::process::id());
        let (channels, known) = (HashMap::new(), addresses.clone());
        let members = Members { channels, target, addresses: known, version: 0 };
        let members = Mutex::new(members);
        let known = Known::default();
        let shared = Shared { addresses, seed, calls: AtomicU64::new(0), members, known };
        Ok(Coordinators { shared: Arc::new(shared), deadline: DEADLINE_DEFAULT })
    }

    /// As [`Coordinators::new`], from `host:port,host:port`.
    ///
    /// # Errors
    /// There is no address.
    pub fn parse(addresses: &str) -> Result<Self, Error> {
        Coordinators::new(addresses.split(',').map(str::trim).filter(|address| !address.is_empty()))
    }

    /// The same group with another deadline for each call, retries included (10 s at first).
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// As given.
    #[must_use]
    pub fn addresses(&self) -> &[String] {
        &self.shared.addresses
    }

    /// One call of the Coordinator service; `what` names it in errors ("create job"). It may be sent more than once.
    ///
    /// # Errors
    /// The group refuses it, or nobody answers before the deadline.
    pub async fn call<T, F, Fut>(&self, what: &'static str, call: F) -> Result<T, Error>
    where
        F: Fn(Member) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_over(what, |connection| call(member(connection))).await
    }

    /// One call of any of the members' services.
    pub(crate) async fn call_over<T, F, Fut>(&self, what: &'static str, call: F) -> Result<T, Error>
    where
        F: Fn(Connection) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let end = Instant::now() + self.deadline;
        let mut hints_followed = 0;
        let mut attempt = 0;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let address = self.shared.target();
            let connection = self.shared.connection(&address)?;
            let status = match timeout(left.min(ATTEMPT), call(connection)).await {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded("the member did not answer"),
            };
            if let Some(error) = Error::permanent(what, &status) {
                return Err(error);
            }
            let hint = (status.code() == Code::Unavailable).then(|| leader(&status)).flatten();
            let hinted = self.shared.move_on(&address, hint);
            // A hint is followed at once, but two members that name each other must not make a busy loop.
            if hinted && hints_followed <= self.shared.members.lock().addresses.len() {
                hints_followed += 1;
                continue;
            }
            let wait = BACKOFF.wait(self.shared.next_seed(), attempt);
            if Instant::now() + wait >= end {
                let last = format!("{address}: {:?}: {}", status.code(), status.message());
                return Err(Error::Deadline { what, within: self.deadline, last });
            }
            sleep(wait).await;
            attempt += 1;
            hints_followed = 0;
        }
    }

    /// Creates a job, or joins one with an equal spec. The flag says whether it was created.
    ///
    /// # Errors
    /// [`Error::JobDiffers`] names the field in which an existing job differs.
    pub async fn create_job(&self, spec: &JobSpec) -> Result<(JobView, bool), Error> {
        spec.validate()?;
        let request = v1::CreateJobRequest { spec: Some(spec.into()) };
        let reply = self
            .call("create job", |mut member| {
                let request = request.clone();
                async move { member.create_job(request).await }
            })
            .await;
        match reply {
            Ok(reply) => Ok((view(reply.view)?, reply.created)),
            Err(error) => Err(self.explain_job(spec, error).await),
        }
    }

    /// The job of this name.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is none.
    pub async fn job(&self, name: &str) -> Result<JobView, Error> {
        let cluster = self.cluster().await?;
        let jobs = cluster.jobs.into_iter().filter_map(|job| job.view);
        let named = |view: &v1::JobView| view.spec.as_ref().is_some_and(|spec| spec.name == name);
        match { jobs }.find(named) {
            Some(found) => view(Some(found)),
            None => Err(Error::NotFound { what: "find job", message: format!("no job {name:?}") }),
        }
    }

    /// Deletes a job with everything in it.
    ///
    /// # Errors
    /// See [`Coordinators::call`].
    pub async fn delete_job(&self, job: JobId) -> Result<(), Error> {
        self.delete_job_if(job, 0).await
    }

    /// The same, if the job's view is of this version still (0: whatever it is).
    ///
    /// # Errors
    /// It has changed meanwhile ([`Refused::Conflict`](crate::Refused::Conflict)); see [`Coordinators::call`].
    pub async fn delete_job_if(&self, job: JobId, version: u64) -> Result<(), Error> {
        let request = v1::DeleteJobRequest { job: job.0, if_version: version };
        self.call("delete job", |mut member| async move { member.delete_job(request).await })
            .await
            .map(drop)
    }

    /// Defines variables, all or none; [`crate::Session::define`] says more.
    ///
    /// # Errors
    /// See [`Coordinators::call`].
    pub async fn define_variables(
        &self,
        job: JobId,
        session: SessionId,
        variables: &[VariableSpec],
    ) -> Result<v1::DefineVariablesReply, Error> {
        let request = v1::DefineVariablesRequest {
            job: job.0,
            session: session.0,
            variables: variables.iter().map(Into::into).collect(),
        };
        self.call("define variables", |mut member| {
            let request = request.clone();
            async move { member.define_variables(request).await }
        })
        .await
    }

    /// Says that all first values of these dense variables are pushed and acknowledged.
    ///
    /// # Errors
    /// See [`Coordinators::call`].
    pub async fn mark_initialized(
        &self,
        job: JobId,
        session: SessionId,
        variables: &[VariableId],
    ) -> Result<(), Error> {
        let variables = variables.iter().map(|variable| variable.0).collect();
        let request = v1::MarkInitializedRequest { job: job.0, session: session.0, variables };
        self.call("mark initialized", |mut member| {
            let request = request.clone();
            async move { member.mark_initialized(request).await }
        })
        .await
        .map(drop)
    }

    /// Sets a label of a job (an empty value removes it), if `expected` is given only where that is the value now. Returns whether it was
    /// changed and the value as it is now.
    ///
    /// # Errors
    /// See [`Coordinators::call`].
    pub async fn label_job(
        &self,
        job: JobId,
        key: &str,
        value: &str,
        expected: Option<&str>,
    ) -> Result<(bool, String), Error> {
        let request = v1::LabelJobRequest {
            job: job.0,
            key: key.into(),
            value: value.into(),
            expected: expected.map(Into::into),
        };
        let reply = self
            .call("label job", |mut member| {
                let request = request.clone();
                async move { member.label_job(request).await }
            })
            .await?;
        Ok((reply.changed, reply.value))
    }

    /// Becomes a member of a job. [`crate::Session`] does this and keeps it open.
    ///
    /// # Errors
    /// See [`Coordinators::call`].
    pub async fn open_session(
        &self,
        job: JobId,
        name: &str,
        kind: v1::SessionKind,
    ) -> Result<v1::OpenSessionReply, Error> {
        let request = v1::OpenSessionRequest {
            job: job.0,
            name: name.into(),
            kind: kind.into(),
            request_id: self.request_id(),
        };
        self.call("open session", |mut member| {
            let request = request.clone();
            async move { member.open_session(request).await }
        })
        .await
    }

    /// Keeps a session open; false when it is closed.
    ///
    /// # Errors
    /// See [`Coordinators::call`].
    pub async fn renew_session(
        &self,
        job: JobId,
        session: SessionId,
        progress: Option<v1::WorkerProgress>,
    ) -> Result<bool, Error> {
        let request = v1::RenewSessionRequest { job: job.0, session: session.0, progress };
        let reply = self
            .call("renew session", |mut member| {
                let request = request.clone();
                async move { member.renew_session(request).await }
            })
            .await?;
        Ok(reply.open)
    }

    /// Ends a session.
    ///
    /// # Errors
    /// See [`Coordinators::call`].
    pub async fn close_session(&self, job: JobId, session: SessionId) -> Result<(), Error> {
        let request = v1::CloseSessionRequest { job: job.0, session: session.0 };
        self.call("close session", |mut member| async move { member.close_session(request).await })
            .await
            .map(drop)
    }

    /// Everything that is committed.
    ///
    /// # Errors
    /// See [`Coordinators::call`].
    pub async fn cluster(&self) -> Result<v1::GetClusterReply, Error> {
        self.call("read the cluster", |mut member| async move {
            member.get_cluster(v1::GetClusterRequest {}).await
        })
        .await
    }

    /// A new `request_id`: unique among the calls of this process and, by its time and process number, among processes.
    #[must_use]
    pub fn request_id(&self) -> String {
        let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let nanos = since_epoch.map_or(0, |since| since.as_nanos() as u64);
        let count = self.shared.next_seed();
        format!("{:x}-{nanos:x}-{count:x}", std::process::id())
    }

    /// A member to keep a stream with: the `turn`th, whoever leads. Clients begin at different ones.
    pub(crate) fn any_member(&self, turn: usize) -> Result<Member, Error> {
        let address = {
            let addresses = &self.shared.members.lock().addresses;
            let at = (self.shared.seed as usize % addresses.len() + turn) % addresses.len();
            addresses[at].clone()
        };
        Ok(member(self.shared.connection(&address)?))
    }

    /// The group says where its members are, as of this position in its log. Those of them that are no addresses are passed over.
    pub(crate) fn learn(&self, addresses: Vec<String>, version: u64) {
        let known = addresses.into_iter().filter(|address| transport::channel(address).is_ok());
        let mut addresses: Vec<String> = known.take(HINTED_MAX).collect();
        let mut members = self.shared.members.lock();
        if addresses.is_empty() || version < members.version {
            return;
        }
        // The caller's come last: who was replaced one by one is found there at worst.
        let given = self.shared.addresses.iter().filter(|one| !addresses.contains(one)).cloned();
        let given: Vec<String> = given.collect();
        addresses.extend(given);
        let Members { channels, target, .. } = &mut *members;
        channels.retain(|address, _| addresses.contains(address) || address == target);
        (members.addresses, members.version) = (addresses, version);
        self.shared.known.raise(version);
    }

    /// Wait before reconnecting a stream for the `attempt`th time in a row.
    pub(crate) fn stream_backoff(&self, attempt: u32) -> Duration {
        BACKOFF.wait(self.shared.next_seed(), attempt)
    }

    /// Makes of "already exists" an error that names the field.
    async fn explain_job(&self, spec: &JobSpec, error: Error) -> Error {
        let exists =
            matches!(error, Error::Refused { code: crate::error::Refused::AlreadyExists, .. });
        if !exists {
            return error;
        }
        match self.job(&spec.name).await {
            Ok(view) => job_difference(&view.spec, spec).unwrap_or(error),
            Err(_) => error,
        }
    }
}

impl Shared {
    fn target(&self) -> String {
        self.members.lock().target.clone()
    }

    fn connection(&self, address: &str) -> Result<Connection, Error> {
        let mut members = self.members.lock();
        let channel = match members.channels.get(address) {
            Some(channel) => channel.clone(),
            None => transport::channel(address)?,
        };
        members.channels.insert(address.into(), channel.clone());
        Ok(self.known.over(channel))
    }

    /// `failed` did not answer: ask the hinted leader next, else the member after it. True when there is a new leader to ask.
    fn move_on(&self, failed: &str, hint: Option<String>) -> bool {
        let mut members = self.members.lock();
        if let Some(hint) = hint.filter(|hint| hint != failed) {
            let known = members.channels.contains_key(&hint) || members.addresses.contains(&hint);
            let room = members.channels.len() < members.addresses.len() + HINTED_MAX;
            if known || (room && transport::channel(&hint).is_ok()) {
                members.target = hint;
                return true;
            }
        }
        // Another call may have moved on already.
        if members.target == failed {
            let at = members.addresses.iter().position(|address| address == failed);
            let next = at.map_or(0, |at| (at + 1) % members.addresses.len());
            members.target = members.addresses[next].clone();
        }
        false
    }

    fn next_seed(&self) -> u64 {
        mix64(self.seed ^ self.calls.fetch_add(1, Ordering::Relaxed))
    }
}

fn member(connection: Connection) -> Member {
    CoordinatorClient::new(connection)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

fn leader(status: &Status) -> Option<String> {
    Some(status.metadata().get(LEADER_METADATA)?.to_str().ok()?.to_owned())
}

fn view(view: Option<v1::JobView>) -> Result<JobView, Error> {
    let answer = |problem: String| Error::Protocol { from: "the coordinator".into(), problem };
    let view = view.ok_or_else(|| answer("view is not given".into()))?;
    JobView::try_from(view).map_err(|invalid| answer(invalid.to_string()))
}

/// The first field in which two specs of one job differ.
pub(crate) fn job_difference(cluster: &JobSpec, wanted: &JobSpec) -> Option<Error> {
    let fields = [
        ("shards", u64::from(cluster.shards), u64::from(wanted.shards)),
        ("replicas", cluster.replicas.into(), wanted.replicas.into()),
        ("min_in_sync", cluster.min_in_sync.into(), wanted.min_in_sync.into()),
        ("seed", cluster.seed, wanted.seed),
    ];
    let (field, cluster, wanted_value) = fields.into_iter().find(|field| field.1 != field.2)?;
    Some(Error::JobDiffers {
        job: wanted.name.clone(),
        field,
        cluster: cluster.to_string(),
        wanted: wanted_value.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn members_that_were_replaced_are_asked_last_and_old_news_of_them_is_no_news() {
        let coordinators = Coordinators::parse("a:1,b:1").expect("addresses");
        let known = || coordinators.shared.members.lock().addresses.clone();
        coordinators.learn(vec!["b:1".into(), "c:1".into(), "no address".into()], 7);
        assert_eq!(known(), ["b:1", "c:1", "a:1"]);
        coordinators.learn(vec!["a:1".into(), "b:1".into()], 6);
        coordinators.learn(Vec::new(), 9);
        assert_eq!(
            known(),
            ["b:1", "c:1", "a:1"],
            "a member that is behind, one that knows nobody"
        );
        coordinators.learn(vec!["d:1".into()], 8);
        assert_eq!(known(), ["d:1", "a:1", "b:1"]);
        assert_eq!(coordinators.shared.known.now(), 8, "whoever knows less is not believed");
        // What fails is left for the members of now, then for those that were given.
        for next in ["b:1", "d:1", "a:1"] {
            let failed = coordinators.shared.target();
            coordinators.shared.move_on(&failed, None);
            assert_eq!(coordinators.shared.target(), next);
        }
    }
}
