//! Files that people bring: opened, unpacked, told apart, and read row by row in bounded memory.
//! What becomes of a row is the business of the command that reads it.
//!
//! A file is known by what is in it and not by its name's ending: exports are renamed, and standard
//! input has no name.

mod json;
mod layout;

use std::{
    fs::File,
    io::{self, BufReader, Cursor, Read},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Context, bail};

use self::layout::{Layout, NotAList, Why};
use crate::{
    domain::Address,
    gateway::as_meant,
    records::{Csv, Lines, RECORD_BYTES_MAX, Record, TOO_LONG, Unclosed},
};

/// What is looked at to tell what a file is.
const HEAD_BYTES: usize = 64 << 10;
const READ_BYTES: usize = 256 << 10;

/// A file that is open, and unpacked as it is read.
pub(super) struct Input {
    /// Its name for people.
    pub(super) name: String,
    /// How many octets it has, packed as it is; none when nobody can say.
    pub(super) bytes: Option<u64>,
    /// How many of them were read.
    pub(super) bytes_read: Arc<AtomicU64>,
    reader: Box<dyn Read + Send>,
}

/// How rows are read.
#[derive(Clone, Debug, Default)]
pub(super) struct Options {
    /// The name of the column of addresses, in place of those that are known.
    pub(super) column: Option<String>,
    /// Rows that begin on this line or before are left out.
    pub(super) skip_lines: u64,
    /// Only the addresses are wanted, of whatever list it is: to ask about them, not to put them on
    /// a list.
    pub(super) addresses_only: bool,
}

/// One row of a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Row {
    /// The line on which it begins, counted from 1; in a JSON document the number of the element.
    pub(super) line: u64,
    /// What the file was taken for.
    pub(super) layout: &'static str,
    /// What stands there.
    pub(super) content: Content,
}

/// What stands in a row.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Somebody who must not be written to.
    Entry {
        /// The text of the address.
        address: String,
        /// The text of the type; empty if there is none.
        kind: String,
        /// The reason; empty if there is none.
        reason: String,
    },
    /// Somebody who may be written to, as far as this file says.
    NotSuppressed,
    /// Nothing that can be read: its text as far as there is one, and why, as the end of a sentence
    /// about the row.
    Unreadable(String, String),
}

/// Why reading ended before the file did.
#[derive(Debug)]
pub(super) enum Ended {
    /// Whoever takes the rows wants no more.
    Stopped,
    /// The file cannot be read on, and why.
    Broken(String),
}

impl From<Unclosed> for Ended {
    fn from(unclosed: Unclosed) -> Self {
        Self::Broken(format!("has a quoted cell in the row of line {} that is not closed", unclosed.line))
    }
}

impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Self {
        Self::Broken(format!("cannot be read on ({error})"))
    }
}

/// Counts what is read through it.
struct Counting<R>(R, Arc<AtomicU64>);

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.0.read(buffer)?;
        self.1.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

impl Input {
    /// Opens a file; `-` is standard input.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let bytes_read = Arc::new(AtomicU64::new(0));
        let (name, bytes, raw): (_, _, Box<dyn Read + Send>) = if path == Path::new("-") {
            ("standard input".to_owned(), None, Box::new(io::stdin()))
        } else {
            let name = path.display().to_string();
            let file = File::open(path).with_context(|| format!("cannot read {name}"))?;
            let meta = file.metadata()?;
            if meta.is_dir() {
                bail!("{name} is a directory; name the files in it");
            }
            (name, meta.is_file().then_some(meta.len()), Box::new(file))
        };
        let reader = unpacked(Counting(raw, bytes_read.clone())).with_context(|| format!("cannot read {name}"))?;
        Ok(Self { name, bytes, bytes_read, reader })
    }

    /// Hands every row to `take`, until one is answered with an error.
    pub(super) fn read(self, options: &Options, mut take: impl FnMut(Row) -> Result<(), Ended>) -> Result<(), Ended> {
        let mut reader = self.reader;
        // A line of content: in a pipe, blank lines may come alone.
        let has_line = |head: &[u8]| {
            let content = head.strip_prefix("\u{feff}".as_bytes()).unwrap_or(head).trim_ascii_start();
            content.contains(&b'\n')
        };
        let mut head = head(&mut reader, has_line)?;
        let is_all = head.len() < HEAD_BYTES && !has_line(&head);
        if head.starts_with(&[0xff, 0xfe]) || head.starts_with(&[0xfe, 0xff]) {
            return Err(Ended::Broken("is UTF-16; save it as UTF-8".to_owned()));
        }
        if head.starts_with("\u{feff}".as_bytes()) {
            head.drain(.."\u{feff}".len());
        }
        let file = Path::new(&self.name).file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let mut rows = Rows { file: &file, options, layout: None, take: &mut take };
        match json::shape(&head, is_all) {
            Some(json::Shape::Document) => rows.document(BufReader::new(Cursor::new(head).chain(reader))),
            Some(json::Shape::Lines) => rows.json_lines(Cursor::new(head).chain(reader)),
            None => {
                let delimiter = delimiter(&head);
                rows.csv(delimiter, Cursor::new(head).chain(reader))
            }
        }
    }
}

