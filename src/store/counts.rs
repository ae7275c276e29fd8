//! The numbers of entries of each workspace, in all and by kind and reason. They are updated with
//! each batch, so that nothing has to count entries.

use std::collections::BTreeMap;

use sqlx::{PgConnection, query, query_as, query_scalar};

use super::{
    Store,
    replica::Source,
    session::{Mode, Stop},
    shares::Share,
};
use crate::domain::{Error, Kind, Sorted, WorkspaceId};

/// The number of rows that a count is divided into, so that as many transactions can usually change
/// it concurrently.
const PARTS: i32 = 16;

/// The most pairs of a kind and a reason whose counts one deletion forgets.
const FORGOTTEN_REASONS_MAX: i64 = 10_000;

/// The number of entries of a kind that have a reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReasonCount {
    /// The kind.
    pub kind: Kind,
    /// The reason.
    pub reason: String,
    /// The number of entries.
    pub count: i64,
}

impl ReasonCount {
    pub(super) fn new(is_domain: bool, reason: String, count: i64) -> Self {
        Self { kind: if is_domain { Kind::Domain } else { Kind::Email }, reason, count }
    }
}

/// The counts of a list.
#[derive(Clone, Debug)]
pub struct Summary {
    /// The number of entries.
    pub total: i64,
    /// The number of pairs of a kind and a reason, including those that are not in `counts`.
    pub reasons: i64,
    /// The pairs with the most entries, the largest first.
    pub counts: Vec<ReasonCount>,
}

/// A pair of a kind and a reason, and the totals of all pairs.
struct SummaryRow {
    is_domain: bool,
    reason: String,
    count: i64,
    total: i64,
    reasons: i64,
}

/// The counts of these entries.
pub(super) fn of(entries: &Sorted) -> Vec<ReasonCount> {
    let mut counts = BTreeMap::<(&str, bool), i64>::new();
    for (address, reason, _) in entries.iter() {
        *counts.entry((reason, !address.contains('@'))).or_default() += 1;
    }
    counts.into_iter().map(|((reason, is_domain), count)| ReasonCount::new(is_domain, reason.to_owned(), count)).collect()
}

/// Adds `changes` to a workspace's counts and returns the id of the transaction; `None` if there is
/// nothing to change. Must be the last work of its transaction, so that the rows are locked only
/// until the commit.
pub(super) async fn add(
    connection: &mut PgConnection,
    workspace: WorkspaceId,
    mut changes: Vec<ReasonCount>,
) -> Result<Option<String>, sqlx::Error> {
    let total: i64 = changes.iter().map(|change| change.count).sum();
    if total == 0 {
        return Ok(None);
    }
    // Every transaction locks the rows in this order, so there are no deadlocks.
    changes.sort_unstable_by(|a, b| (&a.reason, a.kind).cmp(&(&b.reason, b.kind)));
    let reasons: Vec<&str> = changes.iter().map(|change| change.reason.as_str()).collect();
    let are_domains: Vec<bool> = changes.iter().map(|change| change.kind == Kind::Domain).collect();
    let counts: Vec<i64> = changes.iter().map(|change| change.count).collect();
    query!(
        "INSERT INTO reason_counts AS known (workspace_id, reason, is_domain, part, entries)
         SELECT $1, reason, is_domain, pg_backend_pid() % $2, change
         FROM UNNEST($3::text[], $4::bool[], $5::bigint[]) AS new (reason, is_domain, change)
         ON CONFLICT (workspace_id, reason, is_domain, part) DO UPDATE SET entries = known.entries + excluded.entries",
        workspace.0,
        PARTS,
        &reasons as &[&str],
        &are_domains,
        &counts,
    )
    .execute(&mut *connection)
    .await?;
    query_scalar!(
        r#"INSERT INTO entry_counts AS known (workspace_id, part, entries) VALUES ($1, pg_backend_pid() % $2, $3)
           ON CONFLICT (workspace_id, part) DO UPDATE SET entries = known.entries + excluded.entries
           RETURNING pg_current_xact_id()::text AS "transaction!""#,
        workspace.0,
        PARTS,
        total,
    )
    .fetch_one(connection)
    .await
    .map(Some)
}

