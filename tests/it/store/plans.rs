//! How many rows and blocks statements read. Whatever statistics PostgreSQL has about a table, a
//! named address costs one index look-up, and reading or deleting a whole list reads it once.
//!
//! PostgreSQL itself counts the rows and blocks, so a bad plan of any kind is noticed. A session
//! reports its counts when it ends, so every step runs a service of its own.

use dnc::{
    domain::{Batch, KeyId, WorkspaceId},
    proto::{
        CheckEntriesRequest, DeleteEntriesRequest, EntryFilter, EntryType, ExportEntriesRequest, ImportOptions,
        ListDeletionsRequest, ListEntriesRequest, ListEntriesResponse, ListImportsRequest, SummarizeEntriesRequest,
        dnc_service_client::DncServiceClient,
    },
    store::{ImportId, ImportIds},
};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use time::OffsetDateTime;
use tokio::sync::Mutex;
use tonic::transport::Channel;

use crate::{
    address_book::{numbered, request, with_options},
    harness::{TestServer, database, until, with_key},
};

/// Blocks that one look-up by key may read: the levels of the index, a block of the table, and the
/// same again to delete the row.
const BLOCKS_PER_LOOKUP: i64 = 12;

/// Blocks that PostgreSQL reads while it plans, and rows that do not depend on the calls.
const SLACK: i64 = 500;

/// After this many repetitions a session uses a cached generic plan for a statement.
const REPEATS: usize = 8;

#[derive(Clone, Copy, Debug)]
struct Reads {
    rows: i64,
    blocks: i64,
}

/// A migrated database without auto-analyze, and the keys of two workspaces.
struct Lists {
    url: String,
    ours: (WorkspaceId, String),
    theirs: (WorkspaceId, String),
}

impl Lists {
    async fn new() -> Self {
        let url = database().await;
        let server = TestServer::start_with(&[], &url).await;
        sqlx::query("ALTER TABLE entries SET (autovacuum_enabled = off)").execute(&mut server.connection().await).await.unwrap();
        let ours = (server.workspace, server.key.clone());
        let theirs = (server.other_workspace, server.other_key.clone());
        server.begin_stop();
        server.ended().await;
        Self { url, ours, theirs }
    }

    async fn run(&self, statement: impl Into<String>) {
        sqlx::raw_sql(AssertSqlSafe(statement.into())).execute(&mut PgConnection::connect(&self.url).await.unwrap()).await.unwrap();
    }

    async fn number(&self, query: &'static str) -> i64 {
        let connection = &mut PgConnection::connect(&self.url).await.unwrap();
        sqlx::query_scalar(query).fetch_one(connection).await.unwrap()
    }

    async fn now(&self) -> OffsetDateTime {
        let connection = &mut PgConnection::connect(&self.url).await.unwrap();
        sqlx::query_scalar("SELECT clock_timestamp()").fetch_one(connection).await.unwrap()
    }

    /// Inserts the addresses of [`numbered`] without the service.
    async fn fill(&self, workspace: WorkspaceId, numbers: std::ops::Range<u32>, step: u32) {
        self.run(format!(
            "INSERT INTO entries (workspace_id, added_by, address, reason)
             SELECT {}, 1, 'user' || lpad(n::text, 7, '0') || '@example' || n % 7 || '.com', 'bounce'
             FROM generate_series({}, {}, {step}) n",
            workspace.0,
            numbers.start,
            numbers.end - 1,
        ))
        .await;
    }

    /// What the calls of a step read of the table of entries.
    async fn reads<T>(&self, calls: impl AsyncFnOnce(&mut DncServiceClient<Channel>) -> T) -> (T, Reads) {
        let before = self.counted().await;
        let server = TestServer::start_with(&[], &self.url).await;
        let done = calls(&mut server.client().await).await;
        server.begin_stop();
        server.ended().await;
        let after = self.counted().await;
        (done, Reads { rows: after.rows - before.rows, blocks: after.blocks - before.blocks })
    }

