//! The latency of single checks at given rates, while nothing else runs and while an import does.
//!
//! The load is open: a request is sent when it is due, whether or not earlier ones are answered,
//! and its latency counts from then. A service that stalls is charged for every request that was
//! due meanwhile. Senders, service and database share the machine, so only the comparison with the
//! bare statement in the same run counts.

#[allow(unreachable_pub, dead_code, reason = "shared by several programs")]
mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use clap::Parser;
use dnc::proto::{CheckEntriesRequest, dnc_service_client::DncServiceClient};
use support::{BareChecks, Database, Served, import, parts};
use tokio::{sync::mpsc, task::JoinSet};
use tonic::{Request, transport::Channel};

/// Connections to the database: those of the service by default, and those of the bare statement.
const CONNECTIONS: u32 = 16;

/// Channels to the service.
const CHANNELS: usize = 4;

/// A rate holds if this part of its requests is answered within [`HOLDS_WITHIN`].
const HOLDS_PART: f64 = 0.99;
const HOLDS_WITHIN: Duration = Duration::from_millis(50);

/// Requests that wait at the same time. More of them end a step: its rate does not hold.
const WAITING_MAX: u64 = 4_000;

/// A step of the search for the highest rate that holds.
const STEP: f64 = 1.2;

#[derive(Parser)]
struct Options {
    /// The size of the list, in entries
    #[arg(long, default_value_t = 5_000_000)]
    rows: u64,
    /// Rates to measure, in requests a second, besides the highest one and half of it
    #[arg(long, value_delimiter = ',', default_values_t = [1_000, 5_000])]
    rates: Vec<u64>,
    /// How long each rate is held
    #[arg(long, default_value_t = 10)]
    secs: u64,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// How a check is made.
#[derive(Clone)]
enum Way {
    Grpc { channels: Vec<DncServiceClient<Channel>>, key: String },
    Http { client: reqwest::Client, url: String, key: String },
    Statement(BareChecks),
}

impl Way {
    fn name(&self) -> &'static str {
        match self {
            Self::Grpc { .. } => "gRPC",
            Self::Http { .. } => "HTTP",
            Self::Statement(_) => "bare statement",
        }
    }

    async fn check(&self, number: u64, email: String) -> anyhow::Result<()> {
        match self {
            Self::Grpc { channels, key } => {
                let mut request = Request::new(CheckEntriesRequest { emails: vec![email] });
                request.metadata_mut().insert("x-api-key", key.parse()?);
                channels[number as usize % channels.len()].clone().check_entries(request).await?;
            }
            Self::Http { client, url, key } => {
                let answer = client.get(format!("{url}/v1/dnc/check?email={email}")).header("x-api-key", key).send().await?;
                answer.error_for_status()?.bytes().await?;
            }
            Self::Statement(bare) => {
                bare.check(&[email]).await?;
            }
        }
        Ok(())
    }
}

/// What became of the requests of one rate.
struct Measured {
    /// The latency of each request that was answered, in order.
    latencies: Vec<Duration>,
    /// Requests that failed, or that were not sent since too many waited.
    lost: u64,
}

impl Measured {
    fn percentile(&self, part: f64) -> Duration {
        let last = self.latencies.len().saturating_sub(1);
        self.latencies.get((last as f64 * part).round() as usize).copied().unwrap_or_default()
    }

    fn holds(&self) -> bool {
        self.lost == 0 && self.percentile(HOLDS_PART) <= HOLDS_WITHIN
    }
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    // reqwest asks for one even where it needs none.
    let _ = rustls::crypto::ring::default_provider().install_default();
    tokio::runtime::Runtime::new()?.block_on(run(options))
}

async fn run(options: Options) -> anyhow::Result<()> {
    let database = Database::start().await?;
    let (store, workspace, key) = support::tenant(&database.url).await?;
    let bare = BareChecks::connect(&database.url, CONNECTIONS, workspace).await?;
    eprintln!("filling the list up to {}", options.rows);
    bare.fill(options.rows).await?;
    let served = Served::start(&database.url, key.clone()).await?;
    let mut channels = Vec::new();
    for _ in 0..CHANNELS {
        channels.push(DncServiceClient::connect(served.grpc_url.clone()).await?);
    }
    let ways = [
        Way::Statement(bare),
        Way::Grpc { channels, key: key.clone() },
        Way::Http { client: reqwest::Client::new(), url: served.http_url.clone(), key },
    ];
    println!("single checks, a list of {}, latency from when each was due", options.rows);
    println!("{:<16}{:>10}{:>14}{:>10}{:>10}{:>10}{:>8}", "way", "rate/s", "", "p50 ms", "p99 ms", "p99.9 ms", "lost");
    let mut highest = Vec::new();
    for way in &ways {
        // Each connection is slow until it has seen most pages.
        at_rate(way, 500, 3, options.rows).await?;
        let rate = highest_rate(way, options.rows).await?;
        for rate in options.rates.iter().copied().filter(|wanted| *wanted < rate).chain([rate / 2, rate]) {
            print(way, rate, "", &at_rate(way, rate, options.secs, options.rows).await?);
        }
        highest.push(rate);
    }
    println!("highest rate that holds, gRPC against the bare statement: {:.2}", highest[1] as f64 / highest[0] as f64);
    println!("highest rate that holds, HTTP against the bare statement: {:.2}", highest[2] as f64 / highest[0] as f64);

    let importing = Importing::start(&served, options.rows).await?;
    for way in &ways {
        for &rate in &options.rates {
            print(way, rate, "+ import", &at_rate(way, rate, options.secs, options.rows).await?);
        }
    }
    println!("imported meanwhile: {} entries/s", importing.stop().await? as u64);
    store.close().await;
    Ok(())
}

