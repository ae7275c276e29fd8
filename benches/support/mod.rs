//! What the benchmarks of the whole service share: a database of their own, and a service in front of it.

use std::{ffi::OsString, path::PathBuf};

use clap::Parser;
use dnc::{
    cli::issue_key,
    config::ServerOptions,
    domain::WorkspaceId,
    postgres::{self, PrivatePostgres},
    server::{self, Bound},
    store::{KeyOwner, Store},
};

/// A durable private PostgreSQL with a migrated database, which is gone when this is.
pub struct Database {
    // Dropped first, so that the server has stopped when its directory goes.
    pub postgres: PrivatePostgres,
    pub url: String,
    _dir: tempfile::TempDir,
}

impl Database {
    pub async fn start() -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("dnc-bench-").tempdir()?;
        let options =
            postgres::Options { dir: PathBuf::from(dir.path()).join("postgres"), is_ephemeral: false, connections_max: 100 };
        let postgres = PrivatePostgres::start(options).await?;
        postgres.create_database("dnc", "template0").await?;
        let url = postgres.url("dnc");
        Ok(Self { postgres, url, _dir: dir })
    }
}

/// What a server is started with unless told otherwise, on free ports.
pub fn options() -> ServerOptions {
    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        server: ServerOptions,
    }
    let fixed = ["dnc", "--http-addr", "127.0.0.1:0", "--grpc-addr", "127.0.0.1:0"];
    Flags::parse_from(fixed.map(OsString::from)).server
}

/// A running service and a key for it.
pub struct Service {
    pub grpc_url: String,
    pub workspace: WorkspaceId,
    pub key: String,
}

impl Service {
    /// Migrates the database and serves it in this process, until the process ends.
    pub async fn start(database_url: &str) -> anyhow::Result<(Self, Store)> {
        let options = options();
        let store = server::store(database_url, &options.database)?;
        store.migrate().await?;
        let workspace = store.create_workspace("bench").await?;
        let key = issue_key(&store, KeyOwner::Workspace(workspace), "", None).await?.reveal().to_owned();
        let bound = Bound::service(store.clone(), &options).await?;
        let grpc_url = bound.grpc_url();
        tokio::spawn(bound.run(std::future::pending(), std::future::pending()));
        Ok((Self { grpc_url, workspace, key }, store))
    }
}

/// The middle one of some measurements.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
