//! Proto to domain and back, all of it. The border of trust: what comes out of here holds to the rules.

use prost::Message;
use prost_types::Timestamp;
use time::OffsetDateTime;

use crate::{
    domain::{Address, Entry, Error, Failure, Filter, Kind, Reason, Tally},
    proto,
    store::{EntryRow, Replay},
};

/// Addresses that one call may name.
const ADDRESSES_MAX: usize = 10_000;

const REQUEST_ID_CHARS_MAX: usize = 128;
const SEARCH_OCTETS_MAX: usize = 254;
const PAGE_ENTRIES: u32 = 25;
const PAGE_ENTRIES_MAX: u32 = 1_000;

/// A reason that the call gives to entries without one; `fallback` when the call has none.
pub(super) fn default_reason(text: String, fallback: &str) -> Result<Reason, Error> {
    let parsed = Reason::parse(text).map_err(|failure| Error::invalid("options.default_reason", failure.message()))?;
    match parsed {
        Some(reason) => Ok(reason),
        None => Reason::parse(fallback.to_owned()).ok().flatten().ok_or_else(|| Error::internal("an invalid fallback reason")),
    }
}

/// One entry of an import. Output-only fields are not looked at.
pub(super) fn entry(entry: proto::Entry, default_reason: &Reason) -> Result<Entry, Failure> {
    let kind = match proto::EntryType::try_from(entry.r#type) {
        Ok(proto::EntryType::Unspecified | proto::EntryType::Email) => Kind::Email,
        Ok(proto::EntryType::Domain) => Kind::Domain,
        Err(_) => return Err(Failure::InvalidType),
    };
    Ok(Entry {
        address: Address::parse(kind, entry.email)?,
        reason: Reason::parse(entry.reason)?.unwrap_or_else(|| default_reason.clone()),
    })
}

/// The caller's name for an import; none when it has none.
pub(super) fn request_id(text: String) -> Result<Option<String>, Error> {
    if text.chars().count() > REQUEST_ID_CHARS_MAX || text.contains(char::is_control) {
        let message = format!("A request id has at most {REQUEST_ID_CHARS_MAX} characters, and no control characters.");
        return Err(Error::invalid("options.request_id", message));
    }
    Ok(Some(text).filter(|text| !text.is_empty()))
}

/// The answer of an import.
pub(super) fn tally(tally: &Tally) -> proto::ImportEntriesResponse {
    proto::ImportEntriesResponse {
        imported: tally.imported,
        skipped: tally.skipped,
        failed: tally.failed,
        errors: tally.errors.iter().map(|(index, failure)| entry_error(*index, *failure)).collect(),
    }
}

/// The causes of refused entries as they are kept for a replay: the answer with nothing but them.
pub(super) fn errors_to_keep(so_far: &Tally) -> Vec<u8> {
    let answer = tally(so_far);
    proto::ImportEntriesResponse { errors: answer.errors, ..Default::default() }.encode_to_vec()
}

/// The answer of an import that was run before.
pub(super) fn replay(replay: Replay) -> Result<proto::ImportEntriesResponse, Error> {
    let kept = proto::ImportEntriesResponse::decode(replay.errors.unwrap_or_default().as_slice()).map_err(Error::internal)?;
    Ok(proto::ImportEntriesResponse {
        imported: replay.imported,
        skipped: replay.skipped,
        failed: replay.failed,
        errors: kept.errors,
    })
}

/// A request's addresses, each with its place among them, or the cause why it is none.
pub(super) fn addresses(emails: Vec<String>) -> Result<Vec<Result<Address, Failure>>, Error> {
    addresses_count(&emails)?;
    Ok(emails.into_iter().map(Address::parse_any).collect())
}

/// The addresses that a removal names. A text that is none is not stored, so it is left out.
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

/// Which entries a caller means.
pub(super) fn filter(filter: Option<proto::EntryFilter>) -> Result<Filter, Error> {
    let filter = filter.unwrap_or_default();
    let kind = match proto::EntryType::try_from(filter.r#type) {
        Ok(proto::EntryType::Unspecified) => None,
        Ok(proto::EntryType::Email) => Some(Kind::Email),
        Ok(proto::EntryType::Domain) => Some(Kind::Domain),
        Err(_) => return Err(Error::invalid("filter.type", "The type is neither email nor domain.")),
    };
    // A text of nothing but white space would select everything, which is what nobody means by it.
    for (field, text) in [("filter.reason", &filter.reason), ("filter.search", &filter.search)] {
        if !text.is_empty() && Address::search_form(text).is_empty() {
            return Err(Error::invalid(field, "The text is blank; give one, or leave it out."));
        }
    }
    let reason = Reason::parse(filter.reason).map_err(|failure| Error::invalid("filter.reason", failure.message()))?;
    if filter.search.len() > SEARCH_OCTETS_MAX || filter.search.contains('\0') {
        return Err(Error::invalid(
            "filter.search",
            format!("The search has at most {SEARCH_OCTETS_MAX} octets, none of them zero."),
        ));
    }
    let search = Address::search_form(&filter.search);
    Ok(Filter {
        kind,
        reason: reason.map(Reason::into_string),
        search: Some(search).filter(|search| !search.is_empty()),
        created_from: filter.create_time_from.map(|at| time_of("filter.create_time_from", at)).transpose()?,
        created_to: filter.create_time_to.map(|at| time_of("filter.create_time_to", at)).transpose()?,
    })
}

fn time_of(field: &str, at: Timestamp) -> Result<OffsetDateTime, Error> {
    let nanos = i128::from(at.seconds) * 1_000_000_000 + i128::from(at.nanos);
    OffsetDateTime::from_unix_timestamp_nanos(nanos)
        .ok()
        .filter(|time| (1..=9999).contains(&time.year()) && (0..1_000_000_000).contains(&at.nanos))
        .ok_or_else(|| Error::invalid(field, "The time is not one between the years 1 and 9999."))
}

/// How many entries a page has.
pub(super) fn page_size(asked: i32) -> Result<u32, Error> {
    match u32::try_from(asked) {
        Ok(0) => Ok(PAGE_ENTRIES),
        Ok(asked) => Ok(asked.min(PAGE_ENTRIES_MAX)),
        Err(_) => Err(Error::invalid("page_size", "The page size must not be negative.")),
    }
}

/// An entry as callers see it, in the workspace of this public id.
pub(super) fn stored(workspace: &str, row: EntryRow) -> proto::Entry {
    proto::Entry {
        r#type: entry_type(if row.address.contains('@') { Kind::Email } else { Kind::Domain }).into(),
        email: row.address,
        reason: row.reason,
        workspace_id: workspace.to_owned(),
        create_time: Some(Timestamp { seconds: row.created_at.unix_timestamp(), nanos: row.created_at.nanosecond().cast_signed() }),
        added_by: row.added_by.to_string(),
    }
}

/// A kind's number in the proto.
pub(super) fn entry_type(kind: Kind) -> proto::EntryType {
    match kind {
        Kind::Email => proto::EntryType::Email,
        Kind::Domain => proto::EntryType::Domain,
    }
}

/// A refused entry or address, with its place.
pub(super) fn entry_error(index: u64, failure: Failure) -> proto::EntryError {
    proto::EntryError { index, field: failure.field().to_owned(), code: failure.code().to_owned(), message: failure.message() }
}
