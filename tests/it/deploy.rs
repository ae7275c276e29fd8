//! The files in `deploy/`: they name only what the program has.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

/// What `deploy/` has for those who run the service.
const FILES: [&str; 4] = ["Dockerfile", "compose.yaml", "systemd/dnc.service", "debian/dnc.env"];

#[test]
fn every_variable_of_the_deployed_files_is_one_of_the_programs() {
    let help = Command::new(env!("CARGO_BIN_EXE_dnc")).args(["serve", "--help"]).output().unwrap().stdout;
    let help = String::from_utf8(help).unwrap();
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy");
    for file in FILES {
        let text = fs::read_to_string(deploy.join(file)).unwrap();
        let words = text.split(|c: char| !(c.is_ascii_uppercase() || c == '_'));
        let named: BTreeSet<_> = words.filter(|word| word.starts_with("DNC_") || *word == "DATABASE_URL").collect();
        assert!(!named.is_empty(), "{file}");
        for name in named {
            assert!(help.contains(&format!("[env: {name}")), "{file} sets {name}, which is no option of `dnc serve`");
        }
    }
}
