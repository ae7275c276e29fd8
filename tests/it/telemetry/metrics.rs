//! The metrics: what is counted, what must not be in them, and that the dashboard and the alerts
//! use none that does not exist.

use std::{collections::BTreeSet, fs, path::Path};

use dnc::proto::{CheckEntriesRequest, ListEntriesRequest, dnc_service_client::DncServiceClient};
use serde_json::json;
use tonic::Code;

use crate::{
    address_book::{email, numbered, request},
    harness::{Served, TestServer, http_client, until, with_key},
};

async fn scrape(server: &Served) -> String {
    let response = http_client().get(&server.metrics_url).send().await.unwrap();
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/plain; version=0.0.4"));
    response.text().await.unwrap()
}

/// The value of the series with this name and these labels, in any order.
fn value(text: &str, name: &str, labels: &[&str]) -> Option<f64> {
    text.lines().find_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let (its_name, its_labels) = series.split_once('{').unwrap_or((series, "}"));
        let its_labels: BTreeSet<_> = its_labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty()).collect();
        (its_name == name && its_labels == labels.iter().copied().collect()).then(|| value.parse().ok())?
    })
}

/// A server in a process of its own, since the metrics are those of a process, and calls of it of
/// many kinds.
async fn used() -> (TestServer, Served) {
    let tenants = TestServer::start().await;
    let program = Path::new(env!("CARGO_BIN_EXE_dnc"));
    // The database is no replica of itself, so the lag is not known, and shown as that.
    let flags = ["--metrics-addr", "127.0.0.1:0", "--read-database-url", &tenants.database_url];
    let served = Served::start(program, &flags, &tenants.database_url).await.unwrap();
    let mut client = DncServiceClient::connect(served.grpc_url.clone()).await.unwrap();
    let entries: Vec<_> = numbered(0..30).chain(numbered(0..10)).chain([email("nonsense")]).collect();
    client.import_entries(with_key(tokio_stream::iter([request(entries)]), &tenants.key)).await.unwrap();
    let check = || CheckEntriesRequest { emails: vec!["private@secret.example".into()] };
    client.check_entries(with_key(check(), &tenants.key)).await.unwrap();
    let refused = client.check_entries(with_key(check(), "sk_nonsense")).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    client.list_entries(with_key(ListEntriesRequest { page_size: -1, ..Default::default() }, &tenants.key)).await.unwrap_err();
    let mut unknown =
        tonic::client::Grpc::new(tonic::transport::Channel::from_shared(served.grpc_url.clone()).unwrap().connect_lazy());
    unknown.ready().await.unwrap();
    let path = "/dnc.v1.DncService/private@secret.example".parse().unwrap();
    let codec = tonic_prost::ProstCodec::<CheckEntriesRequest, CheckEntriesRequest>::default();
    unknown.unary(with_key(check(), &tenants.key), path, codec).await.unwrap_err();
    let http = |path: &str| format!("{}{path}", served.http_url);
    let import = http_client().post(http("/v1/dnc/import")).header("x-api-key", &tenants.key);
    import.json(&json!({"entries": [{"email": "private@secret.example"}]})).send().await.unwrap().text().await.unwrap();
    for path in ["/v1/dnc/check?email=private@secret.example", "/private@secret.example", "/readyz"] {
        http_client().get(http(path)).header("x-api-key", &tenants.key).send().await.unwrap().text().await.unwrap();
    }
    (tenants, served)
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_entries_and_levels_are_counted_and_nothing_private_is_shown() {
    let (tenants, served) = used().await;
    // A call is counted when its answer has been sent, a moment after it was received.
    until("the last request is counted", async || {
        let text = scrape(&served).await;
        value(&text, "dnc_http_requests_total", &[r#"method="GET""#, r#"route="/readyz""#, r#"status="200""#]) == Some(1.0)
            && value(&text, "dnc_calls_open", &[r#"method="CheckEntries""#]) == Some(0.0)
            && value(&text, "dnc_calls_total", &[r#"method="unknown""#, r#"code="UNIMPLEMENTED""#]) == Some(1.0)
    })
    .await;
    let text = scrape(&served).await;
    for (expected, name, labels) in [
        (2.0, "dnc_calls_total", &[r#"method="ImportEntries""#, r#"code="OK""#][..]),
        (2.0, "dnc_calls_total", &[r#"method="CheckEntries""#, r#"code="OK""#]),
        (1.0, "dnc_calls_total", &[r#"method="CheckEntries""#, r#"code="UNAUTHENTICATED""#]),
        (1.0, "dnc_calls_total", &[r#"method="ListEntries""#, r#"code="INVALID_ARGUMENT""#]),
        (2.0, "dnc_call_duration_seconds_count", &[r#"method="ImportEntries""#]),
        (31.0, "dnc_entries_total", &[r#"outcome="imported""#]),
        (10.0, "dnc_entries_total", &[r#"outcome="skipped""#]),
        (1.0, "dnc_entries_total", &[r#"outcome="failed""#]),
        (41.0, "dnc_batch_entries_sum", &[]),
        (2.0, "dnc_batch_duration_seconds_count", &[]),
        (1.0, "dnc_http_requests_total", &[r#"method="POST""#, r#"route="/v1/dnc/import""#, r#"status="200""#]),
        (1.0, "dnc_http_requests_total", &[r#"method="GET""#, r#"route="unmatched""#, r#"status="404""#]),
        (1.0, "dnc_database_up", &[]),
        (f64::INFINITY, "dnc_replica_lag_seconds", &[]),
        (0.0, "dnc_list_reads_total", &[r#"database="replica""#]),
        (15.0, "dnc_database_connections_max", &[]),
        (0.0, "dnc_work_bytes", &[]),
        (f64::from(96 << 20), "dnc_work_bytes_max", &[]),
        (1.0, "dnc_build_info", &[concat!("version=\"", env!("CARGO_PKG_VERSION"), "\"")]),
    ] {
        assert_eq!(value(&text, name, labels), Some(expected), "{name} {labels:?}\n{text}");
    }
    let open = value(&text, "dnc_connections_open", &[r#"listener="grpc""#]).unwrap();
    assert!(open >= 0.0 && value(&text, "dnc_connections_max", &[r#"listener="grpc""#]).unwrap() > open);
    for private in ["secret", "private", "@", "sk_", "ours", "theirs", &tenants.key, &tenants.workspace.to_string()] {
        assert!(!text.contains(private), "{private}\n{text}");
    }
}

/// The metrics that a text names. A histogram is named by the parts of it.
fn named(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c: char| !is_part(c)).filter(|word| word.starts_with("dnc_"));
    words.map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_of_the_dashboard_and_the_alerts_exists() {
    let (_tenants, served) = used().await;
    let text = scrape(&served).await;
    let exist: BTreeSet<_> =
        text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split(['{', ' ']).next()).collect();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for file in ["deploy/grafana/dnc.json", "deploy/prometheus/rules.yml"] {
        let content = fs::read_to_string(root.join(file)).unwrap();
        let names = named(&content);
        assert!(names.len() > 8, "{file}: {names:?}");
        for name in names {
            assert!(exist.contains(name.as_str()), "{file} names {name}, which is not in\n{text}");
        }
    }
    let dashboard = fs::read_to_string(root.join("deploy/grafana/dnc.json")).unwrap();
    serde_json::from_str::<serde_json::Value>(&dashboard).unwrap();
    // Each alert is explained, and no other one.
    let rules = fs::read_to_string(root.join("deploy/prometheus/rules.yml")).unwrap();
    let alerts: BTreeSet<_> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    let docs = fs::read_to_string(root.join("docs/operations.md")).unwrap();
    let rows = docs.lines().filter_map(|line| line.strip_prefix("| `Dnc").and(line.split('`').nth(1)));
    assert_eq!(alerts, rows.collect());
}

#[tokio::test]
async fn a_connection_without_work_is_idle() {
    let server = TestServer::start().await;
    server.store.list_keys().await.unwrap();
    let levels = server.store.levels();
    assert_eq!((levels.busy, levels.idle, levels.max, levels.is_up), (0, 1, 3, true));
}
