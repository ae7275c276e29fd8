//! The program, run as a command.

use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use sqlx::{Connection, PgConnection};

use crate::harness::{TestServer, database, http_client, until};

fn dnc(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dnc"));
    command.args(args).env_remove("DATABASE_URL");
    command
}

fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap().trim_end().to_owned()
}

/// A process that is killed when its test ends, also when the test fails.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Dev {
    child: Killed,
    lines: HashMap<String, String>,
}

impl Dev {
    /// Starts `dnc dev` on free ports, and reads the lines that it prints when it is ready. Its
    /// standard error goes to a file beside `dir`.
    fn start(dir: &Path) -> Self {
        let mut child = dnc(&["dev", "--http-addr", "127.0.0.1:0", "--grpc-addr", "127.0.0.1:0", "--data-dir"])
            .arg(dir)
            .stdout(Stdio::piped())
            .stderr(fs::File::create(dir.with_extension("stderr")).unwrap())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().take(6);
        let lines =
            lines.map(|line| line.unwrap().split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned())).unwrap());
        let lines = lines.collect();
        Self { child: Killed(child), lines }
    }

    async fn import(&self, key: &str) -> serde_json::Value {
        let mut request =
            http_client().post(format!("{}/v1/dnc/import", self.lines["DNC_HTTP_URL"])).header("x-api-key", &self.lines[key]);
        if key == "DNC_PLATFORM_KEY" {
            request = request.header("x-workspace-id", &self.lines["DNC_WORKSPACE_ID"]);
        }
        let body = serde_json::json!({"entries": [{"email": "a@example.com"}]});
        request.json(&body).send().await.unwrap().json::<serde_json::Value>().await.unwrap()["data"].take()
    }

    fn signal(&self, name: &str) {
        let pid = self.child.0.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }
}

fn postgres_pid(dir: &Path) -> Option<String> {
    let clusters = [dir.join("postgres/cluster"), dir.join("postgres/elsewhere/cluster")];
    clusters.iter().find_map(|cluster| fs::read_to_string(cluster.join("postmaster.pid")).ok()?.lines().next().map(str::to_owned))
}

fn is_running(pid: &str) -> bool {
    // A zombie, which has ended but was not waited for, has no program.
    fs::read_link(Path::new("/proc").join(pid).join("exe")).is_ok()
}

fn kill_at_once(pid: &str) {
    assert!(Command::new("kill").args(["-9", pid]).status().unwrap().success());
}

/// A directory that the user of the private PostgreSQL can enter.
fn open_dir() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    tempfile::Builder::new().prefix("dnc-dev-").permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap()
}

