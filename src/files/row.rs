//! What stands in one row of a file.

use std::borrow::Cow;

use prost_types::Timestamp;

use super::{
    json::Field,
    layout::{Layout, Times, Why},
    records::Record,
    time,
};
use crate::{
    domain::{Failure, Kind, REASON_CHARS_MAX},
    proto,
};

/// One row of a file.
#[derive(Debug)]
pub struct Row<'a> {
    /// The line on which it begins, counted from 1; in a JSON document the number of the element.
    pub line: u64,
    /// What the file was taken for, for people.
    pub layout: &'static str,
    /// What stands there.
    pub content: Content<'a>,
    /// The row as it came.
    pub(super) written: Written<'a>,
}

/// A row as it came.
#[derive(Clone, Copy, Debug)]
pub(super) enum Written<'a> {
    /// A CSV record, and the delimiter of its file.
    Csv(Record<'a>, u8),
    /// A JSON value; none when it was too long.
    Json(Option<&'a [u8]>),
}

/// What stands in a row.
#[derive(Debug)]
pub enum Content<'a> {
    /// The names of the columns. Only handed over to ask about a list.
    Header,
    /// Somebody who must not be written to; or, to ask about a list, somebody to ask about.
    Entry(Entry<'a>),
    /// Somebody who may be written to, as far as this file says.
    Excluded,
    /// Nothing that an entry can be made of.
    Unreadable(Unreadable<'a>),
}

/// An entry that a row names.
#[derive(Debug)]
pub struct Entry<'a> {
    /// The address.
    pub address: Cow<'a, str>,
    /// What it names; none when the row does not say.
    pub kind: Option<Kind>,
    /// Why; empty when the row does not say.
    pub reason: Cow<'a, str>,
    /// When the person opted out.
    pub unsubscribe_time: Option<Timestamp>,
    /// The reason was longer than the service takes, and was cut.
    pub is_reason_cut: bool,
    /// A provider's time was left away: it cannot be read, or is in the future.
    pub is_time_dropped: bool,
}

/// A row that no entry can be made of.
#[derive(Debug)]
pub struct Unreadable<'a> {
    /// The field at fault, empty when it is the whole line.
    pub field: &'static str,
    /// The code that callers branch on.
    pub code: &'static str,
    /// A sentence for people, without the row's text.
    pub message: String,
    /// What stands there, for a file of rejects.
    pub texts: Texts<'a>,
}

/// The texts of a row.
#[derive(Debug, Default)]
pub struct Texts<'a> {
    /// The address, or all that could be read.
    pub address: Cow<'a, str>,
    /// The type.
    pub kind: Cow<'a, str>,
    /// The reason.
    pub reason: Cow<'a, str>,
    /// The time of the opt-out.
    pub unsubscribed_at: Cow<'a, str>,
}

impl Entry<'_> {
    /// The entry as a message; `default_kind` is its type when the row does not say one.
    pub fn to_proto(&self, line: u64, default_kind: Option<Kind>) -> proto::Entry {
        proto::Entry {
            email: self.address.as_ref().to_owned(),
            r#type: self.kind.or(default_kind).map_or(0, Kind::number),
            reason: self.reason.as_ref().to_owned(),
            unsubscribe_time: self.unsubscribe_time,
            line,
            ..proto::Entry::default()
        }
    }
}

impl<'a> Unreadable<'a> {
    /// A line that is `why`, as the end of a sentence about it.
    pub(super) fn line(why: &str, text: impl Into<Cow<'a, str>>) -> Self {
        Self::of("", "INVALID_LINE", why, text)
    }

    /// A line that is too long to be kept.
    pub(super) fn too_long(why: &str) -> Self {
        Self::of("", "LINE_TOO_LONG", why, "")
    }

    fn of(field: &'static str, code: &'static str, why: &str, text: impl Into<Cow<'a, str>>) -> Self {
        let texts = Texts { address: text.into(), ..Texts::default() };
        Self { field, code, message: format!("The line {why}."), texts }
    }

