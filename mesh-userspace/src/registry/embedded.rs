//! The embedded registry: Cloud Map's own API in front of one file, for one machine and for tests.
//!
//! ```text
//! http ─▶ engine (one thread) ─▶ state, store ─▶ answer
//!                                   └─▶ translate ─▶ snapshot
//! ```

use std::{
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant, UNIX_EPOCH},
};

use tokio::{net::TcpListener, sync::mpsc};

use super::{Rules, Snapshot, Start};

pub mod calls;
pub mod engine;
pub mod error;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
pub mod http;
pub mod leases;
pub mod records;
pub mod state;
pub mod store;
pub mod translate;
pub mod wire;

use engine::Engine;

/// The file below the state folder.
const FILE: &str = "embedded.redb";

/// Between two attempts to start.
const AGAIN: Duration = Duration::from_secs(1);

/// Serves at `listen`, and publishes what it holds, for as long as it runs.
pub async fn run(listen: SocketAddr, start: Start) {
    let path = start.state_dir.join(FILE);
    loop {
        let error = match TcpListener::bind(listen).await {
            Err(error) => format!("embedded registry: cannot listen on {listen}: {error}"),
            Ok(listener) => {
                let (file, rules) = (path.clone(), start.rules.clone());
                let opened = tokio::task::spawn_blocking(move || open(&file, &rules)).await;
                match opened.expect("opening does not panic") {
                    Err(error) => error,
                    Ok(engine) => {
                        serve(listener, engine, start.clone()).await;
                        "embedded registry: it has ended by itself".into()
                    }
                }
            }
        };
        start.publisher.publish(None, Some(error));
        tokio::time::sleep(AGAIN).await;
    }
}

/// Opens the file; an earlier run of this registry may still be about to close it.
fn open(path: &Path, rules: &Rules) -> Result<Engine, String> {
    let start = Instant::now();
    loop {
        match Engine::open(path, rules.clone()) {
            Ok(engine) => return Ok(engine),
            Err(_) if start.elapsed() < AGAIN => std::thread::sleep(Duration::from_millis(20)),
            Err(error) => return Err(format!("embedded registry: {}: {error}", path.display())),
        }
    }
}

async fn serve(listener: TcpListener, engine: Engine, start: Start) {
    let (calls, receiver) = mpsc::channel(1024);
    let (tell, mut news) = mpsc::unbounded_channel();
    let Start { publisher, kept, .. } = start;
    // A file that is new, or empty, where there were services: lost rather than emptied.
    let mut lost = kept.filter(|kept| engine.is_empty() && kept.all().next().is_some());
    std::thread::spawn(move || {
        engine.run(receiver, |engine| {
            lost.take_if(|_| !engine.is_empty());
            let told = match &lost {
                None => (engine.snapshot(), None),
                Some(kept) => {
                    let kept = super::services(kept.all().cloned());
                    let why = "embedded registry: it holds nothing; what it held is kept until there is a namespace";
                    (Snapshot { kept, ..Snapshot::default() }, Some(why.into()))
                }
            };
            // Published by the task: the thread may outlive it.
            let _ = tell.send(told);
        });
    });
    let publish = async {
        while let Some((snapshot, error)) = news.recv().await {
            publisher.publish(Some(snapshot.into()), error);
        }
    };
    tokio::select! {
        () = http::serve(listener, calls) => {}
        () = publish => {}
    }
}

/// Now, as Cloud Map says it: seconds since 1970.
fn seconds() -> f64 {
    let since = super::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // Whole milliseconds, as AWS has them: more digits would not all come back from disk.
    since.as_millis() as f64 / 1000.0
}
