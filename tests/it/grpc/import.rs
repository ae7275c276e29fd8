//! `ImportEntries`: the counts, the reported errors, and that no entry is lost or stored twice.

use std::collections::HashSet;

use dnc::proto::{
    CheckEntriesRequest, Entry, ImportEntriesRequest, ImportEntriesResponse, ImportOptions, ListEntriesRequest, UnreadableEntry,
    dnc_service_client::DncServiceClient,
};
use futures_util::stream;
use prost_types::Timestamp;
use tokio::task::JoinSet;
use tonic::Code;
use tonic_types::StatusExt;

use crate::{
    address_book::{domain, email, numbered, request, with_options},
    harness::{PASS_FOR_CITUS, TestServer, http_client, until, with_key},
};

fn counts(answer: &ImportEntriesResponse) -> (u64, u64, u64) {
    (answer.imported, answer.skipped, answer.failed)
}

#[tokio::test]
async fn an_empty_stream_answers_three_zeros() {
    let server = TestServer::start().await;
    assert_eq!(counts(&server.import(vec![]).await.unwrap()), (0, 0, 0));
    assert_eq!(counts(&server.import(vec![request(vec![]), request(vec![])]).await.unwrap()), (0, 0, 0));
}

#[tokio::test]
async fn a_rejected_entry_is_reported_by_its_index_and_stops_no_other() {
    let server = TestServer::start().await;
    let bad_type = Entry { r#type: 7, ..email("a@example.com") };
    let bad_reason = Entry { reason: "x".repeat(65), ..email("b@example.com") };
    let answer = server
        .import(vec![
            request(vec![email("Good@Example.com"), email("bad"), domain("co.uk")]),
            request(vec![]),
            request(vec![bad_type, domain("@BadCompany.com"), bad_reason, domain("10.0.0.1")]),
        ])
        .await
        .unwrap();
    assert_eq!(counts(&answer), (2, 0, 5));
    let errors: Vec<_> = answer.errors.iter().map(|error| (error.index, error.field.as_str(), error.code.as_str())).collect();
    assert_eq!(
        errors,
        [
            (1, "email", "INVALID_EMAIL"),
            (2, "email", "PUBLIC_SUFFIX"),
            (3, "type", "INVALID_TYPE"),
            (5, "reason", "INVALID_REASON"),
            (6, "email", "INVALID_DOMAIN"),
        ]
    );
    assert!(answer.errors.iter().all(|error| !error.message.contains("bad") && !error.message.contains("co.uk")));
    let rows = server.rows(server.workspace).await;
    assert_eq!(rows.iter().map(|row| row.0.as_str()).collect::<Vec<_>>(), ["badcompany.com", "good@example.com"]);
}

#[tokio::test]
async fn unreadable_entries_are_counted_at_their_positions() {
    let server = TestServer::start().await;
    let unreadable = |position, line, code: &str| UnreadableEntry {
        position,
        line,
        field: "email".into(),
        code: code.into(),
        message: "The line is no entry.".into(),
    };
    let at_line = |line, entry| Entry { line, ..entry };
    let options = Some(ImportOptions { request_id: "file".into(), ..ImportOptions::default() });
    let messages = vec![
        ImportEntriesRequest { unreadable: vec![unreadable(0, 1, "INVALID_LINE")], options, ..ImportEntriesRequest::default() },
        ImportEntriesRequest {
            entries: vec![at_line(2, email("a@example.com")), at_line(4, email("bad"))],
            unreadable: vec![unreadable(1, 3, "LINE_TOO_LONG"), unreadable(2, 5, "INVALID_LINE")],
            ..ImportEntriesRequest::default()
        },
    ];
    let answer = server.import(messages.clone()).await.unwrap();
    assert_eq!(counts(&answer), (1, 0, 4));
    let errors: Vec<_> = answer.errors.iter().map(|error| (error.index, error.line, error.code.as_str())).collect();
    assert_eq!(errors, [(0, 1, "INVALID_LINE"), (2, 3, "LINE_TOO_LONG"), (3, 4, "INVALID_EMAIL"), (4, 5, "INVALID_LINE")]);
    assert_eq!(answer.errors[0].message, "The line is no entry.");
    assert_eq!(server.import(messages.clone()).await.unwrap(), answer, "a repeat gets the same answer");
    let mut other = messages.clone();
    other[0].unreadable[0].code = "LINE_TOO_LONG".into();
    assert_eq!(server.import(other).await.unwrap_err().code(), Code::FailedPrecondition);
    let mut wrong = messages;
    wrong[0].options = None;
    wrong[1].unreadable[0].position = 3;
    let refused = server.import(wrong).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let field = refused.get_details_bad_request().unwrap().field_violations.remove(0).field;
    assert_eq!(field, "unreadable[0].position");
}

#[tokio::test]
async fn the_time_of_an_opt_out_is_kept_as_given() {
    let server = TestServer::start().await;
    let at = |seconds| Some(Timestamp { seconds, nanos: 123_456_000 });
    let entries = vec![
        Entry { unsubscribe_time: at(1_000_000_000), ..email("a@example.com") },
        email("b@example.com"),
        Entry { unsubscribe_time: at(-1_000), ..domain("c.com") },
        Entry { unsubscribe_time: at(32_503_680_000), ..email("future@example.com") },
        Entry { unsubscribe_time: at(i64::MAX), ..email("never@example.com") },
    ];
    let answer = server.import(vec![request(entries)]).await.unwrap();
    assert_eq!(counts(&answer), (3, 0, 2));
    let errors: Vec<_> = answer.errors.iter().map(|error| (error.index, error.field.as_str(), error.code.as_str())).collect();
    assert_eq!(errors, [(3, "unsubscribe_time", "INVALID_TIME"), (4, "unsubscribe_time", "INVALID_TIME")]);
    // A later import does not change a stored entry, nor its time.
    let later = Entry { unsubscribe_time: at(1_200_000_000), ..email("a@example.com") };
    let again = Entry { unsubscribe_time: at(1_200_000_000), ..email("b@example.com") };
    assert_eq!(counts(&server.import(vec![request(vec![later, again])]).await.unwrap()), (0, 2, 0));
    let mut client = server.client().await;
    let list = client.list_entries(with_key(ListEntriesRequest::default(), &server.key)).await.unwrap().into_inner();
    let [a, b, c] = list.entries.as_slice() else { panic!("{list:?}") };
    assert_eq!((a.unsubscribe_time, c.unsubscribe_time), (at(1_000_000_000), at(-1_000)));
    assert_eq!(b.unsubscribe_time, b.create_time);
    let check = CheckEntriesRequest { emails: vec!["a@example.com".into()] };
    let checked = client.check_entries(with_key(check, &server.key)).await.unwrap().into_inner();
    assert_eq!(checked.results[0].entry.as_ref(), Some(a));
    let page = http_client().get(format!("{}/v1/dnc", server.http_url)).header("x-api-key", &server.key);
    let page: serde_json::Value = page.send().await.unwrap().json().await.unwrap();
    assert_eq!(page["data"][0]["unsubscribedAt"], "2001-09-09T01:46:40.123Z");
    assert_eq!(page["data"][1]["unsubscribedAt"], page["data"][1]["createdAt"]);
}

#[tokio::test]
async fn a_stored_entry_is_left_as_it_is() {
    let server = TestServer::start().await;
    let first = Entry { reason: "complaint".into(), ..email("a@example.com") };
    let repeated = Entry { reason: "manual".into(), ..email("A@EXAMPLE.COM") };
    let answer = server.import(vec![request(vec![first, repeated.clone()])]).await.unwrap();
    assert_eq!(counts(&answer), (1, 1, 0));
    let answer = server.import(vec![request(vec![repeated])]).await.unwrap();
    assert_eq!(counts(&answer), (0, 1, 0));
    assert_eq!(server.rows(server.workspace).await[0].1, "complaint");
}

#[tokio::test]
async fn an_entry_without_a_reason_gets_the_default_of_the_call() {
    let server = TestServer::start().await;
    server.import(vec![request(vec![email("a@example.com")])]).await.unwrap();
    let options = ImportOptions { default_reason: " Asked us by phone ".into(), ..ImportOptions::default() };
    let own = Entry { reason: "Whatever They Said".into(), ..email("c@example.com") };
    server.import(vec![with_options(vec![email("b@example.com"), own], options)]).await.unwrap();
    // Only the options of the first message are used.
    let late = ImportOptions { default_reason: "late".into(), validate_only: true, ..ImportOptions::default() };
    server.import(vec![request(vec![]), with_options(vec![email("d@example.com")], late)]).await.unwrap();
    let reasons: Vec<_> = server.rows(server.workspace).await.into_iter().map(|row| row.1).collect();
    assert_eq!(reasons, ["import", "Asked us by phone", "Whatever They Said", "import"]);

    let options = ImportOptions { default_reason: "x".repeat(65), ..ImportOptions::default() };
    let status = server.import(vec![with_options(vec![email("e@example.com")], options)]).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].field, "options.default_reason");
}

