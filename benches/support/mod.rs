//! Shared by the benchmarks of the whole service: a database of their own, and a service that uses
//! it.

use std::{
    ffi::OsString,
    fs,
    io::{BufRead, BufReader},
    ops::Range,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    str::FromStr,
    sync::Arc,
};

use anyhow::{Context, bail};

use clap::Parser;
use dnc::{
    config::ServerOptions,
    domain::{Address, KeyOwner, Scope, WorkspaceId},
    postgres::{self, PrivatePostgres},
    proto::{Entry, ImportEntriesRequest, ImportEntriesResponse},
    server::{self, Bound},
    store::Store,
};
use http::uri::PathAndQuery;
use prost::Message;
use sqlx::{
    PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use time::OffsetDateTime;
use tokio_util::bytes::{BufMut, Bytes};
use tonic::{
    Request,
    client::Grpc,
    codec::{Codec, EncodeBuf, Encoder},
    transport::Channel,
};
use tonic_prost::ProstCodec;

/// What a check asks, without the service: the statement that it sends, prepared, on connections of
/// its own.
#[derive(Clone)]
pub struct BareChecks {
    pub pool: PgPool,
    workspace: WorkspaceId,
}

impl BareChecks {
    const STATEMENT: &str = "SELECT entry.address, entry.reason, entry.created_at, entry.added_by, entry.unsubscribed_at
         FROM UNNEST($2::text[]) AS wanted (address)
         CROSS JOIN LATERAL (
             SELECT address, reason, created_at, added_by, unsubscribed_at FROM entries
             WHERE workspace_id = $1 AND entries.address = wanted.address LIMIT 1
         ) AS entry";

    pub async fn connect(database_url: &str, connections: u32, workspace: WorkspaceId) -> anyhow::Result<Self> {
        // As in the service. Planning would cost as much again as a small statement.
        let connect = PgConnectOptions::from_str(database_url)?.options([("plan_cache_mode", "force_generic_plan")]);
        let pool = PgPoolOptions::new().max_connections(connections).test_before_acquire(false).connect_with(connect).await?;
        Ok(Self { pool, workspace })
    }

    /// Fills the list up to `rows` entries, which are [`BareChecks::email`] 1 and following.
    pub async fn fill(&self, rows: u64) -> anyhow::Result<()> {
        let fill = "INSERT INTO entries (workspace_id, added_by, address, reason)
             SELECT $1, 1, 'user' || number || '@example' || number % 1000 || '.com', 'bounce' FROM generate_series(1, $2) AS number";
        sqlx::query(fill).bind(self.workspace.0).bind(rows.cast_signed()).execute(&self.pool).await?;
        sqlx::query("VACUUM ANALYZE entries").execute(&self.pool).await?;
        Ok(())
    }

    pub fn email(number: u64) -> String {
        format!("user{number}@example{}.com", number % 1000)
    }

    /// Looks up the same addresses and domains as the check of these.
    pub async fn check(&self, emails: &[String]) -> anyhow::Result<usize> {
        let addresses: Vec<Address> = emails.iter().filter_map(|email| Address::parse_any(email.clone()).ok()).collect();
        let mut wanted: Vec<&str> = addresses.iter().flat_map(Address::covers).collect();
        wanted.sort_unstable();
        wanted.dedup();
        let rows: Vec<CheckRow> = sqlx::query_as(Self::STATEMENT).bind(self.workspace.0).bind(wanted).fetch_all(&self.pool).await?;
        Ok(rows.len())
    }
}

type CheckRow = (String, String, OffsetDateTime, i64, Option<OffsetDateTime>);

/// A durable private PostgreSQL with a database. Both are deleted when the last clone of this is
/// dropped.
#[derive(Clone)]
pub struct Database {
    // Dropped first, so that the server has stopped when its directory is deleted.
    pub postgres: Arc<PrivatePostgres>,
    pub url: String,
    _dir: Arc<tempfile::TempDir>,
}

impl Database {
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_with(256).await
    }

    /// With a cache of this many MiB.
    pub async fn start_with(shared_buffers_mib: u32) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("dnc-bench-").tempdir()?;
        let options = postgres::Options {
            dir: PathBuf::from(dir.path()).join("postgres"),
            is_ephemeral: false,
            connections_max: 100,
            shared_buffers_mib,
        };
        let postgres = PrivatePostgres::start(options).await?;
        postgres.create_database("dnc", "template0").await?;
        let url = postgres.url("dnc");
        Ok(Self { postgres: Arc::new(postgres), url, _dir: Arc::new(dir) })
    }
}

