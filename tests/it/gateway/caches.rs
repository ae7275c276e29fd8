//! A shared cache in front of the gateway: Varnish, with the rules it comes with.

use std::{
    io::Write,
    net::{SocketAddr, TcpListener},
    path::Path,
    process::{Child, Command, Stdio},
};

use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{TestServer, http_client, until};

/// A running Varnish, which is killed when this is dropped.
struct Varnish {
    child: Child,
    url: String,
    _dir: tempfile::TempDir,
}

impl Varnish {
    /// Starts a Varnish in front of `service`; requests to the host `control` go to `control`.
    /// `None` without Varnish on this machine.
    async fn start(service: &str, control: SocketAddr) -> Option<Self> {
        let program = Path::new("/usr/sbin/varnishd");
        if !program.exists() {
            // Not by a macro: what those print in a test that passes is not shown.
            let _ = writeln!(std::io::stderr(), "SKIPPED: varnishd is not installed; no shared cache is tried");
            return None;
        }
        let service: SocketAddr = service.trim_start_matches("http://").parse().unwrap();
        let backend =
            |name: &str, at: SocketAddr| format!("backend {name} {{ .host = \"{}\"; .port = \"{}\"; }}", at.ip(), at.port());
        let rules = [
            "vcl 4.1;".to_owned(),
            backend("default", service),
            backend("control", control),
            // The rules that Varnish comes with follow these.
            "sub vcl_recv { if (req.http.host == \"control\") { set req.backend_hint = control; } }".to_owned(),
        ];
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rules.vcl");
        std::fs::write(&file, rules.join("\n")).unwrap();
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let child = Command::new(program)
            .arg("-F")
            .arg("-n")
            .arg(dir.path().join("work"))
            .args(["-j", "none", "-s", "malloc,16m", "-a", &address.to_string(), "-f"])
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let varnish = Self { child, url: format!("http://{address}"), _dir: dir };
        until("Varnish answers", || async { http_client().get(&varnish.url).send().await.is_ok() }).await;
        Some(varnish)
    }
}

impl Drop for Varnish {
    fn drop(&mut self) {
        // Its child, which serves, ends with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// True for an answer that Varnish had kept: its header also names the request that fetched it.
fn is_cached(response: &reqwest::Response) -> bool {
    response.headers()["x-varnish"].to_str().unwrap().split_ascii_whitespace().count() == 2
}

/// A server whose answers have no header about caching.
async fn uncommented() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = [0; 4096];
                while let Ok(1..) = socket.read(&mut request).await {
                    let _ = socket.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn a_shared_cache_keeps_no_answer() {
    let server = TestServer::start().await;
    let Some(varnish) = Varnish::start(&server.http_url, uncommented().await).await else { return };
    let entries = json!({"entries": [{"email": "a@example.com"}]});
    assert_eq!(server.post(entries.to_string()).await.status(), 200);

    // It is a cache, and would keep an answer that does not forbid it.
    let control = || http_client().get(&varnish.url).header("host", "control").send();
    control().await.unwrap();
    assert!(is_cached(&control().await.unwrap()));

    let get = |path: &str, key: &str| http_client().get(format!("{}{path}", varnish.url)).header("x-api-key", key).send();
    let cases = [
        ("/v1/dnc", "/pagination/total", json!(1), json!(0)),
        ("/v1/dnc/summary", "/data/total", json!(1), json!(0)),
        ("/v1/dnc/check?email=a@example.com", "/data/suppressed", json!(true), json!(false)),
    ];
    for (path, field, ours, theirs) in cases {
        for (key, expected) in [(&server.key, &ours), (&server.other_key, &theirs), (&server.key, &ours)] {
            let response = get(path, key).await.unwrap();
            assert!(!is_cached(&response), "{path}");
            let body: Value = response.json().await.unwrap();
            assert_eq!(body.pointer(field), Some(expected), "{path}: {body}");
        }
    }
    for (path, status) in [("/v1/dnc/export", 200), ("/v1/nothing", 404), ("/healthz", 200), ("/readyz", 200), ("/nothing", 404)] {
        for key in [&server.key, &server.other_key] {
            let response = get(path, key).await.unwrap();
            assert_eq!(response.status(), StatusCode::from_u16(status).unwrap(), "{path}");
            assert!(!is_cached(&response), "{path}");
        }
    }
}
