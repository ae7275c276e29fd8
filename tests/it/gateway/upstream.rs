//! A gateway in front of a server in another process. Its calls share connections to that server,
//! and must not block each other.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use dnc::server::Bound;
use futures_util::{StreamExt, stream};
use sqlx::{Connection, Executor};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::transport::Endpoint;

use crate::harness::{TestServer, database, http_client, options, until};

/// Starts a gateway in front of `server`, and returns its URL.
async fn gateway_of(server: &TestServer) -> String {
    let upstream = Endpoint::from_shared(server.grpc_url.clone()).unwrap();
    let bound = Bound::gateway(upstream, &options(&[]).http).await.unwrap();
    let url = bound.http_url();
    tokio::spawn(bound.run(std::future::pending(), std::future::pending()));
    url
}

#[tokio::test]
async fn a_refused_call_is_refused_before_its_body_is_read() {
    let server = TestServer::start_with(&["--requests-per-sec-max", "1000"], &database().await).await;
    let url = gateway_of(&server).await;
    let address = url.split_once("//").unwrap().1;
    let request = async |head: &str| {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(head.as_bytes()).await.unwrap();
        let mut answer = vec![0; 4_096];
        let length = tokio::time::timeout(Duration::from_secs(60), socket.read(&mut answer)).await.expect("an answer").unwrap();
        String::from_utf8_lossy(&answer[..length]).into_owned()
    };
    for (line, media_type) in [
        ("POST /v1/dnc/import", "application/json"),
        ("POST /v1/dnc/import", "text/csv"),
        ("POST /v1/dnc", "text/nonsense"),
        ("POST /v1/dnc/check", "application/json"),
        ("DELETE /v1/dnc", "application/json"),
        ("GET /v1/dnc?nonsense=1", "application/json"),
        ("GET /v1/dnc/export?nonsense=1", "application/json"),
    ] {
        let head = format!("{line} HTTP/1.1\r\nHost: x\r\nContent-Type: {media_type}\r\nContent-Length: 1000000\r\nX-Api-Key: ");
        // No byte of the body is sent, and a refused caller gets no `100 Continue`.
        let answer = request(&format!("{head}sk_nonsense\r\nExpect: 100-continue\r\n\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 401"), "{line}: {answer}");
        if line.starts_with("POST") {
            let answer = request(&format!("{head}{}\r\nExpect: 100-continue\r\n\r\n", server.key)).await;
            let expected = if media_type == "text/nonsense" { "HTTP/1.1 415" } else { "HTTP/1.1 100" };
            assert!(answer.starts_with(expected), "{line}: {answer}");
        }
    }
    // The refusal of an invalid request has the rate-limit headers as well.
    for path in ["/v1/dnc/export?nonsense=1", "/v1/dnc?nonsense=1"] {
        let answer = http_client().get(format!("{url}{path}")).header("x-api-key", &server.key).send().await.unwrap();
        assert_eq!(answer.status(), 400);
        assert!(answer.headers().contains_key("x-ratelimit-remaining"), "{path}");
    }
    let post = http_client().post(format!("{url}/v1/dnc/import")).header("x-api-key", &server.key);
    let answer = post.header("content-type", "application/json").body(r#"{"entries":[{"email":5}]}"#).send().await.unwrap();
    assert_eq!(answer.status(), 400);
    assert!(answer.headers().contains_key("x-ratelimit-remaining"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_imports_block_no_other_call() {
    let server = TestServer::start().await;
    let url = gateway_of(&server).await;
    // Writes wait for this lock, reads do not.
    let mut connection = server.connection().await;
    let mut lock = connection.begin().await.unwrap();
    lock.execute("LOCK TABLE entries IN EXCLUSIVE MODE").await.unwrap();
    let taken = Arc::new(AtomicUsize::new(0));
    let posts: Vec<_> = (0..8)
        .map(|post| {
            let taken = taken.clone();
            let lines = stream::iter(0..2_000).map(move |chunk| {
                taken.fetch_add(1, Ordering::Relaxed);
                Ok::<_, std::io::Error>(
                    (0..200).map(|line| format!("{{\"email\":\"{post}-{chunk}-{line}@example.com\"}}\n")).collect::<String>(),
                )
            });
            let request = http_client().post(format!("{url}/v1/dnc/import")).header("x-api-key", &server.key);
            let request = request.header("content-type", "application/x-ndjson").body(reqwest::Body::wrap_stream(lines));
            tokio::spawn(request.send())
        })
        .collect();
    let mut last = (0, Instant::now());
    until("the imports have stalled", || {
        let now = taken.load(Ordering::Relaxed);
        if now != last.0 {
            last = (now, Instant::now());
        }
        std::future::ready(now > 0 && last.1.elapsed() > Duration::from_secs(1))
    })
    .await;
    for _ in 0..8 {
        let check =
            http_client().get(format!("{url}/v1/dnc/check?email=a@example.com")).header("x-api-key", &server.other_key).send();
        let answer = tokio::time::timeout(Duration::from_secs(30), check).await.expect("another workspace's check is answered");
        assert_eq!(answer.unwrap().status(), 200);
    }
    for attempt in 1..=3 {
        let dry_run = http_client().post(format!("{url}/v1/dnc/import?validateOnly=true")).header("x-api-key", &server.other_key);
        let dry_run = dry_run.header("content-type", "application/json").body(r#"{"entries":[{"email":"a@example.com"}]}"#).send();
        let answer = tokio::time::timeout(Duration::from_secs(30), dry_run).await.expect("another workspace's import is answered");
        let status = answer.unwrap().status();
        // A machine that is busy with other tests may stall the database for some seconds.
        if status != 503 || attempt == 3 {
            assert_eq!(status, 200);
            break;
        }
    }
    for post in posts {
        post.abort();
    }
    lock.rollback().await.unwrap();
}