/// Asserts that a command failed with one line on standard error, and returns that line.
fn failure(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(output.stdout.is_empty(), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

#[tokio::test]
async fn dev_serves_keeps_its_data_and_leaves_no_database_behind() {
    // This works in a directory that the user of the private PostgreSQL cannot enter.
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("data");
    let mut first = Dev::start(&dir);
    let expected = ["DNC_HTTP_URL", "DNC_GRPC_URL", "DNC_WORKSPACE_ID", "DNC_API_KEY", "DNC_PLATFORM_KEY", "DATABASE_URL"];
    assert!(expected.iter().all(|name| first.lines.contains_key(*name)), "{:?}", first.lines.keys());
    assert_eq!(first.import("DNC_API_KEY").await["imported"], 1);
    assert_eq!(first.import("DNC_PLATFORM_KEY").await["skipped"], 1);
    let second = run(dnc(&["dev", "--data-dir"]).arg(&dir));
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("another `dnc dev`"));

    let postgres = postgres_pid(&dir).unwrap();
    assert!(is_running(&postgres));
    first.signal("-KILL");
    first.child.0.wait().unwrap();
    until("PostgreSQL is gone", || async { !is_running(&postgres) }).await;

    let mut again = Dev::start(&dir);
    assert_eq!(again.lines["DNC_API_KEY"], first.lines["DNC_API_KEY"]);
    assert_eq!(again.import("DNC_API_KEY").await["skipped"], 1, "the entry is still stored");
    // A private database that is killed is started again.
    kill_at_once(&postgres_pid(&dir).unwrap());
    until("the database is back", || async { again.import("DNC_API_KEY").await["skipped"] == 1 }).await;
    let postgres = postgres_pid(&dir).unwrap();
    again.signal("-TERM");
    assert!(again.child.0.wait().unwrap().success());
    assert!(!is_running(&postgres), "dev waits for its database to stop");
    if let Ok(elsewhere) = fs::read_link(dir.join("postgres/elsewhere")) {
        fs::remove_dir_all(elsewhere).unwrap();
    }
}

#[tokio::test]
async fn dev_survives_every_kill_of_its_database() {
    let parent = open_dir();
    let dir = parent.path().join("data");
    let mut dev = Dev::start(&dir);
    assert_eq!(dev.import("DNC_API_KEY").await["imported"], 1);
    for _ in 0..3 {
        // A backend that does not notice that its server is gone, and keeps the shared memory.
        let mut busy = PgConnection::connect(&dev.lines["DATABASE_URL"]).await.unwrap();
        let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut busy).await.unwrap();
        let busy = tokio::spawn(async move { sqlx::raw_sql("DO $$ BEGIN LOOP END LOOP; END $$").execute(&mut busy).await.is_ok() });
        let mut other = PgConnection::connect(&dev.lines["DATABASE_URL"]).await.unwrap();
        let is_active = "SELECT state = 'active' FROM pg_stat_activity WHERE pid = $1";
        loop {
            let is_active: bool = sqlx::query_scalar(is_active).bind(pid).fetch_one(&mut other).await.unwrap();
            if is_active {
                break;
            }
        }
        kill_at_once(&postgres_pid(&dir).unwrap());
        until("the database is back", || async { dev.import("DNC_API_KEY").await["skipped"] == 1 }).await;
        assert!(!is_running(&pid.to_string()), "no process of the killed server is left");
        assert!(!busy.await.unwrap());
    }
    // Killed again while it starts.
    for _ in 0..3 {
        let postgres = postgres_pid(&dir).unwrap();
        kill_at_once(&postgres);
        until("another server starts", || async { postgres_pid(&dir).is_some_and(|pid| pid != postgres && is_running(&pid)) })
            .await;
    }
    until("the database is back", || async { dev.import("DNC_API_KEY").await["skipped"] == 1 }).await;

    // Both are killed at once, and an unrelated process gets the server's process id.
    let (postgres, file) = (postgres_pid(&dir).unwrap(), dir.join("postgres/cluster/postmaster.pid"));
    dev.signal("-KILL");
    kill_at_once(&postgres);
    dev.child.0.wait().unwrap();
    let mut unrelated = Killed(Command::new("sleep").arg("600").spawn().unwrap());
    let noted = fs::read_to_string(&file).unwrap();
    fs::write(&file, noted.replacen(&postgres, &unrelated.0.id().to_string(), 1)).unwrap();
    let dev = Dev::start(&dir);
    assert_eq!(dev.import("DNC_API_KEY").await["skipped"], 1);
    assert!(matches!(unrelated.0.try_wait(), Ok(None)), "the unrelated process is left alone");
}

#[tokio::test]
async fn dev_reports_new_keys_for_its_first_workspace() {
    let parent = open_dir();
    let dir = parent.path().join("data");
    let said = || fs::read_to_string(dir.with_extension("stderr")).unwrap();
    let note = dir.join("keys");
    let dev = Dev::start(&dir);
    assert_eq!(dev.import("DNC_API_KEY").await["imported"], 1);
    assert!(!said().contains("a new one"), "{}", said());
    let mut last = dev.lines.clone();
    let revoke = run(dnc(&["keys", "revoke", "key_1"]).env("DATABASE_URL", &last["DATABASE_URL"]));
    assert!(revoke.status.success());
    type Damage = fn(&Path);
    let damages: [(Damage, &str, bool); 4] = [
        (|_| {}, "the key of ws_1", false),
        (|note| fs::write(note, b"\xff\xfe").unwrap(), "the platform key of ws_1", true),
        (|note| fs::write(note, &fs::read(note).unwrap()[..90]).unwrap(), "the platform key of ws_1", true),
        (|note| fs::remove_file(note).unwrap(), "the key of ws_1", true),
    ];
    let mut dev = dev;
    for (damage, expected, is_platform_key_new) in damages {
        dev.signal("-TERM");
        assert!(dev.child.0.wait().unwrap().success());
        damage(&note);
        dev = Dev::start(&dir);
        assert_eq!(dev.lines["DNC_WORKSPACE_ID"], "ws_1");
        assert_eq!(dev.lines["DNC_PLATFORM_KEY"] != last["DNC_PLATFORM_KEY"], is_platform_key_new);
        assert!(said().contains(expected) && said().contains(note.to_str().unwrap()), "{}", said());
        for key in ["DNC_API_KEY", "DNC_PLATFORM_KEY"] {
            assert_eq!(dev.import(key).await["skipped"], 1, "the entry is still stored");
        }
        last = dev.lines.clone();
    }
    for (list, rows) in [("workspaces", 1), ("users", 1)] {
        let listed = stdout(&run(dnc(&[list, "list"]).env("DATABASE_URL", &last["DATABASE_URL"])));
        assert_eq!(listed.lines().count(), rows, "{listed}");
    }
}

