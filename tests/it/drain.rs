//! The end of a server: running imports finish, new calls are told to go elsewhere, a second signal cuts everything off.

use dnc::server::Ended;
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::{
    address_book::{numbered, request},
    harness::{TestServer, http_client, until, with_key},
};

#[tokio::test]
async fn running_imports_finish_and_new_calls_are_refused() {
    let server = TestServer::start().await;
    let (send, messages) = tokio::sync::mpsc::channel(1);
    let mut client = server.client().await;
    let call = with_key(tokio_stream::wrappers::ReceiverStream::new(messages), &server.key);
    let running = tokio::spawn(async move { client.import_entries(call).await });
    send.send(request(numbered(0..20_001).collect())).await.unwrap();
    until("the import runs", || async { server.count().await == 20_000 }).await;
    let mut watch = HealthClient::new(server.channel().await);
    let mut watched = watch.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(watched.message().await.unwrap().unwrap().status, 1);

    server.begin_stop();
    assert_eq!(watched.message().await.unwrap().unwrap().status, 2, "not serving");
    let status = server.import(vec![request(vec![])]).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    let response = server.post(r#"{"entries":[{"email":"a@example.com"}]}"#).await;
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    assert_eq!(http_client().get(format!("{}/readyz", server.http_url)).send().await.unwrap().status(), 503);

    send.send(request(numbered(20_001..30_000).collect())).await.unwrap();
    drop(send);
    assert_eq!(running.await.unwrap().unwrap().into_inner().imported, 30_000);
    assert_eq!(server.ended().await, Ended::Drained);
}

#[tokio::test]
async fn a_second_signal_stops_at_once() {
    let server = TestServer::start().await;
    let (send, messages) = tokio::sync::mpsc::channel(1);
    let mut client = server.client().await;
    let call = with_key(tokio_stream::wrappers::ReceiverStream::new(messages), &server.key);
    let running = tokio::spawn(async move { client.import_entries(call).await });
    send.send(request(numbered(0..20_001).collect())).await.unwrap();
    until("the import runs", || async { server.count().await == 20_000 }).await;
    server.begin_stop();
    server.stop_now();
    assert_eq!(server.ended().await, Ended::CutOff);
    running.abort();
}