#[tokio::test]
async fn validate_only_stores_nothing_and_answers_what_would_have_happened() {
    let server = TestServer::start().await;
    server.import(vec![request(numbered(0..100).collect())]).await.unwrap();
    let dry = ImportOptions { validate_only: true, ..ImportOptions::default() };
    let mut small: Vec<_> = numbered(50..150).collect();
    small.extend([email("USER0000149@example2.com"), email("bad")]);
    let answer = server.import(vec![with_options(small, dry.clone())]).await.unwrap();
    assert_eq!(counts(&answer), (50, 51, 1));
    // The same over several batches, with repeats in different batches.
    let mut requests: Vec<_> =
        numbered(0..50_000).collect::<Vec<_>>().chunks(10_000).map(|chunk| request(chunk.to_vec())).collect();
    requests.push(request(numbered(0..10_000).collect()));
    requests[0].options = Some(dry);
    let answer = server.import(requests).await.unwrap();
    assert_eq!(counts(&answer), (49_900, 10_100, 0));
    assert_eq!(server.count().await, 100);
}

#[tokio::test]
async fn a_long_stream_in_many_batches_counts_exactly_and_is_logged_once() {
    let server = TestServer::start().await;
    let requests = |upto: u32| -> Vec<ImportEntriesRequest> {
        numbered(0..upto).collect::<Vec<_>>().chunks(7_001).map(|chunk| request([chunk, &[email("bad")]].concat())).collect()
    };
    let messages = requests(150_000).len() as u64;
    assert_eq!(counts(&server.import(requests(150_000)).await.unwrap()), (150_000, 0, messages));
    assert_eq!(counts(&server.import(requests(160_000)).await.unwrap()).0, 10_000);
    assert_eq!(server.count().await, 160_000);
    let logged: Vec<(i64, i64, i64, bool)> = sqlx::query_as(
        "SELECT imported, skipped, failed, finished_at IS NOT NULL FROM imports WHERE workspace_id = $1 ORDER BY id",
    )
    .bind(server.workspace.0)
    .fetch_all(&mut server.connection().await)
    .await
    .unwrap();
    assert_eq!(logged.len(), 2);
    assert_eq!(logged[0], (150_000, 0, messages as i64, true));
    assert_eq!((logged[1].0, logged[1].1, logged[1].3), (10_000, 150_000, true));
}

