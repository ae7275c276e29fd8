//! The wire format that the service and its clients share: the generated messages, their codec, the
//! budget for bytes in work, and what a call holds while it runs. Knows no rules about entries, and
//! neither the service's nor the client's side of a call.

pub mod budget;
pub mod codec;
pub mod proto;
pub mod running;

/// A request header that asks for the response head as soon as the caller is authenticated; the
/// status then comes at the end. A client that sends it need not send the messages of a call that
/// is refused, nor have them ready.
pub const EARLY_HEAD: http::HeaderName = http::HeaderName::from_static("dnc-early-head");
