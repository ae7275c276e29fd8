//! `dnc import`: files into the list, one import a file, with a table of what became of them.
//!
//! The service alone decides what is stored. The same rules are applied here to each row as it is
//! sent, because the service can tell an entry's number and not its line, and describes ten
//! thousand causes at most; so every refused row gets into the file of rejects, whatever the size
//! of the import, and nothing is kept in memory for it.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use clap::{Args, builder::FalseyValueParser};
use futures_util::{StreamExt, future::ready};
use indicatif::{HumanBytes, HumanCount, HumanDuration, ProgressBar, ProgressStyle};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::Status;
use tonic_types::StatusExt;

use super::{
    client::{Server, TypeName, one_line},
    files::{self, Content, Ended, Input, Row},
};
use crate::{
    domain::{Address, Failure, Kind, Reason},
    gateway::{harmless, type_number},
    proto::{Entry, EntryType, ImportEntriesRequest, ImportEntriesResponse, ImportOptions},
};

/// Entries in one message.
const MESSAGE_ENTRIES: usize = 2_000;

/// Octets of text in one message, well below the service's limit of 4 MiB.
const MESSAGE_BYTES: usize = 1 << 20;

/// How long rows wait for others to fill a message with, if there are others at all.
const FLUSH_AFTER: Duration = Duration::from_secs(1);

/// How long nothing is sent before an empty message says that the import still goes on; a service
/// ends those that say nothing.
const ALIVE_EVERY: Duration = Duration::from_secs(20);

/// Messages that are ready and not yet sent.
const MESSAGES_READY: usize = 4;

/// How often progress is told where there is no terminal to draw a bar on.
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// Rows that a rehearsal shows of each file on a terminal; everywhere else it shows all.
const SHOWN_ON_TERMINAL: u64 = 20;

#[derive(Args, Debug)]
#[command(after_long_help = "\
A file may be CSV with or without a header, a plain list of one address a line, NDJSON, or a suppression list as Amazon SES, SendGrid, \
Mailgun, Postmark, SparkPost or Mailchimp export it, as CSV or JSON; packed with gzip or zstd or not. What it is shows by what is in it. \
Try --dry-run to see what each row is taken for.

Rows that are refused stop nothing: they are counted, and with --rejects written to a file that can be mended and imported. \
Importing a file again is always safe: what is stored is skipped.")]
pub(super) struct Options {
    /// What to import; - is standard input
    #[arg(value_name = "FILE", default_value = "-")]
    files: Vec<PathBuf>,
    /// The reason of rows that have none
    #[arg(long, env = "DNC_IMPORT_REASON", default_value = "import")]
    reason: String,
    /// What rows are that do not say it
    #[arg(long = "type", env = "DNC_IMPORT_TYPE", default_value = "email")]
    entry_type: TypeName,
    /// The column that holds the addresses, if it is not known by its name
    #[arg(long, env = "DNC_IMPORT_COLUMN", value_name = "NAME")]
    column: Option<String>,
    /// Where refused rows go, as CSV with line and cause; an existing file is written over, or gone
    /// on with under --skip-lines
    #[arg(long, env = "DNC_IMPORT_REJECTS", value_name = "FILE")]
    rejects: Option<PathBuf>,
    /// Store nothing; show what each row was taken for, and what would become of it
    #[arg(long, env = "DNC_DRY_RUN", value_parser = FalseyValueParser::new())]
    dry_run: bool,
    /// Leave out what begins on this line of the first file or before, which is how an interrupted
    /// import goes on
    #[arg(long, env = "DNC_IMPORT_SKIP_LINES", value_name = "N", default_value_t = 0)]
    skip_lines: u64,
    #[command(flatten)]
    server: Server,
}

/// What a row is taken for where it does not say.
struct Defaults {
    kind: TypeName,
    reason: String,
}

/// A row that the service refuses, as it would have been stored.
struct Reject {
    line: u64,
    email: String,
    kind: String,
    reason: String,
    code: &'static str,
    cause: String,
}

