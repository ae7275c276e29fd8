//! The OpenAPI document of the HTTP API, served at `/openapi.json`.
//!
//! The schemas of bodies come from the types that the gateway reads and writes, with their
//! comments. The calls are written down here: parameters, media types, statuses, headers and
//! examples. Tests hold both against the routes and the running service.
//!
//! The document forbids nothing that the service accepts. So the fields of an entry are plain
//! texts: an entry that breaks a rule is rejected alone, in an answer with status 200.

use std::sync::LazyLock;

use serde_json::{Map, Value, json};
use utoipa::{PartialSchema, ToSchema};

use super::{
    answers::{Added, Checked, Deleted, EntryType, Imported, Page, Success, Summary},
    error::ErrorBody,
    logs::{JsonDeletion, JsonImport},
    requests::{CheckBody, DeleteBody, ImportBody},
};
use crate::files::Source;

/// The document, as it is served.
pub(super) static DOCUMENT: LazyLock<String> = LazyLock::new(|| document().to_string());

/// A text that is not blank, for a search: characters that are cut from both ends of an address,
/// and others.
const SEARCH: &str = concat!(
    r"^[^\u0000]*[^\u0000\u0009-\u000d\u0020\u0085\u00a0\u1680\u180e\u2000-\u200f\u2028\u2029\u202f\u205f\u2060\u3000\ufeff]",
    r"[^\u0000]*$"
);

/// A reason: 1 to 64 characters without control characters, between white space of any kind.
const REASON: &str = concat!(
    r"^[\u0009-\u000d\u0020\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*",
    r"[^\u0000-\u0020\u007f-\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]",
    r"([^\u0000-\u001f\u007f-\u009f]{0,62}[^\u0000-\u0020\u007f-\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000])?",
    r"[\u0009-\u000d\u0020\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*$"
);

const ABOUT: &str = "\
A list of addresses and domains that must never be written to, one list for each workspace.

Send the key in `X-Api-Key`, or in `Authorization` as a bearer token; if both are there, `X-Api-Key` counts. \
A workspace key (`sk_…`) is bound to one workspace. A platform key (`sk_user_…`) works in every workspace of its user, \
and names one in \
`X-Workspace-Id`. A key has the scope `check`, `read` or `write`; each includes those before it.

A success is `{\"success\": true, \"data\": …}`, an error `{\"error\", \"message\", \"code\"}` with `details` when there is more to say. \
A path that does not exist is answered with 404, and a method that a path does not take with 405 and `Allow`, in the same form.";

fn document() -> Value {
    json!({
        "openapi": "3.1.0",
        "info": { "title": "dnc", "version": env!("CARGO_PKG_VERSION"), "summary": "A Do-Not-Contact list as a service",
            "description": ABOUT },
        "servers": [{ "url": "/", "description": "This server" }],
        "security": [{ "apiKey": [] }, { "bearer": [] }],
        "tags": [
            { "name": "Import", "description": "Puts addresses and domains on the list." },
            { "name": "Check", "description": "Says who must not be written to." },
            { "name": "List", "description": "Shows and exports the list." },
            { "name": "Delete", "description": "Takes entries off the list." },
            { "name": "Server", "description": "Needs no key." },
        ],
        "paths": {
            "/v1/dnc/import": { "post": import_call() },
            "/v1/dnc": { "post": add_call(), "get": list_call(), "delete": delete_call() },
            "/v1/dnc/check": { "get": check_one_call(), "post": check_call() },
            "/v1/dnc/export": { "get": export_call() },
            "/v1/dnc/summary": { "get": summary_call() },
            "/v1/dnc/imports": { "get": imports_call() },
            "/v1/dnc/deletions": { "get": deletions_call() },
            "/healthz": { "get": health_call() },
            "/readyz": { "get": ready_call() },
            "/openapi.json": { "get": document_call() },
        },
        "components": {
            "schemas": schemas(),
            "parameters": parameters(),
            "headers": headers(),
            "responses": problems(),
            "securitySchemes": {
                "apiKey": {
                    "type": "apiKey", "in": "header", "name": "X-Api-Key",
                    "description": "A workspace key (`sk_…`) or a platform key (`sk_user_…`).",
                },
                "bearer": { "type": "http", "scheme": "bearer",
                    "description": "The same keys. `X-Api-Key` counts if it is there as well." },
            },
        },
    })
}

