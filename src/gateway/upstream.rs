//! The gRPC server behind the gateway: the service in this process, or a server elsewhere.
//!
//! Calls on one connection share its flow-control window. A call whose answer nobody reads stops
//! all others on its connection once the window is full. So a connection carries only as many calls
//! as fit into its window side by side. Imports and checks of whole lists, which may wait long in
//! the middle of their messages, have connections of their own.
//!
//! A call is refused before the body of its HTTP request is read, also when the server is
//! elsewhere. HTTP/2 does not say when a server wants the messages of a call. So the gateway asks
//! for the response head as soon as the caller is admitted, and makes no message before the head
//! arrives.

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

/// Calls on one connection at the same time. On both ends, the window of a connection must be as
/// large as that many stream windows.
pub const UPSTREAM_CALLS_MAX: usize = 4;

/// The most connections to the upstream: half of them for imports, half for everything else.
pub const UPSTREAM_CONNECTIONS_MAX: usize = 128;

const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = UPSTREAM_CALLS_MAX as u32 * STREAM_WINDOW_BYTES;

/// How long a call waits for a slot while all connections are in use.
const SLOT_TIMEOUT: Duration = Duration::from_secs(5);

/// A gRPC server, called by the generated clients like a channel.
#[derive(Clone, Debug)]
pub enum Upstream {
    /// The service in this process with its authentication, called without a socket.
    Here(Routes),
    /// A server elsewhere.
    Elsewhere(Elsewhere),
}

impl Upstream {
    /// Calls a server elsewhere. Connections are made when they are needed.
    pub fn elsewhere(endpoint: Endpoint) -> Self {
        let endpoint = endpoint
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(10));
        let pool = || {
            Arc::new(Pool {
                endpoint: endpoint.clone(),
                slots: Arc::new(Semaphore::new(UPSTREAM_CONNECTIONS_MAX / 2 * UPSTREAM_CALLS_MAX)),
                channels: Mutex::default(),
            })
        };
        Self::Elsewhere(Elsewhere { imports: pool(), others: pool() })
    }
}

/// The connections to a server elsewhere.
#[derive(Clone, Debug)]
pub struct Elsewhere {
    imports: Arc<Pool>,
    others: Arc<Pool>,
}

#[derive(Debug)]
struct Pool {
    endpoint: Endpoint,
    slots: Arc<Semaphore>,
    /// Each connection with the number of calls on it.
    channels: Mutex<Vec<(Channel, usize)>>,
}

/// A call's slot on a connection, given back on drop.
#[derive(Debug)]
struct CallSlot {
    pool: Arc<Pool>,
    index: usize,
    _slot: OwnedSemaphorePermit,
}

impl Pool {
    async fn call(self: Arc<Self>, mut request: Request<Body>) -> Result<Response<Body>, Status> {
        let mut admitted = None;
        if waits_for_admission(request.uri().path()) {
            let (sender, receiver) = oneshot::channel();
            admitted = Some(sender);
            request.headers_mut().insert(EARLY_HEAD, HeaderValue::from_static("1"));
            request = request.map(|body| Body::new(HeldMessages { body, admitted: Some(receiver) }));
        }
        let slot = tokio::time::timeout(SLOT_TIMEOUT, self.slots.clone().acquire_owned())
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
        let call_slot = CallSlot { pool: self, index, _slot: slot };
        let response = channel.oneshot(request).await.map_err(|error| Status::from_error(error.into()))?;
        if let Some(admitted) = admitted
            && !response.headers().contains_key(Status::GRPC_STATUS)
        {
            // The receiver is gone if the connection has failed meanwhile.
            let _ = admitted.send(());
        }
        // The call keeps its slot until the end of its answer has been read.
        Ok(response.map(|body| Body::new(Running::new(body, call_slot))))
    }
}

impl Drop for CallSlot {
    fn drop(&mut self) {
        self.pool.channels.lock().unwrap_or_else(PoisonError::into_inner)[self.index].1 -= 1;
    }
}

/// Whether the messages of this method wait until the caller is admitted. An export does not wait:
/// it has no body to read, and the head of its answer says whether it could begin.
fn waits_for_admission(path: &str) -> bool {
    path.starts_with("/dnc.v1.") && !path.ends_with("/ExportEntries")
}

/// The messages of a call. They are not read before the caller is admitted.
struct HeldMessages {
    body: Body,
    /// None once the caller is admitted.
    admitted: Option<oneshot::Receiver<()>>,
}

impl http_body::Body for HeldMessages {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(admitted) = &mut self.admitted {
            if ready!(Pin::new(admitted).poll(cx)).is_err() {
                // Ending the stream here would look like a complete call without messages.
                return Poll::Ready(Some(Err(Status::cancelled("the call was refused or given up"))));
            }
            self.admitted = None;
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
                let pool = if path.ends_with("/ImportEntries") || path.ends_with("/ScrubEntries") { imports } else { others };
                Box::pin(pool.clone().call(request))
            }
        }
    }
}
