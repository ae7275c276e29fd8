//! `dnc serve` and `dnc gateway`, and the signals that stop a server.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use clap::{Args, builder::FalseyValueParser};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::{admin, link};
use crate::{
    config::{DatabaseUrl, HttpOptions, ReadDatabase, ServerOptions},
    server::{self, Bound, Ended},
    store::{ReplicaOptions, Store, StoreOptions},
    telemetry,
};

/// How long the process may take to end by itself after the second signal, before it is ended.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_millis(500);

const STORE_CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a gRPC server may take to accept a connection, and as long again for the TLS handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection with a running call gets a ping after this long without any data, and is given up
/// after as long again without an answer.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Args, Debug)]
pub(super) struct ServeOptions {
    #[command(flatten)]
    database: DatabaseUrl,
    #[command(flatten)]
    replica: ReadDatabase,
    /// Bring the database's schema up to date before serving
    ///
    /// Without it the server does not start on a database that lacks migrations.
    #[arg(long, env = "DNC_MIGRATE", value_parser = FalseyValueParser::new())]
    migrate: bool,
    #[command(flatten)]
    server: ServerOptions,
}

#[derive(Args, Debug)]
pub(super) struct GatewayOptions {
    /// The gRPC server to call, as http://HOST:PORT or https://HOST:PORT
    #[arg(long, env = "DNC_UPSTREAM", value_name = "URL")]
    upstream: String,
    /// A file with a certificate authority to trust beside the system's, PEM
    ///
    /// Needed when the upstream's certificate is signed by an authority of your own.
    #[arg(long, env = "DNC_UPSTREAM_CA", value_name = "FILE")]
    upstream_ca: Option<PathBuf>,
    #[command(flatten)]
    certificate: ClientCertificate,
    #[command(flatten)]
    http: HttpOptions,
}

/// What a client shows to a server that asks for a certificate.
#[derive(Args, Clone, Debug)]
pub(super) struct ClientCertificate {
    /// A file with the certificate chain of this client, PEM, for a server that asks for one
    #[arg(long, env = "DNC_CLIENT_CERT", value_name = "FILE", requires = "client_key")]
    client_cert: Option<PathBuf>,
    /// A file with the private key of that certificate, PEM
    #[arg(long, env = "DNC_CLIENT_KEY", value_name = "FILE", requires = "client_cert")]
    client_key: Option<PathBuf>,
}

pub(super) async fn serve(options: ServeOptions) -> anyhow::Result<()> {
    admin::require_postgres_urls(&options.database)?;
    if let Some(url) = &options.replica.read_database_url {
        admin::require_postgres_url("--read-database-url", url)?;
    }
    measure(&options.server.http)?;
    let signals = Signals::listen()?;
    let lag_max = Duration::from_secs(options.replica.read_lag_max_secs);
    let store = Store::new(&StoreOptions {
        migrate_url: options.database.migrate_database_url,
        is_pooled: options.database.database_transaction_pooler,
        replica: options.replica.read_database_url.map(|url| ReplicaOptions { url, lag_max }),
        ..server::store_options(&options.database.database_url, &options.server.database)
    })?;
    let prepare = async {
        admin::require_reachable(&store).await?;
        if options.migrate {
            store.migrate().await?;
        }
        admin::require_migrated(&store).await
    };
    signals.unless_signalled(prepare).await?;
    let bound = Bound::service(store.clone(), &options.server).await?;
    tracing::info!(http = bound.http_url(), grpc = bound.grpc_url(), metrics = bound.metrics_url(), "serving");
    let ended = signals.serve(bound).await;
    signals.close(&store).await;
    ended
}

/// Starts counting, if the metrics are to be served. Before anything is done that is counted.
pub(super) fn measure(options: &HttpOptions) -> anyhow::Result<()> {
    if options.metrics_addr.is_some() {
        telemetry::metrics::install()?;
    }
    Ok(())
}

pub(super) async fn gateway(options: GatewayOptions) -> anyhow::Result<()> {
    measure(&options.http)?;
    let signals = Signals::listen()?;
    let endpoint = endpoint("--upstream", &options.upstream, options.upstream_ca.as_deref(), &options.certificate)?;
    let bound = Bound::gateway(endpoint.clone(), &options.http).await?;
    tracing::info!(http = bound.http_url(), upstream = options.upstream, metrics = bound.metrics_url(), "serving");
    tokio::spawn(warn_unless_reachable(endpoint.connect_lazy(), options.upstream));
    signals.serve(bound).await
}

