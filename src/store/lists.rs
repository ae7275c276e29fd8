//! Reads the list: checks, pages, and counts of what a filter selects. All statements use the
//! primary key of the table, except for counts and pages of few entries, which are in
//! [`Mode::Scan`](super::session::Mode::Scan).

use std::{ops::Range, sync::Arc, time::Duration};

use sqlx::{FromRow, PgConnection, Postgres, QueryBuilder, query_as, query_scalar};
use time::OffsetDateTime;
use tokio::time::Instant;

use super::{
    Store,
    replica::Source,
    session::{Mode, Stop, Working},
    shares::Share,
};
use crate::domain::{Address, Error, Filter, KeyId, Kind, WorkspaceId};

/// A stored entry.
#[derive(Clone, Debug, FromRow)]
pub struct EntryRow {
    /// The address in canonical form. Only an e-mail address has an `@`.
    pub address: String,
    /// The reason.
    pub reason: String,
    /// When it was stored.
    pub created_at: OffsetDateTime,
    /// The key that stored it.
    #[sqlx(try_from = "i64")]
    pub added_by: KeyId,
    /// The time at which the person opted out, if another system recorded it.
    pub unsubscribed_at: Option<OffsetDateTime>,
}

/// A part of a list, in the order of the key.
#[derive(Clone, Debug)]
pub struct Page {
    /// The matching entries.
    pub entries: Vec<EntryRow>,
    /// Where the next page begins; `None` at the end of the list.
    pub next: Option<Next>,
}

impl Page {
    /// The first `count` of `entries`; a further one shows that there is a next page.
    fn of(mut entries: Vec<EntryRow>, count: u32) -> Self {
        let has_more = entries.len() > count as usize;
        entries.truncate(count as usize);
        let next = entries.last().filter(|_| has_more).map(|last| Next { after: last.address.clone(), examined: 0 });
        Self { entries, next }
    }
}

/// The beginning of the next page. The page before it may have fewer entries than it was to have,
/// or none.
#[derive(Clone, Debug)]
pub struct Next {
    /// The page begins after this address.
    pub after: String,
    /// The number of entries that the page before it examined; 0 unless it examined them in parts.
    pub examined: i64,
}

/// An entry that was examined.
#[derive(FromRow)]
struct ExaminedRow {
    /// Its place among the entries of its part, from 1.
    number: i64,
    is_match: bool,
    #[sqlx(flatten)]
    entry: EntryRow,
}

/// A selection of up to this many entries counts as short. For a longer one, a scan along the key
/// finds a page within a small part of the workspace.
const SHORT_LIST_ENTRIES: i64 = 1_000;

/// The entries that one statement examines.
const PART_ENTRIES: i64 = 50_000;

/// A page has the entries that are found within this time.
const PAGE_TIME_MAX: Duration = Duration::from_secs(1);

/// How long a page of few entries is looked for in the whole table. After that, the page is read in
/// parts.
const FEW_TIME_MAX: Duration = Duration::from_secs(3);

/// A list of up to this many entries is counted however long that takes.
const ALWAYS_COUNTED_ENTRIES: i64 = 100_000;

/// How long counting a longer one may take.
const COUNT_TIME_MAX: Duration = Duration::from_millis(50);

impl Store {
    /// Finds the entries that cover any of the addresses in this range of `addresses`, in one
    /// statement.
    ///
    /// The LIMIT keeps the planner from joining the whole list, which leaves one lookup by key for
    /// each address. The other statements that name addresses have the same shape.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`], as everywhere below.
    pub async fn find_covers(
        &self,
        workspace: WorkspaceId,
        addresses: Arc<Vec<Address>>,
        part: Range<usize>,
    ) -> Result<Vec<EntryRow>, Error> {
        self.read_from(Source::Any, Mode::Read, Share::LookUp(workspace), move |connection| {
            Box::pin(async move {
                let mut wanted: Vec<&str> = addresses[part].iter().flat_map(Address::covers).collect();
                // Lookups in key order are faster.
                wanted.sort_unstable();
                wanted.dedup();
                Ok(query_as!(
                    EntryRow,
                    "SELECT entry.address, entry.reason, entry.created_at, entry.added_by, entry.unsubscribed_at FROM UNNEST($2::text[]) AS wanted (address)
                     CROSS JOIN LATERAL (
                         SELECT address, reason, created_at, added_by, unsubscribed_at FROM entries
                         WHERE workspace_id = $1 AND entries.address = wanted.address LIMIT 1
                     ) AS entry",
                    workspace.0,
                    &wanted as &[&str],
                )
                .fetch_all(connection)
                .await?)
            })
        })
        .await
    }

