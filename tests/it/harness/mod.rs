//! One PostgreSQL for the test run, a new database for each test, and a running service in front of
//! it.

pub mod browser;
mod calls;
mod http;
pub mod process;
mod proxy;
mod served;

use std::{
    ffi::OsString,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        process::CommandExt,
    },
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

pub use calls::{Kind, all_of, give_up_after_polls, make_all};
use clap::Parser;
use dnc::{
    config::ServerOptions,
    domain::{KeyOwner, Scope, WorkspaceId},
    gateway::Upstream,
    grpc::{DncService, auth::Authenticator, guard::Guard, rate::Rate},
    postgres::{self, PrivatePostgres},
    proto::{
        ImportEntriesRequest, ImportEntriesResponse, ListEntriesRequest, dnc_service_client::DncServiceClient,
        dnc_service_server::DncServiceServer,
    },
    server::{Bound, Ended},
    store::{Store, StoreOptions},
};
pub use http::{error, gzip, zstd};
pub use proxy::{Flow, Proxy};
pub use served::{Served, signal};
use sqlx::{Connection, PgConnection};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{
    Request, Response, Status,
    service::Routes,
    transport::{Channel, Endpoint},
};

/// The PostgreSQL of this run. It is in a static and never dropped; it stops when this process
/// ends, however that happens.
struct Run {
    /// The private server, unless `TEST_DATABASE_URL` names another one.
    _postgres: Option<PrivatePostgres>,
    /// The URL without the name of the database.
    base_url: String,
    /// The migrated database that new ones are copied from.
    template: String,
}

fn run() -> &'static Run {
    static RUN: OnceLock<Run> = OnceLock::new();
    RUN.get_or_init(|| {
        // In a runtime of its own: that of the first test ends with that test.
        std::thread::spawn(|| tokio::runtime::Runtime::new().unwrap().block_on(start_run())).join().unwrap()
    })
}

async fn start_run() -> Run {
    let (postgres, base_url) = match std::env::var("TEST_DATABASE_URL") {
        Ok(url) => {
            let mut url = url::Url::parse(&url).expect("TEST_DATABASE_URL is a URL");
            url.set_path("/");
            (None, url.to_string())
        }
        Err(_) => {
            let postgres = PrivatePostgres::start(postgres::Options {
                dir: scratch_dir(),
                is_ephemeral: true,
                connections_max: 400,
                shared_buffers_mib: 256,
            })
            .await
            .expect("a private PostgreSQL; or set TEST_DATABASE_URL");
            let url = postgres.url("");
            (Some(postgres), url)
        }
    };
    let template = format!("dnc_template_{}", std::process::id());
    postgres::create_database(&format!("{base_url}postgres"), &template, "template0").await.unwrap();
    let store = store(&format!("{base_url}{template}"));
    store.migrate().await.unwrap();
    store.close().await;
    Run { _postgres: postgres, base_url, template }
}

/// A new directory for a private PostgreSQL, which removes it when it ends.
pub fn scratch_dir() -> PathBuf {
    tempfile::Builder::new().prefix("dnc-test-").tempdir().unwrap().keep()
}

/// Shows the warnings and errors of the server in the output of a failed test.
fn log_to_test() {
    let log = tracing_subscriber::fmt().with_test_writer().with_max_level(tracing::Level::WARN);
    // Fails in all tests but the first, which has set it already.
    let _ = log.try_init();
}

fn store(url: &str) -> Store {
    Store::new(&StoreOptions {
        url: url.to_owned(),
        migrate_url: None,
        is_pooled: false,
        replica: None,
        connections_max: 4,
        connect_timeout: Duration::from_secs(20),
        statement_timeout: Duration::from_secs(60),
    })
    .unwrap()
}

/// The URL of a new, migrated and empty database.
pub async fn database() -> String {
    let run = tokio::task::spawn_blocking(run).await.unwrap();
    new_database(run, &run.template).await
}

/// The URL of a new, empty database without a schema.
pub async fn bare_database() -> String {
    let run = tokio::task::spawn_blocking(run).await.unwrap();
    new_database(run, "template0").await
}