    /// The message of the service's stream that stands for the row.
    pub fn to_proto(&self, line: u64, position: usize) -> proto::UnreadableEntry {
        proto::UnreadableEntry {
            position: position.try_into().unwrap_or(u32::MAX),
            line,
            field: self.field.to_owned(),
            code: self.code.to_owned(),
            message: self.message.clone(),
        }
    }
}

/// The cells of a row by their column.
pub(super) trait Cells<'a> {
    /// The text of a cell, empty when there is none there.
    ///
    /// # Errors
    /// What is wrong with it, as the end of a sentence about the line.
    fn text(&self, column: usize) -> Result<Cow<'a, str>, &'static str>;
}

impl<'a> Cells<'a> for Record<'a> {
    fn text(&self, column: usize) -> Result<Cow<'a, str>, &'static str> {
        let cell = str::from_utf8(self.cell(column).unwrap_or_default()).map_err(|_| super::decode::NOT_UTF8)?;
        Ok(Cow::Borrowed(super::unescape_formula(cell)))
    }
}

impl<'a> Cells<'a> for &[Field<'a>] {
    fn text(&self, column: usize) -> Result<Cow<'a, str>, &'static str> {
        match self.get(column).map(Field::text) {
            None => Ok(Cow::Borrowed("")),
            Some(text) => text.map_err(|_| "has half a character in it (a surrogate that stands alone)"),
        }
    }
}

/// How rows become entries.
pub(super) struct Rules {
    /// The caller has named a reason, which is better than one that is guessed.
    pub(super) is_reason_given: bool,
    /// Only addresses are wanted.
    pub(super) addresses_only: bool,
    /// Seconds since 1970.
    pub(super) now: i64,
}

impl Rules {
    /// What a row means whose address stands in the column `address`.
    pub(super) fn content<'a>(&self, layout: &Layout, address: usize, cells: &impl Cells<'a>) -> Content<'a> {
        // Only what is used of a row must be readable.
        let fault = std::cell::Cell::new(None);
        let text = |column: usize| {
            cells.text(column).unwrap_or_else(|why| {
                fault.set(Some(why));
                Cow::Borrowed("")
            })
        };
        let other = |column: usize| if column == address { Cow::Borrowed("") } else { text(column) };
        let address = text(address);
        if self.addresses_only {
            return match fault.get() {
                Some(why) => Content::Unreadable(Unreadable::line(why, address)),
                None => Content::Entry(entry(bare_address(address), None, Cow::Borrowed(""))),
            };
        }
        // An address that stands where other rows have their reason is none.
        let why = layout.why(other);
        let kind = layout.kind.map(other).unwrap_or_default();
        let reason = match why {
            Why::Excluded if fault.get().is_none() => return Content::Excluded,
            Why::Guessed(_) if self.is_reason_given => Cow::Borrowed(""),
            Why::Guessed(reason) => Cow::Borrowed(reason),
            Why::Reason(reason) => reason,
            Why::Excluded => Cow::Borrowed(""),
        };
        let own_time = if let Times::Own(column) = layout.time { text(column) } else { Cow::Borrowed("") };
        if let Some(why) = fault.get() {
            let mut unreadable = Unreadable::line(why, address);
            unreadable.texts.reason = reason;
            return Content::Unreadable(unreadable);
        }
        let mut entry = entry(bare_address(address), None, reason);
        let named = kind.trim();
        if !named.is_empty() {
            entry.kind = Kind::of_name(named);
            if entry.kind.is_none() {
                let failure = Failure::InvalidType;
                return Content::Unreadable(fault_of(entry, kind, own_time, failure, failure.message()));
            }
        }
        match &layout.time {
            Times::Own(_) if own_time.trim().is_empty() => {}
            Times::Own(_) => match time::rfc3339(&own_time) {
                Some(time) => entry.unsubscribe_time = Some(time),
                None => {
                    let message = "The time of the opt-out is none; write it as 2024-06-01T10:00:00Z.".to_owned();
                    return Content::Unreadable(fault_of(entry, kind, own_time, Failure::InvalidTime, message));
                }
            },
            Times::Provider(columns) => {
                // A fault in a time that is not needed costs nobody the entry.
                let written = columns.iter().filter_map(|column| cells.text(*column).ok()).find(|text| !text.trim().is_empty());
                if let Some(written) = written {
                    entry.unsubscribe_time = time::any(&written).filter(|time| time.seconds <= self.now);
                    entry.is_time_dropped = entry.unsubscribe_time.is_none();
                }
            }
        }
        Content::Entry(entry)
    }
}

