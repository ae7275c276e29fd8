//! `dnc dev`: a private PostgreSQL, a workspace with keys, and the service, in one command.
//!
//! Standard output gets the lines that a shell can read in, and nothing else.

use std::{
    fs::{self, File, TryLockError},
    io::Write,
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::Context;
use clap::Args;

use super::serve::{Signals, measure};
use crate::{
    config::ServerOptions,
    domain::{ApiKey, KeyOwner, Scope, UserId, WorkspaceId},
    postgres::{self, PrivatePostgres},
    server::{self, Bound},
    store::Store,
};

#[derive(Args, Debug)]
pub(super) struct Options {
    /// The directory for the private PostgreSQL and the keys; kept between runs
    #[arg(long, env = "DNC_DATA_DIR", default_value = ".dnc")]
    data_dir: PathBuf,
    #[command(flatten)]
    server: ServerOptions,
}

/// The first workspace of this data directory, with keys for it.
///
/// The keys are kept in plain form in a file that only its owner can read, because `dnc dev` prints
/// them at every start. Nothing else stores keys in plain form. Keys that were revoked, or whose
/// file is lost, are replaced by new ones for the same workspace; in a second workspace the list
/// would look empty.
struct Tenant {
    workspace: WorkspaceId,
    api_key: ApiKey,
    platform_key: ApiKey,
}

pub(super) async fn run(options: Options) -> anyhow::Result<()> {
    measure(&options.server.http)?;
    let data_dir = &options.data_dir;
    fs::create_dir_all(data_dir).with_context(|| format!("cannot make {}; choose another --data-dir", data_dir.display()))?;
    let _lock = lock(data_dir)?;
    let signals = Signals::listen()?;
    let start = PrivatePostgres::start(postgres::Options {
        dir: data_dir.join("postgres"),
        is_ephemeral: false,
        connections_max: options.server.database.database_connections_max + 20,
        shared_buffers_mib: 256,
    });
    let mut postgres = signals.unless_signalled(start).await?;
    postgres.create_database("dnc", "template0").await?;
    let database_url = postgres.url("dnc");
    let store = server::store(&database_url, &options.server.database)?;
    store.migrate().await?;
    let tenant = tenant(&store, &data_dir.join("keys")).await?;
    let bound = Bound::service(store.clone(), &options.server).await?;
    announce(&bound, &tenant, &database_url, options.server.http.tls.tls_cert.as_deref())?;
    let ended = tokio::select! {
        ended = signals.serve(bound) => ended,
        failed = keep_running(&mut postgres) => failed,
    };
    signals.close(&store).await;
    ended
}

fn lock(data_dir: &Path) -> anyhow::Result<File> {
    let path = data_dir.join("lock");
    let what_to_do = || {
        format!("cannot write the lock {}; make it a file that this user may write, or choose another --data-dir", path.display())
    };
    let file = File::create(&path).with_context(what_to_do)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            anyhow::bail!("another `dnc dev` runs on {}; stop it, or choose another --data-dir", data_dir.display())
        }
        Err(TryLockError::Error(error)) => Err(error)
            .with_context(|| format!("cannot lock {}; choose a --data-dir on a file system that has locks", path.display())),
    }
}

/// Starts the database again whenever it has ended.
async fn keep_running(postgres: &mut PrivatePostgres) -> anyhow::Result<()> {
    loop {
        postgres.ended().await;
        tracing::warn!("the private PostgreSQL ended; starting it again");
        postgres.restart().await?;
    }
}

