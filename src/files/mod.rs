//! Files that people bring: from bytes to rows, from rows to entries, and back.
//!
//! Below both the gateway and the command line, so that a file means the same over HTTP and in `dnc
//! import`. Everything here is pushed: bytes come in pieces of any size, and rows are handed over
//! as they end, in bounded memory; who waits for the bytes is no business of this room. It knows no
//! HTTP, no transport and no option parser.
//!
//! Files understand more than the API does, since people cannot mend what a machine wrote: `Name
//! <a@b.de>` is the address in it, and a reason that is too long is cut. Whether an entry may be
//! stored is decided by the service alone.

mod check;
mod decode;
mod escape;
mod json;
mod layout;
mod packer;
mod preview;
mod reader;
mod records;
mod row;
pub mod time;
mod write;

pub use self::{
    check::{Answered, CheckPacker, CheckPart},
    decode::{
        Compression, EXPANSION_FREE_BYTES, EXPANSION_MAX, ZSTD_WINDOW_LOG_MAX, decompress, expands_too_much, is_window_too_large,
    },
    escape::{escape_formula, unescape_formula},
    layout::Source,
    packer::{Counts, Pack, Packer},
    preview::{Preview, PreviewRow},
    reader::{Options, Purpose, Reader, Refused},
    row::{Content, Entry, Row, Texts, Unreadable},
    write::{Format, type_name, write_csv_row},
};
/// The one table of types, their names and numbers. The gateway has it from here, since it does not
/// see the domain.
pub use crate::domain::Kind;
