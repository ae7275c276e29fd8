//! Do-Not-Contact lists as a service.
//!
//! Five rooms, and imports between them run one way only:
//!
//! * [`domain`]: what is true about addresses, entries, keys and imports. Pure.
//! * [`store`]: where they are kept. The only room that speaks SQL.
//! * [`grpc`]: how they are asked for. The only room that speaks tonic's server side.
//! * [`gateway`]: HTTP/JSON, as a client of the gRPC API. The only room that speaks axum.
//! * [`server`] and [`cli`]: put the others together.
//!
//! The crate is the program `dnc`; what is public here serves its own tests and benchmarks.

pub mod budget;
pub mod cli;
pub mod codec;
pub mod config;
pub mod domain;
#[cfg(test)]
mod fuzz;
pub mod gateway;
pub mod grpc;
pub mod postgres;
pub mod proto;
pub mod records;
pub mod running;
pub mod server;
pub mod store;
pub mod telemetry;

/// Faster than the system's where many small texts are made and given up on several threads, and gives memory back. It stands here and not in `main`, so that
/// benchmarks measure what is run.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
