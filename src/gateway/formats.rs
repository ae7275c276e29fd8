//! Files: CSV (RFC 4180) and NDJSON, streamed. What is written here can be read here again.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};
use futures_util::{Stream, StreamExt, stream::try_unfold};
use serde::Serialize;
use tokio::time::timeout;
use tonic::Streaming;

use super::{
    ANSWER_TIMEOUT,
    answers::{time_text, type_name},
    body::{IDLE_TIMEOUT, Octets},
    error::Problem,
    query::Query,
    requests,
};
use crate::{
    proto::{Entry, ExportEntriesResponse, ImportEntriesRequest, ImportOptions},
    records::{self, Csv, Record, TOO_LONG, Unclosed},
};

/// A format of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A header row and a row an entry.
    Csv,
    /// A JSON object a line.
    Ndjson,
}

impl Format {
    /// `?format=`, CSV unless it is there.
    pub(super) fn of_query(query: &Query) -> Result<Self, Problem> {
        match query.get("format").as_deref() {
            None | Some("csv") => Ok(Self::Csv),
            Some("ndjson") => Ok(Self::Ndjson),
            Some(_) => Err(Problem::invalid("format", "expected csv or ndjson")),
        }
    }

    fn headers(self) -> [(header::HeaderName, HeaderValue); 2] {
        let (media_type, disposition) = match self {
            Self::Csv => ("text/csv; charset=utf-8", "attachment; filename=\"dnc.csv\""),
            Self::Ndjson => ("application/x-ndjson", "attachment; filename=\"dnc.ndjson\""),
        };
        [
            (header::CONTENT_TYPE, HeaderValue::from_static(media_type)),
            (header::CONTENT_DISPOSITION, HeaderValue::from_static(disposition)),
        ]
    }

    /// What comes before the first entry.
    pub fn head(self) -> &'static str {
        match self {
            Self::Csv => "email,type,reason,createdAt,addedBy\r\n",
            Self::Ndjson => "",
        }
    }

    /// Some entries as a part of a file.
    ///
    /// # Errors
    /// Never for entries that came out of the service.
    pub fn write(self, entries: Vec<Entry>) -> Result<Vec<u8>, std::io::Error> {
        match self {
            Self::Csv => write_csv(entries).map_err(std::io::Error::other),
            Self::Ndjson => write_ndjson(entries).map_err(std::io::Error::other),
        }
    }
}

/// A file made of an export's messages as they come. If the export breaks, so does the body: a file that just ends early would
/// look whole.
pub(super) fn file(format: Format, messages: Streaming<ExportEntriesResponse>) -> Response {
    let head = futures_util::stream::once(async move { Ok(format.head().as_bytes().to_vec()) });
    let parts = try_unfold(messages, move |mut messages| async move {
        let message = timeout(ANSWER_TIMEOUT, messages.message()).await.map_err(std::io::Error::other)?;
        let Some(message) = message.map_err(std::io::Error::other)? else { return Ok(None) };
        Ok::<_, std::io::Error>(Some((format.write(message.entries)?, messages)))
    });
    (format.headers(), Body::from_stream(head.chain(parts))).into_response()
}

