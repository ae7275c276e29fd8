//! The canonical form of an address, which is stored, compared and looked up.
//!
//! Every source of addresses uses the same functions, so a lookup finds what was stored. Lengths
//! count the bytes of the canonical form (RFC 5321 section 4.5.3.1). Local parts are compared
//! without regard to case. RFC 5321 lets a host distinguish case, but no large mailbox provider
//! does, and writing to `Bob@` after `bob@` opted out is the worse error. `+tags` and dots are
//! kept, since only the provider knows what they mean. Quoted local parts are rejected. So are
//! invisible characters that no script needs: they come with pasted text, and an entry with one
//! would look right in every list and never match. The rules may become stricter; see
//! [`Address::parse_stored`].

use std::fmt;

use idna::uts46::{AsciiDenyList, DnsLength, Hyphens, Uts46};
use psl::{Info, List, Psl, Type};
use unicode_normalization::{UnicodeNormalization, is_nfc};

use super::failure::Failure;

const LOCAL_BYTES_MAX: usize = 64;
const DOMAIN_BYTES_MAX: usize = 253;
const ADDRESS_BYTES_MAX: usize = 254;
const LABEL_BYTES_MAX: usize = 63;

/// Longer texts are rejected unread. Normalization shortens a text, but never this much.
const INPUT_BYTES_MAX: usize = 8 * 1024;

/// What an address names. The canonical form shows it: only an e-mail address has an `@`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// One e-mail address.
    Email,
    /// A domain with all its sub-domains.
    Domain,
}

impl Kind {
    /// Each kind with its name in JSON, CSV and on the command line, and its number in the proto.
    const TABLE: [(Self, &str, i32); 2] = [(Self::Email, "email", 1), (Self::Domain, "domain", 2)];

    /// The kind with this name.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::TABLE.into_iter().find(|(_, known, _)| *known == name).map(|(kind, ..)| kind)
    }

    /// The kind with this number. `None` for the unspecified type, 0, whose meaning depends on the
    /// field.
    pub fn of_number(number: i32) -> Option<Self> {
        Self::TABLE.into_iter().find(|(.., known)| *known == number).map(|(kind, ..)| kind)
    }

    /// The name in JSON, CSV and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Email => Self::TABLE[0].1,
            Self::Domain => Self::TABLE[1].1,
        }
    }

    /// The number in the proto.
    pub fn number(self) -> i32 {
        match self {
            Self::Email => Self::TABLE[0].2,
            Self::Domain => Self::TABLE[1].2,
        }
    }
}

/// An e-mail address or a domain in canonical form.
///
/// Ordered by bytes, as PostgreSQL orders text under `COLLATE "C"`. `Debug` hides the text, so that
/// no log line contains an address.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(String);

impl Address {
    /// Converts `text` to the canonical form of an address of this kind.
    ///
    /// White space, NBSP, zero-width and BOM characters are trimmed from both ends. An e-mail
    /// address is split at its last `@`.
    ///
    /// # Errors
    /// [`Failure::InvalidEmail`], [`Failure::InvalidDomain`], or [`Failure::PublicSuffix`] when a
    /// domain entry would block all domains under a suffix of the ICANN section of the Public
    /// Suffix List (publicsuffix.org).
    pub fn parse(kind: Kind, text: String) -> Result<Self, Failure> {
        match kind {
            Kind::Email => parse_email(text).map_err(Failure::InvalidEmail),
            Kind::Domain => {
                let domain = parse_domain(&text).map_err(Failure::InvalidDomain)?;
                if is_public_suffix(&domain) {
                    return Err(Failure::PublicSuffix);
                }
                Ok(Self(domain))
            }
        }
    }

    /// Converts a text of unknown kind to its canonical form. A text with an `@` after its first
    /// character is an e-mail address; any other text is a domain. For lookups only: what is to be
    /// stored has a type.
    ///
    /// # Errors
    /// As [`Address::parse`], but a public suffix is accepted: it may be looked up, and an earlier
    /// release may have stored it.
    pub fn parse_any(text: String) -> Result<Self, Failure> {
        let trimmed = trim(&text);
        if trimmed.strip_prefix('@').unwrap_or(trimmed).contains('@') {
            return Self::parse(Kind::Email, text);
        }
        parse_domain(&text).map(Self).map_err(Failure::InvalidEmail)
    }

