//! A mailing list that is asked about: its rows wait for their answers, and keep all their columns.

use std::collections::VecDeque;

use super::{
    Pack, escape_formula, json,
    row::{Content, Row, Unreadable, Written},
    write_csv_row,
};
use crate::proto::{CheckResult, EntryError};

/// Addresses in one request. The service takes 10,000; the answer to these fits 4 MiB with all that
/// it says.
const PART_ADDRESSES: usize = 2_000;

/// Bytes of rows in one part.
const PART_BYTES: usize = 256 << 10;

/// Bytes of an address that is asked about. None this long is one.
const ADDRESS_BYTES_MAX: usize = 1_000;

/// The columns that an answer adds.
const COLUMNS: [&str; 4] = ["suppressed", "reason", "matched", "error"];

/// Packs the rows of a mailing list into parts.
#[derive(Debug, Default)]
pub struct CheckPacker {
    /// How many columns the header has.
    columns: usize,
    part: CheckPart,
    full: VecDeque<CheckPart>,
}

/// Some rows of a mailing list: what is asked about them, and the rows themselves.
#[derive(Debug, Default)]
pub struct CheckPart {
    emails: Vec<String>,
    asked: usize,
    rows: Vec<Kept>,
    /// The rows as they are written, without line breaks after them.
    written: Vec<u8>,
}

#[derive(Debug)]
struct Kept {
    /// Where it ends in `written`.
    end: usize,
    form: Form,
    state: State,
}

/// How a row is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// CSV with this delimiter.
    Csv(u8),
    /// An object of JSON.
    Object,
    /// Any other line of JSON.
    Line,
}

#[derive(Debug)]
enum State {
    Header,
    Asked,
    /// No address could be read.
    Answered(Box<CheckResult>),
}

impl State {
    fn unreadable(line: u64, unreadable: &Unreadable<'_>) -> Self {
        let error = EntryError {
            field: unreadable.field.to_owned(),
            code: unreadable.code.to_owned(),
            message: unreadable.message.clone(),
            line,
            ..EntryError::default()
        };
        let email = unreadable.texts.address.as_ref().to_owned();
        Self::Answered(Box::new(CheckResult { email, suppressed: true, entry: None, error: Some(error) }))
    }
}

/// A row with its answer.
#[derive(Debug)]
pub struct Answered<'a> {
    /// The row as it came, without a line break.
    pub written: &'a [u8],
    /// The answer; none for a header.
    pub result: Option<&'a CheckResult>,
    form: Form,
}

impl Pack for CheckPacker {
    type Packed = CheckPart;

    fn row(&mut self, row: &Row<'_>) {
        if let (Content::Header, Written::Csv(record, _)) = (&row.content, &row.written) {
            self.columns = record.len();
        }
        let part = &mut self.part;
        let form = part.write(row, self.columns);
        let state = match &row.content {
            Content::Header => State::Header,
            Content::Entry(entry) if entry.address.len() > ADDRESS_BYTES_MAX => {
                State::unreadable(row.line, &Unreadable::line("has an address that is too long to be one", ""))
            }
            Content::Entry(entry) => {
                part.emails.push(entry.address.as_ref().to_owned());
                part.asked += 1;
                State::Asked
            }
            Content::Unreadable(unreadable) => State::unreadable(row.line, unreadable),
            // Whoever asks about a list asks about all rows, so there is none such; and if there
            // were, nobody would know whether it may be written to.
            Content::Excluded => State::Answered(Box::new(CheckResult { suppressed: true, ..CheckResult::default() })),
        };
        part.rows.push(Kept { end: part.written.len(), form, state });
        if part.rows.len() >= PART_ADDRESSES || part.written.len() >= PART_BYTES {
            self.full.push_back(std::mem::take(&mut self.part));
        }
    }

    fn is_empty(&self) -> bool {
        self.part.rows.is_empty() && self.full.is_empty()
    }

    fn next_full(&mut self) -> Option<CheckPart> {
        self.full.pop_front()
    }

    fn flush(&mut self) -> Option<CheckPart> {
        self.full.pop_front().or_else(|| (!self.part.rows.is_empty()).then(|| std::mem::take(&mut self.part)))
    }
}

