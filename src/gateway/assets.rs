//! Files that are embedded in the program and served as they are: the page for people. Nothing here
//! reads the disk, and nothing here needs a key.
//!
//! A browser asks each time whether its copy is still good (`no-cache` and an ETag), so that a page
//! never runs with the script of another release.

use axum::{
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::IntoResponse,
    routing::{MethodRouter, get},
};
use sha2::{Digest, Sha256};

/// What an HTML page may do: load scripts, styles and images from this server, and call it. Nothing
/// comes from elsewhere, nothing inline is run, and no other site may show the page in a frame.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
                           form-action 'none'; base-uri 'none'; frame-ancestors 'none'";

/// The route of a file: answers GET and HEAD with `bytes`, or with 304 if the caller has them
/// already.
pub(super) fn file<S: Clone + Send + Sync + 'static>(content_type: &'static str, bytes: &'static [u8]) -> MethodRouter<S> {
    let hash: String = Sha256::digest(bytes)[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    let etag = HeaderValue::try_from(format!("\"{hash}\"")).expect("hexadecimal digits are a header's value");
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::ETAG, etag.clone());
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    if content_type.starts_with("text/html") {
        headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(PAGE_POLICY));
        headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    }
    get(
        async move |request: HeaderMap| {
            if has(&request, &etag) {
                (StatusCode::NOT_MODIFIED, headers).into_response()
            } else {
                (headers, bytes).into_response()
            }
        },
    )
}

/// Whether the caller's copy is the one of this ETag.
fn has(request: &HeaderMap, etag: &HeaderValue) -> bool {
    let lists = request.get_all(header::IF_NONE_MATCH).iter().filter_map(|list| list.to_str().ok());
    lists.flat_map(|list| list.split(',')).map(str::trim).any(|tag| tag == "*" || tag.trim_start_matches("W/") == etag)
}
