//! Which entries of the list a command is about: the options of a filter.

use clap::Args;
use prost_types::Timestamp;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::client::TypeName;
use crate::proto::EntryFilter;

/// The options of a filter. None of them selects every entry.
#[derive(Args, Clone, Debug)]
pub(super) struct Selection {
    /// Only entries of this type
    #[arg(long = "type", env = "DNC_FILTER_TYPE")]
    entry_type: Option<TypeName>,
    /// Only entries with exactly this reason
    #[arg(long, env = "DNC_FILTER_REASON")]
    reason: Option<String>,
    /// Only entries with this text in their address, in any case
    #[arg(long, env = "DNC_FILTER_SEARCH", value_name = "TEXT")]
    search: Option<String>,
    /// Only entries stored at this time or later, such as 2024-06-01T10:00:00Z
    #[arg(long, env = "DNC_FILTER_CREATED_FROM", value_name = "TIME", value_parser = timestamp)]
    created_from: Option<Timestamp>,
    /// Only entries stored before this time
    #[arg(long, env = "DNC_FILTER_CREATED_TO", value_name = "TIME", value_parser = timestamp)]
    created_to: Option<Timestamp>,
}

impl Selection {
    /// The filter of a call.
    pub(super) fn filter(&self) -> EntryFilter {
        EntryFilter {
            r#type: self.entry_type.map(|name| name.kind().number()).unwrap_or_default(),
            reason: self.reason.clone().unwrap_or_default(),
            search: self.search.clone().unwrap_or_default(),
            create_time_from: self.created_from,
            create_time_to: self.created_to,
        }
    }
}

fn timestamp(text: &str) -> Result<Timestamp, String> {
    let time = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| "expected a time such as 2024-06-01T10:00:00Z".to_owned())?;
    Ok(Timestamp { seconds: time.unix_timestamp(), nanos: time.nanosecond().cast_signed() })
}
