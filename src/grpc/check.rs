//! `CheckEntries`: may I write to them? One indexed statement, however many addresses a call names, and no answer without one.
//!
//! Single checks come in crowds. While as many statements as there are [`STATEMENTS_MAX`] run, further calls of a workspace gather and are
//! answered by one statement together; a call that finds a free place waits for nobody. That raises the rate of single checks by about a quarter:
//! a statement of its own for each spends most of its time on round trips.

use std::{
    borrow::Borrow,
    collections::{HashMap, HashSet},
    hash::{Hash, Hasher},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{Semaphore, oneshot};
use tonic::Status;
use tracing::Instrument;

use super::{auth::Principal, convert, status};
use crate::{
    domain::{Error, WorkspaceId},
    proto::{CheckEntriesRequest, CheckEntriesResponse, CheckResult},
    store::{EntryRow, Store},
};

/// Statements of checks at the database at once.
const STATEMENTS_MAX: usize = 4;

/// Addresses (with the domains above them) that calls are gathered up to; a call that has more is a statement by itself.
const GATHERED_MAX: usize = 1_000;

/// Addresses in one statement at most, which bounds its memory here and in the database.
const STATEMENT_ADDRESSES_MAX: usize = 60_000;

/// What was found, by address. Shared by the calls that were answered together.
#[derive(Clone, Debug, Default)]
struct Found(Arc<HashSet<ByAddress>>);

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

impl Found {
    fn get(&self, address: &str) -> Option<&EntryRow> {
        self.0.get(address).map(|found| &found.0)
    }
}

/// Looks addresses up for all calls of a server.
#[derive(Debug)]
pub(super) struct Checker {
    store: Store,
    places: Arc<Semaphore>,
    waiting: Mutex<HashMap<WorkspaceId, Vec<Waiting>>>,
}

#[derive(Debug)]
struct Waiting {
    wanted: Vec<String>,
    answer: oneshot::Sender<Result<Found, Status>>,
}

impl Checker {
    pub(super) fn new(store: Store) -> Arc<Self> {
        Arc::new(Self { store, places: Arc::new(Semaphore::new(STATEMENTS_MAX)), waiting: Mutex::default() })
    }

    pub(super) async fn run(
        self: &Arc<Self>,
        principal: &Principal,
        request: CheckEntriesRequest,
    ) -> Result<CheckEntriesResponse, Status> {
        let asked = request.emails.clone();
        let addresses = convert::addresses(request.emails).map_err(status::from_error)?;
        let wanted: Vec<&str> = addresses.iter().flatten().flat_map(|address| address.covers()).collect();
        let found = self.find(principal.workspace, wanted).await?;
        let workspace = principal.workspace.to_string();
        let results = asked.into_iter().zip(&addresses).enumerate().map(|(index, (email, address))| match address {
            Ok(address) => {
                let row = address.covers().find_map(|cover| found.get(cover));
                let entry = row.map(|row| convert::stored(&workspace, row.clone()));
                CheckResult { email, suppressed: entry.is_some(), entry, error: None }
            }
            // Nobody can say of such a text that it may be written to.
            Err(failure) => {
                CheckResult { email, suppressed: true, entry: None, error: Some(convert::entry_error(index as u64, *failure)) }
            }
        });
        Ok(CheckEntriesResponse { results: results.collect() })
    }

    async fn find(self: &Arc<Self>, workspace: WorkspaceId, wanted: Vec<&str>) -> Result<Found, Status> {
        if wanted.is_empty() {
            return Ok(Found::default());
        }
        if wanted.len() > GATHERED_MAX {
            return self.look_up(workspace, wanted).await;
        }
        let wanted = wanted.into_iter().map(str::to_owned).collect();
        let (answer, mut answered) = oneshot::channel();
        self.waiting().entry(workspace).or_default().push(Waiting { wanted, answer });
        let place = tokio::select! {
            biased;
            // Another call of this workspace took this one along.
            found = &mut answered => return found.unwrap_or_else(|_| Err(lost())),
            place = self.places.clone().acquire_owned() => place.map_err(|closed| status::from_error(Error::internal(closed)))?,
        };
        let gathered = self.take(workspace);
        if !gathered.is_empty() {
            let checker = self.clone();
            // A task of its own: the others must get their answer even if this caller goes away.
            let answer_all = async move {
                let wanted: Vec<&str> = gathered.iter().flat_map(|waiting| &waiting.wanted).map(String::as_str).collect();
                let found = checker.look_up(workspace, wanted).await;
                drop(place);
                for waiting in gathered {
                    // Whoever is gone needs no answer.
                    let _ = waiting.answer.send(found.clone());
                }
            };
            tokio::spawn(answer_all.in_current_span());
        }
        answered.await.unwrap_or_else(|_| Err(lost()))
    }

    /// Takes calls that wait, the longest waiting first, up to the bound.
    fn take(&self, workspace: WorkspaceId) -> Vec<Waiting> {
        let mut all = self.waiting();
        let Some(waiting) = all.get_mut(&workspace) else { return Vec::new() };
        let mut addresses = 0;
        let fitting = waiting.iter().take_while(|waiting| {
            addresses += waiting.wanted.len();
            addresses <= GATHERED_MAX
        });
        let count = fitting.count().max(1);
        let rest = waiting.split_off(count.min(waiting.len()));
        let taken = std::mem::replace(waiting, rest);
        if waiting.is_empty() {
            all.remove(&workspace);
        }
        taken
    }

    async fn look_up(&self, workspace: WorkspaceId, mut wanted: Vec<&str>) -> Result<Found, Status> {
        wanted.sort_unstable();
        wanted.dedup();
        let mut found = Vec::new();
        // One statement, but for the call that names ten thousand addresses under domains of a hundred labels each.
        for part in wanted.chunks(STATEMENT_ADDRESSES_MAX) {
            found.append(&mut self.store.find_entries(workspace, part).await.map_err(status::from_error)?);
        }
        Ok(Found(Arc::new(found.into_iter().map(ByAddress).collect())))
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<WorkspaceId, Vec<Waiting>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn lost() -> Status {
    status::from_error(Error::internal("a check was left without its answer"))
}
