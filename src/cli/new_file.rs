//! A file that is written anew and has its name only when it is done, so that nobody takes a part
//! of it for the whole.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::Context;
use tempfile::NamedTempFile;

/// A file on its way. Dropped before it is done, it leaves nothing behind.
#[derive(Debug)]
pub(super) struct NewFile {
    path: PathBuf,
    writer: Writer,
}

#[derive(Debug)]
enum Writer {
    Renamed(BufWriter<NamedTempFile>),
    /// A pipe or a device, which must not be replaced.
    InPlace(BufWriter<File>),
}

impl NewFile {
    /// Begins a file that will have this name; a file that has it now stays until then.
    pub(super) fn create(path: &Path) -> anyhow::Result<Self> {
        let context = || format!("cannot write {}", path.display());
        // Of a link, the file that it leads to is written.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let writer = if path.metadata().is_ok_and(|meta| !meta.is_file()) {
            Writer::InPlace(BufWriter::new(File::options().write(true).open(&path).with_context(context)?))
        } else {
            let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let file =
                tempfile::Builder::new().prefix(&format!(".{name}.")).suffix(".new").tempfile_in(dir).with_context(context)?;
            Writer::Renamed(BufWriter::new(file))
        };
        Ok(Self { path, writer })
    }

    /// Gives the file its name.
    pub(super) fn finish(mut self) -> anyhow::Result<()> {
        let context = || format!("cannot write {}", self.path.display());
        self.writer.flush().with_context(context)?;
        if let Writer::Renamed(writer) = self.writer {
            let file = writer.into_inner().map_err(io::IntoInnerError::into_error).with_context(context)?;
            file.persist(&self.path).map_err(|error| error.error).with_context(context)?;
        }
        Ok(())
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Renamed(writer) => writer.write(bytes),
            Self::InPlace(writer) => writer.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Renamed(writer) => writer.flush(),
            Self::InPlace(writer) => writer.flush(),
        }
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_file_has_its_name_only_when_it_is_done() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("list.csv");
        fs::write(&path, "old").expect("written");
        let mut file = NewFile::create(&path).expect("created");
        file.write_all(b"half").expect("written");
        drop(file);
        assert_eq!(fs::read_to_string(&path).expect("there"), "old");
        assert_eq!(fs::read_dir(dir.path()).expect("there").count(), 1, "nothing is left behind");
        let mut file = NewFile::create(&path).expect("created");
        file.write_all(b"new").expect("written");
        file.finish().expect("renamed");
        assert_eq!(fs::read_to_string(&path).expect("there"), "new");
    }
}
