//! `dnc import`: files into the list, one import a file, with a table of what became of them.
//!
//! A thread reads the file and packs its rows into parts, a few ahead; the call sends them as the
//! service takes them. What is counted as sent is counted when it goes, so that an import that was
//! interrupted can say after which line to go on.

mod rehearsal;
mod rejects;

use std::{
    collections::BTreeMap,
    io::IsTerminal,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use clap::{
    Args,
    builder::{FalseyValueParser, PossibleValuesParser, TypedValueParser},
};
use futures_util::{StreamExt, future::ready};
use indicatif::HumanCount;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic_types::StatusExt;

use self::{
    rehearsal::{Defaults, Table},
    rejects::{Reject, Rejects},
};
use super::{
    client::{Server, TypeName, retry_wait},
    input::{self, Input, ReadEnd, is_stdin},
    progress::Progress,
};
use crate::{
    domain::Reason,
    files::{self, Counts, Pack, Packer, Purpose, Row, Source},
    proto::{ImportEntriesRequest, ImportEntriesResponse, ImportOptions},
};

/// Entries in one message.
const MESSAGE_ENTRIES: usize = 2_000;

/// Bytes of text in one message, well below the service's limit of 4 MiB.
const MESSAGE_BYTES: usize = 1 << 20;

/// How long rows wait for others to fill a message with, if there are others at all.
const FLUSH_AFTER: Duration = Duration::from_secs(1);

/// How long nothing is sent before an empty message says that the import still goes on; a service
/// ends those that say nothing.
const ALIVE_EVERY: Duration = Duration::from_secs(20);

/// Messages that are ready and not yet sent.
const MESSAGES_READY: usize = 4;

/// The reason of rows that have none, unless the caller names another.
const DEFAULT_REASON: &str = "import";

#[derive(Args, Debug)]
#[command(after_long_help = "\
A file may be CSV with or without a header, a plain list of one address a line, NDJSON, or a suppression list as Amazon SES, SendGrid, \
Mailgun, Postmark, SparkPost, Mailchimp, Mandrill or Brevo export it, as CSV or JSON; compressed with gzip or zstd or not; in UTF-8 or \
UTF-16. What it is shows by what is in it. Where that does not tell (email,created), name the source with --from. Try --dry-run to see \
what each row is taken for.

Rows that are rejected stop nothing: they are counted, and with --rejects written to a file that can be mended and imported. \
Importing a file again is always safe: what is stored is skipped.")]
pub(super) struct Options {
    /// What to import; - is standard input
    #[arg(value_name = "FILE", default_value = "-")]
    files: Vec<PathBuf>,
    /// The reason of rows that have none; also of those whose reason would only be guessed from the
    /// kind of list [default: import]
    #[arg(long, env = "DNC_IMPORT_REASON")]
    reason: Option<String>,
    /// What rows are that do not say it
    #[arg(long = "type", env = "DNC_IMPORT_TYPE", default_value = "email")]
    entry_type: TypeName,
    /// The column that holds the addresses, if it is not known by its name
    #[arg(long, env = "DNC_IMPORT_COLUMN", value_name = "NAME")]
    column: Option<String>,
    /// Where the files come from, if their columns do not tell
    #[arg(long, env = "DNC_IMPORT_FROM", value_name = "SOURCE", value_parser = sources())]
    from: Option<Source>,
    /// Where rejected rows go, as CSV with line and cause. The file is written anew, and has its
    /// name when the import has ended; under --skip-lines it begins with what is there
    #[arg(long, env = "DNC_IMPORT_REJECTS", value_name = "FILE")]
    rejects: Option<PathBuf>,
    /// Store nothing; show what each row was taken for, and what would become of it
    #[arg(long, env = "DNC_DRY_RUN", value_parser = FalseyValueParser::new())]
    dry_run: bool,
    /// Pass over what begins on this line of the first file or before, which is how an interrupted
    /// import goes on
    #[arg(long, env = "DNC_IMPORT_SKIP_LINES", value_name = "N", default_value_t = 0)]
    skip_lines: u64,
    #[command(flatten)]
    server: Server,
}

/// The names of sources, which the help lists.
fn sources() -> impl TypedValueParser<Value = Source> {
    let names = PossibleValuesParser::new(Source::names());
    names.try_map(|name| Source::of_name(&name).ok_or("there is no such source"))
}

/// Some rows on their way, and what is known of them.
#[derive(Debug, Default)]
struct Part {
    message: ImportEntriesRequest,
    rejects: Vec<Reject>,
    /// Lines of the table of a dry run.
    shown: Vec<String>,
    counts: Counts,
    last_line: u64,
    layout: &'static str,
}

/// Makes parts of rows.
struct Parts {
    packer: Packer,
    defaults: Defaults,
    /// The table of a dry run.
    table: Option<Table>,
    part: Part,
    /// What was counted when the part before went.
    counted: Counts,
    begun: Option<Instant>,
}

/// What has been sent of a file.
#[derive(Default)]
struct Sent {
    counts: Counts,
    last_line: u64,
    layout: &'static str,
    rejected: BTreeMap<&'static str, u64>,
    /// Why the file, or the file of rejects, could not be gone on with.
    broken: Option<String>,
}

/// What became of a file, or of all of them.
#[derive(Default)]
struct Outcome {
    imported: u64,
    skipped: u64,
    failed: BTreeMap<String, u64>,
    counts: Counts,
}

pub(super) async fn run(options: Options) -> anyhow::Result<()> {
    if options.files.iter().any(|file| is_stdin(file)) && std::io::stdin().is_terminal() {
        bail!("name a FILE to import, or pipe one into standard input");
    }
    for file in options.files.iter().filter(|file| !is_stdin(file)) {
        // A mistaken name is reported before anything is stored, or written over.
        // Not opened: the writer of a named pipe would take its closing for the end.
        file.metadata().with_context(|| format!("cannot read {}", file.display()))?;
    }
    let reason = options.reason.clone().unwrap_or_else(|| DEFAULT_REASON.to_owned());
    let reason = Reason::parse(reason).map_err(|failure| anyhow::anyhow!("--reason: {}", failure.message()))?;
    let Some(reason) = reason else { bail!("--reason is blank; give a text, or leave it out") };
    let defaults = Defaults { kind: options.entry_type.kind(), reason };
    let rejects = options.rejects.as_deref().map(|path| Rejects::create(path, &options)).transpose()?;
    let rejects = rejects.map(|rejects| Arc::new(Mutex::new(Some(rejects))));
    let import = Import { rejects, stop: stop_on_signal()?, options: &options, defaults };
    let imported = import.files().await;
    // Whatever happened, the rows that were rejected until then are kept.
    let rejects = import.rejects.as_ref().and_then(|rejects| lock(rejects).take());
    let finished = rejects.map_or(Ok(()), Rejects::finish);
    let failed = imported?;
    finished?;
    if options.dry_run {
        eprintln!("dnc: nothing was stored; leave out --dry-run to import");
    }
    if let (Some(path), true) = (&options.rejects, failed) {
        eprintln!("dnc: the rejected rows are in {0}; mend them there, and run: dnc import {0}", path.display());
    }
    Ok(())
}

/// Why an import ended before its files did.
enum EndedEarly {
    /// After this line, because somebody wanted it so.
    Interrupted(u64),
    /// After this line, because the file cannot be read on.
    Broken(u64, String),
}

impl EndedEarly {
    /// What to do about it; `rest` are this file and those after it, `skipped` the line that it
    /// began behind.
    fn advice(&self, rest: &[PathBuf], skipped: u64) -> String {
        let others = if rest.len() > 1 { " and the files after it" } else { "" };
        let file = if is_stdin(&rest[0]) { "standard input".to_owned() } else { rest[0].display().to_string() };
        match self {
            Self::Interrupted(line) => format!(
                "interrupted; everything up to line {line} of {file} is accounted for above. To go on, run the same command with \
                 --skip-lines {line} for {file}{others}"
            ),
            Self::Broken(line, why) if *line == skipped => format!("{file} {why}; nothing of it was imported"),
            Self::Broken(line, why) => format!(
                "{file} {why}; everything up to line {line} is accounted for above. Mend or remove what comes after it, and run the \
                 same command with --skip-lines {line} for {file}{others}"
            ),
        }
    }
}

struct Import<'a> {
    options: &'a Options,
    defaults: Defaults,
    /// None once they have their name.
    rejects: Option<Arc<Mutex<Option<Rejects>>>>,
    stop: CancellationToken,
}