fn write_csv(entries: Vec<Entry>) -> Result<Vec<u8>, csv::Error> {
    let mut writer = csv::WriterBuilder::new().terminator(csv::Terminator::CRLF).from_writer(Vec::new());
    for entry in entries {
        let created_at = time_text(entry.create_time.unwrap_or_default());
        let cells =
            [&harmless(&entry.email), type_name(entry.r#type()), &harmless(&entry.reason), created_at.as_str(), &entry.added_by];
        writer.write_record(cells)?;
    }
    writer.into_inner().map_err(|error| error.into_error().into())
}

fn write_ndjson(entries: Vec<Entry>) -> Result<Vec<u8>, serde_json::Error> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Line {
        email: String,
        r#type: &'static str,
        reason: String,
        created_at: String,
        added_by: String,
    }
    let mut bytes = Vec::new();
    for entry in entries {
        let r#type = type_name(entry.r#type());
        let created_at = time_text(entry.create_time.unwrap_or_default());
        let line = Line { email: entry.email, r#type, reason: entry.reason, created_at, added_by: entry.added_by };
        serde_json::to_writer(&mut bytes, &line)?;
        bytes.push(b'\n');
    }
    Ok(bytes)
}

/// Entries in one message of a streamed import.
const MESSAGE_ENTRIES: usize = 2_000;

/// Bytes of text in such a message; fewer entries fill it when they are long.
const MESSAGE_BYTES: usize = 256 << 10;

/// Why lines were refused here, by the index of the entry that went to the service in their place.
pub(super) type Faults = Arc<Mutex<Vec<(u64, String)>>>;

/// Octets that are read in one go.
const SLICE_BYTES: usize = 8 << 10;

/// How long entries wait for others to fill a message with.
const FLUSH_AFTER: Duration = Duration::from_secs(1);

/// As many causes as an answer describes.
const FAULTS_MAX: usize = 10_000;

/// A file on its way in: makes messages of its lines as they come, and keeps no more than a message of them. What no entry can be made of goes
/// to the service as an entry without an address, so that it is refused and counted there, and its cause is kept in `faults`.
pub(super) fn messages(
    format: Format,
    body: Octets,
    options: ImportOptions,
    faults: Faults,
) -> impl Stream<Item = Result<ImportEntriesRequest, Problem>> + Send + 'static {
    try_unfold(Reader::new(format, body, options, faults), |mut reader| async move {
        Ok(reader.next().await?.map(|message| (message, reader)))
    })
}

struct Reader {
    /// None once it has been read to its end.
    body: Option<Octets>,
    /// What has come and is not read yet.
    chunk: Bytes,
    lines: Lines,
    read: Read,
    options: Option<ImportOptions>,
}

impl Reader {
    fn new(format: Format, body: Octets, options: ImportOptions, faults: Faults) -> Self {
        Self {
            body: Some(body),
            chunk: Bytes::new(),
            lines: Lines::of(format),
            read: Read { entries: Vec::new(), bytes: 0, count: 0, faults },
            options: Some(options),
        }
    }

    async fn next(&mut self) -> Result<Option<ImportEntriesRequest>, Problem> {
        while self.read.entries.len() < MESSAGE_ENTRIES
            && self.read.bytes < MESSAGE_BYTES
            && let Some(body) = &mut self.body
        {
            // A sender that is always faster than this must not keep others from the processor, nor must a large chunk.
            tokio::task::yield_now().await;
            if !self.chunk.is_empty() {
                // In slices, since a chunk of short lines becomes many times its size.
                let slice = self.chunk.split_to(self.chunk.len().min(SLICE_BYTES));
                self.lines.push(&slice, &mut self.read)?;
                continue;
            }
            // What has come goes on its way when nothing more comes for a moment; a live but slow sender must not look idle.
            let waiting = if self.read.entries.is_empty() { IDLE_TIMEOUT } else { FLUSH_AFTER };
            let chunk = match timeout(waiting, body.next()).await {
                Err(_) if !self.read.entries.is_empty() => break,
                Err(_) => return Err(Problem::timed_out()),
                Ok(chunk) => chunk?,
            };
            match chunk {
                Some(chunk) => self.chunk = chunk,
                None => {
                    self.lines.finish(&mut self.read)?;
                    self.body = None;
                }
            }
        }
        // A slice may hold more than a message.
        let rest = self.read.entries.split_off(self.read.entries.len().min(MESSAGE_ENTRIES));
        self.read.bytes = rest.iter().map(text_bytes).sum();
        let entries = std::mem::replace(&mut self.read.entries, rest);
        let options = self.options.take();
        Ok((!entries.is_empty() || options.is_some()).then_some(ImportEntriesRequest { entries, options, unreadable: Vec::new() }))
    }
}

fn text_bytes(entry: &Entry) -> usize {
    entry.email.len() + entry.reason.len()
}

/// What was read so far.
struct Read {
    entries: Vec<Entry>,
    /// Bytes of the texts of `entries`.
    bytes: usize,
    count: u64,
    faults: Faults,
}

impl Read {
    fn entry(&mut self, entry: Entry) {
        self.bytes += text_bytes(&entry);
        self.entries.push(entry);
        self.count += 1;
    }

    fn fault(&mut self, cause: String) {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        if faults.len() < FAULTS_MAX {
            faults.push((self.count, cause));
        }
        drop(faults);
        self.entry(Entry::default());
    }
}

enum Lines {
    Csv { records: Box<Csv>, columns: Option<Columns> },
    Ndjson(records::Lines),
}

/// Where the columns are, as the header row says.
struct Columns {
    email: usize,
    r#type: Option<usize>,
    reason: Option<usize>,
}

impl Lines {
    fn of(format: Format) -> Self {
        match format {
            Format::Csv => Self::Csv { records: Box::new(Csv::new(b',')), columns: None },
            Format::Ndjson => Self::Ndjson(records::Lines::default()),
        }
    }

    fn push(&mut self, chunk: &[u8], read: &mut Read) -> Result<(), Problem> {
        match self {
            Self::Csv { records, columns } => records.push(chunk, |record| csv_record(columns, record, read)),
            Self::Ndjson(lines) => lines.push(chunk, |number, line| {
                ndjson_line(number, line, read);
                Ok(())
            }),
        }
    }

    fn finish(&mut self, read: &mut Read) -> Result<(), Problem> {
        match self {
            Self::Csv { records, columns } => records.finish(|record| csv_record(columns, record, read)),
            Self::Ndjson(lines) => lines.finish(|number, line| {
                ndjson_line(number, line, read);
                Ok(())
            }),
        }
    }
}

impl From<Unclosed> for Problem {
    fn from(unclosed: Unclosed) -> Self {
        let place = format!("line {}", unclosed.line);
        Self::invalid(
            &place,
            "a quoted cell that starts here or just after is not closed; mend it and send the whole file again, what is stored is skipped",
        )
    }
}

fn ndjson_line(number: u64, line: Option<&[u8]>, read: &mut Read) {
    let Some(line) = line else { return read.fault(TOO_LONG.to_owned()) };
    let line = line.strip_prefix("\u{feff}".as_bytes()).filter(|_| number == 1).unwrap_or(line);
    if line.trim_ascii().is_empty() {
        return;
    }
    match requests::entry(line) {
        Ok(entry) => read.entry(entry),
        Err(cause) => read.fault(cause),
    }
}

fn csv_record(columns: &mut Option<Columns>, record: Record<'_>, read: &mut Read) -> Result<(), Problem> {
    let Some(columns) = columns else {
        if record.is_too_long {
            return Err(Problem::invalid("header", TOO_LONG));
        }
        let names = record.cells().map(String::from_utf8_lossy);
        let names: Vec<String> =
            names.map(|name| name.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}').to_lowercase()).collect();
        let place = |wanted: &str| names.iter().position(|name| name == wanted);
        let expected = "expected a first row with the names of the columns, separated by commas, email among them";
        let email = place("email").ok_or_else(|| Problem::invalid("header", expected))?;
        *columns = Some(Columns { email, r#type: place("type"), reason: place("reason") });
        return Ok(());
    };
    if record.is_too_long {
        read.fault(TOO_LONG.to_owned());
        return Ok(());
    }
    let text = |column: Option<usize>| column.and_then(|column| record.cell(column)).map_or(Ok(""), std::str::from_utf8);
    match (record.cell(columns.email).is_some(), text(Some(columns.email)), text(columns.r#type), text(columns.reason)) {
        (true, Ok(email), Ok(r#type), Ok(reason)) => read.entry(Entry {
            email: as_meant(email).to_owned(),
            r#type: requests::type_number(r#type.trim()),
            reason: as_meant(reason).to_owned(),
            ..Entry::default()
        }),
        (false, ..) => read.fault("has no cell in the column email".to_owned()),
        _ => read.fault("is not UTF-8".to_owned()),
    }
    Ok(())
}

/// A cell that no spreadsheet takes for a formula: one that would be gets an apostrophe in front. So does one that starts with apostrophes before
/// such a character, which makes it possible to take the apostrophe away again.
pub fn harmless(cell: &str) -> std::borrow::Cow<'_, str> {
    if starts_formula(cell.trim_start_matches('\'')) { format!("'{cell}").into() } else { cell.into() }
}

/// The cell that [`harmless`] was given.
pub fn as_meant(cell: &str) -> &str {
    match cell.strip_prefix('\'') {
        Some(rest) if starts_formula(rest.trim_start_matches('\'')) => rest,
        _ => cell,
    }
}

fn starts_formula(cell: &str) -> bool {
    cell.starts_with(['=', '+', '-', '@', '\t', '\r'])
}

#[cfg(test)]
mod tests {
    use super::{super::body::Encoding, *};
    use crate::{
        fuzz::{pieces, spelled},
        records::RECORD_BYTES_MAX,
    };

    #[test]
    fn a_cell_is_no_formula_and_still_means_itself() {
        for cell in ["=1+1", "+tag@example.com", "-x@example.com", "@SUM(1)", "\tx", "'=x", "''+x", "'", "'a", "plain", ""] {
            let written = harmless(cell);
            assert!(!starts_formula(&written), "{cell:?}");
            assert_eq!(as_meant(&written), cell);
        }
        assert_eq!(harmless("o'brien@example.ie"), "o'brien@example.ie");
    }

    /// The entries of a file, and the causes of those that stand for bad lines.
    type AsRead = (Vec<Entry>, Vec<(u64, String)>);

    /// All that a file is read as, cut into chunks of every size.
    fn read(format: Format, file: &[u8]) -> Vec<AsRead> {
        let each = [1, 2, 3, 7, 64, file.len().max(1)].map(|size| {
            let mut lines = Lines::of(format);
            let mut read = Read { entries: Vec::new(), bytes: 0, count: 0, faults: Faults::default() };
            for chunk in file.chunks(size) {
                lines.push(chunk, &mut read).expect("a header");
            }
            lines.finish(&mut read).expect("a header");
            let faults = read.faults.lock().expect("not poisoned").clone();
            (read.entries, faults)
        });
        each.into()
    }

    /// All that a file is read as in pieces of this size, and why no more of it is read.
    fn read_on(format: Format, file: &[u8], size: usize) -> (AsRead, Option<String>) {
        let mut lines = Lines::of(format);
        let mut read = Read { entries: Vec::new(), bytes: 0, count: 0, faults: Faults::default() };
        let pushed = file.chunks(size).try_for_each(|chunk| lines.push(chunk, &mut read));
        let problem = pushed.and_then(|()| lines.finish(&mut read)).err().map(Problem::into_message);
        let faults = read.faults.lock().expect("not poisoned").clone();
        ((read.entries, faults), problem)
    }

    #[test]
    fn any_bytes_are_the_same_entries_in_any_pieces() {
        const ALPHABET: [&str; 28] = [
            "secret@b.de",
            "b.de",
            ",",
            ",",
            "\n",
            "\n",
            "\r\n",
            "\r",
            "\"",
            "\"",
            "\"\"",
            " ",
            "\u{feff}",
            "email",
            "Email",
            "type",
            "reason",
            "domain",
            "x",
            "'=",
            "{\"email\":",
            "\"secret@b.de\"",
            "{\"email\":\"a@b.de\"}",
            "}",
            "null",
            "\u{feff}email\n",
            "\0",
            "ü",
        ];
        let hold = |bytes: &[u8], size: usize| {
            for format in [Format::Csv, Format::Ndjson] {
                let whole = read_on(format, bytes, bytes.len().max(1));
                assert_eq!(read_on(format, bytes, size), whole);
                let ((entries, faults), problem) = whole;
                assert!(faults.iter().all(|(index, _)| entries[*index as usize] == Entry::default()));
                let messages = faults.iter().map(|(_, cause)| cause).chain(&problem);
                assert!(messages.into_iter().all(|message| !message.contains('@') && !message.contains("secret")));
            }
        };
        bolero::check!(name = "formats").for_each(|bytes| {
            let (size, rest) = pieces(bytes);
            hold(rest, size);
            hold(spelled(&rest[..rest.len().min(48)], &ALPHABET).as_bytes(), size);
        });
    }

    #[test]
    fn files_are_read_in_any_pieces_and_bad_lines_fail_alone() {
        let long = "x".repeat(RECORD_BYTES_MAX + 1);
        let csv = format!(
            "\u{feff}Reason, EMAIL ,other,type\r\nbounce,a@example.com,x,\n\n\"said \"\"no\"\",\ntwice\",b.de,,domain\r\nonly\n,'+c@example.com\n{long},d@example.com\n'=1,e@example.com,,person"
        );
        let expected = [
            ("a@example.com", "bounce", 0),
            ("b.de", "said \"no\",\ntwice", 2),
            ("", "", 0),
            ("+c@example.com", "", 0),
            ("", "", 0),
            ("e@example.com", "=1", -1),
        ];
        for (entries, faults) in read(Format::Csv, csv.as_bytes()) {
            let entries: Vec<_> = entries.iter().map(|e| (e.email.as_str(), e.reason.as_str(), e.r#type)).collect();
            assert_eq!(entries, expected);
            assert_eq!(faults.iter().map(|fault| fault.0).collect::<Vec<_>>(), [2, 4]);
        }
        let ndjson = format!(
            "\u{feff}{{\"email\":\"a@example.com\"}}\r\n\n{{\"email\":5}}\nnonsense\n{long}\n{{\"email\":\"b.de\",\"type\":\"domain\",\"reason\":null}}"
        );
        for (entries, faults) in read(Format::Ndjson, ndjson.as_bytes()) {
            let entries: Vec<_> = entries.iter().map(|e| (e.email.as_str(), e.r#type)).collect();
            assert_eq!(entries, [("a@example.com", 0), ("", 0), ("", 0), ("", 0), ("b.de", 2)]);
            assert_eq!(faults[0], (1, "email: expected a string".to_owned()));
            assert_eq!(faults[2], (3, TOO_LONG.to_owned()));
        }
    }

    #[tokio::test]
    async fn a_chunk_of_very_short_lines_is_not_kept_as_entries_all_at_once() {
        for (format, file) in
            [(Format::Csv, "email\n".to_owned() + &"a\n".repeat(500_000)), (Format::Ndjson, "1\n".repeat(500_000))]
        {
            let octets = Octets::new(Encoding::Plain, Body::from(file), None);
            let mut reader = Reader::new(format, octets, ImportOptions::default(), Faults::default());
            let mut count = 0;
            while let Some(message) = reader.next().await.ok().flatten() {
                count += message.entries.len();
                assert!(message.entries.len() + reader.read.entries.len() <= MESSAGE_ENTRIES + SLICE_BYTES / 2);
            }
            assert_eq!(count, 500_000);
        }
    }

    #[tokio::test]
    async fn long_lines_are_not_kept_until_there_are_many() {
        let octets = Octets::new(Encoding::Plain, Body::from(format!("{}\n", "a".repeat(60_000)).repeat(200)), None);
        let mut reader = Reader::new(Format::Csv, octets, ImportOptions::default(), Faults::default());
        reader.lines.push(b"email\n", &mut reader.read).expect("a header");
        let mut count = 0;
        while let Some(message) = reader.next().await.ok().flatten() {
            count += message.entries.len();
            assert!(message.entries.iter().map(text_bytes).sum::<usize>() <= MESSAGE_BYTES + RECORD_BYTES_MAX);
        }
        assert_eq!(count, 200);
    }

    #[test]
    fn a_quote_that_is_never_closed_ends_the_import_and_names_the_line() {
        for tail in ["", &"x@example.com,b\n".repeat(9_000)] {
            let file = format!("email,reason\na@example.com,b\n\"c@example.com,b\nd@example.com,b\n{tail}");
            let mut lines = Lines::of(Format::Csv);
            let mut read = Read { entries: Vec::new(), bytes: 0, count: 0, faults: Faults::default() };
            let problem = lines.push(file.as_bytes(), &mut read).and_then(|()| lines.finish(&mut read)).expect_err("not closed");
            assert!(problem.into_message().starts_with("line 3: "));
            assert_eq!(read.entries.len(), 1);
        }
    }

    #[test]
    fn csv_is_quoted_as_rfc_4180_says() {
        let entry = Entry { email: "a@example.com".into(), reason: "said \"no\", twice".into(), ..Entry::default() };
        let text = String::from_utf8(Format::Csv.write(vec![entry]).expect("CSV")).expect("UTF-8");
        assert_eq!(text, "a@example.com,email,\"said \"\"no\"\", twice\",1970-01-01T00:00:00.000Z,\r\n");
    }
}
