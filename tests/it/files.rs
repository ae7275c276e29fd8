//! Files over HTTP and with the command: both read them alike, and a mailing list is answered row
//! by row.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::{Value, json};

use crate::{
    address_book::{domain, email, numbered, request},
    harness::{TestServer, error, http_client},
};

fn dnc(server: &TestServer, dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dnc"));
    command.args(args).env("DNC_SERVER", &server.grpc_url).env("DNC_API_KEY", &server.key).current_dir(dir);
    command
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn printed(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

async fn post(server: &TestServer, path: &str, media_type: &str, body: impl Into<reqwest::Body>) -> reqwest::Response {
    let request = http_client().post(format!("{}{path}", server.http_url)).header("x-api-key", &server.key);
    request.header("content-type", media_type).body(body).send().await.unwrap()
}

/// The outcome of a file: its entries (type, reason, time) by address, the causes by line, and how
/// many rows were excluded; or why the file was refused.
type FileOutcome = Result<(BTreeMap<String, String>, Vec<(u64, String)>, u64), String>;

/// The outcome of `dnc import --dry-run`.
fn dry_run(server: &TestServer, dir: &Path, file: &str) -> FileOutcome {
    let output = dnc(server, dir, &["import", "--dry-run", file]).output().unwrap();
    if !output.status.success() {
        return Err(said(&output));
    }
    let (mut entries, mut causes, mut excluded) = (BTreeMap::new(), Vec::new(), 0);
    let table = printed(&output);
    for row in table.lines().skip(1).take_while(|row| row.contains('\t')) {
        let cells: Vec<&str> = row.split('\t').collect();
        let line = cells[0].rsplit(':').next().unwrap().parse().unwrap();
        match cells[5] {
            "" => drop(entries.insert(cells[1].to_owned(), format!("{} {} {}", cells[2], cells[3], cells[4]))),
            cause if cause.starts_with("excluded") => excluded += 1,
            cause => causes.push((line, cause.to_owned())),
        }
    }
    Ok((entries, causes, excluded))
}

/// The outcome of an import over HTTP. Empties the list afterwards.
async fn imported(server: &TestServer, media_type: &str, file: &[u8]) -> FileOutcome {
    let response = post(server, "/v1/dnc/import", media_type, file.to_vec()).await;
    if response.status() != 200 {
        return Err(error(response).await["message"].as_str().unwrap().to_owned());
    }
    let data = response.json::<Value>().await.unwrap()["data"].take();
    let causes = data["errors"].as_array().into_iter().flatten();
    let causes = causes.map(|error| (error["line"].as_u64().unwrap(), error["message"].as_str().unwrap().to_owned())).collect();
    let list = format!("{}/v1/dnc", server.http_url);
    let page = http_client().get(format!("{list}?limit=100")).header("x-api-key", &server.key).send().await.unwrap();
    let page: Value = page.json().await.unwrap();
    let text = |entry: &Value, name: &str| entry[name].as_str().unwrap().to_owned();
    let entries = page["data"].as_array().unwrap().iter().map(|entry| {
        // An entry without a time has that of the import.
        let at = Some(text(entry, "unsubscribedAt")).filter(|at| *at != text(entry, "createdAt")).unwrap_or_default();
        (text(entry, "email"), format!("{} {} {at}", text(entry, "entryType"), text(entry, "reason")))
    });
    let entries: BTreeMap<_, _> = entries.collect();
    assert_eq!(data["imported"], entries.len());
    let all = http_client().delete(list).header("x-api-key", &server.key).json(&json!({"selectAll": true}));
    assert_eq!(all.send().await.unwrap().status(), 200);
    Ok((entries, causes, data["excluded"].as_u64().unwrap_or_default()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_read_alike_over_http_and_by_the_command() {
    const CSV: &str = "text/csv";
    const NDJSON: &str = "application/x-ndjson";
    let server = TestServer::start().await;
    let dir = tempfile::tempdir().unwrap();
    let long = format!("email,reason\na@example.com,{}\n{},x\nb@example.com,x\n", "é".repeat(70), "x".repeat(70_000));
    let utf16: Vec<u8> = [0xfeff_u16]
        .into_iter()
        .chain("E-Mail\tReason\na@example.com\tasked\n".encode_utf16())
        .flat_map(u16::to_le_bytes)
        .collect();
    let texts = [
        (CSV, "a@example.com\nb@example.com\nbad\n"),
        (CSV, "a@x.de, b@x.de, c@x.de\nd@x.de,bounce\n"),
        (CSV, "a@x.de,bounce\nb@x.de,c@x.de\n"),
        (CSV, "b.com,domain\nco.uk,domain,manual\na@x.de\n"),
        (
            CSV,
            "\u{feff}Email;Type;Reason;UnsubscribedAt\r\na@x.de;;asked;2020-01-02T03:04:05Z\r\nb.com;domain;;\r\nc@x.de;person;;\r\nd@x.de;;;yesterday\r\ne@x.de;;;2999-01-01T00:00:00Z\r\n",
        ),
        (CSV, "email\n<a@x.de>\nmailto:b@x.de\nAnn <c@x.de>\n'+d@x.de\n"),
        (CSV, "EmailAddress,Reason,LastUpdateTime\na@x.de,BOUNCE,2020-01-02T03:04:05+00:00\nb@x.de,COMPLAINT,never\n"),
        (CSV, "status,reason,email,created\n5.1.1,\"550 no\nsuch\",a@x.de,1577934245\n"),
        (CSV, "email,created\na@x.de,1577934245\n"),
        (CSV, "address,tags,created_at\na@x.de,*,\"Thu, 02 Jan 2020 03:04:05 UTC\"\n"),
        (CSV, "EmailAddress,SuppressionReason,Origin,CreatedAt\na@x.de,hardbounce,Recipient,2020-01-02T03:04:05Z\n"),
        (CSV, "email,transactional,non_transactional\na@x.de,false,false\nb@x.de,true,false\n"),
        (CSV, "Email Address,UNSUB_TIME,CLEAN_TIME,LEID,EUID\na@x.de,2020-01-02 03:04:05,,1,x\nb@x.de,,,1,x\n"),
        (CSV, "email,reason,detail,created_at,expires_at,last_event_at\na@x.de,hard-bounce,x,2020-01-02 03:04:05,,\n"),
        (CSV, "address,name,subscribed,vars\na@x.de,Ann,yes,\n"),
        (CSV, "event,recipient\ndelivered,a@x.de\n"),
        (CSV, "name,phone\nx,y\n"),
        (CSV, "email,reason\na@x.de,x\n\"b@x.de"),
        (CSV, "PK\u{3}\u{4}\u{14}\u{0}"),
        (
            NDJSON,
            "{\"email\":\"a@x.de\",\"reason\":\"asked\",\"unsubscribedAt\":\"2020-01-02T03:04:05Z\"}\n{\"email\":\"b@x.de\",\"type\":7}\n\noops\n{\"email\":\"c@x.de\",\"reason\":\"\\ud800\"}\n{\"email\":\"d@x.de\",\"x\":1e999}\n{\"email\":\"e@x.de\",\"unsubscribedAt\":5}\n",
        ),
        (NDJSON, "{\"EmailAddress\":\"a@x.de\",\"Reason\":\"BOUNCE\",\"LastUpdateTime\":1577934245.5}\n{\"email\":\"b@x.de\"}\n"),
        (NDJSON, "{\"email\":\"a@x.de\",\"emailBlacklisted\":true}\n{\"email\":\"b@x.de\",\"emailBlacklisted\":false}\n"),
    ];
    let texts = texts.into_iter().map(|(media_type, text)| (media_type, text.as_bytes().to_vec()));
    for (media_type, file) in texts.chain([(CSV, long.into_bytes()), (CSV, utf16)]) {
        fs::write(dir.path().join("list"), &file).unwrap();
        let shown = String::from_utf8_lossy(&file[..file.len().min(80)]).into_owned();
        match (dry_run(&server, dir.path(), "list"), imported(&server, media_type, &file).await) {
            (Ok(by_command), Ok(over_http)) => assert_eq!(by_command, over_http, "{shown}"),
            (Err(by_command), Err(over_http)) => {
                // Each adds its own advice to the same cause.
                let cause = over_http.split_once("the file ").unwrap().1.split(';').next().unwrap();
                assert!(by_command.contains(cause), "{shown}: {by_command} / {over_http}");
            }
            (by_command, over_http) => panic!("{shown}: {by_command:?} / {over_http:?}"),
        }
    }
    assert_eq!(server.count().await, 0);
}

#[tokio::test]
async fn what_was_left_out_of_a_stored_row_is_counted() {
    let server = TestServer::start().await;
    let file = format!("email,reason\nlong@x.de,{}\nshort@x.de,why\n", "long ".repeat(20));
    let answer = post(&server, "/v1/dnc", "text/csv", file).await.json::<Value>().await.unwrap();
    assert_eq!(answer["data"], json!({"added": 2, "skipped": 0, "reasonsCut": 1}));
    let file = "email,created,reason,status\nbounced@x.de,32503680000,550 no such user,5.1.1\n";
    let answer = post(&server, "/v1/dnc/import?from=sendgrid-bounces", "text/csv", file).await.json::<Value>().await.unwrap();
    assert_eq!(answer["data"], json!({"imported": 1, "skipped": 0, "timesDropped": 1}));
}

#[tokio::test]
async fn excluded_rows_are_counted_and_never_stored() {
    let server = TestServer::start().await;
    let file = "email_address,status\na@example.com,unsubscribed\nb@example.com,subscribed\nc@example.com,cleaned\nd@example.com,pending\n";
    let excluded = |answer: Value| answer["data"].clone();
    let answer = post(&server, "/v1/dnc", "text/csv", file).await.json::<Value>().await.unwrap();
    assert_eq!(excluded(answer), json!({"added": 2, "skipped": 0, "excluded": 2}));
    let reasons: Vec<_> = server.rows(server.workspace).await.into_iter().map(|row| (row.0, row.1)).collect();
    assert_eq!(reasons, [("a@example.com".into(), "unsubscribe_link".into()), ("c@example.com".into(), "bounce".into())]);
    let again = post(&server, "/v1/dnc", "text/csv", "email\nx@example.com\n").await.json::<Value>().await.unwrap();
    assert_eq!(excluded(again), json!({"added": 1, "skipped": 0}), "only if there are any");
    // The caller can name the provider when the columns do not show it.
    let guess = "email,created\ny@example.com,1577934245\n";
    post(&server, "/v1/dnc?from=sendgrid-spam-reports", "text/csv", guess).await;
    post(&server, "/v1/dnc?column=Mail", "text/csv", "Mail,x\nz@example.com,y@example.com\n").await;
    let reasons: Vec<_> = server.rows(server.workspace).await.into_iter().skip(3).map(|row| (row.0, row.1)).collect();
    assert_eq!(reasons, [("y@example.com".into(), "complaint".into()), ("z@example.com".into(), "manual".into())]);
    for (query, media_type, named) in [
        ("from=nobody", "text/csv", "sendgrid-bounces"),
        ("form=mandrill", "text/csv", "from"),
        ("from=mandrill", "application/json", "goes with a file"),
        ("column=Mail", "application/json", "goes with a file"),
    ] {
        let answer = post(&server, &format!("/v1/dnc/import?{query}"), media_type, "{}").await;
        assert_eq!(answer.status(), 400, "{query}");
        assert!(error(answer).await["message"].as_str().unwrap().contains(named), "{query}");
    }
    // JSON is accepted only in its documented form.
    let json_list = r#"[{"email_address":"e@example.com","status":"unsubscribed"}]"#;
    assert_eq!(post(&server, "/v1/dnc", "application/json", json_list).await.status(), 400);
}

#[tokio::test]
async fn the_time_of_an_opt_out_survives_an_export() {
    let server = TestServer::start().await;
    let file = "email,reason,unsubscribedAt\na@example.com,asked,2020-01-02T03:04:05.678Z\n";
    post(&server, "/v1/dnc/import", "text/csv", file).await;
    for (format, media_type) in [("csv", "text/csv"), ("ndjson", "application/x-ndjson")] {
        let url = format!("{}/v1/dnc/export?format={format}", server.http_url);
        let export = http_client().get(url).header("x-api-key", &server.key).send().await.unwrap().text().await.unwrap();
        assert!(export.contains("2020-01-02T03:04:05.678Z"), "{export}");
        let request = http_client().post(format!("{}/v1/dnc/import", server.http_url)).header("x-api-key", &server.other_key);
        let answer = request.header("content-type", media_type).body(export).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        let list = http_client().get(format!("{}/v1/dnc", server.http_url)).header("x-api-key", &server.other_key);
        let list: Value = list.send().await.unwrap().json().await.unwrap();
        assert_eq!(list["data"][0]["unsubscribedAt"], "2020-01-02T03:04:05.678Z");
        let all = http_client().delete(format!("{}/v1/dnc", server.http_url)).header("x-api-key", &server.other_key);
        assert_eq!(all.json(&json!({"selectAll": true})).send().await.unwrap().status(), 200);
    }
    let body = json!({"entries": [{"email": "b@example.com", "unsubscribedAt": "2999-01-01T00:00:00Z"}, {"email": "c@example.com", "unsubscribedAt": "then"}]});
    let answer: Value = server.post(body.to_string()).await.json().await.unwrap();
    assert_eq!(answer["data"]["failed"], 2);
    for error in answer["data"]["errors"].as_array().unwrap() {
        assert_eq!(
            (&error["field"], &error["code"], &error["line"]),
            (&json!("unsubscribedAt"), &json!("INVALID_TIME"), &Value::Null)
        );
    }
}

#[tokio::test]
async fn a_mailing_list_is_answered_row_by_row() {
    let server = TestServer::start().await;
    server.import(vec![request(vec![email("a@example.com"), domain("b.com")])]).await.unwrap();
    let csv = "name;E-Mail\r\n\"Ann; A.\";A@example.com\r\nBob;bob@mail.b.com\r\nCid;cid@example.com\r\nDan;nobody\r\n";
    let answer = post(&server, "/v1/dnc/check", "text/csv", csv).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["content-type"], "text/csv; charset=utf-8");
    assert_eq!(
        answer.text().await.unwrap(),
        "name;E-Mail;suppressed;reason;matched;error\r\n\"Ann; A.\";A@example.com;true;import;a@example.com;\r\n\
         Bob;bob@mail.b.com;true;import;b.com;\r\nCid;cid@example.com;false;;;\r\nDan;nobody;true;;;INVALID_EMAIL\r\n"
    );
    let lines = "{\"email\":\"x@b.com\",\"n\":1}\n{\"n\":2}\n{\"email\":\"free@example.com\"}\n";
    let answer = post(&server, "/v1/dnc/check", "application/x-ndjson", lines).await.text().await.unwrap();
    let rows: Vec<Value> = answer.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        rows[0],
        json!({"email": "x@b.com", "n": 1, "suppressed": true, "reason": "import", "matched": "b.com", "error": null})
    );
    assert_eq!(rows[1], json!({"n": 2, "suppressed": true, "reason": null, "matched": null, "error": "INVALID_LINE"}));
    assert_eq!(rows[2]["suppressed"], false);

    // A long list, of which every hundredth address is suppressed.
    let many: String =
        (0..30_000).map(|n| if n % 100 == 0 { format!("u{n}@b.com,{n}\n") } else { format!("u{n}@example.com,{n}\n") }).collect();
    let answer = post(&server, "/v1/dnc/check", "text/csv", format!("email,n\n{many}")).await.text().await.unwrap();
    let mut rows = answer.lines().skip(1);
    for n in 0..30_000 {
        let row = rows.next().unwrap();
        assert!(row.contains(&format!(",{n},{},", n % 100 == 0)), "{row}");
    }
    assert_eq!(rows.next(), None);

    for (media_type, body, status) in
        [("text/csv", "name,phone\nx,y\n", 400), ("text/plain", "a@example.com", 415), ("text/csv", "PK\u{3}\u{4}xx", 400)]
    {
        let answer = post(&server, "/v1/dnc/check", media_type, body).await;
        assert_eq!(answer.status(), status, "{body}");
        error(answer).await;
    }
    let stranger =
        http_client().post(format!("{}/v1/dnc/check", server.http_url)).header("content-type", "text/csv").body("email\n");
    assert_eq!(stranger.send().await.unwrap().status(), 401);
    assert_eq!(post(&server, "/v1/dnc/check", "text/csv", "").await.text().await.unwrap(), "");
}

#[tokio::test]
async fn a_broken_answer_to_a_mailing_list_does_not_look_complete() {
    let server = TestServer::start().await;
    let many: String = (0..200_000).map(|n| format!("u{n}@example.com\n")).collect();
    let mut answer = post(&server, "/v1/dnc/check", "text/csv", format!("email\n{many}\"never closed\n")).await;
    assert_eq!(answer.status(), 200, "the answer had begun");
    let mut rows = 0;
    let broken = loop {
        match answer.chunk().await {
            Ok(Some(chunk)) => rows += chunk.iter().filter(|byte| **byte == b'\n').count(),
            Ok(None) => break false,
            Err(_) => break true,
        }
    };
    assert!(broken && rows > 0, "{rows} rows");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mailing_list_is_split_in_two() {
    let server = TestServer::start().await;
    server.import(vec![request(vec![email("a@example.com"), domain("b.com")])]).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
    let check = |args: &[&str]| dnc(&server, dir.path(), &[&["check"], args].concat()).output().unwrap();
    fs::write(dir.path().join("list.csv"), "n,email,note\n1,A@example.com,\"x, y\"\n2,free@example.com,\n3,x@b.com,z\n4,nobody\n")
        .unwrap();
    let split = ["--file", "list.csv", "--clear", "clear.csv", "--suppressed", "suppressed.csv"];
    let output = check(&split);
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    assert_eq!(read("clear.csv"), "n,email,note\n2,free@example.com,\n");
    assert_eq!(read("suppressed.csv"), "n,email,note\n1,A@example.com,\"x, y\"\n3,x@b.com,z\n4,nobody,\n");
    assert_eq!(printed(&output).split_whitespace().collect::<Vec<_>>(), ["clear", "1", "suppressed", "3"]);
    // A JSON document is written as lines.
    fs::write(dir.path().join("list.json"), "[{\"email\":\n\"x@b.com\"}, {\"email\":\"free@example.com\"}]").unwrap();
    let output = check(&["--file", "list.json", "--clear", "clear.json"]);
    assert_eq!((output.status.code(), read("clear.json").as_str()), (Some(3), "{\"email\":\"free@example.com\"}\n"));
    let output = check(&["--file", "clear.csv", "--suppressed", "none.csv"]);
    assert_eq!((output.status.code(), read("none.csv").as_str()), (Some(0), "n,email,note\n"));

    // A check that does not complete writes no lists, and existing files stay.
    fs::write(dir.path().join("open.csv"), "email\nfree@example.com\n\"open\n").unwrap();
    let output = check(&["--file", "open.csv", "--clear", "clear.csv", "--suppressed", "new.csv"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("not closed"), "{}", said(&output));
    assert_eq!(read("clear.csv"), "n,email,note\n2,free@example.com,\n");
    assert!(!dir.path().join("new.csv").exists());
    for (args, expected) in [
        (&["--file", "list.csv", "--clear", "list.csv"][..], "write over"),
        (&["--file", "list.csv", "--clear", "x.csv", "--suppressed", "x.csv"], "same file"),
        (&["--file", "list.csv", "--clear", "x.csv", "free@example.com"], "one mailing list"),
    ] {
        let output = check(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(said(&output).contains(expected), "{args:?}: {}", said(&output));
    }
    assert_eq!(check(&["--clear", "x.csv", "free@example.com"]).status.code(), Some(2));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 7, "nothing else is left behind");
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_to_rows_are_reported_and_no_file_is_overwritten() {
    let server = TestServer::start().await;
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
    let import = |args: &[&str]| dnc(&server, dir.path(), &[&["import"], args].concat()).output().unwrap();
    write(
        "list.csv",
        &format!(
            "EmailAddress,SuppressionReason,CreatedAt\na@example.com,{},2020-01-02T03:04:05Z\nb@example.com,HardBounce,never\nbad,HardBounce,\n",
            "x".repeat(65)
        ),
    );
    let output = import(&["--rejects", "r.csv", "list.csv"]);
    let table = printed(&output);
    for row in ["imported 2", "failed 1", "INVALID_EMAIL 1", "reasons cut 1", "times dropped 1"] {
        let has = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ").starts_with(row);
        assert!(table.lines().any(has), "{row}: {table}");
    }
    assert!(said(&output).contains("read as: Postmark suppressions"));
    let rejects = read("r.csv");
    assert!(
        rejects.ends_with(",list.csv,4,INVALID_EMAIL,The e-mail address has no @.\n")
            || rejects.contains(",list.csv,4,INVALID_EMAIL,"),
        "{rejects}"
    );

    fs::hard_link(dir.path().join("r.csv"), dir.path().join("link.csv")).unwrap();
    let piped = |rejects: &str| {
        let input = fs::File::open(dir.path().join("r.csv")).unwrap();
        dnc(&server, dir.path(), &["import", "--rejects", rejects]).stdin(Stdio::from(input)).output().unwrap()
    };
    for output in [piped("r.csv"), piped("link.csv"), import(&["--rejects", "link.csv", "r.csv"])] {
        assert_eq!(output.status.code(), Some(1));
        assert!(said(&output).contains("write over"), "{}", said(&output));
    }
    assert_eq!(read("r.csv"), rejects);

    write("members.csv", "email_address,status\nc@example.com,unsubscribed\nd@example.com,subscribed\n");
    assert!(printed(&import(&["members.csv"])).contains("excluded"));
    write("guess.csv", "email,created\ne@example.com,1577934245\n");
    import(&["--from", "sendgrid-bounces", "guess.csv"]);
    write("spam.csv", "email,ip,created\nf@example.com,192.0.2.1,1577934245\n");
    import(&["--reason", "asked by mail", "spam.csv"]);
    let reasons: BTreeMap<_, _> = server.rows(server.workspace).await.into_iter().map(|row| (row.0, row.1)).collect();
    assert_eq!((reasons["e@example.com"].as_str(), reasons["f@example.com"].as_str()), ("bounce", "asked by mail"));
    write("unknown.json", "{\"people\":[{\"email\":\"x@example.com\"}]}\n");
    let output = import(&["unknown.json"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("no list of entries"), "{}", said(&output));
    let help = printed(&dnc(&server, dir.path(), &["import", "--help"]).output().unwrap());
    assert!(help.contains("sendgrid-bounces") && help.contains("brevo-blocked"), "{help}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_may_send_a_whole_list_before_it_reads_the_answer() {
    let server = TestServer::start().await;
    server.import(vec![request(vec![email("user0000007@example0.com")])]).await.unwrap();
    // More than the buffers of a connection take, in few rows.
    let note = "x".repeat(2_000);
    let rows = numbered(0..10_000).map(|entry| format!("{},{note}\n", entry.email));
    let body = "email,note\n".to_owned() + &rows.collect::<String>();
    let address = server.http_url.strip_prefix("http://").unwrap().to_owned();
    let head = format!(
        "POST /v1/dnc/check HTTP/1.1\r\nHost: {address}\r\nX-Api-Key: {}\r\nContent-Type: text/csv\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        server.key,
        body.len()
    );
    let answer = tokio::task::spawn_blocking(move || {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    let answer = answer.await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{}", answer.lines().next().unwrap_or_default());
    let (_, mut chunks) = answer.split_once("\r\n\r\n").unwrap();
    let mut answer = String::new();
    loop {
        let (length, rest) = chunks.split_once("\r\n").unwrap();
        let (chunk, rest) = rest.split_at(usize::from_str_radix(length, 16).unwrap());
        answer.push_str(chunk);
        chunks = rest.strip_prefix("\r\n").expect("a chunk ends with its line");
        if chunk.is_empty() {
            break;
        }
    }
    assert_eq!((answer.lines().count(), chunks), (10_001, ""), "a whole answer, and nothing after it");
    let verdicts = |verdict: &str| answer.matches(&format!(",{verdict},")).count();
    assert_eq!((verdicts("true"), verdicts("false")), (1, 9_999));
}

#[tokio::test]
async fn a_file_is_shown_as_it_is_understood() {
    let server = TestServer::start().await;
    let file = "email,type,reason,unsubscribedAt\n\
                Ann <Ann@Example.COM>,,asked us,2024-06-01T12:00:00+02:00\nBadCompany.com,domain,,\nnobody,,,\nb@example.com,person,,\n";
    let answer = post(&server, "/v1/dnc/import?validateOnly=true&preview=3", "text/csv", file).await;
    let data = answer.json::<Value>().await.unwrap()["data"].take();
    let row = |line: u64, email: &str, kind: &str, reason: &str, at: &str| json!({"line": line, "email": email, "type": kind, "reason": reason, "unsubscribedAt": at, "excluded": false});
    let rows = [
        row(2, "ann@example.com", "email", "asked us", "2024-06-01T10:00:00.000Z"),
        row(3, "badcompany.com", "domain", "", ""),
        row(4, "nobody", "email", "", ""),
    ];
    assert_eq!(data["preview"], json!({"readAs": "list with a header", "rows": rows}));
    assert_eq!((&data["failed"], &data["errors"][0]["line"], &data["errors"][1]["line"]), (&json!(2), &json!(4), &json!(5)));
    assert_eq!(server.count().await, 0);

    let mailchimp = "Email Address,Status\nin@example.com,subscribed\nout@example.com,unsubscribed\n";
    let answer = post(&server, "/v1/dnc?preview=100", "text/csv", mailchimp).await;
    let data = answer.json::<Value>().await.unwrap()["data"].take();
    let left_out = json!({"line": 2, "email": "", "type": "email", "reason": "", "unsubscribedAt": "", "excluded": true});
    let rows = [left_out, row(3, "out@example.com", "email", "unsubscribe_link", "")];
    assert_eq!(data, json!({"added": 1, "skipped": 0, "excluded": 1, "preview": {"readAs": "Mailchimp members", "rows": rows}}));

    // Rows that are very long are not kept by the hundred.
    let long: String = (0..100).map(|_| format!("{}\n", "x".repeat(60_000))).collect();
    let answer = post(&server, "/v1/dnc/import?preview=100", "text/csv", format!("email\n{long}")).await;
    let data = answer.json::<Value>().await.unwrap()["data"].take();
    assert_eq!((data["preview"]["rows"].as_array().unwrap().len(), &data["failed"]), (4, &json!(100)));

    for (query, media_type, said) in [
        ("preview=0", "text/csv", "preview: expected a number of rows from 1 to 100"),
        ("preview=101", "text/csv", "preview: expected a number of rows from 1 to 100"),
        ("preview=1", "application/json", "preview: goes with a file"),
    ] {
        let answer = post(&server, &format!("/v1/dnc/import?{query}"), media_type, r#"{"entries": [{"email": "a@b.de"}]}"#).await;
        assert_eq!(answer.status(), 400, "{query}");
        assert!(error(answer).await["message"].as_str().unwrap().contains(said), "{query}");
    }
}

#[tokio::test]
async fn invalid_lines_of_a_file_are_rejected_one_by_one_with_their_causes() {
    let server = TestServer::start().await;
    let post = |media_type: &'static str, body: String| {
        let request = server.post_request().header("content-type", media_type).body(body);
        async move { request.send().await.unwrap() }
    };
    let answer = post(
        "application/x-ndjson",
        "{\"email\":\"a@example.com\"}\n{\"email\":\"x@example.com\",\"type\":7}\n\nnonsense\n{\"email\":\"bad\"}\n".into(),
    )
    .await;
    let body: Value = answer.json().await.unwrap();
    assert_eq!((&body["data"]["imported"], &body["data"]["failed"]), (&json!(1), &json!(3)));
    let errors = json!([
        {"index": 1, "line": 2, "field": "type", "code": "INVALID_TYPE", "message": "The type is neither email nor domain."},
        {"index": 2, "line": 4, "field": "", "code": "INVALID_LINE", "message": "The line is not valid JSON."},
        body["data"]["errors"][2],
    ]);
    assert_eq!(body["data"]["errors"], errors);
    assert_eq!((&body["data"]["errors"][2]["index"], &body["data"]["errors"][2]["line"]), (&json!(3), &json!(5)));
    let answer = post("text/csv", format!("EMAIL,reason\nb@example.com,bounce\n{},x\nbad,\n", "x".repeat(70_000))).await;
    let body: Value = answer.json().await.unwrap();
    assert_eq!((&body["data"]["imported"], &body["data"]["failed"]), (&json!(1), &json!(2)));
    let error = &body["data"]["errors"][0];
    assert_eq!((&error["code"], &error["line"]), (&json!("LINE_TOO_LONG"), &json!(3)));
    assert_eq!(error["message"], "The line is longer than 64 KiB, or has more than 1,000 cells.");
    let answer = post("text/csv", "name,phone\nx,y\n".into()).await;
    assert_eq!(answer.status(), 400);
    assert!(answer.text().await.unwrap().contains("header"));
    let many: String = (0..30_000).map(|i| format!("{{\"email\":\"many{i}@example.com\"}}\n")).collect();
    let body: Value = post("application/x-ndjson", many).await.json().await.unwrap();
    assert_eq!(body["data"], json!({"imported": 30_000, "skipped": 0}));
}