    async fn counted(&self) -> Reads {
        let connection = Mutex::new(PgConnection::connect(&self.url).await.unwrap());
        until("every other session has ended", || async {
            let others = "SELECT count(*) FROM pg_stat_activity
                 WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()";
            sqlx::query_scalar::<_, i64>(others).fetch_one(&mut *connection.lock().await).await.unwrap() == 0
        })
        .await;
        let (rows, blocks) = sqlx::query_as(
            "SELECT seq_tup_read + idx_tup_fetch, heap_blks_read + heap_blks_hit + idx_blks_read + idx_blks_hit
             FROM pg_stat_user_tables JOIN pg_statio_user_tables USING (relid) WHERE pg_stat_user_tables.relname = 'entries'",
        )
        .fetch_one(&mut connection.into_inner())
        .await
        .unwrap();
        Reads { rows, blocks }
    }
}

fn emails(numbers: impl Iterator<Item = u32>) -> Vec<String> {
    numbers.map(|number| format!("user{number:07}@example{}.com", number % 7)).collect()
}

async fn suppressed(client: &mut DncServiceClient<Channel>, key: &str, emails: Vec<String>) -> usize {
    let answer = client.check_entries(with_key(CheckEntriesRequest { emails }, key)).await.unwrap().into_inner();
    answer.results.iter().filter(|result| result.suppressed).count()
}

async fn delete(client: &mut DncServiceClient<Channel>, key: &str, message: DeleteEntriesRequest) -> i64 {
    client.delete_entries(with_key(message, key)).await.unwrap().into_inner().deleted
}

async fn first_page(client: &mut DncServiceClient<Channel>, key: &str, filter: EntryFilter) -> ListEntriesResponse {
    let message = ListEntriesRequest { filter: Some(filter), ..ListEntriesRequest::default() };
    client.list_entries(with_key(message, key)).await.unwrap().into_inner()
}

async fn exported(client: &mut DncServiceClient<Channel>, key: &str, filter: EntryFilter) -> usize {
    let call = with_key(ExportEntriesRequest { filter: Some(filter) }, key);
    let mut messages = client.export_entries(call).await.unwrap().into_inner();
    let mut count = 0;
    while let Some(message) = messages.message().await.unwrap() {
        count += message.entries.len();
    }
    count
}

fn stored_from(time: OffsetDateTime) -> EntryFilter {
    let create_time_from = prost_types::Timestamp { seconds: time.unix_timestamp(), nanos: time.nanosecond().cast_signed() };
    EntryFilter { create_time_from: Some(create_time_from), ..EntryFilter::default() }
}

/// Asserts that each name cost at most one look-up by key.
#[track_caller]
fn assert_by_key(what: &str, reads: Reads, names: usize) {
    let names = names as i64;
    assert!(reads.rows <= 2 * names + SLACK, "{what}: {names} names, {reads:?}");
    assert!(reads.blocks <= BLOCKS_PER_LOOKUP * names + SLACK, "{what}: {names} names, {reads:?}");
}

