//! The listener of the metrics, on an address of its own: who may see them is decided by the
//! network and not by a key. It speaks plain text, since they hold no secret.

use std::{sync::Arc, time::Duration};

use axum::{Router, http::header, routing::get};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use super::connections::Connections;
use crate::{
    store::Store,
    telemetry::metrics::{self, Levels},
    wire::budget::Budget,
};

/// The most connections to this listener. Few programs read metrics.
pub(super) const CONNECTIONS_MAX: usize = 16;

/// How often what was recorded is summed up. Between two scrapes it would take more and more
/// memory.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// What the gauges are read from.
#[derive(Clone)]
pub(super) struct Sources {
    pub(super) store: Option<Store>,
    pub(super) budget: Budget,
    pub(super) http: Arc<Connections>,
    pub(super) grpc: Option<Arc<Connections>>,
}

impl Sources {
    fn levels(&self) -> Levels {
        let of = |connections: &Arc<Connections>| (connections.open(), connections.max());
        Levels {
            database: self.store.as_ref().map(Store::levels),
            http: of(&self.http),
            grpc: self.grpc.as_ref().map(of),
            work_bytes: (self.budget.held_bytes(), self.budget.bytes_max()),
        }
    }
}

/// The router with `GET /metrics`.
pub(super) fn router(handle: PrometheusHandle, sources: Sources) -> Router {
    let render = move || {
        metrics::set_levels(&sources.levels());
        let text = handle.render();
        async move { ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text) }
    };
    Router::new().route("/metrics", get(render))
}

/// Sums up what was recorded, from time to time.
pub(super) fn keep_up(handle: PrometheusHandle) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            sleep(UPKEEP_INTERVAL).await;
            handle.run_upkeep();
        }
    }))
}
