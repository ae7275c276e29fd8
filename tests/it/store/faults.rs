//! The service while the link to its database, the database or its callers fail. Afterwards nothing
//! is left behind.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use dnc::{
    domain::{KeyOwner, Scope},
    gateway::Upstream,
    proto::{CheckEntriesRequest, EntryFilter, ListEntriesRequest, dnc_service_client::DncServiceClient},
};
use sqlx::{Connection, PgConnection};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    runtime::Handle,
    task::JoinSet,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::Code;
use tonic_types::StatusExt;

use crate::{
    address_book::{email, numbered, request},
    harness::{
        Flow, Kind, OwnPostgres, Proxy, Served, TestServer, all_of, database, http_client, make_all, require_nothing_left, signal,
        until, upstream, with_key,
    },
};

/// How soon every call must end after the database stops answering, and how soon every call must
/// succeed after the database works again. The service promises half of the second, which a busy
/// machine exceeds.
const ANSWERED_WITHIN: Duration = Duration::from_secs(10);
const RECOVERED_WITHIN: Duration = Duration::from_secs(10);

/// How long a call of the service waits for a connection to the database.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Measures the time in which this process, and with it the service, could run. On a machine that
/// is busy with other tests, the clock says nothing about the service.
struct Stopwatch {
    steps: Arc<AtomicU32>,
    _counting: AbortOnDropHandle<()>,
}

impl Stopwatch {
    const STEP: Duration = Duration::from_millis(20);

    fn start() -> Self {
        let steps = Arc::new(AtomicU32::new(0));
        let counted = steps.clone();
        let counting = tokio::spawn(async move {
            loop {
                tokio::time::sleep(Self::STEP).await;
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { steps, _counting: AbortOnDropHandle::new(counting) }
    }

    fn elapsed(&self) -> Duration {
        Self::STEP * self.steps.load(Ordering::Relaxed)
    }
}

/// Makes calls of every kind until they succeed, and asserts that all do so in time. Then makes
/// several of each kind at once, of which none may fail. Only if the database then accepts no
/// connection for seconds, as on a machine whose disk is busy, they are made again, three times at
/// most.
async fn require_recovery(client: &DncServiceClient<Upstream>, key: &str, round: usize) {
    let works_since = Arc::new(Stopwatch::start());
    let mut kinds = JoinSet::new();
    for kind in Kind::ALL {
        let (client, key, works_since) = (client.clone(), key.to_owned(), works_since.clone());
        kinds.spawn(async move {
            for number in 0.. {
                let call = kind.make(client.clone(), &key, 100_000 * (round + 1) + number);
                let outcome = timeout(Duration::from_secs(3), call).await;
                if matches!(outcome, Ok(Ok(()))) {
                    break;
                }
                assert!(works_since.elapsed() < RECOVERED_WITHIN, "{kind:?} does not work again: {outcome:?}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            assert!(works_since.elapsed() < RECOVERED_WITHIN, "{kind:?} works again only after {:?}", works_since.elapsed());
        });
    }
    all_of(kinds).await;
    for attempt in 1..=3 {
        let numbers = 1_000 * (round + 1) + 10 * attempt..1_000 * (round + 1) + 10 * attempt + 4;
        let outcomes = all_of(make_all(client, key, numbers)).await;
        let is_stalled = outcomes.iter().any(|outcome| outcome.code() == Code::Unavailable && outcome.elapsed >= CONNECT_TIMEOUT);
        if attempt == 3 || !is_stalled {
            for outcome in outcomes {
                outcome.require(Code::Ok);
            }
            break;
        }
    }
}

/// A server that sends each byte back, with `mark` before it.
async fn echo(mark: u8) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("tcp://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut byte = [mark, 0];
                while connection.read_exact(&mut byte[1..]).await.is_ok() && connection.write_all(&byte).await.is_ok() {}
            });
        }
    });
    url
}

