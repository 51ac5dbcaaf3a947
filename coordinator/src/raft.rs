//! The replicated log: one group of members that agree on the order of commands.
//!
//! Follow a change: [`Handle::propose`] queues it, [`driver`] (the one owner of everything) appends it, [`log`] makes it durable,
//! [`peers`] carries it to the other members, and when a majority has it the driver applies it to the [`State`](crate::state::State),
//! publishes the new [`Cluster`](crate::state::Cluster) and answers by [`pending`]. Follow a read: [`Handle::read`] waits for a ReadIndex that
//! began after it was called.
//!
//! The order that everything rests on: what a message promises is on the disk before the message leaves. Only the driver sends, and it sends
//! such messages after [`log::Log::persist`] has returned. A member that may have lost its disk promises nothing at all: [`joining`].
//! The group itself changes by entries of the log ([`group`]); a member that is added while it runs asks who it is ([`entry`]).

pub mod driver;
pub(crate) mod entry;
mod group;
mod handle;
pub mod joining;
pub mod log;
pub mod mem_disk;
pub mod peers;
mod pending;
pub mod sled_disk;
mod snapshot_file;
mod tracing_drain;

pub use driver::{Driver, Fatal, Options};
pub use handle::{Error, Handle, Member, Status, Wish, WishKind};
