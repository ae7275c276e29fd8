//! Puts the rooms together: bind, run, drain.
//!
//! Binding is a step of its own, so that the caller knows the addresses before the first request.
//! Draining goes in this order: new calls are rejected as unavailable and health reports it,
//! running calls are finished, the HTTP side closes, then gRPC.
//!
//! Both sides are axum routers and are served by the same loop in `listener`, so the limits of
//! connections are written once.

mod connections;
mod listener;
mod metrics;
mod timed_body;
mod tls;
mod wire;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::bail;
use axum::{
    extract::{Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use rustix::process::{Resource, getrlimit};
use tokio::{sync::Semaphore, time::sleep};
use tokio_util::{
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker},
};
use tonic::{service::Routes, transport::Endpoint};

use self::{
    connections::Connections,
    listener::{Listener, Protocol},
    tls::Tls,
};
use crate::{
    config::{DatabaseLimits, HttpOptions, ServerOptions, TlsOptions},
    gateway::{self, Upstream},
    grpc::{self, DncService, StreamLimits, auth::Authenticator, guard::Guard, health, rate::Rate},
    proto::{self, dnc_service_server::DncServiceServer},
    store::{Store, StoreOptions},
    telemetry,
    wire::{budget::Budget, running::Running},
};

/// How long connections may take to close once no call is in work.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Open files kept for everything but connections and the database: logs, certificates, and
/// connections that are being replaced.
const FILES_SPARE: u64 = 128;

/// The most connections of one listener unless it is set. A connection takes up to about 100 KiB,
/// so these take about 100 MiB.
const CONNECTIONS_MAX: u64 = 1_024;

/// The most calls in work that need no key: health watchers and reflection.
const OPEN_CALLS_MAX: usize = 10_000;

/// The pause between two times at which each server deletes what is past its retention.
const CLEAR_INTERVAL: Duration = Duration::from_secs(60 * 60);

/// Creates the store of a server that reaches its database directly and has no replica. Connects
/// when it is first used.
///
/// # Errors
/// When the URL cannot be parsed.
pub fn store(database_url: &str, limits: &DatabaseLimits) -> Result<Store, crate::domain::Error> {
    Store::new(&store_options(database_url, limits))
}

/// The options of [`store`].
pub fn store_options(database_url: &str, limits: &DatabaseLimits) -> StoreOptions {
    StoreOptions {
        url: database_url.to_owned(),
        migrate_url: None,
        is_pooled: false,
        replica: None,
        connections_max: limits.database_connections_max,
        connect_timeout: Duration::from_secs(limits.database_connect_timeout_secs),
        statement_timeout: Duration::from_secs(limits.database_statement_timeout_secs),
    }
}

/// The limits of each stream, as the options of a server set them.
pub fn stream_limits(options: &ServerOptions) -> StreamLimits {
    StreamLimits {
        batch_entries_max: options.batch_entries_max as usize,
        batches_in_flight_max: options.batches_in_flight_max.into(),
        sort_bytes_max: options.import_sort_bytes_max,
        sort_rows_min: options.import_sort_rows_min,
        batch_bytes_max: options.import_bytes_max,
        idle_timeout: Duration::from_secs(options.stream_idle_timeout_secs),
    }
}

/// Listeners that are bound but do not accept yet.
#[derive(Debug)]
pub struct Bound {
    http: Listener,
    grpc: Option<Listener>,
    metrics: Option<Metrics>,
    draining: CancellationToken,
    calls: TaskTracker,
    drain_timeout: Duration,
    /// What clears the logs of the database, if there is one.
    clearing: Option<AbortOnDropHandle<()>>,
}

/// The listener of the metrics, and what keeps them up.
#[derive(Debug)]
struct Metrics {
    listener: Listener,
    keeping_up: AbortOnDropHandle<()>,
}

impl Metrics {
    fn bind(options: &HttpOptions, sources: metrics::Sources) -> anyhow::Result<Option<Self>> {
        let Some(address) = options.metrics_addr else { return Ok(None) };
        let handle = telemetry::metrics::install()?;
        let router = metrics::router(handle.clone(), sources);
        let places = Connections::new(metrics::CONNECTIONS_MAX, metrics::CONNECTIONS_MAX);
        let listener = Listener::bind(Protocol::Metrics, address, router, None, places, reader_timeout(options))?;
        Ok(Some(Self { listener, keeping_up: metrics::keep_up(handle) }))
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Every call was finished.
    Drained,
    /// Calls were cut off, by a second signal or because the drain timed out.
    CutOff,
}

impl Bound {
    /// Binds the service with both listeners.
    ///
    /// # Errors
    /// When an address is in use, the TLS files cannot be used, or keys would be sent over plain
    /// text.
    pub async fn service(store: Store, options: &ServerOptions) -> anyhow::Result<Self> {
        refuse_plaintext(&options.http.tls, "--grpc-addr", options.grpc_addr)?;
        refuse_plaintext(&options.http.tls, "--http-addr", options.http.http_addr)?;
        let draining = CancellationToken::new();
        let calls = TaskTracker::new();
        let clearing = AbortOnDropHandle::new(tokio::spawn(clear_logs(store.clone(), options.log_retention)));
        let auth = Arc::new(Authenticator::new(store.clone()));
        let service = DncServiceServer::new(DncService::new(store.clone(), auth.clone(), stream_limits(options)))
            .max_decoding_message_size(grpc::MESSAGE_BYTES_MAX);
        let guarded = Guard::new(service, auth, Rate::new(options.requests_per_sec_max), draining.clone(), calls.clone());
        let health = health::service(store.clone(), draining.clone());
        let budget = Budget::new(options.http.work_bytes_max);
        // The gateway gets the guarded service itself, without a socket between. Reflection is for
        // clients on the network.
        let upstream = Upstream::Here(Routes::new(guarded.clone()).add_service(health.clone()).prepare());
        let routes = Routes::new(guarded.with_budget(budget.clone()))
            .add_service(health)
            .add_service(reflection_v1()?)
            .add_service(reflection_v1alpha()?);
        let open_calls = Arc::new(Semaphore::new(OPEN_CALLS_MAX));
        let routes = (routes.into_axum_router())
            .layer(middleware::from_fn_with_state(open_calls, bound_open_calls))
            .layer(middleware::map_response(async |response: Response| {
                grpc::unimplemented(response.headers()).map_or(response, IntoResponse::into_response)
            }))
            .with_state(());

        let tls = Tls::of(&options.http.tls)?;
        let [grpc_places, http_places] =
            [(); 2].map(|()| places(&options.http, 2, options.database.database_connections_max.into()));
        let sources = metrics::Sources {
            store: Some(store),
            budget: budget.clone(),
            http: http_places.clone(),
            grpc: Some(grpc_places.clone()),
        };
        let metrics = Metrics::bind(&options.http, sources)?;
        let timeout = reader_timeout(&options.http);
        let grpc = Listener::bind(Protocol::Grpc, options.grpc_addr, routes, tls.as_ref(), grpc_places, timeout)?;
        let router = gateway::router(upstream, options.http.json_body_bytes_max, budget, calls.clone(), draining.clone());
        let http = Listener::bind(Protocol::Http, options.http.http_addr, router, tls.as_ref(), http_places, timeout)?;
        Ok(Self {
            http,
            grpc: Some(grpc),
            metrics,
            draining,
            calls,
            drain_timeout: Duration::from_secs(options.http.drain_timeout_secs),
            clearing: Some(clearing),
        })
    }

    /// Binds the HTTP side alone, in front of the service at `upstream`.
    ///
    /// # Errors
    /// When the address is in use, the TLS files cannot be used, or keys would be sent over plain
    /// text.
    pub async fn gateway(upstream: Endpoint, options: &HttpOptions) -> anyhow::Result<Self> {
        refuse_plaintext(&options.tls, "--http-addr", options.http_addr)?;
        let draining = CancellationToken::new();
        let calls = TaskTracker::new();
        let budget = Budget::new(options.work_bytes_max);
        let upstream = Upstream::elsewhere(upstream);
        let places = places(options, 1, gateway::UPSTREAM_CONNECTIONS_MAX as u64);
        let sources = metrics::Sources { store: None, budget: budget.clone(), http: places.clone(), grpc: None };
        let metrics = Metrics::bind(options, sources)?;
        let router = gateway::router(upstream, options.json_body_bytes_max, budget, calls.clone(), draining.clone());
        let tls = Tls::of(&options.tls)?;
        let http = Listener::bind(Protocol::Http, options.http_addr, router, tls.as_ref(), places, reader_timeout(options))?;
        Ok(Self {
            http,
            grpc: None,
            metrics,
            draining,
            calls,
            drain_timeout: Duration::from_secs(options.drain_timeout_secs),
            clearing: None,
        })
    }

    /// The URL of the HTTP side.
    pub fn http_url(&self) -> String {
        self.http.url()
    }

    /// The URL of the gRPC side; empty if there is none.
    pub fn grpc_url(&self) -> String {
        self.grpc.as_ref().map(Listener::url).unwrap_or_default()
    }

    /// The URL of the metrics; empty if they are not served.
    pub fn metrics_url(&self) -> String {
        self.metrics.as_ref().map(|metrics| format!("{}/metrics", metrics.listener.url())).unwrap_or_default()
    }

    /// Serves until `stop`. Then drains until every call is finished, the drain times out, or
    /// `stop_now`.
    ///
    /// # Errors
    /// When a listener fails.
    pub async fn run(self, stop: impl Future<Output = ()>, stop_now: impl Future<Output = ()>) -> anyhow::Result<Ended> {
        let mut http = self.http.serve();
        let mut grpc = self.grpc.map(Listener::serve);
        // Until the end, so that a drain can be watched.
        let _metrics = self.metrics.map(|metrics| (metrics.listener.serve(), metrics.keeping_up));
        let grpc_failed = async {
            match grpc.as_mut() {
                Some(grpc) => grpc.failed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop => {}
            failed = http.failed() => return Err(failed),
            failed = grpc_failed => return Err(failed),
        }
        tracing::info!(running = self.calls.len(), "draining");
        drop(self.clearing);
        self.draining.cancel();
        self.calls.close();
        tokio::pin!(stop_now);
        let ended = tokio::select! {
            () = self.calls.wait() => Ended::Drained,
            () = tokio::time::sleep(self.drain_timeout) => Ended::CutOff,
            () = &mut stop_now => Ended::CutOff,
        };
        if ended == Ended::Drained {
            let close = async {
                http.close(CLOSE_TIMEOUT).await;
                if let Some(grpc) = grpc {
                    grpc.close(CLOSE_TIMEOUT).await;
                }
            };
            // Every call is finished. A second signal only skips closing connections in order.
            tokio::select! {
                () = close => {}
                () = stop_now => {}
            }
        }
        tracing::info!(?ended, "stopped");
        Ok(ended)
    }
}

/// Refuses to listen for keys where others can read them. `flag` is the option that the error
/// names.
fn refuse_plaintext(tls: &TlsOptions, flag: &str, address: SocketAddr) -> anyhow::Result<()> {
    if tls.tls_cert.is_none() && !tls.insecure_plaintext && !address.ip().to_canonical().is_loopback() {
        bail!(
            "{flag} {address} can be reached from other machines, and keys would be sent there over plain text; give --tls-cert and \
             --tls-key, or --insecure-plaintext if only a proxy with TLS reaches this address"
        );
    }
    Ok(())
}

fn reader_timeout(options: &HttpOptions) -> Duration {
    Duration::from_secs(options.reader_idle_timeout_secs)
}

/// The connection table of one of `listeners` listeners. Unless the size is set, it is what the
/// limit of open files allows beside `others` other connections.
fn places(options: &HttpOptions, listeners: u64, others: u64) -> Arc<Connections> {
    let files_max = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let fitting = (files_max.saturating_sub(FILES_SPARE + others) / listeners).clamp(16, CONNECTIONS_MAX);
    let max = options.connections_max.unwrap_or(fitting as usize);
    Connections::new(max, options.connections_per_address_max.unwrap_or(max / 2).max(1))
}

/// Deletes what is past its retention, now and every [`CLEAR_INTERVAL`].
async fn clear_logs(store: Store, retention: Duration) {
    loop {
        match store.clear_logs(retention).await {
            Ok(0) => {}
            Ok(rows) => tracing::info!(rows, "old rows of the logs were deleted"),
            // The rows stay until the next time.
            Err(error) => tracing::info!(cause = %error, "old rows of the logs could not be deleted"),
        }
        sleep(CLEAR_INTERVAL).await;
    }
}

/// Rejects calls that need no key when too many of them are open.
async fn bound_open_calls(State(open_calls): State<Arc<Semaphore>>, request: Request, next: Next) -> Response {
    if listener::needs_key(request.uri().path()) {
        return next.run(request).await;
    }
    match open_calls.try_acquire_owned() {
        Ok(permit) => next.run(request).await.map(|body| axum::body::Body::new(Running::new(body, permit))),
        Err(_) => grpc::too_many_open_calls().into_response(),
    }
}

fn reflection_v1()
-> anyhow::Result<tonic_reflection::server::v1::ServerReflectionServer<impl tonic_reflection::server::v1::ServerReflection>> {
    Ok(reflection().build_v1()?)
}

fn reflection_v1alpha() -> anyhow::Result<
    tonic_reflection::server::v1alpha::ServerReflectionServer<impl tonic_reflection::server::v1alpha::ServerReflection>,
> {
    Ok(reflection().build_v1alpha()?)
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}