/// As much of the start as `is_enough` wants, or fits, or there is.
fn head(reader: &mut impl Read, is_enough: impl Fn(&[u8]) -> bool) -> io::Result<Vec<u8>> {
    let mut head = vec![0; HEAD_BYTES];
    let mut count = 0;
    while count < HEAD_BYTES && !is_enough(&head[..count]) {
        match reader.read(&mut head[count..]) {
            Ok(0) => break,
            Ok(more) => count += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    head.truncate(count);
    Ok(head)
}

/// Unpacks what begins as gzip (RFC 1952) or zstd (RFC 8878) does.
fn unpacked(mut reader: Counting<Box<dyn Read + Send>>) -> io::Result<Box<dyn Read + Send>> {
    let head = head(&mut reader, |head| head.len() >= 4)?;
    let is_gzip = head.starts_with(&[0x1f, 0x8b]);
    let is_zstd = head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]);
    let whole = BufReader::with_capacity(READ_BYTES, Cursor::new(head).chain(reader));
    Ok(match (is_gzip, is_zstd) {
        (true, _) => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
        (_, true) => Box::new(zstd::stream::read::Decoder::with_buffer(whole)?),
        _ => Box::new(whole),
    })
}

/// The sign that stands between cells: the commonest in the first line, outside of quotes.
fn delimiter(head: &[u8]) -> u8 {
    let line = head.split(|byte| *byte == b'\n').find(|line| !line.trim_ascii().is_empty()).unwrap_or_default();
    let mut is_quoted = false;
    let mut counts = [(0, b','), (0, b';'), (0, b'\t')];
    for byte in line {
        is_quoted ^= *byte == b'"';
        if let Some(count) = counts.iter_mut().find(|(_, sign)| sign == byte)
            && !is_quoted
        {
            count.0 += 1;
        }
    }
    // Of equals the first one, which is the comma.
    counts.into_iter().rev().max_by_key(|(count, _)| *count).map_or(b',', |(_, sign)| sign)
}

/// A file's rows on their way to whoever takes them.
struct Rows<'a> {
    file: &'a str,
    options: &'a Options,
    /// The names of the columns, and what they mean; of JSON, those of the object before.
    layout: Option<(Vec<String>, Layout)>,
    take: &'a mut dyn FnMut(Row) -> Result<(), Ended>,
}

