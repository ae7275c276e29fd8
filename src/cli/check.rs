//! `dnc check`: may these be written to? A line for each address, or a mailing list split in two.

use std::{
    io::{BufWriter, IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{anyhow, bail};
use clap::{ArgGroup, Args};
use futures_util::{Stream, StreamExt};
use indicatif::HumanCount;
use tokio::{sync::mpsc, time::timeout};

use super::{
    addresses::Addresses,
    admin::print,
    client::Server,
    input::{self, Input, ReadEnd, require_other_file},
    new_file::NewFile,
    output::one_line,
    progress::Progress,
};
use crate::{
    files::{self, Answered, CheckPacker, CheckPart, Pack, Purpose},
    proto::{CheckResult, ScrubEntriesRequest},
};

/// The exit status when at least one address is suppressed.
const SUPPRESSED: u8 = 3;

/// Parts that are at the service at once, and those that are ready to go.
const PARTS_IN_FLIGHT: usize = 8;
const PARTS_READY: usize = 2;

/// How long nothing is asked before an empty message says that more will be; a service ends those
/// that say nothing.
const ALIVE_EVERY: Duration = Duration::from_secs(20);

#[derive(Args, Debug)]
#[command(
    group = ArgGroup::new("asked").args(["addresses", "files"]).multiple(true).required(true),
    after_long_help = "\
With --clear and --suppressed a mailing list is split: each row goes into one of the two files, with all its columns. A row whose \
address cannot be read counts as suppressed. The files have their names only when the whole list was checked.

Exit status: 0 all are clear; 3 at least one is suppressed, or is no address; 1 the check failed, and nothing is known; 2 wrong usage.")]
pub(super) struct Options {
    #[command(flatten)]
    addresses: Addresses,
    /// Where the rows of --file go that may be written to
    #[arg(long, env = "DNC_CHECK_CLEAR", value_name = "FILE", requires = "files")]
    clear: Option<PathBuf>,
    /// Where the rows of --file go that must not be written to
    #[arg(long, env = "DNC_CHECK_SUPPRESSED", value_name = "FILE", requires = "files")]
    suppressed: Option<PathBuf>,
    #[command(flatten)]
    server: Server,
}

/// What is read, and what is wrong with it.
type Read = Result<CheckPart, anyhow::Error>;

pub(super) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let is_split = options.clear.is_some() || options.suppressed.is_some();
    let mut sink = if is_split { Sink::split(&options)? } else { Sink::Lines };
    let rows = Arc::new(AtomicU64::new(0));
    let (parts, _progress) = read(&options.addresses, is_split, &rows)?;
    let (sender, mut waiting) = mpsc::channel(PARTS_IN_FLIGHT);
    let (failed, mut failure) = mpsc::channel(1);
    let requests = requests(parts, sender, failed);
    let call = options.server.request(requests)?;
    let mut client = options.server.client()?;
    let told = |status| options.server.told(&status);
    let mut answers = client.scrub_entries(call).await.map_err(told)?.into_inner();
    let mut suppressed = 0;
    while let Some(answer) = answers.message().await.map_err(told)? {
        let part: CheckPart = waiting.recv().await.ok_or_else(|| anyhow!("the service answered what it was not asked"))?;
        let mut out = sink.open();
        let is_answered = part.answer(&answer.results, |row| {
            if let Some(result) = row.result {
                suppressed += u64::from(result.suppressed);
                rows.fetch_add(1, Ordering::Relaxed);
            }
            out.write(&row)
        })?;
        if !is_answered {
            bail!("the service answered too few or too many addresses; nothing is known of them");
        }
        out.flush()?;
    }
    if let Ok(error) = failure.try_recv() {
        return Err(error);
    }
    if waiting.try_recv().is_ok() {
        bail!("the service ended the check before it had answered everything; run it again");
    }
    sink.finish(rows.load(Ordering::Relaxed), suppressed)?;
    Ok(if suppressed > 0 { ExitCode::from(SUPPRESSED) } else { ExitCode::SUCCESS })
}

/// Reads everything on a thread of its own, no faster than it is taken.
fn read(addresses: &Addresses, is_split: bool, rows: &Arc<AtomicU64>) -> anyhow::Result<(mpsc::Receiver<Read>, Option<Progress>)> {
    let (ready, parts) = mpsc::channel(PARTS_READY);
    let mut named = CheckPart::default();
    let mut files: Vec<PathBuf> = Vec::new();
    for address in &addresses.addresses {
        if address == "-" { files.push(PathBuf::from("-")) } else { named.push(address.clone()) }
    }
    files.extend(addresses.files.iter().cloned());
    let inputs = files.iter().map(|file| Input::open(file)).collect::<Result<Vec<_>, _>>()?;
    // Lines of progress between the lines of answers would help nobody.
    let is_shown = is_split || !std::io::stdout().is_terminal();
    let progress = inputs.first().filter(|_| is_shown).map(|input| Progress::start(input, rows.clone(), "rows"));
    let options = files::Options { column: addresses.column.clone(), ..files::Options::new(Purpose::Check, input::now()) };
    std::thread::spawn(move || {
        if !named.is_empty() && ready.blocking_send(Ok(named)).is_err() {
            return;
        }
        for input in inputs {
            let name = input.name.clone();
            match read_file(input, &options, &ready) {
                Ok(()) => {}
                Err(ReadEnd::Stopped) => return,
                Err(ReadEnd::Broken(why)) => {
                    let _ = ready.blocking_send(Err(anyhow!("{name} {why}")));
                    return;
                }
            }
        }
    });
    Ok((parts, progress))
}

fn read_file(input: Input, options: &files::Options, ready: &mpsc::Sender<Read>) -> Result<(), ReadEnd> {
    let mut packer = CheckPacker::default();
    let send = |part| ready.blocking_send(Ok(part)).map_err(|_| ReadEnd::Stopped);
    let read = input.read(options.clone(), |row| {
        packer.row(&row);
        packer.next_full().map_or(Ok(()), send)
    });
    // What was read before a fault is answered all the same.
    while let Some(part) = packer.flush() {
        send(part)?;
    }
    read
}

/// The requests of the call. Each part waits for its answer in `waiting`; an error ends the
/// requests.
fn requests(
    parts: mpsc::Receiver<Read>,
    waiting: mpsc::Sender<CheckPart>,
    failed: mpsc::Sender<anyhow::Error>,
) -> impl Stream<Item = ScrubEntriesRequest> + Send + 'static {
    futures_util::stream::unfold((parts, waiting, failed), |(mut parts, waiting, failed)| async move {
        let mut part = match timeout(ALIVE_EVERY, parts.recv()).await {
            Ok(Some(Ok(part))) => part,
            Ok(Some(Err(error))) => {
                let _ = failed.send(error).await;
                return None;
            }
            Ok(None) => return None,
            Err(_) => CheckPart::default(),
        };
        let emails = part.take_emails();
        waiting.send(part).await.ok()?;
        Some((ScrubEntriesRequest { emails }, (parts, waiting, failed)))
    })
    .boxed()
}

