//! The code made of `proto/dnc/v1/dnc.proto` at build time. Nothing is written by hand here.

#![allow(missing_docs, clippy::all, rustdoc::all)]

tonic::include_proto!("dnc.v1");

/// The compiled proto with its imports, as a `google.protobuf.FileDescriptorSet`, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/dnc.bin"));

/// A request header that asks for the head of the answer as soon as the caller was let in, and for the status at the end. Whoever
/// sends it need not send, nor even have, the messages of a call that is refused.
pub const EARLY_HEAD: http::HeaderName = http::HeaderName::from_static("dnc-early-head");