#[tokio::test]
async fn counts_are_exact_where_citus_is_installed() {
    let server = TestServer::start().await;
    sqlx::raw_sql(PASS_FOR_CITUS).execute(&mut server.connection().await).await.unwrap();
    let first = server.import(vec![request(numbered(0..5).collect())]).await.unwrap();
    assert_eq!(counts(&first), (5, 0, 0));
    let known = Some(Timestamp { seconds: 1_000_000_000, nanos: 0 });
    let later = numbered(3..10).map(|entry| Entry { unsubscribe_time: known, ..entry });
    let second = server.import(vec![request(later.chain(numbered(9..12)).collect())]).await.unwrap();
    assert_eq!(counts(&second), (7, 3, 0));
    assert_eq!(server.count().await, 12);
    let listed =
        server.client().await.list_entries(with_key(ListEntriesRequest::default(), &server.key)).await.unwrap().into_inner();
    assert_eq!(listed.total_size, 12);
    assert_eq!(listed.entries.iter().filter(|entry| entry.unsubscribe_time == known).count(), 5);
}

#[tokio::test]
async fn only_the_first_ten_thousand_errors_are_described() {
    let server = TestServer::start().await;
    let requests = (0..3).map(|_| request((0..4_000).map(|_| email("bad")).collect())).collect();
    let answer = server.import(requests).await.unwrap();
    assert_eq!((answer.failed, answer.errors.len(), answer.errors[9_999].index), (12_000, 10_000, 9_999));
}

