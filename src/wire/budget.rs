//! The limit of the bytes that all calls together may have in work. It bounds the memory of a
//! server whatever is sent to it.
//!
//! A call takes a permit for the bytes of its request before the request is read, and holds it
//! until the request is processed. The batches of imports have budgets of their own, since a batch
//! outlives the messages from which it was filled. One owner (a workspace, or the credentials of an
//! HTTP caller) holds a quarter at most, so that no other owner waits because of it alone. Both
//! limits are tokio semaphores, which serve in order and lose nothing when a waiting call is
//! dropped.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How long the call of a request waits for its bytes before it is refused.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// Bytes are counted in units of this size, since a semaphore counts in `u32`.
const UNIT_BYTES: usize = 1 << 10;

/// One owner may hold the whole divided by this.
const OWNER_PART: u32 = 4;

/// The limit of bytes in work is reached. The call may be sent again a little later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too much in work")]
pub struct Exhausted;

/// The bytes that may be in work. Cheap to clone; all clones share the limit.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    total: Arc<Semaphore>,
    units: usize,
    owner_units_max: u32,
    wait_max: Duration,
    owners: Mutex<HashMap<u64, Weak<Semaphore>>>,
}

/// Bytes taken from a [`Budget`], until this is dropped.
#[derive(Debug)]
pub struct Permit {
    owner: OwnedSemaphorePermit,
    total: OwnedSemaphorePermit,
    budget: Budget,
}

impl Budget {
    /// Creates a budget of `bytes_max` bytes, at least 4 KiB. A call waits up to five seconds for
    /// its bytes before it is refused.
    pub fn new(bytes_max: usize) -> Self {
        Self::with_wait(bytes_max, WAIT_MAX)
    }

    /// Creates a budget of which a call waits up to `wait_max` for its bytes.
    pub fn with_wait(bytes_max: usize, wait_max: Duration) -> Self {
        let units = u32::try_from(bytes_max / UNIT_BYTES).unwrap_or(u32::MAX).clamp(OWNER_PART, u32::MAX >> 3);
        Self(Arc::new(Inner {
            total: Arc::new(Semaphore::new(units as usize)),
            units: units as usize,
            owner_units_max: units / OWNER_PART,
            wait_max,
            owners: Mutex::default(),
        }))
    }

    /// Takes `bytes` for `owner`, and waits for them. A request that is larger than an owner's part
    /// counts as that whole part, so it is served when nothing else of its owner is in work.
    ///
    /// # Errors
    /// [`Exhausted`] when the bytes did not become free in time.
    pub async fn acquire(&self, owner: u64, bytes: usize) -> Result<Permit, Exhausted> {
        let units = units(bytes, self.0.owner_units_max);
        let part = self.part_of(owner);
        let (owner, total) = self.take(part, units).await?;
        Ok(Permit { owner, total, budget: self.clone() })
    }

    /// Takes `bytes` for `owner`, if they are free and no other call waits for them.
    pub fn try_acquire(&self, owner: u64, bytes: usize) -> Option<Permit> {
        let units = units(bytes, self.0.owner_units_max);
        let owner = self.part_of(owner).try_acquire_many_owned(units).ok()?;
        let total = self.0.total.clone().try_acquire_many_owned(units).ok()?;
        Some(Permit { owner, total, budget: self.clone() })
    }

    /// How many bytes are held now, in units of 1 KiB.
    pub fn held_bytes(&self) -> usize {
        self.bytes_max() - self.0.total.available_permits() * UNIT_BYTES
    }

    /// How many bytes may be held.
    pub fn bytes_max(&self) -> usize {
        self.0.units * UNIT_BYTES
    }

    /// The owner's part comes first: a wait there holds nothing of the whole.
    async fn take(&self, part: Arc<Semaphore>, units: u32) -> Result<(OwnedSemaphorePermit, OwnedSemaphorePermit), Exhausted> {
        let both = async {
            let owner = part.acquire_many_owned(units).await.map_err(|_| Exhausted)?;
            let total = self.0.total.clone().acquire_many_owned(units).await.map_err(|_| Exhausted)?;
            Ok((owner, total))
        };
        tokio::time::timeout(self.0.wait_max, both).await.map_err(|_| Exhausted)?
    }

    fn part_of(&self, owner: u64) -> Arc<Semaphore> {
        let mut owners = self.0.owners.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(part) = owners.get(&owner).and_then(Weak::upgrade) {
            return part;
        }
        if owners.len() == owners.capacity() {
            // Instead of growing: owners that hold nothing and wait for nothing are removed.
            owners.retain(|_, part| part.strong_count() > 0);
        }
        let part = Arc::new(Semaphore::new(self.0.owner_units_max as usize));
        owners.insert(owner, Arc::downgrade(&part));
        part
    }
}