/// Some rows on their way, and what is known of them.
#[derive(Default)]
struct Part {
    entries: Vec<Entry>,
    /// The line of each entry.
    lines: Vec<u64>,
    rejects: Vec<Reject>,
    /// The lines of those who may be written to.
    left_out: Vec<u64>,
    last_line: u64,
    layout: &'static str,
    octets: usize,
    begun: Option<Instant>,
}

/// What has been sent of a file.
#[derive(Default)]
struct Sent {
    entries: u64,
    left_out: u64,
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
    left_out: u64,
}

pub(super) async fn run(options: Options) -> anyhow::Result<()> {
    if options.files.contains(&PathBuf::from("-")) && std::io::stdin().is_terminal() {
        bail!("name a FILE to import, or pipe one into standard input");
    }
    for file in options.files.iter().filter(|file| file.as_os_str() != "-") {
        // A mistaken name is told before anything is stored, or written over.
        // Not opened: the writer of a named pipe would take its closing for the end.
        file.metadata().with_context(|| format!("cannot read {}", file.display()))?;
    }
    let rejects = options.rejects.as_deref().map(|path| Rejects::open(path, &options)).transpose()?;
    let import =
        Import { rejects: rejects.map(|rejects| Arc::new(Mutex::new(rejects))), stop: stop_on_signal()?, options: &options };
    let mut total = Outcome::default();
    for (number, file) in options.files.iter().enumerate() {
        let skip_lines = if number == 0 { options.skip_lines } else { 0 };
        let (outcome, ended) = import.file(file, skip_lines).await?;
        if options.files.len() > 1 {
            print(&format!("\n{}", file.display()))?;
            outcome.print()?;
        }
        total.add(outcome);
        if let Some(ended) = ended {
            // What is stored is told whatever happened after it.
            total.print_total(number + 1)?;
            bail!("{}", ended.advice(&options.files[number..], skip_lines));
        }
    }
    total.print_total(options.files.len())?;
    if options.dry_run {
        eprintln!("dnc: nothing was stored; leave out --dry-run to import");
    }
    if let (Some(path), true) = (&options.rejects, !total.failed.is_empty()) {
        eprintln!("dnc: the refused rows are in {0}; mend them there, and run: dnc import {0}", path.display());
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
        let file = if rest[0].as_os_str() == "-" { "standard input".to_owned() } else { rest[0].display().to_string() };
        match self {
            Self::Interrupted(line) => format!(
                "interrupted; everything up to line {line} of {file} is accounted for above. To go on, run the same command with \
                 --skip-lines {line} for {file}{others}"
            ),
            Self::Broken(line, why) if *line == skipped => format!("{file} {why}; nothing of it was imported"),
            Self::Broken(line, why) => format!(
                "{file} {why}; everything up to line {line} is accounted for above. Mend or leave out what comes after it, and run the \
                 same command with --skip-lines {line} for {file}{others}"
            ),
        }
    }
}

struct Import<'a> {
    options: &'a Options,
    rejects: Option<Arc<Mutex<Rejects>>>,
    stop: CancellationToken,
}

