//! `dnc dev`: from nothing to a service with keys, in one command. Standard output gets the lines a shell can source, and nothing else.

use std::{
    fs::{self, File, TryLockError},
    io::Write,
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::Context;
use clap::Args;

use super::{admin::issue_key, serve::until_signalled};
use crate::{
    config::ServerOptions,
    domain::{ApiKey, WorkspaceId},
    postgres::{self, PrivatePostgres},
    server::{self, Bound},
    store::{KeyOwner, Store},
};

#[derive(Args, Debug)]
pub(super) struct Options {
    /// Where the private PostgreSQL keeps its data between runs
    #[arg(long, env = "DNC_DATA_DIR", default_value = ".dnc")]
    data_dir: PathBuf,
    #[command(flatten)]
    server: ServerOptions,
}

/// The workspace of this data directory, with keys for it. Plain keys are kept here alone, in a file only its owner can read:
/// this is a place to try things out, and its keys must be printed at every start.
struct Tenant {
    workspace: WorkspaceId,
    api_key: ApiKey,
    platform_key: ApiKey,
}

pub(super) async fn run(options: Options) -> anyhow::Result<()> {
    let data_dir = &options.data_dir;
    fs::create_dir_all(data_dir).with_context(|| format!("cannot make {}; choose another --data-dir", data_dir.display()))?;
    let _lock = lock(data_dir)?;
    let mut postgres = PrivatePostgres::start(postgres::Options {
        dir: data_dir.join("postgres"),
        is_ephemeral: false,
        connections_max: options.server.database.database_connections_max + 20,
    })
    .await?;
    postgres.create_database("dnc", "template0").await?;
    let database_url = postgres.url("dnc");
    let store = server::store(&database_url, &options.server.database)?;
    store.migrate().await?;
    let tenant = tenant(&store, &data_dir.join("keys")).await?;
    let bound = Bound::service(store.clone(), &options.server).await?;
    announce(&bound, &tenant, &database_url, options.server.http.tls.tls_cert.as_deref())?;
    let ended = tokio::select! {
        ended = until_signalled(bound) => ended,
        failed = keep_running(&mut postgres) => failed,
    };
    store.close().await;
    ended
}

fn lock(data_dir: &Path) -> anyhow::Result<File> {
    let file = File::create(data_dir.join("lock"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            anyhow::bail!("another `dnc dev` runs on {}; stop it, or choose another --data-dir", data_dir.display())
        }
        Err(TryLockError::Error(error)) => Err(error).context("the data directory cannot be locked"),
    }
}

/// Starts the database again whenever somebody has killed it.
async fn keep_running(postgres: &mut PrivatePostgres) -> anyhow::Result<()> {
    loop {
        postgres.ended().await;
        tracing::warn!("the private PostgreSQL ended; starting it again");
        postgres.restart().await?;
    }
}

async fn tenant(store: &Store, file: &Path) -> anyhow::Result<Tenant> {
    if let Some(tenant) = read_tenant(file)
        && is_valid(store, &tenant).await?
    {
        return Ok(tenant);
    }
    let workspace = store.create_workspace("dev").await?;
    let user = store.create_user("dev", &[workspace]).await?;
    let tenant = Tenant {
        workspace,
        api_key: issue_key(store, KeyOwner::Workspace(workspace), "dev", None).await?,
        platform_key: issue_key(store, KeyOwner::User(user), "dev", None).await?,
    };
    let mut file = fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(file)?;
    writeln!(file, "{}\n{}\n{}", tenant.workspace, tenant.api_key.reveal(), tenant.platform_key.reveal())?;
    Ok(tenant)
}

fn read_tenant(file: &Path) -> Option<Tenant> {
    let text = fs::read_to_string(file).ok()?;
    let mut lines = text.lines();
    Some(Tenant {
        workspace: lines.next()?.parse().ok()?,
        api_key: ApiKey::parse(lines.next()?)?,
        platform_key: ApiKey::parse(lines.next()?)?,
    })
}

/// False when a key was revoked, or the database is another than the one the keys were made in.
async fn is_valid(store: &Store, tenant: &Tenant) -> anyhow::Result<bool> {
    let api = store.find_caller(tenant.api_key.hash(), None).await?;
    let platform = store.find_caller(tenant.platform_key.hash(), Some(tenant.workspace)).await?;
    Ok(api.is_some_and(|caller| caller.workspace == Some(tenant.workspace)) && platform.is_some_and(|caller| caller.is_member))
}

fn announce(bound: &Bound, tenant: &Tenant, database_url: &str, tls_cert: Option<&Path>) -> anyhow::Result<()> {
    let (http, grpc) = (local(&bound.http_url()), local(&bound.grpc_url()));
    let key = tenant.api_key.reveal();
    let (curl_tls, grpcurl_tls) = match tls_cert {
        Some(cert) => (format!(" --cacert {}", cert.display()), format!("-cacert {}", cert.display())),
        None => (String::new(), "-plaintext".to_owned()),
    };
    let grpc_address = grpc.split_once("//").map_or("", |(_, address)| address);
    eprintln!(
        r#"
dnc is ready. Try it:

curl{curl_tls} -X POST "{http}/v1/dnc/import" \
  -H "Content-Type: application/json" \
  -H "X-Api-Key: {key}" \
  -d '{{
    "entries": [
      {{"email": "bounce1@example.com", "type": "email", "reason": "bounce"}},
      {{"email": "bounce2@example.com", "type": "email", "reason": "bounce"}},
      {{"email": "badcompany.com", "type": "domain", "reason": "manual"}}
    ]
  }}'

grpcurl {grpcurl_tls} -H 'x-api-key: {key}' \
  -d '{{"entries": [{{"email": "bounce3@example.com", "reason": "bounce"}}]}}' \
  {grpc_address} dnc.v1.DncService/ImportEntries

Ctrl-C stops it; what is on the list stays.
"#
    );
    let mut out = std::io::stdout().lock();
    writeln!(out, "DNC_HTTP_URL={http}")?;
    writeln!(out, "DNC_GRPC_URL={grpc}")?;
    writeln!(out, "DNC_WORKSPACE_ID={}", tenant.workspace)?;
    writeln!(out, "DNC_API_KEY={key}")?;
    writeln!(out, "DNC_PLATFORM_KEY={}", tenant.platform_key.reveal())?;
    writeln!(out, "DATABASE_URL={database_url}")?;
    out.flush()?;
    Ok(())
}

/// An address that means every interface is no address to call.
fn local(url: &str) -> String {
    let Some((scheme, address)) = url.split_once("://") else { return url.to_owned() };
    match address.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_unspecified() => format!("{scheme}://127.0.0.1:{}", address.port()),
        _ => url.to_owned(),
    }
}