/// The schemas of the types, and of the types of their fields.
fn schemas() -> Map<String, Value> {
    fn add<T: ToSchema>(schemas: &mut Vec<(String, utoipa::openapi::RefOr<utoipa::openapi::Schema>)>) {
        schemas.push((T::name().into_owned(), T::schema()));
        T::schemas(schemas);
    }
    let mut found = Vec::new();
    add::<ImportBody>(&mut found);
    add::<Imported>(&mut found);
    add::<Added>(&mut found);
    add::<CheckBody>(&mut found);
    add::<Checked>(&mut found);
    add::<Page>(&mut found);
    add::<Deleted>(&mut found);
    add::<Summary>(&mut found);
    add::<JsonImport>(&mut found);
    add::<JsonDeletion>(&mut found);
    add::<EntryType>(&mut found);
    add::<ErrorBody>(&mut found);
    let mut schemas: Map<String, Value> = found.into_iter().map(|(name, schema)| (name, json!(schema))).collect();
    schemas.extend(deletions());
    schemas["Page"]["properties"]["success"] = json!({ "const": true });
    schemas
}

/// The two kinds of deletions, made of the fields of [`DeleteBody`]. They share no field but
/// `validateOnly`, and `selectAll`, which tells them apart.
fn deletions() -> [(String, Value); 3] {
    let Value::Object(fields) = json!(DeleteBody::schema())["properties"].take() else { unreachable!("a struct has properties") };
    let (mut named, mut selected) = (fields.clone(), fields);
    named.retain(|name, _| matches!(name.as_str(), "emails" | "selectAll" | "validateOnly"));
    named["selectAll"] = json!({ "const": false });
    selected.remove("emails");
    selected["selectAll"]["const"] = json!(true);
    for (name, pattern) in [("search", SEARCH), ("reason", REASON)] {
        selected[name]["pattern"] = json!(pattern);
    }
    selected["search"]["maxLength"] = json!(254);
    let named = json!({
        "type": "object", "description": "Deletes what is named.",
        "required": ["emails"], "properties": named, "additionalProperties": false,
    });
    let selected = json!({
        "type": "object", "description": "Deletes what the filters select.",
        "required": ["selectAll"], "properties": selected, "additionalProperties": false,
        "not": { "required": ["type", "entryType"] },
    });
    let either = json!({ "oneOf": [reference("schemas", "DeleteNamed"), reference("schemas", "DeleteSelected")] });
    [("DeleteNamed".into(), named), ("DeleteSelected".into(), selected), ("DeleteRequest".into(), either)]
}

fn reference(room: &str, name: &str) -> Value {
    json!({ "$ref": format!("#/components/{room}/{name}") })
}

/// Parameters of several calls.
fn parameters() -> Value {
    json!({
        "requestId": {
            "name": "X-Request-Id", "in": "header", "schema": { "type": "string" },
            "description": "The caller's name for this request: 1 to 128 letters, digits and `-_.:/+=`. It is answered and logged. \
                            Without a usable one the server makes one.",
        },
        "workspaceId": {
            "name": "X-Workspace-Id", "in": "header", "schema": { "type": "string", "pattern": "^ws_[1-9][0-9]{0,17}$" },
            "description": "The workspace. A platform key must name one. A workspace key may name its own.",
        },
        "idempotencyKey": {
            "name": "Idempotency-Key", "in": "header", "schema": { "type": "string", "pattern": "^[ -~]{0,128}$" },
            "description": "A name for this import. A repeat with the same entries within 24 hours answers the first success again.",
        },
        "contentEncoding": {
            "name": "Content-Encoding", "in": "header",
            "schema": { "type": "string", "enum": ["identity", "gzip", "x-gzip", "zstd"] },
            "description": "How the body is compressed. A zstd window has at most 8 MiB.",
        },
        "validateOnly": {
            "name": "validateOnly", "in": "query", "schema": { "type": "boolean", "default": false, "examples": [true] },
            "description": "Stores nothing, and answers what would have happened.",
        },
        "from": {
            "name": "from", "in": "query",
            "schema": { "type": "string", "enum": Source::names().collect::<Vec<_>>() },
            "description": "What wrote the file, instead of a guess. For files only.",
        },
        "column": {
            "name": "column", "in": "query", "schema": { "type": "string" },
            "description": "The name of the column of addresses, instead of a guess. For files only.",
        },
        "preview": {
            "name": "preview", "in": "query", "schema": { "type": "integer", "minimum": 1, "maximum": 100 },
            "description": "Also answers what this many of the first rows were taken for. For files only.",
        },
        "limit": {
            "name": "limit", "in": "query",
            "schema": { "type": "integer", "minimum": 1, "maximum": 100, "default": 25, "examples": [1] },
            "description": "The most that are answered.",
        },
        "type": {
            "name": "type", "in": "query",
            "schema": { "$ref": "#/components/schemas/EntryType", "examples": ["email"] },
            "description": "Only entries of this type.",
        },
        "reason": {
            "name": "reason", "in": "query", "schema": { "type": "string", "pattern": REASON, "examples": ["bounce"] },
            "description": "Only entries with exactly this reason.",
        },
        "search": {
            "name": "search", "in": "query",
            "schema": { "type": "string", "pattern": SEARCH, "maxLength": 254, "examples": ["bounce"] },
            "description": "Only entries with this text in their address, in any case.",
        },
        "createdFrom": {
            "name": "createdFrom", "in": "query",
            "schema": { "type": "string", "format": "date-time", "examples": ["2024-06-01T10:00:00.000Z"] },
            "description": "Only entries that were stored at this time or later.",
        },
        "createdTo": {
            "name": "createdTo", "in": "query",
            "schema": { "type": "string", "format": "date-time", "examples": ["2199-12-31T23:59:59.999Z"] },
            "description": "Only entries that were stored before this time.",
        },
    })
}

