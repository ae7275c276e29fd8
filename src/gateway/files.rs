//! Files over HTTP: turns bodies into messages of the service, and its answers into bodies. The
//! crate's `files` module reads and writes the content of a file. Here are only the arrival and the
//! sending of its bytes, with their deadlines.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Extension,
    body::{Body, Bytes},
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use futures_util::{Stream, StreamExt, stream, stream::try_unfold};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tonic::Streaming;

use super::{
    body::{ContentBody, IDLE_TIMEOUT},
    call::{ANSWER_TIMEOUT, Fault, reconcile},
    error::Problem,
    query::Query,
    spool::spooled,
    whole::Held,
};
use crate::{
    files::{CheckPacker, CheckPart, Counts, Format, Options, Pack, Packer, Preview, Purpose, Reader, Refused, Source},
    proto::{ExportEntriesResponse, ImportEntriesRequest, ImportOptions, ScrubEntriesRequest, ScrubEntriesResponse},
    wire::running::Progress,
};

/// The most entries in one message of a streamed import, and their bytes.
const MESSAGE_ENTRIES: usize = 2_000;
const MESSAGE_BYTES: usize = 256 << 10;

/// The most rows of a file that are shown as they were understood.
pub(super) const PREVIEW_ROWS_MAX: usize = 100;

/// The most bytes that are parsed in one step.
const SLICE_BYTES: usize = 8 << 10;

/// How long entries wait for more entries before their message is sent.
const FLUSH_AFTER: Duration = Duration::from_secs(1);

/// How long no message is sent while all rows that come are excluded (they name people who may be
/// written to). The service ends a call that is silent.
const ALIVE_EVERY: Duration = Duration::from_secs(20);

/// The most parts of a mailing list that the service has not answered yet.
const PARTS_IN_FLIGHT: usize = 4;

/// Reads `?format=`. The default is CSV.
pub(super) fn format_of_query(query: &Query) -> Result<Format, Problem> {
    match query.get("format").as_deref() {
        None | Some("csv") => Ok(Format::Csv),
        Some("ndjson") => Ok(Format::Ndjson),
        Some(_) => Err(Problem::invalid("format", "expected csv or ndjson")),
    }
}

/// What the caller specifies about a file besides its format.
#[derive(Debug, Default)]
pub(super) struct FileSource {
    /// The source of the list, instead of a guess.
    source: Option<Source>,
    /// The name of the column of addresses.
    column: Option<String>,
    /// How many rows to show as they were understood.
    rows_shown: usize,
}

impl FileSource {
    /// Reads `?from=`, `?column=` and `?preview=`.
    pub(super) fn of_query(query: &Query) -> Result<Self, Problem> {
        let unknown = || {
            let names: Vec<&str> = Source::names().collect();
            Problem::invalid("from", &format!("expected one of {}", names.join(", ")))
        };
        let source = query.get("from").map(|name| Source::of_name(&name).ok_or_else(unknown)).transpose()?;
        let rows_shown =
            match query.get("preview") {
                None => 0,
                Some(text) => text.parse().ok().filter(|rows| (1..=PREVIEW_ROWS_MAX).contains(rows)).ok_or_else(|| {
                    Problem::invalid("preview", &format!("expected a number of rows from 1 to {PREVIEW_ROWS_MAX}"))
                })?,
            };
        Ok(Self { source, column: query.get("column"), rows_shown })
    }

    /// Refuses these parameters for a body that is not a file.
    pub(super) fn require_none(&self) -> Result<(), Problem> {
        let what = "goes with a file; leave it out, or send text/csv or application/x-ndjson";
        let given = [("from", self.source.is_some()), ("column", self.column.is_some()), ("preview", self.rows_shown > 0)];
        given.into_iter().find(|(_, is_given)| *is_given).map_or(Ok(()), |(name, _)| Err(Problem::invalid(name, what)))
    }
}

