//! The gRPC server behind the gateway, however it is reached.
//!
//! Calls to a server elsewhere share connections, and calls on one connection share its flow-control window: what nobody reads of one call stops all others
//! once the window is full. So a connection carries no more calls than have room in its window side by side, and imports and checks of whole
//! lists, which may wait long in the middle of their messages, have connections of their own.
//!
//! A call is refused before the body of its HTTP request is read, here as with a service in this process. HTTP/2 does not say when a server
//! wants the messages of a call. So the head of the answer is asked for as soon as the caller was let in, and no message is made before it comes.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{HeaderValue, Request, Response};
use http_body::Frame;
use prost::bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tonic::{
    Status,
    body::Body,
    service::Routes,
    transport::{Channel, Endpoint},
};
use tower::{Service, ServiceExt};

use crate::wire::{EARLY_HEAD, running::Running};

/// Calls on one connection at once. The window of a connection must have room for as many windows of a stream, on both ends.
pub const UPSTREAM_CALLS_MAX: usize = 4;

/// Connections to the upstream, those for imports and those for everything else together.
pub const UPSTREAM_CONNECTIONS_MAX: usize = 128;

const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = UPSTREAM_CALLS_MAX as u32 * STREAM_WINDOW_BYTES;

/// How long a call waits while all connections are taken.
const PATIENCE: Duration = Duration::from_secs(5);

/// A gRPC server, as the generated clients call it.
#[derive(Clone, Debug)]
pub enum Upstream {
    /// The guarded service in this process, called without a socket.
    Here(Routes),
    /// A server elsewhere.
    Elsewhere(Elsewhere),
}

impl Upstream {
    /// A server elsewhere. Connections are made when they are needed.
    pub fn elsewhere(endpoint: Endpoint) -> Self {
        let endpoint = endpoint
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(10));
        let lane = || {
            Arc::new(Lane {
                endpoint: endpoint.clone(),
                places: Arc::new(Semaphore::new(UPSTREAM_CONNECTIONS_MAX / 2 * UPSTREAM_CALLS_MAX)),
                channels: Mutex::default(),
            })
        };
        Self::Elsewhere(Elsewhere { imports: lane(), others: lane() })
    }
}

/// The connections to a server elsewhere.
#[derive(Clone, Debug)]
pub struct Elsewhere {
    imports: Arc<Lane>,
    others: Arc<Lane>,
}

#[derive(Debug)]
struct Lane {
    endpoint: Endpoint,
    places: Arc<Semaphore>,
    /// Each with the number of calls on it.
    channels: Mutex<Vec<(Channel, usize)>>,
}

/// A call's place on a connection.
#[derive(Debug)]
struct Taken {
    lane: Arc<Lane>,
    index: usize,
    _place: OwnedSemaphorePermit,
}

impl Lane {
    async fn call(self: Arc<Self>, mut request: Request<Body>) -> Result<Response<Body>, Status> {
        let mut let_in = None;
        if waits_for_leave(request.uri().path()) {
            let (sender, receiver) = oneshot::channel();
            let_in = Some(sender);
            request.headers_mut().insert(EARLY_HEAD, HeaderValue::from_static("1"));
            request = request.map(|body| Body::new(Held { body, let_in: Some(receiver) }));
        }
        let place = tokio::time::timeout(PATIENCE, self.places.clone().acquire_owned())
            .await
            .map_err(|_| Status::unavailable("every connection to the upstream is taken"))?
            .map_err(|_| Status::internal("the connections to the upstream are closed"))?;
        let (channel, index) = {
            let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
            let least_busy = (0..channels.len()).min_by_key(|index| channels[*index].1);
            let index = least_busy.filter(|index| channels[*index].1 < UPSTREAM_CALLS_MAX).unwrap_or_else(|| {
                channels.push((self.endpoint.connect_lazy(), 0));
                channels.len() - 1
            });
            channels[index].1 += 1;
            (channels[index].0.clone(), index)
        };
        let taken = Taken { lane: self, index, _place: place };
        let response = channel.oneshot(request).await.map_err(|error| Status::from_error(error.into()))?;
        if let Some(let_in) = let_in
            && !response.headers().contains_key(Status::GRPC_STATUS)
        {
            // Nobody waits for it when the connection has failed meanwhile.
            let _ = let_in.send(());
        }
        // The call is on its connection until the last of its answer has been taken.
        Ok(response.map(|body| Body::new(Running::new(body, taken))))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.lane.channels.lock().unwrap_or_else(PoisonError::into_inner)[self.index].1 -= 1;
    }
}

/// Whether the messages of this method wait until the caller was let in. An export has no body to be read, and the head of its answer tells whether
/// it could begin.
fn waits_for_leave(path: &str) -> bool {
    path.starts_with("/dnc.v1.") && !path.ends_with("/ExportEntries")
}

/// The messages of a call, which are not asked for until its caller was let in.
struct Held {
    body: Body,
    /// None once it was.
    let_in: Option<oneshot::Receiver<()>>,
}

impl http_body::Body for Held {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(let_in) = &mut self.let_in {
            if ready!(Pin::new(let_in).poll(cx)).is_err() {
                // An end would look like a whole call without messages.
                return Poll::Ready(Some(Err(Status::cancelled("the call was refused or given up"))));
            }
            self.let_in = None;
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }
}

impl Service<Request<Body>> for Upstream {
    type Response = Response<Body>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Status>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        match self {
            Self::Here(routes) => Service::<Request<Body>>::poll_ready(routes, cx).map_err(|never| match never {}),
            Self::Elsewhere(_) => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match self {
            Self::Here(routes) => {
                let answer = routes.call(request);
                Box::pin(async move { answer.await.map_err(|never| match never {}) })
            }
            Self::Elsewhere(Elsewhere { imports, others }) => {
                let path = request.uri().path();
                let lane = if path.ends_with("/ImportEntries") || path.ends_with("/ScrubEntries") { imports } else { others };
                Box::pin(lane.clone().call(request))
            }
        }
    }
}
