//! What is true about Do-Not-Contact entries, keys and imports, whatever asks and wherever they are kept.
//!
//! Pure: no async, no I/O, no framework, no clock. Everything behind `grpc::convert` is built of these types, so that code
//! which holds an [`Address`] need not ask again whether it is one.

mod address;
mod batch;
mod entry;
mod error;
mod failure;
mod fingerprint;
mod key;
mod page;

pub use address::{Address, Kind};
pub use batch::{BATCH_ENTRIES_MIN, Batch, Sorted, Tally};
pub use entry::{Entry, Reason};
pub use error::Error;
pub use failure::{Cause, Failure, Rejected};
pub use fingerprint::{Fingerprint, Sent};
pub use key::{ApiKey, KeyHash, KeyId, KeyKind, KeyOwner, Scope, UserId, WorkspaceId};
pub use page::{Filter, Position};
