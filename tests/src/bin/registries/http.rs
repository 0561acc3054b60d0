//! HTTP on both sides: writers, and what an imitation answers with.

use std::net::TcpListener;

use axum::{Router, serve::ListenerExt};
use tokio::runtime::{Builder, Runtime};

/// Calls one server.
pub(crate) struct Caller {
    pub(crate) runtime: Runtime,
    pub(crate) http: reqwest::Client,
}

impl Caller {
    pub(crate) fn new() -> Self {
        // A thread of its own sees when the server closes a connection.
        let runtime = runtime();
        let http = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().expect("a client");
        Self { runtime, http }
    }
}

/// An imitation of a server, on a free port of 127.0.0.1.
pub(crate) struct Imitation {
    pub(crate) address: String,
    /// It is served as long as this exists.
    _runtime: Runtime,
}

impl Imitation {
    pub(crate) fn serve(router: Router) -> Self {
        let runtime = runtime();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        // All connections of a start come at once.
        rustix::net::listen(&listener, 4096).expect("it can listen");
        listener.set_nonblocking(true).expect("a socket");
        let address = listener.local_addr().expect("it is bound").to_string();
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("it does not block");
            // As servers in Go do.
            let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
            axum::serve(listener, router).await
        });
        Self { address, _runtime: runtime }
    }
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}
