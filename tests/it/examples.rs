//! The examples work as they stand. Those that need more than a language are run by `.ci/outside`.

use std::{io::Write, path::Path, process::Command};

use crate::harness::TestServer;

#[tokio::test(flavor = "multi_thread")]
async fn the_examples_over_http_import_in_each_language() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/http");
    let languages: [(&str, &[&str], &str); 5] = [
        ("sh", &[], "import.sh"),
        ("python3", &[], "import.py"),
        ("node", &[], "import.mjs"),
        ("go", &["run"], "import.go"),
        ("ruby", &[], "import.rb"),
    ];
    for (program, args, file) in languages {
        let server = TestServer::start().await;
        let mut command = Command::new(program);
        command.args(args).arg(dir.join(file)).env("DNC_HTTP_URL", &server.http_url).env("DNC_API_KEY", &server.key);
        let Ok(output) = command.output() else {
            // Not by a macro: what those print in a test that passes is not shown.
            let _ = writeln!(std::io::stderr(), "SKIPPED: {file}: {program} is not installed");
            continue;
        };
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{file}: {said}");
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&answer["data"]["imported"], &answer["data"]["skipped"]), (&3.into(), &0.into()), "{file}");
        let entries = server.rows(server.workspace).await;
        let stored: Vec<_> = entries.iter().map(|(address, reason, _)| (address.as_str(), reason.as_str())).collect();
        assert_eq!(stored, [("badcompany.com", "manual"), ("bounce1@example.com", "bounce"), ("bounce2@example.com", "bounce")]);
        let mut command = Command::new(program);
        command.args(args).arg(dir.join(file)).env("DNC_HTTP_URL", &server.http_url).env("DNC_API_KEY", "sk_nonsense");
        assert!(!command.output().unwrap().status.success(), "{file} says that it failed");
    }
}
