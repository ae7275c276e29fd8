//! Kills servers and the database under load, and compares every entry with a model after each
//! fault.
//!
//! `cargo build --release && cargo run --release --example campaign -- --kills 1000 --seed 7`
//!
//! Each worker has its own addresses, so it knows the state of each: present, absent, or unknown
//! after a failed call. The gravest error is a check that reports "clear" for a present address. A
//! failure prints the seed. The seed replays the schedule of faults and operations, but their
//! timing depends on the machine.

#![allow(unreachable_pub, clippy::unwrap_used, reason = "a test by itself: what goes wrong ends it")]

#[path = "../tests/it/harness/proxy.rs"]
mod proxy;
#[path = "../tests/it/harness/served.rs"]
mod served;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use dnc::{
    domain::{KeyOwner, Scope, WorkspaceId},
    postgres::{self, PrivatePostgres},
    proto::{
        CheckEntriesRequest, DeleteEntriesRequest, Entry, EntryFilter, ExportEntriesRequest, ImportEntriesRequest,
        ImportEntriesResponse, ImportOptions, ListEntriesRequest, SummarizeEntriesRequest, dnc_service_client::DncServiceClient,
    },
    store::{Store, StoreOptions},
};
use proxy::{Flow, Proxy};
use served::{Served, signal};
use sqlx::{Connection, PgConnection};
use tokio::{sync::RwLock, task::JoinSet, time::timeout};
use tonic::{Code, Request, Status, transport::Channel};

#[derive(Debug, Parser)]
struct Options {
    /// Faults to cause
    #[arg(long, default_value_t = 100)]
    kills: u64,
    /// Seed of the schedule of faults and operations
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Concurrent callers
    #[arg(long, default_value_t = 8)]
    workers: u64,
    /// The program under test; the one built beside this example unless set
    #[arg(long, env = "DNC_PROGRAM")]
    program: Option<PathBuf>,
}

/// The number of addresses of each worker.
const ADDRESSES: u64 = 300;

/// The number of entries of an import of several batches.
const LONG_IMPORT: u64 = 12_000;

/// A call without an answer after this time counts as a failure of the service. A repeat under an
/// idempotency key whose server was killed waits until that server's claim expires, which takes
/// 15 s.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(25);

/// The time after the end of a fault within which everything must work again. The contract says
/// 5 s; the rest is for restarts on a busy machine. The table at the end has the slowest one.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(60);

/// SplitMix64.
struct Random(u64);

impl Random {
    fn of(seed: u64, stream: u64, step: u64) -> Self {
        Self(
            seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)
                ^ stream.wrapping_mul(0xd1b5_4a32_d192_ed03)
                ^ step.wrapping_mul(0xeb44_acca_b455_d165),
        )
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Known {
    #[default]
    Absent,
    Present,
    /// A call that would have changed it failed, so either is possible.
    Either,
}

#[derive(Clone, Copy, Debug, Default)]
struct Belief {
    known: Known,
    /// An import of it failed and its transaction may still be open, so it may be stored after a
    /// later deletion.
    may_be_stored_later: bool,
    /// A deletion of it failed and its transaction may still be open, so it may be deleted after a
    /// later import.
    may_be_deleted_later: bool,
}

impl Belief {
    /// The state after an import of it was answered.
    fn after_import(self) -> Known {
        if self.may_be_deleted_later { Known::Either } else { Known::Present }
    }
}

/// The states of a worker's addresses.
type Model = BTreeMap<String, Belief>;

struct Worker {
    number: u64,
    key: String,
    model: Mutex<Model>,
    /// Imports that succeeded under an idempotency key, by that key, to be sent again.
    answered: Mutex<HashMap<String, (Vec<String>, ImportEntriesResponse)>>,
}

/// The state that all workers share.
struct Shared {
    seed: u64,
    clients: std::sync::RwLock<Vec<DncServiceClient<Channel>>>,
    /// Read-locked by each operation, write-locked by the verification, during which no operation
    /// may run.
    gate: RwLock<()>,
    counts: Mutex<BTreeMap<&'static str, u64>>,
}

impl Shared {
    fn client(&self, random: &mut Random) -> DncServiceClient<Channel> {
        let clients = self.clients.read().unwrap();
        clients[random.below(clients.len() as u64) as usize].clone()
    }

