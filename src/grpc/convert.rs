//! Proto to domain and back, all of it. The border of trust: what comes out of here holds to the rules.

use crate::{
    domain::{Address, Entry, Error, Failure, Kind, Reason, Tally},
    proto,
};

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

/// The answer of an import.
pub(super) fn tally(tally: Tally) -> proto::ImportEntriesResponse {
    proto::ImportEntriesResponse {
        imported: tally.imported,
        skipped: tally.skipped,
        failed: tally.failed,
        errors: tally.errors.into_iter().map(|(index, failure)| entry_error(index, failure)).collect(),
    }
}

fn entry_error(index: u64, failure: Failure) -> proto::EntryError {
    proto::EntryError { index, field: failure.field().to_owned(), code: failure.code().to_owned(), message: failure.message() }
}
