//! The client against a cluster in the test's process that can be made to misbehave.

#![expect(clippy::duplicate_mod, reason = "the same tests over both transports")]

mod coordinators;
mod fake;

/// The same tests over both ways to a server.
#[path = "."]
mod over_frames {
    const TRANSPORT: downpour_client::Transport = downpour_client::Transport::Framed;
    #[path = "session.rs"]
    mod session;
}

#[path = "."]
mod over_grpc {
    const TRANSPORT: downpour_client::Transport = downpour_client::Transport::Grpc;
    #[path = "session.rs"]
    mod session;
}
