//! One entry of the list.

use time::OffsetDateTime;

use super::{
    address::{Address, Kind},
    failure::{CLOCK_SKEW, Failure, REASON_CHARS_MAX},
};

/// Why an address is on the list: a text of 1 to 64 characters without control characters, kept as
/// given.
///
/// Unknown reasons are accepted. Losing a suppression because of its label would be worse.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason(String);

impl Reason {
    /// Trims `text`. `None` when it is empty: the default reason of the call applies.
    ///
    /// # Errors
    /// [`Failure::InvalidReason`] when it is too long or has a control character.
    pub fn parse(text: String) -> Result<Option<Self>, Failure> {
        let trimmed = text.trim();
        if trimmed.is_empty() {
            return Ok(None);
        }
        // A text has at least as many bytes as characters, so ordinary reasons need no counting.
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

/// An entry that may be stored. Every field is valid by construction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The address that must not be contacted.
    pub address: Address,
    /// The reason.
    pub reason: Reason,
    /// The time at which the person opted out, if another system recorded it.
    pub unsubscribed_at: Option<OffsetDateTime>,
}

impl Entry {
    /// Validates an entry. All sources of entries use this function. An empty `reason` means
    /// `default_reason`.
    ///
    /// # Errors
    /// The failure of the first invalid field: the address is checked before the reason.
    pub fn parse(kind: Kind, address: String, reason: String, default_reason: &Reason) -> Result<Self, Failure> {
        Ok(Self {
            address: Address::parse(kind, address)?,
            reason: Reason::parse(reason)?.unwrap_or_else(|| default_reason.clone()),
            unsubscribed_at: None,
        })
    }

    /// Adds the time of the opt-out. `now` is the caller's clock; this module has none.
    ///
    /// # Errors
    /// [`Failure::InvalidTime`] when the time is in the future, or before the year 1.
    pub fn with_unsubscribed_at(self, at: OffsetDateTime, now: OffsetDateTime) -> Result<Self, Failure> {
        if at.year() < 1 || at > now + CLOCK_SKEW {
            return Err(Failure::InvalidTime);
        }
        Ok(Self { unsubscribed_at: Some(at), ..self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_trimmed_and_otherwise_kept() {
        let parse = |text: &str| Reason::parse(text.to_owned()).map(|reason| reason.map(Reason::into_string));
        assert_eq!(parse(" Asked us to STOP \n"), Ok(Some("Asked us to STOP".to_owned())));
        assert_eq!(parse(" \t"), Ok(None));
        assert_eq!(parse(&"ü".repeat(64)), Ok(Some("ü".repeat(64))));
        assert_eq!(parse(&"a".repeat(65)), Err(Failure::InvalidReason));
        assert_eq!(parse("two\nlines"), Err(Failure::InvalidReason));
    }

    #[test]
    fn an_entry_reports_its_first_fault_and_takes_the_default_reason() {
        let default = Reason::parse("import".to_owned()).expect("valid").expect("not empty");
        let parse = |kind, address: &str, reason: &str| Entry::parse(kind, address.to_owned(), reason.to_owned(), &default);
        let entry = parse(Kind::Email, " A@B.de ", " ").expect("valid");
        assert_eq!((entry.address.as_str(), entry.reason.as_str(), entry.unsubscribed_at), ("a@b.de", "import", None));
        assert_eq!(parse(Kind::Domain, "b.de", "bounce").expect("valid").reason.as_str(), "bounce");
        assert_eq!(parse(Kind::Domain, "a@b.de", "a\nb").map_err(Failure::code), Err("INVALID_DOMAIN"));
        assert_eq!(parse(Kind::Email, "a@b.de", "a\nb"), Err(Failure::InvalidReason));
    }

    #[test]
    fn an_opt_out_is_never_in_the_future() {
        let default = Reason::parse("import".to_owned()).expect("valid").expect("not empty");
        let entry = Entry::parse(Kind::Email, "a@b.de".to_owned(), String::new(), &default).expect("valid");
        let now = OffsetDateTime::UNIX_EPOCH;
        let at = |at| entry.clone().with_unsubscribed_at(at, now).map(|entry| entry.unsubscribed_at);
        let second = time::Duration::SECOND;
        for past in [
            now,
            now - second,
            now + CLOCK_SKEW,
            OffsetDateTime::new_utc(time::macros::date!(0001 - 01 - 01), time::Time::MIDNIGHT),
        ] {
            assert_eq!(at(past), Ok(Some(past)));
        }
        for wrong in [now + CLOCK_SKEW + second, OffsetDateTime::new_utc(time::macros::date!(0000 - 12 - 31), time::Time::MIDNIGHT)]
        {
            assert_eq!(at(wrong), Err(Failure::InvalidTime), "{wrong}");
        }
    }
}
