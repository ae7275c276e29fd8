//! Batches of an import, one transaction each, and the counts of its entries.

use time::OffsetDateTime;

use super::{
    entry::Entry,
    failure::{Cause, Rejected},
};

/// A stream of up to this many entries is always one batch, and so one transaction. HTTP callers
/// rely on it: a JSON import is stored completely or not at all.
pub const BATCH_ENTRIES_MIN: usize = 10_000;

/// The largest number of rejected entries described in an answer. Further ones are only counted.
const ERRORS_KEPT_MAX: usize = 10_000;

/// Entries of one transaction, in bounded memory.
///
/// All texts are stored in one buffer, one after the other. A separate allocation for each text
/// would be freed on another thread than the one that made it, which cost a third of an import's
/// processor time.
pub struct Batch {
    text: String,
    spans: Vec<Span>,
    opt_outs: OptOuts,
    entries_max: usize,
}

/// The known times of opt-outs, each with the offset of its entry's address, sorted by that offset.
/// Most imports have none, and then this costs nothing.
type OptOuts = Vec<(u32, OffsetDateTime)>;

/// The offsets and lengths of an entry's texts in the buffer of its batch.
#[derive(Clone, Copy, Debug)]
struct Span {
    /// The first bytes of the address as a big-endian number, which sorts as the bytes do. Most
    /// comparisons need no more than this.
    prefix: u128,
    /// The offset of the address. Later entries have larger offsets.
    address: u32,
    reason: u32,
    address_len: u16,
    reason_len: u16,
}

impl Batch {
    /// A batch of at least [`BATCH_ENTRIES_MIN`] entries is full at this size of its texts. Larger
    /// batches are faster, but memory must stay bounded.
    const TEXT_BYTES_MAX: usize = 4 << 20;

    /// Creates an empty batch that is full at `entries_max` entries, or at [`BATCH_ENTRIES_MIN`] if
    /// that is more.
    pub fn new(entries_max: usize) -> Self {
        Self { text: String::new(), spans: Vec::new(), opt_outs: Vec::new(), entries_max: entries_max.max(BATCH_ENTRIES_MIN) }
    }

    /// Adds an entry.
    pub fn push(&mut self, entry: &Entry) {
        self.push_parts(entry.address.as_str(), entry.reason.as_str(), entry.unsubscribed_at);
    }

    /// Adds an entry from [`Sorted::iter`], whose texts follow the rules already.
    pub fn push_parts(&mut self, address: &str, reason: &str, unsubscribed_at: Option<OffsetDateTime>) {
        // The rules for addresses and reasons bound both lengths, and the size of a batch bounds
        // their sum, so the casts do not truncate.
        let address_at = self.text.len() as u32;
        // In one step, as `bytes_with` foresees.
        self.text.reserve(address.len() + reason.len());
        self.text.push_str(address);
        self.opt_outs.extend(unsubscribed_at.map(|at| (address_at, at)));
        // Consecutive entries often have the same reason, which is then stored once.
        let (reason_at, reason_len) = match self.spans.last() {
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
        self.spans.push(Span {
            prefix: u128::from_be_bytes(prefix),
            address: address_at,
            reason: reason_at,
            address_len: address.len() as u16,
            reason_len,
        });
    }

    /// True when the batch must be stored before another entry is added.
    pub fn is_full(&self) -> bool {
        let count = self.spans.len();
        count >= self.entries_max || (count >= BATCH_ENTRIES_MIN && self.text.len() >= Self::TEXT_BYTES_MAX)
    }

    /// The bytes of memory that the batch will take once `entry` is added.
    pub fn bytes_with(&self, entry: &Entry) -> usize {
        let text = grown(self.text.capacity(), self.text.len() + entry.address.as_str().len() + entry.reason.as_str().len());
        let spans = grown(self.spans.capacity(), self.spans.len() + 1);
        let opt_outs = grown(self.opt_outs.capacity(), self.opt_outs.len() + usize::from(entry.unsubscribed_at.is_some()));
        bytes_of(text, spans, opt_outs)
    }

    /// The bytes of memory that [`BATCH_ENTRIES_MIN`] entries like those so far will take, if their
    /// texts are up to an eighth longer.
    pub fn bytes_expected(&self) -> usize {
        let expected = |capacity: usize, len: usize| {
            let len = len * BATCH_ENTRIES_MIN / self.spans.len().max(1);
            std::iter::successors(Some(capacity.max(1)), |capacity| Some(2 * capacity)).find(|&grown| grown >= len).unwrap_or(len)
        };
        let text = expected(self.text.capacity(), self.text.len() + self.text.len() / 8);
        let spans = expected(self.spans.capacity(), self.spans.len());
        let opt_outs = expected(self.opt_outs.capacity(), self.opt_outs.len());
        bytes_of(text, spans, opt_outs)
    }

    /// The bytes of memory that the batch takes.
    pub fn bytes(&self) -> usize {
        bytes_of(self.text.capacity(), self.spans.capacity(), self.opt_outs.capacity())
    }

    /// The number of entries added, duplicates included.
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// True when no entry was added.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Sorts the entries by the bytes of their addresses. Of entries with the same address the
    /// first one is kept.
    ///
    /// This is the order of the table's key. Overlapping batches therefore lock rows in the same
    /// order and cannot deadlock. The insert is faster, too.
    pub fn into_sorted(self) -> Sorted {
        let Self { text, mut spans, opt_outs, .. } = self;
        spans.sort_unstable_by(|a, b| {
            let by_address = a.prefix.cmp(&b.prefix).then_with(|| a.address(&text).cmp(b.address(&text)));
            // Entries with equal addresses stay in the order of arrival.
            by_address.then(a.address.cmp(&b.address))
        });
        spans.dedup_by(|later, first| later.prefix == first.prefix && later.address(&text) == first.address(&text));
        Sorted { text, spans, opt_outs }
    }
}

/// The memory of a batch whose parts have these capacities.
fn bytes_of(text: usize, spans: usize, opt_outs: usize) -> usize {
    text + spans * size_of::<Span>() + opt_outs * size_of::<(u32, OffsetDateTime)>()
}

/// The capacity of a vector when it must hold `len` items: it at least doubles when it grows, and
/// begins with 4.
fn grown(capacity: usize, len: usize) -> usize {
    if len <= capacity { capacity } else { len.max(2 * capacity).max(4) }
}

impl Span {
    fn address(self, text: &str) -> &str {
        &text[self.address as usize..][..self.address_len.into()]
    }