/// The default options of a server, on free ports.
pub fn options() -> ServerOptions {
    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        server: ServerOptions,
    }
    let fixed = ["dnc", "--http-addr", "127.0.0.1:0", "--grpc-addr", "127.0.0.1:0"];
    Flags::parse_from(fixed.map(OsString::from)).server
}

/// A service in this process, and a key for it.
pub struct Service {
    pub grpc_url: String,
    pub workspace: WorkspaceId,
    pub key: String,
}

impl Service {
    /// Migrates the database and serves it in this process until the process ends.
    pub async fn start(database_url: &str) -> anyhow::Result<(Self, Store)> {
        let (store, workspace, key) = tenant(database_url).await?;
        let bound = Bound::service(store.clone(), &options()).await?;
        let grpc_url = bound.grpc_url();
        tokio::spawn(bound.run(std::future::pending(), std::future::pending()));
        Ok((Self { grpc_url, workspace, key }, store))
    }
}

/// Migrates a database, and creates a workspace with a key.
pub async fn tenant(database_url: &str) -> anyhow::Result<(Store, WorkspaceId, String)> {
    let store = server::store(database_url, &options().database)?;
    store.migrate().await?;
    let workspace = store.create_workspace("bench").await?;
    let key = store.issue_key(KeyOwner::Workspace(workspace), Scope::Write, "", None).await?.1.reveal().to_owned();
    Ok((store, workspace, key))
}

/// The program itself, serving in a separate process until this is dropped.
pub struct Served {
    process: Child,
    pub http_url: String,
    pub grpc_url: String,
    pub key: String,
}

impl Served {
    /// Starts it with default options, on free ports. The database must be migrated.
    pub async fn start(database_url: &str, key: String) -> anyhow::Result<Self> {
        Self::start_with(&[], database_url, key).await
    }

    /// As [`Served::start`], with these flags.
    pub async fn start_with(flags: &[&str], database_url: &str, key: String) -> anyhow::Result<Self> {
        let mut process = Command::new(env!("CARGO_BIN_EXE_dnc"))
            .args(["serve", "--http-addr", "127.0.0.1:0", "--grpc-addr", "127.0.0.1:0", "--log-format", "json"])
            .args(flags)
            .env("DATABASE_URL", database_url)
            .stderr(Stdio::piped())
            .spawn()?;
        let mut log = BufReader::new(process.stderr.take().context("no log")?);
        let mut line = String::new();
        log.read_line(&mut line)?;
        let serving: serde_json::Value = serde_json::from_str(&line).with_context(|| line.clone())?;
        let url = |name: &str| serving[name].as_str().map(str::to_owned).with_context(|| line.clone());
        let (http_url, grpc_url) = (url("http")?, url("grpc")?);
        // The log is read on, so that its lines are not dropped.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Ok(Self { process, http_url, grpc_url, key })
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The processor time of a process and its children, including those that have ended; `None` where
/// there is no `/proc`.
pub fn cpu_secs_of(pid: u32) -> Option<f64> {
    let mut ticks: u64 = stat(pid)?[UTIME..UTIME + 4].iter().sum();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        if let Some(fields) = process.file_name().to_str().and_then(|name| stat(name.parse().ok()?))
            && fields[0] == u64::from(pid)
        {
            ticks += fields[UTIME] + fields[UTIME + 1];
        }
    }
    Some(ticks as f64 / TICKS_PER_SEC)
}

/// The processor time of this process without its children.
pub fn own_cpu_secs() -> Option<f64> {
    let fields = stat(std::process::id())?;
    Some((fields[UTIME] + fields[UTIME + 1]) as f64 / TICKS_PER_SEC)
}

/// Linux reports processor time to programs in hundredths of a second, whatever the clock of the
/// kernel.
const TICKS_PER_SEC: f64 = 100.0;

/// The index of a process's own user time in [`stat`]. Its kernel time, and both times of its ended
/// children, follow.
const UTIME: usize = 10;

/// The fields of `/proc/PID/stat` (proc(5)) from the parent's id on.
fn stat(pid: u32) -> Option<Vec<u64>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name comes before them, and may contain spaces.
    Some(stat.rsplit_once(')')?.1.split_whitespace().skip(1).map(|field| field.parse().unwrap_or_default()).collect())
}