#[test]
fn dev_names_the_lock_that_it_cannot_write() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("lock")).unwrap();
    for data_dir in [dir.path(), Path::new("/proc")] {
        let said = failure(&run(dnc(&["dev", "--data-dir"]).arg(data_dir)));
        let lock = data_dir.join("lock");
        assert!(said.contains(lock.to_str().unwrap()) && said.contains("--data-dir"), "{said}");
    }
}

/// A server that answers every request with HTTP/1.1, and its port.
fn http1_server() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = std::io::Write::write_all(&mut stream.unwrap(), b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_says_why_it_cannot_reach_the_server() {
    let plain = TestServer::start().await;
    let dir = tempfile::tempdir().unwrap();
    let (ca, cert_file, key_file) = (dir.path().join("ca.pem"), dir.path().join("cert.pem"), dir.path().join("key.pem"));
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    fs::write(&ca, params.self_signed(&ca_key).unwrap().pem()).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
    let certificate = certificate.signed_by(&key, &rcgen::Issuer::new(params, ca_key)).unwrap();
    fs::write(&cert_file, certificate.pem()).unwrap();
    fs::write(&key_file, key.serialize_pem()).unwrap();
    let (cert_file, key_file) = (cert_file.to_str().unwrap(), key_file.to_str().unwrap());
    let secured = TestServer::start_with(&["--tls-cert", cert_file, "--tls-key", key_file], &database().await).await;
    let port = |url: &str| url.rsplit(':').next().unwrap().to_owned();
    let (plain_port, port, http_port) = (port(&plain.grpc_url), port(&secured.grpc_url), port(&secured.http_url));
    let ca = ca.to_str().unwrap();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();

    let check = |server: &str, ca: Option<&str>| {
        let mut command = dnc(&["check", "a@example.com", "--server", server, "--api-key", &secured.key]);
        run(command.args(ca.map(|ca| format!("--server-ca={ca}"))))
    };
    assert!(check(&format!("https://localhost:{port}"), Some(ca)).status.success());
    let mut no_roots = dnc(&["check", "a@example.com", "--server-ca", ca, "--server"]);
    no_roots.arg(format!("https://localhost:{port}")).env("DNC_API_KEY", &secured.key);
    assert!(run(no_roots.env("SSL_CERT_FILE", "/dev/null").env("SSL_CERT_DIR", dir.path())).status.success());
    for (server, ca, expected) in [
        (format!("https://localhost:{port}"), None, &["not trusted", "--server-ca"][..]),
        (format!("https://127.0.0.1:{port}"), Some(ca), &["is for localhost and not for 127.0.0.1"]),
        (format!("http://127.0.0.1:{port}"), None, &["speaks TLS", "https://"]),
        (format!("https://localhost:{plain_port}"), Some(ca), &["TLS", "use http:// in --server"]),
        (plain.http_url.clone(), None, &["no gRPC server", "50051"]),
        (format!("https://localhost:{http_port}"), Some(ca), &["no gRPC server", "50051"]),
        (format!("http://127.0.0.1:{}", http1_server()), None, &["no gRPC server", "50051"]),
        ("http://127.0.0.1:1".to_owned(), None, &["nothing listens on 127.0.0.1:1", "--server"]),
        (format!("https://{}", silent.local_addr().unwrap()), None, &["does not answer", "--server"]),
        ("http://no-such-host.invalid:50051".to_owned(), None, &["no-such-host.invalid is not known", "--server"]),
        ("127.0.0.1:50051".to_owned(), None, &["http://127.0.0.1:50051"]),
    ] {
        let said = failure(&check(&server, ca));
        assert!(expected.iter().all(|part| said.contains(part)), "{server}: {said}");
    }
    fs::write(dir.path().join("list.txt"), "a@example.com\n").unwrap();
    for args in [&["import", "list.txt"][..], &["export"], &["remove", "a@example.com"]] {
        let mut command = dnc(args);
        let said = failure(&run(command.current_dir(dir.path()).env("DNC_SERVER", &plain.http_url).env("DNC_API_KEY", "sk_x")));
        assert!(said.contains("no gRPC server"), "{args:?}: {said}");
    }

    let upstream = format!("https://localhost:{port}");
    let mut gateway = dnc(&["gateway", "--http-addr", "127.0.0.1:0", "--upstream", &upstream]);
    let mut gateway = Killed(gateway.stderr(Stdio::piped()).spawn().unwrap());
    let mut log = BufReader::new(gateway.0.stderr.take().unwrap()).lines().map(Result::unwrap);
    let warned = log.find(|line| line.contains("the upstream cannot be reached")).unwrap();
    assert!(warned.contains("not trusted") && warned.contains("--upstream-ca"), "{warned}");
}

#[test]
fn an_unusable_database_url_is_refused_with_the_cause() {
    for (url, expected) in [
        ("mysql://x:secret@localhost/x", &["mysql://", "postgres://"][..]),
        ("x:secret@localhost/x", &["not a URL", "postgres://"]),
        ("postgres://x:secret@no-such-host.invalid/x", &["DATABASE_URL", "lookup"]),
    ] {
        for args in [&["serve"][..], &["migrate"], &["keys", "list"]] {
            let said = failure(&run(dnc(args).env("DATABASE_URL", url)));
            assert!(expected.iter().all(|part| said.contains(part)) && !said.contains("secret"), "{said}");
        }
    }
}

#[tokio::test]
async fn operators_create_workspaces_users_and_keys() {
    let url = database().await;
    let admin = |args: &[&str]| run(dnc(args).env("DATABASE_URL", &url));
    let workspace = stdout(&admin(&["workspaces", "create", "Our shop"]));
    assert!(workspace.starts_with("ws_"));
    assert!(stdout(&admin(&["workspaces", "list"])).ends_with("\tOur shop"));
    let user = stdout(&admin(&["users", "create", "someone", "--workspace", &workspace]));
    assert!(user.starts_with("user_"));
    assert!(stdout(&admin(&["users", "list"])).ends_with(&format!("someone\t{workspace}")));
    let key = stdout(&admin(&["keys", "create", "--workspace", &workspace, "--name", "shop", "--expires-in", "90d"]));
    assert!(key.starts_with("sk_") && !key.starts_with("sk_user_"));
    assert!(stdout(&admin(&["keys", "create", "--user", &user])).starts_with("sk_user_"));
    let list = stdout(&admin(&["keys", "list"]));
    let row: Vec<_> = list.lines().next().unwrap().split('\t').collect();
    assert_eq!((row[0], row[1], row[2], row[3], row[6]), ("key_1", workspace.as_str(), "write", "valid", "shop"));
    assert!(!list.contains("sk_"));
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let lost = dnc(&["keys", "create", "--workspace", &workspace]).env("DATABASE_URL", &url).stdout(full).output().unwrap();
    assert_eq!(lost.status.code(), Some(1));
    assert!(stdout(&admin(&["keys", "list"])).contains("key_3\tws_1\twrite\trevoked"), "the key was never shown");
    assert!(admin(&["keys", "revoke", "key_1"]).status.success());
    assert!(stdout(&admin(&["keys", "list"])).contains("key_1\tws_1\twrite\trevoked"));

    for (args, status) in [
        (&["keys", "revoke", "key_99"][..], 1),
        (&["keys", "revoke", "99"], 2),
        (&["keys", "create"], 2),
        (&["keys", "create", "--workspace", "ws_1", "--user", "user_1"], 2),
        (&["keys", "create", "--workspace", "ws_99"], 1),
        (&["keys", "create", "--workspace", "ws_1", "--expires-in", "soon"], 2),
        (&["users", "create", "x", "--workspace", "ws_99"], 1),
        (&["workspaces", "create", "  "], 2),
        (&["nonsense"], 2),
    ] {
        let output = admin(args);
        assert_eq!(output.status.code(), Some(status), "{args:?}");
        assert!(output.stdout.is_empty(), "{args:?}");
        if status == 1 {
            assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1, "{args:?}: one line that says what to do");
        }
    }
}

