//! Random operations of every kind, against a model in memory.

use std::collections::BTreeMap;

use dnc::{
    domain::WorkspaceId,
    proto::{CheckEntriesRequest, DeleteEntriesRequest, Entry, EntryFilter, ExportEntriesRequest, SummarizeEntriesRequest},
};
use proptest::prelude::Rng;

use super::list::pages;
use crate::{
    address_book::{domain, email, request},
    harness::{TestServer, with_key},
};

const LONG_AGO: prost_types::Timestamp = prost_types::Timestamp { seconds: 946_684_800, nanos: 0 };

const FAR_AWAY: prost_types::Timestamp = prost_types::Timestamp { seconds: 32_503_680_000, nanos: 0 };

/// Runs seeded random operations on two workspaces, and compares each answer with a model.
#[tokio::test]
async fn random_operations_agree_with_a_model() {
    use proptest::test_runner::{RngAlgorithm, TestRng};

    let seed: u64 = std::env::var("DNC_TEST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos().into());
    println!("DNC_TEST_SEED={seed} repeats this run");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let mut random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut below = |limit: u32| random.next_u32() % limit;

    let server = TestServer::start().await;
    let mut client = server.client().await;
    let keys = [server.key.clone(), server.other_key.clone()];
    let ids = [server.workspace, server.other_workspace];
    let mut models: [BTreeMap<String, String>; 2] = Default::default();
    let reasons = ["bounce", "complaint", "Manual"];
    let name = |number: u32| match number % 4 {
        0 => format!("d{}.example.com", number % 12),
        1 => format!("example{}.org", number % 5),
        _ => format!("u{}@d{}.example.com", number % 40, number % 12),
    };
    let covers = |model: &BTreeMap<String, String>, address: &str| -> Option<String> {
        let domain = address.rsplit_once('@').map_or(address, |(_, domain)| domain);
        let labels: Vec<&str> = domain.split('.').collect();
        let domains = (0..labels.len() - 1).map(|from| labels[from..].join("."));
        std::iter::once(address.to_owned()).chain(domains).find(|cover| model.contains_key(cover))
    };
    for step in 0..400 {
        let at = below(2) as usize;
        let (key, model) = (&keys[at], &mut models[at]);
        let reason = reasons[below(3) as usize];
        let filter = EntryFilter {
            r#type: below(3).cast_signed(),
            reason: if below(2) == 0 { reason.to_owned() } else { String::new() },
            search: ["", "U1", "example", "d1.", "%", "_"][below(6) as usize].to_owned(),
            // All entries are stored today.
            create_time_from: [None, Some(LONG_AGO), Some(FAR_AWAY)][below(8).saturating_sub(5) as usize],
            create_time_to: [None, Some(FAR_AWAY), Some(LONG_AGO)][below(8).saturating_sub(5) as usize],
        };
        let is_today = filter.create_time_from != Some(FAR_AWAY) && filter.create_time_to != Some(LONG_AGO);
        let selects = |address: &str, reason: &str| {
            let of_type = match filter.r#type {
                1 => address.contains('@'),
                2 => !address.contains('@'),
                _ => true,
            };
            is_today
                && of_type
                && (filter.reason.is_empty() || filter.reason == reason)
                && address.contains(&filter.search.to_lowercase())
        };
        let selected: Vec<String> = model.iter().filter(|(a, r)| selects(a, r)).map(|(a, _)| a.clone()).collect();
        match below(10) {
            0..4 => {
                let names: Vec<String> = (0..below(20)).map(|_| name(below(1_000))).collect();
                let entry =
                    |name: &String| Entry { reason: reason.into(), ..if name.contains('@') { email(name) } else { domain(name) } };
                let call = with_key(tokio_stream::iter([request(names.iter().map(entry).collect())]), key);
                let answer = client.import_entries(call).await.unwrap().into_inner();
                let mut imported = 0;
                for name in names {
                    imported += u64::from(!model.contains_key(&name));
                    model.entry(name).or_insert_with(|| reason.to_owned());
                }
                assert_eq!(answer.imported, imported, "seed {seed}, step {step}");
            }
            4..6 => {
                let names: Vec<String> = (0..30).map(|_| name(below(1_000))).collect();
                let call = with_key(CheckEntriesRequest { emails: names.clone() }, key);
                for (name, result) in names.iter().zip(client.check_entries(call).await.unwrap().into_inner().results) {
                    let expected = covers(model, name);
                    assert_eq!(result.suppressed, expected.is_some(), "seed {seed}, step {step}: {name}");
                    assert_eq!(result.entry.map(|entry| entry.email), expected, "seed {seed}, step {step}");
                }
            }
            6 => {
                let (seen, totals) = pages(&mut client, key, &filter, 1 + below(9).cast_signed()).await;
                assert_eq!(seen, selected, "seed {seed}, step {step}: {filter:?}");
                assert!(totals.iter().all(|total| *total == selected.len() as i64), "seed {seed}, step {step}");
            }
            7 => {
                let call = with_key(ExportEntriesRequest { filter: Some(filter.clone()) }, key);
                let mut messages = client.export_entries(call).await.unwrap().into_inner();
                let mut seen = Vec::new();
                while let Some(message) = messages.message().await.unwrap() {
                    seen.extend(message.entries.into_iter().map(|entry| entry.email));
                }
                assert_eq!(seen, selected, "seed {seed}, step {step}: {filter:?}");
            }
            8 => {
                let validate_only = below(2) == 0;
                let (message, gone) = if below(4) == 0 {
                    (DeleteEntriesRequest { filter: Some(filter.clone()), all: true, ..Default::default() }, selected.clone())
                } else {
                    let names: Vec<String> = (0..10).map(|_| name(below(1_000))).collect();
                    let gone = model.keys().filter(|address| names.contains(address)).cloned().collect();
                    (DeleteEntriesRequest { emails: names, ..Default::default() }, gone)
                };
                let call = with_key(DeleteEntriesRequest { validate_only, ..message }, key);
                let deleted = client.delete_entries(call).await.unwrap().into_inner().deleted;
                assert_eq!(deleted, gone.len() as i64, "seed {seed}, step {step}");
                if !validate_only {
                    model.retain(|address, _| !gone.contains(address));
                }
            }
            _ => {
                let answer = client.summarize_entries(with_key(SummarizeEntriesRequest {}, key)).await.unwrap().into_inner();
                let mut expected: BTreeMap<(i32, String), i64> = BTreeMap::new();
                for (address, reason) in model.iter() {
                    *expected.entry((if address.contains('@') { 1 } else { 2 }, reason.clone())).or_default() += 1;
                }
                let seen: BTreeMap<_, _> = answer.reasons.into_iter().map(|row| ((row.r#type, row.reason), row.count)).collect();
                assert_eq!(seen, expected, "seed {seed}, step {step}");
                assert_eq!(answer.total, model.len() as i64, "seed {seed}, step {step}");
            }
        }
    }
    for (id, model) in ids.iter().zip(&models) {
        let rows: BTreeMap<_, _> = server.rows(WorkspaceId(id.0)).await.into_iter().map(|row| (row.0, row.1)).collect();
        assert_eq!(&rows, model, "seed {seed}");
    }
}
