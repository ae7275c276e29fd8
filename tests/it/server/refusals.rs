//! A refusal reaches a client that writes its whole request before it reads the answer.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::Command,
    time::timeout,
};

use crate::harness::{TestServer, database};

/// The answer to a client that writes everything before it reads.
async fn write_then_read(server: &TestServer, head: &str, body: &[u8]) -> String {
    let mut socket = connect(server).await;
    let head = format!("{head}Host: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    socket.write_all(head.as_bytes()).await.expect("the head is accepted");
    socket.write_all(body).await.expect("the whole body is accepted");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.expect("the answer arrives");
    answer
}

async fn connect(server: &TestServer) -> TcpStream {
    TcpStream::connect(server.http_url.split_once("//").unwrap().1).await.unwrap()
}

#[tokio::test]
async fn a_refusal_reaches_a_client_that_writes_before_it_reads() {
    let server = TestServer::start_with(&["--requests-per-sec-max", "1"], &database().await).await;
    let key = format!("X-Api-Key: {}\r\n", server.key);
    let json = "Content-Type: application/json\r\n";
    let large = vec![b' '; 20 << 20];
    let unclosed = [b"email\n\"a@example.com\n".as_slice(), &b"b@example.com\n".repeat(1 << 20)].concat();
    for (head, body, status) in [
        (format!("POST /v1/dnc/import HTTP/1.1\r\n{json}"), &large, "401"),
        (format!("POST /v1/nothing HTTP/1.1\r\n{json}"), &large, "404"),
        (format!("PUT /v1/dnc HTTP/1.1\r\n{json}"), &large, "405"),
        (format!("POST /v1/dnc/import HTTP/1.1\r\n{json}X-Workspace-Id: ws_999999\r\n{key}"), &large, "403"),
        (format!("POST /v1/dnc/import HTTP/1.1\r\n{json}{key}"), &large, "413"),
        (format!("POST /v1/dnc/import HTTP/1.1\r\n{key}"), &large, "415"),
        (format!("POST /v1/dnc/import?x=1 HTTP/1.1\r\n{json}{key}"), &large, "400"),
        (format!("POST /v1/dnc/import HTTP/1.1\r\nContent-Type: text/csv\r\n{key}"), &unclosed, "400"),
        (format!("POST /v1/dnc/import HTTP/1.1\r\n{json}Content-Encoding: gzip\r\n{key}"), &large[..4 << 20].to_vec(), "400"),
    ] {
        let mut answer = write_then_read(&server, &head, body).await;
        // One call a second is admitted. The others are refused in the same way, as too many.
        while answer.starts_with("HTTP/1.1 429") && status != "429" {
            tokio::time::sleep(Duration::from_millis(100)).await;
            answer = write_then_read(&server, &head, body).await;
        }
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.ends_with('}'), "{head}: {answer}");
    }
}

#[tokio::test]
async fn the_connection_of_a_refused_request_can_be_used_again() {
    let server = TestServer::start().await;
    let mut socket = connect(&server).await;
    let body = vec![b' '; 4 << 20];
    let head = format!("POST /v1/dnc/import HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
    socket.write_all(head.as_bytes()).await.unwrap();
    socket.write_all(&body).await.unwrap();
    socket.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answers = String::new();
    socket.read_to_string(&mut answers).await.unwrap();
    assert!(answers.starts_with("HTTP/1.1 401") && answers.contains("HTTP/1.1 200"), "{answers}");
}

#[tokio::test]
async fn a_client_that_expects_100_continue_gets_only_its_refusal() {
    let server = TestServer::start().await;
    let mut socket = connect(&server).await;
    let head = "POST /v1/dnc/import HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1000000\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 401") && !answer.contains("100 Continue"), "{answer}");
}

#[tokio::test]
async fn the_discarded_part_of_a_body_is_limited() {
    let server = TestServer::start().await;
    let mut socket = connect(&server).await;
    socket.write_all(b"POST /v1/dnc/import HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n").await.unwrap();
    let piece = vec![b' '; 1 << 20];
    let mut pieces = 0;
    while let Ok(Ok(())) = timeout(Duration::from_secs(60), socket.write_all(&piece)).await {
        pieces += 1;
        assert!(pieces < 1_000, "the whole body was accepted");
    }
}

#[tokio::test]
async fn pythons_http_client_sees_the_refusal() {
    const SCRIPT: &str = "
import sys, urllib.request, urllib.error
request = urllib.request.Request(sys.argv[1] + '/v1/dnc/import', data=b' ' * (20 << 20), headers={'Content-Type': 'application/json'})
try:
    urllib.request.urlopen(request)
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
";
    let server = TestServer::start().await;
    let output = Command::new("python3").args(["-c", SCRIPT, &server.http_url]).output().await;
    let Ok(output) = output else { return eprintln!("skipped: python3 is not installed") };
    let seen = String::from_utf8_lossy(&output.stdout);
    assert!(seen.starts_with("401 {"), "{seen} {}", String::from_utf8_lossy(&output.stderr));
}