    /// Reads the page of a list that begins after the address `after`: at most `count` matching
    /// entries, in the order of the key. `total` is the number of entries that the filter selects,
    /// if it is known.
    ///
    /// A filtered page is a scan along the key, so that all pages of a list together read it once.
    /// It ends early after `PAGE_TIME_MAX`. If there are few matching entries, the planner
    /// chooses first: it may find them by their creation time, or by reading the whole table.
    ///
    /// # Errors
    /// As [`Store::find_covers`].
    pub async fn page(
        &self,
        workspace: WorkspaceId,
        filter: &Filter,
        after: &str,
        count: u32,
        total: Option<i64>,
    ) -> Result<Page, Error> {
        if *filter == Filter::default() {
            return self.page_of_all(Share::LookUp(workspace), workspace, after, count).await;
        }
        if total == Some(0) {
            return Ok(Page { entries: Vec::new(), next: None });
        }
        if let Some(..=SHORT_LIST_ENTRIES) = total {
            let (its_filter, its_after) = (filter.clone(), after.to_owned());
            let few = self.scan_within(FEW_TIME_MAX, workspace, move |connection| {
                Box::pin(async move { read_entries(connection, workspace, &its_filter, its_after, count).await })
            });
            if let Some(entries) = few.await? {
                return Ok(Page::of(entries, count));
            }
        }
        self.examine(workspace, filter, after, count).await
    }

    /// As [`Store::page`], for an export.
    ///
    /// # Errors
    /// As [`Store::find_covers`].
    pub async fn export_page(&self, workspace: WorkspaceId, filter: &Filter, after: &str, count: u32) -> Result<Page, Error> {
        if *filter == Filter::default() {
            return self.page_of_all(Share::Export(workspace), workspace, after, count).await;
        }
        self.examine(workspace, filter, after, count).await
    }

    async fn page_of_all(&self, share: Share, workspace: WorkspaceId, after: &str, count: u32) -> Result<Page, Error> {
        let after = after.to_owned();
        let entries = self.read_from(Source::Any, Mode::Read, share, move |connection| {
            Box::pin(async move { read_entries(connection, workspace, &Filter::default(), after, count).await })
        });
        Ok(Page::of(entries.await?, count))
    }

    /// Reads a page of a filtered list by examining the entries after `after`, in parts of
    /// [`PART_ENTRIES`] and for at most [`PAGE_TIME_MAX`].
    async fn examine(&self, workspace: WorkspaceId, filter: &Filter, after: &str, count: u32) -> Result<Page, Error> {
        let deadline = Instant::now() + PAGE_TIME_MAX;
        let mut found: Vec<ExaminedRow> = Vec::new();
        let (mut after, mut before) = (after.to_owned(), 0);
        loop {
            // One row more than the page has shows whether there is a next page.
            let missing = count as usize + 1 - found.len();
            let (its_filter, its_after) = (filter.clone(), after);
            let running = self.read_from(Source::Any, Mode::Read, Share::Scan(workspace), move |connection| {
                Box::pin(async move {
                    let mut query = part_of(workspace, &its_filter, its_after);
                    query.push(" ORDER BY address LIMIT ").push(count + 1);
                    Ok(query.build_query_as::<ExaminedRow>().fetch_all(connection).await?)
                })
            });
            let mut part = running.await?;
            let last = part.last().filter(|last| last.number == PART_ENTRIES).map(|last| last.entry.address.clone());
            part.retain(|row| row.is_match);
            part.truncate(missing);
            let is_full = part.len() == missing;
            found.extend(part.into_iter().map(|row| ExaminedRow { number: before + row.number, ..row }));
            if is_full {
                found.pop();
                let next = found.last().map(|last| Next { after: last.entry.address.clone(), examined: last.number });
                return Ok(Page { entries: found.into_iter().map(|row| row.entry).collect(), next });
            }
            before += PART_ENTRIES;
            match last {
                Some(last) if Instant::now() < deadline => after = last,
                last => {
                    let next = last.map(|after| Next { after, examined: before });
                    return Ok(Page { entries: found.into_iter().map(|row| row.entry).collect(), next });
                }
            }
        }
    }

