//! Callers that stop reading their answer, and others that only read slowly.

use std::time::Duration;

use dnc::server::Ended;
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::{Message, bytes::Bytes};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use crate::harness::{TestServer, database};

/// Some megabytes of entries: more than lies in the buffers between the service and a caller.
async fn server_with_a_long_list() -> TestServer {
    let server = TestServer::start_with(&["--reader-idle-timeout-secs", "1"], &database().await).await;
    let fill = "INSERT INTO entries (workspace_id, address, reason, added_by)
                SELECT w, repeat('x', 60) || '@' || repeat('y', 60) || '.' || repeat('z', 60) || '.' || n || '.com', repeat('r', 60), 1
                FROM generate_series(1, 30000) n, (VALUES ($1), ($2)) AS workspaces (w)";
    let fill = sqlx::query(fill).bind(server.workspace.0).bind(server.other_workspace.0);
    fill.execute(&mut server.connection().await).await.unwrap();
    server
}

/// Sends a request over HTTP/2 on a connection of its own, whose streams have this window.
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
async fn an_answer_that_nobody_reads_is_given_up_and_a_slow_reader_gets_all_of_it() {
    let server = server_with_a_long_list().await;
    let export = Some(dnc::proto::ExportEntriesRequest::default().encode_to_vec());
    let check = Some(dnc::proto::CheckEntriesRequest { emails: vec!["a@example.com".into()] }.encode_to_vec());
    let unread = [
        send(&server.http_url, "/v1/dnc/export", &server.key, None, 65_535).await,
        send(&server.grpc_url, "/dnc.v1.DncService/ExportEntries", &server.key, export, 65_535).await,
        // Not a byte of the answer can be sent.
        send(&server.grpc_url, "/dnc.v1.DncService/CheckEntries", &server.key, check, 0).await,
    ];
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(16 << 10).unwrap();
    let address = server.http_url.split_once("//").unwrap().1;
    let mut http1 = socket.connect(address.parse().unwrap()).await.unwrap();
    let request = format!("GET /v1/dnc/export HTTP/1.1\r\nHost: x\r\nX-Api-Key: {}\r\n\r\n", server.key);
    http1.write_all(request.as_bytes()).await.unwrap();

    // Takes longer than a reader may take nothing.
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

    // No call is left that a drain would wait for.
    server.begin_stop();
    let ended = timeout(Duration::from_secs(30), server.ended()).await.expect("the answers were given up");
    assert_eq!(ended, Ended::Drained);
    // Whoever reads on finds the answer broken off and not ended.
    for answer in unread {
        assert!(answer.into_body().collect().await.is_err());
    }
    let mut rest = Vec::new();
    let read = http1.read_to_end(&mut rest).await;
    assert!(read.is_err() || !rest.ends_with(b"\r\n0\r\n\r\n"));
}
