//! The client against a fake cluster over real gRPC.

mod coordinators;
mod fake;
mod session;
