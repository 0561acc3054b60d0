//! From the bytes of a question to the bytes of its answer.

use std::{net::IpAddr, time::Instant};

use hickory_resolver::proto::{
    op::{Edns, Header, Message, MessageType, Metadata, OpCode, Query, ResponseCode},
    rr::{DNSClass, RecordType},
    serialize::binary::{BinDecodable, BinDecoder, BinEncodable, BinEncoder},
};
use tokio::sync::OwnedSemaphorePermit;

use super::{
    Core,
    metrics::Source,
    table::{Own, View},
};

/// The largest answer over UDP: what no usual path has to fragment (DNS flag day 2020).
pub(super) const MAX_UDP: u16 = 1232;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    Udp,
    Tcp,
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Client {
    listener: u64,
    view: View,
    /// Whether it is on this node. Others must not make it ask for them.
    local: bool,
}

impl Client {
    pub(super) fn new(listener: u64, view: View, at: IpAddr, from: IpAddr) -> Self {
        // Nobody but the namespace itself reaches its loopback addresses, whatever its own is.
        let here = at.is_loopback() || from.is_loopback() || from == at;
        Self { listener, view, local: here && view == View::Node }
    }
}

/// What becomes of a message.
pub(super) enum Asked {
    /// It is no question.
    Ignored,
    Answered(Vec<u8>),
    /// To be put to [`Core::forward`].
    Elsewhere(Box<Question>),
}

/// A question that could be read.
pub(super) struct Question {
    metadata: Metadata,
    query: Option<Query>,
    view: View,
    edns: bool,
    /// The most bytes that its answer may have.
    room: u16,
    start: Instant,
    /// Its share of what may be open.
    _open: Option<[OwnedSemaphorePermit; 2]>,
}

#[cfg(any(test, feature = "fuzz"))]
impl Question {
    /// One that can be read, and is for others to answer.
    pub(super) fn forwarded(message: &Message, transport: Transport) -> Self {
        let (metadata, query) = (message.metadata, message.queries.first().cloned());
        let room = if transport == Transport::Udp { 512 } else { u16::MAX };
        let (view, start) = (View::Node, Instant::now());
        Self { metadata, query, view, edns: message.edns.is_some(), room, start, _open: None }
    }

    pub(super) fn query(&self) -> Option<&Query> {
        self.query.as_ref()
    }
}

impl Core {
    /// Answers what the node knows itself, at once.
    pub(super) fn ask(&self, message: &[u8], client: Client, transport: Transport) -> Asked {
        let start = Instant::now();
        let Ok(header) = Header::read(&mut BinDecoder::new(message)) else { return Asked::Ignored };
        // An answer to an answer could go on for ever.
        if header.metadata.message_type == MessageType::Response {
            return Asked::Ignored;
        }
        let metadata = header.metadata;
        let view = client.view;
        let mut question =
            Question { metadata, query: None, view, edns: false, room: 512, start, _open: None };
        let refuse = |question: &Question, code| {
            Asked::Answered(self.reply(question, Source::Refused, Own::failed(code)))
        };
        if metadata.op_code != OpCode::Query {
            return refuse(&question, ResponseCode::NotImp);
        }
        let Ok(message) = Message::from_vec(message) else {
            return refuse(&question, ResponseCode::FormErr);
        };
        question.edns = message.edns.is_some();
        question.room = match transport {
            Transport::Udp => message.max_payload().min(MAX_UDP),
            Transport::Tcp => u16::MAX,
        };
        if message.version() > 0 {
            return refuse(&question, ResponseCode::BADVERS);
        }
        let [query] = &*message.queries else { return refuse(&question, ResponseCode::FormErr) };
        question.query = Some(query.clone());
        let transfer = matches!(query.query_type, RecordType::AXFR | RecordType::IXFR);
        if query.query_class != DNSClass::IN || transfer {
            return refuse(&question, ResponseCode::Refused);
        }
        if let Some(own) = self.table.load().answer(&query.name, query.query_type, view) {
            return Asked::Answered(self.reply(&question, Source::Own, own));
        }
        if self.forwarder.load().hear(&query.name) {
            return refuse(&question, ResponseCode::NXDomain);
        }
        if !client.local || !metadata.recursion_desired {
            return refuse(&question, ResponseCode::Refused);
        }
        question._open = self.limits.enter(client.listener);
        if question._open.is_none() {
            return refuse(&question, ResponseCode::ServFail);
        }
        Asked::Elsewhere(Box::new(question))
    }

    /// Asks upstream.
    pub(super) async fn forward(&self, question: Question) -> Vec<u8> {
        let query = question.query.clone().expect("only whole questions are forwarded");
        let own = self.forwarder.load_full().ask(query).await;
        self.reply(&question, Source::Forwarded, own)
    }

    pub(super) fn reply(&self, question: &Question, source: Source, own: Own) -> Vec<u8> {
        let kind = question.query.as_ref().map(|query| query.query_type);
        self.metrics.count(source, kind, own.code, question.start.elapsed());
        let mut metadata = Metadata::response_from_request(&question.metadata);
        metadata.response_code = own.code;
        metadata.authoritative = source == Source::Own;
        metadata.recursion_available = question.view == View::Node;
        metadata.authentic_data = false;
        let mut message = Message::new(metadata.id, MessageType::Response, metadata.op_code);
        message.metadata = metadata;
        message.queries.extend(question.query.clone());
        message.answers = own.answers;
        message.authorities = own.authorities;
        message.additionals = own.additionals;
        message.edns = question.edns.then(|| {
            let mut edns = Edns::new();
            edns.set_max_payload(MAX_UDP);
            edns
        });
        encode(message, question.room)
    }
}

/// Without what is only for convenience where that is too much; without records, so that the
/// client asks over TCP, where even that is.
fn encode(mut message: Message, room: u16) -> Vec<u8> {
    for step in 0..3 {
        match step {
            0 => {}
            1 => message.additionals.clear(),
            _ => message = message.truncate(),
        }
        let mut bytes = Vec::with_capacity(512);
        let mut encoder = BinEncoder::new(&mut bytes);
        if message.emit(&mut encoder).is_ok() && bytes.len() <= room.into() {
            return bytes;
        }
    }
    let Metadata { id, op_code, .. } = message.metadata;
    let failure = Message::error_msg(id, op_code, ResponseCode::ServFail);
    failure.to_vec().expect("a header can be encoded")
}

#[cfg(test)]
mod tests;
