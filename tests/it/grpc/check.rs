//! `CheckEntries`: which entry suppresses an address, and that nobody gets the answer to another's
//! question.

use dnc::proto::{CheckEntriesRequest, CheckResult, EntryType, dnc_service_client::DncServiceClient};
use tokio::task::JoinSet;
use tonic::Code;

use crate::{
    address_book::{domain, email, numbered, request},
    harness::{Proxy, TestServer, database, http_client, with_key},
};

pub(super) async fn check(server: &TestServer, emails: &[&str]) -> Vec<CheckResult> {
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