impl Permit {
    /// Changes the number of bytes held. Excess bytes are released at once; for more bytes it waits
    /// as [`Budget::acquire`] does.
    ///
    /// # Errors
    /// [`Exhausted`] when the bytes did not become free in time; the permit then holds what it held
    /// before.
    pub async fn resize(&mut self, bytes: usize) -> Result<(), Exhausted> {
        let missing = self.missing_units(bytes);
        if missing > 0 {
            let (owner, total) = self.budget.take(self.owner.semaphore().clone(), missing).await?;
            self.owner.merge(owner);
            self.total.merge(total);
        }
        self.shrink(bytes);
        Ok(())
    }

    /// Takes more bytes, up to `bytes` in all, if they are free and no other call waits for them.
    pub fn try_grow(&mut self, bytes: usize) -> bool {
        let missing = self.missing_units(bytes);
        let Ok(owner) = self.owner.semaphore().clone().try_acquire_many_owned(missing) else { return false };
        let Ok(total) = self.total.semaphore().clone().try_acquire_many_owned(missing) else { return false };
        self.owner.merge(owner);
        self.total.merge(total);
        true
    }

    /// How many bytes are held.
    pub fn bytes(&self) -> usize {
        self.total.num_permits() * UNIT_BYTES
    }

    fn missing_units(&self, bytes: usize) -> u32 {
        units(bytes, self.budget.0.owner_units_max).saturating_sub(self.total.num_permits() as u32)
    }

    /// Releases at once what is held beyond `bytes`.
    pub fn shrink(&mut self, bytes: usize) {
        let (wanted, held) = (units(bytes, self.budget.0.owner_units_max) as usize, self.total.num_permits());
        // Dropping the split-off part releases it.
        self.owner.split(held.saturating_sub(wanted));
        self.total.split(held.saturating_sub(wanted));
    }
}

fn units(bytes: usize, units_max: u32) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX).clamp(1, units_max)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const MIB: usize = 1 << 20;

    #[tokio::test]
    async fn one_owner_holds_a_quarter_and_others_go_on() {
        let budget = Budget::new(4 * MIB);
        let held = budget.acquire(1, MIB).await.unwrap();
        assert!(budget.acquire(1, 1).now_or_never().is_none());
        budget.acquire(2, MIB).now_or_never().unwrap().unwrap();
        let mut waits = Box::pin(budget.acquire(1, MIB));
        assert!(waits.as_mut().now_or_never().is_none());
        drop(held);
        waits.await.unwrap();
    }

    #[tokio::test]
    async fn the_whole_is_limited_and_is_released() {
        let budget = Budget::new(4 * MIB);
        let held: Vec<_> = futures_util::future::join_all((0..4).map(|owner| budget.acquire(owner, 9 * MIB))).await;
        assert!(held.iter().all(Result::is_ok));
        assert_eq!(budget.acquire(9, 1).await.unwrap_err(), Exhausted);
        // A call that is dropped while it waits leaves nothing behind.
        assert!(budget.acquire(8, MIB).now_or_never().is_none());
        drop(held);
        assert_eq!(budget.0.total.available_permits(), 4 * MIB / UNIT_BYTES);
        let held: Vec<_> = futures_util::future::join_all((0..4).map(|owner| budget.acquire(owner, MIB))).await;
        assert!(held.iter().all(Result::is_ok));
    }

    #[tokio::test]
    async fn a_permit_shrinks_and_grows() {
        let budget = Budget::new(4 * MIB);
        let mut permit = budget.acquire(1, MIB).await.unwrap();
        permit.resize(MIB / 2).await.unwrap();
        let other = budget.acquire(1, MIB / 2).now_or_never().unwrap().unwrap();
        assert!(permit.resize(MIB).now_or_never().is_none());
        drop(other);
        permit.resize(MIB).await.unwrap();
        drop(permit);
        assert_eq!(budget.0.total.available_permits(), 4 * MIB / UNIT_BYTES);
    }

    #[tokio::test]
    async fn owners_that_hold_nothing_are_removed() {
        let budget = Budget::new(MIB);
        for owner in 0..10_000 {
            budget.acquire(owner, 1).await.unwrap();
        }
        assert!(budget.0.owners.lock().unwrap().len() < 100);
    }
}
