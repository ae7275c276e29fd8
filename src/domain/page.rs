//! Which part of a list is meant: the filter, and the token that names the next page.
//!
//! A token carries the last key of a page and the total that the first page counted. It is signed together with the filter and the workspace it
//! was made for, so it is refused with any other, and when it was tampered with.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use time::OffsetDateTime;

use super::{address::Kind, error::Error, key::WorkspaceId};

/// The version of the token's layout; a token of another version is refused.
const VERSION: u8 = 1;
const SIGNATURE_BYTES: usize = 16;
const TOTAL_BYTES: usize = 8;

/// Which entries are meant: those that fit everything that is set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Entries of this kind.
    pub kind: Option<Kind>,
    /// Entries with exactly this reason.
    pub reason: Option<String>,
    /// Entries with this text in their canonical address; in lower case.
    pub search: Option<String>,
    /// Entries stored then or later.
    pub created_from: Option<OffsetDateTime>,
    /// Entries stored before.
    pub created_to: Option<OffsetDateTime>,
}

/// Where a page begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// The address that the page comes after.
    pub after: String,
    /// How many entries there were when the first page was asked for.
    pub total: i64,
}

impl Position {
    /// The token for a page of this list.
    pub fn to_token(&self, secret: &[u8], workspace: WorkspaceId, filter: &Filter) -> String {
        let mut bytes = vec![VERSION];
        bytes.extend_from_slice(&self.total.to_be_bytes());
        bytes.extend_from_slice(self.after.as_bytes());
        let signature = signature(secret, &bytes, workspace, filter).finalize().into_bytes();
        bytes.extend_from_slice(&signature[..SIGNATURE_BYTES]);
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Reads a token back.
    ///
    /// # Errors
    /// [`Error::Invalid`] unless the token was made for this workspace and filter.
    pub fn from_token(token: &str, secret: &[u8], workspace: WorkspaceId, filter: &Filter) -> Result<Self, Error> {
        Self::read(token, secret, workspace, filter).ok_or_else(|| {
            Error::invalid(
                "page_token",
                "The page token is damaged, or was made for another filter or workspace. Begin again without one.",
            )
        })
    }

    fn read(token: &str, secret: &[u8], workspace: WorkspaceId, filter: &Filter) -> Option<Self> {
        let digits = token.as_bytes().as_chunks::<2>();
        // One text for one token: no capitals, nothing left over.
        if !digits.1.is_empty() || !token.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return None;
        }
        let bytes: Vec<u8> =
            digits.0.iter().map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect::<Option<_>>()?;
        let (payload, signed) = bytes.split_at_checked(bytes.len().checked_sub(SIGNATURE_BYTES)?)?;
        signature(secret, payload, workspace, filter).verify_truncated_left(signed).ok()?;
        let (version, rest) = payload.split_first()?;
        let (total, after) = rest.split_first_chunk::<TOTAL_BYTES>()?;
        (*version == VERSION)
            .then(|| Some(Self { after: String::from_utf8(after.to_vec()).ok()?, total: i64::from_be_bytes(*total) }))
            .flatten()
    }
}

fn signature(secret: &[u8], payload: &[u8], workspace: WorkspaceId, filter: &Filter) -> Hmac<Sha256> {
    // A key of any length is good for an HMAC (RFC 2104), so this cannot fail; an empty MAC would refuse every token.
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).unwrap_or_else(|_| Hmac::new(&Default::default()));
    let mut part = |bytes: &[u8]| {
        mac.update(&(bytes.len() as u64).to_be_bytes());
        mac.update(bytes);
    };
    part(payload);
    part(&workspace.0.to_be_bytes());
    part(&[match filter.kind {
        None => 0,
        Some(Kind::Email) => 1,
        Some(Kind::Domain) => 2,
    }]);
    for text in [&filter.reason, &filter.search] {
        part(&[u8::from(text.is_some())]);
        part(text.as_deref().unwrap_or_default().as_bytes());
    }
    for time in [filter.created_from, filter.created_to] {
        part(&[u8::from(time.is_some())]);
        part(&time.map_or(0, OffsetDateTime::unix_timestamp_nanos).to_be_bytes());
    }
    mac
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_its_own_list_alone() {
        let (secret, workspace) = (b"secret".as_slice(), WorkspaceId(7));
        let filter = Filter { reason: Some("bounce".to_owned()), ..Filter::default() };
        let position = Position { after: "jürgen@example.de".to_owned(), total: 5_000_000 };
        let token = position.to_token(secret, workspace, &filter);
        let read =
            |token: &str, secret: &[u8], workspace, filter: &Filter| Position::from_token(token, secret, workspace, filter).ok();
        assert_eq!(read(&token, secret, workspace, &filter), Some(position));
        assert_eq!(read(&token, secret, WorkspaceId(8), &filter), None);
        assert_eq!(read(&token, b"other", workspace, &filter), None);
        assert_eq!(read(&token, secret, workspace, &Filter::default()), None);
        let moved = Filter { search: filter.reason.clone(), ..Filter::default() };
        assert_eq!(read(&token, secret, workspace, &moved), None);
        assert_eq!(read(&token.to_uppercase(), secret, workspace, &filter), None);
        for place in 0..token.len() {
            let mut tampered = token.clone().into_bytes();
            tampered[place] = if tampered[place] == b'0' { b'1' } else { b'0' };
            let tampered = String::from_utf8(tampered).expect("ASCII");
            assert_eq!(read(&tampered, secret, workspace, &filter), None, "{place}");
        }
        for nonsense in ["", "0", "zz", "ü", &token[2..], &token[..token.len() - 2]] {
            assert_eq!(read(nonsense, secret, workspace, &filter), None, "{nonsense}");
        }
    }
}
