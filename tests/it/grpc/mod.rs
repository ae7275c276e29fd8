//! The gRPC service: each call, the keys that it takes, and the limits that it keeps.

mod auth;
mod budget;
mod cancel;
mod check;
mod delete;
mod export;
mod idempotency;
mod import;
mod list;
mod model;
mod scrub;
mod sorted;
mod summary;