fn content_type(format: Format) -> (HeaderName, HeaderValue) {
    let media_type = match format {
        Format::Csv => "text/csv; charset=utf-8",
        Format::Ndjson => "application/x-ndjson",
    };
    (header::CONTENT_TYPE, HeaderValue::from_static(media_type))
}

/// Writes a file from an export's messages as they come. If the export breaks off, so does the
/// body: a file that ends early without an error would look complete.
pub(super) fn export(format: Format, messages: Streaming<ExportEntriesResponse>) -> Response {
    let disposition = match format {
        Format::Csv => "attachment; filename=\"dnc.csv\"",
        Format::Ndjson => "attachment; filename=\"dnc.ndjson\"",
    };
    let head = stream::once(async move { Ok(format.head()) });
    let parts = try_unfold(messages, move |mut messages| async move {
        let message = timeout(ANSWER_TIMEOUT, messages.message()).await.map_err(std::io::Error::other)?;
        let Some(message) = message.map_err(std::io::Error::other)? else { return Ok(None) };
        Ok::<_, std::io::Error>(Some((format.write(message.entries)?, messages)))
    });
    let headers = [content_type(format), (header::CONTENT_DISPOSITION, HeaderValue::from_static(disposition))];
    (headers, Body::from_stream(head.chain(parts))).into_response()
}

/// What was read of a file besides its entries.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// What was done to rows besides making entries of them.
    pub(super) counts: Counts,
    /// The first rows, as many as the caller wants to see.
    pub(super) preview: Preview,
}

/// The messages of an import, made from a file as it comes. `seen` is kept up to date with what was
/// read.
pub(super) fn import_messages(
    format: Format,
    body: ContentBody,
    source: FileSource,
    options: ImportOptions,
    seen: Arc<Mutex<Seen>>,
) -> impl Stream<Item = Result<ImportEntriesRequest, Problem>> + Send + 'static {
    let purpose = Purpose::Import { is_reason_given: false };
    let rows = Rows::new(format, purpose, source, body, Packer::new(Some(options), None, MESSAGE_ENTRIES, MESSAGE_BYTES));
    try_unfold(rows, move |mut rows| {
        let seen = seen.clone();
        async move {
            let message = rows.next().await?;
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.counts = rows.packer.counts();
            if message.is_none() {
                seen.preview = std::mem::take(&mut rows.preview);
            }
            Ok(message.map(|message| (message, rows)))
        }
    })
}

/// The parts of a mailing list, made from a file as it comes.
pub(super) fn check_parts(
    format: Format,
    source: FileSource,
    body: ContentBody,
) -> impl Stream<Item = Result<CheckPart, Problem>> + Send + 'static {
    let rows = Rows::new(format, Purpose::Check, source, body, CheckPacker::default());
    try_unfold(rows, |mut rows| async move { Ok(rows.next().await?.map(|part| (part, rows))) })
}

/// A file that is being read. It keeps only a slice of the file and the message that is being
/// packed.
struct Rows<P> {
    /// None once it has been read to its end.
    body: Option<ContentBody>,
    /// Bytes that have arrived and are not parsed yet.
    chunk: Bytes,
    reader: Reader,
    packer: P,
    preview: Preview,
    /// When the last message was sent.
    sent_at: Instant,
}

impl<P: Pack> Rows<P> {
    fn new(format: Format, purpose: Purpose, source: FileSource, body: ContentBody, packer: P) -> Self {
        let FileSource { source, column, rows_shown } = source;
        let now = time::OffsetDateTime::now_utc().unix_timestamp();
        let options = Options { format: Some(format), source, column, ..Options::new(purpose, now) };
        Self {
            body: Some(body),
            chunk: Bytes::new(),
            reader: Reader::new(options),
            packer,
            preview: Preview::new(rows_shown),
            sent_at: Instant::now(),
        }
    }