impl Import<'_> {
    /// Imports all files, and says whether rows were rejected.
    async fn files(&self) -> anyhow::Result<bool> {
        let files = &self.options.files;
        let mut total = Outcome::default();
        for (number, file) in files.iter().enumerate() {
            let skip_lines = if number == 0 { self.options.skip_lines } else { 0 };
            let (outcome, ended) = self.file(file, skip_lines).await?;
            if files.len() > 1 {
                print(&format!("\n{}", file.display()))?;
                outcome.print()?;
            }
            total.add(outcome);
            if let Some(ended) = ended {
                // What is stored is reported whatever happened after it.
                total.print_total(number + 1)?;
                bail!("{}", ended.advice(&files[number..], skip_lines));
            }
        }
        total.print_total(files.len())?;
        Ok(!total.failed.is_empty())
    }

    /// Imports one file, and says what became of it, and whether it ended early. Begins again when
    /// the server asks for that before anything has become of the file.
    async fn file(&self, path: &Path, skip_lines: u64) -> anyhow::Result<(Outcome, Option<EndedEarly>)> {
        let mut tries = 1;
        loop {
            let refused = match self.attempt(path, skip_lines).await? {
                Ok(done) => return Ok(done),
                Err(refused) => refused,
            };
            let wait = if refused.may_begin_again && path.is_file() { retry_wait(&refused.status, tries) } else { None };
            let Some(wait) = wait else { return Err(refused.advice) };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.stop.cancelled() => return Err(refused.advice),
            }
            tries += 1;
        }
    }

    /// Imports one file, unless the server refuses it.
    async fn attempt(&self, path: &Path, skip_lines: u64) -> anyhow::Result<Result<(Outcome, Option<EndedEarly>), FileRefused>> {
        let input = Input::open(path)?;
        let name = input.name.clone();
        let sent = Arc::new(Mutex::new(Sent { last_line: skip_lines, ..Sent::default() }));
        let entries = Arc::new(AtomicU64::new(0));
        let progress = Progress::start(&input, entries.clone(), "entries");
        let parts = self.read(input, skip_lines, sent.clone());
        let messages = self.messages(&name, parts, sent.clone(), entries.clone());
        let call = self.options.server.request(messages)?;
        let answer = self.options.server.client()?.import_entries(call).await;
        drop(progress);
        let sent = std::mem::take(&mut *lock(&sent));
        let entries = entries.load(Ordering::Relaxed);
        let answer = match answer {
            Ok(answer) => answer.into_inner(),
            Err(status) => {
                let advice = broken_off(&name, entries, &status, self.options.server.told(&status));
                // What was written of it, to the rejects or to the terminal, cannot be taken back.
                let may_begin_again = sent.rejected.is_empty() && !self.options.dry_run && stored(&status).is_none_or(|n| n == 0);
                return Ok(Err(FileRefused { status, advice, may_begin_again }));
            }
        };
        if !sent.layout.is_empty() {
            eprintln!("dnc: {name} was read as: {}", sent.layout);
        }
        let ended = match &sent.broken {
            Some(why) => Some(EndedEarly::Broken(sent.last_line, why.clone())),
            None if self.stop.is_cancelled() => Some(EndedEarly::Interrupted(sent.last_line)),
            None => None,
        };
        Ok(Ok((Outcome::of(&answer, sent), ended)))
    }

    /// Reads a file on a thread of its own, and keeps a few parts ready.
    fn read(&self, input: Input, skip_lines: u64, sent: Arc<Mutex<Sent>>) -> mpsc::Receiver<Part> {
        let (ready, parts) = mpsc::channel(MESSAGES_READY);
        let purpose = Purpose::Import { is_reason_given: self.options.reason.is_some() };
        let options = files::Options {
            column: self.options.column.clone(),
            source: self.options.from,
            skip_lines,
            ..files::Options::new(purpose, input::now())
        };
        let table = self.options.dry_run.then(|| Table::new(&input.name, self.defaults.clone()));
        let mut rows = Parts::new(self.defaults.clone(), table);
        std::thread::spawn(move || {
            let read = input.read(options, |row| match rows.take(&row) {
                Some(part) => ready.blocking_send(part).map_err(|_| ReadEnd::Stopped),
                None => Ok(()),
            });
            // What was read before the fault is sent all the same.
            let _ = ready.blocking_send(rows.part());
            if let Err(ReadEnd::Broken(why)) = read {
                lock(&sent).broken = Some(why);
            }
        });
        parts
    }

    /// The messages of one import. What is counted as sent is counted here, when it goes; the
    /// stream ends when the file does, or as soon as somebody wants to stop, and then the service
    /// stores and counts what it has got.
    fn messages(
        &self,
        name: &str,
        parts: mpsc::Receiver<Part>,
        sent: Arc<Mutex<Sent>>,
        entries: Arc<AtomicU64>,
    ) -> impl futures_util::Stream<Item = ImportEntriesRequest> + Send + 'static {
        let first = ImportEntriesRequest {
            options: Some(ImportOptions {
                validate_only: self.options.dry_run,
                default_reason: self.defaults.reason.as_str().to_owned(),
                request_id: String::new(),
            }),
            ..ImportEntriesRequest::default()
        };
        let (name, rejects, stop) = (name.to_owned(), self.rejects.clone(), self.stop.clone());
        let parts = futures_util::stream::unfold(parts, |mut parts| async move {
            match timeout(ALIVE_EVERY, parts.recv()).await {
                Ok(part) => part.map(|part| (part, parts)),
                Err(_) => Some((Part::default(), parts)),
            }
        });
        let messages = parts.scan((), move |(), part| {
            let mut sent = lock(&sent);
            if let Some(rejects) = &rejects
                && let Some(rejects) = &mut *lock(rejects)
                && let Err(error) = rejects.write(&name, &part.rejects)
            {
                // Not sent either, so that going on comes by these rows again.
                sent.broken = Some(format!("was left, since the file of rejects takes nothing more ({error})"));
                return ready(None);
            }
            rehearsal::show(&part.shown);
            entries.fetch_add((part.message.entries.len() + part.message.unreadable.len()) as u64, Ordering::Relaxed);
            ready(Some(sent.count(part)))
        });
        futures_util::stream::iter([first]).chain(messages.take_until(stop.cancelled_owned()))
    }
}

