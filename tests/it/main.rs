//! Tests of the whole service over real sockets, against a real PostgreSQL.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, reason = "tests")]

mod address_book;
mod harness;

mod cli;
mod deploy;
mod docs;
mod examples;
mod files;
mod gateway;
mod grpc;
mod server;
mod store;
mod structure;
mod telemetry;