#[tokio::test]
async fn the_proxy_of_these_tests_works() {
    let (first, second) = (echo(b'1').await, echo(b'2').await);
    let link = Proxy::to(&first).await;
    let address = link.url(&first).trim_start_matches("tcp://").to_owned();
    let connect = || async { TcpStream::connect(&address).await.unwrap() };
    let moment = Duration::from_millis(200);
    let answer = async |connection: &mut TcpStream| {
        let mut answer = [0; 2];
        connection.read_exact(&mut answer).await.map(|_| answer)
    };
    let ask = async |connection: &mut TcpStream| {
        connection.write_all(b"x").await?;
        answer(connection).await
    };

    let mut old = connect().await;
    assert_eq!(ask(&mut old).await.unwrap(), *b"1x");
    link.all(Flow::Stall);
    let mut new = connect().await;
    assert!(timeout(moment, ask(&mut old)).await.is_err());
    assert!(timeout(moment, ask(&mut new)).await.is_err());
    link.mend();
    // The bytes that were sent into the stalled link arrive once.
    for connection in [&mut old, &mut new] {
        assert_eq!(answer(connection).await.unwrap(), *b"1x");
        assert_eq!(ask(connection).await.unwrap(), *b"1x");
    }
    link.fail_over(&second);
    assert!(timeout(moment, ask(&mut old)).await.is_err());
    assert_eq!(ask(&mut connect().await).await.unwrap(), *b"2x");
    until("the closed connection is noticed", || async { link.open() == 2 }).await;
    drop(old);
    until("a client that leaves a silent link is noticed", || async { link.open() == 1 }).await;
    let mut sending = connect().await;
    until("the new connection is there", || async { link.open() == 2 }).await;
    link.existing(Flow::Stall);
    assert!(timeout(moment, sending.write_all(&vec![b'x'; 32 << 20])).await.is_err());
    drop(sending);
    until("a client that leaves while it sends is noticed", || async { link.open() == 1 }).await;
    link.existing(Flow::Lose);
    assert!(timeout(moment, ask(&mut new)).await.is_err());

    link.unreachable().await;
    assert!(timeout(moment, TcpStream::connect(&address)).await.is_err());
    link.all(Flow::Slow(40));
    let mut slow = connect().await;
    let began = Instant::now();
    for _ in 0..10 {
        assert_eq!(ask(&mut slow).await.unwrap(), *b"2x");
    }
    assert!(began.elapsed() > Duration::from_millis(500));
    let made = link.made();
    link.cut();
    assert!(ask(&mut slow).await.is_err());
    assert!(ask(&mut connect().await).await.is_err());
    assert!(link.made() > made);
    until("all are closed", || async { link.open() == 0 }).await;
}

