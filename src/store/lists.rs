//! Reading the list: questions before a send, pages, counts. All of it by the table's own key.

use sqlx::{FromRow, Postgres, QueryBuilder, query_as, query_scalar};
use time::OffsetDateTime;

use super::{Store, error::from_sqlx};
use crate::domain::{Error, Filter, KeyId, Kind, WorkspaceId};

/// An entry as it is kept.
#[derive(Clone, Debug, FromRow)]
pub struct EntryRow {
    /// The canonical form; its kind shows by the `@`.
    pub address: String,
    /// Why it is on the list.
    pub reason: String,
    /// When it was stored.
    pub created_at: OffsetDateTime,
    #[sqlx(try_from = "i64")]
    /// The key that stored it.
    pub added_by: KeyId,
}

/// How many entries of a kind have a reason.
#[derive(Clone, Debug)]
pub struct ReasonCount {
    /// The kind.
    pub kind: Kind,
    /// The reason.
    pub reason: String,
    /// How many.
    pub count: i64,
}

impl Store {
    /// The entries for any of these addresses, in one statement. `addresses` must be canonical; sorted ones are faster.
    ///
    /// The array stands behind a sub-select because the planner would otherwise estimate each of its elements, which takes longer than to look them
    /// up.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`], as everywhere below.
    pub async fn find_entries(&self, workspace: WorkspaceId, addresses: &[&str]) -> Result<Vec<EntryRow>, Error> {
        query_as!(
            EntryRow,
            "SELECT address, reason, created_at, added_by FROM entries
             WHERE workspace_id = $1 AND address = ANY (ARRAY(SELECT UNNEST($2::text[])))",
            workspace.0,
            addresses as &[&str],
        )
        .fetch_all(&self.pool)
        .await
        .map_err(from_sqlx)
    }

    /// At most `count` entries that come after an address, in the order of the key.
    ///
    /// # Errors
    /// As [`Store::find_entries`].
    pub async fn page(&self, workspace: WorkspaceId, filter: &Filter, after: &str, count: u32) -> Result<Vec<EntryRow>, Error> {
        let _slot = match *filter == Filter::default() {
            true => None,
            false => Some(self.scan_slots.acquire().await.map_err(Error::internal)?),
        };
        let mut query = QueryBuilder::new("SELECT address, reason, created_at, added_by FROM entries");
        push_filter(&mut query, workspace, filter);
        query.push(" AND address > ").push_bind(after).push(" ORDER BY address LIMIT ").push_bind(i64::from(count));
        query.build_query_as().fetch_all(&self.pool).await.map_err(from_sqlx)
    }

    /// How many entries a filter selects. One that selects everything costs nothing, others look at what they select from.
    ///
    /// # Errors
    /// As [`Store::find_entries`].
    pub async fn count_entries(&self, workspace: WorkspaceId, filter: &Filter) -> Result<i64, Error> {
        if *filter == Filter::default() {
            return self.count_all(workspace).await;
        }
        let _slot = self.scan_slots.acquire().await.map_err(Error::internal)?;
        let mut query = QueryBuilder::new("SELECT count(*) FROM entries");
        push_filter(&mut query, workspace, filter);
        query.build_query_scalar().fetch_one(&self.pool).await.map_err(from_sqlx)
    }

    /// How many of these addresses are on the list.
    ///
    /// # Errors
    /// As [`Store::find_entries`].
    pub async fn count_named(&self, workspace: WorkspaceId, addresses: &[&str]) -> Result<i64, Error> {
        query_scalar!(
            r#"SELECT count(*) AS "count!" FROM entries WHERE workspace_id = $1 AND address = ANY (ARRAY(SELECT UNNEST($2::text[])))"#,
            workspace.0,
            addresses as &[&str],
        )
        .fetch_one(&self.pool)
        .await
        .map_err(from_sqlx)
    }

    /// Counts by kind and reason, the largest first.
    ///
    /// # Errors
    /// As [`Store::find_entries`].
    pub async fn summarize(&self, workspace: WorkspaceId) -> Result<Vec<ReasonCount>, Error> {
        let _slot = self.scan_slots.acquire().await.map_err(Error::internal)?;
        let rows = sqlx::query!(
            r#"SELECT strpos(address, '@') = 0 AS "is_domain!", reason, count(*) AS "count!"
               FROM entries WHERE workspace_id = $1 GROUP BY 1, 2 ORDER BY 3 DESC, 2, 1"#,
            workspace.0,
        )
        .fetch_all(&self.pool)
        .await
        .map_err(from_sqlx)?;
        let kind = |is_domain| if is_domain { Kind::Domain } else { Kind::Email };
        Ok(rows.into_iter().map(|row| ReasonCount { kind: kind(row.is_domain), reason: row.reason, count: row.count }).collect())
    }

    /// The octets that page tokens are signed with; the same on every server.
    ///
    /// # Errors
    /// As [`Store::find_entries`].
    pub async fn page_token_secret(&self) -> Result<&[u8], Error> {
        let secret = self.page_token_secret.get_or_try_init(|| async {
            query_scalar!("SELECT secret FROM secrets WHERE name = 'page_token'").fetch_one(&self.pool).await.map_err(from_sqlx)
        });
        Ok(secret.await?)
    }
}

/// What a filter says, as a WHERE clause. Each combination of parts is a statement of its own, so the planner sees which index fits.
pub(super) fn push_filter(query: &mut QueryBuilder<Postgres>, workspace: WorkspaceId, filter: &Filter) {
    query.push(" WHERE workspace_id = ").push_bind(workspace.0);
    match filter.kind {
        // Word for word the condition of the index of domains.
        Some(Kind::Domain) => query.push(" AND strpos(address, '@') = 0"),
        Some(Kind::Email) => query.push(" AND strpos(address, '@') > 0"),
        None => query,
    };
    if let Some(reason) = &filter.reason {
        query.push(" AND reason = ").push_bind(reason.clone());
    }
    if let Some(search) = &filter.search {
        // No pattern, so nothing in the text has a meaning of its own; addresses are lower case as the text is.
        query.push(" AND strpos(address, ").push_bind(search.clone()).push(") > 0");
    }
    if let Some(from) = filter.created_from {
        query.push(" AND created_at >= ").push_bind(from);
    }
    if let Some(to) = filter.created_to {
        query.push(" AND created_at < ").push_bind(to);
    }
}
