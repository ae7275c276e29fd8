//! What the columns of a file mean, by their names: our own files, and the suppression exports of
//! the large providers as they come.
//!
//! JSON is read by the same rules, an object's keys being the names. Names are compared without
//! case, spaces and punctuation, so `Email Address`, `EmailAddress` and `email_address` are one.
//! Names were taken from the providers' public references. A set of names that others use as well
//! (`email,created`) is no provider's list unless the file's name or the caller says so: a wrong
//! guess would give every row a wrong reason.

use std::borrow::Cow;

/// A provider's words for why, and ours.
type Words = &'static [(&'static str, &'static str)];

const BOUNCE: &str = "bounce";
const COMPLAINT: &str = "complaint";
const UNSUBSCRIBE: &str = "unsubscribe_link";
const MANUAL: &str = "manual";

/// Amazon SES, `SuppressionListReason`.
const SES: Words = &[("BOUNCE", BOUNCE), ("COMPLAINT", COMPLAINT)];

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

/// Mandrill, `reason` of a rejection.
const MANDRILL: Words =
    &[("hard-bounce", BOUNCE), ("soft-bounce", BOUNCE), ("spam", COMPLAINT), ("unsub", UNSUBSCRIBE), ("custom", MANUAL)];

/// Brevo, `reason.code` of a blocked contact.
const BREVO: Words = &[
    ("hardBounce", BOUNCE),
    ("contactFlaggedAsSpam", COMPLAINT),
    ("unsubscribedViaMA", UNSUBSCRIBE),
    ("unsubscribedViaEmail", UNSUBSCRIBE),
    ("unsubscribedViaApi", UNSUBSCRIBE),
    ("adminBlocked", MANUAL),
];

/// The statuses of those who may be written to. Any other, known or not, keeps its row on the list:
/// a suppression that is lost is the worse mistake.
const MAY_BE_WRITTEN_TO: [&str; 3] = ["subscribed", "pending", "transactional"];

/// The well-known reasons.
const OURS: [&str; 5] = [BOUNCE, COMPLAINT, UNSUBSCRIBE, MANUAL, "import"];

/// Where a list comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Our own columns, or those of nobody in particular.
    List,
    /// Amazon SES, the account's suppression list.
    AmazonSes,
    /// SendGrid, bounces.
    SendgridBounces,
    /// SendGrid, blocks.
    SendgridBlocks,
    /// SendGrid, invalid e-mails.
    SendgridInvalidEmails,
    /// SendGrid, spam reports.
    SendgridSpamReports,
    /// SendGrid, global and group unsubscribes.
    SendgridUnsubscribes,
    /// Mailgun, bounces.
    MailgunBounces,
    /// Mailgun, complaints.
    MailgunComplaints,
    /// Mailgun, unsubscribes.
    MailgunUnsubscribes,
    /// Postmark, suppressions of a stream.
    Postmark,
    /// SparkPost, the suppression list.
    Sparkpost,
    /// Mailchimp, an audience's export.
    MailchimpAudience,
    /// Mailchimp, members with their status.
    MailchimpMembers,
    /// Mandrill, the rejection list.
    Mandrill,
    /// Brevo, blocked and unsubscribed contacts.
    BrevoBlocked,
    /// Brevo, contacts with their block flag.
    BrevoContacts,
}

impl Source {
    /// All of them, with the name for `--from` and the name for people.
    const TABLE: [(Self, &str, &str); 17] = [
        (Self::List, "list", "list with a header"),
        (Self::AmazonSes, "amazon-ses", "Amazon SES suppression list"),
        (Self::SendgridBounces, "sendgrid-bounces", "SendGrid bounces"),
        (Self::SendgridBlocks, "sendgrid-blocks", "SendGrid blocks"),
        (Self::SendgridInvalidEmails, "sendgrid-invalid-emails", "SendGrid invalid emails"),
        (Self::SendgridSpamReports, "sendgrid-spam-reports", "SendGrid spam reports"),
        (Self::SendgridUnsubscribes, "sendgrid-unsubscribes", "SendGrid unsubscribes"),
        (Self::MailgunBounces, "mailgun-bounces", "Mailgun bounces"),
        (Self::MailgunComplaints, "mailgun-complaints", "Mailgun complaints"),
        (Self::MailgunUnsubscribes, "mailgun-unsubscribes", "Mailgun unsubscribes"),
        (Self::Postmark, "postmark", "Postmark suppressions"),
        (Self::Sparkpost, "sparkpost", "SparkPost suppression list"),
        (Self::MailchimpAudience, "mailchimp-audience", "Mailchimp audience export"),
        (Self::MailchimpMembers, "mailchimp-members", "Mailchimp members"),
        (Self::Mandrill, "mandrill", "Mandrill rejections"),
        (Self::BrevoBlocked, "brevo-blocked", "Brevo blocked contacts"),
        (Self::BrevoContacts, "brevo-contacts", "Brevo contacts"),
    ];

