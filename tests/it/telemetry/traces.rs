//! Traces over OTLP, seen by a collector.

use std::{
    collections::HashMap,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    trace::v1::Span,
};
use serde_json::json;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

use crate::harness::{TestServer, http_client, process::Process, until};

/// Keeps what it gets.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(&self, request: Request<ExportTraceServiceRequest>) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.lock().unwrap().push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    async fn start(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = Server::builder().add_service(TraceServiceServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        url
    }

    fn spans_of(&self, trace: u128) -> Vec<Span> {
        let requests = self.0.lock().unwrap();
        let spans = requests.iter().flat_map(|request| &request.resource_spans).flat_map(|of| &of.scope_spans);
        spans.flat_map(|scope| scope.spans.clone()).filter(|span| span.trace_id == trace.to_be_bytes()).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http_import_is_one_trace_down_to_the_statement() {
    let collector = Collector::default();
    let tenants = TestServer::start().await;
    let mut command = Command::new(env!("CARGO_BIN_EXE_dnc"));
    command.args(["serve", "--http-addr", "127.0.0.1:0", "--grpc-addr", "127.0.0.1:0", "--log-format", "json"]);
    command.env("DATABASE_URL", &tenants.database_url).stderr(Stdio::piped());
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.start().await).env("OTEL_BSP_SCHEDULE_DELAY", "50");
    let served = Process::serving(&mut command);
    let mut gateway = Command::new(env!("CARGO_BIN_EXE_dnc"));
    // A gateway in between that exports nothing, and passes on what it got.
    gateway.args(["gateway", "--http-addr", "127.0.0.1:0", "--log-format", "json", "--upstream", &served.grpc_url]);
    let gateway = Process::serving(gateway.stderr(Stdio::piped()));

    for (trace, url, has_http) in [(0xabcd_u128, &served.http_url, true), (0xef01, &gateway.http_url, false)] {
        let import = http_client().post(format!("{url}/v1/dnc/import")).header("x-api-key", &tenants.key);
        let import = import
            .header("traceparent", format!("00-{trace:032x}-00000000000000aa-01"))
            .header("tracestate", "vendor=private@secret.example")
            .json(&json!({"entries": [{"email": format!("private{trace}@secret.example")}, {"email": "secret nonsense"}]}));
        assert_eq!(import.send().await.unwrap().status(), 200);
        let is_complete = |spans: &[Span]| {
            spans.iter().any(|span| span.name == "rpc") && spans.iter().any(|span| span.name == "http") == has_http
        };
        until("the spans arrive", async || is_complete(&collector.spans_of(trace))).await;

        let spans = collector.spans_of(trace);
        let by_id: HashMap<_, _> = spans.iter().map(|span| (span.span_id.clone(), span)).collect();
        let ancestors = |span: &Span| {
            let mut names = Vec::new();
            let mut parent = span.parent_span_id.clone();
            while let Some(found) = by_id.get(&parent) {
                names.push(found.name.clone());
                parent = found.parent_span_id.clone();
            }
            assert_eq!(parent, 0xaa_u64.to_be_bytes(), "the trace begins with the caller's span");
            names
        };
        let above: Vec<&str> = if has_http { vec!["rpc", "http"] } else { vec!["rpc"] };
        let statements: Vec<_> = spans.iter().filter(|span| span.name == "statement").collect();
        assert!(statements.iter().any(|span| format!("{:?}", span.attributes).contains("Write")));
        for statement in statements {
            assert_eq!(ancestors(statement), above);
        }
    }
    let all = format!("{:?}", collector.0.lock().unwrap());
    for private in ["secret", "private", "@", &tenants.key] {
        assert!(!all.contains(private), "{private}");
    }
}
