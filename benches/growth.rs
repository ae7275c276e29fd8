//! The rate of imports into lists of several sizes, in one run. Only the ratios count: absolute
//! figures depend on the machine.
//!
//! Each import adds to the list, so the ways take turns, and the size of the list when each one
//! began is reported. What clients send is prepared before the clock starts.

#[allow(unreachable_pub, dead_code, reason = "shared by several programs")]
mod support;

use std::{
    fs,
    io::Write,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use clap::Parser;
use dnc::{
    domain::{KeyOwner, Scope},
    store::Store,
};
use sqlx::{PgPool, postgres::PgPoolOptions};
use support::{Database, MESSAGE_ENTRIES, Served, address, import, median, message, parts, peak_bytes_of, psql, reset_peak_of};
use tokio_util::bytes::Bytes;
use tonic::transport::Channel;

#[derive(Parser)]
struct Options {
    /// Sizes of the list, in entries
    #[arg(long, value_delimiter = ',', default_values_t = [0, 1_000_000, 5_000_000, 20_000_000])]
    rows: Vec<u64>,
    /// Sizes of the imports, in entries
    #[arg(long, value_delimiter = ',', default_values_t = [2_000_000, 10_000_000])]
    entries: Vec<u64>,
    /// Rounds of each measurement
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// The cache of pages of the database, in MiB
    #[arg(long, default_value_t = 256)]
    shared_buffers_mib: u32,
    /// Only ways whose names contain this text; may be given several times
    #[arg(long)]
    only: Vec<String>,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// A way of importing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// One gRPC stream, with the default options.
    Default,
    /// One gRPC stream to a server that sorts every long import.
    Sorted,
    /// One gRPC stream to a server that sorts none.
    Arrival,
    /// An administrator with `psql`: a temporary table, from which the rows are inserted in order.
    Psql,
}

impl Way {
    const ALL: [Self; 4] = [Self::Default, Self::Sorted, Self::Arrival, Self::Psql];

    fn name(self) -> &'static str {
        match self {
            Self::Default => "stream",
            Self::Sorted => "stream, sorted",
            Self::Arrival => "stream, not sorted",
            Self::Psql => "psql, sorted",
        }
    }

    /// The flags of its server.
    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Default | Self::Psql => &[],
            Self::Sorted => &["--import-sort-rows-min", "0"],
            Self::Arrival => &["--import-sort-bytes-max", "0"],
        }
    }
}

/// A measured import.
struct Measured {
    way: Way,
    /// The size that the list was to have, and the size that it had.
    rows: u64,
    rows_before: u64,
    entries: u64,
    rate: f64,
    wal_bytes_per_row: f64,
    pages_read_per_row: f64,
    peak_bytes: u64,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    tokio::runtime::Runtime::new()?.block_on(run(options))
}

/// A list and a key for it.
struct List {
    workspace: i64,
    key: String,
}

async fn list(store: &Store) -> anyhow::Result<List> {
    let workspace = store.create_workspace("bench").await?;
    let key = store.issue_key(KeyOwner::Workspace(workspace), Scope::Write, "", None).await?.1.reveal().to_owned();
    Ok(List { workspace: workspace.0, key })
}

