//! The gateway: the import as it is documented, and the answers to every kind of invalid request.

use dnc::server::Bound;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_util::sync::CancellationToken;

use crate::harness::{Proxy, TestServer, database, error, gzip, http_client, options, until, zstd};

#[tokio::test]
async fn the_request_of_the_reference_is_answered_as_documented() {
    let server = TestServer::start().await;
    let body = json!({"entries": [
        {"email": "bounce1@example.com", "type": "email", "reason": "bounce"},
        {"email": "bounce2@example.com", "type": "email", "reason": "bounce"},
        {"email": "badcompany.com", "type": "domain", "reason": "manual"},
    ]});
    // The samples of the reference send both headers, `Authorization` with a placeholder.
    let request = server.post_request().header("authorization", "Bearer YOUR_API_TOKEN").json(&body);
    let response = request.try_clone().unwrap().send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "application/json");
    assert_eq!(response.text().await.unwrap(), r#"{"success":true,"data":{"imported":3,"skipped":0}}"#);
    let response = request.send().await.unwrap();
    assert_eq!(response.text().await.unwrap(), r#"{"success":true,"data":{"imported":0,"skipped":3}}"#);
}

#[tokio::test]
async fn rejected_entries_are_reported_and_the_rest_is_stored() {
    let server = TestServer::start().await;
    let body = json!({"entries": [{"email": "a@example.com"}, {"email": "bad"}, {"email": "b@example.com", "type": "person"}]});
    let response = server.post(body.to_string()).await;
    assert_eq!(response.status(), 200);
    let body: Value = response.json().await.unwrap();
    assert_eq!((&body["data"]["imported"], &body["data"]["failed"]), (&json!(1), &json!(2)));
    assert_eq!(body["data"]["errors"][0]["index"], 1);
    assert_eq!(body["data"]["errors"][1]["code"], "INVALID_TYPE");
    assert_eq!(server.rows(server.workspace).await[0].1, "import", "the documented default reason");
}

#[tokio::test]
async fn ten_thousand_entries_are_accepted_and_one_more_is_refused() {
    let server = TestServer::start().await;
    let body =
        |count: usize| json!({"entries": (0..count).map(|i| json!({"email": format!("u{i}@example.com")})).collect::<Vec<_>>()});
    let response = server.post(body(10_001).to_string()).await;
    assert_eq!(response.status(), 400);
    assert!(error(response).await["message"].as_str().unwrap().contains("entries: expected 1 to 10000 entries, got more"));
    assert_eq!(server.count().await, 0);
    let response = server.post(body(10_000).to_string()).await;
    assert_eq!(response.status(), 200);
    assert_eq!(server.count().await, 10_000);
}

#[tokio::test]
async fn an_invalid_request_is_refused_in_the_documented_form() {
    let server = TestServer::start().await;
    let good = r#"{"entries":[{"email":"a@example.com"}]}"#;
    let client = http_client();
    let url = |path: &str| format!("{}{path}", server.http_url);
    let key = server.key.as_str();

    let response = client.get(url("/nothing")).send().await.unwrap();
    assert_eq!(response.status(), 404);
    error(response).await;
    for method in [Method::GET, Method::PUT, Method::DELETE, Method::PATCH, Method::OPTIONS] {
        let response = client.request(method, url("/v1/dnc/import")).send().await.unwrap();
        assert_eq!(response.status(), 405);
        assert_eq!(response.headers()["allow"], "POST");
        error(response).await;
    }
    for (media_type, expected) in [
        (Some("application/json; charset=utf-8"), 200),
        (Some("Application/JSON"), 200),
        (Some("text/plain"), 415),
        (Some("application/x-www-form-urlencoded"), 415),
        (None, 415),
    ] {
        let mut request = server.post_request().body(good);
        if let Some(media_type) = media_type {
            request = request.header("content-type", media_type);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status().as_u16(), expected, "{media_type:?}");
        if expected != 200 {
            error(response).await;
        }
    }
    for (body, expected) in [
        ("{", "line 1"),
        (r#"{"entries":[{"email":"a@example.com"},{"email":1}]}"#, "entries[1].email: expected a string"),
        (r#"{"entries":[]}"#, "entries"),
        (r#"{}"#, "entries"),
    ] {
        let response = server.post(body).await;
        assert_eq!(response.status(), 400, "{body}");
        assert!(error(response).await["message"].as_str().unwrap().contains(expected), "{body}");
    }
    let response = server.post(vec![b'{', 0xff, 0xfe]).await;
    assert_eq!(response.status(), 400);
    error(response).await;
    let response = server.post(" ".repeat((8 << 20) + 1)).await;
    assert_eq!(response.status(), 413);
    error(response).await;
    // The same without a Content-Length.
    let endless = tokio_stream::iter((0..9).map(|_| Ok::<_, std::io::Error>(" ".repeat(1 << 20))));
    let response = server.post(reqwest::Body::wrap_stream(endless)).await;
    assert_eq!(response.status(), 413);
    for query in ["validateOnly=maybe", "validateOnly=", "validateOnly=true&validateOnly=true"] {
        let response = client
            .post(url(&format!("/v1/dnc/import?{query}")))
            .header("x-api-key", key)
            .json(&json!({"entries":[{"email":"a@b.de"}]}));
        let response = response.send().await.unwrap();
        assert_eq!(response.status(), 400, "{query}");
        assert!(error(response).await["message"].as_str().unwrap().contains("validateOnly"));
    }
    let rows = server.rows(server.workspace).await;
    assert_eq!(rows.len(), 1, "only the valid request was stored");
}

#[tokio::test]
async fn callers_are_authenticated_as_over_grpc() {
    let server = TestServer::start().await;
    let post = |headers: &[(&str, &str)]| {
        let mut request =
            http_client().post(format!("{}/v1/dnc/import", server.http_url)).json(&json!({"entries":[{"email":"a@b.de"}]}));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        async move { request.send().await.unwrap() }
    };
    let (ours, theirs) = (server.workspace.to_string(), server.other_workspace.to_string());
    let bearer = format!("bearer {}", server.key);
    for (headers, expected) in [
        (vec![], 401),
        (vec![("x-api-key", "sk_nonsense")], 401),
        (vec![("authorization", "Basic abc")], 401),
        (vec![("x-api-key", server.platform_key.as_str())], 400),
        (vec![("x-api-key", server.platform_key.as_str()), ("x-workspace-id", "nonsense")], 400),
        (vec![("x-api-key", server.platform_key.as_str()), ("x-workspace-id", &theirs)], 403),
        (vec![("x-api-key", server.platform_key.as_str()), ("x-workspace-id", "ws_987654")], 403),
        (vec![("x-api-key", server.key.as_str()), ("x-workspace-id", &theirs)], 403),
        (vec![("authorization", bearer.as_str())], 200),
        (vec![("x-api-key", server.platform_key.as_str()), ("x-workspace-id", &ours)], 200),
    ] {
        let response = post(&headers).await;
        assert_eq!(response.status().as_u16(), expected, "{headers:?}");
        assert_eq!(response.headers().contains_key("www-authenticate"), expected == 401);
        if expected != 200 {
            error(response).await;
        }
    }
}

#[tokio::test]
async fn a_refused_call_is_refused_before_its_body_is_read() {
    let server = TestServer::start().await;
    let address = server.http_url.split_once("//").unwrap().1;
    let mut socket = TcpStream::connect(address).await.unwrap();
    let head = "POST /v1/dnc/import HTTP/1.1\r\nHost: x\r\nX-Api-Key: nonsense\r\nContent-Type: text/nonsense\r\nContent-Length: 1000000\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    // No byte of the body is sent.
    let mut answer = vec![0; 12];
    socket.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, b"HTTP/1.1 401");
}

#[tokio::test]
async fn validate_only_stores_nothing() {
    let server = TestServer::start().await;
    let url = format!("{}/v1/dnc/import?validateOnly=true", server.http_url);
    let response = http_client()
        .post(url)
        .header("x-api-key", &server.key)
        .json(&json!({"entries":[{"email":"a@b.de"}]}))
        .send()
        .await
        .unwrap();
    assert_eq!(response.json::<Value>().await.unwrap()["data"], json!({"imported": 1, "skipped": 0}));
    assert_eq!(server.count().await, 0);
}

#[tokio::test]
async fn a_usable_trace_id_is_returned_and_an_unusable_one_is_replaced() {
    let server = TestServer::start().await;
    let get = |id: String| http_client().get(format!("{}/healthz", server.http_url)).header("x-request-id", id).send();
    assert_eq!(get("their-own.id_1".into()).await.unwrap().headers()["x-request-id"], "their-own.id_1");
    for unusable in ["two words".to_owned(), "x".repeat(129), String::new()] {
        let answer = get(unusable.clone()).await.unwrap();
        assert_ne!(answer.headers()["x-request-id"].to_str().unwrap(), unusable);
    }
}

#[tokio::test]
async fn entries_that_do_not_fit_one_message_are_still_one_transaction() {
    let server = TestServer::start().await;
    let reason = "ü".repeat(64);
    let entries: Vec<_> = (0..10_000)
        .map(|i| json!({"email": format!("{i:0>64}@{}.example.com", "a".repeat(63)), "reason": reason}))
        .chain([])
        .collect();
    let absurd = json!({"email": format!("{}@example.com", "x".repeat(4 << 20))});
    let response = server.post(json!({"entries": [absurd, {"email": "a@example.com"}]}).to_string()).await;
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["data"]["imported"], 1);
    assert_eq!(body["data"]["errors"][0]["code"], "INVALID_EMAIL");
    let response = server.post(json!({ "entries": entries }).to_string()).await;
    assert_eq!(response.json::<Value>().await.unwrap()["data"]["imported"], 10_000);
    let transactions: i64 = sqlx::query_scalar("SELECT count(DISTINCT xmin::text) FROM entries WHERE address LIKE '0%'")
        .fetch_one(&mut server.connection().await)
        .await
        .unwrap();
    assert_eq!(transactions, 1);
}

#[tokio::test]
async fn the_service_reports_a_lost_database_and_recovers() {
    let database_url = database().await;
    let link = Proxy::to(&database_url).await;
    let flags = ["--database-connect-timeout-secs", "1"];
    let server = TestServer::start_through(&flags, &database_url, &link.url(&database_url)).await;
    let get = |path: &str| http_client().get(format!("{}{path}", server.http_url)).send();
    let good = r#"{"entries":[{"email":"a@example.com"}]}"#;
    assert_eq!(get("/healthz").await.unwrap().status(), 200);
    assert_eq!(get("/readyz").await.unwrap().status(), 200);
    assert_eq!(server.post(good).await.status(), 200);
    link.cut();
    // Callers share a probe of the database, which may be up to a second old.
    until("the service is not ready", || async { get("/readyz").await.unwrap().status() == 503 }).await;
    let response = get("/readyz").await.unwrap();
    assert!(response.headers().contains_key("retry-after"));
    error(response).await;
    let response = server.post(good).await;
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    let body = error(response).await.to_string();
    assert!(!body.contains("sqlx") && !body.contains("pool"), "{body}");
    assert_eq!(get("/healthz").await.unwrap().status(), 200, "it is still alive");
    link.mend();
    until("the service is ready again", || async { get("/readyz").await.unwrap().status() == 200 }).await;
    assert_eq!(server.post(good).await.status(), 200);
}

#[tokio::test]
async fn a_gateway_alone_serves_a_service_in_another_process() {
    let server = TestServer::start().await;
    let channel = tonic::transport::Endpoint::from_shared(server.grpc_url.clone()).unwrap();
    let bound = Bound::gateway(channel, &options(&[]).http).await.unwrap();
    let url = bound.http_url();
    let stop = CancellationToken::new();
    tokio::spawn(bound.run(stop.clone().cancelled_owned(), std::future::pending()));
    let post = |key: &str, body: &'static str| {
        let request =
            http_client().post(format!("{url}/v1/dnc/import")).header("x-api-key", key).header("content-type", "application/json");
        request.body(body).send()
    };
    let response = post(&server.key, r#"{"entries":[{"email":"a@example.com"}]}"#).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.json::<Value>().await.unwrap()["data"]["imported"], 1);
    assert_eq!(post("nonsense", "{}").await.unwrap().status(), 401);
    let response = post(&server.key, r#"{"entries":[{"email":5}]}"#).await.unwrap();
    assert_eq!(response.status(), 400);
    error(response).await;
    assert_eq!(http_client().get(format!("{url}/readyz")).send().await.unwrap().status(), 200);
    server.begin_stop();
    server.ended().await;
    let response = post("sk_x", r#"{"entries":[{"email":"a@example.com"}]}"#).await.unwrap();
    assert_eq!(response.status(), 503);
    error(response).await;
}

#[tokio::test]
async fn compressed_bodies_are_decompressed_within_limits() {
    let server = TestServer::start().await;
    let post = |encoding: &'static str, media_type: &'static str, body: Vec<u8>| {
        let request = server.post_request().header("content-encoding", encoding).header("content-type", media_type).body(body);
        async move { request.send().await.unwrap() }
    };
    let lines = |from: u32| {
        let entries = crate::address_book::numbered(from..from + 30_000);
        "email\n".to_owned() + &entries.map(|entry| entry.email + "\n").collect::<String>()
    };
    let two_members = [gzip(lines(0).as_bytes()), gzip(lines(30_000).split_once('\n').unwrap().1.as_bytes())].concat();
    for (encoding, body) in [("gzip", two_members), ("ZSTD", zstd(lines(60_000).as_bytes())), ("identity", lines(90_000).into())] {
        let answer = post(encoding, "text/csv", body).await;
        assert_eq!(answer.status(), 200, "{encoding}");
        assert_eq!(answer.json::<Value>().await.unwrap()["data"]["failed"], Value::Null, "{encoding}");
    }
    assert_eq!(server.count().await, 120_000);
    let one = br#"{"entries":[{"email":"json@example.com"}]}"#;
    assert_eq!(post("gzip", "application/json", gzip(one)).await.json::<Value>().await.unwrap()["data"]["imported"], 1);

    // A JSON body is limited by its decompressed size, a file by the ratio of that to its
    // compressed size.
    let blank = vec![b'\n'; 64 << 20];
    let padded = [one.as_slice(), &vec![b' '; 9 << 20]].concat();
    let mut wide = zstd::stream::Encoder::new(Vec::new(), 3).unwrap();
    wide.window_log(27).unwrap();
    std::io::Write::write_all(&mut wide, &lines(0).repeat(20).into_bytes()).unwrap();
    let wide = wide.finish().unwrap();
    let broken = {
        let whole = gzip(lines(0).as_bytes());
        whole[..whole.len() / 2].to_vec()
    };
    for (encoding, media_type, body, status) in [
        ("gzip", "application/json", gzip(&padded), 413),
        ("gzip", "text/csv", gzip(&blank), 413),
        ("zstd", "application/x-ndjson", zstd(&blank), 413),
        ("zstd", "text/csv", wide, 400),
        ("gzip", "text/csv", broken, 400),
        ("gzip", "text/csv", b"not compressed at all".to_vec(), 400),
        ("zstd", "application/json", one.to_vec(), 400),
        ("br", "text/csv", b"email\n".to_vec(), 415),
        ("gzip, gzip", "text/csv", gzip(&gzip(b"email\n")), 415),
    ] {
        let answer = post(encoding, media_type, body).await;
        assert_eq!(answer.status(), status, "{encoding} {media_type}");
        if status == 415 {
            assert_eq!(answer.headers()["accept-encoding"], "gzip, zstd");
        }
        let body = error(answer).await;
        if (encoding, media_type, status) == ("zstd", "text/csv", 400) {
            assert!(body["message"].as_str().unwrap().contains("window"), "{body}");
        }
    }
}
