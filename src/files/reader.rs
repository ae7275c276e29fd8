//! Bytes in, rows out: what the file is, what its columns mean, and one row after the other.
//!
//! A file is known by what is in it and not by its name's ending: exports are renamed, and standard
//! input has no name. Who has said the format (an HTTP body's media type) is held to it.

use std::{borrow::Cow, fmt};

use super::{
    Format,
    decode::{NOT_UTF8, Text},
    json::{self, Documents, Element, Field, Look, Shape},
    layout::{Layout, NotAList, Source},
    records::{Csv, Lines, Record, TOO_LONG},
    row::{Cells, Content, Row, Rules, Unreadable, Written},
};
use crate::domain::Address;

/// What is looked at to tell what a file is.
const HEAD_BYTES: usize = 64 << 10;

/// What rows are read for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To put them on a list.
    Import {
        /// The caller has named a reason. It is better than one that is guessed from a file's
        /// columns.
        is_reason_given: bool,
    },
    /// For their addresses, of whatever list it is: each address is a row.
    Addresses,
    /// To ask about them: each row is one, and keeps its columns.
    Check,
}

/// How a file is read.
#[derive(Clone, Debug)]
pub struct Options {
    /// What for.
    pub purpose: Purpose,
    /// The format that the file must have; none when it is to be found out.
    pub format: Option<Format>,
    /// The file's name, without its directory; empty when it has none.
    pub file_name: String,
    /// The name of the column of addresses, in place of those that are known.
    pub column: Option<String>,
    /// Where the file comes from, in place of a guess.
    pub source: Option<Source>,
    /// Rows that begin on this line or before are not handed over.
    pub skip_lines: u64,
    /// The time, in seconds since 1970. A provider's time after it is dropped.
    pub now: i64,
}

impl Options {
    /// Everything found out by what is in the file.
    pub fn new(purpose: Purpose, now: i64) -> Self {
        Self { purpose, format: None, file_name: String::new(), column: None, source: None, skip_lines: 0, now }
    }
}

