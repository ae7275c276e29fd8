//! The logs of imports and deletions, and expired idempotency keys, are deleted by the servers
//! themselves.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection, PgConnection};
use time::OffsetDateTime;
use uuid::{NoContext, Timestamp, Uuid};

use crate::{
    address_book::{numbered, with_options},
    harness::{Flow, Proxy, TestServer, database, until},
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Writes `count` imports, deletions, idempotency keys and recorded addresses of dry runs of this
/// age.
async fn write(connection: &mut PgConnection, workspace: i64, age: Duration, count: usize) {
    let at = OffsetDateTime::now_utc() - age;
    let ids: Vec<Uuid> =
        (0..count).map(|_| Uuid::new_v7(Timestamp::from_unix(NoContext, at.unix_timestamp().unsigned_abs(), 0))).collect();
    for statement in [
        "INSERT INTO imports (workspace_id, id, key_id, started_at, finished_at, imported, skipped, failed)
         SELECT $1, id, 1, $2, $2, 1, 0, 0 FROM UNNEST($3::uuid[]) AS new (id)",
        "INSERT INTO deletions (workspace_id, id, key_id, started_at, deleted, mode, named)
         SELECT $1, id, 1, $2, 1, 'emails', 1 FROM UNNEST($3::uuid[]) AS new (id)",
        "INSERT INTO import_requests (workspace_id, request_id, import_id, started_at, lease_until, finished_at)
         SELECT $1, id::text, id, $2, $2, $2 FROM UNNEST($3::uuid[]) AS new (id)",
        "INSERT INTO rehearsed (workspace_id, rehearsal, address)
         SELECT $1, id, 'a@example.com' FROM UNNEST($3::uuid[]) AS new (id) WHERE $2 IS NOT NULL",
    ] {
        sqlx::query(statement).bind(workspace).bind(at).bind(&ids).execute(&mut *connection).await.unwrap();
    }
}

/// The rows of imports, deletions, idempotency keys and dry runs of a workspace.
async fn counts(connection: &mut PgConnection, workspace: i64) -> [i64; 4] {
    let mut found = [0; 4];
    for (table, count) in ["imports", "deletions", "import_requests", "rehearsed"].into_iter().zip(&mut found) {
        let statement = format!("SELECT count(*) FROM {table} WHERE workspace_id = $1");
        *count = sqlx::query_scalar(AssertSqlSafe(statement)).bind(workspace).fetch_one(&mut *connection).await.unwrap();
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_delete_what_is_past_its_retention_and_nothing_else() {
    let url = database().await;
    let first = TestServer::start_with(&[], &url).await;
    let mut connection = first.connection().await;
    let (ours, theirs) = (first.workspace.0, first.other_workspace.0);
    write(&mut connection, ours, 401 * DAY, 2_500).await;
    write(&mut connection, ours, 399 * DAY, 20).await;
    write(&mut connection, theirs, 401 * DAY, 5).await;
    write(&mut connection, theirs, DAY / 2, 3).await;
    let options = |request_id: &str| dnc::proto::ImportOptions { request_id: request_id.into(), ..Default::default() };
    first.import(vec![with_options(numbered(0..5).collect(), options("again"))]).await.unwrap();
    // Two at once, and the server itself: all come to an end.
    let (one, other) = tokio::join!(first.store.clear_logs(400 * DAY), first.store.clear_logs(400 * DAY));
    assert!(one.unwrap() + other.unwrap() > 0);
    until("all is deleted", async || {
        counts(&mut first.connection().await, ours).await == [21, 20, 1, 0]
            && counts(&mut first.connection().await, theirs).await == [3; 4]
    })
    .await;
    // The answer of an import is still known, with the shortest retention, too.
    first.store.clear_logs(DAY).await.unwrap();
    assert_eq!(counts(&mut connection, ours).await, [1, 0, 1, 0]);
    let again = first.import(vec![with_options(numbered(0..5).collect(), options("again"))]).await.unwrap();
    assert_eq!((again.imported, again.skipped), (5, 0));
    assert_eq!(first.count().await, 5);
}

#[tokio::test]
async fn what_is_past_its_retention_is_deleted_by_workspace_where_citus_is_installed() {
    // A server that runs would delete rows as well.
    let server = TestServer::start().await;
    let (url, ours, theirs) = (server.database_url.clone(), server.workspace.0, server.other_workspace.0);
    server.begin_stop();
    server.ended().await;
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let rename = "SET allow_system_table_mods = on; UPDATE pg_extension SET extname = 'citus' WHERE extname = 'plpgsql'";
    sqlx::raw_sql(rename).execute(&mut connection).await.unwrap();
    write(&mut connection, ours, 401 * DAY, 30).await;
    write(&mut connection, ours, 399 * DAY, 20).await;
    write(&mut connection, theirs, 401 * DAY, 5).await;
    write(&mut connection, theirs, DAY / 2, 3).await;
    let store = dnc::server::store(&url, &crate::harness::options(&[]).database).unwrap();
    assert_eq!(store.clear_logs(400 * DAY).await.unwrap(), 2 * (30 + 5) + 2 * (50 + 5));
    assert_eq!(counts(&mut connection, ours).await, [20, 20, 0, 0]);
    assert_eq!(counts(&mut connection, theirs).await, [3; 4]);
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_clears_the_logs_without_being_asked_and_stops_in_order() {
    let url = database().await;
    let first = TestServer::start_with(&[], &url).await;
    let mut connection = first.connection().await;
    write(&mut connection, first.workspace.0, 3 * DAY, 1_500).await;
    let proxy = Proxy::to(&url).await;
    let second = TestServer::start_through(&["--log-retention", "2d"], &url, &proxy.url(&url)).await;
    until("the logs are cleared", async || counts(&mut first.connection().await, first.workspace.0).await == [0; 4]).await;
    // A silent database does not hold up the end of a server that clears.
    proxy.all(Flow::Stall);
    let third = TestServer::start_through(&[], &url, &proxy.url(&url)).await;
    for server in [second, third] {
        server.begin_stop();
        tokio::time::timeout(Duration::from_secs(30), server.ended()).await.expect("the server ends");
    }
}