/// Headers of answers.
fn headers() -> Value {
    let number = json!({ "type": "integer", "minimum": 0 });
    json!({
        "requestId": {
            "required": true, "schema": { "type": "string" },
            "description": "The name of this request in the server's log: the caller's, or a new one.",
        },
        "noSniff": { "required": true, "schema": { "const": "nosniff" }, "description": "The `Content-Type` is to be trusted." },
        "noStore": { "required": true, "schema": { "const": "no-store" },
            "description": "The answer is for this caller and for now." },
        "rateLimit": { "schema": number,
            "description": "The requests that the key may make in a second. Only if there is a limit." },
        "rateLimitRemaining": { "schema": number, "description": "How many of them are left." },
        "rateLimitReset": { "schema": number, "description": "In how many seconds they are available again." },
        "retryAfter": { "required": true, "schema": { "type": "integer", "minimum": 1 },
            "description": "Seconds to wait before the next try." },
        "authenticate": { "required": true, "schema": { "const": "Bearer" }, "description": "The call needs a key." },
        "acceptEncoding": { "required": true, "schema": { "type": "string" },
            "description": "The content encodings that a body may have." },
        "fileName": { "required": true, "schema": { "type": "string" }, "description": "The name to store the file under." },
        "eTag": { "required": true, "schema": { "type": "string" }, "description": "The version of what is answered." },
        "noCache": { "required": true, "schema": { "const": "no-cache" },
            "description": "A copy may be kept, and is used only after asking." },
    })
}

/// The headers of all answers, and `more`.
fn headers_with(more: &[(&str, &str)]) -> Value {
    let all = [("X-Request-Id", "requestId"), ("X-Content-Type-Options", "noSniff")];
    all.iter().chain(more).map(|(name, header)| ((*name).to_owned(), reference("headers", header))).collect()
}

/// The header of answers that no cache may keep.
const NO_STORE: (&str, &str) = ("Cache-Control", "noStore");

/// The headers of answers under `/v1`, and `more`.
fn private_headers(more: &[(&str, &str)]) -> Value {
    let limits = [
        NO_STORE,
        ("X-RateLimit-Limit", "rateLimit"),
        ("X-RateLimit-Remaining", "rateLimitRemaining"),
        ("X-RateLimit-Reset", "rateLimitReset"),
    ];
    headers_with(&[limits.as_slice(), more].concat())
}

