//! Callers that send or read slowly, or stop.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use dnc::{proto::Entry, server::Ended};
use futures_util::{Stream, StreamExt, stream};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::{Message, bytes::Bytes};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    runtime::Handle,
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    address_book::{email, request},
    harness::{Kind, TestServer, all_of, database, make_all, require_nothing_left, until, with_key},
};

/// A server with `entries` long entries on each of the two lists. An export of 3,000 of them is
/// larger than the buffers between the service and a reader over HTTP/2.
async fn server_with_long_lists(flags: &[&str], entries: i32) -> TestServer {
    let server = TestServer::start_with(flags, &database().await).await;
    let fill = "INSERT INTO entries (workspace_id, address, reason, added_by)
                SELECT w, repeat('x', 60) || '@' || repeat('y', 60) || '.' || repeat('z', 60) || '.' || n || '.com', repeat('r', 60), 1
                FROM generate_series(1, $3) n, (VALUES ($1), ($2)) AS workspaces (w)";
    let fill = sqlx::query(fill).bind(server.workspace.0).bind(server.other_workspace.0).bind(entries);
    fill.execute(&mut server.connection().await).await.unwrap();
    let count = "INSERT INTO entry_counts (workspace_id, part, entries) VALUES ($1, 0, $3), ($2, 0, $3)";
    let count = sqlx::query(count).bind(server.workspace.0).bind(server.other_workspace.0).bind(i64::from(entries));
    count.execute(&mut server.connection().await).await.unwrap();
    server
}

