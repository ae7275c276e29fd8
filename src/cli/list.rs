//! `dnc list` and `dnc summary`: what is on the list.

use clap::Args;
use prost_types::Timestamp;
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::{
    client::Server,
    output::{Format, Table, instant},
    selection::Selection,
};
use crate::{
    files::type_name,
    proto::{Entry, ListEntriesRequest, SummarizeEntriesRequest},
};

/// Entries of one page; the service answers no more.
const PAGE_ENTRIES_MAX: u32 = 1_000;

#[derive(Args, Debug)]
#[command(after_long_help = "\
Entries come in the order of their addresses. For the whole list use `dnc export`, which keeps nothing in memory.")]
pub(super) struct List {
    #[command(flatten)]
    selection: Selection,
    /// How many entries to show
    #[arg(long, env = "DNC_LIST_LIMIT", value_name = "N", default_value_t = 25, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    limit: u32,
    #[command(flatten)]
    format: Format,
    #[command(flatten)]
    server: Server,
}

#[derive(Args, Debug)]
pub(super) struct Summary {
    #[command(flatten)]
    format: Format,
    #[command(flatten)]
    server: Server,
}

/// Prints the first entries of the list, or of the part that the options select.
pub(super) async fn list(options: List) -> anyhow::Result<()> {
    let mut table = Table::new(["email", "type", "reason", "unsubscribed_at", "created_at", "added_by"]);
    let mut page_token = String::new();
    let (mut shown, mut total) = (0, None);
    while shown < options.limit {
        let page_size = (options.limit - shown).min(PAGE_ENTRIES_MAX).cast_signed();
        let request = ListEntriesRequest { filter: Some(options.selection.filter()), page_size, page_token };
        let page = options.server.call(request, async |mut client, request| client.list_entries(request).await).await?;
        total = (!page.total_omitted).then_some(page.total_size);
        shown += page.entries.len() as u32;
        page.entries.into_iter().for_each(|entry| table.push(row(entry)));
        page_token = page.next_page_token;
        if page_token.is_empty() || total.is_some_and(|total| i64::from(shown) >= total) {
            break;
        }
    }
    table.print(options.format)?;
    match total {
        Some(total) if i64::from(shown) < total => {
            eprintln!("dnc: {shown} of {total} entries; --limit shows more, `dnc export` writes all");
        }
        None if !page_token.is_empty() => {
            eprintln!("dnc: {shown} entries, and perhaps more; --limit shows more, `dnc export` writes all");
        }
        _ => {}
    }
    Ok(())
}

/// Prints how many entries there are, by type and reason, the largest number first.
pub(super) async fn summary(options: Summary) -> anyhow::Result<()> {
    let request = SummarizeEntriesRequest {};
    let answer = options.server.call(request, async |mut client, request| client.summarize_entries(request).await).await?;
    let mut table = Table::new(["type", "reason", "count"]);
    for row in answer.reasons {
        table.push([json!(type_name(row.r#type)), json!(row.reason), json!(row.count)]);
    }
    table.print(options.format)?;
    if answer.other_reasons > 0 {
        eprintln!("dnc: {} more reasons with {} entries are not shown", answer.other_reasons, answer.other_entries);
    }
    eprintln!("dnc: {} entries in all", answer.total);
    Ok(())
}

fn row(entry: Entry) -> [Value; 6] {
    [
        json!(entry.email),
        json!(type_name(entry.r#type)),
        json!(entry.reason),
        time_of(entry.unsubscribe_time),
        time_of(entry.create_time),
        json!(entry.added_by),
    ]
}

fn time_of(at: Option<Timestamp>) -> Value {
    let time = at.and_then(|at| OffsetDateTime::from_unix_timestamp(at.seconds).ok());
    time.map(instant).map_or(Value::Null, Value::from)
}
