//! The throughput of imports compared with the limit of the database, in one run. Only the ratios
//! count: absolute figures depend on the machine.
//!
//! The service runs in a separate process, so that its processor time and memory are measured
//! separately. What clients send is prepared before the clock starts, since clients usually run on
//! other machines. Each way is measured next to the one that it is compared with, in alternating
//! order: the speed of a machine changes, and a ratio of two figures taken minutes apart says
//! little. The median of several rounds counts.

#[allow(unreachable_pub, dead_code, reason = "shared by several programs")]
mod support;

use std::{collections::BTreeMap, fs, io::Write, ops::Range, path::PathBuf, time::Instant};

use anyhow::{Context, bail};
use clap::Parser;
use serde_json::json;
use sqlx::{PgPool, postgres::PgPoolOptions};
use support::{
    Database, MESSAGE_ENTRIES, Served, address, cpu_secs_of, import, median, message, own_cpu_secs, parts, peak_bytes_of, psql,
    reset_peak_of,
};
use tokio::task::JoinSet;
use tokio_util::bytes::Bytes;
use tonic::transport::Channel;

const STATEMENT: &str = "INSERT INTO entries (workspace_id, added_by, address, reason)
     SELECT $1, 1, address, reason FROM UNNEST($2::text[], $3::text[]) AS new (address, reason)
     ON CONFLICT DO NOTHING";
const POST_ENTRIES: u64 = 10_000;
/// Measurements on top of a large list use the number of entries divided by this.
const ON_TOP_DIVISOR: u64 = 3;
const CHUNK_BYTES: usize = 64 << 10;

#[derive(Parser)]
struct Options {
    /// Entries of one measurement
    #[arg(long, default_value_t = 600_000)]
    entries: u64,
    /// Rows on the list before the measurements on top of a large list
    #[arg(long, default_value_t = 5_000_000)]
    rows_below: u64,
    /// Entries of the streams whose peak memory is measured; 0 omits them
    #[arg(long, default_value_t = 10_000_000)]
    long_stream_entries: u64,
    /// Rounds of each measurement
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Single posts of 10,000 entries whose times are compared
    #[arg(long, default_value_t = 60)]
    posts: u64,
    /// Only ways whose names contain this text; may be given several times
    #[arg(long)]
    only: Vec<String>,
    /// File for the results as JSON
    #[arg(long, default_value = "target/import-bench.json")]
    json: PathBuf,
    /// Passed by cargo to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

/// A way into the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    /// The statement that the service sends, sent directly to the database.
    Bare {
        batch: u64,
        connections: u64,
    },
    /// `psql` with a file, as a database administrator would import it.
    Psql,
    /// `COPY` into the table itself, which fails at the first duplicate.
    Copy,
    Grpc {
        streams: u64,
    },
    Json {
        posts: u64,
    },
    Ndjson,
    Csv,
}

impl Way {
    /// The pairs of ways that are compared.
    const PAIRS: [(Self, Self); 9] = [
        (Self::Grpc { streams: 1 }, Self::Bare { batch: BATCH_ENTRIES, connections: 4 }),
        (Self::Grpc { streams: 4 }, Self::Bare { batch: BATCH_ENTRIES, connections: 4 }),
        (Self::Json { posts: 4 }, Self::Bare { batch: POST_ENTRIES, connections: 4 }),
        (Self::Json { posts: 1 }, Self::Bare { batch: POST_ENTRIES, connections: 1 }),
        (Self::Ndjson, Self::Bare { batch: BATCH_ENTRIES, connections: 4 }),
        (Self::Csv, Self::Bare { batch: BATCH_ENTRIES, connections: 4 }),
        (Self::Grpc { streams: 1 }, Self::Psql),
        (Self::Psql, Self::Bare { batch: BATCH_ENTRIES, connections: 1 }),
        (Self::Copy, Self::Bare { batch: BATCH_ENTRIES, connections: 1 }),
    ];

