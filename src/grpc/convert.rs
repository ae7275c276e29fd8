//! Conversion between proto messages and domain types, in both directions.
//!
//! This is the trust boundary: the domain values that are made here satisfy the domain's rules.

use prost::Message;
use prost_types::Timestamp;
use time::OffsetDateTime;

use crate::{
    domain::{Address, Cause, Entry, Error, Failure, Filter, Kind, Reason, Rejected, Sent, Tally},
    proto,
    store::{DeletionRow, EntryRow, ImportRow, Replay, Selection},
};

/// The largest number of addresses in one call.
const ADDRESSES_MAX: usize = 10_000;

const IDEMPOTENCY_KEY_CHARS_MAX: usize = 128;
const UNREADABLE_CODE_CHARS_MAX: usize = 32;
/// The number of the type that is not given.
const UNSPECIFIED: i32 = proto::EntryType::Unspecified as i32;

const UNREADABLE_MESSAGE_CHARS_MAX: usize = 200;
const SEARCH_CHARS_MAX: usize = 254;
const PAGE_ENTRIES: u32 = 25;
const PAGE_ENTRIES_MAX: u32 = 1_000;

/// The reason for entries without one: the call's default reason, or `fallback` if that is empty.
pub(super) fn default_reason(text: String, fallback: &str) -> Result<Reason, Error> {
    let parsed = Reason::parse(text).map_err(|failure| Error::invalid("options.default_reason", failure.message()))?;
    match parsed {
        Some(reason) => Ok(reason),
        None => Reason::parse(fallback.to_owned()).ok().flatten().ok_or_else(|| Error::internal("an invalid fallback reason")),
    }
}

/// One entry of an import. Output-only fields are ignored. `now` is the latest time of an opt-out;
/// see [`Entry::with_unsubscribed_at`].
pub(super) fn entry(entry: proto::Entry, default_reason: &Reason, now: OffsetDateTime) -> Result<Entry, Failure> {
    let kind = match entry.r#type {
        UNSPECIFIED => Kind::Email,
        number => Kind::of_number(number).ok_or(Failure::InvalidType)?,
    };
    let parsed = Entry::parse(kind, entry.email, entry.reason, default_reason)?;
    match entry.unsubscribe_time {
        None => Ok(parsed),
        Some(at) => parsed.with_unsubscribed_at(time(at).ok_or(Failure::InvalidTime)?, now),
    }
}

/// An entry of a message, or its sender's report of one that could not be read.
pub(super) enum Received {
    Entry(proto::Entry),
    Unreadable { line: u64, cause: Cause },
}

/// The entries of a message and the reports of unreadable ones, in their original order.
///
/// # Errors
/// [`Error::Invalid`] when a report exceeds a limit: reports go into the answer, and must fit
/// there.
pub(super) fn received(message: proto::ImportEntriesRequest) -> Result<impl Iterator<Item = Received>, Error> {
    let proto::ImportEntriesRequest { entries, unreadable, .. } = message;
    let mut position_min = 0;
    for (index, reported) in unreadable.iter().enumerate() {
        let is_word = |text: &str| {
            (1..=UNREADABLE_CODE_CHARS_MAX).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_')
        };
        let is_text = |text: &str, max: usize| text.chars().count() <= max && !text.contains(char::is_control);
        let wrong = if reported.position < position_min || reported.position as usize > entries.len() {
            ("position", "The positions must not decrease, and be at most the number of entries in the message.")
        } else if !is_text(&reported.field, UNREADABLE_CODE_CHARS_MAX) {
            ("field", "The field has at most 32 characters, and no control characters.")
        } else if !is_word(&reported.code) {
            ("code", "The code has 1 to 32 characters, each of A to Z or _.")
        } else if !is_text(&reported.message, UNREADABLE_MESSAGE_CHARS_MAX) {
            ("message", "The message has at most 200 characters, and no control characters.")
        } else {
            position_min = reported.position;
            continue;
        };
        return Err(Error::invalid(format!("unreadable[{index}].{}", wrong.0), wrong.1));
    }
    let mut unreadable = unreadable.into_iter().peekable();
    let mut entries = entries.into_iter();
    let mut taken = 0;
    Ok(std::iter::from_fn(move || {
        let reported = unreadable.next_if(|reported| reported.position <= taken);
        if let Some(proto::UnreadableEntry { line, field, code, message, .. }) = reported {
            return Some(Received::Unreadable { line, cause: Cause::Unreadable { field, code, message } });
        }
        taken += 1;
        entries.next().map(Received::Entry)
    }))
}

