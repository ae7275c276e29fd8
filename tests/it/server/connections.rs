//! Clients without a key: they open connections and send nothing, a part of a request, or nonsense.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt;

use super::tls;
use crate::{
    address_book::{email, request},
    harness::{TestServer, http_client, process::Process, with_key},
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const EMPTY_SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

fn address(url: &str) -> &str {
    url.split_once("//").unwrap().1
}

async fn connection_that_sends(url: &str, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address(url)).await.unwrap();
    // The server may have closed it already, to make room for another one.
    let _ = stream.write_all(bytes).await;
    stream
}

/// Reads until the other side closes.
async fn read_all(mut stream: TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes).await;
    bytes
}

/// User and system time of a process, in clock ticks of 10 ms.
fn cpu_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(')').unwrap().1.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_connections_do_not_lock_others_out() {
    let server = TestServer::start().await;
    let mut command = Command::new("/bin/sh");
    // Each listener alone would need more descriptors than this limit allows.
    let command = command
        .args(["-c", r#"ulimit -n 320; exec "$0" serve --http-addr 127.0.0.1:0 --grpc-addr 127.0.0.1:0 --log-format json"#])
        .arg(env!("CARGO_BIN_EXE_dnc"))
        .env("DATABASE_URL", &server.database_url)
        .stderr(Stdio::piped());
    let process = Process::serving(command);
    let known = tonic::transport::Channel::from_shared(process.grpc_url.clone()).unwrap().connect().await.unwrap();
    let mut client = dnc::proto::dnc_service_client::DncServiceClient::new(known);
    let mut import =
        async |name: String| client.import_entries(with_key(tokio_stream::iter([request(vec![email(&name)])]), &server.key)).await;
    import("first@example.com".to_owned()).await.unwrap();

    let mut hostile = Vec::new();
    for round in 0..10 {
        for url in [&process.http_url, &process.grpc_url] {
            for bytes in [&b""[..], b"GET / HTTP/1.1\r\nhost: x\r\n", PREFACE, &[PREFACE, EMPTY_SETTINGS].concat()] {
                hostile.extend(join_all((0..10).map(|_| connection_that_sends(url, bytes))).await);
            }
        }
        import(format!("{round}@example.com")).await.expect("a known connection is served");
        let check = format!("{}/v1/dnc/check?email={round}@example.com", process.http_url);
        let answer = http_client().get(check).header("x-api-key", &server.key).send().await.expect("a new connection is served");
        assert_eq!(answer.status(), 200);
    }
    assert_eq!(hostile.len(), 800);
    let (before, since) = (cpu_ticks(process.id()), Instant::now());
    tokio::time::sleep(Duration::from_secs(1)).await;
    let used = cpu_ticks(process.id()) - before;
    assert!(used < since.elapsed().as_millis() as u64 / 20, "{used} ticks of CPU time without a request");
}

#[tokio::test]
async fn connections_without_a_request_are_closed() {
    let server = TestServer::start().await;
    let mut silent = Vec::new();
    for url in [&server.http_url, &server.grpc_url] {
        for bytes in
            [&b""[..], b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-", &PREFACE[..10], PREFACE, &[PREFACE, EMPTY_SETTINGS].concat()]
        {
            silent.push(connection_that_sends(url, bytes).await);
        }
    }
    // A connection whose only call needs no key is closed as well.
    silent.push(connection_that_sends(&server.http_url, b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").await);
    let closed = tokio::time::timeout(Duration::from_secs(60), join_all(silent.into_iter().map(read_all))).await;
    closed.expect("every connection was closed");
}

#[tokio::test]
async fn a_stalled_tls_handshake_is_ended() {
    let dir = tempfile::tempdir().unwrap();
    let server = tls::serve(dir.path(), &tls::self_signed()).await;
    // Connections that send nothing, and some that send only the beginning of a record.
    let silent = [
        connection_that_sends(&server.http_url, b"").await,
        connection_that_sends(&server.http_url, &[22, 3, 1, 2, 0, 1]).await,
        connection_that_sends(&server.grpc_url, b"").await,
        connection_that_sends(&server.grpc_url, &[22, 3, 1, 2, 0, 1]).await,
    ];
    let closed = tokio::time::timeout(Duration::from_secs(30), join_all(silent.into_iter().map(read_all))).await;
    closed.expect("every connection was closed");
}

#[tokio::test]
async fn an_unreadable_head_is_answered_in_the_documented_form() {
    let server = TestServer::start().await;
    let long = |bytes: usize| "x".repeat(bytes);
    let many: String = (0..200).map(|number| format!("x-{number}: y\r\n")).collect();
    for (head, status) in [
        ("nonsense\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1\r\nno colon\r\n\r\n".to_owned(), 400),
        ("GET /\u{7f} HTTP/1.1\r\n\r\n".to_owned(), 400),
        (format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", long(20_000)), 414),
        (format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", long(70_000)), 414),
        (format!("GET / HTTP/1.1\r\nhost: x\r\nx-y: {}\r\n\r\n", long(40_000)), 431),
        (format!("GET / HTTP/1.1\r\nhost: x\r\nx-y: {}\r\n\r\n", long(900_000)), 431),
        (format!("GET / HTTP/1.1\r\nhost: x\r\n{many}\r\n"), 431),
    ] {
        let mut stream = connection_that_sends(&server.http_url, head.as_bytes()).await;
        stream.shutdown().await.unwrap();
        let text = String::from_utf8(read_all(stream).await).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{status}: {text:?}"));
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
        let header =
            |name: &str| head.lines().find_map(|line| line.strip_prefix(&format!("{name}: "))).unwrap_or_default().to_owned();
        assert_eq!(header("content-type"), "application/json", "{head}");
        assert_eq!(header("x-content-type-options"), "nosniff");
        assert!(!header("x-request-id").is_empty());
        assert_eq!(header("content-length"), body.len().to_string());
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(body["code"], status);
        assert!(body["error"].is_string() && body["message"].is_string(), "{body}");
    }
}

#[tokio::test]
async fn an_unknown_method_or_service_is_answered_with_error_info() {
    let server = TestServer::start().await;
    for path in ["/some.Other/Thing", "/dnc.v1.DncService/Nothing", "/grpc.health.v1.Health/Nothing", "/nothing"] {
        let mut client = tonic::client::Grpc::new(server.channel().await);
        client.ready().await.unwrap();
        let codec = tonic_prost::ProstCodec::<HealthCheckRequest, HealthCheckRequest>::default();
        let call = client.unary(with_key(HealthCheckRequest::default(), &server.key), path.parse().unwrap(), codec);
        let status = call.await.unwrap_err();
        assert_eq!(status.code(), Code::Unimplemented, "{path}");
        assert_eq!(status.get_details_error_info().map(|info| info.reason).as_deref(), Some("UNIMPLEMENTED"), "{path}");
    }
}

#[tokio::test]
async fn health_watchers_share_one_probe() {
    let server = TestServer::start().await;
    let channels = join_all((0..4).map(|_| server.channel())).await;
    let mut watchers = Vec::new();
    for number in 0..200 {
        let mut health = HealthClient::new(channels[number % 4].clone());
        let mut watcher = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
        assert_eq!(watcher.message().await.unwrap().unwrap().status, 1);
        watchers.push(watcher);
    }
    let mut connection = server.connection().await;
    let mut transactions = async || {
        let sql = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()";
        sqlx::query_scalar::<_, i64>(sql).fetch_one(&mut connection).await.unwrap()
    };
    let (before, since) = (transactions().await, Instant::now());
    while since.elapsed() < Duration::from_secs(5) {
        tokio::time::sleep(Duration::from_millis(500)).await;
        transactions().await;
    }
    let made = transactions().await - before;
    // A probe is a few statements. The statements of this test count as well.
    assert!(made < 10 * since.elapsed().as_secs() as i64 + 60, "{made} transactions");
    server.begin_stop();
    for mut watcher in watchers {
        let ended = async { while let Ok(Some(_)) = watcher.message().await {} };
        tokio::time::timeout(Duration::from_secs(10), ended).await.expect("a drain ends the watch");
    }
}