    /// As [`Address::parse_any`], but also accepts what earlier releases stored and this one
    /// rejects: an e-mail address with an invisible character before the `@`. For deletions only,
    /// so that every stored entry can be deleted by its name. A check rejects such a text, and so
    /// reports it as suppressed, whether it is stored or not.
    ///
    /// # Errors
    /// As [`Address::parse_any`].
    pub fn parse_stored(text: String) -> Result<Self, Failure> {
        let trimmed = trim(&text);
        match trimmed.rsplit_once('@') {
            Some((local, _)) if local.contains(is_needless_invisible) => {
                email_of(trimmed, check_stored_local).map_err(Failure::InvalidEmail)
            }
            _ => Self::parse_any(text),
        }
    }

    /// Converts a part of an address to the text to search for in canonical forms: lower case, and
    /// a domain (after an `@`, or with a dot) in IDNA's ASCII form.
    pub fn search_form(text: &str) -> String {
        let folded = canonical_local(trim(text));
        let (local, domain) = match folded.rsplit_once('@') {
            Some((local, domain)) => (Some(local), domain),
            None => (None, folded.as_str()),
        };
        let is_unicode_domain = !domain.is_ascii() && (local.is_some() || domain.contains('.'));
        match Uts46::new().to_ascii(domain.as_bytes(), AsciiDenyList::EMPTY, Hyphens::Allow, DnsLength::Ignore) {
            Ok(ascii) if is_unicode_domain => local.map_or(ascii.to_string(), |local| format!("{local}@{ascii}")),
            _ => folded,
        }
    }

    /// The entries that would cover this address, the nearest first: the address itself, its
    /// domain, and every parent domain that an entry can name.
    pub fn covers(&self) -> impl Iterator<Item = &str> {
        let domain = self.0.rsplit_once('@').map(|(_, domain)| domain);
        let itself = std::iter::once(self.0.as_str());
        let first = domain.or_else(|| parent(&self.0));
        itself.chain(std::iter::successors(first, |domain| parent(domain)))
    }

    /// The canonical text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What the address names.
    pub fn kind(&self) -> Kind {
        if self.0.contains('@') { Kind::Email } else { Kind::Domain }
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Address({:?}, redacted)", self.kind())
    }
}

fn parse_email(mut text: String) -> Result<Address, &'static str> {
    if is_ordinary_email(text.as_bytes()) {
        text.make_ascii_lowercase();
        return Ok(Address(text));
    }
    email_of(trim(&text), check_local)
}

fn email_of(trimmed: &str, check_local: impl Fn(&str) -> Result<(), &'static str>) -> Result<Address, &'static str> {
    if trimmed.is_empty() {
        return Err("is empty");
    }
    if trimmed.len() > INPUT_BYTES_MAX {
        return Err("is far longer than any address");
    }
    let Some((local, domain)) = trimmed.rsplit_once('@') else {
        return Err("has no @; set type to domain if a domain is meant");
    };
    let local = canonical_local(local);
    check_local(&local)?;
    let domain = canonical_domain(domain)?;
    let address = local + "@" + &domain;
    if address.len() > ADDRESS_BYTES_MAX {
        return Err("is longer than 254 bytes");
    }
    Ok(Address(address))
}

fn parse_domain(text: &str) -> Result<String, &'static str> {
    let trimmed = trim(text);
    let domain = trimmed.strip_prefix('@').unwrap_or(trimmed);
    if domain.is_empty() {
        return Err("is empty");
    }
    if domain.len() > INPUT_BYTES_MAX {
        return Err("is far longer than any domain");
    }
    if domain.contains('@') {
        return Err("has an @; set type to email if an address is meant");
    }
    canonical_domain(domain)
}

/// Classes of bytes in an address whose canonical form differs in case only.
const LOCAL: u8 = 1;
const LABEL: u8 = 2;
const CLASS: [u8; 256] = {
    let mut class = [0_u8; 256];
    let mut byte = 0_usize;
    while byte < 128 {
        let b = byte as u8;
        if b.is_ascii_alphanumeric() || b == b'-' {
            class[byte] |= LABEL;
        }
        if b.is_ascii_graphic() && !is_forbidden_in_local(b) {
            class[byte] |= LOCAL;
        }
        byte += 1;
    }
    class
};

const fn is_forbidden_in_local(byte: u8) -> bool {
    matches!(byte, b'@' | b',' | b';' | b'<' | b'>' | b'(' | b')' | b'[' | b']' | b':' | b'\\' | b'"')
}

