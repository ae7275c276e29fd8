//! What the columns of a file mean, by their names: our own files, and the suppression exports of
//! the large providers as they come.
//!
//! JSON is read by the same rules, an object's keys being the names. Names are compared without
//! case, spaces and punctuation, so `Email Address`, `EmailAddress` and `email_address` are one.
//! Names were taken from the providers' public references; where a list does not say in any column
//! why an address is on it (SendGrid, Mailgun), the set of its columns or the name of the file
//! does.

/// A provider's words for why, and ours.
type Words = &'static [(&'static str, &'static str)];

const BOUNCE: &str = "bounce";
const COMPLAINT: &str = "complaint";
const UNSUBSCRIBE: &str = "unsubscribe_link";
const MANUAL: &str = "manual";

/// Amazon SES, `SuppressionListReason`.
pub(super) const SES: Words = &[("BOUNCE", BOUNCE), ("COMPLAINT", COMPLAINT)];

/// SparkPost, `source` of the suppression list.
const SPARKPOST: Words = &[
    ("Spam Complaint", COMPLAINT),
    ("Bounce Rule", BOUNCE),
    ("List Unsubscribe", UNSUBSCRIBE),
    ("Unsubscribe Link", UNSUBSCRIBE),
    ("Manually Added", MANUAL),
    ("Compliance", MANUAL),
];

/// Mailchimp, `status` of a member.
const MAILCHIMP: Words = &[("unsubscribed", UNSUBSCRIBE), ("cleaned", BOUNCE)];

/// The statuses of those who may be written to. Any other, known or not, keeps its row on the list:
/// a suppression that is lost is the worse mistake.
const MAY_BE_WRITTEN_TO: [&str; 3] = ["subscribed", "pending", "transactional"];

/// The well-known reasons.
const OURS: [&str; 5] = [BOUNCE, COMPLAINT, UNSUBSCRIBE, MANUAL, "import"];

