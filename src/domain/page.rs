//! Filters, and the tokens that name the next page of a list.
//!
//! A token holds the last address of a page, and the total that the first page counted. It is
//! encrypted, because tokens end up in logs and browser histories, which must not contain
//! addresses. It is authenticated, and bound to its filter and workspace: a token that was
//! modified, or comes with another filter or workspace, is rejected. Its nonce is random and long
//! enough (192 bits) for any number of tokens under one key.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use chacha20poly1305::{
    XChaCha20Poly1305, XNonce,
    aead::{Aead, KeyInit, Payload},
};
use hmac::{Hmac, Mac};
use sha2::Sha256;
use time::OffsetDateTime;

use super::{address::Kind, error::Error, key::WorkspaceId};

/// Names the use of the key and the token's layout. A token of another layout is rejected.
const PURPOSE: &[u8] = b"dnc page token 3";
const NONCE_BYTES: usize = 24;
const NUMBER_BYTES: usize = 8;
/// The total in a token of a list that was not counted.
const NOT_COUNTED: i64 = -1;

/// Selects the entries that match all fields that are set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Entries of this kind.
    pub kind: Option<Kind>,
    /// Entries with exactly this reason.
    pub reason: Option<String>,
    /// Entries with this text in their canonical address. The text is in lower case.
    pub search: Option<String>,
    /// Entries stored at this time or later.
    pub created_from: Option<OffsetDateTime>,
    /// Entries stored before this time.
    pub created_to: Option<OffsetDateTime>,
}

impl Filter {
    /// True when nothing but the kind and the reason decides.
    pub fn is_by_kind_and_reason(&self) -> bool {
        self.search.is_none() && self.created_from.is_none() && self.created_to.is_none()
    }
}

/// The position at which a page begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// The page begins after this address.
    pub after: String,
    /// The number of matching entries when the first page was read; `None` if they were not
    /// counted.
    pub total: Option<i64>,
    /// The number of entries, matching or not, that the pages until here examined.
    pub examined: i64,
}

impl Position {
    /// Encodes the position as a token for this workspace and filter.
    ///
    /// # Errors
    /// [`Error::Internal`] when the system has no random numbers.
    pub fn to_token(&self, secret: &[u8], workspace: WorkspaceId, filter: &Filter) -> Result<String, Error> {
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(|error| Error::internal(error.to_string()))?;
        let (total, examined) = (self.total.unwrap_or(NOT_COUNTED).to_be_bytes(), self.examined.to_be_bytes());
        let msg = [&total, &examined, self.after.as_bytes()].concat();
        let payload = Payload { msg: &msg, aad: &list_bytes(workspace, filter) };
        let encrypted =
            cipher(secret).encrypt(&XNonce::from(nonce), payload).map_err(|error| Error::internal(error.to_string()))?;
        Ok(URL_SAFE_NO_PAD.encode([nonce.as_slice(), &encrypted].concat()))
    }

    /// Decodes a token.
    ///
    /// # Errors
    /// [`Error::Invalid`] unless the token was made for this workspace and filter.
    pub fn from_token(token: &str, secret: &[u8], workspace: WorkspaceId, filter: &Filter) -> Result<Self, Error> {
        Self::decode(token, secret, workspace, filter).ok_or_else(|| {
            Error::invalid(
                "page_token",
                "The page token is damaged, or was made for another filter or workspace. Begin again without one.",
            )
        })
    }

    fn decode(token: &str, secret: &[u8], workspace: WorkspaceId, filter: &Filter) -> Option<Self> {
        // The engine accepts exactly one text for each token: no trailing bits, no padding.
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (nonce, encrypted) = bytes.split_first_chunk::<NONCE_BYTES>()?;
        let payload = Payload { msg: encrypted, aad: &list_bytes(workspace, filter) };
        let decrypted = cipher(secret).decrypt(&XNonce::from(*nonce), payload).ok()?;
        let (total, rest) = decrypted.split_first_chunk::<NUMBER_BYTES>()?;
        let (examined, after) = rest.split_first_chunk::<NUMBER_BYTES>()?;
        let total = Some(i64::from_be_bytes(*total)).filter(|total| *total != NOT_COUNTED);
        Some(Self { after: String::from_utf8(after.to_vec()).ok()?, total, examined: i64::from_be_bytes(*examined) })
    }
}