    /// All names that [`Source::of_name`] knows.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Self::TABLE.into_iter().map(|(_, name, _)| name)
    }

    /// The source of this name.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::TABLE.into_iter().find(|(_, known, _)| *known == name).map(|(source, ..)| source)
    }

    /// Its name for people.
    fn title(self) -> &'static str {
        Self::TABLE.into_iter().find(|(source, ..)| *source == self).map_or("", |(.., title)| title)
    }

    /// The columns that may hold the address, the first one that is there counts.
    fn addresses(self) -> &'static [&'static str] {
        match self {
            Self::List => &["email", "emailaddress", "address", "recipient"],
            Self::AmazonSes | Self::Postmark | Self::MailchimpAudience | Self::MailchimpMembers => &["emailaddress", "email"],
            Self::MailgunBounces | Self::MailgunComplaints | Self::MailgunUnsubscribes => &["address", "recipient"],
            Self::Sparkpost => &["recipient", "email"],
            Self::SendgridBounces
            | Self::SendgridBlocks
            | Self::SendgridInvalidEmails
            | Self::SendgridSpamReports
            | Self::SendgridUnsubscribes
            | Self::Mandrill
            | Self::BrevoBlocked
            | Self::BrevoContacts => &["email"],
        }
    }

    /// The columns that say when somebody opted out, the first one that is set counts.
    fn times(self) -> &'static [&'static str] {
        match self {
            Self::List => &[],
            Self::AmazonSes => &["lastupdatetime"],
            Self::SendgridBounces
            | Self::SendgridBlocks
            | Self::SendgridInvalidEmails
            | Self::SendgridSpamReports
            | Self::SendgridUnsubscribes => &["created", "createdat"],
            Self::MailgunBounces | Self::MailgunComplaints | Self::MailgunUnsubscribes | Self::Postmark | Self::Mandrill => {
                &["createdat"]
            }
            Self::Sparkpost => &["created", "updated"],
            Self::MailchimpAudience => &["unsubtime", "optouttime", "cleantime"],
            Self::BrevoBlocked => &["blockedat"],
            // When they were changed last is not when they opted out.
            Self::MailchimpMembers | Self::BrevoContacts => &[],
        }
    }

    /// The reason of all its rows, or of those that do not say one.
    fn reason(self) -> Option<&'static str> {
        match self {
            Self::SendgridBounces | Self::SendgridBlocks | Self::SendgridInvalidEmails | Self::MailgunBounces => Some(BOUNCE),
            Self::SendgridSpamReports | Self::MailgunComplaints => Some(COMPLAINT),
            Self::SendgridUnsubscribes | Self::MailgunUnsubscribes => Some(UNSUBSCRIBE),
            Self::List
            | Self::AmazonSes
            | Self::Postmark
            | Self::Sparkpost
            | Self::MailchimpAudience
            | Self::MailchimpMembers
            | Self::Mandrill
            | Self::BrevoBlocked
            | Self::BrevoContacts => None,
        }
    }
}

/// Where a file's columns are, and what its words mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// What the file was taken for.
    pub(super) name: &'static str,
    /// The column of the address.
    pub(super) address: usize,
    /// The column of `email` or `domain`.
    pub(super) kind: Option<usize>,
    /// Where it stands when somebody opted out.
    pub(super) time: Times,
    reasons: Reasons,
    /// The reason of rows that have none, as far as the kind of list says it.
    guessed: Option<&'static str>,
}