impl Import<'_> {
    /// Imports one file, and says what became of it, and whether it ended early.
    async fn file(&self, path: &Path, skip_lines: u64) -> anyhow::Result<(Outcome, Option<EndedEarly>)> {
        let input = Input::open(path)?;
        let name = input.name.clone();
        let sent = Arc::new(Mutex::new(Sent { last_line: skip_lines, ..Sent::default() }));
        let progress = Progress::start(&input, sent.clone());
        let parts = self.read(input, skip_lines, sent.clone());
        let messages = self.messages(&name, parts, sent.clone());
        let call = self.options.server.request(messages)?;
        let answer = self.options.server.client()?.import_entries(call).await;
        drop(progress);
        let sent = std::mem::take(&mut *lock(&sent));
        let answer =
            answer.map_err(|status| broken_off(&name, sent.entries, &status, self.options.server.told(&status)))?.into_inner();
        if !sent.layout.is_empty() {
            eprintln!("dnc: {name} was read as: {}", sent.layout);
        }
        let ended = match &sent.broken {
            Some(why) => Some(EndedEarly::Broken(sent.last_line, why.clone())),
            None if self.stop.is_cancelled() => Some(EndedEarly::Interrupted(sent.last_line)),
            None => None,
        };
        Ok((Outcome::of(&answer, sent), ended))
    }

    /// Reads a file on a thread of its own, and keeps a few parts ready.
    fn read(&self, input: Input, skip_lines: u64, sent: Arc<Mutex<Sent>>) -> mpsc::Receiver<Part> {
        let (ready, parts) = mpsc::channel(MESSAGES_READY);
        let options = files::Options { column: self.options.column.clone(), skip_lines, addresses_only: false };
        let defaults = Defaults { kind: self.options.entry_type, reason: self.options.reason.clone() };
        std::thread::spawn(move || {
            let mut part = Part::default();
            let read = input.read(&options, |row| {
                part.take(row, &defaults);
                if !part.is_due() {
                    return Ok(());
                }
                ready.blocking_send(std::mem::take(&mut part)).map_err(|_| Ended::Stopped)
            });
            // What was read before the fault is sent all the same.
            let _ = ready.blocking_send(part);
            if let Err(Ended::Broken(why)) = read {
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
    ) -> impl futures_util::Stream<Item = ImportEntriesRequest> + Send + 'static {
        let first = ImportEntriesRequest {
            entries: Vec::new(),
            options: Some(ImportOptions {
                validate_only: self.options.dry_run,
                default_reason: self.options.reason.clone(),
                request_id: String::new(),
            }),
            unreadable: Vec::new(),
        };
        let (name, rejects, stop) = (name.to_owned(), self.rejects.clone(), self.stop.clone());
        let mut shown = self.options.dry_run.then(|| Shown::new(&name, self.options));
        let parts = futures_util::stream::unfold(parts, |mut parts| async move {
            match timeout(ALIVE_EVERY, parts.recv()).await {
                Ok(part) => part.map(|part| (part, parts)),
                Err(_) => Some((Part::default(), parts)),
            }
        });
        let messages = parts.scan((), move |(), part| {
            let mut sent = lock(&sent);
            if let Some(rejects) = &rejects
                && let Err(error) = lock(rejects).write(&name, &part.rejects)
            {
                // Not sent either, so that going on comes by these rows again.
                sent.broken = Some(format!("was left, since the file of rejects takes nothing more ({error})"));
                return ready(None);
            }
            if let Some(shown) = &mut shown {
                shown.show(&part);
            }
            ready(Some(ImportEntriesRequest { entries: sent.count(part), ..ImportEntriesRequest::default() }))
        });
        futures_util::stream::iter([first]).chain(messages.take_until(stop.cancelled_owned()))
    }
}

impl Part {
    /// True when it is large enough to be sent, or has waited long enough.
    fn is_due(&mut self) -> bool {
        self.entries.len() + self.left_out.len() >= MESSAGE_ENTRIES
            || self.octets >= MESSAGE_BYTES
            || self.begun.get_or_insert_with(Instant::now).elapsed() >= FLUSH_AFTER
    }

    fn take(&mut self, row: Row, defaults: &Defaults) {
        self.last_line = row.line;
        self.layout = row.layout;
        let (address, kind, reason) = match row.content {
            Content::NotSuppressed => {
                self.left_out.push(row.line);
                return;
            }
            Content::Unreadable(text, why) => {
                self.octets += text.len();
                self.rejects.push(Reject {
                    line: row.line,
                    email: text,
                    kind: kind_name(defaults.kind.number()).unwrap_or_default().to_owned(),
                    reason: defaults.reason.clone(),
                    code: Failure::InvalidEmail("").code(),
                    cause: format!("The row {why}."),
                });
                // Counted by the service like any other refused entry.
                return self.send(row.line, Entry::default());
            }
            Content::Entry { address, kind, reason } => (address, kind, reason),
        };
        let number = match type_number(kind.trim()) {
            0 => defaults.kind.number(),
            number => number,
        };
        let checked = match EntryType::try_from(number) {
            Ok(EntryType::Domain) => Address::parse(Kind::Domain, address.clone()).map(drop),
            Ok(_) => Address::parse(Kind::Email, address.clone()).map(drop),
            Err(_) => Err(Failure::InvalidType),
        };
        if let Err(failure) = checked.and_then(|()| Reason::parse(reason.clone()).map(drop)) {
            self.rejects.push(Reject {
                line: row.line,
                email: address.clone(),
                kind: kind_name(number).map_or(kind, str::to_owned),
                reason: if reason.trim().is_empty() { defaults.reason.clone() } else { reason.clone() },
                code: failure.code(),
                cause: failure.message(),
            });
        }
        self.send(row.line, Entry { email: address, r#type: number, reason, ..Entry::default() });
    }

    fn send(&mut self, line: u64, entry: Entry) {
        self.octets += entry.email.len() + entry.reason.len();
        self.entries.push(entry);
        self.lines.push(line);
    }
}

impl Sent {
    fn count(&mut self, part: Part) -> Vec<Entry> {
        self.entries += part.entries.len() as u64;
        self.left_out += part.left_out.len() as u64;
        self.last_line = self.last_line.max(part.last_line);
        if !part.layout.is_empty() {
            self.layout = part.layout;
        }
        for reject in &part.rejects {
            *self.rejected.entry(reject.code).or_default() += 1;
        }
        part.entries
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
                    "dnc: the service refused other rows than this program expected (is one of them older?), so lines in the rejects may \
                     be wrong; the first it refused is entry {}: {}",
                    first.index, first.message
                );
            }
        }
        Self { imported: answer.imported, skipped: answer.skipped, failed, left_out: sent.left_out }
    }

    fn add(&mut self, other: Self) {
        self.imported += other.imported;
        self.skipped += other.skipped;
        self.left_out += other.left_out;
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
        if self.left_out > 0 {
            row("left out", self.left_out, "  may be written to, as the file says")?;
        }
        Ok(())
    }
}