async fn run(options: Options) -> anyhow::Result<()> {
    let database = Database::start_with(options.shared_buffers_mib).await?;
    let (store, _, _) = support::tenant(&database.url).await?;
    let pool = PgPoolOptions::new().max_connections(2).connect(&database.url).await?;
    let mut ways: Vec<Way> = Way::ALL.into_iter().filter(|way| is_wanted(&options, *way)).collect();
    if psql().is_none() {
        eprintln!("SKIPPED: there is no psql on this machine, so the administrator's way is not measured");
        ways.retain(|way| *way != Way::Psql);
    }
    let large = list(&store).await?;
    let mut next = 0;
    let mut all = Vec::new();
    for &rows in &options.rows {
        let present = sqlx::query_scalar("SELECT COALESCE(sum(entries), 0)::bigint FROM entry_counts WHERE workspace_id = $1");
        let present: i64 = present.bind(large.workspace).fetch_one(&pool).await?;
        grow(&pool, large.workspace, present.unsigned_abs(), rows).await?;
        for round in 0..options.rounds {
            for &entries in &options.entries {
                ways.rotate_left(1);
                for &way in &ways {
                    eprintln!("round {}: {} of {entries} into {rows}", round + 1, way.name());
                    let of_its_own = if rows == 0 { Some(list(&store).await?) } else { None };
                    let list = of_its_own.as_ref().unwrap_or(&large);
                    all.push(measure(&database, &pool, list, way, rows, next..next + entries).await?);
                    next += entries;
                }
            }
        }
    }
    store.close().await;
    report(&options, &all)
}

fn is_wanted(options: &Options, way: Way) -> bool {
    options.only.is_empty() || options.only.iter().any(|text| way.name().contains(text))
}

/// Fills the list up to `rows` entries. Its index is as full as after imports in no order.
async fn grow(pool: &PgPool, workspace: i64, present: u64, rows: u64) -> anyhow::Result<()> {
    let Some(missing) = rows.checked_sub(present).filter(|missing| *missing > 0) else { return Ok(()) };
    eprintln!("filling the list up to {rows}");
    sqlx::query("ALTER INDEX entries_pkey SET (fillfactor = 70)").execute(pool).await?;
    let mut filling = pool.begin().await?;
    sqlx::query("SET LOCAL work_mem = '1GB'").execute(&mut *filling).await?;
    sqlx::query(
        "INSERT INTO entries (workspace_id, added_by, address, reason)
         SELECT $1, 1, 'user.' || substr(md5($2 || '/' || number), 1, 11) || '@example' || number % 1000 || '.com', 'bounce'
         FROM generate_series(1, $3) AS number ORDER BY 3 ON CONFLICT DO NOTHING",
    )
    .bind(workspace)
    .bind(present.to_string())
    .bind(missing.cast_signed())
    .execute(&mut *filling)
    .await?;
    filling.commit().await?;
    add_to_count(pool, workspace, missing).await?;
    sqlx::query("ALTER INDEX entries_pkey RESET (fillfactor)").execute(pool).await?;
    sqlx::query("VACUUM ANALYZE entries").execute(pool).await?;
    Ok(())
}

/// Counts entries that were not stored by the service.
async fn add_to_count(pool: &PgPool, workspace: i64, entries: u64) -> anyhow::Result<()> {
    sqlx::query(
        "INSERT INTO entry_counts AS known VALUES ($1, 0, $2) ON CONFLICT (workspace_id, part) DO UPDATE SET entries = known.entries + $2",
    )
    .bind(workspace)
    .bind(entries.cast_signed())
    .execute(pool)
    .await?;
    Ok(())
}