    const ALL: [Self; 12] = [
        Self::Bare { batch: BATCH_ENTRIES, connections: 1 },
        Self::Bare { batch: BATCH_ENTRIES, connections: 4 },
        Self::Grpc { streams: 1 },
        Self::Grpc { streams: 4 },
        Self::Bare { batch: POST_ENTRIES, connections: 1 },
        Self::Bare { batch: POST_ENTRIES, connections: 4 },
        Self::Json { posts: 1 },
        Self::Json { posts: 4 },
        Self::Ndjson,
        Self::Csv,
        Self::Psql,
        Self::Copy,
    ];

    fn name(self) -> String {
        match self {
            Self::Bare { batch, connections } => format!("bare statement, {batch} x {connections}"),
            Self::Psql => "psql: \\copy, then INSERT".to_owned(),
            Self::Copy => "COPY into the keyed table".to_owned(),
            Self::Grpc { streams } => format!("gRPC stream x {streams}"),
            Self::Json { posts } => format!("JSON posts of 10000 x {posts}"),
            Self::Ndjson => "NDJSON stream".to_owned(),
            Self::Csv => "CSV stream".to_owned(),
        }
    }

    fn is_service(self) -> bool {
        matches!(self, Self::Grpc { .. } | Self::Json { .. } | Self::Ndjson | Self::Csv)
    }
}

/// The default size of the service's batches, in entries.
const BATCH_ENTRIES: u64 = 20_000;

/// The prepared data of a measurement.
enum Load {
    Arrays(Vec<(Vec<String>, Vec<String>)>),
    File(tempfile::NamedTempFile),
    Streams(Vec<Vec<Bytes>>),
    Bodies(Vec<Bytes>),
}

#[derive(Clone, Copy, Debug)]
struct Measured {
    secs: f64,
    database_cpu_secs: Option<f64>,
    server_cpu_secs: Option<f64>,
    /// The processor time of this program, which sends the data.
    sender_cpu_secs: Option<f64>,
    server_peak_bytes: Option<u64>,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    tokio::runtime::Runtime::new()?.block_on(async { tokio::spawn(run(options)).await? })
}

fn body(numbers: Range<u64>) -> Bytes {
    let entries: Vec<_> = numbers.map(|number| json!({"email": address(number), "type": "email", "reason": "bounce"})).collect();
    json!({ "entries": entries }).to_string().into()
}

fn line(way: Way, number: u64) -> String {
    match way {
        Way::Ndjson => format!("{{\"email\":\"{}\",\"reason\":\"bounce\"}}\n", address(number)),
        _ => format!("{},bounce\n", address(number)),
    }
}

fn chunks(way: Way, numbers: Range<u64>) -> impl Iterator<Item = Bytes> {
    let mut numbers = numbers;
    let mut next = if way == Way::Csv { "email,reason\n".to_owned() } else { String::new() };
    std::iter::from_fn(move || {
        while next.len() < CHUNK_BYTES
            && let Some(number) = numbers.next()
        {
            next.push_str(&line(way, number));
        }
        Some(Bytes::from(std::mem::take(&mut next))).filter(|chunk| !chunk.is_empty())
    })
}

fn load(way: Way, numbers: Range<u64>) -> anyhow::Result<Load> {
    Ok(match way {
        Way::Bare { batch, .. } => Load::Arrays(
            parts(numbers, batch)
                .map(|part| {
                    let mut addresses: Vec<String> = part.map(address).collect();
                    addresses.sort_unstable();
                    let reasons = vec!["bounce".to_owned(); addresses.len()];
                    (addresses, reasons)
                })
                .collect(),
        ),
        Way::Psql | Way::Copy => {
            let mut file = tempfile::NamedTempFile::new()?;
            for number in numbers {
                file.write_all(line(way, number).as_bytes())?;
            }
            Load::File(file)
        }
        Way::Grpc { streams } => {
            let share = (numbers.end - numbers.start).div_ceil(streams);
            Load::Streams(parts(numbers, share).map(|part| parts(part, MESSAGE_ENTRIES).map(message).collect()).collect())
        }
        Way::Json { .. } => Load::Bodies(parts(numbers, POST_ENTRIES).map(body).collect()),
        Way::Ndjson | Way::Csv => Load::Bodies(chunks(way, numbers).collect()),
    })
}

