//! The logs of imports and deletions, and expired idempotency keys, are deleted by the servers
//! themselves.

use std::time::Duration;

use dnc::store::Store;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use time::OffsetDateTime;
use uuid::{NoContext, Timestamp, Uuid};

use crate::{
    address_book::{numbered, with_options},
    harness::{Flow, PASS_FOR_CITUS, Proxy, TestServer, database, options, until},
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

/// The URL of a database without a server, which would delete rows as well, and the first of its
/// two workspaces. It passes for one with Citus if `has_citus`.
async fn without_server(has_citus: bool) -> (String, i64) {
    let server = TestServer::start().await;
    let (url, workspace) = (server.database_url.clone(), server.workspace.0);
    let mut connection = server.connection().await;
    server.begin_stop();
    server.ended().await;
    if has_citus {
        sqlx::raw_sql(PASS_FOR_CITUS).execute(&mut connection).await.unwrap();
    }
    connection.close().await.unwrap();
    (url, workspace)
}

fn store(url: &str) -> Store {
    dnc::server::store(url, &options(&[]).database).unwrap()
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
    let with_id = |request_id: &str| dnc::proto::ImportOptions { request_id: request_id.into(), ..Default::default() };
    first.import(vec![with_options(numbered(0..5).collect(), with_id("again"))]).await.unwrap();
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
    let again = first.import(vec![with_options(numbered(0..5).collect(), with_id("again"))]).await.unwrap();
    assert_eq!((again.imported, again.skipped), (5, 0));
    assert_eq!(first.count().await, 5);
}

#[tokio::test]
async fn what_is_past_its_retention_is_deleted_by_workspace_where_citus_is_installed() {
    let (url, ours) = without_server(true).await;
    let store = store(&url);
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let theirs = ours + 1;
    write(&mut connection, ours, 401 * DAY, 30).await;
    write(&mut connection, ours, 399 * DAY, 20).await;
    write(&mut connection, theirs, 401 * DAY, 5).await;
    write(&mut connection, theirs, DAY / 2, 3).await;
    assert_eq!(store.clear_logs(400 * DAY).await.unwrap(), 2 * (30 + 5) + 2 * (50 + 5));
    assert_eq!(counts(&mut connection, ours).await, [20, 20, 0, 0]);
    assert_eq!(counts(&mut connection, theirs).await, [3; 4]);
    store.close().await;
}

/// The columns `started_at`, `finished_at` and `lease_until` of an import and its idempotency key
/// as ages in hours, and whether the import and the key are kept for 100 hours and for a day.
type Ages = (i64, Option<i64>, i64, bool, bool);

#[tokio::test]
async fn an_import_is_remembered_from_its_end_and_one_without_an_end_from_its_last_sign() {
    const IMPORTS: [Ages; 6] = [
        (200, Some(110), 110, false, false),
        (200, Some(90), 110, true, false),
        (110, None, 30, false, false),
        (90, None, 20, true, true),
        (110, Some(20), 110, true, true),
        (110, Some(30), 20, true, false),
    ];
    for has_citus in [false, true] {
        let (url, ours) = without_server(has_citus).await;
        let store = store(&url);
        let mut connection = PgConnection::connect(&url).await.unwrap();
        let now = OffsetDateTime::now_utc();
        let at = |hours: i64| now - time::Duration::hours(hours);
        let id = |hours: i64| Uuid::new_v7(Timestamp::from_unix(NoContext, at(hours).unix_timestamp().unsigned_abs(), 0));
        for (number, (started, finished, lease, ..)) in IMPORTS.into_iter().enumerate() {
            for statement in [
                "INSERT INTO imports (workspace_id, id, key_id, started_at, finished_at, imported, skipped, failed)
                 SELECT $1, $2, $3, $4, $5, 1, 0, 0 WHERE $6 IS NOT NULL",
                "INSERT INTO import_requests (workspace_id, import_id, request_id, started_at, finished_at, lease_until)
                 VALUES ($1, $2, $3::text, $4, $5, $6)",
            ] {
                let query = sqlx::query(statement).bind(ours).bind(id(started)).bind(number as i64).bind(at(started));
                query.bind(finished.map(at)).bind(at(lease)).execute(&mut connection).await.unwrap();
            }
        }
        // The clock of the database has the last word about a deletion, and its id about what is
        // looked at.
        for (of_id, started) in [(110, 110), (110, 90), (90, 110)] {
            let deletion =
                "INSERT INTO deletions (workspace_id, id, key_id, started_at, deleted, mode) VALUES ($1, $2, 1, $3, 1, 'all')";
            sqlx::query(deletion).bind(ours).bind(id(of_id)).bind(at(started)).execute(&mut connection).await.unwrap();
        }
        store.clear_logs(Duration::from_secs(100 * 60 * 60)).await.unwrap();
        let kept: Vec<i64> = sqlx::query_scalar("SELECT key_id FROM imports ORDER BY 1").fetch_all(&mut connection).await.unwrap();
        let kept_keys: Vec<i64> = sqlx::query_scalar("SELECT request_id::bigint FROM import_requests ORDER BY 1")
            .fetch_all(&mut connection)
            .await
            .unwrap();
        let expected = |is_kept: fn(&Ages) -> bool| -> Vec<i64> {
            (0..).zip(&IMPORTS).filter(|(_, ages)| is_kept(ages)).map(|(number, _)| number).collect()
        };
        assert_eq!(kept, expected(|ages| ages.3), "Citus: {has_citus}");
        assert_eq!(kept_keys, expected(|ages| ages.4), "Citus: {has_citus}");
        assert_eq!(counts(&mut connection, ours).await[1], 2, "Citus: {has_citus}");
        store.close().await;
    }
}

#[tokio::test]
async fn each_workspace_is_cleared_by_itself_however_many_there_are() {
    for has_citus in [false, true] {
        let (url, first) = without_server(has_citus).await;
        let store = store(&url);
        let mut connection = PgConnection::connect(&url).await.unwrap();
        let many = "INSERT INTO workspaces (name) SELECT n::text FROM generate_series(1, 1200) n";
        sqlx::query(many).execute(&mut connection).await.unwrap();
        let last: i64 = sqlx::query_scalar("SELECT max(id) FROM workspaces").fetch_one(&mut connection).await.unwrap();
        // The first one has more than a statement deletes. No statement is about the last one.
        for (workspace, count) in [(first, 1_500), (first + 1, 3), (first + 600, 2), (last, 2), (last + 1, 2)] {
            write(&mut connection, workspace, 3 * DAY, count).await;
        }
        assert_eq!(store.clear_logs(2 * DAY).await.unwrap(), 4 * (1_500 + 3 + 2 + 2), "Citus: {has_citus}");
        assert_eq!(counts(&mut connection, last + 1).await, [2; 4], "Citus: {has_citus}");
        store.close().await;
    }
}

#[tokio::test]
async fn a_row_that_another_server_deletes_is_skipped() {
    let (url, ours) = without_server(false).await;
    let store = store(&url);
    let mut connection = PgConnection::connect(&url).await.unwrap();
    write(&mut connection, ours, 3 * DAY, 3).await;
    let mut other = PgConnection::connect(&url).await.unwrap();
    sqlx::raw_sql("BEGIN").execute(&mut other).await.unwrap();
    for table in ["imports", "deletions", "import_requests", "rehearsed"] {
        let lock = format!("SELECT FROM {table} LIMIT 1 FOR UPDATE");
        sqlx::raw_sql(AssertSqlSafe(lock)).execute(&mut other).await.unwrap();
    }
    let clearing = tokio::time::timeout(Duration::from_secs(30), store.clear_logs(2 * DAY)).await;
    assert_eq!(clearing.expect("it does not wait").unwrap(), 4 * 2);
    sqlx::raw_sql("ROLLBACK").execute(&mut other).await.unwrap();
    assert_eq!(store.clear_logs(2 * DAY).await.unwrap(), 4);
    store.close().await;
}

#[tokio::test]
async fn what_is_not_past_its_retention_is_not_read() {
    const RECENT: usize = 3_000;
    for has_citus in [false, true] {
        let (url, ours) = without_server(has_citus).await;
        let mut connection = PgConnection::connect(&url).await.unwrap();
        write(&mut connection, ours, DAY / 2, RECENT).await;
        write(&mut connection, ours, 3 * DAY, 10).await;
        connection.close().await.unwrap();
        let read = async || -> i64 {
            until("every other session has ended", async || {
                let others = "SELECT count(*) FROM pg_stat_activity
                     WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()";
                let mut connection = PgConnection::connect(&url).await.unwrap();
                sqlx::query_scalar::<_, i64>(others).fetch_one(&mut connection).await.unwrap() == 0
            })
            .await;
            let mut connection = PgConnection::connect(&url).await.unwrap();
            let read = "SELECT sum(seq_tup_read + idx_tup_fetch)::bigint FROM pg_stat_user_tables
                WHERE relname IN ('imports', 'deletions', 'import_requests', 'rehearsed')";
            sqlx::query_scalar(read).fetch_one(&mut connection).await.unwrap()
        };
        let before = read().await;
        let store = store(&url);
        assert_eq!(store.clear_logs(2 * DAY).await.unwrap(), 4 * 10);
        store.close().await;
        drop(store);
        let read = read().await - before;
        assert!(read < RECENT as i64 / 2, "Citus: {has_citus}: {read} rows");
    }
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
