//! The metrics of a server, for Prometheus.
//!
//! Everything that is counted is named here, with its unit and its labels. Labels have few values:
//! methods, routes, codes. No label holds an address, a key or the name of a workspace.
//!
//! The handles are made once. Until [`install`] is called they count nothing and cost nothing, so
//! it must be called before the first call is served. The recorder is one for the process, as the
//! log is: passing it to every module would say nothing more.

use std::{
    collections::HashMap,
    sync::{LazyLock, OnceLock, PoisonError, RwLock},
    time::Instant,
};

use http::{Method, StatusCode};
use metrics::{Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

/// The bounds of the buckets of times, in seconds: from a check by key to an import of a large
/// file.
const SECONDS: [f64; 14] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0];

/// The bounds of the buckets of batches, in entries.
const ENTRIES: [f64; 8] = [1.0, 10.0, 100.0, 1_000.0, 5_000.0, 10_000.0, 20_000.0, 100_000.0];

/// The methods of the service. Every other one is "unknown".
const METHODS: [&str; 10] = [
    "ImportEntries",
    "CheckEntries",
    "ScrubEntries",
    "ListEntries",
    "ExportEntries",
    "DeleteEntries",
    "SummarizeEntries",
    "ListImports",
    "ListDeletions",
    UNKNOWN,
];
const UNKNOWN: &str = "unknown";

/// The codes of gRPC, by their number.
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];
const CANCELLED: usize = 1;

static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();

/// Starts counting, unless that was done before. Returns what renders the metrics.
///
/// # Errors
/// When another recorder was installed.
pub fn install() -> anyhow::Result<PrometheusHandle> {
    if let Some(handle) = RECORDER.get() {
        return Ok(handle.clone());
    }
    let recorder = PrometheusBuilder::new()
        .set_buckets(&SECONDS)?
        .set_buckets_for_metric(Matcher::Full("dnc_batch_entries".to_owned()), &ENTRIES)?
        .build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).map_err(|_| anyhow::anyhow!("the metrics are recorded elsewhere"))?;
    let handle = RECORDER.get_or_init(|| handle).clone();
    describe();
    gauge!("dnc_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1);
    // Known from the beginning, so that a rate over them is right from the first scrape on.
    LazyLock::force(&CALLS);
    LazyLock::force(&ENTRIES_BY_OUTCOME);
    Ok(handle)
}

fn describe() {
    describe_gauge!("dnc_build_info", "1, with the version of the program as a label.");
    describe_counter!("dnc_calls_total", "Calls of the gRPC service that have ended, those of the HTTP side included.");
    describe_histogram!("dnc_call_duration_seconds", Unit::Seconds, "From the head of a call to the end of its answer.");
    describe_gauge!("dnc_calls_open", "Calls in work. Those of ImportEntries, ScrubEntries and ExportEntries are streams.");
    describe_counter!("dnc_http_requests_total", "HTTP requests that have ended. The status 499 is that of a caller who left.");
    describe_histogram!("dnc_http_request_duration_seconds", Unit::Seconds, "From the head of a request to the end of its answer.");
    describe_counter!("dnc_entries_total", "Entries of imports by what became of them, dry runs excluded.");
    describe_histogram!("dnc_batch_entries", Unit::Count, "Entries of a batch, repeats included.");
    describe_histogram!("dnc_batch_duration_seconds", Unit::Seconds, "Storing a batch, the wait for a connection included.");
    describe_gauge!("dnc_database_connections", "Open connections to the database, by what they do.");
    describe_gauge!("dnc_database_connections_max", "The most connections to the database.");
    describe_histogram!("dnc_database_wait_seconds", Unit::Seconds, "Waiting for a connection to the database.");
    describe_histogram!("dnc_database_work_seconds", Unit::Seconds, "Work on a connection, by its kind.");
    describe_gauge!("dnc_database_up", "1 while the database answers and takes writes, else 0.");
    describe_gauge!("dnc_replica_lag_seconds", Unit::Seconds, "How far the replica that answers reads lags behind at most.");
    describe_counter!("dnc_list_reads_total", "Reads of the list, by the database that answered, if there is a replica.");
    describe_gauge!("dnc_connections_open", "Open connections of clients, by listener.");
    describe_gauge!("dnc_connections_max", "The most connections of clients, by listener.");
    describe_counter!("dnc_log_lines_dropped_total", "Log lines that were dropped because too many waited to be written.");
    describe_gauge!("dnc_work_bytes", Unit::Bytes, "Memory that the requests in work may take.");
    describe_gauge!("dnc_work_bytes_max", Unit::Bytes, "The most memory that the requests in work may take.");
}

