//! Files that are named on the command line: opened, decompressed, and read row by row.

use std::{
    fs::{File, Metadata},
    io::{self, BufReader, Read},
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Context, bail};

use crate::files::{Options, Reader, Refused, Row, decompress};

const READ_BYTES: usize = 256 << 10;

/// A file that is open, and decompressed as it is read.
pub(super) struct Input {
    /// Its name for people.
    pub(super) name: String,
    /// How many bytes it has, compressed as it is; none when nobody can say.
    pub(super) bytes: Option<u64>,
    /// How many of them were read.
    pub(super) bytes_read: Arc<AtomicU64>,
    reader: Box<dyn Read + Send>,
}

/// Why reading ended before the file did.
#[derive(Debug)]
pub(super) enum ReadEnd {
    /// Whoever takes the rows wants no more.
    Stopped,
    /// The file cannot be read on, and why, as the end of a sentence about it.
    Broken(String),
}

impl From<Refused> for ReadEnd {
    fn from(refused: Refused) -> Self {
        let advice = if refused == Refused::NoAddressColumn { "; name it with --column" } else { "" };
        Self::Broken(format!("{refused}{advice}"))
    }
}

impl From<io::Error> for ReadEnd {
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
        let (name, bytes, raw): (_, _, Box<dyn Read + Send>) = if is_stdin(path) {
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
        let counted = BufReader::with_capacity(READ_BYTES, Counting(raw, bytes_read.clone()));
        let reader = decompress(counted, bytes_read.clone()).with_context(|| format!("cannot read {name}"))?;
        Ok(Self { name, bytes, bytes_read, reader })
    }

    /// Hands every row to `take`, until one is answered with an error.
    pub(super) fn read(self, options: Options, mut take: impl FnMut(Row<'_>) -> Result<(), ReadEnd>) -> Result<(), ReadEnd> {
        let file_name = Path::new(&self.name).file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let mut rows = Reader::new(Options { file_name, ..options });
        let mut reader = self.reader;
        let mut buffer = vec![0; READ_BYTES];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return rows.finish(take),
                Ok(count) => rows.push(&buffer[..count], &mut take)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Whether this names standard input.
pub(super) fn is_stdin(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// Fails if `output` would write over one of the files that are read, under whatever name.
pub(super) fn require_other_file(flag: &str, output: &Path, inputs: &[PathBuf]) -> anyhow::Result<()> {
    let Ok(there) = output.metadata() else { return Ok(()) };
    let identity = |meta: &Metadata| (meta.dev(), meta.ino());
    for input in inputs {
        let meta =
            if is_stdin(input) { File::from(io::stdin().as_fd().try_clone_to_owned()?).metadata() } else { input.metadata() };
        if meta.is_ok_and(|meta| meta.is_file() && identity(&meta) == identity(&there)) {
            bail!("{flag} would write over {}, which is read; choose another name", output.display());
        }
    }
    Ok(())
}

/// The time, in seconds since 1970.
pub(super) fn now() -> i64 {
    time::OffsetDateTime::now_utc().unix_timestamp()
}
