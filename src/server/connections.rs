//! Which connections stay open when there are too many.
//!
//! File descriptors and memory are limited, and anybody who can reach a listener can open a
//! connection without a key. When a listener is full, or one client address has as many connections
//! as it may have, a new connection replaces an idle one. Connections that never made an accepted
//! call go first, then the others, the longest idle first. So idle connections cannot keep others
//! out, and no running call is cut off to make room. Only when every connection has a call in work
//! is the new one closed at once.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};

use tokio::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// The least time between two log lines that say a listener is full.
const WARN_INTERVAL: Duration = Duration::from_secs(60);

/// The connections of one listener.
#[derive(Debug)]
pub(super) struct Connections {
    max: usize,
    per_address_max: usize,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    by_number: HashMap<u64, (IpAddr, Arc<Activity>)>,
    last_number: u64,
    warned_at: Option<Instant>,
}

/// What a connection is doing. Shared by the connection and the table of all connections.
#[derive(Debug)]
pub(super) struct Activity {
    opened_at: Instant,
    /// When the last call ended, in milliseconds since `opened_at`.
    idle_since_ms: AtomicU64,
    /// Calls in work, of every kind.
    calls: AtomicU32,
    /// Calls in work that need a key.
    guarded_calls: AtomicU32,
    /// True once a call with a valid key was accepted.
    is_known: AtomicBool,
    displaced: CancellationToken,
}

/// The place of one connection in the table. Dropping it frees the place.
#[derive(Debug)]
pub(super) struct Place {
    number: u64,
    connections: Arc<Connections>,
    pub(super) activity: Arc<Activity>,
}

/// A call in work.
#[derive(Debug)]
pub(super) struct Call {
    activity: Arc<Activity>,
    is_guarded: bool,
}

impl Connections {
    pub(super) fn new(max: usize, per_address_max: usize) -> Arc<Self> {
        Arc::new(Self { max, per_address_max, held: Mutex::default() })
    }

    pub(super) fn max(&self) -> usize {
        self.max
    }

    /// The number of open connections.
    pub(super) fn open(&self) -> usize {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).by_number.len()
    }

    /// A place for a new connection from `address`, or `None` when every other one has a call in
    /// work.
    pub(super) fn place(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let address = counted_as(address);
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let from_there = held.by_number.values().filter(|(other, _)| *other == address).count();
        let is_full = held.by_number.len() >= self.max;
        if from_there >= self.per_address_max || is_full {
            if held.warned_at.is_none_or(|at| at.elapsed() > WARN_INTERVAL) {
                held.warned_at = Some(Instant::now());
                tracing::warn!(connections = held.by_number.len(), "too many connections; new ones replace idle ones");
            }
            let candidates = held.by_number.iter().filter(|(_, (other, _))| from_there < self.per_address_max || *other == address);
            let (_, number) =
                candidates.filter_map(|(number, (_, activity))| Some((activity.replacement_order()?, *number))).min()?;
            if let Some((_, displaced)) = held.by_number.remove(&number) {
                displaced.displaced.cancel();
            }
        }
        held.last_number += 1;
        let (number, activity) = (held.last_number, Arc::new(Activity::new()));
        held.by_number.insert(number, (address, activity.clone()));
        Some(Place { number, connections: self.clone(), activity })
    }
}

/// The address that a connection is counted under. A client with one IPv6 address usually has the
/// whole 64-bit network, so that counts as one.
fn counted_as(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        address @ IpAddr::V4(_) => address,
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.held.lock().unwrap_or_else(PoisonError::into_inner).by_number.remove(&self.number);
    }
}

impl Activity {
    fn new() -> Self {
        Self {
            opened_at: Instant::now(),
            idle_since_ms: AtomicU64::new(0),
            calls: AtomicU32::new(0),
            guarded_calls: AtomicU32::new(0),
            is_known: AtomicBool::new(false),
            displaced: CancellationToken::new(),
        }
    }

