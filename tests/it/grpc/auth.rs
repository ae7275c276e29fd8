//! Authentication and the scopes of keys: each kind of valid and invalid credentials, for every
//! method of the proto.

use std::time::Duration;

use dnc::{
    domain::{ApiKey, KeyId, KeyKind, KeyOwner, Scope, WorkspaceId},
    proto::FILE_DESCRIPTOR_SET,
};
use prost::Message;
use tonic::{Code, Request, Status, client::Grpc, metadata::MetadataValue, transport::Channel};
use tonic_prost::ProstCodec;
use tonic_types::StatusExt;

use crate::{
    address_book::{email, numbered, request},
    harness::{TestServer, http_client, until, with_key},
};

/// The name of a case, the headers of its call, and the expected code.
type Case = (&'static str, Vec<(&'static str, String)>, Code);

/// The paths of all methods of all services in the proto.
fn methods() -> Vec<String> {
    let files = prost_types::FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap().file;
    let services = files.iter().flat_map(|file| file.service.iter().map(move |service| (file.package(), service)));
    let paths = services.flat_map(|(package, service)| {
        service.method.iter().map(move |method| format!("/{package}.{}/{}", service.name(), method.name()))
    });
    paths.collect()
}

/// Calls a method with an empty message and `headers`.
async fn call(channel: &Channel, path: &str, headers: &[(&'static str, &str)]) -> Status {
    let mut request = Request::new(tokio_stream::iter([()]));
    for (name, value) in headers {
        request.metadata_mut().append(*name, MetadataValue::try_from(*value).unwrap());
    }
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await.unwrap();
    let codec: ProstCodec<(), ()> = ProstCodec::default();
    match grpc.client_streaming(request, path.parse().unwrap(), codec).await {
        Ok(_) => Status::ok(""),
        Err(status) => status,
    }
}

#[tokio::test]
async fn every_method_needs_a_valid_key() {
    let server = TestServer::start().await;
    let channel = Channel::from_shared(server.grpc_url.clone()).unwrap().connect().await.unwrap();
    let owner = KeyOwner::Workspace(server.workspace);
    let (_, expired) = server.store.issue_key(owner, Scope::Write, "", Some(Duration::ZERO)).await.unwrap();
    let (id, revoked) = server.store.issue_key(owner, Scope::Write, "", None).await.unwrap();
    server.store.revoke_key(id).await.unwrap();
    let unknown = ApiKey::generate(KeyKind::Platform).unwrap();
    let (ours, theirs) = (server.workspace.to_string(), server.other_workspace.to_string());
    let bearer = |key: &str| format!("Bearer {key}");

    let methods = methods();
    assert!(methods.contains(&"/dnc.v1.DncService/ImportEntries".to_owned()));
    for method in methods {
        let cases: Vec<Case> = vec![
            ("no key", vec![], Code::Unauthenticated),
            ("empty key", vec![("x-api-key", String::new())], Code::Unauthenticated),
            ("nonsense", vec![("x-api-key", "nonsense".into())], Code::Unauthenticated),
            ("unknown", vec![("x-api-key", unknown.reveal().into())], Code::Unauthenticated),
            ("expired", vec![("x-api-key", expired.reveal().into())], Code::Unauthenticated),
            ("revoked", vec![("x-api-key", revoked.reveal().into())], Code::Unauthenticated),
            ("no scheme", vec![("authorization", server.key.clone())], Code::Unauthenticated),
            ("other scheme", vec![("authorization", format!("Basic {}", server.key))], Code::Unauthenticated),
            ("two keys", vec![("x-api-key", server.key.clone()), ("x-api-key", server.key.clone())], Code::Unauthenticated),
            (
                "x-api-key alone counts",
                vec![("x-api-key", unknown.reveal().into()), ("authorization", bearer(&server.key))],
                Code::Unauthenticated,
            ),
            ("platform key, no workspace", vec![("x-api-key", server.platform_key.clone())], Code::InvalidArgument),
            (
                "platform key, malformed workspace",
                vec![("x-api-key", server.platform_key.clone()), ("x-workspace-id", "1".into())],
                Code::InvalidArgument,
            ),
            (
                "unknown key before malformed workspace",
                vec![("x-api-key", unknown.reveal().into()), ("x-workspace-id", "1".into())],
                Code::Unauthenticated,
            ),
            (
                "workspace key, malformed workspace",
                vec![("x-api-key", server.key.clone()), ("x-workspace-id", "ws_x".into())],
                Code::InvalidArgument,
            ),
            (
                "two workspaces",
                vec![
                    ("x-api-key", server.platform_key.clone()),
                    ("x-workspace-id", ours.clone()),
                    ("x-workspace-id", ours.clone()),
                ],
                Code::InvalidArgument,
            ),
            (
                "another's workspace",
                vec![("x-api-key", server.key.clone()), ("x-workspace-id", theirs.clone())],
                Code::PermissionDenied,
            ),
            (
                "not a member",
                vec![("x-api-key", server.platform_key.clone()), ("x-workspace-id", theirs.clone())],
                Code::PermissionDenied,
            ),
            (
                "no such workspace",
                vec![("x-api-key", server.platform_key.clone()), ("x-workspace-id", WorkspaceId(999_999).to_string())],
                Code::PermissionDenied,
            ),
        ];
        for (case, headers, expected) in cases {
            let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
            let status = call(&channel, &method, &headers).await;
            assert_eq!(status.code(), expected, "{method}: {case}: {status:?}");
            let info = status.get_details_error_info().unwrap_or_else(|| panic!("{method}: {case}: no ErrorInfo"));
            assert_eq!(info.domain, "dnc");
            assert_eq!(status.get_details_bad_request().is_some(), expected == Code::InvalidArgument, "{method}: {case}");
            assert!(!format!("{status:?}").contains("sk_"), "{method}: {case}");
        }
        for headers in [
            vec![("authorization", bearer(&server.key))],
            vec![("authorization", format!("bEARER {}", server.key))],
            vec![("x-api-key", server.key.clone()), ("authorization", "Bearer YOUR_API_TOKEN".into())],
            vec![("x-api-key", server.key.clone()), ("x-workspace-id", ours.clone())],
            vec![("x-api-key", server.platform_key.clone()), ("x-workspace-id", ours.clone())],
        ] {
            let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
            let code = call(&channel, &method, &headers).await.code();
            assert!(!matches!(code, Code::Unauthenticated | Code::PermissionDenied), "{method}: {code:?}");
        }
    }
    let status = call(&channel, "/dnc.v1.DncService/Nonsense", &[("x-api-key", &server.key)]).await;
    assert_eq!(status.code(), Code::Unimplemented);
}

#[tokio::test]
async fn a_platform_key_stores_in_the_workspace_it_names() {
    let server = TestServer::start().await;
    let mut call = with_key(tokio_stream::iter([request(vec![email("a@example.com")])]), &server.platform_key);
    call.metadata_mut().insert("x-workspace-id", server.workspace.to_string().parse().unwrap());
    assert_eq!(server.client().await.import_entries(call).await.unwrap().into_inner().imported, 1);
    let rows = server.rows(server.workspace).await;
    assert_eq!(rows.len(), 1);
    assert_eq!(KeyId(rows[0].2).to_string(), "key_3", "added by the platform key");
    assert!(server.rows(server.other_workspace).await.is_empty());
}

#[tokio::test]
async fn an_address_in_two_workspaces_is_two_entries() {
    let server = TestServer::start().await;
    server.import(vec![request(vec![email("a@example.com")])]).await.unwrap();
    let theirs = with_key(tokio_stream::iter([request(vec![email("a@example.com")])]), &server.other_key);
    let answer = server.client().await.import_entries(theirs).await.unwrap().into_inner();
    assert_eq!((answer.imported, answer.skipped), (1, 0));
}

#[tokio::test]
async fn a_key_may_call_only_the_methods_of_its_scope() {
    let server = TestServer::start().await;
    let channel = server.channel().await;
    let needed = |method: &str| match method.rsplit('/').next().unwrap() {
        "CheckEntries" | "ScrubEntries" => Scope::Check,
        "ListEntries" | "ExportEntries" | "SummarizeEntries" | "ListImports" | "ListDeletions" => Scope::Read,
        "ImportEntries" | "DeleteEntries" => Scope::Write,
        other => panic!("{other} needs a scope"),
    };
    let owners = [KeyOwner::Workspace(server.workspace), KeyOwner::User(server.store.list_users().await.unwrap()[0].id)];
    for (owner, scope) in owners.into_iter().flat_map(|owner| Scope::ALL.map(|scope| (owner, scope))) {
        let (_, key) = server.store.issue_key(owner, scope, "", None).await.unwrap();
        for method in methods() {
            let workspace = server.workspace.to_string();
            let status = call(&channel, &method, &[("x-api-key", key.reveal()), ("x-workspace-id", &workspace)]).await;
            if needed(&method) <= scope {
                // An empty message may be invalid for the method, and an empty stream of answers is
                // an error of the client.
                let refused = [Code::PermissionDenied, Code::Unauthenticated, Code::Unimplemented];
                assert!(!refused.contains(&status.code()), "{method} with {scope:?}: {status:?}");
            } else {
                assert_eq!(status.code(), Code::PermissionDenied, "{method} with {scope:?}");
                assert!(status.message().contains(needed(&method).name()), "{}", status.message());
            }
        }
    }
    let (_, key) = server.store.issue_key(owners[0], Scope::Check, "", None).await.unwrap();
    let get = |path: &str| http_client().get(format!("{}{path}", server.http_url)).header("x-api-key", key.reveal()).send();
    assert_eq!(get("/v1/dnc/check?email=a@example.com").await.unwrap().status(), 200);
    for path in ["/v1/dnc", "/v1/dnc/export", "/v1/dnc/summary"] {
        assert_eq!(get(path).await.unwrap().status(), 403, "{path}");
    }
}

#[tokio::test]
async fn a_revoked_key_stops_working_even_within_a_stream() {
    let server = TestServer::start().await;
    let owner = KeyOwner::Workspace(server.workspace);
    let (id, key) = server.store.issue_key(owner, Scope::Write, "", None).await.unwrap();
    let (send, running) = server.begin_import(key.reveal()).await;
    send.send(request(numbered(0..20_001).collect())).await.unwrap();
    until("the first batch is stored", || async { server.count().await == 20_000 }).await;

    server.store.revoke_key(id).await.unwrap();
    let revoked_at = tokio::time::Instant::now();
    until("a new call is refused", || async {
        let call = with_key(tokio_stream::iter([request(vec![])]), key.reveal());
        server.client().await.import_entries(call).await.is_err_and(|status| status.code() == Code::Unauthenticated)
    })
    .await;
    assert!(revoked_at.elapsed() < Duration::from_secs(5), "the documented limit");
    drop(send);
    let status = running.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert_eq!(status.get_details_error_info().unwrap().metadata["imported"], "20000");
    assert_eq!(server.count().await, 20_000);
}

#[tokio::test]
async fn too_many_requests_of_a_key_are_refused_with_a_retry_after() {
    let server = TestServer::start_with(&["--requests-per-sec-max", "1"], &crate::harness::database().await).await;
    let refused = std::sync::Mutex::new(None);
    until("a request is refused", || async {
        let answer = server.post(r#"{"entries":[{"email":"a@example.com"}]}"#).await;
        assert!(answer.headers().contains_key("x-ratelimit-limit"), "{answer:?}");
        let is_refused = answer.status() == 429;
        *refused.lock().unwrap() = Some(answer);
        is_refused
    })
    .await;
    let answer = refused.into_inner().unwrap().unwrap();
    assert_eq!(answer.headers()["retry-after"], "1");
    assert_eq!(answer.headers()["x-ratelimit-limit"], "1");
    assert_eq!(answer.headers()["x-ratelimit-remaining"], "0");
    assert!(answer.headers().contains_key("x-ratelimit-reset"));
    let body: serde_json::Value = answer.json().await.unwrap();
    assert_eq!(body["error"], "Too Many Requests");
}
