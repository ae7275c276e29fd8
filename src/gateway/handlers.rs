//! One handler for each HTTP call: makes the messages of a gRPC call from the request, and the
//! response from its answer.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Json,
    body::Body,
    extract::{RawQuery, State},
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use tokio::time::timeout;
use tonic::metadata::MetadataMap;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use super::{
    Gateway, answers,
    call::{Answer, Resumable, pass_back},
    error::Problem,
    files::{self, FileSource, Seen},
    query::{self, Query},
    requests,
    whole::Held,
};
use crate::{
    files::Format,
    proto::{ExportEntriesRequest, ImportEntriesResponse, SummarizeEntriesRequest},
};

/// How long the service may take to say whether it is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) async fn readyz(State(gateway): State<Arc<Gateway>>) -> Result<Response, Problem> {
    let request = HealthCheckRequest { service: String::new() };
    let mut health = HealthClient::new(gateway.upstream.clone());
    let answer = timeout(READY_TIMEOUT, health.check(request)).await.map_err(|_| Problem::not_ready())??.into_inner();
    if answer.status() == ServingStatus::Serving {
        Ok(ok(serde_json::json!({ "status": "ready" })))
    } else {
        Err(Problem::not_ready())
    }
}

pub(super) async fn import_entries(
    State(gateway): State<Arc<Gateway>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let (metadata, answer, seen) = gateway.import(query, &headers, body, "").await?;
    Ok(pass_back(&metadata, ok(answers::import_answer(answer, seen))))
}

pub(super) async fn add_entries(
    State(gateway): State<Arc<Gateway>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let (metadata, answer, seen) = gateway.import(query, &headers, body, "manual").await?;
    Ok(pass_back(&metadata, ok(answers::add_answer(answer, seen))))
}

pub(super) async fn list_entries(
    State(gateway): State<Arc<Gateway>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let limit = Query::parse(query.as_deref(), &query::PAGE).and_then(|query| query.limit());
    let request = once(async move { requests::list_request(&Query::parse(query.as_deref(), &query::PAGE)?) });
    let (metadata, answer) = gateway.call("/dnc.v1.DncService/ListEntries", &headers, request).await?;
    Ok(pass_back(&metadata, Json(answers::list_answer(answer, limit?)).into_response()))
}

pub(super) async fn delete_entries(
    State(gateway): State<Arc<Gateway>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let held = Held::default();
    let decoding = gateway.bodies.decode(&headers, body, &held, requests::delete_request);
    let request = once(async move {
        Query::parse(query.as_deref(), &[])?;
        decoding.await
    });
    let (metadata, answer) = gateway.call("/dnc.v1.DncService/DeleteEntries", &headers, request).await?;
    Ok(pass_back(&metadata, ok(answers::delete_answer(answer))))
}

pub(super) async fn check_entries(
    State(gateway): State<Arc<Gateway>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    if let Ok(MediaType::File(format)) = MediaType::of(&headers) {
        return gateway.check_file(query, &headers, body, format).await;
    }
    let held = Held::default();
    let decoding = gateway.bodies.decode(&headers, body, &held, requests::check_request);
    let request = once(async move {
        Query::parse(query.as_deref(), &[])?;
        decoding.await
    });
    let (metadata, answer) = gateway.call("/dnc.v1.DncService/CheckEntries", &headers, request).await?;
    Ok(pass_back(&metadata, ok(answers::check_answer(answer))))
}

pub(super) async fn check_entry(
    State(gateway): State<Arc<Gateway>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let request = once(async move { requests::check_one_request(query.as_deref()) });
    let (metadata, answer) = gateway.call("/dnc.v1.DncService/CheckEntries", &headers, request).await?;
    let result = answers::check_answer(answer).into_iter().next().ok_or_else(Problem::internal)?;
    Ok(pass_back(&metadata, ok(result)))
}