    async fn next(&mut self) -> Result<Option<P::Packed>, Problem> {
        let message = self.read().await;
        self.sent_at = Instant::now();
        message
    }

    async fn read(&mut self) -> Result<Option<P::Packed>, Problem> {
        loop {
            if self.sent_at.elapsed() > ALIVE_EVERY {
                return Ok(Some(self.packer.flush().unwrap_or_default()));
            }
            if let Some(full) = self.packer.next_full() {
                return Ok(Some(full));
            }
            let Some(body) = &mut self.body else { return Ok(self.packer.flush()) };
            // Neither a sender that is always faster than this nor a large chunk may keep other
            // tasks from the processor.
            tokio::task::yield_now().await;
            if !self.chunk.is_empty() {
                // In slices, since the entries of a chunk of short lines take many times its size.
                let slice = self.chunk.split_to(self.chunk.len().min(SLICE_BYTES));
                self.reader.push(&slice, |row| {
                    self.preview.row(&row);
                    self.packer.row(&row);
                    Ok::<_, Problem>(())
                })?;
                continue;
            }
            // Entries are sent when no more arrive for a moment, so that a slow sender does not
            // look idle to the service.
            let waiting = if self.packer.is_empty() { IDLE_TIMEOUT } else { FLUSH_AFTER };
            let chunk = match timeout(waiting, body.next()).await {
                Err(_) if !self.packer.is_empty() => return Ok(self.packer.flush()),
                Err(_) => return Err(Problem::timed_out()),
                Ok(chunk) => chunk?,
            };
            match chunk {
                Some(chunk) => self.chunk = chunk,
                None => {
                    self.reader.finish(|row| {
                        self.preview.row(&row);
                        self.packer.row(&row);
                        Ok::<_, Problem>(())
                    })?;
                    self.body = None;
                }
            }
        }
    }
}

impl From<Refused> for Problem {
    fn from(refused: Refused) -> Self {
        let place = match refused {
            Refused::Unclosed(line) => format!("line {line}"),
            Refused::NoAddressColumn | Refused::TwoAddressColumns | Refused::FirstRowTooLong => "header".to_owned(),
            Refused::NotText(_) | Refused::NotAList(_) | Refused::NotCsv | Refused::Json(_) | Refused::NoList => "body".to_owned(),
        };
        let advice = match refused {
            Refused::Unclosed(_) => "; mend it and send the whole file again, what is stored is skipped",
            _ => "",
        };
        Self::invalid(&place, &format!("the file {refused}{advice}"))
    }
}

/// Parts of a mailing list that wait for their answers.
pub(super) struct Waiting(mpsc::Receiver<CheckPart>);

/// Makes the requests for the parts of a mailing list, and returns the parts that wait for their
/// answers. When [`PARTS_IN_FLIGHT`] parts wait, nothing more is read.
pub(super) fn check_requests(
    parts: impl Stream<Item = Result<CheckPart, Problem>> + Send + 'static,
) -> (impl Stream<Item = Result<ScrubEntriesRequest, Problem>> + Send + 'static, Waiting) {
    let (sender, waiting) = mpsc::channel(PARTS_IN_FLIGHT);
    let requests = parts.then(move |part| {
        let sender = sender.clone();
        async move {
            let mut part = part?;
            let emails = part.take_emails();
            // The reader of the answers is gone, and the call with it.
            sender.send(part).await.map_err(|_| Problem::broken_body())?;
            Ok(ScrubEntriesRequest { emails })
        }
    });
    (requests, Waiting(waiting))
}

