//! Texts for the fuzz targets, which are ordinary tests and stand with the code that they try.
//!
//! Each target gets bytes: the files of its corpus (`__fuzz__/TARGET/corpus` beside the source),
//! then random ones for a second, or for as long as `BOLERO_RANDOM_TEST_TIME_MS` says. Random bytes
//! hardly ever make a header or an address, so a target also tries the text that they choose from
//! an alphabet of its own.

/// The text whose parts the bytes choose.
pub(crate) fn spelled(bytes: &[u8], alphabet: &[&str]) -> String {
    bytes.iter().map(|byte| alphabet[usize::from(*byte) % alphabet.len()]).collect()
}

/// The bytes in pieces: the first one says how long they are. One in four is cut at every byte.
pub(crate) fn pieces(bytes: &[u8]) -> (usize, &[u8]) {
    match bytes.split_first() {
        Some((size, rest)) => (usize::from(size % 4) * (1 + usize::from(size / 4)) + 1, rest),
        None => (1, bytes),
    }
}
