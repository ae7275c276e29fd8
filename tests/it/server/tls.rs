//! TLS of the listeners: both speak it. Client certificates, certificates that are replaced while
//! the server runs, and the refusal to take keys over plain text.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use dnc::proto::{CheckEntriesRequest, dnc_service_client::DncServiceClient};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::json;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::{
    address_book::request,
    harness::{TestServer, database, http_client, process::Process, until, with_key},
};

/// A certificate and its key, both as PEM.
pub(super) struct Pem {
    cert: String,
    key: String,
}

pub(super) fn self_signed() -> Pem {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    Pem { cert: made.cert.pem(), key: made.signing_key.serialize_pem() }
}

/// An authority.
fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new([]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A client's certificate that `issuer` has signed.
fn signed_by(issuer: &CertifiedIssuer<'static, KeyPair>) -> Pem {
    let key = KeyPair::generate().unwrap();
    let cert = CertificateParams::new(["client".to_owned()]).unwrap().signed_by(&key, issuer).unwrap();
    Pem { cert: cert.pem(), key: key.serialize_pem() }
}

fn write(dir: &Path, pem: &Pem) {
    fs::write(dir.join("cert.pem"), &pem.cert).unwrap();
    fs::write(dir.join("key.pem"), &pem.key).unwrap();
}

/// A server with this certificate, which it reads from files in `dir`.
pub(super) async fn serve(dir: &Path, pem: &Pem) -> TestServer {
    write(dir, pem);
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    TestServer::start_with(&["--tls-cert", &path("cert.pem"), "--tls-key", &path("key.pem")], &database().await).await
}

/// A client that trusts `server` alone, with a certificate of its own if `client` is one.
fn http(server: &Pem, client: Option<&Pem>) -> reqwest::Client {
    http_client();
    let root = reqwest::Certificate::from_pem(server.cert.as_bytes()).unwrap();
    let mut builder = reqwest::Client::builder().tls_certs_only([root]);
    if let Some(client) = client {
        builder = builder.identity(reqwest::Identity::from_pem(format!("{}{}", client.cert, client.key).as_bytes()).unwrap());
    }
    builder.build().unwrap()
}

async fn grpc(url: &str, server: &Pem, client: Option<&Pem>) -> Result<DncServiceClient<Channel>, tonic::transport::Error> {
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&server.cert)).domain_name("localhost");
    if let Some(client) = client {
        tls = tls.identity(Identity::from_pem(&client.cert, &client.key));
    }
    let endpoint = Endpoint::from_shared(url.to_owned()).unwrap().tls_config(tls).unwrap();
    Ok(DncServiceClient::new(endpoint.connect().await?))
}

/// Whether this client is answered over gRPC.
async fn checks(client: &mut DncServiceClient<Channel>, key: &str) -> bool {
    client.check_entries(with_key(CheckEntriesRequest { emails: vec!["a@example.com".into()] }, key)).await.is_ok()
}

fn local(url: &str) -> String {
    format!("{}/healthz", url.replace("127.0.0.1", "localhost"))
}

#[tokio::test]
async fn both_listeners_speak_tls() {
    let pem = self_signed();
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), &pem).await;
    assert!(server.http_url.starts_with("https://"));
    let url = server.http_url.replace("127.0.0.1", "localhost");
    let post = http(&pem, None).post(format!("{url}/v1/dnc/import")).header("x-api-key", &server.key);
    let response = post.json(&json!({"entries":[{"email":"a@example.com"}]})).send().await.unwrap();
    assert_eq!(response.status(), 200);
    let call = with_key(tokio_stream::iter([request(vec![])]), &server.key);
    let mut client = grpc(&server.grpc_url, &pem, None).await.unwrap();
    assert_eq!(client.import_entries(call).await.unwrap().into_inner().imported, 0);
}

