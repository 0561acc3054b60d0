//! The API's socket. Whoever can connect may ask and change everything, so what a web page could
//! make a browser send is refused.

use std::{convert::Infallible, net::IpAddr, sync::Arc, time::Duration};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::{Body, Bytes},
    header,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc, oneshot},
    task::JoinSet,
};

use super::{
    engine::Call,
    error::{Error, Result},
    wire::{self, Format},
};

/// The largest request, in bytes: the largest that Cloud Map's limits allow is a tenth of it.
const BODY: usize = 256 << 10;
/// How long a request may take to arrive, and a connection to say nothing.
const PATIENCE: Duration = Duration::from_secs(10);
/// Connections at a time; further ones wait.
const CONNECTIONS: usize = 256;

/// Serves until it is dropped, or the engine has ended.
pub async fn serve(listener: TcpListener, calls: mpsc::Sender<Call>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let place = places.clone().acquire_owned().await.expect("nobody closes it");
        while connections.try_join_next().is_some() {}
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = calls.closed() => return,
        };
        let calls = calls.clone();
        connections.spawn(async move {
            let _place = place;
            let service = service_fn(|request| answer(request, &calls));
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(PATIENCE).max_buf_size(64 << 10);
            // A client that goes away is its own affair.
            let _ = http.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

pub(super) async fn answer<B>(
    request: Request<B>,
    calls: &mpsc::Sender<Call>,
) -> std::result::Result<Response<Full<Bytes>>, Infallible>
where
    B: Body<Data = Bytes, Error: std::error::Error + Send + Sync + 'static>,
{
    let (head, body) = request.into_parts();
    let mut format = Format::Json;
    let result = async {
        foreign(&head.headers)?;
        if head.method != Method::POST {
            return Err(Error::new("UnknownOperationException", "operations are called by POST"));
        }
        let operation;
        (format, operation) = wire::operation(head.uri.path(), &head.headers)?;
        format.check(&head.headers)?;
        let body = tokio::time::timeout(PATIENCE, Limited::new(body, BODY).collect()).await;
        let body = body.map_err(|_| Error::new("RequestTimeoutException", "the request took too long"))?;
        let body = body.map_err(|error| Error::invalid(format!("the request's body: {error}")))?;
        call(calls, operation, format.decode(&body.to_bytes())?).await
    };
    let result = result.await;
    let status = match &result {
        Ok(_) => StatusCode::OK,
        Err(error) if error.is_internal() => StatusCode::INTERNAL_SERVER_ERROR,
        Err(error) if error.kind == "AccessDeniedException" => StatusCode::FORBIDDEN,
        Err(_) => StatusCode::BAD_REQUEST,
    };
    let body = format.encode(&result.unwrap_or_else(|error| error.body()));
    let response = Response::builder().status(status).header(header::CONTENT_TYPE, format.content_type());
    let response = match format {
        Format::Json => response,
        Format::Cbor => response.header("smithy-protocol", "rpc-v2-cbor"),
    };
    Ok(response.body(body.into()).expect("a valid answer"))
}

async fn call(calls: &mpsc::Sender<Call>, operation: String, input: Value) -> Result<Value> {
    let (answer, answered) = oneshot::channel();
    let ended = || Error::internal("the registry ends");
    calls.send(Call { operation, input, answer }).await.map_err(|_| ended())?;
    answered.await.map_err(|_| ended())?
}

/// Refuses what comes from a web page: browsers name its origin, and a page that was rebound to
/// our address names its own host.
fn foreign(headers: &HeaderMap) -> Result<()> {
    let denied = |what: String| Err(Error::new("AccessDeniedException", what));
    if headers.contains_key(header::ORIGIN) {
        return denied("requests of web pages (with an Origin) are refused".into());
    }
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    // DiscoverInstances puts this before the host, unless it is told not to.
    let name = name.strip_prefix("data-").unwrap_or(name);
    let local = name == "localhost" || name.ends_with(".localhost") || name.parse::<IpAddr>().is_ok();
    if local { Ok(()) } else { denied(format!("host {host:?} is neither an address nor localhost")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_and_localhost_are_hosts() {
        let host = |host: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, host.parse().unwrap());
            foreign(&headers).is_ok()
        };
        for good in ["127.0.0.1:9465", "10.0.0.1", "[::1]:9465", "localhost:1", "data-127.0.0.1:9465"] {
            assert!(host(good), "{good}");
        }
        for bad in ["", "attacker.example:9465", "localhost.attacker.example", "127.0.0.1.attacker.example:1"]
        {
            assert!(!host(bad), "{bad}");
        }
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, "127.0.0.1".parse().unwrap());
        headers.insert(header::ORIGIN, "null".parse().unwrap());
        assert!(foreign(&headers).is_err());
    }
}