fn print(way: &Way, rate: u64, load: &str, measured: &Measured) {
    let millis = |part| measured.percentile(part).as_secs_f64() * 1e3;
    let (p50, p99, p999) = (millis(0.5), millis(0.99), millis(0.999));
    println!("{:<16}{rate:>10}{load:>14}{p50:>10.2}{p99:>10.2}{p999:>10.2}{:>8}", way.name(), measured.lost);
}

/// The highest rate that holds for two seconds.
async fn highest_rate(way: &Way, rows: u64) -> anyhow::Result<u64> {
    let mut rate = 1_000.0;
    while at_rate(way, (rate * STEP) as u64, 2, rows).await?.holds() {
        rate *= STEP;
    }
    Ok(rate as u64)
}

/// Sends checks at this rate, and waits for all of them.
async fn at_rate(way: &Way, rate: u64, secs: u64, rows: u64) -> anyhow::Result<Measured> {
    // A thread of its own: tokio's timers count in milliseconds.
    let (due, mut dues) = mpsc::unbounded_channel();
    let pacing = std::thread::spawn(move || {
        let began = Instant::now() + Duration::from_millis(10);
        for number in 0..rate * secs {
            let at = began + Duration::from_secs_f64(number as f64 / rate as f64);
            if let Some(left) = at.checked_duration_since(Instant::now()) {
                std::thread::sleep(left);
            }
            if due.send((number, at)).is_err() {
                return;
            }
        }
    });
    let (waiting, failed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut calls = JoinSet::new();
    let mut lost = 0;
    while let Some((number, at)) = dues.recv().await {
        if waiting.load(Ordering::Relaxed) >= WAITING_MAX {
            lost += 1;
            continue;
        }
        waiting.fetch_add(1, Ordering::Relaxed);
        let (way, waiting, failed) = (way.clone(), waiting.clone(), failed.clone());
        // Every second address is on the list.
        let user = (number * 7_919_777 + rate) % (2 * rows);
        calls.spawn(async move {
            let checked = way.check(number, BareChecks::email(user)).await;
            waiting.fetch_sub(1, Ordering::Relaxed);
            if checked.is_err() {
                failed.fetch_add(1, Ordering::Relaxed);
            }
            checked.ok().map(|()| at.elapsed())
        });
    }
    let mut latencies: Vec<Duration> = calls.join_all().await.into_iter().flatten().collect();
    latencies.sort_unstable();
    ensure!(pacing.join().is_ok(), "the sender panicked");
    Ok(Measured { latencies, lost: lost + failed.load(Ordering::Relaxed) })
}

/// Imports of new entries, one after the other, into the list that is checked.
struct Importing {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<anyhow::Result<f64>>,
}

impl Importing {
    const ENTRIES: u64 = 200_000;

    /// Begins them. The list that is checked has `rows` other entries.
    async fn start(served: &Served, rows: u64) -> anyhow::Result<Self> {
        let channel = Channel::from_shared(served.grpc_url.clone())?.connect().await?;
        let (key, stop) = (served.key.clone(), Arc::new(AtomicBool::new(false)));
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let (began, mut next) = (Instant::now(), rows);
            while !stopped.load(Ordering::Relaxed) {
                let messages: Vec<_> = parts(next..next + Self::ENTRIES, support::MESSAGE_ENTRIES).map(support::message).collect();
                import(channel.clone(), key.clone(), tokio_stream::iter(messages)).await.context("an import failed")?;
                next += Self::ENTRIES;
            }
            Ok((next - rows) as f64 / began.elapsed().as_secs_f64())
        });
        Ok(Self { stop, task })
    }

    /// Ends them, and returns the entries a second that were stored.
    async fn stop(self) -> anyhow::Result<f64> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await?
    }
}