#[tokio::test]
async fn a_workspace_without_statistics_is_read_by_key() {
    const LARGE: u32 = 300_000;
    const FRESH: u32 = 30_000;
    let lists = Lists::new().await;
    let theirs = lists.theirs.0;
    lists.fill(theirs, 0..LARGE, 1).await;
    lists.run("VACUUM ANALYZE entries").await;
    lists.run(format!("INSERT INTO entry_counts VALUES ({}, 0, {LARGE})", theirs.0)).await;
    lists.run(format!("INSERT INTO reason_counts VALUES ({}, 'bounce', false, 0, {LARGE})", theirs.0)).await;
    let key = &lists.ours.1;
    let (imported, _) = lists
        .reads(async |client| {
            let messages: Vec<_> =
                (0..FRESH).step_by(10_000).map(|from| request(numbered(from..from + 10_000).collect())).collect();
            client.import_entries(with_key(tokio_stream::iter(messages), key)).await.unwrap().into_inner().imported
        })
        .await;
    assert_eq!(imported, u64::from(FRESH));

    // Every second address is on the list.
    for names in [1_u32, 1_000, 10_000] {
        let emails = emails((0..names).map(|n| (n % 2 * FRESH) + n));
        let (found, reads) = lists
            .reads(async |client| {
                let mut found = 0;
                for _ in 0..REPEATS {
                    found += suppressed(client, key, emails.clone()).await;
                }
                found
            })
            .await;
        assert_eq!(found, names.div_ceil(2) as usize * REPEATS);
        assert_by_key("check", reads, REPEATS * (names as usize + 7));
    }

    let again: Vec<_> = numbered(0..10_000).collect();
    let (skipped, reads) = lists
        .reads(async |client| {
            let mut skipped = 0;
            for _ in 0..REPEATS {
                // A stream of one message, and one of two.
                for messages in [vec![again[..1_000].to_vec()], vec![again[..5_000].to_vec(), again[5_000..].to_vec()]] {
                    let options = ImportOptions { validate_only: true, ..ImportOptions::default() };
                    let messages: Vec<_> = messages.into_iter().map(|entries| with_options(entries, options.clone())).collect();
                    let call = with_key(tokio_stream::iter(messages), key);
                    skipped += client.import_entries(call).await.unwrap().into_inner().skipped;
                }
            }
            skipped
        })
        .await;
    assert_eq!(skipped, 11_000 * REPEATS as u64);
    assert_by_key("dry run", reads, 11_000 * REPEATS);

    let (deleted, reads) = lists
        .reads(async |client| {
            let mut deleted = 0;
            for call in 0..REPEATS as u32 {
                let emails = emails(call * 1_000..(call + 1) * 1_000);
                let message = DeleteEntriesRequest { emails, ..DeleteEntriesRequest::default() };
                deleted += delete(client, key, DeleteEntriesRequest { validate_only: true, ..message.clone() }).await;
                deleted += delete(client, key, message).await;
            }
            deleted
        })
        .await;
    assert_eq!(deleted, 16_000);
    assert_by_key("deletion of named entries", reads, 16_000);

    let left = i64::from(FRESH) - 8_000;
    let (listed, reads) = lists
        .reads(async |client| {
            let (mut listed, mut page_token) = (0, String::new());
            for _ in 0..REPEATS {
                let message = ListEntriesRequest { page_size: 100, page_token, ..ListEntriesRequest::default() };
                let page = client.list_entries(with_key(message, key)).await.unwrap().into_inner();
                listed += page.entries.len();
                page_token = page.next_page_token;
            }
            listed
        })
        .await;
    assert_eq!(listed, 100 * REPEATS);
    assert!(reads.rows <= 101 * REPEATS as i64 + SLACK, "pages: {reads:?}");

    let (_, reads) = lists
        .reads(async |client| {
            for _ in 0..REPEATS {
                let summary = client.summarize_entries(with_key(SummarizeEntriesRequest {}, key)).await.unwrap().into_inner();
                assert_eq!((summary.total, summary.reasons.len()), (left, 1));
                for (reason, total) in [("import", left), ("none", 0)] {
                    let filter = EntryFilter { reason: reason.into(), ..EntryFilter::default() };
                    assert_eq!(first_page(client, key, filter).await.total_size, total, "{reason}");
                }
            }
        })
        .await;
    assert!(reads.rows <= 26 * REPEATS as i64 + SLACK, "counts by reason: {reads:?}");

    let (count, reads) = lists.reads(async |client| exported(client, key, EntryFilter::default()).await).await;
    assert_eq!(count as i64, left);
    assert!(reads.rows <= left + SLACK, "export: {reads:?}");

    let (deleted, reads) = lists
        .reads(async |client| delete(client, key, DeleteEntriesRequest { all: true, ..DeleteEntriesRequest::default() }).await)
        .await;
    assert_eq!(deleted, left);
    assert!(reads.rows <= 2 * left + SLACK, "deletion of all: {reads:?}");
    assert!(reads.blocks <= BLOCKS_PER_LOOKUP * left + SLACK, "deletion of all: {reads:?}");
}

#[tokio::test]
async fn an_export_of_recent_entries_reads_the_list_once() {
    const OLD: u32 = 200_000;
    const FRESH: u32 = 60_000;
    let lists = Lists::new().await;
    let (workspace, key) = &lists.ours;
    lists.fill(*workspace, 1..2 * OLD, 2).await;
    lists.run("VACUUM ANALYZE entries").await;
    // A search reads the index, and of the table what it finds.
    let few = EntryFilter { search: "user0000001@".into(), ..EntryFilter::default() };
    let (count, reads) = lists.reads(async |client| exported(client, key, few).await).await;
    assert_eq!(count, 1);
    assert!(reads.rows <= SLACK, "search: {reads:?}");

    let before = lists.now().await;
    lists.fill(*workspace, 0..2 * FRESH, 2).await;
    let all = i64::from(OLD + FRESH);

    let (count, reads) = lists.reads(async |client| exported(client, key, stored_from(before)).await).await;
    assert_eq!(count, FRESH as usize);
    assert!(reads.rows <= all + SLACK, "export: {reads:?}");
    let message = DeleteEntriesRequest { all: true, filter: Some(stored_from(before)), ..DeleteEntriesRequest::default() };
    let (deleted, reads) = lists.reads(async |client| delete(client, key, message).await).await;
    assert_eq!(deleted, i64::from(FRESH));
    assert!(reads.rows <= all + i64::from(FRESH) + SLACK, "deletion: {reads:?}");
}

