//! The `Shard` service, with a bound on what decoding a request allocates: two bytes on the wire can become a struct of a hundred, so a
//! request's messages are counted in its bytes before they are decoded.

use std::convert::Infallible;

use bytes::{Buf, Bytes};
use downpour_core::spec::SHARDS_MAX;
use downpour_proto::transport::MESSAGE_BYTES_MAX;
use downpour_proto::v1::shard_server::{SERVICE_NAME, Shard, ShardServer};
use downpour_proto::{Invalid, v1};
use prost::Message;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
use tonic::codec::{Codec, DecodeBuf, Decoder};
use tonic::codegen::{Body, BoxFuture, Context, Poll, StdError, http};
use tonic::server::{Grpc, NamedService, StreamingService, UnaryService};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

use crate::service::Service;

/// Messages inside the parts of one request: decoded, they need about as much as the largest message.
const ITEMS_MAX: usize = 1 << 19;

/// Where a request has lists of messages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lists {
    /// Number of the field of parts.
    parts: u32,
    /// In a part.
    items: &'static [List],
}

/// A field that is a list of messages, and those inside them.
#[derive(Clone, Copy, Debug)]
struct List {
    field: u32,
    inside: &'static [List],
}

const fn list(field: u32, inside: &'static [List]) -> List {
    List { field, inside }
}

pub(crate) const PULL: Lists = Lists { parts: 3, items: &[list(3, &[]), list(4, &[])] };
pub(crate) const PUSH: Lists = Lists { parts: 7, items: &[list(4, &[])] };
/// Records; in them pushes with their updates, modes of variables, and the steps at the end of a round.
pub(crate) const REPLICATE: Lists = Lists { parts: 3, items: &[list(5, RECORD)] };
const RECORD: &[List] = &[
    list(3, &[list(5, &[])]),
    list(4, &[]),
    list(72, &[list(2, &[list(3, &[])])]),
    list(73, &[list(2, &[])]),
];

/// Decodes a request that arrived as a frame.
///
/// # Errors
/// It is no such message, or has more in it than a request may.
pub(crate) fn decode<T: Message + Default>(lists: Lists, request: Bytes) -> Result<T, Status> {
    lists.check(&request)?;
    T::decode(request).map_err(|error| Status::invalid_argument(error.to_string()))
}

impl Lists {
    /// # Errors
    /// The request has more parts than a job can have shards, or too much in them.
    fn check(self, request: &[u8]) -> Result<(), Invalid> {
        let (mut parts, mut items) = (0, 0);
        for_each_list(request, |field, part| {
            if field == self.parts {
                parts += 1;
                count(part, self.items, &mut items);
            }
        });
        let too_many = |what, max| Invalid::new("parts", format!("have more than {max} {what}"));
        if parts > SHARDS_MAX as usize {
            return Err(too_many("elements", SHARDS_MAX as usize));
        }
        if items > ITEMS_MAX {
            return Err(too_many("messages in all", ITEMS_MAX));
        }
        Ok(())
    }
}

/// Adds the messages of these lists.
fn count(message: &[u8], lists: &[List], items: &mut usize) {
    for_each_list(message, |field, element| {
        if let Some(list) = lists.iter().find(|list| list.field == field) {
            *items += 1;
            if !list.inside.is_empty() {
                count(element, list.inside, items);
            }
        }
    });
}

/// Calls `each` with the number and the bytes of every field of a message that has a length. Ends where the message is malformed: decoding
/// gets no further and says what is wrong.
fn for_each_list(mut message: &[u8], mut each: impl FnMut(u32, &[u8])) {
    while let Ok((field, wire_type)) = decode_key(&mut message) {
        if wire_type == WireType::LengthDelimited {
            let Ok(len) = decode_varint(&mut message) else { return };
            let body = &message[..message.len().min(usize::try_from(len).unwrap_or(usize::MAX))];
            each(field, body);
            message.advance(body.len());
        } else if skip_field(wire_type, field, &mut message, DecodeContext::default()).is_err() {
            return;
        }
    }
}

/// Protobuf, counted before it is decoded.
#[derive(Clone, Debug)]
struct Counted<T, U> {
    lists: Lists,
    codec: ProstCodec<T, U>,
}

impl<T, U> Codec for Counted<T, U>
where
    T: Message + 'static,
    U: Message + Default + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = CountedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        self.codec.encoder()
    }

    fn decoder(&mut self) -> Self::Decoder {
        CountedDecoder { lists: self.lists, decoder: self.codec.decoder() }
    }
}

