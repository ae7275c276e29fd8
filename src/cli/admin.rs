//! `dnc migrate`, `workspaces`, `users` and `keys`: what an operator does directly with the
//! database. A new id or key is the only thing on standard output, so that a script can read it.

use std::{io::Write, time::Duration};

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::output::{Format, Table, instant};
use crate::{
    config::DatabaseUrl,
    domain::{KeyId, KeyOwner, Scope, UserId, WorkspaceId},
    store::{Store, StoreOptions},
};

#[derive(Args, Debug)]
pub(super) struct Migrate {
    /// Then distribute the tables by workspace over the servers of a cluster
    ///
    /// Tables that are distributed already stay as they are. Servers that run notice it when they
    /// are started again.
    #[arg(long, env = "DNC_MIGRATE_DISTRIBUTE", value_name = "CLUSTER")]
    distribute: Option<Cluster>,
    #[command(flatten)]
    database: DatabaseUrl,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Cluster {
    Citus,
}

#[derive(Debug, Subcommand)]
pub(super) enum Workspaces {
    /// Create a workspace and print its id
    Create {
        /// A name for people to recognize it by
        #[arg(value_parser = name)]
        name: String,
        #[command(flatten)]
        database: DatabaseUrl,
    },
    /// List workspaces: id, time of creation, name
    List(List),
}

#[derive(Debug, Subcommand)]
pub(super) enum Users {
    /// Create a user and print its id
    ///
    /// A user is the owner of platform keys, which work in all workspaces of the user. Callers of a
    /// single workspace need no user.
    Create {
        /// A name for people to recognize it by
        #[arg(value_parser = name)]
        name: String,
        /// A workspace that the user is a member of; can be repeated
        #[arg(long, env = "DNC_USER_WORKSPACES", value_delimiter = ',', value_name = "ws_…", required = true)]
        workspace: Vec<WorkspaceId>,
        #[command(flatten)]
        database: DatabaseUrl,
    },
    /// List users: id, time of creation, name, workspaces
    List(List),
}

#[derive(Debug, Subcommand)]
pub(super) enum Keys {
    /// Create a key and print it
    ///
    /// Only a hash of the key is stored, so it cannot be shown again: keep the output.
    Create {
        #[command(flatten)]
        owner: Owner,
        /// A name for people to recognize it by
        #[arg(long, env = "DNC_KEY_NAME", default_value = "", value_parser = optional_name)]
        name: String,
        /// What the key may do: check asks about addresses, read also lists them, write does
        /// everything
        ///
        /// Give a program that only asks before it sends a key of the scope check: nothing can be
        /// read or changed with it.
        #[arg(long, env = "DNC_KEY_SCOPE", default_value = "write")]
        scope: ScopeName,
        /// How long the key works, such as 90d or 12h [default: for ever]
        #[arg(long, env = "DNC_KEY_EXPIRES_IN", value_name = "DURATION", value_parser = expiry)]
        expires_in: Option<Duration>,
        #[command(flatten)]
        database: DatabaseUrl,
    },
    /// List keys: id, owner, scope, state, time of creation, expiry, name
    List(List),
    /// Revoke a key
    ///
    /// Every server rejects it within five seconds, also on streams that are running.
    Revoke {
        /// The id of the key, as `dnc keys list` shows it
        #[arg(value_name = "key_…")]
        id: KeyId,
        #[command(flatten)]
        database: DatabaseUrl,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum ScopeName {
    Check,
    Read,
    Write,
}

impl From<ScopeName> for Scope {
    fn from(name: ScopeName) -> Self {
        match name {
            ScopeName::Check => Self::Check,
            ScopeName::Read => Self::Read,
            ScopeName::Write => Self::Write,
        }
    }
}

#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub(super) struct Owner {
    /// Create a workspace key, for this workspace only
    #[arg(long, env = "DNC_KEY_WORKSPACE", value_name = "ws_…")]
    workspace: Option<WorkspaceId>,
    /// Create a platform key, for all workspaces of this user
    #[arg(long, env = "DNC_KEY_USER", value_name = "user_…")]
    user: Option<UserId>,
}

/// What is printed, and where it comes from.
#[derive(Args, Debug)]
pub(super) struct List {
    #[command(flatten)]
    format: Format,
    #[command(flatten)]
    database: DatabaseUrl,
}

pub(super) async fn migrate(options: Migrate) -> anyhow::Result<()> {
    let store = connect(&options.database).await?;
    let pending = store.pending_migrations().await?;
    store.migrate().await?;
    eprintln!("dnc: the schema is up to date ({pending} migrations applied)");
    if let Some(Cluster::Citus) = options.distribute {
        let tables = store.distribute().await?;
        eprintln!("dnc: the tables are distributed ({} of them now)", tables.len());
    }
    Ok(())
}

pub(super) async fn workspaces(command: Workspaces) -> anyhow::Result<()> {
    match command {
        Workspaces::Create { name, database } => print(&migrated(&database).await?.create_workspace(&name).await?.to_string())?,
        Workspaces::List(list) => {
            let mut table = Table::new(["id", "created_at", "name"]);
            for row in migrated(&list.database).await?.list_workspaces().await? {
                table.push([json!(row.id.to_string()), json!(instant(row.created_at)), json!(row.name)]);
            }
            table.print(list.format)?;
        }
    }
    Ok(())
}

pub(super) async fn users(command: Users) -> anyhow::Result<()> {
    match command {
        Users::Create { name, workspace, database } => {
            print(&migrated(&database).await?.create_user(&name, &workspace).await?.to_string())?
        }
        Users::List(list) => {
            let mut table = Table::new(["id", "created_at", "name", "workspaces"]);
            for row in migrated(&list.database).await?.list_users().await? {
                let workspaces: Vec<_> = row.workspaces.iter().map(ToString::to_string).collect();
                table.push([json!(row.id.to_string()), json!(instant(row.created_at)), json!(row.name), json!(workspaces)]);
            }
            table.print(list.format)?;
        }
    }
    Ok(())
}

pub(super) async fn keys(command: Keys) -> anyhow::Result<()> {
    match command {
        Keys::Create { owner, name, scope, expires_in, database } => {
            let owner = match (owner.workspace, owner.user) {
                (Some(id), _) => KeyOwner::Workspace(id),
                (None, Some(id)) => KeyOwner::User(id),
                (None, None) => anyhow::bail!("give --workspace or --user"),
            };
            let store = migrated(&database).await?;
            let (id, key) = store.issue_key(owner, scope.into(), &name, expires_in).await?;
            if let Err(error) = print(key.reveal()) {
                // Nobody has seen the key, and nobody ever will.
                store.revoke_key(id).await?;
                return Err(error.context(format!("{id} was revoked again")));
            }
        }
        Keys::List(list) => {
            let now = OffsetDateTime::now_utc();
            let mut table = Table::new(["id", "owner", "scope", "state", "created_at", "expires_at", "name"]);
            for row in migrated(&list.database).await?.list_keys().await? {
                let state = match (row.revoked_at, row.expires_at) {
                    (Some(_), _) => "revoked",
                    (None, Some(end)) if end <= now => "expired",
                    _ => "valid",
                };
                table.push([
                    json!(row.id.to_string()),
                    json!(row.owner.to_string()),
                    json!(row.scope.name()),
                    json!(state),
                    json!(instant(row.created_at)),
                    row.expires_at.map(instant).map_or(Value::Null, Value::from),
                    json!(row.name),
                ]);
            }
            table.print(list.format)?;
        }
        Keys::Revoke { id, database } => {
            migrated(&database).await?.revoke_key(id).await?;
            eprintln!("dnc: {id} is revoked");
        }
    }
    Ok(())
}

/// Prints a line to standard output, and fails if it cannot be written.
pub(super) fn print(line: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{line}").context("standard output takes nothing more")
}

/// Opens the store, and fails unless the database answers.
pub(super) async fn connect(database: &DatabaseUrl) -> anyhow::Result<Store> {
    require_postgres_urls(database)?;
    let store = Store::new(&StoreOptions {
        url: database.database_url.clone(),
        migrate_url: database.migrate_database_url.clone(),
        is_pooled: database.database_transaction_pooler,
        replica: None,
        connections_max: 4,
        connect_timeout: Duration::from_secs(10),
        statement_timeout: Duration::from_secs(600),
    })?;
    require_reachable(&store).await?;
    Ok(store)
}

/// As [`require_postgres_url`], for all that are given.
pub(super) fn require_postgres_urls(database: &DatabaseUrl) -> anyhow::Result<()> {
    require_postgres_url("DATABASE_URL", &database.database_url)?;
    let migrate = database.migrate_database_url.as_deref();
    migrate.map_or(Ok(()), |url| require_postgres_url("--migrate-database-url", url))
}

/// Rejects a URL with another scheme, which the driver would take for PostgreSQL's. The message
/// repeats only the scheme, because the URL contains a password. `option` is the one that has it.
pub(super) fn require_postgres_url(option: &str, url: &str) -> anyhow::Result<()> {
    const FORM: &str = "give postgres://USER:PASSWORD@HOST:PORT/DATABASE";
    match url.split_once("://") {
        Some(("postgres" | "postgresql", _)) => Ok(()),
        Some((scheme, _)) if scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte)) => {
            anyhow::bail!("{option} begins with {scheme}://, and the service needs PostgreSQL; {FORM}")
        }
        _ => anyhow::bail!("{option} is not a URL; {FORM}"),
    }
}

