//! Connections to servers, one for each life of a server.

use std::collections::HashMap;

use downpour_core::id::ServerRef;
use downpour_proto::transport::{self, MESSAGE_BYTES_MAX};
use downpour_proto::v1::shard_client::ShardClient;
use parking_lot::Mutex;
use tonic::transport::Channel;

use crate::state::JobState;

/// Made when they are first used, dropped when their server is replaced.
#[derive(Debug, Default)]
pub(crate) struct Servers(Mutex<HashMap<ServerRef, Channel>>);

impl Servers {
    /// `None` while the address of this life of the server is unknown.
    pub(crate) fn client(
        &self,
        state: &JobState,
        server: ServerRef,
    ) -> Option<ShardClient<Channel>> {
        let address = state.address(server)?;
        let mut channels = self.0.lock();
        let channel = match channels.get(&server) {
            Some(channel) => channel.clone(),
            None => {
                let channel = transport::channel(address).ok()?;
                channels.retain(|&known, _| state.address(known).is_some());
                channels.insert(server, channel.clone());
                channel
            }
        };
        Some(
            ShardClient::new(channel)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX),
        )
    }
}
