//! The page for people, in a browser.

use std::io::Write;

use dnc::domain::{KeyOwner, Scope};
use reqwest::StatusCode;
use serde_json::json;

use crate::harness::{
    TestServer,
    browser::{Browser, Page},
    database, http_client,
};

/// Opens the page, and enters a key.
async fn signed_in(browser: &std::sync::Arc<Browser>, server: &TestServer, key: &str) -> Page {
    let page = browser.open(&server.http_url).await;
    page.fill("#key", key).await;
    page.press("Enter").await;
    page
}

/// Goes to a view of the page.
async fn view(page: &Page, name: &str) {
    page.click(&format!("#views a[href='#/{name}']")).await;
    page.wait(&format!("document.querySelector('#{name}').checkVisibility()")).await;
}

/// Asserts that the page asked nobody else for anything, broke no policy, and kept no key.
pub(crate) async fn assert_clean(page: &Page, server: &TestServer) {
    let requested = page.requested();
    assert!(requested.len() > 3);
    for url in requested {
        let is_ours = url.starts_with(&server.http_url) || url.starts_with("data:") || url.starts_with("blob:");
        assert!(is_ours, "requested {url}");
        assert!(!url.contains("sk_"), "a key in {url}");
    }
    assert_eq!(page.console(), Vec::<String>::new());
    let kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href, history.state])";
    let kept = page.eval(kept).await;
    assert!(!kept.as_str().unwrap().contains("sk_"), "{kept}");
    assert_eq!(page.eval("indexedDB.databases().then((all) => all.length)").await, 0);
    assert_eq!(page.eval("caches.keys().then((all) => all.length)").await, 0);
}

#[tokio::test]
async fn the_page_is_served_with_a_strict_policy_and_revalidated() {
    let server = TestServer::start().await;
    let get = |path: &str| http_client().get(format!("{}{path}", server.http_url));
    for (path, content_type) in [
        ("/", "text/html; charset=utf-8"),
        ("/page.css", "text/css; charset=utf-8"),
        ("/page.js", "text/javascript; charset=utf-8"),
        ("/docs", "text/html; charset=utf-8"),
        ("/docs/docs.js", "text/javascript; charset=utf-8"),
    ] {
        let answer = get(path).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        let headers = answer.headers().clone();
        assert_eq!(headers["content-type"], content_type);
        assert_eq!(headers["cache-control"], "no-cache");
        assert_eq!(headers["referrer-policy"], "no-referrer");
        assert_eq!(headers["x-content-type-options"], "nosniff");
        let policy = headers.get("content-security-policy").map(|policy| policy.to_str().unwrap());
        assert_eq!(policy.is_some(), content_type.starts_with("text/html"));
        if let Some(policy) = policy {
            assert!(policy.starts_with("default-src 'none';") && policy.contains("frame-ancestors 'none'"), "{policy}");
            assert!(!policy.contains("unsafe") && !policy.contains("http"), "{policy}");
            assert_eq!(headers["x-frame-options"], "DENY");
        }
        let length = answer.bytes().await.unwrap().len();
        assert!(length > 300);

        let head = http_client().head(format!("{}{path}", server.http_url)).send().await.unwrap();
        assert_eq!(
            (&head.headers()["etag"], &head.headers()["content-length"]),
            (&headers["etag"], &length.to_string().parse().unwrap())
        );
        assert_eq!(head.bytes().await.unwrap().len(), 0);

        let etag = headers["etag"].to_str().unwrap();
        for (given, status) in [(etag, 304), (&format!("\"x\", W/{etag}"), 304), ("*", 304), ("\"x\"", 200)] {
            let answer = get(path).header("if-none-match", given).send().await.unwrap();
            assert_eq!(answer.status().as_u16(), status, "{given}");
            assert_eq!(answer.headers()["etag"], etag);
        }
    }
}