struct Bench {
    database: Database,
    pool: PgPool,
    workspace: i64,
    server: Served,
    grpc: Channel,
    http: reqwest::Client,
    psql: Option<PathBuf>,
}

async fn run(options: Options) -> anyhow::Result<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let database = Database::start().await?;
    let (store, workspace, key) = support::tenant(&database.url).await?;
    let server = Served::start(&database.url, key).await?;
    let pool = PgPoolOptions::new().min_connections(4).max_connections(4).test_before_acquire(false).connect(&database.url).await?;
    let grpc = Channel::from_shared(server.grpc_url.clone())?.connect().await?;
    let bench = Bench { database, pool, workspace: workspace.0, server, grpc, http: reqwest::Client::new(), psql: psql() };
    if bench.psql.is_none() {
        eprintln!("SKIPPED: there is no psql on this machine, so the administrator's way is not measured");
    }
    let is_wanted = |way: &Way| options.only.is_empty() || options.only.iter().any(|text| way.name().contains(text));
    let is_possible = |way: &Way| *way != Way::Psql || bench.psql.is_some();
    let pairs: Vec<(Way, Way)> = Way::PAIRS
        .into_iter()
        .filter(|(ours, theirs)| (is_wanted(ours) || is_wanted(theirs)) && is_possible(ours) && is_possible(theirs))
        .collect();
    // Opens the service's connections and fills all caches, as on a server that has run for a
    // while.
    bench.measure(Way::Grpc { streams: 4 }, 0..100_000).await?;
    bench.measure(Way::Bare { batch: POST_ENTRIES, connections: 4 }, 100_000..200_000).await?;

    let mut results = Results::new();
    for round in 0..options.rounds {
        eprintln!("round {} of {}: fresh and present entries", round + 1, options.rounds);
        for pair in &pairs {
            for way in in_order(*pair, round) {
                bench.empty().await?;
                let measured = bench.measure(way, 0..options.entries).await?;
                results.entry((*pair, "fresh")).or_default().push((way, measured));
                if way != Way::Copy {
                    let measured = bench.measure(way, 0..options.entries).await?;
                    results.entry((*pair, "present")).or_default().push((way, measured));
                }
            }
        }
    }
    eprintln!("one post of 10,000 beside one statement");
    bench.empty().await?;
    let posts = bench.posts(options.posts).await?;

    eprintln!("on top of {} rows", options.rows_below);
    bench.empty().await?;
    bench.measure(Way::Bare { batch: 100_000, connections: 4 }, 0..options.rows_below).await?;
    sqlx::query("VACUUM ANALYZE entries").execute(&bench.pool).await?;
    let mut next = options.rows_below;
    // The list grows with each measurement, so there are fewer and smaller rounds. Both ways of a
    // pair meet a list of about the same size.
    for round in 0..options.rounds.min(2) {
        for pair in &pairs {
            for way in in_order(*pair, round) {
                let numbers = next..next + options.entries / ON_TOP_DIVISOR;
                next = numbers.end;
                let measured = bench.measure(way, numbers).await?;
                results.entry((*pair, "on top")).or_default().push((way, measured));
            }
        }
    }
    eprintln!("the list has {next} rows at the end of that");

    let mut long = BTreeMap::new();
    if options.long_stream_entries > 0 {
        for way in [Way::Grpc { streams: 1 }, Way::Ndjson] {
            eprintln!("one stream of {} entries: {}", options.long_stream_entries, way.name());
            bench.empty().await?;
            long.insert(way, bench.long_stream(way, options.long_stream_entries).await?);
        }
    }
    store.close().await;
    report(&options, &results, &posts, &long)
}