impl Parts {
    fn new(defaults: Defaults, table: Option<Table>) -> Self {
        // A part is full when it is said to be here, between two rows.
        let packer = Packer::new(None, Some(defaults.kind), usize::MAX, usize::MAX);
        Self { packer, defaults, table, part: Part::default(), counted: Counts::default(), begun: None }
    }

    /// Takes a row, and gives out those before it when they are enough. A part never ends within a
    /// row: an import that goes on behind a line would lose the rest of it.
    fn take(&mut self, row: &Row<'_>) -> Option<Part> {
        let full = (row.line != self.part.last_line && self.is_due()).then(|| self.part());
        let reject = self.defaults.reject(row);
        if let Some(table) = &mut self.table {
            table.add(row, reject.as_ref());
        }
        self.part.rejects.extend(reject);
        self.packer.row(row);
        self.part.last_line = row.line;
        self.part.layout = row.layout;
        full
    }

    /// True when the part is large enough to be sent, or has waited long enough.
    fn is_due(&mut self) -> bool {
        let excluded = self.packer.counts().excluded - self.counted.excluded;
        self.packer.waiting() + excluded as usize >= MESSAGE_ENTRIES
            || self.packer.bytes() >= MESSAGE_BYTES
            || self.begun.get_or_insert_with(Instant::now).elapsed() >= FLUSH_AFTER
    }

