//! The commands for operators, and the tables that they print: `dnc list`, `summary`, `imports`,
//! `deletions`, `keys` and `users`. The latest imports and deletions over HTTP.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use dnc::{
    domain::{Error, KeyOwner, Scope, WorkspaceId},
    proto::{DeleteEntriesRequest, Entry, EntryFilter},
};
use serde_json::{Value, json};

use crate::{
    address_book::{domain, email, numbered, request},
    harness::{PASS_FOR_CITUS, TestServer, database, http_client, options, with_key},
};

/// Runs a command that must succeed, and returns its standard output and standard error.
fn dnc(server: &TestServer, args: &[&str]) -> (String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dnc"));
    command.args(args).env("DATABASE_URL", &server.database_url).env("DNC_SERVER", &server.grpc_url);
    let output = command.env("DNC_API_KEY", &server.key).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    (String::from_utf8(output.stdout).unwrap(), said)
}

fn json(server: &TestServer, args: &[&str]) -> Vec<Value> {
    let (printed, _) = dnc(server, &[args, &["--json"]].concat());
    serde_json::from_str(&printed).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_logs_show_who_stored_and_who_deleted_entries() {
    let server = TestServer::start().await;
    server.import(vec![request(numbered(0..5).collect())]).await.unwrap();
    server.import(vec![request(numbered(3..6).chain([email("nonsense")]).collect())]).await.unwrap();
    let mut client = server.client().await;
    let named = DeleteEntriesRequest { emails: vec!["user0000001@example1.com".into(), "x.com".into()], ..Default::default() };
    client.delete_entries(with_key(named, &server.key)).await.unwrap();
    let filter = Some(EntryFilter { r#type: 1, search: "user".into(), ..EntryFilter::default() });
    client.delete_entries(with_key(DeleteEntriesRequest { all: true, filter, ..Default::default() }, &server.key)).await.unwrap();

    let workspace = server.workspace.to_string();
    let imports = json(&server, &["imports", "list", "--workspace", &workspace]);
    let counts: Vec<_> =
        imports.iter().map(|row| ["imported", "skipped", "failed"].map(|name| row[name].as_u64().unwrap())).collect();
    assert_eq!(counts, [[1, 2, 1], [5, 0, 0]], "the latest first");
    for row in &imports {
        assert_eq!((row["workspace"].as_str().unwrap(), row["key"].as_str().unwrap()), (workspace.as_str(), "key_1"));
        assert!(row["finished_at"].is_string() && row["id"].as_str().unwrap().len() == 36);
    }
    let deletions = json(&server, &["deletions", "list"]);
    let asked: Vec<_> =
        deletions.iter().map(|row| (row["deleted"].as_i64().unwrap(), row["asked_for"].as_str().unwrap())).collect();
    assert_eq!(asked, [(5, "type=email search=user"), (1, "2 named")]);
    assert_eq!(json(&server, &["imports", "list", "--limit", "1"]).len(), 1);
    assert!(json(&server, &["imports", "list", "--workspace", &server.other_workspace.to_string()]).is_empty());

    let (lines, _) = dnc(&server, &["imports", "list"]);
    let cells: Vec<_> = lines.lines().next().unwrap().split('\t').collect();
    assert_eq!(cells[1..6], [workspace.as_str(), "key_1", "1", "2", "1"]);
    let keys = json(&server, &["keys", "list"]);
    assert_eq!(
        (keys[0]["id"].as_str(), keys[0]["state"].as_str(), &keys[0]["expires_at"]),
        (Some("key_1"), Some("valid"), &Value::Null)
    );
    let users = json(&server, &["users", "list"]);
    assert!(users[0]["workspaces"].as_array().unwrap().iter().any(|id| *id == workspace.as_str()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_is_shown_page_by_page_and_summarized() {
    let server = TestServer::start().await;
    let bounced = numbered(0..1_500).map(|entry| Entry { reason: "bounce".into(), ..entry });
    server.import(vec![request(bounced.chain([domain("blocked.com")]).collect())]).await.unwrap();
    let (lines, said) = dnc(&server, &["list", "--limit", "1200"]);
    assert_eq!(lines.lines().count(), 1_200);
    assert!(said.contains("1200 of 1501 entries"), "{said}");
    let all = json(&server, &["list", "--limit", "2000"]);
    assert_eq!(all.len(), 1_501);
    assert_eq!(
        (&all[0]["email"], &all[0]["type"], &all[0]["added_by"]),
        (&"blocked.com".into(), &"domain".into(), &"key_1".into())
    );
    let (filtered, said) = dnc(&server, &["list", "--type", "domain", "--reason", "import", "--search", "LOCK"]);
    assert!(filtered.starts_with("blocked.com\tdomain\timport\t"), "{filtered}");
    assert_eq!(said, "");
    let later = json(&server, &["list", "--created-from", "2999-01-01T00:00:00Z"]);
    assert!(later.is_empty());
    let (lines, said) = dnc(&server, &["summary"]);
    assert_eq!(lines, "email\tbounce\t1500\ndomain\timport\t1\n");
    assert!(said.contains("1501 entries in all"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_selection_is_removed_only_when_confirmed() {
    let server = TestServer::start().await;
    let bounced = numbered(0..30).map(|entry| Entry { reason: "bounce".into(), ..entry });
    server.import(vec![request(bounced.chain([email("a@example.com"), domain("b.com")]).collect())]).await.unwrap();
    let remove = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dnc"));
        command.arg("remove").args(args).env("DNC_SERVER", &server.grpc_url).env("DNC_API_KEY", &server.key);
        command.stdin(Stdio::null()).output().unwrap()
    };
    let unconfirmed = remove(&["--reason", "bounce"]);
    assert_eq!(unconfirmed.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&unconfirmed.stderr).contains("--yes"));
    for wrong in [&[][..], &["a@example.com", "--reason", "bounce"], &["--all", "a@example.com"], &["--yes"]] {
        assert_eq!(remove(wrong).status.code(), Some(2), "{wrong:?}");
    }
    assert_eq!(server.count().await, 32);
    for (args, removed) in [
        (&["--reason", "bounce", "--dry-run"][..], "30\n"),
        (&["--reason", "bounce", "--search", "user0000001", "--yes"], "1\n"),
        (&["--type", "domain", "-y"], "1\n"),
        (&["--created-to", "2000-01-01T00:00:00Z", "--yes"], "0\n"),
        (&["--all", "--yes"], "30\n"),
    ] {
        let output = remove(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(String::from_utf8_lossy(&output.stdout), removed, "{args:?}");
    }
    assert_eq!(server.count().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_standard_output_is_no_failure() {
    let server = TestServer::start().await;
    server.import(vec![request(numbered(0..20_000).collect())]).await.unwrap();
    for args in [&["export"][..], &["list", "--limit", "20000"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dnc"));
        command.args(args).env("DNC_SERVER", &server.grpc_url).env("DNC_API_KEY", &server.key);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(!line.is_empty());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_is_retried_when_the_server_asks_for_it() {
    let server = TestServer::start_with(&["--requests-per-sec-max", "1"], &database().await).await;
    let said: String = (0..2).map(|_| dnc(&server, &["summary"]).1).collect();
    assert!(said.contains("Trying again in 1 s."), "{said}");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("list.txt");
    std::fs::write(&file, "a@example.com\n").unwrap();
    let file = file.to_str().unwrap();
    let both: Vec<_> = (0..2).map(|_| dnc(&server, &["import", file])).collect();
    assert!(both.iter().any(|(_, said)| said.contains("Trying again in 1 s.")), "{both:?}");
    assert_eq!(server.count().await, 1);
}

#[tokio::test]
async fn an_owner_that_does_not_exist_is_told_from_a_database_that_is_slow() {
    let server = TestServer::start().await;
    let (owner, nobody) = (KeyOwner::Workspace(server.workspace), KeyOwner::Workspace(WorkspaceId(i64::MAX)));
    let missing = server.store.issue_key(nobody, Scope::Write, "", None).await;
    assert!(matches!(missing, Err(Error::NotFound(_))), "{missing:?}");
    let missing = server.store.create_user("someone", &[WorkspaceId(i64::MAX)]).await;
    assert!(matches!(missing, Err(Error::NotFound(_))), "{missing:?}");

    let mut connection = server.connection().await;
    let impatient = "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET lock_timeout = 100', current_database()); END $$";
    sqlx::raw_sql(impatient).execute(&mut connection).await.unwrap();
    let store = dnc::server::store(&server.database_url, &options(&[]).database).unwrap();
    sqlx::raw_sql("BEGIN; LOCK TABLE api_keys, memberships").execute(&mut connection).await.unwrap();
    let slow = store.issue_key(owner, Scope::Write, "", None).await;
    assert!(matches!(slow, Err(Error::Timeout { .. })), "{slow:?}");
    let slow = store.create_user("someone", &[server.workspace]).await;
    assert!(matches!(slow, Err(Error::Timeout { .. })), "{slow:?}");
}

#[tokio::test]
async fn callers_see_the_latest_imports_and_deletions_of_their_workspace() {
    let server = TestServer::start().await;
    let owner = KeyOwner::Workspace(server.workspace);
    let (id, reader) = server.store.issue_key(owner, Scope::Read, "", None).await.unwrap();
    let get = async |path: &str, key: &str| {
        let answer = http_client().get(format!("{}/v1/dnc/{path}", server.http_url)).header("x-api-key", key).send().await.unwrap();
        (answer.status().as_u16(), answer.json::<Value>().await.unwrap())
    };
    let delete = async |body: Value| {
        let call = http_client().delete(format!("{}/v1/dnc", server.http_url)).header("x-api-key", &server.key).json(&body);
        assert_eq!(call.send().await.unwrap().status(), 200);
    };
    for log in ["imports", "deletions"] {
        assert_eq!(get(log, reader.reveal()).await, (200, json!({"success": true, "data": []})));
    }
    server.import(vec![request(numbered(0..20).collect())]).await.unwrap();
    server.import(vec![request(numbered(0..1).chain([email("a@b.de"), email("nobody")]).collect())]).await.unwrap();
    server.post(r#"{"entries": [{"email": "nobody"}]}"#).await;
    let (_, imports) = get("imports", reader.reveal()).await;
    let counts: Vec<_> =
        imports["data"].as_array().unwrap().iter().map(|row| [&row["imported"], &row["skipped"], &row["failed"]]).collect();
    assert_eq!(json!(counts), json!([[0, 0, 1], [1, 1, 1], [20, 0, 0]]));
    let latest = &imports["data"][0];
    assert_ne!(latest["addedBy"], id.to_string(), "the key that stored them, and not the one that asks");
    assert!(latest["startedAt"].as_str() <= latest["finishedAt"].as_str() && latest["finishedAt"].is_string(), "{latest}");

    delete(json!({"emails": ["a@b.de", "A@b.de", "b@b.de"]})).await;
    delete(json!({"selectAll": true, "type": "email", "reason": "x y", "search": "USER", "createdFrom": "2024-06-01T10:00:00Z"}))
        .await;
    delete(json!({"selectAll": true})).await;
    let (_, deletions) = get("deletions", reader.reveal()).await;
    let rows = deletions["data"].as_array().unwrap().iter().map(|row| json!([row["deleted"], row["named"], row["filter"]]));
    let filter = json!({"type": "email", "reason": "x y", "search": "user", "createdFrom": "2024-06-01T10:00:00.000Z"});
    assert_eq!(rows.collect::<Vec<_>>(), [json!([20, null, {}]), json!([0, null, filter]), json!([1, 2, null])]);
    assert_eq!(get("deletions?limit=1", reader.reveal()).await.1["data"].as_array().unwrap().len(), 1);

    // Nobody else sees them, nor does a key that may only check.
    assert_eq!(get("imports", &server.other_key).await.1["data"], json!([]));
    let (_, narrow) = server.store.issue_key(owner, Scope::Check, "", None).await.unwrap();
    for (path, key, status) in [
        ("imports", narrow.reveal(), 403),
        ("deletions", "sk_nonsense", 401),
        ("imports?limit=0", reader.reveal(), 400),
        ("deletions?cursor=x", reader.reveal(), 400),
    ] {
        assert_eq!(get(path, key).await.0, status, "{path}");
    }
}

#[tokio::test]
async fn tables_are_distributed_once_by_workspace() {
    let server = TestServer::start().await;
    let mut connection = server.connection().await;
    let migrate = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dnc"));
        command.args(["migrate", "--distribute", "citus"]).env("DATABASE_URL", &server.database_url).output().unwrap()
    };
    let refused = migrate();
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8(refused.stderr).unwrap().contains("Citus is not installed in this database."));
    // What is called of Citus beside its name: its table of tables, and the function that
    // distributes one.
    let citus = "CREATE TABLE pg_dist_partition (logicalrelid regclass, how text);
        CREATE FUNCTION create_distributed_table(
            table_name regclass, distribution_column text, distribution_type text DEFAULT 'hash',
            colocate_with text DEFAULT 'default', shard_count int DEFAULT NULL
        ) RETURNS void LANGUAGE sql AS $$
            INSERT INTO pg_dist_partition
            VALUES ($1, concat_ws(' ', $2, $3, $4, $5)) $$";
    for statements in [PASS_FOR_CITUS, citus] {
        sqlx::raw_sql(statements).execute(&mut connection).await.unwrap();
    }
    for now in [7, 0] {
        let (_, said) = dnc(&server, &["migrate", "--distribute", "citus"]);
        assert!(said.contains(&format!("the tables are distributed ({now} of them now)")), "{said}");
    }
    let tables: Vec<(String, String)> =
        sqlx::query_as("SELECT logicalrelid::text, how FROM pg_dist_partition").fetch_all(&mut connection).await.unwrap();
    assert_eq!(tables[0], ("entries".to_owned(), "workspace_id hash default 128".to_owned()));
    assert!(tables[1..].iter().all(|(_, how)| how == "workspace_id hash entries"), "{tables:?}");
    let mut tables: Vec<_> = tables.into_iter().map(|(table, _)| table).collect();
    tables.sort_unstable();
    // Every table of a workspace, except for those of tenants.
    let of_workspaces = "SELECT table_name::text FROM information_schema.columns
        WHERE table_schema = 'public' AND column_name = 'workspace_id' AND table_name NOT IN ('api_keys', 'memberships') ORDER BY 1";
    let of_workspaces: Vec<String> = sqlx::query_scalar(of_workspaces).fetch_all(&mut connection).await.unwrap();
    assert_eq!(tables, of_workspaces);
}
