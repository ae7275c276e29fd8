//! The memory that a call's request may use. A request's messages are tracked through gRPC's
//! framing as they arrive. Bytes are taken from the budget before a message is read, and its
//! entries are counted before it is decoded: a message of 4 MiB may contain 2 million empty
//! entries.
//!
//! A message holds its bytes until the next one of its stream is requested. From then until the
//! next one begins, it holds only as many bytes as its text has. The last message holds its bytes
//! until the answer has been taken.
//!
//! Calls of the gateway in the same process do not pass here. The gateway has the budget for its
//! own bodies, and makes no message with more entries than are allowed.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::future::BoxFuture;
use http_body::Frame;
use prost::bytes::Bytes;
use tokio::time::{Instant, Sleep, sleep};
use tonic::{Code, Status, body::Body};
use tonic_types::StatusExt;

use super::{MESSAGE_BYTES_MAX, status};
use crate::{
    domain::Error,
    wire::budget::{Budget, Exhausted, Permit},
};

/// How long a message may take from its first byte to its last. The message of a call with a single
/// one must arrive within this time from the beginning of the call.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(30);

const BUSY: &str = "Too much is in work at the moment. Send the request again later.";
const SLOW: &str = "A message was not complete within 30 seconds. Send smaller messages.";

/// The prefix of a message in gRPC's framing: the compression flag, and the length of the message.
const PREFIX_BYTES: usize = 5;

/// What is known about the messages of a method.
#[derive(Clone, Copy)]
struct Shape {
    /// Whether the request is a stream.
    has_many: bool,
    /// The repeated field of the message, and how many items it may have.
    field: &'static str,
    entries_max: usize,
    /// The number of another repeated field whose items count as well.
    other_field: Option<u64>,
    too_many: &'static str,
    /// Bytes that an entry takes in memory in all its forms, beside its text.
    entry_bytes: usize,
    /// Bytes in memory for each byte of a typical message.
    expansion: usize,
}

fn shape(path: &str) -> Shape {
    let addresses = Shape {
        has_many: false,
        field: "emails",
        entries_max: 10_000,
        other_field: None,
        too_many: "At most 10000 addresses fit one message.",
        entry_bytes: 512,
        expansion: 24,
    };
    match path {
        "/dnc.v1.DncService/ImportEntries" => Shape {
            has_many: true,
            field: "entries",
            entries_max: 100_000,
            other_field: Some(3),
            too_many: "A message has more than 100,000 entries. Send them in several messages of one stream.",
            entry_bytes: 256,
            expansion: 8,
        },
        "/dnc.v1.DncService/ScrubEntries" => Shape { has_many: true, ..addresses },
        _ => addresses,
    }
}

/// The bytes that a call has in work. Clones share them; they are returned with the last clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Work(Arc<Mutex<Option<Permit>>>);

impl Work {
    fn shrink(&self, bytes: usize) {
        if let Some(permit) = self.0.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            permit.shrink(bytes);
        }
    }

    /// Takes the permit out. Its holder then holds the bytes.
    pub(super) fn take(&self) -> Option<Permit> {
        self.replace(None)
    }

    fn replace(&self, permit: Option<Permit>) -> Option<Permit> {
        std::mem::replace(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), permit)
    }
}

/// A request's body that is read no further than the budget allows.
pub(super) struct Metered {
    body: Body,
    budget: Budget,
    owner: u64,
    shape: Shape,
    work: Work,
    state: State,
    last_length: usize,
    /// Received, and not passed on yet.
    received: Bytes,
    /// The last piece of a message, held back until the budget allows what the message needs.
    last_piece: Option<Bytes>,
    waiting: Option<BoxFuture<'static, Result<Permit, Exhausted>>>,
    deadline: Option<Pin<Box<Sleep>>>,
}

/// The position of the body within its messages.
enum State {
    Prefix {
        bytes: [u8; PREFIX_BYTES],
        filled: usize,
    },
    /// The prefix is complete, and may be passed on.
    Begun {
        bytes: [u8; PREFIX_BYTES],
    },
    Message {
        length: usize,
        left: usize,
        counter: Counter,
    },
}

const BETWEEN_MESSAGES: State = State::Prefix { bytes: [0; PREFIX_BYTES], filled: 0 };

