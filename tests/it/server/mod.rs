//! Listeners and connections, and how a server ends.

mod connections;
mod drain;
mod refusals;
mod slow;
mod tls;