#[tokio::test]
async fn sixteen_overlapping_imports_in_opposite_orders_store_each_address_once() {
    const ADDRESSES: u32 = 30_000;
    let server = TestServer::start().await;
    let mut imports = JoinSet::new();
    for number in 0..16 {
        let mut client = DncServiceClient::connect(server.grpc_url.clone()).await.unwrap();
        let mut entries: Vec<_> = numbered(0..ADDRESSES).collect();
        if number % 2 == 1 {
            entries.reverse();
        }
        entries.rotate_left(number * 1_000);
        let requests: Vec<_> = entries.chunks(2_500).map(|chunk| request(chunk.to_vec())).collect();
        let call = with_key(tokio_stream::iter(requests), &server.key);
        imports.spawn(async move { client.import_entries(call).await.map(tonic::Response::into_inner) });
    }
    let answers: Vec<_> = imports.join_all().await.into_iter().map(|answer| answer.expect("no dead-lock, no time-out")).collect();
    assert!(answers.iter().all(|answer| answer.imported + answer.skipped == u64::from(ADDRESSES)));
    assert_eq!(answers.iter().map(|answer| answer.imported).sum::<u64>(), u64::from(ADDRESSES));
    assert_eq!(server.count().await, i64::from(ADDRESSES));
}

#[tokio::test]
async fn a_message_that_is_too_large_is_refused_with_the_counts_so_far() {
    let server = TestServer::start().await;
    let large = request(vec![email("x".repeat(5 << 20))]);
    let requests = vec![request(numbered(0..25_000).collect()), large];
    let status = server.import(requests).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert_eq!(status.get_details_error_info().unwrap().metadata["imported"], "20000");
    assert_eq!(server.count().await, 20_000, "the complete batch stays");
    let logged: (i64, i64, bool) = sqlx::query_as("SELECT imported, skipped, finished_at IS NULL FROM imports")
        .fetch_one(&mut server.connection().await)
        .await
        .unwrap();
    assert_eq!(logged, (20_000, 0, true), "the log has all batches, and no end");
}

#[tokio::test]
async fn an_import_whose_caller_is_gone_leaves_complete_batches_only() {
    let server = TestServer::start().await;
    let (send, messages) = tokio::sync::mpsc::channel(1);
    let mut client = server.client().await;
    let call = with_key(
        stream::unfold(messages, |mut messages| async move { messages.recv().await.map(|message| (message, messages)) }),
        &server.key,
    );
    let running = tokio::spawn(async move { client.import_entries(call).await });
    send.send(request(numbered(0..30_000).collect())).await.unwrap();
    until("the complete batches are stored", || async { server.count().await >= 20_000 }).await;
    running.abort();
    let _ = running.await;
    assert_eq!(server.count().await, 20_000);
    let answer = server.import(vec![request(numbered(0..30_000).collect())]).await.unwrap();
    assert_eq!(counts(&answer), (10_000, 20_000, 0));
}

#[tokio::test]
async fn an_idle_stream_is_ended() {
    let server = TestServer::start_with(&["--stream-idle-timeout-secs", "1"], &crate::harness::database().await).await;
    let call = with_key(tokio_stream::pending(), &server.key);
    let status = server.client().await.import_entries(call).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
}

#[tokio::test]
async fn reflection_and_health_answer_without_a_key() {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    use tonic_reflection::pb::{v1, v1alpha};

    let server = TestServer::start().await;
    for service in ["", "dnc.v1.DncService"] {
        let request = HealthCheckRequest { service: service.into() };
        let answer = HealthClient::new(server.channel().await).check(request).await.unwrap();
        assert_eq!(answer.into_inner().status, 1);
    }
    let list = v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(String::new())),
    };
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(server.channel().await);
    let mut answers = client.server_reflection_info(tokio_stream::iter([list])).await.unwrap().into_inner();
    let Some(v1::server_reflection_response::MessageResponse::ListServicesResponse(list)) =
        answers.message().await.unwrap().unwrap().message_response
    else {
        panic!("not a list")
    };
    let names: HashSet<_> = list.service.into_iter().map(|service| service.name).collect();
    assert!(names.contains("dnc.v1.DncService") && names.contains("grpc.health.v1.Health"), "{names:?}");
    let symbol = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1alpha::server_reflection_request::MessageRequest::FileContainingSymbol("dnc.v1.DncService".into())),
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(server.channel().await);
    let mut answers = client.server_reflection_info(tokio_stream::iter([symbol])).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    assert!(matches!(answer, v1alpha::server_reflection_response::MessageResponse::FileDescriptorResponse(_)), "{answer:?}");
}

