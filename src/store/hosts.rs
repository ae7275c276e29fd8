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

use super::{error, link::Backend, session::open};
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
    last: Arc<AtomicUsize>,
    generation: Arc<AtomicU64>,
}

impl Hosts {
    /// Reads a `postgres://` URL.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it cannot be read.
    pub(super) fn of_url(url: &str) -> Result<Self, Error> {
        let unreadable = || {
            Error::invalid(
                "database-url",
                "The database URL cannot be read; give postgres://USER:PASSWORD@HOST:PORT/DATABASE, with several HOST:PORT separated by commas if need be.",
            )
        };
        let all = split(url).ok_or_else(unreadable)?;
        let all = all.iter().map(|url| PgConnectOptions::from_str(url).map_err(|_| unreadable())).collect::<Result<_, _>>()?;
        Ok(Self { all, last: Arc::default(), generation: Arc::default() })
    }

    /// The same servers, with `change` made to the options of each.
    pub(super) fn with(&self, change: impl Fn(PgConnectOptions) -> PgConnectOptions) -> Self {
        let all = self.all.iter().cloned().map(change).collect();
        Self { all, last: self.last.clone(), generation: self.generation.clone() }
    }

    /// Opens a connection to the server that takes writes.
    ///
    /// # Errors
    /// That of a server which was tried. If all of them answer and none takes writes, a protocol
    /// error.
    pub(super) async fn open(&self) -> Result<(PgConnection, Backend), sqlx::Error> {
        let last = self.last.load(Ordering::Relaxed);
        if self.all.len() == 1 {
            return open(&self.all[last]).await;
        }
        let one = |index: usize| async move { (index, open(&self.all[index]).await) };
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
    use super::*;

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
            assert!(Hosts::of_url(url).is_err(), "{url}");
        }
        assert_eq!(Hosts::of_url("postgres://u:p@a:1,b:2/d").unwrap().all.len(), 2);
    }
}