#[tokio::test]
async fn a_certificate_is_replaced_while_the_server_runs() {
    let (old, new) = (self_signed(), self_signed());
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path(), &old).await;
    let mut before = grpc(&server.grpc_url, &old, None).await.unwrap();
    assert!(checks(&mut before, &server.key).await);
    assert!(http(&new, None).get(local(&server.http_url)).send().await.is_err());

    // For a moment the certificate and the key do not belong together.
    fs::write(dir.path().join("cert.pem"), &new.cert).unwrap();
    assert!(http(&old, None).get(local(&server.http_url)).send().await.is_ok());
    write(dir.path(), &new);
    until("the new certificate is served", async || http(&new, None).get(local(&server.http_url)).send().await.is_ok()).await;
    assert!(http(&old, None).get(local(&server.http_url)).send().await.is_err());
    assert!(grpc(&server.grpc_url, &old, None).await.is_err());
    assert!(checks(&mut grpc(&server.grpc_url, &new, None).await.unwrap(), &server.key).await);
    assert!(checks(&mut before, &server.key).await, "a connection lives on");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_clients_with_a_certificate_of_the_authority_are_served() {
    let (ours, theirs) = (authority(), authority());
    let (pem, good, bad) = (self_signed(), signed_by(&ours), signed_by(&theirs));
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &pem);
    fs::write(dir.path().join("ca.pem"), ours.pem()).unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (cert, key, client_ca) = (path("cert.pem"), path("key.pem"), path("ca.pem"));
    let flags = ["--tls-cert", &cert, "--tls-key", &key, "--tls-client-ca", &client_ca];
    let server = TestServer::start_with(&flags, &database().await).await;
    let url = local(&server.http_url);
    for (client, is_served) in [(Some(&good), true), (Some(&bad), false), (None, false)] {
        assert_eq!(http(&pem, client).get(&url).send().await.is_ok(), is_served);
        let is_answered = match grpc(&server.grpc_url, &pem, client).await {
            Ok(mut client) => checks(&mut client, &server.key).await,
            Err(_) => false,
        };
        assert_eq!(is_answered, is_served);
    }
    // The clients of this program have one, too: the commands, and a gateway.
    for (name, text) in [("root.pem", &pem.cert), ("client.pem", &good.cert), ("client-key.pem", &good.key)] {
        fs::write(dir.path().join(name), text).unwrap();
    }
    let grpc_url = server.grpc_url.replace("127.0.0.1", "localhost");
    let (root, client_cert, client_key) = (path("root.pem"), path("client.pem"), path("client-key.pem"));
    let shown = ["--client-cert", &client_cert, "--client-key", &client_key];
    let check = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dnc"));
        command.args(["check", "a@example.com", "--server", &grpc_url, "--server-ca", &root, "--api-key", &server.key]);
        command.args(more).output().unwrap()
    };
    let answered = tokio::task::block_in_place(|| check(&shown));
    assert!(answered.status.success(), "{}", String::from_utf8_lossy(&answered.stderr));
    assert_eq!(tokio::task::block_in_place(|| check(&[])).status.code(), Some(1));
    let mut command = Command::new(env!("CARGO_BIN_EXE_dnc"));
    command.args(["gateway", "--http-addr", "127.0.0.1:0", "--log-format", "json", "--upstream", &grpc_url]);
    command.args(["--upstream-ca", &root]).args(shown).stderr(Stdio::piped());
    let gateway = tokio::task::block_in_place(|| Process::serving(&mut command));
    assert_eq!(http_client().get(format!("{}/readyz", gateway.http_url)).send().await.unwrap().status(), 200);
    // The authority is replaced like a certificate.
    fs::write(dir.path().join("ca.pem"), theirs.pem()).unwrap();
    until("the new authority counts", async || http(&pem, Some(&bad)).get(&url).send().await.is_ok()).await;
    assert!(http(&pem, Some(&good)).get(&url).send().await.is_err());
}

#[tokio::test]
async fn keys_are_not_taken_over_plain_text_from_other_machines() {
    let database_url = database().await;
    let dnc = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dnc"));
        command.args(args).env("DATABASE_URL", &database_url).output().unwrap()
    };
    for (args, flag) in [
        (&["serve", "--http-addr", "0.0.0.0:0", "--grpc-addr", "127.0.0.1:0"][..], "--http-addr 0.0.0.0:0"),
        (&["serve", "--http-addr", "[::1]:0", "--grpc-addr", "[::]:0"], "--grpc-addr [::]:0"),
        (&["gateway", "--upstream", "http://127.0.0.1:1", "--http-addr", "192.0.2.1:0"], "--http-addr 192.0.2.1:0"),
    ] {
        let output = dnc(args);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(flag) && said.contains("--tls-cert") && said.contains("--insecure-plaintext"), "{said}");
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_dnc"));
    command.args(["serve", "--http-addr", "0.0.0.0:0", "--grpc-addr", "127.0.0.1:0", "--log-format", "json"]);
    command.env("DATABASE_URL", &database_url).env("DNC_INSECURE_PLAINTEXT", "1").stderr(Stdio::piped());
    let allowed = Process::serving(&mut command);
    let port = allowed.http_url.rsplit_once(':').unwrap().1;
    assert_eq!(http_client().get(format!("http://127.0.0.1:{port}/healthz")).send().await.unwrap().status(), 200);
}
