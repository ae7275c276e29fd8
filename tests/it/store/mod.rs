//! The database: its connections and their failures, statements, replicas and poolers.

mod crash;
mod faults;
mod migrations;
mod plans;
mod pool;
mod pooler;
mod replica;
mod retention;
