//! What is shown while a file is read: a bar on a terminal, else a line now and then.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use indicatif::{HumanBytes, HumanCount, HumanDuration, ProgressBar, ProgressStyle};
use tokio_util::task::AbortOnDropHandle;

use super::input::Input;

/// How often progress is reported where there is no terminal to draw a bar on.
const REPORT_EVERY: Duration = Duration::from_secs(5);

/// Shown until it is dropped.
pub(super) struct Progress {
    bar: ProgressBar,
    _reporting: AbortOnDropHandle<()>,
}

impl Progress {
    /// Shows how much of `input` was read, and how many `rows` that are, called `noun`.
    pub(super) fn start(input: &Input, rows: Arc<AtomicU64>, noun: &'static str) -> Self {
        let (bytes, bytes_read, name) = (input.bytes, input.bytes_read.clone(), input.name.clone());
        let bar = match bytes {
            Some(bytes) => ProgressBar::new(bytes).with_style(style("{prefix} {bar:24} {bytes}/{total_bytes}  {msg}  {eta} left")),
            None => ProgressBar::new_spinner().with_style(style("{prefix} {spinner} {bytes}  {msg}  {elapsed}")),
        };
        bar.set_prefix(name.clone());
        let (drawn, started) = (bar.clone(), Instant::now());
        let reporting = tokio::spawn(async move {
            let every = if drawn.is_hidden() { REPORT_EVERY } else { Duration::from_millis(200) };
            let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
            loop {
                ticks.tick().await;
                let (rows, read) = (rows.load(Ordering::Relaxed), bytes_read.load(Ordering::Relaxed));
                let elapsed = started.elapsed();
                let rate = rows as f64 / elapsed.as_secs_f64();
                let rows = format!("{} {noun}, {}/s", HumanCount(rows), HumanCount(rate as u64));
                if drawn.is_hidden() {
                    let left = bytes.filter(|_| read > 0).map(|bytes| {
                        let left = elapsed.mul_f64(bytes.saturating_sub(read) as f64 / read as f64);
                        format!(" of {}, {} left", HumanBytes(bytes), HumanDuration(left))
                    });
                    eprintln!("dnc: {name}: {rows}, {}{}", HumanBytes(read), left.unwrap_or_default());
                } else {
                    drawn.set_position(read);
                    drawn.set_message(rows);
                }
            }
        });
        Self { bar, _reporting: AbortOnDropHandle::new(reporting) }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