    fn count(&self, what: &'static str) {
        *self.counts.lock().unwrap().entry(what).or_default() += 1;
    }
}

fn with_key<T>(message: T, key: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("x-api-key", key.parse().unwrap());
    request
}

/// Runs a call; `None` when it failed in a way that a fault explains.
async fn outcome<T>(
    shared: &Shared,
    patience: Option<Duration>,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> anyhow::Result<Option<T>> {
    let Ok(answer) = timeout(patience.unwrap_or(ANSWER_TIMEOUT), call).await else {
        ensure!(patience.is_some(), "no answer in {ANSWER_TIMEOUT:?}");
        shared.count("calls given up");
        return Ok(None);
    };
    match answer {
        Ok(answer) => {
            shared.count("calls answered");
            Ok(Some(answer.into_inner()))
        }
        // A status without details was created by the client, whose connection was lost.
        Err(status) if status.details().is_empty() || matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded) => {
            shared.count("calls failed");
            Ok(None)
        }
        Err(status) => bail!("an answer that no fault explains: {status:?}"),
    }
}

impl Worker {
    fn address(&self, number: u64) -> String {
        format!("w{}n{number}@example{}.com", self.number, number % 5)
    }

    fn some_addresses(&self, random: &mut Random) -> Vec<String> {
        let count = 1 + random.below(60);
        let mut addresses: Vec<_> = (0..count).map(|_| self.address(random.below(ADDRESSES))).collect();
        addresses.sort();
        addresses.dedup();
        addresses
    }

    async fn step(&self, shared: &Shared, step: u64) -> anyhow::Result<()> {
        let random = &mut Random::of(shared.seed, self.number + 1, step);
        let patience = (random.below(5) == 0).then(|| Duration::from_micros(random.below(30_000)));
        let client = shared.client(random);
        match random.below(20) {
            0..=6 => self.import(shared, client, self.some_addresses(random), patience).await,
            7 => {
                let first = ADDRESSES + LONG_IMPORT * random.below(2);
                self.import(shared, client, (first..first + LONG_IMPORT).map(|number| self.address(number)).collect(), patience)
                    .await
            }
            8 | 9 => self.import_once(shared, random, step).await,
            10 => self.replay(shared, client, random).await,
            11..=13 => self.delete(shared, client, Some(self.some_addresses(random)), patience).await,
            14 => self.delete(shared, client, None, patience).await,
            _ => self.check(shared, client, self.some_addresses(random), patience).await,
        }
        .with_context(|| format!("worker {}, step {step}", self.number))
    }

    async fn import(
        &self,
        shared: &Shared,
        mut client: DncServiceClient<Channel>,
        addresses: Vec<String>,
        patience: Option<Duration>,
    ) -> anyhow::Result<()> {
        let call = with_key(tokio_stream::iter(messages(&addresses, "")), &self.key);
        let answer = outcome(shared, patience, client.import_entries(call)).await?;
        self.imported(&addresses, answer.as_ref())
    }

    /// Applies an import to the model, and checks its counts.
    fn imported(&self, addresses: &[String], answer: Option<&ImportEntriesResponse>) -> anyhow::Result<()> {
        let mut model = self.model.lock().unwrap();
        let (mut least, mut most) = (0, 0);
        for address in addresses {
            let belief = model.entry(address.clone()).or_default();
            least += u64::from(belief.known == Known::Absent && !belief.may_be_stored_later);
            most += u64::from(belief.known != Known::Present);
            if answer.is_some() {
                belief.known = belief.after_import();
            } else {
                // This also applies to a present address: it may be deleted before the import
                // reaches it.
                belief.may_be_stored_later = true;
                if belief.known == Known::Absent {
                    belief.known = Known::Either;
                }
            }
        }
        if let Some(answer) = answer {
            let received = addresses.len() as u64;
            ensure!(
                answer.failed == 0 && answer.imported + answer.skipped == received,
                "counts do not add up: {answer:?} of {received}"
            );
            ensure!((least..=most).contains(&answer.imported), "imported {}, not {least} to {most}", answer.imported);
        }
        Ok(())
    }

