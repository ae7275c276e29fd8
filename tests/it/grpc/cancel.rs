//! Callers that leave during a call, at every point where the service waits. What they leave behind
//! must not affect other calls.

use std::time::Duration;

use dnc::{
    domain::{KeyOwner, Scope},
    gateway::Upstream,
    proto::{
        CheckEntriesRequest, DeleteEntriesRequest, ImportOptions, ListEntriesRequest, ListImportsRequest,
        dnc_service_client::DncServiceClient,
    },
};
use sqlx::Connection;
use time::OffsetDateTime;
use tokio::{task::JoinSet, time::timeout};
use tonic::Code;

use crate::{
    address_book::{numbered, request, with_options},
    harness::{Kind, OwnPostgres, TestServer, all_of, database, give_up_after_polls, make_all, until, with_key},
};

/// Database connections of the services under test. There are few, so that a damaged one is soon
/// used again.
const CONNECTIONS: usize = 8;
const FLAGS: [&str; 2] = ["--database-connections-max", "8"];

/// Asserts that every database connection of a service is in order: no transaction is open, `now()`
/// moves on, and all connections can be used at once. `round` makes the addresses unique.
async fn require_clean(server: &TestServer, client: &DncServiceClient<Upstream>, expired_key: &str, round: usize) {
    let open = "SELECT count(*) FROM pg_stat_activity
                WHERE application_name = 'dnc' AND datname = current_database() AND state LIKE 'idle in transaction%'";
    let mut connection = server.connection().await;
    let mut left = i64::MAX;
    for _ in 0..200 {
        left = sqlx::query_scalar(open).fetch_one(&mut connection).await.unwrap();
        if left == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(left, 0, "connections are idle in a transaction");
    // Many more calls at once than there are connections, so that each one is used.
    let mut refused = JoinSet::new();
    for _ in 0..8 * CONNECTIONS {
        let (mut client, key) = (client.clone(), expired_key.to_owned());
        refused.spawn(async move {
            client.check_entries(with_key(CheckEntriesRequest { emails: vec!["a@example.com".into()] }, &key)).await.map(drop)
        });
    }
    for outcome in all_of(refused).await {
        assert_eq!(outcome.unwrap_err().code(), Code::Unauthenticated, "the key has expired");
    }
    // Entries that are stored now get the current time. Each round stores new addresses.
    let before = OffsetDateTime::now_utc() - Duration::from_secs(5);
    let first = 1_000_000 + 1_000 * u32::try_from(round).unwrap();
    let mut imports = JoinSet::new();
    for number in 0..2 * CONNECTIONS as u32 {
        let (mut client, key) = (client.clone(), server.other_key.clone());
        imports.spawn(async move {
            let entries = numbered(first + 10 * number..first + 10 * (number + 1)).collect();
            client.import_entries(with_key(tokio_stream::iter([request(entries)]), &key)).await
        });
    }
    for answer in all_of(imports).await {
        assert_eq!(answer.unwrap().into_inner().imported, 10);
    }
    let stale = "SELECT count(*) FROM entries WHERE workspace_id = $1 AND address >= $2 AND created_at < $3";
    let stale: i64 = sqlx::query_scalar(stale)
        .bind(server.other_workspace.0)
        .bind(format!("user{first:07}"))
        .bind(before)
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert_eq!(stale, 0, "entries got a time before they were sent");
    // Several calls of every kind succeed at once.
    for outcome in all_of(make_all(client, &server.key, 10_000 * (round + 1)..10_000 * (round + 1) + 3)).await {
        outcome.require(Code::Ok);
    }
    // A claim of an idempotency key is released when its caller is gone, before its lease ends.
    until("no idempotency key stays claimed", || async {
        let claimed = "SELECT count(*) FROM import_requests WHERE finished_at IS NULL";
        sqlx::query_scalar::<_, i64>(claimed).fetch_one(&mut server.connection().await).await.unwrap() == 0
    })
    .await;
    // The maintained count is that of the rows.
    let listed = client.clone().list_entries(with_key(ListEntriesRequest::default(), &server.key)).await.unwrap();
    assert_eq!(listed.into_inner().total_size, server.count().await);
    connection.close().await.unwrap();
}

/// Issues a key that has expired when this returns.
async fn expired_key(server: &TestServer) -> String {
    let owner = KeyOwner::Workspace(server.workspace);
    let key = server.store.issue_key(owner, Scope::Write, "", Some(Duration::from_millis(1))).await.unwrap().1.reveal().to_owned();
    tokio::time::sleep(Duration::from_millis(10)).await;
    key
}

/// Opens the database connections. Opening one takes many more polls than using it, so a caller
/// that leaves meanwhile would not reach the rest.
async fn open_connections(client: &DncServiceClient<Upstream>, key: &str) {
    all_of(make_all(client, key, 100..102)).await;
}

/// Asserts that no connection was used again while a transaction was open on it.
fn require_quiet_log(postgres: &OwnPostgres) {
    let log = postgres.log();
    let damaged: Vec<_> =
        log.lines().filter(|line| line.contains("transaction in progress") || line.contains("transaction is aborted")).collect();
    assert!(damaged.is_empty(), "{} times, such as {}", damaged.len(), damaged[0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_may_be_dropped_at_every_point() {
    let postgres = OwnPostgres::start().await;
    let server = TestServer::start_with(&[], &postgres.url).await;
    let client = server.in_process(&FLAGS);
    let expired = expired_key(&server).await;
    open_connections(&client, &server.key).await;
    let mut kinds = JoinSet::new();
    for kind in Kind::ALL {
        let (client, key) = (client.clone(), server.key.clone());
        kinds.spawn(async move {
            let is_large = matches!(kind, Kind::ImportManyBatches | Kind::ImportManyBatchesWithRequestId | Kind::DryRun);
            let (mut polls, mut finished) = (1, 0);
            for number in 0.. {
                let outcome = give_up_after_polls(polls, kind.make(client.clone(), &key, number)).await;
                finished += usize::from(outcome.is_some());
                if finished == 5 || polls > 200 {
                    break;
                }
                polls += if is_large { 1 + polls / 3 } else { 1 };
            }
            // The polls depend on where the service waits. So calls are also dropped after various
            // times.
            let (times, step) = if is_large { (10, Duration::from_millis(40)) } else { (100, Duration::from_micros(100)) };
            for number in 0..times {
                let _ = timeout(number * step, kind.make(client.clone(), &key, 1_000 + number as usize)).await;
            }
        });
    }
    all_of(kinds).await;
    require_clean(&server, &client, &expired, 0).await;
    require_quiet_log(&postgres);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_deletions_may_be_dropped() {
    let postgres = OwnPostgres::start().await;
    let server = TestServer::start_with(&[], &postgres.url).await;
    let client = server.in_process(&FLAGS);
    let expired = expired_key(&server).await;
    open_connections(&client, &server.key).await;
    let mut callers = JoinSet::new();
    for caller in 0..CONNECTIONS {
        let (client, key) = (client.clone(), server.key.clone());
        callers.spawn(async move {
            for number in 0..400 {
                let mut client = client.clone();
                let emails = numbered(0..5).map(|entry| entry.email).collect();
                let call = client.delete_entries(with_key(DeleteEntriesRequest { emails, ..Default::default() }, &key));
                // A whole call takes about ten polls. Every 20th call completes, so that
                // connections stay open.
                give_up_after_polls(if number % 20 == 0 { usize::MAX } else { 1 + (caller + number) % 12 }, call).await;
            }
        });
    }
    all_of(callers).await;
    require_clean(&server, &client, &expired, 0).await;
    require_quiet_log(&postgres);
}

#[tokio::test]
async fn checks_that_are_dropped_while_they_wait_block_no_others() {
    let server = TestServer::start_with(&FLAGS, &database().await).await;
    let client = server.upstream();
    let check = |count: u32, patience: Duration| {
        let (mut client, key) = (client.clone(), server.key.clone());
        async move {
            let emails = numbered(0..count).map(|entry| entry.email).collect();
            timeout(patience, client.check_entries(with_key(CheckEntriesRequest { emails }, &key))).await
        }
    };
    for count in [1, 300] {
        for _ in 0..3 {
            // Reads are locked for a while, so all checks wait, most of them before they reach the
            // database.
            let mut blocker = server.connection().await;
            let mut lock = blocker.begin().await.unwrap();
            sqlx::query("LOCK TABLE entries IN ACCESS EXCLUSIVE MODE").execute(&mut *lock).await.unwrap();
            let mut staying = JoinSet::new();
            let mut leaving = JoinSet::new();
            for number in 0..24 {
                if number % 2 == 0 {
                    leaving.spawn(check(count, Duration::from_millis(100 + 10 * number)));
                } else {
                    staying.spawn(check(count, Duration::from_secs(30)));
                }
            }
            all_of(leaving).await;
            lock.rollback().await.unwrap();
            for answer in all_of(staying).await {
                answer.expect("answered").unwrap();
            }
            let mut later = JoinSet::new();
            for _ in 0..24 {
                later.spawn(check(count, Duration::from_secs(30)));
            }
            for answer in all_of(later).await {
                answer.expect("a later one is answered").unwrap();
            }
        }
    }
    until("no statement is left behind", || async {
        let running = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'dnc' AND datname = current_database() AND state <> 'idle'";
        sqlx::query_scalar::<_, i64>(running).fetch_one(&mut server.connection().await).await.unwrap() == 0
    })
    .await;
}

#[tokio::test]
async fn a_dry_run_that_is_dropped_during_a_batch_leaves_no_addresses() {
    let server = TestServer::start().await;
    let client = server.in_process(&FLAGS);
    let mut blocker = server.connection().await;
    let mut lock = blocker.begin().await.unwrap();
    sqlx::query("LOCK TABLE entries IN ACCESS EXCLUSIVE MODE").execute(&mut *lock).await.unwrap();
    // More than a batch, so that the first one is recorded.
    let options = ImportOptions { validate_only: true, ..ImportOptions::default() };
    let call = with_key(tokio_stream::iter([with_options(numbered(0..10_001).collect(), options)]), &server.key);
    let mut importer = client.clone();
    let running = tokio::spawn(async move { importer.import_entries(call).await });
    let waiting = "SELECT pid, xact_start FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let mut connection = server.connection().await;
    let batch: (i32, OffsetDateTime) = loop {
        match sqlx::query_as(waiting).fetch_optional(&mut connection).await.unwrap() {
            Some(batch) => break batch,
            None => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    running.abort();
    assert!(running.await.unwrap_err().is_cancelled());
    // In this time a deletion that does not wait for the batch would end.
    for _ in 0..5 {
        client.clone().list_imports(with_key(ListImportsRequest::default(), &server.key)).await.unwrap();
    }
    lock.rollback().await.unwrap();
    until("the batch is stored", || async {
        let stored = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1 AND xact_start = $2)";
        sqlx::query_scalar(stored).bind(batch.0).bind(batch.1).fetch_one(&mut server.connection().await).await.unwrap()
    })
    .await;
    until("its addresses are deleted", || async {
        let is_empty = "SELECT NOT EXISTS (SELECT FROM rehearsed)";
        sqlx::query_scalar(is_empty).fetch_one(&mut server.connection().await).await.unwrap()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_whose_release_fails_is_released_later() {
    let server = TestServer::start_with(&["--database-statement-timeout-secs", "1"], &database().await).await;
    let (send, importing) = server.begin_import(&server.key).await;
    let options = ImportOptions { request_id: "x".into(), ..ImportOptions::default() };
    send.send(with_options(numbered(0..1).collect(), options)).await.unwrap();
    let count = async |counted: &'static str| -> i64 {
        sqlx::query_scalar(counted).fetch_one(&mut server.connection().await).await.unwrap()
    };
    let claimed = "SELECT count(*) FROM import_requests";
    until("the key is claimed", async || count(claimed).await == 1).await;
    let mut connection = server.connection().await;
    let mut lock = connection.begin().await.unwrap();
    sqlx::raw_sql("LOCK TABLE import_requests IN SHARE MODE").execute(&mut *lock).await.unwrap();
    importing.abort();
    let waiting = "SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE 'DELETE FROM import_requests%'";
    until("the release waits", async || count(waiting).await == 1).await;
    until("it is given up", async || count(waiting).await == 0).await;
    lock.rollback().await.unwrap();
    until("the key is released", async || count(claimed).await == 0).await;
}
