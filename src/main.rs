//! The program `dnc`.

use std::process::ExitCode;

fn main() -> ExitCode {
    dnc::cli::main()
}
