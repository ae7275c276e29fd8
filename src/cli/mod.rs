//! The command line: one program, and every option is a flag and an environment variable.
//!
//! A command reads its options, calls the rooms below, and prints. Rules about entries, keys and
//! imports live in those rooms and not here.
//!
//! Exit status: 0 done; 1 failed, with one line on standard error that says what to do; 2 wrong
//! usage; 3 from `check`: at least one address is suppressed.

mod addresses;
mod admin;
mod check;
mod client;
#[cfg(feature = "dev")]
mod dev;
mod export;
mod import;
mod input;
mod link;
mod list;
mod logs;
mod manual;
mod new_file;
mod output;
mod progress;
mod remove;
mod selection;
mod serve;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::{config::LogOptions, telemetry};

/// Do-Not-Contact lists as a service: gRPC and HTTP/JSON in front of PostgreSQL
///
/// A Do-Not-Contact list holds the addresses and domains that must never be written to, one list
/// for each workspace. To try it on this machine run `dnc dev`. To run it with a database of yours
/// run `dnc migrate`, then `dnc workspaces create`, `dnc keys create` and `dnc serve`. The commands
/// `import`, `check`, `export` and `remove` call a service that runs.
#[derive(Debug, Parser)]
#[command(name = "dnc", version, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    log: LogOptions,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start everything on this machine, to try it out or to develop against it
    ///
    /// Starts a private PostgreSQL, creates a workspace and its keys on the first run, and serves
    /// HTTP and gRPC. The data is kept between runs. When the service is ready, standard output
    /// gets lines such as DNC_HTTP_URL=… that a shell can read in. Ctrl-C stops everything. Not for
    /// production: use `dnc serve` there.
    #[cfg(feature = "dev")]
    Dev(dev::Options),
    /// Run the service with a database of yours
    ///
    /// Serves HTTP and gRPC. Any number of servers can share one database. SIGTERM or Ctrl-C stops
    /// the server once running calls are finished; a second signal stops it at once.
    Serve(serve::ServeOptions),
    /// Run the HTTP side alone, in front of a gRPC server elsewhere
    ///
    /// For a network where HTTP clients must not reach the database's side. The gateway holds no
    /// data: it translates each request into gRPC calls, with the key of its caller.
    Gateway(serve::GatewayOptions),
    /// Bring the database's schema up to date
    ///
    /// Run it before the first `dnc serve` and after each upgrade. Safe to run again, and while
    /// servers run unless the release notes say otherwise.
    Migrate(admin::Migrate),
    /// Create and list workspaces, each with a list of its own
    #[command(subcommand)]
    Workspaces(admin::Workspaces),
    /// Create and list users, whose keys work in several workspaces
    #[command(subcommand)]
    Users(admin::Users),
    /// Create, list and revoke API keys
    #[command(subcommand)]
    Keys(admin::Keys),
    /// Show who put entries on a list
    #[command(subcommand)]
    Imports(logs::Imports),
    /// Show who took entries off a list
    #[command(subcommand)]
    Deletions(logs::Deletions),
    /// Put files of addresses and domains on the list
    ///
    /// CSV, NDJSON, plain lists, and exports of other providers.
    Import(import::Options),
    /// Ask whether addresses may be written to
    ///
    /// Prints a line for each: suppressed, clear or invalid.
    Check(check::Options),
    /// Show the first entries of the list, or of a part of it
    List(list::List),
    /// Show how many entries there are, by type and reason
    Summary(list::Summary),
    /// Write the list, or a part of it, to standard output
    Export(export::Options),
    /// Take addresses and domains off the list
    Remove(remove::Options),
    /// Print completions for a shell
    ///
    /// Put the output where the shell looks for completions, for example
    /// `dnc completions bash > /etc/bash_completion.d/dnc`.
    Completions(manual::Completions),
    /// Print the manual page, or write the pages of all commands
    ///
    /// Without --dir the main page goes to standard output: `dnc man | man -l -`. With --dir each
    /// command gets a page of its own there: dnc.1, dnc-serve.1 and so on.
    Man(manual::Man),
}

/// Runs the program with the process's own arguments.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match start(cli) {
        Ok(status) => status,
        Err(error) => {
            let text = format!("{error:#}");
            let line = format!("dnc: {}", text.split_whitespace().collect::<Vec<_>>().join(" "));
            telemetry::within_two_seconds(move || eprintln!("{line}"));
            ExitCode::FAILURE
        }
    }
}

fn start(cli: Cli) -> anyhow::Result<ExitCode> {
    // One provider for all of TLS. That it is there already is no error.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let telemetry = runtime.block_on(async { telemetry::init(&cli.log) })?;
    let outcome = runtime.block_on(run(cli.command));
    telemetry.end();
    // Whatever still runs here was given up on purpose.
    runtime.shutdown_background();
    outcome
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    // To a reader that has seen enough, such as `head`, these have done their work.
    let is_for_readers = matches!(
        command,
        Command::Check(_)
            | Command::List(_)
            | Command::Summary(_)
            | Command::Export(_)
            | Command::Imports(_)
            | Command::Deletions(_)
    );
    let outcome = run_to_end(command).await;
    let is_closed = |error: &anyhow::Error| {
        let kind = |cause: &(dyn std::error::Error + 'static)| cause.downcast_ref().map(std::io::Error::kind);
        error.chain().any(|cause| kind(cause) == Some(std::io::ErrorKind::BrokenPipe))
    };
    match outcome {
        Err(error) if is_for_readers && is_closed(&error) => Ok(ExitCode::SUCCESS),
        outcome => outcome,
    }
}

async fn run_to_end(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        #[cfg(feature = "dev")]
        Command::Dev(options) => dev::run(options).await,
        Command::Serve(options) => serve::serve(options).await,
        Command::Gateway(options) => serve::gateway(options).await,
        Command::Migrate(options) => admin::migrate(options).await,
        Command::Workspaces(command) => admin::workspaces(command).await,
        Command::Users(command) => admin::users(command).await,
        Command::Keys(command) => admin::keys(command).await,
        Command::Imports(command) => logs::imports(command).await,
        Command::Deletions(command) => logs::deletions(command).await,
        Command::Import(options) => import::run(options).await,
        Command::Check(options) => return check::run(options).await,
        Command::List(options) => list::list(options).await,
        Command::Summary(options) => list::summary(options).await,
        Command::Export(options) => export::run(options).await,
        Command::Remove(options) => remove::run(options).await,
        Command::Completions(options) => manual::completions(&options, Cli::command()),
        Command::Man(options) => manual::man(&options, Cli::command()),
    }
    .map(|()| ExitCode::SUCCESS)
}