/// The columns of times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Times {
    /// Our own column, which must be right.
    Own(usize),
    /// A provider's columns, the first one that is set counts. What cannot be read there is left
    /// away.
    Provider(Vec<usize>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Reasons {
    /// No column says why.
    None,
    /// A column that is kept as it is.
    AsIs(usize),
    /// A column of words that have a counterpart; other words are kept as they are.
    Words(usize, Words),
    /// A column that is kept if it has one of our words.
    Ours(usize),
    /// Mailchimp: the status of a member.
    MailchimpStatus(usize),
    /// Postmark: a reason, and who it came from.
    Postmark { reason: usize, origin: Option<usize> },
    /// Mailchimp: whichever time is set. In a mixed list a row without a time is no suppression.
    Mailchimp { unsubscribed: Option<usize>, cleaned: Option<usize>, is_mixed: bool },
    /// Mailgun's own export script writes the same columns for all lists: a bounce has a code.
    MailgunScript { code: usize, error: Option<usize> },
    /// SparkPost before 2017: suppressed if either is true.
    SparkPostFlags { transactional: usize, non_transactional: usize },
    /// Mandrill: a rejection that has expired is none.
    Mandrill { reason: Option<usize>, expired: Option<usize> },
    /// Brevo: suppressed if true.
    BrevoFlag(usize),
}

/// Why a file is no suppression list.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NotAList {
    /// No column of addresses has a name that is known.
    NoAddress,
    /// Two columns of addresses have the same name.
    TwoAddresses,
    /// It is a list of something else, as the end of a sentence about the file.
    Other(&'static str),
}

/// Why a row is on the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Why<'a> {
    /// For the reason that the row says; empty when it says none.
    Reason(Cow<'a, str>),
    /// For this reason, as far as the kind of list says.
    Guessed(&'static str),
    /// It is not: the row names somebody who may be written to.
    Excluded,
}

/// The names of a file's columns, as they are compared.
struct Names(Vec<String>);

impl Names {
    fn of(names: &[impl AsRef<str>]) -> Self {
        Self(names.iter().map(|name| plain(name.as_ref())).collect())
    }

    fn at(&self, wanted: &str) -> Option<usize> {
        self.0.iter().position(|name| name == wanted)
    }

    fn has(&self, wanted: &[&str]) -> bool {
        wanted.iter().all(|name| self.at(name).is_some())
    }

    fn has_any(&self, wanted: &[&str]) -> bool {
        wanted.iter().any(|name| self.at(name).is_some())
    }

    fn address(&self, wanted: &[&str]) -> Result<usize, NotAList> {
        let column = wanted.iter().find_map(|name| self.at(name)).ok_or(NotAList::NoAddress)?;
        let has_another = self.0.iter().skip(column + 1).any(|name| *name == self.0[column]);
        if has_another { Err(NotAList::TwoAddresses) } else { Ok(column) }
    }
}

impl Layout {
    /// The layout of a file with these names of columns. `file` is its name, which some providers
    /// put the kind of list into.
    ///
    /// # Errors
    /// [`NotAList`], which must not be imported.
    pub(super) fn of(names: &[impl AsRef<str>], file: &str) -> Result<Self, NotAList> {
        let names = Names::of(names);
        let source = guess(&names, &file.to_lowercase())?;
        Self::with_names(&names, source)
    }

    /// The layout of a file that the caller says comes from `source`.
    ///
    /// # Errors
    /// When it has no column of addresses that such files have.
    pub(super) fn from(source: Source, names: &[impl AsRef<str>]) -> Result<Self, NotAList> {
        Self::with_names(&Names::of(names), source)
    }

    fn with_names(names: &Names, source: Source) -> Result<Self, NotAList> {
        let at = |name| names.at(name);
        let as_is = || at("reason").map_or(Reasons::None, Reasons::AsIs);
        let reasons = match source {
            Source::List => as_is(),
            Source::AmazonSes => at("reason").map_or(Reasons::None, |reason| Reasons::Words(reason, SES)),
            Source::SendgridBounces | Source::SendgridBlocks | Source::SendgridInvalidEmails => {
                // The mail server's own text, most often.
                at("reason").map_or(Reasons::None, Reasons::Ours)
            }
            Source::SendgridSpamReports | Source::SendgridUnsubscribes => Reasons::None,
            Source::MailgunBounces | Source::MailgunComplaints | Source::MailgunUnsubscribes => {
                at("code").map_or(Reasons::None, |code| Reasons::MailgunScript { code, error: at("error") })
            }
            Source::Postmark => {
                at("suppressionreason").map_or_else(as_is, |reason| Reasons::Postmark { reason, origin: at("origin") })
            }
            Source::Sparkpost => match (at("source"), at("transactional"), at("nontransactional")) {
                (_, Some(transactional), Some(non_transactional)) if at("source").is_none() => {
                    Reasons::SparkPostFlags { transactional, non_transactional }
                }
                (Some(source), ..) => Reasons::Words(source, SPARKPOST),
                _ => Reasons::None,
            },
            Source::MailchimpAudience => {
                let (unsubscribed, cleaned) = (at("unsubtime").or(at("optouttime")), at("cleantime"));
                // A list of one kind needs no time to say so; one that may hold others does.
                let is_mixed = (unsubscribed.is_some() && cleaned.is_some()) || at("lastchanged").is_some();
                Reasons::Mailchimp { unsubscribed, cleaned, is_mixed: is_mixed && (unsubscribed.is_some() || cleaned.is_some()) }
            }
            Source::MailchimpMembers => at("status").map_or(Reasons::None, Reasons::MailchimpStatus),
            Source::Mandrill => Reasons::Mandrill { reason: at("reason"), expired: at("expired") },
            Source::BrevoBlocked => at("reasoncode").or(at("reason")).map_or(Reasons::None, |reason| Reasons::Words(reason, BREVO)),
            Source::BrevoContacts => at("emailblacklisted").or(at("emailblocklisted")).map_or(Reasons::None, Reasons::BrevoFlag),
        };
        let provider = || Times::Provider(source.times().iter().filter_map(|name| at(name)).collect());
        Ok(Self {
            name: source.title(),
            address: names.address(source.addresses())?,
            kind: if source == Source::List { at("type") } else { None },
            time: at("unsubscribedat").map_or_else(provider, Times::Own),
            reasons,
            guessed: source.reason(),
        })
    }

    /// The layout of a file whose column of addresses somebody named; the others are known by their
    /// names.
    ///
    /// # Errors
    /// [`NotAList::NoAddress`] when there is no such column.
    pub(super) fn with_address(names: &[impl AsRef<str>], column: &str, source: Option<Source>) -> Result<Self, NotAList> {
        let mut names = Names::of(names);
        let address = names.address(&[&plain(column)])?;
        // Named as the source would name it, so that the source finds it.
        let source = source.unwrap_or(Source::List);
        let title = source.addresses().first().copied().unwrap_or("email");
        for name in names.0.iter_mut().filter(|name| source.addresses().contains(&name.as_str())) {
            name.clear();
        }
        names.0[address] = title.to_owned();
        Self::with_names(&names, source)
    }

    /// The layout of any file with a column of addresses, also of a list of those who may be
    /// written to.
    ///
    /// # Errors
    /// [`NotAList::NoAddress`].
    pub(super) fn any_with_addresses(names: &[impl AsRef<str>]) -> Result<Self, NotAList> {
        let names = Names::of(names);
        let address = names.address(&["email", "emailaddress", "address", "recipient", "value"])?;
        Ok(Self::bare(Source::List.title(), address))
    }

    /// The layout of a file without a header, by the cells of its first row: an address, or
    /// several, then the type and the reason, each known by its words. When the address is not the
    /// first cell, and no cell is a word, nothing is known of the others.
    pub(super) fn without_header(cells: &[&str], source: Option<Source>) -> Self {
        let is_address = |cell: &&str| cell.contains('@');
        let is_kind = |cell: &&str| matches!(*cell, "email" | "domain");
        let is_word_of_ses = |cell: &&str| SES.iter().any(|(word, _)| word == cell);
        let address = cells.iter().position(is_address).unwrap_or_default();
        let rest = || cells.iter().enumerate().skip(address + 1).filter(|(_, cell)| !is_address(cell));
        let (title, kind, reasons) = if let Some((column, _)) = rest().find(|(_, cell)| is_word_of_ses(cell)) {
            ("Amazon SES suppression list", None, Reasons::Words(column, SES))
        } else if cells.len() == 1 {
            ("plain list", None, Reasons::None)
        } else {
            let kind = rest().find(|(_, cell)| is_kind(cell)).map(|(column, _)| column);
            let ours = rest().find(|(_, cell)| OURS.contains(cell)).map(|(column, _)| column);
            // An address and one more cell, which is nothing else, or a third one after an empty
            // type.
            let (kind, reason) = match (kind, ours, cells.get(address + 1..).unwrap_or_default()) {
                (Some(kind), None, rest) => (Some(kind), Some(kind + 1).filter(|_| address + 1 == kind && rest.len() > 1)),
                (None, None, [cell]) if address == 0 && !is_address(cell) => (None, Some(1)),
                (None, None, ["", cell]) if address == 0 && !is_address(cell) => (Some(1), Some(2)),
                (None, Some(ours), ["", ..]) if ours == address + 2 => (Some(address + 1), Some(ours)),
                (kind, reason, _) => (kind, reason),
            };
            ("list without a header", kind, reason.map_or(Reasons::None, Reasons::AsIs))
        };
        let title = source.map_or(title, Source::title);
        Self { kind, reasons, guessed: source.and_then(Source::reason), ..Self::bare(title, address) }
    }

    fn bare(name: &'static str, address: usize) -> Self {
        Self { name, address, kind: None, time: Times::Provider(Vec::new()), reasons: Reasons::None, guessed: None }
    }

    /// The column whose text may be a reason, of a file without a header.
    pub(super) fn reason_column(&self) -> Option<usize> {
        match self.reasons {
            Reasons::AsIs(column) | Reasons::Words(column, _) => Some(column),
            _ => None,
        }
    }

    /// Why a row is on the list.
    pub(super) fn why<'a>(&self, cell: impl Fn(usize) -> Cow<'a, str>) -> Why<'a> {
        let is_set = |column: Option<usize>| column.is_some_and(|column| !cell(column).trim().is_empty());
        let is_true = |column: usize| {
            let cell = cell(column);
            ["true", "yes", "1"].iter().any(|word| word.eq_ignore_ascii_case(cell.trim()))
        };
        let known = |text: Cow<'a, str>, words: Words| {
            let word = words.iter().find(|(word, _)| word.eq_ignore_ascii_case(text.trim()));
            word.map_or(text, |(_, ours)| Cow::Borrowed(*ours))
        };
        let guessed = || self.guessed.map_or(Why::Reason(Cow::Borrowed("")), Why::Guessed);
        let said = |text: Cow<'a, str>| if text.trim().is_empty() { guessed() } else { Why::Reason(text) };
        match &self.reasons {
            Reasons::None => guessed(),
            Reasons::AsIs(column) => said(cell(*column)),
            Reasons::Words(column, words) => said(known(cell(*column), words)),
            Reasons::Ours(column) => {
                let text = cell(*column);
                if OURS.contains(&text.trim()) { Why::Reason(text) } else { guessed() }
            }
            Reasons::MailchimpStatus(column) => {
                let status = cell(*column);
                if MAY_BE_WRITTEN_TO.iter().any(|word| word.eq_ignore_ascii_case(status.trim())) {
                    return Why::Excluded;
                }
                said(known(status, MAILCHIMP))
            }
            Reasons::Postmark { reason, origin } => {
                let is_recipient = origin.is_some_and(|origin| cell(origin).trim().eq_ignore_ascii_case("Recipient"));
                let manual = if is_recipient { UNSUBSCRIBE } else { MANUAL };
                let text = cell(*reason);
                let words = [("HardBounce", BOUNCE), ("SpamComplaint", COMPLAINT), ("ManualSuppression", manual)];
                let ours = words.into_iter().find(|(word, _)| word.eq_ignore_ascii_case(text.trim()));
                said(ours.map_or(text, |(_, ours)| Cow::Borrowed(ours)))
            }
            Reasons::Mailchimp { unsubscribed, .. } if is_set(*unsubscribed) => Why::Reason(Cow::Borrowed(UNSUBSCRIBE)),
            Reasons::Mailchimp { cleaned, .. } if is_set(*cleaned) => Why::Reason(Cow::Borrowed(BOUNCE)),
            Reasons::Mailchimp { is_mixed: true, .. } => Why::Excluded,
            Reasons::Mailchimp { unsubscribed: Some(_), .. } => Why::Guessed(UNSUBSCRIBE),
            Reasons::Mailchimp { cleaned: Some(_), .. } => Why::Guessed(BOUNCE),
            Reasons::Mailchimp { .. } => guessed(),
            Reasons::MailgunScript { code, error } if is_set(Some(*code)) || is_set(*error) => Why::Reason(Cow::Borrowed(BOUNCE)),
            Reasons::MailgunScript { .. } => guessed(),
            Reasons::SparkPostFlags { transactional, non_transactional } => {
                if is_true(*transactional) || is_true(*non_transactional) { guessed() } else { Why::Excluded }
            }
            Reasons::Mandrill { expired: Some(expired), .. } if is_true(*expired) => Why::Excluded,
            Reasons::Mandrill { reason, .. } => said(reason.map_or(Cow::Borrowed(""), |reason| known(cell(reason), MANDRILL))),
            Reasons::BrevoFlag(column) => {
                if is_true(*column) {
                    guessed()
                } else {
                    Why::Excluded
                }
            }
        }
    }
}

