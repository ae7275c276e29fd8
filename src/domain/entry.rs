//! One entry of the list.

use super::{
    address::Address,
    failure::{Failure, REASON_CHARS_MAX},
};

/// Why an address is on the list: any text of 1 to 64 characters without control characters, kept
/// as given.
///
/// An unknown text is as good as a well-known one: losing a suppression over its label would be
/// worse.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason(String);

impl Reason {
    /// Trims `text`; `None` when nothing is left, which asks for the call's default.
    ///
    /// # Errors
    /// [`Failure::InvalidReason`] when it is too long or has a control character.
    pub fn parse(text: String) -> Result<Option<Self>, Failure> {
        let trimmed = text.trim();
        if trimmed.is_empty() {
            return Ok(None);
        }
        // Octets bound the characters from above, which spares counting them for every ordinary
        // reason.
        let too_long = trimmed.len() > REASON_CHARS_MAX && trimmed.chars().count() > REASON_CHARS_MAX;
        if too_long || trimmed.contains(char::is_control) {
            return Err(Failure::InvalidReason);
        }
        Ok(Some(if trimmed.len() == text.len() { Self(text) } else { Self(trimmed.to_owned()) }))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The text.
    pub fn into_string(self) -> String {
        self.0
    }
}

/// An entry that may be stored: both fields hold to the rules by construction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What must not be contacted.
    pub address: Address,
    /// Why.
    pub reason: Reason,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_kept_as_given_but_for_its_ends() {
        let parse = |text: &str| Reason::parse(text.to_owned()).map(|reason| reason.map(Reason::into_string));
        assert_eq!(parse(" Asked us to STOP \n"), Ok(Some("Asked us to STOP".to_owned())));
        assert_eq!(parse(" \t"), Ok(None));
        assert_eq!(parse(&"ü".repeat(64)), Ok(Some("ü".repeat(64))));
        assert_eq!(parse(&"a".repeat(65)), Err(Failure::InvalidReason));
        assert_eq!(parse("two\nlines"), Err(Failure::InvalidReason));
    }
}
