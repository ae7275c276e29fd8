//! An answer that is made while its request still comes, kept for a caller who sends everything
//! before it reads anything. Most HTTP clients do.
//!
//! Without this, such a caller and the server would wait for each other once the buffers of the
//! connection are full. What the caller does not take goes into an unnamed temporary file, so
//! memory stays constant. An answer that outgrows the file waits for its reader.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::body::Bytes;
use futures_util::{Stream, StreamExt, stream};
use tokio::{sync::Notify, task::spawn_blocking};
use tokio_util::task::AbortOnDropHandle;

use crate::wire::running::Progress;

/// Bytes of one answer that are kept in memory, and in the file.
const MEMORY_BYTES_MAX: usize = 256 << 10;
const FILE_BYTES_MAX: u64 = 256 << 20;

/// Bytes that are read from the file at once.
const READ_BYTES: usize = 64 << 10;

/// What was made and not yet taken: first the pieces in memory, then those in the file.
#[derive(Default)]
struct Kept {
    pieces: VecDeque<Vec<u8>>,
    pieces_bytes: usize,
    file: Option<Arc<File>>,
    /// Where in the file the next piece goes, and where the reader goes on.
    written: u64,
    read: u64,
    /// How the parts ended, once they have.
    end: Option<io::Result<()>>,
}

#[derive(Default)]
struct Spool {
    kept: Mutex<Kept>,
    /// There is something to read, and there is room again.
    filled: Notify,
    drained: Notify,
}

/// What the reader does next.
enum Next {
    Piece(Vec<u8>),
    Read(Arc<File>, u64, usize),
    End(io::Result<()>),
    Wait,
}

/// The same parts, taken as they come, whether or not the reader takes them. `progress` is reported
/// for each. Dropping the answer ends the taking.
pub(super) fn spooled(
    parts: impl Stream<Item = io::Result<Vec<u8>>> + Send + 'static,
    progress: Progress,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    let spool = Arc::new(Spool::default());
    let taking = {
        let spool = spool.clone();
        tokio::spawn(async move {
            let end = spool.take(parts, &progress).await;
            spool.kept().end = Some(end);
            spool.filled.notify_one();
        })
    };
    let reader = (spool, AbortOnDropHandle::new(taking));
    stream::try_unfold(reader, |(spool, taking)| async move {
        let piece = spool.next().await?;
        Ok(piece.map(|piece| (piece, (spool, taking))))
    })
}

impl Spool {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn take(&self, parts: impl Stream<Item = io::Result<Vec<u8>>>, progress: &Progress) -> io::Result<()> {
        let mut parts = std::pin::pin!(parts);
        while let Some(part) = parts.next().await {
            let mut part = part?;
            progress.report();
            loop {
                let pushed = self.kept().push(part);
                let Err(refused) = pushed else { break };
                part = refused;
                let free = self.kept().free(part.len());
                match free {
                    Some((file, at)) => {
                        self.write(file, at, part).await?;
                        break;
                    }
                    None => self.drained.notified().await,
                }
            }
            self.filled.notify_one();
        }
        Ok(())
    }

    async fn write(&self, file: Option<Arc<File>>, at: u64, part: Vec<u8>) -> io::Result<()> {
        let bytes = part.len() as u64;
        let written = spawn_blocking(move || {
            let file = file.map_or_else(|| tempfile::tempfile().map(Arc::new), Ok)?;
            file.write_all_at(&part, at)?;
            Ok::<_, io::Error>(file)
        });
        let file = written.await.map_err(io::Error::other)??;
        let mut kept = self.kept();
        kept.file = Some(file);
        kept.written = at + bytes;
        Ok(())
    }

    async fn next(&self) -> io::Result<Option<Bytes>> {
        loop {
            let next = self.kept().next();
            match next {
                Next::Piece(piece) => {
                    self.drained.notify_one();
                    return Ok(Some(piece.into()));
                }
                Next::Read(file, at, bytes) => {
                    let read = spawn_blocking(move || {
                        let mut piece = vec![0; bytes];
                        file.read_exact_at(&mut piece, at).map(|()| piece)
                    });
                    let piece = read.await.map_err(io::Error::other)??;
                    self.kept().read += bytes as u64;
                    self.drained.notify_one();
                    return Ok(Some(piece.into()));
                }
                Next::End(end) => return end.map(|()| None),
                Next::Wait => self.filled.notified().await,
            }
        }
    }
}

