//! `dnc completions` and `dnc man`: the files that a package installs beside the program.
//!
//! Both are made from the definition of the command line, so they always say what `--help` says.
//! They are made when they are asked for and not by the build script, which would have to compile
//! the command line a second time.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::Context;
use clap::{Args, Command, builder::ValueHint};
use clap_complete::Shell;

#[derive(Args, Debug)]
pub(super) struct Completions {
    /// The shell to print completions for
    shell: Shell,
}

#[derive(Args, Debug)]
pub(super) struct Man {
    /// Write the pages of all commands into this directory; it is created if it does not exist
    #[arg(long, env = "DNC_MAN_DIR", value_name = "DIR", value_hint = ValueHint::DirPath)]
    dir: Option<PathBuf>,
}

/// Prints the completions of `program` for a shell.
pub(super) fn completions(options: &Completions, mut program: Command) -> anyhow::Result<()> {
    // Into memory first: the generator panics when its output cannot be written.
    let mut script = Vec::new();
    let name = program.get_name().to_owned();
    clap_complete::generate(options.shell, &mut program, name, &mut script);
    print(&script)
}

/// Prints the main page of `program`, or writes the pages of all its commands.
pub(super) fn man(options: &Man, program: Command) -> anyhow::Result<()> {
    match &options.dir {
        Some(dir) => write_pages(dir, program).with_context(|| format!("cannot write the pages to {}", dir.display())),
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(program.disable_help_subcommand(true)).render(&mut page)?;
            print(&page)
        }
    }
}

fn write_pages(dir: &Path, program: Command) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    clap_mangen::generate_to(program, dir)
}

fn print(text: &[u8]) -> anyhow::Result<()> {
    io::stdout().write_all(text).context("cannot write to standard output")
}
