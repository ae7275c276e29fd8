//! Limits how many statements use the database at once. Each kind of work has its own slots, and no
//! workspace may take all of them: a slot remains for the next workspace, however much one of them
//! requests.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::error::busy;
use crate::domain::{Error, WorkspaceId};

/// How long each part of long work may wait for a slot.
const LONG_WAIT: Duration = Duration::from_secs(60);

/// How long a short read may wait for a slot. After that its caller is better served by an error.
const SHORT_WAIT: Duration = Duration::from_secs(8);

/// Slots for lookups that belong to no workspace.
const SERVICE_SLOTS: usize = 2;

/// The kind of a piece of work, and the workspace that it is done for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Share {
    /// Lookups on which every call depends, such as those of API keys, for all workspaces.
    Service,
    /// Statements that find rows by key: checks, pages, deletions of named entries.
    LookUp(WorkspaceId),
    /// A page of an export. It is as short as a lookup. But an export asks for the next page at
    /// once, and fails if it does not get it.
    Export(WorkspaceId),
    /// A batch of an import or of a dry run.
    Import(WorkspaceId),
    /// Work that may read a whole list: counts, filtered pages, deletions by filter.
    Scan(WorkspaceId),
}

/// Permission to use the database, until it is dropped.
#[derive(Debug)]
pub(super) struct Slot {
    _of_workspace: Option<OwnedSemaphorePermit>,
    _of_all: OwnedSemaphorePermit,
}

/// The slots of a store, by kind of work.
#[derive(Debug)]
pub(super) struct Shares {
    service: Arc<Semaphore>,
    look_ups: Slots,
    exports: Slots,
    imports: Slots,
    scans: Slots,
}

impl Shares {
    /// Divides this many connections, at least 4: an eighth for scans (two from 8 on), nearly a
    /// half for imports, and the rest for lookups and [`Share::Service`]. Lookups may also use
    /// connections that imports and scans leave idle, up to three quarters of all: lookups are
    /// short and return them in a moment. So may exports, whose pages are as short, up to a quarter
    /// of all.
    pub(super) fn of(connections_max: usize) -> Self {
        let scans = (connections_max / 8).max(if connections_max < 8 { 1 } else { 2 });
        let imports = (connections_max / 2 - usize::from(connections_max < 8)).max(1);
        let look_ups = (connections_max * 3 / 4).max(2);
        let exports = (connections_max / 4).max(2);
        // Lookups are short, so one slot for other workspaces means a short wait. The other kinds
        // take long, so one workspace may have half of the slots.
        Self {
            service: Arc::new(Semaphore::new(SERVICE_SLOTS)),
            look_ups: Slots::new(look_ups, look_ups - 1),
            exports: Slots::new(exports, exports.div_ceil(2)),
            imports: Slots::new(imports, imports.div_ceil(2)),
            scans: Slots::new(scans, scans.div_ceil(2)),
        }
    }

    /// Waits for a slot.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when none is free in time.
    pub(super) async fn acquire(&self, share: Share) -> Result<Slot, Error> {
        let (slots, workspace, wait) = match share {
            Share::Service => {
                let of_all = timeout(SHORT_WAIT, self.service.clone().acquire_owned()).await.map_err(|_| busy())?;
                return Ok(Slot { _of_workspace: None, _of_all: of_all.map_err(Error::internal)? });
            }
            Share::LookUp(workspace) => (&self.look_ups, workspace, SHORT_WAIT),
            Share::Export(workspace) => (&self.exports, workspace, LONG_WAIT),
            Share::Import(workspace) => (&self.imports, workspace, LONG_WAIT),
            Share::Scan(workspace) => (&self.scans, workspace, LONG_WAIT),
        };
        timeout(wait, slots.acquire(workspace)).await.unwrap_or_else(|_| Err(busy()))
    }
}

/// The slots of one kind of work.
#[derive(Debug)]
struct Slots {
    all: Arc<Semaphore>,
    /// The number of slots that one workspace may have at once.
    workspace_max: usize,
    /// The slots of each workspace that has or waits for one.
    by_workspace: Mutex<HashMap<WorkspaceId, Weak<Semaphore>>>,
}

