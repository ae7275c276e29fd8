//! The rules about Do-Not-Contact entries, keys and imports, independent of transport and storage.
//!
//! Pure: no async, no I/O, no framework, no clock. Everything behind `grpc::convert` uses these
//! types. Code that holds an [`Address`] therefore never validates it again.

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
pub use failure::{Cause, Failure, REASON_CHARS_MAX, Rejected};
pub use fingerprint::{Fingerprint, Sent};
pub use key::{ApiKey, KeyHash, KeyId, KeyKind, KeyOwner, Scope, UserId, WorkspaceId};
pub use page::{Filter, Position};