    /// Imports under an idempotency key, and repeats the call until it is answered.
    async fn import_once(&self, shared: &Shared, random: &mut Random, step: u64) -> anyhow::Result<()> {
        let addresses = self.some_addresses(random);
        let idempotency_key = format!("w{}s{step}", self.number);
        let before = self.model.lock().unwrap().clone();
        let began = Instant::now();
        let mut tries = 0;
        let answer = loop {
            let patience = (tries == 0 && random.below(3) == 0).then(|| Duration::from_micros(random.below(20_000)));
            let mut client = shared.client(random);
            let call = with_key(tokio_stream::iter(messages(&addresses, &idempotency_key)), &self.key);
            if let Some(answer) = outcome(shared, patience, client.import_entries(call)).await? {
                break answer;
            }
            tries += 1;
            if began.elapsed() > Duration::from_secs(3) {
                // The verification after the fault is waiting. It shows the outcome of this import,
                // which is not sent again.
                return self.imported(&addresses, None);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        // Whichever attempt succeeded, the entries count as imported once.
        let new = addresses.iter().map(|address| before.get(address).copied().unwrap_or_default());
        let least = new.clone().filter(|belief| belief.known == Known::Absent && !belief.may_be_stored_later).count() as u64;
        let most = new.filter(|belief| belief.known != Known::Present).count() as u64;
        ensure!(
            (least..=most).contains(&answer.imported),
            "with an idempotency key: imported {}, not {least} to {most}",
            answer.imported
        );
        let mut model = self.model.lock().unwrap();
        for address in &addresses {
            let belief = model.entry(address.clone()).or_default();
            belief.known = belief.after_import();
        }
        drop(model);
        self.answered.lock().unwrap().insert(idempotency_key, (addresses, answer));
        Ok(())
    }

    /// Repeats an import that was answered. The answer must be the same, and nothing may be stored,
    /// not even entries that were deleted since.
    async fn replay(&self, shared: &Shared, mut client: DncServiceClient<Channel>, random: &mut Random) -> anyhow::Result<()> {
        let picked = {
            let answered = self.answered.lock().unwrap();
            let mut ids: Vec<_> = answered.keys().cloned().collect();
            ids.sort();
            if ids.is_empty() {
                return Ok(());
            }
            let id = ids[random.below(ids.len() as u64) as usize].clone();
            let (addresses, answer) = answered[&id].clone();
            (id, addresses, answer)
        };
        let (idempotency_key, addresses, first) = picked;
        let call = with_key(tokio_stream::iter(messages(&addresses, &idempotency_key)), &self.key);
        if let Some(answer) = outcome(shared, None, client.import_entries(call)).await? {
            ensure!(answer == first, "a repeat was answered {answer:?}, and first {first:?}");
        }
        Ok(())
    }

    /// Deletes the addresses, or all addresses of this worker by a filter.
    async fn delete(
        &self,
        shared: &Shared,
        mut client: DncServiceClient<Channel>,
        named: Option<Vec<String>>,
        patience: Option<Duration>,
    ) -> anyhow::Result<()> {
        let request = match &named {
            Some(emails) => DeleteEntriesRequest { emails: emails.clone(), ..DeleteEntriesRequest::default() },
            None => DeleteEntriesRequest {
                all: true,
                filter: Some(EntryFilter { search: format!("w{}n", self.number), ..EntryFilter::default() }),
                ..DeleteEntriesRequest::default()
            },
        };
        let answer = outcome(shared, patience, client.delete_entries(with_key(request, &self.key))).await?;
        let mut model = self.model.lock().unwrap();
        let addresses = named.unwrap_or_else(|| model.keys().cloned().collect());
        let (mut least, mut most) = (0, 0);
        for address in &addresses {
            let belief = model.entry(address.clone()).or_default();
            least += i64::from(belief.known == Known::Present);
            most += i64::from(belief.known != Known::Absent || belief.may_be_stored_later);
            belief.may_be_deleted_later |= answer.is_none();
            belief.known = match (answer.is_some(), belief.known) {
                (true, _) if belief.may_be_stored_later => Known::Either,
                (true, _) | (false, Known::Absent) => Known::Absent,
                (false, _) => Known::Either,
            };
        }
        if let Some(answer) = answer {
            ensure!((least..=most).contains(&answer.deleted), "deleted {}, not {least} to {most}", answer.deleted);
        }
        Ok(())
    }

    async fn check(
        &self,
        shared: &Shared,
        mut client: DncServiceClient<Channel>,
        emails: Vec<String>,
        patience: Option<Duration>,
    ) -> anyhow::Result<()> {
        let call = client.check_entries(with_key(CheckEntriesRequest { emails: emails.clone() }, &self.key));
        let Some(answer) = outcome(shared, patience, call).await? else { return Ok(()) };
        let model = self.model.lock().unwrap();
        ensure!(answer.results.len() == emails.len(), "{} results for {} addresses", answer.results.len(), emails.len());
        for (result, email) in answer.results.iter().zip(&emails) {
            ensure!(result.email == *email, "results are out of order");
            let belief = model.get(email).copied().unwrap_or_default();
            ensure!(
                result.suppressed || belief.known != Known::Present,
                "CLEAR was reported for an address that is on the list: {email}"
            );
            let is_absent = belief.known == Known::Absent && !belief.may_be_stored_later;
            ensure!(!(result.suppressed && is_absent), "suppressed was reported for an address that is not on the list: {email}");
        }
        Ok(())
    }
}

fn messages(addresses: &[String], idempotency_key: &str) -> Vec<ImportEntriesRequest> {
    let options = ImportOptions { request_id: idempotency_key.to_owned(), ..ImportOptions::default() };
    let message = |part: &[String]| ImportEntriesRequest {
        entries: part.iter().map(|email| Entry { email: email.clone(), ..Entry::default() }).collect(),
        options: Some(options.clone()),
        ..ImportEntriesRequest::default()
    };
    addresses.chunks(4_000).map(message).collect()
}

/// The processes under test, and the workers.
struct Scene {
    program: PathBuf,
    postgres: PrivatePostgres,
    url: String,
    link: Proxy,
    servers: Vec<Option<Served>>,
    shared: Arc<Shared>,
    workers: Vec<Arc<Worker>>,
    workspaces: Vec<(WorkspaceId, String)>,
    slowest_recovery: Duration,
}

impl Scene {
    async fn start_server(&mut self, index: usize) -> anyhow::Result<()> {
        let began = Instant::now();
        let served = loop {
            match Served::start(&self.program, &["--database-connections-max", "8"], &self.link.url(&self.url)).await {
                Ok(served) => break served,
                Err(error) if began.elapsed() > RECOVERY_TIMEOUT => return Err(error).context("the server does not start again"),
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        };
        let client = DncServiceClient::new(Channel::from_shared(served.grpc_url.clone())?.connect_lazy());
        let mut clients = self.shared.clients.write().unwrap();
        if index < clients.len() {
            clients[index] = client;
        } else {
            clients.push(client);
        }
        drop(clients);
        self.servers[index] = Some(served);
        Ok(())
    }

    /// Causes one fault, and repairs it.
    async fn cause_fault(&mut self, random: &mut Random) -> anyhow::Result<&'static str> {
        let moment = Duration::from_millis(random.below(400));
        Ok(match random.below(8) {
            0 | 1 => {
                let index = random.below(self.servers.len() as u64) as usize;
                if let Some(mut served) = self.servers[index].take() {
                    served.signal("KILL");
                    served.ended_within(RECOVERY_TIMEOUT).await?;
                }
                self.start_server(index).await?;
                "server killed"
            }
            2 => {
                signal(self.postgres.pid().ok(), "KILL");
                self.postgres.ended().await;
                self.postgres.restart().await?;
                "database killed"
            }
            3 => {
                let mut admin = PgConnection::connect(&self.url).await?;
                let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                           WHERE application_name = 'dnc' AND state <> 'idle' AND pid <> pg_backend_pid()";
                sqlx::raw_sql(end).execute(&mut admin).await?;
                "busy backends ended"
            }
            4 => {
                let mut admin = PgConnection::connect(&self.url).await?;
                let one =
                    "SELECT pid FROM pg_stat_activity WHERE application_name = 'dnc' ORDER BY state = 'idle', random() LIMIT 1";
                let pid: Option<i32> = sqlx::query_scalar(one).fetch_optional(&mut admin).await?;
                // PostgreSQL then restarts all of its processes.
                signal(pid.and_then(|pid| pid.try_into().ok()), "KILL");
                "one backend killed"
            }
            5 => {
                self.link.cut();
                tokio::time::sleep(moment).await;
                self.link.mend();
                "link cut"
            }
            6 => {
                self.link.all(Flow::Stall);
                tokio::time::sleep(moment * u32::try_from(random.below(12))?).await;
                if random.below(2) == 0 {
                    self.link.mend();
                    "link stalled"
                } else {
                    self.link.fail_over(&self.url);
                    "link stalled, old connections dead"
                }
            }
            _ => {
                self.link.all(Flow::Lose);
                tokio::time::sleep(moment).await;
                self.link.fail_over(&self.url);
                "link lost bytes, old connections dead"
            }
        })
    }

    /// Waits until every server answers, then compares the whole list with the models. No operation
    /// runs meanwhile.
    async fn verify(&mut self) -> anyhow::Result<()> {
        let shared = self.shared.clone();
        let _none_runs = shared.gate.write().await;
        let began = Instant::now();
        let clients = shared.clients.read().unwrap().clone();
        for client in &clients {
            for (_, key) in &self.workspaces {
                insist(began, async || {
                    let call =
                        with_key(DeleteEntriesRequest { emails: vec!["nobody@example.com".into()], ..Default::default() }, key);
                    client.clone().delete_entries(call).await
                })
                .await?;
            }
        }
        self.slowest_recovery = self.slowest_recovery.max(began.elapsed());
        let mut admin = PgConnection::connect(&self.url).await?;
        let open =
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'dnc' AND (state <> 'idle' OR backend_xid IS NOT NULL)
                    AND query NOT LIKE '%pg_stat_activity%'";
        let began = Instant::now();
        while sqlx::query_scalar::<_, i64>(open).fetch_one(&mut admin).await? > 0 {
            // A backend with a dead connection ends by itself, at the latest when its transaction
            // has been idle for 10 s.
            ensure!(began.elapsed() < Duration::from_secs(40), "transactions stay open");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        for (index, (workspace, key)) in self.workspaces.iter().enumerate() {
            let client = &clients[index % clients.len()];
            let began = Instant::now();
            let exported = insist(began, async || {
                let mut exported = Vec::new();
                let mut messages =
                    client.clone().export_entries(with_key(ExportEntriesRequest::default(), key)).await?.into_inner();
                while let Some(message) = messages.message().await? {
                    exported.extend(message.entries.into_iter().map(|entry| entry.email));
                }
                Ok(exported)
            })
            .await?;
            let count = exported.len();
            let exported: BTreeSet<String> = exported.into_iter().collect();
            ensure!(exported.len() == count, "an entry was exported twice");
            let workers = self.workers.iter().filter(|worker| worker.key == *key);
            let mut known = 0;
            for worker in workers {
                let mut model = worker.model.lock().unwrap();
                for (address, belief) in model.iter_mut() {
                    let is_there = exported.contains(address);
                    known += usize::from(is_there);
                    match belief.known {
                        Known::Present => ensure!(is_there, "an acknowledged entry is missing: {address}"),
                        Known::Absent => {
                            ensure!(!is_there || belief.may_be_stored_later, "an acknowledged deletion left its entry: {address}")
                        }
                        Known::Either => {}
                    }
                    *belief = Belief { known: if is_there { Known::Present } else { Known::Absent }, ..Belief::default() };
                }
            }
            ensure!(known == exported.len(), "{} entries that nobody imported", exported.len() - known);
            let listed =
                insist(began, async || client.clone().list_entries(with_key(ListEntriesRequest::default(), key)).await).await?;
            let listed = listed.into_inner().total_size;
            ensure!(listed == exported.len() as i64, "the list counts {listed}, the export {}", exported.len());
            let summed =
                insist(began, async || client.clone().summarize_entries(with_key(SummarizeEntriesRequest {}, key)).await).await?;
            let summed = summed.into_inner().total;
            ensure!(summed == exported.len() as i64, "the summary counts {summed}, the export {}", exported.len());
            let logs = "SELECT COALESCE((SELECT sum(imported) FROM imports WHERE workspace_id = $1), 0)::bigint,
                            COALESCE((SELECT sum(deleted) FROM deletions WHERE workspace_id = $1), 0)::bigint";
            let (imported, deleted): (i64, i64) = sqlx::query_as(logs).bind(workspace.0).fetch_one(&mut admin).await?;
            // A failed import of several batches may have stored more than its row in the log says,
            // never less.
            ensure!(imported - deleted <= listed, "the logs say {imported} imported and {deleted} deleted, the list {listed}");
        }
        // Connections that a fail-over left dead are not examined.
        Ok(())
    }
}

/// Makes a call until it is answered, for [`RECOVERY_TIMEOUT`] after `began`. Each connection that
/// a fault closed may fail one call.
///
/// # Errors
/// When there is no answer until then.
async fn insist<T>(began: Instant, call: impl AsyncFn() -> Result<T, Status>) -> anyhow::Result<T> {
    loop {
        match timeout(ANSWER_TIMEOUT, call()).await {
            Ok(Ok(answer)) => return Ok(answer),
            failed if began.elapsed() > RECOVERY_TIMEOUT => {
                bail!("no recovery in {RECOVERY_TIMEOUT:?}: {:?}", failed.map(|answer| answer.map(drop)))
            }
            _ => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Why a worker ended, which none does by itself.
fn cause_of_end(ended: Option<Result<anyhow::Result<()>, tokio::task::JoinError>>) -> String {
    match ended {
        Some(Ok(Err(error))) => format!("{error:#}"),
        other => format!("{other:?}"),
    }
}

async fn run(options: &Options) -> anyhow::Result<()> {
    let program = match &options.program {
        Some(program) => program.clone(),
        None => std::env::current_exe()?.parent().and_then(|dir| dir.parent()).context("no directory")?.join("dnc"),
    };
    ensure!(program.exists(), "build the program first: cargo build, with --release if this is");
    let dir = tempfile::Builder::new().prefix("dnc-campaign-").tempdir()?;
    let postgres_options =
        postgres::Options { dir: dir.path().to_owned(), is_ephemeral: false, connections_max: 100, shared_buffers_mib: 256 };
    let postgres = PrivatePostgres::start(postgres_options).await?;
    postgres.create_database("dnc", "template0").await?;
    let url = postgres.url("dnc");
    let store = Store::new(&StoreOptions {
        url: url.clone(),
        migrate_url: None,
        is_pooled: false,
        replica: None,
        connections_max: 4,
        connect_timeout: Duration::from_secs(20),
        statement_timeout: Duration::from_secs(60),
    })?;
    store.migrate().await?;
    let mut workspaces = Vec::new();
    for name in ["first", "second"] {
        let workspace = store.create_workspace(name).await?;
        workspaces.push((
            workspace,
            store.issue_key(KeyOwner::Workspace(workspace), Scope::Write, "", None).await?.1.reveal().to_owned(),
        ));
    }
    store.close().await;
    drop(store);
    let shared = Arc::new(Shared {
        seed: options.seed,
        clients: std::sync::RwLock::default(),
        gate: RwLock::default(),
        counts: Mutex::default(),
    });
    let workers: Vec<_> = (0..options.workers)
        .map(|number| {
            let key = workspaces[number as usize % workspaces.len()].1.clone();
            Arc::new(Worker { number, key, model: Mutex::default(), answered: Mutex::default() })
        })
        .collect();
    let link = Proxy::to(&url).await;
    let servers = vec![None, None];
    let mut scene = Scene {
        program,
        postgres,
        url,
        link,
        servers,
        shared: shared.clone(),
        workers: workers.clone(),
        workspaces,
        slowest_recovery: Duration::ZERO,
    };
    for index in 0..scene.servers.len() {
        scene.start_server(index).await?;
    }
    let mut running = JoinSet::new();
    for worker in workers {
        let shared = shared.clone();
        running.spawn(async move {
            for step in 0.. {
                let _runs = shared.gate.read().await;
                worker.step(&shared, step).await?;
            }
            anyhow::Ok(())
        });
    }
    for kill in 0..options.kills {
        let random = &mut Random::of(options.seed, 0, kill);
        let pause = Duration::from_millis(100 + random.below(500));
        let fault = tokio::select! {
            ended = running.join_next() => bail!("fault {kill}: {}", cause_of_end(ended)),
            fault = async {
                tokio::time::sleep(pause).await;
                scene.cause_fault(random).await
            } => fault.with_context(|| format!("fault {kill}"))?,
        };
        shared.count(fault);
        tokio::select! {
            ended = running.join_next() => bail!("after fault {kill}, {fault}: {}", cause_of_end(ended)),
            verified = scene.verify() => verified.with_context(|| format!("after fault {kill}, {fault}"))?,
        }
        if (kill + 1) % 50 == 0 {
            println!("{} faults", kill + 1);
        }
    }
    running.shutdown().await;
    println!("| what | how many |\n|---|---|");
    for (what, count) in shared.counts.lock().unwrap().iter() {
        println!("| {what} | {count} |");
    }
    println!("| slowest recovery | {:.1} s |", scene.slowest_recovery.as_secs_f64());
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    let began = Instant::now();
    match run(&options).await {
        Ok(()) => {
            println!(
                "{} faults, seed {}: everything agrees after {:.0} s",
                options.kills,
                options.seed,
                began.elapsed().as_secs_f64()
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("--seed {} --workers {}: {error:#}", options.seed, options.workers);
            ExitCode::FAILURE
        }
    }
}
