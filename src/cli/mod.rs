//! The command line: one binary, every option a flag and an environment variable. Puts rooms together and prints; decides nothing else.
//!
//! Exit status: 0 done; 1 failed, with one line on standard error that says what to do; 2 wrong usage; 3 from `check`: at least one is
//! suppressed.

mod addresses;
mod admin;
mod check;
mod client;
mod dev;
mod export;
mod import;
mod input;
mod link;
mod list;
mod logs;
mod new_file;
mod output;
mod progress;
mod remove;
mod selection;
mod serve;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::{
    config::{DatabaseUrl, LogOptions},
    telemetry,
};

/// Do-Not-Contact lists as a service: gRPC and HTTP/JSON in front of PostgreSQL
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
    /// Everything on this machine with no set-up: a private PostgreSQL, a first workspace with its keys, and the service
    Dev(dev::Options),
    /// The service, with a database of yours
    Serve(serve::ServeOptions),
    /// The HTTP side alone, in front of a gRPC server elsewhere
    Gateway(serve::GatewayOptions),
    /// Bring the database's schema up to date
    Migrate(DatabaseUrl),
    /// Make and list workspaces
    #[command(subcommand)]
    Workspaces(admin::Workspaces),
    /// Make and list users
    #[command(subcommand)]
    Users(admin::Users),
    /// Make, list and revoke API keys
    #[command(subcommand)]
    Keys(admin::Keys),
    /// Show who put entries on a list
    #[command(subcommand)]
    Imports(logs::Imports),
    /// Show who took entries off a list
    #[command(subcommand)]
    Deletions(logs::Deletions),
    /// Put files of addresses and domains on the list: CSV, NDJSON, plain lists, exports of other providers
    Import(import::Options),
    /// Ask whether addresses may be written to: a line each with suppressed, clear or invalid
    Check(check::Options),
    /// Show the first entries of the list, or of a part of it
    List(list::List),
    /// Show how many entries there are, by type and reason
    Summary(list::Summary),
    /// Write the list, or a part of it, to standard output
    Export(export::Options),
    /// Take addresses and domains off the list
    Remove(remove::Options),
}

/// Runs the program with the process's own arguments.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = telemetry::init(&cli.log).and_then(|()| {
        // One provider for all of TLS; installing it twice is no error worth a word.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let outcome = runtime.block_on(run(cli.command));
        // What still runs was cut off on purpose.
        runtime.shutdown_background();
        outcome
    });
    match outcome {
        Ok(status) => status,
        Err(error) => {
            let text = format!("{error:#}");
            eprintln!("dnc: {}", text.split_whitespace().collect::<Vec<_>>().join(" "));
            ExitCode::FAILURE
        }
    }
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
        Command::Dev(options) => dev::run(options).await,
        Command::Serve(options) => serve::serve(options).await,
        Command::Gateway(options) => serve::gateway(options).await,
        Command::Migrate(database) => admin::migrate(&database).await,
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
    }
    .map(|()| ExitCode::SUCCESS)
}
