//! How an import is cut into transactions, and how its entries are counted.

use time::OffsetDateTime;

use super::{
    entry::Entry,
    failure::{Cause, Rejected},
};

/// A stream of this many entries or fewer is always one batch, and so one transaction: HTTP callers
/// are promised that all of a JSON import is stored or none of it.
pub const BATCH_ENTRIES_MIN: usize = 10_000;

/// The entries described in an answer; further refused ones are counted only.
const ERRORS_MAX: usize = 10_000;

/// Entries on their way into one transaction, in bounded memory.
///
/// The texts stand one behind the other in one buffer. A text of its own for each would be freed on
/// another thread than it was made on, which cost a third of an import's processor time.
pub struct Batch {
    text: String,
    places: Vec<Place>,
    opt_outs: OptOuts,
    entries_max: usize,
}

/// The times of the opt-outs that are known, each after the offset of its entry's address, in that
/// order. Most imports have none, and then this costs nothing.
type OptOuts = Vec<(u32, OffsetDateTime)>;

/// Where an entry's texts are.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// The first octets of the address, as a number that sorts as they do: most comparisons need no
    /// more.
    prefix: u128,
    /// Where the address begins. Later entries have larger numbers.
    address: u32,
    reason: u32,
    address_len: u16,
    reason_len: u16,
}

impl Batch {
    /// Larger batches are faster, but a batch of long texts is cut once it holds this much, so that
    /// memory stays bounded.
    const OCTETS_MAX: usize = 4 << 20;

    /// An empty batch that is full at `entries_max` entries ([`BATCH_ENTRIES_MIN`] at least).
    pub fn new(entries_max: usize) -> Self {
        Self { text: String::new(), places: Vec::new(), opt_outs: Vec::new(), entries_max: entries_max.max(BATCH_ENTRIES_MIN) }
    }

    /// Takes one more entry.
    pub fn push(&mut self, entry: &Entry) {
        let (address, reason) = (entry.address.as_str(), entry.reason.as_str());
        // Both lengths are bounded by the rules for an address and a reason, and so is their sum
        // for a batch.
        let address_at = self.text.len() as u32;
        self.text.push_str(address);
        self.opt_outs.extend(entry.unsubscribed_at.map(|at| (address_at, at)));
        // Reasons come in rows of equal ones.
        let (reason_at, reason_len) = match self.places.last() {
            Some(last) if last.reason(&self.text) == reason => (last.reason, last.reason_len),
            _ => {
                let at = self.text.len() as u32;
                self.text.push_str(reason);
                (at, reason.len() as u16)
            }
        };
        let mut prefix = [0; 16];
        let count = address.len().min(prefix.len());
        prefix[..count].copy_from_slice(&address.as_bytes()[..count]);
        self.places.push(Place {
            prefix: u128::from_be_bytes(prefix),
            address: address_at,
            reason: reason_at,
            address_len: address.len() as u16,
            reason_len,
        });
    }

    /// True when the batch should be stored before another entry is pushed.
    pub fn is_full(&self) -> bool {
        let count = self.places.len();
        count >= self.entries_max || (count >= BATCH_ENTRIES_MIN && self.text.len() >= Self::OCTETS_MAX)
    }

    /// The number of entries pushed, repeats included.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// True when nothing was pushed.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The entries in the order of their addresses' octets, each address once with the reason it
    /// came with first.
    ///
    /// That is the order of the table's key, so overlapping batches wait for each other in one
    /// direction only and cannot dead-lock; it also makes the insert faster.
    pub fn into_sorted(self) -> Sorted {
        let Self { text, mut places, opt_outs, .. } = self;
        places.sort_unstable_by(|a, b| {
            let by_address = a.prefix.cmp(&b.prefix).then_with(|| a.address(&text).cmp(b.address(&text)));
            // Of equal addresses the first one stays.
            by_address.then(a.address.cmp(&b.address))
        });
        places.dedup_by(|later, first| later.prefix == first.prefix && later.address(&text) == first.address(&text));
        Sorted { text, places, opt_outs }
    }
}

impl Place {
    fn address(self, text: &str) -> &str {
        &text[self.address as usize..][..self.address_len.into()]
    }

    fn reason(self, text: &str) -> &str {
        &text[self.reason as usize..][..self.reason_len.into()]
    }
}

/// The entries of a batch by address, each address once.
pub struct Sorted {
    text: String,
    places: Vec<Place>,
    opt_outs: OptOuts,
}

impl Sorted {
    /// The addresses, in the order of their octets.
    pub fn addresses(&self) -> Vec<&str> {
        self.places.iter().map(|place| place.address(&self.text)).collect()
    }

    /// The reason of each address.
    pub fn reasons(&self) -> Vec<&str> {
        self.places.iter().map(|place| place.reason(&self.text)).collect()
    }

    /// When each address opted out, where that is known; `None` when it is known of no address.
    pub fn unsubscribed_at(&self) -> Option<Vec<Option<OffsetDateTime>>> {
        let of = |place: &Place| {
            let found = self.opt_outs.binary_search_by_key(&place.address, |(address, _)| *address);
            found.ok().map(|known| self.opt_outs[known].1)
        };
        (!self.opt_outs.is_empty()).then(|| self.places.iter().map(of).collect())
    }
}

