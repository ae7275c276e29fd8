//! `grpc.health.v1`: ready when the database answers, is migrated, and this server is not shutting down. Asked afresh each time, since a
//! status kept from a moment ago is the one thing that a health check must not be.

use std::{pin::Pin, time::Duration};

use futures_util::{Stream, StreamExt, stream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, server::NamedService};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse,
    health_check_response::ServingStatus,
    health_server::{Health, HealthServer},
};

use super::{DncService, status};
use crate::{domain::Error, proto::dnc_service_server::DncServiceServer, store::Store};

const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// The health service over this store; not serving once `draining` is cancelled.
pub fn service(store: Store, draining: CancellationToken) -> HealthServer<impl Health> {
    HealthServer::new(Probe { store, draining })
}

#[derive(Clone)]
struct Probe {
    store: Store,
    draining: CancellationToken,
}

impl Probe {
    async fn status(&self) -> ServingStatus {
        let probe = tokio::time::timeout(ANSWER_TIMEOUT, self.store.pending_migrations());
        let is_ready = !self.draining.is_cancelled() && matches!(probe.await, Ok(Ok(0)));
        // A drain that began while the database answered counts too.
        if is_ready && !self.draining.is_cancelled() { ServingStatus::Serving } else { ServingStatus::NotServing }
    }
}

fn is_known(service: &str) -> bool {
    service.is_empty() || service == <DncServiceServer<DncService> as NamedService>::NAME
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

#[tonic::async_trait]
impl Health for Probe {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        if !is_known(&request.get_ref().service) {
            return Err(status::from_error(Error::NotFound("There is no service of that name here.")));
        }
        Ok(Response::new(response(self.status().await)))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    /// Says the status, and again each time it has changed; ends when the server drains.
    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        if !is_known(&request.get_ref().service) {
            // As the health protocol asks: the stream stays open, for the service might be added later.
            let unknown = stream::iter([Ok(response(ServingStatus::ServiceUnknown))]).chain(stream::pending());
            return Ok(Response::new(Box::pin(unknown.take_until(self.draining.clone().cancelled_owned()))));
        }
        let seen = stream::unfold((self.clone(), None), |(probe, last)| async move {
            loop {
                let draining = probe.draining.is_cancelled();
                if draining && last == Some(ServingStatus::NotServing) {
                    return None;
                }
                let now = probe.status().await;
                if last != Some(now) {
                    return Some((Ok(response(now)), (probe, Some(now))));
                }
                tokio::select! {
                    () = tokio::time::sleep(WATCH_INTERVAL) => {}
                    () = probe.draining.cancelled() => {}
                }
            }
        });
        Ok(Response::new(Box::pin(seen)))
    }
}
