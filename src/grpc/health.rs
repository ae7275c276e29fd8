//! `grpc.health.v1`: ready when the database answers, is migrated, and this server is not shutting down. Needs no key, so however many ask, there is one look
//! at the database at a time, which all share who asked before it began; watchers share one a second.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt, stream};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};
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

/// How long a look at the database is good for watchers, and how often they need one.
const LOOK_TTL: Duration = Duration::from_secs(1);

/// The health service over this store; not serving once `draining` is cancelled.
pub fn service(store: Store, draining: CancellationToken) -> HealthServer<impl Health> {
    HealthServer::new(Probe { store, draining, last: Arc::default() })
}

#[derive(Clone)]
struct Probe {
    store: Store,
    draining: CancellationToken,
    /// When the last look at the database was begun, and whether it was ready. Locked while somebody looks, so that all others wait for that look.
    last: Arc<Mutex<Option<(Instant, bool)>>>,
}

impl Probe {
    /// What a look finds that was begun no earlier than this.
    async fn status(&self, not_before: Option<Instant>) -> ServingStatus {
        let is_ready = !self.draining.is_cancelled() && self.is_ready(not_before).await;
        // A drain that began while the database answered counts too.
        if is_ready && !self.draining.is_cancelled() { ServingStatus::Serving } else { ServingStatus::NotServing }
    }

    async fn is_ready(&self, not_before: Option<Instant>) -> bool {
        let mut last = self.last.lock().await;
        if let Some((begun_at, is_ready)) = *last
            && not_before.is_none_or(|not_before| begun_at >= not_before)
        {
            return is_ready;
        }
        let begun_at = Instant::now();
        let is_ready = matches!(timeout(ANSWER_TIMEOUT, self.store.pending_migrations()).await, Ok(Ok(0)));
        *last = Some((begun_at, is_ready));
        is_ready
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
        Ok(Response::new(response(self.status(Some(Instant::now())).await)))
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
                let now = probe.status(Instant::now().checked_sub(LOOK_TTL)).await;
                if last != Some(now) {
                    return Some((Ok(response(now)), (probe, Some(now))));
                }
                tokio::select! {
                    () = tokio::time::sleep(LOOK_TTL) => {}
                    () = probe.draining.cancelled() => {}
                }
            }
        });
        Ok(Response::new(Box::pin(seen)))
    }
}
