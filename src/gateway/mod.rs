//! HTTP/JSON in front of the gRPC API, as a client of it. Only this module uses axum.
//!
//! The gateway has no rules of its own. It turns a request into messages, sends the caller's
//! credentials along, and turns the answer or status into a response. The message stream of a call
//! reads the body, so a body is read only after the service has admitted the caller: a refused call
//! is refused before its body is read. A fault in a JSON body breaks the stream off before anything
//! of the body is stored.

mod answers;
mod assets;
mod body;
mod call;
mod discard;
mod error;
mod files;
mod handlers;
mod logs;
mod openapi;
mod query;
mod requests;
mod spool;
mod upstream;
mod whole;

use std::{panic::AssertUnwindSafe, sync::Arc};

use axum::{
    Router,
    body::Body,
    extract::{MatchedPath, Request, State},
    handler::Handler,
    http::{HeaderValue, Method, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{MethodRouter, delete, get, post},
};
use futures_util::FutureExt;
use tokio::time::Instant;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument;

pub use self::error::unreadable;
pub use self::upstream::{UPSTREAM_CALLS_MAX, UPSTREAM_CONNECTIONS_MAX, Upstream};
use self::{
    error::Problem,
    handlers::{
        add_entries, check_entries, check_entry, delete_entries, export_entries, import_entries, list_entries, ok, readyz,
        summarize_entries,
    },
    whole::Bodies,
};
use crate::{
    telemetry::{self, metrics},
    wire::{budget::Budget, running::Running},
};

#[derive(Clone)]
struct Gateway {
    upstream: Upstream,
    bodies: Bodies,
}

/// The router of all HTTP calls, in front of `upstream`.
///
/// A JSON body may have up to `json_body_bytes_max` bytes, decompressed; the memory it needs is
/// counted in `work`. `requests` counts the calls that run. Once `draining` is cancelled, all calls
/// but `/healthz` are refused with 503.
pub fn router(
    upstream: Upstream,
    json_body_bytes_max: usize,
    work: Budget,
    requests: TaskTracker,
    draining: CancellationToken,
) -> Router {
    (routes().into_iter())
        .fold(Router::new(), |router, (_, path, handler)| router.route(path, handler))
        .route("/", assets::file("text/html; charset=utf-8", include_bytes!("page/index.html")))
        .route("/page.css", assets::file("text/css; charset=utf-8", include_bytes!("page/page.css")))
        .route("/page.js", assets::file("text/javascript; charset=utf-8", include_bytes!("page/page.js")))
        .route("/docs", assets::file("text/html; charset=utf-8", include_bytes!("docs/index.html")))
        .route("/docs/docs.js", assets::file("text/javascript; charset=utf-8", include_bytes!("docs/docs.js")))
        .route(
            "/docs/swagger-ui-bundle.js",
            assets::gzipped("text/javascript; charset=utf-8", include_bytes!(concat!(env!("OUT_DIR"), "/swagger-ui-bundle.js.gz"))),
        )
        .route(
            "/docs/swagger-ui.css",
            assets::gzipped("text/css; charset=utf-8", include_bytes!(concat!(env!("OUT_DIR"), "/swagger-ui.css.gz"))),
        )
        .fallback(async || Problem::not_found())
        .method_not_allowed_fallback(async || Problem::method_not_allowed())
        .with_state(Arc::new(Gateway { upstream, bodies: Bodies::new(json_body_bytes_max, work) }))
        .layer(middleware::from_fn_with_state(
            Shared { requests, draining, discard_slots: discard::DiscardSlots::default() },
            wrap_request,
        ))
}

type Route = (Method, &'static str, MethodRouter<Arc<Gateway>>);

fn route<H: Handler<T, Arc<Gateway>>, T: 'static>(method: Method, path: &'static str, handler: H) -> Route {
    let handler = match method {
        Method::POST => post(handler),
        Method::DELETE => delete(handler),
        _ => get(handler),
    };
    (method, path, handler)
}

/// All calls, without the files of the pages. The OpenAPI document has these, and no others.
fn routes() -> Vec<Route> {
    vec![
        route(Method::POST, "/v1/dnc/import", import_entries),
        route(Method::POST, "/v1/dnc", add_entries),
        route(Method::GET, "/v1/dnc", list_entries),
        route(Method::DELETE, "/v1/dnc", delete_entries),
        route(Method::POST, "/v1/dnc/check", check_entries),
        route(Method::GET, "/v1/dnc/check", check_entry),
        route(Method::GET, "/v1/dnc/export", export_entries),
        route(Method::GET, "/v1/dnc/summary", summarize_entries),
        route(Method::GET, "/v1/dnc/imports", logs::list_imports),
        route(Method::GET, "/v1/dnc/deletions", logs::list_deletions),
        route(Method::GET, "/healthz", async || ok(serde_json::json!({ "status": "alive" }))),
        route(Method::GET, "/readyz", readyz),
        (Method::GET, "/openapi.json", assets::file("application/json", openapi::DOCUMENT.as_bytes())),
    ]
}

/// What all requests share.
#[derive(Clone)]
struct Shared {
    requests: TaskTracker,
    draining: CancellationToken,
    discard_slots: discard::DiscardSlots,
}

/// Gives every request a trace id, a span with a log line at its end, and an answer in the
/// documented error form even when a handler panics.
async fn wrap_request(
    State(Shared { requests, draining, discard_slots }): State<Shared>,
    mut request: Request,
    next: Next,
) -> Response {
    let running = requests.token();
    let trace_id = telemetry::request_id(request.headers());
    // The route and not the path is logged: a query or a mistyped path may contain an address or a
    // key.
    let route = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str).to_owned();
    let mut measured = metrics::HttpRequest::begin(request.method(), route.clone());
    let span = tracing::info_span!(
        "http",
        method = %request.method(),
        route,
        request_id = trace_id.to_str().unwrap_or_default(),
    );
    telemetry::continue_trace(&span, request.headers());
    request.headers_mut().insert(telemetry::REQUEST_ID, trace_id.clone());
    let started = Instant::now();
    async move {
        let request = discard_slots.wrap(request);
        let mut response = if draining.is_cancelled() && request.uri().path() != "/healthz" {
            Problem::draining().into_response()
        } else {
            let answer = AssertUnwindSafe(next.run(request)).catch_unwind().await;
            answer.unwrap_or_else(|_| Problem::internal().into_response())
        };
        measured.ends_with(response.status());
        tracing::info!(status = response.status().as_u16(), elapsed_ms = started.elapsed().as_millis() as u64, "request");
        let headers = response.headers_mut();
        headers.insert(telemetry::REQUEST_ID, trace_id);
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        // An answer is for one workspace only, and a cache between does not know the key. Readiness
        // is true only now.
        headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
        // The request counts as running until the end of its answer has been read.
        response.map(|body| Body::new(Running::new(body, (running, measured))))
    }
    .instrument(span)
    .await
}