impl CheckPart {
    /// A part that asks about one address, which stands in no file.
    pub fn push(&mut self, address: String) {
        self.written.extend_from_slice(address.as_bytes());
        self.rows.push(Kept { end: self.written.len(), form: Form::Line, state: State::Asked });
        self.emails.push(address);
        self.asked += 1;
    }

    /// The addresses that the service is asked about.
    pub fn take_emails(&mut self) -> Vec<String> {
        std::mem::take(&mut self.emails)
    }

    /// How many rows it has.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Writes a row as it came, with `columns` cells at least.
    fn write(&mut self, row: &Row<'_>, columns: usize) -> Form {
        match row.written {
            Written::Csv(record, delimiter) => {
                let missing = columns.saturating_sub(record.len());
                let cells = record.cells().chain(std::iter::repeat_n(&b""[..], missing));
                write_csv_row(&mut self.written, delimiter, cells, b"");
                Form::Csv(delimiter)
            }
            Written::Json(bytes) => {
                // A line break in JSON stands between values only.
                let one_line =
                    bytes.unwrap_or_default().iter().map(|byte| if matches!(byte, b'\r' | b'\n') { b' ' } else { *byte });
                self.written.extend(one_line);
                let is_object = bytes.is_some_and(|bytes| {
                    let is_valid = matches!(row.content, Content::Entry(_)) || json::element(bytes).is_ok();
                    bytes.starts_with(b"{") && is_valid
                });
                if is_object { Form::Object } else { Form::Line }
            }
        }
    }

    /// Hands over each row with its answer, in their order.
    ///
    /// # Errors
    /// False when these are not the answers to this part, and what `take` answers.
    pub fn answer<E>(&self, results: &[CheckResult], mut take: impl FnMut(Answered<'_>) -> Result<(), E>) -> Result<bool, E> {
        if results.len() != self.asked {
            return Ok(false);
        }
        let mut results = results.iter();
        let mut start = 0;
        for Kept { end, form, state } in &self.rows {
            let result = match state {
                State::Header => None,
                State::Asked => results.next(),
                State::Answered(result) => Some(&**result),
            };
            take(Answered { written: &self.written[start..*end], result, form: *form })?;
            start = *end;
        }
        Ok(true)
    }
}

impl Answered<'_> {
    /// Writes the row with the columns that say what was found, and a line break.
    pub fn write(&self, out: &mut Vec<u8>) {
        let entry = self.result.and_then(|result| result.entry.as_ref());
        let error = self.result.and_then(|result| result.error.as_ref()).map(|error| error.code.as_str());
        let (reason, matched) = (entry.map(|entry| entry.reason.as_str()), entry.map(|entry| entry.email.as_str()));
        let suppressed = if self.result.is_some_and(|result| !result.suppressed) { "false" } else { "true" };
        match self.form {
            Form::Csv(delimiter) => {
                out.extend_from_slice(self.written);
                out.push(delimiter);
                let (reason, matched) = (escape_formula(reason.unwrap_or_default()), escape_formula(matched.unwrap_or_default()));
                let cells = [suppressed, &reason, &matched, error.unwrap_or_default()];
                write_csv_row(out, delimiter, if self.result.is_none() { COLUMNS } else { cells }, b"\r\n");
            }
            Form::Object | Form::Line => {
                if let (Form::Object, Some(start)) = (self.form, self.written.strip_suffix(b"}")) {
                    let start = start.trim_ascii_end();
                    out.extend_from_slice(start);
                    if start != b"{" {
                        out.push(b',');
                    }
                } else {
                    out.push(b'{');
                    let is_known = self.result.is_some_and(|result| result.error.as_ref().is_none_or(|error| error.line == 0));
                    if let (true, Some(result)) = (is_known, self.result) {
                        out.extend_from_slice(format!("\"email\":{},", quoted(Some(&result.email))).as_bytes());
                    }
                }
                let (reason, matched, error) = (quoted(reason), quoted(matched), quoted(error));
                let added = format!("\"suppressed\":{suppressed},\"reason\":{reason},\"matched\":{matched},\"error\":{error}}}\n");
                out.extend_from_slice(added.as_bytes());
            }
        }
    }
}

