//! `CheckEntries`: may I write to them? One indexed statement a call, however many addresses it names, and no answer without one.

use std::collections::HashMap;

use super::{auth::Principal, convert};
use crate::{
    domain::Error,
    proto::{CheckEntriesRequest, CheckEntriesResponse, CheckResult},
    store::{EntryRow, Store},
};

pub(super) async fn run(store: &Store, principal: &Principal, request: CheckEntriesRequest) -> Result<CheckEntriesResponse, Error> {
    let asked = request.emails.clone();
    let addresses = convert::addresses(request.emails)?;
    let mut wanted: Vec<&str> = addresses.iter().flatten().flat_map(|address| address.covers()).collect();
    wanted.sort_unstable();
    wanted.dedup();
    let rows = if wanted.is_empty() { Vec::new() } else { store.find_entries(principal.workspace, &wanted).await? };
    let found: HashMap<&str, &EntryRow> = rows.iter().map(|row| (row.address.as_str(), row)).collect();
    let results = asked.into_iter().zip(&addresses).enumerate().map(|(index, (email, address))| match address {
        Ok(address) => {
            let entry =
                address.covers().find_map(|cover| found.get(cover)).map(|row| convert::stored(principal.workspace, (*row).clone()));
            CheckResult { email, suppressed: entry.is_some(), entry, error: None }
        }
        // Nobody can say of such a text that it may be written to.
        Err(failure) => {
            CheckResult { email, suppressed: true, entry: None, error: Some(convert::entry_error(index as u64, *failure)) }
        }
    });
    Ok(CheckEntriesResponse { results: results.collect() })
}
