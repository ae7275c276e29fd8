//! Completions and manual pages, which packages install.

use std::{
    fs,
    process::{Command, Output},
};

fn dnc(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dnc")).args(args).output().unwrap()
}

fn text(output: &Output) -> &str {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::str::from_utf8(&output.stdout).unwrap()
}

#[test]
fn bash_completes_commands_options_and_values() {
    let script = dnc(&["completions", "bash"]);
    // What bash would offer for the last word of a command line.
    let offers = |words: &[&str]| {
        let ask = format!(
            "{}\nCOMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); _dnc dnc \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD-1]}}\"; \
             printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            text(&script)
        );
        let output = Command::new("bash").args(["-c", &ask, "bash", "dnc"]).args(words).output().unwrap();
        text(&output).lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(offers(&["ser"]), ["serve"]);
    assert_eq!(offers(&["keys", "rev"]), ["revoke"]);
    assert_eq!(offers(&["serve", "--grpc"]), ["--grpc-addr"]);
    assert_eq!(offers(&["serve", "--log-format", "j"]), ["json"]);
}

#[test]
fn other_shells_get_completions_too() {
    for shell in ["elvish", "fish", "powershell", "zsh"] {
        assert!(text(&dnc(&["completions", shell])).contains("database-url"), "{shell}");
    }
    let unknown = dnc(&["completions", "tcl"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("bash"), "the shells there are should be named");
}

#[test]
fn each_command_has_a_page_of_its_own() {
    let main_page = dnc(&["man"]);
    let dir = tempfile::tempdir().unwrap();
    let pages = dir.path().join("share/man1");
    assert_eq!(text(&dnc(&["man", "--dir", pages.to_str().unwrap()])), "");
    let page = |name: &str| fs::read_to_string(pages.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(page("dnc.1"), text(&main_page));
    let serve = page("dnc-serve.1");
    assert!(serve.contains("\\-\\-database\\-url") && serve.contains("DATABASE_URL"), "{serve}");
    page("dnc-keys-create.1");
    // Everything that the help names has a page.
    let help = dnc(&["help"]);
    let commands = text(&help).lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // A description that goes on in the next line is indented further.
    let names = commands.filter_map(|line| line.strip_prefix("  ").filter(|line| !line.starts_with(' ')));
    let names: Vec<_> = names.filter_map(|line| line.split(' ').next()).filter(|name| *name != "help").collect();
    assert!(names.len() > 10, "{names:?}");
    for name in names {
        page(&format!("dnc-{name}.1"));
    }
}

#[test]
fn a_directory_that_cannot_be_written_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let dir = file.path().join("man");
    let output = dnc(&["man", "--dir", dir.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(dir.to_str().unwrap()) && said.lines().count() == 1, "{said}");
}
