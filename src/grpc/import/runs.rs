//! Sorted runs of a long import in a temporary file, and their merge.
//!
//! The entries of an import come in no order, so each batch of it touches as many pages of the
//! key's index as it has entries, once the list is large. In the key's order a batch touches a
//! fraction of them. An import that is too long for memory is sorted in runs, which are merged.
//!
//! Everything here blocks. The file has no name, so it disappears with its owner.

use std::{
    cmp::{Ordering, Reverse},
    collections::{BinaryHeap, binary_heap::PeekMut},
    fs::File,
    io::{self, BufRead, BufReader, Read},
    ops::Range,
    os::unix::fs::FileExt,
    sync::Arc,
};

use time::OffsetDateTime;

use crate::domain::{Batch, Sorted};

/// Bytes that the merge reads of a run at once.
const READ_BYTES: usize = 32 << 10;

/// Sorted runs, in the order of arrival.
pub(super) struct Runs {
    file: File,
    runs: Vec<Range<u64>>,
    bytes: u64,
    /// Entries that were left out of the runs.
    repeats: u64,
}

impl Runs {
    /// Creates the file.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { file: tempfile::tempfile()?, runs: Vec::new(), bytes: 0, repeats: 0 })
    }

    /// Writes a run. `repeats` is the number of entries that were left out of it, since their
    /// addresses came before in it.
    pub(super) fn add(&mut self, run: &Sorted, repeats: u64) -> io::Result<()> {
        let mut buffer = Vec::new();
        for (address, reason, unsubscribed_at) in run.iter() {
            // The rules of both texts bound their lengths.
            buffer.extend((address.len() as u16).to_le_bytes());
            buffer.extend((reason.len() as u16).to_le_bytes());
            buffer.push(u8::from(unsubscribed_at.is_some()));
            buffer.extend(address.as_bytes());
            buffer.extend(reason.as_bytes());
            buffer.extend(unsubscribed_at.iter().flat_map(|at| at.unix_timestamp_nanos().to_le_bytes()));
        }
        self.file.write_all_at(&buffer, self.bytes)?;
        let end = self.bytes + buffer.len() as u64;
        self.runs.push(self.bytes..end);
        self.bytes = end;
        self.repeats += repeats;
        Ok(())
    }

    /// The number of runs.
    pub(super) fn count(&self) -> usize {
        self.runs.len()
    }

    /// The size of the file.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The entries of all runs in the key's order, in batches of up to `entries_max`. Of entries
    /// with the same address the one that arrived first is kept.
    pub(super) fn merge(self, entries_max: usize) -> io::Result<Merge> {
        let file = Arc::new(self.file);
        let mut heads = BinaryHeap::with_capacity(self.runs.len());
        for (run, bytes) in self.runs.into_iter().enumerate() {
            let rest = BufReader::with_capacity(READ_BYTES, Part { file: file.clone(), bytes });
            let mut head = Head { run, address: Vec::new(), reason: Vec::new(), unsubscribed_at: None, rest };
            if head.advance()? {
                heads.push(Reverse(Box::new(head)));
            }
        }
        Ok(Merge { heads, last: Vec::new(), entries_max, repeats: self.repeats })
    }
}

/// A part of the file.
struct Part {
    file: Arc<File>,
    bytes: Range<u64>,
}

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.bytes.end - self.bytes.start).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.file.read_at(&mut buffer[..left], self.bytes.start)?;
        if read == 0 && left > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.bytes.start += read as u64;
        Ok(read)
    }
}

/// The next entry of a run, and what follows it.
struct Head {
    run: usize,
    address: Vec<u8>,
    reason: Vec<u8>,
    unsubscribed_at: Option<OffsetDateTime>,
    rest: BufReader<Part>,
}

impl Head {
    /// Goes on to the next entry. False at the end of the run.
    fn advance(&mut self) -> io::Result<bool> {
        if self.rest.fill_buf()?.is_empty() {
            return Ok(false);
        }
        let mut fixed = [0; 5];
        self.rest.read_exact(&mut fixed)?;
        let [a, b, c, d, has_time] = fixed;
        self.address.resize(u16::from_le_bytes([a, b]).into(), 0);
        self.rest.read_exact(&mut self.address)?;
        self.reason.resize(u16::from_le_bytes([c, d]).into(), 0);
        self.rest.read_exact(&mut self.reason)?;
        self.unsubscribed_at = match has_time {
            0 => None,
            _ => {
                let mut nanos = [0; 16];
                self.rest.read_exact(&mut nanos)?;
                Some(OffsetDateTime::from_unix_timestamp_nanos(i128::from_le_bytes(nanos)).map_err(io::Error::other)?)
            }
        };
        Ok(true)
    }
}

impl Ord for Head {
    fn cmp(&self, other: &Self) -> Ordering {
        self.address.cmp(&other.address).then(self.run.cmp(&other.run))
    }
}