/// What became of an import's entries so far. `imported + skipped + failed` is the number received.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Newly stored.
    pub imported: u64,
    /// Already there, or repeated.
    pub skipped: u64,
    /// Rejected.
    pub failed: u64,
    /// The first rejected entries.
    pub errors: Vec<Rejected>,
}

impl Tally {
    /// Counts a stored batch: of `received` entries, `imported` were new.
    pub fn stored(&mut self, received: u64, imported: u64) {
        self.imported += imported;
        self.skipped += received.saturating_sub(imported);
    }

    /// Counts a rejected entry, and keeps it if it is one of the first.
    pub fn rejected(&mut self, index: u64, line: u64, cause: Cause) {
        self.failed += 1;
        if self.errors.len() < ERRORS_MAX {
            self.errors.push(Rejected { index, line, cause });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Failure, Kind, Reason};

    fn entry(address: &str, reason: &str) -> Entry {
        let reason = Reason::parse(reason.to_owned()).expect("valid").expect("not empty");
        Entry::parse(Kind::Email, address.to_owned(), String::new(), &reason).expect("valid")
    }

    #[test]
    fn leaves_sorted_by_octets_and_keeps_the_first_of_repeats() {
        let mut batch = Batch::new(0);
        let entries = [
            ("b@x.de", "first"),
            ("ä@x.de", "r"),
            ("a@x.de", "r"),
            ("b@x.de", "second"),
            ("a@x.de.com", "r"),
            ("a-long-one@x.de", "s"),
            ("a-long-on@x.de", "s"),
        ];
        for (address, reason) in entries {
            batch.push(&entry(address, reason));
        }
        assert_eq!(batch.len(), entries.len());
        let sorted = batch.into_sorted();
        let mut expected: Vec<_> = entries.iter().map(|(address, _)| *address).collect();
        expected.sort_unstable();
        expected.dedup();
        assert_eq!(sorted.addresses(), expected);
        assert_eq!(sorted.reasons(), ["s", "s", "r", "r", "first", "r"]);
    }

    #[test]
    fn a_batch_is_full_at_its_limit_or_when_its_texts_are_large() {
        let (short, long) = (entry("a@x.de", "r"), entry(&format!("{}@{}.de", "a".repeat(64), "b.".repeat(90) + "b"), "r"));
        let full_at = |of: &Entry| {
            let mut batch = Batch::new(50_000);
            assert!(batch.is_empty());
            while !batch.is_full() {
                batch.push(of);
                assert!(!batch.is_empty());
            }
            batch.len()
        };
        assert_eq!(full_at(&short), 50_000);
        let octets = long.address.as_str().len();
        assert_eq!(full_at(&long), (Batch::OCTETS_MAX - 1).div_ceil(octets));
    }

    #[test]
    fn a_reason_that_comes_in_a_row_is_kept_once() {
        let mut batch = Batch::new(0);
        for (address, reason) in
            [("a@x.de", "long reason"), ("b@x.de", "long reason"), ("c@x.de", "other"), ("d@x.de", "long reason")]
        {
            batch.push(&entry(address, reason));
        }
        assert_eq!(batch.text, "a@x.delong reasonb@x.dec@x.deotherd@x.delong reason");
        assert_eq!(batch.into_sorted().reasons(), ["long reason", "long reason", "other", "long reason"]);
    }

    #[test]
    fn an_opt_out_stays_with_its_address() {
        let now = OffsetDateTime::UNIX_EPOCH;
        let mut batch = Batch::new(0);
        for (address, secs) in [("b@x.de", Some(1)), ("c@x.de", None), ("a@x.de", Some(2)), ("b@x.de", Some(3))] {
            let entry = entry(address, "r");
            batch.push(&Entry { unsubscribed_at: secs.map(|secs| now - time::Duration::seconds(secs)), ..entry });
        }
        let sorted = batch.into_sorted();
        assert_eq!(sorted.addresses(), ["a@x.de", "b@x.de", "c@x.de"]);
        let times = [Some(2), Some(1), None].map(|secs| secs.map(|secs| now - time::Duration::seconds(secs)));
        assert_eq!(sorted.unsubscribed_at(), Some(times.to_vec()));
        let mut without = Batch::new(0);
        without.push(&entry("a@x.de", "r"));
        assert_eq!(without.into_sorted().unsubscribed_at(), None);
    }

    #[test]
    fn a_tally_counts_what_was_stored_and_what_was_there() {
        let mut tally = Tally::default();
        tally.stored(10, 7);
        tally.stored(5, 5);
        assert_eq!((tally.imported, tally.skipped, tally.failed), (12, 3, 0));
    }

    #[test]
    fn ten_thousand_of_the_longest_entries_are_one_batch() {
        let mut batch = Batch::new(0);
        let long = entry(&format!("{}@{}.de", "a".repeat(64), "b.".repeat(90) + "b"), &"ü".repeat(64));
        for _ in 0..BATCH_ENTRIES_MIN - 1 {
            batch.push(&long);
            assert!(!batch.is_full());
        }
        batch.push(&long);
        assert!(batch.is_full());
    }

    #[test]
    fn only_the_first_errors_are_kept() {
        let mut tally = Tally::default();
        for index in 0..10_001 {
            tally.rejected(index, 0, Cause::Failure(Failure::InvalidType));
        }
        assert_eq!((tally.failed, tally.errors.len()), (10_001, 10_000));
    }
}