/// The measurements of a pair of ways in one state of the list.
type Results = BTreeMap<((Way, Way), &'static str), Vec<(Way, Measured)>>;

/// The ways of a pair in the order of this round.
fn in_order((ours, theirs): (Way, Way), round: usize) -> [Way; 2] {
    if round.is_multiple_of(2) { [theirs, ours] } else { [ours, theirs] }
}

impl Bench {
    /// Empties the tables and runs a checkpoint, so that each measurement starts with the same
    /// write-ahead log.
    async fn empty(&self) -> anyhow::Result<()> {
        sqlx::query("TRUNCATE entries, entry_counts, reason_counts, imports").execute(&self.pool).await?;
        sqlx::query("CHECKPOINT").execute(&self.pool).await?;
        Ok(())
    }

    async fn measure(&self, way: Way, numbers: Range<u64>) -> anyhow::Result<Measured> {
        let load = load(way, numbers)?;
        self.timed(way, self.send(way, load)).await
    }

    async fn timed(&self, way: Way, work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<Measured> {
        let postmaster = self.database.postgres.pid()?;
        reset_peak_of(self.server.pid());
        let (database, server) = (cpu_secs_of(postmaster), cpu_secs_of(self.server.pid()));
        let sender = own_cpu_secs();
        let started = Instant::now();
        work.await.with_context(|| way.name())?;
        let secs = started.elapsed().as_secs_f64();
        let spent = |before: Option<f64>, after: Option<f64>| Some(after? - before?);
        Ok(Measured {
            secs,
            database_cpu_secs: spent(database, cpu_secs_of(postmaster)),
            server_cpu_secs: spent(server, cpu_secs_of(self.server.pid())).filter(|_| way.is_service()),
            sender_cpu_secs: spent(sender, own_cpu_secs()),
            server_peak_bytes: peak_bytes_of(self.server.pid()).filter(|_| way.is_service()),
        })
    }

    async fn send(&self, way: Way, load: Load) -> anyhow::Result<()> {
        match (way, load) {
            (Way::Bare { connections, .. }, Load::Arrays(batches)) => {
                let batches = std::sync::Arc::new(std::sync::Mutex::new(batches));
                let tasks = (0..connections).map(|_| {
                    let (batches, pool, workspace) = (batches.clone(), self.pool.clone(), self.workspace);
                    async move {
                        let next = || batches.lock().ok().and_then(|mut batches| batches.pop());
                        while let Some((addresses, reasons)) = next() {
                            sqlx::query(STATEMENT).bind(workspace).bind(&addresses).bind(&reasons).execute(&pool).await?;
                        }
                        Ok(())
                    }
                });
                all(tasks).await
            }
            (Way::Psql, Load::File(file)) => {
                let script = format!(
                    "CREATE TEMPORARY TABLE staging (address text, reason text);\n\\copy staging FROM '{}' (FORMAT csv)\n\
                     INSERT INTO entries (workspace_id, added_by, address, reason) SELECT {}, 1, address, reason FROM staging ON CONFLICT DO NOTHING;\n",
                    file.path().display(),
                    self.workspace
                );
                let script_file = tempfile::NamedTempFile::new()?;
                fs::write(script_file.path(), script)?;
                let psql = self.psql.as_ref().context("there is no psql")?;
                let mut command = tokio::process::Command::new(psql);
                command.args(["-q", "-X", "-v", "ON_ERROR_STOP=1", "-f"]).arg(script_file.path()).arg(&self.database.url);
                if !command.status().await?.success() {
                    bail!("psql failed");
                }
                Ok(())
            }
            (Way::Copy, Load::File(file)) => {
                // The same columns and defaults as in an insert. The client adds the columns that
                // are equal in all rows.
                let rows: String =
                    fs::read_to_string(file.path())?.lines().map(|line| format!("{},1,{line}\n", self.workspace)).collect();
                let mut connection = self.pool.acquire().await?;
                let copy = "COPY entries (workspace_id, added_by, address, reason) FROM STDIN (FORMAT csv)";
                let mut copy = connection.copy_in_raw(copy).await?;
                for chunk in rows.as_bytes().chunks(1 << 20) {
                    copy.send(chunk).await?;
                }
                copy.finish().await?;
                Ok(())
            }
            (Way::Grpc { .. }, Load::Streams(streams)) => {
                all(streams.into_iter().map(|messages| self.stream(futures_util::stream::iter(messages)))).await
            }
            (Way::Json { posts }, Load::Bodies(bodies)) => {
                let bodies = std::sync::Arc::new(std::sync::Mutex::new(bodies));
                let tasks = (0..posts).map(|_| {
                    let bodies = bodies.clone();
                    let post = |body| self.post("application/json", body);
                    let requests = std::iter::from_fn(move || bodies.lock().ok()?.pop()).map(post);
                    async move {
                        for request in requests {
                            request.await?;
                        }
                        Ok(())
                    }
                });
                futures_util::future::try_join_all(tasks).await.map(drop)
            }
            (Way::Ndjson | Way::Csv, Load::Bodies(chunks)) => {
                self.post(media_type(way), reqwest::Body::wrap_stream(ok_stream(chunks))).await
            }
            _ => bail!("this load is for another way"),
        }
    }

    /// One import over gRPC, of encoded messages.
    fn stream(
        &self,
        messages: impl futures_util::Stream<Item = Bytes> + Send + 'static,
    ) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
        import(self.grpc.clone(), self.server.key.clone(), messages)
    }

    fn post(
        &self,
        media_type: &'static str,
        body: impl Into<reqwest::Body>,
    ) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
        let request = self.http.post(format!("{}/v1/dnc/import", self.server.http_url));
        let request = request.header("x-api-key", &self.server.key).header("content-type", media_type).body(body);
        async move {
            let answer = request.send().await?;
            if !answer.status().is_success() {
                bail!("{}", answer.text().await?);
            }
            answer.bytes().await?;
            Ok(())
        }
    }

    /// The times of single posts and of single statements of the same size, in alternating order:
    /// the sorted seconds of the statements, then of the posts.
    async fn posts(&self, count: u64) -> anyhow::Result<[Vec<f64>; 2]> {
        let ways = [Way::Bare { batch: POST_ENTRIES, connections: 1 }, Way::Json { posts: 1 }];
        let mut seconds = [Vec::new(), Vec::new()];
        for number in 0..2 * count {
            // Alternates the order within each pair.
            let side = ((number + number / 2) % 2) as usize;
            let measured = self.measure(ways[side], number * POST_ENTRIES..(number + 1) * POST_ENTRIES).await?;
            seconds[side].push(measured.secs);
        }
        for seconds in &mut seconds {
            seconds.sort_by(f64::total_cmp);
        }
        Ok(seconds)
    }

    /// One stream that is generated while it is sent, to a service that is started for it.
    async fn long_stream(&self, way: Way, entries: u64) -> anyhow::Result<Measured> {
        let server = Served::start(&self.database.url, self.server.key.clone()).await?;
        let grpc = Channel::from_shared(server.grpc_url.clone())?.connect().await?;
        let bench = Bench {
            database: self.database.clone(),
            pool: self.pool.clone(),
            workspace: self.workspace,
            server,
            grpc,
            http: reqwest::Client::new(),
            psql: None,
        };
        match way {
            Way::Grpc { .. } => {
                let messages = futures_util::stream::iter(parts(0..entries, MESSAGE_ENTRIES).map(message));
                bench.timed(way, bench.stream(messages)).await
            }
            _ => {
                let body = reqwest::Body::wrap_stream(ok_stream(chunks(way, 0..entries)));
                bench.timed(way, bench.post(media_type(way), body)).await
            }
        }
    }
}

