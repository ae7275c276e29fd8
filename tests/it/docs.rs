//! The commands in the documentation work as they stand, and answer what is written under them.
//!
//! A block that starts with `` ```sh run `` is run. The blocks of a file run one after the other in
//! one shell, as somebody types them who reads the page from top to bottom: in an empty directory,
//! with a service running, and with the lines of `dnc dev` read in. Words after `run` are programs
//! that the block needs and a machine may lack, such as `grpcurl`: without them it is skipped, and
//! said so. `status=3` is the exit status of a block that does not end with 0.
//!
//! A block `` ```json answer `` or `` ```text answer `` after it is what the commands print. `…` in
//! it stands for any text: ids, times and keys are different each time.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::harness::TestServer;

/// A block of commands, and what they print.
#[derive(Debug)]
struct Block {
    /// The number of its first line.
    line: usize,
    commands: String,
    programs: Vec<String>,
    status: i32,
    answer: Option<Answer>,
}

#[derive(Debug)]
struct Answer {
    is_json: bool,
    text: String,
}

fn blocks(page: &str) -> Vec<Block> {
    let mut found: Vec<Block> = Vec::new();
    let mut lines = page.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let Some(info) = line.strip_prefix("```") else { continue };
        let body: Vec<_> = lines.by_ref().map(|(_, line)| line).take_while(|line| *line != "```").collect();
        let text = body.join("\n");
        match info.split(' ').collect::<Vec<_>>()[..] {
            ["sh", "run", ref words @ ..] => {
                let (statuses, programs): (Vec<&str>, Vec<&str>) = words.iter().partition(|word| word.starts_with("status="));
                found.push(Block {
                    line: number + 1,
                    commands: text,
                    programs: programs.into_iter().map(ToString::to_string).collect(),
                    status: statuses.first().map_or(0, |word| word["status=".len()..].parse().unwrap()),
                    answer: None,
                });
            }
            [language @ ("json" | "text"), "answer"] => {
                let block = found.last_mut().expect("an answer stands under its commands");
                assert!(block.answer.is_none(), "line {}: a second answer", number + 1);
                block.answer = Some(Answer { is_json: language == "json", text });
            }
            _ => {}
        }
    }
    found
}

/// True if `text` is `pattern`, in which `…` stands for any text.
fn fits(pattern: &str, text: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('…') else { return pattern == text };
    let Some(text) = text.strip_prefix(first) else { return false };
    text.char_indices().map(|(at, _)| &text[at..]).chain([""]).any(|tail| fits(rest, tail))
}

fn fits_json(pattern: &Value, value: &Value) -> bool {
    match (pattern, value) {
        (Value::String(pattern), Value::String(value)) => fits(pattern, value),
        (Value::Array(patterns), Value::Array(values)) => {
            patterns.len() == values.len() && patterns.iter().zip(values).all(|(pattern, value)| fits_json(pattern, value))
        }
        (Value::Object(patterns), Value::Object(values)) => {
            patterns.len() == values.len()
                && patterns.iter().all(|(name, pattern)| values.get(name).is_some_and(|value| fits_json(pattern, value)))
        }
        _ => pattern == value,
    }
}

impl Answer {
    fn fits(&self, printed: &str) -> bool {
        if self.is_json {
            let pattern: Value = serde_json::from_str(&self.text).expect("the answer on the page is JSON");
            serde_json::from_str(printed).is_ok_and(|value| fits_json(&pattern, &value))
        } else {
            fits(self.text.trim_end(), &printed.trim_end().replace("\r\n", "\n"))
        }
    }
}

