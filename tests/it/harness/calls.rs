//! One call of each kind, for tests that treat all of them alike.

use std::{
    ops::Range,
    pin::pin,
    task::Poll,
    time::{Duration, Instant},
};

use dnc::{
    gateway::Upstream,
    proto::{
        CheckEntriesRequest, DeleteEntriesRequest, EntryFilter, ExportEntriesRequest, ImportEntriesRequest, ImportOptions,
        ListDeletionsRequest, ListEntriesRequest, ListImportsRequest, ScrubEntriesRequest, SummarizeEntriesRequest,
        dnc_service_client::DncServiceClient,
    },
};
use tokio::{task::JoinSet, time::timeout};
use tonic::{Code, Status};

use super::with_key;
use crate::address_book::numbered;

/// The kinds of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    CheckOne,
    CheckMany,
    Scrub,
    DeleteNamed,
    DeleteFiltered,
    DeleteAll,
    ImportOneBatch,
    ImportManyBatches,
    ImportWithRequestId,
    ImportManyBatchesWithRequestId,
    DryRun,
    List,
    ListFiltered,
    Summarize,
    Export,
    ListImports,
    ListDeletions,
}

impl Kind {
    pub const ALL: [Self; 17] = [
        Self::CheckOne,
        Self::CheckMany,
        Self::Scrub,
        Self::DeleteNamed,
        Self::DeleteFiltered,
        Self::DeleteAll,
        Self::ImportOneBatch,
        Self::ImportManyBatches,
        Self::ImportWithRequestId,
        Self::ImportManyBatchesWithRequestId,
        Self::DryRun,
        Self::List,
        Self::ListFiltered,
        Self::Summarize,
        Self::Export,
        Self::ListImports,
        Self::ListDeletions,
    ];

    /// Makes the call and reads all of its answer. `number` makes the idempotency key unique.
    pub async fn make(self, mut client: DncServiceClient<Upstream>, key: &str, number: usize) -> Result<(), Status> {
        let names = |count| numbered(0..count).map(|entry| entry.email).collect::<Vec<_>>();
        let filter = Some(EntryFilter { search: "user00".to_owned(), ..EntryFilter::default() });
        match self {
            Self::CheckOne => client.check_entries(with_key(CheckEntriesRequest { emails: names(1) }, key)).await.map(drop),
            Self::CheckMany => client.check_entries(with_key(CheckEntriesRequest { emails: names(300) }, key)).await.map(drop),
            Self::Scrub => {
                let messages = [ScrubEntriesRequest { emails: names(300) }, ScrubEntriesRequest { emails: names(1) }];
                let answers = client.scrub_entries(with_key(tokio_stream::iter(messages), key)).await?;
                let mut answers = answers.into_inner();
                while answers.message().await?.is_some() {}
                Ok(())
            }
            Self::DeleteNamed => {
                let request = DeleteEntriesRequest { emails: names(200), ..DeleteEntriesRequest::default() };
                client.delete_entries(with_key(request, key)).await.map(drop)
            }
            Self::DeleteFiltered | Self::DeleteAll => {
                let filter = filter.filter(|_| self == Self::DeleteFiltered);
                let request = DeleteEntriesRequest { all: true, filter, ..DeleteEntriesRequest::default() };
                client.delete_entries(with_key(request, key)).await.map(drop)
            }
            Self::ImportOneBatch
            | Self::ImportManyBatches
            | Self::ImportWithRequestId
            | Self::ImportManyBatchesWithRequestId
            | Self::DryRun => {
                let options = ImportOptions {
                    validate_only: self == Self::DryRun,
                    request_id: match self {
                        Self::ImportWithRequestId | Self::ImportManyBatchesWithRequestId => format!("{self:?}{number}"),
                        _ => String::new(),
                    },
                    ..ImportOptions::default()
                };
                let entries: Vec<_> = match self {
                    Self::ImportOneBatch | Self::ImportWithRequestId => numbered(0..200).collect(),
                    _ => numbered(0..25_000).collect(),
                };
                let messages: Vec<_> = entries
                    .chunks(5_000)
                    .map(|entries| ImportEntriesRequest {
                        entries: entries.to_vec(),
                        options: Some(options.clone()),
                        ..ImportEntriesRequest::default()
                    })
                    .collect();
                client.import_entries(with_key(tokio_stream::iter(messages), key)).await.map(drop)
            }
            Self::List | Self::ListFiltered => {
                let filter = filter.filter(|_| self == Self::ListFiltered);
                client.list_entries(with_key(ListEntriesRequest { filter, ..ListEntriesRequest::default() }, key)).await.map(drop)
            }
            Self::Summarize => client.summarize_entries(with_key(SummarizeEntriesRequest {}, key)).await.map(drop),
            Self::ListImports => client.list_imports(with_key(ListImportsRequest::default(), key)).await.map(drop),
            Self::ListDeletions => client.list_deletions(with_key(ListDeletionsRequest::default(), key)).await.map(drop),
            Self::Export => {
                let mut messages = client.export_entries(with_key(ExportEntriesRequest::default(), key)).await?.into_inner();
                while messages.message().await?.is_some() {}
                Ok(())
            }
        }
    }
}

/// How a call ended, and how long it took.
#[derive(Debug)]
pub struct Outcome {
    kind: Kind,
    result: Result<(), Status>,
    pub elapsed: Duration,
}

impl Outcome {
    pub fn code(&self) -> Code {
        self.result.as_ref().err().map_or(Code::Ok, Status::code)
    }

    #[track_caller]
    pub fn require(&self, code: Code) {
        self.require_one_of(&[code]);
    }

    #[track_caller]
    pub fn require_one_of(&self, codes: &[Code]) {
        assert!(codes.contains(&self.code()), "{:?} after {:?}: {:?}", self.kind, self.elapsed, self.result);
    }
}

/// Makes calls of every kind at once, one for each of `numbers`.
pub fn make_all(client: &DncServiceClient<Upstream>, key: &str, numbers: Range<usize>) -> JoinSet<Outcome> {
    let mut calls = JoinSet::new();
    for number in numbers {
        for kind in Kind::ALL {
            let (client, key) = (client.clone(), key.to_owned());
            calls.spawn(async move {
                let began = Instant::now();
                let result = kind.make(client, &key, number).await;
                Outcome { kind, result, elapsed: began.elapsed() }
            });
        }
    }
    calls
}

/// Waits for calls. Every one must be answered within 60 seconds.
pub async fn all_of<T: 'static>(calls: JoinSet<T>) -> Vec<T> {
    timeout(Duration::from_secs(60), calls.join_all()).await.expect("every call is answered")
}

/// Polls `future` at most `polls` times and then drops it, as a server drops a call whose caller is
/// gone.
pub async fn give_up_after_polls<F: Future>(polls: usize, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut left = polls;
    std::future::poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match future.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}