impl Metered {
    /// Meters the body of a call of the method at `path`. `owner` is whose part of `budget` it
    /// uses, `work` receives the permit.
    pub(super) fn new(body: Body, budget: Budget, owner: u64, path: &str, work: Work) -> Self {
        let shape = shape(path);
        let deadline = (!shape.has_many).then(|| Box::pin(sleep(MESSAGE_TIMEOUT)));
        Self {
            body,
            budget,
            owner,
            shape,
            work,
            state: BETWEEN_MESSAGES,
            last_length: 0,
            received: Bytes::new(),
            last_piece: None,
            waiting: None,
            deadline,
        }
    }

    fn restart_deadline(&mut self) {
        match &mut self.deadline {
            Some(deadline) => deadline.as_mut().reset(Instant::now() + MESSAGE_TIMEOUT),
            None => self.deadline = Some(Box::pin(sleep(MESSAGE_TIMEOUT))),
        }
    }

    /// Starts taking the bytes that a message of this length typically needs.
    fn begin(&mut self, length: usize) {
        let Shape { entries_max, entry_bytes, expansion, .. } = self.shape;
        let bytes = length + (length * expansion).min(entries_max * entry_bytes);
        let (budget, owner) = (self.budget.clone(), self.owner);
        self.waiting = Some(Box::pin(async move { budget.acquire(owner, bytes).await }));
    }

    /// The message has arrived in full: starts taking the bytes that it really needs.
    fn complete(&mut self, bytes: usize) {
        if self.shape.has_many {
            self.deadline = None;
        } else {
            // The end of the stream must arrive in time as well.
            self.restart_deadline();
        }
        if let Some(mut permit) = self.work.replace(None) {
            self.waiting = Some(Box::pin(async move { permit.resize(bytes).await.map(|()| permit) }));
        }
    }

    /// The next piece that can be passed on; none if more must arrive first, from the body or the
    /// budget.
    fn next_piece(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if let Some(piece) = self.last_piece.take() {
                return Ok(Some(piece));
            }
            match &mut self.state {
                State::Prefix { bytes, filled } => {
                    let is_between = *filled == 0 && self.shape.has_many;
                    if self.received.is_empty() {
                        if is_between {
                            // A reader that asks for more has decoded the last message, and
                            // released all but its text.
                            self.work.shrink(self.last_length);
                        }
                        return Ok(None);
                    }
                    if is_between {
                        self.work.replace(None);
                        self.deadline = Some(Box::pin(sleep(MESSAGE_TIMEOUT)));
                    }
                    let count = self.received.len().min(PREFIX_BYTES - *filled);
                    bytes[*filled..*filled + count].copy_from_slice(&self.received.split_to(count));
                    *filled += count;
                    if *filled == PREFIX_BYTES {
                        let bytes = *bytes;
                        self.state = State::Begun { bytes };
                        let length = length(bytes);
                        // A larger message is refused by its length alone, when the prefix is
                        // decoded.
                        if length <= MESSAGE_BYTES_MAX {
                            self.begin(length);
                            return Ok(None);
                        }
                    }
                }
                State::Begun { bytes } => {
                    let (bytes, length) = (*bytes, length(*bytes));
                    // A compressed message is refused by its flag alone.
                    let counter = if bytes[0] == 0 { Counter::of(self.shape.other_field) } else { Counter::stopped() };
                    self.state = State::Message { length, left: length, counter };
                    return Ok(Some(Bytes::copy_from_slice(&bytes)));
                }
                State::Message { length, left, counter } => {
                    if *left > 0 && self.received.is_empty() {
                        return Ok(None);
                    }
                    let piece = self.received.split_to((*left).min(self.received.len()));
                    *left -= piece.len();
                    counter.feed(&piece);
                    if counter.entries > self.shape.entries_max {
                        return Err(Error::invalid(self.shape.field, self.shape.too_many));
                    }
                    if *left > 0 {
                        return Ok(Some(piece));
                    }
                    self.last_length = *length;
                    let bytes = *length + counter.entries * self.shape.entry_bytes;
                    self.state = BETWEEN_MESSAGES;
                    self.last_piece = (!piece.is_empty()).then_some(piece);
                    self.complete(bytes);
                    if self.waiting.is_some() {
                        return Ok(None);
                    }
                }
            }
        }
    }
}

fn length(prefix: [u8; PREFIX_BYTES]) -> usize {
    let [_, length @ ..] = prefix;
    u32::from_be_bytes(length) as usize
}