/// Deletes the counts of kinds and reasons that no entry has any more, as far as nobody is changing
/// them. The rest stays for the next time.
pub(super) async fn forget_empty(connection: &mut PgConnection, workspace: WorkspaceId) -> Result<(), Stop> {
    // The sum of rows that are locked does not change, so deleting them if it is 0 changes no
    // total. Nothing is waited for, so there are no deadlocks.
    query!(
        "WITH empty AS (
             SELECT reason, is_domain FROM reason_counts WHERE workspace_id = $1
             GROUP BY reason, is_domain HAVING sum(entries) = 0 LIMIT $2
         ), locked AS (
             SELECT known.reason, known.is_domain, known.part, known.entries FROM empty CROSS JOIN LATERAL (
                 SELECT reason, is_domain, part, entries FROM reason_counts AS known
                 WHERE workspace_id = $1 AND known.reason = empty.reason AND known.is_domain = empty.is_domain
                 ORDER BY part FOR UPDATE SKIP LOCKED
             ) AS known
         ), unused AS (SELECT reason, is_domain FROM locked GROUP BY reason, is_domain HAVING sum(entries) = 0)
         DELETE FROM reason_counts AS known USING locked JOIN unused USING (reason, is_domain)
         WHERE known.workspace_id = $1 AND known.reason = locked.reason AND known.is_domain = locked.is_domain
             AND known.part = locked.part",
        workspace.0,
        FORGOTTEN_REASONS_MAX,
    )
    .execute(connection)
    .await?;
    Ok(())
}

impl Store {
    /// The number of entries of a workspace.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`], as everywhere below.
    pub(super) async fn count_all(&self, source: Source, workspace: WorkspaceId) -> Result<i64, Error> {
        self.read_from(source, Mode::Read, Share::LookUp(workspace), move |connection| {
            Box::pin(async move {
                Ok(query_scalar!(
                    r#"SELECT COALESCE(sum(entries), 0)::bigint AS "count!" FROM entry_counts WHERE workspace_id = $1"#,
                    workspace.0
                )
                .fetch_one(connection)
                .await?)
            })
        })
        .await
    }

    /// The number of entries of this kind and with this reason; of any kind, or with any reason, if
    /// it is `None`. No number when a server from before migration 0009 has changed the list since,
    /// which did not count by kind and reason.
    pub(super) async fn count_by_reason(
        &self,
        source: Source,
        workspace: WorkspaceId,
        kind: Option<Kind>,
        reason: Option<String>,
    ) -> Result<Option<i64>, Error> {
        self.read_from(source, Mode::Read, Share::Scan(workspace), move |connection| {
            Box::pin(async move {
                let row = query!(
                    r#"SELECT COALESCE(sum(entries) FILTER (WHERE reason = COALESCE($2, reason) AND is_domain = COALESCE($3, is_domain)), 0)::bigint AS "count!",
                           COALESCE(sum(entries), 0) = (SELECT COALESCE(sum(entries), 0) FROM entry_counts WHERE workspace_id = $1) AS "is_complete!"
                       FROM reason_counts WHERE workspace_id = $1"#,
                    workspace.0,
                    reason,
                    kind.map(|kind| kind == Kind::Domain),
                );
                let row = row.fetch_one(connection).await?;
                Ok(row.is_complete.then_some(row.count))
            })
        })
        .await
    }

    /// The entries by kind and reason: the `reasons_max` largest counts, and the number of all of
    /// them.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub async fn summarize(&self, workspace: WorkspaceId, reasons_max: u32) -> Result<Summary, Error> {
        let is_counted = self.count_by_reason(Source::Any, workspace, None, None).await?.is_some();
        self.read_from(Source::Any, Mode::Scan, Share::Scan(workspace), move |connection| {
            Box::pin(async move {
                let reasons_max = i64::from(reasons_max);
                let rows = if is_counted {
                    let counted = query_as!(
                        SummaryRow,
                        r#"SELECT is_domain AS "is_domain!", reason AS "reason!", sum(entries)::bigint AS "count!",
                           (sum(sum(entries)) OVER ())::bigint AS "total!", count(*) OVER () AS "reasons!"
                       FROM reason_counts WHERE workspace_id = $1 GROUP BY reason, is_domain HAVING sum(entries) <> 0
                       ORDER BY 3 DESC, 2, 1 LIMIT $2"#,
                        workspace.0,
                        reasons_max,
                    );
                    counted.fetch_all(connection).await?
                } else {
                    let read = query_as!(
                        SummaryRow,
                        r#"SELECT strpos(address, '@') = 0 AS "is_domain!", reason AS "reason!", count(*) AS "count!",
                           sum(count(*)) OVER ()::bigint AS "total!", count(*) OVER () AS "reasons!"
                       FROM entries WHERE workspace_id = $1 GROUP BY 1, 2 ORDER BY 3 DESC, 2, 1 LIMIT $2"#,
                        workspace.0,
                        reasons_max,
                    );
                    read.fetch_all(connection).await?
                };
                let (total, reasons) = rows.first().map_or((0, 0), |row| (row.total, row.reasons));
                let counts = rows.into_iter().map(|row| ReasonCount::new(row.is_domain, row.reason, row.count));
                Ok(Summary { total, reasons, counts: counts.collect() })
            })
        })
        .await
    }
}
