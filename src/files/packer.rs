//! Entries on their way to the service: packed into messages, none too large.

use std::collections::VecDeque;

use super::row::{Content, Row, Unreadable};
use crate::{
    domain::Kind,
    proto::{Entry, ImportEntriesRequest, ImportOptions, UnreadableEntry},
};

/// What stands around the texts of an entry, and more: at most this.
const ENTRY_BYTES: usize = 48;

/// What was done to rows besides making entries of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Rows that name people who may be written to.
    pub excluded: u64,
    /// Reasons that were cut.
    pub reasons_cut: u64,
    /// A provider's times that cannot be read, or are in the future.
    pub times_dropped: u64,
}

impl Counts {
    /// What was counted after `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            excluded: self.excluded - before.excluded,
            reasons_cut: self.reasons_cut - before.reasons_cut,
            times_dropped: self.times_dropped - before.times_dropped,
        }
    }

    /// Counts those of another file, or part.
    pub fn add(&mut self, other: Self) {
        self.excluded += other.excluded;
        self.reasons_cut += other.reasons_cut;
        self.times_dropped += other.times_dropped;
    }
}

/// Packs rows, and gives them out in parts that are none too large.
pub trait Pack {
    /// A part; the default one is empty.
    type Packed: Default;

    /// Takes a row.
    fn row(&mut self, row: &Row<'_>);

    /// Whether nothing waits to be given out.
    fn is_empty(&self) -> bool;

    /// The next part that is full.
    fn next_full(&mut self) -> Option<Self::Packed>;

    /// The next part, full or not; none when nothing is left.
    fn flush(&mut self) -> Option<Self::Packed>;
}

/// Packs entries into the messages of one import. The options go with the first message, which
/// comes also when there are no entries.
#[derive(Debug)]
pub struct Packer {
    entries_max: usize,
    bytes_max: usize,
    default_kind: Option<Kind>,
    /// Go with the first message.
    options: Option<ImportOptions>,
    entries: Vec<Entry>,
    unreadable: Vec<UnreadableEntry>,
    bytes: usize,
    full: VecDeque<ImportEntriesRequest>,
    counts: Counts,
}

impl Packer {
    /// Packs `entries_max` entries and about `bytes_max` bytes at most into a message. The service
    /// takes 4 MiB. An entry that does not say its type is of `default_kind`.
    pub fn new(options: Option<ImportOptions>, default_kind: Option<Kind>, entries_max: usize, bytes_max: usize) -> Self {
        Self {
            entries_max,
            bytes_max,
            default_kind,
            options,
            entries: Vec::new(),
            unreadable: Vec::new(),
            bytes: 0,
            full: VecDeque::new(),
            counts: Counts::default(),
        }
    }

    /// Takes an entry.
    pub fn entry(&mut self, entry: Entry) {
        self.make_room(entry.email.len() + entry.reason.len() + ENTRY_BYTES);
        self.entries.push(entry);
    }

    fn unreadable(&mut self, line: u64, unreadable: &Unreadable<'_>) {
        self.make_room(unreadable.message.len() + ENTRY_BYTES);
        self.unreadable.push(unreadable.to_proto(line, self.entries.len()));
    }

    /// Takes an entry that its sender could not read, for `message`.
    pub fn invalid(&mut self, field: &'static str, code: &'static str, message: &str) {
        self.unreadable(0, &Unreadable { field, code, message: message.to_owned(), texts: Default::default() });
    }

    fn make_room(&mut self, bytes: usize) {
        let has_any = self.len() > 0;
        if has_any && (self.len() >= self.entries_max || self.bytes + bytes > self.bytes_max) {
            let message = self.message();
            self.full.push_back(message);
        }
        self.bytes += bytes;
    }

    fn message(&mut self) -> ImportEntriesRequest {
        self.bytes = 0;
        ImportEntriesRequest {
            entries: std::mem::take(&mut self.entries),
            options: self.options.take(),
            unreadable: std::mem::take(&mut self.unreadable),
        }
    }

    /// How many entries are in the message that is being packed.
    fn len(&self) -> usize {
        self.entries.len() + self.unreadable.len()
    }

    /// How many entries have not been given out.
    pub fn waiting(&self) -> usize {
        let full = self.full.iter().map(|message| message.entries.len() + message.unreadable.len());
        self.len() + full.sum::<usize>()
    }

    /// How many bytes the message that is being packed has, about.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What was counted so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }
}

impl Pack for Packer {
    type Packed = ImportEntriesRequest;

    fn row(&mut self, row: &Row<'_>) {
        match &row.content {
            Content::Header => {}
            Content::Excluded => self.counts.excluded += 1,
            Content::Unreadable(unreadable) => self.unreadable(row.line, unreadable),
            Content::Entry(entry) => {
                self.counts.reasons_cut += u64::from(entry.is_reason_cut);
                self.counts.times_dropped += u64::from(entry.is_time_dropped);
                self.entry(entry.to_proto(row.line, self.default_kind));
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.len() == 0 && self.full.is_empty()
    }

    fn next_full(&mut self) -> Option<ImportEntriesRequest> {
        self.full.pop_front()
    }

    fn flush(&mut self) -> Option<ImportEntriesRequest> {
        let full = self.full.pop_front();
        full.or_else(|| (self.len() > 0 || self.options.is_some()).then(|| self.message()))
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    fn all(mut packer: Packer) -> Vec<ImportEntriesRequest> {
        std::iter::from_fn(|| packer.flush()).collect()
    }

    #[test]
    fn messages_stay_below_the_limits_and_keep_the_order() {
        let mut packer = Packer::new(Some(ImportOptions::default()), None, 300, 1 << 20);
        let long = "x".repeat(60 << 10);
        for number in 0..1_000 {
            match number % 7 {
                0 => packer.invalid("type", "INVALID_TYPE", &number.to_string()),
                1 => packer.entry(Entry { email: format!("{number}"), reason: long.clone(), ..Entry::default() }),
                _ => packer.entry(Entry { email: format!("{number}"), ..Entry::default() }),
            }
        }
        let messages = all(packer);
        assert!(messages.len() > 3);
        assert_eq!(messages.iter().filter(|message| message.options.is_some()).count(), 1);
        assert!(messages[0].options.is_some());
        let mut seen = Vec::new();
        for message in messages {
            assert!(message.encoded_len() <= 1 << 20 && message.entries.len() + message.unreadable.len() <= 300);
            let mut unreadable = message.unreadable.iter().peekable();
            for position in 0..=message.entries.len() {
                while let Some(next) = unreadable.next_if(|next| next.position as usize == position) {
                    seen.push(next.message.clone());
                }
                seen.extend(message.entries.get(position).map(|entry| entry.email.clone()));
            }
        }
        assert_eq!(seen, (0..1_000).map(|number| number.to_string()).collect::<Vec<_>>());
    }

    #[test]
    fn nothing_but_the_options_is_a_message() {
        assert_eq!(all(Packer::new(Some(ImportOptions::default()), None, 1, 1)).len(), 1);
        assert_eq!(all(Packer::new(None, None, 1, 1)).len(), 0);
    }
}