pub(super) async fn export_entries(
    State(gateway): State<Arc<Gateway>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let parsed =
        Query::parse(query.as_deref(), &query::EXPORT).and_then(|query| Ok((files::format_of_query(&query)?, query.filter()?)));
    let (format, filter) = match parsed {
        Ok(parsed) => parsed,
        Err(problem) => {
            // A caller that is not admitted gets that error first. So the service is called, with a
            // broken message stream.
            let broken = once(async move { Err::<ExportEntriesRequest, _>(problem) });
            gateway.call::<_, ()>("/dnc.v1.DncService/ListEntries", &headers, broken).await?;
            return Err(Problem::internal());
        }
    };
    let request = once(async move { Ok(ExportEntriesRequest { filter: Some(filter) }) });
    let (metadata, entries, _) = gateway.call_for_stream("/dnc.v1.DncService/ExportEntries", &headers, request).await?;
    Ok(pass_back(&metadata, files::export(format, entries)))
}

pub(super) async fn summarize_entries(
    State(gateway): State<Arc<Gateway>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let request = once(async move {
        Query::parse(query.as_deref(), &[])?;
        Ok(SummarizeEntriesRequest {})
    });
    let (metadata, answer) = gateway.call("/dnc.v1.DncService/SummarizeEntries", &headers, request).await?;
    Ok(pass_back(&metadata, ok(answers::summary_answer(answer))))
}

impl Gateway {
    async fn import(
        &self,
        query: Option<String>,
        headers: &HeaderMap,
        body: Body,
        default_reason: &'static str,
    ) -> Result<(MetadataMap, ImportEntriesResponse, Seen), Problem> {
        let idempotency_key = headers.get("idempotency-key").cloned();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let held = Held::default();
        let (received, bodies, noted, holding) = (headers.clone(), self.bodies.clone(), seen.clone(), held.clone());
        let messages = once(async move {
            let query = Query::parse(query.as_deref(), &requests::IMPORT_PARAMETERS)?;
            let options = requests::import_options(&query, idempotency_key, default_reason)?;
            let source = FileSource::of_query(&query)?;
            Ok(match MediaType::of(&received)? {
                MediaType::File(format) => {
                    let body = bodies.file(&received, body, &holding).await?;
                    files::import_messages(format, body, source, options, noted).boxed()
                }
                MediaType::Json => {
                    source.require_none()?;
                    let entries = bodies.decode(&received, body, &holding, requests::import_entries).await?;
                    stream::iter(requests::import_requests(entries, options)).map(Ok).boxed()
                }
            })
        });
        let messages = Resumable::new(messages.try_flatten());
        let (metadata, answer): Answer<ImportEntriesResponse> =
            self.call("/dnc.v1.DncService/ImportEntries", headers, messages.clone()).await?;
        // A repeated import is answered before its body is read. Reading on counts the rows
        // again, and spares the caller a connection that closes while it still writes.
        if let Some(rest) = messages.take_over() {
            let _ = rest.try_for_each(|_| std::future::ready(Ok(()))).await;
        }
        let seen = std::mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner));
        Ok((metadata, answer, seen))
    }

    /// Checks a mailing list, and answers row by row as the file comes.
    async fn check_file(
        &self,
        query: Option<String>,
        headers: &HeaderMap,
        body: Body,
        format: Format,
    ) -> Result<Response, Problem> {
        let held = Held::default();
        let (received, bodies, holding) = (headers.clone(), self.bodies.clone(), held.clone());
        let parts = once(async move {
            let source = FileSource::of_query(&Query::parse(query.as_deref(), &["column"])?)?;
            Ok(files::check_parts(format, source, bodies.file(&received, body, &holding).await?))
        });
        let (requests, waiting) = files::check_requests(parts.try_flatten());
        let (metadata, answers, fault) = self.call_for_stream("/dnc.v1.DncService/ScrubEntries", headers, requests).await?;
        Ok(pass_back(&metadata, files::checked(format, answers, waiting, fault, held).await?))
    }
}

pub(super) fn once<T>(make: impl Future<Output = Result<T, Problem>> + Send) -> impl Stream<Item = Result<T, Problem>> + Send {
    stream::once(make)
}

pub(super) fn ok(data: impl serde::Serialize) -> Response {
    Json(answers::Success { success: true, data }).into_response()
}

pub(super) enum MediaType {
    Json,
    File(Format),
}

impl MediaType {
    pub(super) fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        let named = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let essence = named.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        match essence.as_str() {
            "application/json" => Ok(Self::Json),
            "application/x-ndjson" => Ok(Self::File(Format::Ndjson)),
            "text/csv" => Ok(Self::File(Format::Csv)),
            _ => Err(Problem::media_type()),
        }
    }
}
