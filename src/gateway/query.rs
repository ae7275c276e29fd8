//! Parses the query string of a URL. Parsing is strict: if a misspelled filter or option were
//! ignored, the call would select, export or store something else than the caller means.

use percent_encoding::percent_decode_str;
use prost_types::Timestamp;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{error::Problem, requests};
use crate::proto::EntryFilter;

/// The parameters of a page.
pub(super) const PAGE: [&str; 7] = ["type", "reason", "search", "createdFrom", "createdTo", "cursor", "limit"];

/// The parameters of an export.
pub(super) const EXPORT: [&str; 6] = ["type", "reason", "search", "createdFrom", "createdTo", "format"];

/// Entries per page by default and at most, by the public reference.
pub(super) const LIMIT: i32 = 25;
pub(super) const LIMIT_MAX: i32 = 100;

/// The parameters of a call. Each occurs at most once.
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    /// Parses the raw query string. A plus sign stays a plus sign, although HTML forms encode a
    /// space so. Most callers who put `bob+news@example.com` into a URL mean that address, and
    /// checking another one would give a wrong answer.
    ///
    /// # Errors
    /// 400 for a parameter that is not `known`, occurs twice, or is not percent-encoded UTF-8.
    pub(super) fn parse(query: Option<&str>, known: &[&'static str]) -> Result<Self, Problem> {
        let mut parameters: Vec<(String, String)> = Vec::new();
        for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let decoded = |text: &str, parameter: &str| match percent_decode_str(text).decode_utf8() {
                Ok(text) => Ok(text.into_owned()),
                Err(_) => Err(Problem::invalid(parameter, "expected percent-encoded UTF-8")),
            };
            let name = decoded(name, "query")?;
            if !known.contains(&name.as_str()) {
                return Err(Problem::unknown("parameter", "query", &name, known));
            }
            if parameters.iter().any(|(before, _)| *before == name) {
                return Err(Problem::invalid(&name, "is there twice"));
            }
            // A reason is words, and no address.
            let value = if name == "reason" { decoded(&value.replace('+', " "), &name)? } else { decoded(value, &name)? };
            parameters.push((name, value));
        }
        Ok(Self(parameters))
    }

    /// The value of a parameter, if it is given.
    pub(super) fn get(&self, name: &str) -> Option<String> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone())
    }

    /// The value of a boolean parameter. The default is false.
    pub(super) fn flag(&self, name: &str) -> Result<bool, Problem> {
        match self.get(name).as_deref() {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(Problem::invalid(name, "expected true or false")),
        }
    }

    /// The entries per page, 1 to 100. The default is 25.
    pub(super) fn limit(&self) -> Result<i32, Problem> {
        let Some(text) = self.get("limit") else { return Ok(LIMIT) };
        text.parse()
            .ok()
            .filter(|limit| (1..=LIMIT_MAX).contains(limit))
            .ok_or_else(|| Problem::invalid("limit", &format!("expected a number from 1 to {LIMIT_MAX}")))
    }

    fn time(&self, name: &str) -> Result<Option<Timestamp>, Problem> {
        let Some(text) = self.get(name) else { return Ok(None) };
        timestamp(name, &text).map(Some)
    }

    /// The filter made of the parameters `type`, `reason`, `search`, `createdFrom` and `createdTo`.
    pub(super) fn filter(&self) -> Result<EntryFilter, Problem> {
        Ok(EntryFilter {
            r#type: self.get("type").map(|name| requests::entry_type("type", &name)).transpose()?.unwrap_or_default(),
            reason: self.get("reason").unwrap_or_default(),
            search: self.get("search").unwrap_or_default(),
            create_time_from: self.time("createdFrom")?,
            create_time_to: self.time("createdTo")?,
        })
    }
}

/// Parses a time in RFC 3339. An error names `field`.
pub(super) fn timestamp(field: &str, text: &str) -> Result<Timestamp, Problem> {
    let time = OffsetDateTime::parse(text, &Rfc3339)
        .map_err(|_| Problem::invalid(field, "expected a time such as 2024-06-01T10:00:00.000Z"))?;
    Ok(Timestamp { seconds: time.unix_timestamp(), nanos: time.nanosecond().cast_signed() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(query: &str, known: &[&'static str]) -> String {
        Query::parse(Some(query), known).map(|_| ()).expect_err(query).into_message()
    }

    #[test]
    fn unknown_parameters_are_refused_with_the_nearest_name() {
        for (query, nearest) in [
            ("serach=x", "search"),
            ("created_from=2024-01-01T00:00:00Z", "createdFrom"),
            ("Search=x", "search"),
            ("%73erach=x", "search"),
            ("limit=1&pageToken=x", "cursor"),
            ("entryType=email", "type"),
        ] {
            assert!(refused(query, &PAGE).contains(nearest), "{query}: {}", refused(query, &PAGE));
        }
        assert!(
            refused("validate_only=true", &["validateOnly"])
                .starts_with("validate_only: unknown parameter; did you mean validateOnly?")
        );
        assert!(refused("dryRun=true", &["validateOnly"]).contains("validateOnly"));
        assert!(refused("x=1", &[]).contains("takes no parameters"));
        assert_eq!(refused("limit=1&limit=1", &PAGE), "limit: is there twice");
        assert_eq!(refused("limit=1&%6cimit=1", &PAGE), "limit: is there twice");
        assert!(refused("search=%ff", &PAGE).starts_with("search: expected percent-encoded UTF-8"));
        assert!(refused("%ff=1", &PAGE).starts_with("query: "));
        for text in ["bob@example.com=1", "bob%40example.com", "sk_abc=1"] {
            let message = refused(text, &PAGE);
            assert!(message.starts_with("query: ") && !message.contains("bob") && !message.contains("sk_"), "{message}");
        }
    }

    #[test]
    fn an_empty_query_has_no_parameters() {
        for query in [None, Some(""), Some("&"), Some("&&")] {
            assert!(Query::parse(query, &[]).is_ok());
        }
        let query = Query::parse(Some("search=a+b%2Bc&&l%69mit=5"), &PAGE).expect("known");
        assert_eq!(query.get("search").as_deref(), Some("a+b+c"));
        assert_eq!(query.limit().ok(), Some(5));
        let query = Query::parse(Some("reason=asked+by+c%2B%2B"), &PAGE).expect("known");
        assert_eq!(query.get("reason").as_deref(), Some("asked by c++"));
    }
}
