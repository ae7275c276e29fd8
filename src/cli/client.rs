//! How the commands for people call the service: where it is, who asks, and what is tried again.

use std::{path::PathBuf, time::Duration};

use anyhow::bail;
use clap::{Args, ValueEnum};
use tonic::{Code, Request, Response, Status, metadata::AsciiMetadataValue, transport::Channel};
use tonic_types::StatusExt;

use super::{
    link,
    serve::{ClientCertificate, dial},
};
use crate::{
    domain::{Kind, WorkspaceId},
    proto::dnc_service_client::DncServiceClient,
};

/// How often a call is made, and how long the server may ask to wait between two tries.
const TRIES_MAX: u32 = 5;
const RETRY_WAIT_MAX: Duration = Duration::from_secs(60);

/// Where the service is, and who asks.
#[derive(Args, Clone, Debug)]
pub(super) struct Server {
    /// The gRPC server, as http://HOST:PORT or https://HOST:PORT
    #[arg(long, env = "DNC_SERVER", default_value = "http://127.0.0.1:50051", value_name = "URL")]
    server: String,
    /// A certificate authority to trust for the server besides the system's, PEM
    #[arg(long, env = "DNC_SERVER_CA", value_name = "FILE")]
    server_ca: Option<PathBuf>,
    #[command(flatten)]
    certificate: ClientCertificate,
    /// The key to call with
    #[arg(long, env = "DNC_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: String,
    /// The workspace to work in; a platform key needs one
    #[arg(long, env = "DNC_WORKSPACE_ID", value_name = "ws_…")]
    workspace: Option<WorkspaceId>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum TypeName {
    Email,
    Domain,
}

impl TypeName {
    /// What it is called inside.
    pub(super) fn kind(self) -> Kind {
        match self {
            Self::Email => Kind::Email,
            Self::Domain => Kind::Domain,
        }
    }
}

impl Server {
    pub(super) fn client(&self) -> anyhow::Result<DncServiceClient<Channel>> {
        let channel = dial("--server", &self.server, self.server_ca.as_deref(), &self.certificate)?;
        Ok(DncServiceClient::new(channel).max_decoding_message_size(usize::MAX))
    }

    pub(super) fn request<T>(&self, message: T) -> anyhow::Result<Request<T>> {
        let mut request = Request::new(message);
        let Ok(key) = AsciiMetadataValue::try_from(self.api_key.trim()) else { bail!("--api-key has characters that no key has") };
        request.metadata_mut().insert("x-api-key", key);
        if let Some(workspace) = self.workspace {
            request.metadata_mut().insert("x-workspace-id", AsciiMetadataValue::try_from(workspace.to_string())?);
        }
        Ok(request)
    }

    /// Makes a call, and makes it again while the server says that a later try may succeed. For
    /// calls that may be repeated. Waits as long as the server asks for, but no longer than
    /// [`RETRY_WAIT_MAX`].
    ///
    /// # Errors
    /// What the last answer says, with what to do about it.
    pub(super) async fn call<T: Clone, R>(
        &self,
        message: T,
        call: impl AsyncFn(DncServiceClient<Channel>, Request<T>) -> Result<Response<R>, Status>,
    ) -> anyhow::Result<R> {
        let client = self.client()?;
        let mut tries = 1;
        loop {
            let status = match call(client.clone(), self.request(message.clone())?).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) => status,
            };
            match retry_wait(&status, tries) {
                Some(wait) => tokio::time::sleep(wait).await,
                None => return Err(self.told(&status)),
            }
            tries += 1;
        }
    }

    /// What a status says, without the numbers around it; of a call that the server did not answer,
    /// the cause.
    pub(super) fn told(&self, status: &Status) -> anyhow::Error {
        anyhow::Error::msg(link::why("--server", &self.server, status).unwrap_or_else(|| status.message().to_owned()))
    }
}

/// How long to wait before a call is made again that ended with this status after so many tries.
/// The wait is reported on standard error. `None` when the server does not say that a later try may
/// succeed, or asks for too much.
pub(super) fn retry_wait(status: &Status, tries: u32) -> Option<Duration> {
    let may_pass = matches!(status.code(), Code::Unavailable | Code::ResourceExhausted);
    let wait = status.get_details_retry_info().and_then(|info| info.retry_delay)?;
    let is_tried = may_pass && wait <= RETRY_WAIT_MAX && tries < TRIES_MAX;
    is_tried.then(|| {
        eprintln!("dnc: {} Trying again in {} s.", status.message(), wait.as_secs_f64().ceil());
        wait
    })
}
