//! `DeleteEntries`: its two modes, and deletions beside imports of the same addresses.

use dnc::proto::{DeleteEntriesRequest, Entry, EntryFilter, ListEntriesRequest};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::check::check;
use crate::{
    address_book::{domain, email, numbered, request},
    harness::{TestServer, http_client, with_key},
};

#[tokio::test]
async fn deletions_have_two_modes_and_are_logged() {
    let server = TestServer::start().await;
    let delete = |body: Value| {
        let url = format!("{}/v1/dnc", server.http_url);
        let request = http_client().delete(url).header("x-api-key", &server.key).json(&body);
        async move {
            let answer = request.send().await.unwrap();
            (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
        }
    };
    server.import(vec![request(numbered(0..25_000).collect())]).await.unwrap();
    server.import(vec![request(vec![domain("b.com"), Entry { reason: "bounce".into(), ..email("a@example.com") }])]).await.unwrap();
    let mut theirs = server.client().await;
    theirs.import_entries(with_key(tokio_stream::iter([request(numbered(0..10).collect())]), &server.other_key)).await.unwrap();

    for wrong in [
        json!({}),
        json!({"selectAll": false}),
        json!({"emails": []}),
        json!({"emails": ["a@example.com"], "selectAll": true}),
        json!({"emails": ["a@example.com"], "reason": "bounce"}),
        json!({"selectAll": true, "type": "person"}),
        json!({"selectAll": "yes"}),
        json!({"selectAll": true, "reason": " "}),
        json!({"selectAll": true, "search": "\u{a0}"}),
        json!({"selectAll": true, "search": ""}),
        json!({"selectAll": true, "createdTo": "yesterday"}),
    ] {
        assert_eq!(delete(wrong.clone()).await.0, 400, "{wrong}");
    }
    assert_eq!(server.count().await, 25_002);
    let early = delete(json!({"selectAll": true, "createdTo": "2020-01-01T00:00:00Z"})).await;
    assert_eq!(early.1["data"], json!({"deleted": 0}));
    let dry = delete(json!({"selectAll": true, "search": "USER", "validateOnly": true})).await;
    assert_eq!(dry.1["data"], json!({"deleted": 25_000}));
    assert_eq!(
        delete(json!({"emails": ["A@Example.com", "unknown@example.com", "bad", "a@example.com"]})).await.1["data"]["deleted"],
        1
    );
    assert_eq!(delete(json!({"selectAll": true, "type": "domain", "reason": "import"})).await.1["data"]["deleted"], 1);
    assert_eq!(delete(json!({"selectAll": true, "search": "user"})).await.1["data"]["deleted"], 25_000);
    assert_eq!(delete(json!({"selectAll": true})).await.1["data"]["deleted"], 0);
    assert_eq!(server.rows(server.other_workspace).await.len(), 10, "the list of the other workspace is unchanged");
    type Logged = (i64, i64, String, Option<i64>, Option<String>, Option<String>, Option<String>);
    let log: Vec<Logged> = sqlx::query_as(
        "SELECT key_id, deleted, mode, named, filter_type, filter_reason, filter_search FROM deletions WHERE workspace_id = $1 ORDER BY id",
    )
    .bind(server.workspace.0)
    .fetch_all(&mut server.connection().await)
    .await
    .unwrap();
    let text = |text: &str| Some(text.to_owned());
    assert_eq!(
        log,
        [
            (1, 0, "all".to_owned(), None, None, None, None),
            (1, 1, "emails".to_owned(), Some(2), None, None, None),
            (1, 1, "all".to_owned(), None, text("domain"), text("import"), None),
            (1, 25_000, "all".to_owned(), None, None, None, text("user")),
            (1, 0, "all".to_owned(), None, None, None, None),
        ]
    );
}

#[tokio::test]
async fn concurrent_deletions_and_imports_of_the_same_addresses_succeed() {
    let server = TestServer::start().await;
    let mut tasks = JoinSet::new();
    for number in 0..8 {
        let (mut client, key) = (server.client().await, server.key.clone());
        tasks.spawn(async move {
            for _ in 0..3 {
                if number % 2 == 0 {
                    let call = with_key(tokio_stream::iter([request(numbered(0..5_000).rev().collect())]), &key);
                    client.import_entries(call).await.unwrap();
                } else if number == 1 {
                    let all = DeleteEntriesRequest { all: true, ..Default::default() };
                    client.delete_entries(with_key(all, &key)).await.unwrap();
                } else {
                    let named =
                        DeleteEntriesRequest { emails: numbered(0..5_000).rev().map(|e| e.email).collect(), ..Default::default() };
                    client.delete_entries(with_key(named, &key)).await.unwrap();
                }
            }
        });
    }
    tasks.join_all().await;
}

#[tokio::test]
async fn entries_of_an_earlier_release_are_suppressed_listed_and_deletable() {
    let server = TestServer::start().await;
    server.import(vec![request(vec![email("old@example.com"), domain("old.example.com")])]).await.unwrap();
    // Addresses that the rules of an earlier release accepted.
    let (address, suffix) = ("o\u{200b}ld@example.com", "kobe.jp");
    for (from, to) in [("old@example.com", address), ("old.example.com", suffix)] {
        let updated = sqlx::query("UPDATE entries SET address = $1 WHERE address = $2").bind(to).bind(from);
        assert_eq!(updated.execute(&mut server.connection().await).await.unwrap().rows_affected(), 1);
    }
    let results = check(&server, &[address, suffix, "x@y.kobe.jp"]).await;
    assert!(results.iter().all(|result| result.suppressed));
    assert_eq!(results[0].error.as_ref().map(|error| error.code.as_str()), Some("INVALID_EMAIL"));
    assert_eq!(results[2].entry.as_ref().map(|entry| entry.email.as_str()), Some(suffix));
    let filter = EntryFilter { search: "O\u{200b}L".to_owned(), ..Default::default() };
    let list = ListEntriesRequest { filter: Some(filter), ..Default::default() };
    let listed = server.client().await.list_entries(with_key(list, &server.key)).await.unwrap().into_inner();
    assert_eq!(listed.entries.iter().map(|entry| entry.email.as_str()).collect::<Vec<_>>(), [address]);
    let emails = vec![address.to_uppercase(), suffix.to_owned()];
    let deletion = DeleteEntriesRequest { emails, ..Default::default() };
    assert_eq!(server.client().await.delete_entries(with_key(deletion, &server.key)).await.unwrap().into_inner().deleted, 2);
}
