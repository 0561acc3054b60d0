//! The commands' end of the API.

use std::{path::Path, time::Duration};

use anyhow::{Context, bail};
use http_body_util::{BodyExt, Empty};
use hyper::{Request, body::Bytes, client::conn::http1::handshake};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

/// Longer than any answer takes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Asks the daemon behind `socket` for the object at `path`.
pub async fn get<T: DeserializeOwned>(socket: &Path, path: &str) -> anyhow::Result<T> {
    let answer = tokio::time::timeout(PATIENCE, ask(socket, path)).await;
    answer.with_context(|| format!("the daemon at {} does not answer", socket.display()))?
}

async fn ask<T: DeserializeOwned>(socket: &Path, path: &str) -> anyhow::Result<T> {
    let stream = UnixStream::connect(socket).await;
    let stream =
        stream.with_context(|| format!("cannot reach the daemon at {}: is it running?", socket.display()))?;
    let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::get(path).header("host", "mesh").body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    if !status.is_success() {
        bail!("{}", String::from_utf8_lossy(&body));
    }
    serde_json::from_slice(&body).context("the daemon's answer does not fit this version of the command")
}
