//! `dnc remove`: takes entries off the list, by name or by what they have in common.

use std::io::{IsTerminal, Write};

use anyhow::{Context, bail};
use clap::{ArgGroup, Args, builder::FalseyValueParser};

use super::{addresses::Addresses, admin::print, client::Server, selection::Selection};
use crate::proto::DeleteEntriesRequest;

/// What names entries one by one, and what selects many.
const NAMED: [&str; 2] = ["addresses", "files"];
const SELECTED: [&str; 6] = ["entry_type", "reason", "search", "created_from", "created_to", "all"];

#[derive(Args, Debug)]
#[command(
    group = ArgGroup::new("named").args(NAMED).multiple(true).conflicts_with("selected"),
    group = ArgGroup::new("selected").args(SELECTED).multiple(true),
    group = ArgGroup::new("what").args(NAMED).args(SELECTED).multiple(true).required(true),
    after_long_help = "\
Name addresses, or select entries by --type, --reason, --search and the time they were stored; several options select what fits all of \
them. A selection is shown as a number and confirmed on a terminal. Elsewhere it needs --yes.

Prints how many entries were removed.")]
pub(super) struct Options {
    #[command(flatten)]
    addresses: Addresses,
    #[command(flatten)]
    selection: Selection,
    /// Remove every entry
    #[arg(long, env = "DNC_REMOVE_ALL", value_parser = FalseyValueParser::new())]
    all: bool,
    /// Remove what is selected without a question
    #[arg(long, short, env = "DNC_YES", value_parser = FalseyValueParser::new())]
    yes: bool,
    /// Remove nothing, and print how many entries would be removed
    #[arg(long, env = "DNC_DRY_RUN", value_parser = FalseyValueParser::new())]
    dry_run: bool,
    #[command(flatten)]
    server: Server,
}

pub(super) async fn run(options: Options) -> anyhow::Result<()> {
    let is_named = !options.addresses.addresses.is_empty() || !options.addresses.files.is_empty();
    let removed = if is_named { named(options).await? } else { selected(&options).await? };
    print(&removed.to_string())
}

async fn named(options: Options) -> anyhow::Result<i64> {
    let mut parts = options.addresses.chunks();
    let mut removed = 0;
    while let Some(emails) = parts.recv().await {
        let so_far = || format!("{removed} removed until then");
        let emails = emails.with_context(so_far)?;
        if emails.is_empty() {
            continue;
        }
        let request = DeleteEntriesRequest { emails, validate_only: options.dry_run, ..DeleteEntriesRequest::default() };
        removed += delete(&options.server, request).await.with_context(so_far)?;
    }
    Ok(removed)
}

async fn selected(options: &Options) -> anyhow::Result<i64> {
    let request = |validate_only| DeleteEntriesRequest {
        all: true,
        filter: Some(options.selection.filter()),
        validate_only,
        ..DeleteEntriesRequest::default()
    };
    if !options.dry_run && !options.yes {
        if !std::io::stdin().is_terminal() {
            bail!("nothing was removed: give --yes to remove what is selected, or --dry-run to count it");
        }
        let count = delete(&options.server, request(true)).await?;
        if !confirmed(count)? {
            bail!("nothing was removed");
        }
    }
    delete(&options.server, request(options.dry_run)).await
}

async fn delete(server: &Server, request: DeleteEntriesRequest) -> anyhow::Result<i64> {
    let answer = server.call(request, async |mut client, request| client.delete_entries(request).await).await?;
    Ok(answer.deleted)
}

/// Asks on the terminal.
fn confirmed(count: i64) -> anyhow::Result<bool> {
    eprint!("dnc: remove {count} entries from the list? Type yes to remove them: ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(answer.trim().eq_ignore_ascii_case("yes"))
}