    /// Counts the entries that a filter selects. A filter by kind and reason costs nothing; any
    /// other reads the entries that it selects from.
    ///
    /// # Errors
    /// As [`Store::find_covers`].
    pub async fn count_entries(&self, workspace: WorkspaceId, filter: &Filter) -> Result<i64, Error> {
        self.count_from(Source::Primary, workspace, filter).await
    }

    async fn count_from(&self, source: Source, workspace: WorkspaceId, filter: &Filter) -> Result<i64, Error> {
        if *filter == Filter::default() {
            return self.count_all(source, workspace).await;
        }
        if filter.is_by_kind_and_reason()
            && let Some(count) = self.count_by_reason(source, workspace, filter.kind, filter.reason.clone()).await?
        {
            return Ok(count);
        }
        let filter = filter.clone();
        let count = self.read_from(source, Mode::Scan, Share::Scan(workspace), move |connection| {
            Box::pin(async move { count_matching(connection, workspace, &filter).await })
        });
        count.await
    }

    /// As [`Store::count_entries`], but `None` if a long list cannot be counted in
    /// `COUNT_TIME_MAX`.
    ///
    /// # Errors
    /// As [`Store::find_covers`].
    pub async fn count_in_time(&self, workspace: WorkspaceId, filter: &Filter) -> Result<Option<i64>, Error> {
        if filter.is_by_kind_and_reason() || self.count_all(Source::Any, workspace).await? <= ALWAYS_COUNTED_ENTRIES {
            return self.count_from(Source::Any, workspace, filter).await.map(Some);
        }
        let filter = filter.clone();
        let counting = self.scan_within(COUNT_TIME_MAX, workspace, move |connection| {
            Box::pin(async move { count_matching(connection, workspace, &filter).await })
        });
        counting.await
    }

