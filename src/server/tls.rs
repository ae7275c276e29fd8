//! TLS of the listeners: the certificate, its key, and the authority of client certificates.
//!
//! The files are read again while the server runs, so a certificate is renewed without a restart. A
//! new handshake uses what was read last; connections that exist are not touched. The content of
//! the files is compared and not their times: secrets are often mounted through links that change
//! as a whole, and a file may be replaced twice within the resolution of its time.

use std::{fs, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio::{sync::watch, time::sleep};
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

use super::listener::Protocol;
use crate::config::TlsOptions;

/// The pause between two looks at the files. They are a few kilobytes.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The TLS settings of all listeners, as they are now. Clones share them.
#[derive(Clone)]
pub(super) struct Tls {
    configs: watch::Receiver<Configs>,
    _looking: Arc<AbortOnDropHandle<()>>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls")
    }
}

/// One setting for each protocol; they differ in what they negotiate.
#[derive(Clone)]
struct Configs {
    http: Arc<ServerConfig>,
    grpc: Arc<ServerConfig>,
}

/// The content of the files.
#[derive(Clone, PartialEq, Eq)]
struct Files {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

impl Tls {
    /// Reads the files that `options` name, and starts to look for changes. `None` without a
    /// certificate.
    ///
    /// # Errors
    /// When a file cannot be read or used.
    pub(super) fn of(options: &TlsOptions) -> anyhow::Result<Option<Self>> {
        let Some(files) = Files::read(options)? else { return Ok(None) };
        let (sender, configs) = watch::channel(files.configs()?);
        let looking = tokio::spawn(keep_looking(options.clone(), files, sender));
        Ok(Some(Self { configs, _looking: Arc::new(AbortOnDropHandle::new(looking)) }))
    }

    /// What accepts the next connection of a listener.
    pub(super) fn acceptor(&self, protocol: Protocol) -> TlsAcceptor {
        let configs = self.configs.borrow();
        TlsAcceptor::from(match protocol {
            Protocol::Http | Protocol::Metrics => configs.http.clone(),
            Protocol::Grpc => configs.grpc.clone(),
        })
    }
}

/// Replaces the settings whenever the files have changed and can be used.
async fn keep_looking(options: TlsOptions, files: Files, configs: watch::Sender<Configs>) {
    let mut renewal = Renewal { files, broken: None };
    loop {
        sleep(LOOK_INTERVAL).await;
        let its_options = options.clone();
        // On a thread for blocking work: the files may be on a network.
        let Ok(read) = tokio::task::spawn_blocking(move || Files::read(&its_options)).await else { continue };
        match renewal.look(read) {
            Look::Same => {}
            Look::Changed(new) => {
                configs.send_replace(new);
                tracing::info!("new connections use the TLS certificate that was replaced");
            }
            Look::Broken(cause) => {
                tracing::warn!(cause, "the new TLS files cannot be used; the old certificate stays in use");
            }
        }
    }
}

/// What is in use, and the last fault of what should replace it.
struct Renewal {
    files: Files,
    broken: Option<String>,
}

enum Look {
    Same,
    Changed(Configs),
    /// Reported once for each cause.
    Broken(String),
}

impl Renewal {
    fn look(&mut self, read: anyhow::Result<Option<Files>>) -> Look {
        let usable = match read {
            Ok(Some(files)) if files == self.files => {
                self.broken = None;
                return Look::Same;
            }
            Ok(Some(files)) => files.configs().map(|configs| (files, configs)),
            Ok(None) => return Look::Same,
            Err(error) => Err(error),
        };
        match usable {
            Ok((files, configs)) => {
                *self = Self { files, broken: None };
                Look::Changed(configs)
            }
            Err(error) => {
                let cause = format!("{error:#}");
                if self.broken.replace(cause.clone()).as_ref() == Some(&cause) { Look::Same } else { Look::Broken(cause) }
            }
        }
    }
}

impl Files {
    fn read(options: &TlsOptions) -> anyhow::Result<Option<Self>> {
        let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        let (Some(cert), Some(key)) = (&options.tls_cert, &options.tls_key) else { return Ok(None) };
        let client_ca = options.tls_client_ca.as_deref().map(read).transpose()?;
        Ok(Some(Self { cert: read(cert)?, key: read(key)?, client_ca }))
    }

    fn configs(&self) -> anyhow::Result<Configs> {
        let chain = certificates(&self.cert).context("the TLS certificate cannot be used")?;
        let key = PrivateKeyDer::from_pem_slice(&self.key).context("the TLS key cannot be used")?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(client_ca) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(client_ca).context("the client CA cannot be used")? {
                    roots.add(certificate).context("the client CA cannot be used")?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                builder.with_client_cert_verifier(verifier.context("the client CA cannot be used")?)
            }
        };
        let mut grpc = builder.with_single_cert(chain, key).context("the TLS certificate and key cannot be used together")?;
        grpc.alpn_protocols = vec![b"h2".to_vec()];
        let mut http = grpc.clone();
        http.alpn_protocols.push(b"http/1.1".to_vec());
        Ok(Configs { http: Arc::new(http), grpc: Arc::new(grpc) })
    }
}

fn certificates(pem: &[u8]) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let certificates = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>()?;
    ensure!(!certificates.is_empty(), "the file has no certificate in PEM");
    Ok(certificates)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn files() -> Files {
        let certificate = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        Files {
            cert: certificate.cert.pem().into_bytes(),
            key: certificate.signing_key.serialize_pem().into_bytes(),
            client_ca: None,
        }
    }

    #[test]
    fn what_cannot_be_used_changes_nothing_and_is_reported_once() {
        let (old, new) = (files(), files());
        let mut renewal = Renewal { files: old.clone(), broken: None };
        assert!(matches!(renewal.look(Ok(Some(old.clone()))), Look::Same));
        // The certificate is replaced before its key.
        let half = Files { cert: new.cert.clone(), ..old.clone() };
        assert!(matches!(renewal.look(Ok(Some(half.clone()))), Look::Broken(_)));
        assert!(matches!(renewal.look(Ok(Some(half))), Look::Same));
        for broken in [
            Files { cert: b"nonsense".to_vec(), ..new.clone() },
            Files { key: Vec::new(), ..new.clone() },
            Files { client_ca: Some(b"nonsense".to_vec()), ..new.clone() },
        ] {
            assert!(matches!(renewal.look(Ok(Some(broken))), Look::Broken(_)));
        }
        assert!(matches!(renewal.look(Err(anyhow::anyhow!("cannot read cert.pem"))), Look::Broken(_)));
        assert!(renewal.files == old);
        assert!(matches!(renewal.look(Ok(Some(new.clone()))), Look::Changed(_)));
        assert!(renewal.files == new);
        // A fault that comes back after it was mended is a new one.
        assert!(matches!(renewal.look(Err(anyhow::anyhow!("cannot read cert.pem"))), Look::Broken(_)));
    }
}
