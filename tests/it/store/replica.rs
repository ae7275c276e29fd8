//! A replica that answers reads, and what happens when it lags behind, follows nobody, or is gone.

use std::{path::Path, time::Duration};

use dnc::{
    domain::Error,
    proto::{
        CheckEntriesRequest, DeleteEntriesRequest, ListEntriesRequest, SummarizeEntriesRequest,
        dnc_service_client::DncServiceClient,
    },
    store::{ReplicaOptions, Store, StoreOptions},
};
use futures_util::future::join_all;
use sqlx::{Connection, PgConnection};
use tonic::transport::Channel;

use crate::{
    address_book::{numbered, request},
    harness::{Flow, OwnPostgres, Proxy, Served, TestServer, database, http_client, options, until, with_key},
};

/// A server whose lists may be read from a standby.
struct Setup {
    tenants: TestServer,
    standby: OwnPostgres,
    /// The link to the standby.
    link: Proxy,
    served: Served,
    client: DncServiceClient<Channel>,
    primary: OwnPostgres,
}

impl Setup {
    /// A standby that may lag behind by up to `lag_max_secs`.
    async fn start(lag_max_secs: &str) -> Self {
        let primary = OwnPostgres::start().await;
        let standby = primary.standby().await;
        let tenants = TestServer::start_with(&[], &primary.url).await;
        let link = Proxy::to(&standby.url).await;
        let url = link.url(&standby.url);
        let flags = ["--metrics-addr", "127.0.0.1:0", "--read-database-url", &url, "--read-lag-max-secs", lag_max_secs];
        let served = Served::start(Path::new(env!("CARGO_BIN_EXE_dnc")), &flags, &primary.url).await.unwrap();
        let client = DncServiceClient::connect(served.grpc_url.clone()).await.unwrap();
        Self { tenants, standby, link, served, client, primary }
    }

    async fn import(&self, range: std::ops::Range<u32>) {
        let import = with_key(tokio_stream::iter([request(numbered(range).collect())]), &self.tenants.key);
        self.client.clone().import_entries(import).await.unwrap();
    }

    async fn is_suppressed(&self, number: u32) -> bool {
        let emails = numbered(number..number + 1).map(|entry| entry.email).collect();
        let check = with_key(CheckEntriesRequest { emails }, &self.tenants.key);
        self.client.clone().check_entries(check).await.unwrap().into_inner().results[0].suppressed
    }

