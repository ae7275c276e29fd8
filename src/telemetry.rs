//! Logs, and the request id that connects an answer with its log lines.
//!
//! No address and no key is ever logged.

use http::{HeaderMap, HeaderName, HeaderValue};
use tracing_subscriber::{Layer, filter::Targets, fmt, layer::SubscriberExt, util::SubscriberInitExt};
use uuid::Uuid;

use crate::config::{LogFormat, LogOptions};

/// The header (and gRPC metadata key) of the request id.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

const REQUEST_ID_CHARS_MAX: usize = 128;

/// Starts writing logs to standard error. Standard output is for what a command prints.
///
/// # Errors
/// When the filter cannot be parsed, or logging was started before.
pub fn init(options: &LogOptions) -> anyhow::Result<()> {
    let filter: Targets = (options.log.parse())
        .map_err(|error| anyhow::anyhow!("--log {:?} cannot be read ({error}); try --log info", options.log))?;
    let lines = fmt::layer()
        .with_writer(std::io::stderr)
        // It would report a closed standard error to standard error, and panic in the middle of a
        // call.
        .log_internal_errors(false);
    let lines = match options.log_format {
        LogFormat::Text => lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    (tracing_subscriber::registry().with(filter).with(lines).try_init())
        .map_err(|error| anyhow::anyhow!("logging cannot be started: {error}"))
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