fn media_type(way: Way) -> &'static str {
    if way == Way::Csv { "text/csv" } else { "application/x-ndjson" }
}

fn ok_stream(
    chunks: impl IntoIterator<Item = Bytes, IntoIter: Send + 'static>,
) -> impl futures_util::Stream<Item = Result<Bytes, std::io::Error>> + Send + 'static {
    futures_util::stream::iter(chunks.into_iter().map(Ok))
}

async fn all(work: impl Iterator<Item = impl Future<Output = anyhow::Result<()>> + Send + 'static>) -> anyhow::Result<()> {
    let mut tasks: JoinSet<anyhow::Result<()>> = work.collect();
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(())
}

fn report(options: &Options, results: &Results, posts: &[Vec<f64>; 2], long: &BTreeMap<Way, Measured>) -> anyhow::Result<()> {
    let all_of = |way: Way, state: &str| -> Vec<Measured> {
        let of_state = results.iter().filter(|((_, of), _)| *of == state).flat_map(|(_, all)| all);
        of_state.filter(|(of, _)| *of == way).map(|(_, measured)| *measured).collect()
    };
    let middle = |way: Way, state: &'static str| -> Option<Measured> {
        let mut all = all_of(way, state);
        all.sort_by(|a, b| a.secs.total_cmp(&b.secs));
        all.get(all.len() / 2).copied()
    };
    let entries = |state: &str| if state == "on top" { options.entries / ON_TOP_DIVISOR } else { options.entries };
    let rate = |way: Way, state: &'static str| middle(way, state).map(|measured| entries(state) as f64 / measured.secs);
    let per_entry = |secs: Option<f64>| secs.map(|secs| secs / options.entries as f64 * 1e6);
    let text = |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |value| format!("{value:.digits$}"));

    println!(
        "{:<32}{:>11}{:>11}{:>11}{:>13}{:>13}{:>11}{:>10}",
        "entries a second", "fresh", "present", "on top", "database us", "service us", "sender us", "peak MiB"
    );
    let mut rows = Vec::new();
    for way in Way::ALL {
        let Some(fresh) = middle(way, "fresh") else { continue };
        let states = ["fresh", "present", "on top"];
        let peaks = states.iter().flat_map(|state| all_of(way, state)).filter_map(|measured| measured.server_peak_bytes);
        let peak = peaks.max().map(|bytes| bytes as f64 / f64::from(1 << 20));
        println!(
            "{:<32}{:>11}{:>11}{:>11}{:>13}{:>13}{:>11}{:>10}",
            way.name(),
            text(rate(way, "fresh"), 0),
            text(rate(way, "present"), 0),
            text(rate(way, "on top"), 0),
            text(per_entry(fresh.database_cpu_secs), 2),
            text(per_entry(fresh.server_cpu_secs), 2),
            text(per_entry(fresh.sender_cpu_secs), 2),
            text(peak, 0)
        );
        let states: serde_json::Map<_, _> = ["fresh", "present", "on top"]
            .into_iter()
            .filter_map(|state| {
                let measured = middle(way, state)?;
                let value = json!({
                    "entries": entries(state),
                    "secs": measured.secs,
                    "entries_per_sec": entries(state) as f64 / measured.secs,
                    "database_cpu_secs": measured.database_cpu_secs,
                    "server_cpu_secs": measured.server_cpu_secs,
                    "sender_cpu_secs": measured.sender_cpu_secs,
                    "server_peak_bytes": measured.server_peak_bytes,
                });
                Some((state.to_owned(), value))
            })
            .collect();
        rows.push(json!({ "way": way.name(), "states": states }));
    }
    println!("(microseconds of processor time an entry, of fresh ones)\n");

    // The median, over all rounds, of the ratio of the two measurements of a round.
    let ratio = |ours: Way, theirs: Way, state: &'static str| {
        let rounds = results.get(&((ours, theirs), state))?.chunks_exact(2);
        let ratios = rounds.map(|round| {
            let secs = |way| round.iter().find(|(of, _)| *of == way).map_or(f64::NAN, |(_, measured)| measured.secs);
            secs(theirs) / secs(ours)
        });
        Some(median(ratios.collect()))
    };
    let bare = |batch, connections| Way::Bare { batch, connections };
    let grpc = Way::Grpc { streams: 1 };
    let quantile = |side: usize, part: f64| posts[side].get((posts[side].len() as f64 * part) as usize).copied();
    let cpu = middle(grpc, "fresh").and_then(|measured| Some(measured.server_cpu_secs? / measured.database_cpu_secs?));
    let peak = |way: Way| long.get(&way).and_then(|m| m.server_peak_bytes).map(|bytes| bytes as f64 / f64::from(1 << 20));
    let post = |part: f64| Some(quantile(1, part)? / quantile(0, part)?);
    let figures = [
        ("gRPC stream against the bare statement, 4 connections, fresh", ratio(grpc, bare(BATCH_ENTRIES, 4), "fresh"), ">= 0.95"),
        ("the same, all present", ratio(grpc, bare(BATCH_ENTRIES, 4), "present"), ">= 0.90"),
        ("the same, on top of a large list", ratio(grpc, bare(BATCH_ENTRIES, 4), "on top"), ""),
        ("4 gRPC streams against the same", ratio(Way::Grpc { streams: 4 }, bare(BATCH_ENTRIES, 4), "fresh"), ""),
        (
            "JSON posts, 4 at once, against the bare statement, 4 connections",
            ratio(Way::Json { posts: 4 }, bare(POST_ENTRIES, 4), "fresh"),
            ">= 0.85",
        ),
        ("NDJSON stream against the bare statement, 4 connections", ratio(Way::Ndjson, bare(BATCH_ENTRIES, 4), "fresh"), ""),
        ("CSV stream against the same", ratio(Way::Csv, bare(BATCH_ENTRIES, 4), "fresh"), ""),
        ("gRPC stream against the administrator's psql", ratio(grpc, Way::Psql, "fresh"), ">= 1.5"),
        ("one JSON post of 10,000 against the statement: p50 of the time", post(0.5), "<= 1.25"),
        ("the same: p99", post(0.99), ""),
        ("service's processor time against the database's, gRPC", cpu, "<= 0.15"),
        ("service's peak MiB, one long gRPC stream", peak(grpc), "<= 64"),
        ("service's peak MiB, one long NDJSON stream", peak(Way::Ndjson), "<= 64"),
    ];
    for (name, value, wanted) in &figures {
        println!("{name:<68}{:>8}  {wanted}", text(*value, 2));
    }
    let figures: Vec<_> =
        figures.iter().map(|(name, value, wanted)| json!({"figure": name, "value": value, "wanted": wanted})).collect();
    let milliseconds =
        |side: usize| json!({"p50_ms": quantile(side, 0.5).map(|s| s * 1e3), "p99_ms": quantile(side, 0.99).map(|s| s * 1e3)});
    let long: Vec<_> = long
        .iter()
        .map(|(way, m)| json!({"way": way.name(), "entries": options.long_stream_entries, "secs": m.secs, "server_peak_bytes": m.server_peak_bytes}))
        .collect();
    let whole = json!({
        "ways": rows,
        "post_of_10000": {"statement": milliseconds(0), "json": milliseconds(1)},
        "long_streams": long,
        "figures": figures,
    });
    if let Some(dir) = options.json.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(&options.json, serde_json::to_string_pretty(&whole)?)?;
    eprintln!("\nwritten to {}", options.json.display());
    Ok(())
}
