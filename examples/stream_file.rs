//! Streams a file with an address a line into the list, in constant memory:
//! `cargo run --example stream_file -- FILE`. Needs `DNC_GRPC_URL` and `DNC_API_KEY`, which
//! `dnc dev` prints.
//!
//! A program of your own makes the same client from `proto/dnc/v1/dnc.proto` with
//! `tonic-prost-build`.

use dnc::proto::{Entry, ImportEntriesRequest, dnc_service_client::DncServiceClient};
use tokio::{
    fs::File,
    io::{AsyncBufReadExt, BufReader},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;

const MESSAGE_ENTRIES: usize = 1_000;

/// Sends a message for each thousand lines. Waits while the service is not ready for more, so the
/// file is never in memory as a whole.
async fn read(path: String, sender: mpsc::Sender<ImportEntriesRequest>) -> std::io::Result<()> {
    let mut lines = BufReader::new(File::open(path).await?).lines();
    let mut entries = Vec::with_capacity(MESSAGE_ENTRIES);
    while let Some(line) = lines.next_line().await? {
        let email = line.trim().to_owned();
        if !email.is_empty() {
            entries.push(Entry { email, reason: "unsubscribe_link".to_owned(), ..Entry::default() });
        }
        // A receiver that is gone has got an answer, or an error, which `main` reports.
        if entries.len() == MESSAGE_ENTRIES && sender.send(message(std::mem::take(&mut entries))).await.is_err() {
            return Ok(());
        }
    }
    let _ = sender.send(message(entries)).await;
    Ok(())
}

fn message(entries: Vec<Entry>) -> ImportEntriesRequest {
    ImportEntriesRequest { entries, ..ImportEntriesRequest::default() }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let path = std::env::args().nth(1).ok_or_else(|| anyhow::anyhow!("name a file with an address a line"))?;
    let (url, key) = (std::env::var("DNC_GRPC_URL")?, std::env::var("DNC_API_KEY")?);
    let mut client = DncServiceClient::connect(url).await?;
    let (sender, messages) = mpsc::channel(2);
    let reading = tokio::spawn(read(path, sender));
    let mut request = tonic::Request::new(ReceiverStream::new(messages));
    request.metadata_mut().insert("x-api-key", key.parse()?);
    // An import that breaks may be sent again as a whole: what is stored is skipped.
    let answer = client.import_entries(request).await?.into_inner();
    // The stream ends also when the file cannot be read on.
    reading.await??;
    println!("imported {}, skipped {}, failed {}", answer.imported, answer.skipped, answer.failed);
    for error in answer.errors.iter().take(10) {
        eprintln!("entry {}: {}: {}", error.index, error.code, error.message);
    }
    Ok(())
}
