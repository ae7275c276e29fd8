//! The servers that the database URL names, of which one takes writes.
//!
//! A URL may name several, as in libpq: `postgres://USER@A:5432,B:5432/dnc`. After a fail-over
//! another one takes writes, and the next connection finds it. sqlx knows one server for each URL,
//! so the URL is split here.

use std::{
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use tokio::time::{Instant, sleep};

use super::{error, link::Backend, session::Setup};
use crate::domain::Error;

/// How long the server that took writes last may take to accept a connection before the others are
/// tried. It is short, since a link must be found to work or not within a few seconds.
const FIRST_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the others may take once that one has refused. Some may not answer at all.
const OTHERS_TIMEOUT: Duration = Duration::from_millis(500);

/// How long all of them may take while none takes writes.
const ALL_TIMEOUT: Duration = Duration::from_secs(4);

/// The servers of a database. All clones agree on which of them took writes last.
#[derive(Clone, Debug)]
pub(super) struct Hosts {
    all: Arc<[PgConnectOptions]>,
    setup: Arc<Setup>,
    last: Arc<AtomicUsize>,
    generation: Arc<AtomicU64>,
}

impl Hosts {
    /// Reads a `postgres://` URL, which `option` has. `setup` is done on each new connection.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it cannot be read.
    pub(super) fn of_url(option: &'static str, url: &str, setup: Setup) -> Result<Self, Error> {
        let unreadable = || {
            Error::invalid(
                option,
                "The database URL cannot be read; give postgres://USER:PASSWORD@HOST:PORT/DATABASE, with several HOST:PORT separated by commas if need be.",
            )
        };
        let all = split(url).ok_or_else(unreadable)?;
        let options =
            |url: &String| PgConnectOptions::from_str(url).map(|options| setup.driver_options(options)).map_err(|_| unreadable());
        let all = all.iter().map(options).collect::<Result<_, _>>()?;
        Ok(Self { all, setup: Arc::new(setup), last: Arc::default(), generation: Arc::default() })
    }

    /// How many servers there are.
    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    /// What is done on each new connection, and how transactions begin.
    pub(super) fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Opens a connection to the server that takes writes, or to that of a replica.
    ///
    /// # Errors
    /// That of a server which was tried. If all of them answer and none takes writes, a protocol
    /// error.
    pub(super) async fn open(&self) -> Result<(PgConnection, Backend), sqlx::Error> {
        let last = self.last.load(Ordering::Relaxed);
        if self.all.len() == 1 {
            return self.setup.open(&self.all[last]).await;
        }
        let one = |index: usize| async move { (index, self.setup.open(&self.all[index]).await) };
        let mut tries = FuturesUnordered::from_iter([one(last)]);
        let mut are_all_tried = false;
        let mut refusal = None;
        // Until then the server that took writes last is asked alone.
        let mut wait = Box::pin(sleep(FIRST_TIMEOUT));
        loop {
            if are_all_tried && tries.is_empty() {
                return Err(refusal.unwrap_or(sqlx::Error::PoolTimedOut));
            }
            tokio::select! {
                biased;
                Some((index, tried)) = tries.next() => match tried {
                    Ok(opened) => {
                        if self.last.swap(index, Ordering::Relaxed) != index {
                            // The connections to the other one are not used again.
                            self.generation.fetch_add(1, Ordering::AcqRel);
                        }
                        return Ok(opened);
                    }
                    Err(error) => {
                        // What a server answers says more than that another one does not.
                        if refusal.as_ref().is_none_or(|refusal| !error::is_answer(refusal)) {
                            refusal = Some(error);
                        }
                        if index == last {
                            let limit = if are_all_tried { OTHERS_TIMEOUT } else { Duration::ZERO };
                            wait.as_mut().reset(Instant::now() + limit);
                        }
                    }
                },
                () = &mut wait => {
                    if are_all_tried {
                        return Err(refusal.unwrap_or(sqlx::Error::PoolTimedOut));
                    }
                    are_all_tried = true;
                    // At once, because a server that is gone may not answer.
                    tries.extend((0..self.all.len()).filter(|&index| index != last).map(one));
                    let limit = if refusal.is_some() { OTHERS_TIMEOUT } else { ALL_TIMEOUT };
                    wait.as_mut().reset(Instant::now() + limit);
                }
            }
        }
    }

    /// The number of the present set of connections. Those of an earlier one are not used again.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Ends the set of this number.
    pub(super) fn retire(&self, generation: u64) {
        // A late report of the same failure must not discard the connections that were opened
        // since.
        let _ = self.generation.compare_exchange(generation, generation + 1, Ordering::AcqRel, Ordering::Acquire);
    }

    /// The options of the server that takes writes. With a single server it is not asked whether it
    /// does.
    ///
    /// # Errors
    /// As [`Hosts::open`].
    pub(super) async fn writable(&self) -> Result<PgConnectOptions, sqlx::Error> {
        if self.all.len() > 1 {
            self.open().await?.0.close().await?;
        }
        Ok(self.all[self.last.load(Ordering::Relaxed)].clone())
    }
}

/// A URL for each server that `url` names. `None` if it asks for another one than that which takes
/// writes.
fn split(url: &str) -> Option<Vec<String>> {
    let (scheme, rest) = url.split_once("://")?;
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let (user, hosts) = match authority.rsplit_once('@') {
        Some((user, hosts)) => (format!("{user}@"), hosts),
        None => (String::new(), authority),
    };
    // libpq's parameter for what is done here in any case.
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    let mut kept = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("target_session_attrs", "read-write" | "primary" | "any")) => {}
            Some(("target_session_attrs", _)) => return None,
            // libpq's other form of several servers.
            Some(("host" | "port", value)) if value.contains(',') => return None,
            _ => kept.push(pair),
        }
    }
    let query = if kept.is_empty() { String::new() } else { format!("?{}", kept.join("&")) };
    Some(hosts.split(',').map(|host| format!("{scheme}://{user}{host}{path}{query}")).collect())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    /// What a server that takes no writes does with a connection.
    #[derive(Clone, Copy)]
    enum Server {
        Silent,
        /// Closes it after a while.
        Closes(Duration),
        /// Reports that it has too many.
        Refuses,
    }

    const CLOSES: Server = Server::Closes(Duration::ZERO);

    fn of_url(url: &str) -> Result<Hosts, Error> {
        Hosts::of_url("database-url", url, Setup::new(Duration::from_secs(1), false))
    }

    /// Starts a server. Returns its host and port, and the number of its connections.
    async fn start(server: Server) -> (String, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (host, accepted) = (listener.local_addr().unwrap().to_string(), Arc::new(AtomicUsize::new(0)));
        let counted = accepted.clone();
        tokio::spawn(async move {
            while let Ok((mut connection, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(async move {
                    let _ = connection.read(&mut [0; 1_000]).await;
                    match server {
                        Server::Silent => std::future::pending().await,
                        Server::Closes(after) => sleep(after).await,
                        Server::Refuses => {
                            let fields = b"SFATAL\0VFATAL\0C53300\0Mtoo many connections\0\0";
                            let length = u32::try_from(4 + fields.len()).unwrap();
                            connection.write_all(&[b"E", &length.to_be_bytes()[..], fields].concat()).await.unwrap();
                        }
                    }
                });
            }
        });
        (host, accepted)
    }

    /// Asks two servers for a connection. Returns the error, the time it took, and how many
    /// connections each of them had.
    async fn refusal(servers: [Server; 2]) -> (sqlx::Error, Duration, [usize; 2]) {
        let [(one, at_one), (other, at_other)] = [start(servers[0]).await, start(servers[1]).await];
        let hosts = of_url(&format!("postgres://u@{one},{other}/d?sslmode=disable")).unwrap();
        let began = Instant::now();
        let error = hosts.open().await.unwrap_err();
        (error, began.elapsed(), [&at_one, &at_other].map(|accepted| accepted.load(Ordering::Relaxed)))
    }

    #[tokio::test]
    async fn servers_that_take_no_writes_are_waited_for_within_limits() {
        let late = 2 * FIRST_TIMEOUT;
        let (silent, first_closes, other_closes, first_closes_late) = tokio::join!(
            refusal([Server::Silent, Server::Silent]),
            refusal([CLOSES, Server::Silent]),
            refusal([Server::Silent, CLOSES]),
            refusal([Server::Closes(late), Server::Silent]),
        );
        assert!(matches!(silent.0, sqlx::Error::PoolTimedOut), "{silent:?}");
        assert!(silent.1 >= FIRST_TIMEOUT + ALL_TIMEOUT, "{silent:?}");
        assert_eq!(silent.2, [1, 1]);
        assert!(!matches!(first_closes.0, sqlx::Error::PoolTimedOut), "{first_closes:?}");
        assert!(first_closes.1 < ALL_TIMEOUT, "{first_closes:?}");
        // The other one is not the one that took writes last.
        assert!(other_closes.1 >= FIRST_TIMEOUT + ALL_TIMEOUT, "{other_closes:?}");
        assert!(first_closes_late.1 >= late + OTHERS_TIMEOUT, "{first_closes_late:?}");
    }

    #[tokio::test]
    async fn the_others_are_tried_at_once_and_an_answer_is_the_error() {
        for servers in [[CLOSES, Server::Refuses], [Server::Refuses, CLOSES]] {
            let mut fastest = Duration::MAX;
            for _ in 0..5 {
                let (error, took, accepted) = refusal(servers).await;
                assert!(matches!(error, sqlx::Error::Database(_)), "{error:?}");
                assert_eq!(accepted, [1, 1]);
                fastest = fastest.min(took);
            }
            assert!(fastest < OTHERS_TIMEOUT, "{fastest:?}");
        }
    }

    #[test]
    fn a_url_is_split_into_one_for_each_server() {
        let cases: [(&str, &[&str]); 6] = [
            ("postgres://u:p@a:1/d", &["postgres://u:p@a:1/d"]),
            ("postgres:///d?host=/run/x", &["postgres:///d?host=/run/x"]),
            ("postgres://u:p,q@a:1,b/d?x=1,2", &["postgres://u:p,q@a:1/d?x=1,2", "postgres://u:p,q@b/d?x=1,2"]),
            ("postgresql://a,[::1]:2", &["postgresql://a", "postgresql://[::1]:2"]),
            (
                "postgres://a,b/d?target_session_attrs=read-write&sslmode=require",
                &["postgres://a/d?sslmode=require", "postgres://b/d?sslmode=require"],
            ),
            ("postgres://a?target_session_attrs=any", &["postgres://a"]),
        ];
        for (url, expected) in cases {
            assert_eq!(split(url).unwrap(), expected, "{url}");
        }
        for url in ["a:1/d", "postgres://a,b/d?target_session_attrs=standby", "postgres:///d?host=a,b", ""] {
            assert!(of_url(url).is_err(), "{url}");
        }
        assert_eq!(of_url("postgres://u:p@a:1,b:2/d").unwrap().all.len(), 2);
    }
}