/// A text as JSON has it; null when there is none.
fn quoted(text: Option<&str>) -> String {
    serde_json::to_string(&text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        files::{Format, Options, Purpose, Reader, Refused},
        proto::Entry,
    };

    /// The answer to a list on which `bad@b.de` is suppressed by its domain.
    fn answered(format: Format, file: &str) -> String {
        let mut reader = Reader::new(Options { format: Some(format), ..Options::new(Purpose::Check, 0) });
        let mut packer = CheckPacker::default();
        let mut take = |row: Row<'_>| {
            packer.row(&row);
            Ok::<_, Refused>(())
        };
        reader.push(file.as_bytes(), &mut take).and_then(|()| reader.finish(&mut take)).expect("a list");
        let mut out = Vec::new();
        while let Some(mut part) = packer.flush() {
            let results: Vec<CheckResult> = part
                .take_emails()
                .into_iter()
                .map(|email| {
                    let is_bad = email.starts_with("bad");
                    let entry = is_bad.then(|| Entry { email: "b.de".into(), reason: "=x".into(), ..Entry::default() });
                    CheckResult { email, suppressed: is_bad, entry, error: None }
                })
                .collect();
            let is_answered = part.answer(&results, |row| {
                row.write(&mut out);
                Ok::<_, Refused>(())
            });
            assert_eq!(is_answered, Ok(true));
            assert_eq!(part.answer(&[], |_| Ok::<_, Refused>(())), Ok(results.is_empty()));
        }
        String::from_utf8(out).expect("UTF-8")
    }

    #[test]
    fn a_list_keeps_its_rows_and_columns() {
        let csv = "name;email\n\"Doe; Ann\";bad@b.de\n'=x;ok@b.de\nonly\n";
        let expected = "name;email;suppressed;reason;matched;error\r\n\"Doe; Ann\";bad@b.de;true;'=x;b.de;\r\n\
                        '=x;ok@b.de;false;;;\r\nonly;;true;;;INVALID_LINE\r\n";
        assert_eq!(answered(Format::Csv, csv), expected);
        assert_eq!(answered(Format::Csv, "ok@b.de\nbad@b.de\n"), "ok@b.de,false,,,\r\nbad@b.de,true,'=x,b.de,\r\n");
        assert_eq!(answered(Format::Csv, "email\n"), "email,suppressed,reason,matched,error\r\n");
        assert_eq!(answered(Format::Csv, ""), "");
        let lines = "{\"n\":1,\"email\":\"bad@b.de\" }\n{\"email\":\"ok@b.de\"}\n{}\n\"ok@b.de\"\noops\n";
        let expected = "{\"n\":1,\"email\":\"bad@b.de\",\"suppressed\":true,\"reason\":\"=x\",\"matched\":\"b.de\",\"error\":null}\n\
                        {\"email\":\"ok@b.de\",\"suppressed\":false,\"reason\":null,\"matched\":null,\"error\":null}\n\
                        {\"suppressed\":true,\"reason\":null,\"matched\":null,\"error\":\"INVALID_LINE\"}\n\
                        {\"email\":\"ok@b.de\",\"suppressed\":false,\"reason\":null,\"matched\":null,\"error\":null}\n\
                        {\"suppressed\":true,\"reason\":null,\"matched\":null,\"error\":\"INVALID_LINE\"}\n";
        assert_eq!(answered(Format::Ndjson, lines), expected);
    }

    #[test]
    fn rows_that_nobody_can_read_are_suppressed() {
        let long = format!("email\n{}@b.de\n{}\n", "x".repeat(2_000), "x".repeat(70_000));
        for line in answered(Format::Csv, &long).lines().skip(1) {
            assert!(line.contains(",true,,,"), "{line:.40}");
        }
    }

    #[test]
    fn a_long_list_comes_in_parts() {
        let list: String = (0..5_000).map(|n| format!("ok{n}@b.de\n")).collect();
        let answered = answered(Format::Csv, &list);
        assert_eq!(answered, list.replace('\n', ",false,,,\r\n"));
    }
}
