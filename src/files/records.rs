//! CSV records (RFC 4180) and lines, out of bytes that come in any pieces, in bounded memory. What
//! stands in them is the business of whoever reads them.

use csv_core::ReadRecordResult;

use super::Refused;

/// The longest line, or CSV record.
pub(super) const RECORD_BYTES_MAX: usize = 64 << 10;

/// The most cells of a CSV record.
const CELLS_MAX: usize = 1_000;

/// What is wrong with a record or line that does not fit.
pub(super) const TOO_LONG: &str = "is longer than 64 KiB, or has more than 1,000 cells";

/// One CSV record.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record<'a> {
    /// The line on which it begins, counted from 1.
    pub(super) line: u64,
    /// True when it did not fit; it has no cells then.
    pub(super) is_too_long: bool,
    bytes: &'a [u8],
    ends: &'a [usize],
}

impl<'a> Record<'a> {
    /// How many cells it has.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The cell in a column, counted from 0.
    pub(super) fn cell(&self, column: usize) -> Option<&'a [u8]> {
        let start = if column == 0 { 0 } else { *self.ends.get(column - 1)? };
        self.bytes.get(start..*self.ends.get(column)?)
    }

    /// All cells.
    pub(super) fn cells(&self) -> impl Iterator<Item = &'a [u8]> {
        (0..self.ends.len()).map_while(|column| self.cell(column))
    }
}

/// Cuts CSV into records. Blank lines are none.
pub(super) struct Csv {
    parser: csv_core::Reader,
    bytes: Vec<u8>,
    ends: Vec<usize>,
    bytes_len: usize,
    ends_len: usize,
    is_too_long: bool,
    is_in_record: bool,
    quotes: Quotes,
    line: LineCount,
    first_line: u64,
}

/// The line that the next byte stands on, with line breaks of every kind.
struct LineCount {
    line: u64,
    is_after_cr: bool,
}

/// Whether the next byte stands in a quoted cell.
struct Quotes {
    delimiter: u8,
    is_open: bool,
    /// True where a quote opens a cell: at its start, and behind a quote that closed one, which
    /// makes the two stand for one.
    may_open: bool,
}

impl Quotes {
    fn begin(&mut self) {
        (self.is_open, self.may_open) = (false, true);
    }

    fn add(&mut self, bytes: &[u8]) {
        if !self.is_open && !bytes.contains(&b'"') {
            self.may_open = bytes.last().map_or(self.may_open, |last| *last == self.delimiter);
            return;
        }
        for byte in bytes {
            let is_quote = *byte == b'"';
            let was_open = self.is_open;
            self.is_open = if was_open { !is_quote } else { is_quote && self.may_open };
            self.may_open = (was_open && is_quote) || (!was_open && *byte == self.delimiter);
        }
    }
}

impl LineCount {
    fn add(&mut self, bytes: &[u8]) {
        if !self.is_after_cr && !bytes.contains(&b'\r') {
            self.line += bytes.iter().filter(|byte| **byte == b'\n').count() as u64;
            return;
        }
        for byte in bytes {
            // CR, LF, or both together.
            self.line += u64::from(*byte == b'\r' || (*byte == b'\n' && !self.is_after_cr));
            self.is_after_cr = *byte == b'\r';
        }
    }
}

impl Csv {
    /// For cells that are separated by `delimiter`.
    pub(super) fn new(delimiter: u8) -> Self {
        let mut parser = csv_core::ReaderBuilder::new().delimiter(delimiter).build();
        // The parser would cut a byte order mark, if it comes in one piece. After this it cuts
        // none.
        parser.read_record(b"\n", &mut [0], &mut [0]);
        Self {
            parser,
            bytes: vec![0; RECORD_BYTES_MAX],
            ends: vec![0; CELLS_MAX],
            bytes_len: 0,
            ends_len: 0,
            is_too_long: false,
            is_in_record: false,
            quotes: Quotes { delimiter, is_open: false, may_open: true },
            line: LineCount { line: 1, is_after_cr: false },
            first_line: 1,
        }
    }

