//! When somebody opted out, as files write it, and times as this program writes them.

use prost_types::Timestamp;
use time::{
    OffsetDateTime, UtcOffset,
    format_description::well_known::{Rfc2822, Rfc3339},
    macros::format_description,
};

/// A number of seconds since 1970 this large is one of milliseconds: as seconds it would be the
/// year 5138.
const MILLIS_MIN: f64 = 1e11;

/// A time as RFC 3339 writes it, such as `2024-06-01T10:00:00.000Z`.
pub fn rfc3339(text: &str) -> Option<Timestamp> {
    OffsetDateTime::parse(text.trim(), &Rfc3339).ok().map(timestamp)
}

/// A time as a mail provider writes it: RFC 3339, also with a space in place of the T, without an
/// offset (which means UTC) or without a time of day; RFC 2822; or seconds or milliseconds since
/// 1970.
pub(super) fn any(text: &str) -> Option<Timestamp> {
    let text = text.trim();
    if text.bytes().next()?.is_ascii_alphabetic() {
        return rfc2822(text);
    }
    if text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+')) {
        return since_1970(text);
    }
    iso(text).or_else(|| rfc2822(text))
}

/// RFC 3339 in UTC with milliseconds.
pub fn text(time: Timestamp) -> String {
    let nanos = i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos);
    let time = OffsetDateTime::from_unix_timestamp_nanos(nanos).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    time.format(format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z")).unwrap_or_default()
}

fn timestamp(time: OffsetDateTime) -> Timestamp {
    Timestamp { seconds: time.unix_timestamp(), nanos: time.nanosecond().cast_signed() }
}

fn rfc2822(text: &str) -> Option<Timestamp> {
    // UTC is no zone of RFC 2822, and Mailgun writes it.
    let text = text.strip_suffix("UTC").map_or_else(|| text.to_owned(), |time| format!("{time}+0000"));
    OffsetDateTime::parse(&text, &Rfc2822).ok().map(timestamp)
}

fn since_1970(text: &str) -> Option<Timestamp> {
    let number = text.parse::<f64>().ok().filter(|number| number.is_finite())?;
    let micros_each = if number >= MILLIS_MIN { 1e3 } else { 1e6 };
    // To the microsecond, which is what such a number can say.
    OffsetDateTime::from_unix_timestamp_nanos((number * micros_each).round() as i128 * 1_000).ok().map(timestamp)
}

fn iso(text: &str) -> Option<Timestamp> {
    let (date, rest) = text.split_at_checked(10)?;
    let mut rest = rest.strip_prefix(['T', 't', ' ']).unwrap_or(rest).trim();
    let mut offset = "Z".to_owned();
    if let Some(time) = rest.strip_suffix(['Z', 'z']).or_else(|| rest.strip_suffix("UTC")).or_else(|| rest.strip_suffix("GMT")) {
        rest = time;
    } else if let Some(at) = rest.find(['+', '-']) {
        let (time, named) = rest.split_at(at);
        // RFC 3339 wants +02:00; others write +0200 and +02.
        offset = match (named.len(), named.contains(':')) {
            (3, _) => format!("{named}:00"),
            (5, false) => format!("{}:{}", named.get(..3)?, named.get(3..)?),
            _ => named.to_owned(),
        };
        rest = time;
    }
    let time = match rest.trim_end() {
        "" => "00:00:00".to_owned(),
        time if time.len() == 5 => format!("{time}:00"),
        time => time.to_owned(),
    };
    let time = OffsetDateTime::parse(&format!("{date}T{time}{offset}"), &Rfc3339).ok()?;
    Some(timestamp(time.to_offset(UtcOffset::UTC)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_every_provider_are_read() {
        for written in [
            "2011-10-21T11:02:55Z",
            "2011-10-21T11:02:55.000+00:00",
            "2011-10-21T07:02:55-04:00",
            "2011-10-21 11:02:55",
            " 2011-10-21 11:02:55.000000 ",
            "2011-10-21 11:02:55 UTC",
            "2011-10-21 13:02:55 +0200",
            "2011-10-21T13:02:55+02",
            "Fri, 21 Oct 2011 11:02:55 UTC",
            "Fri, 21 Oct 2011 11:02:55 GMT",
            "Fri, 21 Oct 2011 11:02:55 +0000",
            "21 Oct 2011 11:02:55 +0000",
            "1319194975",
            "1319194975.0",
            "1.319194975e9",
            "1319194975000",
        ] {
            assert_eq!(any(written), Some(Timestamp { seconds: 1_319_194_975, nanos: 0 }), "{written}");
        }
        assert_eq!(any("2011-10-21").map(text), Some("2011-10-21T00:00:00.000Z".to_owned()));
        assert_eq!(any("2011-10-21 11:02").map(text), Some("2011-10-21T11:02:00.000Z".to_owned()));
        assert_eq!(any("1319194975.25").map(text), Some("2011-10-21T11:02:55.250Z".to_owned()));
    }

    #[test]
    fn what_is_no_time_is_none() {
        for written in
            ["", " ", "-", "never", "10/21/2011", "2011-13-21", "2011-10-21 25:00:00", "1e400", "ü", "2011-10-2ü", "1.2.3"]
        {
            assert_eq!(any(written), None, "{written}");
        }
        for written in ["", "2011-10-21", "2011-10-21 11:02:55", "1319194975", "0000-00-00T00:00:00Z"] {
            assert_eq!(rfc3339(written), None, "{written}");
        }
        assert_eq!(rfc3339("2011-10-21T13:02:55+02:00").map(text), Some("2011-10-21T11:02:55.000Z".to_owned()));
    }
}
