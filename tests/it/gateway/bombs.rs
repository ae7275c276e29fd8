//! Bodies that are costly to read: small ones that decompress to large ones, and slow ones. They
//! are refused, and do not affect other callers.

use std::time::Duration;

use reqwest::Response;
use serde_json::{Value, json};
use sqlx::Connection;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, timeout},
};

use crate::harness::{TestServer, database, error, gzip, http_client, until, zstd};

/// The costliest bodies, each with its media type and encoding.
fn attacks() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let entries = |entry: &str, bytes: usize| format!("{{\"entries\":[{}]}}", vec![entry; bytes / entry.len()].join(","));
    let empty = entries("{}", 8 << 20);
    let short = entries("{\"email\":\"\"}", 8 << 20);
    let nested = "[".repeat(8 << 20);
    let long = format!("{{\"entries\":[{{\"email\":\"{}\"}}]}}", "x".repeat(8 << 20));
    let wide = entries(&format!("{{\"email\":\"{}@example.com\"}}", "x".repeat(800)), 8 << 20);
    let spaces = vec![b' '; 64 << 20];
    vec![
        ("application/json", "gzip", gzip(&spaces)),
        ("application/json", "zstd", zstd(&spaces)),
        ("application/json", "gzip", gzip(short.as_bytes())),
        ("application/json", "zstd", zstd(empty.as_bytes())),
        ("application/json", "identity", empty.into_bytes()),
        ("application/json", "identity", short.into_bytes()),
        ("application/json", "identity", nested.into_bytes()),
        ("application/json", "identity", long.into_bytes()),
        ("application/json", "identity", wide.into_bytes()),
        ("text/csv", "gzip", gzip(&[b"email\n".as_slice(), &[[b'a'; 63].as_slice(), b"\n"].concat().repeat(1 << 20)].concat())),
        ("application/x-ndjson", "zstd", zstd(&vec![b'\n'; 256 << 20])),
        ("application/x-ndjson", "gzip", gzip(b"").repeat(20_000)),
    ]
}