/// Fails unless the database can be reached, with the cause that the database or network gave.
pub(super) async fn require_reachable(store: &Store) -> anyhow::Result<()> {
    store.ping().await.map_err(|error| {
        let error = anyhow::Error::from(error);
        anyhow::anyhow!(
            "DATABASE_URL cannot be used ({}); check the host, port, database, user and password in it",
            error.root_cause()
        )
    })
}

/// A store whose database has answered, and has all migrations.
pub(super) async fn migrated(database: &DatabaseUrl) -> anyhow::Result<Store> {
    let store = connect(database).await?;
    require_migrated(&store).await?;
    Ok(store)
}

/// Fails if the database lacks migrations.
pub(super) async fn require_migrated(store: &Store) -> anyhow::Result<()> {
    match store.pending_migrations().await? {
        0 => Ok(()),
        pending => anyhow::bail!("the database lacks {pending} migrations; run `dnc migrate` first"),
    }
}

fn name(text: &str) -> Result<String, String> {
    let text = optional_name(text)?;
    if text.is_empty() { Err("a name is needed".to_owned()) } else { Ok(text) }
}

fn optional_name(text: &str) -> Result<String, String> {
    let text = text.trim();
    if text.chars().count() > 100 || text.contains(char::is_control) {
        return Err("a name has at most 100 characters, and no control characters".to_owned());
    }
    Ok(text.to_owned())
}

fn expiry(text: &str) -> Result<Duration, String> {
    const YEARS_MAX: u64 = 100;
    match humantime::parse_duration(text) {
        Ok(duration) if duration.as_secs() == 0 => Err("must be a second at least".to_owned()),
        Ok(duration) if duration.as_secs() > YEARS_MAX * 366 * 24 * 3600 => {
            Err("is more than 100 years; leave it out for a key that never expires".to_owned())
        }
        Ok(duration) => Ok(duration),
        Err(_) => Err("give a number with a unit, such as 90d, 12h or 30m".to_owned()),
    }
}