#[tokio::test]
async fn the_log_has_one_row_for_each_import_with_its_counts() {
    let server = TestServer::start().await;
    // Several batches, with rejected entries between and after them.
    let entries: Vec<Entry> = numbered(0..65_000)
        .enumerate()
        .flat_map(|(index, entry)| if index % 9_000 == 0 { vec![entry, email("bad")] } else { vec![entry] })
        .chain([email("bad")])
        .collect();
    let requests: Vec<_> = entries.chunks(5_000).map(|chunk| request(chunk.to_vec())).collect();
    for _ in 0..2 {
        server.import(requests.clone()).await.unwrap();
    }
    let broken = [requests, vec![request(vec![email("x".repeat(5 << 20))])]].concat();
    assert!(server.import(broken).await.is_err());
    let log = "SELECT imported, skipped, failed, finished_at IS NOT NULL FROM imports WHERE workspace_id = $1 ORDER BY id";
    let log: Vec<(i64, i64, i64, bool)> =
        sqlx::query_as(log).bind(server.workspace.0).fetch_all(&mut server.connection().await).await.unwrap();
    assert_eq!(log[..2], [(65_000, 0, 9, true), (0, 65_000, 9, true)]);
    // The aborted import is logged with its complete batches and without an end.
    assert_eq!((log[2].0, log[2].3), (0, false));
    assert!(log[2].1 >= 50_000, "{log:?}");
}

#[tokio::test]
async fn an_import_whose_caller_is_gone_is_logged_as_not_finished() {
    let server = TestServer::start().await;
    let (send, running) = server.begin_import(&server.key).await;
    send.send(request(numbered(0..25_000).collect())).await.unwrap();
    until("two batches are stored", || async { server.count().await == 20_000 }).await;
    running.abort();
    let log: Vec<(i64, bool)> = sqlx::query_as("SELECT imported, finished_at IS NOT NULL FROM imports")
        .fetch_all(&mut server.connection().await)
        .await
        .unwrap();
    assert_eq!(log, [(10_000, false)], "the counts of its first batch");
}

#[tokio::test]
async fn an_idempotency_key_is_valid_only_for_the_same_entries() {
    let server = TestServer::start().await;
    let options = |request_id: &str| Some(ImportOptions { request_id: request_id.to_owned(), ..ImportOptions::default() });
    let with_id =
        |id: &str, entries: Vec<Entry>| ImportEntriesRequest { entries, options: options(id), ..ImportEntriesRequest::default() };
    let first = server.import(vec![with_id("a", numbered(0..3).collect())]).await.unwrap();
    assert_eq!(first.imported, 3);
    // The same entries, split into other messages, are the same import.
    let cut = vec![with_id("a", numbered(0..1).collect()), request(numbered(1..3).collect())];
    assert_eq!(server.import(cut).await.unwrap(), first);
    let status = server.import(vec![with_id("a", numbered(5..8).collect())]).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(status.get_details_error_info().unwrap().reason, "CONFLICT");
    // An import without entries is remembered as well.
    let nothing = server.import(vec![with_id("empty", vec![])]).await.unwrap();
    assert_eq!(server.import(vec![with_id("empty", vec![])]).await.unwrap(), nothing);
    let status = server.import(vec![with_id("empty", numbered(0..1).collect())]).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let runs: i64 = sqlx::query_scalar("SELECT count(*) FROM imports").fetch_one(&mut server.connection().await).await.unwrap();
    assert_eq!(runs, 2);
}

#[tokio::test]
async fn a_long_repeat_does_not_wait_for_the_running_import() {
    let server = TestServer::start().await;
    let options = Some(ImportOptions { request_id: "a".to_owned(), ..ImportOptions::default() });
    let (send, running) = server.begin_import(&server.key).await;
    let first =
        ImportEntriesRequest { entries: numbered(0..5).collect(), options: options.clone(), ..ImportEntriesRequest::default() };
    send.send(first.clone()).await.unwrap();
    let claimed = "SELECT count(*) FROM import_requests";
    until("the idempotency key is claimed", || async {
        sqlx::query_scalar::<_, i64>(claimed).fetch_one(&mut server.connection().await).await.unwrap() == 1
    })
    .await;
    let parts = (0..60).map(|part| request(numbered(part * 5_000..(part + 1) * 5_000).collect()));
    let long = server.import([first.clone()].into_iter().chain(parts).collect()).await.unwrap_err();
    assert_eq!(long.code(), Code::Unavailable);
    assert!(long.get_details_retry_info().is_some());
    let other = ImportEntriesRequest { entries: numbered(7..9).collect(), options, ..ImportEntriesRequest::default() };
    assert_eq!(server.import(vec![other]).await.unwrap_err().code(), Code::FailedPrecondition);
    // A short repeat waits, and gets the same answer.
    let waiting = tokio::spawn({
        let mut client = server.client().await;
        let call = with_key(tokio_stream::iter([first]), &server.key);
        async move { client.import_entries(call).await }
    });
    drop(send);
    let answer = running.await.unwrap().unwrap().into_inner();
    assert_eq!(waiting.await.unwrap().unwrap().into_inner(), answer);
}

