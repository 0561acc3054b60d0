//! Asking as a task would, and saying why the answer is what it is.

use hickory_resolver::proto::{
    op::Query,
    rr::{Name, RecordType},
};
use serde::{Deserialize, Serialize};

use super::{
    Core,
    metrics::{Source, code_name},
    table::View,
};

/// What a name is answered with.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answer {
    pub name: String,
    pub r#type: String,
    pub rcode: String,
    /// `own` or `forwarded`.
    pub answer: String,
    pub reason: String,
    pub records: Vec<Record>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    pub name: String,
    pub r#type: String,
    pub ttl: u32,
    pub data: String,
}

impl Core {
    /// The answer to a name, which is taken as it is: no search domain is appended.
    pub async fn query(&self, name: &str, kind: &str) -> Result<Answer, String> {
        let mut full =
            Name::from_ascii(name).map_err(|error| format!("{name:?} is not a DNS name: {error}"))?;
        full.set_fqdn(true);
        let kind: RecordType =
            kind.to_uppercase().parse().map_err(|_| format!("{kind:?} is not a record type"))?;
        let table = self.table.load_full();
        let (source, reason, own) = match table.answer(&full, kind, View::Node) {
            Some(own) => (Source::Own, table.explain(&full).unwrap_or_default(), own),
            None => {
                let upstream = self.forwarder.load_full();
                let own = upstream.ask(Query::query(full.clone(), kind)).await;
                (Source::Forwarded, upstream.to_string(), own)
            }
        };
        let records = own.answers.iter().map(|record| Record {
            name: record.name.to_string(),
            r#type: record.record_type().to_string(),
            ttl: record.ttl,
            data: record.data.to_string(),
        });
        Ok(Answer {
            name: full.to_string(),
            r#type: kind.to_string(),
            rcode: code_name(own.code).into(),
            answer: source.name().into(),
            reason,
            records: records.collect(),
        })
    }
}
