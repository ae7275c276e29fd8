//! Addresses that a command names: one by one, or in files.

use std::path::{Path, PathBuf};

use clap::Args;
use tokio::sync::mpsc;

use super::input::{self, Input, ReadEnd};
use crate::files::{self, Content, Purpose};

/// Addresses that one call may name.
const MESSAGE_ADDRESSES_MAX: usize = 10_000;

/// Bytes of text in one call, well below the service's limit of 4 MiB.
const MESSAGE_BYTES_MAX: usize = 2 << 20;

/// Addresses and domains: named one by one, or in files.
#[derive(Args, Clone, Debug)]
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

impl Addresses {
    /// All of them, in parts that one call may name. Files are read on a thread of its own, no
    /// faster than the parts are taken.
    pub(super) fn chunks(self) -> mpsc::Receiver<anyhow::Result<Vec<String>>> {
        let (ready, chunks) = mpsc::channel(1);
        std::thread::spawn(move || {
            let mut chunk = Vec::new();
            let mut bytes = 0;
            let mut take = |address: String| {
                bytes += address.len();
                chunk.push(address);
                if chunk.len() < MESSAGE_ADDRESSES_MAX && bytes < MESSAGE_BYTES_MAX {
                    return Ok(());
                }
                bytes = 0;
                ready.blocking_send(Ok(std::mem::take(&mut chunk))).map_err(|_| ReadEnd::Stopped)
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
    take: &mut impl FnMut(String) -> Result<(), ReadEnd>,
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
        ReadEnd::Stopped => None,
        ReadEnd::Broken(why) => Some(anyhow::anyhow!("{name} {why}")),
    })
}
