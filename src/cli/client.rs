//! `dnc check`, `export` and `remove`: a gRPC client for people. What was asked for goes to standard output, everything else to standard error.

use std::{io::Write, path::PathBuf};

use anyhow::bail;
use clap::{Args, ValueEnum, builder::FalseyValueParser};
use tonic::{Request, Status, metadata::AsciiMetadataValue, transport::Channel};

use super::{admin::print, serve::dial};
use crate::{
    domain::WorkspaceId,
    gateway::Format,
    proto::{
        CheckEntriesRequest, CheckResult, DeleteEntriesRequest, EntryFilter, EntryType, ExportEntriesRequest,
        dnc_service_client::DncServiceClient,
    },
};

/// Addresses that one call may name.
const ADDRESSES_MAX: usize = 10_000;

/// Where the service is, and who asks.
#[derive(Args, Clone, Debug)]
struct Server {
    /// The gRPC server, as http://HOST:PORT or https://HOST:PORT
    #[arg(long, env = "DNC_SERVER", default_value = "http://127.0.0.1:50051", value_name = "URL")]
    server: String,
    /// A certificate authority to trust for the server besides the system's, PEM
    #[arg(long, env = "DNC_SERVER_CA", value_name = "FILE")]
    server_ca: Option<PathBuf>,
    /// The key to call with
    #[arg(long, env = "DNC_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: String,
    /// The workspace to work in; a platform key needs one
    #[arg(long, env = "DNC_WORKSPACE_ID", value_name = "ws_…")]
    workspace: Option<WorkspaceId>,
}

#[derive(Args, Debug)]
pub(super) struct Check {
    /// What to look up
    #[arg(required = true, value_name = "ADDRESS")]
    addresses: Vec<String>,
    #[command(flatten)]
    server: Server,
}

#[derive(Args, Debug)]
pub(super) struct Export {
    /// How the list is written
    #[arg(long, env = "DNC_EXPORT_FORMAT", default_value = "csv")]
    format: FileFormat,
    /// Only entries of this type
    #[arg(long = "type", env = "DNC_EXPORT_TYPE")]
    entry_type: Option<TypeName>,
    /// Only entries with exactly this reason
    #[arg(long, env = "DNC_EXPORT_REASON")]
    reason: Option<String>,
    /// Only entries with this text in their address
    #[arg(long, env = "DNC_EXPORT_SEARCH")]
    search: Option<String>,
    #[command(flatten)]
    server: Server,
}

#[derive(Args, Debug)]
pub(super) struct Remove {
    /// The addresses and domains to take off the list
    #[arg(required = true, value_name = "ADDRESS")]
    addresses: Vec<String>,
    /// Remove nothing, and say how many would be gone
    #[arg(long, env = "DNC_DRY_RUN", value_parser = FalseyValueParser::new())]
    dry_run: bool,
    #[command(flatten)]
    server: Server,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FileFormat {
    Csv,
    Ndjson,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum TypeName {
    Email,
    Domain,
}

impl Server {
    fn client(&self) -> anyhow::Result<DncServiceClient<Channel>> {
        Ok(DncServiceClient::new(dial("--server", &self.server, self.server_ca.as_deref())?).max_decoding_message_size(usize::MAX))
    }

    fn request<T>(&self, message: T) -> anyhow::Result<Request<T>> {
        let mut request = Request::new(message);
        let Ok(key) = AsciiMetadataValue::try_from(self.api_key.trim()) else { bail!("--api-key has characters that no key has") };
        request.metadata_mut().insert("x-api-key", key);
        if let Some(workspace) = self.workspace {
            request.metadata_mut().insert("x-workspace-id", AsciiMetadataValue::try_from(workspace.to_string())?);
        }
        Ok(request)
    }
}

/// What a status says, without the numbers around it.
fn told(status: Status) -> anyhow::Error {
    match status.code() {
        tonic::Code::Unavailable if status.message().is_empty() || !status.message().ends_with('.') => {
            anyhow::anyhow!("the server cannot be reached; check --server")
        }
        _ => anyhow::anyhow!("{}", status.message()),
    }
}

/// Prints a line an address: the address, `suppressed`, `clear` or `invalid`, and what decided it.
pub(super) async fn check(options: Check) -> anyhow::Result<()> {
    let mut client = options.server.client()?;
    let mut out = std::io::stdout().lock();
    for addresses in options.addresses.chunks(ADDRESSES_MAX) {
        let request = options.server.request(CheckEntriesRequest { emails: addresses.to_vec() })?;
        for result in client.check_entries(request).await.map_err(told)?.into_inner().results {
            let CheckResult { email, suppressed, entry, error } = result;
            match (entry, error) {
                (Some(entry), _) => writeln!(out, "{email}\tsuppressed\t{}\t{}", entry.email, entry.reason)?,
                (None, Some(error)) => writeln!(out, "{email}\tinvalid\t{}\t{}", error.code, error.message)?,
                (None, None) if suppressed => writeln!(out, "{email}\tsuppressed\t\t")?,
                (None, None) => writeln!(out, "{email}\tclear\t\t")?,
            }
        }
    }
    Ok(())
}

/// Writes the list to standard output.
pub(super) async fn export(options: Export) -> anyhow::Result<()> {
    let format = match options.format {
        FileFormat::Csv => Format::Csv,
        FileFormat::Ndjson => Format::Ndjson,
    };
    let entry_type = match options.entry_type {
        None => EntryType::Unspecified,
        Some(TypeName::Email) => EntryType::Email,
        Some(TypeName::Domain) => EntryType::Domain,
    };
    let filter = EntryFilter {
        r#type: entry_type.into(),
        reason: options.reason.unwrap_or_default(),
        search: options.search.unwrap_or_default(),
        ..EntryFilter::default()
    };
    let request = options.server.request(ExportEntriesRequest { filter: Some(filter) })?;
    let mut messages = options.server.client()?.export_entries(request).await.map_err(told)?.into_inner();
    let mut out = std::io::stdout().lock();
    out.write_all(format.head().as_bytes())?;
    while let Some(message) = messages.message().await.map_err(told)? {
        out.write_all(&format.write(message.entries)?)?;
    }
    out.flush()?;
    Ok(())
}

/// Prints how many entries were removed.
pub(super) async fn remove(options: Remove) -> anyhow::Result<()> {
    let mut client = options.server.client()?;
    let mut removed = 0;
    for addresses in options.addresses.chunks(ADDRESSES_MAX) {
        let message = DeleteEntriesRequest { emails: addresses.to_vec(), validate_only: options.dry_run, ..Default::default() };
        removed += client.delete_entries(options.server.request(message)?).await.map_err(told)?.into_inner().deleted;
    }
    print(&removed.to_string())
}
