//! `ScrubEntries`: a mailing list of any length is answered in order, and no suppressed address is
//! reported as clear.

use std::time::Duration;

use dnc::{
    domain::{KeyOwner, Scope},
    proto::{CheckResult, Entry, ScrubEntriesRequest, ScrubEntriesResponse},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::{
    address_book::{domain, email, numbered, request},
    harness::{TestServer, with_key},
};

fn ask<const N: usize>(emails: [&str; N]) -> ScrubEntriesRequest {
    ScrubEntriesRequest { emails: emails.map(str::to_owned).to_vec() }
}

async fn begin(server: &TestServer, key: &str) -> (mpsc::Sender<ScrubEntriesRequest>, Streaming<ScrubEntriesResponse>) {
    let (send, messages) = mpsc::channel(1);
    let call = with_key(ReceiverStream::new(messages), key);
    (send, server.client().await.scrub_entries(call).await.unwrap().into_inner())
}

/// The verdicts of each message, one letter for each address: `s` for suppressed, `c` for clear,
/// `e` for a text that is not an address.
async fn verdicts(server: &TestServer, key: &str, messages: Vec<ScrubEntriesRequest>) -> Result<Vec<String>, Status> {
    let call = with_key(tokio_stream::iter(messages), key);
    let mut answers = server.client().await.scrub_entries(call).await?.into_inner();
    let mut seen = Vec::new();
    while let Some(answer) = answers.message().await? {
        let letter = |result: &CheckResult| match (&result.error, result.suppressed) {
            (Some(_), true) => 'e',
            (Some(_), false) => '!',
            (None, true) => 's',
            (None, false) => 'c',
        };
        seen.push(answer.results.iter().map(letter).collect());
    }
    Ok(seen)
}

#[tokio::test]
async fn each_message_is_answered_in_order() {
    let server = TestServer::start().await;
    let opted_out = Entry { reason: "bounce".into(), ..email("a@example.com") };
    server.import(vec![request(vec![opted_out, domain("blocked.com")])]).await.unwrap();
    let messages = vec![
        ask(["A@Example.com", "b@example.com", "nonsense@", "x@mail.blocked.com"]),
        ask([]),
        ask(["blocked.com", "example.com", ""]),
    ];
    assert_eq!(verdicts(&server, &server.key, messages.clone()).await.unwrap(), ["sces", "", "sce"]);
    assert_eq!(verdicts(&server, &server.other_key, messages).await.unwrap(), ["ccec", "", "cce"]);
    assert!(verdicts(&server, &server.key, vec![]).await.unwrap().is_empty());

    let (send, mut answers) = begin(&server, &server.key).await;
    // A message is answered while the request stream is still open.
    send.send(ask(["a@example.com"])).await.unwrap();
    let result = answers.message().await.unwrap().unwrap().results.remove(0);
    assert_eq!((result.email.as_str(), result.suppressed), ("a@example.com", true));
    let entry = result.entry.unwrap();
    assert_eq!((entry.email.as_str(), entry.reason.as_str()), ("a@example.com", "bounce"));
    drop(send);
    assert!(answers.message().await.unwrap().is_none());
}

#[tokio::test]
async fn a_long_list_is_answered_like_many_checks() {
    let server = TestServer::start().await;
    server.import(vec![request(numbered(0..20_000).filter(|entry| entry.email.contains("3@")).collect())]).await.unwrap();
    let emails: Vec<String> = numbered(0..20_000).map(|entry| entry.email).collect();
    let parts = |size: usize| emails.chunks(size).map(|part| ScrubEntriesRequest { emails: part.to_vec() }).collect();
    let expected: String = emails.iter().map(|email| if email.contains("3@") { 's' } else { 'c' }).collect();
    for size in [10_000, 700] {
        let seen = verdicts(&server, &server.key, parts(size)).await.unwrap();
        assert_eq!(seen.len(), emails.len().div_ceil(size));
        assert_eq!(seen.concat(), expected);
    }
}

#[tokio::test]
async fn a_message_that_is_too_large_or_too_late_ends_the_stream() {
    let server = TestServer::start_with(&["--stream-idle-timeout-secs", "1"], &crate::harness::database().await).await;
    let too_many = ScrubEntriesRequest { emails: vec!["a@example.com".to_owned(); 10_001] };
    let refused = verdicts(&server, &server.key, vec![too_many]).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("10000"), "{}", refused.message());

    let (send, mut answers) = begin(&server, &server.key).await;
    send.send(ask(["a@example.com"])).await.unwrap();
    assert!(answers.message().await.unwrap().is_some());
    assert_eq!(answers.message().await.unwrap_err().code(), Code::DeadlineExceeded);
}

#[tokio::test]
async fn a_revoked_key_gets_no_more_answers() {
    let server = TestServer::start().await;
    let (id, key) = server.store.issue_key(KeyOwner::Workspace(server.workspace), Scope::Write, "", None).await.unwrap();
    let (send, mut answers) = begin(&server, key.reveal()).await;
    send.send(ask(["a@example.com"])).await.unwrap();
    assert!(answers.message().await.unwrap().is_some());
    server.store.revoke_key(id).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(5), answers.message()).await.expect("the documented limit");
    assert_eq!(ended.unwrap_err().code(), Code::Unauthenticated);
}
