//! `dnc export` and `remove`: a gRPC client for people. What was asked for goes to
//! standard output, everything else to standard error.

use std::{
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum, builder::FalseyValueParser};
use tokio::sync::mpsc;
use tonic::{Code, Request, Response, Status, metadata::AsciiMetadataValue, transport::Channel};
use tonic_types::StatusExt;

use super::{
    admin::print,
    input::{self, Ended, Input},
    link,
    serve::dial,
};
use crate::{
    domain::{Kind, WorkspaceId},
    files::{self, Content, Format, Purpose},
    proto::{DeleteEntriesRequest, EntryFilter, ExportEntriesRequest, dnc_service_client::DncServiceClient},
};

/// Addresses that one call may name.
const ADDRESSES_MAX: usize = 10_000;

/// Octets of text in one call, well below the service's limit of 4 MiB.
const CHUNK_BYTES: usize = 2 << 20;

/// How often a call is made, and how long the server may ask to wait between two tries.
const TRIES_MAX: u32 = 5;
const RETRY_WAIT_MAX: Duration = Duration::from_secs(60);

/// Where the service is, and who asks.
#[derive(Args, Clone, Debug)]
pub(super) struct Server {
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

/// Addresses and domains: named one by one, or in files.
#[derive(Args, Clone, Debug)]
#[group(required = true, multiple = true)]
pub(super) struct Addresses {
    /// Addresses and domains; - reads them from standard input
    #[arg(value_name = "ADDRESS")]
    pub(super) addresses: Vec<String>,
    /// A file of them, of any kind that `dnc import` reads; - is standard input; may be given
    /// several times
    #[arg(long = "file", short, env = "DNC_FILE", value_name = "FILE")]
    pub(super) files: Vec<PathBuf>,
    /// The column that holds the addresses in the files, if it is not known by its name
    #[arg(long, env = "DNC_FILE_COLUMN", value_name = "NAME", requires = "files")]
    pub(super) column: Option<String>,
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
    #[command(flatten)]
    addresses: Addresses,
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
pub(super) enum TypeName {
    Email,
    Domain,
}

impl Addresses {
    /// All of them, as many at once as one call may name. Files are read on a thread of its own, no
    /// faster than they are taken.
    fn chunks(self) -> mpsc::Receiver<anyhow::Result<Vec<String>>> {
        let (ready, chunks) = mpsc::channel(1);
        std::thread::spawn(move || {
            let mut chunk = Vec::new();
            let mut octets = 0;
            let mut take = |address: String| {
                octets += address.len();
                chunk.push(address);
                if chunk.len() < ADDRESSES_MAX && octets < CHUNK_BYTES {
                    return Ok(());
                }
                octets = 0;
                ready.blocking_send(Ok(std::mem::take(&mut chunk))).map_err(|_| Ended::Stopped)
            };
            let options = files::Options { column: self.column, ..files::Options::new(Purpose::Addresses, input::now()) };
            let named = self.addresses.into_iter().try_for_each(|address| match address.as_str() {
                "-" => read_addresses(Path::new("-"), &options, &mut take),
                _ => take(address).map_err(|_| None),
            });
            let read = named.and_then(|()| self.files.iter().try_for_each(|file| read_addresses(file, &options, &mut take)));
            let _ = ready.blocking_send(Ok(chunk));
            if let Err(Some(error)) = read {
                let _ = ready.blocking_send(Err(error));
            }
        });
        chunks
    }
}

/// Hands over the addresses in a file; the error is none when no more is wanted.
fn read_addresses(
    file: &Path,
    options: &files::Options,
    take: &mut impl FnMut(String) -> Result<(), Ended>,
) -> Result<(), Option<anyhow::Error>> {
    let input = Input::open(file)?;
    let name = input.name.clone();
    let read = input.read(options.clone(), |row| match row.content {
        Content::Entry(entry) => take(entry.address.into_owned()),
        // What cannot be read is named as well, and is no address.
        Content::Unreadable(unreadable) => take(unreadable.texts.address.into_owned()),
        Content::Header | Content::Excluded => Ok(()),
    });
    read.map_err(|ended| match ended {
        Ended::Stopped => None,
        Ended::Broken(why) => Some(anyhow::anyhow!("{name} {why}")),
    })
}

impl TypeName {
    /// What it is called inside.
    pub(super) fn kind(self) -> Kind {
        match self {
            Self::Email => Kind::Email,
            Self::Domain => Kind::Domain,
        }
    }
}

impl Server {
    pub(super) fn client(&self) -> anyhow::Result<DncServiceClient<Channel>> {
        Ok(DncServiceClient::new(dial("--server", &self.server, self.server_ca.as_deref())?).max_decoding_message_size(usize::MAX))
    }

