//! Do-Not-Contact lists as a service.
//!
//! The rooms, and imports between them run one way only:
//!
//! * [`wire`]: the generated messages and what a call holds while it runs.
//! * [`domain`]: what is true about addresses, entries, keys and imports. Pure.
//! * [`store`]: where they are kept. The only room that speaks SQL.
//! * [`grpc`]: how they are asked for. The only room that speaks tonic's server side.
//! * [`files`]: from the bytes of a file to entries, and back. Pure; for the two rooms below.
//! * [`gateway`]: HTTP/JSON, as a client of the gRPC API. The only room that speaks axum.
//! * [`server`] and [`cli`]: put the others together.
//!
//! The crate is the program `dnc`; what is public here serves its own tests and benchmarks.

pub mod cli;
pub mod config;
pub mod domain;
pub mod files;
#[cfg(test)]
mod fuzz;
pub mod gateway;
pub mod grpc;
pub mod postgres;
pub mod server;
pub mod store;
pub mod telemetry;
pub mod wire;

pub use wire::proto;

/// Faster than the system's where many small texts are made and given up on several threads, and gives memory back. It stands here and not in `main`, so that
/// benchmarks measure what is run.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