#[tokio::test]
async fn a_few_entries_of_a_long_list_are_found_without_reading_all_of_it() {
    const OLD: u32 = 200_000;
    // The entries of one range of blocks in the BRIN index of times, which has the first and last
    // time of each range.
    const RANGE: i64 = 15_000;
    let lists = Lists::new().await;
    let (workspace, key) = &lists.ours;
    lists.fill(*workspace, 0..OLD, 1).await;
    lists.run("VACUUM ANALYZE entries").await;
    let before = lists.now().await;
    lists.fill(*workspace, OLD..OLD + 20, 1).await;
    let filter = EntryFilter { reason: "bounce".into(), ..stored_from(before) };
    let (pages, reads) = lists
        .reads(async |client| {
            // On a busy machine the time for counting may be over too early.
            for pages in 1.. {
                let page = first_page(client, key, filter.clone()).await;
                assert_eq!(page.entries.len(), 20);
                if !page.total_omitted {
                    assert_eq!(page.total_size, 20);
                    return pages;
                }
            }
            0
        })
        .await;
    assert!(pages > 1 || reads.rows <= 2 * RANGE + SLACK, "by time: {reads:?}");

    lists.run(format!("INSERT INTO entries VALUES ({}, now(), 1, 'example.org', 'bounce')", workspace.0)).await;
    lists.run(format!("INSERT INTO reason_counts VALUES ({}, 'bounce', true, 0, 1)", workspace.0)).await;
    let filter = EntryFilter { r#type: EntryType::Domain.into(), ..EntryFilter::default() };
    let (page, reads) = lists.reads(async |client| first_page(client, key, filter).await).await;
    assert_eq!((page.entries.len(), page.total_size), (1, 1));
    assert!(reads.rows <= SLACK, "domains: {reads:?}");
}

#[tokio::test]
async fn plans_made_for_an_empty_table_suit_a_full_one() {
    const ROWS: u32 = 30_000;
    // PostgreSQL takes a table that was never analyzed for a small one, and one that was empty when
    // it was analyzed for an empty one.
    for prepared in ["SELECT 1", "VACUUM ANALYZE entries"] {
        let lists = Lists::new().await;
        let key = &lists.ours.1;
        lists.run(prepared).await;
        let many = emails(0..1_000);
        let named = |emails: &[String]| DeleteEntriesRequest { emails: emails.to_vec(), ..DeleteEntriesRequest::default() };
        let (_, reads) = lists
            .reads(async |client| {
                for _ in 0..REPEATS {
                    assert_eq!(suppressed(client, key, many[..1].to_vec()).await, 0);
                    assert_eq!(suppressed(client, key, many.clone()).await, 0);
                    assert_eq!(delete(client, key, named(&many)).await, 0);
                    client.list_entries(with_key(ListEntriesRequest::default(), key)).await.unwrap();
                }
                let messages: Vec<_> =
                    (0..ROWS).step_by(10_000).map(|from| request(numbered(from..from + 10_000).collect())).collect();
                client.import_entries(with_key(tokio_stream::iter(messages), key)).await.unwrap();
                for _ in 0..REPEATS {
                    assert_eq!(suppressed(client, key, many[..1].to_vec()).await, 1);
                    assert_eq!(suppressed(client, key, many.clone()).await, 1_000);
                    client.list_entries(with_key(ListEntriesRequest::default(), key)).await.unwrap();
                }
                assert_eq!(delete(client, key, named(&many)).await, 1_000);
            })
            .await;
        let looked_up = (REPEATS * 3 * 1_009 + REPEATS * 26) as i64;
        assert!(reads.rows <= looked_up + SLACK, "{prepared}: {reads:?}");
        // The import looks up and writes each entry.
        assert!(reads.blocks <= BLOCKS_PER_LOOKUP * (i64::from(ROWS) + looked_up) + SLACK, "{prepared}: {reads:?}");
    }
}

#[tokio::test]
async fn the_logs_of_a_workspace_are_found_among_those_of_others() {
    const READ: &str = "SELECT sum(seq_tup_read + idx_tup_fetch)::bigint FROM pg_stat_user_tables
        WHERE relname IN ('imports', 'deletions')";
    for prepared in ["SELECT 1", "ANALYZE imports, deletions"] {
        let lists = Lists::new().await;
        let key = &lists.ours.1;
        for (table, columns, values) in
            [("imports", "imported, skipped, failed", "0, 0, 0"), ("deletions", "deleted, mode", "0, 'emails'")]
        {
            lists
                .run(format!(
                    "INSERT INTO {table} (workspace_id, id, key_id, {columns})
                     SELECT {} + n % 100, gen_random_uuid(), 1, {values} FROM generate_series(1, 100000) n",
                    lists.ours.0.0,
                ))
                .await;
        }
        lists.run(prepared).await;
        let before = lists.number(READ).await;
        lists
            .reads(async |client| {
                for _ in 0..REPEATS {
                    let imports = client.list_imports(with_key(ListImportsRequest::default(), key)).await.unwrap();
                    assert_eq!(imports.into_inner().imports.len(), 25);
                    let deletions = client.list_deletions(with_key(ListDeletionsRequest { page_size: 5 }, key)).await.unwrap();
                    assert_eq!(deletions.into_inner().deletions.len(), 5);
                }
            })
            .await;
        let read = lists.number(READ).await - before;
        assert!(read <= (REPEATS * 30) as i64 + SLACK, "{prepared}: {read}");
    }
}

#[tokio::test]
async fn the_addresses_remembered_by_a_dry_run_are_deleted_in_one_pass() {
    const SEEN: u32 = 200_000;
    let lists = Lists::new().await;
    let key = &lists.ours.1;
    let seen = "SELECT count(*) FROM rehearsed";
    lists
        .reads(async |client| {
            let messages = (0..SEEN).step_by(10_000).map(|from| {
                let options = ImportOptions { validate_only: true, ..ImportOptions::default() };
                with_options(numbered(from..from + 10_000).collect(), options)
            });
            let call = with_key(tokio_stream::iter(messages.collect::<Vec<_>>()), key);
            assert_eq!(client.import_entries(call).await.unwrap().into_inner().imported, u64::from(SEEN));
            until("they are deleted", || async { lists.number(seen).await == 0 }).await;
        })
        .await;
    let reads = lists.number("SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes WHERE relname = 'rehearsed'").await;
    assert!(reads <= i64::from(SEEN) + SLACK, "{reads} entries of the index");
}

#[tokio::test]
async fn what_a_batch_inserted_is_returned_only_if_it_must_be() {
    let server = TestServer::start().await;
    let mut connection = server.connection().await;
    let record = "CREATE TABLE seen (number serial, is_returned boolean);
        CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN INSERT INTO seen (is_returned) VALUES (current_query() LIKE ''%RETURNING%''); RETURN NULL; END';
        CREATE TRIGGER see AFTER INSERT ON entries FOR EACH STATEMENT EXECUTE FUNCTION see()";
    sqlx::raw_sql(record).execute(&mut connection).await.unwrap();
    for (number, (reasons, expects_new)) in [(1, false), (1, true), (2, false), (2, true)].into_iter().enumerate() {
        let mut batch = Batch::new(1);
        for reason in ["bounce", "complaint"].into_iter().take(reasons) {
            batch.push_parts(&format!("{reason}{number}@example.com"), reason, None);
        }
        let ids = ImportIds { workspace: server.workspace, key: KeyId(1), import: ImportId::new() };
        let inserted = server.store.insert_batch(ids, batch.into_sorted(), None, expects_new).await.unwrap();
        assert_eq!(inserted, reasons as u64);
    }
    let seen: Vec<bool> =
        sqlx::query_scalar("SELECT is_returned FROM seen ORDER BY number").fetch_all(&mut connection).await.unwrap();
    assert_eq!(seen, [false, false, true, false]);
}
