//! Addresses and requests for the tests.

use dnc::proto::{Entry, EntryType, ImportEntriesRequest, ImportOptions};

/// An entry for an e-mail address.
pub fn email(address: impl Into<String>) -> Entry {
    Entry { email: address.into(), ..Entry::default() }
}

/// An entry for a domain.
pub fn domain(name: impl Into<String>) -> Entry {
    Entry { email: name.into(), r#type: EntryType::Domain.into(), ..Entry::default() }
}

/// An entry for each number, spread over seven domains, in the order of their addresses.
pub fn numbered(range: std::ops::Range<u32>) -> impl DoubleEndedIterator<Item = Entry> + ExactSizeIterator {
    range.map(|number| email(format!("user{number:07}@example{}.com", number % 7)))
}

/// A message of an import.
pub fn request(entries: Vec<Entry>) -> ImportEntriesRequest {
    ImportEntriesRequest { entries, ..ImportEntriesRequest::default() }
}

/// The first message of an import with options.
pub fn with_options(entries: Vec<Entry>, options: ImportOptions) -> ImportEntriesRequest {
    ImportEntriesRequest { entries, options: Some(options), ..ImportEntriesRequest::default() }
}
