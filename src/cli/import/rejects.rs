//! The file of rejected rows: each as it stood, with its line and cause, so that it can be mended
//! and imported.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use anyhow::Context;

use super::Options;
use crate::{
    cli::{input::require_other_file, new_file::NewFile},
    files::{escape_formula, write_csv_row},
};

const COLUMNS: [&str; 8] = ["email", "type", "reason", "unsubscribedAt", "file", "line", "code", "cause"];

/// A row that the service rejects, as it would have been stored.
#[derive(Debug)]
pub(super) struct Reject {
    pub(super) line: u64,
    pub(super) email: String,
    pub(super) kind: String,
    pub(super) reason: String,
    pub(super) unsubscribed_at: String,
    pub(super) code: &'static str,
    pub(super) cause: String,
}

/// The file on its way.
#[derive(Debug)]
pub(super) struct Rejects(NewFile);

impl Rejects {
    /// Begins the file. It goes on with one that is there when the import goes on.
    pub(super) fn create(path: &Path, options: &Options) -> anyhow::Result<Self> {
        require_other_file("--rejects", path, &options.files)?;
        let before = match fs::read(path) {
            Ok(bytes) if options.skip_lines > 0 && path.is_file() => bytes,
            _ => Vec::new(),
        };
        let mut rejects = Self(NewFile::create(path)?);
        let written = if before.is_empty() { rejects.row(COLUMNS) } else { rejects.0.write_all(&before) };
        written.with_context(|| format!("cannot write {}", path.display()))?;
        Ok(rejects)
    }

    pub(super) fn write(&mut self, file: &str, rejects: &[Reject]) -> io::Result<()> {
        for Reject { line, email, kind, reason, unsubscribed_at, code, cause } in rejects {
            let [email, kind, reason] = [email, kind, reason].map(|text| escape_formula(text));
            self.row([&*email, &kind, &reason, unsubscribed_at, &escape_formula(file), &line.to_string(), code, cause])?;
        }
        if rejects.is_empty() { Ok(()) } else { self.0.flush() }
    }

    fn row<const N: usize>(&mut self, cells: [&str; N]) -> io::Result<()> {
        let mut row = Vec::new();
        write_csv_row(&mut row, b',', cells, b"\n");
        self.0.write_all(&row)
    }

    /// Gives the file its name, whatever became of the import.
    pub(super) fn finish(self) -> anyhow::Result<()> {
        self.0.finish()
    }
}
