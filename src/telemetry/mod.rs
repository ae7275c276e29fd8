//! Logs, metrics and traces, and the request id that connects an answer with its log lines.
//!
//! No address and no key is in any of them.

pub mod metrics;
#[cfg(feature = "otlp")]
mod traces;

use std::sync::OnceLock;

use http::{HeaderMap, HeaderName, HeaderValue};
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    Layer,
    filter::Targets,
    fmt,
    layer::SubscriberExt,
    util::{SubscriberInitExt, TryInitError},
};
use uuid::Uuid;

use crate::config::{LogFormat, LogOptions};

/// The header (and gRPC metadata key) of the request id.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The header (and gRPC metadata key) that names the trace of a request, as W3C defines it.
pub const TRACEPARENT: &str = "traceparent";

#[cfg(feature = "otlp")]
pub use traces::{continue_trace, pass_on};

/// Traces are not built in.
#[cfg(not(feature = "otlp"))]
pub fn continue_trace(_: &tracing::Span, _: &HeaderMap) {}

/// Traces are not built in: what the caller has sent goes on as it is.
#[cfg(not(feature = "otlp"))]
pub fn pass_on(_: &mut HeaderMap) {}

const REQUEST_ID_CHARS_MAX: usize = 128;

/// The most log lines that wait to be written, of a few hundred bytes each. Further ones are
/// dropped.
const LINES_WAITING_MAX: usize = 10_000;

static LINES_DROPPED: OnceLock<ErrorCounter> = OnceLock::new();

/// The number of log lines that were dropped since nobody read those before them.
pub fn lines_dropped() -> u64 {
    LINES_DROPPED.get().map_or(0, |counter| counter.dropped_lines() as u64)
}

/// Logs and traces of the program, until it ends.
#[must_use]
pub struct Telemetry {
    /// Writes the last lines when it is dropped.
    writing: WorkerGuard,
    #[cfg(feature = "otlp")]
    exporting: Option<traces::Exporting>,
}

impl std::fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Telemetry")
    }
}

impl Telemetry {
    /// Sends the last spans and writes the last log lines. Takes four seconds at most.
    pub fn end(self) {
        #[cfg(feature = "otlp")]
        if let Some(exporting) = self.exporting {
            exporting.end();
        }
        let writing = self.writing;
        within_two_seconds(move || drop(writing));
    }
}

/// Runs `work`, which may write to standard error, and waits for its end for at most two seconds:
/// it blocks if nobody reads what is written.
pub fn within_two_seconds(work: impl FnOnce() + Send + 'static) {
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        work();
        let _ = done.send(());
    });
    let _ = ended.recv_timeout(std::time::Duration::from_secs(2));
}

/// Starts writing logs to standard error, and traces to a collector if the environment names one.
/// Standard output is for what a command prints. Must be called on the program's runtime.
///
/// Log lines are written by a thread of their own. If calls wrote their lines themselves, a full
/// pipe would block them, and under load each would wait longer for the reader than a check takes.
///
/// # Errors
/// When the filter or the collector's URL cannot be parsed, or logging was started before.
pub fn init(options: &LogOptions) -> anyhow::Result<Telemetry> {
    let filter: Targets = (options.log.parse())
        .map_err(|error| anyhow::anyhow!("--log {:?} cannot be read ({error}); try --log info", options.log))?;
    let (stderr, writing) =
        NonBlockingBuilder::default().lossy(true).buffered_lines_limit(LINES_WAITING_MAX).finish(std::io::stderr());
    let _ = LINES_DROPPED.set(stderr.error_counter());
    let lines = fmt::layer()
        .with_writer(stderr)
        // It would report a closed standard error to standard error, and panic in the middle of a
        // call.
        .log_internal_errors(false);
    let lines = match options.log_format {
        LogFormat::Text => lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let started =
        |started: Result<(), TryInitError>| started.map_err(|error| anyhow::anyhow!("logging cannot be started: {error}"));
    #[cfg(feature = "otlp")]
    if let Some((spans, exporting)) = traces::layer()? {
        // Each layer has a filter of its own: what is logged does not decide what is traced.
        started(tracing_subscriber::registry().with(lines.with_filter(filter)).with(spans).try_init())?;
        return Ok(Telemetry { writing, exporting: Some(exporting) });
    }
    started(tracing_subscriber::registry().with(lines).with(filter).try_init())?;
    Ok(Telemetry {
        writing,
        #[cfg(feature = "otlp")]
        exporting: None,
    })
}

/// The request id that the caller sent, or a new one if it sent none or an unusable one.
///
/// Usable are 1 to 128 letters, digits and `-_.:/+=`. The id is logged, so a text that could be an
/// address or contain a key is replaced.
pub fn request_id(headers: &HeaderMap) -> HeaderValue {
    let is_usable = |value: &&HeaderValue| {
        let bytes = value.as_bytes();
        (1..=REQUEST_ID_CHARS_MAX).contains(&bytes.len())
            && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(byte))
            && !bytes.windows(3).any(|part| part == b"sk_")
    };
    headers
        .get(REQUEST_ID)
        .filter(is_usable)
        .cloned()
        .unwrap_or_else(|| HeaderValue::from_str(&Uuid::new_v4().to_string()).unwrap_or(HeaderValue::from_static("none")))
}

/// The log lines of `work`, as text: the level, the message and the fields.
#[cfg(test)]
pub(crate) fn logged(work: impl FnOnce()) -> String {
    use std::io::{Read, Seek};

    let mut file = std::sync::Arc::new(tempfile::tempfile().expect("a file"));
    let lines = fmt().without_time().with_target(false).with_ansi(false).with_writer(file.clone()).finish();
    tracing::subscriber::with_default(lines, work);
    let mut text = String::new();
    file.rewind().and_then(|()| file.read_to_string(&mut text)).expect("what was written");
    text
}
