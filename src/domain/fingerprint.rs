//! A hash of an import's first entries. It is stored with the idempotency key, and distinguishes a
//! repeat of the import from another import under the same key.

use sha2::{Digest, Sha256};

const HASH_BYTES: usize = 16;
const COUNT_BYTES: usize = 4;

type Hash = [u8; HASH_BYTES];

/// A hash of the entries in the first message of an import.
///
/// A repeated import may be split into messages differently. A repeat is therefore compared over as
/// many entries as were hashed. If its first message has fewer entries, only the first entry is
/// compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    count: u32,
    first: Hash,
    all: Hash,
}

/// An entry as the caller sent it.
#[derive(Clone, Copy, Debug)]
pub struct Sent<'a> {
    /// The text of the address. For an entry that its sender could not read: the message about it.
    pub address: &'a str,
    /// The number of the type; `None` for an unreadable entry.
    pub kind: Option<i32>,
    /// The reason; for an unreadable entry, its code.
    pub reason: &'a str,
    /// The time of the opt-out, if known, in seconds and nanoseconds.
    pub unsubscribed_at: Option<(i64, i32)>,
}

impl Fingerprint {
    /// The fingerprint of an import that begins with these entries.
    pub fn of<'a>(entries: impl IntoIterator<Item = Sent<'a>>) -> Self {
        let mut all = Sha256::new();
        let mut first = None;
        let mut count = 0_u32;
        for entry in entries {
            for text in [entry.address, entry.reason] {
                all.update((text.len() as u64).to_be_bytes());
                all.update(text.as_bytes());
            }
            // No type has the number that stands for `None`.
            all.update(entry.kind.unwrap_or(i32::MIN).to_be_bytes());
            if let Some((secs, nanos)) = entry.unsubscribed_at {
                all.update(secs.to_be_bytes());
                all.update(nanos.to_be_bytes());
            }
            first.get_or_insert_with(|| truncate(all.clone()));
            count = count.saturating_add(1);
        }
        Self { count, first: first.unwrap_or_default(), all: truncate(all) }
    }

    /// True when an import that begins with these entries can be a repeat of the import with this
    /// fingerprint.
    pub fn fits<'a>(&self, entries: impl ExactSizeIterator<Item = Sent<'a>>) -> bool {
        match (self.count as usize, entries.len()) {
            (0, count) => count == 0,
            (kept, count) if count >= kept => Self::of(entries.take(kept)) == *self,
            _ => Self::of(entries.take(1)).first == self.first,
        }
    }

    /// The stored form.
    pub fn to_bytes(&self) -> Vec<u8> {
        [self.count.to_be_bytes().as_slice(), &self.first, &self.all].concat()
    }

    /// Reads what [`Fingerprint::to_bytes`] wrote; `None` for anything else.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (count, rest) = bytes.split_first_chunk::<COUNT_BYTES>()?;
        let (first, rest) = rest.split_first_chunk::<HASH_BYTES>()?;
        Some(Self { count: u32::from_be_bytes(*count), first: *first, all: rest.try_into().ok()? })
    }
}

fn truncate(hash: Sha256) -> Hash {
    let mut bytes = Hash::default();
    bytes.copy_from_slice(&hash.finalize()[..HASH_BYTES]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn sent<'a>(address: &'a str, kind: i32, reason: &'a str) -> Sent<'a> {
        Sent { address, kind: Some(kind), reason, unsubscribed_at: None }
    }

    const SENT: [Sent<'_>; 3] = [sent("a@b.de", 0, ""), sent("c.de", 2, "manual"), sent("d@e.de", 1, "x")];

    #[test]
    fn a_repeat_fits_in_any_message_sizes_and_another_import_does_not() {
        for kept in 0..=3 {
            let fingerprint = Fingerprint::of(SENT[..kept].iter().copied());
            assert_eq!(Fingerprint::from_bytes(&fingerprint.to_bytes()), Some(fingerprint.clone()));
            for sent in 0..=3 {
                assert_eq!(fingerprint.fits(SENT[..sent].iter().copied()), (kept == 0) == (sent == 0), "{kept} {sent}");
            }
        }
        let fingerprint = Fingerprint::of(SENT);
        let fits = |index: usize, sent: Sent<'_>| {
            let mut other = SENT;
            other[index] = sent;
            fingerprint.fits(other.iter().copied())
        };
        assert!(fits(1, SENT[1]));
        for other in [
            sent("c.de", 1, "manual"),
            sent("c.de", 2, "manua"),
            sent("x.de", 2, "manual"),
            sent("c.dem", 2, "anual"),
            Sent { kind: None, ..SENT[1] },
            Sent { unsubscribed_at: Some((0, 0)), ..SENT[1] },
        ] {
            assert!(!fits(1, other), "{other:?}");
        }
        assert!(!fingerprint.fits([sent("x@b.de", 0, "")].into_iter()));
        assert_eq!(Fingerprint::from_bytes(b"short"), None);
        assert_eq!(Fingerprint::from_bytes(&[0; 37]), None);
    }

    #[test]
    fn the_stored_form_is_the_same_in_every_release() {
        // An idempotency key is valid for a day, also across an upgrade.
        let hex: String = Fingerprint::of(SENT).to_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "000000033a50c7498065b02db94c3e5d44169ff0dd2fd43b2746a261d8f7554d422193e8");
    }
}