/// Where the answers go.
enum Sink {
    /// A line each to standard output.
    Lines,
    /// The rows into two files.
    Split { clear: Option<NewFile>, suppressed: Option<NewFile> },
}

/// A sink that takes the answers to one part.
enum Out<'a> {
    Lines(BufWriter<std::io::StdoutLock<'static>>),
    Split { clear: &'a mut Option<NewFile>, suppressed: &'a mut Option<NewFile> },
}

impl Sink {
    fn split(options: &Options) -> anyhow::Result<Self> {
        let Addresses { addresses, files, .. } = &options.addresses;
        if !addresses.is_empty() || files.len() != 1 {
            bail!("--clear and --suppressed split one mailing list; name it with --file, and nothing else");
        }
        if options.clear == options.suppressed {
            bail!("--clear and --suppressed name the same file; choose two");
        }
        let create = |flag: &str, path: Option<&Path>| {
            path.map(|path| {
                require_other_file(flag, path, files)?;
                NewFile::create(path)
            })
            .transpose()
        };
        Ok(Self::Split {
            clear: create("--clear", options.clear.as_deref())?,
            suppressed: create("--suppressed", options.suppressed.as_deref())?,
        })
    }

    fn open(&mut self) -> Out<'_> {
        match self {
            Self::Lines => Out::Lines(BufWriter::new(std::io::stdout().lock())),
            Self::Split { clear, suppressed } => Out::Split { clear, suppressed },
        }
    }

    fn finish(self, rows: u64, suppressed_rows: u64) -> anyhow::Result<()> {
        let Self::Split { clear, suppressed } = self else { return Ok(()) };
        for file in [clear, suppressed].into_iter().flatten() {
            file.finish()?;
        }
        let row = |name: &str, count: u64| print(&format!("{name:<20}{:>15}", HumanCount(count).to_string()));
        row("clear", rows - suppressed_rows)?;
        row("suppressed", suppressed_rows)
    }
}

impl Out<'_> {
    fn write(&mut self, row: &Answered<'_>) -> std::io::Result<()> {
        match self {
            Self::Lines(out) => row.result.map_or(Ok(()), |result| write_line(out, result)),
            Self::Split { clear, suppressed } => {
                let line = |file: &mut Option<NewFile>| {
                    let Some(file) = file else { return Ok(()) };
                    file.write_all(row.written)?;
                    file.write_all(b"\n")
                };
                match row.result {
                    Some(result) if result.suppressed => line(suppressed),
                    Some(_) => line(clear),
                    // A header belongs to both.
                    None => line(clear).and_then(|()| line(suppressed)),
                }
            }
        }
    }

    fn flush(self) -> std::io::Result<()> {
        if let Self::Lines(mut out) = self { out.flush() } else { Ok(()) }
    }
}

/// The address, `suppressed`, `clear` or `invalid`, and what decided it.
fn write_line(out: &mut impl Write, CheckResult { email, suppressed, entry, error }: &CheckResult) -> std::io::Result<()> {
    let email = one_line(email);
    match (entry, error) {
        (Some(entry), _) => writeln!(out, "{email}\tsuppressed\t{}\t{}", entry.email, entry.reason),
        (None, Some(error)) => writeln!(out, "{email}\tinvalid\t{}\t{}", error.code, error.message),
        (None, None) if *suppressed => writeln!(out, "{email}\tsuppressed\t\t"),
        (None, None) => writeln!(out, "{email}\tclear\t\t"),
    }
}