#[tokio::test]
async fn serve_needs_a_reachable_and_migrated_database() {
    let no_database = run(&mut dnc(&["serve"]));
    assert_eq!(no_database.status.code(), Some(2), "never a silent empty database");
    let nowhere = run(&mut dnc(&["serve", "--database-url", "postgres://x:secret@127.0.0.1:1/x"]));
    assert_eq!(nowhere.status.code(), Some(1));
    let said = String::from_utf8_lossy(&nowhere.stderr);
    assert!(said.contains("DATABASE_URL") && !said.contains("secret"), "{said}");

    let url = database().await;
    let empty = url.replace("dnc_test_", "dnc_test_empty_");
    let name = empty.rsplit('/').next().unwrap().to_owned();
    dnc::postgres::create_database(&url, &name, "template0").await.unwrap();
    let serve = ["serve", "--http-addr", "127.0.0.1:0", "--grpc-addr", "127.0.0.1:0"];
    let pending = run(dnc(&serve).env("DATABASE_URL", &empty));
    assert_eq!(pending.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&pending.stderr).contains("dnc migrate"));
    assert!(run(dnc(&["migrate"]).env("DATABASE_URL", &empty)).status.success());

    let child = dnc(&serve).env("DATABASE_URL", &empty).env("DNC_LOG_FORMAT", "json").stderr(Stdio::piped()).spawn();
    let mut child = Killed(child.unwrap());
    let mut log = BufReader::new(child.0.stderr.take().unwrap()).lines().map(Result::unwrap);
    let line: serde_json::Value = serde_json::from_str(&log.next().unwrap()).unwrap();
    assert_eq!(line["message"], "serving");
    let http_url = line["http"].as_str().unwrap();
    let ready = http_client().get(format!("{http_url}/readyz")).send().await.unwrap();
    assert_eq!(ready.status(), 200);
    let secret = format!("sk_{}", "0".repeat(64));
    for path in [
        format!("/v1/dnc/{secret}"),
        "/v1/dnc/someone@example.com".to_owned(),
        format!("/v1/dnc/check?email=someone@example.com&x={secret}"),
    ] {
        let request = http_client().get(format!("{http_url}{path}")).header("x-api-key", &secret).header("x-request-id", &secret);
        assert!(request.send().await.unwrap().status().is_client_error());
    }
    assert!(Command::new("kill").arg(child.0.id().to_string()).status().unwrap().success());
    assert!(child.0.wait().unwrap().success());
    let log: Vec<String> = log.collect();
    assert!(log.len() >= 6, "{log:?}");
    assert!(!log.iter().any(|line| line.contains("sk_") || line.contains("someone")), "a key or an address in the log: {log:?}");
}

