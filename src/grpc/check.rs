//! `CheckEntries`: whether addresses are suppressed. It fails closed: without the database's answer
//! the call is an error.
//!
//! Each call runs its own statements. Sharing a statement between concurrent single checks is a
//! quarter faster, but makes callers wait for each other. With its own statements no call can be
//! left unanswered because of another.

use std::{
    borrow::Borrow,
    collections::HashSet,
    hash::{Hash, Hasher},
    ops::Range,
    sync::Arc,
};

use prost::Message;

use super::{MESSAGE_BYTES_MAX, auth::Principal, convert};
use crate::{
    domain::{Address, Error, Failure},
    proto::{CheckEntriesRequest, CheckEntriesResponse, CheckResult},
    store::{EntryRow, Store},
};

/// Keys (addresses, with the domains above them) in one statement. This bounds the statement's
/// time, so that other calls get their turn between two statements. The keys of one address are
/// never split.
const STATEMENT_KEYS_MAX: usize = 20_000;

/// The rows found, by address.
type Found = HashSet<ByAddress>;

#[derive(Debug)]
struct ByAddress(EntryRow);

impl Borrow<str> for ByAddress {
    fn borrow(&self) -> &str {
        &self.0.address
    }
}

impl Hash for ByAddress {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.address.hash(state);
    }
}

impl PartialEq for ByAddress {
    fn eq(&self, other: &Self) -> bool {
        self.0.address == other.0.address
    }
}

impl Eq for ByAddress {}

/// Looks up the addresses of a request, and answers in their order.
///
/// # Errors
/// [`Error::Invalid`] for more than 10,000 addresses, or an answer larger than 4 MiB without
/// entries; those of the store.
pub(super) async fn run(store: &Store, principal: &Principal, request: CheckEntriesRequest) -> Result<CheckEntriesResponse, Error> {
    let asked = request.emails.clone();
    let mut addresses = Vec::with_capacity(asked.len());
    // The texts that are not addresses, by their index in the request.
    let mut failures = Vec::new();
    for (index, parsed) in convert::addresses(request.emails)?.into_iter().enumerate() {
        match parsed {
            Ok(address) => addresses.push(address),
            Err(failure) => failures.push((index, failure)),
        }
    }
    let addresses = Arc::new(addresses);
    let mut found = Found::new();
    for part in statements(&addresses) {
        let rows = store.find_covers(principal.workspace, addresses.clone(), part).await?;
        found.extend(rows.into_iter().map(ByAddress));
    }
    let results = answer(&principal.workspace.to_string(), asked, &addresses, &failures, &found);
    fitted(CheckEntriesResponse { results })
}

/// Splits addresses into ranges of one statement each.
fn statements(addresses: &[Address]) -> Vec<Range<usize>> {
    let mut parts = Vec::new();
    let (mut start, mut keys) = (0, 0);
    for (index, address) in addresses.iter().enumerate() {
        let more = address.covers().count();
        if keys + more > STATEMENT_KEYS_MAX && index > start {
            parts.push(start..index);
            (start, keys) = (index, 0);
        }
        keys += more;
    }
    if start < addresses.len() {
        parts.push(start..addresses.len());
    }
    parts
}

fn answer(
    workspace: &str,
    asked: Vec<String>,
    addresses: &[Address],
    failures: &[(usize, Failure)],
    found: &Found,
) -> Vec<CheckResult> {
    let (mut addresses, mut failures) = (addresses.iter(), failures.iter().peekable());
    let results = asked.into_iter().enumerate().map(|(index, email)| {
        // A text that is not an address counts as suppressed: nothing shows that it may be written
        // to.
        if let Some((_, failure)) = failures.next_if(|(failed, _)| *failed == index) {
            let error = convert::entry_error(index as u64, *failure);
            return CheckResult { email, suppressed: true, entry: None, error: Some(error) };
        }
        let row = addresses.next().and_then(|address| address.covers().find_map(|cover| found.get(cover)));
        let entry = row.map(|ByAddress(row)| convert::stored(workspace, row.clone()));
        CheckResult { email, suppressed: entry.is_some(), entry, error: None }
    });
    results.collect()
}

/// Makes an answer fit the 4 MiB that clients accept: omits the entries that matched, starting at
/// the last result, until the rest fits. Whether an address is suppressed is never omitted.
fn fitted(mut answer: CheckEntriesResponse) -> Result<CheckEntriesResponse, Error> {
    let mut bytes = answer.encoded_len();
    for result in answer.results.iter_mut().rev() {
        if bytes <= MESSAGE_BYTES_MAX {
            break;
        }
        // The tags and lengths around the entry go too, which only makes the answer smaller.
        bytes -= result.entry.take().map_or(0, |entry| entry.encoded_len());
    }
    if bytes > MESSAGE_BYTES_MAX {
        return Err(Error::invalid("emails", "The answer would be larger than 4 MiB. Name fewer addresses in one call."));
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::Entry;

    #[test]
    fn statements_cover_every_address_once_within_the_limit() {
        let deep = Address::parse_any(format!("x@{}de", "a.".repeat(120))).expect("valid");
        for addresses in [vec![], vec![deep.clone()], vec![deep; 2_000]] {
            let parts = statements(&addresses);
            let covered: Vec<usize> = parts.iter().cloned().flatten().collect();
            assert_eq!(covered, (0..addresses.len()).collect::<Vec<_>>());
            for part in parts {
                assert!(addresses[part].iter().flat_map(Address::covers).count() <= STATEMENT_KEYS_MAX);
            }
        }
    }

    #[test]
    fn a_large_answer_omits_entries_but_never_a_verdict() {
        let long = CheckResult {
            email: "e".repeat(254),
            suppressed: true,
            entry: Some(Entry { email: "e".repeat(254), reason: "ü".repeat(64), ..Entry::default() }),
            error: None,
        };
        let small = CheckEntriesResponse { results: vec![long.clone(); 10] };
        assert_eq!(fitted(small.clone()).expect("fits"), small);
        let answer = fitted(CheckEntriesResponse { results: vec![long.clone(); 10_000] }).expect("fits");
        assert!(answer.encoded_len() <= MESSAGE_BYTES_MAX);
        assert!(answer.results.iter().all(|result| result.suppressed && result.email == long.email));
        assert!(answer.results[0].entry.is_some() && answer.results[9_999].entry.is_none());
        let huge = CheckResult { email: "e".repeat(500), ..CheckResult::default() };
        assert!(fitted(CheckEntriesResponse { results: vec![huge; 10_000] }).is_err());
    }
}
