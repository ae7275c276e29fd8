//! Workspaces, users and memberships.

use sqlx::{query, query_scalar};
use time::OffsetDateTime;

use super::{Store, session::Stop, shares::Share};
use crate::domain::{Error, UserId, WorkspaceId};

/// A workspace as operators see it.
#[derive(Debug)]
pub struct WorkspaceRow {
    /// Its id.
    pub id: WorkspaceId,
    /// When it was created.
    pub created_at: OffsetDateTime,
    /// What people call it.
    pub name: String,
}

/// A user as operators see it.
#[derive(Debug)]
pub struct UserRow {
    /// Its id.
    pub id: UserId,
    /// When it was created.
    pub created_at: OffsetDateTime,
    /// What people call it.
    pub name: String,
    /// The workspaces that the user is a member of.
    pub workspaces: Vec<WorkspaceId>,
}

impl Store {
    /// Creates a workspace.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`], as everywhere below.
    pub async fn create_workspace(&self, name: &str) -> Result<WorkspaceId, Error> {
        let name = name.to_owned();
        let created = self.primary.write(Share::Service, move |connection| {
            Box::pin(async move {
                let id =
                    query_scalar!("INSERT INTO workspaces (name) VALUES ($1) RETURNING id", name).fetch_one(connection).await?;
                Ok(WorkspaceId(id))
            })
        });
        Ok(created.await?)
    }

    /// All workspaces, oldest first.
    ///
    /// # Errors
    /// As [`Store::create_workspace`].
    pub async fn list_workspaces(&self) -> Result<Vec<WorkspaceRow>, Error> {
        self.primary
            .read(Share::Service, |connection| {
                Box::pin(async move {
                    Ok(query!("SELECT id, created_at, name FROM workspaces ORDER BY id")
                        .map(|row| WorkspaceRow { id: WorkspaceId(row.id), created_at: row.created_at, name: row.name })
                        .fetch_all(connection)
                        .await?)
                })
            })
            .await
    }

    /// Creates a user who is a member of these workspaces.
    ///
    /// # Errors
    /// [`Error::NotFound`] when one of the workspaces does not exist; then no user is created.
    pub async fn create_user(&self, name: &str, workspaces: &[WorkspaceId]) -> Result<UserId, Error> {
        let ids: Vec<i64> = workspaces.iter().map(|id| id.0).collect();
        let name = name.to_owned();
        let created = self.primary.write(Share::Service, move |connection| {
            Box::pin(async move {
                let user =
                    query_scalar!("INSERT INTO users (name) VALUES ($1) RETURNING id", name).fetch_one(&mut *connection).await?;
                query!(
                    "INSERT INTO memberships (user_id, workspace_id) SELECT $1, UNNEST($2::bigint[]) ON CONFLICT DO NOTHING",
                    user,
                    &ids
                )
                .execute(connection)
                .await
                .map_err(|error| match error.as_database_error() {
                    Some(inner) if inner.is_foreign_key_violation() => Stop::Refused(Error::NotFound(
                        "One of these workspaces does not exist; `dnc workspaces list` shows those that do.",
                    )),
                    _ => error.into(),
                })?;
                Ok(UserId(user))
            })
        });
        Ok(created.await?)
    }

    /// All users, oldest first.
    ///
    /// # Errors
    /// As [`Store::create_workspace`].
    pub async fn list_users(&self) -> Result<Vec<UserRow>, Error> {
        self.primary.read(Share::Service, |connection| {
            Box::pin(async move {
                Ok(query!(
                    r#"SELECT id, created_at, name,
                           ARRAY(SELECT workspace_id FROM memberships WHERE user_id = users.id ORDER BY workspace_id) AS "workspaces!"
                       FROM users ORDER BY id"#
                )
                .map(|row| UserRow {
                    id: UserId(row.id),
                    created_at: row.created_at,
                    name: row.name,
                    workspaces: row.workspaces.into_iter().map(WorkspaceId).collect(),
                })
                .fetch_all(connection)
                .await?)
            })
        })
        .await
    }
}