async fn measure(
    database: &Database,
    pool: &PgPool,
    list: &List,
    way: Way,
    rows: u64,
    numbers: std::ops::Range<u64>,
) -> anyhow::Result<Measured> {
    let entries = numbers.end - numbers.start;
    let rows_before: i64 = sqlx::query_scalar("SELECT COALESCE(sum(entries), 0)::bigint FROM entry_counts WHERE workspace_id = $1")
        .bind(list.workspace)
        .fetch_one(pool)
        .await?;
    sqlx::query("CHECKPOINT").execute(pool).await?;
    let mut peak_bytes = 0;
    let secs;
    let before;
    if way == Way::Psql {
        let mut file = std::io::BufWriter::new(tempfile::NamedTempFile::new()?);
        for number in numbers {
            writeln!(file, "{},bounce", address(number))?;
        }
        let file = file.into_inner()?;
        let script = tempfile::NamedTempFile::new()?;
        let workspace = list.workspace;
        fs::write(
            script.path(),
            format!(
                "CREATE TEMPORARY TABLE staging (address text COLLATE \"C\", reason text);\n\\copy staging FROM '{}' (FORMAT csv)\n\
                 INSERT INTO entries (workspace_id, added_by, address, reason) SELECT {workspace}, 1, address, reason \
                 FROM staging ORDER BY address ON CONFLICT DO NOTHING;\n",
                file.path().display(),
            ),
        )?;
        let psql = psql().context("there is no psql")?;
        before = usage(pool).await?;
        let started = Instant::now();
        let mut command = tokio::process::Command::new(psql);
        command.args(["-q", "-X", "-v", "ON_ERROR_STOP=1", "-f"]).arg(script.path()).arg(&database.url);
        if !command.status().await?.success() {
            bail!("psql failed");
        }
        secs = started.elapsed().as_secs_f64();
    } else {
        let server = Served::start_with(way.flags(), &database.url, list.key.clone()).await?;
        let channel = Channel::from_shared(server.grpc_url.clone())?.connect().await?;
        let messages: Vec<Bytes> = parts(numbers, MESSAGE_ENTRIES).map(message).collect();
        // Opens the service's connections, as on a server that has run for a while.
        import(channel.clone(), list.key.clone(), futures_util::stream::iter([])).await?;
        before = usage(pool).await?;
        reset_peak_of(server.pid());
        let started = Instant::now();
        import(channel, list.key.clone(), futures_util::stream::iter(messages)).await?;
        secs = started.elapsed().as_secs_f64();
        peak_bytes = peak_bytes_of(server.pid()).unwrap_or_default();
    }
    if way == Way::Psql {
        add_to_count(pool, list.workspace, entries).await?;
    }
    // The statistics of a backend arrive within a second after its last statement.
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    let after = usage(pool).await?;
    let measured = Measured {
        way,
        rows,
        rows_before: rows_before.unsigned_abs(),
        entries,
        rate: entries as f64 / secs,
        wal_bytes_per_row: (after.0 - before.0) / entries as f64,
        pages_read_per_row: (after.1 - before.1) / entries as f64,
        peak_bytes,
    };
    eprintln!(
        "  {:.0} rows/s, {:.0} bytes of WAL and {:.2} pages read a row, peak {} MiB",
        measured.rate,
        measured.wal_bytes_per_row,
        measured.pages_read_per_row,
        measured.peak_bytes >> 20
    );
    Ok(measured)
}

/// The bytes of WAL and the pages read so far.
async fn usage(pool: &PgPool) -> anyhow::Result<(f64, f64)> {
    Ok(sqlx::query_as(
        "SELECT (pg_current_wal_lsn() - '0/0')::float8, blks_read::float8 FROM pg_stat_database WHERE datname = current_database()",
    )
    .fetch_one(pool)
    .await?)
}

fn report(options: &Options, all: &[Measured]) -> anyhow::Result<()> {
    println!(
        "{:<22}{:>12}{:>12}{:>12}{:>12}{:>12}{:>10}",
        "way", "list", "entries", "rows/s", "WAL B/row", "pages/row", "peak MiB"
    );
    let mut results = Vec::new();
    for &entries in &options.entries {
        for &rows in &options.rows {
            for way in Way::ALL {
                let of: Vec<&Measured> =
                    all.iter().filter(|one| (one.way, one.rows, one.entries) == (way, rows, entries)).collect();
                if of.is_empty() {
                    continue;
                }
                let middle = |value: fn(&Measured) -> f64| median(of.iter().map(|one| value(one)).collect());
                let (rate, wal, pages) =
                    (middle(|one| one.rate), middle(|one| one.wal_bytes_per_row), middle(|one| one.pages_read_per_row));
                let peak = of.iter().map(|one| one.peak_bytes).max().unwrap_or_default() >> 20;
                println!("{:<22}{rows:>12}{entries:>12}{rate:>12.0}{wal:>12.0}{pages:>12.2}{peak:>10}", way.name());
                results.push(serde_json::json!({
                    "way": way.name(), "rows": rows, "rows_before": of.iter().map(|one| one.rows_before).collect::<Vec<_>>(),
                    "entries": entries, "rows_per_sec": rate, "wal_bytes_per_row": wal, "pages_read_per_row": pages, "peak_mib": peak,
                }));
            }
        }
    }
    fs::write("target/growth-bench.json", serde_json::to_string_pretty(&results)?)?;
    fs::write("target/growth-bench.svg", plot(options, all))?;
    println!("also in target/growth-bench.json and target/growth-bench.svg");
    Ok(())
}

