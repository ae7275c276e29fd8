//! `dnc serve` and `dnc gateway`, and the signals that end every server.

use anyhow::{Context, bail};
use clap::{Args, builder::FalseyValueParser};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::{admin, link};
use crate::{
    config::{DatabaseUrl, HttpOptions, ServerOptions},
    gateway::Upstream,
    server::{self, Bound, Ended},
};

#[derive(Args, Debug)]
pub(super) struct ServeOptions {
    #[command(flatten)]
    database: DatabaseUrl,
    /// Bring the schema up to date first, and do not refuse to start on a database that lacks migrations
    #[arg(long, env = "DNC_MIGRATE", value_parser = FalseyValueParser::new())]
    migrate: bool,
    #[command(flatten)]
    server: ServerOptions,
}

#[derive(Args, Debug)]
pub(super) struct GatewayOptions {
    /// The gRPC server, as http://HOST:PORT or https://HOST:PORT
    #[arg(long, env = "DNC_UPSTREAM", value_name = "URL")]
    upstream: String,
    /// A certificate authority to trust for the upstream besides the system's, PEM
    #[arg(long, env = "DNC_UPSTREAM_CA", value_name = "FILE")]
    upstream_ca: Option<std::path::PathBuf>,
    #[command(flatten)]
    http: HttpOptions,
}

pub(super) async fn serve(options: ServeOptions) -> anyhow::Result<()> {
    admin::require_postgres_url(&options.database.database_url)?;
    let store = server::store(&options.database.database_url, &options.server.database)?;
    admin::require_reachable(&store).await?;
    if options.migrate {
        store.migrate().await?;
    }
    admin::require_migrated(&store).await?;
    let bound = Bound::service(store.clone(), &options.server).await?;
    tracing::info!(http = bound.http_url(), grpc = bound.grpc_url(), "serving");
    let ended = until_signalled(bound).await;
    store.close().await;
    ended
}

pub(super) async fn gateway(options: GatewayOptions) -> anyhow::Result<()> {
    let channel = dial("--upstream", &options.upstream, options.upstream_ca.as_deref())?;
    let bound = Bound::gateway(Upstream::Elsewhere(channel.clone()), &options.http).await?;
    tracing::info!(http = bound.http_url(), upstream = options.upstream, "serving");
    tokio::spawn(warn_unless_reachable(channel, options.upstream));
    until_signalled(bound).await
}

/// Asks the upstream once whether it is there. It may come later, so the gateway serves all the
/// same; but callers are told no more than "unavailable", and whoever runs the gateway must see the
/// cause.
async fn warn_unless_reachable(channel: Channel, url: String) {
    let mut health = HealthClient::new(channel);
    if let Err(status) = health.check(HealthCheckRequest::default()).await
        && let Ok(Some(cause)) = tokio::task::spawn_blocking(move || link::why("--upstream", &url, &status)).await
    {
        tracing::warn!(cause, "the upstream cannot be reached");
    }
}

/// A connection to a gRPC server, which is made when it is first needed. `flag` names the URL in an error.
pub(super) fn dial(flag: &str, url: &str, ca: Option<&std::path::Path>) -> anyhow::Result<Channel> {
    let mut endpoint = Endpoint::from_shared(url.to_owned())
        .ok()
        .filter(|endpoint| matches!(endpoint.uri().scheme_str(), Some("http" | "https")) && endpoint.uri().host().is_some())
        .with_context(|| format!("{flag} {url:?} is not a URL such as http://127.0.0.1:50051"))?
        .connect_timeout(std::time::Duration::from_secs(5))
        .http2_keep_alive_interval(std::time::Duration::from_secs(30))
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(8 << 20);
    if endpoint.uri().scheme_str() == Some("https") {
        let mut tls = ClientTlsConfig::new();
        if let Some(path) = ca {
            tls = tls.ca_certificate(Certificate::from_pem(
                std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?,
            ));
        }
        // A container may have no certificates of the system's own; the authority named is enough then.
        endpoint = endpoint
            .clone()
            .tls_config(tls.clone().with_native_roots())
            .or_else(|_| endpoint.tls_config(tls))
            .with_context(|| format!("{flag}-ca cannot be used"))?;
    }
    Ok(endpoint.connect_lazy())
}

/// Serves until SIGTERM or Ctrl-C, then drains; a second signal stops at once.
pub(super) async fn until_signalled(bound: Bound) -> anyhow::Result<()> {
    let (first, second) = (CancellationToken::new(), CancellationToken::new());
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (on_first, on_second) = (first.clone(), second.clone());
    tokio::spawn(async move {
        for token in [on_first, on_second] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            token.cancel();
        }
    });
    match bound.run(first.cancelled_owned(), second.cancelled_owned()).await? {
        Ended::Drained => Ok(()),
        Ended::CutOff => bail!("stopped before every running call was finished; imports that were cut off can be sent again"),
    }
}
