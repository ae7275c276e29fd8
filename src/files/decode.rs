//! From the bytes of a file to UTF-8: which compression it has, how far a compressed file may
//! expand, and text in UTF-16.
//!
//! The decompressors themselves stand where the bytes come from, one that reads for files and one
//! that waits for HTTP bodies; the limits are the same for both and stand here. Text in an older
//! encoding, such as Windows-1252, has no mark that names it. It is found where a cell that counts
//! is not UTF-8, and then that row is rejected with [`NOT_UTF8`]: a name that nobody reads costs
//! nobody an entry.

use std::{
    io::{self, BufRead, Read},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::Refused;

/// Decompressed bytes for one compressed byte at most, once more than [`EXPANSION_FREE_BYTES`] have
/// come out. Lists of addresses shrink to a tenth or so, and hardly ever to a hundredth; what grows
/// more than this was made to keep a server busy.
pub const EXPANSION_MAX: u64 = 250;

/// Decompressed bytes that are never too many.
pub const EXPANSION_FREE_BYTES: u64 = 16 << 20;

/// The largest window of a zstd frame, as a power of two: 8 MiB, which RFC 9659 sets for HTTP. The
/// decoder keeps as much in memory.
pub const ZSTD_WINDOW_LOG_MAX: u32 = 23;

/// How many bytes tell a compression.
const COMPRESSION_START_BYTES: u64 = 4;

/// What is wrong with a cell that is not UTF-8.
pub(super) const NOT_UTF8: &str = "is not UTF-8; save the file as UTF-8, which spreadsheets call \"CSV UTF-8\"";

/// How a file is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// RFC 1952; several members may follow each other.
    Gzip,
    /// RFC 8878; several frames may follow each other.
    Zstd,
}

impl Compression {
    /// The compression of a file that starts like this.
    pub fn of_start(start: &[u8]) -> Self {
        if start.starts_with(&[0x1f, 0x8b]) {
            Self::Gzip
        } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            Self::Zstd
        } else {
            Self::None
        }
    }
}

/// Whether so many decompressed bytes are too many for so many compressed ones.
pub fn expands_too_much(bytes_in: u64, bytes_out: u64) -> bool {
    bytes_out > EXPANSION_FREE_BYTES.max(EXPANSION_MAX.saturating_mul(bytes_in))
}

/// Whether a zstd decoder failed because a frame's window is larger than [`ZSTD_WINDOW_LOG_MAX`].
/// The library keeps the error's number to itself.
pub fn is_window_too_large(error: &io::Error) -> bool {
    error.to_string() == "Frame requires too much memory for decoding"
}

/// A file, decompressed as it is read, within the limits. `bytes_in` is how much of the file itself
/// was read so far.
///
/// # Errors
/// Of the first read.
pub fn decompress(mut file: impl BufRead + Send + 'static, bytes_in: Arc<AtomicU64>) -> io::Result<Box<dyn Read + Send>> {
    let mut start = Vec::new();
    (&mut file).take(COMPRESSION_START_BYTES).read_to_end(&mut start)?;
    let compression = Compression::of_start(&start);
    let file = io::Cursor::new(start).chain(file);
    Ok(match compression {
        Compression::None => Box::new(file),
        Compression::Gzip => Box::new(Decompressed { decoder: flate2::bufread::MultiGzDecoder::new(file), bytes_in, bytes_out: 0 }),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(file)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
            Box::new(Decompressed { decoder, bytes_in, bytes_out: 0 })
        }
    })
}

struct Decompressed<D> {
    decoder: D,
    bytes_in: Arc<AtomicU64>,
    bytes_out: u64,
}

impl<D: Read> Read for Decompressed<D> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.decoder.read(buffer).map_err(|error| {
            let advice = "its zstd window is larger than 8 MiB; compress it with a smaller one, such as zstd --long=23";
            if is_window_too_large(&error) { io::Error::other(advice) } else { error }
        })?;
        self.bytes_out += count as u64;
        if expands_too_much(self.bytes_in.load(Ordering::Relaxed), self.bytes_out) {
            return Err(io::Error::other(format!(
                "it decompresses to more than {EXPANSION_MAX} times its size; decompress it first, if that is right"
            )));
        }
        Ok(count)
    }
}

/// The text of a file as UTF-8: without a byte order mark, and out of UTF-16 if the mark says so.
#[derive(Debug, Default)]
pub(super) struct Text {
    encoding: Encoding,
    /// The first bytes, until there are enough of them.
    start: Vec<u8>,
    out: Vec<u8>,
}

