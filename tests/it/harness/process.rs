//! `dnc serve` as a process, for tests of what only a process has: limits, signals, an exit status.

use std::{
    io::{BufRead, BufReader, Lines},
    process::{Child, ChildStderr, Command, ExitStatus},
};

/// A server process that is killed when its test ends, also when the test fails.
pub struct Process {
    child: Child,
    log: Option<Lines<BufReader<ChildStderr>>>,
    pub http_url: String,
    pub grpc_url: String,
}

impl Process {
    /// Starts the process, and waits until it serves. The command must log as JSON, to a pipe on
    /// standard error.
    pub fn serving(command: &mut Command) -> Self {
        let mut process = Self::starting(command);
        for line in process.log.as_mut().unwrap() {
            let line: serde_json::Value = serde_json::from_str(&line.unwrap()).unwrap();
            if line["message"] == "serving" {
                process.http_url = line["http"].as_str().unwrap_or_default().to_owned();
                process.grpc_url = line["grpc"].as_str().unwrap_or_default().to_owned();
                break;
            }
        }
        // The log is read on, so that its lines are not dropped.
        let log = process.log.take().unwrap();
        std::thread::spawn(move || log.for_each(drop));
        process
    }

    /// Starts the process without waiting for it.
    pub fn starting(command: &mut Command) -> Self {
        let mut child = command.spawn().unwrap();
        let log = child.stderr.take().map(|log| BufReader::new(log).lines());
        Self { child, log, http_url: String::new(), grpc_url: String::new() }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, name: &str) {
        assert!(Command::new("kill").args([name, &self.id().to_string()]).status().unwrap().success());
    }

    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
