//! Authentication, and the scope of keys. The [guard](super::guard) asks here before a call's body
//! is read.
//!
//! Successful look-ups are cached for two seconds, which bounds how long a revoked key works on any
//! server. Failed look-ups are not cached, so a new key works at once.

use std::time::Duration;

use http::HeaderMap;
use moka::future::Cache;

use crate::{
    domain::{ApiKey, Error, KeyHash, KeyId, KeyKind, Scope, WorkspaceId},
    store::{Caller, Store},
};

/// How long a look-up is cached. A revocation must take effect on every server within five seconds.
const CACHE_TTL: Duration = Duration::from_secs(2);
const CACHE_ENTRIES_MAX: u64 = 10_000;

/// The scope that a method needs; none for a method that is not in the table, which is refused.
pub(super) fn needs(path: &str) -> Option<Scope> {
    match path {
        "/dnc.v1.DncService/CheckEntries" | "/dnc.v1.DncService/ScrubEntries" => Some(Scope::Check),
        "/dnc.v1.DncService/ListEntries"
        | "/dnc.v1.DncService/ExportEntries"
        | "/dnc.v1.DncService/SummarizeEntries"
        | "/dnc.v1.DncService/ListImports"
        | "/dnc.v1.DncService/ListDeletions" => Some(Scope::Read),
        "/dnc.v1.DncService/ImportEntries" | "/dnc.v1.DncService/DeleteEntries" => Some(Scope::Write),
        _ => None,
    }
}

/// An authenticated caller, and the workspace it works in.
#[derive(Clone, Debug)]
pub struct Principal {
    /// The workspace. Every statement of the call names it.
    pub workspace: WorkspaceId,
    /// The id of the key. Entries that the call stores are marked with it.
    pub key: KeyId,
    kind: KeyKind,
    /// The arguments of the look-up, kept to repeat it.
    asked: (KeyHash, Option<WorkspaceId>),
}

/// Authenticates callers. Shared by all calls.
pub struct Authenticator {
    store: Store,
    callers: Cache<(KeyHash, Option<WorkspaceId>), Caller>,
}

impl std::fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authenticator").finish_non_exhaustive()
    }
}

impl Authenticator {
    /// Looks keys up in `store`.
    pub fn new(store: Store) -> Self {
        Self { store, callers: Cache::builder().max_capacity(CACHE_ENTRIES_MAX).time_to_live(CACHE_TTL).build() }
    }

    /// The caller and the workspace of a call that needs the scope `needs`.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`] without a valid key, [`Error::Forbidden`] when the key's scope is
    /// too narrow or it may not use the workspace, [`Error::Invalid`] when a platform key names no
    /// workspace or the workspace id is malformed; those of the store.
    pub(super) async fn authenticate(&self, headers: &HeaderMap, needs: Scope) -> Result<Principal, Error> {
        let key = key_of(headers)?;
        let mut values = headers.get_all("x-workspace-id").iter();
        let asked_for = values.next();
        // A malformed id is looked up as none: a wrong key must be reported before a wrong
        // workspace id.
        let workspace_id =
            asked_for.filter(|_| values.next().is_none()).and_then(|value| value.to_str().ok()?.trim().parse::<WorkspaceId>().ok());
        let asked = (key.hash(), workspace_id);
        let caller = self.caller(asked).await?.ok_or(UNKNOWN_KEY)?;
        if asked_for.is_some() && workspace_id.is_none() {
            return Err(Error::invalid("x-workspace-id", "Send X-Workspace-Id once, as ws_ and a number, such as ws_1."));
        }
        let workspace = match (key.kind(), workspace_id) {
            (KeyKind::Platform, None) => {
                return Err(Error::invalid(
                    "x-workspace-id",
                    "A platform key works in many workspaces; name one in X-Workspace-Id.",
                ));
            }
            (KeyKind::Platform, Some(asked_for)) if caller.is_member => asked_for,
            (KeyKind::Workspace, None) => caller.workspace.ok_or(FORBIDDEN)?,
            (KeyKind::Workspace, Some(asked_for)) if caller.workspace == Some(asked_for) => asked_for,
            (KeyKind::Platform | KeyKind::Workspace, Some(_)) => return Err(FORBIDDEN),
        };
        if caller.scope < needs {
            return Err(out_of_scope(needs));
        }
        Ok(Principal { workspace, key: caller.key, kind: key.kind(), asked })
    }

    /// Looks the caller up again during a long call.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`] or [`Error::Forbidden`] when the caller has lost access; those of
    /// the store.
    pub(super) async fn recheck(&self, principal: &Principal) -> Result<(), Error> {
        let caller = self.caller(principal.asked).await?.ok_or(UNKNOWN_KEY)?;
        match principal.kind {
            KeyKind::Workspace => Ok(()),
            KeyKind::Platform if caller.is_member => Ok(()),
            KeyKind::Platform => Err(FORBIDDEN),
        }
    }

    /// Looks a caller up through the cache. Concurrent calls with the same key share one look-up.
    async fn caller(&self, asked: (KeyHash, Option<WorkspaceId>)) -> Result<Option<Caller>, Error> {
        let look_up = async {
            match self.store.find_caller(asked.0, asked.1).await {
                Ok(Some(caller)) => Ok(caller),
                Ok(None) => Err(None),
                Err(error) => Err(Some(error)),
            }
        };
        match self.callers.try_get_with(asked, look_up).await {
            Ok(caller) => Ok(Some(caller)),
            Err(failed) => failed.as_ref().as_ref().map_or(Ok(None), |error| Err(error.shared())),
        }
    }
}

const NO_KEY: Error =
    Error::Unauthenticated("The call needs an API key: send it in X-Api-Key, or in Authorization as a Bearer token.");
const MALFORMED_KEY: Error =
    Error::Unauthenticated("The API key cannot be read. Send exactly one, in X-Api-Key, or in Authorization as a Bearer token.");
const UNKNOWN_KEY: Error = Error::Unauthenticated("The API key is not valid: it is unknown, expired or revoked.");
const FORBIDDEN: Error = Error::Forbidden("This API key may not use that workspace.");

/// The refusal of a key whose scope is too narrow. No key is too narrow for the scope `check`.
fn out_of_scope(needs: Scope) -> Error {
    Error::Forbidden(match needs {
        Scope::Check | Scope::Read => "This call needs a key with the scope read or write.",
        Scope::Write => "This call needs a key with the scope write.",
    })
}

/// The API key of a call. If both headers are present, only `X-Api-Key` counts: the samples in the
/// public reference send both.
fn key_of(headers: &HeaderMap) -> Result<ApiKey, Error> {
    let single = |name: &str| -> Result<Option<&str>, Error> {
        let mut values = headers.get_all(name).iter();
        let Some(value) = values.next() else { return Ok(None) };
        if values.next().is_some() {
            return Err(MALFORMED_KEY);
        }
        value.to_str().map(|text| Some(text.trim())).map_err(|_| MALFORMED_KEY)
    };
    let text = match single("x-api-key")? {
        Some(text) => text,
        None => {
            let text = single("authorization")?.ok_or(NO_KEY)?;
            let (scheme, key) = text.split_once(' ').ok_or(MALFORMED_KEY)?;
            if !scheme.eq_ignore_ascii_case("bearer") {
                return Err(MALFORMED_KEY);
            }
            key.trim()
        }
    };
    if text.is_empty() {
        return Err(MALFORMED_KEY);
    }
    ApiKey::parse(text).ok_or(UNKNOWN_KEY)
}
