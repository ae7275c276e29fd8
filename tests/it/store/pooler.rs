//! A connection pooler between the service and its database: PgBouncer.

use std::{
    io::Write,
    net::{SocketAddr, TcpListener},
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        process::CommandExt,
    },
    path::Path,
    process::{Child, Command, Stdio},
};

use dnc::store::StoreOptions;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, Row, postgres::PgConnectOptions};
use tonic::Code;

use crate::harness::{Flow, Kind, Proxy, TestServer, all_of, bare_database, database, make_all, options, until};

/// The user `nobody`, since PgBouncer does not run as root.
const NOBODY: u32 = 65_534;

/// A running PgBouncer, which is killed when this is dropped.
struct Pooler {
    child: Child,
    address: SocketAddr,
    dir: tempfile::TempDir,
}

impl Pooler {
    /// Starts a PgBouncer in front of the server of `url`. `None` without PgBouncer on this
    /// machine.
    async fn start(mode: &str, url: &str) -> Option<Self> {
        if Command::new("pgbouncer").arg("--version").output().is_err() {
            // Not by a macro: what those print in a test that passes is not shown.
            let _ = writeln!(std::io::stderr(), "SKIPPED: pgbouncer is not installed; no pooler is tried");
            return None;
        }
        let database = url::Url::parse(url).unwrap();
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let users = dir.path().join("users");
        std::fs::write(&users, format!("\"{}\" \"{}\"\n", database.username(), database.password().unwrap())).unwrap();
        let rules = [
            "[databases]".to_owned(),
            format!("* = host={} port={}", database.host_str().unwrap(), database.port().unwrap()),
            "[pgbouncer]".to_owned(),
            format!("listen_addr = {}\nlisten_port = {}\nunix_socket_dir =", address.ip(), address.port()),
            format!("auth_type = trust\nauth_file = {}\npool_mode = {mode}", users.display()),
        ];
        std::fs::write(dir.path().join("rules"), rules.join("\n")).unwrap();
        let pooler = Self { child: Self::spawn(dir.path()), address, dir };
        pooler.ready().await;
        Some(pooler)
    }

    fn spawn(dir: &Path) -> Child {
        let mut command = Command::new("pgbouncer");
        if std::fs::metadata("/proc/self").unwrap().uid() == 0 {
            command.uid(NOBODY).gid(NOBODY);
        }
        command.arg("-q").arg(dir.join("rules")).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    async fn ready(&self) {
        until("PgBouncer accepts connections", || async { tokio::net::TcpStream::connect(self.address).await.is_ok() }).await;
    }

    async fn restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = Self::spawn(self.dir.path());
        self.ready().await;
    }

    /// `url` by way of this pooler.
    fn url(&self, url: &str) -> String {
        let mut url = url::Url::parse(url).unwrap();
        url.set_port(Some(self.address.port())).unwrap();
        url.to_string()
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How a service reaches its database by way of a pooler that assigns connections to transactions.
fn pooled(url: &str, flags: &[&str]) -> StoreOptions {
    StoreOptions { is_pooled: true, ..dnc::server::store_options(url, &options(flags).database) }
}

async fn all_succeed(server: &TestServer, calls: std::ops::Range<usize>) {
    for outcome in all_of(make_all(&server.upstream(), &server.key, calls)).await {
        outcome.require(Code::Ok);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_of_sessions_needs_no_option() {
    let url = database().await;
    let Some(pooler) = Pooler::start("session", &url).await else { return };
    let server = TestServer::start_through(&[], &url, &pooler.url(&url)).await;
    all_succeed(&server, 0..3).await;
    assert_ne!(server.count().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_pooler_of_transactions_every_call_works_and_leaves_no_setting_behind() {
    let url = database().await;
    let Some(pooler) = Pooler::start("transaction", &url).await else { return };
    let server = TestServer::start_on(&[], &url, &pooled(&pooler.url(&url), &[])).await;
    all_succeed(&server, 0..6).await;
    assert_ne!(server.count().await, 0);
    let options: PgConnectOptions = pooler.url(&url).parse().unwrap();
    let mut other = PgConnection::connect_with(&options.extra_float_digits(None)).await.unwrap();
    for setting in ["enable_seqscan", "jit", "statement_timeout"] {
        // As text: another server may run the next statement.
        let shown = format!("SELECT current_setting('{setting}') = reset_val FROM pg_settings WHERE name = '{setting}'");
        let row = other.fetch_one(sqlx::raw_sql(AssertSqlSafe(shown))).await.unwrap();
        let is_default: Option<bool> = row.get(0);
        assert_eq!(is_default, Some(true), "{setting}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_pooler_of_transactions_statements_have_their_time_limit_and_end_with_their_caller() {
    let url = database().await;
    let Some(pooler) = Pooler::start("transaction", &url).await else { return };
    let short = ["--database-statement-timeout-secs", "1"];
    let limited = TestServer::start_on(&short, &url, &pooled(&pooler.url(&url), &short)).await;
    let unlimited = TestServer::start_on(&[], &url, &pooled(&pooler.url(&url), &[])).await;
    let mut admin = limited.connection().await;
    let mut lock = admin.begin().await.unwrap();
    sqlx::raw_sql("LOCK TABLE entries").execute(&mut *lock).await.unwrap();
    let late = Kind::CheckOne.make(limited.upstream(), &limited.key, 0).await.unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded);

    let mut observer = limited.connection().await;
    let mut waiting = async || {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        sqlx::query_scalar::<_, i64>(waiting).fetch_one(&mut observer).await.unwrap()
    };
    let call = tokio::spawn({
        let (client, key) = (unlimited.upstream(), unlimited.key.clone());
        async move { Kind::CheckMany.make(client, &key, 0).await }
    });
    while waiting().await == 0 {
        tokio::task::yield_now().await;
    }
    call.abort();
    let given_up = async {
        while waiting().await != 0 {
            tokio::task::yield_now().await;
        }
    };
    // Long before its own limit.
    tokio::time::timeout(std::time::Duration::from_secs(30), given_up).await.expect("the statement is cancelled");
    lock.rollback().await.unwrap();
    all_succeed(&unlimited, 0..1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_is_silent_or_restarted_is_unavailable_for_a_while() {
    let url = database().await;
    let Some(mut pooler) = Pooler::start("transaction", &url).await else { return };
    let link = Proxy::to(&pooler.url(&url)).await;
    let server = TestServer::start_on(&[], &url, &pooled(&link.url(&pooler.url(&url)), &[])).await;
    let check = async || Kind::CheckOne.make(server.upstream(), &server.key, 0).await.map_err(|status| status.code());
    assert_eq!(check().await, Ok(()));
    link.all(Flow::Stall);
    assert_eq!(check().await, Err(Code::Unavailable));
    link.mend();
    until("checks are answered again", || async { check().await.is_ok() }).await;
    pooler.restart().await;
    until("checks are answered after a restart", || async { check().await.is_ok() }).await;
    all_succeed(&server, 1..2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn migrations_go_past_the_pooler() {
    let url = bare_database().await;
    let Some(pooler) = Pooler::start("transaction", &url).await else { return };
    let dnc = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dnc"));
        command.args(arguments).env("DATABASE_URL", pooler.url(&url)).env("DNC_MIGRATE_DATABASE_URL", &url);
        command.env("DNC_DATABASE_TRANSACTION_POOLER", "1").output().unwrap()
    };
    for arguments in [&["migrate"][..], &["workspaces", "create", "Our shop"], &["keys", "create", "--workspace", "ws_1"]] {
        let done = dnc(arguments);
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    }
}
