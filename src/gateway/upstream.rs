//! The gRPC server behind the gateway, however it is reached.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use http::{Request, Response};
use tonic::{Status, body::Body, service::Routes, transport::Channel};
use tower::Service;

/// A gRPC server, as the generated clients call it.
#[derive(Clone, Debug)]
pub enum Upstream {
    /// The guarded service in this process, called without a socket.
    Here(Routes),
    /// A server elsewhere.
    Elsewhere(Channel),
}

impl Service<Request<Body>> for Upstream {
    type Response = Response<Body>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Status>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        match self {
            Self::Here(routes) => Service::<Request<Body>>::poll_ready(routes, cx).map_err(|never| match never {}),
            Self::Elsewhere(channel) => channel.poll_ready(cx).map_err(|error| Status::from_error(error.into())),
        }
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match self {
            Self::Here(routes) => {
                let answer = routes.call(request);
                Box::pin(async move { answer.await.map_err(|never| match never {}) })
            }
            Self::Elsewhere(channel) => {
                let answer = channel.call(request);
                Box::pin(async move { answer.await.map_err(|error| Status::from_error(error.into())) })
            }
        }
    }
}
