//! Puts the rooms together: bind, run, drain.
//!
//! Binding comes first and alone, so that whoever starts a server knows its addresses before the first request. Draining: new calls
//! are refused as unavailable and health says so, calls that run are waited for, then the HTTP side closes, then gRPC.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use axum_server::{Handle, tls_rustls::RustlsConfig};
use hyper_util::rt::TokioTimer;
use tokio::task::JoinHandle;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{
    service::Routes,
    transport::{Identity, Server, ServerTlsConfig, server::TcpIncoming},
};

use crate::{
    config::{DatabaseLimits, HttpOptions, ServerOptions, TlsOptions},
    gateway::{self, Upstream},
    grpc::{
        self, DncService, ImportLimits,
        auth::{Authenticator, Guard},
        health,
    },
    proto::{self, dnc_service_server::DncServiceServer},
    store::{Store, StoreOptions},
};

/// How long connections may take to close once no call runs on them any more.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a caller may take to send a request's headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// Larger than HTTP/2's defaults, which throttle a fast stream; together with the messages in work they bound a stream's memory.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;

/// The largest frame that a client may send; eight times HTTP/2's default, since each one has its price.
const FRAME_BYTES: u32 = 128 << 10;

/// The store as a server uses it.
///
/// # Errors
/// When the URL cannot be read.
pub fn store(database_url: &str, limits: &DatabaseLimits) -> Result<Store, crate::domain::Error> {
    Store::new(&StoreOptions {
        url: database_url.to_owned(),
        connections_max: limits.database_connections_max,
        connect_timeout: Duration::from_secs(limits.database_connect_timeout_secs),
        statement_timeout: Duration::from_secs(limits.database_statement_timeout_secs),
    })
}

/// Listeners that are bound and not yet served.
#[derive(Debug)]
pub struct Bound {
    http: Option<HttpListener>,
    grpc: Option<GrpcListener>,
    draining: CancellationToken,
    calls: TaskTracker,
    drain_timeout: Duration,
}

#[derive(Debug)]
struct HttpListener {
    listener: TcpListener,
    address: SocketAddr,
    router: axum::Router,
    tls: Option<RustlsConfig>,
}

#[derive(Debug)]
struct GrpcListener {
    incoming: TcpIncoming,
    address: SocketAddr,
    routes: Routes,
    server: Server,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Every call was finished.
    Drained,
    /// Calls were cut off: by a second signal, or because they took longer than the drain may.
    CutOff,
}

impl Bound {
    /// Binds the service with both listeners.
    ///
    /// # Errors
    /// When an address is taken, or TLS is set up wrongly.
    pub async fn service(store: Store, options: &ServerOptions) -> anyhow::Result<Self> {
        let draining = CancellationToken::new();
        let calls = TaskTracker::new();
        let auth = Arc::new(Authenticator::new(store.clone(), options.requests_per_sec_max));
        let limits = ImportLimits {
            batch_entries_max: options.batch_entries_max as usize,
            batches_in_flight_max: options.batches_in_flight_max.into(),
            idle_timeout: Duration::from_secs(options.stream_idle_timeout_secs),
        };
        let service = DncServiceServer::new(DncService::new(store.clone(), auth.clone(), limits))
            .max_decoding_message_size(grpc::MESSAGE_BYTES_MAX);
        let guarded = Guard::new(service, auth, draining.clone(), calls.clone());
        let callable = Routes::new(guarded).add_service(health::service(store, draining.clone())).prepare();
        // The gateway is handed the guarded service itself; reflection is for clients on the network.
        let upstream = Upstream::Here(callable.clone());
        let routes = callable.add_service(reflection_v1()?).add_service(reflection_v1alpha()?).prepare();

        let incoming = TcpIncoming::bind(options.grpc_addr)
            .with_context(|| format!("cannot listen for gRPC on {}; choose another --grpc-addr", options.grpc_addr))?
            .with_nodelay(Some(true));
        let address = incoming.local_addr()?;
        let mut server = Server::builder()
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES)
            .http2_keepalive_interval(Some(Duration::from_secs(30)))
            .http2_keepalive_timeout(Some(Duration::from_secs(20)));
        if let Some((cert, key)) = tls_files(&options.http.tls)? {
            server = server
                .tls_config(ServerTlsConfig::new().identity(Identity::from_pem(cert, key)))
                .context("the TLS certificate or key cannot be used")?;
        }
        let http = HttpListener::bind(&options.http, upstream, &calls, &draining).await?;
        Ok(Self {
            http: Some(http),
            grpc: Some(GrpcListener { incoming, address, routes, server }),
            draining,
            calls,
            drain_timeout: Duration::from_secs(options.http.drain_timeout_secs),
        })
    }

    /// Binds the HTTP side alone, in front of a service elsewhere.
    ///
    /// # Errors
    /// When the address is taken, or TLS is set up wrongly.
    pub async fn gateway(upstream: Upstream, options: &HttpOptions) -> anyhow::Result<Self> {
        let draining = CancellationToken::new();
        let calls = TaskTracker::new();
        let http = HttpListener::bind(options, upstream, &calls, &draining).await?;
        Ok(Self { http: Some(http), grpc: None, draining, calls, drain_timeout: Duration::from_secs(options.drain_timeout_secs) })
    }

    /// Where HTTP is served, as a URL.
    pub fn http_url(&self) -> String {
        self.http.as_ref().map(|http| url(http.address, http.tls.is_some())).unwrap_or_default()
    }

    /// Where gRPC is served, as a URL.
    pub fn grpc_url(&self) -> String {
        let is_tls = self.http.as_ref().is_some_and(|http| http.tls.is_some());
        self.grpc.as_ref().map(|grpc| url(grpc.address, is_tls)).unwrap_or_default()
    }

    /// Serves until `stop`, then drains until every call is finished, the drain's time is over, or `stop_now`.
    ///
    /// # Errors
    /// When a listener fails.
    pub async fn run(mut self, stop: impl Future<Output = ()>, stop_now: impl Future<Output = ()>) -> anyhow::Result<Ended> {
        let handle = Handle::new();
        let http = self.http.take().map(|http| tokio::spawn(http.serve(handle.clone())));
        let grpc_stop = CancellationToken::new();
        let grpc = self.grpc.take().map(|grpc| tokio::spawn(grpc.serve(grpc_stop.clone())));
        let mut listeners = Listeners { http, grpc };
        tokio::select! {
            () = stop => {}
            failed = listeners.failed() => return Err(failed),
        }
        tracing::info!(running = self.calls.len(), "draining");
        self.draining.cancel();
        self.calls.close();
        let ended = tokio::select! {
            () = self.calls.wait() => Ended::Drained,
            () = tokio::time::sleep(self.drain_timeout) => Ended::CutOff,
            () = stop_now => Ended::CutOff,
        };
        if ended == Ended::Drained {
            handle.graceful_shutdown(Some(CLOSE_TIMEOUT));
            if let Some(http) = listeners.http.as_mut() {
                let _ = tokio::time::timeout(2 * CLOSE_TIMEOUT, http).await;
            }
            grpc_stop.cancel();
            if let Some(grpc) = listeners.grpc.as_mut() {
                let _ = tokio::time::timeout(CLOSE_TIMEOUT, grpc).await;
            }
        }
        tracing::info!(?ended, "stopped");
        Ok(ended)
    }
}