#[derive(Debug)]
struct CountedDecoder<U> {
    lists: Lists,
    decoder: ProstDecoder<U>,
}

impl<U: Message + Default> Decoder for CountedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // The buffer is one piece.
        self.lists.check(buffer.chunk())?;
        self.decoder.decode(buffer)
    }
}

fn grpc<T, U>(lists: Lists) -> Grpc<Counted<T, U>>
where
    T: Message + 'static,
    U: Message + Default + 'static,
{
    Grpc::new(Counted { lists, codec: ProstCodec::default() })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

/// Routes the methods of `Shard`, as the generated server does.
#[derive(Clone, Debug)]
pub(crate) struct BoundedServer(pub(crate) Service);

impl NamedService for BoundedServer {
    const NAME: &'static str = SERVICE_NAME;
}

impl<B> tonic::codegen::Service<http::Request<B>> for BoundedServer
where
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let service = self.0.clone();
        match request.uri().path() {
            "/downpour.v1.Shard/Pull" => {
                Box::pin(async move { Ok(grpc(PULL).unary(service, request).await) })
            }
            "/downpour.v1.Shard/Push" => {
                Box::pin(async move { Ok(grpc(PUSH).streaming(service, request).await) })
            }
            // It has no others, and says so.
            _ => ShardServer::new(service).call(request),
        }
    }
}

impl UnaryService<v1::PullRequest> for Service {
    type Response = v1::PullReply;
    type Future = BoxFuture<Response<v1::PullReply>, Status>;

    fn call(&mut self, request: Request<v1::PullRequest>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move { service.pull(request).await })
    }
}

impl StreamingService<v1::PushRequest> for Service {
    type Response = v1::PushReply;
    type ResponseStream = <Service as Shard>::PushStream;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, request: Request<Streaming<v1::PushRequest>>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move { service.push(request).await })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pull(parts: usize, items: usize) -> Vec<u8> {
        let part = v1::PullPart {
            rows: vec![v1::PullRows::default(); items],
            dense: vec![v1::PullDense::default(); items],
            ..Default::default()
        };
        v1::PullRequest { parts: vec![part; parts], ..Default::default() }.encode_to_vec()
    }

    fn push(parts: usize, items: usize) -> Vec<u8> {
        let part =
            v1::PushPart { updates: vec![v1::Update::default(); items], ..Default::default() };
        v1::PushRequest { job: 1, parts: vec![part; parts], ..Default::default() }.encode_to_vec()
    }

    fn records(parts: usize, items: usize) -> Vec<u8> {
        let updates = vec![v1::ResolvedUpdate::default(); items.saturating_sub(2)];
        let push = v1::PushRecord { updates, ..Default::default() };
        let record = v1::Record { body: Some(v1::record::Body::Push(push)), ..Default::default() };
        let records = if items == 0 { Vec::new() } else { vec![record] };
        let shard = v1::ShardRecords { records, ..Default::default() };
        let shards = vec![shard; parts];
        v1::ReplicateRequest { shards, ..Default::default() }.encode_to_vec()
    }

    #[test]
    fn more_parts_than_shards_and_more_in_them_than_fits_are_refused_before_decoding() {
        let (parts_max, half) = (SHARDS_MAX as usize, ITEMS_MAX / 2);
        for (lists, fits) in [
            (PULL, [pull(0, 0), pull(parts_max, 0), pull(1, half)]),
            (PUSH, [push(0, 0), push(parts_max, 0), push(2, half)]),
            (REPLICATE, [records(0, 0), records(parts_max, 0), records(2, half)]),
        ] {
            assert!(fits.iter().all(|request| lists.check(request).is_ok()), "{lists:?}");
        }
        for (lists, many) in [
            (PULL, [pull(parts_max + 1, 0), pull(1, half + 1)]),
            (PUSH, [push(parts_max + 1, 0), push(2, half + 1)]),
            (REPLICATE, [records(parts_max + 1, 0), records(2, half + 1)]),
        ] {
            for request in many {
                assert_eq!(lists.check(&request).map_err(|invalid| invalid.field), Err("parts"));
                // A group in front, of a field that nobody knows, hides nothing.
                let hidden = [&[0x7b, 0x08, 0x01, 0x7c][..], &request].concat();
                assert!(lists.check(&hidden).is_err(), "{lists:?}");
            }
        }
    }
}
