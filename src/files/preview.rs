//! The first rows of a file as they are understood, for people to see before anything is stored.

use super::{
    row::{Content, Row},
    time,
};
use crate::domain::{Address, Kind};

/// Texts of rows that are kept, in bytes. Rows that people look at have a hundred each.
const BYTES_MAX: usize = 256 << 10;

/// What the first rows of a file were taken for.
#[derive(Debug, Default)]
pub struct Preview {
    /// What the file was taken for, for people; empty until its first row was read.
    pub layout: &'static str,
    /// The first rows. Less than asked for if they are very long.
    pub rows: Vec<PreviewRow>,
    rows_max: usize,
    bytes: usize,
}

/// What a row was taken for.
#[derive(Debug, PartialEq, Eq)]
pub struct PreviewRow {
    /// The line on which it begins, counted from 1.
    pub line: u64,
    /// The address in its canonical form; as it stands in the file if it has none.
    pub email: String,
    /// The name of its type.
    pub kind: String,
    /// Why; empty if the row does not say.
    pub reason: String,
    /// When the person opted out; empty if the row does not say.
    pub unsubscribed_at: String,
    /// Whether the row names somebody who may be written to, as far as the file says.
    pub is_excluded: bool,
}

impl Preview {
    /// Keeps at most `rows_max` rows.
    pub fn new(rows_max: usize) -> Self {
        Self { rows_max, ..Self::default() }
    }

    /// Takes a row, unless it has enough.
    pub fn row(&mut self, row: &Row<'_>) {
        if self.rows.len() >= self.rows_max {
            return;
        }
        // Each line of JSON has a layout of its own, and that of the first is the file's.
        if self.layout.is_empty() {
            self.layout = row.layout;
        }
        let mut shown = PreviewRow {
            line: row.line,
            email: String::new(),
            kind: Kind::Email.name().to_owned(),
            reason: String::new(),
            unsubscribed_at: String::new(),
            is_excluded: false,
        };
        match &row.content {
            Content::Header => return,
            Content::Excluded => shown.is_excluded = true,
            Content::Entry(entry) => {
                let kind = entry.kind.unwrap_or(Kind::Email);
                let canonical = Address::parse(kind, entry.address.as_ref().to_owned());
                shown.email = canonical.map_or_else(|_| entry.address.trim().to_owned(), |address| address.as_str().to_owned());
                shown.kind = kind.name().to_owned();
                shown.reason = entry.reason.trim().to_owned();
                shown.unsubscribed_at = entry.unsubscribe_time.map(time::text).unwrap_or_default();
            }
            Content::Unreadable(unreadable) => {
                shown.email = unreadable.texts.address.trim().to_owned();
                shown.kind = unreadable.texts.kind.trim().to_owned();
                shown.reason = unreadable.texts.reason.trim().to_owned();
                shown.unsubscribed_at = unreadable.texts.unsubscribed_at.trim().to_owned();
            }
        }
        let bytes = self.bytes + shown.email.len() + shown.kind.len() + shown.reason.len() + shown.unsubscribed_at.len();
        if bytes > BYTES_MAX {
            // No row after one that is missing.
            self.rows_max = 0;
            return;
        }
        self.bytes = bytes;
        self.rows.push(shown);
    }
}