async fn new_database(run: &Run, template: &str) -> String {
    static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let name = format!("dnc_test_{}_{number}", std::process::id());
    // PostgreSQL copies a template for one database at a time.
    static COPYING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _copying = COPYING.lock().await;
    postgres::create_database(&format!("{}postgres", run.base_url), &name, template).await.unwrap();
    format!("{}{name}", run.base_url)
}

/// Lets a database pass for one with Citus: only the name of an extension is asked for, and what is
/// done there runs on any PostgreSQL.
pub const PASS_FOR_CITUS: &str =
    "SET allow_system_table_mods = on; UPDATE pg_extension SET extname = 'citus' WHERE extname = 'plpgsql'";

/// A PostgreSQL of its own with a migrated database, for a test that damages it or reads its log.
pub struct OwnPostgres {
    // Dropped first, so that the server has stopped before its directory is removed.
    pub server: PrivatePostgres,
    pub url: String,
    dir: tempfile::TempDir,
}

impl OwnPostgres {
    pub async fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("dnc-test-").tempdir().unwrap();
        let options =
            postgres::Options { dir: dir.path().to_owned(), is_ephemeral: false, connections_max: 100, shared_buffers_mib: 256 };
        let server = PrivatePostgres::start(options).await.unwrap();
        server.create_database("dnc", "template0").await.unwrap();
        let url = server.url("dnc");
        // What is killed here are processes. A disk that is busy with other tests stalls them all.
        let own = Self { server, url, dir };
        own.run("ALTER SYSTEM SET fsync = off").await;
        own.run("SELECT pg_reload_conf()").await;
        let store = store(&own.url);
        store.migrate().await.unwrap();
        store.close().await;
        own
    }

    /// A standby that follows this server, and accepts no writes until it is promoted.
    pub async fn standby(&self) -> Self {
        let dir = tempfile::Builder::new().prefix("dnc-test-").tempdir().unwrap();
        let process = PathBuf::from(format!("/proc/{}", self.server.pid().unwrap()));
        let program = std::fs::read_link(process.join("exe")).unwrap().with_file_name("pg_basebackup");
        let owner = std::fs::metadata(&process).unwrap();
        let cluster = dir.path().join("cluster");
        std::fs::create_dir(&cluster).unwrap();
        std::os::unix::fs::chown(&cluster, Some(owner.uid()), Some(owner.gid())).unwrap();
        // The user of the server must be able to pass through the first directory, and must be the
        // only one with access to the second.
        for (dir, mode) in [(dir.path(), 0o711), (&cluster, 0o700)] {
            std::fs::set_permissions(dir, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        let mut copy = std::process::Command::new(program);
        copy.uid(owner.uid()).gid(owner.gid()).current_dir("/").args(["-R", "--checkpoint=fast", "--no-sync", "--pgdata"]);
        let copied = copy.arg(&cluster).args(["-d", &self.server.url("")]).output().unwrap();
        assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
        // The standby has the users and passwords of the original.
        std::fs::copy(self.dir.path().join("password"), dir.path().join("password")).unwrap();
        let options =
            postgres::Options { dir: dir.path().to_owned(), is_ephemeral: false, connections_max: 100, shared_buffers_mib: 256 };
        let server = PrivatePostgres::start(options).await.unwrap();
        let url = server.url("dnc");
        Self { server, url, dir }
    }

    /// A new connection to the database of the service.
    pub async fn connection(&self) -> PgConnection {
        PgConnection::connect(&self.url).await.unwrap()
    }

    pub async fn run(&self, statement: &'static str) {
        sqlx::raw_sql(statement).execute(&mut self.connection().await).await.unwrap();
    }

    /// Everything that the server has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("postgres.log")).unwrap()
    }

    /// Sends the server a signal that ends it, such as `KILL`, and waits until it has ended.
    pub async fn end(&mut self, name: &str) {
        signal(self.server.pid().ok(), name);
        self.server.ended().await;
    }
}

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    server: ServerOptions,
}