    /// Reads on, and hands over each record that ends here.
    ///
    /// # Errors
    /// What `take` answers, or that a quoted cell is far too long.
    pub(super) fn push<E: From<Refused>>(
        &mut self,
        mut chunk: &[u8],
        mut take: impl FnMut(Record<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        loop {
            if !self.is_in_record {
                let content = chunk.iter().position(|byte| !matches!(byte, b'\r' | b'\n')).unwrap_or(chunk.len());
                self.line.add(&chunk[..content]);
                chunk = &chunk[content..];
                self.first_line = self.line.line;
            }
            if chunk.is_empty() {
                return Ok(());
            }
            chunk = self.read(chunk, &mut take)?;
        }
    }

    /// Hands over the last record, if no line break stood behind it.
    ///
    /// # Errors
    /// What `take` answers, or that a quoted cell is not closed.
    pub(super) fn finish<E: From<Refused>>(&mut self, mut take: impl FnMut(Record<'_>) -> Result<(), E>) -> Result<(), E> {
        if self.is_in_record && self.quotes.is_open {
            return Err(Refused::Unclosed(self.first_line).into());
        }
        // No more input means the end to the parser; it may ask for room first.
        while self.is_in_record {
            self.read(&[], &mut take)?;
        }
        Ok(())
    }

    fn read<'c, E: From<Refused>>(
        &mut self,
        chunk: &'c [u8],
        take: &mut impl FnMut(Record<'_>) -> Result<(), E>,
    ) -> Result<&'c [u8], E> {
        let (bytes, ends) = (&mut self.bytes[self.bytes_len..], &mut self.ends[self.ends_len..]);
        let (result, taken, written, ended) = self.parser.read_record(chunk, bytes, ends);
        self.line.add(&chunk[..taken]);
        self.quotes.add(&chunk[..taken]);
        self.bytes_len += written;
        self.ends_len += ended;
        self.is_in_record = true;
        match result {
            ReadRecordResult::InputEmpty => {}
            ReadRecordResult::OutputFull | ReadRecordResult::OutputEndsFull => {
                self.require_closed()?;
                self.is_too_long = true;
                (self.bytes_len, self.ends_len) = (0, 0);
            }
            ReadRecordResult::Record => {
                let is_too_long = std::mem::take(&mut self.is_too_long);
                let ends_len = if is_too_long { 0 } else { self.ends_len };
                let record = Record {
                    line: self.first_line,
                    is_too_long,
                    bytes: &self.bytes[..self.bytes_len],
                    ends: &self.ends[..ends_len],
                };
                take(record)?;
                (self.bytes_len, self.ends_len, self.is_in_record) = (0, 0, false);
                self.quotes.begin();
            }
            ReadRecordResult::End => self.is_in_record = false,
        }
        Ok(&chunk[taken..])
    }

    /// A quoted cell that is not closed took in the rest of the file, or far too much of it. The
    /// lines in it would be lost without being counted, so nothing after them is read.
    fn require_closed(&self) -> Result<(), Refused> {
        // A cell that took in no other line is reported as it is: too long.
        let has_line_break = self.bytes[..self.bytes_len].iter().any(|byte| matches!(byte, b'\r' | b'\n'));
        if self.quotes.is_open && has_line_break { Err(Refused::Unclosed(self.first_line)) } else { Ok(()) }
    }
}

/// Cuts bytes into lines.
#[derive(Debug, Default)]
pub(super) struct Lines {
    /// The start of a line whose end has not come yet.
    begun: Vec<u8>,
    is_too_long: bool,
    ended: u64,
}

impl Lines {
    /// Reads on, and hands over each line that ends here: its number, counted from 1, and its
    /// bytes without the line break, or none when it is longer than [`RECORD_BYTES_MAX`].
    ///
    /// # Errors
    /// What `take` answers.
    pub(super) fn push<E>(&mut self, chunk: &[u8], mut take: impl FnMut(u64, Option<&[u8]>) -> Result<(), E>) -> Result<(), E> {
        let mut parts = chunk.split(|&byte| byte == b'\n').peekable();
        while let Some(part) = parts.next() {
            let ends_here = parts.peek().is_some();
            if self.begun.len() + part.len() > RECORD_BYTES_MAX {
                self.is_too_long = true;
                self.begun.clear();
            } else if !self.is_too_long && (!ends_here || !self.begun.is_empty()) {
                self.begun.extend_from_slice(part);
            }
            if !ends_here {
                continue;
            }
            self.ended += 1;
            if std::mem::take(&mut self.is_too_long) {
                take(self.ended, None)?;
            } else {
                take(self.ended, Some(if self.begun.is_empty() { part } else { &self.begun }))?;
            }
            self.begun.clear();
        }
        Ok(())
    }

