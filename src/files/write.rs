//! Files that are written: an export of the list, and the answers to a mailing list. CSV as RFC
//! 4180 has it, and NDJSON; what is written here can be read here again.

use serde::Serialize;

use super::{escape_formula, time};
use crate::{domain::Kind, proto::Entry};

/// A format of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A header row and a row an entry.
    Csv,
    /// A JSON object a line.
    Ndjson,
}

/// The name of the type of this number. Without a type, an entry is an e-mail address.
pub fn type_name(number: i32) -> &'static str {
    Kind::of_number(number).unwrap_or(Kind::Email).name()
}

/// The columns of an export.
const COLUMNS: [&str; 6] = ["email", "type", "reason", "unsubscribedAt", "createdAt", "addedBy"];

impl Format {
    /// What comes before the first entry of an export.
    pub fn head(self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if self == Self::Csv {
            write_csv_row(&mut bytes, b',', COLUMNS, b"\r\n");
        }
        bytes
    }

    /// Some entries as a part of an export.
    ///
    /// # Errors
    /// Never for entries that came out of the service.
    pub fn write(self, entries: Vec<Entry>) -> Result<Vec<u8>, std::io::Error> {
        let mut bytes = Vec::new();
        for entry in entries {
            let kind = type_name(entry.r#type);
            let created_at = time::text(entry.create_time.unwrap_or_default());
            let unsubscribed_at = entry.unsubscribe_time.map_or_else(|| created_at.clone(), time::text);
            match self {
                Self::Csv => {
                    let (email, reason) = (escape_formula(&entry.email), escape_formula(&entry.reason));
                    let cells = [&*email, kind, &reason, &unsubscribed_at, &created_at, &entry.added_by];
                    write_csv_row(&mut bytes, b',', cells, b"\r\n");
                }
                Self::Ndjson => {
                    let line = Line {
                        email: &entry.email,
                        r#type: kind,
                        reason: &entry.reason,
                        unsubscribed_at: &unsubscribed_at,
                        created_at: &created_at,
                        added_by: &entry.added_by,
                    };
                    serde_json::to_writer(&mut bytes, &line)?;
                    bytes.push(b'\n');
                }
            }
        }
        Ok(bytes)
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Line<'a> {
    email: &'a str,
    r#type: &'a str,
    reason: &'a str,
    unsubscribed_at: &'a str,
    created_at: &'a str,
    added_by: &'a str,
}

/// Writes one row and its line break.
pub fn write_csv_row<C: AsRef<[u8]>>(out: &mut Vec<u8>, delimiter: u8, cells: impl IntoIterator<Item = C>, line_break: &[u8]) {
    let start = out.len();
    for (place, cell) in cells.into_iter().enumerate() {
        if place > 0 {
            out.push(delimiter);
        }
        write_cell(out, delimiter, cell.as_ref());
    }
    // A blank line would be no row.
    if out.len() == start {
        out.extend_from_slice(b"\"\"");
    }
    out.extend_from_slice(line_break);
}

fn write_cell(out: &mut Vec<u8>, delimiter: u8, cell: &[u8]) {
    let must_be_quoted = |byte: &u8| *byte == delimiter || matches!(byte, b'"' | b'\r' | b'\n');
    if !cell.iter().any(must_be_quoted) {
        return out.extend_from_slice(cell);
    }
    out.push(b'"');
    for byte in cell {
        if *byte == b'"' {
            out.push(b'"');
        }
        out.push(*byte);
    }
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use prost_types::Timestamp;

    use super::*;

    fn row(delimiter: u8, cells: &[&str]) -> String {
        let mut out = Vec::new();
        write_csv_row(&mut out, delimiter, cells, b"\n");
        String::from_utf8(out).expect("UTF-8")
    }

    #[test]
    fn cells_are_quoted_only_if_they_must_be() {
        assert_eq!(row(b',', &["a", "b c", "d;e", ""]), "a,b c,d;e,\n");
        assert_eq!(row(b';', &["a,b", "d;e", "f\"g", "h\ni"]), "a,b;\"d;e\";\"f\"\"g\";\"h\ni\"\n");
        assert_eq!(row(b',', &[""]), "\"\"\n");
    }

    #[test]
    fn an_export_says_when_somebody_opted_out_or_was_stored() {
        let entry = |seconds: Option<i64>| Entry {
            email: "=a@example.com".into(),
            r#type: 1,
            reason: "said \"no\", twice".into(),
            create_time: Some(Timestamp { seconds: 1_000_000_000, nanos: 0 }),
            unsubscribe_time: seconds.map(|seconds| Timestamp { seconds, nanos: 0 }),
            ..Entry::default()
        };
        let text = |format: Format| {
            let bytes = [format.head(), format.write(vec![entry(Some(0)), entry(None)]).expect("a part")].concat();
            String::from_utf8(bytes).expect("UTF-8")
        };
        assert_eq!(
            text(Format::Csv),
            "email,type,reason,unsubscribedAt,createdAt,addedBy\r\n\
             '=a@example.com,email,\"said \"\"no\"\", twice\",1970-01-01T00:00:00.000Z,2001-09-09T01:46:40.000Z,\r\n\
             '=a@example.com,email,\"said \"\"no\"\", twice\",2001-09-09T01:46:40.000Z,2001-09-09T01:46:40.000Z,\r\n"
        );
        assert!(text(Format::Ndjson).starts_with(
            "{\"email\":\"=a@example.com\",\"type\":\"email\",\"reason\":\"said \\\"no\\\", twice\",\
             \"unsubscribedAt\":\"1970-01-01T00:00:00.000Z\",\"createdAt\":"
        ));
    }
}
