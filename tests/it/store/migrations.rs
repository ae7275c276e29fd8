//! Migrations of a database that already has rows.

use sqlx::{Connection, PgConnection};

use crate::harness::bare_database;

#[tokio::test]
async fn the_log_is_migrated_to_one_row_for_each_import() {
    let mut connection = PgConnection::connect(&bare_database().await).await.unwrap();
    for migration in [
        include_str!("../../../migrations/0001_tenants.sql"),
        include_str!("../../../migrations/0002_entries.sql"),
        include_str!("../../../migrations/0003_imports.sql"),
        include_str!("../../../migrations/0004_whole_list.sql"),
        include_str!("../../../migrations/0005_counts_and_request_ends.sql"),
    ] {
        sqlx::raw_sql(migration).execute(&mut connection).await.unwrap();
    }
    let before = "INSERT INTO imports (workspace_id, id, key_id, finished_at, imported, skipped, failed) VALUES
            (1, '00000000-0000-0000-0000-000000000001', 7, now(), 10, 2, 1),
            (1, '00000000-0000-0000-0000-000000000002', 7, NULL, 5, 0, 0);
        INSERT INTO import_batches (workspace_id, import_id, batch, imported, skipped, failed) VALUES
            (1, '00000000-0000-0000-0000-000000000002', 1, 20, 3, 0),
            (1, '00000000-0000-0000-0000-000000000002', 2, 0, 4, 2),
            (2, '00000000-0000-0000-0000-000000000003', 1, 8, 0, 0);
        INSERT INTO import_requests (workspace_id, request_id, import_id, lease_until, finished_at)
            VALUES (1, 'known', '00000000-0000-0000-0000-000000000001', now(), now());";
    sqlx::raw_sql(before).execute(&mut connection).await.unwrap();
    let migration = include_str!("../../../migrations/0006_one_row_an_import.sql");
    sqlx::raw_sql(migration).execute(&mut connection).await.unwrap();
    let log: Vec<(i64, i64, i64, i64, i64, bool)> =
        sqlx::query_as("SELECT workspace_id, key_id, imported, skipped, failed, finished_at IS NOT NULL FROM imports ORDER BY id")
            .fetch_all(&mut connection)
            .await
            .unwrap();
    assert_eq!(log, [(1, 7, 10, 2, 1, true), (1, 7, 25, 7, 2, false), (2, 0, 8, 0, 0, false)]);
    let requests: Vec<(String, Option<Vec<u8>>)> =
        sqlx::query_as("SELECT request_id, fingerprint FROM import_requests").fetch_all(&mut connection).await.unwrap();
    assert_eq!(requests, [("known".to_owned(), None)]);
}

#[tokio::test]
async fn entries_that_exist_are_counted_by_type_and_reason() {
    let mut connection = PgConnection::connect(&bare_database().await).await.unwrap();
    sqlx::raw_sql(include_str!("../../../migrations/0002_entries.sql")).execute(&mut connection).await.unwrap();
    let before = "INSERT INTO entries (workspace_id, added_by, address, reason) VALUES
        (1, 1, 'a@example.com', 'bounce'), (1, 1, 'b@example.com', 'bounce'), (1, 1, 'c@example.com', 'Bounce'),
        (1, 1, 'example.org', 'bounce'), (2, 1, 'a@example.com', 'bounce')";
    sqlx::raw_sql(before).execute(&mut connection).await.unwrap();
    sqlx::raw_sql(include_str!("../../../migrations/0009_reason_counts.sql")).execute(&mut connection).await.unwrap();
    let counts = "SELECT workspace_id, reason, is_domain, entries FROM reason_counts ORDER BY 1, 2, 3";
    let counts: Vec<(i64, String, bool, i64)> = sqlx::query_as(counts).fetch_all(&mut connection).await.unwrap();
    let expected = [(1, "Bounce", false, 1), (1, "bounce", false, 2), (1, "bounce", true, 1), (2, "bounce", false, 1)];
    assert_eq!(counts, expected.map(|(workspace, reason, is_domain, entries)| (workspace, reason.to_owned(), is_domain, entries)));
}