/// Runs calls over a link that `begin` silences and `end` restores: before, during and after the
/// silence.
async fn test_silence(begin: impl AsyncFn(&Proxy), end: impl Fn(&Proxy, &str)) {
    // One at a time, since each of these tests measures time.
    static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _turn = TURN.lock().await;
    let database_url = database().await;
    let link = Proxy::to(&database_url).await;
    let server = TestServer::start_through(&[], &database_url, &link.url(&database_url)).await;
    server.import(vec![request(numbered(0..3_000).collect())]).await.unwrap();
    let client = server.upstream();
    all_of(make_all(&client, &server.key, 0..2)).await;
    let status = async |path: &str| {
        let answer = http_client().get(format!("{}{path}", server.http_url)).header("x-api-key", &server.key).send().await.unwrap();
        (answer.status().as_u16(), answer.headers().contains_key("retry-after"))
    };
    until("ready", || async { status("/readyz").await.0 == 200 }).await;

    // When the link falls silent, some calls are at the database and one is between two messages.
    // Others follow, more than there are connections.
    let mut blocker = server.connection().await;
    sqlx::raw_sql("BEGIN; LOCK TABLE entries IN ACCESS EXCLUSIVE MODE").execute(&mut blocker).await.unwrap();
    let running = make_all(&client, &server.key, 10..11);
    until("calls wait for the database", || async {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        sqlx::query_scalar::<_, i64>(waiting).fetch_one(&mut server.connection().await).await.unwrap() >= 4
    })
    .await;
    let (send, messages) = tokio::sync::mpsc::channel(8);
    let mut importer = server.client().await;
    let import = with_key(ReceiverStream::new(messages), &server.key);
    let importing = tokio::spawn(async move { importer.import_entries(import).await });
    send.send(request(numbered(50_000..55_000).collect())).await.unwrap();
    begin(&link).await;
    let silent_since = Stopwatch::start();
    sqlx::raw_sql("ROLLBACK").execute(&mut blocker).await.unwrap();
    let new = make_all(&client, &server.key, 20..22);
    for _ in 0..3 {
        send.send(request(numbered(55_000..60_000).collect())).await.unwrap();
    }
    drop(send);
    // A call that had sent everything before may still get its answer through a link that loses
    // what is sent.
    for (mut calls, codes) in [(running, &[Code::Unavailable, Code::Ok][..]), (new, &[Code::Unavailable])] {
        while let Some(outcome) = timeout(2 * ANSWERED_WITHIN, calls.join_next()).await.expect("every call is answered") {
            let outcome = outcome.unwrap();
            outcome.require_one_of(codes);
            assert!(silent_since.elapsed() < ANSWERED_WITHIN, "{outcome:?} only {:?} after", silent_since.elapsed());
        }
    }
    let broken = timeout(2 * ANSWERED_WITHIN, importing).await.expect("the import ends").unwrap().unwrap_err();
    assert_eq!(broken.code(), Code::Unavailable);
    assert_eq!(status("/readyz").await, (503, true));
    let late = Stopwatch::start();
    assert_eq!(status("/v1/dnc").await, (503, true));
    assert!(late.elapsed() < ANSWERED_WITHIN);

    end(&link, &database_url);
    let (_, ()) = tokio::join!(
        async {
            let works_since = Stopwatch::start();
            while status("/readyz").await.0 != 200 {
                assert!(works_since.elapsed() < RECOVERED_WITHIN, "not ready");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        },
        require_recovery(&client, &server.key, 0)
    );
    until("no more connections than are allowed", || async { link.open() <= 16 }).await;
    // A repeat of the aborted import completes it.
    let answer = server.import(vec![request(numbered(50_000..60_000).collect())]).await.unwrap();
    assert_eq!(answer.imported + answer.skipped, 10_000);
    require_nothing_left(&server, 16).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_link_stalls_and_works_again() {
    test_silence(async |link| link.all(Flow::Stall), |link, _| link.mend()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_connections_stay_silent_while_new_ones_work() {
    test_silence(async |link| link.all(Flow::Stall), |link, url| link.fail_over(url)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_link_loses_all_bytes() {
    test_silence(async |link| link.all(Flow::Lose), |link, url| link.fail_over(url)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_database_cannot_be_connected_to() {
    test_silence(Proxy::unreachable, |link, url| link.fail_over(url)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_the_process_while_the_link_is_silent() {
    let database_url = database().await;
    let keys = TestServer::start_with(&[], &database_url).await;
    let link = Proxy::to(&database_url).await;
    let program = Path::new(env!("CARGO_BIN_EXE_dnc"));
    let mut served = Served::start(program, &[], &link.url(&database_url)).await.unwrap();
    let client = upstream(&served.grpc_url);
    all_of(make_all(&client, &keys.key, 0..2)).await;
    let descriptors = served.descriptors().unwrap();
    link.all(Flow::Stall);
    for outcome in all_of(make_all(&client, &keys.key, 10..12)).await {
        outcome.require(Code::Unavailable);
    }
    link.fail_over(&database_url);
    require_recovery(&client, &keys.key, 0).await;
    until("no descriptor is left behind", || async { served.descriptors().unwrap() <= descriptors + 10 }).await;

    // A call runs when the first signal begins the drain.
    let (send, messages) = tokio::sync::mpsc::channel(1);
    let mut importer = client.clone();
    let import = with_key(ReceiverStream::new(messages), &keys.other_key);
    let running = tokio::spawn(async move { importer.import_entries(import).await });
    send.send(request(numbered(0..25_000).collect())).await.unwrap();
    until("an import runs", || async { !keys.rows(keys.other_workspace).await.is_empty() }).await;
    link.all(Flow::Stall);
    let waiting = make_all(&client, &keys.key, 20..21);
    served.signal("TERM");
    assert!(served.ended_within(Duration::from_millis(500)).await.is_err());
    served.signal("TERM");
    let status = served.ended_within(Duration::from_secs(2)).await.expect("ended by the second signal");
    assert_eq!(status.code(), Some(1));
    assert!(running.await.unwrap().is_err());
    all_of(waiting).await;

    // One signal ends a server that does not serve yet.
    let mut starting = Served::spawn(program, &[], &link.url(&database_url)).unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    signal(starting.id(), "TERM");
    timeout(Duration::from_secs(2), starting.wait()).await.expect("ended by a signal").unwrap();
}

#[tokio::test]
async fn the_log_says_once_that_the_database_is_away_and_that_it_is_back() {
    let database_url = database().await;
    let link = Proxy::to(&database_url).await;
    let mut served = Served::spawn(Path::new(env!("CARGO_BIN_EXE_dnc")), &[], &link.url(&database_url)).unwrap();
    let mut log = BufReader::new(served.stderr.take().unwrap()).lines();
    let mut said = Vec::new();
    let mut read_until = async |end: &str| {
        while said.last().is_none_or(|last| last != end) {
            let line = log.next_line().await.unwrap().expect("the server runs");
            let message = serde_json::from_str::<serde_json::Value>(&line).unwrap()["message"].as_str().unwrap().to_owned();
            if message.starts_with("the database ") {
                said.push(message);
            }
        }
        said.clone()
    };
    until("the database is polled", || async {
        let polled = "SELECT EXISTS (SELECT FROM pg_stat_activity
            WHERE datname = current_database() AND query LIKE 'SELECT pid, backend_start, xact_start, COALESCE(%')";
        let mut connection = PgConnection::connect(&database_url).await.unwrap();
        sqlx::query_scalar(polled).fetch_one(&mut connection).await.unwrap()
    })
    .await;
    link.all(Flow::Cut);
    let (away, back) = ("the database does not answer", "the database answers again");
    let reading = timeout(Duration::from_secs(60), read_until(away));
    assert_eq!(reading.await.expect("it is said"), [away]);
    let made = link.made();
    until("it is polled again in vain", || async { link.made() > made + 2 }).await;
    link.mend();
    let reading = timeout(Duration::from_secs(60), read_until(back));
    assert_eq!(reading.await.expect("it is said"), [away, back]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn read_only_sessions_are_closed() {
    let server = TestServer::start_with(&["--database-connections-max", "8"], &database().await).await;
    let client = server.upstream();
    let mut admin = server.connection().await;
    let name: String = sqlx::query_scalar("SELECT current_database()").fetch_one(&mut admin).await.unwrap();
    let set = async |admin: &mut sqlx::PgConnection, setting: &str| {
        let statement = format!("ALTER DATABASE {name} {setting}");
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(admin).await.unwrap();
    };
    // The state of connections that reach a standby during a fail-over.
    set(&mut admin, "SET default_transaction_read_only = on").await;
    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
               WHERE application_name = 'dnc' AND datname = current_database() AND pid <> pg_backend_pid()";
    sqlx::raw_sql(end).execute(&mut admin).await.unwrap();
    let writes = [Kind::ImportOneBatch, Kind::ImportManyBatches, Kind::ImportWithRequestId, Kind::DeleteNamed];
    let mut calls = JoinSet::new();
    for number in 0..16 {
        for kind in writes {
            let (client, key) = (client.clone(), server.key.clone());
            calls.spawn(async move { kind.make(client, &key, number).await.unwrap_err() });
        }
    }
    for status in all_of(calls).await {
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert!(status.get_details_retry_info().is_some());
    }
    // A standby may lag behind, so it must not answer a check either.
    assert_eq!(Kind::CheckMany.make(client.clone(), &server.key, 0).await.unwrap_err().code(), Code::Unavailable);
    let ready = || async { http_client().get(format!("{}/readyz", server.http_url)).send().await.unwrap().status() };
    until("not ready", || async { ready().await == 503 }).await;

    set(&mut admin, "RESET default_transaction_read_only").await;
    require_recovery(&client, &server.key, 0).await;
    assert_eq!(ready().await, 200);
    require_nothing_left(&server, 8).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promoted_standby_takes_over() {
    let mut old = OwnPostgres::start().await;
    let mut new = old.standby().await;
    let link = Proxy::to(&old.url).await;
    let mut server = TestServer::start_through(&[], &old.url, &link.url(&old.url)).await;
    let client = server.upstream();
    all_of(make_all(&client, &server.key, 0..2)).await;
    let (send, messages) = tokio::sync::mpsc::channel(1);
    let mut importer = client.clone();
    let import = with_key(ReceiverStream::new(messages), &server.other_key);
    let importing = tokio::spawn(async move { importer.import_entries(import).await });
    send.send(request(numbered(0..15_000).collect())).await.unwrap();
    until("a batch is stored", || async { !server.rows(server.other_workspace).await.is_empty() }).await;

    // The old server accepts no more writes. Those that it accepted have reached the new one, which
    // is not promoted yet.
    let mut admin = server.connection().await;
    sqlx::raw_sql("ALTER SYSTEM SET default_transaction_read_only = on").execute(&mut admin).await.unwrap();
    sqlx::raw_sql("SELECT pg_reload_conf()").execute(&mut admin).await.unwrap();
    let status = async |kind: Kind| kind.make(client.clone(), &server.key, 900).await.err().map(|status| status.code());
    let ready = || async { http_client().get(format!("{}/readyz", server.http_url)).send().await.unwrap().status() };
    until("it is noticed", || async { ready().await == 503 }).await;
    assert_eq!(status(Kind::ImportOneBatch).await, Some(Code::Unavailable));
    until("the copy is complete", || async {
        let lag = "SELECT count(*) FROM pg_stat_replication WHERE replay_lsn = pg_current_wal_lsn()";
        sqlx::query_scalar::<_, i64>(lag).fetch_one(&mut server.connection().await).await.unwrap() == 1
    })
    .await;
    link.redirect(&new.url);
    assert_eq!(status(Kind::ImportOneBatch).await, Some(Code::Unavailable), "a standby takes no writes either");
    let before = server.rows(server.workspace).await;
    let mut promoted = new.connection().await;
    assert!(sqlx::query_scalar::<_, bool>("SELECT pg_promote(true, 30)").fetch_one(&mut promoted).await.unwrap());

    // From here on the test reads from the new server.
    let stored_before = server.rows(server.other_workspace).await.len();
    server.database_url.clone_from(&new.url);
    assert_eq!(server.rows(server.workspace).await, before);
    require_recovery(&client, &server.key, 0).await;
    drop(send);
    let acknowledged = match importing.await.unwrap() {
        Ok(answer) => answer.into_inner().imported,
        Err(status) => {
            assert_eq!(status.code(), Code::Unavailable, "{status:?}");
            let counts = status.get_details_error_info().unwrap().metadata;
            counts.get("imported").map_or(0, |count| count.parse::<u64>().unwrap())
        }
    };
    let stored = server.rows(server.other_workspace).await.len();
    assert!(
        acknowledged as usize <= stored && stored_before <= stored,
        "{acknowledged} acknowledged, {stored_before} then {stored} stored"
    );
    // The old server still runs, and would answer that this address is not suppressed.
    let import = with_key(tokio_stream::iter([request(vec![email("later@example.com")])]), &server.key);
    assert_eq!(client.clone().import_entries(import).await.unwrap().into_inner().imported, 1);
    let mut checks = JoinSet::new();
    for _ in 0..64 {
        let (mut client, key) = (client.clone(), server.key.clone());
        checks.spawn(async move {
            let check = CheckEntriesRequest { emails: vec!["later@example.com".to_owned()] };
            client.check_entries(with_key(check, &key)).await.unwrap().into_inner().results.remove(0).suppressed
        });
    }
    assert!(all_of(checks).await.into_iter().all(|suppressed| suppressed));
    require_nothing_left(&server, 16).await;
    // This is faster than an orderly stop of both.
    new.end("QUIT").await;
    old.end("QUIT").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_several_servers_in_the_url_the_one_that_takes_writes_is_used() {
    let mut old = OwnPostgres::start().await;
    let mut new = old.standby().await;
    // Both have the same user, password and database. The first one that is named accepts no
    // connection, like a machine that is gone; the second is the standby.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = |url: &str| url::Url::parse(url).unwrap()[url::Position::BeforeHost..url::Position::AfterPort].to_owned();
    let (old_host, new_host) = (host(&old.url), host(&new.url));
    let all = old.url.replace(&old_host, &format!("{},{new_host},{old_host}", silent.local_addr().unwrap()));
    let server = TestServer::start_through(&[], &old.url, &all).await;
    let client = server.upstream();
    all_of(make_all(&client, &server.key, 0..2)).await;
    let import = with_key(tokio_stream::iter([request(numbered(0..10).collect())]), &server.other_key);
    client.clone().import_entries(import).await.unwrap();
    until("the copy is complete", || async {
        let lag = "SELECT count(*) FROM pg_stat_replication WHERE replay_lsn = pg_current_wal_lsn()";
        sqlx::query_scalar::<_, i64>(lag).fetch_one(&mut server.connection().await).await.unwrap() == 1
    })
    .await;
    old.end("QUIT").await;
    let ready = || async { http_client().get(format!("{}/readyz", server.http_url)).send().await.unwrap().status() };
    until("a standby alone is not enough", || async { ready().await == 503 }).await;
    let mut promoted = new.connection().await;
    assert!(sqlx::query_scalar::<_, bool>("SELECT pg_promote(true, 30)").fetch_one(&mut promoted).await.unwrap());
    require_recovery(&client, &server.key, 0).await;
    assert_eq!(ready().await, 200);
    let kept = "SELECT count(*) FROM entries WHERE workspace_id = $1";
    let kept: i64 = sqlx::query_scalar(kept).bind(server.other_workspace.0).fetch_one(&mut promoted).await.unwrap();
    assert_eq!(kept, 10);
    new.end("QUIT").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_stopped_or_killed_during_an_import_loses_nothing_acknowledged() {
    let mut postgres = OwnPostgres::start().await;
    let server = TestServer::start_with(&[], &postgres.url).await;
    let client = server.upstream();
    let all: Vec<_> = numbered(0..60_000).collect();
    for (round, name) in ["INT", "QUIT", "KILL"].into_iter().enumerate() {
        let (send, importing) = server.begin_import(&server.other_key).await;
        for chunk in all[..20_000 * (round + 1)].chunks(5_000) {
            let _ = send.send(request(chunk.to_vec())).await;
        }
        postgres.end(name).await;
        drop(send);
        let outcome = timeout(2 * ANSWERED_WITHIN, importing).await.expect("the import ends").unwrap();
        postgres.server.restart().await.unwrap();
        require_recovery(&client, &server.key, round).await;
        let stored = server.rows(server.other_workspace).await.len() as u64;
        match outcome {
            Ok(answer) => assert_eq!(answer.into_inner().imported, stored),
            Err(status) => {
                assert_eq!(status.code(), Code::Unavailable, "{status:?}");
                let counts = status.get_details_error_info().unwrap().metadata;
                // There are no counts if the guard refused the call.
                let count = |name: &str| counts.get(name).map_or(0, |count| count.parse::<u64>().unwrap());
                let acknowledged = count("imported") + count("skipped");
                assert!(acknowledged <= stored, "{acknowledged} acknowledged, {stored} stored");
            }
        }
    }
    let requests = all.chunks(5_000).map(|chunk| request(chunk.to_vec())).collect::<Vec<_>>();
    let answer = server.client().await.import_entries(with_key(tokio_stream::iter(requests), &server.other_key)).await.unwrap();
    assert_eq!((answer.get_ref().imported + answer.get_ref().skipped, answer.get_ref().failed), (60_000, 0));
    assert_eq!(server.rows(server.other_workspace).await.len(), 60_000);
    require_nothing_left(&server, 16).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_whose_connection_is_lost_is_retried() {
    let server = TestServer::start().await;
    let (send, importing) = server.begin_import(&server.key).await;
    let mut admin = server.connection().await;
    let all: Vec<_> = numbered(0..150_000).collect();
    for (number, chunk) in all.chunks(5_000).enumerate() {
        send.send(request(chunk.to_vec())).await.unwrap();
        if number % 6 == 3 {
            let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'dnc'
                       AND datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle'";
            sqlx::raw_sql(end).execute(&mut admin).await.unwrap();
        }
    }
    drop(send);
    let answer = importing.await.unwrap().expect("lost connections do not fail the import").into_inner();
    assert_eq!((answer.imported + answer.skipped, answer.failed), (150_000, 0));
    assert_eq!(server.count().await, 150_000);
    require_nothing_left(&server, 16).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn abandoned_scans_are_ended() {
    let database_url = database().await;
    let mut admin = <sqlx::PgConnection as sqlx::Connection>::connect(&database_url).await.unwrap();
    let name: String = sqlx::query_scalar("SELECT current_database()").fetch_one(&mut admin).await.unwrap();
    // Slows down a function that filters call, so that a scan takes ten seconds.
    let slow = format!(
        "CREATE FUNCTION public.strpos(text, text) RETURNS int LANGUAGE plpgsql AS
             'BEGIN PERFORM pg_sleep(0.05); RETURN pg_catalog.strpos($1, $2); END';
         ALTER DATABASE {name} SET search_path = public, pg_catalog"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(slow)).execute(&mut admin).await.unwrap();
    let server = TestServer::start_with(&[], &database_url).await;
    server.import(vec![request(numbered(0..200).collect())]).await.unwrap();
    let client = server.upstream();
    let mut given_up = JoinSet::new();
    for number in 0..30 {
        let (mut client, key) = (server.client().await, server.key.clone());
        given_up.spawn(async move {
            tokio::time::sleep(Duration::from_millis(30 * number)).await;
            let filter = Some(EntryFilter { search: "nowhere".into(), ..EntryFilter::default() });
            let call = client.list_entries(with_key(ListEntriesRequest { filter, ..ListEntriesRequest::default() }, &key));
            assert!(timeout(Duration::from_millis(150), call).await.is_err(), "the scan ended too early");
        });
    }
    let scans = async |admin: &mut sqlx::PgConnection| {
        let scans = "SELECT count(*) FROM pg_stat_activity
                     WHERE datname = current_database() AND pid <> pg_backend_pid() AND state = 'active' AND query LIKE '%strpos%'";
        sqlx::query_scalar::<_, i64>(scans).fetch_one(admin).await.unwrap()
    };
    let mut most = 0;
    while !given_up.is_empty() {
        most = most.max(scans(&mut admin).await);
        Kind::CheckOne.make(client.clone(), &server.other_key, 0).await.expect("others are served");
        tokio::time::sleep(Duration::from_millis(10)).await;
        while let Some(ended) = given_up.try_join_next() {
            ended.unwrap();
        }
    }
    assert!((1..=2).contains(&most), "{most} scans at once");
    let left_at = Instant::now();
    while scans(&mut admin).await > 0 {
        assert!(left_at.elapsed() < Duration::from_secs(5), "scans run on for callers that are gone");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    require_nothing_left(&server, 16).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_pool_recovers_and_leaves_nothing() {
    let server = TestServer::start().await;
    let client = server.upstream();
    all_of(make_all(&client, &server.key, 0..2)).await;
    let metrics = Handle::current().metrics();
    let tasks = metrics.num_alive_tasks();
    let mut blocker = server.connection().await;
    sqlx::raw_sql("BEGIN; LOCK TABLE entries IN ACCESS EXCLUSIVE MODE").execute(&mut blocker).await.unwrap();
    let waiting = [make_all(&client, &server.key, 10..13), make_all(&client, &server.other_key, 10..13)];
    until("every connection has a waiting statement", || async {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        // One of the sixteen watches the link, and two are for the look-ups of keys.
        sqlx::query_scalar::<_, i64>(waiting).fetch_one(&mut server.connection().await).await.unwrap() >= 13
    })
    .await;
    // Unknown keys and health checks need none of these connections.
    let unknown = Kind::CheckOne.make(client.clone(), "sk_nonsense", 0).await.unwrap_err();
    assert_eq!(unknown.code(), Code::Unauthenticated);
    assert_eq!(http_client().get(format!("{}/healthz", server.http_url)).send().await.unwrap().status(), 200);
    sqlx::raw_sql("ROLLBACK").execute(&mut blocker).await.unwrap();
    for calls in waiting {
        for outcome in all_of(calls).await {
            outcome.require(Code::Ok);
        }
    }
    require_nothing_left(&server, 16).await;
    drop(client);
    until("no task is left behind", || std::future::ready(metrics.num_alive_tasks() <= tasks)).await;
}

#[tokio::test]
async fn a_failed_migration_changes_nothing_and_can_be_repeated() {
    let url = database().await;
    let name = format!("{}_unmigrated", url.rsplit('/').next().unwrap());
    dnc::postgres::create_database(&url, &name, "template0").await.unwrap();
    let url = format!("{}/{name}", url.rsplit_once('/').unwrap().0);
    let program = Path::new(env!("CARGO_BIN_EXE_dnc"));
    let migrate = async || tokio::process::Command::new(program).arg("migrate").env("DATABASE_URL", &url).output().await.unwrap();
    let mut admin = <sqlx::PgConnection as sqlx::Connection>::connect(&url).await.unwrap();
    // Takes the name of a table that a later migration creates.
    sqlx::raw_sql("CREATE TABLE secrets (x int)").execute(&mut admin).await.unwrap();
    for _ in 0..2 {
        let output = migrate().await;
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains("migration 4"), "it names the migration");
        assert!(Served::start(program, &[], &url).await.is_err(), "it does not serve an incomplete schema");
    }
    sqlx::raw_sql("DROP TABLE secrets").execute(&mut admin).await.unwrap();
    assert!(migrate().await.status.success());
    let server = TestServer::start_with(&[], &url).await;
    assert_eq!(server.import(vec![request(numbered(0..10).collect())]).await.unwrap().imported, 10);
    let owner = KeyOwner::Workspace(server.workspace);
    server.store.issue_key(owner, Scope::Write, "", None).await.unwrap();
}