impl PartialOrd for Head {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Head {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Head {}

/// The merge of runs.
pub(super) struct Merge {
    heads: BinaryHeap<Reverse<Box<Head>>>,
    last: Vec<u8>,
    entries_max: usize,
    /// Repeats that are not reported yet.
    repeats: u64,
}

/// A part of the merged entries.
pub(super) struct Merged {
    pub(super) batch: Batch,
    /// How many entries were left out, since entries with their addresses came before.
    pub(super) repeats: u64,
}

impl Merge {
    /// The next entries; none at the end.
    pub(super) fn next(&mut self) -> io::Result<Option<Merged>> {
        let mut merged = Merged { batch: Batch::new(self.entries_max), repeats: std::mem::take(&mut self.repeats) };
        while !merged.batch.is_full()
            && let Some(mut head) = self.heads.peek_mut()
        {
            let Head { address, reason, unsubscribed_at, .. } = &*head.0;
            if *address == self.last {
                merged.repeats += 1;
            } else {
                let text = |bytes| str::from_utf8(bytes).map_err(io::Error::other);
                merged.batch.push_parts(text(address)?, text(reason)?, *unsubscribed_at);
                self.last.clone_from(address);
            }
            if !head.0.advance()? {
                PeekMut::pop(head);
            }
        }
        let is_empty = merged.batch.is_empty() && merged.repeats == 0;
        Ok((!is_empty).then_some(merged))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::domain::{Entry, Kind, Reason};

    fn add(runs: &mut Runs, entries: &[(&str, &str, Option<i64>)]) {
        let mut batch = Batch::new(0);
        for (address, reason, secs) in entries {
            let reason = Reason::parse((*reason).to_owned()).unwrap().unwrap();
            let entry = Entry::parse(Kind::Email, (*address).to_owned(), String::new(), &reason).unwrap();
            let unsubscribed_at = secs.map(|secs| OffsetDateTime::from_unix_timestamp(secs).unwrap());
            batch.push(&Entry { unsubscribed_at, ..entry });
        }
        let received = batch.len() as u64;
        let run = batch.into_sorted();
        runs.add(&run, received - run.len() as u64).unwrap();
    }

    #[test]
    fn runs_are_merged_in_order_and_the_first_of_repeats_is_kept() {
        let mut runs = Runs::new().unwrap();
        add(&mut runs, &[("c@x.de", "1", None), ("a@x.de", "1", Some(7)), ("c@x.de", "4", None)]);
        add(&mut runs, &[]);
        add(&mut runs, &[("b@x.de", "2", Some(-5)), ("a@x.de", "2", None), ("ü@x.de", "grün", None)]);
        add(&mut runs, &[("c@x.de", "3", None)]);
        let mut merge = runs.merge(0).unwrap();
        let merged = merge.next().unwrap().unwrap();
        assert_eq!(merged.repeats, 3);
        let sorted = merged.batch.into_sorted();
        let at = |secs| Some(OffsetDateTime::from_unix_timestamp(secs).unwrap());
        let expected = [("a@x.de", "1", at(7)), ("b@x.de", "2", at(-5)), ("c@x.de", "1", None), ("ü@x.de", "grün", None)];
        assert_eq!(sorted.iter().collect::<Vec<_>>(), expected);
        assert!(merge.next().unwrap().is_none());
    }

    #[test]
    fn many_entries_come_in_full_batches() {
        let mut runs = Runs::new().unwrap();
        let mut names: Vec<String> = (0..50_000).map(|number| format!("{:05}@x.de", number * 7_919 % 50_021)).collect();
        for part in names.chunks(9_000) {
            add(&mut runs, &part.iter().map(|name| (name.as_str(), "r", None)).collect::<Vec<_>>());
        }
        let mut merge = runs.merge(20_000).unwrap();
        let mut merged = Vec::new();
        let mut sizes = Vec::new();
        while let Some(next) = merge.next().unwrap() {
            sizes.push(next.batch.len());
            merged.extend(next.batch.into_sorted().addresses().iter().map(|&address| address.to_owned()));
        }
        names.sort_unstable();
        assert_eq!(merged, names);
        assert_eq!(sizes, [20_000, 20_000, 10_000]);
    }

    #[test]
    fn a_file_that_was_cut_off_is_an_error() {
        let mut runs = Runs::new().unwrap();
        add(&mut runs, &[("a@x.de", "r", None), ("b@x.de", "r", None)]);
        // In the middle of an entry, and between two.
        for left in [runs.bytes - 1, runs.bytes / 2] {
            runs.file.set_len(left).unwrap();
            let runs = Runs { file: runs.file.try_clone().unwrap(), runs: runs.runs.clone(), ..runs };
            assert!(runs.merge(0).unwrap().next().is_err());
        }
    }
}