/// True for a valid ASCII address that at most needs lower case: nearly every address. All others
/// take the slow path, which also finds the cause of a failure. So does every Punycode label,
/// because IDNA must accept what it decodes to.
fn is_ordinary_email(bytes: &[u8]) -> bool {
    if bytes.len() > ADDRESS_BYTES_MAX {
        return false;
    }
    let Some(at) = bytes.iter().position(|&byte| byte == b'@') else { return false };
    let (local, domain) = (&bytes[..at], &bytes[at + 1..]);
    let local_is_ordinary = (1..=LOCAL_BYTES_MAX).contains(&at)
        && local.iter().all(|&byte| CLASS[byte as usize] & LOCAL != 0)
        && local[0] != b'.'
        && local[at - 1] != b'.';
    // The domain needs no limit of its own: the limit of the whole address is tighter.
    if !local_is_ordinary {
        return false;
    }
    let mut labels = 0;
    let mut last_is_number = false;
    let mut label_start = 0;
    // The end of the text ends a label, as a dot does.
    for (index, &byte) in domain.iter().chain(b".").enumerate() {
        if byte != b'.' {
            if CLASS[byte as usize] & LABEL == 0 {
                return false;
            }
            continue;
        }
        let label = &domain[label_start..index];
        let (Some(first), Some(last)) = (label.first(), label.last()) else { return false };
        let may_be_punycode = label.len() >= 4 && label[2..4] == *b"--";
        if *first == b'-' || *last == b'-' || label.len() > LABEL_BYTES_MAX || may_be_punycode {
            return false;
        }
        labels += 1;
        last_is_number = first.is_ascii_digit() && label.iter().all(u8::is_ascii_digit);
        label_start = index + 1;
    }
    labels >= 2 && !last_is_number
}

/// Unicode NFC, lower case, and NFC again, because lower case can leave a decomposed text.
fn canonical_local(local: &str) -> String {
    let composed: String = if is_nfc(local) { local.to_lowercase() } else { local.nfc().collect::<String>().to_lowercase() };
    if is_nfc(&composed) { composed } else { composed.nfc().collect() }
}

fn check_local(local: &str) -> Result<(), &'static str> {
    if local.contains(is_needless_invisible) {
        return Err("has an invisible character before the @; type the address anew instead of pasting it");
    }
    check_stored_local(local)
}

/// Zero-width space, word joiner, BOM and soft hyphen. The zero-width joiner and non-joiner are
/// accepted: Persian and Indic scripts need them.
fn is_needless_invisible(c: char) -> bool {
    matches!(c, '\u{200b}' | '\u{2060}' | '\u{feff}' | '\u{ad}')
}

/// The rules that every stored local part has met since the first release.
fn check_stored_local(local: &str) -> Result<(), &'static str> {
    if local.is_empty() {
        return Err("has nothing before the @");
    }
    if local.len() > LOCAL_BYTES_MAX {
        return Err("has more than 64 bytes before the @");
    }
    if local.starts_with('.') || local.ends_with('.') {
        return Err("has a dot at the start or end of the part before the @");
    }
    let is_forbidden =
        |c: char| c.is_whitespace() || c.is_control() || u8::try_from(c).is_ok_and(|b| b.is_ascii() && is_forbidden_in_local(b));
    if local.contains(is_forbidden) {
        return Err(
            "has a character before the @ that is not accepted there; give one bare address without a name, quotes or brackets",
        );
    }
    Ok(())
}

/// UTS 46 non-transitional processing to ASCII, then the rules of [`check_domain`].
fn canonical_domain(domain: &str) -> Result<String, &'static str> {
    let ascii = Uts46::new()
        .to_ascii(domain.as_bytes(), AsciiDenyList::EMPTY, Hyphens::Allow, DnsLength::Ignore)
        .map_err(|_| "has a domain that IDNA does not allow")?;
    let ascii = ascii.strip_suffix('.').unwrap_or(&ascii);
    check_domain(ascii)?;
    Ok(ascii.to_owned())
}