/// The answers that are errors, by status.
fn problems() -> Value {
    let problem = |description: &str, headers: Value, examples: Value| {
        let mut content = json!({ "schema": reference("schemas", "Error") });
        if examples != json!({}) {
            content["examples"] = examples;
        }
        json!({ "description": description, "headers": headers, "content": { "application/json": content } })
    };
    let private = || private_headers(&[]);
    let open = || headers_with(&[]);
    let retry = ("Retry-After", "retryAfter");
    json!({
        "400": problem("The request is wrong; the message says where.", private(), json!({
            "body": { "summary": "A field has the wrong JSON type", "value": {
                "error": "Bad Request", "message": "entries[0].email: expected a string", "code": 400,
                "details": { "reason": "INVALID", "fields": [{ "field": "entries[0].email", "message": "expected a string" }] },
            } },
            "parameter": { "summary": "A parameter has an impossible value", "value": {
                "error": "Bad Request", "message": "limit: expected a number from 1 to 100", "code": 400,
                "details": { "reason": "INVALID", "fields": [{ "field": "limit", "message": "expected a number from 1 to 100" }] },
            } },
            "workspace": { "summary": "A platform key without a workspace", "value": {
                "error": "Bad Request",
                "message": "X-Workspace-Id: A platform key works in many workspaces; name one in X-Workspace-Id.", "code": 400,
                "details": { "reason": "INVALID", "fields": [
                    { "field": "X-Workspace-Id",
                        "message": "A platform key works in many workspaces; name one in X-Workspace-Id." },
                ] },
            } },
        })),
        "401": problem("There is no valid key.", headers_with(&[NO_STORE, ("WWW-Authenticate", "authenticate")]), json!({
            "missing": { "summary": "No key", "value": {
                "error": "Unauthorized",
                "message": "The call needs an API key: send it in X-Api-Key, or in Authorization as a Bearer token.",
                "code": 401, "details": { "reason": "UNAUTHENTICATED" },
            } },
            "unknown": { "summary": "A wrong key", "value": {
                "error": "Unauthorized", "message": "The API key is not valid: it is unknown, expired or revoked.",
                "code": 401, "details": { "reason": "UNAUTHENTICATED" },
            } },
        })),
        "403": problem("The key may not use that workspace, or its scope is too narrow.", headers_with(&[NO_STORE]), json!({
            "workspace": { "summary": "Another workspace", "value": {
                "error": "Forbidden", "message": "This API key may not use that workspace.", "code": 403,
                "details": { "reason": "FORBIDDEN" },
            } },
            "scope": { "summary": "A key that may only read", "value": {
                "error": "Forbidden", "message": "This call needs a key with the scope write.", "code": 403,
                "details": { "reason": "FORBIDDEN" },
            } },
        })),
        "408": problem("The body stopped coming.", private(), json!({})),
        "413": problem("The body is too large, or decompresses to too much.", private(), json!({
            "bytes": { "summary": "More than a JSON body may have", "value": {
                "error": "Payload Too Large",
                "message": "The body is larger than 8388608 bytes. Send the entries in several requests.", "code": 413,
            } },
        })),
        "414": problem("The target of the request is too long.", open(), json!({})),
        "415": problem("The body's media type or content encoding is not one of those that the call takes.",
            private_headers(&[("Accept-Encoding", "acceptEncoding")]), json!({
                "type": { "summary": "Plain text", "value": {
                    "error": "Unsupported Media Type", "code": 415,
                    "message": "Send the body as Content-Type: application/json; imports and checks also take application/x-ndjson and text/csv.",
                } },
            })),
        "422": problem("The idempotency key was used with other entries.", private(), json!({
            "used": { "summary": "The same key for another import", "value": {
                "error": "Unprocessable Entity",
                "message": "This idempotency key belongs to an import of other entries. Use another one for each import.",
                "code": 422, "details": { "reason": "CONFLICT" },
            } },
        })),
        "429": problem("Too many requests for the key.", private_headers(&[retry]), json!({
            "limit": { "summary": "Too many requests", "value": {
                "error": "Too Many Requests",
                "message": "Too many requests for this key. Wait as long as Retry-After says, then send it again.",
                "code": 429, "details": { "reason": "EXHAUSTED" },
            } },
        })),
        "431": problem("The request has too many headers, or they are too large.", open(), json!({})),
        "500": problem("Something unforeseen. Report it with the X-Request-Id of the answer.", private(), json!({})),
        "503": problem("The database is away or too slow, too much is in work, or the server is shutting down.",
            private_headers(&[retry]), json!({})),
        "notReady": problem("Not ready, or shutting down.", headers_with(&[NO_STORE, retry]), json!({})),
    })
}

/// A call under `/v1`. `names` are the parameters and `more` the errors besides those that all of
/// them have.
fn call(id: &str, tag: &str, scope: &str, (summary, about): (&str, &str), names: &[&str], more: &[&str], success: Value) -> Value {
    let parameters: Vec<_> = ["requestId", "workspaceId"].iter().chain(names).map(|name| reference("parameters", name)).collect();
    let mut responses = json!({ "200": success });
    for status in ["400", "401", "403", "414", "429", "431", "500", "503"].iter().chain(more) {
        responses[*status] = reference("responses", status);
    }
    json!({
        "operationId": id, "tags": [tag], "summary": summary,
        "description": format!("{about}\n\nNeeds a key with the scope `{scope}`."),
        "parameters": parameters, "responses": responses,
    })
}

/// A successful answer in JSON.
fn success(description: &str, schema: Value, examples: Value) -> Value {
    json!({
        "description": description, "headers": private_headers(&[]),
        "content": { "application/json": { "schema": schema, "examples": examples } },
    })
}

/// The schema of `{"success": true, "data": T}`.
fn of<T: ToSchema>() -> Value {
    let mut schema = json!(Success::<T>::schema());
    schema["properties"]["success"] = json!({ "const": true });
    if let Some(schema) = schema.as_object_mut() {
        schema.remove("description");
    }
    schema
}