    fn reason(self, text: &str) -> &str {
        &text[self.reason as usize..][..self.reason_len.into()]
    }
}

/// The entries of a batch, sorted by address, each address once.
pub struct Sorted {
    text: String,
    spans: Vec<Span>,
    opt_outs: OptOuts,
}

impl Sorted {
    /// The addresses, in the order of their bytes.
    pub fn addresses(&self) -> Vec<&str> {
        self.spans.iter().map(|span| span.address(&self.text)).collect()
    }

    /// The reason of each address, in the order of [`Sorted::addresses`].
    pub fn reasons(&self) -> Vec<&str> {
        self.spans.iter().map(|span| span.reason(&self.text)).collect()
    }

    /// The time at which each address opted out, where it is known. `None` when it is not known for
    /// any address.
    pub fn unsubscribed_at(&self) -> Option<Vec<Option<OffsetDateTime>>> {
        (!self.opt_outs.is_empty()).then(|| self.spans.iter().map(|span| self.opt_out(span)).collect())
    }

    /// Address, reason and time of the opt-out of each entry, in the order of
    /// [`Sorted::addresses`].
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str, Option<OffsetDateTime>)> {
        self.spans.iter().map(|span| (span.address(&self.text), span.reason(&self.text), self.opt_out(span)))
    }

    /// The number of different addresses.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// A batch of these entries, which counts as full.
    pub fn into_batch(self) -> Batch {
        Batch { text: self.text, spans: self.spans, opt_outs: self.opt_outs, entries_max: 0 }
    }

    fn opt_out(&self, span: &Span) -> Option<OffsetDateTime> {
        let found = self.opt_outs.binary_search_by_key(&span.address, |(address, _)| *address);
        found.ok().map(|known| self.opt_outs[known].1)
    }
}

/// The counts of an import so far. `imported + skipped + failed` is the number of entries received.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Newly stored.
    pub imported: u64,
    /// Already on the list, or repeated in this import.
    pub skipped: u64,
    /// Rejected.
    pub failed: u64,
    /// The first rejected entries, at most 10,000.
    pub errors: Vec<Rejected>,
}

impl Tally {
    /// Counts a stored batch of `received` entries, of which `imported` were new.
    pub fn stored(&mut self, received: u64, imported: u64) {
        self.imported += imported;
        self.skipped += received.saturating_sub(imported);
    }

    /// Counts a rejected entry. Its cause is kept for the first ones only.
    pub fn rejected(&mut self, index: u64, line: u64, cause: Cause) {
        self.failed += 1;
        if self.errors.len() < ERRORS_KEPT_MAX {
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
    fn sorts_by_bytes_and_keeps_the_first_of_duplicates() {
        let mut batch = Batch::new(0);
        let entries = [
            ("b@x.de", "first"),
            ("ä@x.de", "r"),
            ("a@x.de", "r"),
            ("b@x.de", "second"),
            ("a@x.de.com", "r"),
            ("a-long-one@x.de", "s"),
            ("a-long-on@x.de", "s"),
            // These differ only after the prefix by which they are sorted first.
            ("a-long-one@x.de.eu", "s"),
            ("a-long-one@x.de.com", "s"),
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
        assert_eq!(sorted.reasons(), ["s", "s", "s", "s", "r", "r", "first", "r"]);
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
        let bytes = long.address.as_str().len();
        assert_eq!(full_at(&long), (Batch::TEXT_BYTES_MAX - 1).div_ceil(bytes));
    }

    #[test]
    fn the_memory_of_a_batch_is_known_before_an_entry_is_added() {
        // With a reason for all entries, and with one for each.
        for reason in [|_| "r".to_owned(), |number: usize| format!("reason {number}")] {
            let mut batch = Batch::new(0);
            assert_eq!(batch.bytes(), 0);
            let mut expected = 0;
            for number in 0..BATCH_ENTRIES_MIN {
                let entry = entry(&format!("user{number:07}@example.com"), &reason(number));
                let unsubscribed_at = (number % 3 == 0).then_some(OffsetDateTime::UNIX_EPOCH);
                let entry = Entry { unsubscribed_at, ..entry };
                let foreseen = batch.bytes_with(&entry);
                batch.push(&entry);
                assert_eq!(batch.bytes(), foreseen, "{number}");
                if number == 100 {
                    expected = batch.bytes_expected();
                }
            }
            assert!((batch.bytes()..=2 * batch.bytes()).contains(&expected), "{expected}, {}", batch.bytes());
        }
    }

    #[test]
    fn consecutive_equal_reasons_are_stored_once() {
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
        let [a, b, c] = times;
        assert!(sorted.iter().eq([("a@x.de", "r", a), ("b@x.de", "r", b), ("c@x.de", "r", c)]));
        let mut without = Batch::new(0);
        without.push(&entry("a@x.de", "r"));
        assert_eq!(without.into_sorted().unsubscribed_at(), None);
    }

    #[test]
    fn a_tally_counts_new_and_present_entries() {
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