fn check_domain(domain: &str) -> Result<(), &'static str> {
    if domain.is_empty() {
        return Err("has no domain");
    }
    if domain.len() > DOMAIN_BYTES_MAX {
        return Err("has a domain longer than 253 bytes");
    }
    let mut labels = 0;
    let mut last = "";
    for label in domain.split('.') {
        if label.is_empty() {
            return Err("has a domain with an empty label (two dots, or a dot at the start)");
        }
        if label.len() > LABEL_BYTES_MAX {
            return Err("has a domain label longer than 63 bytes");
        }
        if !label.bytes().all(|byte| CLASS[byte as usize] & LABEL != 0) {
            return Err("has a domain with a character other than letters, digits and hyphens");
        }
        if label.starts_with('-') || label.ends_with('-') {
            return Err("has a domain label that starts or ends with a hyphen");
        }
        labels += 1;
        last = label;
    }
    if labels < 2 {
        return Err("has a domain of a single label; give it in full, such as example.com");
    }
    if last.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("has a domain whose last label is a number; IP addresses are not accepted");
    }
    Ok(())
}

/// The parent domain; `None` for a top-level domain, which no entry can name.
fn parent(domain: &str) -> Option<&str> {
    domain.split_once('.').map(|(_, above)| above).filter(|above| above.contains('.'))
}

/// True when each name directly under `domain` may have another owner: a rule of the list names the
/// domain, or a wildcard rule is directly under it (`*.kobe.jp` for `kobe.jp`). An exception such
/// as `!city.kobe.jp` is the domain of one owner.
fn is_public_suffix(domain: &str) -> bool {
    // A label that only a wildcard can match: no domain name on the list contains it.
    const ANY: &[u8] = b"_";
    let labels = || domain.as_bytes().rsplit(|&byte| byte == b'.');
    let itself = List.find(labels());
    let under = List.find(labels().chain([ANY]));
    let icann = |info: Info, bytes: usize| info.typ == Some(Type::Icann) && info.len == bytes;
    icann(itself, domain.len()) || icann(under, ANY.len() + 1 + domain.len())
}