/// The cipher. Its key is derived from the secret, for this use only.
fn cipher(secret: &[u8]) -> XChaCha20Poly1305 {
    // HMAC accepts a key of any length (RFC 2104), so this cannot fail. The fallback key would
    // reject every token.
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).unwrap_or_else(|_| Hmac::new(&Default::default()));
    mac.update(PURPOSE);
    XChaCha20Poly1305::new(&mac.finalize().into_bytes())
}

/// The workspace and the filter that a token belongs to, as bytes that differ for any two of them.
fn list_bytes(workspace: WorkspaceId, filter: &Filter) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut part = |part: &[u8]| {
        bytes.extend_from_slice(&(part.len() as u64).to_be_bytes());
        bytes.extend_from_slice(part);
    };
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
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::spelled;

    #[test]
    fn arbitrary_bytes_are_rejected_as_tokens() {
        let (secret, workspace, filter) = (b"secret".as_slice(), WorkspaceId(7), Filter::default());
        let read = |token: &str| Position::from_token(token, secret, workspace, &filter).ok();
        bolero::check!(name = "token").for_each(|bytes| {
            let text = String::from_utf8_lossy(bytes).into_owned();
            let alphabet = ["A", "B", "Z", "a", "z", "0", "9", "-", "_", "=", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"];
            for invalid in [text.clone(), spelled(bytes, &alphabet), URL_SAFE_NO_PAD.encode(bytes)] {
                assert_eq!(read(&invalid), None);
            }
            let sum = bytes.iter().map(|byte| i64::from(*byte)).sum();
            let position = Position { after: text, total: (sum % 2 == 0).then_some(sum), examined: 2 * sum };
            let token = position.to_token(secret, workspace, &filter).expect("random numbers");
            assert_eq!(read(&token), Some(position));
            // One character changed, one more, one fewer.
            let index = bytes.first().map_or(0, |byte| usize::from(*byte)) % token.len();
            for with in ["", "0", "A", "ü", "00"] {
                let mut changed = token.clone();
                changed.replace_range(index..=index, with);
                assert!(changed == token || read(&changed).is_none());
            }
        });
    }

    #[test]
    fn a_token_is_valid_for_its_own_list_only() {
        let (secret, workspace) = (b"secret".as_slice(), WorkspaceId(7));
        let filter = Filter { reason: Some("bounce".to_owned()), ..Filter::default() };
        let position = Position { after: "jürgen@example.de".to_owned(), total: Some(5_000_000), examined: 25 };
        let token = position.to_token(secret, workspace, &filter).expect("random numbers");
        let read =
            |token: &str, secret: &[u8], workspace, filter: &Filter| Position::from_token(token, secret, workspace, filter).ok();
        assert_eq!(read(&token, secret, workspace, &filter), Some(position));
        assert_eq!(read(&token, secret, WorkspaceId(8), &filter), None);
        assert_eq!(read(&token, b"other", workspace, &filter), None);
        assert_eq!(read(&token, secret, workspace, &Filter::default()), None);
        let moved = Filter { search: filter.reason.clone(), ..Filter::default() };
        assert_eq!(read(&token, secret, workspace, &moved), None);
        assert_eq!(read(&format!("{token}="), secret, workspace, &filter), None);
        for index in 0..token.len() {
            let mut tampered = token.clone().into_bytes();
            tampered[index] = if tampered[index] == b'0' { b'1' } else { b'0' };
            let tampered = String::from_utf8(tampered).expect("ASCII");
            assert_eq!(read(&tampered, secret, workspace, &filter), None, "{index}");
        }
        for invalid in ["", "0", "zz", "ü", &token[2..], &token[..token.len() - 2]] {
            assert_eq!(read(invalid, secret, workspace, &filter), None, "{invalid}");
        }
    }

    #[test]
    fn a_token_shows_no_address() {
        let position = Position { after: "someone@example.com".to_owned(), total: None, examined: 1 };
        let token = || position.to_token(b"secret", WorkspaceId(7), &Filter::default()).expect("random numbers");
        let bytes = URL_SAFE_NO_PAD.decode(token()).expect("base64url");
        assert!(!bytes.windows(7).any(|part| part == b"example" || part == b"someone"));
        assert_ne!(token(), token(), "tokens of equal positions differ");
    }

    #[test]
    fn a_token_of_the_first_layout_is_rejected() {
        // Version 1: hexadecimal, signed, and the address in it for all to see.
        let old = "01000000000000000161406578616d706c652e636f6d0123456789abcdef0123456789abcdef";
        assert!(Position::from_token(old, b"secret", WorkspaceId(7), &Filter::default()).is_err());
    }
}