/// The median rate of each way over the size of the list, one panel for each size of import.
fn plot(options: &Options, all: &[Measured]) -> String {
    const COLORS: [(Way, &str); 4] =
        [(Way::Default, "#3450c8"), (Way::Sorted, "#1a7f64"), (Way::Arrival, "#b3541e"), (Way::Psql, "#6e6e78")];
    const WIDTH: f64 = 420.0;
    const HEIGHT: f64 = 260.0;
    const LEFT: f64 = 70.0;
    const TOP: f64 = 50.0;
    let rows_max = options.rows.iter().max().copied().unwrap_or_default().max(1) as f64;
    let rate_max = all.iter().map(|one| one.rate).fold(1.0, f64::max) * 1.05;
    let panel = WIDTH + LEFT + 60.0;
    let mut svg = String::new();
    for (number, &entries) in options.entries.iter().enumerate() {
        let left = LEFT + number as f64 * panel;
        let x = |rows: u64| left + rows as f64 / rows_max * WIDTH;
        let y = |rate: f64| TOP + HEIGHT - rate / rate_max * HEIGHT;
        svg += &format!("<text x='{left}' y='24' font-weight='bold'>imports of {} million</text>\n", entries / 1_000_000);
        for step in 0..=4 {
            let rate = rate_max * f64::from(step) / 4.0;
            svg += &format!(
                "<path d='M{left} {y:.1}h{WIDTH}' stroke='#ccc'/><text x='{:.1}' y='{:.1}' text-anchor='end'>{:.0}k</text>\n",
                left - 8.0,
                y(rate) + 4.0,
                rate / 1_000.0,
                y = y(rate),
            );
        }
        for &rows in &options.rows {
            let (x, y) = (x(rows), TOP + HEIGHT + 20.0);
            svg += &format!("<text x='{x:.1}' y='{y:.1}' text-anchor='middle'>{}M</text>\n", rows / 1_000_000);
        }
        for (line, (way, color)) in COLORS.into_iter().enumerate() {
            let point = |rows: u64| {
                let of = all.iter().filter(|one| (one.way, one.rows, one.entries) == (way, rows, entries));
                let rates: Vec<f64> = of.map(|one| one.rate).collect();
                (!rates.is_empty()).then(|| (x(rows), y(median(rates))))
            };
            let points: Vec<(f64, f64)> = options.rows.iter().filter_map(|&rows| point(rows)).collect();
            if points.is_empty() {
                continue;
            }
            let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            svg += &format!("<polyline points='{}' fill='none' stroke='{color}' stroke-width='2'/>\n", path.join(" "));
            let at = TOP + HEIGHT + 45.0 + 18.0 * line as f64;
            svg += &format!("<text x='{left}' y='{at:.1}' fill='{color}'>{}</text>\n", way.name());
        }
    }
    let (width, height) = (panel * options.entries.len() as f64 + 20.0, TOP + HEIGHT + 120.0);
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:.0} {height:.0}' font-family='sans-serif' font-size='12'>\n\
         <title>Entries a second over the size of the list</title>\n<rect width='100%' height='100%' fill='#fff'/>\n{svg}</svg>\n"
    )
}