/// Trims what is pasted unseen with an address: white space, NBSP, zero-width characters, direction
/// marks and BOM.
fn trim(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || matches!(c, '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2060}' | '\u{feff}'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use unicode_normalization::UnicodeNormalization;

    use super::*;
    use crate::fuzz::spelled;

    fn email(text: &str) -> Result<String, Failure> {
        Address::parse(Kind::Email, text.to_owned()).map(|address| address.as_str().to_owned())
    }

    #[test]
    fn a_kind_has_one_name_and_one_number() {
        for (kind, name, number) in Kind::TABLE {
            assert_eq!((kind.name(), kind.number()), (name, number));
            assert_eq!((Kind::of_name(name), Kind::of_number(number)), (Some(kind), Some(kind)));
            assert_eq!(
                crate::proto::EntryType::try_from(number).expect("known").as_str_name(),
                format!("ENTRY_TYPE_{}", name.to_uppercase())
            );
        }
        assert_eq!((Kind::of_name("Email"), Kind::of_name(""), Kind::of_number(0), Kind::of_number(3)), (None, None, None, None));
    }

    #[test]
    fn canonical_forms_match_the_vectors() {
        #[derive(serde::Deserialize)]
        struct Case {
            input: String,
            r#type: String,
            canonical: Option<String>,
            code: Option<String>,
        }
        let cases: Vec<Case> = serde_json::from_str(include_str!("../../tests/vectors/canonical.json")).expect("valid JSON");
        assert!(cases.len() > 50);
        for case in cases {
            let kind = if case.r#type == "domain" { Kind::Domain } else { Kind::Email };
            let got = Address::parse(kind, case.input.clone());
            match (&got, &case.canonical, &case.code) {
                (Ok(address), Some(canonical), None) => {
                    assert_eq!(address.as_str(), canonical, "{:?}", case.input);
                    assert_eq!(address.kind(), kind);
                }
                (Err(failure), None, Some(code)) => assert_eq!(failure.code(), code, "{:?}", case.input),
                _ => panic!("{:?} became {got:?}", case.input),
            }
        }
    }

    #[test]
    fn the_fast_path_agrees_with_the_slow_path() {
        let samples = [
            "a@b.co",
            "A.B@EXAMPLE.COM",
            "a@b.1",
            "a@1.b",
            "a@b.c1",
            "a@b",
            "a@-b.co",
            "a@b-.co",
            "a@b.-",
            ".a@b.co",
            "a.@b.co",
            "a@b..co",
            "a@b.co.",
            "a@.b.co",
            "a@ab--c.com",
            "a@xn--a.com",
            "a@xn--mnchen-3ya.de",
            "@b.co",
            "a@",
            "a b@c.de",
            "a@b@c.de",
            "a@b.c:d",
            ",@b.co",
            "a,b@c.de",
            "a@b.1c",
            "a@ab-c.com",
            "a@b--c.com",
            "a@abc--.com",
            "a\u{7f}@b.co",
            "a@b_c.de",
        ];
        for sample in samples {
            let slow = email(&format!(" {sample}"));
            assert_eq!(email(sample).ok(), slow.ok(), "{sample}");
        }
    }

    #[test]
    fn ordinary_addresses_take_the_fast_path() {
        let longest = format!("{}@{}.{}.{}", "a".repeat(64), "b".repeat(63), "c".repeat(63), "d".repeat(61));
        assert_eq!(longest.len(), 254);
        let ordinary = [
            "a@b.co",
            "A.B+c@Mail.EXAMPLE.com",
            "!#$%&'*+/=?^_`{|}~-@b.co",
            "a..b@c.de",
            "a@1.b",
            "a@b.1c",
            "a@b.c1",
            "a@ab-c.de",
            "a@b--c.de",
            &longest,
        ];
        for text in ordinary {
            assert!(is_ordinary_email(text.as_bytes()), "{text}");
        }
        for text in [
            "",
            "@",
            "a",
            "a@b",
            "a@b.",
            "a@.b",
            "@b.co",
            ".a@b.co",
            "a.@b.co",
            "a@b@c.de",
            "a,b@c.de",
            "a b@c.de",
            "a@b c.de",
            "a@b.1",
            "a@-b.co",
            "a@b-.co",
            "a@ab--c.de",
            "a@xn--a.de",
            "ü@b.co",
            "a@ü.de",
            "a\u{7f}@b.co",
            "a@b_c.de",
            "a@b..de",
        ] {
            assert!(!is_ordinary_email(text.as_bytes()), "{text}");
        }
        for (from, to) in [("a@", "aa@"), ("bbb.", "bbbb."), ("ddd", "dddd")] {
            let too_long = longest.replacen(from, to, 1);
            assert!(!is_ordinary_email(too_long.as_bytes()), "{to}");
        }
    }

    #[test]
    fn a_text_may_be_longer_than_its_canonical_form_up_to_a_limit() {
        // IDNA removes soft hyphens from a domain.
        let padded = |start: &str, bytes: usize| {
            let end = "b.com";
            let hyphens = (bytes - start.len() - end.len()) / 2;
            let text = format!("{start}{}{end}", "\u{ad}".repeat(hyphens));
            assert_eq!(text.len(), bytes);
            text
        };
        assert_eq!(email(&padded("a@", 8_191)), Ok("a@b.com".to_owned()));
        assert_eq!(email(&padded("a@x", 8_192)), Ok("a@xb.com".to_owned()));
        assert_eq!(email(&padded("a@", 8_193)), Err(Failure::InvalidEmail("is far longer than any address")));
        let domain = |text| Address::parse(Kind::Domain, text).map(|address| address.0);
        assert_eq!(domain(padded("x", 8_192)), Ok("xb.com".to_owned()));
        assert_eq!(domain(padded("", 8_193)), Err(Failure::InvalidDomain("is far longer than any domain")));
    }

    #[test]
    fn debug_output_hides_the_address() {
        for (text, shown) in [("secret@b.de", "Address(Email, redacted)"), ("secret.de", "Address(Domain, redacted)")] {
            assert_eq!(format!("{:?}", Address::parse_any(text.to_owned()).expect(text)), shown);
        }
    }

    #[test]
    fn public_suffixes_are_those_of_the_icann_section_only() {
        let code = |text: &str| Address::parse(Kind::Domain, text.to_owned()).map_err(|failure| failure.code());
        assert_eq!(code("公司.cn"), Err("PUBLIC_SUFFIX"));
        assert_eq!(code("anything.ck"), Err("PUBLIC_SUFFIX"));
        assert!(code("www.ck").is_ok(), "an exception of the list");
        assert!(code("github.io").is_ok(), "private section");
        for under_a_wildcard in ["sch.uk", "kobe.jp", "KOBE.JP.", "yokohama.jp", "x.kobe.jp", "x.sch.uk"] {
            assert_eq!(code(under_a_wildcard), Err("PUBLIC_SUFFIX"), "{under_a_wildcard}");
        }
        for owned in
            ["city.kobe.jp", "www.city.kobe.jp", "a.x.kobe.jp", "foo.com", "example.jp", "compute.amazonaws.com", "a.unknown"]
        {
            assert!(code(owned).is_ok(), "{owned}");
        }
        assert!(email("someone@co.uk").is_ok(), "an address blocks itself alone");
    }

    #[test]
    fn an_invisible_character_is_rejected_unless_a_script_needs_it() {
        for c in ['\u{200b}', '\u{2060}', '\u{feff}', '\u{ad}'] {
            for text in [format!("a{c}b@example.com"), format!("a{c}@example.com"), format!("A{c}Ü@example.com")] {
                assert_eq!(email(&text).map_err(Failure::code), Err("INVALID_EMAIL"), "{c:?}");
                assert_eq!(Address::parse_any(text).map_err(Failure::code), Err("INVALID_EMAIL"), "{c:?}");
            }
        }
        for text in ["نامه\u{200c}ای@example.com", "क्\u{200d}ष@example.com", "a\u{200c}@example.com"] {
            assert_eq!(email(text), Ok(text.to_owned()));
        }
    }

    #[test]
    fn what_an_earlier_release_stored_can_be_deleted() {
        let stored = |text: &str| Address::parse_stored(text.to_owned()).map(|address| address.0).map_err(Failure::code);
        assert_eq!(stored(" A\u{200b}Ü@MÜNCHEN.de\n"), Ok("a\u{200b}ü@xn--mnchen-3ya.de".to_owned()));
        assert_eq!(stored("\u{ad}a@b.co"), Ok("\u{ad}a@b.co".to_owned()));
        assert_eq!(stored("sch.uk"), Ok("sch.uk".to_owned()));
        assert_eq!(stored("A@b.co"), Ok("a@b.co".to_owned()));
        for never in ["a\u{200b} b@c.de", "a\u{200b}@c", ".\u{200b}@b.co", "nonsense", "\u{200b}"] {
            assert_eq!(stored(never), Err("INVALID_EMAIL"), "{never:?}");
        }
    }

    #[test]
    fn a_search_text_takes_the_stored_form() {
        for (text, form) in [
            (" Bücher.DE", "xn--bcher-kva.de"),
            ("INFO@München.de\u{200b}", "info@xn--mnchen-3ya.de"),
            ("JÜRGEN", "jürgen"),
            ("a+B", "a+b"),
            ("%_", "%_"),
            (" \u{feff}", ""),
        ] {
            assert_eq!(Address::search_form(text), form);
        }
    }

    #[test]
    fn an_address_is_covered_by_whole_labels() {
        let covers =
            |text: &str| -> Vec<String> { Address::parse_any(text.to_owned()).expect(text).covers().map(str::to_owned).collect() };
        assert_eq!(
            covers("X@mail.eu.badcompany.com"),
            ["x@mail.eu.badcompany.com", "mail.eu.badcompany.com", "eu.badcompany.com", "badcompany.com"]
        );
        assert_eq!(covers("a@b.co"), ["a@b.co", "b.co"]);
        assert_eq!(covers("@Mail.BadCompany.com"), ["mail.badcompany.com", "badcompany.com"]);
        assert_eq!(covers("co.uk"), ["co.uk"]);
        assert_eq!(Address::parse_any("nonsense".to_owned()).map_err(Failure::code), Err("INVALID_EMAIL"));
    }

    #[test]
    fn limits_count_bytes_of_the_canonical_form() {
        let local = "ü".repeat(32);
        assert!(email(&format!("{local}@example.de")).is_ok());
        assert!(email(&format!("{local}a@example.de")).is_err());
        let domain = |bytes: usize| {
            let mut text = "a.".repeat(bytes / 2 - 2);
            text.push_str(&"a".repeat(bytes - text.len() - 3));
            text.push_str(".de");
            text
        };
        assert!(email(&format!("a@{}", domain(252))).is_ok());
        assert!(email(&format!("ab@{}", domain(252))).is_err(), "255 bytes");
        assert!(Address::parse(Kind::Domain, domain(253)).is_ok());
        assert!(Address::parse(Kind::Domain, domain(254)).is_err());
    }

    /// Checks everything that must hold for any text.
    fn check_rules(text: &str) {
        let slow = email_of(trim(text), check_local);
        assert_eq!(parse_email(text.to_owned()), slow, "the fast path and the slow path");
        for kind in [Kind::Email, Kind::Domain] {
            let Ok(address) = Address::parse(kind, text.to_owned()) else { continue };
            let canonical = address.as_str();
            assert_eq!(address.kind(), kind);
            assert_eq!(Address::parse(kind, canonical.to_owned()).as_ref(), Ok(&address), "its own canonical form");
            assert_eq!(Address::parse_any(text.to_owned()).as_ref(), Ok(&address), "a check finds what an import stored");
            assert_eq!(Address::parse_stored(text.to_owned()).as_ref(), Ok(&address), "a deletion finds it as well");
            assert_eq!(address.covers().next(), Some(canonical));
            if !canonical.ends_with('.') {
                assert_eq!(Address::search_form(canonical), canonical, "a search finds it");
            }
            assert!(canonical.len() <= 254 && canonical.nfc().eq(canonical.chars()));
            let (local, domain) = canonical.rsplit_once('@').unwrap_or(("a", canonical));
            assert!((1..=64).contains(&local.len()) && domain.len() <= 253);
            assert!(!local.starts_with('.') && !local.ends_with('.'));
            assert!(!local.contains(|c: char| c.is_whitespace()
                || c.is_control()
                || "@,;<>()[]:\\\"\u{200b}\u{2060}\u{feff}\u{ad}".contains(c)));
            let labels: Vec<&str> = domain.split('.').collect();
            assert!(labels.len() >= 2 && labels.iter().all(|label| (1..=63).contains(&label.len())));
            let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
            assert!(labels.iter().all(|label| label.bytes().all(is_plain) && !label.starts_with('-') && !label.ends_with('-')));
            assert!(!labels[labels.len() - 1].bytes().all(|byte| byte.is_ascii_digit()));
        }
    }

    #[test]
    fn any_bytes_keep_the_rules() {
        const ALPHABET: [&str; 52] = [
            "a",
            "B",
            "z",
            "0",
            "9",
            "@",
            "@",
            "@",
            ".",
            ".",
            "-",
            "--",
            "+",
            "_",
            "'",
            "xn--",
            "XN--",
            "xn--mnchen-3ya",
            "com",
            ".de",
            "co.uk",
            "kobe.jp",
            "city",
            "127.0.0.1",
            " ",
            "\t",
            "\r\n",
            "\u{a0}",
            "\u{feff}",
            "\u{200b}",
            "\u{200c}",
            "\u{200d}",
            "\u{2060}",
            "\u{ad}",
            "\0",
            "\u{7f}",
            "ü",
            "u\u{308}",
            "Ü",
            "ß",
            "ẞ",
            "İ",
            "ς",
            "Σ",
            "。",
            "．",
            "測試",
            "क्",
            "\u{345}",
            "\u{1f600}",
            "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
            ",;<>()[]:\\\"",
        ];
        bolero::check!(name = "address").for_each(|bytes| {
            check_rules(&String::from_utf8_lossy(bytes));
            check_rules(&spelled(&bytes[..bytes.len().min(12)], &ALPHABET));
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn canonical_is_its_own_canonical_form(text in "\\PC{1,12}@\\PC{1,8}\\.(de|com|測試)") {
            if let Ok(once) = email(&text) {
                prop_assert_eq!(email(&once), Ok(once));
            }
        }

        #[test]
        fn surrounding_space_normal_form_and_case_do_not_matter(
            local in "[a-zäöüéèñçåøA-ZÄÖÜÉ0-9.+_-]{1,20}",
            domain in "[a-zäöüéA-ZÄÖÜ0-9]{1,10}\\.(de|COM|co\\.uk)",
        ) {
            let text = format!("{local}@{domain}");
            let expected = email(&text);
            for variant in [
                format!("\u{feff}\u{a0} \t{text}\u{200b}\r\n"),
                text.nfd().collect(),
                text.nfc().collect(),
                text.to_lowercase(),
                text.to_uppercase(),
            ] {
                prop_assert_eq!(email(&variant), expected.clone());
            }
        }

        #[test]
        fn any_text_is_accepted_or_rejected(text in any::<String>()) {
            let _ = Address::parse(Kind::Email, text.clone());
            if let Ok(domain) = Address::parse(Kind::Domain, text) {
                prop_assert_eq!(Address::parse(Kind::Domain, domain.as_str().to_owned()), Ok(domain));
            }
        }
    }
}