impl Kept {
    /// Keeps a part in memory if it fits there and nothing is in the file, which comes later.
    /// Gives it back otherwise.
    fn push(&mut self, part: Vec<u8>) -> Result<(), Vec<u8>> {
        let fits = self.pieces.is_empty() || self.pieces_bytes + part.len() <= MEMORY_BYTES_MAX;
        if self.read < self.written || !fits {
            return Err(part);
        }
        self.pieces_bytes += part.len();
        self.pieces.push_back(part);
        Ok(())
    }

    /// The file, if there is one already, and where a part of this length goes in it; `None` when
    /// it has to wait.
    fn free(&mut self, bytes: usize) -> Option<(Option<Arc<File>>, u64)> {
        if self.read == self.written {
            // Everything in the file has been taken: it is filled from its beginning again.
            (self.read, self.written) = (0, 0);
        }
        (self.written + bytes as u64 <= FILE_BYTES_MAX).then(|| (self.file.clone(), self.written))
    }

    fn next(&mut self) -> Next {
        if let Some(piece) = self.pieces.pop_front() {
            self.pieces_bytes -= piece.len();
            return Next::Piece(piece);
        }
        match (&self.file, self.written - self.read) {
            (Some(file), 1..) => {
                let bytes = READ_BYTES.min(usize::try_from(self.written - self.read).unwrap_or(READ_BYTES));
                Next::Read(file.clone(), self.read, bytes)
            }
            _ => self.end.take().map_or(Next::Wait, Next::End),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Parts of different lengths, and a count of those that were taken.
    fn parts(count: usize) -> (impl Stream<Item = io::Result<Vec<u8>>> + Send + 'static, Arc<AtomicUsize>) {
        let taken = Arc::new(AtomicUsize::new(0));
        let counted = taken.clone();
        let parts = stream::iter(0..count).map(move |number| {
            counted.fetch_add(1, Ordering::SeqCst);
            Ok(part(number))
        });
        (parts, taken)
    }

    fn part(number: usize) -> Vec<u8> {
        format!("{number};").repeat(1 + number % 7 * 400).into_bytes()
    }

    fn expected(count: usize) -> Vec<u8> {
        (0..count).flat_map(part).collect()
    }

    async fn read(answer: impl Stream<Item = io::Result<Bytes>>) -> io::Result<Vec<u8>> {
        let mut answer = std::pin::pin!(answer);
        let mut bytes = Vec::new();
        while let Some(piece) = answer.next().await {
            bytes.extend_from_slice(&piece?);
        }
        Ok(bytes)
    }

    async fn until(is_so: impl Fn() -> bool) {
        while !is_so() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_reader_may_come_late_or_keep_pace() {
        const COUNT: usize = 500;
        assert!(expected(COUNT).len() > 4 * MEMORY_BYTES_MAX);
        for late in [0, 1, COUNT / 2, COUNT] {
            let (parts, taken) = parts(COUNT);
            let answer = spooled(parts, Progress::default());
            until(|| taken.load(Ordering::SeqCst) >= late).await;
            assert!(read(answer).await.expect("no fault") == expected(COUNT), "{late}");
        }
    }

    #[tokio::test]
    async fn a_fault_comes_after_what_was_made_before_it() {
        let (parts, _) = parts(300);
        let parts = parts.chain(stream::iter([Err(io::Error::other("broken"))]));
        let mut answer = std::pin::pin!(spooled(parts, Progress::default()));
        let mut bytes = Vec::new();
        let fault = loop {
            match answer.next().await.expect("a fault at the end") {
                Ok(piece) => bytes.extend_from_slice(&piece),
                Err(fault) => break fault,
            }
        };
        assert!(bytes == expected(300) && fault.to_string() == "broken");
    }

    #[tokio::test]
    async fn nothing_is_taken_for_a_reader_who_is_gone() {
        let (sender, parts) = tokio::sync::mpsc::channel::<io::Result<Vec<u8>>>(1);
        let answer = spooled(tokio_stream::wrappers::ReceiverStream::new(parts), Progress::default());
        sender.send(Ok(vec![1])).await.expect("taken");
        drop(answer);
        sender.closed().await;
    }
}
