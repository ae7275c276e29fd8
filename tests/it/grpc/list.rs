//! `ListEntries`: pages and their tokens, filters, and how much of a long list is examined.

use dnc::{
    domain::{Filter, Kind},
    proto::{
        Entry, EntryFilter, EntryType, ExportEntriesRequest, ListEntriesRequest, SummarizeEntriesRequest,
        dnc_service_client::DncServiceClient,
    },
};
use serde_json::{Value, json};
use sqlx::AssertSqlSafe;
use time::OffsetDateTime;
use tonic::{Code, transport::Channel};

use super::check::check;
use crate::{
    address_book::{email, numbered, request},
    harness::{TestServer, http_client, with_key},
};

/// The addresses on all pages of a list, and the total of each page.
pub(super) async fn pages(
    client: &mut DncServiceClient<Channel>,
    key: &str,
    filter: &EntryFilter,
    page_size: i32,
) -> (Vec<String>, Vec<i64>) {
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
async fn the_secret_of_page_tokens_is_that_of_the_database() {
    let server = TestServer::start().await;
    let stored: Vec<u8> = sqlx::query_scalar("SELECT secret FROM secrets WHERE name = 'page_token'")
        .fetch_one(&mut server.connection().await)
        .await
        .unwrap();
    assert!(stored.len() >= 32);
    assert_eq!(server.store.page_token_secret().await.unwrap(), stored);
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