/// The file of refused rows.
struct Rejects(csv::Writer<File>);

impl Rejects {
    fn open(path: &Path, options: &Options) -> anyhow::Result<Self> {
        let place = path.canonicalize().ok();
        if place.is_some() && options.files.iter().any(|file| file.canonicalize().ok() == place) {
            bail!("--rejects would write over {}, which is to be imported; choose another name", path.display());
        }
        let goes_on = options.skip_lines > 0;
        let opened = File::options().create(true).write(true).truncate(!goes_on).append(goes_on).open(path);
        let file = opened.with_context(|| format!("cannot write {}", path.display()))?;
        let is_new = file.metadata()?.len() == 0;
        let mut rejects = Self(csv::Writer::from_writer(file));
        if is_new {
            rejects.0.write_record(["email", "type", "reason", "file", "line", "code", "cause"])?;
            rejects.0.flush().with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(rejects)
    }

    fn write(&mut self, file: &str, rejects: &[Reject]) -> Result<(), csv::Error> {
        for Reject { line, email, kind, reason, code, cause } in rejects {
            let line = line.to_string();
            let cells: [&str; 7] = [&harmless(email), &harmless(kind), &harmless(reason), &harmless(file), &line, code, cause];
            self.0.write_record(cells)?;
        }
        if !rejects.is_empty() {
            self.0.flush()?;
        }
        Ok(())
    }
}

/// What a rehearsal shows of the rows.
struct Shown {
    file: String,
    left: u64,
    default_reason: String,
}

impl Shown {
    fn new(file: &str, options: &Options) -> Self {
        let _ = print("row\taddress\ttype\treason\trefused");
        let left = if std::io::stdout().is_terminal() { SHOWN_ON_TERMINAL } else { u64::MAX };
        Self { file: file.to_owned(), left, default_reason: options.reason.clone() }
    }