#[tokio::test]
async fn a_revoked_key_ends_a_slow_stream() {
    let server = TestServer::start().await;
    let (send, running) = server.begin_import(&server.key).await;
    send.send(request(numbered(0..1).collect())).await.unwrap();
    let key = server.store.list_keys().await.unwrap().into_iter().next().unwrap().id;
    server.store.revoke_key(key).await.unwrap();
    let status = tokio::time::timeout(std::time::Duration::from_secs(5), running).await.expect("in time").unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    drop(send);
    assert_eq!(server.count().await, 0);
}

#[tokio::test]
async fn a_long_dry_run_holds_no_connection_between_its_batches() {
    let server = TestServer::start().await;
    // What another one remembers is kept.
    sqlx::query("INSERT INTO rehearsed (workspace_id, rehearsal, address) VALUES ($1, $2, 'a@example.com')")
        .bind(server.workspace.0)
        .bind(uuid::Uuid::now_v7())
        .execute(&mut server.connection().await)
        .await
        .unwrap();
    let mut running = Vec::new();
    for _ in 0..6 {
        running.push(server.begin_import(&server.key).await);
    }
    let options = Some(ImportOptions { validate_only: true, ..ImportOptions::default() });
    for (send, _) in &running {
        let entries = numbered(0..10_001).collect();
        send.send(ImportEntriesRequest { entries, options: options.clone(), ..ImportEntriesRequest::default() }).await.unwrap();
    }
    let seen = "SELECT count(DISTINCT rehearsal) FROM rehearsed";
    let count = async |statement| sqlx::query_scalar::<_, i64>(statement).fetch_one(&mut server.connection().await).await.unwrap();
    until("each has looked up a batch", async || count(seen).await == 7).await;
    // All of them are idle. A dry run of another workspace does not wait for any.
    let theirs = ImportEntriesRequest { entries: numbered(0..10_001).collect(), options, ..ImportEntriesRequest::default() };
    let theirs = with_key(tokio_stream::iter([theirs]), &server.other_key);
    assert_eq!(server.client().await.import_entries(theirs).await.unwrap().into_inner().imported, 10_001);
    for (send, call) in running {
        send.send(request(numbered(0..20_000).collect())).await.unwrap();
        drop(send);
        let answer = call.await.unwrap().unwrap().into_inner();
        assert_eq!((answer.imported, answer.skipped), (20_000, 10_001));
    }
    assert_eq!(server.count().await, 0);
    until("the remembered addresses are deleted", async || count("SELECT count(*) FROM rehearsed").await == 1).await;
}

#[tokio::test]
async fn a_cancelled_stream_does_not_count_as_complete() {
    let server = TestServer::start().await;
    for round in 0..3 {
        let start = round * 20_000;
        let options = ImportOptions { request_id: format!("broken-{round}"), ..ImportOptions::default() };
        // One more than the first batch, so that the rest waits for the next message.
        let first = with_options(numbered(start..start + 10_001).collect(), options);
        let (sender, messages) = tokio::sync::mpsc::channel(1);
        let messages =
            stream::unfold(messages, |mut messages| async move { messages.recv().await.map(|message| (message, messages)) });
        let mut call = with_key(messages, &server.key);
        let cancel = call.cancellation_handle();
        let mut client = server.client().await;
        let running = tokio::spawn(async move { client.import_entries(call).await });
        sender.send(first.clone()).await.unwrap();
        until("the first batch is stored", || async { server.count().await == i64::from(round) * 20_000 + 10_000 }).await;
        cancel.cancel();
        running.await.unwrap().unwrap_err();
        let rest = request(numbered(start + 10_001..start + 20_000).collect());
        let answer = server.import(vec![first, rest]).await.unwrap();
        assert_eq!(answer.imported + answer.skipped, 20_000, "not the answer to the part that arrived before");
    }
}