/// The metrics of one method.
struct CallMetrics {
    name: &'static str,
    open: Gauge,
    duration: Histogram,
    by_code: [OnceLock<Counter>; CODES.len()],
}

static CALLS: LazyLock<[CallMetrics; METHODS.len()]> = LazyLock::new(|| {
    METHODS.map(|name| CallMetrics {
        name,
        open: gauge!("dnc_calls_open", "method" => name),
        duration: histogram!("dnc_call_duration_seconds", "method" => name),
        by_code: [const { OnceLock::new() }; CODES.len()],
    })
});

/// A call in work. When it is dropped, the call has ended: as cancelled, unless it got a code.
pub struct Call {
    metrics: &'static CallMetrics,
    started: Instant,
    code: usize,
}

impl std::fmt::Debug for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Call").field("method", &self.metrics.name).finish_non_exhaustive()
    }
}

impl Call {
    /// Begins a call of the method at this path, such as `/dnc.v1.DncService/CheckEntries`.
    pub fn begin(path: &str) -> Self {
        let name = path.strip_prefix("/dnc.v1.DncService/").unwrap_or(UNKNOWN);
        let metrics = CALLS.iter().find(|method| method.name == name).unwrap_or(&CALLS[METHODS.len() - 1]);
        metrics.open.increment(1);
        Self { metrics, started: Instant::now(), code: CANCELLED }
    }

    /// The number of the gRPC code that the call ends with.
    pub fn ends_with(&mut self, code: i32) {
        self.code = usize::try_from(code).unwrap_or(CODES.len());
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.metrics.open.decrement(1);
        self.metrics.duration.record(self.started.elapsed());
        if let Some(counter) = self.metrics.by_code.get(self.code) {
            let (method, code) = (self.metrics.name, CODES[self.code]);
            counter.get_or_init(|| counter!("dnc_calls_total", "method" => method, "code" => code)).increment(1);
        }
    }
}

/// The metrics of one kind of HTTP requests.
struct RequestMetrics {
    count: Counter,
    duration: Histogram,
}

type RequestLabels = (&'static str, String, u16);

static REQUESTS: LazyLock<RwLock<HashMap<RequestLabels, RequestMetrics>>> = LazyLock::new(RwLock::default);

/// An HTTP request in work. When it is dropped, the request has ended.
#[derive(Debug)]
pub struct HttpRequest {
    started: Instant,
    method: &'static str,
    /// The pattern and not the path.
    route: String,
    /// 499 until the answer is known: the caller is gone.
    status: u16,
}

impl HttpRequest {
    /// Begins a request. `route` is the pattern of its path.
    pub fn begin(method: &Method, route: String) -> Self {
        let known = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
        let method = known.into_iter().find(|known| method.as_str() == *known).unwrap_or("other");
        Self { started: Instant::now(), method, route, status: 499 }
    }

    /// The status of the answer.
    pub fn ends_with(&mut self, status: StatusCode) {
        self.status = status.as_u16();
    }
}

impl Drop for HttpRequest {
    fn drop(&mut self) {
        if RECORDER.get().is_none() {
            return;
        }
        let labels = (self.method, std::mem::take(&mut self.route), self.status);
        let elapsed = self.started.elapsed();
        if let Some(known) = REQUESTS.read().unwrap_or_else(PoisonError::into_inner).get(&labels) {
            known.count.increment(1);
            known.duration.record(elapsed);
            return;
        }
        let (method, route, status) = labels.clone();
        let made = RequestMetrics {
            count: counter!("dnc_http_requests_total", "method" => method, "route" => route.clone(), "status" => status.to_string()),
            duration: histogram!("dnc_http_request_duration_seconds", "method" => method, "route" => route),
        };
        made.count.increment(1);
        made.duration.record(elapsed);
        REQUESTS.write().unwrap_or_else(PoisonError::into_inner).insert(labels, made);
    }
}

/// Entries of imports by what became of them.
struct ByOutcome {
    imported: Counter,
    skipped: Counter,
    failed: Counter,
}

static ENTRIES_BY_OUTCOME: LazyLock<ByOutcome> = LazyLock::new(|| {
    let counter = |outcome: &'static str| counter!("dnc_entries_total", "outcome" => outcome);
    ByOutcome { imported: counter("imported"), skipped: counter("skipped"), failed: counter("failed") }
});

static BATCH_ENTRIES: LazyLock<Histogram> = LazyLock::new(|| histogram!("dnc_batch_entries"));
static BATCH_DURATION: LazyLock<Histogram> = LazyLock::new(|| histogram!("dnc_batch_duration_seconds"));

/// Counts a batch that is stored: the entries in it, those of them that are new, and since when it
/// was being stored.
pub fn batch_stored(received: u64, imported: u64, started: Instant) {
    ENTRIES_BY_OUTCOME.imported.increment(imported);
    ENTRIES_BY_OUTCOME.skipped.increment(received.saturating_sub(imported));
    BATCH_ENTRIES.record(received as f64);
    BATCH_DURATION.record(started.elapsed());
}

/// Counts the rejected entries of an import.
pub fn entries_rejected(failed: u64) {
    ENTRIES_BY_OUTCOME.failed.increment(failed);
}

static DATABASE_WAIT: LazyLock<Histogram> = LazyLock::new(|| histogram!("dnc_database_wait_seconds"));
static DATABASE_WORK: LazyLock<[Histogram; 3]> =
    LazyLock::new(|| ["read", "scan", "write"].map(|mode| histogram!("dnc_database_work_seconds", "mode" => mode)));

/// The kind of a piece of work on a connection.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// A look-up.
    Read,
    /// A reading of a whole list.
    Scan,
    /// A transaction that writes.
    Write,
}