/// The content of an import's first message, by which a repeat is recognized.
pub(super) fn sent(message: &proto::ImportEntriesRequest) -> Vec<Sent<'_>> {
    let entries = message.entries.iter().map(|entry| Sent {
        address: &entry.email,
        kind: Some(entry.r#type),
        reason: &entry.reason,
        unsubscribed_at: entry.unsubscribe_time.map(|at| (at.seconds, at.nanos)),
    });
    let unreadable = message.unreadable.iter();
    let unreadable =
        unreadable.map(|entry| Sent { address: &entry.message, kind: None, reason: &entry.code, unsubscribed_at: None });
    entries.chain(unreadable).collect()
}

/// The import's idempotency key; none if the text is empty.
pub(super) fn idempotency_key(text: String) -> Result<Option<String>, Error> {
    if text.chars().count() > IDEMPOTENCY_KEY_CHARS_MAX || text.contains(char::is_control) {
        let message = format!("The idempotency key has at most {IDEMPOTENCY_KEY_CHARS_MAX} characters, and no control characters.");
        return Err(Error::invalid("options.request_id", message));
    }
    Ok(Some(text).filter(|text| !text.is_empty()))
}

/// The answer to an import.
pub(super) fn tally(tally: &Tally) -> proto::ImportEntriesResponse {
    proto::ImportEntriesResponse {
        imported: tally.imported,
        skipped: tally.skipped,
        failed: tally.failed,
        errors: tally.errors.iter().map(rejected).collect(),
    }
}

/// The rejected entries of an import, encoded to be kept for a replay: an answer with only
/// `errors`.
pub(super) fn errors_to_keep(so_far: &Tally) -> Vec<u8> {
    let answer = tally(so_far);
    proto::ImportEntriesResponse { errors: answer.errors, ..Default::default() }.encode_to_vec()
}

/// The answer to a repeat: that of the import which ran before.
pub(super) fn replay(replay: Replay) -> Result<proto::ImportEntriesResponse, Error> {
    let kept = proto::ImportEntriesResponse::decode(replay.errors.unwrap_or_default().as_slice()).map_err(Error::internal)?;
    Ok(proto::ImportEntriesResponse {
        imported: replay.imported,
        skipped: replay.skipped,
        failed: replay.failed,
        errors: kept.errors,
    })
}

/// The addresses of a request in their order, or why a text is not one.
///
/// # Errors
/// [`Error::Invalid`] for more than 10,000 of them.
pub(super) fn addresses(emails: Vec<String>) -> Result<Vec<Result<Address, Failure>>, Error> {
    addresses_count(&emails)?;
    Ok(emails.into_iter().map(Address::parse_any).collect())
}

/// The addresses named by a deletion. A text that is not an address cannot be stored, so it is
/// omitted.
///
/// # Errors
/// [`Error::Invalid`] for more than 10,000 of them.
pub(super) fn stored_addresses(emails: Vec<String>) -> Result<Vec<Address>, Error> {
    addresses_count(&emails)?;
    Ok(emails.into_iter().flat_map(Address::parse_stored).collect())
}

fn addresses_count(emails: &[String]) -> Result<(), Error> {
    if emails.len() > ADDRESSES_MAX {
        return Err(Error::invalid("emails", format!("At most {ADDRESSES_MAX} addresses fit one call, got {}.", emails.len())));
    }
    Ok(())
}