/// The schema of `{"success": true, "data": [T]}`. `name` is that of the schema of `T`.
fn list_of<T: ToSchema>(name: &str) -> Value {
    let mut schema = of::<T>();
    schema["properties"]["data"] = json!({ "type": "array", "items": reference("schemas", name) });
    schema
}

/// The errors of calls with a body.
const OF_BODIES: [&str; 3] = ["408", "413", "415"];

const OF_IMPORTS: [&str; 4] = ["408", "413", "415", "422"];

/// The parameters of an import, and of the filters of a list.
const IMPORT: [&str; 6] = ["idempotencyKey", "contentEncoding", "validateOnly", "from", "column", "preview"];
const FILTERS: [&str; 5] = ["type", "reason", "search", "createdFrom", "createdTo"];

const IMPORT_ABOUT: &str = "\
As JSON, 1 to 10,000 entries, which are stored in one transaction. As `text/csv` or `application/x-ndjson`, a file of any length, \
which is stored in batches as it comes; exports of other providers are understood.

A wrong entry never stops the others. An entry that is on the list already stays as it is. Sending an import again is safe.";

/// The body of an import.
fn import_body() -> Value {
    json!({
        "required": true,
        "content": {
            "application/json": { "schema": reference("schemas", "ImportRequest"), "examples": {
                "reference": { "summary": "Two addresses and a domain", "value": { "entries": [
                    { "email": "bounce1@example.com", "type": "email", "reason": "bounce" },
                    { "email": "bounce2@example.com", "type": "email", "reason": "bounce" },
                    { "email": "badcompany.com", "type": "domain", "reason": "manual" },
                ] } },
                "rejected": { "summary": "One of the entries is no address", "value": { "entries": [
                    { "email": "bounce1@example.com" }, { "email": "not an address" },
                ] } },
            } },
            "text/csv": { "schema": { "type": "string" }, "examples": {
                "reference": { "summary": "A list with a header", "value":
                    "email,type,reason\nbounce1@example.com,email,bounce\nbounce2@example.com,email,bounce\nbadcompany.com,domain,manual\n" },
            } },
            "application/x-ndjson": { "schema": { "type": "string" }, "examples": {
                "reference": { "summary": "One object a line", "value":
                    "{\"email\":\"bounce1@example.com\",\"type\":\"email\",\"reason\":\"bounce\"}\n{\"email\":\"badcompany.com\",\"type\":\"domain\",\"reason\":\"manual\"}\n" },
            } },
        },
    })
}

/// The examples of an import's answers. `stored` is the name of the first count.
fn import_examples(stored: &str) -> Value {
    let rejected = json!([{
        "index": 1, "field": "email", "code": "INVALID_EMAIL",
        "message": "The e-mail address has no @; set type to domain if a domain is meant.",
    }]);
    json!({
        "reference": { "summary": "Stored, or there already",
            "value": { "success": true, "data": { stored: 245, "skipped": 12 } } },
        "rejected": { "summary": "One entry was rejected", "value": {
            "success": true, "data": { stored: 1, "skipped": 0, "failed": 1, "errors": rejected },
        } },
    })
}

fn import_call() -> Value {
    let answer = success("What became of the entries.", of::<Imported>(), import_examples("imported"));
    let about = format!("{IMPORT_ABOUT} The default reason is `import`.");
    let mut call = call("importEntries", "Import", "write", ("Bulk import", &about), &IMPORT, &OF_IMPORTS, answer);
    call["requestBody"] = import_body();
    call
}

fn add_call() -> Value {
    let answer = success("What became of the entries.", of::<Added>(), import_examples("added"));
    let about = format!("{IMPORT_ABOUT} The default reason is `manual`.");
    let mut call = call("addEntries", "Import", "write", ("Add entries", &about), &IMPORT, &OF_IMPORTS, answer);
    call["requestBody"] = import_body();
    call
}

/// The entry of the examples.
fn example_entry(email: &str, entry_type: &str, reason: &str) -> Value {
    let at = "2024-06-01T10:00:00.000Z";
    json!({
        "_id": "9ecb6b1f0a5d4c3e2f100b1a", "email": email, "entryType": entry_type, "workspaceId": "ws_1", "reason": reason,
        "unsubscribedAt": at, "createdAt": at, "updatedAt": at, "addedBy": "key_1",
    })
}