// The service must run while the test waits for the command.
#[tokio::test(flavor = "multi_thread")]
async fn the_client_checks_exports_and_removes() {
    let server = crate::harness::TestServer::start().await;
    server.import(vec![crate::address_book::request(vec![crate::address_book::domain("b.com")])]).await.unwrap();
    let client = |args: &[&str]| run(dnc(args).env("DNC_SERVER", &server.grpc_url).env("DNC_API_KEY", &server.key));
    let checked = client(&["check", "x@mail.b.com", "free@example.com", "bad"]);
    assert_eq!(checked.status.code(), Some(3), "some are suppressed");
    assert_eq!(client(&["check", "free@example.com"]).status.code(), Some(0), "all are clear");
    assert_eq!(client(&["check", "bad"]).status.code(), Some(3), "nothing shows that it may be written to");
    let lines = String::from_utf8(checked.stdout).unwrap();
    let lines: Vec<_> = lines.lines().collect();
    assert_eq!(lines[0], "x@mail.b.com\tsuppressed\tb.com\timport");
    assert_eq!(lines[1], "free@example.com\tclear\t\t");
    assert!(lines[2].starts_with("bad\tinvalid\tINVALID_EMAIL\t"));
    assert!(stdout(&client(&["export"])).starts_with("email,type,reason,unsubscribedAt,createdAt,addedBy\r\nb.com,domain,import,"));
    assert!(stdout(&client(&["export", "--format", "ndjson", "--type", "email"])).is_empty());
    assert_eq!(stdout(&client(&["remove", "--dry-run", "b.com"])), "1");
    assert_eq!(stdout(&client(&["remove", "B.com", "unknown@example.com"])), "1");
    assert_eq!(server.count().await, 0);
    let refused = run(dnc(&["check", "a@b.de"]).env("DNC_SERVER", &server.grpc_url).env("DNC_API_KEY", "sk_nonsense"));
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&refused.stderr), "dnc: The API key is not valid: it is unknown, expired or revoked.\n");
    let nowhere = run(dnc(&["check", "a@b.de"]).env("DNC_SERVER", "http://127.0.0.1:1").env("DNC_API_KEY", "sk_x"));
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("nothing listens on 127.0.0.1:1"));
}

