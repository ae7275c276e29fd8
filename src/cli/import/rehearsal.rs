//! What the service will say of a row, told beforehand by its own rule, and the table of a dry run.
//!
//! The service alone decides what is stored. It describes ten thousand rejected entries at most,
//! and knows nothing of the text of a row that could not be read; so the same rule is applied here
//! to each row as it is sent, and every rejected row gets into the file of rejects, whatever the
//! size of the import.

use std::io::{IsTerminal, Write};

use time::OffsetDateTime;

use super::rejects::Reject;
use crate::{
    cli::output::one_line,
    domain::{Entry, Failure, Kind, Reason},
    files::{self, Content, Row},
};

/// Rows that a dry run shows of each file on a terminal; everywhere else it shows all.
const SHOWN_ON_TERMINAL: u64 = 20;

/// What a row is taken for where it does not say.
#[derive(Clone, Debug)]
pub(super) struct Defaults {
    pub(super) kind: Kind,
    pub(super) reason: Reason,
}

impl Defaults {
    /// The row as a reject; none when the service takes it.
    pub(super) fn reject(&self, row: &Row<'_>) -> Option<Reject> {
        let or = |text: &str, default: &str| if text.trim().is_empty() { default.to_owned() } else { text.to_owned() };
        match &row.content {
            Content::Header | Content::Excluded => None,
            Content::Entry(entry) => {
                let failure = self.judge(entry).err()?;
                Some(Reject {
                    line: row.line,
                    email: entry.address.as_ref().to_owned(),
                    kind: entry.kind.unwrap_or(self.kind).name().to_owned(),
                    reason: or(&entry.reason, self.reason.as_str()),
                    unsubscribed_at: entry.unsubscribe_time.map(files::time::text).unwrap_or_default(),
                    code: failure.code(),
                    cause: failure.message(),
                })
            }
            Content::Unreadable(unreadable) => Some(Reject {
                line: row.line,
                email: unreadable.texts.address.as_ref().to_owned(),
                kind: or(&unreadable.texts.kind, self.kind.name()),
                reason: or(&unreadable.texts.reason, self.reason.as_str()),
                unsubscribed_at: unreadable.texts.unsubscribed_at.as_ref().to_owned(),
                code: unreadable.code,
                cause: unreadable.message.clone(),
            }),
        }
    }

    fn judge(&self, entry: &files::Entry<'_>) -> Result<(), Failure> {
        let kind = entry.kind.unwrap_or(self.kind);
        let (address, reason) = (entry.address.as_ref().to_owned(), entry.reason.as_ref().to_owned());
        let parsed = Entry::parse(kind, address, reason, &self.reason)?;
        if let Some(at) = entry.unsubscribe_time {
            let nanos = i128::from(at.seconds) * 1_000_000_000 + i128::from(at.nanos);
            let at = OffsetDateTime::from_unix_timestamp_nanos(nanos).map_err(|_| Failure::InvalidTime)?;
            parsed.with_unsubscribed_at(at, OffsetDateTime::now_utc())?;
        }
        Ok(())
    }
}

/// The table of a dry run.
#[derive(Debug)]
pub(super) struct Table {
    file: String,
    left: u64,
    defaults: Defaults,
    /// What is to be shown with the next part.
    lines: Vec<String>,
}

impl Table {
    /// A table of this file's rows.
    pub(super) fn new(file: &str, defaults: Defaults) -> Self {
        let left = if std::io::stdout().is_terminal() { SHOWN_ON_TERMINAL } else { u64::MAX };
        let lines = vec!["row\taddress\ttype\treason\tunsubscribed\trejected".to_owned()];
        Self { file: file.to_owned(), left, defaults, lines }
    }

    /// Adds a row, and what becomes of it.
    pub(super) fn add(&mut self, row: &Row<'_>, reject: Option<&Reject>) {
        if self.left == 0 {
            return;
        }
        self.left -= 1;
        let place = format!("{}:{}", self.file, row.line);
        let line = match (&row.content, reject) {
            (Content::Excluded, _) => format!("{place}\t\t\t\t\texcluded: may be written to, as the file says"),
            (_, Some(reject)) => {
                let [email, kind, reason, at] =
                    [&reject.email, &reject.kind, &reject.reason, &reject.unsubscribed_at].map(|text| one_line(text.trim()));
                format!("{place}\t{email}\t{kind}\t{reason}\t{at}\t{}", reject.cause)
            }
            (Content::Entry(entry), None) => {
                let kind = entry.kind.unwrap_or(self.defaults.kind).name();
                let said = entry.reason.trim();
                let reason = if said.is_empty() { self.defaults.reason.as_str() } else { said };
                let at = entry.unsubscribe_time.map(files::time::text).unwrap_or_default();
                format!("{place}\t{}\t{kind}\t{}\t{at}\t", one_line(entry.address.trim()), one_line(reason))
            }
            (Content::Header | Content::Unreadable(_), None) => return,
        };
        self.lines.push(line);
        if self.left == 0 {
            self.lines.push("…\t(send standard output to a file to see all rows)".to_owned());
        }
    }

    /// The lines that were added since the last time.
    pub(super) fn take(&mut self) -> Vec<String> {
        std::mem::take(&mut self.lines)
    }
}

/// Shows lines of the table.
pub(super) fn show(lines: &[String]) {
    let mut out = std::io::stdout().lock();
    for line in lines {
        // Whoever closed the pipe has seen enough.
        let _ = writeln!(out, "{line}");
    }
}