#[tokio::test]
async fn a_wrong_key_is_refused_and_the_right_one_looks_an_address_up() {
    let Some(browser) = Browser::get() else { return };
    let server = TestServer::start().await;
    let entries = json!({"entries": [{"email": "badcompany.com", "type": "domain", "reason": "complaint"}]});
    assert_eq!(server.post(entries.to_string()).await.status(), 200);

    let page = signed_in(browser, &server, "sk_nonsense").await;
    page.wait("document.querySelector('#key-message').textContent.includes('Enter another one')").await;
    assert_eq!(page.eval("document.querySelector('#views').checkVisibility()").await, false);

    page.fill("#key", &server.key).await;
    page.press("Enter").await;
    page.fill("#lookup-email", "Ann@Mail.BadCompany.com").await;
    page.press("Enter").await;
    let found = page.wait("document.querySelector('#lookup-result dl')?.innerText").await;
    let found = found.as_str().unwrap();
    for expected in ["badcompany.com", "sub-domains", "complaint", "key_"] {
        assert!(found.contains(expected), "{found}");
    }
    page.fill("#lookup-email", "free@example.org").await;
    page.press("Enter").await;
    page.wait("document.querySelector('#lookup-result').innerText.includes('May be written to')").await;
    page.fill("#lookup-email", "<img src=x onerror=alert(1)>@").await;
    page.press("Enter").await;
    page.wait("document.querySelector('#lookup-result').innerText.includes('Not an address')").await;
    assert_clean(&page, &server).await;

    page.click("#forget").await;
    page.wait("document.activeElement.id === 'key' && document.activeElement.value === ''").await;
    assert_eq!(page.eval("document.querySelector('#lookup-result').innerText").await, "");
}

