//! A replica that answers reads, and what happens when it lags behind, follows nobody, or is gone.

use std::{path::Path, time::Duration};

use dnc::proto::{CheckEntriesRequest, ListEntriesRequest, SummarizeEntriesRequest, dnc_service_client::DncServiceClient};
use sqlx::{Connection, PgConnection};
use tonic::transport::Channel;

use crate::{
    address_book::{numbered, request},
    harness::{Flow, OwnPostgres, Proxy, Served, TestServer, http_client, until, with_key},
};

/// A server whose lists may be read from a standby that lags behind by up to four seconds.
struct Setup {
    tenants: TestServer,
    standby: OwnPostgres,
    /// The link to the standby.
    link: Proxy,
    served: Served,
    client: DncServiceClient<Channel>,
    _primary: OwnPostgres,
}

impl Setup {
    async fn start() -> Self {
        let primary = OwnPostgres::start().await;
        let standby = primary.standby().await;
        let tenants = TestServer::start_with(&[], &primary.url).await;
        let link = Proxy::to(&standby.url).await;
        let url = link.url(&standby.url);
        let flags = ["--metrics-addr", "127.0.0.1:0", "--read-database-url", &url, "--read-lag-max-secs", "4"];
        let served = Served::start(Path::new(env!("CARGO_BIN_EXE_dnc")), &flags, &primary.url).await.unwrap();
        let client = DncServiceClient::connect(served.grpc_url.clone()).await.unwrap();
        Self { tenants, standby, link, served, client, _primary: primary }
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
        line.unwrap_or(f64::NAN)
    }

    /// Reads of the list by the database that answered: the primary, the replica.
    async fn reads(&self) -> [f64; 2] {
        [
            self.metric(r#"dnc_list_reads_total{database="primary"}"#).await,
            self.metric(r#"dnc_list_reads_total{database="replica"}"#).await,
        ]
    }

    async fn is_from_replica(&self) -> bool {
        let before = self.reads().await[1];
        self.is_suppressed(0).await;
        self.reads().await[1] > before || (before.is_nan() && self.reads().await[1] == 1.0)
    }

    async fn on_standby(&self, statement: &'static str) {
        let mut standby = PgConnection::connect(&self.standby.url).await.unwrap();
        sqlx::raw_sql(statement).execute(&mut standby).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_answers_reads_while_it_is_recent() {
    let setup = Setup::start().await;
    setup.import(0..100).await;
    until("checks are answered by the replica", || setup.is_from_replica()).await;
    until("the entries have reached it", || setup.is_suppressed(99)).await;
    assert!(setup.metric("dnc_replica_lag_seconds").await < 4.0);
    let [primary, _] = setup.reads().await;
    let key = &setup.tenants.key;
    let list = ListEntriesRequest { page_size: 10, ..ListEntriesRequest::default() };
    let listed = setup.client.clone().list_entries(with_key(list, key)).await.unwrap().into_inner();
    assert_eq!((listed.entries.len(), listed.total_size), (10, 100));
    let summary = setup.client.clone().summarize_entries(with_key(SummarizeEntriesRequest {}, key)).await.unwrap();
    assert_eq!(summary.into_inner().total, 100);
    // A machine that is busy may have measured a lag in between.
    assert!(setup.reads().await[0] - primary < 3.0 || setup.metric("dnc_replica_lag_seconds").await > 4.0);

    // A new entry is found at the latest when the replica may not be asked any more.
    setup.on_standby("SELECT pg_wal_replay_pause()").await;
    setup.import(100..101).await;
    let added = std::time::Instant::now();
    until("the new entry is found", || setup.is_suppressed(100)).await;
    // What the bound promises, with room for a busy machine, on which a call takes longer.
    assert!(added.elapsed() < Duration::from_secs(20), "{:?}", added.elapsed());
    assert!(!setup.is_from_replica().await);
    assert!(setup.metric("dnc_replica_lag_seconds").await > 4.0);
    setup.on_standby("SELECT pg_wal_replay_resume()").await;
    until("checks are answered by the replica again", || setup.is_from_replica()).await;
    assert!(setup.is_suppressed(100).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_gone_or_promoted_is_not_asked() {
    let mut setup = Setup::start().await;
    setup.import(0..1).await;
    until("checks are answered by the replica", || setup.is_from_replica()).await;
    // It has a history of its own from here on.
    setup.on_standby("SELECT pg_promote(true, 30)").await;
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
    let mut setup = Setup::start().await;
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
    assert!(setup.is_suppressed(9).await);
}