/// Whose list has these columns.
fn guess(names: &Names, file: &str) -> Result<Source, NotAList> {
    let has = |all: &[&str]| names.has(all);
    let has_email = has(&["email"]);
    let other = |what| Err(NotAList::Other(what));
    // Lists of members, allowlists and logs come first: reading one of them as a suppression list
    // would silence everybody on it.
    if (has(&["address", "domain"]) && !has_email) || has(&["type", "value", "reason", "createdat"]) {
        return other("is Mailgun's allowlist, which names those who may be written to");
    }
    if has(&["address", "subscribed"]) {
        return other("is Mailgun's mailing list, whose members may be written to");
    }
    if has(&["event"]) && names.has_any(&["recipient", "email", "emailaddress", "address"]) {
        return other("is a log of events, which also names those who were written to; export the suppression list");
    }
    if has(&["recipient"]) && names.has_any(&["subject", "messageid", "deliverystatus", "loglevel"]) {
        return other("is a log of messages, which names those who were written to; export the suppression list");
    }
    if has(&["emailaddress", "subject", "status"]) {
        return other("is Mandrill's log of messages, which names those who were written to; export the rejections");
    }
    if has(&["email", "detail", "createdat"]) && !has(&["reason"]) {
        return other("is Mandrill's allowlist, which names those who may be written to");
    }
    if names.has_any(&["emailblacklisted", "emailblocklisted"]) && has_email {
        return Ok(Source::BrevoContacts);
    }
    if has(&["contactid", "email", "addedtime"]) {
        return other("is Brevo's export of contacts, which does not say who may be written to; add --from list if nobody may");
    }
    if has(&["emailaddress", "status"]) && !has(&["message"]) {
        return Ok(Source::MailchimpMembers);
    }
    if has(&["emailaddress", "leid", "euid"]) || has(&["emailaddress", "memberrating"]) {
        if names.has_any(&["unsubtime", "optouttime", "cleantime"]) {
            return Ok(Source::MailchimpAudience);
        }
        return other("is Mailchimp's list of subscribers, who may be written to");
    }
    if has(&["suppressionreason", "emailaddress"]) {
        return Ok(Source::Postmark);
    }
    if has(&["emailaddress", "reason"]) && !has_email {
        return Ok(Source::AmazonSes);
    }
    if has(&["transactional", "nontransactional"]) && names.has_any(&["recipient", "email"]) {
        return Ok(Source::Sparkpost);
    }
    if has(&["recipient"]) && !has_email && names.has_any(&["source", "type", "description"]) {
        return Ok(Source::Sparkpost);
    }
    let is_named = |part: &str| file.contains(part);
    if has(&["address"]) && !has_email {
        let named = if is_named("complaint") {
            Some(Source::MailgunComplaints)
        } else if is_named("unsubscribe") {
            Some(Source::MailgunUnsubscribes)
        } else {
            Some(Source::MailgunBounces).filter(|_| is_named("bounce"))
        };
        if has(&["code"]) {
            return Ok(named.unwrap_or(Source::MailgunBounces));
        }
        if has(&["createdat"]) && names.has_any(&["tags", "tag"]) {
            return Ok(Source::MailgunUnsubscribes);
        }
        return Ok(named.filter(|_| has(&["createdat"])).unwrap_or(Source::List));
    }
    if has_email && has(&["reason"]) && names.has_any(&["lasteventat", "expiresat"]) {
        return Ok(Source::Mandrill);
    }
    if has_email && has(&["blockedat"]) && names.has_any(&["reason", "reasoncode"]) {
        return Ok(Source::BrevoBlocked);
    }
    if has_email && !has(&["type"]) {
        if has(&["groupid", "groupname"]) {
            return Ok(Source::SendgridUnsubscribes);
        }
        if has(&["created", "status", "reason"]) {
            return Ok(if is_named("block") { Source::SendgridBlocks } else { Source::SendgridBounces });
        }
        // What is left has names that anybody may use.
        let by_name = [
            ("spam", Source::SendgridSpamReports),
            ("unsubscribe", Source::SendgridUnsubscribes),
            ("invalid", Source::SendgridInvalidEmails),
            ("block", Source::SendgridBlocks),
            ("bounce", Source::SendgridBounces),
        ];
        if has(&["created"])
            && let Some((_, source)) = by_name.into_iter().find(|(part, _)| is_named(part))
        {
            return Ok(source);
        }
    }
    Ok(Source::List)
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
            let cell = |column: usize| Cow::Borrowed(cells.get(column).map_or("", String::as_str));
            let texts: Vec<&str> = cells.iter().map(String::as_str).collect();
            let mut layouts = vec![
                Layout::of(names, file),
                Layout::with_address(names, "Email", None),
                Layout::any_with_addresses(names),
                Ok(Layout::without_header(&texts, None)),
            ];
            for name in Source::names() {
                let source = Source::of_name(name).expect("known");
                layouts.push(Layout::from(source, names));
                layouts.push(Layout::with_address(names, "Email", Some(source)));
                layouts.push(Ok(Layout::without_header(&texts, Some(source))));
            }
            for layout in layouts {
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
                    let times = |layout: &Layout, names: &[String]| match &layout.time {
                        Times::Own(column) => vec![plain(&names[*column])],
                        Times::Provider(columns) => columns.iter().map(|column| plain(&names[*column])).collect(),
                    };
                    assert_eq!(times(&layout, names), times(&other, &turned));
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

    /// What a row of a file with this header means: the file's name, then why.
    fn read<'a>(file: &str, header: &str, row: &'a str) -> (&'static str, Why<'a>) {
        let names: Vec<String> = header.split(',').map(str::to_owned).collect();
        let layout = Layout::of(&names, file).expect(header);
        let cells: Vec<&str> = row.split(',').collect();
        assert!(cells[layout.address].contains('@'), "{header}: {row}");
        (layout.name, layout.why(|column| Cow::Borrowed(cells.get(column).copied().unwrap_or_default())))
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
            ("suppression_invalid_emails.csv", "reason,email,created", "Bad Syntax,a@b.de,1", "SendGrid invalid emails", "bounce"),
            ("Spam_Reports.csv", "ip,email,created", "192.0.2.1,a@b.de,1", "SendGrid spam reports", "complaint"),
            ("suppression_spam_reports.csv", "email,created", "a@b.de,1", "SendGrid spam reports", "complaint"),
            ("suppression_unsubscribes.csv", "email,created", "a@b.de,1", "SendGrid unsubscribes", "unsubscribe_link"),
            // Anybody's names are nobody's list.
            ("x.csv", "ip,email,created", "192.0.2.1,a@b.de,1", "list with a header", ""),
            ("x.csv", "email,created", "a@b.de,1", "list with a header", ""),
            ("x.csv", "address,created_at", "a@b.de,x", "list with a header", ""),
            ("x.csv", "email,reason,created", "a@b.de,Asked us,1", "list with a header", "Asked us"),
            ("x.csv", "recipient", "a@b.de", "list with a header", ""),
            ("x.csv", "name,email,address", "Ann,a@b.de,Main Street 1", "list with a header", ""),
            ("x.json", "email_address,status,member_rating", "a@b.de,unsubscribed,2", "Mailchimp members", "unsubscribe_link"),
            ("x.csv", "Email Address,Status", "a@b.de,Opted out", "Mailchimp members", "Opted out"),
            ("x.csv", "Email Address,UNSUB_TIME,LEID,EUID", "a@b.de,,1,x", "Mailchimp audience export", "unsubscribe_link"),
            ("x.json", "email,group_id,group_name,created_at", "a@b.de,1,News,1", "SendGrid unsubscribes", "unsubscribe_link"),
            ("x.csv", "address,code,error,created_at", "a@b.de,550,No,x", "Mailgun bounces", "bounce"),
            ("b.de_complaints.csv", "address,code,error,created_at,MessageHash", "a@b.de,,,x,", "Mailgun complaints", "complaint"),
            ("x.csv", "address,tags,created_at", "a@b.de,*,x", "Mailgun unsubscribes", "unsubscribe_link"),
            ("complaints.csv", "address,created_at", "a@b.de,x", "Mailgun complaints", "complaint"),
            ("x", "EmailAddress,SuppressionReason,Origin", "a@b.de,hardbounce,x", "Postmark suppressions", "bounce"),
            (
                "x",
                "EmailAddress,SuppressionReason,Origin",
                "a@b.de,MANUALSUPPRESSION,recipient",
                "Postmark suppressions",
                "unsubscribe_link",
            ),
            ("x", "email,transactional,non_transactional", "a@b.de,true,false", "SparkPost suppression list", ""),
            (
                "rejects.csv",
                "email,reason,detail,created_at,expires_at,last_event_at",
                "a@b.de,hard-bounce,550,x,,",
                "Mandrill rejections",
                "bounce",
            ),
            (
                "x",
                "email,reason,detail,created_at,expires_at,last_event_at",
                "a@b.de,unsub,,x,,",
                "Mandrill rejections",
                "unsubscribe_link",
            ),
            ("x", "email,reason,last_event_at,expired", "a@b.de,spam,x,false", "Mandrill rejections", "complaint"),
            ("x", "email,senderEmail,reason,blockedAt,reason.code", "a@b.de,x,,x,hardBounce", "Brevo blocked contacts", "bounce"),
            ("x", "email,senderEmail,reason,blockedAt", "a@b.de,x,adminBlocked,x", "Brevo blocked contacts", "manual"),
            ("x", "email,id,emailBlacklisted,smsBlacklisted", "a@b.de,1,true,false", "Brevo contacts", ""),
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
            let (read_as, why) = read(file, header, row);
            let read_reason = match &why {
                Why::Reason(reason) => reason.as_ref(),
                Why::Guessed(reason) => reason,
                Why::Excluded => "excluded",
            };
            assert_eq!((read_as, read_reason), (name, reason), "{header}: {row}");
        }
    }

    #[test]
    fn those_who_may_be_written_to_are_excluded() {
        for (header, row) in [
            ("Email Address,MEMBER_RATING,UNSUB_TIME,LAST_CHANGED,LEID,EUID", "a@b.de,2,,2025-01-01,1,x"),
            ("email_address,status", "a@b.de,subscribed"),
            ("recipient,transactional,non_transactional", "a@b.de,false,FALSE"),
            ("email,transactional,non_transactional", "a@b.de,false,false"),
            ("email,reason,detail,created_at,last_event_at,expired", "a@b.de,soft-bounce,x,x,x,true"),
            ("email,emailBlacklisted", "a@b.de,false"),
        ] {
            assert_eq!(read("x", header, row).1, Why::Excluded, "{header}");
        }
        for header in [
            "address,domain",
            "address,name,subscribed,vars",
            "type,value,reason,createdAt",
            "Email Address,First Name,MEMBER_RATING,LEID,EUID",
            "event,timestamp,recipient,message",
            "recipient,subject,delivery_status",
            "email,event,timestamp,sg_message_id",
            "Date,Email Address,Sender,Subject,Status,Tags",
            "email,detail,created_at",
            "CONTACT ID,EMAIL,FIRSTNAME,ADDED_TIME,MODIFIED_TIME",
            "email,name,Email",
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
            let layout = Layout::without_header(&cells, None);
            let why = layout.why(|column| Cow::Borrowed(cells.get(column).copied().unwrap_or_default()));
            assert_eq!((layout.name, layout.kind, why), (name, kind, Why::Reason(Cow::Borrowed(reason))), "{row}");
        }
    }

    #[test]
    fn the_caller_knows_best_where_a_file_comes_from() {
        for (name, header, row, reason) in [
            ("sendgrid-bounces", "email,created", "a@b.de,1", Why::Guessed(BOUNCE)),
            ("sendgrid-spam-reports", "ip,email,created", "1,a@b.de,1", Why::Guessed(COMPLAINT)),
            ("mailgun-complaints", "address,created_at", "a@b.de,1", Why::Guessed(COMPLAINT)),
            ("list", "email,created,status,reason", "a@b.de,1,x,Asked us", Why::Reason(Cow::Borrowed("Asked us"))),
        ] {
            let names: Vec<&str> = header.split(',').collect();
            let cells: Vec<&str> = row.split(',').collect();
            let layout = Layout::from(Source::of_name(name).expect("known"), &names).expect("a list");
            assert_eq!(layout.why(|column| Cow::Borrowed(cells[column])), reason, "{name}");
        }
        assert_eq!(Layout::from(Source::Mandrill, &["Mail"]), Err(NotAList::NoAddress));
        let named = Layout::with_address(&["Mail", "reason"], "mail", Some(Source::Mandrill)).expect("a list");
        assert_eq!(named.why(|_| Cow::Borrowed("spam")), Why::Reason(Cow::Borrowed(COMPLAINT)));
    }

    #[test]
    fn it_is_known_where_the_time_of_an_opt_out_stands() {
        for (file, header, columns) in [
            ("x", "EmailAddress,Reason,LastUpdateTime", &[2][..]),
            ("x", "status,reason,email,created", &[3]),
            ("x", "email,group_id,group_name,created_at", &[3]),
            ("x", "address,tags,created_at", &[2]),
            ("x", "EmailAddress,SuppressionReason,Origin,CreatedAt", &[3]),
            ("x", "recipient,type,source,updated,created", &[4, 3]),
            ("x", "Email Address,UNSUB_TIME,CLEAN_TIME,LEID,EUID", &[1, 2]),
            ("x", "Email Address,OPTOUT_TIME,LEID,EUID", &[1]),
            ("x", "email,reason,created_at,expires_at", &[2]),
            ("x", "email,reason,blockedAt", &[2]),
            ("x", "email,created", &[]),
        ] {
            let names: Vec<&str> = header.split(',').collect();
            assert_eq!(Layout::of(&names, file).expect(header).time, Times::Provider(columns.to_vec()), "{header}");
        }
        assert_eq!(Layout::of(&["email", "Unsubscribed At"], "x").expect("a list").time, Times::Own(1));
    }
}