/// The tasks that serve; they end with this.
struct Listeners {
    http: Option<JoinHandle<anyhow::Result<()>>>,
    grpc: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Listeners {
    async fn failed(&mut self) -> anyhow::Error {
        let ended = match (self.http.as_mut(), self.grpc.as_mut()) {
            (Some(http), Some(grpc)) => tokio::select! { ended = http => ended, ended = grpc => ended },
            (Some(one), None) | (None, Some(one)) => one.await,
            (None, None) => std::future::pending().await,
        };
        match ended {
            Ok(Ok(())) => anyhow::anyhow!("a listener ended by itself"),
            Ok(Err(error)) => error,
            Err(panicked) => panicked.into(),
        }
    }
}

impl Drop for Listeners {
    fn drop(&mut self) {
        for task in [&self.http, &self.grpc].into_iter().flatten() {
            task.abort();
        }
    }
}

impl HttpListener {
    async fn bind(
        options: &HttpOptions,
        upstream: Upstream,
        requests: &TaskTracker,
        draining: &CancellationToken,
    ) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(options.http_addr)
            .with_context(|| format!("cannot listen for HTTP on {}; choose another --http-addr", options.http_addr))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let tls = match tls_files(&options.tls)? {
            Some((cert, key)) => {
                Some(RustlsConfig::from_pem(cert, key).await.context("the TLS certificate or key cannot be used")?)
            }
            None => None,
        };
        let router = gateway::router(upstream, options.json_body_bytes_max, requests.clone(), draining.clone());
        Ok(Self { listener, address, router, tls })
    }

    async fn serve(self, handle: Handle<SocketAddr>) -> anyhow::Result<()> {
        let app = self.router.into_make_service();
        match self.tls {
            Some(tls) => {
                let mut server = axum_server::from_tcp_rustls(self.listener, tls)?.handle(handle);
                server.http_builder().http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
                server.serve(app).await?;
            }
            None => {
                let mut server = axum_server::from_tcp(self.listener)?.handle(handle);
                server.http_builder().http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
                server.serve(app).await?;
            }
        }
        Ok(())
    }
}

impl GrpcListener {
    async fn serve(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let router = self.server.add_routes(self.routes);
        router.serve_with_incoming_shutdown(self.incoming, stop.cancelled_owned()).await?;
        Ok(())
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

fn tls_files(options: &TlsOptions) -> anyhow::Result<Option<(Vec<u8>, Vec<u8>)>> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    match (&options.tls_cert, &options.tls_key) {
        (Some(cert), Some(key)) => Ok(Some((read(cert)?, read(key)?))),
        _ => Ok(None),
    }
}

fn url(address: SocketAddr, is_tls: bool) -> String {
    format!("{}://{address}", if is_tls { "https" } else { "http" })
}
