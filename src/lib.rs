//! Do-Not-Contact lists as a service.
//!
//! The crate has rooms, and imports between them run one way only; a test keeps it so.
//!
//! * [`wire`]: the generated messages, and what a call holds while it runs.
//! * [`domain`]: rules about addresses, entries, keys and imports. No I/O.
//! * [`store`]: the database. The only room that contains SQL.
//! * [`grpc`]: the service. The only room that uses tonic's server side.
//! * [`files`]: from the bytes of a file to entries, and back. No I/O.
//! * [`gateway`]: HTTP/JSON, as a client of the gRPC API. The only room that uses axum, beside
//!   [`server`].
//! * [`server`] and [`cli`]: put the others together.
//!
//! The crate exists for the program `dnc`. What is public is public for its tests and benchmarks,
//! and may change with any release.

pub mod cli;
pub mod config;
pub mod domain;
pub mod files;
#[cfg(test)]
mod fuzz;
pub mod gateway;
pub mod grpc;
#[cfg(feature = "dev")]
pub mod postgres;
pub mod server;
pub mod store;
pub mod telemetry;
pub mod wire;

pub use wire::proto;
