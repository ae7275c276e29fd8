//! How an import is cut into transactions, and how its entries are counted.

use super::{entry::Entry, failure::Failure};

/// A stream of this many entries or fewer is always one batch, and so one transaction: HTTP callers are promised that all
/// of a JSON import is stored or none of it.
pub const BATCH_ENTRIES_MIN: usize = 10_000;

/// The entries described in an answer; further refused ones are counted only.
const ERRORS_MAX: usize = 10_000;

/// Entries on their way into one transaction: bounded, and sorted and without repeats when they leave.
#[derive(Debug)]
pub struct Batch {
    entries: Vec<Entry>,
    octets: usize,
    entries_max: usize,
}

impl Batch {
    /// Larger batches are faster, but a batch of long texts is cut once it holds this much, so that memory stays bounded.
    const OCTETS_MAX: usize = 4 << 20;

    /// An empty batch that is full at `entries_max` entries ([`BATCH_ENTRIES_MIN`] at least).
    pub fn new(entries_max: usize) -> Self {
        Self { entries: Vec::new(), octets: 0, entries_max: entries_max.max(BATCH_ENTRIES_MIN) }
    }

    /// Takes one more entry.
    pub fn push(&mut self, entry: Entry) {
        self.octets += entry.address.as_str().len() + entry.reason.as_str().len();
        self.entries.push(entry);
    }

    /// True when the batch should be stored before another entry is pushed.
    pub fn is_full(&self) -> bool {
        let count = self.entries.len();
        count >= self.entries_max || (count >= BATCH_ENTRIES_MIN && self.octets >= Self::OCTETS_MAX)
    }

    /// The number of entries pushed, repeats included.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True when nothing was pushed.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entries in the order of their addresses' octets, each address once with the reason it came with first.
    ///
    /// That is the order of the table's key, so overlapping batches wait for each other in one direction only and cannot
    /// dead-lock; it also makes the insert faster.
    pub fn into_sorted(mut self) -> Vec<Entry> {
        // Stable, so that of equal addresses the first one stays.
        self.entries.sort_by(|a, b| a.address.cmp(&b.address));
        self.entries.dedup_by(|later, first| later.address == first.address);
        self.entries
    }
}

/// What became of an import's entries so far. `imported + skipped + failed` is the number received.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Newly stored.
    pub imported: u64,
    /// Already there, or repeated.
    pub skipped: u64,
    /// Refused.
    pub failed: u64,
    /// The first refused entries with their places in the stream.
    pub errors: Vec<(u64, Failure)>,
}

impl Tally {
    /// Counts a stored batch: of `received` entries, `imported` were new.
    pub fn stored(&mut self, received: u64, imported: u64) {
        self.imported += imported;
        self.skipped += received.saturating_sub(imported);
    }

    /// Counts a refused entry and keeps its place and cause.
    pub fn refused(&mut self, index: u64, failure: Failure) {
        self.failed += 1;
        if self.errors.len() < ERRORS_MAX {
            self.errors.push((index, failure));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Address, Kind, Reason};

    fn entry(address: &str, reason: &str) -> Entry {
        Entry {
            address: Address::parse(Kind::Email, address.to_owned()).expect("valid"),
            reason: Reason::parse(reason.to_owned()).expect("valid").expect("not empty"),
        }
    }

    #[test]
    fn leaves_sorted_by_octets_and_keeps_the_first_of_repeats() {
        let mut batch = Batch::new(0);
        for (address, reason) in [("b@x.de", "first"), ("ä@x.de", "r"), ("a@x.de", "r"), ("b@x.de", "second")] {
            batch.push(entry(address, reason));
        }
        assert_eq!(batch.len(), 4);
        let sorted = batch.into_sorted();
        let addresses: Vec<_> = sorted.iter().map(|entry| entry.address.as_str()).collect();
        assert_eq!(addresses, ["a@x.de", "b@x.de", "ä@x.de"]);
        assert_eq!(sorted[1].reason.as_str(), "first");
    }

    #[test]
    fn ten_thousand_of_the_longest_entries_are_one_batch() {
        let mut batch = Batch::new(0);
        let long = entry(&format!("{}@{}.de", "a".repeat(64), "b.".repeat(90) + "b"), &"ü".repeat(64));
        for _ in 0..BATCH_ENTRIES_MIN - 1 {
            batch.push(long.clone());
            assert!(!batch.is_full());
        }
        batch.push(long);
        assert!(batch.is_full());
    }

    #[test]
    fn only_the_first_errors_are_kept() {
        let mut tally = Tally::default();
        for index in 0..10_001 {
            tally.refused(index, Failure::InvalidType);
        }
        assert_eq!((tally.failed, tally.errors.len()), (10_001, 10_000));
    }
}