// The service must run while the test waits for the command.
#[tokio::test(flavor = "multi_thread")]
async fn the_client_imports_files_and_writes_the_rejected_rows() {
    let server = crate::harness::TestServer::start().await;
    let dir = tempfile::tempdir().unwrap();
    let dnc =
        |args: &[&str]| run(dnc(args).env("DNC_SERVER", &server.grpc_url).env("DNC_API_KEY", &server.key).current_dir(dir.path()));
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    write(
        "list.csv",
        "email;type;reason\na@example.com;;bounce\nbad;;\n\na@example.com;;\nb.com;domain;manual\nco.uk;domain;\nx@y.de;person;\n",
    );
    write(
        "ses.json",
        r#"{"SuppressedDestinationSummaries":[{"EmailAddress":"c@example.com","Reason":"COMPLAINT","LastUpdateTime":1}]}"#,
    );
    write("members.json", r#"{"items":[{"address":"free@example.com","name":"x","subscribed":true}]}"#);
    let many: String = (0..30_000).map(|n| if n % 2 == 0 { format!("m{n}@example.com\n") } else { format!("m{n}\n") }).collect();
    write("many.txt", &many);

    let shown = stdout(&dnc(&["import", "--dry-run", "list.csv", "ses.json"]));
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines[0], "row\taddress\ttype\treason\tunsubscribed\trejected");
    assert_eq!(lines[1], "list.csv:2\ta@example.com\temail\tbounce\t\t");
    assert!(lines[2].starts_with("list.csv:3\tbad\temail\timport\t\tThe e-mail address has no @"));
    assert_eq!(lines[4], "list.csv:6\tb.com\tdomain\tmanual\t\t");
    assert!(shown.contains("ses.json:1\tc@example.com\temail\tcomplaint\t1970-01-01T00:00:01.000Z\t\n"));
    assert_eq!(server.count().await, 0);

    let output = dnc(&["import", "--rejects", "rejects.csv", "list.csv", "ses.json", "many.txt"]);
    let table = stdout(&output);
    let total = table.split("in all").nth(1).unwrap();
    let rows: HashMap<&str, &str> = total
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?, words.next()?))
        })
        .collect();
    let expected = [
        ("imported", "15,003"),
        ("skipped", "1"),
        ("failed", "15,003"),
        ("INVALID_EMAIL", "15,001"),
        ("PUBLIC_SUFFIX", "1"),
        ("INVALID_TYPE", "1"),
    ];
    assert_eq!(rows, HashMap::from(expected), "{table}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("read as: Amazon SES suppression list"));
    assert_eq!(server.count().await, 15_003);
    // More rejected rows than one answer describes, each with its line and cause.
    let rejects = fs::read_to_string(dir.path().join("rejects.csv")).unwrap();
    assert_eq!(rejects.lines().count(), 1 + 15_003);
    assert!(rejects.starts_with(
        "email,type,reason,unsubscribedAt,file,line,code,cause\nbad,email,import,,list.csv,3,INVALID_EMAIL,The e-mail address has no @"
    ));
    assert!(rejects.contains("x@y.de,person,import,,list.csv,8,INVALID_TYPE,"));
    assert!(rejects.ends_with('\n') && rejects.contains("\nm29999,email,import,,many.txt,30000,INVALID_EMAIL,"));
    // The corrected file of rejects can be imported.
    write("mended.csv", &rejects.replace("\nm", "\nm@m").replace(",email,import,,many", ".example.org,email,import,,many"));
    assert!(stdout(&dnc(&["import", "mended.csv"])).contains("15,000"));
    let runs: i64 = sqlx::query_scalar("SELECT count(*) FROM imports").fetch_one(&mut server.connection().await).await.unwrap();
    assert_eq!(runs, 4, "one import for each file");

    write("ask.txt", "A@example.com\nx@sub.b.com\nfree@example.org\n");
    let asked = dnc(&["check", "--file", "ask.txt", "c@example.com"]);
    assert_eq!(asked.status.code(), Some(3));
    let asked = String::from_utf8(asked.stdout).unwrap();
    let verdicts: Vec<_> = asked.lines().map(|line| line.split('\t').nth(1).unwrap()).collect();
    assert_eq!(verdicts, ["suppressed", "suppressed", "suppressed", "clear"], "the named addresses come first");
    assert_eq!(stdout(&dnc(&["remove", "--file", "many.txt", "--file", "ask.txt"])), "15001");

    for (args, expected) in [
        (&["import", "nowhere.csv"][..], "cannot read nowhere.csv"),
        (&["import", "--rejects", "list.csv", "list.csv"], "write over"),
        (&["import", "--reason", "x\ty", "list.csv"], "reason"),
        (&["import", "--column", "Mail", "list.csv"], "--column"),
        (&["import", "."], "is a directory"),
        (
            &["import", "members.json"],
            "members.json is Mailgun's mailing list, whose members may be written to; nothing of it was imported",
        ),
    ] {
        let refused = dnc(args);
        assert_eq!(refused.status.code(), Some(1), "{args:?}");
        assert!(
            String::from_utf8_lossy(&refused.stderr).contains(expected),
            "{args:?}: {}",
            String::from_utf8_lossy(&refused.stderr)
        );
    }
    assert_eq!(fs::read_to_string(dir.path().join("list.csv")).unwrap().lines().count(), 8, "no file was overwritten");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_import_says_how_to_continue() {
    let server = crate::harness::TestServer::start().await;
    let mut command = dnc(&["import"]);
    command.env("DNC_SERVER", &server.grpc_url).env("DNC_API_KEY", &server.key);
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut child = Killed(child);
    let mut pipe = child.0.stdin.take().unwrap();
    let lines: String = (0..50_000).map(|n| format!("m{n}@example.com\n")).collect();
    std::io::Write::write_all(&mut pipe, lines.as_bytes()).unwrap();
    until("some of it is stored", || async { server.count().await >= 20_000 }).await;
    // The pipe stays open, as if more were to come.
    assert!(Command::new("kill").args(["-INT", &child.0.id().to_string()]).status().unwrap().success());
    assert_eq!(child.0.wait().unwrap().code(), Some(1));
    let said = std::io::read_to_string(child.0.stderr.take().unwrap()).unwrap();
    let stored = server.count().await;
    assert!(said.contains(&format!("--skip-lines {stored} for standard input")), "{said}");
    drop(pipe);

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("list.txt");
    fs::write(&file, &lines).unwrap();
    let skipped = stored.to_string();
    let mut rest = dnc(&["import", "--skip-lines", &skipped, file.to_str().unwrap()]);
    let rest = run(rest.env("DNC_SERVER", &server.grpc_url).env("DNC_API_KEY", &server.key));
    let table = stdout(&rest);
    let imported: i64 = table.lines().next().unwrap().replace("imported", "").replace(',', "").trim().parse().unwrap();
    assert_eq!((imported, server.count().await), (50_000 - stored, 50_000), "{table}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_whose_key_is_revoked_says_what_is_stored() {
    let server = crate::harness::TestServer::start().await;
    let mut command = dnc(&["import", "-"]);
    command.env("DNC_SERVER", &server.grpc_url).env("DNC_API_KEY", &server.key);
    let mut child = Killed(command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    let mut pipe = child.0.stdin.take().unwrap();
    let lines: String = (0..50_000).map(|n| format!("m{n}@example.com\n")).collect();
    std::io::Write::write_all(&mut pipe, lines.as_bytes()).unwrap();
    until("some of it is stored", || async { server.count().await >= 20_000 }).await;
    server.store.revoke_key("key_1".parse().unwrap()).await.unwrap();
    let client = server.client().await;
    let refused = async || {
        let call = crate::harness::with_key(dnc::proto::SummarizeEntriesRequest {}, &server.key);
        client.clone().summarize_entries(call).await.is_err_and(|status| status.code() == tonic::Code::Unauthenticated)
    };
    until("the key is refused", refused).await;
    let _ = std::io::Write::write_all(&mut pipe, lines.as_bytes());
    drop(pipe);
    assert_eq!(child.0.wait().unwrap().code(), Some(1));
    let said = std::io::read_to_string(child.0.stderr.take().unwrap()).unwrap();
    assert!(said.contains("revoked") && said.contains("import it again, what is stored is skipped"), "{said}");
}
