//! An acknowledged entry stays stored, whatever is killed.

use dnc::{
    postgres::{self, PrivatePostgres},
    proto::{DeleteEntriesRequest, ImportOptions},
};
use sqlx::PgConnection;
use tonic::Code;
use tonic_types::StatusExt;

use crate::{
    address_book::{numbered, request, with_options},
    harness::{Flow, Proxy, TestServer, until, with_key},
};

/// A private PostgreSQL with a migrated database, which a test may damage.
async fn own_database(dir: &std::path::Path) -> (PrivatePostgres, String) {
    let options =
        postgres::Options { dir: dir.join("postgres"), is_ephemeral: false, connections_max: 50, shared_buffers_mib: 256 };
    let postgres = PrivatePostgres::start(options).await.unwrap();
    postgres.create_database("dnc", "template0").await.unwrap();
    let database_url = postgres.url("dnc");
    let migrator = dnc::server::store(&database_url, &crate::harness::options(&[]).database).unwrap();
    migrator.migrate().await.unwrap();
    migrator.close().await;
    (postgres, database_url)
}

/// From now on a commit waits for a standby that does not exist, after it has taken effect here.
async fn hold_commits(connection: &mut PgConnection) {
    sqlx::raw_sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'").execute(&mut *connection).await.unwrap();
    sqlx::raw_sql("SELECT pg_reload_conf()").execute(&mut *connection).await.unwrap();
    let shown = async |connection: &mut PgConnection| -> String {
        sqlx::query_scalar("SHOW synchronous_standby_names").fetch_one(connection).await.unwrap()
    };
    while shown(connection).await.is_empty() {
        tokio::task::yield_now().await;
    }
}

async fn release_commits(connection: &mut PgConnection) {
    sqlx::raw_sql("ALTER SYSTEM RESET synchronous_standby_names").execute(&mut *connection).await.unwrap();
    sqlx::raw_sql("SELECT pg_reload_conf()").execute(connection).await.unwrap();
}

#[tokio::test]
async fn a_commit_whose_answer_was_lost_is_counted_by_its_outcome() {
    let dir = tempfile::tempdir().unwrap();
    let (_postgres, database_url) = own_database(dir.path()).await;
    let server = TestServer::start_with(&[], &database_url).await;
    let mut connection = server.connection().await;
    let import_without_answer = async |connection: &mut PgConnection, server: &TestServer, entries: std::ops::Range<u32>| {
        hold_commits(connection).await;
        let mut client = server.client().await;
        let call = with_key(tokio_stream::iter([request(numbered(entries).collect())]), &server.key);
        let running = tokio::spawn(async move { client.import_entries(call).await });
        until("the commit waits, and its connection is closed", || async {
            let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
            sqlx::query(end).execute(&mut server.connection().await).await.unwrap().rows_affected() == 1
        })
        .await;
        release_commits(connection).await;
        running.await.unwrap()
    };
    let answer = import_without_answer(&mut connection, &server, 0..5).await.unwrap().into_inner();
    assert_eq!((answer.imported, answer.skipped), (5, 0));
    assert_eq!(server.count().await, 5);

    // Where Citus is installed nobody knows the outcome of one server's transaction.
    let install = "SET allow_system_table_mods = on;
        INSERT INTO pg_extension (oid, extname, extowner, extnamespace, extrelocatable, extversion)
        VALUES (99999, 'citus', 10, 11, false, '0')";
    sqlx::raw_sql(install).execute(&mut connection).await.unwrap();
    let server = TestServer::start_with(&[], &database_url).await;
    let status = import_without_answer(&mut connection, &server, 5..10).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert_eq!(server.count().await, 5);
}

#[tokio::test]
async fn a_lost_commit_is_looked_up_until_its_outcome_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let (_postgres, database_url) = own_database(dir.path()).await;
    let proxy = Proxy::to(&database_url).await;
    let server = TestServer::start_through(&[], &database_url, &proxy.url(&database_url)).await;
    let mut connection = server.connection().await;

    // Rolled back: the first transaction to commit ends its own backend instead.
    let end_once = "CREATE SEQUENCE ends;
        CREATE FUNCTION end_once() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF nextval('ends') = 1 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;
                RETURN NULL;
            END
        $$;
        CREATE CONSTRAINT TRIGGER end_once AFTER INSERT ON entries DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION end_once()";
    sqlx::raw_sql(end_once).execute(&mut connection).await.unwrap();
    let answer = server.import(vec![request(numbered(0..5).collect())]).await.unwrap();
    assert_eq!((answer.imported, answer.skipped), (5, 0));
    assert_eq!(server.count().await, 5);

    // The same for the transaction that claims an idempotency key.
    let end_a_claim = "SELECT setval('ends', 1, false);
        DROP TRIGGER end_once ON entries;
        CREATE CONSTRAINT TRIGGER end_once AFTER INSERT ON import_requests DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION end_once()";
    sqlx::raw_sql(end_a_claim).execute(&mut connection).await.unwrap();
    let options = ImportOptions { request_id: "once".to_owned(), ..ImportOptions::default() };
    let answer = server.import(vec![with_options(numbered(15..20).collect(), options)]).await.unwrap();
    assert_eq!((answer.imported, answer.skipped), (5, 0));

    let import = |entries: std::ops::Range<u32>| {
        let call = with_key(tokio_stream::iter([request(numbered(entries).collect())]), &server.key);
        let mut client = server.upstream();
        tokio::spawn(async move { client.import_entries(call).await })
    };
    let is_there = async |activity: &str| -> bool {
        let sql = format!("SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND {activity})");
        sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&mut server.connection().await).await.unwrap()
    };

    // Still running when it is looked up for the first time.
    hold_commits(&mut connection).await;
    let running = import(5..10);
    until("the commit waits", || is_there("wait_event = 'SyncRep'")).await;
    proxy.existing(Flow::Cut);
    until("its outcome is looked up", || is_there("query LIKE 'SELECT pg_xact_status(%'")).await;
    release_commits(&mut connection).await;
    let answer = running.await.unwrap().unwrap().into_inner();
    assert_eq!((answer.imported, answer.skipped), (5, 0));

    // Never known.
    hold_commits(&mut connection).await;
    let running = import(10..15);
    until("the commit waits", || is_there("wait_event = 'SyncRep'")).await;
    proxy.cut();
    let status = tokio::time::timeout(std::time::Duration::from_secs(60), running).await.unwrap().unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    proxy.mend();
    release_commits(&mut connection).await;
    until("it is stored", async || server.count().await == 20).await;
}

