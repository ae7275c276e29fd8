//! What was acknowledged is there, whatever is killed.

use dnc::postgres::{self, PrivatePostgres};
use tonic::Code;
use tonic_types::StatusExt;

use crate::{
    address_book::{numbered, request},
    harness::{TestServer, until, with_key},
};

#[tokio::test]
async fn a_database_killed_in_the_middle_of_a_stream_loses_nothing_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let options = postgres::Options { dir: dir.path().join("postgres"), is_ephemeral: false, connections_max: 50 };
    let mut postgres = PrivatePostgres::start(options).await.unwrap();
    postgres.create_database("dnc", "template0").await.unwrap();
    let database_url = postgres.url("dnc");
    let migrator = dnc::server::store(&database_url, &crate::harness::options(&[]).database).unwrap();
    migrator.migrate().await.unwrap();
    migrator.close().await;
    let server = TestServer::start_with(&[], &database_url).await;

    let (send, messages) = tokio::sync::mpsc::channel(1);
    let mut client = server.client().await;
    let call = with_key(tokio_stream::wrappers::ReceiverStream::new(messages), &server.key);
    let running = tokio::spawn(async move { client.import_entries(call).await });
    let all: Vec<_> = numbered(0..200_000).collect();
    let mut chunks = all.chunks(5_000);
    for chunk in chunks.by_ref().take(13) {
        send.send(request(chunk.to_vec())).await.unwrap();
    }
    until("three batches are stored", || async { server.count().await == 60_000 }).await;
    assert!(std::process::Command::new("kill").args(["-9", &postgres.pid().unwrap().to_string()]).status().unwrap().success());
    postgres.ended().await;
    for chunk in chunks {
        if send.send(request(chunk.to_vec())).await.is_err() {
            break;
        }
    }
    drop(send);
    let status = running.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    let info = status.get_details_error_info().unwrap();
    assert_eq!((info.reason.as_str(), info.metadata["imported"].as_str()), ("UNAVAILABLE", "60000"));
    assert!(status.get_details_retry_info().is_some());

    postgres.restart().await.unwrap();
    assert!(server.count().await >= 60_000, "what was acknowledged is there");
    let requests = || all.chunks(5_000).map(|chunk| request(chunk.to_vec())).collect::<Vec<_>>();
    let answer = server.import(requests()).await.expect("the repeat ends right");
    assert_eq!(answer.imported + answer.skipped, 200_000);
    assert!(answer.skipped >= 60_000);
    assert_eq!(server.count().await, 200_000);
}