/// The options of `dnc serve` with these flags, on free ports.
pub fn options(flags: &[&str]) -> ServerOptions {
    let fixed = ["dnc", "--http-addr", "127.0.0.1:0", "--grpc-addr", "127.0.0.1:0"];
    Flags::parse_from(fixed.iter().chain(flags).map(OsString::from)).server
}

/// A running service with two workspaces.
pub struct TestServer {
    pub database_url: String,
    pub http_url: String,
    pub grpc_url: String,
    pub store: Store,
    pub workspace: WorkspaceId,
    pub key: String,
    pub platform_key: String,
    pub other_workspace: WorkspaceId,
    pub other_key: String,
    stop: CancellationToken,
    stop_now: CancellationToken,
    running: Option<JoinHandle<anyhow::Result<Ended>>>,
}

impl TestServer {
    pub async fn start() -> Self {
        Self::start_with(&[], &database().await).await
    }

    pub async fn start_with(flags: &[&str], database_url: &str) -> Self {
        Self::start_through(flags, database_url, database_url).await
    }

    /// `service_url` is the URL by which the service reaches the database, `database_url` the one
    /// by which the test does.
    pub async fn start_through(flags: &[&str], database_url: &str, service_url: &str) -> Self {
        let service = dnc::server::store_options(service_url, &options(flags).database);
        Self::start_on(flags, database_url, &service).await
    }

    /// `service` is how the service reaches the database.
    pub async fn start_on(flags: &[&str], database_url: &str, service: &StoreOptions) -> Self {
        log_to_test();
        let options = options(flags);
        let store = store(database_url);
        let workspace = store.create_workspace("ours").await.unwrap();
        let other_workspace = store.create_workspace("theirs").await.unwrap();
        let user = store.create_user("someone", &[workspace]).await.unwrap();
        let key = store.issue_key(KeyOwner::Workspace(workspace), Scope::Write, "", None).await.unwrap().1.reveal().to_owned();
        let other_key =
            store.issue_key(KeyOwner::Workspace(other_workspace), Scope::Write, "", None).await.unwrap().1.reveal().to_owned();
        let platform_key = store.issue_key(KeyOwner::User(user), Scope::Write, "", None).await.unwrap().1.reveal().to_owned();
        let service_store = Store::new(service).unwrap();
        let bound = Bound::service(service_store.clone(), &options).await.unwrap();
        let (http_url, grpc_url) = (bound.http_url(), bound.grpc_url());
        let (stop, stop_now) = (CancellationToken::new(), CancellationToken::new());
        let run = bound.run(stop.clone().cancelled_owned(), stop_now.clone().cancelled_owned());
        let running = tokio::spawn(async move {
            let ended = run.await;
            service_store.close().await;
            ended
        });
        Self {
            database_url: database_url.to_owned(),
            http_url,
            grpc_url,
            store,
            workspace,
            key,
            platform_key,
            other_workspace,
            other_key,
            stop,
            stop_now,
            running: Some(running),
        }
    }

    pub async fn client(&self) -> DncServiceClient<Channel> {
        DncServiceClient::new(self.channel().await)
    }

    /// A client for [`Kind::make`].
    pub fn upstream(&self) -> DncServiceClient<Upstream> {
        upstream(&self.grpc_url)
    }

    /// The guarded service with database connections of its own, called without a socket. So a call
    /// that is dropped here is dropped in the service at once.
    pub fn in_process(&self, flags: &[&str]) -> DncServiceClient<Upstream> {
        let options = options(flags);
        let store = dnc::server::store(&self.database_url, &options.database).unwrap();
        let auth = Arc::new(Authenticator::new(store.clone()));
        let service = DncServiceServer::new(DncService::new(store, auth.clone(), dnc::server::stream_limits(&options)));
        let guarded = Guard::new(service, auth, Rate::new(None), CancellationToken::new(), TaskTracker::new());
        DncServiceClient::new(Upstream::Here(Routes::new(guarded).prepare()))
    }

    pub async fn channel(&self) -> Channel {
        Channel::from_shared(self.grpc_url.clone()).unwrap().connect().await.unwrap()
    }