impl http_body::Body for Metered {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            if let Some(waiting) = &mut self.waiting {
                let permit = ready!(waiting.as_mut().poll(cx));
                self.waiting = None;
                match permit {
                    Ok(permit) => self.work.replace(Some(permit)),
                    Err(Exhausted) => return Poll::Ready(Some(Err(refusal(Error::Unavailable { message: BUSY, source: None })))),
                };
                if self.deadline.is_some() {
                    self.restart_deadline();
                }
            }
            match self.next_piece() {
                Ok(Some(piece)) => return Poll::Ready(Some(Ok(Frame::data(piece)))),
                Err(error) => return Poll::Ready(Some(Err(refusal(error)))),
                Ok(None) if self.waiting.is_some() => {}
                Ok(None) => {
                    if self.deadline.as_mut().is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready()) {
                        return Poll::Ready(Some(Err(refusal(Error::Timeout { message: SLOW, source: None }))));
                    }
                    match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                        Some(Ok(frame)) => match frame.into_data() {
                            Ok(data) => self.received = data,
                            Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                        },
                        ended => return Poll::Ready(ended),
                    }
                }
            }
        }
    }
}

fn refusal(error: Error) -> Status {
    status::from_error(error)
}

/// The error behind a status that the reader of a request's messages got from this module.
pub(super) fn error_of(status: &Status) -> Option<Error> {
    status.get_details_error_info()?;
    match status.code() {
        Code::Unavailable => Some(Error::Unavailable { message: BUSY, source: None }),
        Code::DeadlineExceeded => Some(Error::Timeout { message: SLOW, source: None }),
        Code::InvalidArgument => {
            let field = status.get_details_bad_request()?.field_violations.into_iter().next()?.field;
            Some(Error::invalid(field, status.message()))
        }
        _ => None,
    }
}

/// Counts the items of field 1 in a message that arrives in pieces, and those of `other_field` if
/// there is one. Field 1 is the repeated field of every request that has one. Invalid protobuf ends
/// the counting, as it will end the decoding.
#[derive(Debug, Default)]
struct Counter {
    at: At,
    entries: usize,
    other_field: Option<u64>,
}

#[derive(Debug)]
enum At {
    Tag { value: u64, shift: u32 },
    Number,
    Length { value: u64, shift: u32 },
    Inside { left: u64 },
    Stopped,
}

impl Default for At {
    fn default() -> Self {
        Self::Tag { value: 0, shift: 0 }
    }
}

impl Counter {
    fn of(other_field: Option<u64>) -> Self {
        Self { other_field, ..Self::default() }
    }

    fn stopped() -> Self {
        Self { at: At::Stopped, ..Self::default() }
    }