impl Slots {
    fn new(count: usize, workspace_max: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(count)), workspace_max: workspace_max.max(1), by_workspace: Mutex::default() }
    }

    async fn acquire(&self, workspace: WorkspaceId) -> Result<Slot, Error> {
        // The workspace's own slot comes first: its excess work waits there and blocks no other
        // workspace.
        let of_workspace = self.own(workspace).acquire_owned().await.map_err(Error::internal)?;
        let of_all = self.all.clone().acquire_owned().await.map_err(Error::internal)?;
        Ok(Slot { _of_workspace: Some(of_workspace), _of_all: of_all })
    }

    fn own(&self, workspace: WorkspaceId) -> Arc<Semaphore> {
        let mut by_workspace = self.by_workspace.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = by_workspace.get(&workspace).and_then(Weak::upgrade) {
            return own;
        }
        // Instead of growing: workspaces that hold nothing and wait for nothing are removed.
        if by_workspace.len() == by_workspace.capacity() {
            by_workspace.retain(|_, own| own.strong_count() > 0);
        }
        let own = Arc::new(Semaphore::new(self.workspace_max));
        by_workspace.insert(workspace, Arc::downgrade(&own));
        own
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const OURS: WorkspaceId = WorkspaceId(1);
    const THEIRS: WorkspaceId = WorkspaceId(2);

    #[tokio::test]
    async fn no_workspace_has_all_slots_and_none_waits_for_what_another_has_too_much_of() {
        for connections_max in [4, 5, 8, 16, 100] {
            let shares = Shares::of(connections_max);
            let counts =
                [&shares.look_ups, &shares.exports, &shares.imports, &shares.scans].map(|slots| slots.all.available_permits());
            assert!(counts[2] + counts[3] < connections_max, "look-ups always have a connection that nothing long holds");
            for share in [Share::LookUp, Share::Export, Share::Import, Share::Scan] {
                // Unconstrained, because the runtime otherwise forces a task that never waits to
                // yield.
                let try_acquire =
                    |share| tokio::task::unconstrained(shares.acquire(share)).now_or_never().map(|slot| slot.expect("open"));
                let mut held = Vec::new();
                while let Some(slot) = try_acquire(share(OURS)) {
                    held.push(slot);
                }
                let mut waiting = Box::pin(shares.acquire(share(OURS)));
                assert!(waiting.as_mut().now_or_never().is_none());
                // A single slot cannot be shared, only used in turn.
                if !(held.len() == 1 && counts.contains(&1)) {
                    assert!(try_acquire(share(THEIRS)).is_some(), "{connections_max} {:?}", share(THEIRS));
                }
                // A cancelled wait leaves nothing behind, and a returned slot is free.
                drop(waiting);
                held.pop();
                assert!(try_acquire(share(OURS)).is_some());
            }
        }
    }

    #[test]
    fn the_connections_are_divided_among_the_kinds_of_work() {
        // All slots and those of one workspace, of look-ups, exports, imports and scans.
        for (connections_max, expected) in [
            (4, [(3, 2), (2, 1), (1, 1), (1, 1)]),
            (7, [(5, 4), (2, 1), (2, 1), (1, 1)]),
            (8, [(6, 5), (2, 1), (4, 2), (2, 1)]),
            (16, [(12, 11), (4, 2), (8, 4), (2, 1)]),
            (100, [(75, 74), (25, 13), (50, 25), (12, 6)]),
        ] {
            let Shares { look_ups, exports, imports, scans, .. } = Shares::of(connections_max);
            let divided = [look_ups, exports, imports, scans].map(|slots| (slots.all.available_permits(), slots.workspace_max));
            assert_eq!(divided, expected, "{connections_max}");
        }
    }

    #[tokio::test]
    async fn workspaces_that_have_no_slot_are_forgotten() {
        let shares = Shares::of(16);
        for number in 0..10_000 {
            drop(shares.acquire(Share::LookUp(WorkspaceId(number))).await.expect("a slot"));
        }
        assert!(shares.look_ups.by_workspace.lock().expect("not poisoned").len() < 100);
    }

    #[tokio::test]
    async fn a_workspace_that_has_slots_is_remembered() {
        let slots = Slots::new(2, 1);
        let _held = slots.acquire(OURS).await.expect("a slot");
        for number in 10..100 {
            drop(slots.acquire(WorkspaceId(number)).await.expect("a slot"));
        }
        assert!(slots.acquire(OURS).now_or_never().is_none());
    }
}
