//! What the service and its clients share about the wire: the generated messages, how they are read, and what a
//! call holds while it runs. Knows no rule about entries, and neither side of a call.

pub mod budget;
pub mod codec;
pub mod proto;
pub mod running;

/// A request header that asks for the head of the answer as soon as the caller was let in, and for the status at the end. Whoever
/// sends it need not send, nor even have, the messages of a call that is refused.
pub const EARLY_HEAD: http::HeaderName = http::HeaderName::from_static("dnc-early-head");
