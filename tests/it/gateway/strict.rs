//! Requests with unknown or invalid parts are refused with the names of the HTTP API. Also: the
//! headers for caches, and the rate-limit headers.

use reqwest::{Method, Response};
use serde_json::{Value, json};

use crate::{
    address_book,
    harness::{TestServer, database, error, http_client},
};

impl TestServer {
    async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Response {
        let mut request = http_client().request(method, format!("{}{path}", self.http_url)).header("x-api-key", &self.key);
        if let Some(body) = body {
            request = request.json(&body);
        }
        request.send().await.unwrap()
    }
}

#[tokio::test]
async fn every_answer_forbids_sniffing_and_caching() {
    let server = TestServer::start().await;
    let good = json!({"entries": [{"email": "a@example.com"}]});
    for (method, path, body, status) in [
        (Method::GET, "/healthz", None, 200),
        (Method::GET, "/readyz", None, 200),
        (Method::GET, "/nothing", None, 404),
        (Method::POST, "/v1/dnc/import", Some(good.clone()), 200),
        (Method::GET, "/v1/dnc", None, 200),
        (Method::GET, "/v1/dnc?limit=0", None, 400),
        (Method::GET, "/v1/dnc/export", None, 200),
        (Method::GET, "/v1/dnc/summary", None, 200),
        (Method::GET, "/v1/dnc/check?email=a@example.com", None, 200),
        (Method::GET, "/v1/nothing", None, 404),
        (Method::GET, "/v1", None, 404),
        (Method::PUT, "/v1/dnc", None, 405),
        (Method::DELETE, "/v1/dnc", Some(json!({"selectAll": true})), 200),
    ] {
        let response = server.call(method.clone(), path, body).await;
        assert_eq!(response.status().as_u16(), status, "{method} {path}");
        assert_eq!(response.headers()["x-content-type-options"], "nosniff", "{method} {path}");
        assert_eq!(response.headers()["cache-control"], "no-store", "{method} {path}");
    }
    let stranger = http_client().get(format!("{}/v1/dnc", server.http_url)).send().await.unwrap();
    assert_eq!(stranger.status(), 401);
    error(stranger).await;
}

#[tokio::test]
async fn a_deletion_with_an_unknown_or_invalid_part_deletes_nothing() {
    let server = TestServer::start().await;
    let entries = json!({"entries": [{"email": "a@example.com"}, {"email": "b.example", "type": "domain"}]});
    server.call(Method::POST, "/v1/dnc", Some(entries)).await;
    for (body, named) in [
        (json!({"selectAll": true, "serach": "nobody"}), "search"),
        (json!({"selectAll": true, "search": null}), "search"),
        (json!({"selectAll": true, "excludeIds": ["1"]}), "emails"),
        (json!({"selectAll": true, "validate_only": true}), "validateOnly"),
        (json!({"selectAll": true, "type": "email", "entryType": "email"}), "entryType"),
        (json!({"selectAll": true, "emails": ["a@example.com"]}), "selectAll"),
        (json!({"selectAll": false}), "selectAll"),
        (json!({"selectAll": false, "search": "a"}), "selectAll"),
        (json!({"emails": ["a@example.com"], "search": "a"}), "emails"),
        (json!({"emails": []}), "emails"),
        (json!({}), "selectAll"),
    ] {
        let response = server.call(Method::DELETE, "/v1/dnc", Some(body.clone())).await;
        assert_eq!(response.status(), 400, "{body}");
        let answer = error(response).await;
        assert!(answer["message"].as_str().unwrap().contains(named), "{body}: {answer}");
    }
    let response = server.call(Method::DELETE, "/v1/dnc?dryRun=true", Some(json!({"selectAll": true}))).await;
    assert_eq!(response.status(), 400);
    assert_eq!(server.count().await, 2);
    let response = server.call(Method::DELETE, "/v1/dnc", Some(json!({"selectAll": true, "entryType": "domain"}))).await;
    assert_eq!(response.json::<Value>().await.unwrap()["data"]["deleted"], 1);
    let response = server.call(Method::DELETE, "/v1/dnc", Some(json!({"selectAll": true}))).await;
    assert_eq!(response.json::<Value>().await.unwrap()["data"]["deleted"], 1);
}

#[tokio::test]
async fn a_query_with_an_unknown_or_repeated_parameter_does_nothing() {
    let server = TestServer::start().await;
    let good = json!({"entries": [{"email": "a@example.com"}]});
    let emails = json!({"emails": ["a@example.com"]});
    for (method, path, body, named) in [
        (Method::POST, "/v1/dnc/import?validate_only=true", Some(&good), "validateOnly"),
        (Method::POST, "/v1/dnc/import?dryRun=true", Some(&good), "validateOnly"),
        (Method::POST, "/v1/dnc?validateonly=true", Some(&good), "validateOnly"),
        (Method::POST, "/v1/dnc?%76alidate%5Fonly=true", Some(&good), "validateOnly"),
        (Method::GET, "/v1/dnc?serach=x", None, "search"),
        (Method::GET, "/v1/dnc?search=x&search=x", None, "search"),
        (Method::GET, "/v1/dnc/export?Format=ndjson", None, "format"),
        (Method::GET, "/v1/dnc/export?limit=5", None, "format"),
        (Method::GET, "/v1/dnc/check?emails=a@example.com", None, "email"),
        (Method::GET, "/v1/dnc/summary?type=email", None, "no parameters"),
        (Method::POST, "/v1/dnc/check?validateOnly=true", Some(&emails), "no parameters"),
    ] {
        let response = server.call(method.clone(), path, body.cloned()).await;
        assert_eq!(response.status(), 400, "{method} {path}");
        let answer = error(response).await;
        assert!(answer["message"].as_str().unwrap().contains(named), "{method} {path}: {answer}");
    }
    assert_eq!(server.count().await, 0, "nothing was stored");
    assert_eq!(server.call(Method::GET, "/healthz?cache=1", None).await.status(), 200);
    // A caller without a key only learns that it needs one.
    let stranger = http_client().get(format!("{}/v1/dnc?serach=x", server.http_url)).send().await.unwrap();
    assert_eq!(stranger.status(), 401);
}

