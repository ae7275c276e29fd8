//! Idempotency keys of imports: a repeat gets the first answer again, and only one of several
//! runs.

use dnc::{
    domain::Fingerprint,
    proto::ImportOptions,
    store::{Claim, ImportId},
};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tonic::Code;

use crate::{
    address_book::{email, numbered, request, with_options},
    harness::{TestServer, until, with_key},
};

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
