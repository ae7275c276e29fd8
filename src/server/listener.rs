//! One listener: accepts connections and serves them, with a deadline for each phase.
//!
//! axum-server and tonic's own server are not used: they wait without a limit in most of these
//! phases, do not limit the number of connections, and would need the rules twice.
//!
//! | phase | the connection ends after |
//! |---|---|
//! | TLS handshake | 10 s |
//! | before the first accepted call | 30 s without a call |
//! | after an accepted call | 75 s without a call over HTTP/1, 5 minutes over HTTP/2 |
//! | an HTTP/2 peer that answers no ping | 50 s |
//! | a peer that reads nothing of what is written to it | 60 s, unless set otherwise |
//!
//! The last time also holds for a single answer of which the peer reads nothing, whatever else
//! happens on its connection (`timed_body`).

use std::{
    convert::Infallible,
    net::{SocketAddr, TcpListener},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use axum::{
    Router,
    body::Body,
    http::{Request, StatusCode, Version},
    response::Response,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::Semaphore,
    time::{Instant, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::{AbortOnDropHandle, TaskTracker},
};
use tower::ServiceExt;

use super::{
    connections::{Activity, Call, Connections, Place},
    timed_body::TimedBody,
    tls::Tls,
    wire::Wire,
};
use crate::{
    gateway,
    wire::running::{Progress, Running},
};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const FIRST_CALL_TIMEOUT: Duration = Duration::from_secs(30);
const HTTP1_IDLE_TIMEOUT: Duration = Duration::from_secs(75);
const HTTP2_IDLE_TIMEOUT: Duration = Duration::from_secs(300);
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a connection may take to close after it was asked to.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(5);

/// The pause before accepting again when no file descriptor is left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How many replaced connections may be closing beyond the limit.
const DISPLACED_MAX: usize = 32;

/// Larger than HTTP/2's default, which slows down a fast stream. The streams of a connection share
/// its window: as many unread streams as [`gateway::UPSTREAM_CALLS_MAX`] fill it and stop the
/// others.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = gateway::UPSTREAM_CALLS_MAX as u32 * STREAM_WINDOW_BYTES;

/// The largest frame that a client may send: eight times HTTP/2's default, since each frame costs
/// time.
const FRAME_BYTES: u32 = 128 << 10;

const STREAMS_MAX: u32 = 128;

/// The longest path with query of a request, and the largest head that contains it.
const TARGET_BYTES_MAX: usize = 16 << 10;
const HEAD_BYTES_MAX: usize = 32 << 10;

/// How much of a head hyper reads. More than is allowed, so that nearly every head that is too
/// large reaches [`too_large`] and is answered like any other request.
const BUFFER_BYTES: usize = 128 << 10;

/// The protocol of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    /// HTTP/1 and HTTP/2.
    Http,
    /// HTTP/2 alone.
    Grpc,
    /// As [`Protocol::Http`].
    Metrics,
}

/// A bound listener.
#[derive(Debug)]
pub(super) struct Listener {
    listener: TcpListener,
    address: SocketAddr,
    tls: Option<Tls>,
    server: Server,
}

/// What the connections of a listener share.
#[derive(Clone, Debug)]
struct Server {
    protocol: Protocol,
    router: Router,
    builder: auto::Builder<TokioExecutor>,
    connections: Arc<Connections>,
    reader_timeout: Duration,
    /// Limits the open sockets, those that are closing included.
    sockets: Arc<Semaphore>,
    /// Cancelled: connections close as soon as no call is in work on them.
    closing: CancellationToken,
    /// Cancelled: connections end at once.
    gone: CancellationToken,
    tasks: TaskTracker,
}

/// A running listener. Dropping it ends its connections at once.
#[derive(Debug)]
pub(super) struct Serving {
    accepting: AbortOnDropHandle<anyhow::Result<Infallible>>,
    closing: CancellationToken,
    tasks: TaskTracker,
    _gone: DropGuard,
}

/// True for the paths of calls that need a key.
pub(super) fn needs_key(path: &str) -> bool {
    path.starts_with("/v1/") || path.starts_with("/dnc.v1.")
}

impl Listener {
    pub(super) fn bind(
        protocol: Protocol,
        address: SocketAddr,
        router: Router,
        tls: Option<&Tls>,
        connections: Arc<Connections>,
        reader_timeout: Duration,
    ) -> anyhow::Result<Self> {
        let (name, flag) = match protocol {
            Protocol::Http => ("HTTP", "--http-addr"),
            Protocol::Grpc => ("gRPC", "--grpc-addr"),
            Protocol::Metrics => ("metrics", "--metrics-addr"),
        };
        let listener =
            TcpListener::bind(address).with_context(|| format!("cannot listen for {name} on {address}; choose another {flag}"))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let server = Server {
            protocol,
            router,
            builder: builder(protocol),
            sockets: Arc::new(Semaphore::new(connections.max() + DISPLACED_MAX)),
            connections,
            reader_timeout,
            closing: CancellationToken::new(),
            gone: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        Ok(Self { listener, address, tls: tls.cloned(), server })
    }

    pub(super) fn url(&self) -> String {
        format!("{}://{}", if self.tls.is_some() { "https" } else { "http" }, self.address)
    }

    pub(super) fn serve(self) -> Serving {
        let Server { closing, gone, tasks, .. } = self.server.clone();
        let accepting = AbortOnDropHandle::new(tokio::spawn(self.accept()));
        Serving { accepting, closing, tasks, _gone: gone.drop_guard() }
    }

    async fn accept(self) -> anyhow::Result<Infallible> {
        let listener = tokio::net::TcpListener::from_std(self.listener)?;
        let mut is_out_of_files = false;
        loop {
            let socket = self.server.sockets.clone().acquire_owned().await?;
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) if is_of_one_connection(&error) => continue,
                Err(error) => {
                    if !std::mem::replace(&mut is_out_of_files, true) {
                        tracing::error!(%error, "connections cannot be accepted; trying again until they can");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            is_out_of_files = false;
            // Without a place, the connection is closed at once.
            let Some(place) = self.server.connections.place(peer.ip()) else { continue };
            let (server, tls) = (self.server.clone(), self.tls.as_ref().map(|tls| tls.acceptor(self.server.protocol)));
            self.server.tasks.spawn(async move {
                tokio::select! {
                    () = server.gone.cancelled() => {}
                    () = place.activity.displaced() => {}
                    () = server.clone().connection(stream, tls, &place) => {}
                }
                drop((place, socket));
            });
        }
    }
}

/// True for an error that concerns one connection and not the listener.
fn is_of_one_connection(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

fn builder(protocol: Protocol) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HTTP1_IDLE_TIMEOUT).max_buf_size(BUFFER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(BUFFER_BYTES as u32);
    match protocol {
        Protocol::Http | Protocol::Metrics => builder,
        Protocol::Grpc => builder.http2_only(),
    }
}

impl Server {
    async fn connection(self, stream: TcpStream, tls: Option<TlsAcceptor>, place: &Place) {
        // Otherwise a small answer waits until the peer has acknowledged the previous one.
        let _ = stream.set_nodelay(true);
        match tls {
            None => self.speak(stream, place).await,
            Some(tls) => {
                let closing = self.closing.clone();
                tokio::select! {
                    () = closing.cancelled() => {}
                    handshake = timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)) => {
                        if let Ok(Ok(stream)) = handshake {
                            self.speak(stream, place).await;
                        }
                    }
                }
            }
        }
    }

    async fn speak(self, io: impl AsyncRead + AsyncWrite + Unpin + 'static, place: &Place) {
        let activity = &place.activity;
        let is_http2 = Arc::new(AtomicBool::new(self.protocol == Protocol::Grpc));
        let service = {
            let (router, activity, is_http2) = (self.router.clone(), activity.clone(), is_http2.clone());
            let reader_timeout = self.reader_timeout;
            tower::service_fn(move |request: Request<hyper::body::Incoming>| {
                is_http2.store(request.version() == Version::HTTP_2, Ordering::Relaxed);
                answer(router.clone(), activity.clone(), request.map(Body::new), reader_timeout)
            })
        };
        let io = TokioIo::new(Wire::new(io, activity.clone(), self.reader_timeout));
        let mut connection = pin!(self.builder.serve_connection(io, TowerToHyperService::new(service)));
        let idle_timeout = || match (activity.is_known(), is_http2.load(Ordering::Relaxed)) {
            (false, _) => FIRST_CALL_TIMEOUT,
            (true, false) => HTTP1_IDLE_TIMEOUT,
            (true, true) => HTTP2_IDLE_TIMEOUT,
        };
        loop {
            let idle_too_long_at = if activity.has_calls() { Instant::now() } else { activity.idle_since() } + idle_timeout();
            tokio::select! {
                _ = connection.as_mut() => return,
                () = self.closing.cancelled() => break,
                () = tokio::time::sleep_until(idle_too_long_at) => {
                    if !activity.has_calls() && activity.idle_since() + idle_timeout() <= Instant::now() {
                        break;
                    }
                }
            }
        }
        connection.as_mut().graceful_shutdown();
        while timeout(GOODBYE_TIMEOUT, connection.as_mut()).await.is_err() && activity.has_calls() {}
    }
}

async fn answer(
    router: Router,
    activity: Arc<Activity>,
    request: Request<Body>,
    reader_timeout: Duration,
) -> Result<Response, Infallible> {
    let is_guarded = needs_key(request.uri().path());
    let mut call = Call::begin(activity.clone(), is_guarded);
    let response = match too_large(&request) {
        Some(status) => gateway::unreadable(status),
        None => router.oneshot(request).await?,
    };
    // gRPC puts an early rejection into the head, and every other status into the trailers.
    if is_guarded && response.status().is_success() && !response.headers().contains_key("grpc-status") {
        activity.accepted();
    } else {
        call.rejected();
    }
    let progress = response.extensions().get::<Progress>().cloned().unwrap_or_default();
    Ok(response.map(|body| Body::new(TimedBody::new(Body::new(Running::new(body, call)), reader_timeout, progress))))
}

fn too_large(request: &Request<Body>) -> Option<StatusCode> {
    let target = request.uri().path_and_query().map_or(0, |target| target.as_str().len());
    let fields = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len());
    if target > TARGET_BYTES_MAX {
        Some(StatusCode::URI_TOO_LONG)
    } else if fields.sum::<usize>() > HEAD_BYTES_MAX - TARGET_BYTES_MAX {
        Some(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE)
    } else {
        None
    }
}

impl Serving {
    /// Waits until accepting has failed, which normally never happens.
    pub(super) async fn failed(&mut self) -> anyhow::Error {
        match (&mut self.accepting).await {
            Ok(Err(error)) => error,
            Ok(Ok(never)) => match never {},
            Err(panicked) => panicked.into(),
        }
    }

    /// Stops accepting, and closes connections as their calls end. Those still open after `within`
    /// are cut off.
    pub(super) async fn close(self, within: Duration) {
        self.accepting.abort();
        self.closing.cancel();
        self.tasks.close();
        let _ = timeout(within, self.tasks.wait()).await;
    }
}
