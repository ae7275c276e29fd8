//! Check, list, export, delete, summary and replay: each documented property, and random operations
//! against a model in memory.

use std::collections::BTreeMap;

use dnc::{
    domain::{Filter, Fingerprint, Kind, WorkspaceId},
    proto::{
        CheckEntriesRequest, CheckResult, DeleteEntriesRequest, Entry, EntryFilter, EntryType, ExportEntriesRequest, ImportOptions,
        ListEntriesRequest, SummarizeEntriesRequest, dnc_service_client::DncServiceClient,
    },
    store::{Claim, ImportId},
};
use proptest::prelude::Rng;
use serde_json::{Value, json};
use sqlx::AssertSqlSafe;
use time::OffsetDateTime;
use tokio::task::JoinSet;
use tonic::{Code, transport::Channel};

use crate::{
    address_book::{domain, email, numbered, request, with_options},
    harness::{Proxy, TestServer, database, http_client, until, with_key},
};

async fn check(server: &TestServer, emails: &[&str]) -> Vec<CheckResult> {
    let message = CheckEntriesRequest { emails: emails.iter().map(|email| (*email).to_owned()).collect() };
    server.client().await.check_entries(with_key(message, &server.key)).await.unwrap().into_inner().results
}

#[tokio::test]
async fn an_address_is_suppressed_by_itself_or_a_domain_above_it() {
    let server = TestServer::start().await;
    let mut theirs = server.client().await;
    let call = with_key(tokio_stream::iter([request(vec![email("free@example.com"), domain("example.org")])]), &server.other_key);
    theirs.import_entries(call).await.unwrap();
    server
        .import(vec![request(vec![email("x@mail.badcompany.com"), domain("badcompany.com"), domain("mail.badcompany.com")])])
        .await
        .unwrap();
    let asked = [
        "X@Mail.BadCompany.com",
        "y@mail.badcompany.com",
        "z@eu.badcompany.com",
        "z@notbadcompany.com",
        "badcompany.com",
        "deep.mail.badcompany.com",
        "free@example.com",
        "a@example.org",
        "nonsense",
        "x@mail.badcompany.com",
    ];
    let results = check(&server, &asked).await;
    assert_eq!(
        results.iter().map(|result| result.email.as_str()).collect::<Vec<_>>(),
        asked,
        "in the order of the request, as they were sent"
    );
    let by: Vec<_> = results.iter().map(|result| result.entry.as_ref().map_or("", |entry| entry.email.as_str())).collect();
    assert_eq!(
        by,
        [
            "x@mail.badcompany.com",
            "mail.badcompany.com",
            "badcompany.com",
            "",
            "badcompany.com",
            "mail.badcompany.com",
            "",
            "",
            "",
            "x@mail.badcompany.com"
        ]
    );
    let suppressed: Vec<_> = results.iter().map(|result| result.suppressed).collect();
    assert_eq!(suppressed, [true, true, true, false, true, true, false, false, true, true]);
    let entry = results[0].entry.as_ref().unwrap();
    assert_eq!((entry.r#type(), entry.workspace_id.as_str(), entry.added_by.as_str()), (EntryType::Email, "ws_1", "key_1"));
    assert!(entry.create_time.is_some());
    let error = results[8].error.as_ref().unwrap();
    assert_eq!((error.index, error.code.as_str()), (8, "INVALID_EMAIL"));
}

#[tokio::test]
async fn a_check_without_its_database_is_an_error() {
    let database_url = database().await;
    let link = Proxy::to(&database_url).await;
    let flags = ["--database-connect-timeout-secs", "1"];
    let server = TestServer::start_through(&flags, &database_url, &link.url(&database_url)).await;
    server.import(vec![request(vec![email("a@example.com")])]).await.unwrap();
    assert!(check(&server, &["a@example.com"]).await[0].suppressed);
    link.cut();
    let message = CheckEntriesRequest { emails: vec!["a@example.com".into(), "nonsense".into()] };
    let status = server.client().await.check_entries(with_key(message, &server.key)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    for path in ["check?email=a@example.com", "export", "summary"] {
        let url = format!("{}/v1/dnc/{path}", server.http_url);
        assert_eq!(http_client().get(url).header("x-api-key", &server.key).send().await.unwrap().status(), 503, "{path}");
    }
}

/// The addresses on all pages of a list, and the total of each page.
async fn pages(client: &mut DncServiceClient<Channel>, key: &str, filter: &EntryFilter, page_size: i32) -> (Vec<String>, Vec<i64>) {
    let (mut seen, mut totals, mut token) = (Vec::new(), Vec::new(), String::new());
    loop {
        let message = ListEntriesRequest { filter: Some(filter.clone()), page_size, page_token: token };
        let page = client.list_entries(with_key(message, key)).await.unwrap().into_inner();
        seen.extend(page.entries.into_iter().map(|entry| entry.email));
        totals.push(page.total_size);
        token = page.next_page_token;
        if token.is_empty() {
            return (seen, totals);
        }
    }
}

#[tokio::test]
async fn pages_are_stable_under_writes_and_a_page_token_fits_only_its_list() {
    let server = TestServer::start().await;
    let mut client = server.client().await;
    server.import(vec![request(numbered(0..100).map(|e| Entry { reason: "bounce".into(), ..e }).collect())]).await.unwrap();
    let filter = EntryFilter { reason: "bounce".into(), ..EntryFilter::default() };
    let ask =
        |filter: Option<EntryFilter>, page_token: &str| ListEntriesRequest { filter, page_size: 10, page_token: page_token.into() };
    let first = client.list_entries(with_key(ask(Some(filter.clone()), ""), &server.key)).await.unwrap().into_inner();
    let token = first.next_page_token.clone();
    assert_eq!((first.entries.len(), first.total_size), (10, 100));

    // Entries before and after the position of the token.
    let more =
        ["aaa@example.com", "user0000005x@example.com", "zzz@example.com"].map(|a| Entry { reason: "bounce".into(), ..email(a) });
    server.import(vec![request(more.to_vec())]).await.unwrap();
    let second = client.list_entries(with_key(ask(Some(filter.clone()), &token), &server.key)).await.unwrap().into_inner();
    assert_eq!(second.total_size, 100, "the count of the first page is carried in the token");
    assert_eq!(second.entries[0].email, "user0000010@example3.com");

    let tampered = token.replace(&token[10..12], if &token[10..12] == "00" { "01" } else { "00" });
    for (filter, token, key) in [
        (None, token.as_str(), &server.key),
        (Some(EntryFilter { reason: "manual".into(), ..EntryFilter::default() }), &token, &server.key),
        (Some(filter.clone()), &token, &server.other_key),
        (Some(filter.clone()), &tampered, &server.key),
        (Some(filter.clone()), "nonsense", &server.key),
    ] {
        let status = client.list_entries(with_key(ask(filter, token), key)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
    }
    let url = format!("{}/v1/dnc?reason=manual&cursor={token}", server.http_url);
    assert_eq!(http_client().get(url).header("x-api-key", &server.key).send().await.unwrap().status(), 400);
}

#[tokio::test]
async fn lists_and_checks_over_http_have_the_documented_form() {
    let server = TestServer::start().await;
    let get = |path: &str| {
        let request = http_client().get(format!("{}{path}", server.http_url)).header("x-api-key", &server.key);
        async move { request.send().await.unwrap() }
    };
    let post = |path: &str, body: Value| {
        let request = http_client().post(format!("{}{path}", server.http_url)).header("x-api-key", &server.key).json(&body);
        async move { request.send().await.unwrap().json::<Value>().await.unwrap() }
    };
    let added =
        post("/v1/dnc", json!({"entries": [{"email": "a@example.com"}, {"email": "b.com", "type": "domain"}, {"email": "bad"}]}))
            .await;
    assert_eq!((&added["data"]["added"], &added["data"]["skipped"], &added["data"]["failed"]), (&json!(2), &json!(0), &json!(1)));
    let page: Value = get("/v1/dnc?limit=1").await.json().await.unwrap();
    assert_eq!(page["success"], true);
    let entry = &page["data"][0];
    assert_eq!(
        (&entry["email"], &entry["entryType"], &entry["reason"]),
        (&json!("a@example.com"), &json!("email"), &json!("manual"))
    );
    assert_eq!((&entry["workspaceId"], &entry["addedBy"]), (&json!("ws_1"), &json!("key_1")));
    let id = entry["_id"].as_str().unwrap();
    assert!(id.len() == 24 && id.bytes().all(|b| b.is_ascii_hexdigit()));
    let time = entry["createdAt"].as_str().unwrap();
    assert!(time.len() == 24 && time.ends_with('Z') && time.as_bytes()[19] == b'.', "{time}");
    assert_eq!((&entry["updatedAt"], &entry["unsubscribedAt"]), (&entry["createdAt"], &entry["createdAt"]));
    let cursor = page["pagination"]["nextCursor"].as_str().unwrap();
    assert_eq!(page["pagination"], json!({"limit": 1, "total": 2, "hasMore": true, "nextCursor": cursor}));
    let last: Value = get(&format!("/v1/dnc?limit=1&cursor={cursor}")).await.json().await.unwrap();
    assert_eq!(last["pagination"], json!({"limit": 1, "total": 2, "hasMore": false, "nextCursor": null}));
    assert_eq!(last["data"][0]["email"], "b.com");
    let again: Value = get("/v1/dnc?type=email").await.json().await.unwrap();
    assert_eq!(again["data"][0]["_id"], id);
    assert_eq!(again["pagination"]["limit"], 25);
    let filtered: Value =
        get(&format!("/v1/dnc?createdFrom={time}&search=EXAMPLE&createdTo=2999-01-01T00:00:00Z")).await.json().await.unwrap();
    assert_eq!(filtered["pagination"]["total"], 1);
    for query in ["limit=0", "limit=101", "limit=x", "type=person", "createdFrom=yesterday", "cursor=x", "limit=1&limit=2"] {
        assert_eq!(get(&format!("/v1/dnc?{query}")).await.status(), 400, "{query}");
    }
    let checked: Value = get("/v1/dnc/check?email=x@mail.b.com").await.json().await.unwrap();
    assert_eq!((&checked["data"]["suppressed"], &checked["data"]["entry"]["email"]), (&json!(true), &json!("b.com")));
    assert_eq!(get("/v1/dnc/check").await.status(), 400);
    assert_eq!(get("/v1/dnc/check?email=j%FCrgen@example.de").await.status(), 400, "not UTF-8");
    post("/v1/dnc", json!({"entries": [{"email": "+tag+x@example.net"}]})).await;
    for email in ["+tag+x@example.net", "%2Btag%2Bx@example.net"] {
        let checked: Value = get(&format!("/v1/dnc/check?email={email}")).await.json().await.unwrap();
        assert_eq!((&checked["data"]["suppressed"], &checked["data"]["email"]), (&json!(true), &json!("+tag+x@example.net")));
    }
    let found: Value = get("/v1/dnc?search=tag+x").await.json().await.unwrap();
    assert_eq!(found["pagination"]["total"], 1);
    let broken = http_client().post(format!("{}/v1/dnc/check", server.http_url)).header("x-api-key", &server.key);
    let broken =
        broken.header("content-type", "application/json").body(r#"{"emails":["\ud83d","a@example.com"]}"#).send().await.unwrap();
    let broken: Value = broken.json().await.unwrap();
    assert_eq!((&broken["data"][0]["error"]["code"], &broken["data"][1]["suppressed"]), (&json!("INVALID_EMAIL"), &json!(true)));
    let checked = post("/v1/dnc/check", json!({"emails": ["free@example.org", "bad"]})).await;
    assert_eq!(checked["data"][0], json!({"email": "free@example.org", "suppressed": false}));
    assert_eq!(checked["data"][1]["error"]["code"], "INVALID_EMAIL");
    assert_eq!(post("/v1/dnc/check", json!({"emails": []})).await["code"], 400);
    assert_eq!(post("/v1/dnc/check", json!({"emails": vec!["a@b.de"; 10_001]})).await["code"], 400);
    let summary: Value = get("/v1/dnc/summary").await.json().await.unwrap();
    assert_eq!(summary["data"]["total"], 3);
    assert_eq!(summary["data"]["reasons"][0], json!({"type": "email", "reason": "manual", "count": 2}));
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
async fn an_export_can_be_imported_as_the_same_list() {
    let server = TestServer::start().await;
    let mut entries: Vec<_> = numbered(0..9_000).collect();
    for odd in
        ["=1+1@example.com", "+tag@example.com", "-x@example.com", "'=x@example.com", "o'brien@example.ie", "jürgen@example.de"]
    {
        entries.push(Entry { reason: format!("{odd}, said \"no\""), ..email(odd) });
    }
    entries.push(Entry { reason: "@SUM(1)".into(), ..domain("b.com") });
    entries.push(Entry { reason: "\u{1F6AB} ; nein".into(), ..domain("münchen.de") });
    server.import(vec![request(entries)]).await.unwrap();
    let ours = server.rows(server.workspace).await;
    assert_eq!(ours.len(), 9_008);
    for (format, media_type) in [("csv", "text/csv"), ("ndjson", "application/x-ndjson")] {
        let url = format!("{}/v1/dnc/export?format={format}", server.http_url);
        let answer = http_client().get(url).header("x-api-key", &server.key).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        assert!(answer.headers()["content-type"].to_str().unwrap().starts_with(media_type));
        let file = answer.text().await.unwrap();
        if format == "csv" {
            assert!(file.starts_with("email,type,reason,unsubscribedAt,createdAt,addedBy\r\n"));
            let starts_formula = |line: &str| line.trim_start_matches('"').starts_with(['=', '+', '-', '@', '\t']);
            assert!(!file.lines().any(starts_formula));
        }
        let request = http_client().post(format!("{}/v1/dnc/import", server.http_url)).header("x-api-key", &server.other_key);
        let answer = request.header("content-type", media_type).body(file).send().await.unwrap();
        assert_eq!(answer.json::<Value>().await.unwrap()["data"]["imported"], 9_008);
        let theirs = server.rows(server.other_workspace).await;
        let bare = |rows: &[(String, String, i64)]| rows.iter().map(|row| (row.0.clone(), row.1.clone())).collect::<Vec<_>>();
        assert_eq!(bare(&theirs), bare(&ours), "{format}");
        let all = DeleteEntriesRequest { all: true, ..Default::default() };
        server.client().await.delete_entries(with_key(all, &server.other_key)).await.unwrap();
    }
    let url = format!("{}/v1/dnc/export?format=xml", server.http_url);
    assert_eq!(http_client().get(url).header("x-api-key", &server.key).send().await.unwrap().status(), 400);
}

#[tokio::test]
async fn slow_readers_of_exports_hold_no_database_connection() {
    let server = TestServer::start_with(&["--database-connections-max", "4"], &database().await).await;
    server.import(vec![request(numbered(0..50_000).collect())]).await.unwrap();
    let mut readers = Vec::new();
    for _ in 0..8 {
        let call = with_key(ExportEntriesRequest::default(), &server.key);
        let mut messages = server.client().await.export_entries(call).await.unwrap().into_inner();
        assert_eq!(messages.message().await.unwrap().unwrap().entries.len(), 2_000);
        readers.push(messages);
    }
    assert!(check(&server, &["user0000001@example1.com"]).await[0].suppressed);
    assert_eq!(server.import(vec![request(vec![email("new@example.com")])]).await.unwrap().imported, 1);
}

#[tokio::test]
async fn concurrent_checks_each_get_their_own_answer() {
    let server = TestServer::start().await;
    server.import(vec![request(numbered(0..500).collect())]).await.unwrap();
    let channel = server.channel().await;
    let mut calls = JoinSet::new();
    for (number, entry) in numbered(0..1_000).enumerate() {
        let mut client = DncServiceClient::new(channel.clone());
        let key = if number % 10 == 0 { server.other_key.clone() } else { server.key.clone() };
        calls.spawn(async move {
            let call = with_key(CheckEntriesRequest { emails: vec![entry.email.clone()] }, &key);
            let result = client.check_entries(call).await.unwrap().into_inner().results.remove(0);
            assert_eq!(result.email, entry.email);
            assert_eq!(result.suppressed, number < 500 && number % 10 != 0, "{number}");
        });
    }
    calls.join_all().await;
}

#[tokio::test]
async fn invalid_lines_of_a_file_are_rejected_one_by_one_with_their_causes() {
    let server = TestServer::start().await;
    let post = |media_type: &'static str, body: String| {
        let request = server.post_request().header("content-type", media_type).body(body);
        async move { request.send().await.unwrap() }
    };
    let answer = post(
        "application/x-ndjson",
        "{\"email\":\"a@example.com\"}\n{\"email\":\"x@example.com\",\"type\":7}\n\nnonsense\n{\"email\":\"bad\"}\n".into(),
    )
    .await;
    let body: Value = answer.json().await.unwrap();
    assert_eq!((&body["data"]["imported"], &body["data"]["failed"]), (&json!(1), &json!(3)));
    let errors = json!([
        {"index": 1, "line": 2, "field": "type", "code": "INVALID_TYPE", "message": "The type is neither email nor domain."},
        {"index": 2, "line": 4, "field": "", "code": "INVALID_LINE", "message": "The line is not valid JSON."},
        body["data"]["errors"][2],
    ]);
    assert_eq!(body["data"]["errors"], errors);
    assert_eq!((&body["data"]["errors"][2]["index"], &body["data"]["errors"][2]["line"]), (&json!(3), &json!(5)));
    let answer = post("text/csv", format!("EMAIL,reason\nb@example.com,bounce\n{},x\nbad,\n", "x".repeat(70_000))).await;
    let body: Value = answer.json().await.unwrap();
    assert_eq!((&body["data"]["imported"], &body["data"]["failed"]), (&json!(1), &json!(2)));
    let error = &body["data"]["errors"][0];
    assert_eq!((&error["code"], &error["line"]), (&json!("LINE_TOO_LONG"), &json!(3)));
    assert_eq!(error["message"], "The line is longer than 64 KiB, or has more than 1,000 cells.");
    let answer = post("text/csv", "name,phone\nx,y\n".into()).await;
    assert_eq!(answer.status(), 400);
    assert!(answer.text().await.unwrap().contains("header"));
    let many: String = (0..30_000).map(|i| format!("{{\"email\":\"many{i}@example.com\"}}\n")).collect();
    let body: Value = post("application/x-ndjson", many).await.json().await.unwrap();
    assert_eq!(body["data"], json!({"imported": 30_000, "skipped": 0}));
}

#[tokio::test]
async fn a_repeated_idempotency_key_gets_the_first_answer_again() {
    let server = TestServer::start().await;
    let options = || ImportOptions { request_id: "first".into(), ..ImportOptions::default() };
    let first = server.import(vec![with_options(vec![email("a@example.com"), email("bad")], options())]).await.unwrap();
    assert_eq!((first.imported, first.failed), (1, 1));
    let again = server.import(vec![with_options(vec![email("a@example.com"), email("bad")], options())]).await.unwrap();
    assert_eq!(again, first, "with the causes");
    assert_eq!(server.count().await, 1);
    // The same text in another workspace is another key.
    let call = with_key(tokio_stream::iter([with_options(vec![email("a@example.com")], options())]), &server.other_key);
    assert_eq!(server.client().await.import_entries(call).await.unwrap().into_inner().failed, 0);
    let post = |body: Value| {
        let request = server.post_request().header("idempotency-key", "over http").json(&body);
        async move { request.send().await.unwrap().text().await.unwrap() }
    };
    let first = post(json!({"entries": [{"email": "c@example.com"}]})).await;
    assert_eq!(post(json!({"entries": [{"email": "c@example.com"}]})).await, first);
    let long = ImportOptions { request_id: "x".repeat(129), ..ImportOptions::default() };
    assert_eq!(server.import(vec![with_options(vec![], long)]).await.unwrap_err().code(), Code::InvalidArgument);
    // A day later the key can be used for another import.
    sqlx::query("UPDATE import_requests SET finished_at = finished_at - interval '25 hours'")
        .execute(&mut server.connection().await)
        .await
        .unwrap();
    assert_eq!(server.import(vec![with_options(vec![email("d@example.com")], options())]).await.unwrap().imported, 1);
}

#[tokio::test]
async fn concurrent_first_uses_of_an_idempotency_key_run_the_import_once() {
    let server = TestServer::start().await;
    let mut calls = JoinSet::new();
    for _ in 0..8 {
        let mut client = server.client().await;
        let options = ImportOptions { request_id: "one".into(), ..ImportOptions::default() };
        let chunks = numbered(0..30_000)
            .collect::<Vec<_>>()
            .chunks(10_000)
            .map(|chunk| with_options(chunk.to_vec(), options.clone()))
            .collect::<Vec<_>>();
        let call = with_key(tokio_stream::iter(chunks), &server.key);
        calls.spawn(async move { client.import_entries(call).await.unwrap().into_inner() });
    }
    for answer in calls.join_all().await {
        assert_eq!((answer.imported, answer.skipped), (30_000, 0), "each gets the same answer");
    }
    let runs: i64 = sqlx::query_scalar("SELECT count(*) FROM imports").fetch_one(&mut server.connection().await).await.unwrap();
    assert_eq!(runs, 1);
}

#[tokio::test]
async fn a_failed_import_releases_its_idempotency_key() {
    let server = TestServer::start().await;
    let options = || ImportOptions { request_id: "x".into(), ..ImportOptions::default() };
    let broken = vec![with_options(vec![email("a@example.com")], options()), request(vec![email("x".repeat(5 << 20))])];
    assert!(server.import(broken).await.is_err());
    assert_eq!(server.import(vec![with_options(vec![email("a@example.com")], options())]).await.unwrap().imported, 1);
}

#[tokio::test]
async fn an_idempotency_key_of_a_dead_import_is_free_when_its_lease_ends() {
    let server = TestServer::start().await;
    let dead = "INSERT INTO import_requests (workspace_id, request_id, import_id, lease_until)
                VALUES ($1, 'x', '00000000-0000-0000-0000-000000000000', now() + interval '1 second')";
    sqlx::query(dead).bind(server.workspace.0).execute(&mut server.connection().await).await.unwrap();
    let options = ImportOptions { request_id: "x".into(), ..ImportOptions::default() };
    let answer = server.import(vec![with_options(vec![email("a@example.com")], options.clone())]).await.unwrap();
    assert_eq!(answer.imported, 1, "it waited, and then ran");
    assert_eq!(server.import(vec![with_options(vec![email("a@example.com")], options)]).await.unwrap(), answer);
}

#[tokio::test]
async fn a_claim_that_is_renewed_is_not_free() {
    let server = TestServer::start().await;
    let claim =
        async |import: ImportId| server.store.claim_request(server.workspace, import, "x", &Fingerprint::of([])).await.unwrap();
    let (ours, theirs) = (ImportId::new(), ImportId::new());
    assert!(matches!(claim(ours).await, Claim::Mine));
    let end = "UPDATE import_requests SET lease_until = now() - interval '1 second'";
    sqlx::query(end).execute(&mut server.connection().await).await.unwrap();
    server.store.renew_claim(server.workspace, ours, "x").await.unwrap();
    assert!(matches!(claim(theirs).await, Claim::Busy(_)));
    sqlx::query(end).execute(&mut server.connection().await).await.unwrap();
    assert!(matches!(claim(theirs).await, Claim::Mine));
}

#[tokio::test]
async fn an_import_that_lost_its_idempotency_key_does_not_succeed() {
    let server = TestServer::start().await;
    let options = || ImportOptions { request_id: "x".into(), ..ImportOptions::default() };
    let (messages, stream) = tokio::sync::mpsc::channel(1);
    let mut client = server.client().await;
    let call = with_key(tokio_stream::wrappers::ReceiverStream::new(stream), &server.key);
    let slow = tokio::spawn(async move { client.import_entries(call).await });
    messages.send(with_options(vec![email("quick@example.com")], options())).await.unwrap();
    messages.send(request(vec![email("slow@example.com")])).await.unwrap();
    let lost = async || {
        // As if its server could not renew the lease.
        let past = "UPDATE import_requests SET lease_until = now() - interval '1 second' WHERE request_id = 'x'";
        sqlx::query(past).execute(&mut server.connection().await).await.unwrap().rows_affected() == 1
    };
    until("the slow import has the key, and loses it", lost).await;
    let quick = server.import(vec![with_options(vec![email("quick@example.com")], options())]).await.unwrap();
    assert_eq!(quick.imported, 1);
    drop(messages);
    assert_eq!(slow.await.unwrap().unwrap_err().code(), Code::Unavailable);
    assert_eq!(server.rows(server.workspace).await[0].0, "quick@example.com");
    assert_eq!(server.count().await, 1);
    assert_eq!(server.import(vec![with_options(vec![email("quick@example.com")], options())]).await.unwrap(), quick);
}

#[tokio::test]
async fn a_repeated_file_gets_the_causes_of_its_invalid_lines_again() {
    let server = TestServer::start().await;
    let file = format!("email,reason\na@example.com,bounce\n{},x\nbad,\n{}", "x".repeat(70_000), "b@example.com,\n".repeat(50_000));
    let post = || {
        let request = server.post_request().header("content-type", "text/csv").header("idempotency-key", "file");
        let request = request.body(file.clone());
        async move { request.send().await.unwrap().json::<Value>().await.unwrap() }
    };
    let first = post().await;
    assert_eq!((&first["data"]["imported"], &first["data"]["failed"]), (&json!(2), &json!(2)));
    assert_eq!(post().await, first);
}

/// Stores entries without the service. Every 12,500th has the reason `rare`, and so have the
/// domains.
async fn store(server: &TestServer, entries: i64, domains: i64) {
    let workspace = server.workspace.0;
    let statement = format!(
        "INSERT INTO entries (workspace_id, added_by, address, reason)
         SELECT {workspace}, 1, 'user' || lpad(n::text, 7, '0') || '@example.com', CASE n % 12500 WHEN 0 THEN 'rare' ELSE 'bounce' END
         FROM generate_series(1, {entries}) n
         UNION ALL SELECT {workspace}, 1, 'user' || n || '.com', 'rare' FROM generate_series(1, {domains}) n;
         INSERT INTO entry_counts VALUES ({workspace}, 0, {entries} + {domains});"
    );
    sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut server.connection().await).await.unwrap();
}

#[tokio::test]
async fn a_filtered_list_is_examined_in_parts() {
    let server = TestServer::start().await;
    // The 50,000th and the 100,000th are the last ones of their parts.
    store(&server, 150_000, 7).await;
    let rare: Vec<String> =
        server.rows(server.workspace).await.into_iter().filter(|row| row.1 == "rare").map(|row| row.0).collect();
    assert_eq!(rare.len(), 19);
    let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
    let rare_ones = EntryFilter { reason: "rare".into(), ..EntryFilter::default() };
    // Each as it is asked for, and as the store has it.
    type InStore = fn(Filter) -> Filter;
    let filters: [(EntryFilter, InStore, &[String]); 8] = [
        (rare_ones.clone(), |rare| rare, &rare),
        (
            EntryFilter { r#type: EntryType::Email.into(), ..rare_ones.clone() },
            |rare| Filter { kind: Some(Kind::Email), ..rare },
            &rare[..12],
        ),
        (
            EntryFilter { r#type: EntryType::Domain.into(), ..rare_ones.clone() },
            |rare| Filter { kind: Some(Kind::Domain), ..rare },
            &rare[12..],
        ),
        (
            EntryFilter { search: "00@".into(), ..rare_ones.clone() },
            |rare| Filter { search: Some("00@".to_owned()), ..rare },
            &rare[..12],
        ),
        (
            EntryFilter { search: "com".into(), r#type: EntryType::Email.into(), ..rare_ones.clone() },
            |rare| Filter { search: Some("com".to_owned()), kind: Some(Kind::Email), ..rare },
            &rare[..12],
        ),
        (
            EntryFilter { search: "com".into(), r#type: EntryType::Domain.into(), ..rare_ones.clone() },
            |rare| Filter { search: Some("com".to_owned()), kind: Some(Kind::Domain), ..rare },
            &rare[12..],
        ),
        (
            EntryFilter { create_time_from: at(1), ..rare_ones.clone() },
            |rare| Filter { created_from: Some(OffsetDateTime::UNIX_EPOCH), ..rare },
            &rare,
        ),
        (
            EntryFilter { create_time_to: at(1), ..rare_ones },
            |rare| Filter { created_to: Some(OffsetDateTime::UNIX_EPOCH), ..rare },
            &[],
        ),
    ];
    let mut client = server.client().await;
    let rare_ones = Filter { reason: Some("rare".to_owned()), ..Filter::default() };
    for (filter, in_store, expected) in filters {
        for page_size in [1, 4, 100] {
            let (seen, _) = pages(&mut client, &server.key, &filter, page_size).await;
            assert_eq!(seen, expected, "{filter:?}, pages of {page_size}");
            // Few entries are not looked for in parts if their number is known.
            let (mut seen, mut after) = (Vec::new(), Some(String::new()));
            while let Some(from) = after {
                let filter = in_store(rare_ones.clone());
                let page = server.store.page(server.workspace, &filter, &from, page_size as u32, None).await.unwrap();
                seen.extend(page.entries.into_iter().map(|entry| entry.address));
                after = page.next.map(|next| next.after);
            }
            assert_eq!(seen, expected, "{filter:?}, examined for pages of {page_size}");
        }
        let call = with_key(ExportEntriesRequest { filter: Some(filter.clone()) }, &server.key);
        let mut messages = client.export_entries(call).await.unwrap().into_inner();
        let mut seen = Vec::new();
        while let Some(message) = messages.message().await.unwrap() {
            seen.extend(message.entries.into_iter().map(|entry| entry.email));
        }
        assert_eq!(seen, expected, "the export of {filter:?}");
    }
    // The fifth is in the second part. Of the domains no other entry is examined.
    for (kind, count, expected) in [(None, 5, 62_500), (Some(Kind::Domain), 3, 3)] {
        let filter = Filter { kind, ..rare_ones.clone() };
        let page = server.store.page(server.workspace, &filter, "", count, None).await.unwrap();
        assert_eq!((page.entries.len(), page.next.unwrap().examined), (count as usize, expected), "{kind:?}");
    }
    let last = server.store.page(server.workspace, &Filter::default(), "user0150000@example.com", 7, None).await.unwrap();
    assert_eq!((last.entries.len(), last.next.is_none()), (7, true));
}

#[tokio::test]
async fn a_filter_by_time_has_its_beginning_and_not_its_end() {
    let server = TestServer::start().await;
    let (workspace, at) = (server.workspace, OffsetDateTime::UNIX_EPOCH);
    let moment = time::Duration::microseconds(1);
    for (address, created_at) in [("a@example.com", at - moment), ("b@example.com", at), ("c@example.com", at + moment)] {
        let insert = "INSERT INTO entries (workspace_id, added_by, address, reason, created_at) VALUES ($1, 1, $2, 'bounce', $3)";
        let insert = sqlx::query(insert).bind(workspace.0).bind(address).bind(created_at);
        insert.execute(&mut server.connection().await).await.unwrap();
    }
    let filter = Filter { created_from: Some(at), created_to: Some(at + moment), ..Filter::default() };
    let searched = Filter { search: Some("example".to_owned()), ..filter.clone() };
    for filter in [filter, searched] {
        assert_eq!(server.store.count_entries(workspace, &filter).await.unwrap(), 1);
        for page in [
            server.store.page(workspace, &filter, "", 10, None).await,
            server.store.page(workspace, &filter, "", 10, Some(1)).await,
            server.store.export_page(workspace, &filter, "", 10).await,
        ] {
            let addresses: Vec<_> = page.unwrap().entries.into_iter().map(|entry| entry.address).collect();
            assert_eq!(addresses, ["b@example.com"]);
        }
    }
}

#[tokio::test]
async fn a_long_search_says_how_far_it_came() {
    let server = TestServer::start().await;
    store(&server, 110_000, 0).await;
    // Reading the third address takes longer than a page may.
    let slow = "CREATE TABLE slow (secs float8); INSERT INTO slow VALUES (1.1);
        CREATE FUNCTION is_read(address text) RETURNS boolean LANGUAGE plpgsql COST 0.0001 AS $$ BEGIN
            IF address = 'user0000003@example.com' THEN PERFORM pg_sleep(secs) FROM slow; END IF;
            RETURN true;
        END $$;
        ALTER TABLE entries RENAME TO stored;
        CREATE VIEW entries AS SELECT * FROM stored WHERE is_read(address);";
    sqlx::raw_sql(slow).execute(&mut server.connection().await).await.unwrap();
    let get = async |query: &str| -> Value {
        let request = http_client().get(format!("{}/v1/dnc?{query}", server.http_url)).header("x-api-key", &server.key);
        request.send().await.unwrap().json().await.unwrap()
    };
    let page = get("search=12500@&limit=5").await;
    let cursor = page["pagination"]["nextCursor"].as_str().unwrap();
    let expected = json!({
        "limit": 5, "total": null, "totalOmitted": true, "examined": 50_000, "hasMore": true, "nextCursor": cursor,
    });
    assert_eq!((page["data"].as_array().unwrap().len(), &page["pagination"]), (1, &expected));
    let last = get(&format!("search=12500@&limit=5&cursor={cursor}")).await;
    let expected = json!({"limit": 5, "total": null, "totalOmitted": true, "hasMore": false, "nextCursor": null});
    assert_eq!((&last["data"], &last["pagination"]), (&json!([]), &expected));

    let filter = EntryFilter { search: "00@".into(), ..EntryFilter::default() };
    let (seen, totals) = pages(&mut server.client().await, &server.key, &filter, 1_000).await;
    assert_eq!((seen.len(), totals.len()), (1_100, 2), "what was found within a second, and the rest");
    assert!(totals.iter().all(|total| *total == 0));
    // Nothing of this list is counted by reason yet.
    assert_eq!(get("limit=1").await["pagination"]["total"], 110_000, "the total of all is kept");
    assert_eq!(get("reason=rare&limit=100").await["pagination"]["total"], 8, "counted by reading");
    // A filter by reason has its total, which is kept.
    sqlx::raw_sql("INSERT INTO reason_counts SELECT workspace_id, reason, false, 0, count(*) FROM stored GROUP BY 1, 2")
        .execute(&mut server.connection().await)
        .await
        .unwrap();
    let page = get("reason=rare&limit=100").await;
    assert_eq!(page["pagination"], json!({"limit": 100, "total": 8, "hasMore": false, "nextCursor": null}));
    assert_eq!(page["data"].as_array().unwrap().len(), 8, "few entries are looked for longer");
    sqlx::raw_sql("UPDATE slow SET secs = 3.1").execute(&mut server.connection().await).await.unwrap();
    let page = get("reason=rare&limit=100").await;
    let cursor = page["pagination"]["nextCursor"].as_str().unwrap();
    let expected = json!({"limit": 100, "total": 8, "examined": 50_000, "hasMore": true, "nextCursor": cursor});
    assert_eq!(page["pagination"], expected);
    assert_eq!(page["data"].as_array().unwrap().len(), 4);
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

/// Stores so many entries in a workspace that their export is larger than any socket buffer.
async fn fill(server: &TestServer) {
    let many = "INSERT INTO entries (workspace_id, added_by, address, reason)
                SELECT $1, 1, 'user' || n || '@example.com', repeat('x', 64) FROM generate_series(1, 300000) n";
    sqlx::query(many).bind(server.workspace.0).execute(&mut server.connection().await).await.unwrap();
}

#[tokio::test]
async fn an_export_that_loses_its_database_breaks_instead_of_ending() {
    let database_url = database().await;
    let link = Proxy::to(&database_url).await;
    let flags = ["--database-connect-timeout-secs", "1"];
    let server = TestServer::start_through(&flags, &database_url, &link.url(&database_url)).await;
    fill(&server).await;
    for format in ["csv", "ndjson"] {
        let url = format!("{}/v1/dnc/export?format={format}", server.http_url);
        let mut answer = http_client().get(url).header("x-api-key", &server.key).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        assert!(answer.chunk().await.unwrap().is_some());
        link.cut();
        let broken = loop {
            match answer.chunk().await {
                Ok(Some(_)) => {}
                Ok(None) => break false,
                Err(_) => break true,
            }
        };
        assert!(broken, "an export that just ends looks complete");
        link.mend();
        let ready = || async { http_client().get(format!("{}/readyz", server.http_url)).send().await.unwrap().status() == 200 };
        until("the service is ready again", ready).await;
    }
}

#[tokio::test]
async fn an_export_breaks_when_its_key_is_revoked() {
    let server = TestServer::start().await;
    fill(&server).await;
    let call = with_key(ExportEntriesRequest::default(), &server.key);
    let mut messages = server.client().await.export_entries(call).await.unwrap().into_inner();
    assert!(messages.message().await.unwrap().is_some());
    server.store.revoke_key("key_1".parse().unwrap()).await.unwrap();
    let refused = async || {
        let call = with_key(SummarizeEntriesRequest {}, &server.key);
        server.client().await.summarize_entries(call).await.is_err()
    };
    until("the server has noticed the revocation", refused).await;
    let status = loop {
        match messages.message().await {
            Ok(message) => assert!(message.is_some(), "it ended as if it were complete"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Unauthenticated);
}

const LONG_AGO: prost_types::Timestamp = prost_types::Timestamp { seconds: 946_684_800, nanos: 0 };
const FAR_AWAY: prost_types::Timestamp = prost_types::Timestamp { seconds: 32_503_680_000, nanos: 0 };

/// Runs seeded random operations on two workspaces, and compares each answer with a model.
#[tokio::test]
async fn random_operations_agree_with_a_model() {
    use proptest::test_runner::{RngAlgorithm, TestRng};

    let seed: u64 = std::env::var("DNC_TEST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos().into());
    println!("DNC_TEST_SEED={seed} repeats this run");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let mut random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut below = |limit: u32| random.next_u32() % limit;

    let server = TestServer::start().await;
    let mut client = server.client().await;
    let keys = [server.key.clone(), server.other_key.clone()];
    let ids = [server.workspace, server.other_workspace];
    let mut models: [BTreeMap<String, String>; 2] = Default::default();
    let reasons = ["bounce", "complaint", "Manual"];
    let name = |number: u32| match number % 4 {
        0 => format!("d{}.example.com", number % 12),
        1 => format!("example{}.org", number % 5),
        _ => format!("u{}@d{}.example.com", number % 40, number % 12),
    };
    let covers = |model: &BTreeMap<String, String>, address: &str| -> Option<String> {
        let domain = address.rsplit_once('@').map_or(address, |(_, domain)| domain);
        let labels: Vec<&str> = domain.split('.').collect();
        let domains = (0..labels.len() - 1).map(|from| labels[from..].join("."));
        std::iter::once(address.to_owned()).chain(domains).find(|cover| model.contains_key(cover))
    };
    for step in 0..400 {
        let at = below(2) as usize;
        let (key, model) = (&keys[at], &mut models[at]);
        let reason = reasons[below(3) as usize];
        let filter = EntryFilter {
            r#type: below(3).cast_signed(),
            reason: if below(2) == 0 { reason.to_owned() } else { String::new() },
            search: ["", "U1", "example", "d1.", "%", "_"][below(6) as usize].to_owned(),
            // All entries are stored today.
            create_time_from: [None, Some(LONG_AGO), Some(FAR_AWAY)][below(8).saturating_sub(5) as usize],
            create_time_to: [None, Some(FAR_AWAY), Some(LONG_AGO)][below(8).saturating_sub(5) as usize],
        };
        let is_today = filter.create_time_from != Some(FAR_AWAY) && filter.create_time_to != Some(LONG_AGO);
        let selects = |address: &str, reason: &str| {
            let of_type = match filter.r#type {
                1 => address.contains('@'),
                2 => !address.contains('@'),
                _ => true,
            };
            is_today
                && of_type
                && (filter.reason.is_empty() || filter.reason == reason)
                && address.contains(&filter.search.to_lowercase())
        };
        let selected: Vec<String> = model.iter().filter(|(a, r)| selects(a, r)).map(|(a, _)| a.clone()).collect();
        match below(10) {
            0..4 => {
                let names: Vec<String> = (0..below(20)).map(|_| name(below(1_000))).collect();
                let entry =
                    |name: &String| Entry { reason: reason.into(), ..if name.contains('@') { email(name) } else { domain(name) } };
                let call = with_key(tokio_stream::iter([request(names.iter().map(entry).collect())]), key);
                let answer = client.import_entries(call).await.unwrap().into_inner();
                let mut imported = 0;
                for name in names {
                    imported += u64::from(!model.contains_key(&name));
                    model.entry(name).or_insert_with(|| reason.to_owned());
                }
                assert_eq!(answer.imported, imported, "seed {seed}, step {step}");
            }
            4..6 => {
                let names: Vec<String> = (0..30).map(|_| name(below(1_000))).collect();
                let call = with_key(CheckEntriesRequest { emails: names.clone() }, key);
                for (name, result) in names.iter().zip(client.check_entries(call).await.unwrap().into_inner().results) {
                    let expected = covers(model, name);
                    assert_eq!(result.suppressed, expected.is_some(), "seed {seed}, step {step}: {name}");
                    assert_eq!(result.entry.map(|entry| entry.email), expected, "seed {seed}, step {step}");
                }
            }
            6 => {
                let (seen, totals) = pages(&mut client, key, &filter, 1 + below(9).cast_signed()).await;
                assert_eq!(seen, selected, "seed {seed}, step {step}: {filter:?}");
                assert!(totals.iter().all(|total| *total == selected.len() as i64), "seed {seed}, step {step}");
            }
            7 => {
                let call = with_key(ExportEntriesRequest { filter: Some(filter.clone()) }, key);
                let mut messages = client.export_entries(call).await.unwrap().into_inner();
                let mut seen = Vec::new();
                while let Some(message) = messages.message().await.unwrap() {
                    seen.extend(message.entries.into_iter().map(|entry| entry.email));
                }
                assert_eq!(seen, selected, "seed {seed}, step {step}: {filter:?}");
            }
            8 => {
                let validate_only = below(2) == 0;
                let (message, gone) = if below(4) == 0 {
                    (DeleteEntriesRequest { filter: Some(filter.clone()), all: true, ..Default::default() }, selected.clone())
                } else {
                    let names: Vec<String> = (0..10).map(|_| name(below(1_000))).collect();
                    let gone = model.keys().filter(|address| names.contains(address)).cloned().collect();
                    (DeleteEntriesRequest { emails: names, ..Default::default() }, gone)
                };
                let call = with_key(DeleteEntriesRequest { validate_only, ..message }, key);
                let deleted = client.delete_entries(call).await.unwrap().into_inner().deleted;
                assert_eq!(deleted, gone.len() as i64, "seed {seed}, step {step}");
                if !validate_only {
                    model.retain(|address, _| !gone.contains(address));
                }
            }
            _ => {
                let answer = client.summarize_entries(with_key(SummarizeEntriesRequest {}, key)).await.unwrap().into_inner();
                let mut expected: BTreeMap<(i32, String), i64> = BTreeMap::new();
                for (address, reason) in model.iter() {
                    *expected.entry((if address.contains('@') { 1 } else { 2 }, reason.clone())).or_default() += 1;
                }
                let seen: BTreeMap<_, _> = answer.reasons.into_iter().map(|row| ((row.r#type, row.reason), row.count)).collect();
                assert_eq!(seen, expected, "seed {seed}, step {step}");
                assert_eq!(answer.total, model.len() as i64, "seed {seed}, step {step}");
            }
        }
    }
    for (id, model) in ids.iter().zip(&models) {
        let rows: BTreeMap<_, _> = server.rows(WorkspaceId(id.0)).await.into_iter().map(|row| (row.0, row.1)).collect();
        assert_eq!(&rows, model, "seed {seed}");
    }
}

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

#[tokio::test]
async fn large_answers_fit_into_4_mib() {
    let server = TestServer::start().await;
    let address = |number: u32| format!("{}{number:05}@{}example.com", "a".repeat(59), "long-label-of-a-domain.".repeat(7));
    let entries: Vec<Entry> =
        (0..10_000).map(|number| Entry { reason: format!("{number:05}{}", "ü".repeat(59)), ..email(address(number)) }).collect();
    let imported = server.import(entries.chunks(2_000).map(|chunk| request(chunk.to_vec())).collect()).await.unwrap();
    assert_eq!(imported.imported, 10_000);
    let results = check(&server, &entries.iter().map(|entry| entry.email.as_str()).collect::<Vec<_>>()).await;
    assert!(results.len() == 10_000 && results.iter().all(|result| result.suppressed));
    assert!(results[0].entry.is_some() && results[9_999].entry.is_none());
    let summary =
        server.client().await.summarize_entries(with_key(SummarizeEntriesRequest {}, &server.key)).await.unwrap().into_inner();
    assert_eq!((summary.total, summary.reasons.len()), (10_000, 1_000));
    assert_eq!((summary.other_reasons, summary.other_entries), (9_000, 9_000));
    let request = http_client().get(format!("{}/v1/dnc/summary", server.http_url)).header("x-api-key", &server.key);
    let body: Value = request.send().await.unwrap().json().await.unwrap();
    assert_eq!((&body["data"]["otherReasons"], &body["data"]["otherEntries"]), (&json!(9_000), &json!(9_000)));
}

#[tokio::test]
async fn the_secret_of_page_tokens_is_that_of_the_database() {
    let server = TestServer::start().await;
    let stored: Vec<u8> = sqlx::query_scalar("SELECT secret FROM secrets WHERE name = 'page_token'")
        .fetch_one(&mut server.connection().await)
        .await
        .unwrap();
    assert!(stored.len() >= 32);
    assert_eq!(server.store.page_token_secret().await.unwrap(), stored);
}