impl Rows<'_> {
    fn row(&mut self, line: u64, content: Content) -> Result<(), Ended> {
        if line <= self.options.skip_lines {
            return Ok(());
        }
        let layout = self.layout.as_ref().map_or("", |(_, layout)| layout.name);
        (self.take)(Row { line, layout, content })
    }

    fn layout_of(&self, names: &[String]) -> Result<Layout, NotAList> {
        match &self.options.column {
            Some(column) => Layout::with_address(names, column),
            None if self.options.addresses_only => Layout::any_with_addresses(names),
            None => Layout::of(names, self.file),
        }
    }

    fn csv(&mut self, delimiter: u8, mut reader: impl Read) -> Result<(), Ended> {
        let mut csv = Csv::new(delimiter);
        let mut buffer = vec![0; READ_BYTES];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => csv.push(&buffer[..count], |record| self.record(record))?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        csv.finish(|record| self.record(record))
    }

    fn record(&mut self, record: Record<'_>) -> Result<(), Ended> {
        let line = record.line;
        if record.is_too_long {
            return self.row(line, Content::Unreadable(String::new(), TOO_LONG.to_owned()));
        }
        let Some((_, layout)) = &self.layout else {
            return self.first_record(record);
        };
        let Some(address) = record.cell(layout.address) else {
            let text = record.cells().map(String::from_utf8_lossy).collect::<Vec<_>>().join(",");
            return self.row(line, Content::Unreadable(text, "has no cell in the column of addresses".to_owned()));
        };
        // Only what is used of a row must be readable.
        let is_utf8 = std::cell::Cell::new(true);
        let text = |column: usize| {
            let cell = record.cell(column).unwrap_or_default();
            let cell = std::str::from_utf8(cell).unwrap_or_else(|_| {
                is_utf8.set(false);
                ""
            });
            as_meant(cell).to_owned()
        };
        let mut content = content(layout, text);
        if !is_utf8.get() {
            content = Content::Unreadable(String::from_utf8_lossy(address).into_owned(), "is not UTF-8".to_owned());
        }
        self.row(line, content)
    }

    /// The first record says what the columns are, or is an entry itself.
    fn first_record(&mut self, record: Record<'_>) -> Result<(), Ended> {
        let cells: Vec<String> = record.cells().map(|cell| String::from_utf8_lossy(cell).into_owned()).collect();
        let is_entry = cells.iter().any(|cell| cell.contains('@'))
            || cells.first().is_some_and(|cell| Address::parse_any(cell.clone()).is_ok());
        if is_entry && self.options.column.is_none() {
            let texts: Vec<&str> = cells.iter().map(|cell| cell.trim()).collect();
            let layout = Layout::without_header(&texts);
            self.layout = Some((Vec::new(), layout));
            return self.record(record);
        }
        match self.layout_of(&cells) {
            Ok(layout) => {
                self.layout = Some((cells, layout));
                Ok(())
            }
            Err(NotAList::Other(what)) => Err(Ended::Broken(what.to_owned())),
            Err(NotAList::NoAddress) => Err(Ended::Broken(
                "has a first row that neither holds an address nor names a column of them; name it with --column".to_owned(),
            )),
        }
    }

    fn json_lines(&mut self, mut reader: impl Read) -> Result<(), Ended> {
        let mut lines = Lines::default();
        let mut buffer = vec![0; READ_BYTES];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => lines.push(&buffer[..count], |number, line| self.json_line(number, line))?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        lines.finish(|number, line| self.json_line(number, line))
    }

    fn json_line(&mut self, number: u64, line: Option<&[u8]>) -> Result<(), Ended> {
        let Some(line) = line else {
            return self.row(number, Content::Unreadable(String::new(), TOO_LONG.to_owned()));
        };
        let line = line.trim_ascii();
        if line.is_empty() {
            return Ok(());
        }
        match serde_json::from_slice(line) {
            Ok(element) => self.element(number, element),
            Err(_) => {
                let text = String::from_utf8_lossy(line).into_owned();
                self.row(number, Content::Unreadable(text, "is not valid JSON".to_owned()))
            }
        }
    }

    fn document(&mut self, reader: impl Read) -> Result<(), Ended> {
        let mut number = 0;
        json::document(reader, |element| {
            number += 1;
            self.element(number, element)
        })
    }

    fn element(&mut self, line: u64, element: json::Element) -> Result<(), Ended> {
        let json::Element::Cells { names, texts } = element else {
            return self.row(line, Content::Unreadable(String::new(), "is neither an object nor a text".to_owned()));
        };
        if texts.iter().map(String::len).sum::<usize>() > RECORD_BYTES_MAX {
            return self.row(line, Content::Unreadable(String::new(), TOO_LONG.to_owned()));
        }
        if self.layout.as_ref().is_none_or(|(known, _)| *known != names) {
            match self.layout_of(&names) {
                Ok(layout) => self.layout = Some((names, layout)),
                Err(NotAList::Other(what)) => return Err(Ended::Broken(what.to_owned())),
                Err(NotAList::NoAddress) => {
                    return self.row(line, Content::Unreadable(texts.join(","), "has no field with an address".to_owned()));
                }
            }
        }
        let Some((_, layout)) = &self.layout else { return Ok(()) };
        let content = content(layout, |column| texts.get(column).cloned().unwrap_or_default());
        self.row(line, content)
    }
}