    fn show(&mut self, part: &Part) {
        let mut out = std::io::stdout().lock();
        let mut rejects = part.rejects.iter().peekable();
        for line in &part.left_out {
            if self.left == 0 {
                return;
            }
            self.left -= 1;
            let _ = writeln!(out, "{}:{line}\t\t\t\tleft out: may be written to, as the file says", self.file);
        }
        for (entry, line) in part.entries.iter().zip(&part.lines) {
            let reject = rejects.next_if(|reject| reject.line == *line);
            if self.left == 0 {
                return;
            }
            self.left -= 1;
            let address = reject.map_or(entry.email.as_str(), |reject| reject.email.as_str()).trim();
            let kind = kind_name(entry.r#type).or(reject.map(|reject| reject.kind.as_str())).unwrap_or_default();
            let reason = if entry.reason.trim().is_empty() { &self.default_reason } else { &entry.reason };
            // Whoever closed the pipe has seen enough.
            let _ = writeln!(
                out,
                "{}:{line}\t{}\t{}\t{}\t{}",
                self.file,
                one_line(address),
                one_line(kind),
                one_line(reason),
                reject.map_or("", |reject| reject.cause.as_str())
            );
            if self.left == 0 {
                let _ = writeln!(out, "…\t(send standard output to a file to see all rows)");
            }
        }
    }
}

/// What is told while a file is imported: a bar on a terminal, else a line now and then.
struct Progress {
    bar: ProgressBar,
    _telling: AbortOnDropHandle<()>,
}

impl Progress {
    fn start(input: &Input, sent: Arc<Mutex<Sent>>) -> Self {
        let (bytes, bytes_read, name) = (input.bytes, input.bytes_read.clone(), input.name.clone());
        let bar = match bytes {
            Some(bytes) => ProgressBar::new(bytes).with_style(style("{prefix} {bar:24} {bytes}/{total_bytes}  {msg}  {eta} left")),
            None => ProgressBar::new_spinner().with_style(style("{prefix} {spinner} {bytes}  {msg}  {elapsed}")),
        };
        bar.set_prefix(name.clone());
        let (drawn, started) = (bar.clone(), Instant::now());
        let telling = tokio::spawn(async move {
            let every = if drawn.is_hidden() { REPORT_EVERY } else { Duration::from_millis(200) };
            let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
            loop {
                ticks.tick().await;
                let (entries, read) = (lock(&sent).entries, bytes_read.load(Ordering::Relaxed));
                let elapsed = started.elapsed();
                let rate = entries as f64 / elapsed.as_secs_f64();
                let rows = format!("{} entries, {}/s", HumanCount(entries), HumanCount(rate as u64));
                if drawn.is_hidden() {
                    let left = bytes.filter(|_| read > 0).map(|bytes| {
                        let left = elapsed.mul_f64(bytes.saturating_sub(read) as f64 / read as f64);
                        format!(" of {}, {} left", HumanBytes(bytes), HumanDuration(left))
                    });
                    eprintln!("dnc: {name}: {rows}, {}{}", HumanBytes(read), left.unwrap_or_default());
                } else {
                    drawn.set_position(read);
                    drawn.set_message(rows);
                }
            }
        });
        Self { bar, _telling: AbortOnDropHandle::new(telling) }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// The name of an entry type; none for a number that no type has.
fn kind_name(number: i32) -> Option<&'static str> {
    match EntryType::try_from(number) {
        Ok(EntryType::Domain) => Some("domain"),
        Ok(EntryType::Unspecified | EntryType::Email) => Some("email"),
        Err(_) => None,
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// The first signal ends the import in order, the second one at once.
fn stop_on_signal() -> anyhow::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let told = stop.clone();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if told.is_cancelled() {
                eprintln!(
                    "dnc: stopped at once; what was stored last is not known. Import the files again: what is stored is skipped"
                );
                std::process::exit(1);
            }
            eprintln!("dnc: stopping; waiting until what was sent is stored (Ctrl-C again stops at once)");
            told.cancel();
        }
    });
    Ok(stop)
}

/// An import that the service, or the way to it, broke off.
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
