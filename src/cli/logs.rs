//! `dnc imports list` and `dnc deletions list`: who put entries on a list or took them off, when,
//! and how many.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{
    admin::migrated,
    output::{Format, Table, instant},
};
use crate::{
    config::DatabaseUrl,
    domain::{Filter, Kind, WorkspaceId},
    store::Selection,
};

#[derive(Debug, Subcommand)]
pub(super) enum Imports {
    /// List the latest imports: start, workspace, key, counts, end, id
    ///
    /// An import without an end still runs, or was broken off; its counts are then those that were
    /// known last.
    List(Options),
}

#[derive(Debug, Subcommand)]
pub(super) enum Deletions {
    /// List the latest deletions: start, workspace, key, count, what was asked for, id
    List(Options),
}

#[derive(Args, Debug)]
pub(super) struct Options {
    /// Only those of this workspace
    #[arg(long, env = "DNC_LOG_WORKSPACE", value_name = "ws_…")]
    workspace: Option<WorkspaceId>,
    /// How many to list
    #[arg(long, env = "DNC_LOG_LIMIT", value_name = "N", default_value_t = 50)]
    limit: u32,
    #[command(flatten)]
    format: Format,
    #[command(flatten)]
    database: DatabaseUrl,
}

pub(super) async fn imports(Imports::List(options): Imports) -> anyhow::Result<()> {
    let mut table = Table::new(["started_at", "workspace", "key", "imported", "skipped", "failed", "finished_at", "id"]);
    for row in migrated(&options.database).await?.list_imports(options.workspace, options.limit).await? {
        table.push([
            json!(instant(row.started_at)),
            json!(row.workspace.to_string()),
            json!(row.key.to_string()),
            json!(row.imported),
            json!(row.skipped),
            json!(row.failed),
            row.finished_at.map(instant).map_or(Value::Null, Value::from),
            json!(row.id.to_string()),
        ]);
    }
    table.print(options.format)
}

pub(super) async fn deletions(Deletions::List(options): Deletions) -> anyhow::Result<()> {
    let mut table = Table::new(["started_at", "workspace", "key", "deleted", "asked_for", "id"]);
    for row in migrated(&options.database).await?.list_deletions(options.workspace, options.limit).await? {
        table.push([
            json!(instant(row.started_at)),
            json!(row.workspace.to_string()),
            json!(row.key.to_string()),
            json!(row.deleted),
            json!(description(row.selection)),
            json!(row.id.to_string()),
        ]);
    }
    table.print(options.format)
}

/// What a deletion was asked for, in the words of `dnc remove`'s options.
fn description(selection: Selection) -> String {
    let filter = match selection {
        Selection::Named(count) => return format!("{count} named"),
        Selection::All(filter) => filter,
    };
    let Filter { kind, reason, search, created_from, created_to } = filter;
    let parts = [
        kind.map(|kind: Kind| format!("type={}", kind.name())),
        reason.map(|reason| format!("reason={reason}")),
        search.map(|search| format!("search={search}")),
        created_from.map(|from| format!("from={}", instant(from))),
        created_to.map(|to| format!("to={}", instant(to))),
    ];
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    if parts.is_empty() { "all".to_owned() } else { parts.join(" ") }
}
