//! API keys, and the public forms of ids (`ws_1`, `user_1`, `key_1`).
//!
//! A key exists in plain form only in [`ApiKey`]: when it is created and when a caller sends it.
//! The database stores its SHA-256, and lookups compare that. A slow password hash would add
//! nothing: a key is 256 random bits and cannot be guessed from its hash.

use std::{fmt, str::FromStr};

use sha2::{Digest, Sha256};

/// What a key is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    /// `sk_…`: one workspace.
    Workspace,
    /// `sk_user_…`: a user, and every workspace that the user is a member of.
    Platform,
}

impl KeyKind {
    const fn prefix(self) -> &'static str {
        match self {
            Self::Workspace => "sk_",
            Self::Platform => "sk_user_",
        }
    }
}

/// The owner of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyOwner {
    /// One workspace.
    Workspace(WorkspaceId),
    /// One user.
    User(UserId),
}

impl KeyOwner {
    /// The kind of key that this owner gets.
    pub fn kind(self) -> KeyKind {
        match self {
            Self::Workspace(_) => KeyKind::Workspace,
            Self::User(_) => KeyKind::Platform,
        }
    }
}

impl fmt::Display for KeyOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workspace(id) => id.fmt(f),
            Self::User(id) => id.fmt(f),
        }
    }
}

/// What a key may do. Each scope includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Check whether addresses may be written to, and nothing else.
    Check,
    /// Also read the list.
    Read,
    /// Also change the list.
    Write,
}

impl Scope {
    /// All scopes, the narrowest first.
    pub const ALL: [Self; 3] = [Self::Check, Self::Read, Self::Write];

    /// The name on the command line and in the database.
    pub fn name(self) -> &'static str {
        match self {
            Self::Check => "check",
            Self::Read => "read",
            Self::Write => "write",
        }
    }

    /// The scope with this name.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scope| scope.name() == name)
    }
}

/// A key in plain form. Only [`ApiKey::reveal`] shows it; `Debug` does not.
#[derive(Clone)]
pub struct ApiKey {
    text: String,
    kind: KeyKind,
}

impl ApiKey {
    const SECRET_BYTES: usize = 32;

    /// Generates a key of 256 bits from the operating system's random number generator.
    ///
    /// # Errors
    /// When the operating system has no random numbers.
    pub fn generate(kind: KeyKind) -> Result<Self, getrandom::Error> {
        let mut secret = [0_u8; Self::SECRET_BYTES];
        getrandom::fill(&mut secret)?;
        Ok(Self { text: format!("{}{}", kind.prefix(), hex(&secret)), kind })
    }

    /// Parses a key that a caller sent. `None` when the text cannot be a key, which saves a query.
    pub fn parse(text: &str) -> Option<Self> {
        // The longer prefix comes first, because a platform key starts with the other prefix too.
        let kind = [KeyKind::Platform, KeyKind::Workspace].into_iter().find(|kind| text.starts_with(kind.prefix()))?;
        let secret = &text[kind.prefix().len()..];
        let is_secret =
            secret.len() == 2 * Self::SECRET_BYTES && secret.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        is_secret.then(|| Self { text: text.to_owned(), kind })
    }

    /// What the key is bound to.
    pub fn kind(&self) -> KeyKind {
        self.kind
    }

    /// The hash that is stored and compared.
    pub fn hash(&self) -> KeyHash {
        KeyHash(Sha256::digest(self.text.as_bytes()).into())
    }

    /// The key in plain form, for showing it once and for sending it.
    pub fn reveal(&self) -> &str {
        &self.text
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKey({:?}, redacted)", self.kind)
    }
}

/// The SHA-256 of a key.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyHash(redacted)")
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An id: a number with a prefix that names its type. Only the text form leaves the service.
macro_rules! public_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub i64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl From<i64> for $name {
            fn from(number: i64) -> Self {
                Self(number)
            }
        }

        impl FromStr for $name {
            type Err = String;

            /// Accepts the public form only: the prefix and a positive decimal number without sign
            /// or leading zeros.
            fn from_str(text: &str) -> Result<Self, String> {
                text.strip_prefix($prefix)
                    .filter(|digits| digits.starts_with(|c: char| ('1'..='9').contains(&c)) && digits.bytes().all(|b| b.is_ascii_digit()))
                    .and_then(|digits| digits.parse().ok())
                    .map(Self)
                    .ok_or_else(|| concat!("expected ", $prefix, " and a number, such as ", $prefix, "1").to_owned())
            }
        }
    };
}

public_id!(
    /// The id of a workspace, `ws_1`.
    WorkspaceId,
    "ws_"
);
public_id!(
    /// The id of a user, `user_1`.
    UserId,
    "user_"
);
public_id!(
    /// The id of a key, `key_1`. It is not a secret.
    KeyId,
    "key_"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_round_trips_through_its_text_and_is_redacted() {
        for kind in [KeyKind::Workspace, KeyKind::Platform] {
            let key = ApiKey::generate(kind).expect("randomness");
            let again = ApiKey::parse(key.reveal()).expect("its own text");
            assert_eq!((again.kind(), again.hash()), (kind, key.hash()));
            assert!(!format!("{key:?} {:?}", key.hash()).contains(&key.reveal()[10..]));
        }
        let key = ApiKey::generate(KeyKind::Platform).expect("randomness");
        assert_eq!(format!("{key:?} {:?}", key.hash()), "ApiKey(Platform, redacted) KeyHash(redacted)");
        assert_ne!(key.hash(), ApiKey::generate(KeyKind::Platform).expect("randomness").hash());
        // The stored hash of a key must stay the same in every release.
        let known = ApiKey::parse(&format!("sk_{}", "0a".repeat(32))).expect("a key");
        assert_eq!(hex(known.hash().as_bytes()), "ab86e3ebf7d0f6d9606f8e7a55eb6513acf3b0cc188bd6679486ec1656f76819");
        for text in
            ["", "sk_", "sk_user_", "sk_123", "pk_00", &format!("sk_{}", "A".repeat(64)), &format!("sk_user_{}", "0".repeat(63))]
        {
            assert!(ApiKey::parse(text).is_none(), "{text}");
        }
    }

    #[test]
    fn a_scope_includes_those_before_it() {
        assert!(Scope::ALL.is_sorted());
        for scope in Scope::ALL {
            assert_eq!(Scope::of_name(scope.name()), Some(scope));
        }
        assert_eq!(Scope::of_name("Write"), None);
    }

    #[test]
    fn ids_have_one_text_form() {
        assert_eq!("ws_12".parse(), Ok(WorkspaceId(12)));
        assert_eq!(WorkspaceId(12).to_string(), "ws_12");
        for text in ["", "12", "ws_", "ws_0", "ws_01", "ws_+1", "ws_-1", "ws_1 ", "WS_1", "ws_99999999999999999999", "user_1"] {
            assert!(text.parse::<WorkspaceId>().is_err(), "{text}");
        }
    }
}