#[derive(Debug, Default)]
enum Encoding {
    #[default]
    Unknown,
    Utf8,
    Utf16(Utf16),
}

#[derive(Debug)]
struct Utf16 {
    is_big_endian: bool,
    /// The first byte of a unit whose second has not come.
    byte: Option<u8>,
    /// The first unit of a pair whose second has not come.
    high: Option<u16>,
}

/// As many bytes as the longest of the signatures below.
const START_BYTES: usize = 4;

impl Text {
    /// The next bytes as UTF-8, as far as they are known to be text.
    ///
    /// # Errors
    /// What the file is instead of text.
    pub(super) fn push<'a>(&'a mut self, chunk: &'a [u8]) -> Result<&'a [u8], Refused> {
        match &mut self.encoding {
            Encoding::Utf8 => return Ok(chunk),
            Encoding::Utf16(utf16) => {
                self.out.clear();
                utf16.push(chunk, &mut self.out);
            }
            Encoding::Unknown => {
                self.start.extend_from_slice(chunk);
                if self.start.len() < START_BYTES {
                    return Ok(&[]);
                }
                self.begin()?;
            }
        }
        Ok(&self.out)
    }

    /// What is left at the end of the file.
    ///
    /// # Errors
    /// What the file is instead of text.
    pub(super) fn finish(&mut self) -> Result<&[u8], Refused> {
        self.out.clear();
        if matches!(self.encoding, Encoding::Unknown) {
            self.begin()?;
        }
        if let Encoding::Utf16(utf16) = &mut self.encoding {
            utf16.finish(&mut self.out);
        }
        Ok(&self.out)
    }

    /// Tells the encoding by the first bytes, which become the first text.
    fn begin(&mut self) -> Result<(), Refused> {
        let start = std::mem::take(&mut self.start);
        for (signature, what) in [
            (&b"PK\x03\x04"[..], "is a zip archive or a spreadsheet; save the spreadsheet as CSV, or unpack the archive"),
            (b"PK\x05\x06", "is an empty zip archive"),
            (b"\xd0\xcf\x11\xe0", "is a spreadsheet or another document; save it as CSV"),
            (b"%PDF", "is a PDF document; use the list that it was made of"),
            (b"\x1f\x8b", "is compressed with gzip; say so with Content-Encoding: gzip, or decompress it first"),
            (b"\x28\xb5\x2f\xfd", "is compressed with zstd; say so with Content-Encoding: zstd, or decompress it first"),
        ] {
            if start.starts_with(signature) {
                return Err(Refused::NotText(what));
            }
        }
        let utf16 = |is_big_endian| Utf16 { is_big_endian, byte: None, high: None };
        if let Some(text) = start.strip_prefix("\u{feff}".as_bytes()) {
            self.out.extend_from_slice(text);
            self.encoding = Encoding::Utf8;
        } else if let Some(text) = start.strip_prefix(&[0xff, 0xfe]).or_else(|| start.strip_prefix(&[0xfe, 0xff])) {
            let mut utf16 = utf16(start[0] == 0xfe);
            utf16.push(text, &mut self.out);
            self.encoding = Encoding::Utf16(utf16);
        } else {
            self.out = start;
            self.encoding = Encoding::Utf8;
        }
        Ok(())
    }
}

impl Utf16 {
    fn push(&mut self, chunk: &[u8], out: &mut Vec<u8>) {
        for byte in chunk {
            let Some(first) = self.byte.take() else {
                self.byte = Some(*byte);
                continue;
            };
            let unit = if self.is_big_endian { [first, *byte] } else { [*byte, first] };
            self.unit(u16::from_be_bytes(unit), out);
        }
    }

    fn unit(&mut self, unit: u16, out: &mut Vec<u8>) {
        if let Some(high) = self.high.take() {
            match char::decode_utf16([high, unit]).next() {
                Some(Ok(c)) => return write(c, out),
                // Half of a pair, and then something else.
                _ => write(char::REPLACEMENT_CHARACTER, out),
            }
        }
        if (0xd800..0xdc00).contains(&unit) {
            self.high = Some(unit);
        } else {
            write(char::from_u32(unit.into()).unwrap_or(char::REPLACEMENT_CHARACTER), out);
        }
    }

    fn finish(&mut self, out: &mut Vec<u8>) {
        if self.byte.take().is_some() | self.high.take().is_some() {
            write(char::REPLACEMENT_CHARACTER, out);
        }
    }
}

