//! Who may stay connected. Descriptors and memory are limited, and whoever can reach a listener may open a connection without a key.
//!
//! When a listener has as many connections as it may have, or one address has, a new one takes the place of one that does nothing: first of those
//! that never made a call that was let in, then of those that rest, the longest rest first. So silent connections cannot keep others out, and no call
//! that runs is cut off for them. Only when every connection has a call in work, the new one is closed at once.

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

/// How often a full listener is worth a line in the log.
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

/// What a connection does, seen from outside.
#[derive(Debug)]
pub(super) struct Activity {
    opened_at: Instant,
    /// When the last call ended, in milliseconds after `opened_at`.
    rested_at_ms: AtomicU64,
    /// Calls in work, of every kind.
    calls: AtomicU32,
    /// Calls in work that need a key.
    guarded_calls: AtomicU32,
    /// True once a call was let in.
    is_known: AtomicBool,
    displaced: CancellationToken,
}

/// The place of one connection; free again when this is dropped.
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

    /// Finds a place for a connection from this address; none when all are in work.
    pub(super) fn place(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let address = counted_as(address);
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let from_there = held.by_number.values().filter(|(other, _)| *other == address).count();
        let is_full = held.by_number.len() >= self.max;
        if from_there >= self.per_address_max || is_full {
            if held.warned_at.is_none_or(|at| at.elapsed() > WARN_INTERVAL) {
                held.warned_at = Some(Instant::now());
                tracing::warn!(
                    connections = held.by_number.len(),
                    "too many connections; new ones take the place of those that rest"
                );
            }
            let candidates = held.by_number.iter().filter(|(_, (other, _))| from_there < self.per_address_max || *other == address);
            let (_, number) = candidates.filter_map(|(number, (_, activity))| Some((activity.worth()?, *number))).min()?;
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

/// Whoever has one IPv6 address has its whole network of 64 bits.
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
            rested_at_ms: AtomicU64::new(0),
            calls: AtomicU32::new(0),
            guarded_calls: AtomicU32::new(0),
            is_known: AtomicBool::new(false),
            displaced: CancellationToken::new(),
        }
    }

    /// Where the connection stands in the order in which places are given to others; none if it keeps its place.
    fn worth(&self) -> Option<(bool, Instant)> {
        let is_in_work = self.guarded_calls.load(Ordering::Relaxed) > 0;
        (!is_in_work).then(|| (self.is_known(), self.rested_at()))
    }

    /// Since when nothing has been in work here; the time of opening when nothing ever was.
    pub(super) fn rested_at(&self) -> Instant {
        self.opened_at + Duration::from_millis(self.rested_at_ms.load(Ordering::Relaxed))
    }

    /// True while a call of any kind is in work.
    pub(super) fn has_calls(&self) -> bool {
        self.calls.load(Ordering::Relaxed) > 0
    }

    /// True once a call that needs a key was let in.
    pub(super) fn is_known(&self) -> bool {
        self.is_known.load(Ordering::Relaxed)
    }

    pub(super) fn let_in(&self) {
        self.is_known.store(true, Ordering::Relaxed);
    }

    /// Waits until the place was given to another connection.
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

    /// The call was refused: what is left of it protects its connection no longer.
    pub(super) fn refused(&mut self) {
        self.activity.guarded_calls.fetch_sub(std::mem::take(&mut self.is_guarded).into(), Ordering::Relaxed);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.refused();
        let rested_at_ms = self.activity.opened_at.elapsed().as_millis() as u64;
        self.activity.rested_at_ms.fetch_max(rested_at_ms, Ordering::Relaxed);
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
    fn strangers_make_room_before_known_ones_and_those_in_work_stay() {
        let connections = Connections::new(3, 3);
        let [known, working, silent] = [(); 3].map(|()| connections.place(ONE).unwrap());
        known.activity.let_in();
        let call = Call::begin(working.activity.clone(), true);
        let newer = connections.place(TWO).unwrap();
        assert!(is_displaced(&silent) && !is_displaced(&known));
        let _work = Call::begin(newer.activity.clone(), true);
        let newest = connections.place(TWO).unwrap();
        assert!(is_displaced(&known));
        let mut refused = Call::begin(newest.activity.clone(), true);
        assert!(connections.place(TWO).is_none(), "all are in work");
        refused.refused();
        assert!(connections.place(TWO).is_some());
        assert!(is_displaced(&newest) && !is_displaced(&working));
        drop(call);
        assert!(connections.place(ONE).is_some());
    }

    #[test]
    fn an_address_takes_places_from_itself_alone() {
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