/// The filter of a list, an export or a deletion. Without one, every entry is selected.
pub(super) fn filter(filter: Option<proto::EntryFilter>) -> Result<Filter, Error> {
    let filter = filter.unwrap_or_default();
    let kind = match filter.r#type {
        UNSPECIFIED => None,
        number => Some(Kind::of_number(number).ok_or_else(|| Error::invalid("filter.type", Failure::InvalidType.message()))?),
    };
    // A blank text would select everything, which no caller means by it.
    let blank = |field| Error::invalid(field, "The text is blank. Send some text, or omit the field.");
    let has_reason = !filter.reason.is_empty();
    let reason = Reason::parse(filter.reason).map_err(|failure| Error::invalid("filter.reason", failure.message()))?;
    if has_reason && reason.is_none() {
        return Err(blank("filter.reason"));
    }
    if filter.search.chars().count() > SEARCH_CHARS_MAX || filter.search.contains('\0') {
        let message = format!("The search has at most {SEARCH_CHARS_MAX} characters, and no zero byte.");
        return Err(Error::invalid("filter.search", message));
    }
    let search = Address::search_form(&filter.search);
    if !filter.search.is_empty() && search.is_empty() {
        return Err(blank("filter.search"));
    }
    Ok(Filter {
        kind,
        reason: reason.map(Reason::into_string),
        search: Some(search).filter(|search| !search.is_empty()),
        created_from: filter.create_time_from.map(|at| time_of("filter.create_time_from", at)).transpose()?,
        created_to: filter.create_time_to.map(|at| time_of("filter.create_time_to", at)).transpose()?,
    })
}

fn time_of(field: &str, at: Timestamp) -> Result<OffsetDateTime, Error> {
    time(at).ok_or_else(|| Error::invalid(field, "The time must be between the years 1 and 9999."))
}

/// The time of a timestamp; none outside of the years 1 to 9999, the range of
/// `google.protobuf.Timestamp`.
fn time(at: Timestamp) -> Option<OffsetDateTime> {
    let nanos = i128::from(at.seconds) * 1_000_000_000 + i128::from(at.nanos);
    let time = OffsetDateTime::from_unix_timestamp_nanos(nanos).ok()?;
    ((1..=9999).contains(&time.year()) && (0..1_000_000_000).contains(&at.nanos)).then_some(time)
}

fn timestamp(time: OffsetDateTime) -> Timestamp {
    Timestamp { seconds: time.unix_timestamp(), nanos: time.nanosecond().cast_signed() }
}

/// The number of entries in a page: 25 for 0, at most 1,000.
pub(super) fn page_size(asked: i32) -> Result<u32, Error> {
    match u32::try_from(asked) {
        Ok(0) => Ok(PAGE_ENTRIES),
        Ok(asked) => Ok(asked.min(PAGE_ENTRIES_MAX)),
        Err(_) => Err(Error::invalid("page_size", "The page size must not be negative.")),
    }
}

/// A stored entry as callers see it. `workspace` is the public id of its workspace.
pub(super) fn stored(workspace: &str, row: EntryRow) -> proto::Entry {
    proto::Entry {
        r#type: if row.address.contains('@') { Kind::Email } else { Kind::Domain }.number(),
        email: row.address,
        reason: row.reason,
        workspace_id: workspace.to_owned(),
        create_time: Some(timestamp(row.created_at)),
        added_by: row.added_by.to_string(),
        unsubscribe_time: Some(timestamp(row.unsubscribed_at.unwrap_or(row.created_at))),
        line: 0,
    }
}

/// An import as it was logged.
pub(super) fn import(row: ImportRow) -> proto::Import {
    proto::Import {
        id: row.id.to_string(),
        key_id: row.key.to_string(),
        start_time: Some(timestamp(row.started_at)),
        end_time: row.finished_at.map(timestamp),
        imported: row.imported,
        skipped: row.skipped,
        failed: row.failed,
    }
}

/// A deletion as it was logged.
pub(super) fn deletion(row: DeletionRow) -> proto::Deletion {
    let selection = match row.selection {
        Selection::Named(count) => proto::deletion::Selection::Named(count),
        Selection::All(filter) => proto::deletion::Selection::Filter(proto::EntryFilter {
            r#type: filter.kind.map_or(UNSPECIFIED, Kind::number),
            reason: filter.reason.unwrap_or_default(),
            search: filter.search.unwrap_or_default(),
            create_time_from: filter.created_from.map(timestamp),
            create_time_to: filter.created_to.map(timestamp),
        }),
    };
    proto::Deletion {
        id: row.id.to_string(),
        key_id: row.key.to_string(),
        start_time: Some(timestamp(row.started_at)),
        deleted: row.deleted,
        selection: Some(selection),
    }
}

/// Why the entry or address at `index` of the request was rejected.
pub(super) fn entry_error(index: u64, failure: Failure) -> proto::EntryError {
    let (field, code) = (failure.field().to_owned(), failure.code().to_owned());
    proto::EntryError { index, field, code, message: failure.message(), line: 0 }
}