    /// Imports over gRPC with the workspace's own key.
    pub async fn import(&self, requests: Vec<ImportEntriesRequest>) -> Result<ImportEntriesResponse, Status> {
        let request = with_key(tokio_stream::iter(requests), &self.key);
        self.client().await.import_entries(request).await.map(Response::into_inner)
    }

    /// Begins an import of what is sent to the channel, until that is dropped.
    pub async fn begin_import(
        &self,
        key: &str,
    ) -> (mpsc::Sender<ImportEntriesRequest>, JoinHandle<Result<Response<ImportEntriesResponse>, Status>>) {
        let (send, messages) = mpsc::channel(1);
        let call = with_key(ReceiverStream::new(messages), key);
        let mut client = self.client().await;
        (send, tokio::spawn(async move { client.import_entries(call).await }))
    }

    /// Posts a JSON body to the import with the workspace's own key.
    pub async fn post(&self, body: impl Into<reqwest::Body>) -> reqwest::Response {
        self.post_request().header("content-type", "application/json").body(body).send().await.unwrap()
    }

    pub fn post_request(&self) -> reqwest::RequestBuilder {
        http_client().post(format!("{}/v1/dnc/import", self.http_url)).header("x-api-key", &self.key)
    }

    pub async fn connection(&self) -> PgConnection {
        PgConnection::connect(&self.database_url).await.unwrap()
    }

    /// Address, reason and key id of all entries of a workspace, in the order of the addresses.
    pub async fn rows(&self, workspace: WorkspaceId) -> Vec<(String, String, i64)> {
        sqlx::query_as("SELECT address, reason, added_by FROM entries WHERE workspace_id = $1 ORDER BY address")
            .bind(workspace.0)
            .fetch_all(&mut self.connection().await)
            .await
            .unwrap()
    }

    /// How many entries the first workspace has.
    pub async fn count(&self) -> i64 {
        sqlx::query_scalar("SELECT count(*) FROM entries WHERE workspace_id = $1")
            .bind(self.workspace.0)
            .fetch_one(&mut self.connection().await)
            .await
            .unwrap()
    }

    pub fn begin_stop(&self) {
        self.stop.cancel();
    }

    pub fn stop_now(&self) {
        self.stop_now.cancel();
    }

    pub async fn ended(mut self) -> Ended {
        self.running.take().unwrap().await.unwrap().unwrap()
    }
}

/// A client for [`Kind::make`], to the server at `grpc_url`.
pub fn upstream(grpc_url: &str) -> DncServiceClient<Upstream> {
    DncServiceClient::new(Upstream::elsewhere(Endpoint::from_shared(grpc_url.to_owned()).unwrap()))
}

pub fn http_client() -> reqwest::Client {
    static PROVIDER: OnceLock<()> = OnceLock::new();
    PROVIDER.get_or_init(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    reqwest::Client::new()
}

pub fn with_key<T>(message: T, key: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("x-api-key", key.parse().unwrap());
    request
}

/// Waits until `condition` holds. The limit of 60 seconds only ends a test that fails.
pub async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    while !condition().await {
        assert!(tokio::time::Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Asserts that no session of a service is left in a transaction or a statement, that it has at
/// most `connections_max` of them, and that the maintained count is that of the rows.
pub async fn require_nothing_left(server: &TestServer, connections_max: i64) {
    let sessions = "SELECT count(*), count(*) FILTER (WHERE state <> 'idle') FROM pg_stat_activity
                    WHERE application_name = 'dnc' AND datname = current_database() AND pid <> pg_backend_pid()";
    // The service has one more to watch the link. The store of the test has four and one.
    let sessions_max = connections_max + 1 + 5;
    until("the sessions are idle, and not too many", || async {
        let (all, busy): (i64, i64) = sqlx::query_as(sessions).fetch_one(&mut server.connection().await).await.unwrap();
        all <= sessions_max && busy == 0
    })
    .await;
    let call = with_key(ListEntriesRequest::default(), &server.key);
    let listed = server.client().await.list_entries(call).await.unwrap().into_inner();
    assert_eq!(listed.total_size, server.count().await);
}