/// Calls the upstream once, and logs why it cannot be reached. Callers of the gateway only see
/// "unavailable"; its operator must see the cause. The gateway serves anyway, since the upstream
/// may start later.
async fn warn_unless_reachable(channel: Channel, url: String) {
    let mut health = HealthClient::new(channel);
    if let Err(status) = health.check(HealthCheckRequest::default()).await
        && let Ok(Some(cause)) = tokio::task::spawn_blocking(move || link::why("--upstream", &url, &status)).await
    {
        tracing::warn!(cause, "the upstream cannot be reached");
    }
}

/// A connection to a gRPC server. It is opened by the first call. `flag` is the option that errors
/// name.
pub(super) fn dial(flag: &str, url: &str, ca: Option<&Path>, certificate: &ClientCertificate) -> anyhow::Result<Channel> {
    let endpoint =
        endpoint(flag, url, ca, certificate)?.initial_stream_window_size(4 << 20).initial_connection_window_size(8 << 20);
    Ok(endpoint.connect_lazy())
}

fn endpoint(flag: &str, url: &str, ca: Option<&Path>, certificate: &ClientCertificate) -> anyhow::Result<Endpoint> {
    let read = |path: &Path| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let mut endpoint = Endpoint::from_shared(url.to_owned())
        .ok()
        .filter(|endpoint| matches!(endpoint.uri().scheme_str(), Some("http" | "https")) && endpoint.uri().host().is_some())
        .with_context(|| format!("{flag} {url:?} is not a URL such as http://127.0.0.1:50051"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(SILENCE_TIMEOUT)
        .keep_alive_timeout(SILENCE_TIMEOUT);
    if endpoint.uri().scheme_str() == Some("https") {
        let mut tls = ClientTlsConfig::new().timeout(CONNECT_TIMEOUT);
        if let Some(path) = ca {
            tls = tls.ca_certificate(Certificate::from_pem(read(path)?));
        }
        if let (Some(cert), Some(key)) = (&certificate.client_cert, &certificate.client_key) {
            tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
        }
        // A container may have no certificates of the system. The authority in `ca` is enough then.
        endpoint = endpoint
            .clone()
            .tls_config(tls.clone().with_native_roots())
            .or_else(|_| endpoint.tls_config(tls))
            .with_context(|| format!("{flag}-ca or --client-cert cannot be used"))?;
    }
    Ok(endpoint)
}

/// SIGTERM and Ctrl-C. The first signal drains the server. The second one ends the process within a
/// second, whatever hangs.
pub(super) struct Signals {
    first: CancellationToken,
    second: CancellationToken,
}

impl Signals {
    /// Starts listening, on a thread of its own since every other thread may hang.
    pub(super) fn listen() -> anyhow::Result<Self> {
        let (first, second) = (CancellationToken::new(), CancellationToken::new());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (mut terminate, mut interrupt) = {
            let _in_runtime = runtime.enter();
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
        };
        let tokens = [first.clone(), second.clone()];
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            runtime.block_on(async move {
                for token in tokens {
                    tokio::select! {
                        _ = terminate.recv() => {}
                        _ = interrupt.recv() => {}
                    }
                    token.cancel();
                }
                tokio::time::sleep(LAST_WORDS_TIMEOUT).await;
                std::process::exit(1)
            })
        })?;
        Ok(Self { first, second })
    }

    /// Waits for `prepare`, and fails if a signal comes first.
    pub(super) async fn unless_signalled<T>(&self, prepare: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        tokio::select! {
            prepared = prepare => prepared,
            () = self.first.cancelled() => bail!("stopped by a signal before it was ready to serve"),
        }
    }

    /// Serves until the first signal, then drains until the second one.
    pub(super) async fn serve(&self, bound: Bound) -> anyhow::Result<()> {
        match bound.run(self.first.cancelled(), self.second.cancelled()).await? {
            Ended::Drained => Ok(()),
            Ended::CutOff => bail!("stopped before every running call was finished; imports that were cut off can be sent again"),
        }
    }

    /// Closes the connections to the database. Those that no longer answer end with the process.
    pub(super) async fn close(&self, store: &Store) {
        tokio::select! {
            () = store.close() => {}
            () = tokio::time::sleep(STORE_CLOSE_TIMEOUT) => {}
            () = self.second.cancelled() => {}
        }
    }
}
