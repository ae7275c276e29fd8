//! `SummarizeEntries`: the counts by type and reason, and how they are kept.

use dnc::{
    domain::{Filter, Kind},
    proto::{DeleteEntriesRequest, Entry, EntryFilter, EntryType, ListEntriesRequest, SummarizeEntriesRequest},
};
use sqlx::AssertSqlSafe;

use super::list::pages;
use crate::{
    address_book::{domain, email, numbered, request},
    harness::{TestServer, with_key},
};

#[tokio::test]
async fn entries_are_counted_by_type_and_reason_as_they_come_and_go() {
    let server = TestServer::start().await;
    let of = |reasons: &'static [&'static str]| {
        move |(number, entry): (usize, Entry)| Entry { reason: reasons[number % reasons.len()].into(), ..entry }
    };
    let numbered = |range, reasons| numbered(range).enumerate().map(of(reasons)).collect::<Vec<_>>();
    let counted = async |what: &str| {
        let message = SummarizeEntriesRequest {};
        let answer = server.client().await.summarize_entries(with_key(message, &server.key)).await.unwrap().into_inner();
        let counts = answer.reasons.into_iter().map(|row| (row.r#type == EntryType::Domain as i32, row.reason, row.count));
        let mut counts: Vec<_> = counts.collect();
        counts.sort_unstable();
        let stored =
            "SELECT strpos(address, '@') = 0, reason, count(*) FROM entries GROUP BY 1, 2 ORDER BY 1, reason COLLATE \"C\"";
        let stored: Vec<(bool, String, i64)> = sqlx::query_as(stored).fetch_all(&mut server.connection().await).await.unwrap();
        assert_eq!(counts, stored, "{what}");
        assert_eq!(answer.total, server.count().await, "{what}");
        for (is_domain, reason, count) in stored {
            let r#type = if is_domain { EntryType::Domain } else { EntryType::Email }.into();
            let filter = EntryFilter { reason, r#type, ..EntryFilter::default() };
            let message = ListEntriesRequest { filter: Some(filter), page_size: 1, ..ListEntriesRequest::default() };
            let page = server.client().await.list_entries(with_key(message, &server.key)).await.unwrap().into_inner();
            assert_eq!(page.total_size, count, "{what}");
        }
    };
    let import = async |entries: Vec<Entry>| server.import(vec![request(entries)]).await.unwrap().imported;
    assert_eq!(import(numbered(0..100, &["bounce"])).await, 100);
    counted("one reason, all new").await;
    assert_eq!(import(numbered(50..150, &["complaint"])).await, 50);
    counted("one reason, some new").await;
    assert_eq!(import(numbered(150..250, &["bounce", "complaint", "\u{e4}"])).await, 100);
    counted("several reasons, all new").await;
    let domains = [domain("example.org"), domain("example.net")];
    assert_eq!(import([numbered(200..300, &["manual", "bounce"]), domains.to_vec()].concat()).await, 52);
    counted("several reasons and types, some new").await;
    assert_eq!(import(numbered(0..300, &["manual", "bounce"])).await, 0);
    counted("none new").await;
    let batches = [20_000..30_000, 25_000..35_000].map(|range| request(numbered(range, &["manual", "bounce"])));
    assert_eq!(server.import(batches.to_vec()).await.unwrap().imported, 15_000);
    counted("a batch of which some are new, after one of which all were").await;
    let emails = numbered(0..300, &[""]).into_iter().step_by(3).map(|entry| entry.email).chain(["example.org".to_owned()]);
    let named = DeleteEntriesRequest { emails: emails.collect(), ..DeleteEntriesRequest::default() };
    assert_eq!(server.client().await.delete_entries(with_key(named, &server.key)).await.unwrap().into_inner().deleted, 101);
    counted("some deleted by name").await;
    for search in ["1@", ""] {
        let filter = EntryFilter { search: search.into(), ..EntryFilter::default() };
        let all = DeleteEntriesRequest { all: true, filter: Some(filter), ..DeleteEntriesRequest::default() };
        let answer = server.client().await.delete_entries(with_key(all, &server.key)).await.unwrap();
        assert!(answer.into_inner().deleted > 10);
        counted("deleted by a filter").await;
    }
    assert_eq!(server.count().await, 0);
}

#[tokio::test]
async fn what_an_older_server_stored_is_counted_by_reading() {
    let server = TestServer::start().await;
    server.import(vec![request(numbered(0..10).collect())]).await.unwrap();
    // It counts entries, but not by type and reason.
    let old = format!(
        "INSERT INTO entries (workspace_id, added_by, address, reason) VALUES ({0}, 1, 'example.org', 'bounce');
         INSERT INTO entry_counts VALUES ({0}, 20, 1)",
        server.workspace.0
    );
    sqlx::raw_sql(AssertSqlSafe(old)).execute(&mut server.connection().await).await.unwrap();
    let mut client = server.client().await;
    let summary = client.summarize_entries(with_key(SummarizeEntriesRequest {}, &server.key)).await.unwrap().into_inner();
    assert_eq!(summary.total, 11);
    let counts: Vec<_> = summary.reasons.iter().map(|row| (row.r#type, row.reason.as_str(), row.count)).collect();
    assert_eq!(counts, [(1, "import", 10), (2, "bounce", 1)]);
    let filter = EntryFilter { reason: "bounce".into(), ..EntryFilter::default() };
    let (seen, totals) = pages(&mut client, &server.key, &filter, 10).await;
    assert_eq!((seen, totals), (vec!["example.org".to_owned()], vec![1]));
    // No entry has this reason, and none is read.
    let filter = EntryFilter { reason: "none".into(), ..EntryFilter::default() };
    assert_eq!(pages(&mut client, &server.key, &filter, 10).await, (vec![], vec![0]));
}

#[tokio::test]
async fn a_deletion_forgets_the_counts_of_reasons_that_no_entry_has() {
    let server = TestServer::start().await;
    let with_reason = |number: u32, reason: &str| Entry { reason: reason.into(), ..numbered(number..number + 1).next().unwrap() };
    server.import(vec![request(vec![with_reason(1, "gone"), with_reason(2, "kept")])]).await.unwrap();
    let mut connection = server.connection().await;
    let parts = "INSERT INTO reason_counts SELECT $1, reason, false, part, entries
        FROM (VALUES ('over', 1, 5), ('over', 2, -5), ('busy', 1, 5), ('busy', 2, -5)) AS parts (reason, part, entries)";
    sqlx::query(parts).bind(server.workspace.0).execute(&mut connection).await.unwrap();
    let mut busy = sqlx::Connection::begin(&mut connection).await.unwrap();
    sqlx::raw_sql("SELECT FROM reason_counts WHERE reason = 'busy' AND part = 1 FOR UPDATE").execute(&mut *busy).await.unwrap();
    let remaining = async || {
        let rows = "SELECT reason, entries FROM reason_counts WHERE workspace_id = $1 ORDER BY reason, part";
        let rows = sqlx::query_as::<_, (String, i64)>(rows).bind(server.workspace.0);
        rows.fetch_all(&mut server.connection().await).await.unwrap()
    };
    let filter = EntryFilter { reason: "gone".into(), ..EntryFilter::default() };
    let deletion = DeleteEntriesRequest { all: true, filter: Some(filter), ..DeleteEntriesRequest::default() };
    let deleted = server.client().await.delete_entries(with_key(deletion, &server.key)).await.unwrap().into_inner().deleted;
    assert_eq!(deleted, 1);
    assert_eq!(remaining().await, [("busy".into(), 5), ("busy".into(), -5), ("kept".into(), 1)]);
    busy.rollback().await.unwrap();
    let nothing = DeleteEntriesRequest { all: true, ..DeleteEntriesRequest::default() };
    server.client().await.delete_entries(with_key(nothing, &server.other_key)).await.unwrap();
    assert_eq!(remaining().await.len(), 3, "the counts of another workspace");
    let nothing = EntryFilter { reason: "gone".into(), ..EntryFilter::default() };
    let deletion = DeleteEntriesRequest { all: true, filter: Some(nothing), ..DeleteEntriesRequest::default() };
    server.client().await.delete_entries(with_key(deletion, &server.key)).await.unwrap();
    assert_eq!(remaining().await, [("kept".into(), 1)]);
}

#[tokio::test]
async fn a_summary_begins_with_the_largest_count_and_goes_on_by_reason_and_type() {
    let server = TestServer::start().await;
    let empty = server.store.summarize(server.workspace, 10).await.unwrap();
    assert_eq!((empty.total, empty.reasons, empty.counts.len()), (0, 0, 0));
    let of = |reason: &str, entries: Vec<Entry>| {
        request(entries.into_iter().map(|entry| Entry { reason: reason.into(), ..entry }).collect())
    };
    let ours = [
        of("x", vec![domain("x.org")]),
        of("b", vec![domain("b.org"), email("1@example.com")]),
        of("a", vec![domain("a.org")]),
        of("m", numbered(0..3).collect()),
    ];
    server.import(ours.to_vec()).await.unwrap();
    let theirs = with_key(tokio_stream::iter([of("b", numbered(0..5).collect())]), &server.other_key);
    server.client().await.import_entries(theirs).await.unwrap();
    let delete = async |names: &[&str]| {
        let emails = names.iter().map(|name| (*name).to_owned()).collect();
        let named = DeleteEntriesRequest { emails, ..DeleteEntriesRequest::default() };
        server.client().await.delete_entries(with_key(named, &server.key)).await.unwrap();
    };
    delete(&["x.org"]).await;
    let expected = [(Kind::Email, "m", 3), (Kind::Domain, "a", 1), (Kind::Email, "b", 1), (Kind::Domain, "b", 1)];
    // As it is counted, and as it is read after a server that does not count by type and reason has
    // stored or deleted an entry.
    let older = [
        "SELECT 1",
        "INSERT INTO entries (workspace_id, added_by, address, reason) VALUES ($1, 1, '3@example.com', 'm');
         INSERT INTO entry_counts VALUES ($1, 20, 1)",
        "DELETE FROM entries WHERE workspace_id = $1 AND address >= 'user0000001';
         INSERT INTO entry_counts VALUES ($1, 21, -2)",
    ];
    for (statements, of_m) in older.into_iter().zip([3, 4, 2]) {
        let statements = statements.replace("$1", &server.workspace.0.to_string());
        sqlx::raw_sql(AssertSqlSafe(statements)).execute(&mut server.connection().await).await.unwrap();
        for listed in [4, 2] {
            let summary = server.store.summarize(server.workspace, listed).await.unwrap();
            let counts: Vec<_> = summary.counts.iter().map(|row| (row.kind, row.reason.as_str(), row.count)).collect();
            let mut expected = expected;
            expected[0].2 = of_m;
            assert_eq!(counts, expected[..listed as usize], "{of_m}");
            assert_eq!((summary.total, summary.reasons), (3 + of_m, 4));
        }
        for (kind, reason, count) in [
            (Some(Kind::Email), Some("b"), 1),
            (Some(Kind::Domain), Some("b"), 1),
            (None, Some("b"), 2),
            (Some(Kind::Email), None, 1 + of_m),
            (Some(Kind::Domain), None, 2),
            (None, None, 3 + of_m),
        ] {
            let filter = Filter { kind, reason: reason.map(str::to_owned), ..Filter::default() };
            let counted = server.store.count_entries(server.workspace, &filter).await.unwrap();
            assert_eq!(counted, count, "{filter:?}");
        }
    }
}
