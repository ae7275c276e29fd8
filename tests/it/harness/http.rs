//! Bodies and answers over HTTP.

use reqwest::Response;
use serde_json::Value;

/// Asserts that an error has the documented form, and returns its body.
pub async fn error(response: Response) -> Value {
    let status = response.status();
    assert_eq!(response.headers()["content-type"], "application/json");
    assert!(response.headers().contains_key("x-request-id"));
    assert_eq!(response.headers()["x-content-type-options"], "nosniff");
    if response.url().path().starts_with("/v1/") {
        assert_eq!(response.headers()["cache-control"], "no-store");
    }
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["error"], status.canonical_reason().unwrap());
    assert_eq!(body["code"], status.as_u16());
    assert!(body["message"].as_str().unwrap().len() > 10);
    body
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    std::io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 3).unwrap()
}
