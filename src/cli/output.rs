//! Tables on standard output: aligned columns with a header for people at a terminal, values
//! separated by tabs for scripts, JSON for programs.

use std::io::{BufWriter, IsTerminal, Write};

use anyhow::Context;
use clap::{Args, builder::FalseyValueParser};
use serde_json::{Map, Value};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use unicode_width::UnicodeWidthStr;

/// How a table is printed.
#[derive(Args, Clone, Copy, Debug)]
pub(super) struct Format {
    /// Print a JSON array of objects
    #[arg(long, env = "DNC_JSON", value_parser = FalseyValueParser::new())]
    json: bool,
}

/// Rows of a fixed number of columns. A null is a value that there is not.
pub(super) struct Table<const N: usize> {
    columns: [&'static str; N],
    rows: Vec<[Value; N]>,
}

impl<const N: usize> Table<N> {
    /// A table without rows. The columns' names are also the fields of the JSON objects.
    pub(super) fn new(columns: [&'static str; N]) -> Self {
        Self { columns, rows: Vec::new() }
    }

    /// Adds a row.
    pub(super) fn push(&mut self, row: [Value; N]) {
        self.rows.push(row);
    }

    /// Prints the table to standard output.
    ///
    /// # Errors
    /// When standard output takes nothing more.
    pub(super) fn print(self, format: Format) -> anyhow::Result<()> {
        let stdout = std::io::stdout();
        let is_terminal = stdout.is_terminal();
        let mut out = BufWriter::new(stdout.lock());
        let written = match (format.json, is_terminal) {
            (true, _) => self.write_json(&mut out),
            (false, true) => self.write_aligned(&mut out),
            (false, false) => self.write_tabs(&mut out),
        };
        written.and_then(|()| out.flush()).context("standard output takes nothing more")
    }

    fn write_json(self, out: &mut impl Write) -> std::io::Result<()> {
        let objects = self.rows.into_iter().map(|row| {
            let fields = self.columns.iter().map(|name| (*name).to_owned()).zip(row);
            Value::Object(fields.collect::<Map<_, _>>())
        });
        serde_json::to_writer_pretty(&mut *out, &objects.collect::<Vec<_>>())?;
        writeln!(out)
    }

    fn write_tabs(self, out: &mut impl Write) -> std::io::Result<()> {
        self.rows.iter().try_for_each(|row| writeln!(out, "{}", row.each_ref().map(text).join("\t")))
    }

    fn write_aligned(self, out: &mut impl Write) -> std::io::Result<()> {
        let header = self.columns.map(|name| name.replace('_', " ").to_uppercase());
        let rows: Vec<_> = std::iter::once(header).chain(self.rows.iter().map(|row| row.each_ref().map(text))).collect();
        let mut widths = [0; N];
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.width());
            }
        }
        for row in &rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(widths) {
                line.push_str(cell);
                line.extend(std::iter::repeat_n(' ', width - cell.width() + 2));
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// A value as a cell of a line, without what would end the cell or move the terminal's cursor.
fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => one_line(text),
        Value::Array(values) => values.iter().map(text).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// A text as a part of a line: without what would end the line or move the terminal's cursor.
pub(super) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// A time as RFC 3339 in whole seconds.
pub(super) fn instant(at: OffsetDateTime) -> String {
    at.replace_nanosecond(0).unwrap_or(at).format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn written(write: fn(Table<3>, &mut Vec<u8>) -> std::io::Result<()>) -> String {
        let mut table = Table::new(["id", "created_at", "names"]);
        table.push([json!("ws_1"), Value::Null, json!(["a\tb", "c"])]);
        table.push([json!("ws_100"), json!("2024"), json!([])]);
        let mut out = Vec::new();
        write(table, &mut out).expect("memory takes everything");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn a_table_is_for_people_for_scripts_or_for_programs() {
        assert_eq!(written(Table::write_tabs), "ws_1\t\ta\u{fffd}b,c\nws_100\t2024\t\n");
        let aligned = "ID      CREATED AT  NAMES\nws_1                a\u{fffd}b,c\nws_100  2024\n";
        assert_eq!(written(Table::write_aligned), aligned);
        let parsed: Value = serde_json::from_str(&written(Table::write_json)).expect("JSON");
        let expected = json!([
            { "id": "ws_1", "created_at": null, "names": ["a\tb", "c"] },
            { "id": "ws_100", "created_at": "2024", "names": [] },
        ]);
        assert_eq!(parsed, expected);
    }
}
