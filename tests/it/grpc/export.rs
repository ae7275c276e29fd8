//! `ExportEntries`: complete, or broken off so that its reader notices.

use dnc::proto::{DeleteEntriesRequest, Entry, ExportEntriesRequest, SummarizeEntriesRequest};
use serde_json::Value;
use tonic::Code;

use super::check::check;
use crate::{
    address_book::{domain, email, numbered, request},
    harness::{Proxy, TestServer, database, http_client, until, with_key},
};

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
