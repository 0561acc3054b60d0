//! The API: HTTP and JSON on a unix socket, the same objects that the commands print.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    os::unix::{
        fs::{FileTypeExt, PermissionsExt},
        net::UnixStream as StdUnixStream,
    },
    path::Path,
    sync::Arc,
};

use anyhow::{Context, bail};
use axum::{
    Json, Router,
    extract::{Query, State},
    http::StatusCode,
    routing::get,
};
use serde::Deserialize;
use tokio::net::UnixListener;

use crate::{daemon::View, dns};

pub mod client;
pub mod objects;

use objects::{Backend, Explanation, Registry, Service, Status};

/// Opens the socket; one that a dead daemon left behind is replaced.
pub fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    let what = || format!("cannot listen on {}", path.display());
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(what)?;
    }
    if let Ok(meta) = fs::symlink_metadata(path) {
        if !meta.file_type().is_socket() {
            bail!("api.socket {} exists and is no socket", path.display());
        }
        if StdUnixStream::connect(path).is_ok() {
            bail!("{} is in use by another mesh daemon; set another api.socket", path.display());
        }
        fs::remove_file(path).with_context(what)?;
    }
    let listener = UnixListener::bind(path).with_context(what)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660)).with_context(what)?;
    Ok(listener)
}

pub async fn serve(listener: UnixListener, view: Arc<View>) -> io::Result<()> {
    let router = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/services", get(services))
        .route("/v1/backends", get(backends))
        .route("/v1/registries", get(registries))
        .route("/v1/explain", get(explain))
        .route("/v1/dns", get(names))
        .with_state(view);
    axum::serve(listener, router).await
}

async fn status(State(view): State<Arc<View>>) -> Json<Status> {
    Json(Status::of(&view))
}

async fn services(State(view): State<Arc<View>>) -> Json<Vec<Service>> {
    Json(Service::all(&view))
}

async fn backends(State(view): State<Arc<View>>) -> Json<Vec<Backend>> {
    Json(Backend::all(&view))
}

async fn registries(State(view): State<Arc<View>>) -> Json<Vec<Registry>> {
    Json(Registry::all(&view))
}

#[derive(Deserialize)]
struct Target {
    target: String,
}

async fn explain(
    State(view): State<Arc<View>>,
    Query(Target { target }): Query<Target>,
) -> Result<Json<Vec<Explanation>>, (StatusCode, String)> {
    let dialled = Dialled::parse(&target).ok_or_else(|| {
        let message = format!("{target:?} is neither ADDRESS, ADDRESS:PORT, NAME nor NAME:PORT");
        (StatusCode::BAD_REQUEST, message)
    })?;
    Explanation::of(&view, &dialled).map(Json).map_err(|message| (StatusCode::NOT_FOUND, message))
}

#[derive(Deserialize)]
struct Question {
    name: String,
    r#type: String,
}

async fn names(
    State(view): State<Arc<View>>,
    Query(Question { name, r#type }): Query<Question>,
) -> Result<Json<dns::query::Answer>, (StatusCode, String)> {
    view.dns.query(&name, &r#type).await.map(Json).map_err(|message| (StatusCode::BAD_REQUEST, message))
}

/// What `explain` is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dialled {
    Address { address: IpAddr, port: Option<u16> },
    Name { name: String, port: Option<u16> },
}

impl Dialled {
    fn parse(target: &str) -> Option<Self> {
        let address = |address: IpAddr, port| Self::Address { address: address.to_canonical(), port };
        if let Ok(socket) = target.parse::<SocketAddr>() {
            return Some(address(socket.ip(), Some(socket.port())));
        }
        if let Ok(ip) = target.parse() {
            return Some(address(ip, None));
        }
        let (name, port) = match target.rsplit_once(':') {
            Some((name, port)) => (name, Some(port.parse().ok()?)),
            None => (target, None),
        };
        crate::registry::rules::dns_name("name", name).ok()?;
        Some(Self::Name { name: name.into(), port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_an_address_or_a_name() {
        let address =
            |address: &str, port| Some(Dialled::Address { address: address.parse().unwrap(), port });
        let name = |name: &str, port| Some(Dialled::Name { name: name.into(), port });
        assert_eq!(Dialled::parse("127.128.0.1:80"), address("127.128.0.1", Some(80)));
        assert_eq!(Dialled::parse("[::ffff:127.128.0.1]:80"), address("127.128.0.1", Some(80)));
        assert_eq!(Dialled::parse("fd00::1"), address("fd00::1", None));
        assert_eq!(Dialled::parse("backend:80"), name("backend", Some(80)));
        assert_eq!(Dialled::parse("backend.service.local"), name("backend.service.local", None));
        for nonsense in ["", "a b", "backend:", "backend:70000", "http://backend"] {
            assert_eq!(Dialled::parse(nonsense), None, "{nonsense}");
        }
    }
}