/// The peak memory of a process since [`reset_peak_of`].
pub fn peak_bytes_of(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// Resets the peak memory of a process.
pub fn reset_peak_of(pid: u32) {
    // Where that is not permitted, the peak is that of the whole life of the process.
    let _ = fs::write(format!("/proc/{pid}/clear_refs"), "5");
}

/// The median of some measurements.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The number of entries in a message of a stream.
pub const MESSAGE_ENTRIES: u64 = 2_000;

/// An address whose position in the key is far from that of the next number, as in real lists.
pub fn address(number: u64) -> String {
    let mut mixed = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    format!("user.{:011x}@example{}.com", mixed >> 20, number % 1_000)
}

/// Ranges of `size` numbers.
pub fn parts(numbers: Range<u64>, size: u64) -> impl Iterator<Item = Range<u64>> {
    let end = numbers.end;
    numbers.step_by(size as usize).map(move |start| start..(start + size).min(end))
}

/// An encoded message of an import.
pub fn message(numbers: Range<u64>) -> Bytes {
    let entry = |number| Entry { email: address(number), reason: "bounce".to_owned(), ..Entry::default() };
    ImportEntriesRequest { entries: numbers.map(entry).collect(), ..ImportEntriesRequest::default() }.encode_to_vec().into()
}

/// The name of `psql`, if it is on the search path.
pub fn psql() -> Option<PathBuf> {
    let found = Command::new("psql").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    found.ok().filter(ExitStatus::success).map(|_| PathBuf::from("psql"))
}

/// One import over gRPC, of encoded messages.
pub async fn import(
    channel: Channel,
    key: String,
    messages: impl futures_util::Stream<Item = Bytes> + Send + 'static,
) -> anyhow::Result<()> {
    let mut client = Grpc::new(channel);
    client.ready().await?;
    let mut request = Request::new(messages);
    request.metadata_mut().insert("x-api-key", key.parse()?);
    let path = PathAndQuery::from_static("/dnc.v1.DncService/ImportEntries");
    let answer: ImportEntriesResponse = client.client_streaming(request, path, Encoded).await?.into_inner();
    if answer.failed > 0 {
        bail!("{} entries were rejected", answer.failed);
    }
    Ok(())
}

/// A codec that sends encoded messages unchanged.
#[derive(Clone, Copy, Default)]
struct Encoded;

impl Codec for Encoded {
    type Encode = Bytes;
    type Decode = ImportEntriesResponse;
    type Encoder = Self;
    type Decoder = <ProstCodec<(), ImportEntriesResponse> as Codec>::Decoder;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<(), ImportEntriesResponse>::default().decoder()
    }
}

impl Encoder for Encoded {
    type Item = Bytes;
    type Error = tonic::Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), tonic::Status> {
        buffer.put(item);
        Ok(())
    }
}
