//! The connections of a store: which of them are used again, which are tested before, and when the
//! database counts as away.

use std::time::Duration;

use dnc::{
    domain::{Batch, Error, Filter, KeyId, WorkspaceId},
    store::{ImportId, ImportIds, Store},
};
use sqlx::{Connection, PgConnection};
use tokio::{net::TcpListener, task::JoinHandle, time::timeout};

use crate::harness::{Flow, Proxy, database, give_up_after_polls, options, until};

/// How long a call of [`Setup::store`] waits for a connection, by default.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The sessions of a store that run its calls.
const SESSIONS: &str = "application_name = 'dnc' AND query NOT LIKE 'SELECT pid, backend_start, xact_start, COALESCE(%'";

/// The session that watches the link, once it has polled.
const WATCHER: &str =
    "application_name = 'dnc' AND query LIKE 'SELECT pid, backend_start, xact_start, COALESCE(%' AND state = 'idle'";

/// A store with the options of a server.
fn store(url: &str) -> Store {
    Store::new(&dnc::server::store_options(url, &options(&[]).database)).unwrap()
}

/// A store that reaches its database over a link.
struct Setup {
    url: String,
    link: Proxy,
    store: Store,
}

impl Setup {
    async fn new() -> Self {
        let url = database().await;
        let link = Proxy::to(&url).await;
        let store = store(&link.url(&url));
        Self { url, link, store }
    }

    async fn admin(&self) -> PgConnection {
        PgConnection::connect(&self.url).await.unwrap()
    }

    /// One short call.
    async fn read(&self) -> Result<usize, Error> {
        self.store.pending_migrations().await
    }

    /// How many sessions of the database are such ones.
    async fn count(&self, sessions: &str) -> i64 {
        let count = format!("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND {sessions}");
        sqlx::query_scalar(sqlx::AssertSqlSafe(count)).fetch_one(&mut self.admin().await).await.unwrap()
    }

    /// When the last statement of this session began.
    async fn began(&self, session: &str) -> Option<time::OffsetDateTime> {
        let began = format!("SELECT query_start FROM pg_stat_activity WHERE datname = current_database() AND {session}");
        sqlx::query_scalar(sqlx::AssertSqlSafe(began)).fetch_optional(&mut self.admin().await).await.unwrap()
    }

    /// The process behind the only session.
    async fn pid(&self) -> i32 {
        let pid = format!("SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND {SESSIONS}");
        sqlx::query_scalar(sqlx::AssertSqlSafe(pid)).fetch_one(&mut self.admin().await).await.unwrap()
    }

    async fn until_watched(&self) {
        until("the link is watched", async || self.count(WATCHER).await > 0).await;
    }

    /// Waits until a call needs a new connection, since the old ones are not used any more.
    async fn until_reconnected(&self) {
        let made = self.link.made();
        until("the old connections are not used", async || {
            self.read().await.unwrap();
            self.link.made() > made
        })
        .await;
    }

    /// Ends the connection that watches the link, so that it is opened again.
    async fn end_watcher(&self) {
        let name = self.url.rsplit('/').next().unwrap();
        let end = format!("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = '{name}' AND {WATCHER}");
        let mut other = PgConnection::connect(&self.url.replace(name, "postgres")).await.unwrap();
        sqlx::raw_sql(sqlx::AssertSqlSafe(end)).execute(&mut other).await.unwrap();
    }

    /// Begins this many calls that wait in the database until the returned connection is closed.
    async fn begin_blocked(&self, count: usize) -> (Vec<JoinHandle<Result<i64, Error>>>, PgConnection) {
        let mut blocker = self.admin().await;
        sqlx::raw_sql("BEGIN; LOCK TABLE entries IN ACCESS EXCLUSIVE MODE").execute(&mut blocker).await.unwrap();
        let calls = (0..count).map(|_| {
            let store = self.store.clone();
            tokio::spawn(async move { store.count_named(WorkspaceId(1), vec![]).await })
        });
        let calls = calls.collect();
        until("they wait", async || self.count("wait_event_type = 'Lock'").await == count as i64).await;
        (calls, blocker)
    }
}