    pub(super) fn request<T>(&self, message: T) -> anyhow::Result<Request<T>> {
        let mut request = Request::new(message);
        let Ok(key) = AsciiMetadataValue::try_from(self.api_key.trim()) else { bail!("--api-key has characters that no key has") };
        request.metadata_mut().insert("x-api-key", key);
        if let Some(workspace) = self.workspace {
            request.metadata_mut().insert("x-workspace-id", AsciiMetadataValue::try_from(workspace.to_string())?);
        }
        Ok(request)
    }

    /// Makes a call, and makes it again while the server says that a later try may succeed. For calls that may be
    /// repeated. Waits as long as the server asks for, but no longer than [`RETRY_WAIT_MAX`].
    ///
    /// # Errors
    /// What the last answer says, with what to do about it.
    pub(super) async fn call<T: Clone, R>(
        &self,
        message: T,
        call: impl AsyncFn(DncServiceClient<Channel>, Request<T>) -> Result<Response<R>, Status>,
    ) -> anyhow::Result<R> {
        let client = self.client()?;
        let mut tries = 1;
        loop {
            let status = match call(client.clone(), self.request(message.clone())?).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) => status,
            };
            let may_pass = matches!(status.code(), Code::Unavailable | Code::ResourceExhausted);
            let asked_for = status.get_details_retry_info().and_then(|info| info.retry_delay);
            match asked_for {
                Some(wait) if may_pass && wait <= RETRY_WAIT_MAX && tries < TRIES_MAX => {
                    eprintln!("dnc: {} Trying again in {} s.", status.message(), wait.as_secs_f64().ceil());
                    tokio::time::sleep(wait).await;
                    tries += 1;
                }
                _ => return Err(self.told(&status)),
            }
        }
    }

    /// What a status says, without the numbers around it; of a call that the server did not answer,
    /// the cause.
    pub(super) fn told(&self, status: &Status) -> anyhow::Error {
        anyhow::Error::msg(link::why("--server", &self.server, status).unwrap_or_else(|| status.message().to_owned()))
    }
}

/// A text as a cell of a line: without what would end the cell or move the terminal's cursor.
pub(super) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// Writes the list to standard output.
pub(super) async fn export(options: Export) -> anyhow::Result<()> {
    let format = match options.format {
        FileFormat::Csv => Format::Csv,
        FileFormat::Ndjson => Format::Ndjson,
    };
    let filter = EntryFilter {
        r#type: options.entry_type.map(|name| name.kind().number()).unwrap_or_default(),
        reason: options.reason.unwrap_or_default(),
        search: options.search.unwrap_or_default(),
        ..EntryFilter::default()
    };
    let request = options.server.request(ExportEntriesRequest { filter: Some(filter) })?;
    let mut messages =
        options.server.client()?.export_entries(request).await.map_err(|status| options.server.told(&status))?.into_inner();
    let told = |status| options.server.told(&status);
    // Nothing is written before the service has answered: the head alone would look like an empty
    // list.
    let mut message = messages.message().await.map_err(told)?;
    let mut out = std::io::stdout().lock();
    out.write_all(&format.head())?;
    while let Some(part) = message {
        out.write_all(&format.write(part.entries)?)?;
        message = messages.message().await.map_err(told)?;
    }
    out.flush()?;
    Ok(())
}

/// Prints how many entries were removed.
pub(super) async fn remove(options: Remove) -> anyhow::Result<()> {
    let mut client = options.server.client()?;
    let mut chunks = options.addresses.chunks();
    let mut removed = 0;
    while let Some(emails) = chunks.recv().await {
        let emails = emails.with_context(|| format!("{removed} removed until then"))?;
        if emails.is_empty() {
            continue;
        }
        let message = DeleteEntriesRequest { emails, validate_only: options.dry_run, ..Default::default() };
        let answer = client.delete_entries(options.server.request(message)?).await.map_err(|status| options.server.told(&status));
        removed += answer.with_context(|| format!("{removed} removed until then"))?.into_inner().deleted;
    }
    print(&removed.to_string())
}
