//! Cells that no spreadsheet takes for a formula.
//!
//! A cell that would be one gets an apostrophe in front. So does a cell that starts with
//! apostrophes before such a character, which makes it possible to take the apostrophe away again.

use std::borrow::Cow;

/// The cell as it is written into a CSV file.
pub fn escape_formula(cell: &str) -> Cow<'_, str> {
    if starts_formula(cell.trim_start_matches('\'')) { format!("'{cell}").into() } else { cell.into() }
}

/// The cell that [`escape_formula`] was given.
pub fn unescape_formula(cell: &str) -> &str {
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
    use super::*;

    #[test]
    fn a_cell_is_no_formula_and_still_means_itself() {
        for cell in ["=1+1", "+tag@example.com", "-x@example.com", "@SUM(1)", "\tx", "'=x", "''+x", "'", "'a", "plain", ""] {
            let written = escape_formula(cell);
            assert!(!starts_formula(&written), "{cell:?}");
            assert_eq!(unescape_formula(&written), cell);
        }
        assert_eq!(escape_formula("o'brien@example.ie"), "o'brien@example.ie");
    }
}
