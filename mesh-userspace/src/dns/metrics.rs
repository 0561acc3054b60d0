//! How many questions were answered, by whom, how and how fast.

use std::time::Duration;

use hickory_resolver::proto::{op::ResponseCode, rr::RecordType};
use prometheus_client::{
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::{Registry, Unit},
};

type Labels<const N: usize> = [(&'static str, &'static str); N];

/// Whatever clients ask, labels have few values.
#[derive(Clone, Debug)]
pub struct Metrics {
    queries: Family<Labels<3>, Counter>,
    duration: Family<Labels<1>, Histogram, fn() -> Histogram>,
}

/// Where an answer comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Own,
    Forwarded,
    /// The question was not taken.
    Refused,
}

impl Source {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Forwarded => "forwarded",
            Self::Refused => "refused",
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        // From what a look at a table takes to what clients wait for at most.
        const BOUNDS: [f64; 8] = [0.000_02, 0.000_1, 0.000_5, 0.002, 0.01, 0.05, 0.5, 3.0];
        Self { queries: Family::default(), duration: Family::new_with_constructor(|| Histogram::new(BOUNDS)) }
    }
}

impl Metrics {
    pub(super) fn count(&self, source: Source, kind: Option<RecordType>, code: ResponseCode, took: Duration) {
        let answer = ("answer", source.name());
        let labels = [answer, ("type", kind.map_or("none", type_name)), ("rcode", code_name(code))];
        self.queries.get_or_create(&labels).inc();
        self.duration.get_or_create(&[answer]).observe(took.as_secs_f64());
    }

    pub fn register(&self, registry: &mut Registry) {
        let help = "Names asked for, by who answered, type and response code";
        registry.register("mesh_dns_queries", help, self.queries.clone());
        let help = "How long the answer to a question took";
        registry.register_with_unit("mesh_dns_query_duration", help, Unit::Seconds, self.duration.clone());
    }
}

fn type_name(kind: RecordType) -> &'static str {
    match kind {
        RecordType::A => "A",
        RecordType::AAAA => "AAAA",
        RecordType::SRV => "SRV",
        RecordType::PTR => "PTR",
        _ => "other",
    }
}

pub(super) fn code_name(code: ResponseCode) -> &'static str {
    match code {
        ResponseCode::NoError => "NOERROR",
        ResponseCode::NXDomain => "NXDOMAIN",
        ResponseCode::ServFail => "SERVFAIL",
        ResponseCode::Refused => "REFUSED",
        ResponseCode::FormErr => "FORMERR",
        ResponseCode::NotImp => "NOTIMP",
        _ => "other",
    }
}
