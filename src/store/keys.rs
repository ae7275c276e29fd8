//! API keys: created, listed, revoked, and looked up for each call.

use std::time::Duration;

use sqlx::{query, query_scalar};
use time::OffsetDateTime;

use super::{Store, session::Stop, shares::Share};
use crate::domain::{ApiKey, Error, KeyHash, KeyId, KeyOwner, Scope, UserId, WorkspaceId};

/// A key as operators see it. The key itself is not stored.
#[derive(Debug)]
pub struct KeyRow {
    /// Its id.
    pub id: KeyId,
    /// What it is bound to.
    pub owner: KeyOwner,
    /// What it may do.
    pub scope: Scope,
    /// When it was created.
    pub created_at: OffsetDateTime,
    /// When it stops working.
    pub expires_at: Option<OffsetDateTime>,
    /// When it was revoked.
    pub revoked_at: Option<OffsetDateTime>,
    /// What people call it.
    pub name: String,
}

/// A valid key of a call. The caller's right to the requested workspace is not yet checked.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// The key's id.
    pub key: KeyId,
    /// The workspace of a workspace key; `None` for a platform key.
    pub workspace: Option<WorkspaceId>,
    /// True when the key's user is a member of the requested workspace.
    pub is_member: bool,
    /// What the key may do.
    pub scope: Scope,
}

impl Store {
    /// Creates a key, stores its hash, and returns the key with its id. There is no other copy of
    /// the key. Without `expires_in` the key is valid until it is revoked.
    ///
    /// # Errors
    /// [`Error::NotFound`] when the owner does not exist, [`Error::Internal`] when the operating
    /// system has no random numbers, [`Error::Unavailable`] and [`Error::Timeout`].
    pub async fn issue_key(
        &self,
        owner: KeyOwner,
        scope: Scope,
        name: &str,
        expires_in: Option<Duration>,
    ) -> Result<(KeyId, ApiKey), Error> {
        let key = ApiKey::generate(owner.kind()).map_err(Error::internal)?;
        let hash = key.hash();
        let (workspace, user) = match owner {
            KeyOwner::Workspace(id) => (Some(id.0), None),
            KeyOwner::User(id) => (None, Some(id.0)),
        };
        let name = name.to_owned();
        let created = self.primary.write(Share::Service, move |connection| {
            Box::pin(async move {
                query_scalar!(
                    "INSERT INTO api_keys (workspace_id, user_id, name, secret_sha256, expires_at, scope)
                     VALUES ($1, $2, $3, $4, now() + make_interval(secs => $5), $6) RETURNING id",
                    workspace,
                    user,
                    name,
                    hash.as_bytes(),
                    expires_in.map(|duration| duration.as_secs_f64()),
                    scope.name(),
                )
                .fetch_one(connection)
                .await
                .map(KeyId)
                .map_err(|error| match error.as_database_error() {
                    Some(inner) if inner.is_foreign_key_violation() => {
                        Stop::Refused(Error::NotFound("There is no such workspace or user."))
                    }
                    _ => error.into(),
                })
            })
        });
        Ok((created.await?, key))
    }

    /// All keys, oldest first.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub async fn list_keys(&self) -> Result<Vec<KeyRow>, Error> {
        self.primary
            .read(Share::Service, |connection| {
                Box::pin(async move {
                    let keys = query!(
                    "SELECT id, workspace_id, user_id, created_at, expires_at, revoked_at, name, scope FROM api_keys ORDER BY id"
                )
                .try_map(|row| {
                    let owner = match (row.workspace_id, row.user_id) {
                        (Some(id), _) => KeyOwner::Workspace(WorkspaceId(id)),
                        (None, Some(id)) => KeyOwner::User(UserId(id)),
                        (None, None) => return Err(sqlx::Error::Decode("a key without an owner".into())),
                    };
                    Ok(KeyRow {
                        id: KeyId(row.id),
                        owner,
                        scope: scope(&row.scope)?,
                        created_at: row.created_at,
                        expires_at: row.expires_at,
                        revoked_at: row.revoked_at,
                        name: row.name,
                    })
                })
                .fetch_all(connection)
                .await?;
                    Ok(keys)
                })
            })
            .await
    }

    /// Revokes a key. Revoking a revoked key changes nothing.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such key.
    pub async fn revoke_key(&self, id: KeyId) -> Result<(), Error> {
        let revoked = self.primary.write(Share::Service, move |connection| {
            Box::pin(async move {
                query!("UPDATE api_keys SET revoked_at = now() WHERE id = $1 AND revoked_at IS NULL", id.0)
                    .execute(&mut *connection)
                    .await?;
                let exists = query_scalar!(r#"SELECT EXISTS (SELECT FROM api_keys WHERE id = $1) AS "exists!""#, id.0);
                if !exists.fetch_one(connection).await? {
                    return Err(Stop::Refused(Error::NotFound("There is no such key; `dnc keys list` shows those that exist.")));
                }
                Ok(())
            })
        });
        Ok(revoked.await?)
    }

    /// Finds the caller of a key; `None` if the key is unknown, expired or revoked. Expiry is
    /// decided by the database's clock, so that all servers agree.
    ///
    /// # Errors
    /// [`Error::Unavailable`] and [`Error::Timeout`].
    pub async fn find_caller(&self, hash: KeyHash, workspace: Option<WorkspaceId>) -> Result<Option<Caller>, Error> {
        self.primary.read(Share::Service, move |connection| {
            Box::pin(async move {
                // Not now(), which stands still within a transaction.
                Ok(query!(
                    r#"SELECT id, workspace_id, scope,
                           EXISTS (SELECT FROM memberships WHERE memberships.user_id = api_keys.user_id AND memberships.workspace_id = $2)
                               AS "is_member!"
                       FROM api_keys
                       WHERE secret_sha256 = $1 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > clock_timestamp())"#,
                    hash.as_bytes(),
                    workspace.map(|id| id.0),
                )
                .try_map(|row| {
                    Ok(Caller {
                        key: KeyId(row.id),
                        workspace: row.workspace_id.map(WorkspaceId),
                        is_member: row.is_member,
                        scope: scope(&row.scope)?,
                    })
                })
                .fetch_optional(connection)
                .await?)
            })
        })
        .await
    }
}

/// A scope as it is stored. The table's check leaves no other.
fn scope(name: &str) -> Result<Scope, sqlx::Error> {
    Scope::of_name(name).ok_or_else(|| sqlx::Error::Decode("an unknown scope".into()))
}