    async fn metric(&self, series: &str) -> f64 {
        let text = http_client().get(&self.served.metrics_url).send().await.unwrap().text().await.unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok());
        // What was not counted yet has no line.
        line.unwrap_or(0.0)
    }

    /// Reads of the list by the database that answered: the primary, the replica.
    async fn reads(&self) -> [f64; 2] {
        [
            self.metric(r#"dnc_list_reads_total{database="primary"}"#).await,
            self.metric(r#"dnc_list_reads_total{database="replica"}"#).await,
        ]
    }

    async fn is_from_replica(&self) -> bool {
        let [_, before] = self.reads().await;
        self.is_suppressed(0).await;
        let [_, after] = self.reads().await;
        after > before
    }

    /// How many such sessions of the server the standby has.
    async fn sessions_of_standby(&self, sessions: &str) -> i64 {
        let count = format!("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'dnc' AND {sessions}");
        sqlx::query_scalar(sqlx::AssertSqlSafe(count)).fetch_one(&mut self.standby.connection().await).await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_answers_reads_while_it_is_recent() {
    let setup = Setup::start("4").await;
    setup.import(0..100).await;
    until("checks are answered by the replica", || setup.is_from_replica()).await;
    until("the entries have reached it", || setup.is_suppressed(99)).await;
    assert!(setup.metric("dnc_replica_lag_seconds").await < 4.0);
    let key = &setup.tenants.key;
    until("a list is answered by the replica alone", async || {
        let before = setup.reads().await;
        let list = ListEntriesRequest { page_size: 10, ..ListEntriesRequest::default() };
        let listed = setup.client.clone().list_entries(with_key(list, key)).await.unwrap().into_inner();
        assert_eq!((listed.entries.len(), listed.total_size), (10, 100));
        let after = setup.reads().await;
        after[0] == before[0] && after[1] > before[1]
    })
    .await;
    until("a summary is answered by the replica alone", async || {
        let before = setup.reads().await;
        let summary = setup.client.clone().summarize_entries(with_key(SummarizeEntriesRequest {}, key)).await.unwrap();
        assert_eq!(summary.into_inner().total, 100);
        let after = setup.reads().await;
        after[0] == before[0] && after[1] > before[1]
    })
    .await;

    // A new entry is found at the latest when the replica may not be asked any more.
    setup.standby.run("SELECT pg_wal_replay_pause()").await;
    setup.import(100..101).await;
    // What a deletion would delete is counted where it deletes.
    let preview = DeleteEntriesRequest { all: true, validate_only: true, ..DeleteEntriesRequest::default() };
    assert_eq!(setup.client.clone().delete_entries(with_key(preview, key)).await.unwrap().into_inner().deleted, 101);
    until("the lag is past the bound", async || setup.metric("dnc_replica_lag_seconds").await > 4.0).await;
    assert!(setup.is_suppressed(100).await);
    assert!(!setup.is_from_replica().await);
    // The replica is not even asked, which would end in a rollback there.
    let summary = setup.client.clone().summarize_entries(with_key(SummarizeEntriesRequest {}, key)).await.unwrap();
    assert_eq!(summary.into_inner().total, 101);
    assert_eq!(setup.sessions_of_standby("query = 'ROLLBACK'").await, 0);
    setup.standby.run("SELECT pg_wal_replay_resume()").await;
    until("checks are answered by the replica again", || setup.is_from_replica()).await;
    assert!(setup.is_suppressed(100).await);
    // Each change is logged once.
    let to = ["reads go to the primary and not to the replica", "reads go to the replica"];
    let changes = setup.served.log_about_replica();
    assert!(changes.ends_with(&to.map(str::to_owned)), "{changes:?}");
    assert!(changes.windows(2).all(|pair| pair[0] != pair[1]), "{changes:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_gone_or_promoted_is_not_asked() {
    let mut setup = Setup::start("4").await;
    setup.import(0..1).await;
    until("checks are answered by the replica", || setup.is_from_replica()).await;
    // It has a history of its own from here on.
    setup.standby.run("SELECT pg_promote(true, 30)").await;
    until("the promotion is noticed", || async { !setup.is_from_replica().await }).await;
    assert!(setup.is_suppressed(0).await);
    assert_eq!(setup.metric("dnc_replica_lag_seconds").await, f64::INFINITY);
    setup.standby.end("QUIT").await;
    assert!(setup.is_suppressed(0).await);
    setup.import(1..2).await;
    assert!(setup.is_suppressed(1).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_the_replica_cannot_answer_is_answered_by_the_primary() {
    let mut setup = Setup::start("600").await;
    setup.import(0..10).await;
    until("checks are answered by the replica", || setup.is_from_replica()).await;
    // These do not know yet that nothing comes back.
    setup.link.all(Flow::Stall);
    for _ in 0..3 {
        assert!(setup.is_suppressed(9).await);
    }
    setup.link.mend();
    until("checks are answered by the replica again", || setup.is_from_replica()).await;
    setup.link.cut();
    assert!(setup.is_suppressed(9).await);
    setup.link.mend();
    until("checks are answered by the replica once more", || setup.is_from_replica()).await;
    setup.standby.end("KILL").await;
    assert!(setup.is_suppressed(9).await);
    let made = setup.link.made();
    until("it is known to be away", async || setup.link.made() >= made + 8).await;
    // Its lag is within the bound for a long time, but not every read waits a second for it: the
    // link is tried several times in a second.
    let made = setup.link.made();
    for _ in 0..30 {
        assert!(setup.is_suppressed(9).await);
    }
    assert!(setup.link.made() < made + 60);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_has_waited_for_a_connection_is_not_answered_with_older_data() {
    let setup = Setup::start("2").await;
    setup.import(0..1).await;
    until("checks are answered by the replica", || setup.is_from_replica()).await;
    until("the entry has reached it", || setup.is_suppressed(0)).await;
    // The standby has this lock until it has replayed the end of the transaction.
    let mut primary = setup.primary.connection().await;
    sqlx::raw_sql("BEGIN; LOCK TABLE entries IN ACCESS EXCLUSIVE MODE").execute(&mut primary).await.unwrap();
    let is_locked = "SELECT EXISTS (SELECT FROM pg_locks WHERE relation = 'entries'::regclass AND mode = 'AccessExclusiveLock')";
    until("the standby has the lock", async || {
        sqlx::query_scalar(is_locked).fetch_one(&mut setup.standby.connection().await).await.unwrap()
    })
    .await;
    setup.standby.run("SELECT pg_wal_replay_pause()").await;
    setup.primary.run("SELECT pg_logical_emit_message(true, '', 'it lags behind from here on')").await;
    // More than the statements that one workspace may have at once.
    let checks = join_all((0..15).map(|_| setup.is_suppressed(0)));
    let lagging = async {
        until("some checks wait for the lock", async || setup.sessions_of_standby("wait_event_type = 'Lock'").await > 0).await;
        until("the lag is past the bound", async || setup.metric("dnc_replica_lag_seconds").await > 2.0).await;
        sqlx::raw_sql("ROLLBACK").execute(&mut primary).await.unwrap();
        // Others wait for these.
        setup.standby.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'").await;
    };
    let answered = tokio::time::timeout(Duration::from_secs(30), async { tokio::join!(checks, lagging) });
    let (checks, ()) = answered.await.expect("none of the others waits for the lock");
    assert!(checks.into_iter().all(|is_suppressed| is_suppressed));
    setup.standby.run("SELECT pg_wal_replay_resume()").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_with_another_history_is_not_asked() {
    let mut old = OwnPostgres::start().await;
    let (new, left_behind) = (old.standby().await, old.standby().await);
    // The new primary does not receive the end of the log, which the other standby has.
    new.run("ALTER SYSTEM SET primary_conninfo = ''").await;
    new.run("SELECT pg_reload_conf()").await;
    let receives = "SELECT EXISTS (SELECT FROM pg_stat_wal_receiver)";
    until("it receives nothing more", async || {
        !sqlx::query_scalar::<_, bool>(receives).fetch_one(&mut new.connection().await).await.unwrap()
    })
    .await;
    old.run("SELECT pg_logical_emit_message(false, '', repeat('x', 32 * 1024 * 1024)), pg_switch_wal()").await;
    let end: i64 =
        sqlx::query_scalar("SELECT (pg_current_wal_lsn() - '0/0')::bigint").fetch_one(&mut old.connection().await).await.unwrap();
    let replayed = "SELECT (pg_last_wal_replay_lsn() - '0/0')::bigint >= $1";
    until("the standby has replayed it", async || {
        sqlx::query_scalar(replayed).bind(end).fetch_one(&mut left_behind.connection().await).await.unwrap()
    })
    .await;
    old.end("QUIT").await;
    new.run("SELECT pg_promote(true, 30)").await;
    // Another system, whose log is shorter.
    let stranger = OwnPostgres::start().await;
    for primary in [&new, &stranger] {
        let flags = ["--read-database-url", &left_behind.url];
        let served = Served::start(Path::new(env!("CARGO_BIN_EXE_dnc")), &flags, &primary.url).await.unwrap();
        until("it is measured", async || !served.log_about_replica().is_empty()).await;
        assert_eq!(served.log_about_replica(), ["reads go to the primary and not to the replica"]);
    }
}

#[tokio::test]
async fn the_sessions_of_the_replica_are_closed_with_the_store() {
    let url = database().await;
    let options = dnc::server::store_options(&url, &options(&[]).database);
    // It is asked how far it has come, although it is no replica.
    let replica = ReplicaOptions { url: url.clone(), lag_max: Duration::from_secs(10) };
    let store = Store::new(&StoreOptions { replica: Some(replica), ..options }).unwrap();
    let sessions = async || -> i64 {
        let sessions = "SELECT count(*) FROM pg_stat_activity
            WHERE datname = current_database() AND application_name = 'dnc' AND query LIKE '%pg_control_checkpoint()%'";
        sqlx::query_scalar(sessions).fetch_one(&mut PgConnection::connect(&url).await.unwrap()).await.unwrap()
    };
    until("both are asked", async || sessions().await == 2).await;
    store.close().await;
    until("no session is left", async || sessions().await == 0).await;
    assert_eq!(store.levels().replica_lag_secs, Some(f64::INFINITY));
}

#[tokio::test]
async fn the_url_of_a_replica_names_one_server() {
    let options = dnc::server::store_options("postgres://u@a,b/d", &options(&[]).database);
    let of = |url: &str| {
        let replica = ReplicaOptions { url: url.to_owned(), lag_max: Duration::from_secs(10) };
        Store::new(&StoreOptions { replica: Some(replica), ..options.clone() })
    };
    assert!(of("postgres://u@c/d").is_ok());
    assert!(matches!(of("postgres://u@c,d/d"), Err(Error::Invalid { .. })));
}
