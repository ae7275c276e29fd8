//! `dnc export`: the list as a file.

use std::io::Write;

use clap::{Args, ValueEnum};

use super::{client::Server, selection::Selection};
use crate::{
    files::Format,
    proto::{ExportEntriesRequest, ExportEntriesResponse},
};

#[derive(Args, Debug)]
pub(super) struct Options {
    /// How the list is written
    #[arg(long, env = "DNC_EXPORT_FORMAT", default_value = "csv")]
    format: FormatName,
    #[command(flatten)]
    selection: Selection,
    #[command(flatten)]
    server: Server,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FormatName {
    Csv,
    Ndjson,
}

/// Writes the list to standard output.
pub(super) async fn run(options: Options) -> anyhow::Result<()> {
    let format = match options.format {
        FormatName::Csv => Format::Csv,
        FormatName::Ndjson => Format::Ndjson,
    };
    let request = ExportEntriesRequest { filter: Some(options.selection.filter()) };
    let mut messages = options.server.call(request, async |mut client, request| client.export_entries(request).await).await?;
    let failed = |status| options.server.told(&status);
    // Nothing is written before the service has answered: the head alone would look like an empty
    // list.
    let mut message = messages.message().await.map_err(failed)?;
    let mut out = std::io::stdout().lock();
    out.write_all(&format.head())?;
    while let Some(ExportEntriesResponse { entries }) = message {
        out.write_all(&format.write(entries)?)?;
        message = messages.message().await.map_err(failed)?;
    }
    out.flush()?;
    Ok(())
}
