//! Long imports that are sorted before they are stored.

use std::{collections::HashMap, process::Command, process::Stdio};

use dnc::proto::{Entry, ImportEntriesRequest, ImportEntriesResponse, dnc_service_client::DncServiceClient};
use prost_types::Timestamp;
use tonic::transport::Channel;
use tonic_types::StatusExt;

use crate::{
    address_book::{email, request},
    harness::{TestServer, database, process::Process, until, with_key},
};

/// Sorts every import from its second batch on. A file is full after two runs.
const FLAGS: [&str; 6] = ["--import-sort-rows-min", "0", "--import-sort-bytes-max", "20000000", "--batches-in-flight-max", "1"];

fn counts(answer: &ImportEntriesResponse) -> (u64, u64, u64) {
    (answer.imported, answer.skipped, answer.failed)
}

/// Entries in no order: `count` numbers below a prime that is larger, each once. Every 10th one is
/// followed by a repeat of an earlier one with another reason, every 1,000th by a bad one. Every
/// 100th has a time.
fn mixed(count: u64) -> Vec<Entry> {
    const PRIME: u64 = 1_000_003;
    let number = |at: u64| (at + 1) * 7_919 % PRIME;
    let entry = |at: u64, reason: &str| Entry { reason: reason.to_owned(), ..email(format!("u{}@example.com", number(at))) };
    let mut entries = Vec::new();
    for at in 0..count {
        let time = at.is_multiple_of(100).then_some(Timestamp { seconds: 1_500_000_000 + at as i64, nanos: 5_000_000 });
        entries.push(Entry { unsubscribe_time: time, ..entry(at, "first") });
        if at % 10 == 9 {
            entries.push(entry(at / 2, "again"));
        }
        if at % 1_000 == 999 {
            entries.push(email("bad"));
        }
    }
    entries
}

fn messages(entries: &[Entry]) -> Vec<ImportEntriesRequest> {
    entries.chunks(3_000).map(|entries| request(entries.to_vec())).collect()
}

/// What is stored of each address: the reason, and the time in nanoseconds.
async fn stored(server: &TestServer) -> HashMap<String, (String, Option<i64>)> {
    let rows: Vec<(String, String, Option<i64>)> = sqlx::query_as(
        "SELECT address, reason, (extract(epoch FROM unsubscribed_at) * 1000000)::bigint FROM entries WHERE workspace_id = $1",
    )
    .bind(server.workspace.0)
    .fetch_all(&mut server.connection().await)
    .await
    .unwrap();
    rows.into_iter().map(|(address, reason, time)| (address, (reason, time))).collect()
}

#[tokio::test]
async fn a_sorted_import_stores_and_counts_as_any_other() {
    const COUNT: u64 = 400_000;
    let server = TestServer::start_with(&FLAGS, &database().await).await;
    // Some are there already.
    let present: Vec<_> = mixed(1_000).into_iter().map(|entry| Entry { reason: "present".into(), ..entry }).collect();
    server.import(messages(&present)).await.unwrap();
    let entries = mixed(COUNT);
    let (repeats, bad) = (COUNT / 10, COUNT / 1_000);
    let answer = server.import(messages(&entries)).await.unwrap();
    assert_eq!(counts(&answer), (COUNT - 1_000, 1_000 + repeats, bad));
    let stored = stored(&server).await;
    assert_eq!(stored.len() as u64, COUNT);
    for (at, entry) in entries.iter().filter(|entry| entry.reason == "first").enumerate() {
        let time = entry.unsubscribe_time.map(|time| time.seconds * 1_000_000 + i64::from(time.nanos) / 1_000);
        let reason = if at < 1_000 { "present" } else { "first" };
        assert_eq!(stored[&entry.email], (reason.to_owned(), time), "entry {at}");
    }
    let kept = "SELECT imported, skipped, failed FROM imports WHERE finished_at IS NOT NULL ORDER BY started_at DESC LIMIT 1";
    let kept: (i64, i64, i64) = sqlx::query_as(kept).fetch_one(&mut server.connection().await).await.unwrap();
    assert_eq!(kept, ((COUNT - 1_000) as i64, (1_000 + repeats) as i64, bad as i64));
    let answer = server.import(messages(&entries)).await.unwrap();
    assert_eq!(counts(&answer), (0, COUNT + repeats, bad));
}

#[tokio::test]
async fn a_broken_stream_says_what_is_stored_and_leaves_no_file() {
    let server = TestServer::start().await;
    let process = process(&FLAGS, &server, None);
    let mut client = DncServiceClient::new(Channel::from_shared(process.grpc_url.clone()).unwrap().connect().await.unwrap());
    for count in [100_000, 300_000] {
        // The last message is too large.
        let broken = [messages(&mixed(count)), vec![request(vec![email("x".repeat(5 << 20))])]].concat();
        let status = client.import_entries(with_key(tokio_stream::iter(broken), &server.key)).await.unwrap_err();
        let counts = status.get_details_error_info().unwrap().metadata;
        let [imported, skipped] = ["imported", "skipped"].map(|name| counts[name].parse::<i64>().unwrap());
        // What waited in the files is not stored, and not counted.
        assert!(imported + skipped < count as i64, "{counts:?}");
        until("its files are closed", || async { files(&process).is_empty() }).await;
        let answer = client.import_entries(with_key(tokio_stream::iter(messages(&mixed(count))), &server.key)).await.unwrap();
        assert_eq!(answer.into_inner().imported as i64 + imported, count as i64);
        server.remove_all().await;
    }
    until("no file is left", || async { files(&process).is_empty() }).await;
}

#[tokio::test]
async fn an_import_is_stored_where_no_temporary_file_can_be_written() {
    let server = TestServer::start().await;
    let process = process(&FLAGS, &server, Some("/nonexistent"));
    let mut client = DncServiceClient::new(Channel::from_shared(process.grpc_url.clone()).unwrap().connect().await.unwrap());
    let answer = client.import_entries(with_key(tokio_stream::iter(messages(&mixed(150_000))), &server.key)).await.unwrap();
    assert_eq!(counts(&answer.into_inner()), (150_000, 15_000, 150));
}

/// A server of its own, with this directory for temporary files.
fn process(flags: &[&str], server: &TestServer, temporary: Option<&str>) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dnc"));
    command.args(["serve", "--http-addr", "127.0.0.1:0", "--grpc-addr", "127.0.0.1:0", "--log-format", "json"]).args(flags);
    command.env("DATABASE_URL", &server.database_url).stderr(Stdio::piped());
    if let Some(temporary) = temporary {
        command.env("TMPDIR", temporary);
    }
    Process::serving(&mut command)
}

/// The deleted files that a process has open.
fn files(process: &Process) -> Vec<String> {
    let links = std::fs::read_dir(format!("/proc/{}/fd", process.id())).unwrap();
    let open = links.filter_map(|link| std::fs::read_link(link.ok()?.path()).ok()).map(|path| path.display().to_string());
    open.filter(|path| path.ends_with("(deleted)")).collect()
}

impl TestServer {
    /// Removes all entries.
    async fn remove_all(&self) {
        sqlx::query("TRUNCATE entries, entry_counts, reason_counts").execute(&mut self.connection().await).await.unwrap();
    }
}
