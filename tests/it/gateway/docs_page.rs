//! The interactive documentation at `/docs`, in a browser.

use crate::{
    gateway::page::assert_clean,
    harness::{
        TestServer,
        browser::{Browser, Page},
        http_client,
    },
};

/// Enters a key, in place of the one before.
async fn authorize(page: &Page, key: &str) {
    page.click(".auth-wrapper .authorize").await;
    page.wait("document.querySelector('.modal-ux') !== null").await;
    if page.eval("document.querySelector('#api_key_value') === null").await == true {
        // The first dialog of the two that are shown is that of `X-Api-Key`.
        page.click(".auth-container .auth-btn-wrapper button:first-child").await;
    }
    page.fill("#api_key_value", key).await;
    page.click(".auth-container .auth-btn-wrapper .authorize").await;
    page.click(".modal-ux .close-modal").await;
}

/// Sends the request that is filled in, and returns the status and the text of the answer.
async fn execute(page: &Page) -> (String, String) {
    page.eval("document.querySelector('.btn-clear')?.click()").await;
    page.wait("document.querySelector('.live-responses-table') === null").await;
    page.click(".opblock-body .execute").await;
    let status = page.wait("document.querySelector('.live-responses-table .response .response-col_status')?.innerText").await;
    let body = page.wait("document.querySelector('.live-responses-table .highlight-code')?.innerText").await;
    (status.as_str().unwrap().trim().to_owned(), body.as_str().unwrap().to_owned())
}

#[tokio::test]
async fn the_documented_request_is_sent_from_the_page() {
    let Some(browser) = Browser::get() else { return };
    let server = TestServer::start().await;
    let page = browser.open(&format!("{}/docs", server.http_url)).await;
    authorize(&page, &server.key).await;
    page.click("#operations-Import-importEntries .opblock-summary-control").await;
    page.click("#operations-Import-importEntries .try-out__btn").await;
    let (status, body) = execute(&page).await;
    assert!(status.starts_with("200"), "{status} {body}");
    assert!(body.contains("\"imported\": 3") && body.contains("\"skipped\": 0"), "{body}");
    page.screenshot("docs").await;
    assert_eq!(server.count().await, 3);
    let (_, body) = execute(&page).await;
    assert!(body.contains("\"imported\": 0") && body.contains("\"skipped\": 3"), "{body}");

    authorize(&page, "sk_nonsense").await;
    let (status, body) = execute(&page).await;
    assert!(status.starts_with("401"), "{status} {body}");
    assert!(body.contains("The API key is not valid"), "{body}");
    assert_clean(&page, &server).await;

    // The page forgets the key with its end.
    page.go(&format!("{}/docs", server.http_url)).await;
    page.click("#operations-Import-importEntries .opblock-summary-control").await;
    page.click("#operations-Import-importEntries .try-out__btn").await;
    let (status, _) = execute(&page).await;
    assert!(status.starts_with("401"), "{status}");
}

#[tokio::test]
async fn a_large_file_is_sent_compressed_to_those_who_take_it_so() {
    let server = TestServer::start().await;
    for (path, content_type) in
        [("/docs/swagger-ui-bundle.js", "text/javascript; charset=utf-8"), ("/docs/swagger-ui.css", "text/css; charset=utf-8")]
    {
        let get = |accepts: Option<&str>| {
            let request = http_client().get(format!("{}{path}", server.http_url));
            accepts.into_iter().fold(request, |request, accepts| request.header("accept-encoding", accepts)).send()
        };
        let plain = get(None).await.unwrap();
        assert_eq!(plain.headers()["content-type"], content_type);
        assert_eq!(plain.headers()["vary"], "accept-encoding");
        assert!(!plain.headers().contains_key("content-encoding"));
        let tag = plain.headers()["etag"].clone();
        let plain = plain.bytes().await.unwrap();
        for (accepts, is_gzip) in
            [("br, GZIP", true), ("gzip;q=0.5", true), ("gzip;q=0", false), ("gzip; q=0.0", false), ("br", false)]
        {
            let answer = get(Some(accepts)).await.unwrap();
            assert_eq!(answer.headers().contains_key("content-encoding"), is_gzip, "{accepts}");
            assert_eq!(answer.headers()["etag"] != tag, is_gzip, "each form has its own tag");
            let bytes = answer.bytes().await.unwrap();
            if is_gzip {
                let mut decompressed = Vec::new();
                std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&bytes[..]), &mut decompressed).unwrap();
                assert_eq!(decompressed, plain);
            } else {
                assert_eq!(bytes, plain);
            }
        }
    }
}
