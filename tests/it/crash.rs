//! An acknowledged entry stays stored, whatever is killed.

use dnc::{
    postgres::{self, PrivatePostgres},
    proto::DeleteEntriesRequest,
};
use tonic::Code;
use tonic_types::StatusExt;

use crate::{
    address_book::{numbered, request},
    harness::{TestServer, until, with_key},
};

/// A private PostgreSQL with a migrated database, which a test may damage.
async fn own_database(dir: &std::path::Path) -> (PrivatePostgres, String) {
    let options = postgres::Options { dir: dir.join("postgres"), is_ephemeral: false, connections_max: 50 };
    let postgres = PrivatePostgres::start(options).await.unwrap();
    postgres.create_database("dnc", "template0").await.unwrap();
    let database_url = postgres.url("dnc");
    let migrator = dnc::server::store(&database_url, &crate::harness::options(&[]).database).unwrap();
    migrator.migrate().await.unwrap();
    migrator.close().await;
    (postgres, database_url)
}

#[tokio::test]
async fn a_commit_whose_answer_was_lost_is_counted_by_its_outcome() {
    let dir = tempfile::tempdir().unwrap();
    let (_postgres, database_url) = own_database(dir.path()).await;
    let server = TestServer::start_with(&[], &database_url).await;
    let mut connection = server.connection().await;
    // A commit now waits for a standby that does not exist, after it has taken effect here.
    sqlx::raw_sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'").execute(&mut connection).await.unwrap();
    sqlx::raw_sql("SELECT pg_reload_conf()").execute(&mut connection).await.unwrap();
    let shown = async |connection: &mut sqlx::PgConnection| -> String {
        sqlx::query_scalar("SHOW synchronous_standby_names").fetch_one(connection).await.unwrap()
    };
    while shown(&mut connection).await.is_empty() {
        tokio::task::yield_now().await;
    }
    let mut client = server.client().await;
    let call = with_key(tokio_stream::iter([request(numbered(0..5).collect())]), &server.key);
    let running = tokio::spawn(async move { client.import_entries(call).await });
    until("the commit waits, and its connection is closed", || async {
        let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        sqlx::query(end).execute(&mut server.connection().await).await.unwrap().rows_affected() == 1
    })
    .await;
    sqlx::raw_sql("ALTER SYSTEM RESET synchronous_standby_names").execute(&mut connection).await.unwrap();
    sqlx::raw_sql("SELECT pg_reload_conf()").execute(&mut connection).await.unwrap();
    let answer = running.await.unwrap().unwrap().into_inner();
    assert_eq!((answer.imported, answer.skipped), (5, 0));
    assert_eq!(server.count().await, 5);
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
    let mut number = 0;
    for (event, tries, code, stored) in [
        ("INSERT", 2, "40001", true),
        ("INSERT", 2, "40P01", true),
        ("INSERT", 1_000, "40001", false),
        ("INSERT", 1, "22000", false),
        ("DELETE", 2, "40001", true),
    ] {
        let trigger = format!(
            "SELECT setval('tries', 1, false); DROP TRIGGER IF EXISTS refuse ON entries;
             CREATE TRIGGER refuse AFTER {event} ON entries EXECUTE FUNCTION refuse({tries}, '{code}')"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(trigger)).execute(&mut connection).await.unwrap();
        if event == "INSERT" {
            let answer = server.import(vec![request(numbered(number..number + 5).collect())]).await;
            assert_eq!(answer.is_ok_and(|answer| answer.imported == 5), stored, "{code}");
            number += if stored { 5 } else { 0 };
            assert_eq!(server.count().await, i64::from(number), "{code}");
        } else {
            let emails = numbered(0..3).map(|entry| entry.email).collect();
            let call = with_key(DeleteEntriesRequest { emails, ..DeleteEntriesRequest::default() }, &server.key);
            assert_eq!(server.client().await.delete_entries(call).await.unwrap().into_inner().deleted, 3);
        }
    }
}

#[tokio::test]
async fn a_database_killed_in_the_middle_of_a_stream_loses_nothing_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let (mut postgres, database_url) = own_database(dir.path()).await;
    let server = TestServer::start_with(&[], &database_url).await;

    let (send, messages) = tokio::sync::mpsc::channel(1);
    let mut client = server.client().await;
    let call = with_key(tokio_stream::wrappers::ReceiverStream::new(messages), &server.key);
    let running = tokio::spawn(async move { client.import_entries(call).await });
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
