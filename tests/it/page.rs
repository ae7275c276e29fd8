//! The page for people, in a browser.

use reqwest::StatusCode;
use serde_json::json;

use crate::harness::{
    TestServer,
    browser::{Browser, Page},
    http_client,
};

/// Opens the page, and enters a key.
async fn signed_in(browser: &std::sync::Arc<Browser>, server: &TestServer, key: &str) -> Page {
    let page = browser.open(&server.http_url).await;
    page.fill("#key", key).await;
    page.press("Enter").await;
    page
}

/// Asserts that the page asked nobody else for anything, broke no policy, and kept no key.
async fn assert_clean(page: &Page, server: &TestServer) {
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
    ] {
        let answer = get(path).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        let headers = answer.headers().clone();
        assert_eq!(headers["content-type"], content_type);
        assert_eq!(headers["cache-control"], "no-cache");
        assert_eq!(headers["referrer-policy"], "no-referrer");
        assert_eq!(headers["x-content-type-options"], "nosniff");
        let policy = headers.get("content-security-policy").map(|policy| policy.to_str().unwrap());
        assert_eq!(policy.is_some(), path == "/");
        if let Some(policy) = policy {
            assert!(policy.starts_with("default-src 'none';") && policy.contains("frame-ancestors 'none'"), "{policy}");
            assert!(!policy.contains("unsafe") && !policy.contains("http"), "{policy}");
            assert_eq!(headers["x-frame-options"], "DENY");
        }
        let length = answer.bytes().await.unwrap().len();
        assert!(length > 1000);

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
    assert_eq!(page.eval("document.querySelector('#app').checkVisibility()").await, false);

    page.fill("#key", &server.key).await;
    page.press("Enter").await;
    page.fill("#lookup-email", "Ann@Mail.BadCompany.com").await;
    page.press("Enter").await;
    let found = page.wait("document.querySelector('#lookup-result dl')?.innerText").await;
    let found = found.as_str().unwrap();
    for expected in ["badcompany.com", "complaint", "key_", "Domain"] {
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
    page.wait("document.querySelector('#key').value === '' && document.activeElement.id === 'key'").await;
    assert_eq!(page.eval("document.querySelector('#lookup-result').innerText").await, "");
}

#[tokio::test]
async fn a_platform_key_names_its_workspace() {
    let Some(browser) = Browser::get() else { return };
    let server = TestServer::start().await;
    let page = signed_in(browser, &server, &server.platform_key).await;
    page.wait("document.querySelector('#key-message').textContent.includes('X-Workspace-Id')").await;
    page.fill("#workspace", &server.workspace.to_string()).await;
    page.press("Enter").await;
    page.wait("document.querySelector('#session-text').checkVisibility()").await;
    let session = page.eval("document.querySelector('#session-text').innerText").await;
    assert_eq!(session, format!("Platform key, {}", server.workspace));
    assert_clean(&page, &server).await;
}

#[tokio::test]
async fn every_view_fits_a_phone() {
    let Some(browser) = Browser::get() else { return };
    let server = TestServer::start().await;
    let entries = json!({"entries": [{"email": "badcompany.com", "type": "domain", "reason": "complaint"}]});
    assert_eq!(server.post(entries.to_string()).await.status(), 200);
    let page = browser.open(&server.http_url).await;
    for (width, scheme) in [(360, "light"), (360, "dark"), (1100, "light"), (1100, "dark")] {
        page.emulate(width, scheme).await;
        page.go(&server.http_url).await;
        let look = async |view: &str| {
            let widest = page.eval("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)").await;
            assert!(widest.as_u64().unwrap() <= width.into(), "{view} is {widest} px wide of {width}");
            page.screenshot(&format!("{view}-{width}-{scheme}")).await;
        };
        look("key").await;
        page.fill("#key", &server.key).await;
        page.press("Enter").await;
        page.fill("#lookup-email", &format!("{}@mail.badcompany.com", "long".repeat(16))).await;
        page.press("Enter").await;
        page.wait("document.querySelector('#lookup-result dl')").await;
        look("lookup").await;
    }
    assert_clean(&page, &server).await;
}