fn list_call() -> Value {
    let examples = json!({ "page": { "summary": "The first page of two", "value": {
        "success": true, "data": [example_entry("bounce1@example.com", "email", "bounce")],
        "pagination": { "limit": 1, "total": 2, "hasMore": true, "nextCursor": "aGVyZSBpcyBhbiBlbmNyeXB0ZWQgcG9zaXRpb24" },
    } } });
    let mut answer = success("A page of the list, in the order of the addresses' bytes.", reference("schemas", "Page"), examples);
    let mut same: Map<String, Value> =
        FILTERS.map(|name| (name.to_owned(), json!(format!("$request.query.{name}")))).into_iter().collect();
    same.insert("cursor".to_owned(), json!("$response.body#/pagination/nextCursor"));
    answer["links"] = json!({ "nextPage": {
        "operationId": "listEntries", "parameters": same, "description": "The next page, with the same filters.",
    } });
    let about = "What others write meanwhile moves nothing: each entry that stays is listed exactly once.";
    let names = [FILTERS.as_slice(), &["limit"]].concat();
    let mut call = call("listEntries", "List", "read", ("List entries", about), &names, &[], answer);
    let cursor = json!({
        "name": "cursor", "in": "query", "schema": { "type": "string" },
        "description": "The `nextCursor` of the page before, which had the same filters.",
    });
    if let Some(list) = call["parameters"].as_array_mut() {
        list.push(cursor);
    }
    call
}

fn delete_call() -> Value {
    let examples = json!({
        "named": { "summary": "What was deleted", "value": { "success": true, "data": { "deleted": 1 } } },
    });
    let answer = success("How many entries were deleted.", of::<Deleted>(), examples);
    let about = "Deletes up to 10,000 entries that are named, or everything that filters select. \
                 Unknown fields, fields that are there twice and null are rejected.";
    let more = OF_BODIES;
    let mut call = call("deleteEntries", "Delete", "write", ("Delete entries", about), &["contentEncoding"], &more, answer);
    call["requestBody"] = json!({
        "required": true,
        "content": { "application/json": { "schema": reference("schemas", "DeleteRequest"), "examples": {
            "named": { "summary": "By name", "value": { "emails": ["bounce1@example.com", "never-there@example.com"] } },
            "selected": { "summary": "What filters select, only counted",
                "value": { "selectAll": true, "type": "email", "validateOnly": true } },
        } } },
    });
    call
}

/// The answer to a check of one address.
fn example_check() -> Value {
    json!({
        "email": "someone@mail.badcompany.com", "suppressed": true, "entry": example_entry("badcompany.com", "domain", "manual"),
    })
}

fn check_one_call() -> Value {
    let examples = json!({ "suppressed": {
        "summary": "A domain entry covers the address", "value": { "success": true, "data": example_check() },
    } });
    let answer = success("Whether the address may be written to.", of::<Checked>(), examples);
    let about = "For one address. A text without an `@` is a domain. A text that is no address is suppressed, with an `error`.";
    let mut call = call("checkEntry", "Check", "check", ("Check an address", about), &[], &[], answer);
    let email = json!({
        "name": "email", "in": "query", "required": true,
        "schema": { "type": "string", "examples": ["someone@mail.badcompany.com"] },
        "description": "The address or domain.",
    });
    if let Some(list) = call["parameters"].as_array_mut() {
        list.push(email);
    }
    call
}

fn check_call() -> Value {
    let examples = json!({
        "addresses": { "summary": "A domain entry covers the first of two addresses", "value": {
            "success": true, "data": [example_check(), { "email": "free@example.org", "suppressed": false }],
        } },
    });
    let mut answer = success("One result for each address or row, in the same order.", list_of::<Checked>("CheckResult"), examples);
    answer["content"]["text/csv"] = json!({ "schema": { "type": "string" }, "examples": { "list": {
        "summary": "The same rows with four columns more",
        "value": "name,email,suppressed,reason,matched,error\r\nAnn,someone@mail.badcompany.com,true,manual,badcompany.com,\r\nBo,free@example.org,false,,,\r\n",
    } } });
    answer["content"]["application/x-ndjson"] = json!({ "schema": { "type": "string" }, "examples": { "list": {
        "summary": "The same objects with four fields more",
        "value": "{\"email\":\"free@example.org\",\"suppressed\":false,\"reason\":null,\"matched\":null,\"error\":null}\n",
    } } });
    let about = "As JSON, for 1 to 10,000 addresses. As `text/csv` or `application/x-ndjson`, for a mailing list of any length: \
                 the answer has the same rows in the same form, with `suppressed`, `reason`, `matched` and `error` added, \
                 as they come.";
    let mut call =
        call("checkEntries", "Check", "check", ("Check addresses", about), &["contentEncoding", "column"], &OF_BODIES, answer);
    call["requestBody"] = json!({
        "required": true,
        "content": {
            "application/json": { "schema": reference("schemas", "CheckRequest"), "examples": {
                "addresses": { "summary": "Two addresses",
                    "value": { "emails": ["someone@mail.badcompany.com", "free@example.org"] } },
            } },
            "text/csv": { "schema": { "type": "string" }, "examples": {
                "list": { "summary": "A mailing list",
                    "value": "name,email\nAnn,someone@mail.badcompany.com\nBo,free@example.org\n" },
            } },
            "application/x-ndjson": { "schema": { "type": "string" }, "examples": {
                "list": { "summary": "One object a line", "value": "{\"email\":\"free@example.org\"}\n" },
            } },
        },
    });
    call
}