    /// Runs `work` as [`Mode::Scan`]; `None` if a statement of it takes longer than `limit`.
    async fn scan_within<T, W>(&self, limit: Duration, workspace: WorkspaceId, work: W) -> Result<Option<T>, Error>
    where
        T: Send + 'static,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Working<'c, T> + Clone + Send + 'static,
    {
        let scanned = self.read_from(
            Source::Any,
            Mode::Scan,
            Share::Scan(workspace),
            move |connection: &mut PgConnection| -> Working<'_, T> {
                Box::pin(async move {
                    let mut query = QueryBuilder::new("SET LOCAL statement_timeout = ");
                    query.push(limit.as_millis());
                    query.build().execute(&mut *connection).await?;
                    work(connection).await
                })
            },
        );
        match scanned.await {
            Ok(done) => Ok(Some(done)),
            Err(Error::Timeout { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// How many of these addresses are on the list.
    ///
    /// # Errors
    /// As [`Store::find_covers`].
    pub async fn count_named(&self, workspace: WorkspaceId, addresses: Vec<Address>) -> Result<i64, Error> {
        self.primary
            .read(Share::LookUp(workspace), move |connection| {
                Box::pin(async move {
                    let addresses: Vec<&str> = addresses.iter().map(Address::as_str).collect();
                    Ok(count_present(connection, workspace, &addresses).await?)
                })
            })
            .await
    }

    /// The secret from which the key of page tokens is derived. It is the same on every server.
    ///
    /// # Errors
    /// As [`Store::find_covers`].
    pub async fn page_token_secret(&self) -> Result<&[u8], Error> {
        let secret = self.page_token_secret.get_or_try_init(|| {
            self.primary.read(Share::Service, |connection| {
                Box::pin(async move {
                    Ok(query_scalar!("SELECT secret FROM secrets WHERE name = 'page_token'").fetch_one(connection).await?)
                })
            })
        });
        Ok(secret.await?)
    }
}

/// How many of these addresses are on the list.
pub(super) async fn count_present(
    connection: &mut PgConnection,
    workspace: WorkspaceId,
    addresses: &[&str],
) -> Result<i64, sqlx::Error> {
    query_scalar!(
        r#"SELECT count(*) AS "count!" FROM UNNEST($2::text[]) AS wanted (address)
           CROSS JOIN LATERAL (
               SELECT FROM entries WHERE workspace_id = $1 AND entries.address = wanted.address LIMIT 1
           ) AS entry"#,
        workspace.0,
        addresses as &[&str],
    )
    .fetch_one(connection)
    .await
}

/// Counts the entries that a filter selects by reading them.
async fn count_matching(connection: &mut PgConnection, workspace: WorkspaceId, filter: &Filter) -> Result<i64, Stop> {
    let mut query = QueryBuilder::new("SELECT count(*) FROM entries");
    push_filter(&mut query, workspace, filter);
    Ok(query.build_query_scalar().fetch_one(connection).await?)
}

/// Reads the matching entries after `after`, at most one more than `count`.
async fn read_entries(
    connection: &mut PgConnection,
    workspace: WorkspaceId,
    filter: &Filter,
    after: String,
    count: u32,
) -> Result<Vec<EntryRow>, Stop> {
    let mut query = QueryBuilder::new("SELECT address, reason, created_at, added_by, unsubscribed_at FROM entries");
    push_filter(&mut query, workspace, filter);
    // The limit is part of the text, so that the planner sees that it is small.
    query.push(" AND address > ").push_bind(after).push(" ORDER BY address LIMIT ").push(count + 1);
    Ok(query.build_query_as().fetch_all(connection).await?)
}

/// A query of the next [`PART_ENTRIES`] entries after `after`: those that match, and the last one.
fn part_of(workspace: WorkspaceId, filter: &Filter, after: String) -> QueryBuilder<Postgres> {
    // Domains have an index of their own.
    let scanned = Filter { kind: filter.kind.filter(|&kind| kind == Kind::Domain), ..Filter::default() };
    let mut query = QueryBuilder::new("SELECT * FROM (SELECT ");
    if filter.search.is_some() {
        // The index has the addresses, so only the entries that have the text are read.
        query.push("examined.address, reason, created_at, added_by, unsubscribed_at, number, has_text");
        push_conditions_on_entry(&mut query, filter);
        query.push(" AS is_match FROM (SELECT address, row_number() OVER (ORDER BY address) AS number, true");
        push_conditions_on_address(&mut query, filter);
        query.push(" AS has_text FROM (SELECT address FROM entries");
        push_filter(&mut query, workspace, &scanned);
        query.push(" AND address > ").push_bind(after).push(" ORDER BY address LIMIT ").push(PART_ENTRIES);
        query.push(") AS part) AS examined CROSS JOIN LATERAL (SELECT reason, created_at, added_by, unsubscribed_at");
        query.push(" FROM entries WHERE workspace_id = ").push_bind(workspace.0);
        query.push(" AND entries.address = examined.address LIMIT 1) AS entry WHERE has_text OR number = ").push(PART_ENTRIES);
    } else {
        query.push("*, row_number() OVER (ORDER BY address) AS number, true");
        push_conditions(&mut query, filter);
        query.push(" AS is_match FROM (SELECT address, reason, created_at, added_by, unsubscribed_at FROM entries");
        push_filter(&mut query, workspace, &scanned);
        query.push(" AND address > ").push_bind(after).push(" ORDER BY address LIMIT ").push(PART_ENTRIES).push(") AS part");
    }
    query.push(") AS found WHERE is_match OR number = ").push(PART_ENTRIES);
    query
}

/// Appends a filter as a WHERE clause. Each combination of conditions is a statement of its own, so
/// that the planner sees which index fits.
pub(super) fn push_filter(query: &mut QueryBuilder<Postgres>, workspace: WorkspaceId, filter: &Filter) {
    query.push(" WHERE workspace_id = ").push_bind(workspace.0);
    push_conditions(query, filter);
}

fn push_conditions(query: &mut QueryBuilder<Postgres>, filter: &Filter) {
    push_conditions_on_entry(query, filter);
    push_conditions_on_address(query, filter);
}

fn push_conditions_on_address(query: &mut QueryBuilder<Postgres>, filter: &Filter) {
    match filter.kind {
        // Exactly the condition of the partial index on domains.
        Some(Kind::Domain) => query.push(" AND strpos(address, '@') = 0"),
        Some(Kind::Email) => query.push(" AND strpos(address, '@') > 0"),
        None => query,
    };
    if let Some(search) = &filter.search {
        // Not a pattern, so no character of the text is special. Both the text and the addresses
        // are in lower case.
        query.push(" AND strpos(address, ").push_bind(search.clone()).push(") > 0");
    }
}

/// Appends the conditions on what is not in the index.
fn push_conditions_on_entry(query: &mut QueryBuilder<Postgres>, filter: &Filter) {
    if let Some(reason) = &filter.reason {
        query.push(" AND reason = ").push_bind(reason.clone());
    }
    if let Some(from) = filter.created_from {
        query.push(" AND created_at >= ").push_bind(from);
    }
    if let Some(to) = filter.created_to {
        query.push(" AND created_at < ").push_bind(to);
    }
}