fn write(c: char, out: &mut Vec<u8>) {
    out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(bytes: &[u8], size: usize) -> Result<Vec<u8>, Refused> {
        let (mut text, mut out) = (Text::default(), Vec::new());
        for chunk in bytes.chunks(size) {
            out.extend_from_slice(text.push(chunk)?);
        }
        out.extend_from_slice(text.finish()?);
        Ok(out)
    }

    #[test]
    fn a_byte_order_mark_says_the_encoding_in_any_pieces() {
        let written = "a@b.de,ü€\u{1f600}\n";
        let units: Vec<u16> = written.encode_utf16().collect();
        let little: Vec<u8> = [0xfeff].iter().chain(&units).flat_map(|unit| unit.to_le_bytes()).collect();
        let big: Vec<u8> = [0xfeff].iter().chain(&units).flat_map(|unit| unit.to_be_bytes()).collect();
        for size in [1, 2, 3, 5, 1_000] {
            for bytes in [written.as_bytes(), format!("\u{feff}{written}").as_bytes(), &little, &big] {
                assert_eq!(text(bytes, size).as_deref().ok(), Some(written.as_bytes()), "in pieces of {size}");
            }
            assert_eq!(text("\u{feff}".as_bytes(), size).ok(), Some(Vec::new()));
            assert_eq!(text(b"a", size).ok(), Some(b"a".to_vec()));
            assert_eq!(text(b"\xef\xbb", size).ok(), Some(b"\xef\xbb".to_vec()));
            assert_eq!(text(b"", size).ok(), Some(Vec::new()));
        }
    }

    #[test]
    fn half_a_character_of_utf16_is_replaced_and_loses_nothing_else() {
        for (units, expected) in [
            (&[0xfeff, 0xd83d, 0x61][..], "\u{fffd}a"),
            (&[0xfeff, 0xde00, 0x61], "\u{fffd}a"),
            (&[0xfeff, 0xd83d, 0xd83d, 0xde00, 0x61], "\u{fffd}\u{1f600}a"),
            (&[0xfeff, 0x61, 0xd83d], "a\u{fffd}"),
        ] {
            let bytes: Vec<u8> = units.iter().flat_map(|unit: &u16| unit.to_le_bytes()).collect();
            assert_eq!(text(&bytes, 3).as_deref().ok(), Some(expected.as_bytes()));
        }
    }

    #[test]
    fn what_is_no_text_is_named() {
        for (bytes, named) in [
            (&b"PK\x03\x04rest"[..], "spreadsheet"),
            (b"\x1f\x8b\x08\x00rest", "gzip"),
            (b"\x28\xb5\x2f\xfdrest", "zstd"),
            (b"%PDF-1.7", "PDF"),
        ] {
            for size in [1, 3, 100] {
                let refused = text(bytes, size).expect_err(named);
                assert!(refused.to_string().contains(named), "{refused}");
            }
        }
        assert!(text(b"PK,email\n", 3).is_ok());
    }

    /// All that is in a file, decompressed.
    fn read(bytes: Vec<u8>) -> io::Result<usize> {
        let count = Arc::new(AtomicU64::new(bytes.len() as u64));
        let mut reader = decompress(io::Cursor::new(bytes), count)?;
        io::copy(&mut reader, &mut io::sink()).map(|count| count as usize)
    }

    #[test]
    fn files_are_decompressed_within_the_limits() {
        let text = "a@b.de\n".repeat(1_000);
        let gzip = |bytes: &[u8]| {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            io::Write::write_all(&mut encoder, bytes).and_then(|()| encoder.finish()).expect("compressed")
        };
        let zstd = |bytes: &[u8], window_log: u32| {
            let mut encoder = zstd::stream::Encoder::new(Vec::new(), 3).expect("an encoder");
            encoder.window_log(window_log).expect("a window");
            io::Write::write_all(&mut encoder, bytes).and_then(|()| encoder.finish()).expect("compressed")
        };
        let packed = zstd(text.as_bytes(), 20);
        for bytes in [text.clone().into_bytes(), gzip(text.as_bytes()), packed.clone()] {
            assert_eq!(read(bytes).ok(), Some(text.len()));
        }
        assert_eq!(read([gzip(b"a"), gzip(b"b")].concat()).ok(), Some(2));
        assert!(read(packed[..packed.len() - 5].to_vec()).is_err(), "a file that is cut short");
        let blank = vec![b'\n'; 32 << 20];
        for (bytes, named) in [(gzip(&blank), "250 times"), (zstd(&blank, 20), "250 times"), (zstd(&blank, 27), "8 MiB")] {
            let error = read(bytes).expect_err(named).to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