fn export_call() -> Value {
    let answer = json!({
        "description": "The file, in the order of the addresses' bytes. If it cannot be completed, the connection is cut.",
        "headers": private_headers(&[("Content-Disposition", "fileName")]),
        "content": {
            "text/csv": { "schema": { "type": "string" }, "examples": { "export": { "summary": "A domain", "value":
                "email,type,reason,unsubscribedAt,createdAt,addedBy\r\nbadcompany.com,domain,manual,2024-06-01T10:00:00.000Z,2024-06-01T10:00:00.000Z,key_1\r\n" } } },
            "application/x-ndjson": { "schema": { "type": "string" } },
        },
    });
    let about = "The whole list, or what the filters select, as a file that can be imported again. A CSV cell that a spreadsheet would take \
                 for a formula gets an apostrophe in front.";
    let mut call = call("exportEntries", "List", "read", ("Export the list", about), &FILTERS, &[], answer);
    let format = json!({
        "name": "format", "in": "query",
        "schema": { "type": "string", "enum": ["csv", "ndjson"], "default": "csv", "examples": ["csv"] },
        "description": "The form of the file.",
    });
    if let Some(list) = call["parameters"].as_array_mut() {
        list.push(format);
    }
    call
}

fn summary_call() -> Value {
    let examples = json!({ "summary": { "summary": "Three entries", "value": { "success": true, "data": {
        "total": 3,
        "reasons": [{ "type": "email", "reason": "bounce", "count": 2 }, { "type": "domain", "reason": "manual", "count": 1 }],
    } } } });
    let answer = success("The number of entries, in all and by type and reason.", of::<Summary>(), examples);
    call("summarizeEntries", "List", "read", ("Summary", "The numbers of entries."), &[], &[], answer)
}

fn imports_call() -> Value {
    let examples = json!({ "latest": { "summary": "The latest import", "value": { "success": true, "data": [{
        "_id": "018fd3f0-7a00-7000-8000-000000000000", "addedBy": "key_1", "startedAt": "2024-06-01T10:00:00.000Z",
        "finishedAt": "2024-06-01T10:00:01.000Z", "imported": 245, "skipped": 12, "failed": 0,
    }] } } });
    let answer = success("The latest imports, latest first.", list_of::<JsonImport>("Import"), examples);
    let about = "Who put how many entries on the list, and when. Imports with `validateOnly` are not logged.";
    call("listImports", "Import", "read", ("The latest imports", about), &["limit"], &[], answer)
}

fn deletions_call() -> Value {
    let examples = json!({ "latest": { "summary": "The latest deletion", "value": { "success": true, "data": [{
        "_id": "018fd3f0-7a00-7000-8000-000000000001", "deletedBy": "key_1", "startedAt": "2024-06-01T10:00:00.000Z",
        "deleted": 1, "named": 2,
    }] } } });
    let answer = success("The latest deletions, latest first.", list_of::<JsonDeletion>("Deletion"), examples);
    let about = "Who took how many entries off the list, and when. Deletions with `validateOnly` are not logged.";
    call("listDeletions", "Delete", "read", ("The latest deletions", about), &["limit"], &[], answer)
}

/// A call that needs no key.
fn open_call(id: &str, summary: &str, mut responses: Value) -> Value {
    for status in ["414", "431"] {
        responses[status] = reference("responses", status);
    }
    json!({
        "operationId": id, "tags": ["Server"], "summary": summary, "security": [],
        "parameters": [reference("parameters", "requestId")], "responses": responses,
    })
}

/// The answer of a probe, whose `data` is `{"status": status}`.
fn probe(description: &str, status: &str) -> Value {
    let schema = json!({
        "type": "object", "required": ["success", "data"],
        "properties": {
            "success": { "const": true },
            "data": { "type": "object", "required": ["status"], "properties": { "status": { "const": status } } },
        },
    });
    json!({
        "description": description, "headers": headers_with(&[NO_STORE]),
        "content": { "application/json": { "schema": schema, "examples": {
            "probe": { "summary": description, "value": { "success": true, "data": { "status": status } } },
        } } },
    })
}

