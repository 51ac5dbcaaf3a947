//! Connections of frames (`downpour_proto::frame`) to one server.

use std::collections::VecDeque;

use downpour_proto::frame::{Frame, Hello, Kind};
use downpour_proto::framed::{Connection, failure};
use downpour_proto::v1;
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

/// What travels on one connection: requests one way, their answers in the same order the other.
trait Exchange {
    type Request;

    /// Appends a request.
    fn send(&mut self, request: Self::Request, connection: &mut Connection);

    /// Takes the answer to the oldest request.
    ///
    /// # Errors
    /// It is none, and the connection cannot be trusted any more.
    fn receive(&mut self, frame: Frame) -> Result<(), Status>;
}

/// Connects, and carries requests until the connection or the queue ends. Returns why.
async fn run<E: Exchange>(
    address: &str,
    hello: Hello,
    requests: &mut mpsc::UnboundedReceiver<E::Request>,
    exchange: &mut E,
) -> Status {
    let broken = |error: std::io::Error| Status::unavailable(error.to_string());
    let mut connection = match Connection::open(address, hello).await {
        Ok(connection) => connection,
        Err(error) => return broken(error),
    };
    loop {
        tokio::select! {
            request = requests.recv() => {
                let Some(request) = request else { return Status::cancelled("not needed any more") };
                exchange.send(request, &mut connection);
            }
            turned = connection.turn() => {
                if let Err(error) = turned {
                    return broken(error);
                }
                loop {
                    match connection.take() {
                        Ok(Some(frame)) => {
                            if let Err(status) = exchange.receive(frame) {
                                return status;
                            }
                            // Whoever waited for it copies it out of this buffer, before more comes in.
                            tokio::task::yield_now().await;
                        }
                        Ok(None) => break,
                        Err(invalid) => return Status::internal(invalid.to_string()),
                    }
                }
            }
        }
    }
}

/// Pulls from one server: a connection that is made when it is first needed and again after it broke.
#[derive(Debug, Default)]
pub(crate) struct Pulls(Mutex<Option<mpsc::UnboundedSender<Call>>>);

#[derive(Debug)]
struct Call {
    request: v1::PullRequest,
    answer: oneshot::Sender<Result<v1::PullReply, Status>>,
}

#[derive(Default)]
struct Pulling {
    next: u64,
    waiting: VecDeque<(u64, oneshot::Sender<Result<v1::PullReply, Status>>)>,
}

impl Pulls {
    /// One pull.
    ///
    /// # Errors
    /// What the server says, or that it cannot be reached.
    pub(crate) async fn pull(
        &self,
        address: &str,
        hello: Hello,
        request: v1::PullRequest,
    ) -> Result<v1::PullReply, Status> {
        let (answer, reply) = oneshot::channel();
        self.send(address, hello, Call { request, answer });
        reply.await.unwrap_or_else(|_| Err(Status::unavailable("the connection broke")))
    }

    fn send(&self, address: &str, hello: Hello, call: Call) {
        let mut calls = self.0.lock();
        let call = match &*calls {
            None => call,
            Some(open) => match open.send(call) {
                Ok(()) => return,
                Err(mpsc::error::SendError(call)) => call,
            },
        };
        let (sender, mut queue) = mpsc::unbounded_channel();
        // It cannot be closed: `queue` is here.
        _ = sender.send(call);
        *calls = Some(sender);
        let address = address.to_owned();
        tokio::spawn(async move {
            let mut pulling = Pulling::default();
            let status = run(&address, hello, &mut queue, &mut pulling).await;
            queue.close();
            while let Some(call) = queue.recv().await {
                _ = call.answer.send(Err(status.clone()));
            }
            for (_, answer) in pulling.waiting {
                _ = answer.send(Err(status.clone()));
            }
        });
    }
}

impl Exchange for Pulling {
    type Request = Call;

    fn send(&mut self, Call { request, answer }: Call, connection: &mut Connection) {
        self.next += 1;
        connection.send(Kind::Pull, self.next, &request);
        self.waiting.push_back((self.next, answer));
    }

    fn receive(&mut self, Frame { kind, request, body }: Frame) -> Result<(), Status> {
        let (_, answer) = self
            .waiting
            .pop_front()
            .filter(|(number, _)| *number == request)
            .ok_or_else(|| Status::internal("an answer to another pull"))?;
        let reply = match kind {
            Kind::Pulled => {
                v1::PullReply::decode(body).map_err(|error| Status::internal(error.to_string()))
            }
            Kind::Failed => Err(failure(body)),
            _ => return Err(Status::internal("an answer that is none to a pull")),
        };
        // Whoever asked may have given up.
        _ = answer.send(reply);
        Ok(())
    }
}

struct Pushing<F>(F);

/// Sends requests in order until the connection or the queue ends; `report` gets the replies. Returns why it ended.
pub(crate) async fn push(
    address: &str,
    hello: Hello,
    mut requests: mpsc::UnboundedReceiver<v1::PushRequest>,
    report: impl FnMut(v1::PushReply),
) -> Status {
    run(address, hello, &mut requests, &mut Pushing(report)).await
}

impl<F: FnMut(v1::PushReply)> Exchange for Pushing<F> {
    type Request = v1::PushRequest;

    fn send(&mut self, request: v1::PushRequest, connection: &mut Connection) {
        connection.send(Kind::Push, request.request, &request);
    }

    fn receive(&mut self, Frame { kind, body, .. }: Frame) -> Result<(), Status> {
        match kind {
            Kind::Pushed => {
                let reply = v1::PushReply::decode(body);
                (self.0)(reply.map_err(|error| Status::internal(error.to_string()))?);
                Ok(())
            }
            Kind::Failed => Err(failure(body)),
            _ => Err(Status::internal("an answer that is none to a push")),
        }
    }
}