/// Where a file's columns are, and what its words mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// What the file was taken for.
    pub(super) name: &'static str,
    /// The column of the address.
    pub(super) address: usize,
    /// The column of `email` or `domain`.
    pub(super) kind: Option<usize>,
    reasons: Reasons,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Reasons {
    /// No column says why: the import's default counts.
    Default,
    /// A column that is kept as it is.
    AsIs(usize),
    /// The list itself says why.
    All(&'static str),
    /// A column of words that have a counterpart; other words are kept as they are.
    Words(usize, Words),
    /// A column that is kept if it has one of our words, else this.
    OursOr(usize, &'static str),
    /// Mailchimp: the status of a member.
    MailchimpStatus(usize),
    /// Postmark: a reason, and who it came from.
    Postmark { reason: usize, origin: Option<usize> },
    /// Mailchimp: whichever time is set. In a mixed list a row without a time is no suppression.
    Mailchimp { unsubscribed: Option<usize>, cleaned: Option<usize>, is_mixed: bool },
    /// Mailgun's own export script writes the same columns for all lists: a bounce has a code.
    MailgunScript { code: usize, error: Option<usize>, otherwise: &'static str },
    /// SparkPost before 2017: suppressed if either is true.
    SparkPostFlags { transactional: usize, non_transactional: usize },
}

/// Why a file is no suppression list.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NotAList {
    /// No column of addresses has a name that is known.
    NoAddress,
    /// It is a list of something else, as the end of a sentence about the file.
    Other(&'static str),
}

/// Why a row is on the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// For this reason; empty means the import's default.
    Reason(String),
    /// It is not: the row names somebody who may be written to.
    NotSuppressed,
}

impl Layout {
    /// The layout of a file with these names of columns. `file` is its name, which some providers
    /// put the kind of list into.
    ///
    /// # Errors
    /// [`NotAList`], which must not be imported.
    pub(super) fn of(names: &[String], file: &str) -> Result<Self, NotAList> {
        let plain: Vec<String> = names.iter().map(|name| plain(name)).collect();
        let at = |wanted: &str| plain.iter().position(|name| name == wanted);
        let has = |all: &[&str]| all.iter().all(|name| at(name).is_some());
        let file = file.to_lowercase();
        let layout = |name, address: &str, reasons| {
            let address = at(address).ok_or(NotAList::NoAddress)?;
            Ok(Self { name, address, kind: None, reasons })
        };
        // Words that only an allowlist or a list of members has come first: reading one of them as
        // a suppression list would silence everybody on it.
        let has_email = at("email").is_some();
        if (has(&["address", "domain"]) && !has_email) || has(&["type", "value", "reason", "createdat"]) {
            return Err(NotAList::Other("is Mailgun's allowlist, which names those who may be written to"));
        }
        if has(&["address", "subscribed"]) {
            return Err(NotAList::Other("is Mailgun's mailing list, whose members may be written to"));
        }
        if has(&["emailaddress", "status"]) && !has(&["message"]) {
            return layout("Mailchimp members", "emailaddress", Reasons::MailchimpStatus(at("status").unwrap_or_default()));
        }
        if has(&["emailaddress", "leid", "euid"]) || has(&["emailaddress", "memberrating"]) {
            return match (at("unsubtime"), at("cleantime")) {
                (None, None) => Err(NotAList::Other("is Mailchimp's list of subscribers, who may be written to")),
                (unsubscribed, cleaned) => {
                    // A list of one kind needs no time to say so; one that may hold others does.
                    let is_mixed = (unsubscribed.is_some() && cleaned.is_some()) || at("lastchanged").is_some();
                    layout("Mailchimp audience export", "emailaddress", Reasons::Mailchimp { unsubscribed, cleaned, is_mixed })
                }
            };
        }
        if let Some(reason) = at("suppressionreason") {
            return layout("Postmark suppressions", "emailaddress", Reasons::Postmark { reason, origin: at("origin") });
        }
        if has(&["emailaddress"]) {
            return match at("reason") {
                Some(reason) => layout("Amazon SES suppression list", "emailaddress", Reasons::Words(reason, SES)),
                None => layout("list with a header", "emailaddress", Reasons::Default),
            };
        }
        if has(&["recipient"]) && !has_email {
            let reasons = match (at("source"), at("transactional"), at("nontransactional")) {
                (Some(source), ..) => Reasons::Words(source, SPARKPOST),
                (None, Some(transactional), Some(non_transactional)) => {
                    Reasons::SparkPostFlags { transactional, non_transactional }
                }
                _ => Reasons::Default,
            };
            return layout("SparkPost suppression list", "recipient", reasons);
        }
        if has(&["address"]) && !has_email {
            let (named, by_name) = if file.contains("complaint") {
                ("Mailgun complaints", Some(COMPLAINT))
            } else if file.contains("unsubscribe") {
                ("Mailgun unsubscribes", Some(UNSUBSCRIBE))
            } else {
                ("Mailgun bounces", None)
            };
            if let Some(code) = at("code") {
                let otherwise = by_name.unwrap_or(BOUNCE);
                return layout(named, "address", Reasons::MailgunScript { code, error: at("error"), otherwise });
            }
            if has(&["tags"]) || has(&["tag"]) {
                return layout("Mailgun unsubscribes", "address", Reasons::All(UNSUBSCRIBE));
            }
            if has(&["createdat"]) {
                let (name, reason) = by_name.map_or(("Mailgun complaints", COMPLAINT), |reason| (named, reason));
                return layout(name, "address", Reasons::All(reason));
            }
            return layout("list with a header", "address", at("reason").map_or(Reasons::Default, Reasons::AsIs));
        }
        if has(&["email"]) && !has(&["type"]) {
            // SendGrid's lists have no column for the kind, but each has other columns; `reason` is
            // the mail server's own text there.
            if has(&["created", "ip"]) || (has(&["created"]) && file.contains("spam")) {
                return layout("SendGrid spam reports", "email", Reasons::All(COMPLAINT));
            }
            if let (Some(_), Some(reason)) = (at("created"), at("reason")) {
                let name = match (has(&["status"]), file.contains("block")) {
                    (true, true) => "SendGrid blocks",
                    (true, false) => "SendGrid bounces",
                    (false, _) => "SendGrid invalid emails",
                };
                return layout(name, "email", Reasons::OursOr(reason, BOUNCE));
            }
            if has(&["created"]) || has(&["groupid"]) || has(&["groupname"]) {
                return layout("SendGrid unsubscribes", "email", Reasons::All(UNSUBSCRIBE));
            }
        }
        let mut own = layout("list with a header", "email", at("reason").map_or(Reasons::Default, Reasons::AsIs))?;
        own.kind = at("type");
        Ok(own)
    }

    /// The layout of a file whose column of addresses somebody named; `type` and `reason` are known
    /// by their names.
    ///
    /// # Errors
    /// [`NotAList::NoAddress`] when there is no such column.
    pub(super) fn with_address(names: &[String], column: &str) -> Result<Self, NotAList> {
        let names: Vec<String> = names.iter().map(|name| plain(name)).collect();
        let at = |wanted: &str| names.iter().position(|name| name == wanted);
        Ok(Self {
            name: "list with a header",
            address: at(&plain(column)).ok_or(NotAList::NoAddress)?,
            kind: at("type"),
            reasons: at("reason").map_or(Reasons::Default, Reasons::AsIs),
        })
    }

    /// The layout of any file with a column of addresses, also of a list of those who may be
    /// written to.
    ///
    /// # Errors
    /// [`NotAList::NoAddress`].
    pub(super) fn any_with_addresses(names: &[String]) -> Result<Self, NotAList> {
        let known = ["email", "emailaddress", "address", "recipient", "value"];
        let place = |wanted: &str| names.iter().position(|name| plain(name) == wanted);
        let address = known.into_iter().find_map(place).ok_or(NotAList::NoAddress)?;
        Ok(Self { name: "list with a header", address, kind: None, reasons: Reasons::Default })
    }

    /// The layout of a file without a header, by the cells of its first row: an address, then its
    /// type if that is one, then its reason. When the address is not the first cell, nothing is
    /// known of the others.
    pub(super) fn without_header(cells: &[&str]) -> Self {
        let is_kind = |cell: &&str| matches!(*cell, "email" | "domain");
        let is_word_of_ses = |cell: &&str| SES.iter().any(|(word, _)| word == cell);
        let address = cells.iter().position(|cell| cell.contains('@')).unwrap_or_default();
        if address > 0 {
            return Self { name: "list without a header", address, kind: None, reasons: Reasons::Default };
        }
        let (name, kind, reasons) = match (cells.get(1), cells.get(2)) {
            (None, _) => ("plain list", None, Reasons::Default),
            (Some(cell), Some(_)) if is_kind(cell) || cell.is_empty() => ("list without a header", Some(1), Reasons::AsIs(2)),
            (Some(cell), None) if is_kind(cell) => ("list without a header", Some(1), Reasons::Default),
            (Some(cell), _) if is_word_of_ses(cell) => ("Amazon SES suppression list", None, Reasons::Words(1, SES)),
            (Some(_), None) => ("list without a header", None, Reasons::AsIs(1)),
            (Some(cell), Some(_)) if OURS.contains(cell) => ("list without a header", None, Reasons::AsIs(1)),
            (Some(_), Some(_)) => ("list without a header", None, Reasons::Default),
        };
        Self { name, address: 0, kind, reasons }
    }

    /// Why a row is on the list.
    pub(super) fn why(&self, cell: impl Fn(usize) -> String) -> Why {
        let is_set = |column: Option<usize>| column.is_some_and(|column| !cell(column).trim().is_empty());
        let is_true = |column: usize| cell(column).trim().eq_ignore_ascii_case("true");
        let known = |text: &str, words: Words| {
            words.iter().find(|(word, _)| word.eq_ignore_ascii_case(text.trim())).map(|(_, ours)| (*ours).to_owned())
        };
        let reason = match &self.reasons {
            Reasons::Default => String::new(),
            Reasons::AsIs(column) => cell(*column),
            Reasons::All(reason) => (*reason).to_owned(),
            Reasons::Words(column, words) => {
                let text = cell(*column);
                known(&text, words).unwrap_or(text)
            }
            Reasons::OursOr(column, otherwise) => {
                let text = cell(*column);
                if OURS.contains(&text.trim()) { text } else { (*otherwise).to_owned() }
            }
            Reasons::MailchimpStatus(column) => {
                let status = cell(*column);
                if MAY_BE_WRITTEN_TO.iter().any(|word| word.eq_ignore_ascii_case(status.trim())) {
                    return Why::NotSuppressed;
                }
                known(&status, MAILCHIMP).unwrap_or(status)
            }
            Reasons::Postmark { reason, origin } => {
                let is_recipient = origin.is_some_and(|origin| cell(origin).trim().eq_ignore_ascii_case("Recipient"));
                match cell(*reason).trim() {
                    "HardBounce" => BOUNCE.to_owned(),
                    "SpamComplaint" => COMPLAINT.to_owned(),
                    "ManualSuppression" if is_recipient => UNSUBSCRIBE.to_owned(),
                    "ManualSuppression" => MANUAL.to_owned(),
                    other => other.to_owned(),
                }
            }
            Reasons::Mailchimp { unsubscribed, .. } if is_set(*unsubscribed) => UNSUBSCRIBE.to_owned(),
            Reasons::Mailchimp { cleaned, .. } if is_set(*cleaned) => BOUNCE.to_owned(),
            Reasons::Mailchimp { is_mixed: true, .. } => return Why::NotSuppressed,
            Reasons::Mailchimp { unsubscribed: Some(_), .. } => UNSUBSCRIBE.to_owned(),
            Reasons::Mailchimp { .. } => BOUNCE.to_owned(),
            Reasons::MailgunScript { code, error, otherwise } => {
                if is_set(Some(*code)) || is_set(*error) {
                    BOUNCE.to_owned()
                } else {
                    (*otherwise).to_owned()
                }
            }
            Reasons::SparkPostFlags { transactional, non_transactional } => {
                match (is_true(*transactional), is_true(*non_transactional)) {
                    (false, false) => return Why::NotSuppressed,
                    _ => String::new(),
                }
            }
        };
        Why::Reason(reason)
    }
}

/// A name without case, spaces and punctuation.
fn plain(name: &str) -> String {
    name.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::spelled;

    #[test]
    fn any_header_has_one_meaning_in_any_order() {
        const NAMES: [&str; 34] = [
            "email",
            "Email Address",
            "address",
            "recipient",
            "type",
            "reason",
            "created",
            "created_at",
            "createdAt",
            "status",
            "ip",
            "value",
            "domain",
            "subscribed",
            "message",
            "leid",
            "euid",
            "member_rating",
            "unsub_time",
            "clean_time",
            "last_changed",
            "SuppressionReason",
            "Origin",
            "source",
            "transactional",
            "non_transactional",
            "code",
            "error",
            "tags",
            "group_id",
            "note",
            "",
            "\u{feff}E-Mail",
            "İ",
        ];
        const CELLS: [&str; 18] = [
            "",
            " ",
            "a@b.de",
            "b.de",
            "email",
            "domain",
            "BOUNCE",
            "COMPLAINT",
            "HardBounce",
            "ManualSuppression",
            "Recipient",
            "TRUE",
            "false",
            "Spam Complaint",
            "unsubscribed",
            "pending",
            "import",
            "5.1.1",
        ];
        let hold = |names: &[String], cells: &[String], file: &str| {
            let cell = |column: usize| cells.get(column).cloned().unwrap_or_default();
            for layout in [
                Layout::of(names, file),
                Layout::with_address(names, "Email"),
                Layout::any_with_addresses(names),
                Ok(Layout::without_header(&cells.iter().map(String::as_str).collect::<Vec<_>>())),
            ] {
                let Ok(layout) = layout else { continue };
                assert!(layout.address < names.len().max(cells.len()).max(1));
                let _ = layout.why(cell);
            }
            let mut plain_names: Vec<String> = names.iter().map(|name| plain(name)).collect();
            plain_names.sort();
            if plain_names.windows(2).any(|pair| pair[0] == pair[1]) {
                return;
            }
            let turned: Vec<String> = names.iter().rev().cloned().collect();
            let turned_cell = |column: usize| names.len().checked_sub(column + 1).map(cell).unwrap_or_default();
            match (Layout::of(names, file), Layout::of(&turned, file)) {
                (Ok(layout), Ok(other)) => {
                    assert_eq!(layout.name, other.name);
                    assert_eq!(cell(layout.address), turned_cell(other.address));
                    assert_eq!(layout.why(cell), other.why(turned_cell));
                }
                (layout, other) => assert_eq!(layout.err(), other.err()),
            }
        };
        bolero::check!(name = "layout").for_each(|bytes| {
            let text = String::from_utf8_lossy(bytes);
            let (names, cells) = text.split_once('\n').unwrap_or((&text, ""));
            let split = |row: &str| row.split(',').map(str::to_owned).collect::<Vec<_>>();
            hold(&split(names), &split(cells), names);
            let one = |byte: &u8, of: &[&str]| spelled(&[*byte], of);
            let (names, cells) = bytes[..bytes.len().min(16)].split_at(bytes.len().min(16) / 2);
            let file = ["x.csv", "complaints.csv", "spam.csv", "blocks.csv", "unsubscribes.csv"][bytes.len() % 5];
            let cells: Vec<String> = cells.iter().map(|byte| one(byte, &CELLS)).collect();
            hold(&names.iter().map(|byte| one(byte, &NAMES)).collect::<Vec<_>>(), &cells, file);
        });
    }

    /// What rows of a file with this header mean: its name, then why.
    fn read(file: &str, header: &str, rows: &[&str]) -> (&'static str, Vec<Why>) {
        let names: Vec<String> = header.split(',').map(str::to_owned).collect();
        let layout = Layout::of(&names, file).expect(header);
        let why = rows.iter().map(|row| {
            let cells: Vec<&str> = row.split(',').collect();
            assert!(cells[layout.address].contains('@'), "{header}: {row}");
            layout.why(|column| cells.get(column).copied().unwrap_or_default().to_owned())
        });
        (layout.name, why.collect())
    }

    #[test]
    fn providers_lists_are_known_by_their_columns() {
        for (file, header, row, name, reason) in [
            ("x.csv", "email,type,reason", "a@b.de,email,Asked us", "list with a header", "Asked us"),
            ("x.csv", "\u{feff}Email,Reason", "a@b.de,bounce", "list with a header", "bounce"),
            ("x.csv", "email,type,reason,createdAt,addedBy", "a@b.de,email,x,,", "list with a header", "x"),
            ("x.csv", "EmailAddress,Reason,LastUpdateTime", "a@b.de,COMPLAINT,1", "Amazon SES suppression list", "complaint"),
            ("x.json", "emailAddress,reason", "a@b.de,BOUNCE", "Amazon SES suppression list", "bounce"),
            ("x.csv", "status,reason,email,created", "5.1.1,550 no,a@b.de,1", "SendGrid bounces", "bounce"),
            ("suppression_blocks.csv", "status,reason,email,created", "4.0.0,no,a@b.de,1", "SendGrid blocks", "bounce"),
            ("x.csv", "reason,email,created", "Bad Syntax,a@b.de,1", "SendGrid invalid emails", "bounce"),
            ("x.csv", "ip,email,created", "192.0.2.1,a@b.de,1", "SendGrid spam reports", "complaint"),
            ("suppression_spam_reports.csv", "email,created", "a@b.de,1", "SendGrid spam reports", "complaint"),
            ("x.csv", "email,created", "a@b.de,1", "SendGrid unsubscribes", "unsubscribe_link"),
            ("own.csv", "email,reason,created", "a@b.de,complaint,1", "SendGrid invalid emails", "complaint"),
            ("x.csv", "name,email,address", "Ann,a@b.de,Main Street 1", "list with a header", ""),
            ("x.json", "email_address,status,member_rating", "a@b.de,unsubscribed,2", "Mailchimp members", "unsubscribe_link"),
            ("x.csv", "Email Address,Status", "a@b.de,Opted out", "Mailchimp members", "Opted out"),
            ("x.csv", "Email Address,UNSUB_TIME,LEID,EUID", "a@b.de,,1,x", "Mailchimp audience export", "unsubscribe_link"),
            ("x.json", "email,group_id,group_name,created_at", "a@b.de,1,News,1", "SendGrid unsubscribes", "unsubscribe_link"),
            ("x.csv", "address,code,error,created_at", "a@b.de,550,No,x", "Mailgun bounces", "bounce"),
            ("b.de_complaints.csv", "address,code,error,created_at,MessageHash", "a@b.de,,,x,", "Mailgun complaints", "complaint"),
            ("x.csv", "address,tags,created_at", "a@b.de,*,x", "Mailgun unsubscribes", "unsubscribe_link"),
            ("x.csv", "address,created_at", "a@b.de,x", "Mailgun complaints", "complaint"),
            (
                "x",
                "EmailAddress,SuppressionReason,Origin,CreatedAt",
                "a@b.de,HardBounce,Recipient,x",
                "Postmark suppressions",
                "bounce",
            ),
            (
                "x",
                "EmailAddress,SuppressionReason,Origin,CreatedAt",
                "a@b.de,SpamComplaint,Recipient,x",
                "Postmark suppressions",
                "complaint",
            ),
            (
                "x",
                "EmailAddress,SuppressionReason,Origin,CreatedAt",
                "a@b.de,ManualSuppression,Recipient,x",
                "Postmark suppressions",
                "unsubscribe_link",
            ),
            (
                "x",
                "EmailAddress,SuppressionReason,Origin,CreatedAt",
                "a@b.de,ManualSuppression,Customer,x",
                "Postmark suppressions",
                "manual",
            ),
            ("x", "recipient,type,source,description", "a@b.de,transactional,Bounce Rule,", "SparkPost suppression list", "bounce"),
            (
                "x",
                "recipient,type,source,description",
                "a@b.de,non_transactional,List Unsubscribe,",
                "SparkPost suppression list",
                "unsubscribe_link",
            ),
            ("x", "recipient,type,description", "a@b.de,non_transactional,x", "SparkPost suppression list", ""),
            ("x", "recipient,transactional,non_transactional", "a@b.de,false,true", "SparkPost suppression list", ""),
            (
                "x",
                "Email Address,First Name,MEMBER_RATING,UNSUB_TIME,LEID,EUID",
                "a@b.de,A,2,2025-06-01 10:00:00,1,x",
                "Mailchimp audience export",
                "unsubscribe_link",
            ),
            (
                "x",
                "Email Address,CLEAN_TIME,CLEAN_CAMPAIGN_TITLE,LEID,EUID",
                "a@b.de,2025-06-01 10:00:00,t,1,x",
                "Mailchimp audience export",
                "bounce",
            ),
            ("x", "email_address,status", "a@b.de,cleaned", "Mailchimp members", "bounce"),
        ] {
            assert_eq!(read(file, header, &[row]), (name, vec![Why::Reason(reason.to_owned())]), "{header}: {row}");
        }
    }

    #[test]
    fn those_who_may_be_written_to_are_left_out() {
        for (header, row) in [
            ("Email Address,MEMBER_RATING,UNSUB_TIME,LAST_CHANGED,LEID,EUID", "a@b.de,2,,2025-01-01,1,x"),
            ("email_address,status", "a@b.de,subscribed"),
            ("recipient,transactional,non_transactional", "a@b.de,false,FALSE"),
        ] {
            assert_eq!(read("x", header, &[row]).1, [Why::NotSuppressed], "{header}");
        }
        for header in [
            "address,domain",
            "address,name,subscribed,vars",
            "type,value,reason,createdAt",
            "Email Address,First Name,MEMBER_RATING,LEID,EUID",
            "name,phone",
        ] {
            let names: Vec<String> = header.split(',').map(str::to_owned).collect();
            assert!(Layout::of(&names, "x").is_err(), "{header}");
        }
    }

    #[test]
    fn files_without_a_header_are_known_by_their_first_row() {
        for (row, name, kind, reason) in [
            ("a@b.de", "plain list", None, ""),
            ("a@b.de,bounce", "list without a header", None, "bounce"),
            ("a@b.de,COMPLAINT", "Amazon SES suppression list", None, "complaint"),
            ("b.de,domain", "list without a header", Some(1), ""),
            ("b.de,domain,manual", "list without a header", Some(1), "manual"),
            ("a@b.de,,manual", "list without a header", Some(1), "manual"),
            ("a@b.de,BOUNCE,2024-01-01", "Amazon SES suppression list", None, "bounce"),
            ("a@b.de,John Smith,Berlin", "list without a header", None, ""),
            ("John Smith,a@b.de", "list without a header", None, ""),
        ] {
            let cells: Vec<&str> = row.split(',').collect();
            let layout = Layout::without_header(&cells);
            let why = layout.why(|column| cells.get(column).copied().unwrap_or_default().to_owned());
            assert_eq!((layout.name, layout.kind, why), (name, kind, Why::Reason(reason.to_owned())), "{row}");
        }
    }
}