/// Writes the mailing list with its answers, as they come. `held` is dropped after the last of
/// them.
///
/// # Errors
/// An error before the first answer is a response of its own. After it, the body ends in an error,
/// since a file that ends early without one would look complete.
pub(super) async fn checked(
    format: Format,
    answers: Streaming<ScrubEntriesResponse>,
    waiting: Waiting,
    fault: Fault,
    held: Held,
) -> Result<Response, Problem> {
    let parts = try_unfold((answers, waiting, fault, held), |(mut answers, mut waiting, fault, held)| async move {
        let written = next_checked(&mut answers, &mut waiting, &fault).await?;
        Ok(written.map(|written| (written, (answers, waiting, fault, held))))
    });
    let mut parts = parts.boxed();
    let first = parts.next().await.transpose()?;
    let parts = stream::iter(first.map(Ok)).chain(parts).map(|part: Result<_, Problem>| {
        part.map_err(|problem| {
            let why = problem.into_message();
            tracing::warn!(why, "the answers to a mailing list broke off");
            std::io::Error::other(why)
        })
    });
    let progress = Progress::default();
    let body = Body::from_stream(spooled(parts, progress.clone()));
    Ok(([content_type(format)], Extension(progress), body).into_response())
}

async fn next_checked(
    answers: &mut Streaming<ScrubEntriesResponse>,
    Waiting(waiting): &mut Waiting,
    fault: &Fault,
) -> Result<Option<Vec<u8>>, Problem> {
    let answer = loop {
        match timeout(ANSWER_TIMEOUT, answers.message()).await {
            Ok(answer) => break reconcile(answer, fault)?,
            // The service owes answers only to parts it was sent; the body has deadlines of its
            // own.
            Err(_) if waiting.is_empty() => {}
            Err(_) => return Err(Problem::silent()),
        }
    };
    let part = match (answer.as_ref(), waiting.try_recv()) {
        (None, Err(_)) => return Ok(None),
        (Some(_), Ok(part)) => part,
        // The service has sent too many answers, or too few.
        (None, Ok(_)) | (Some(_), Err(_)) => return Err(Problem::internal()),
    };
    let mut written = Vec::new();
    let is_answered = part.answer(&answer.unwrap_or_default().results, |row| {
        row.write(&mut written);
        Ok::<_, Problem>(())
    })?;
    if is_answered { Ok(Some(written)) } else { Err(Problem::internal()) }
}

#[cfg(test)]
mod tests {
    use super::{super::body::Encoding, *};

    #[tokio::test]
    async fn a_chunk_of_very_short_lines_is_not_kept_as_entries_all_at_once() {
        for (format, file) in
            [(Format::Csv, "email\n".to_owned() + &"a\n".repeat(500_000)), (Format::Ndjson, "1\n".repeat(500_000))]
        {
            let body = ContentBody::new(Encoding::Plain, Body::from(file), None);
            let packer = Packer::new(None, None, MESSAGE_ENTRIES, MESSAGE_BYTES);
            let mut rows = Rows::new(format, Purpose::Import { is_reason_given: false }, FileSource::default(), body, packer);
            let mut count = 0;
            while let Some(message) = rows.next().await.ok().flatten() {
                let entries = message.entries.len() + message.unreadable.len();
                count += entries;
                assert!(entries <= MESSAGE_ENTRIES && rows.packer.waiting() <= MESSAGE_ENTRIES + SLICE_BYTES / 2);
            }
            assert_eq!(count, 500_000);
        }
    }

    #[tokio::test]
    async fn long_lines_are_not_kept_until_there_are_many() {
        let file = "email\n".to_owned() + &format!("{}\n", "a".repeat(60_000)).repeat(200);
        let body = ContentBody::new(Encoding::Plain, Body::from(file), None);
        let packer = Packer::new(None, None, MESSAGE_ENTRIES, MESSAGE_BYTES);
        let mut rows = Rows::new(Format::Csv, Purpose::Import { is_reason_given: false }, FileSource::default(), body, packer);
        let mut count = 0;
        while let Some(message) = rows.next().await.ok().flatten() {
            count += message.entries.len();
            assert!(message.entries.iter().map(|entry| entry.email.len()).sum::<usize>() <= MESSAGE_BYTES);
        }
        assert_eq!(count, 200);
    }
}
