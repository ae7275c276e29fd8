//! Tests of the whole service over real sockets, against a real PostgreSQL.

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, reason = "tests")]

mod address_book;
mod harness;

mod auth;
mod bombs;
mod budget;
mod caches;
mod cancel;
mod cli;
mod connections;
mod crash;
mod deploy;
mod docs;
mod docs_page;
mod drain;
mod examples;
mod faults;
mod files;
mod gateway;
mod import;
mod manual;
mod metrics;
mod migrations;
mod openapi;
mod operators;
mod page;
mod plans;
mod pool;
mod pooler;
mod refusals;
mod replica;
mod retention;
mod scrub;
mod slow;
mod sorted;
mod strict;
mod structure;
mod tls;
mod traces;
mod upstream;
mod whole_list;