fn fault_of<'a>(
    entry: Entry<'a>,
    kind: Cow<'a, str>,
    unsubscribed_at: Cow<'a, str>,
    failure: Failure,
    message: String,
) -> Unreadable<'a> {
    let texts = Texts { address: entry.address, kind, reason: entry.reason, unsubscribed_at };
    Unreadable { field: failure.field(), code: failure.code(), message, texts }
}

fn entry<'a>(address: Cow<'a, str>, kind: Option<Kind>, reason: Cow<'a, str>) -> Entry<'a> {
    let trimmed = reason.trim();
    // A text has at least as many bytes as characters, so ordinary reasons need no counting.
    let cut_at =
        if trimmed.len() > REASON_CHARS_MAX { trimmed.char_indices().nth(REASON_CHARS_MAX).map(|(at, _)| at) } else { None };
    let cut = cut_at.map(|at| Cow::Owned(trimmed[..at].to_owned()));
    Entry {
        address,
        kind,
        is_reason_cut: cut.is_some(),
        reason: cut.unwrap_or(reason),
        unsubscribe_time: None,
        is_time_dropped: false,
    }
}

/// The address in `<a@b.de>`, `Name <a@b.de>` and `mailto:a@b.de`; any other text as it is.
fn bare_address(text: Cow<'_, str>) -> Cow<'_, str> {
    let trimmed = text.trim();
    let may_be_wrapped = trimmed.ends_with('>') || trimmed.starts_with(['m', 'M', '<']);
    if !may_be_wrapped {
        return text;
    }
    let inner = match (trimmed.strip_suffix('>'), trimmed.rfind('<')) {
        (Some(start), Some(at)) => &start[at + 1..],
        _ => trimmed,
    };
    const SCHEME: &str = "mailto:";
    let inner = match inner.get(..SCHEME.len()) {
        Some(scheme) if scheme.eq_ignore_ascii_case(SCHEME) => {
            let address = &inner[SCHEME.len()..];
            address.split('?').next().unwrap_or(address)
        }
        _ => inner,
    };
    if inner.len() == trimmed.len() { text } else { Cow::Owned(inner.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_in_what_people_paste_is_found() {
        for (text, address) in [
            ("<a@b.de>", "a@b.de"),
            ("Ann B. <a@b.de>", "a@b.de"),
            ("\"B, Ann\" <a@b.de> ", "a@b.de"),
            ("mailto:a@b.de", "a@b.de"),
            ("MAILTO:a@b.de?subject=x", "a@b.de"),
            ("Ann <mailto:a@b.de>", "a@b.de"),
            ("<<a@b.de>", "a@b.de"),
            // As they are, which no rule takes.
            ("<a@b.de> Ann", "<a@b.de> Ann"),
            ("a@b.de, <c@d.de", "a@b.de, <c@d.de"),
            ("mailto@b.de", "mailto@b.de"),
            (" m@b.de", " m@b.de"),
            ("", ""),
            ("ü", "ü"),
            (">", ">"),
        ] {
            assert_eq!(bare_address(Cow::Borrowed(text)), address, "{text}");
        }
    }

    #[test]
    fn a_reason_is_cut_to_what_the_service_takes() {
        for (reason, kept, is_cut) in [
            ("bounce".to_owned(), "bounce".to_owned(), false),
            ("ü".repeat(64), "ü".repeat(64), false),
            (format!(" {} ", "ü".repeat(64)), format!(" {} ", "ü".repeat(64)), false),
            ("ü".repeat(65), "ü".repeat(64), true),
        ] {
            let entry = entry(Cow::Borrowed(""), None, Cow::Owned(reason));
            assert_eq!((&*entry.reason, entry.is_reason_cut), (kept.as_str(), is_cut));
        }
    }
}
