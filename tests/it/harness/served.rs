//! The program in a process of its own, which a test may kill.

#![allow(dead_code, reason = "each program that includes this file uses a part of it")]

use std::{
    io,
    path::Path,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

/// `dnc serve` on free ports. The process is killed when this is dropped.
pub struct Served {
    child: Child,
    pub http_url: String,
    pub grpc_url: String,
    /// Empty unless `--metrics-addr` is given.
    pub metrics_url: String,
    about_replica: Arc<Mutex<Vec<String>>>,
}

impl Served {
    /// Starts the process, and waits until it serves.
    ///
    /// # Errors
    /// When it ends instead, or does not serve within 30 seconds.
    pub async fn start(program: &Path, flags: &[&str], database_url: &str) -> io::Result<Self> {
        let mut child = Self::spawn(program, flags, database_url)?;
        let mut log = BufReader::new(child.stderr.take().ok_or(io::ErrorKind::BrokenPipe)?).lines();
        let about_replica = Arc::<Mutex<Vec<String>>>::default();
        let kept = about_replica.clone();
        let keep = move |line: String| {
            let line: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
            if let (Some("dnc::store::replica"), Some(message)) = (line["target"].as_str(), line["message"].as_str()) {
                kept.lock().unwrap_or_else(PoisonError::into_inner).push(message.to_owned());
            }
            line
        };
        let serving = async {
            while let Some(line) = log.next_line().await? {
                let line = keep(line);
                if let (Some(http), Some(grpc)) = (line["http"].as_str(), line["grpc"].as_str()) {
                    let metrics = line["metrics"].as_str().unwrap_or_default();
                    return Ok((http.to_owned(), grpc.to_owned(), metrics.to_owned()));
                }
            }
            Err(io::Error::other("the server ended instead of serving"))
        };
        let (http_url, grpc_url, metrics_url) =
            tokio::time::timeout(Duration::from_secs(30), serving).await.map_err(|_| io::ErrorKind::TimedOut)??;
        // The log is read on, so that its lines are not dropped.
        tokio::spawn(async move {
            while let Ok(Some(line)) = log.next_line().await {
                keep(line);
            }
        });
        Ok(Self { child, http_url, grpc_url, metrics_url, about_replica })
    }

    /// What it has logged about its replica.
    pub fn log_about_replica(&self) -> Vec<String> {
        self.about_replica.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Starts the process without waiting for it.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn(program: &Path, flags: &[&str], database_url: &str) -> io::Result<Child> {
        Command::new(program)
            .args(["serve", "--http-addr", "127.0.0.1:0", "--grpc-addr", "127.0.0.1:0", "--log-format", "json"])
            .args(flags)
            .env("DATABASE_URL", database_url)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
    }

    /// Sends the process a signal, such as `TERM`.
    pub fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    /// Waits until the process has ended.
    ///
    /// # Errors
    /// When it does not end within `limit`.
    pub async fn ended_within(&mut self, limit: Duration) -> io::Result<ExitStatus> {
        tokio::time::timeout(limit, self.child.wait()).await.map_err(|_| io::ErrorKind::TimedOut)?
    }

    /// How many files and sockets the process has open.
    ///
    /// # Errors
    /// When it has ended.
    pub fn descriptors(&self) -> io::Result<usize> {
        let pid = self.child.id().ok_or(io::ErrorKind::NotFound)?;
        Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
    }
}

/// Sends a signal to a process, unless it has ended.
pub fn signal(pid: Option<u32>, name: &str) {
    if let Some(pid) = pid {
        let _ = std::process::Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
    }
}