#[tokio::test]
async fn a_transaction_in_conflict_is_retried_within_limits() {
    let server = TestServer::start().await;
    let refuse = "CREATE SEQUENCE tries;
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF nextval('tries') <= TG_ARGV[0]::int THEN RAISE EXCEPTION 'not now' USING ERRCODE = TG_ARGV[1]; END IF;
                RETURN NULL;
            END
        $$;";
    let mut connection = server.connection().await;
    sqlx::raw_sql(refuse).execute(&mut connection).await.unwrap();
    let at_commit = "DEFERRABLE INITIALLY DEFERRED";
    let (mut stored, mut deleted) = (0, 0);
    for (event, when, tries, code, succeeds) in [
        ("INSERT", "", 2, "40001", true),
        ("INSERT", "", 2, "40P01", true),
        ("INSERT", "", 1_000, "40001", false),
        ("INSERT", "", 1, "22000", false),
        ("DELETE", "", 2, "40001", true),
        ("DELETE", at_commit, 2, "40001", true),
        ("DELETE", "", 1, "22000", false),
    ] {
        let trigger = format!(
            "SELECT setval('tries', 1, false); DROP TRIGGER IF EXISTS refuse ON entries;
             CREATE CONSTRAINT TRIGGER refuse AFTER {event} ON entries {when} FOR EACH ROW EXECUTE FUNCTION refuse({tries}, '{code}')"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(trigger)).execute(&mut connection).await.unwrap();
        if event == "INSERT" {
            let answer = server.import(vec![request(numbered(stored..stored + 5).collect())]).await;
            assert_eq!(answer.is_ok_and(|answer| answer.imported == 5), succeeds, "{code}");
            stored += if succeeds { 5 } else { 0 };
        } else {
            let emails = numbered(deleted..deleted + 3).map(|entry| entry.email).collect();
            let call = with_key(DeleteEntriesRequest { emails, ..DeleteEntriesRequest::default() }, &server.key);
            let answer = server.client().await.delete_entries(call).await;
            assert_eq!(answer.is_ok_and(|answer| answer.into_inner().deleted == 3), succeeds, "{when} {code}");
            deleted += if succeeds { 3 } else { 0 };
        }
        assert_eq!(server.count().await, i64::from(stored - deleted), "{event} {when} {code}");
    }
}

#[tokio::test]
async fn a_database_killed_in_the_middle_of_a_stream_loses_nothing_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let (mut postgres, database_url) = own_database(dir.path()).await;
    let server = TestServer::start_with(&[], &database_url).await;

    let (send, running) = server.begin_import(&server.key).await;
    let all: Vec<_> = numbered(0..200_000).collect();
    let mut chunks = all.chunks(5_000);
    for chunk in chunks.by_ref().take(13) {
        send.send(request(chunk.to_vec())).await.unwrap();
    }
    until("three batches are stored", || async { server.count().await == 60_000 }).await;
    assert!(std::process::Command::new("kill").args(["-9", &postgres.pid().unwrap().to_string()]).status().unwrap().success());
    postgres.ended().await;
    for chunk in chunks {
        if send.send(request(chunk.to_vec())).await.is_err() {
            break;
        }
    }
    drop(send);
    let status = running.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    let info = status.get_details_error_info().unwrap();
    assert_eq!((info.reason.as_str(), info.metadata["imported"].as_str()), ("UNAVAILABLE", "60000"));
    assert!(status.get_details_retry_info().is_some());

    postgres.restart().await.unwrap();
    assert!(server.count().await >= 60_000, "what was acknowledged is there");
    let requests = || all.chunks(5_000).map(|chunk| request(chunk.to_vec())).collect::<Vec<_>>();
    let answer = server.import(requests()).await.expect("the repeat succeeds");
    assert_eq!(answer.imported + answer.skipped, 200_000);
    assert!(answer.skipped >= 60_000);
    assert_eq!(server.count().await, 200_000);
}