#[tokio::test]
async fn errors_use_the_names_of_the_http_api() {
    let server = TestServer::start().await;
    let long = "x".repeat(300);
    for (path, field) in [
        ("/v1/dnc?cursor=nonsense".to_owned(), "cursor"),
        (format!("/v1/dnc?search={long}"), "search"),
        (format!("/v1/dnc?reason={long}"), "reason"),
        ("/v1/dnc?search=%20".to_owned(), "search"),
        ("/v1/dnc?limit=-1".to_owned(), "limit"),
        ("/v1/dnc?createdFrom=yesterday".to_owned(), "createdFrom"),
        ("/v1/dnc?createdTo=0000-01-01T00:00:00Z".to_owned(), "createdTo"),
        ("/v1/dnc?type=person".to_owned(), "type"),
    ] {
        let response = server.call(Method::GET, &path, None).await;
        assert_eq!(response.status(), 400, "{path}");
        let answer = error(response).await;
        assert!(answer["message"].as_str().unwrap().starts_with(&format!("{field}: ")), "{answer}");
        assert_eq!(answer["details"]["fields"][0]["field"], field);
        for word in ["page_token", "page token", "filter.", "options."] {
            assert!(!answer.to_string().contains(word), "{answer}");
        }
    }
    let request = server.post_request().header("idempotency-key", long).json(&json!({"entries": [{"email": "a@example.com"}]}));
    let answer = error(request.send().await.unwrap()).await;
    assert!(answer["message"].as_str().unwrap().starts_with("Idempotency-Key: "), "{answer}");
}

#[tokio::test]
async fn a_cursor_shows_no_address() {
    let server = TestServer::start().await;
    let entries = json!({"entries": [{"email": "someone@example.com"}, {"email": "zorro@example.com"}]});
    server.call(Method::POST, "/v1/dnc", Some(entries)).await;
    let page: Value = server.call(Method::GET, "/v1/dnc?limit=1", None).await.json().await.unwrap();
    let cursor = page["pagination"]["nextCursor"].as_str().unwrap();
    let hex: String = "someone".bytes().map(|byte| format!("{byte:02x}")).collect();
    assert!(!cursor.contains(&hex), "{cursor}");
    assert!(cursor.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)), "{cursor}");
    let next: Value = server.call(Method::GET, &format!("/v1/dnc?limit=1&cursor={cursor}"), None).await.json().await.unwrap();
    assert_eq!(next["data"][0]["email"], "zorro@example.com");
}

#[tokio::test]
async fn every_answer_to_a_counted_request_has_the_rate_limit_headers() {
    let server = TestServer::start_with(&["--requests-per-sec-max", "100"], &database().await).await;
    let good = json!({"entries": [{"email": "a@example.com"}]});
    for (method, path, body, status) in [
        (Method::POST, "/v1/dnc/import", Some(good), 200),
        (Method::POST, "/v1/dnc/import", Some(json!({"entries": [{"email": 5}]})), 400),
        (Method::POST, "/v1/dnc/import?x=1", Some(json!({})), 400),
        (Method::POST, "/v1/dnc/import", None, 415),
        (Method::POST, "/v1/dnc/check", Some(json!({"emails": []})), 400),
        (Method::DELETE, "/v1/dnc", Some(json!({"selectAll": null})), 400),
        (Method::GET, "/v1/dnc?limit=0", None, 400),
        (Method::GET, "/v1/dnc?cursor=nonsense", None, 400),
        (Method::GET, "/v1/dnc/export?format=xml", None, 400),
        (Method::GET, "/v1/dnc/export", None, 200),
    ] {
        let response = server.call(method.clone(), path, body).await;
        assert_eq!(response.status().as_u16(), status, "{method} {path}");
        for name in ["x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"] {
            assert!(response.headers().contains_key(name), "{method} {path} lacks {name}");
        }
    }
}

#[tokio::test]
async fn the_refusal_of_a_broken_file_says_how_much_is_stored() {
    let server = TestServer::start().await;
    let lines: String = address_book::numbered(0..60_000).map(|entry| entry.email + "\n").collect();
    let file = format!("email\n{lines}\"never closed\n{}", "x\n".repeat(60_000));
    let response = server.post_request().header("content-type", "text/csv").body(file).send().await.unwrap();
    assert_eq!(response.status(), 400);
    let answer = error(response).await;
    assert!(answer["message"].as_str().unwrap().starts_with("line 60002: "), "{answer}");
    assert_eq!(answer["details"]["imported"].as_i64().unwrap(), server.count().await, "{answer}");
}
