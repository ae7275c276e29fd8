//! The code made of `proto/dnc/v1/dnc.proto` at build time. Nothing is written by hand here.

#![allow(missing_docs, clippy::all, rustdoc::all)]

tonic::include_proto!("dnc.v1");

/// The compiled proto with its imports, as a `google.protobuf.FileDescriptorSet`, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/dnc.bin"));