    /// Hands over the last line, if no line break stood behind it.
    ///
    /// # Errors
    /// What `take` answers.
    pub(super) fn finish<E>(&mut self, take: impl FnMut(u64, Option<&[u8]>) -> Result<(), E>) -> Result<(), E> {
        if self.begun.is_empty() && !self.is_too_long { Ok(()) } else { self.push(b"\n", take) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::{pieces, spelled};

    fn records(text: &str, size: usize) -> Result<Vec<(u64, Vec<String>)>, Refused> {
        let mut csv = Csv::new(b',');
        let mut seen = Vec::new();
        let mut take = |record: Record<'_>| {
            let cells = record.cells().map(|cell| String::from_utf8_lossy(cell).into_owned()).collect();
            seen.push((record.line, cells));
            Ok(())
        };
        for chunk in text.as_bytes().chunks(size) {
            csv.push(chunk, &mut take)?;
        }
        csv.finish(&mut take)?;
        Ok(seen)
    }

    #[test]
    fn records_know_their_line_in_any_pieces_and_with_any_line_breaks() {
        for line_break in ["\n", "\r\n", "\r"] {
            for (size, end) in [(1, ""), (2, "\n"), (3, ""), (5, "\n\n"), (100, "")] {
                let text = "a,b\n\n\n\"two\nlines\",c\n5\" pipe,\"la\nst\"".to_owned() + end;
                let seen = records(&text.replace('\n', line_break), size).expect("closed");
                let with_breaks = |cell: &str| cell.replace('\n', line_break);
                let expected = [(1, ["a", "b"]), (4, ["two\nlines", "c"]), (6, ["5\" pipe", "la\nst"])];
                let expected = expected.map(|(line, cells)| (line, cells.map(with_breaks)));
                assert_eq!(seen, expected.map(|(line, cells)| (line, cells.to_vec())), "in pieces of {size}");
            }
        }
    }

    /// The lines of a file in pieces of this size.
    fn lines(bytes: &[u8], size: usize) -> Vec<(u64, Option<Vec<u8>>)> {
        let (mut lines, mut seen) = (Lines::default(), Vec::new());
        let mut take = |number, line: Option<&[u8]>| -> Result<(), Refused> {
            seen.push((number, line.map(<[u8]>::to_vec)));
            Ok(())
        };
        for chunk in bytes.chunks(size) {
            lines.push(chunk, &mut take).expect("taken");
        }
        lines.finish(&mut take).expect("taken");
        seen
    }

    /// Its line, whether it is too long, and its cells.
    type AnyRecord = (u64, bool, Vec<Vec<u8>>);

    /// The records of a file in pieces of this size, and the line of a quote that is not closed.
    fn csv_records(bytes: &[u8], size: usize) -> (Vec<AnyRecord>, Option<u64>) {
        let (mut csv, mut seen) = (Csv::new(b','), Vec::new());
        let mut take = |record: Record<'_>| -> Result<(), Refused> {
            seen.push((record.line, record.is_too_long, record.cells().map(<[u8]>::to_vec).collect()));
            Ok(())
        };
        let pushed = bytes.chunks(size).try_for_each(|chunk| csv.push(chunk, &mut take));
        let unclosed = pushed.and_then(|()| csv.finish(&mut take)).err().and_then(|refused| refused.line());
        (seen, unclosed)
    }