/// Records a wait for a connection that has begun at `started` and is over.
pub fn waited_for_database(started: Instant) {
    DATABASE_WAIT.record(started.elapsed());
}

/// Records work on a connection that has begun at `started` and is over.
pub fn worked_on_database(kind: Work, started: Instant) {
    DATABASE_WORK[kind as usize].record(started.elapsed());
}

static LIST_READS: LazyLock<[Counter; 2]> =
    LazyLock::new(|| ["primary", "replica"].map(|database| counter!("dnc_list_reads_total", "database" => database)));

/// Counts a read of the list that the replica could have answered, and whether it did.
pub fn read_from_replica(is_from_replica: bool) {
    LIST_READS[usize::from(is_from_replica)].increment(1);
}

/// What is looked up when the metrics are rendered.
#[derive(Clone, Copy, Debug, Default)]
pub struct Levels {
    /// Of the database, if this server has one.
    pub database: Option<DatabaseLevels>,
    /// Open connections of the HTTP side, and how many there may be.
    pub http: (usize, usize),
    /// The same of the gRPC side, if there is one.
    pub grpc: Option<(usize, usize)>,
    /// Bytes in work, and how many there may be.
    pub work_bytes: (usize, usize),
}

/// The use of the database.
#[derive(Clone, Copy, Debug)]
pub struct DatabaseLevels {
    /// Connections with work on them.
    pub busy: usize,
    /// Open connections without.
    pub idle: usize,
    /// How many there may be.
    pub max: usize,
    /// Whether the database answers and takes writes.
    pub is_up: bool,
    /// How many seconds the replica lags behind at most, if there is one; infinite if that is not
    /// known.
    pub replica_lag_secs: Option<f64>,
}

/// Sets the gauges of what is looked up.
pub fn set_levels(levels: &Levels) {
    if let Some(database) = levels.database {
        gauge!("dnc_database_connections", "state" => "busy").set(database.busy as f64);
        gauge!("dnc_database_connections", "state" => "idle").set(database.idle as f64);
        gauge!("dnc_database_connections_max").set(database.max as f64);
        gauge!("dnc_database_up").set(u8::from(database.is_up));
        if let Some(lag) = database.replica_lag_secs {
            gauge!("dnc_replica_lag_seconds").set(lag);
        }
    }
    for (listener, connections) in [("http", Some(levels.http)), ("grpc", levels.grpc)] {
        if let Some((open, max)) = connections {
            gauge!("dnc_connections_open", "listener" => listener).set(open as f64);
            gauge!("dnc_connections_max", "listener" => listener).set(max as f64);
        }
    }
    counter!("dnc_log_lines_dropped_total").absolute(super::lines_dropped());
    gauge!("dnc_work_bytes").set(levels.work_bytes.0 as f64);
    gauge!("dnc_work_bytes_max").set(levels.work_bytes.1 as f64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_of_the_service_has_a_label() {
        let descriptors = <prost_types::FileDescriptorSet as prost::Message>::decode(crate::proto::FILE_DESCRIPTOR_SET)
            .expect("the descriptors are those of the build");
        let methods: Vec<_> = descriptors.file.iter().flat_map(|file| &file.service).flat_map(|service| &service.method).collect();
        assert_eq!(methods.len() + 1, METHODS.len());
        assert!(methods.iter().all(|method| METHODS.contains(&method.name())));
    }
}