#[tokio::test]
async fn only_a_clear_and_latest_answer_is_shown() {
    let Some(browser) = Browser::get() else { return };
    let server = TestServer::start().await;
    assert_eq!(server.post(r#"{"entries": [{"email": "a@example.com"}]}"#).await.status(), 200);
    let page = signed_in(browser, &server, &server.key).await;
    let result = "document.querySelector('#lookup-result')";
    let look_up = async |email: &str| {
        page.fill("#lookup-email", email).await;
        page.press("Enter").await;
    };
    // A removal is answered after something else was looked up.
    look_up("a@example.com").await;
    page.wait(&format!("window.remover = {result}.querySelector('button')")).await;
    page.eval(
        "window.ask = fetch;
         window.held = new Promise((go) => window.release = go);
         window.fetch = (url, options) =>
             (options.method === 'DELETE' ? held : Promise.resolve()).then(() => ask(url, options)); 0",
    )
    .await;
    page.click("#lookup-result button").await;
    page.click("#confirm-yes").await;
    page.wait("remover.ariaBusy === 'true'").await;
    look_up("free@example.org").await;
    let is_free = format!("{result}.innerText.includes('Neither free@example.org')");
    page.wait(&is_free).await;
    page.eval("release()").await;
    page.wait("remover.ariaBusy !== 'true'").await;
    assert_eq!(server.count().await, 0);
    assert_eq!(page.eval(&is_free).await, true);

    // Nobody may be written to because an answer lacks something.
    for answer in [
        json!({ "data": { "email": "free@example.org", "suppressed": true } }),
        json!({ "data": { "email": "free@example.org", "suppressed": null } }),
        json!({ "data": { "email": "free@example.org" } }),
        json!({ "data": { "suppressed": false } }),
        json!({}),
        json!("no object"),
    ] {
        page.eval(&format!("window.fetch = async () => new Response({}); 0", json!(answer.to_string()))).await;
        look_up("free@example.org").await;
        page.wait("document.querySelector('#lookup-message').innerText.includes('was not understood')").await;
        assert_eq!(page.eval(&format!("{result}.innerText")).await, "", "{answer}");
    }
    assert_clean(&page, &server).await;
}

#[tokio::test]
async fn a_platform_key_names_its_workspace() {
    let Some(browser) = Browser::get() else { return };
    let server = TestServer::start().await;
    let page = signed_in(browser, &server, &server.platform_key).await;
    page.wait("document.querySelector('#key-message').textContent.includes('X-Workspace-Id')").await;
    page.fill("#workspace", &server.workspace.to_string()).await;
    page.press("Enter").await;
    page.wait("document.querySelector('#session').checkVisibility()").await;
    let session = page.eval("document.querySelector('#session-text').innerText").await;
    assert_eq!(session, format!("Platform key, {}", server.workspace));
    assert_clean(&page, &server).await;
}

#[tokio::test]
async fn what_goes_wrong_is_said_with_what_to_do() {
    let Some(browser) = Browser::get() else { return };
    let server = TestServer::start_with(&["--requests-per-sec-max", "1"], &database().await).await;
    let owner = KeyOwner::Workspace(server.workspace);
    let (_, narrow) = server.store.issue_key(owner, Scope::Check, "", None).await.unwrap();
    let page = signed_in(browser, &server, narrow.reveal()).await;
    page.wait("document.querySelector('#lookup').checkVisibility()").await;
    let said = |expected: &str| {
        format!("[...document.querySelectorAll('.message')].some((each) => each.innerText.includes('{expected}'))")
    };
    view(&page, "summary").await;
    page.wait(&said("scope")).await;
    view(&page, "lookup").await;
    page.fill("#lookup-email", "ann@example.com").await;
    let limited = said("too many requests with this key. Try again in 1 second");
    page.wait(&format!("{limited} || (document.querySelector('#lookup-form button').click(), false)")).await;
    server.begin_stop();
    server.ended().await;
    page.click("#lookup-form button").await;
    page.wait(&said("The server cannot be reached")).await;
}

#[tokio::test]
async fn a_file_is_seen_row_by_row_imported_and_its_rejects_are_mended() {
    let Some(browser) = Browser::get() else { return };
    let server = TestServer::start().await;
    assert_eq!(server.post(r#"{"entries": [{"email": "old@example.com"}]}"#).await.status(), 200);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("suppression_bounces.csv");
    let rows = "email,reason,status,created\n\
                Ann@Example.com,\"550, no\nsuch user\",5.1.1,1717236000\n\
                old@example.com,550,5.1.1,1717236000\n\
                \n\
                not <b>an</b> address,550,5.1.1,1717236000\n\
                ann@example.com,550,5.1.1,1717236000\n";
    std::fs::write(&file, rows).unwrap();
    let page = signed_in(browser, &server, &server.key).await;
    view(&page, "import").await;
    page.choose("#import-file", &[&file]).await;
    let result = "document.querySelector('#import .result')";
    let seen = page.wait(&format!("{result}.querySelector('.rejects') && {result}.innerText")).await;
    let seen = seen.as_str().unwrap();
    assert!(seen.contains("read as: SendGrid bounces") && seen.contains("4 rows"), "{seen}");
    let cells = |table: &str| {
        format!(
            "[...{result}.querySelectorAll('{table} tbody tr')].map((row) => row.innerText.split('\\t').map((cell) => cell.trim()))"
        )
    };
    assert_eq!(
        page.eval(&cells(".rows:not(.rejects)")).await,
        json!([
            ["2", "ann@example.com", "bounce", "Jun 1, 2024", "New"],
            ["4", "old@example.com", "bounce", "Jun 1, 2024", "Already on the list"],
            [
                "6",
                "not <b>an</b> address",
                "bounce",
                "Jun 1, 2024",
                "Rejected The e-mail address has no @; set type to domain if a domain is meant."
            ],
            ["7", "ann@example.com", "bounce", "Jun 1, 2024", "Repeated"],
        ])
    );
    let rejected = page.eval(&cells(".rejects")).await;
    assert_eq!((&rejected[0][0], &rejected[0][1]), (&json!("6"), &json!("not <b>an</b> address,550,5.1.1,1717236000")));
    assert_eq!(server.count().await, 1, "nothing is stored by looking at a file");

    page.click("#import .result button.primary").await;
    page.wait(&format!("{result}.innerText.includes('1 entry was imported')")).await;
    assert_eq!(server.rows(server.workspace).await[0].1, "bounce");
    page.click("#import .result .buttons button:first-child").await;
    let rejects = page.downloaded("suppression_bounces.rejected.csv").await;
    let expected = "rejected_line,rejected_code,rejected_cause,email,reason,status,created\n\
                    6,INVALID_EMAIL,The e-mail address has no @; set type to domain if a domain is meant.,\
                    not <b>an</b> address,550,5.1.1,1717236000\n";
    assert_eq!(rejects.replace('"', ""), expected);

    // Mended, the file is still known for what it is.
    std::fs::write(&file, rejects.replace("not <b>an</b> address", "bo@example.com")).unwrap();
    page.click("#import .result .buttons button:nth-child(2)").await;
    page.choose("#import-file", &[&file]).await;
    page.wait(&format!("{result}.innerText.includes('read as: SendGrid bounces')")).await;
    page.click("#import .result button.primary").await;
    page.wait(&format!("{result}.innerText.includes('1 entry was imported')")).await;
    assert_eq!(server.count().await, 3);

    view(&page, "history").await;
    let history = page.wait("document.querySelector('#history table')?.innerText").await;
    assert_eq!(history.as_str().unwrap().matches("key_").count(), 3, "{history}");
    assert_clean(&page, &server).await;
}

#[tokio::test]
async fn a_file_of_any_kind_is_recognized() {
    let Some(browser) = Browser::get() else { return };
    let server = TestServer::start().await;
    let dir = tempfile::tempdir().unwrap();
    let gzip = |text: &str| {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(text.as_bytes()).unwrap();
        packer.finish().unwrap()
    };
    let utf16: Vec<u8> =
        "\u{feff}email\treason\na@utf16.example\tbounce\nnobody\tx\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let ses = r#"{"SuppressedDestinationSummaries": [
        {"EmailAddress": "a@ses.example", "Reason": "BOUNCE", "LastUpdateTime": "2024-06-01T10:00:00Z"}, {"EmailAddress": "nobody"}
    ]}"#;
    let lines = "{\"email\": \"a@lines.example\"}\n{\"email\": \"nobody\"}\n";
    let nested = "{\"data\": {\"x\": [1], \"entries\": [{\"email\": \"a@nested.example\"}]}}\n\
                  {\"items\": [{\n\"email\": \"nobody\", \"n\": 9007199254740993\n}]}";
    let wide = "{\"email\": \"a@wide.example\", \"data\": [\"x@y.de\"]}\n{\"email\": \"nobody\"}\n";
    let files: [(&str, Vec<u8>, &str, &str); 8] = [
        ("plain.txt", b"a@plain.example\nnobody\n".to_vec(), "plain list", "nobody"),
        ("sheet.txt", utf16, "list with a header", "nobody\tx"),
        ("ses.json", ses.into(), "Amazon SES suppression list", r#"{"EmailAddress": "nobody"}"#),
        (
            "api.json",
            br#"{"entries": [{"email": "a@api.example"}, {"email": "nobody"}]}"#.to_vec(),
            "list",
            r#"{"email": "nobody"}"#,
        ),
        ("nested.json", nested.into(), "list", r#"{ "email": "nobody", "n": 9007199254740993 }"#),
        ("wide.json", wide.into(), "list", r#"{"email": "nobody"}"#),
        ("lines.ndjson.gz", gzip(lines), "list", r#"{"email": "nobody"}"#),
        ("own.csv.zst", zstd::encode_all(&b"email\na@zstd.example\nnobody\n"[..], 1).unwrap(), "list with a header", "nobody"),
    ];
    let page = signed_in(browser, &server, &server.key).await;
    view(&page, "import").await;
    let result = "document.querySelector('#import .result')";
    let can_unpack_zstd =
        page.eval("(() => { try { return !!new DecompressionStream('zstd'); } catch { return false; } })()").await == true;
    for (name, bytes, read_as, rejected) in files {
        let file = dir.path().join(name);
        std::fs::write(&file, bytes).unwrap();
        // The result of the last one is shown a moment before its work has ended.
        page.wait("document.querySelector('#import .working').hidden").await;
        page.choose("#import-file", &[&file]).await;
        let seen = page.wait(&format!("{result}.querySelector('h3')?.innerText === '{name}' && {result}.innerText")).await;
        let seen = seen.as_str().unwrap();
        let has_text = can_unpack_zstd || !name.ends_with(".zst");
        assert!(seen.contains(&format!("read as: {read_as}")) && seen.contains("2 rows"), "{name}: {seen}");
        assert!(!has_text || seen.contains(rejected), "{name}: {seen}");
        page.click("#import .result button.primary").await;
        page.wait(&format!("{result}.innerText.includes('1 entry was imported')")).await;
        page.click("#import .result .buttons button:nth-child(2)").await;
    }
    // What a text field and the clipboard have is a file too.
    page.eval("document.querySelector('#import details').open = true").await;
    page.fill("#import-text", "a@typed.example\nb@typed.example").await;
    page.click("#import-text-form button").await;
    page.wait(&format!("{result}.querySelector('h3')?.innerText === 'pasted.csv' && {result}.innerText.includes('2 rows')")).await;
    for event in [
        "new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true })",
        "new ClipboardEvent('paste', { clipboardData: data, bubbles: true })",
    ] {
        page.eval(
            &("(() => { const data = new DataTransfer(); data.items.add(new File(['email\\nc@dropped.example\\n'], 'dropped.csv'));
               document.querySelector('#import-title').dispatchEvent("
                .to_owned()
                + event + "); })()"),
        )
        .await;
        page.wait(&format!("{result}.querySelector('h3')?.innerText === 'dropped.csv' && {result}.innerText.includes('1 row')"))
            .await;
        page.click("#import .result .buttons button:nth-child(2)").await;
        page.wait(&format!("!{result}.hasChildNodes()")).await;
    }
    // A file that is no list can be read in another way.
    let file = dir.path().join("people.csv");
    std::fs::write(&file, "who,where\na@people.example,Berlin\n").unwrap();
    page.choose("#import-file", &[&file]).await;
    page.wait("document.querySelector('#import > .message').innerText.includes('column of addresses')").await;
    page.fill("#import-column", "who").await;
    page.press("Enter").await;
    page.wait(&format!("{result}.innerText.includes('a@people.example')")).await;
    for (name, bytes, why) in
        [("list.zip", &b"PK\x03\x04"[..], "Save it as CSV"), ("empty.csv", b"", "is empty"), ("x.json", b"[{]", "not valid JSON")]
    {
        let file = dir.path().join(name);
        std::fs::write(&file, bytes).unwrap();
        page.eval("document.querySelector('#import .result .buttons button:last-child')?.click()").await;
        page.choose("#import-file", &[&file]).await;
        page.wait(&format!("document.querySelector('#import > .message').innerText.includes('{why}')")).await;
    }
    assert_eq!(server.count().await, 8);
    assert_clean(&page, &server).await;
}

#[tokio::test]
async fn a_hundred_thousand_rows_are_imported_and_checked() {
    let Some(browser) = Browser::get() else { return };
    let server = TestServer::start().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("large.csv");
    let rows = (0..100_000).map(|row| match row % 1_000 {
        0 => format!("\"Doe, {row}\",nobody{row}\n"),
        _ => format!("\"Doe, {row}\",person{row}@example.com\n"),
    });
    std::fs::write(&file, "name,email\n".to_owned() + &rows.collect::<String>()).unwrap();
    let page = signed_in(browser, &server, &server.key).await;
    view(&page, "import").await;
    page.eval(
        "window.seen = new Set(); new MutationObserver(() => {
            const card = document.querySelector('#import .working');
            if (!card.hidden) window.seen.add(card.querySelector('label').innerText);
        }).observe(document.querySelector('#import .working'), { subtree: true, childList: true, attributes: true })",
    )
    .await;
    page.choose("#import-file", &[&file]).await;
    let result = "document.querySelector('#import .result')";
    let seen = page.wait(&format!("{result}.querySelector('.rejects') && {result}.innerText")).await;
    for expected in ["100,000 rows", "The first 100 of 100,000 rows", "Import 99,900 new entries", "Rejected\n100", "\n99002\n"] {
        assert!(seen.as_str().unwrap().replace('\t', "\n").contains(expected), "{expected}: {seen}");
    }
    assert_eq!(page.eval("document.querySelectorAll('#import tbody tr').length").await, 200);
    // A slow import shows how far it is, can be given up, and begun again.
    let slow =
        |bytes_per_sec: i64| json!({ "offline": false, "latency": 0, "downloadThroughput": -1, "uploadThroughput": bytes_per_sec });
    page.command("Network.emulateNetworkConditions", slow(300_000)).await;
    page.click("#import .result button.primary").await;
    page.wait("document.querySelector('#import progress').position > 0").await;
    // Another file does not come in between.
    page.eval(
        "(() => { const data = new DataTransfer(); data.items.add(new File(['email\\nc@dropped.example\\n'], 'dropped.csv'));
           document.querySelector('#import-title').dispatchEvent(
               new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true })); })()",
    )
    .await;
    page.wait("document.querySelector('#import > .message').innerText.includes('dropped.csv was not taken')").await;
    page.click("#import .working button").await;
    page.wait(&format!("{result}.innerText.includes('not known whether the import ended')")).await;
    page.command("Network.emulateNetworkConditions", slow(-1)).await;
    page.click("#import .result button.primary").await;
    page.wait(&format!("{result}.innerText.includes('imported')")).await;
    assert_eq!(server.count().await, 99_900);
    let shown = page.eval("[...window.seen]").await;
    assert!(shown.to_string().contains("nothing is stored yet") && shown.to_string().contains("Importing large.csv"), "{shown}");

    let list = dir.path().join("mailing.csv");
    let rows = (0..100_000)
        .map(|row| format!("\"a \"\"quoted\"\"\nname\";person{row}@{}.com\n", if row % 2 == 0 { "example" } else { "free" }));
    std::fs::write(&list, "name;email\n".to_owned() + &rows.collect::<String>() + "x;nobody\n").unwrap();
    view(&page, "check").await;
    page.choose("#check-file", &[&list]).await;
    page.wait("document.querySelector('#check .tiles')").await;
    let tiles = page.eval("[...document.querySelectorAll('#check .tiles dd')].map((tile) => tile.innerText)").await;
    // Those of the first file whose number ends in 000 were rejected.
    assert_eq!(tiles, json!(["50,100", "49,901", "1"]));
    page.click("#check .result button.primary").await;
    page.click("#check .result .buttons button:nth-child(2)").await;
    let clear = page.downloaded("mailing.clear.csv").await;
    let suppressed = page.downloaded("mailing.suppressed.csv").await;
    assert!(
        clear.starts_with(
            "name;email\n\"a \"\"quoted\"\"\nname\";person0@example.com\n\"a \"\"quoted\"\"\nname\";person1@free.com\n"
        ),
        "{clear:.200}"
    );
    assert!(suppressed.starts_with("name;email;suppressed;reason;matched;error\n"), "{suppressed:.200}");
    assert!(suppressed.contains("person2@example.com;true;import;person2@example.com;\n"), "{suppressed:.400}");
    assert!(suppressed.ends_with("x;nobody;true;;;INVALID_EMAIL\n"), "{}", &suppressed[suppressed.len() - 100..]);
    assert_eq!((clear.matches("@").count(), suppressed.matches("person").count()), (50_100, 49_900 * 2));
    assert_clean(&page, &server).await;
}

#[tokio::test]
async fn a_list_of_json_is_split() {
    let Some(browser) = Browser::get() else { return };
    let server = TestServer::start().await;
    assert_eq!(server.post(r#"{"entries": [{"email": "a@example.com", "reason": "said \"no\""}]}"#).await.status(), 200);
    let dir = tempfile::tempdir().unwrap();
    let list = dir.path().join("list.ndjson");
    std::fs::write(
        &list,
        "{\"email\": \"a@example.com\", \"n\": 1}\n{\"suppressed\":true,\"email\": \"b@example.com\"}\n{\"n\": 2}\n",
    )
    .unwrap();
    let page = signed_in(browser, &server, &server.key).await;
    view(&page, "check").await;
    page.choose("#check-file", &[&list]).await;
    page.click("#check .result button.primary").await;
    page.click("#check .result .buttons button:nth-child(2)").await;
    assert_eq!(page.downloaded("list.clear.ndjson").await, "{\"suppressed\":true,\"email\": \"b@example.com\"}\n");
    let suppressed = page.downloaded("list.suppressed.ndjson").await;
    assert!(
        suppressed.starts_with("{\"email\": \"a@example.com\", \"n\": 1,\"suppressed\":true,\"reason\":\"said \\\"no\\\"\""),
        "{suppressed}"
    );
    assert!(
        suppressed.ends_with("{\"n\": 2,\"suppressed\":true,\"reason\":null,\"matched\":null,\"error\":\"INVALID_LINE\"}\n"),
        "{suppressed}"
    );
    assert_clean(&page, &server).await;
}

#[tokio::test]
async fn the_list_is_filtered_exported_and_entries_are_removed_once_confirmed() {
    let Some(browser) = Browser::get() else { return };
    let server = TestServer::start().await;
    let people = (0..60)
        .map(|n| json!({"email": format!("person{n:02}@example.com"), "reason": if n % 2 == 0 { "bounce" } else { "asked us" }}));
    let mut entries: Vec<_> = people.collect();
    entries.push(json!({"email": "badcompany.com", "type": "domain"}));
    assert_eq!(server.post(json!({ "entries": entries }).to_string()).await.status(), 200);
    let page = signed_in(browser, &server, &server.key).await;
    view(&page, "list").await;
    let status = |text: &str| format!("document.querySelector('#list-status').innerText === '{text}'");
    let shown = |text: &str| format!("document.querySelector('#list-page').innerText === '{text}'");
    page.wait(&status("61 entries")).await;
    page.click("#list-next").await;
    page.wait(&shown("26 to 50")).await;
    page.click("#list-next").await;
    page.wait(&shown("51 to 61")).await;
    page.click("#list-back").await;
    page.wait(&shown("26 to 50")).await;
    page.fill("#list-search", "PERSON0").await;
    page.press("Enter").await;
    page.wait(&status("10 entries")).await;
    page.fill("#list-reason", "asked us").await;
    page.press("Enter").await;
    page.wait(&status("5 entries")).await;
    page.click("#list-csv").await;
    let export = page.downloaded("dnc.csv").await;
    assert_eq!(export.matches("asked us").count(), 5);

    // Escape keeps what is selected.
    page.click("#list-rows tr:nth-child(1) input").await;
    page.click("#list-rows tr:nth-child(2) input").await;
    page.click("#list-remove").await;
    page.wait(
        "document.querySelector('#confirm').open && document.querySelector('#confirm-title').innerText === 'Remove 2 entries?'",
    )
    .await;
    page.press("Escape").await;
    page.wait("!document.querySelector('#confirm').open").await;
    assert_eq!(server.count().await, 61);
    page.click("#list-remove").await;
    page.click("#confirm-yes").await;
    page.wait(&status("2 entries removed; 3 left")).await;
    assert_eq!(server.count().await, 59);

    // What a filter selects is removed by whoever types its number.
    page.click("#list-remove-all").await;
    page.wait("document.querySelector('#confirm').open && document.querySelector('#confirm-yes').disabled").await;
    page.fill("#confirm-count", "3").await;
    page.click("#confirm-yes").await;
    page.wait(&status("3 entries removed; 0 left")).await;
    assert_eq!(server.count().await, 56);

    view(&page, "history").await;
    page.wait("document.querySelector('#history .result').innerText.includes('address contains person0')").await;
    view(&page, "summary").await;
    let rows = "[...document.querySelectorAll('#summary tbody tr')].map((row) => [...row.cells].slice(0, 3).map((cell) => cell.innerText))";
    page.wait("document.querySelector('#summary tbody tr')").await;
    assert_eq!(
        page.eval(rows).await,
        json!([["bounce", "Addresses", "30"], ["asked us", "Addresses", "25"], ["import", "Domains", "1"]])
    );
    page.click("#summary tbody tr:nth-child(3) button").await;
    page.wait(&status("1 entry")).await;
    assert_clean(&page, &server).await;
}

#[test]
fn the_page_offers_every_source_of_a_file() {
    let page = include_str!("../../../src/gateway/page/index.html");
    let start = page.find("<select id=\"import-from\">").unwrap();
    let offered: Vec<_> = page[start..]
        .split("</select>")
        .next()
        .unwrap()
        .split("value=\"")
        .skip(2)
        .map(|rest| rest.split('"').next().unwrap())
        .collect();
    assert_eq!(offered, dnc::files::Source::names().collect::<Vec<_>>());
}

/// The script of axe-core, which `.ci/outside` fetches.
fn axe() -> Option<String> {
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("target/outside/npm/node_modules/axe-core/axe.min.js");
    let script = std::fs::read_to_string(script).ok();
    if script.is_none() {
        let skipped = "SKIPPED: axe-core is not there; .ci/outside fetches it. The page is not checked for accessibility";
        let _ = writeln!(std::io::stderr(), "{skipped}");
    }
    script
}

#[tokio::test]
async fn every_view_is_accessible_and_fits_a_phone() {
    let Some(browser) = Browser::get() else { return };
    let axe = axe();
    let server = TestServer::start().await;
    let long = format!("{}@{}.example.com", "long".repeat(16), "label".repeat(12));
    let file = format!("email,type,reason\n{long},,{}\nnobody,,\nbadcompany.com,domain,complaint\n", "why ".repeat(15));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(format!("{}.csv", "name".repeat(20)));
    std::fs::write(&path, &file).unwrap();
    let delete = json!({"emails": ["nobody@example.com"]});
    let delete = http_client().delete(format!("{}/v1/dnc", server.http_url)).header("x-api-key", &server.key).json(&delete);
    assert_eq!(delete.send().await.unwrap().status(), 200);
    let page = browser.open(&server.http_url).await;
    for (width, scheme) in [(360, "light"), (1100, "dark")] {
        page.emulate(width, scheme).await;
        page.go(&server.http_url).await;
        if let Some(axe) = &axe {
            page.eval(&format!("{axe}; 0")).await;
        }
        let look = async |name: &str| {
            let widest = page.eval("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth)").await;
            assert!(widest.as_u64().unwrap() <= width.into(), "{name} is {widest} px wide of {width}");
            if axe.is_some() {
                let violations = page.eval("axe.run({ resultTypes: ['violations'] }).then(({ violations }) => violations)").await;
                assert_eq!(violations, json!([]), "{name}, {width} px, {scheme}");
            }
            page.screenshot(&format!("{name}-{width}-{scheme}")).await;
        };
        look("key").await;
        page.fill("#key", &server.key).await;
        page.press("Enter").await;
        view(&page, "import").await;
        look("import").await;
        page.choose("#import-file", &[&path]).await;
        page.wait("document.querySelector('#import .rejects')").await;
        look("preview").await;
        page.eval("document.querySelector('#import .result button.primary')?.click()").await;
        page.wait("document.querySelector('#import .result h3').innerText.includes('imported') || !document.querySelector('#import .primary')").await;
        look("imported").await;
        view(&page, "lookup").await;
        page.fill("#lookup-email", "somebody@mail.badcompany.com").await;
        page.press("Enter").await;
        page.wait("document.querySelector('#lookup-result dl')").await;
        look("lookup").await;
        view(&page, "list").await;
        page.click("#list-rows input").await;
        look("list").await;
        page.click("#list-remove-all").await;
        page.wait("document.querySelector('#confirm').open").await;
        look("confirm").await;
        page.press("Escape").await;
        view(&page, "check").await;
        page.choose("#check-file", &[&path]).await;
        page.wait("document.querySelector('#check .tiles')").await;
        look("check").await;
        view(&page, "summary").await;
        page.wait("document.querySelector('#summary tbody tr')").await;
        look("summary").await;
        view(&page, "history").await;
        page.wait("document.querySelectorAll('#history table').length === 2").await;
        look("history").await;
    }
    assert_clean(&page, &server).await;
}

#[tokio::test]
async fn the_page_is_used_by_keyboard_alone() {
    let Some(browser) = Browser::get() else { return };
    let server = TestServer::start().await;
    let page = signed_in(browser, &server, &server.key).await;
    page.wait("document.activeElement.id === 'lookup-email'").await;
    // From the top: the key, the views, and the first of each.
    page.eval("document.activeElement.blur()").await;
    let tab = async || {
        page.press("Tab").await;
        page.eval("document.activeElement.id || document.activeElement.innerText").await.as_str().unwrap_or_default().to_owned()
    };
    page.eval("document.querySelector('#forget').focus()").await;
    let mut order = Vec::new();
    for _ in 0..3 {
        order.push(tab().await);
    }
    assert_eq!(order, ["Look up", "The list", "Import"]);
    page.press("Enter").await;
    page.wait("document.activeElement.id === 'import-title'").await;
    assert_eq!(tab().await, "import-file");
    let ring = "getComputedStyle(document.activeElement.closest('.drop') ?? document.activeElement).outlineStyle";
    assert_eq!(page.eval(ring).await, "solid", "the focus is seen");
    assert_eq!(tab().await, "Type or paste addresses");
    page.press("Enter").await;
    assert_eq!(tab().await, "import-text");
    page.command("Input.insertText", json!({ "text": "typed@example.com" })).await;
    assert_eq!(tab().await, "Preview");
    page.press("Enter").await;
    page.wait("document.activeElement.innerText === 'pasted.csv'").await;
    assert!(tab().await.starts_with("Import 1 new entry"));
    page.press("Enter").await;
    page.wait("document.activeElement.innerText === '1 entry was imported'").await;
    assert_eq!(server.count().await, 1);
    assert_clean(&page, &server).await;
}
