//! Metrics and health over HTTP, for whoever watches the node.

use std::{fmt, net::SocketAddr, sync::Arc, sync::atomic::Ordering, time::UNIX_EPOCH};

use anyhow::Context;
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text::encode},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};
use tokio::net::TcpListener;

use crate::{api::objects::Counts, daemon::View, registry::Sync};

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(address).await;
    listener.with_context(|| format!("cannot listen on web.listen {address}"))
}

pub async fn serve(listener: TcpListener, view: Arc<View>) -> std::io::Result<()> {
    let router = Router::new()
        .route("/", get(index))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(view);
    axum::serve(listener, router).await
}

async fn index() -> String {
    format!("mesh {}\n/metrics /healthz /readyz\n", env!("CARGO_PKG_VERSION"))
}

async fn readyz(State(view): State<Arc<View>>) -> (StatusCode, &'static str) {
    match view.ready() {
        true => (StatusCode::OK, "ready\n"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not ready; `mesh status` says why\n"),
    }
}

async fn metrics(State(view): State<Arc<View>>) -> impl IntoResponse {
    let mut registry = Registry::default();
    view.dns.metrics.register(&mut registry);
    registry.register_collector(Box::new(Scrape(view)));
    let mut text = String::new();
    match encode(&mut text, &registry) {
        Ok(()) => (StatusCode::OK, [(header::CONTENT_TYPE, OPEN_METRICS)], text),
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, "text/plain")], error.to_string())
        }
    }
}

/// Reads everything at the moment of the scrape.
struct Scrape(Arc<View>);

impl fmt::Debug for Scrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scrape")
    }
}

type Labels<'a> = &'a [(&'a str, &'a str)];

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let view = &self.0;
        if let Ok(outcomes) = view.stats.outcomes() {
            let rows =
                outcomes.iter().map(|(outcome, count)| ([("outcome", *outcome)], ConstCounter::new(*count)));
            let help = "Connects to a VIP by what became of them";
            family(&mut encoder, "mesh_connect_outcomes", help, None, rows)?;
        }
        let counts = Counts::of_all(view);
        let states = [
            ("active", counts.active),
            ("draining", counts.draining),
            ("unhealthy", counts.unhealthy),
            ("ejected", counts.ejected),
        ];
        let rows = states.iter().map(|(state, count)| ([("state", *state)], gauge(*count)));
        family(&mut encoder, "mesh_backends", "Backends by state", None, rows)?;

        let maps = view.maps();
        let rows = maps.iter().map(|map| ([("map", map.name.as_str())], gauge(map.used)));
        family(&mut encoder, "mesh_map_entries", "Entries in use in a map", None, rows)?;
        let rows = maps.iter().map(|map| ([("map", map.name.as_str())], gauge(map.max)));
        family(&mut encoder, "mesh_map_capacity", "Entries that a map can hold", None, rows)?;

        let registries = view.registries.borrow().clone();
        let up = registries
            .iter()
            .map(|r| ([("type", r.kind), ("source", &*r.source)], gauge(r.sync == Sync::Synced)));
        family(&mut encoder, "mesh_registry_up", "Whether the last read of a registry worked", None, up)?;
        let synced = registries.iter().filter_map(|r| {
            let at = r.last_sync?.duration_since(UNIX_EPOCH).ok()?.as_secs_f64();
            Some(([("type", r.kind), ("source", &*r.source)], seconds(at)))
        });
        let help = "When a registry was last read successfully, in seconds since 1970";
        family(&mut encoder, "mesh_registry_last_sync_timestamp", help, Some(&Unit::Seconds), synced)?;

        let worked = view.reload_worked.load(Ordering::Relaxed);
        let help = "Whether the last reload worked";
        single(&mut encoder, "mesh_config_last_reload_successful", help, None, &gauge(worked))?;
        let took = seconds(view.report.borrow().seconds);
        let help = "How long the last reconciliation took";
        single(&mut encoder, "mesh_reconcile_duration", help, Some(&Unit::Seconds), &took)
    }
}

fn gauge(value: impl TryInto<i64>) -> ConstGauge<i64> {
    ConstGauge::new(value.try_into().unwrap_or(i64::MAX))
}

fn seconds(value: f64) -> ConstGauge<f64> {
    ConstGauge::new(value)
}

/// Writes one metric family with a row per label set.
fn family<'a, const N: usize, M: EncodeMetric>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    rows: impl Iterator<Item = ([(&'a str, &'a str); N], M)>,
) -> fmt::Result {
    let mut rows = rows.peekable();
    let Some((_, first)) = rows.peek() else { return Ok(()) };
    let mut metric = encoder.encode_descriptor(name, help, unit, first.metric_type())?;
    for (labels, value) in rows {
        let labels: Labels = &labels;
        value.encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}

/// Writes a metric without labels.
fn single(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    value: &impl EncodeMetric,
) -> fmt::Result {
    value.encode(encoder.encode_descriptor(name, help, unit, value.metric_type())?)
}
