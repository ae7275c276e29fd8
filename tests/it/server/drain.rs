//! The shutdown of a server: running imports finish, new calls are refused, and a second signal
//! ends everything at once.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use dnc::{
    proto::{CheckEntriesRequest, dnc_service_client::DncServiceClient},
    server::Ended,
};
use futures_util::StreamExt;
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::{
    address_book::{numbered, request},
    harness::{Flow, Proxy, TestServer, http_client, process::Process, until, with_key},
};

#[tokio::test]
async fn running_imports_finish_and_new_calls_are_refused() {
    let server = TestServer::start().await;
    let (send, running) = server.begin_import(&server.key).await;
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
    let (send, running) = server.begin_import(&server.key).await;
    send.send(request(numbered(0..20_001).collect())).await.unwrap();
    until("the import runs", || async { server.count().await == 20_000 }).await;
    server.begin_stop();
    server.stop_now();
    assert_eq!(server.ended().await, Ended::CutOff);
    running.abort();
}

fn serve(database_url: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dnc"));
    command.args(["serve", "--http-addr", "127.0.0.1:0", "--grpc-addr", "127.0.0.1:0", "--log-format", "json"]);
    command.env("DATABASE_URL", database_url).stderr(Stdio::piped());
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_the_process_whatever_hangs() {
    let server = TestServer::start().await;
    let link = Proxy::to(&server.database_url).await;
    let mut process = Process::serving(&mut serve(&link.url(&server.database_url)));
    let channel = tonic::transport::Channel::from_shared(process.grpc_url.clone()).unwrap().connect().await.unwrap();
    let (send, messages) = tokio::sync::mpsc::channel(1);
    let call = with_key(tokio_stream::wrappers::ReceiverStream::new(messages), &server.key);
    let running = tokio::spawn(async move { DncServiceClient::new(channel).import_entries(call).await });
    send.send(request(numbered(0..20_001).collect())).await.unwrap();
    until("the import runs", || async { server.count().await == 20_000 }).await;
    link.all(Flow::Stall);
    let get = || http_client().get(format!("{}/nothing", process.http_url)).send();
    process.signal("-TERM");
    until("it drains", || async { get().await.is_ok_and(|answer| answer.status() == 503) }).await;
    process.signal("-INT");
    let since = Instant::now();
    until("the process ends", || std::future::ready(process.try_wait().is_some())).await;
    assert!(since.elapsed() < Duration::from_secs(2), "took {:?}", since.elapsed());
    assert_eq!(process.try_wait().unwrap().code(), Some(1));
    assert!(running.await.unwrap().is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_nobody_reads_stops_nothing() {
    // A line of about 200 bytes for each call: more than a pipe of 64 KiB holds, and than may wait.
    const CALLS: usize = 11_000;
    let server = TestServer::start().await;
    let mut child = serve(&server.database_url).args(["--metrics-addr", "127.0.0.1:0"]).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let serving: serde_json::Value = loop {
        let mut line = String::new();
        log.read_line(&mut line).unwrap();
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        if line["message"] == "serving" {
            break line;
        }
    };
    let client = crate::harness::upstream(serving["grpc"].as_str().unwrap());
    let check = |key: &str| {
        let (mut client, call) = (client.clone(), with_key(CheckEntriesRequest { emails: vec!["a@example.com".into()] }, key));
        async move { client.check_entries(call).await.map_err(|status| status.code()) }
    };
    let refused = futures_util::stream::iter((0..CALLS).map(|_| check("no key"))).buffer_unordered(16);
    assert!(refused.all(async |answer| answer.is_err_and(|code| code == Code::Unauthenticated)).await);
    assert!(!check(&server.key).await.unwrap().into_inner().results[0].suppressed);
    let metrics = http_client().get(serving["metrics"].as_str().unwrap()).send().await.unwrap().text().await.unwrap();
    let dropped = metrics.lines().find_map(|line| line.strip_prefix("dnc_log_lines_dropped_total "));
    assert!(dropped.unwrap().parse::<u64>().unwrap() > 0);
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    until("the process ends", || std::future::ready(child.try_wait().unwrap().is_some())).await;
    assert!(child.wait().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_a_start_that_waits_for_its_database() {
    let server = TestServer::start().await;
    let link = Proxy::to(&server.database_url).await;
    link.all(Flow::Stall);
    let connections = link.made();
    let mut process = Process::starting(&mut serve(&link.url(&server.database_url)));
    until("it connects to the database", || std::future::ready(link.made() > connections)).await;
    process.signal("-TERM");
    let since = Instant::now();
    until("the process ends", || std::future::ready(process.try_wait().is_some())).await;
    assert!(since.elapsed() < Duration::from_secs(2), "took {:?}", since.elapsed());
    assert_eq!(process.try_wait().unwrap().code(), Some(1));
}