/// Sends a request over HTTP/2 on a new connection, whose streams have a window of `window_bytes`.
async fn send(url: &str, path: &str, key: &str, message: Option<Vec<u8>>, window_bytes: u32) -> http::Response<Incoming> {
    let socket = TcpStream::connect(url.split_once("//").unwrap().1).await.unwrap();
    let mut builder = http2::Builder::new(TokioExecutor::new());
    let (mut client, connection) = builder.initial_stream_window_size(window_bytes).handshake(TokioIo::new(socket)).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::builder().uri(format!("{url}{path}")).header("x-api-key", key);
    let request = match message {
        None => request.body(Full::new(Bytes::new())),
        Some(message) => {
            let length = u32::try_from(message.len()).unwrap().to_be_bytes();
            let body = [&[0][..], &length, &message].concat();
            request.method("POST").header("content-type", "application/grpc").body(Full::new(body.into()))
        }
    };
    let response = client.send_request(request.unwrap()).await.unwrap();
    assert_eq!(response.status(), 200);
    response
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unread_answer_is_given_up_and_a_slow_reader_gets_a_whole_one() {
    let server = server_with_long_lists(&["--reader-idle-timeout-secs", "1"], 30_000).await;
    let export = Some(dnc::proto::ExportEntriesRequest::default().encode_to_vec());
    let check = Some(dnc::proto::CheckEntriesRequest { emails: vec!["a@example.com".into()] }.encode_to_vec());
    let unread = [
        send(&server.http_url, "/v1/dnc/export", &server.key, None, 65_535).await,
        send(&server.grpc_url, "/dnc.v1.DncService/ExportEntries", &server.key, export, 65_535).await,
        // With this window, no byte of the answer can be sent.
        send(&server.grpc_url, "/dnc.v1.DncService/CheckEntries", &server.key, check, 0).await,
    ];
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(16 << 10).unwrap();
    let address = server.http_url.split_once("//").unwrap().1;
    let mut http1 = socket.connect(address.parse().unwrap()).await.unwrap();
    let request = format!("GET /v1/dnc/export HTTP/1.1\r\nHost: x\r\nX-Api-Key: {}\r\n\r\n", server.key);
    http1.write_all(request.as_bytes()).await.unwrap();

    // Reading all of it takes longer than a reader may be idle.
    let mut slow = send(&server.http_url, "/v1/dnc/export?format=ndjson", &server.other_key, None, 1 << 20).await;
    let (mut lines, mut frames) = (0, 0);
    while let Some(frame) = slow.frame().await {
        lines += frame.unwrap().data_ref().map_or(0, |data| data.iter().filter(|byte| **byte == b'\n').count());
        frames += 1;
        if frames % 40 == 0 {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    assert_eq!(lines, 30_000);

    // No call is left for a drain to wait for.
    server.begin_stop();
    let ended = timeout(Duration::from_secs(30), server.ended()).await.expect("the answers were given up");
    assert_eq!(ended, Ended::Drained);
    // A reader that continues sees the answer break, and not a regular end.
    for answer in unread {
        assert!(answer.into_body().collect().await.is_err());
    }
    let mut rest = Vec::new();
    let read = http1.read_to_end(&mut rest).await;
    assert!(read.is_err() || !rest.ends_with(b"\r\n0\r\n\r\n"));
}

/// Entries that are sent one by one until `stop`. `sent` counts them.
fn trickle(number: usize, stop: &CancellationToken, sent: &Arc<AtomicUsize>) -> impl Stream<Item = Entry> + Send + 'static {
    let sent = sent.clone();
    let entries = stream::iter(0..).then(move |entry| {
        let sent = sent.clone();
        async move {
            tokio::time::sleep(Duration::from_millis(200)).await;
            sent.fetch_add(1, Ordering::Relaxed);
            email(format!("{number}-{entry}@example.com"))
        }
    });
    entries.take_until(stop.clone().cancelled_owned())
}

/// Reads an export over HTTP/2 frame by frame, with pauses, and returns the number of its entries.
async fn read_slowly(server: Arc<TestServer>) -> usize {
    let mut answer = send(&server.http_url, "/v1/dnc/export?format=ndjson", &server.key, None, 65_535).await;
    let mut lines = 0;
    while let Some(frame) = answer.frame().await {
        lines += frame.unwrap().data_ref().map_or(0, |data| data.iter().filter(|byte| **byte == b'\n').count());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    lines
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_slow_streams_block_no_call_and_leave_nothing() {
    const ENTRIES: usize = 2_100;
    let server = Arc::new(server_with_long_lists(&[], ENTRIES as i32).await);
    for outcome in all_of(make_all(&server.upstream(), &server.other_key, 0..2)).await {
        outcome.require(tonic::Code::Ok);
    }
    let before = Handle::current().metrics().num_alive_tasks();

    let (stop, sent) = (CancellationToken::new(), Arc::new(AtomicUsize::new(0)));
    let (mut imports, mut exports) = (JoinSet::new(), JoinSet::new());
    let client = server.upstream();
    for number in 0..100 {
        let (mut client, key) = (client.clone(), server.key.clone());
        let messages = trickle(number, &stop, &sent).map(|entry| request(vec![entry]));
        imports.spawn(async move { client.import_entries(with_key(messages, &key)).await.unwrap().into_inner().imported });
    }
    for number in 100..120 {
        let lines =
            trickle(number, &stop, &sent).map(|entry| Ok::<_, std::io::Error>(format!("{{\"email\":\"{}\"}}\n", entry.email)));
        let post = server.post_request().header("content-type", "application/x-ndjson").body(reqwest::Body::wrap_stream(lines));
        imports.spawn(async move {
            let answer = post.send().await.unwrap().json::<serde_json::Value>().await.unwrap();
            answer["data"]["imported"].as_u64().unwrap_or_else(|| panic!("{answer}"))
        });
    }
    for _ in 0..80 {
        exports.spawn(read_slowly(server.clone()));
    }
    until("every import runs", || std::future::ready(sent.load(Ordering::Relaxed) > 300)).await;
    for number in 0..2 {
        for kind in [Kind::CheckOne, Kind::CheckMany, Kind::ImportOneBatch, Kind::List, Kind::Export] {
            let call = timeout(Duration::from_secs(10), kind.make(client.clone(), &server.other_key, 10 + number));
            call.await.expect("another workspace is served").unwrap();
        }
    }
    for lines in all_of(exports).await {
        assert!(lines >= ENTRIES, "{lines}");
    }
    stop.cancel();
    let imported: u64 = all_of(imports).await.into_iter().sum();
    assert_eq!(imported as usize, sent.load(Ordering::Relaxed));
    assert_eq!(server.count().await as usize, ENTRIES + imported as usize);

    drop(client);
    require_nothing_left(&server, 16).await;
    until("no task is left behind", || std::future::ready(Handle::current().metrics().num_alive_tasks() <= before)).await;
    let server = Arc::into_inner(server).unwrap();
    server.begin_stop();
    assert_eq!(timeout(Duration::from_secs(30), server.ended()).await.expect("no call is left"), Ended::Drained);
}
