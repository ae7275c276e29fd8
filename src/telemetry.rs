//! Logs, and the request id that ties a caller's answer to them. No address and no key is ever written here.

use http::{HeaderMap, HeaderName, HeaderValue};
use tracing_subscriber::{EnvFilter, fmt};
use uuid::Uuid;

use crate::config::{LogFormat, LogOptions};

/// The header (and gRPC metadata key) of the request id.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

const REQUEST_ID_CHARS_MAX: usize = 128;

/// Starts writing logs to standard error, so that standard output stays free for what a command prints.
///
/// # Errors
/// When the filter cannot be read, or logging was started before.
pub fn init(options: &LogOptions) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&options.log)
        .map_err(|error| anyhow::anyhow!("--log {:?} cannot be read ({error}); try --log info", options.log))?;
    let builder = fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // Complaining about a closed standard error on standard error would panic in the middle of a call.
        .log_internal_errors(false);
    let started = match options.log_format {
        LogFormat::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("logging cannot be started: {error}"))
}

/// The caller's own request id if it sent one sane id, or else a new one. Sane is a text of 1 to 128 letters, digits and `-_.:/+=`, which has neither an
/// address nor a key in it: it goes into the log.
pub fn request_id(headers: &HeaderMap) -> HeaderValue {
    let is_sane = |value: &&HeaderValue| {
        let bytes = value.as_bytes();
        (1..=REQUEST_ID_CHARS_MAX).contains(&bytes.len())
            && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(byte))
            && !bytes.windows(3).any(|part| part == b"sk_")
    };
    headers
        .get(REQUEST_ID)
        .filter(is_sane)
        .cloned()
        .unwrap_or_else(|| HeaderValue::from_str(&Uuid::new_v4().to_string()).unwrap_or(HeaderValue::from_static("none")))
}