fn content(layout: &Layout, text: impl Fn(usize) -> String) -> Content {
    match layout.why(&text) {
        Why::NotSuppressed => Content::NotSuppressed,
        Why::Reason(reason) => {
            Content::Entry { address: text(layout.address), kind: layout.kind.map(&text).unwrap_or_default(), reason }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::fuzz::{pieces, spelled};

    /// Gives no more than so many bytes at once, as a pipe may.
    struct Cut(Cursor<Vec<u8>>, usize);

    impl Read for Cut {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = buffer.len().min(self.1);
            self.0.read(&mut buffer[..count])
        }
    }

    /// The rows of a file that comes in pieces of this size, and how reading ended.
    fn rows_of(content: &[u8], size: usize, options: &Options) -> (Vec<Row>, String) {
        let bytes_read = Arc::new(AtomicU64::new(0));
        let raw: Box<dyn Read + Send> = Box::new(Cut(Cursor::new(content.to_vec()), size));
        let reader = match unpacked(Counting(raw, bytes_read.clone())) {
            Ok(reader) => reader,
            Err(error) => return (Vec::new(), error.to_string()),
        };
        let input = Input { name: "list.csv".to_owned(), bytes: None, bytes_read, reader };
        let mut seen = Vec::new();
        let ended = input.read(options, |row| {
            seen.push(row);
            Ok(())
        });
        (seen, format!("{ended:?}"))
    }

    #[test]
    fn any_bytes_are_the_same_rows_in_any_pieces() {
        const ALPHABET: [&str; 44] = [
            "a@b.de",
            "b.de",
            "x",
            ",",
            ",",
            ";",
            "\t",
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
            "type",
            "reason",
            "EmailAddress",
            "Reason",
            "BOUNCE",
            "domain",
            "created",
            "status",
            "recipient",
            "address",
            "'=",
            "{",
            "}",
            "[",
            "]",
            ":",
            "{\"email\":\"a@b.de\"}",
            "{\"address\":\"a@b.de\",\"tags\":[\"x\"]}",
            "{\"items\":[",
            "]}",
            "null",
            "1e5",
            "\"email\"",
            "\"a@b.de\"",
            "\\ud800",
            "[\"a@b.de\"",
            "ü",
        ];
        let hold = |bytes: &[u8], size: usize| {
            for options in [
                Options::default(),
                Options { column: Some("x".to_owned()), skip_lines: 2, addresses_only: false },
                Options { addresses_only: true, ..Options::default() },
            ] {
                let whole = rows_of(bytes, bytes.len().max(1), &options);
                assert_eq!(rows_of(bytes, size, &options), whole);
                assert!(whole.0.iter().all(|row| row.line > options.skip_lines));
                assert!(whole.0.is_sorted_by(|a, b| a.line < b.line));
            }
        };
        bolero::check!(name = "files").for_each(|bytes| {
            let (size, rest) = pieces(bytes);
            hold(rest, size);
            hold(spelled(&rest[..rest.len().min(48)], &ALPHABET).as_bytes(), size);
        });
    }

    fn rows(content: &[u8]) -> Result<Vec<(u64, String)>, String> {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(content).expect("written");
        let mut seen = Vec::new();
        let read = Input::open(file.path()).expect("a file").read(&Options::default(), |row| {
            seen.push((
                row.line,
                match row.content {
                    Content::Entry { address, kind, reason } => format!("{address}|{kind}|{reason}"),
                    Content::NotSuppressed => "not suppressed".to_owned(),
                    Content::Unreadable(_, cause) => cause,
                },
            ));
            Ok(())
        });
        match read {
            Ok(()) => Ok(seen),
            Err(Ended::Broken(what)) => Err(what),
            Err(Ended::Stopped) => Err(String::new()),
        }
    }

    #[test]
    fn a_file_is_known_by_what_is_in_it() {
        for (text, expected) in [
            ("a@b.de\r\n\r\nc@d.de", &[(1, "a@b.de||"), (3, "c@d.de||")][..]),
            ("b.de\nc.de\n", &[(1, "b.de||"), (2, "c.de||")]),
            ("\u{feff}email;reason\na@b.de;bounce\n", &[(2, "a@b.de||bounce")]),
            ("Email\tType\nb.de\tdomain\n", &[(2, "b.de|domain|")]),
            ("a@b.de,BOUNCE\nc@d.de, COMPLAINT\n", &[(1, "a@b.de||bounce"), (2, "c@d.de||complaint")]),
            (
                "status,reason,email,created\n5.1.1,\"550 no,\nreally\",a@b.de,1\n,,c@d.de,2\n",
                &[(2, "a@b.de||bounce"), (4, "c@d.de||bounce")],
            ),
            ("\u{feff}[{\"email\":\"a@b.de\"}]", &[(1, "a@b.de||")]),
            ("{\"email\":\"a@b.de\",\"data\":[]}", &[(1, "a@b.de||")]),
            ("email,note\na@b.de,\"two\nlines\"", &[(2, "a@b.de||")]),
            ("John,john@b.de\nAnn,ann@b.de", &[(1, "john@b.de||"), (2, "ann@b.de||")]),
            ("email,reason\n'=a@b.de,'-x\nonly\n", &[(2, "=a@b.de||-x"), (3, "only||")]),
            ("x,email\nonly\n", &[(2, "has no cell in the column of addresses")]),
            (
                "{\"email\":\"a@b.de\",\"type\":\"email\"}\noops}\n\n{\"email\":\"c@d.de\",\"reason\":null}\n[]\n{\"x\":1}",
                &[
                    (1, "a@b.de|email|"),
                    (2, "is not valid JSON"),
                    (4, "c@d.de||"),
                    (5, "is neither an object nor a text"),
                    (6, "has no field with an address"),
                ],
            ),
            (
                "{\"SuppressedDestinationSummaries\": [\n {\"EmailAddress\":\"a@b.de\",\"Reason\":\"BOUNCE\",\"LastUpdateTime\":1.5}],\n\"NextToken\":\"x\"}\n{\"SuppressedDestinationSummaries\":[{\"EmailAddress\":\"c@d.de\",\"Reason\":\"COMPLAINT\",\"LastUpdateTime\":2}]}",
                &[(1, "a@b.de||bounce"), (2, "c@d.de||complaint")],
            ),
            (
                "{\"items\":[{\"address\":\"a@b.de\",\"tags\":[\"x\",\"y\"],\"created_at\":\"\"}],\"paging\":{\"next\":[\"z\"]}}",
                &[(1, "a@b.de||unsubscribe_link")],
            ),
            ("\n\n{\"email\":\"a@b.de\"}\n", &[(3, "a@b.de||")]),
            ("[\"a@b.de\", \"c@d.de\", 7]", &[(1, "a@b.de||"), (2, "c@d.de||"), (3, "is neither an object nor a text")]),
            ("[{\"created\":1,\"email\":\"a@b.de\",\"ip\":\"192.0.2.1\"}]", &[(1, "a@b.de||complaint")]),
            ("", &[]),
        ] {
            let expected: Vec<_> = expected.iter().map(|(line, text)| (*line, (*text).to_owned())).collect();
            assert_eq!(rows(text.as_bytes()), Ok(expected.clone()), "{text}");
            let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            packed.write_all(text.as_bytes()).expect("packed");
            assert_eq!(rows(&packed.finish().expect("packed")), Ok(expected.clone()), "gzip: {text}");
            assert_eq!(rows(&zstd::stream::encode_all(text.as_bytes(), 0).expect("packed")), Ok(expected), "zstd: {text}");
        }
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for (text, expected) in [
            ("name,phone\nx,y\n", "--column"),
            ("address,domain\na@b.de,\n", "allowlist"),
            ("[{\"type\":\"domain\",\"value\":\"b.de\",\"reason\":\"\",\"createdAt\":\"\"}]", "allowlist"),
            ("{\n\"a\":{},\"b\": 1}", "no list"),
            ("{\"items\":[{\"address\":\"a@b.de\"", "not valid JSON"),
            ("email,reason\n\"a@b.de,x\nc@d.de,y\n", "line 2 that is not closed"),
            ("\u{ff}\u{fe}", "neither holds"),
        ] {
            let refused = rows(text.as_bytes()).expect_err(text);
            assert!(refused.contains(expected), "{text}: {refused}");
        }
        assert!(rows(&[0xff, 0xfe, b'a', 0]).expect_err("UTF-16").contains("UTF-8"));
        let whole = zstd::stream::encode_all("a@b.de\n".repeat(1_000).as_bytes(), 0).expect("packed");
        assert!(rows(&whole[..whole.len() - 5]).is_err(), "a packed file that is cut short");
    }

    #[test]
    fn an_octet_that_nobody_needs_refuses_nothing() {
        let latin1 = b"email,name\na@b.de,M\xfcller\nc\xfc@d.de,x\n";
        assert_eq!(rows(latin1), Ok(vec![(2, "a@b.de||".to_owned()), (3, "is not UTF-8".to_owned())]));
    }

    #[test]
    fn a_large_document_on_one_line_is_a_document() {
        // Whatever stands where the look at its start ends.
        for filler in 0..40 {
            let row = "{\"EmailAddress\":\"a@b.de\",\"SuppressionReason\":\"HardBounce\"}";
            let text = format!("{{\"x\":\"{}\",\"Suppressions\":[{}]}}", "x".repeat(filler), vec![row; 1_500].join(","));
            assert_eq!(rows(text.as_bytes()).map(|rows| rows.len()), Ok(1_500));
        }
    }

    #[test]
    fn a_column_can_be_named_and_lines_skipped() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(b"Mail,Grund\na@b.de,x\nc@d.de,y\n").expect("written");
        let options = Options { column: Some("mail".to_owned()), skip_lines: 2, addresses_only: false };
        let mut seen = Vec::new();
        let read = Input::open(file.path()).expect("a file").read(&options, |row| {
            seen.push(row.line);
            Ok(())
        });
        assert!(read.is_ok());
        assert_eq!(seen, [3]);
    }
}