    /// The order in which connections are replaced, smallest first; `None` for one that must stay.
    fn replacement_order(&self) -> Option<(bool, Instant)> {
        let is_in_work = self.guarded_calls.load(Ordering::Relaxed) > 0;
        (!is_in_work).then(|| (self.is_known(), self.idle_since()))
    }

    /// Since when no call has been in work; the time of opening if there never was one.
    pub(super) fn idle_since(&self) -> Instant {
        self.opened_at + Duration::from_millis(self.idle_since_ms.load(Ordering::Relaxed))
    }

    /// True while a call of any kind is in work.
    pub(super) fn has_calls(&self) -> bool {
        self.calls.load(Ordering::Relaxed) > 0
    }

    /// True once a call that needs a key was accepted.
    pub(super) fn is_known(&self) -> bool {
        self.is_known.load(Ordering::Relaxed)
    }

    pub(super) fn accepted(&self) {
        self.is_known.store(true, Ordering::Relaxed);
    }

    /// Waits until another connection has taken the place.
    pub(super) async fn displaced(&self) {
        self.displaced.cancelled().await;
    }
}

impl Call {
    /// Begins a call; `is_guarded` if it needs a key.
    pub(super) fn begin(activity: Arc<Activity>, is_guarded: bool) -> Self {
        activity.calls.fetch_add(1, Ordering::Relaxed);
        activity.guarded_calls.fetch_add(is_guarded.into(), Ordering::Relaxed);
        Self { activity, is_guarded }
    }

    /// Marks the call as rejected. From now on it no longer keeps its connection from being
    /// replaced.
    pub(super) fn rejected(&mut self) {
        self.activity.guarded_calls.fetch_sub(std::mem::take(&mut self.is_guarded).into(), Ordering::Relaxed);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.rejected();
        let idle_since_ms = self.activity.opened_at.elapsed().as_millis() as u64;
        self.activity.idle_since_ms.fetch_max(idle_since_ms, Ordering::Relaxed);
        self.activity.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const ONE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    const TWO: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));

    fn is_displaced(place: &Place) -> bool {
        place.activity.displaced.is_cancelled()
    }

    #[test]
    fn connections_without_an_accepted_call_are_replaced_first_and_those_in_work_stay() {
        let connections = Connections::new(3, 3);
        let [known, working, silent] = [(); 3].map(|()| connections.place(ONE).unwrap());
        known.activity.accepted();
        let call = Call::begin(working.activity.clone(), true);
        let newer = connections.place(TWO).unwrap();
        assert!(is_displaced(&silent) && !is_displaced(&known));
        let _work = Call::begin(newer.activity.clone(), true);
        let newest = connections.place(TWO).unwrap();
        assert!(is_displaced(&known));
        let mut rejected = Call::begin(newest.activity.clone(), true);
        assert!(connections.place(TWO).is_none(), "all are in work");
        rejected.rejected();
        assert!(connections.place(TWO).is_some());
        assert!(is_displaced(&newest) && !is_displaced(&working));
        drop(call);
        assert!(connections.place(ONE).is_some());
    }

    #[test]
    fn an_address_replaces_only_its_own_connections() {
        let connections = Connections::new(10, 2);
        let other = connections.place(TWO).unwrap();
        let [first, second] = [(); 2].map(|()| connections.place(ONE).unwrap());
        let _third = connections.place(ONE).unwrap();
        assert!(is_displaced(&first) && !is_displaced(&second) && !is_displaced(&other));
        drop((first, second));
        assert_eq!(connections.held.lock().unwrap().by_number.len(), 2);
    }

    #[test]
    fn an_ipv6_network_is_one_address() {
        let [one, same, other] = ["2001:db8::1", "2001:db8::ffff", "2001:db8:0:1::1"].map(|text| counted_as(text.parse().unwrap()));
        assert_eq!(one, same);
        assert_ne!(one, other);
        assert_eq!(counted_as("::ffff:192.0.2.1".parse().unwrap()), ONE);
    }
}
