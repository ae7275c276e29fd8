//! What an operator sees of a running service.

mod metrics;
mod traces;