    fn feed(&mut self, mut piece: &[u8]) {
        while let Some((&byte, rest)) = piece.split_first() {
            let (bits, is_last) = (u64::from(byte & 0x7f), byte < 0x80);
            let next = match self.at {
                At::Stopped => return,
                At::Inside { left } => {
                    let count = left.min(piece.len() as u64);
                    piece = &piece[count as usize..];
                    self.at = if count == left { At::default() } else { At::Inside { left: left - count } };
                    continue;
                }
                At::Number => {
                    if is_last {
                        At::default()
                    } else {
                        At::Number
                    }
                }
                At::Tag { value, shift } | At::Length { value, shift } if shift > 63 => {
                    let _ = value;
                    At::Stopped
                }
                At::Tag { value, shift } if !is_last => At::Tag { value: value | bits << shift, shift: shift + 7 },
                At::Length { value, shift } if !is_last => At::Length { value: value | bits << shift, shift: shift + 7 },
                At::Length { value, shift } => At::Inside { left: value | bits << shift },
                At::Tag { value, shift } => {
                    let tag = value | bits << shift;
                    match tag & 7 {
                        0 => At::Number,
                        1 => At::Inside { left: 8 },
                        2 => {
                            let field = tag >> 3;
                            self.entries += usize::from(field == 1 || Some(field) == self.other_field);
                            At::Length { value: 0, shift: 0 }
                        }
                        3 | 4 => At::default(),
                        5 => At::Inside { left: 4 },
                        _ => At::Stopped,
                    }
                }
            };
            // A field of length zero ends at once.
            self.at = if let At::Inside { left: 0 } = next { At::default() } else { next };
            piece = rest;
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use prost::Message;

    use super::*;
    use crate::proto::{Entry, ImportEntriesRequest, ImportOptions, UnreadableEntry};

    #[test]
    fn entries_are_counted_however_the_message_is_split() {
        let mut entries = vec![Entry::default(); 3];
        entries.push(Entry { email: "a".repeat(300), reason: "b".repeat(5), ..Entry::default() });
        let options = ImportOptions { request_id: "\n\u{1}".repeat(40), ..ImportOptions::default() };
        let unreadable = vec![UnreadableEntry { message: "\u{1a}\n".repeat(9), ..UnreadableEntry::default() }; 2];
        let bytes = ImportEntriesRequest { entries, options: Some(options), unreadable }.encode_to_vec();
        for size in 1..bytes.len() {
            for (other_field, expected) in [(None, 4), (Some(3), 6)] {
                let mut counter = Counter::of(other_field);
                bytes.chunks(size).for_each(|piece| counter.feed(piece));
                assert_eq!(counter.entries, expected, "pieces of {size}");
            }
        }
    }

    #[test]
    fn unusual_encodings_are_counted_as_they_are_decoded() {
        let mut counter = Counter::default();
        // Field 1 with a tag of two bytes, a number, eight and four bytes, a group, and field 1
        // again.
        counter.feed(&[
            0x8a, 0x00, 0x00, 0x18, 0x96, 0x01, 0x21, 0, 0, 0, 0, 0, 0, 0, 0x0a, 0x2d, 0, 0, 0, 0x0a, 0x33, 0x34, 0x0a, 0x01, 7,
        ]);
        assert_eq!(counter.entries, 2);
        counter.feed(&[0x0f, 0x0a, 0x00]);
        assert_eq!(counter.entries, 2, "nothing is counted after invalid protobuf");
    }

    #[tokio::test]
    async fn an_idle_stream_holds_the_text_of_its_last_message() {
        use futures_util::{FutureExt, StreamExt};
        use http_body_util::{BodyExt, StreamBody};
        let entry = Entry { email: "a@example.com".to_owned(), ..Entry::default() };
        let bytes = ImportEntriesRequest { entries: vec![entry; 1_000], ..ImportEntriesRequest::default() }.encode_to_vec();
        let length = bytes.len();
        let message = [&[0][..], &(length as u32).to_be_bytes(), &bytes].concat();
        let frames = tokio_stream::iter([Ok::<_, Status>(Frame::data(Bytes::from(message)))]).chain(tokio_stream::pending());
        let budget = Budget::new(4 << 20);
        let body = Body::new(StreamBody::new(frames));
        let mut metered = Metered::new(body, budget.clone(), 1, "/dnc.v1.DncService/ImportEntries", Work::default());
        assert_eq!(metered.frame().await.unwrap().unwrap().into_data().unwrap().len(), PREFIX_BYTES);
        assert_eq!(metered.frame().await.unwrap().unwrap().into_data().unwrap().len(), length);
        let rest = (1 << 20) - length.next_multiple_of(1024);
        assert!(budget.acquire(1, rest).now_or_never().is_none(), "the message is in work");
        assert!(metered.frame().now_or_never().is_none(), "nothing more arrives");
        assert!(budget.acquire(1, rest).now_or_never().is_some());
        assert!(budget.acquire(1, rest + 1).now_or_never().is_none());
    }

    #[tokio::test]
    async fn the_body_is_passed_on_unchanged() {
        use http_body_util::{BodyExt, StreamBody};
        let message = |entries| {
            let bytes = ImportEntriesRequest { entries, ..ImportEntriesRequest::default() }.encode_to_vec();
            [&[0][..], &(bytes.len() as u32).to_be_bytes(), &bytes].concat()
        };
        let entry = Entry { email: "a@example.com".to_owned(), ..Entry::default() };
        let whole = [message(vec![]), message(vec![entry.clone(); 50]), message(vec![entry])].concat();
        for size in [1, 2, 7, 100, whole.len()] {
            let pieces: Vec<_> =
                whole.chunks(size).map(|piece| Ok::<_, Status>(Frame::data(Bytes::copy_from_slice(piece)))).collect();
            let body = Body::new(StreamBody::new(tokio_stream::iter(pieces)));
            let work = Work::default();
            let budget = Budget::new(1 << 20);
            let metered = Metered::new(body, budget, 1, "/dnc.v1.DncService/ImportEntries", work.clone());
            assert_eq!(metered.collect().await.unwrap().to_bytes(), whole, "pieces of {size}");
            assert!(work.replace(None).is_some(), "the last message is in work until the answer");
        }
    }
}