fn rejected(rejected: &Rejected) -> proto::EntryError {
    let Rejected { index, line, cause } = rejected;
    match cause {
        Cause::Failure(failure) => proto::EntryError { line: *line, ..entry_error(*index, *failure) },
        Cause::Unreadable { field, code, message } => {
            let (field, code, message) = (field.clone(), code.clone(), message.clone());
            proto::EntryError { index: *index, field, code, message, line: *line }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::KeyId;

    /// The field named by an [`Error::Invalid`].
    fn field<T>(result: Result<T, Error>) -> Option<String> {
        match result {
            Err(Error::Invalid { field, .. }) => Some(field),
            _ => None,
        }
    }

    fn reason(text: &str) -> Reason {
        default_reason(text.to_owned(), "import").expect("a reason")
    }

    #[test]
    fn an_entry_has_its_type_and_a_reason() {
        let of = |r#type: i32, email: &str, reason: &str| proto::Entry {
            r#type,
            email: email.to_owned(),
            reason: reason.to_owned(),
            ..Default::default()
        };
        let (default, now) = (reason(""), OffsetDateTime::UNIX_EPOCH);
        assert_eq!(default.as_str(), "import");
        assert_eq!(reason(" asked us ").as_str(), "asked us");
        for (number, email, given, stored) in [
            (0, "A@b.de", "", Some((Kind::Email, "import"))),
            (1, "a@b.de", "bounce", Some((Kind::Email, "bounce"))),
            (2, "b.de", "", Some((Kind::Domain, "import"))),
            (3, "b.de", "", None),
            (-1, "a@b.de", "", None),
        ] {
            let read = entry(of(number, email, given), &default, now);
            let read = read.as_ref().map(|entry| (entry.address.kind(), entry.reason.as_str()));
            assert_eq!(read, stored.ok_or(&Failure::InvalidType), "{number}");
        }
        assert_eq!(entry(of(0, "b.de", ""), &default, now).map_err(Failure::code), Err("INVALID_EMAIL"));
        assert_eq!(entry(of(0, "a@b.de", "a\nb"), &default, now), Err(Failure::InvalidReason));
        for (at, expected) in [((0, 0), Ok(Some(now))), ((60, 0), Err(Failure::InvalidTime)), ((0, -1), Err(Failure::InvalidTime))]
        {
            let at = Timestamp { seconds: at.0, nanos: at.1 };
            let read = entry(proto::Entry { unsubscribe_time: Some(at), ..of(1, "a@b.de", "") }, &default, now);
            assert_eq!(read.map(|entry| entry.unsubscribed_at), expected, "{at:?}");
        }
        assert_eq!(field(default_reason("a\nb".to_owned(), "import")).as_deref(), Some("options.default_reason"));
        assert!(matches!(default_reason(String::new(), " "), Err(Error::Internal { .. })));
    }

    #[test]
    fn unreadable_entries_keep_their_positions() {
        let unreadable =
            |position| proto::UnreadableEntry { position, line: 3, code: "INVALID_LINE".to_owned(), ..Default::default() };
        let message = |positions: &[u32]| proto::ImportEntriesRequest {
            entries: ["a", "b"].map(|email| proto::Entry { email: email.to_owned(), ..Default::default() }).to_vec(),
            unreadable: positions.iter().map(|position| unreadable(*position)).collect(),
            ..Default::default()
        };
        for (positions, expected) in [(&[][..], "ab"), (&[0], "-ab"), (&[1], "a-b"), (&[2], "ab-"), (&[0, 0, 1, 2, 2], "--a-b--")] {
            let order: String = received(message(positions))
                .expect("in order")
                .map(|received| match received {
                    Received::Entry(entry) => entry.email,
                    Received::Unreadable { line: 3, .. } => "-".to_owned(),
                    Received::Unreadable { .. } => "?".to_owned(),
                })
                .collect();
            assert_eq!(order, expected, "{positions:?}");
        }
        assert_eq!(field(received(message(&[3]))).as_deref(), Some("unreadable[0].position"));
        assert_eq!(field(received(message(&[1, 0]))).as_deref(), Some("unreadable[1].position"));
        let report = |field: &str, code: &str, text: &str| proto::ImportEntriesRequest {
            unreadable: vec![proto::UnreadableEntry {
                field: field.to_owned(),
                code: code.to_owned(),
                message: text.to_owned(),
                ..Default::default()
            }],
            ..Default::default()
        };
        assert!(received(report(&"f".repeat(32), &"C".repeat(32), &"ü".repeat(200))).is_ok());
        for (wrong, expected) in [
            (report(&"f".repeat(33), "CODE", ""), "unreadable[0].field"),
            (report("", "", ""), "unreadable[0].code"),
            (report("", "code", ""), "unreadable[0].code"),
            (report("", &"C".repeat(33), ""), "unreadable[0].code"),
            (report("", "CODE", &"m".repeat(201)), "unreadable[0].message"),
            (report("", "CODE", "a\nb"), "unreadable[0].message"),
        ] {
            assert_eq!(field(received(wrong)).as_deref(), Some(expected));
        }
    }

    #[test]
    fn an_idempotency_key_is_bounded() {
        assert!(matches!(idempotency_key(String::new()), Ok(None)));
        let longest = "ü".repeat(IDEMPOTENCY_KEY_CHARS_MAX);
        assert_eq!(idempotency_key(longest.clone()).expect("short enough"), Some(longest.clone()));
        for wrong in [longest + "a", "a\tb".to_owned()] {
            assert_eq!(field(idempotency_key(wrong)).as_deref(), Some("options.request_id"));
        }
    }

    #[test]
    fn a_replay_gives_the_first_answer() {
        let mut first = Tally { imported: 3, skipped: 2, ..Tally::default() };
        first.rejected(7, 8, Cause::Failure(Failure::InvalidType));
        let unreadable = ["", "INVALID_LINE", "The line is no entry."].map(str::to_owned);
        let [field, code, message] = unreadable.clone();
        first.rejected(9, 10, Cause::Unreadable { field, code, message });
        let answer = tally(&first);
        assert_eq!((answer.imported, answer.skipped, answer.failed), (3, 2, 2));
        let error = answer.errors[1].clone();
        assert_eq!((error.index, error.line), (9, 10));
        assert_eq!([error.field, error.code, error.message], unreadable);
        let error = &answer.errors[0];
        assert_eq!((error.index, error.line, error.field.as_str(), error.code.as_str()), (7, 8, "type", "INVALID_TYPE"));
        assert_eq!(error.message, Failure::InvalidType.message());
        let kept = Replay { imported: 3, skipped: 2, failed: 2, errors: Some(errors_to_keep(&first)) };
        assert_eq!(replay(kept).expect("kept as it was"), answer);
        let without = Replay { imported: 3, skipped: 2, failed: 1, errors: None };
        assert!(replay(without).expect("counts").errors.is_empty());
        let damaged = Replay { imported: 3, skipped: 2, failed: 1, errors: Some(vec![0xff]) };
        assert!(matches!(replay(damaged), Err(Error::Internal { .. })));
    }

    #[test]
    fn the_addresses_of_a_call_are_limited() {
        let named = |count: usize| vec!["a@b.de".to_owned(); count];
        assert_eq!(addresses(named(ADDRESSES_MAX)).expect("as many as fit").len(), ADDRESSES_MAX);
        assert_eq!(stored_addresses(named(ADDRESSES_MAX)).expect("as many as fit").len(), ADDRESSES_MAX);
        assert_eq!(field(addresses(named(ADDRESSES_MAX + 1))).as_deref(), Some("emails"));
        assert_eq!(field(stored_addresses(named(ADDRESSES_MAX + 1))).as_deref(), Some("emails"));
        let mixed = vec!["a@b.de".to_owned(), "nonsense".to_owned(), "a\u{200b}@b.de".to_owned()];
        let is_address: Vec<bool> = addresses(mixed.clone()).expect("few").iter().map(Result::is_ok).collect();
        assert_eq!(is_address, [true, false, false]);
        let stored: Vec<_> = stored_addresses(mixed).expect("few").iter().map(|address| address.as_str().to_owned()).collect();
        assert_eq!(stored, ["a@b.de", "a\u{200b}@b.de"]);
    }

    #[test]
    fn a_filter_is_converted_or_refused() {
        let time = |seconds, nanos| Some(Timestamp { seconds, nanos });
        let whole = proto::EntryFilter {
            r#type: 2,
            reason: " bounce ".to_owned(),
            search: "MÜNCHEN.de".to_owned(),
            create_time_from: time(0, 0),
            create_time_to: time(253_402_300_799, 999_999_999),
        };
        let read = filter(Some(whole)).expect("a filter");
        assert_eq!(read.kind, Some(Kind::Domain));
        assert_eq!(read.reason.as_deref(), Some("bounce"));
        assert_eq!(read.search.as_deref(), Some("xn--mnchen-3ya.de"));
        assert_eq!(read.created_from, Some(OffsetDateTime::UNIX_EPOCH));
        assert_eq!(read.created_to.map(|time| (time.year(), time.nanosecond())), Some((9999, 999_999_999)));
        assert_eq!(filter(None).expect("no filter"), Filter::default());
        let email = proto::EntryFilter { r#type: 1, ..Default::default() };
        assert_eq!(filter(Some(email)).expect("a filter").kind, Some(Kind::Email));
        let longest = proto::EntryFilter { search: "ü".repeat(SEARCH_CHARS_MAX), ..Default::default() };
        assert!(filter(Some(longest)).is_ok());
        let none = proto::EntryFilter::default;
        for (wrong, expected) in [
            (proto::EntryFilter { r#type: 3, ..none() }, "filter.type"),
            (proto::EntryFilter { reason: " ".to_owned(), ..none() }, "filter.reason"),
            (proto::EntryFilter { reason: "a\nb".to_owned(), ..none() }, "filter.reason"),
            (proto::EntryFilter { search: "\u{a0}".to_owned(), ..none() }, "filter.search"),
            (proto::EntryFilter { search: "a\0".to_owned(), ..none() }, "filter.search"),
            (proto::EntryFilter { search: "a".repeat(SEARCH_CHARS_MAX + 1), ..none() }, "filter.search"),
            (proto::EntryFilter { create_time_from: time(0, -1), ..none() }, "filter.create_time_from"),
            (proto::EntryFilter { create_time_from: time(0, 1_000_000_000), ..none() }, "filter.create_time_from"),
            (proto::EntryFilter { create_time_to: time(253_402_300_800, 0), ..none() }, "filter.create_time_to"),
            (proto::EntryFilter { create_time_to: time(-62_135_596_801, 0), ..none() }, "filter.create_time_to"),
            (proto::EntryFilter { create_time_to: time(i64::MIN, 0), ..none() }, "filter.create_time_to"),
        ] {
            assert_eq!(field(filter(Some(wrong.clone()))).as_deref(), Some(expected), "{wrong:?}");
        }
    }

    #[test]
    fn a_page_size_has_a_default_and_a_maximum() {
        let sizes = [0, 1, 1_000, 1_001, i32::MAX].map(|asked| page_size(asked).expect("a size"));
        assert_eq!(sizes, [25, 1, 1_000, 1_000, 1_000]);
        assert_eq!(field(page_size(-1)).as_deref(), Some("page_size"));
    }

    #[test]
    fn a_row_becomes_an_entry_of_its_workspace() {
        let row = |address: &str| EntryRow {
            address: address.to_owned(),
            reason: "bounce".to_owned(),
            created_at: OffsetDateTime::from_unix_timestamp_nanos(1_500_000_001).expect("a time"),
            added_by: KeyId(7),
            unsubscribed_at: None,
        };
        let expected = proto::Entry {
            email: "a@b.de".to_owned(),
            r#type: 1,
            reason: "bounce".to_owned(),
            workspace_id: "ws_1".to_owned(),
            create_time: Some(Timestamp { seconds: 1, nanos: 500_000_001 }),
            added_by: "key_7".to_owned(),
            unsubscribe_time: Some(Timestamp { seconds: 1, nanos: 500_000_001 }),
            line: 0,
        };
        assert_eq!(stored("ws_1", row("a@b.de")), expected);
        let domain = proto::Entry { email: "b.de".to_owned(), r#type: 2, ..expected.clone() };
        assert_eq!(stored("ws_1", row("b.de")), domain);
        let opted_out = EntryRow { unsubscribed_at: Some(OffsetDateTime::UNIX_EPOCH), ..row("a@b.de") };
        let epoch = Some(Timestamp { seconds: 0, nanos: 0 });
        assert_eq!(stored("ws_1", opted_out), proto::Entry { unsubscribe_time: epoch, ..expected });
    }
}
