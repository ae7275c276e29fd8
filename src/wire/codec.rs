//! A codec that decodes as tonic's own codec for prost does, but from one slice.
//!
//! tonic passes a message as a buffer that is read byte by byte through several layers. prost
//! decodes a plain slice several times as fast.

use std::marker::PhantomData;

use prost::{Message, bytes::Buf};
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder},
};
use tonic_prost::ProstCodec;

/// Encodes `T` and decodes `U`. `build.rs` names it for all generated code.
#[derive(Clone, Debug)]
pub struct SliceCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for SliceCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T: Message + Send + 'static, U: Message + Default + Send + 'static> Codec for SliceCodec<T, U> {
    type Encode = T;
    type Decode = U;
    type Encoder = <ProstCodec<T, U> as Codec>::Encoder;
    type Decoder = SliceDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::default().encoder()
    }

    fn decoder(&mut self) -> SliceDecoder<U> {
        SliceDecoder(PhantomData)
    }
}

/// The decoder of [`SliceCodec`].
#[derive(Clone, Debug)]
pub struct SliceDecoder<U>(PhantomData<U>);

impl<U: Message + Default> Decoder for SliceDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // This takes over the bytes without a copy.
        let message = buffer.copy_to_bytes(buffer.remaining());
        U::decode(message.as_ref()).map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, TryStreamExt, stream};
    use http_body::Frame;
    use http_body_util::StreamBody;
    use prost::bytes::Bytes;
    use tonic::Streaming;

    use super::*;
    use crate::wire::proto::{Entry, ImportEntriesRequest};

    #[test]
    fn messages_decode_the_same_in_any_pieces() {
        let entry = |email: &str| Entry { email: email.to_owned(), ..Entry::default() };
        let entries = vec![entry("a@example.com"), entry(&"b".repeat(300))];
        let sent = [
            ImportEntriesRequest { entries, ..ImportEntriesRequest::default() },
            ImportEntriesRequest::default(),
            ImportEntriesRequest { entries: vec![entry("c@example.com")], ..ImportEntriesRequest::default() },
        ];
        let mut bytes = Vec::new();
        for message in &sent {
            // In gRPC over HTTP/2 a compression flag and the length come before each message.
            bytes.push(0);
            bytes.extend((message.encoded_len() as u32).to_be_bytes());
            message.encode(&mut bytes).expect("a vector has room");
        }
        for size in [1, 2, 7, bytes.len()] {
            let frames = bytes.chunks(size).map(|piece| Ok::<_, Status>(Frame::data(Bytes::copy_from_slice(piece))));
            let body = StreamBody::new(stream::iter(frames.collect::<Vec<_>>()));
            let decoder = SliceDecoder::<ImportEntriesRequest>(PhantomData);
            let read = Streaming::new_request(decoder, body, None, None).try_collect::<Vec<_>>();
            let read = read.now_or_never().expect("all is there").expect("valid");
            assert_eq!(read, sent, "pieces of {size}");
        }
    }
}