async fn post(server: &TestServer, key: &str, attack: &(&'static str, &'static str, Vec<u8>)) -> Response {
    let (media_type, encoding, body) = attack;
    let request = http_client().post(format!("{}/v1/dnc/import?validateOnly=true", server.http_url)).header("x-api-key", key);
    request.header("content-type", *media_type).header("content-encoding", *encoding).body(body.clone()).send().await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn costly_bodies_are_refused_and_stall_no_other_call() {
    let server = std::sync::Arc::new(TestServer::start().await);
    let mut attackers = JoinSet::new();
    for attack in attacks() {
        let server = server.clone();
        attackers.spawn(async move {
            let response = post(&server, &server.key, &attack).await;
            let status = response.status().as_u16();
            let allowed = [200, 400, 413, 503].contains(&status);
            assert!(allowed, "{} {}: {status}", attack.0, attack.1);
            if status != 200 {
                error(response).await;
            }
        });
    }
    let client = http_client();
    let mut slowest = Duration::ZERO;
    while !attackers.is_empty() {
        let started = Instant::now();
        assert_eq!(client.get(format!("{}/healthz", server.http_url)).send().await.unwrap().status(), 200);
        let check =
            client.get(format!("{}/v1/dnc/check?email=a@example.com", server.http_url)).header("x-api-key", &server.other_key);
        assert_eq!(check.send().await.unwrap().status(), 200, "another workspace is served");
        slowest = slowest.max(started.elapsed());
        while let Some(done) = attackers.try_join_next() {
            done.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(slowest < Duration::from_secs(10), "the slowest answer of /healthz and a check took {slowest:?}");
}

/// A post whose body is announced but not sent.
async fn stalled_post(server: &TestServer, key: &str, announced: usize) -> TcpStream {
    let mut socket = TcpStream::connect(server.http_url.split_once("//").unwrap().1).await.unwrap();
    let head = format!(
        "POST /v1/dnc/import HTTP/1.1\r\nHost: x\r\nX-Api-Key: {key}\r\nContent-Type: application/json\r\nContent-Length: {announced}\r\n\r\n"
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    socket
}

/// A JSON import of about `bytes` bytes.
fn entries(bytes: usize) -> String {
    let entries: Vec<Value> = (0..bytes / 32).map(|number| json!({"email": format!("user{number:07}@example.com")})).collect();
    json!({ "entries": entries }).to_string()
}

#[tokio::test]
async fn slow_bodies_block_neither_small_requests_nor_other_callers() {
    let server = TestServer::start().await;
    let mut slow = Vec::new();
    for _ in 0..4 {
        slow.push(stalled_post(&server, &server.key, 8 << 20).await);
    }
    let post = |key: String, body: String| {
        let request = http_client().post(format!("{}/v1/dnc/import", server.http_url)).header("x-api-key", key);
        request.header("content-type", "application/json").body(body).send()
    };
    let large = entries(200_000);
    // There may be room until the first slow body is in work.
    until("the share of the caller is used up", || async {
        let answer = post(server.key.clone(), large.clone()).await.unwrap();
        if answer.status() == 503 {
            assert!(answer.headers().contains_key("retry-after"));
            error(answer).await;
            return true;
        }
        false
    })
    .await;
    let small = json!({"entries": [{"email": "a@example.com"}]}).to_string();
    assert_eq!(post(server.key.clone(), small).await.unwrap().status(), 200);
    assert_eq!(post(server.other_key.clone(), large.clone()).await.unwrap().status(), 200);
    // A stalled body is refused in time, and its bytes are free again.
    for mut socket in slow {
        let mut answer = [0; 12];
        timeout(Duration::from_secs(60), socket.read_exact(&mut answer)).await.expect("an answer").unwrap();
        assert!([b"HTTP/1.1 408".as_slice(), b"HTTP/1.1 503"].contains(&answer.as_slice()));
    }
    assert_eq!(post(server.key.clone(), large).await.unwrap().status(), 200);
}

#[tokio::test]
async fn streamed_files_are_counted_and_refused_before_they_are_read() {
    // Room for four files, one for each caller.
    let server = TestServer::start_with(&["--work-bytes-max", "4194304"], &database().await).await;
    let begin = async |key: &str, media_type: &str| {
        let mut socket = TcpStream::connect(server.http_url.split_once("//").unwrap().1).await.unwrap();
        let head = format!(
            "POST /v1/dnc/import HTTP/1.1\r\nHost: x\r\nX-Api-Key: {key}\r\nContent-Type: {media_type}\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n\r\n"
        );
        socket.write_all(head.as_bytes()).await.unwrap();
        let mut answer = vec![0; 1_000];
        let length = timeout(Duration::from_secs(60), socket.read(&mut answer)).await.expect("an answer").unwrap();
        (socket, String::from_utf8_lossy(&answer[..length]).to_lowercase())
    };
    let (first, answer) = begin(&server.key, "text/csv").await;
    assert!(answer.starts_with("http/1.1 100"), "{answer}");
    let (_, answer) = begin(&server.key, "application/x-ndjson").await;
    assert!(answer.starts_with("http/1.1 503") && answer.contains("retry-after"), "{answer}");
    let (_, answer) = begin(&server.other_key, "application/x-ndjson").await;
    assert!(answer.starts_with("http/1.1 100"), "{answer}");
    drop(first);
    let (_, answer) = begin(&server.key, "text/csv").await;
    assert!(answer.starts_with("http/1.1 100"), "its bytes are free again: {answer}");
}

#[tokio::test]
async fn many_large_imports_at_once_are_all_stored() {
    let server = std::sync::Arc::new(TestServer::start().await);
    let mut posts = JoinSet::new();
    for number in 0..8 {
        let server = server.clone();
        posts.spawn(async move {
            let entries: Vec<Value> = (0..4_000)
                .map(|i| json!({"email": format!("user{number}-{i}@some-longer-name.example.com"), "reason": "bounce"}))
                .collect();
            let answer = server.post(json!({ "entries": entries }).to_string()).await;
            let status = answer.status();
            assert_eq!(status, 200, "{}", answer.text().await.unwrap());
        });
    }
    posts.join_all().await;
    assert_eq!(server.count().await, 32_000);
}

#[tokio::test]
async fn a_body_is_refused_before_it_is_read_when_too_much_is_in_work() {
    let server = TestServer::start_with(&["--work-bytes-max", "1048576"], &database().await).await;
    let mut connection = server.connection().await;
    let mut lock = connection.begin().await.unwrap();
    sqlx::query("LOCK TABLE entries").execute(&mut *lock).await.unwrap();
    let held = tokio::spawn(server.post_request().header("content-type", "application/json").body(entries(200_000)).send());
    let refused = async || {
        let mut socket = stalled_post(&server, &server.key, 200_000).await;
        let mut answer = vec![0; 1_000];
        let length = timeout(Duration::from_secs(60), socket.read(&mut answer)).await.expect("an answer").unwrap();
        String::from_utf8_lossy(&answer[..length]).into_owned()
    };
    // There may be room until the first body is in work.
    until("the share of the caller is used up", || async {
        let answer = refused().await.to_lowercase();
        answer.starts_with("http/1.1 503") && answer.contains("retry-after")
    })
    .await;
    lock.rollback().await.unwrap();
    let _ = held.await.unwrap().unwrap();
    assert_eq!(server.post(entries(200_000)).await.status(), 200);
}