    /// All that was taken since the last time.
    fn part(&mut self) -> Part {
        self.begun = None;
        let before = std::mem::replace(&mut self.counted, self.packer.counts());
        Part {
            message: self.packer.flush().unwrap_or_default(),
            shown: self.table.as_mut().map(Table::take).unwrap_or_default(),
            counts: self.counted.since(before),
            ..std::mem::take(&mut self.part)
        }
    }
}

impl Sent {
    fn count(&mut self, part: Part) -> ImportEntriesRequest {
        self.counts.add(part.counts);
        self.last_line = self.last_line.max(part.last_line);
        if !part.layout.is_empty() {
            self.layout = part.layout;
        }
        for reject in &part.rejects {
            *self.rejected.entry(reject.code).or_default() += 1;
        }
        part.message
    }
}

impl Outcome {
    fn of(answer: &ImportEntriesResponse, sent: Sent) -> Self {
        let mut failed: BTreeMap<String, u64> = BTreeMap::new();
        if sent.rejected.values().sum::<u64>() == answer.failed {
            failed.extend(sent.rejected.iter().map(|(code, count)| ((*code).to_owned(), *count)));
        } else {
            // A service of another version has other rules, and its word counts.
            for error in &answer.errors {
                *failed.entry(error.code.clone()).or_default() += 1;
            }
            let described = answer.errors.len() as u64;
            if answer.failed > described {
                failed.insert("not described".to_owned(), answer.failed - described);
            }
            if let Some(first) = answer.errors.first() {
                eprintln!(
                    "dnc: the service rejected other rows than this program expected (is one of them older?), so the file of rejects may \
                     be wrong; the first it rejected is on line {}: {}",
                    first.line, first.message
                );
            }
        }
        Self { imported: answer.imported, skipped: answer.skipped, failed, counts: sent.counts }
    }