/// Why a file is not read, or not read on. Written out it is the end of a sentence about the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It is no text, but this.
    NotText(&'static str),
    /// It is no list of those who must not be written to, but this.
    NotAList(&'static str),
    /// Its first row neither holds an address nor names a column of them.
    NoAddressColumn,
    /// Two of its columns have the name of the column of addresses.
    TwoAddressColumns,
    /// Its first row is too long.
    FirstRowTooLong,
    /// It was said to be CSV, and is JSON.
    NotCsv,
    /// A quoted cell in the row that begins on this line is not closed.
    Unclosed(u64),
    /// It is not valid JSON, and why.
    Json(&'static str),
    /// It is a JSON document without a list in it.
    NoList,
}

impl Refused {
    /// The line at fault, if there is one.
    pub fn line(self) -> Option<u64> {
        if let Self::Unclosed(line) = self { Some(line) } else { None }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotText(what) | Self::NotAList(what) => f.write_str(what),
            Self::NoAddressColumn => f.write_str(
                "has a first row that neither holds an address nor names a column of addresses, such as email; in CSV the columns are \
                 separated by commas, semicolons or tabs",
            ),
            Self::TwoAddressColumns => f.write_str("names its column of addresses twice; rename one of the two"),
            Self::FirstRowTooLong => write!(f, "has a first row that {TOO_LONG}"),
            Self::NotCsv => f.write_str("is JSON and not CSV; send one object a line as application/x-ndjson"),
            Self::Unclosed(line) => write!(f, "has a quoted cell in the row of line {line} that is not closed"),
            Self::Json(why) => write!(f, "is not valid JSON: {why}"),
            Self::NoList => f.write_str("is a JSON document that has no list of entries in it"),
        }
    }
}

impl std::error::Error for Refused {}

/// Reads a file that comes in pieces.
pub struct Reader {
    text: Text,
    state: State,
    rows: Rows,
}

enum State {
    /// Its start, until it is known what it is.
    Head {
        bytes: Vec<u8>,
        /// So many of them were looked at for the end of a line of content.
        searched: usize,
        /// What was looked at is blank.
        is_blank: bool,
        /// A line of content has ended.
        has_ended_line: bool,
    },
    Csv(Box<Csv>),
    JsonLines(Lines),
    Document(Documents),
}

impl Reader {
    /// Nothing is read yet.
    pub fn new(options: Options) -> Self {
        let rules = Rules {
            is_reason_given: options.purpose == Purpose::Import { is_reason_given: true },
            addresses_only: !matches!(options.purpose, Purpose::Import { .. }),
            now: options.now,
        };
        let rows = Rows { options, rules, delimiter: b',', known: None, is_headerless: false };
        Self {
            text: Text::default(),
            state: State::Head { bytes: Vec::new(), searched: 0, is_blank: true, has_ended_line: false },
            rows,
        }
    }

    /// Reads on, and hands over each row that ends here.
    ///
    /// # Errors
    /// What `take` answers, or that the file is not read on.
    pub fn push<E: From<Refused>>(&mut self, chunk: &[u8], mut take: impl FnMut(Row<'_>) -> Result<(), E>) -> Result<(), E> {
        let chunk = self.text.push(chunk)?;
        self.state.push(&mut self.rows, chunk, &mut take)
    }

    /// Hands over what is left when the file has ended.
    ///
    /// # Errors
    /// What `take` answers, or that the file should not have ended here.
    pub fn finish<E: From<Refused>>(&mut self, mut take: impl FnMut(Row<'_>) -> Result<(), E>) -> Result<(), E> {
        let rest = self.text.finish()?;
        self.state.push(&mut self.rows, rest, &mut take)?;
        let rows = &mut self.rows;
        if let State::Head { bytes, .. } = &mut self.state {
            let head = std::mem::take(bytes);
            if let Some(state) = rows.state_for(&head, true)? {
                self.state = state;
                self.state.push(rows, &head, &mut take)?;
            }
        }
        match &mut self.state {
            State::Head { .. } => Ok(()),
            State::Csv(csv) => csv.finish(|record| rows.record(record, &mut take)),
            State::JsonLines(lines) => lines.finish(|number, line| rows.json_line(number, line, &mut take)),
            State::Document(documents) => Ok(documents.finish()?),
        }
    }
}

impl State {
    fn push<E: From<Refused>>(
        &mut self,
        rows: &mut Rows,
        chunk: &[u8],
        take: &mut impl FnMut(Row<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        match self {
            Self::Csv(csv) => csv.push(chunk, |record| rows.record(record, take)),
            Self::JsonLines(lines) => lines.push(chunk, |number, line| rows.json_line(number, line, take)),
            Self::Document(documents) => documents.push(chunk, |number, element| rows.json(number, element, take)),
            Self::Head { bytes, searched, is_blank, has_ended_line } => {
                bytes.extend_from_slice(chunk);
                // A line of content tells what it is; in a pipe, blank lines may come alone.
                let has_line = has_line(&bytes[*searched..], is_blank);
                *searched = bytes.len();
                let is_format_known = rows.options.format == Some(Format::Ndjson);
                *has_ended_line |= has_line;
                if !*has_ended_line && !is_format_known && bytes.len() < HEAD_BYTES {
                    return Ok(());
                }
                let Some(state) = rows.state_for(bytes, false)? else { return Ok(()) };
                let head = std::mem::take(bytes);
                *self = state;
                self.push(rows, &head, take)
            }
        }
    }
}

/// Whether a line with content ends in `bytes`. `is_blank` says whether all before it was blank,
/// and then whether all up to its end is.
fn has_line(bytes: &[u8], is_blank: &mut bool) -> bool {
    let blank = if *is_blank { bytes.iter().take_while(|byte| byte.is_ascii_whitespace()).count() } else { 0 };
    let content = &bytes[blank..];
    *is_blank &= content.is_empty();
    content.contains(&b'\n')
}

/// The character that stands between cells: the commonest in the first line, outside of quotes.
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

/// What is known of a file's rows.
struct Rows {
    options: Options,
    rules: Rules,
    delimiter: u8,
    known: Option<Known>,
    is_headerless: bool,
}

/// The names of the columns, and what they mean; of JSON, those of the object before.
struct Known {
    names: Vec<String>,
    layout: Layout,
}

impl Rows {
    /// How a file goes on that starts with `head`; none when more of it must be seen.
    fn state_for(&mut self, head: &[u8], is_all: bool) -> Result<Option<State>, Refused> {
        if self.options.format == Some(Format::Ndjson) {
            return Ok(Some(State::JsonLines(Lines::default())));
        }
        let text = head.trim_ascii_start();
        if self.options.format == Some(Format::Csv) {
            if matches!(text.first(), Some(b'{' | b'[')) {
                return Err(Refused::NotCsv);
            }
        } else {
            let is_full = head.len() >= HEAD_BYTES;
            let is_cut = is_full && !is_all && !text.contains(&b'\n') && text.first() == Some(&b'{');
            match json::look(text, is_all || is_full, self.options.column.as_deref()) {
                _ if is_cut => return Ok(Some(State::Document(Documents::default()))),
                Look::More => return Ok(None),
                Look::Json(Shape::Lines) => return Ok(Some(State::JsonLines(Lines::default()))),
                Look::Json(Shape::Document) => return Ok(Some(State::Document(Documents::default()))),
                Look::Other => {}
            }
        }
        self.delimiter = delimiter(head);
        Ok(Some(State::Csv(Box::new(Csv::new(self.delimiter)))))
    }

    fn layout_of(&self, names: &[impl AsRef<str>]) -> Result<Layout, NotAList> {
        let Options { column, source, purpose, file_name, .. } = &self.options;
        match (column, source) {
            (Some(column), source) => Layout::with_address(names, column, *source),
            (None, Some(source)) => Layout::from(*source, names),
            (None, None) if matches!(purpose, Purpose::Import { .. }) => Layout::of(names, file_name),
            (None, None) => Layout::any_with_addresses(names),
        }
    }

    fn hand_over<E>(
        &self,
        line: u64,
        content: Content<'_>,
        written: Written<'_>,
        take: &mut impl FnMut(Row<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        if line <= self.options.skip_lines {
            return Ok(());
        }
        let layout = self.known.as_ref().map_or("", |known| known.layout.name);
        take(Row { line, layout, content, written })
    }

    fn record<E: From<Refused>>(&mut self, record: Record<'_>, take: &mut impl FnMut(Row<'_>) -> Result<(), E>) -> Result<(), E> {
        let Some(known) = &self.known else { return self.first_record(record, take) };
        if record.is_too_long {
            let content = Content::Unreadable(Unreadable::too_long(TOO_LONG));
            return self.hand_over(record.line, content, Written::Csv(record, self.delimiter), take);
        }
        let layout = &known.layout;
        if self.is_headerless && record.len() > 1 {
            return self.bare_record(layout, record, take);
        }
        let all_text = || record.cells().map(String::from_utf8_lossy).collect::<Vec<_>>().join(",");
        let has_more = record.len() > known.names.len().max(1) && {
            let mut more = (known.names.len()..record.len()).filter_map(|column| record.cell(column));
            more.any(|cell| cell.contains(&b'@'))
        };
        let content = if record.cell(layout.address).is_none() {
            Content::Unreadable(Unreadable::line("has no cell in the column of addresses", all_text()))
        } else if has_more {
            let why = "has an address in a cell that the header has no column for; put one address on each line";
            Content::Unreadable(Unreadable::line(why, all_text()))
        } else {
            self.rules.content(layout, layout.address, &record)
        };
        self.hand_over(record.line, content, Written::Csv(record, self.delimiter), take)
    }

    /// The first record says what the columns are, or is an entry itself.
    fn first_record<E: From<Refused>>(
        &mut self,
        record: Record<'_>,
        take: &mut impl FnMut(Row<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        if record.is_too_long {
            return Err(Refused::FirstRowTooLong.into());
        }
        let cells: Vec<String> = record.cells().map(|cell| String::from_utf8_lossy(cell).into_owned()).collect();
        let is_entry = cells.iter().any(|cell| cell.contains('@'))
            || cells.first().is_some_and(|cell| Address::parse_any(cell.clone()).is_ok());
        if is_entry && self.options.column.is_none() {
            let texts: Vec<&str> = cells.iter().map(|cell| cell.trim()).collect();
            let layout = Layout::without_header(&texts, self.options.source);
            self.known = Some(Known { names: Vec::new(), layout });
            self.is_headerless = true;
            return self.record(record, take);
        }
        match self.layout_of(&cells) {
            Ok(layout) => self.known = Some(Known { names: cells, layout }),
            Err(NotAList::Other(what)) => return Err(Refused::NotAList(what).into()),
            Err(NotAList::NoAddress) => return Err(Refused::NoAddressColumn.into()),
            Err(NotAList::TwoAddresses) => return Err(Refused::TwoAddressColumns.into()),
        }
        if self.options.purpose == Purpose::Check {
            return self.hand_over(record.line, Content::Header, Written::Csv(record, self.delimiter), take);
        }
        Ok(())
    }

    /// A record of a file without a header: every address in it is an entry, so that none is left
    /// out.
    fn bare_record<E>(
        &self,
        layout: &Layout,
        record: Record<'_>,
        take: &mut impl FnMut(Row<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let written = Written::Csv(record, self.delimiter);
        let bare = |address| Bare { record, address, reason: layout.reason_column() };
        let any = bare(usize::MAX);
        let named = (0..record.len()).filter(|column| any.is_address(*column));
        let count = named.clone().count();
        if count == 0 {
            return self.bare_domains(layout, record, take);
        }
        if count > 1 && self.options.purpose == Purpose::Check {
            let why = "has more than one address; put one on each line, or name the column of addresses in a header";
            let text = record.cell(layout.address).map(String::from_utf8_lossy).unwrap_or_default();
            return self.hand_over(record.line, Content::Unreadable(Unreadable::line(why, text)), written, take);
        }
        for column in named {
            let content = self.rules.content(layout, column, &bare(column));
            self.hand_over(record.line, content, written, take)?;
        }
        Ok(())
    }

    /// A record without an address of e-mail in it: the cells that are domains, or else what stands
    /// where the first row had its address.
    fn bare_domains<E>(
        &self,
        layout: &Layout,
        record: Record<'_>,
        take: &mut impl FnMut(Row<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let written = Written::Csv(record, self.delimiter);
        let is_domain = |column: &usize| {
            let text = record.text(*column).unwrap_or_default();
            text.contains('.') && Address::parse_any(text.into_owned()).is_ok()
        };
        let fallback = if record.len() > layout.address { layout.address } else { 0 };
        let mut columns: Vec<usize> = (0..record.len()).filter(is_domain).collect();
        if columns.is_empty() || self.options.purpose == Purpose::Check {
            columns = vec![fallback];
        }
        for column in &columns {
            // Its reason, unless that is the next domain.
            let reason = layout.reason_column().filter(|reason| columns.contains(reason) && reason != column);
            let cells = Masked { record, masked: reason };
            let content = self.rules.content(layout, *column, &cells);
            self.hand_over(record.line, content, written, take)?;
        }
        Ok(())
    }

    fn json_line<E: From<Refused>>(
        &mut self,
        number: u64,
        line: Option<&[u8]>,
        take: &mut impl FnMut(Row<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        if line.is_some_and(|line| line.trim_ascii().is_empty()) { Ok(()) } else { self.json(number, line, take) }
    }

    fn json<E: From<Refused>>(
        &mut self,
        number: u64,
        bytes: Option<&[u8]>,
        take: &mut impl FnMut(Row<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let bytes = bytes.map(<[u8]>::trim_ascii);
        let text = || bytes.map(String::from_utf8_lossy).unwrap_or_default();
        let unreadable = |why: &str| Content::Unreadable(Unreadable::line(why, text()));
        let element = bytes.map(json::element);
        let content = match &element {
            None => Content::Unreadable(Unreadable::too_long(TOO_LONG)),
            Some(Err(_)) if bytes.is_some_and(|bytes| str::from_utf8(bytes).is_err()) => unreadable(NOT_UTF8),
            Some(Err(_)) => unreadable("is not valid JSON"),
            Some(Ok(Element::Other)) => unreadable("is neither an object nor a text"),
            Some(Ok(Element::Text(field))) => match Layout::from(Source::List, &["email"]) {
                Ok(layout) => self.rules.content(&layout, 0, &std::slice::from_ref(field)),
                Err(_) => unreadable("is no address"),
            },
            Some(Ok(Element::Object(fields))) => match self.know(fields)? {
                Ok(()) => match &self.known {
                    Some(Known { layout, .. }) => self.rules.content(layout, layout.address, &fields.as_slice()),
                    None => unreadable("has no field with an address"),
                },
                Err(why) => unreadable(why),
            },
        };
        self.hand_over(number, content, Written::Json(bytes), take)
    }

    /// Finds the layout of an object, which most often is that of the one before.
    ///
    /// # Errors
    /// That the file is not read on; inside, what is wrong with the object.
    fn know(&mut self, fields: &[Field<'_>]) -> Result<Result<(), &'static str>, Refused> {
        let is_known = self.known.as_ref().is_some_and(|known| {
            known.names.len() == fields.len() && known.names.iter().zip(fields).all(|(name, field)| *name == field.name)
        });
        if !is_known {
            let names: Vec<String> = fields.iter().map(|field| field.name.as_ref().to_owned()).collect();
            let mut sorted: Vec<&str> = names.iter().map(String::as_str).collect();
            sorted.sort_unstable();
            if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
                return Ok(Err("names a field twice"));
            }
            match self.layout_of(&names) {
                Ok(layout) => self.known = Some(Known { names, layout }),
                Err(NotAList::Other(what)) => return Err(Refused::NotAList(what)),
                Err(NotAList::NoAddress) => return Ok(Err("has no field with an address")),
                Err(NotAList::TwoAddresses) => return Ok(Err("has two fields with an address")),
            }
        }
        Ok(Ok(()))
    }
}

/// A record of a file without a header, read for one of its addresses: other addresses in it are no
/// reason and no type.
struct Bare<'a> {
    record: Record<'a>,
    address: usize,
    reason: Option<usize>,
}

impl Bare<'_> {
    /// Whether an address stands in this column, or what must be taken for one.
    fn is_address(&self, column: usize) -> bool {
        let cell = self.record.cell(column).unwrap_or_default();
        if !cell.contains(&b'@') {
            return false;
        }
        // A mail server's text with an address in it is a reason where one is expected.
        let is_text = || !cell.trim_ascii().ends_with(b">") && cell.trim_ascii().contains(&b' ');
        !(self.reason == Some(column) && is_text())
    }
}

impl<'a> Cells<'a> for Bare<'a> {
    fn text(&self, column: usize) -> Result<Cow<'a, str>, &'static str> {
        if column != self.address && self.is_address(column) { Ok(Cow::Borrowed("")) } else { self.record.text(column) }
    }
}

/// A record with one cell that is not looked at.
struct Masked<'a> {
    record: Record<'a>,
    masked: Option<usize>,
}

impl<'a> Cells<'a> for Masked<'a> {
    fn text(&self, column: usize) -> Result<Cow<'a, str>, &'static str> {
        if self.masked == Some(column) { Ok(Cow::Borrowed("")) } else { self.record.text(column) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        files::time,
        fuzz::{pieces, spelled},
    };

    const IMPORT: Purpose = Purpose::Import { is_reason_given: false };

    /// A row as a text: the address, the type, the reason, the time; or what else became of it.
    fn shown(row: &Row<'_>) -> String {
        match &row.content {
            Content::Header => "header".to_owned(),
            Content::Excluded => "excluded".to_owned(),
            Content::Unreadable(unreadable) => format!("{}: {}", unreadable.code, unreadable.message),
            Content::Entry(entry) => {
                let kind = entry.kind.map_or("", crate::domain::Kind::name);
                let mut text = format!("{}|{kind}|{}", entry.address.trim(), entry.reason.trim());
                if let Some(at) = entry.unsubscribe_time {
                    text = format!("{text}|{}", time::text(at));
                }
                for (is_so, mark) in [(entry.is_reason_cut, "|cut"), (entry.is_time_dropped, "|dropped")] {
                    text.push_str(if is_so { mark } else { "" });
                }
                text
            }
        }
    }

    /// The rows of a file that comes in pieces of this size, and why it was not read on.
    fn rows_of(bytes: &[u8], size: usize, options: &Options) -> (Vec<(u64, String)>, Option<Refused>) {
        let mut reader = Reader::new(options.clone());
        let mut seen = Vec::new();
        let mut take = |row: Row<'_>| {
            seen.push((row.line, shown(&row)));
            Ok::<_, Refused>(())
        };
        let pushed = bytes.chunks(size.max(1)).try_for_each(|chunk| reader.push(chunk, &mut take));
        let refused = pushed.and_then(|()| reader.finish(&mut take)).err();
        (seen, refused)
    }

    /// The same in pieces of several sizes, which make no difference.
    fn rows_with(bytes: &[u8], options: &Options) -> Result<Vec<(u64, String)>, String> {
        let whole = rows_of(bytes, bytes.len(), options);
        for size in [1, 2, 3, 7, 64] {
            assert_eq!(rows_of(bytes, size, options), whole, "in pieces of {size}");
        }
        let (rows, refused) = whole;
        refused.map_or(Ok(rows), |refused| Err(refused.to_string()))
    }

    fn rows(text: &str) -> Result<Vec<(u64, String)>, String> {
        rows_with(text.as_bytes(), &Options::new(IMPORT, i64::MAX))
    }

    fn texts(text: &str, options: &Options) -> Vec<String> {
        rows_with(text.as_bytes(), options).expect(text).into_iter().map(|(_, text)| text).collect()
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
            let import = Options::new(IMPORT, 0);
            for options in [
                import.clone(),
                Options { column: Some("x".to_owned()), skip_lines: 2, ..import.clone() },
                Options { source: Some(Source::SendgridBounces), ..import },
                Options::new(Purpose::Addresses, 0),
                Options::new(Purpose::Check, 0),
            ] {
                let whole = rows_of(bytes, bytes.len(), &options);
                assert_eq!(rows_of(bytes, size, &options), whole);
                assert!(whole.0.iter().all(|(line, _)| *line > options.skip_lines));
                // Several addresses may stand on a line of a list without a header.
                let is_one_a_line = options.purpose == Purpose::Check;
                assert!(whole.0.is_sorted_by(|a, b| if is_one_a_line { a.0 < b.0 } else { a.0 <= b.0 }));
            }
        };
        bolero::check!(name = "files").for_each(|bytes| {
            let (size, rest) = pieces(bytes);
            hold(rest, size);
            hold(spelled(&rest[..rest.len().min(48)], &ALPHABET).as_bytes(), size);
        });
    }

    #[test]
    fn any_bytes_of_a_given_format_are_read_and_no_message_repeats_them() {
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
                let options = Options { format: Some(format), ..Options::new(IMPORT, 0) };
                let whole = rows_of(bytes, bytes.len(), &options);
                assert_eq!(rows_of(bytes, size, &options), whole);
                let causes = whole.0.iter().map(|(_, text)| text.clone()).filter(|text| text.contains(": The line "));
                for message in causes.chain(whole.1.map(|refused| refused.to_string())) {
                    assert!(!message.contains('@') && !message.contains("secret") && message.len() <= 200, "{message}");
                }
            }
        };
        bolero::check!(name = "formats").for_each(|bytes| {
            let (size, rest) = pieces(bytes);
            hold(rest, size);
            hold(spelled(&rest[..rest.len().min(48)], &ALPHABET).as_bytes(), size);
        });
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
                "status,reason,email,created\n5.1.1,\"550 no,\nreally\",a@b.de,1\n,,c@d.de,never\n",
                &[(2, "a@b.de||bounce|1970-01-01T00:00:01.000Z"), (4, "c@d.de||bounce|dropped")],
            ),
            ("\u{feff}[{\"email\":\"a@b.de\"}]", &[(1, "a@b.de||")]),
            ("{\"email\":\"a@b.de\",\"data\":[]}", &[(1, "a@b.de||")]),
            ("email,note\na@b.de,\"two\nlines\"", &[(2, "a@b.de||")]),
            ("John,john@b.de\nAnn,ann@b.de", &[(1, "john@b.de||"), (2, "ann@b.de||")]),
            ("email,reason\n'=a@b.de,'-x\nonly\n", &[(2, "=a@b.de||-x"), (3, "only||")]),
            ("x,email\nonly\n", &[(2, "INVALID_LINE: The line has no cell in the column of addresses.")]),
            ("email\n<a@b.de>\nmailto:c@d.de\n\"Doe, Ann <e@f.de>\"\n", &[(2, "a@b.de||"), (3, "c@d.de||"), (4, "e@f.de||")]),
            (
                "{\"email\":\"a@b.de\",\"type\":\"email\"}\noops}\n\n{\"email\":\"c@d.de\",\"reason\":null}\n[]\n{\"x\":1}\n{\"email\":1,\"email\":2}",
                &[
                    (1, "a@b.de|email|"),
                    (2, "INVALID_LINE: The line is not valid JSON."),
                    (4, "c@d.de||"),
                    (5, "INVALID_LINE: The line is neither an object nor a text."),
                    (6, "INVALID_LINE: The line has no field with an address."),
                    (7, "INVALID_LINE: The line names a field twice."),
                ],
            ),
            (
                "{\"SuppressedDestinationSummaries\": [\n {\"EmailAddress\":\"a@b.de\",\"Reason\":\"BOUNCE\",\"LastUpdateTime\":1.5}],\n\"NextToken\":\"x\"}\n{\"SuppressedDestinationSummaries\":[{\"EmailAddress\":\"c@d.de\",\"Reason\":\"COMPLAINT\",\"LastUpdateTime\":\"1970-01-01T00:00:02+00:00\"}]}",
                &[(1, "a@b.de||bounce|1970-01-01T00:00:01.500Z"), (2, "c@d.de||complaint|1970-01-01T00:00:02.000Z")],
            ),
            (
                "{\"items\":[{\"address\":\"a@b.de\",\"tags\":[\"x\",\"y\"],\"created_at\":\"Thu, 01 Jan 1970 00:00:03 UTC\"}],\"paging\":{\"next\":[\"z\"]}}",
                &[(1, "a@b.de||unsubscribe_link|1970-01-01T00:00:03.000Z")],
            ),
            (
                "{\"count\":1,\"contacts\":[{\"email\":\"a@b.de\",\"senderEmail\":\"x@y.de\",\"reason\":{\"code\":\"unsubscribedViaEmail\",\"message\":\"x\"},\"blockedAt\":\"1970-01-01T00:00:04.000Z\"}]}",
                &[(1, "a@b.de||unsubscribe_link|1970-01-01T00:00:04.000Z")],
            ),
            ("\n\n{\"email\":\"a@b.de\"}\n", &[(3, "a@b.de||")]),
            (
                "[\"a@b.de\", \"c@d.de\", 7]",
                &[(1, "a@b.de||"), (2, "c@d.de||"), (3, "INVALID_LINE: The line is neither an object nor a text.")],
            ),
            ("", &[]),
        ] {
            let expected: Vec<_> = expected.iter().map(|(line, text)| (*line, (*text).to_owned())).collect();
            assert_eq!(rows(text), Ok(expected.clone()), "{text}");
            let utf16: Vec<u8> =
                [0xfeff].into_iter().chain(text.trim_start_matches('\u{feff}').encode_utf16()).flat_map(u16::to_le_bytes).collect();
            assert_eq!(rows_with(&utf16, &Options::new(IMPORT, i64::MAX)), Ok(expected), "UTF-16: {text}");
        }
    }

    #[test]
    fn every_address_of_a_row_without_a_header_is_an_entry() {
        for (text, expected) in [
            ("a@x.de, b@x.de, c@x.de", &["a@x.de||", "b@x.de||", "c@x.de||"][..]),
            ("a@x.de,b@x.de\nc@x.de,bounce\nd@x.de", &["a@x.de||", "b@x.de||", "c@x.de||", "d@x.de||"]),
            ("a@x.de,bounce\nb@x.de,c@x.de\nd@x.de,complaint", &["a@x.de||bounce", "b@x.de||", "c@x.de||", "d@x.de||complaint"]),
            ("a@x.de,b@x.de,bounce", &["a@x.de||bounce", "b@x.de||bounce"]),
            ("a@x.de,bounce\nb@x.de,550 no such user c@x.de", &["a@x.de||bounce", "b@x.de||550 no such user c@x.de"]),
            ("a@x.de\nb@x.de;c@x.de", &["a@x.de||", "b@x.de;c@x.de||"]),
            ("a@x.de\nb@x.de,not@all", &["a@x.de||", "b@x.de||", "not@all||"]),
            ("Ann,<a@x.de>,Bob <b@x.de>", &["a@x.de||", "b@x.de||"]),
            ("x.de,y.de\nz.de,domain,bounce", &["x.de||", "y.de||", "z.de||domain"]),
            ("x.de,domain,manual\ny.de,domain,z.de", &["x.de|domain|manual", "y.de|domain|", "z.de|domain|"]),
            (
                "email\na@x.de\nb@x.de,c@x.de",
                &[
                    "a@x.de||",
                    "INVALID_LINE: The line has an address in a cell that the header has no column for; put one address on each line.",
                ],
            ),
        ] {
            assert_eq!(texts(text, &Options::new(IMPORT, 0)), expected, "{text}");
        }
    }

    #[test]
    fn what_the_caller_says_wins_over_a_guess() {
        let guessed = Options::new(IMPORT, 0);
        let given = Options::new(Purpose::Import { is_reason_given: true }, 0);
        let from = |options: &Options| Options { source: Some(Source::SendgridSpamReports), ..options.clone() };
        let named = |options: &Options| Options { file_name: "spam.csv".to_owned(), ..options.clone() };
        let text = "email,ip,created\na@b.de,192.0.2.1,0\n";
        let time = "1970-01-01T00:00:00.000Z";
        assert_eq!(texts(text, &guessed), ["a@b.de||"]);
        assert_eq!(texts(text, &from(&guessed)), [format!("a@b.de||complaint|{time}")]);
        assert_eq!(texts(text, &named(&guessed)), [format!("a@b.de||complaint|{time}")]);
        for options in [from(&given), named(&given)] {
            assert_eq!(texts(text, &options), [format!("a@b.de|||{time}")]);
        }
        // What a row says itself is no guess.
        assert_eq!(texts("EmailAddress,Reason\na@b.de,BOUNCE\n", &given), ["a@b.de||bounce"]);
        assert_eq!(texts("a@b.de\n", &from(&guessed)), ["a@b.de||complaint"]);
    }

    #[test]
    fn our_own_time_must_be_right_and_a_providers_may_be_dropped() {
        let text =
            "email,unsubscribedAt\na@b.de,1970-01-01T01:00:00+01:00\nc@d.de,\ne@f.de,yesterday\ng@h.de,2999-01-01T00:00:00Z\n";
        let wrong = "INVALID_TIME: The time of the opt-out is none; write it as 2024-06-01T10:00:00Z.";
        let expected = ["a@b.de|||1970-01-01T00:00:00.000Z", "c@d.de||", wrong, "g@h.de|||2999-01-01T00:00:00.000Z"];
        assert_eq!(texts(text, &Options::new(IMPORT, 5)), expected);
        let text = "EmailAddress,SuppressionReason,CreatedAt\na@b.de,HardBounce,1970-01-01T00:00:05Z\nc@d.de,HardBounce,1970-01-01T00:00:06Z\ne@f.de,HardBounce,\n";
        let expected = ["a@b.de||bounce|1970-01-01T00:00:05.000Z", "c@d.de||bounce|dropped", "e@f.de||bounce"];
        assert_eq!(texts(text, &Options::new(IMPORT, 5)), expected);
    }

    #[test]
    fn a_fault_fails_its_row_alone() {
        let long = "x".repeat(70);
        let text = format!(
            "[{{\"email\":\"a@b.de\",\"reason\":\"\\ud800\"}},{{\"email\":\"b@b.de\",\"x\":1e999}},{{\"email\":\"c@b.de\",\"type\":7}},{{\"email\":}},{{\"email\":\"d@b.de\",\"reason\":\"{long}\"}}]"
        );
        let expected = [
            "INVALID_LINE: The line has half a character in it (a surrogate that stands alone).".to_owned(),
            "b@b.de||".to_owned(),
            "INVALID_TYPE: The type is neither email nor domain.".to_owned(),
            "INVALID_LINE: The line is not valid JSON.".to_owned(),
            format!("d@b.de||{}|cut", &long[..64]),
        ];
        assert_eq!(texts(&text, &Options::new(IMPORT, 0)), expected);
        let latin1 = b"email,name\na@b.de,M\xfcller\nc\xfc@d.de,x\n";
        let seen = rows_with(latin1, &Options::new(IMPORT, 0)).expect("a list");
        assert_eq!(seen[0], (2, "a@b.de||".to_owned()), "a byte that nobody needs fails nothing");
        assert!(seen[1].1.starts_with("INVALID_LINE: The line is not UTF-8; save the file as UTF-8"), "{seen:?}");
        let long = format!("email\n{}\na@b.de\n", "x".repeat(70_000));
        assert_eq!(texts(&long, &Options::new(IMPORT, 0)), [format!("LINE_TOO_LONG: The line {TOO_LONG}."), "a@b.de||".to_owned()]);
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for (text, expected) in [
            ("name,phone\nx,y\n", "names a column of addresses"),
            ("address,domain\na@b.de,\n", "allowlist"),
            ("[{\"type\":\"domain\",\"value\":\"b.de\",\"reason\":\"\",\"createdAt\":\"\"}]", "allowlist"),
            ("{\"items\":[{\"event\":\"delivered\",\"recipient\":\"a@b.de\",\"timestamp\":1}]}", "log of events"),
            ("event,timestamp,recipient\ndelivered,1,a@b.de\n", "log of events"),
            ("{\n\"a\":{},\"b\": 1}", "no list"),
            ("{\"people\":[{\"email\":\"a@b.de\"}]}", "no list"),
            ("{\"people\":[{\"email\":\"a@b.de\"}]}\n\n", "no list"),
            ("{\"items\":[{\"address\":\"a@b.de\"", "not valid JSON"),
            ("email,reason\n\"a@b.de,x\nc@d.de,y\n", "line 2 that is not closed"),
            ("email,reason\na@b.de,x\n\"c@d.de", "line 3 that is not closed"),
            ("email,name,Email\n", "twice"),
            ("PK\u{3}\u{4}xx", "spreadsheet"),
        ] {
            let refused = rows(text).expect_err(text);
            assert!(refused.contains(expected), "{text}: {refused}");
        }
        let csv = Options { format: Some(Format::Csv), ..Options::new(IMPORT, 0) };
        assert!(rows_with(b"[{\"email\":\"a@b.de\"}]", &csv).expect_err("JSON").contains("application/x-ndjson"));
        let ndjson = Options { format: Some(Format::Ndjson), ..Options::new(IMPORT, 0) };
        assert_eq!(
            texts("\u{feff}\n{\"email\":\"a@b.de\"}\na@b.de", &ndjson),
            ["a@b.de||", "INVALID_LINE: The line is not valid JSON."]
        );
    }

    #[test]
    fn a_large_document_on_one_line_is_a_document() {
        // Whatever stands where the look at its start ends.
        for filler in 0..40 {
            let row = "{\"EmailAddress\":\"a@b.de\",\"SuppressionReason\":\"HardBounce\"}";
            let text = format!("{{\"x\":\"{}\",\"Suppressions\":[{}]}}", "x".repeat(filler), vec![row; 1_500].join(","));
            let (rows, refused) = rows_of(text.as_bytes(), 4_096, &Options::new(IMPORT, 0));
            assert_eq!((rows.len(), refused), (1_500, None));
        }
    }

    #[test]
    fn a_column_can_be_named_and_lines_skipped() {
        let options = Options { column: Some("mail".to_owned()), skip_lines: 2, ..Options::new(IMPORT, 0) };
        assert_eq!(rows_with(b"Mail,Grund\na@b.de,x\nc@d.de,y\n", &options), Ok(vec![(3, "c@d.de||".to_owned())]));
        assert_eq!(
            rows_with(b"{\"mail\":\"a@b.de\"}\n", &Options { skip_lines: 0, ..options }),
            Ok(vec![(1, "a@b.de||".to_owned())])
        );
    }

    #[test]
    fn whoever_asks_about_a_list_gets_a_row_for_each_row() {
        let check = Options::new(Purpose::Check, 0);
        let several =
            "INVALID_LINE: The line has more than one address; put one on each line, or name the column of addresses in a header.";
        for (text, expected) in [
            (
                "name,email,status\nAnn,a@b.de,subscribed\nBob\n",
                &["header", "a@b.de||", "INVALID_LINE: The line has no cell in the column of addresses."][..],
            ),
            ("address,domain\na@b.de,\n", &["header", "a@b.de||"]),
            ("a@b.de,Ann\nc@d.de,e@f.de\n", &["a@b.de||", several]),
            ("{\"email\":\"a@b.de\",\"status\":\"subscribed\"}\n", &["a@b.de||"]),
        ] {
            assert_eq!(texts(text, &check), expected, "{text}");
        }
        assert_eq!(texts("a@b.de,c@d.de\n", &Options::new(Purpose::Addresses, 0)), ["a@b.de||", "c@d.de||"]);
    }
}
