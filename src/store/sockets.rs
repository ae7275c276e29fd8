//! The kernel's time-outs for the sockets to the database.
//!
//! sqlx opens its sockets itself and has no setting for these, so the sockets are found among the
//! open files of this process by the port of the database. This is a second safeguard: `link`
//! detects a silent database by itself, also on systems without these time-outs.

/// How long a connection may be idle before the kernel probes its peer, in seconds.
#[cfg(target_os = "linux")]
const KEEPALIVE_IDLE_SECS: u64 = 5;

#[cfg(target_os = "linux")]
const KEEPALIVE_INTERVAL_SECS: u64 = 2;

#[cfg(target_os = "linux")]
const KEEPALIVE_PROBES: u32 = 2;

/// How long sent data may remain unacknowledged, in milliseconds.
#[cfg(target_os = "linux")]
const USER_TIMEOUT_MILLIS: u32 = 8_000;

/// Makes the kernel close connections to this port whose peer is gone.
#[cfg(target_os = "linux")]
pub(super) fn give_up_dead_peers(port: u16) {
    if let Err(error) = set_all(port) {
        tracing::debug!(cause = %error, "the kernel watches no database connection");
    }
}

/// Keeps the kernel's default time-outs.
#[cfg(not(target_os = "linux"))]
pub(super) fn give_up_dead_peers(_port: u16) {}

#[cfg(target_os = "linux")]
fn set_all(port: u16) -> std::io::Result<()> {
    use std::{fs, time::Duration};

    use rustix::{
        net::{getpeername, sockopt},
        process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open},
    };

    let this_process = pidfd_open(getpid(), PidfdFlags::empty())?;
    for entry in fs::read_dir("/proc/self/fd")?.flatten() {
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let is_socket = fs::read_link(entry.path()).is_ok_and(|target| target.to_string_lossy().starts_with("socket:"));
        if !is_socket {
            continue;
        }
        // The number may be reused for another file meanwhile, so the options are set on a
        // duplicate. A duplicate and the original share their options.
        let Ok(socket) = pidfd_getfd(&this_process, number, PidfdGetfdFlags::empty()) else { continue };
        let peer = getpeername(&socket).ok().flatten().and_then(|peer| std::net::SocketAddr::try_from(peer).ok());
        if peer.is_none_or(|peer| peer.port() != port) || sockopt::socket_keepalive(&socket)? {
            continue;
        }
        sockopt::set_socket_keepalive(&socket, true)?;
        sockopt::set_tcp_keepidle(&socket, Duration::from_secs(KEEPALIVE_IDLE_SECS))?;
        sockopt::set_tcp_keepintvl(&socket, Duration::from_secs(KEEPALIVE_INTERVAL_SECS))?;
        sockopt::set_tcp_keepcnt(&socket, KEEPALIVE_PROBES)?;
        sockopt::set_tcp_user_timeout(&socket, USER_TIMEOUT_MILLIS)?;
    }
    Ok(())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use rustix::net::sockopt;

    use super::*;

    #[test]
    fn sockets_to_the_port_are_watched_and_no_others() {
        let [ours, other] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port"));
        let [to_ours, to_other] =
            [&ours, &other].map(|listener| TcpStream::connect(listener.local_addr().expect("bound")).expect("connects"));
        give_up_dead_peers(ours.local_addr().expect("bound").port());
        assert!(sockopt::socket_keepalive(&to_ours).expect("a socket"));
        assert_eq!(sockopt::tcp_user_timeout(&to_ours).expect("a socket"), USER_TIMEOUT_MILLIS);
        assert!(!sockopt::socket_keepalive(&to_other).expect("a socket"));
    }
}
