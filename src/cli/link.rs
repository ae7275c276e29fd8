//! Why a gRPC server cannot be talked to, in one sentence that names the cause and what to change.
//!
//! tonic says "transport error" of a wrong port, a wrong certificate and a missing server alike.
//! The causes are in the chain of sources below the status. What they do not tell (who is it that
//! answers, but not in HTTP/2?) is asked of the server itself, once, after the call has failed.

use std::{
    error::Error as StdError,
    io::{self, Read, Write},
    net::{TcpStream, ToSocketAddrs},
    time::Duration,
};

use http::Uri;
use rustls::CertificateError;
use tonic::Status;

/// How long the server is given to answer the question who it is.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// The beginning of HTTP/2, with empty settings.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// The cause of a call's failure, unless it is the server's own answer, whose message says it.
/// `flag` names the option that gave `url`.
///
/// May block for [`PROBE_TIMEOUT`].
pub(super) fn why(flag: &str, url: &str, status: &Status) -> Option<String> {
    let uri: Uri = url.parse().ok()?;
    let host = uri.host()?;
    let is_tls = uri.scheme_str() == Some("https");
    let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
    let place = format!("{host}:{port}");
    let no_grpc =
        || format!("{place} is an HTTP server and no gRPC server; check the port in {flag}, for gRPC it is usually 50051");
    let silent = || format!("{place} does not answer; check {flag}, and the firewalls on the way");
    // What tonic says of an answer without gRPC's trailers, and of one whose body is no gRPC
    // message.
    let markers = ["mapped from HTTP status code ", "while receiving response with status: "];
    if let Some(code) = markers.iter().find_map(|marker| status.message().split_once(marker)).map(|(_, code)| code) {
        return Some(if code.starts_with('5') {
            format!("{place} answered HTTP status {code}: the gRPC server behind it is away; try again later")
        } else {
            no_grpc()
        });
    }
    // An answer of the server itself has no source.
    status.source()?;
    for cause in causes(status) {
        if let Some(tls) = cause.downcast_ref::<rustls::Error>() {
            return Some(why_tls(flag, host, &place, tls).unwrap_or_else(no_grpc));
        }
        if let Some(error) = cause.downcast_ref::<io::Error>() {
            match error.kind() {
                io::ErrorKind::ConnectionRefused => {
                    return Some(format!("nothing listens on {place}; start the server, or check {flag}"));
                }
                io::ErrorKind::TimedOut => return Some(silent()),
                io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
                    return Some(format!("no network leads to {place}; check {flag}"));
                }
                io::ErrorKind::UnexpectedEof if is_tls => {
                    return Some(format!("{place} ended the TLS handshake; if it has no TLS, use http:// in {flag}"));
                }
                _ => {}
            }
        }
        match cause.to_string().as_str() {
            "dns error" => return Some(format!("the host {host} is not known; check {flag}")),
            "HTTP/2 was not negotiated." => return Some(no_grpc()),
            "TLS handshake timeout." | "keep-alive timed out" => return Some(silent()),
            _ => {}
        }
    }
    match probe(host, port) {
        Some(Speaks::Http1) if !is_tls => Some(no_grpc()),
        Some(Speaks::Tls) if !is_tls => Some(format!("{place} speaks TLS; use https:// in {flag}")),
        _ => Some(format!("the connection to {place} was lost; try again, and check {flag} if that does not help")),
    }
}

/// None when it is not TLS that fails, but what is to be spoken over it.
fn why_tls(flag: &str, host: &str, place: &str, error: &rustls::Error) -> Option<String> {
    Some(match error {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            format!(
                "the certificate of {place} is of an authority that is not trusted here; name the authority's certificate with {flag}-ca"
            )
        }
        rustls::Error::InvalidCertificate(CertificateError::NotValidForNameContext { presented, .. }) => {
            let names: Vec<_> = presented.iter().map(|name| bare_name(name)).collect();
            format!(
                "the certificate of {place} is for {} and not for {host}; use a name that it is for in {flag}",
                names.join(", ")
            )
        }
        rustls::Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            format!("the certificate of {place} has expired; renew it at the server, or set this machine's clock")
        }
        rustls::Error::InvalidCertificate(CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. }) => {
            format!("the certificate of {place} is not valid yet; set the clock of this machine")
        }
        rustls::Error::InvalidCertificate(cause) => {
            format!("the certificate of {place} cannot be accepted ({cause}); mend it at the server")
        }
        rustls::Error::InvalidMessage(_) => format!("{place} does not speak TLS; use http:// in {flag}, or the port that has TLS"),
        rustls::Error::AlertReceived(rustls::AlertDescription::NoApplicationProtocol) => return None,
        rustls::Error::AlertReceived(
            rustls::AlertDescription::CertificateRequired
            | rustls::AlertDescription::UnknownCA
            | rustls::AlertDescription::BadCertificate,
        ) => format!("{place} asks for the certificate of a client that it trusts; give one with --client-cert and --client-key"),
        other => format!("the TLS handshake with {place} failed ({other}); check {flag}"),
    })
}

/// `DnsName("example.com")`, as the TLS library has it, is example.com.
fn bare_name(name: &str) -> &str {
    let inner = name.split_once('(').and_then(|(_, inner)| inner.strip_suffix(')')).unwrap_or(name);
    inner.trim_matches('"')
}

/// All errors below the status, the outermost first. An I/O error hides the one that it wraps from
/// `source`.
fn causes<'a>(status: &'a Status) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    let first: &'a (dyn StdError + 'static) = status;
    std::iter::successors(Some(first), |&error| match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        Some(wrapped) => {
            let wrapped: &(dyn StdError + 'static) = wrapped;
            Some(wrapped)
        }
        None => error.source(),
    })
}

enum Speaks {
    Http1,
    Tls,
}

/// What a server says to the beginning of HTTP/2, when it is not HTTP/2 itself.
fn probe(host: &str, port: u16) -> Option<Speaks> {
    let bare_host = host.trim_matches(['[', ']']);
    let address = (bare_host, port).to_socket_addrs().ok()?.next()?;
    let mut stream = TcpStream::connect_timeout(&address, PROBE_TIMEOUT).ok()?;
    stream.set_read_timeout(Some(PROBE_TIMEOUT)).ok()?;
    stream.set_write_timeout(Some(PROBE_TIMEOUT)).ok()?;
    stream.write_all(PREFACE).ok()?;
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).ok()?;
    match answer {
        [b'H', b'T', b'T', b'P', b'/'] => Some(Speaks::Http1),
        // A TLS alert: content type 21, version 3.x.
        [21, 3, ..] => Some(Speaks::Tls),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_of_a_certificate_are_bare() {
        assert_eq!(super::bare_name("DnsName(\"example.com\")"), "example.com");
        assert_eq!(super::bare_name("IpAddress(127.0.0.1)"), "127.0.0.1");
        assert_eq!(super::bare_name("example.com"), "example.com");
    }
}