fn is_installed(program: &str) -> bool {
    let found = Command::new("sh").args(["-c", r#"command -v "$0""#, program]).stdout(Stdio::null()).status();
    found.is_ok_and(|status| status.success())
}

/// Printed also when the test passes, which libtest would otherwise keep to itself.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Runs all commands of a page.
async fn check(page: &Path) {
    const MARK: char = '\u{1e}';
    let name = page.file_name().unwrap().to_string_lossy().into_owned();
    let mut blocks = blocks(&fs::read_to_string(page).unwrap());
    blocks.retain(|block| {
        let missing = block.programs.iter().find(|program| !is_installed(program));
        if let Some(program) = missing {
            say(&format!("SKIPPED: {name} line {}: {program} is not installed", block.line));
        }
        missing.is_none()
    });
    if blocks.is_empty() {
        return;
    }
    let server = TestServer::start().await;
    let mut script = format!(
        "set -eu -o pipefail\nDNC_HTTP_URL={}\nDNC_GRPC_URL={}\nDNC_WORKSPACE_ID={}\nDNC_API_KEY={}\nDNC_PLATFORM_KEY={}\nDATABASE_URL={}\n",
        server.http_url, server.grpc_url, server.workspace, server.key, server.platform_key, server.database_url
    );
    for block in &blocks {
        match block.status {
            0 => script.push_str(&block.commands),
            status => script.push_str(&format!(
                "set +e\n{}\nstatus=$?; set -e; [ $status = {status} ] || {{ echo \"exit status $status\" >&2; exit 1; }}",
                block.commands
            )),
        }
        script.push_str(&format!("\nprintf '{MARK}'\n"));
    }
    let dir = tempfile::tempdir().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), script).unwrap();
    let programs = Path::new(env!("CARGO_BIN_EXE_dnc")).parent().unwrap();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    let mut command = Command::new("bash");
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("DNC_") || name == "DATABASE_URL" {
            command.env_remove(name);
        }
    }
    command.arg(file.path()).current_dir(dir.path()).env("PATH", path).stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let (printed, said) =
        (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned());
    let printed: Vec<_> = printed.split(MARK).collect();
    for (number, block) in blocks.iter().enumerate() {
        let place = format!("{name} line {}", block.line);
        assert!(number + 1 < printed.len(), "{place} fails: {}\n{}\n{said}", block.commands, printed[number]);
        if let Some(answer) = &block.answer {
            assert!(answer.fits(printed[number]), "{place} answers\n{}\nand not\n{}", printed[number], answer.text);
        }
    }
    assert!(output.status.success(), "{name}: {said}");
}

#[tokio::test]
async fn commands_in_the_documentation_do_what_it_says() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let mut pages: Vec<PathBuf> = docs.filter(|path| path.extension().is_some_and(|extension| extension == "md")).collect();
    pages.extend([root.join("README.md"), root.join("CONTRIBUTING.md")]);
    let run: usize = pages.iter().map(|page| blocks(&fs::read_to_string(page).unwrap()).len()).sum();
    assert!(run > 10, "only {run} blocks are marked");
    futures_util::future::join_all(pages.iter().map(|page| check(page))).await;
}

/// Links between pages, and to files, lead somewhere.
#[test]
fn links_in_the_documentation_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let tops = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(|name| root.join(name));
    for page in docs.chain(tops).filter(|path| path.extension().is_some_and(|extension| extension == "md")) {
        let text = fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).filter_map(|after| after.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { page.clone() } else { page.parent().unwrap().join(path) };
            assert!(target.exists(), "{}: {link} leads nowhere", page.display());
            if !heading.is_empty() {
                let headings = fs::read_to_string(&target).unwrap();
                let has_it = headings.lines().filter(|line| line.starts_with('#')).any(|line| anchor(line) == heading);
                assert!(has_it, "{}: {link} names no heading", page.display());
            }
        }
    }
}

/// The anchor that a forge makes of a heading.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    text.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_')).map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn answers_are_compared_with_gaps() {
    assert!(fits("a…c", "abbbc") && fits("…", "") && fits("a…", "a") && !fits("a…c", "ab") && !fits("a", "ab"));
    let json = |text: &str| Answer { is_json: true, text: text.to_owned() };
    assert!(json(r#"{"a": "…", "b": [1]}"#).fits(r#"{"b":[1],"a":"x"}"#));
    assert!(!json(r#"{"a": "…"}"#).fits(r#"{"a":"x","b":1}"#));
    let page = "```sh run status=3 grpcurl\nfalse\n```\ntext\n```json answer\n1\n```\n```sh\nnot this\n```\n";
    let found = blocks(page);
    assert_eq!(found.len(), 1);
    assert!(found[0].status == 3 && found[0].programs == ["grpcurl"] && found[0].answer.as_ref().unwrap().text == "1");
}
