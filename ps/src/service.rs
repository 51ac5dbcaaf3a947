//! The `Shard` service: clients pull and push.

use std::pin::Pin;
use std::sync::Arc;

use bytes::BytesMut;
use downpour_core::id::Incarnation;
use downpour_proto::v1;
use downpour_proto::v1::shard_server::Shard;
use futures::Stream;
use tonic::{Request, Response, Status, Streaming};

use crate::life::Process;
use crate::membership::Current;
use crate::{pull, push};

/// Answers clients.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) process: Arc<Process>,
    pub(crate) current: Current,
}

#[tonic::async_trait]
impl Shard for Service {
    type PushStream = Pin<Box<dyn Stream<Item = Result<v1::PushReply, Status>> + Send>>;

    async fn pull(
        &self,
        request: Request<v1::PullRequest>,
    ) -> Result<Response<v1::PullReply>, Status> {
        let _timer = self.process.metrics.pull_seconds.start_timer();
        let life = self.current.load_full();
        let reply = pull::answer(life.as_ref(), request.into_inner(), &mut BytesMut::new()).await?;
        Ok(Response::new(reply))
    }

    async fn push(
        &self,
        request: Request<Streaming<v1::PushRequest>>,
    ) -> Result<Response<Self::PushStream>, Status> {
        let requests = request.into_inner();
        let replies = push::serve(Arc::clone(&self.process), Arc::clone(&self.current), requests);
        Ok(Response::new(Box::pin(replies)))
    }
}

/// Whether a request is meant for this incarnation.
pub(crate) fn meant_for(life: Option<&Arc<crate::life::Life>>, incarnation: u64) -> bool {
    life.is_some_and(|life| life.me.incarnation == Incarnation(incarnation))
}
