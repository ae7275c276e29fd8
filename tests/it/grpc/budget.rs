//! The memory that requests may use: counted before it is allocated, limited over all calls, and
//! shared between workspaces.

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use dnc::proto::{CheckEntriesRequest, DeleteEntriesRequest, Entry, ImportEntriesRequest, dnc_service_client::DncServiceClient};
use futures_util::{StreamExt, future::join_all, stream};
use http_body_util::{BodyExt, StreamBody};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tonic::{Code, Status, body::Body, transport::Channel};
use tonic_types::StatusExt;
use tower::ServiceExt;

use crate::{
    address_book::{email, numbered, request},
    harness::{TestServer, database, process::Process, with_key},
};

const IMPORT: &str = "/dnc.v1.DncService/ImportEntries";

/// A gRPC message with `bytes` as its content.
fn message(bytes: &[u8]) -> Vec<u8> {
    [&[0][..], &u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat()
}

/// A message of `count` empty entries.
fn empty_entries(count: usize) -> Vec<u8> {
    message(&[0x0a, 0x00].repeat(count))
}

fn whole(bytes: Vec<u8>) -> Body {
    let frame = http_body::Frame::data(prost::bytes::Bytes::from(bytes));
    Body::new(StreamBody::new(stream::iter([Ok::<_, Status>(frame)])))
}

/// A body that stalls after `bytes`.
fn unfinished(bytes: Vec<u8>) -> Body {
    let frame = http_body::Frame::data(prost::bytes::Bytes::from(bytes));
    Body::new(StreamBody::new(stream::iter([Ok::<_, Status>(frame)]).chain(stream::pending())))
}

/// Makes a call with this body, and returns its status.
async fn call(channel: Channel, path: &str, key: &str, body: Body) -> Status {
    let request =
        http::Request::post(path).header("content-type", "application/grpc").header("te", "trailers").header("x-api-key", key);
    let response = match channel.oneshot(request.body(body).unwrap()).await {
        Ok(response) => response,
        Err(error) => return Status::from_error(error.into()),
    };
    let (head, body) = response.into_parts();
    match Status::from_header_map(&head.headers) {
        Some(status) => status,
        None => match body.collect().await {
            Ok(body) => body.trailers().and_then(Status::from_header_map).unwrap_or_else(|| Status::unknown("no status")),
            Err(status) => status,
        },
    }
}

/// A server on the database of `server`, in a process of its own.
fn serving(server: &TestServer) -> Process {
    Process::serving(
        Command::new(env!("CARGO_BIN_EXE_dnc"))
            .args(["serve", "--http-addr", "127.0.0.1:0", "--grpc-addr", "127.0.0.1:0", "--log-format", "json"])
            .env("DATABASE_URL", &server.database_url)
            .stderr(Stdio::piped()),
    )
}

#[tokio::test]
async fn messages_with_too_many_entries_are_refused() {
    let server = TestServer::start().await;
    let status = call(server.channel().await, IMPORT, &server.key, whole(empty_entries(2_000_000))).await;
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert!(status.message().contains("100,000"), "{}", status.message());
    assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].field, "entries");
    let emails = vec![String::new(); 10_001];
    let mut client = server.client().await;
    let check = client.check_entries(with_key(CheckEntriesRequest { emails: emails.clone() }, &server.key)).await.unwrap_err();
    let delete = DeleteEntriesRequest { emails, ..DeleteEntriesRequest::default() };
    let delete = client.delete_entries(with_key(delete, &server.key)).await.unwrap_err();
    for status in [check, delete] {
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].field, "emails");
        assert!(status.message().starts_with("At most 10000"), "{}", status.message());
    }
    // The largest allowed number is accepted.
    let answer = server.import(vec![request(numbered(0..100_000).collect())]).await.unwrap();
    assert_eq!(answer.imported, 100_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_limited_whatever_is_sent() {
    let server = TestServer::start().await;
    let process = serving(&server);
    let channel = async || Channel::from_shared(process.grpc_url.clone()).unwrap().connect().await;
    let check = DncServiceClient::new(channel().await.unwrap());
    let small = CheckEntriesRequest { emails: vec!["a@example.com".to_owned()] };
    check.clone().check_entries(with_key(small.clone(), &server.other_key)).await.unwrap();
    let calls = join_all((0..50).map(|number| {
        let bytes = if number % 2 == 0 { empty_entries(2_000_000) } else { empty_entries(100_000) };
        let (key, channel) = (&server.key, &channel);
        async move { call(channel().await.unwrap(), IMPORT, key, whole(bytes)).await }
    }));
    let others = async {
        for _ in 0..20 {
            check.clone().check_entries(with_key(small.clone(), &server.other_key)).await.expect("another workspace is served");
        }
    };
    let (statuses, ()) = futures_util::join!(calls, others);
    for status in statuses {
        assert!(matches!(status.code(), Code::Ok | Code::InvalidArgument | Code::Unavailable), "{status:?}");
    }
    require_bounded_memory(&process);
}

/// The most memory that a server took is below the limit of the documentation.
fn require_bounded_memory(process: &Process) {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak_kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    println!("peak: {} MiB", peak_kib / 1024);
    assert!(peak_kib < 300_000, "{peak_kib} KiB");
}

/// 9,999 entries with long addresses and reasons: almost a batch that is stored.
fn long_entries(stream: usize) -> ImportEntriesRequest {
    let domain = vec!["d".repeat(60); 3].join(".");
    let entry = |number| {
        let email = email(format!("{:x<40}@{domain}.com", format!("{stream}-{number}-")));
        Entry { reason: format!("{number:0>64}"), ..email }
    };
    request((0..9_999).map(entry).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn imports_that_stall_before_they_are_stored_take_a_bounded_amount_of_memory() {
    let server = TestServer::start().await;
    let process = serving(&server);
    let channel = async || Channel::from_shared(process.grpc_url.clone()).unwrap().connect().await.unwrap();
    let mut stalled = tokio::task::JoinSet::new();
    for number in 0..100 {
        let (channel, key) = (channel().await, server.key.clone());
        stalled.spawn(async move {
            let body = message(&long_entries(number).encode_to_vec());
            call(channel, IMPORT, &key, unfinished(body)).await
        });
    }
    let other = with_key(stream::iter([request(numbered(0..10_000).collect())]), &server.other_key);
    let answer = DncServiceClient::new(channel().await).import_entries(other).await.expect("another workspace is served");
    assert_eq!(answer.into_inner().imported, 10_000);
    // An import for which there is no memory for too long is refused.
    let refused = stalled.join_next().await.unwrap().unwrap();
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    assert!(refused.get_details_retry_info().is_some());
    require_bounded_memory(&process);
    // What the others hold is free again when their callers are gone.
    stalled.shutdown().await;
    let again = with_key(stream::iter([long_entries(0)]), &server.key);
    let answer = DncServiceClient::new(channel().await).import_entries(again).await.unwrap();
    assert_eq!(answer.into_inner().imported, 9_999);
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_imports_take_no_more_than_they_need() {
    let server = TestServer::start().await;
    // As many begin as the memory of a workspace allows, if each took what a batch needs.
    let mut slow = tokio::task::JoinSet::new();
    for number in 0..60 {
        let (channel, key) = (server.channel().await, server.key.clone());
        let body = message(&request(numbered(number * 1_000..number * 1_000 + 500).collect()).encode_to_vec());
        slow.spawn(async move { call(channel, IMPORT, &key, unfinished(body)).await });
    }
    for entries in [1, 10_000] {
        let answer = server.import(vec![request(numbered(1_000_000..1_000_000 + entries).collect())]).await;
        answer.expect("slow imports leave room for others of their workspace");
    }
    assert!(slow.try_join_next().is_none(), "no slow import was refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn imports_that_share_little_memory_are_all_stored() {
    // Not even three ordinary batches fit into the quarter that a workspace may have.
    let server = TestServer::start_with(&["--import-bytes-max", "16777216"], &database().await).await;
    let answers = join_all((0..12).map(|stream| {
        let server = &server;
        async move {
            let entries: Vec<_> = numbered(stream * 25_000..(stream + 1) * 25_000).collect();
            server.import(entries.chunks(5_000).map(|part| request(part.to_vec())).collect()).await
        }
    }));
    for answer in answers.await {
        assert_eq!(answer.unwrap().imported, 25_000);
    }
    assert_eq!(server.count().await, 300_000);
}

#[tokio::test]
async fn a_workspace_that_uses_up_its_share_blocks_only_itself() {
    let server = TestServer::start_with(&["--work-bytes-max", "1048576"], &database().await).await;
    let begun = message(&[0; 300_000])[..1_000].to_vec();
    let stalled = tokio::spawn({
        let (channel, key) = (server.channel().await, server.key.clone());
        async move { call(channel, IMPORT, &key, unfinished(begun)).await }
    });
    // Once the stalled message has the whole share, the next one of its workspace is refused.
    let refused = tokio::time::timeout(Duration::from_secs(60), async {
        loop {
            match server.import(vec![request(numbered(0..1).collect())]).await {
                Ok(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(status) => return status,
            }
        }
    });
    let refused = refused.await.expect("the share is used up");
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    assert!(refused.get_details_retry_info().is_some());
    assert_eq!(refused.get_details_error_info().unwrap().reason, "UNAVAILABLE");
    let import = with_key(stream::iter([request(numbered(0..1).collect())]), &server.other_key);
    server.client().await.import_entries(import).await.expect("another workspace has its own share");
    // A stalled message is refused at its deadline, and its share is free again.
    let status = tokio::time::timeout(Duration::from_secs(60), stalled).await.expect("it has a deadline").unwrap();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    server.import(vec![request(numbered(0..1).collect())]).await.expect("the share is free again");
}

#[tokio::test]
async fn the_deadline_of_the_caller_holds() {
    let server = TestServer::start().await;
    // Not with tonic's client, which would end the call by itself.
    let io = tokio::net::TcpStream::connect(server.grpc_url.strip_prefix("http://").unwrap()).await.unwrap();
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(io));
    let (mut client, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::post(format!("{}{IMPORT}", server.grpc_url)).header("content-type", "application/grpc");
    let request = request.header("x-api-key", &server.key).header("grpc-timeout", "300m");
    let response = client.send_request(request.body(unfinished(Vec::new())).unwrap()).await.unwrap();
    let status = Status::from_header_map(response.headers()).unwrap();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert_eq!(status.get_details_error_info().unwrap().reason, "TIMEOUT");
}