#[tokio::test]
async fn a_connection_is_used_again_and_tested_only_after_a_pause() {
    let setup = Setup::new().await;
    for _ in 0..10 {
        setup.read().await.unwrap();
    }
    // One watches the link.
    assert!(setup.link.made() <= 2, "{} connections", setup.link.made());
    let bytes = async || {
        let before = setup.link.forwarded();
        setup.read().await.unwrap();
        setup.link.forwarded() - before
    };
    // Those of a poll may be among them, but not each time.
    let mut fresh = usize::MAX;
    for _ in 0..5 {
        fresh = fresh.min(bytes().await);
    }
    until("it has been idle", async || {
        setup.count(&format!("{SESSIONS} AND state = 'idle' AND state_change < now() - interval '1.1 seconds'")).await == 1
    })
    .await;
    assert!(bytes().await > fresh, "a test takes bytes");
    setup.store.close().await;
    until("it is closed", async || setup.count(SESSIONS).await == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fails_is_told_from_what_is_slow() {
    // Most of the time they wait for the link to be polled, so they run at once.
    tokio::join!(
        a_connection_that_is_silent_retires_those_of_its_age(),
        a_lost_connection_retires_those_of_its_age(),
        a_lost_signal_retires_the_connections_of_its_age(),
        a_signal_is_sent_at_once_and_retires_no_connection(),
        a_lost_answer_is_given_up(),
        replies_show_that_the_link_works_and_silence_that_it_does_not(),
        a_database_that_replies_late_is_not_away(),
        a_database_that_refuses_connections_is_not_away(),
        an_import_begins_although_its_connection_is_lost_and_ends_while_the_database_is_away(),
    );
}

async fn a_connection_that_is_silent_retires_those_of_its_age() {
    let setup = Setup::new().await;
    // Testing one after the other would take longer than a call waits for a connection.
    let count = 2 + CONNECT_TIMEOUT.as_secs() as usize;
    let (calls, blocker) = setup.begin_blocked(count).await;
    blocker.close().await.unwrap();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    until("they have been idle", async || {
        setup.count(&format!("{SESSIONS} AND state = 'idle' AND state_change < now() - interval '1.1 seconds'")).await
            == count as i64
    })
    .await;
    setup.link.existing(Flow::Stall);
    setup.read().await.expect("a new connection is opened");
}

async fn replies_show_that_the_link_works_and_silence_that_it_does_not() {
    let setup = Setup::new().await;
    setup.read().await.unwrap();
    // The link cannot be watched any more, but calls have their answers.
    setup.link.new_ones(Flow::Stall);
    let made = setup.link.made();
    until("it was polled in vain", async || {
        setup.end_watcher().await;
        setup.read().await.expect("answered");
        setup.link.made() >= made + 2
    })
    .await;
    setup.link.existing(Flow::Stall);
    let silent = timeout(Duration::from_secs(30), setup.read()).await.expect("it is given up");
    assert!(matches!(silent, Err(Error::Unavailable { .. })), "{silent:?}");
    until("the database is away", async || !setup.store.is_reachable()).await;
    let made = setup.link.made();
    until("it stays away for longer than a signal may take", async || setup.link.made() >= made + 2).await;
    // The signal that ends the abandoned call is sent when the link works again. It does not make
    // the new connections old.
    setup.link.new_ones(Flow::Pass);
    until("it works again", async || setup.read().await.is_ok()).await;
    let made = setup.link.made();
    until("the signal is sent", async || setup.count(&format!("{SESSIONS} AND state = 'idle'")).await == 1).await;
    for _ in 0..3 {
        setup.read().await.unwrap();
    }
    assert_eq!(setup.link.made(), made);
}

async fn a_database_that_replies_late_is_not_away() {
    let setup = Setup::new().await;
    setup.read().await.unwrap();
    setup.until_watched().await;
    let pid = setup.pid().await;
    let made = setup.link.made();
    setup.link.existing(Flow::Stall);
    setup.link.new_ones(Flow::Lose);
    until("a new connection is tried", async || setup.link.made() > made).await;
    // The new one has lost what was sent, so the reply can only come on the old one.
    setup.link.existing(Flow::Pass);
    let first = setup.began(WATCHER).await;
    until("it is polled again", async || {
        assert!(setup.store.is_reachable());
        setup.began(WATCHER).await > first
    })
    .await;
    setup.read().await.unwrap();
    assert_eq!(setup.pid().await, pid, "the connections are used on");
}

async fn a_database_that_refuses_connections_is_not_away() {
    let setup = Setup::new().await;
    let name = setup.url.rsplit('/').next().unwrap();
    let mut other = PgConnection::connect(&setup.url.replace(name, "postgres")).await.unwrap();
    let refuse = format!("ALTER DATABASE {name} ALLOW_CONNECTIONS false");
    sqlx::raw_sql(sqlx::AssertSqlSafe(refuse)).execute(&mut other).await.unwrap();
    let made = setup.link.made();
    until("it was polled in vain", async || {
        setup.end_watcher().await;
        assert!(setup.store.is_reachable());
        setup.link.made() >= made + 2
    })
    .await;
    setup.link.cut();
    until("the database is away", async || !setup.store.is_reachable()).await;
}

async fn a_lost_connection_retires_those_of_its_age() {
    let setup = Setup::new().await;
    setup.read().await.unwrap();
    setup.until_watched().await;
    setup.link.existing(Flow::Stall);
    until("the link is watched on another connection", async || setup.count(WATCHER).await == 2).await;
    setup.link.mend();
    setup.until_reconnected().await;
    // Also when it is closed.
    setup.until_watched().await;
    let made = setup.link.made();
    setup.end_watcher().await;
    until("not only that one is opened again", async || {
        assert!(setup.store.is_reachable());
        setup.read().await.unwrap();
        setup.link.made() >= made + 2
    })
    .await;
}

async fn a_lost_signal_retires_the_connections_of_its_age() {
    let setup = Setup::new().await;
    let (mut calls, blocker) = setup.begin_blocked(2).await;
    setup.until_watched().await;
    setup.link.existing(Flow::Stall);
    // The signal that cancels it is mostly sent before the next poll.
    calls.remove(0).abort();
    until("the link is watched on another connection", async || setup.count(WATCHER).await == 2).await;
    blocker.close().await.unwrap();
    setup.link.mend();
    let _ = calls.remove(0).await.unwrap();
    setup.until_reconnected().await;
}

async fn a_signal_is_sent_at_once_and_retires_no_connection() {
    /// The pause between two polls.
    const INTERVAL: time::Duration = time::Duration::milliseconds(1_500);
    let setup = Setup::new().await;
    let signal = "application_name = 'dnc' AND query LIKE '%_backend(pid)%'";
    // On a busy machine not the first time.
    until("a signal is sent between two polls, and the connections are used on", async || {
        let (mut calls, blocker) = setup.begin_blocked(2).await;
        setup.until_watched().await;
        let polled = setup.began(WATCHER).await;
        calls.remove(0).abort();
        until("it is cancelled", async || setup.count("wait_event_type = 'Lock'").await == 1).await;
        let sent = setup.began(signal).await;
        blocker.close().await.unwrap();
        let mut is_used_on = calls.remove(0).await.unwrap().is_ok();
        let made = setup.link.made();
        setup.until_watched().await;
        for _ in 0..3 {
            is_used_on &= setup.read().await.is_ok();
        }
        is_used_on &= setup.link.made() == made;
        is_used_on && polled.zip(sent).is_some_and(|(polled, sent)| sent - polled < INTERVAL)
    })
    .await;
}

async fn a_lost_answer_is_given_up() {
    let setup = Setup::new().await;
    let (mut calls, blocker) = setup.begin_blocked(1).await;
    let backend = "application_name = 'dnc' AND query LIKE '%CROSS JOIN LATERAL%'";
    assert_eq!(setup.count(backend).await, 1);
    setup.link.existing(Flow::Stall);
    blocker.close().await.unwrap();
    let call = calls.remove(0);
    until("the answer is given up", async || {
        setup.read().await.unwrap();
        call.is_finished()
    })
    .await;
    assert!(matches!(call.await.unwrap(), Err(Error::Unavailable { .. })));
    until("its session is ended", async || setup.count(backend).await == 0).await;
}

async fn an_import_begins_although_its_connection_is_lost_and_ends_while_the_database_is_away() {
    let ids = ImportIds { workspace: WorkspaceId(1), key: KeyId(1), import: ImportId::new() };
    let batch = || {
        let mut batch = Batch::new(1);
        batch.push_parts("a@example.com", "bounce", None);
        batch.into_sorted()
    };
    let setup = Setup::new().await;
    setup.read().await.unwrap();
    let end =
        format!("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND {SESSIONS}");
    sqlx::raw_sql(sqlx::AssertSqlSafe(end)).execute(&mut setup.admin().await).await.unwrap();
    assert_eq!(setup.store.insert_batch(ids, batch(), None, true).await.unwrap(), 1);

    let away = store(&setup.link.url(&setup.url));
    setup.link.cut();
    let outcome = timeout(Duration::from_secs(30), away.insert_batch(ids, batch(), None, true)).await.expect("it ends");
    assert!(matches!(outcome, Err(Error::Unavailable { .. })), "{outcome:?}");
}

#[tokio::test]
async fn no_connection_is_opened_in_vain() {
    let url = database().await;
    let link = Proxy::to(&url).await;
    let opened = async |call: fn(Store) -> futures_util::future::BoxFuture<'static, Result<(), Error>>| {
        let before = link.made();
        call(store(&link.url(&url))).await.unwrap();
        link.made() - before
    };
    // The link is watched after a while, which may have passed on a busy machine.
    until("a ping opens one", async || opened(|store| Box::pin(async move { store.ping().await })).await == 1).await;
    until("a call opens one", async || opened(|store| Box::pin(async move { store.list_workspaces().await.map(drop) })).await == 1)
        .await;
}

#[tokio::test]
async fn connections_to_another_server_replace_the_earlier_ones() {
    let url = database().await;
    let (one, other) = (Proxy::to(&url).await, Proxy::to(&url).await);
    let host = |url: &str| url::Url::parse(url).unwrap()[url::Position::BeforeHost..url::Position::AfterPort].to_owned();
    let both = url.replace(&host(&url), &format!("{},{}", host(&one.url(&url)), host(&other.url(&url))));
    let setup = Setup { store: store(&both), url, link: one };
    setup.read().await.unwrap();
    setup.until_watched().await;
    assert_eq!((setup.link.open(), other.made()), (2, 0));
    // New connections lead to the other one. The old ones still work.
    setup.link.new_ones(Flow::Cut);
    let (calls, blocker) = setup.begin_blocked(2).await;
    blocker.close().await.unwrap();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    until("the old connection is closed, except that which watches the link", async || {
        setup.read().await.unwrap();
        setup.link.open() == 1
    })
    .await;
    let made = other.made();
    for _ in 0..3 {
        setup.read().await.unwrap();
    }
    assert_eq!(other.made(), made, "new ones are used again");

    // A server that accepts no connection is passed over, also by what opens a single one.
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let with_closed = setup.url.replace(&host(&setup.url), &format!("{closed},{}", host(&setup.url)));
    store(&with_closed).ping().await.unwrap();
}

#[tokio::test]
async fn exports_and_pages_do_not_wait_for_scans_nor_exports_for_look_ups() {
    let setup = Setup::new().await;
    let (name, workspace) = (setup.url.rsplit('/').next().unwrap(), WorkspaceId(1));
    let mut blocker = setup.admin().await;
    // A function that filters call waits for a lock.
    let slow = format!(
        "CREATE FUNCTION public.strpos(text, text) RETURNS int LANGUAGE plpgsql AS
             'BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN pg_catalog.strpos($1, $2); END';
         ALTER DATABASE {name} SET search_path = public, pg_catalog;
         INSERT INTO entries (workspace_id, added_by, address, reason) VALUES (1, 1, 'a@example.com', 'bounce');
         SELECT pg_advisory_lock(1)"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(slow)).execute(&mut blocker).await.unwrap();
    let export = async || {
        let page = timeout(Duration::from_secs(30), setup.store.export_page(workspace, &Filter::default(), "", 10)).await;
        page.expect("it does not wait").unwrap().entries.len()
    };
    // As many exports with a filter as a workspace may run without one.
    let filter = Filter { search: Some("nowhere".to_owned()), ..Filter::default() };
    let scans = [(); 2].map(|()| {
        let (store, filter) = (setup.store.clone(), filter.clone());
        tokio::spawn(async move { store.export_page(workspace, &filter, "", 10).await.unwrap().entries.len() })
    });
    until("one runs", async || setup.count("wait_event = 'advisory'").await == 1).await;
    assert_eq!(export().await, 1);
    let page = timeout(Duration::from_secs(30), setup.store.page(workspace, &Filter::default(), "", 10, Some(1))).await;
    assert_eq!(page.expect("it does not wait").unwrap().entries.len(), 1);

    // As many look-ups as a workspace may run at once.
    sqlx::raw_sql("BEGIN; LOCK TABLE import_requests IN SHARE MODE").execute(&mut blocker).await.unwrap();
    let look_ups = [(); 11].map(|()| {
        let store = setup.store.clone();
        tokio::spawn(async move { store.release_claim(workspace, ImportId::new(), "x").await })
    });
    until("they wait", async || setup.count("wait_event = 'relation'").await == 11).await;
    assert_eq!(export().await, 1);
    blocker.close().await.unwrap();
    for look_up in look_ups {
        look_up.await.unwrap().unwrap();
    }
    for scan in scans {
        assert_eq!(scan.await.unwrap(), 0);
    }
}

#[tokio::test]
async fn counts_by_reason_do_not_wait_for_look_ups() {
    let setup = Setup::new().await;
    let workspace = WorkspaceId(1);
    let mut blocker = setup.admin().await;
    // As many look-ups as a workspace may run at once.
    sqlx::raw_sql("BEGIN; LOCK TABLE import_requests IN SHARE MODE").execute(&mut blocker).await.unwrap();
    let look_ups = [(); 11].map(|()| {
        let store = setup.store.clone();
        tokio::spawn(async move { store.release_claim(workspace, ImportId::new(), "x").await })
    });
    until("they wait", async || setup.count("wait_event = 'relation'").await == 11).await;
    let filter = Filter { reason: Some("bounce".to_owned()), ..Filter::default() };
    let count = timeout(Duration::from_secs(30), setup.store.count_entries(workspace, &filter)).await;
    assert_eq!(count.expect("it does not wait").unwrap(), 0);
    let summary = timeout(Duration::from_secs(30), setup.store.summarize(workspace, 1)).await;
    assert_eq!(summary.expect("it does not wait").unwrap().total, 0);
    blocker.close().await.unwrap();
    for look_up in look_ups {
        look_up.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn work_whose_caller_is_gone_before_it_has_a_connection_does_not_begin() {
    let setup = Setup::new().await;
    for number in 0..20 {
        // The connection is free. Work that begins is completed.
        setup.read().await.unwrap();
        let mut batch = Batch::new(1);
        batch.push_parts(&format!("{number}@example.com"), "bounce", None);
        let ids = ImportIds { workspace: WorkspaceId(1), key: KeyId(1), import: ImportId::new() };
        if number == 0 {
            // Finds out whether Citus is installed, which is asked once.
            setup.store.insert_batch(ids, batch.into_sorted(), None, true).await.unwrap();
        } else {
            let left = give_up_after_polls(1, setup.store.insert_batch(ids, batch.into_sorted(), None, true)).await;
            assert!(left.is_none());
        }
    }
    setup.store.close().await;
    until("all work has ended", async || setup.count(SESSIONS).await == 0).await;
    let stored = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM entries").fetch_one(&mut setup.admin().await).await;
    assert_eq!(stored.unwrap(), 1);
}