    #[test]
    fn any_bytes_are_the_same_records_in_any_pieces() {
        let (long, many) = ("x".repeat(RECORD_BYTES_MAX / 2), ",".repeat(CELLS_MAX / 2));
        let alphabet =
            ["a", "b", ",", ",", "\"", "\"", "\"\"", "\n", "\n", "\r\n", "\r", "\n\n", "\u{feff}", "\0", "ü", &long, &many];
        let hold = |bytes: &[u8], size: usize| {
            let (whole, unclosed) = csv_records(bytes, bytes.len().max(1));
            assert_eq!(csv_records(bytes, size), (whole.clone(), unclosed));
            assert!(whole.is_sorted_by(|a, b| a.0 < b.0), "each record begins on a later line");
            assert!(unclosed.is_none_or(|line| whole.last().is_none_or(|last| last.0 < line)));
            let all = lines(bytes, bytes.len().max(1));
            assert_eq!(lines(bytes, size), all);
            let expected = bytes.strip_suffix(b"\n").unwrap_or(bytes).split(|byte| *byte == b'\n').enumerate();
            let expected =
                expected.map(|(number, line)| (number as u64 + 1, (line.len() <= RECORD_BYTES_MAX).then(|| line.to_vec())));
            assert_eq!(all, expected.filter(|_| !bytes.is_empty()).collect::<Vec<_>>());
        };
        bolero::check!(name = "records").for_each(|bytes| {
            let (size, rest) = pieces(bytes);
            hold(rest, size);
            hold(spelled(&rest[..rest.len().min(64)], &alphabet).as_bytes(), size);
        });
    }

    #[test]
    fn a_byte_order_mark_is_text_like_any_other_here() {
        for size in [1, 2, 3, 100] {
            assert_eq!(records("\u{feff}a,b", size).expect("closed"), [(1, vec!["\u{feff}a".to_owned(), "b".to_owned()])]);
            assert_eq!(csv_records(b"\xef\xbb", size), (vec![(1, false, vec![b"\xef\xbb".to_vec()])], None));
        }
    }

    #[test]
    fn a_quote_that_is_never_closed_is_reported_with_its_line() {
        for size in [1, 2, 100] {
            assert_eq!(records("a,b\n\"c", size).expect_err("not closed").line(), Some(2));
        }
        for tail in ["", &"x,b\n".repeat(30_000)] {
            for size in [1, 7, 1 << 20] {
                let unclosed = records(&format!("a,b\n\n\"c,d\ne,f\n{tail}"), size).expect_err("not closed");
                assert_eq!(unclosed.line(), Some(3));
            }
        }
    }

    #[test]
    fn lines_know_their_number_in_any_pieces() {
        let text = format!("a\r\n\n{}\nb", "x".repeat(RECORD_BYTES_MAX + 1));
        for size in [1, 2, 1 << 20] {
            let mut lines = Lines::default();
            let mut seen = Vec::new();
            let mut take = |number, line: Option<&[u8]>| -> Result<(), Refused> {
                seen.push((number, line.map(<[u8]>::to_vec)));
                Ok(())
            };
            for chunk in text.as_bytes().chunks(size) {
                lines.push(chunk, &mut take).expect("taken");
            }
            lines.finish(&mut take).expect("taken");
            assert_eq!(seen, [(1, Some(b"a\r".to_vec())), (2, Some(Vec::new())), (3, None), (4, Some(b"b".to_vec()))]);
        }
    }
}
