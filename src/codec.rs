//! How messages are read from the wire: as tonic's own codec for prost does it, but from one slice.
//!
//! tonic hands over a message as a buffer that is walked octet by octet through several layers; that the message stands in one piece there lets prost read
//! it several times as fast.

use std::marker::PhantomData;

use prost::{Message, bytes::Buf};
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder},
};
use tonic_prost::ProstCodec;

/// Writes `T` and reads `U`. Named in `build.rs`, for all generated code.
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

/// The reading half.
#[derive(Clone, Debug)]
pub struct SliceDecoder<U>(PhantomData<U>);

impl<U: Message + Default> Decoder for SliceDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        let whole = buffer.remaining();
        let message = if buffer.chunk().len() == whole {
            let message = U::decode(buffer.chunk());
            buffer.advance(whole);
            message
        } else {
            U::decode(buffer)
        };
        message.map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}
