//! Files that are embedded in the program and served as they are: the page for people, and the
//! documentation. Nothing here reads the disk, and nothing here needs a key.
//!
//! A browser asks each time whether its copy is still good (`no-cache` and an ETag), so that a page
//! never runs with the script of another release.

use std::{
    io::Read,
    sync::{Arc, OnceLock},
};

use axum::{
    body::{Body, Bytes},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{MethodRouter, get},
};
use flate2::read::GzDecoder;
use sha2::{Digest, Sha256};

use super::error::Problem;

/// What an HTML page may do: load scripts, styles and images from this server, and call it. Nothing
/// comes from elsewhere, nothing inline is run, and no other site may show the page in a frame.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
                           form-action 'none'; base-uri 'none'; frame-ancestors 'none'";

/// The route of a file: answers GET and HEAD with `bytes`, or with 304 if the caller has them
/// already.
pub(super) fn file<S: Clone + Send + Sync + 'static>(content_type: &'static str, bytes: &'static [u8]) -> MethodRouter<S> {
    let headers = headers(content_type, bytes);
    get(async move |request: HeaderMap| answer(&request, headers, bytes))
}

/// The route of a file that is embedded as the gzip file `gzip`. A caller that takes no gzip gets
/// it decompressed.
pub(super) fn gzipped<S: Clone + Send + Sync + 'static>(content_type: &'static str, gzip: &'static [u8]) -> MethodRouter<S> {
    let mut headers = headers(content_type, gzip);
    headers.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
    let mut as_gzip = headers.clone();
    as_gzip.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    // The two forms are told apart by their ETags.
    headers.insert(header::ETAG, etag(&[gzip, b"decompressed"]));
    // Decompressed once, and shared by all answers.
    let decompressed = Arc::new(OnceLock::<Bytes>::new());
    get(async move |request: HeaderMap| {
        if takes_gzip(&request) {
            return answer(&request, as_gzip, gzip);
        }
        if decompressed.get().is_none() {
            let mut bytes = Vec::new();
            if GzDecoder::new(gzip).read_to_end(&mut bytes).is_err() {
                return Problem::internal().into_response();
            }
            let _ = decompressed.set(bytes.into());
        }
        answer(&request, headers, decompressed.get().cloned().unwrap_or_default())
    })
}

fn headers(content_type: &'static str, bytes: &[u8]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::ETAG, etag(&[bytes]));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    if content_type.starts_with("text/html") {
        headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(PAGE_POLICY));
        headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    }
    headers
}

fn etag(parts: &[&[u8]]) -> HeaderValue {
    let hash = parts.iter().fold(Sha256::new(), |hash, part| hash.chain_update(part)).finalize();
    let hash: String = hash[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    HeaderValue::try_from(format!("\"{hash}\"")).expect("hexadecimal digits are a header's value")
}

fn answer(request: &HeaderMap, headers: HeaderMap, body: impl Into<Body>) -> Response {
    if has(request, &headers[header::ETAG]) {
        (StatusCode::NOT_MODIFIED, headers).into_response()
    } else {
        (headers, body.into()).into_response()
    }
}

fn takes_gzip(request: &HeaderMap) -> bool {
    let lists = request.get_all(header::ACCEPT_ENCODING).iter().filter_map(|list| list.to_str().ok());
    let mut codings = lists.flat_map(|list| list.split(',')).map(|coding| coding.replace(' ', "").to_ascii_lowercase());
    codings.any(|coding| {
        coding
            .strip_prefix("gzip")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(";q=") && rest.contains(|c| ('1'..='9').contains(&c)))
    })
}

/// Whether the caller's copy is the one of this ETag.
fn has(request: &HeaderMap, etag: &HeaderValue) -> bool {
    let lists = request.get_all(header::IF_NONE_MATCH).iter().filter_map(|list| list.to_str().ok());
    lists.flat_map(|list| list.split(',')).map(str::trim).any(|tag| tag == "*" || tag.trim_start_matches("W/") == etag)
}