fn health_call() -> Value {
    open_call("health", "Is the process alive?", json!({ "200": probe("It is alive.", "alive") }))
}

fn ready_call() -> Value {
    let responses = json!({ "200": probe("It is ready.", "ready"), "503": reference("responses", "notReady") });
    open_call("readiness", "Does the database answer, take writes, and have the right schema?", responses)
}

fn document_call() -> Value {
    let headers = || headers_with(&[("ETag", "eTag"), ("Cache-Control", "noCache")]);
    let responses = json!({
        "200": {
            "description": "The OpenAPI document.", "headers": headers(),
            "content": { "application/json": { "schema": {
                "type": "object", "required": ["openapi", "info", "paths"], "properties": { "openapi": { "const": "3.1.0" } },
            } } },
        },
        "304": { "description": "The caller has this version.", "headers": headers() },
        "503": reference("responses", "notReady"),
    });
    let mut call = open_call("document", "This document", responses);
    if let Some(list) = call["parameters"].as_array_mut() {
        list.push(json!({
            "name": "If-None-Match", "in": "header", "schema": { "type": "string" },
            "description": "The `ETag` of the version that the caller has.",
        }));
    }
    call
}

#[cfg(test)]
mod tests {
    use super::{
        super::{files, query, requests::ENTRIES_MAX, routes},
        *,
    };

    #[test]
    fn the_document_has_the_routes_and_no_others() {
        let document = document();
        let paths = document["paths"].as_object().into_iter().flatten();
        let mut documented: Vec<String> = paths
            .flat_map(|(path, calls)| {
                calls.as_object().into_iter().flatten().map(move |(method, _)| format!("{} {path}", method.to_uppercase()))
            })
            .collect();
        let mut served: Vec<String> = routes().iter().map(|(method, path, _)| format!("{method} {path}")).collect();
        documented.sort_unstable();
        served.sort_unstable();
        assert_eq!(documented, served);
    }

    #[test]
    fn the_document_has_the_parameters_that_the_calls_take() {
        let document = document();
        let of = |path: &str, method: &str| -> Vec<String> {
            let parameters = document["paths"][path][method]["parameters"].as_array().cloned().unwrap_or_default();
            let resolved = parameters.into_iter().map(|parameter| match parameter["$ref"].as_str() {
                Some(reference) => document.pointer(&reference[1..]).cloned().unwrap_or_default(),
                None => parameter,
            });
            let queries = resolved.filter(|parameter| parameter["in"] == "query");
            let mut names: Vec<_> = queries.map(|parameter| parameter["name"].as_str().unwrap_or_default().to_owned()).collect();
            names.sort_unstable();
            names
        };
        for (path, method, known) in [
            ("/v1/dnc/import", "post", crate::gateway::requests::IMPORT_PARAMETERS.as_slice()),
            ("/v1/dnc", "post", &crate::gateway::requests::IMPORT_PARAMETERS),
            ("/v1/dnc", "get", &query::PAGE),
            ("/v1/dnc", "delete", &[]),
            ("/v1/dnc/check", "get", &["email"]),
            ("/v1/dnc/check", "post", &["column"]),
            ("/v1/dnc/export", "get", &query::EXPORT),
            ("/v1/dnc/summary", "get", &[]),
            ("/v1/dnc/imports", "get", &["limit"]),
            ("/v1/dnc/deletions", "get", &["limit"]),
        ] {
            let mut known = known.to_vec();
            known.sort_unstable();
            assert_eq!(of(path, method), known, "{method} {path}");
        }
    }

    #[test]
    fn the_document_has_the_limits_of_the_code() {
        let document = document();
        let limit = |pointer: &str| document.pointer(pointer).and_then(Value::as_u64);
        let lists = ["ImportRequest/properties/entries", "CheckRequest/properties/emails", "DeleteNamed/properties/emails"];
        for list in lists {
            assert_eq!(limit(&format!("/components/schemas/{list}/maxItems")), Some(ENTRIES_MAX as u64));
            assert_eq!(limit(&format!("/components/schemas/{list}/minItems")), Some(1));
        }
        assert_eq!(limit("/components/schemas/Pagination/properties/limit/maximum"), Some(query::LIMIT_MAX as u64));
        let page = document.pointer("/components/parameters/limit/schema");
        assert_eq!(
            page,
            Some(
                &json!({ "type": "integer", "minimum": 1, "maximum": query::LIMIT_MAX, "default": query::LIMIT, "examples": [1] })
            )
        );
        let preview = document.pointer("/components/parameters/preview/schema");
        assert_eq!(preview, Some(&json!({ "type": "integer", "minimum": 1, "maximum": files::PREVIEW_ROWS_MAX })));
    }
}
