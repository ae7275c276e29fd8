//! Reads the list: checks, pages, counts. All statements use the primary key of the table, unless
//! [`Mode::Scan`] says otherwise.

use std::{ops::Range, sync::Arc};

use sqlx::{FromRow, PgConnection, Postgres, QueryBuilder, query_as, query_scalar};
use time::OffsetDateTime;

use super::{Store, session::Mode, shares::Share};
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

/// A selection of up to this many entries counts as short. For a longer one, a scan along the key
/// finds a page within a small part of the workspace.
const SHORT_LIST_ENTRIES: i64 = 1_000;

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
        self.read(Share::LookUp(workspace), move |connection| {
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

    /// Reads at most `count` matching entries after the address `after`, in the order of the key.
    /// `total` is the number of entries that the filter selects; `None` for a page of an export,
    /// which does not count them.
    ///
    /// A filtered page is a scan along the key, so that all pages of a list together read it once.
    /// Only for a short selection does the planner choose: it may find the few entries by their
    /// creation time. To find many entries in that way for every page would take many times as long
    /// as the scan.
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
    ) -> Result<Vec<EntryRow>, Error> {
        let (mode, share) = match total {
            None if *filter == Filter::default() => (Mode::Read, Share::Export(workspace)),
            _ if *filter == Filter::default() => (Mode::Read, Share::LookUp(workspace)),
            Some(..=SHORT_LIST_ENTRIES) => (Mode::Scan, Share::Scan(workspace)),
            _ => (Mode::Read, Share::Scan(workspace)),
        };
        let (filter, after) = (filter.clone(), after.to_owned());
        let running = self.run(mode, share, move |connection| {
            Box::pin(async move {
                let mut query = QueryBuilder::new("SELECT address, reason, created_at, added_by, unsubscribed_at FROM entries");
                push_filter(&mut query, workspace, &filter);
                // The limit is part of the text, so that the planner sees that it is small.
                query.push(" AND address > ").push_bind(after).push(" ORDER BY address LIMIT ").push(count);
                Ok(query.build_query_as().fetch_all(connection).await?)
            })
        });
        Ok(running.await?)
    }

    /// Counts the entries that a filter selects. A filter by kind and reason costs nothing; any other
    /// reads the entries that it selects from.
    ///
    /// # Errors
    /// As [`Store::find_covers`].
    pub async fn count_entries(&self, workspace: WorkspaceId, filter: &Filter) -> Result<i64, Error> {
        match filter.clone() {
            Filter { kind: None, reason: None, search: None, created_from: None, created_to: None } => {
                return self.count_all(workspace).await;
            }
            Filter { kind, reason, search: None, created_from: None, created_to: None } => {
                return self.count_by_reason(workspace, kind, reason).await;
            }
            _ => {}
        }
        let filter = filter.clone();
        self.scan(workspace, move |connection| {
            Box::pin(async move {
                let mut query = QueryBuilder::new("SELECT count(*) FROM entries");
                push_filter(&mut query, workspace, &filter);
                Ok(query.build_query_scalar().fetch_one(connection).await?)
            })
        })
        .await
    }

    /// How many of these addresses are on the list.
    ///
    /// # Errors
    /// As [`Store::find_covers`].
    pub async fn count_named(&self, workspace: WorkspaceId, addresses: Vec<Address>) -> Result<i64, Error> {
        self.read(Share::LookUp(workspace), move |connection| {
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
            self.read(Share::Service, |connection| {
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

/// Appends a filter as a WHERE clause. Each combination of conditions is a statement of its own, so
/// that the planner sees which index fits.
pub(super) fn push_filter(query: &mut QueryBuilder<Postgres>, workspace: WorkspaceId, filter: &Filter) {
    query.push(" WHERE workspace_id = ").push_bind(workspace.0);
    match filter.kind {
        // Exactly the condition of the partial index on domains.
        Some(Kind::Domain) => query.push(" AND strpos(address, '@') = 0"),
        Some(Kind::Email) => query.push(" AND strpos(address, '@') > 0"),
        None => query,
    };
    if let Some(reason) = &filter.reason {
        query.push(" AND reason = ").push_bind(reason.clone());
    }
    if let Some(search) = &filter.search {
        // Not a pattern, so no character of the text is special. Both the text and the addresses
        // are in lower case.
        query.push(" AND strpos(address, ").push_bind(search.clone()).push(") > 0");
    }
    if let Some(from) = filter.created_from {
        query.push(" AND created_at >= ").push_bind(from);
    }
    if let Some(to) = filter.created_to {
        query.push(" AND created_at < ").push_bind(to);
    }
}
