//! The clocks of the fake job, whichever server is asked: nobody waits, who may not begin asks again.

use std::time::Duration;

use downpour_core::clocks::Regime;
use downpour_core::id::SessionId;
use downpour_proto::v1::clock_server::Clock;
use downpour_proto::v1::{
    AdvanceReply, AdvanceRequest, EndRoundReply, EndRoundRequest, RoundPartReply, Seated,
    advance_reply, round_part_reply,
};
use tonic::{Request, Response, Status};

use super::shard::Server;

#[tonic::async_trait]
impl Clock for Server {
    async fn advance(
        &self,
        request: Request<AdvanceRequest>,
    ) -> Result<Response<AdvanceReply>, Status> {
        let AdvanceRequest { session, clock, contributes, leaves, seat, .. } = request.into_inner();
        let session = SessionId(session);
        let seated = {
            let mut state = self.cluster.state.lock();
            let consistency = state.view.as_ref().map(|view| view.consistency.clone());
            let board = &mut state.board;
            if let Some(consistency) = consistency.filter(|modes| modes != board.newest()) {
                board.set(Regime { since: board.boundary(), consistency });
            }
            if leaves {
                board.leave(session, seat);
            } else if let Some(seat) = board.ticked(session, seat, clock, contributes) {
                board.tick(session, seat);
            }
            while let Some(round) = board.due() {
                board.end_round(round);
            }
            let seat = board.seats().get(&session).copied().unwrap_or_default();
            Seated {
                may_begin: board.may_begin(session),
                clock: seat.clock,
                floor: board.floor(),
                counted: seat.counted,
                last_round: Some(board.last_round().into()),
                consistency: Some(board.at(seat.clock).into()),
                may_leave: false,
            }
        };
        if !seated.may_begin && !leaves {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let result = Some(advance_reply::Result::Seated(seated));
        Ok(Response::new(AdvanceReply { result }))
    }

    async fn end_round(
        &self,
        request: Request<EndRoundRequest>,
    ) -> Result<Response<EndRoundReply>, Status> {
        let done = Some(round_part_reply::Result::Done(true));
        let parts = request.into_inner().parts.into_iter();
        let parts = parts.map(|part| RoundPartReply { shard: part.shard, result: done });
        Ok(Response::new(EndRoundReply { parts: parts.collect() }))
    }
}