    fn add(&mut self, other: Self) {
        self.imported += other.imported;
        self.skipped += other.skipped;
        self.counts.add(other.counts);
        for (code, count) in other.failed {
            *self.failed.entry(code).or_default() += count;
        }
    }

    fn print_total(&self, files: usize) -> anyhow::Result<()> {
        if files > 1 {
            print("\nin all")?;
        }
        self.print()
    }

    fn print(&self) -> anyhow::Result<()> {
        let row =
            |name: &str, count: u64, note: &str| print(format!("{name:<20}{:>15}{note}", HumanCount(count).to_string()).trim_end());
        row("imported", self.imported, "")?;
        row("skipped", self.skipped, "  already there, or repeated")?;
        row("failed", self.failed.values().sum(), "")?;
        for (code, count) in &self.failed {
            row(&format!("  {code}"), *count, "")?;
        }
        for (name, count, note) in [
            ("excluded", self.counts.excluded, "  may be written to, as the file says"),
            ("reasons cut", self.counts.reasons_cut, "  after 64 characters"),
            ("times dropped", self.counts.times_dropped, "  not a time, or in the future; the entries are kept"),
        ] {
            if count > 0 {
                row(name, count, note)?;
            }
        }
        Ok(())
    }
}

/// The first signal ends the import in order, the second one at once.
fn stop_on_signal() -> anyhow::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let seen = stop.clone();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if seen.is_cancelled() {
                eprintln!(
                    "dnc: stopped at once; what was stored last is not known. Import the files again: what is stored is skipped"
                );
                std::process::exit(1);
            }
            eprintln!("dnc: stopping; waiting until what was sent is stored (Ctrl-C again stops at once)");
            seen.cancel();
        }
    });
    Ok(stop)
}

/// A file that the server refused.
struct FileRefused {
    status: Status,
    /// What to do about it.
    advice: anyhow::Error,
    /// Nothing has become of the file yet.
    may_begin_again: bool,
}

/// How many entries of an import were counted before it broke off, as far as the service says.
fn stored(status: &Status) -> Option<u64> {
    let details = status.get_error_details();
    let metadata = &details.error_info()?.metadata;
    ["imported", "skipped", "failed"].iter().map(|name| metadata.get(*name)?.parse::<u64>().ok()).sum()
}

/// What to do about an import that the service, or the way to it, broke off.
fn broken_off(name: &str, sent: u64, status: &Status, cause: anyhow::Error) -> anyhow::Error {
    let details = status.get_error_details();
    let stored = details.error_info().and_then(|info| {
        let count = |name: &str| info.metadata.get(name).and_then(|count| count.parse().ok()).map(HumanCount);
        Some(format!("imported {}, skipped {}, failed {} until then", count("imported")?, count("skipped")?, count("failed")?))
    });
    match stored {
        Some(stored) => anyhow::anyhow!("{name}: {cause} ({stored}; import it again, what is stored is skipped)"),
        None if sent > 0 => {
            let sent = HumanCount(sent);
            anyhow::anyhow!("{name}: {cause} ({sent} entries were sent until then; import it again, what is stored is skipped)")
        }
        None => anyhow::anyhow!("{name}: {cause}"),
    }
}

fn print(line: &str) -> anyhow::Result<()> {
    super::admin::print(line)
}

fn lock<T>(shared: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