async fn tenant(store: &Store, file: &Path) -> anyhow::Result<Tenant> {
    let (stored_key, stored_platform_key) = read_keys(file);
    let (is_stored, has_platform_key) = (stored_key.is_some(), stored_platform_key.is_some());
    let workspace_of_key = match &stored_key {
        Some(key) => store.find_caller(key.hash(), None).await?.and_then(|caller| caller.workspace),
        None => None,
    };
    let found = match workspace_of_key {
        Some(workspace) => Some(workspace),
        None => store.list_workspaces().await?.first().map(|first| first.id),
    };
    let workspace = match found {
        Some(workspace) => workspace,
        None => store.create_workspace("dev").await?,
    };
    let good_key = stored_key.filter(|_| workspace_of_key.is_some());
    let good_platform_key = match stored_platform_key {
        Some(key) => store.find_caller(key.hash(), Some(workspace)).await?.filter(|caller| caller.is_member).map(|_| key),
        None => None,
    };
    if found.is_some() {
        for (name, is_stored, is_good) in
            [("key", is_stored, good_key.is_some()), ("platform key", has_platform_key, good_platform_key.is_some())]
        {
            let fault = if is_stored { "no longer works" } else { "is missing" };
            if !is_good {
                eprintln!(
                    "dnc: the {name} of {workspace} in {} {fault}; a new one for the same workspace was created",
                    file.display()
                );
            }
        }
    }
    let is_file_good = good_key.is_some() && good_platform_key.is_some();
    let tenant = Tenant {
        workspace,
        api_key: match good_key {
            Some(key) => key,
            None => store.issue_key(KeyOwner::Workspace(workspace), Scope::Write, "dev", None).await?.1,
        },
        platform_key: match good_platform_key {
            Some(key) => key,
            None => store.issue_key(KeyOwner::User(member(store, workspace).await?), Scope::Write, "dev", None).await?.1,
        },
    };
    if !is_file_good {
        tenant.write(file).with_context(|| format!("cannot write {}; remove it, or choose another --data-dir", file.display()))?;
    }
    Ok(tenant)
}

/// The first user who may use the workspace; made when there is none.
async fn member(store: &Store, workspace: WorkspaceId) -> anyhow::Result<UserId> {
    let users = store.list_users().await?;
    match users.iter().find(|user| user.workspaces.contains(&workspace)) {
        Some(user) => Ok(user.id),
        None => Ok(store.create_user("dev", &[workspace]).await?),
    }
}

impl Tenant {
    /// Writes the keys file completely or not at all. A partial file would lose the keys.
    fn write(&self, path: &Path) -> std::io::Result<()> {
        let unfinished = path.with_extension("unfinished");
        let mut file = fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&unfinished)?;
        writeln!(file, "{}\n{}\n{}", self.workspace, self.api_key.reveal(), self.platform_key.reveal())?;
        fs::rename(unfinished, path)
    }
}

/// The workspace key and the platform key in the keys file. Its first line, the workspace, is for
/// people.
fn read_keys(file: &Path) -> (Option<ApiKey>, Option<ApiKey>) {
    let text = fs::read_to_string(file).unwrap_or_default();
    let mut keys = text.lines().skip(1).map(ApiKey::parse);
    (keys.next().flatten(), keys.next().flatten())
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

Or open {http}/ in a browser, and enter the key there. {http}/docs shows the calls.

Ctrl-C stops it; what is on the list stays.
"#
    );
    let mut out = std::io::stdout().lock();
    writeln!(out, "DNC_HTTP_URL={http}")?;
    writeln!(out, "DNC_GRPC_URL={grpc}")?;
    writeln!(out, "DNC_WORKSPACE_ID={}", tenant.workspace)?;
    writeln!(out, "DNC_API_KEY={key}")?;
    writeln!(out, "DNC_PLATFORM_KEY={}", tenant.platform_key.reveal())?;
    let metrics = bound.metrics_url();
    if !metrics.is_empty() {
        writeln!(out, "DNC_METRICS_URL={}", local(&metrics))?;
    }
    writeln!(out, "DATABASE_URL={database_url}")?;
    out.flush()?;
    Ok(())
}

/// `url`, with 127.0.0.1 for an address that means every interface and cannot be called.
fn local(url: &str) -> String {
    let Some((scheme, address)) = url.split_once("://") else { return url.to_owned() };
    let (address, path) = address.split_at(address.find('/').unwrap_or(address.len()));
    match address.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_unspecified() => format!("{scheme}://127.0.0.1:{}{path}", address.port()),
        _ => url.to_owned(),
    }
}
