//! The code generated from `proto/dnc/v1/dnc.proto` at build time. Nothing here is written by hand.

#![allow(missing_docs, clippy::all, rustdoc::all)]

tonic::include_proto!("dnc.v1");

/// The compiled proto with its imports, as a `google.protobuf.FileDescriptorSet` for server
/// reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/dnc.bin"));
