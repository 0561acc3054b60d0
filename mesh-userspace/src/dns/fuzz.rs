//! What bytes on port 53 come to, from clients and from name servers.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
    sync::{Arc, LazyLock},
    time::Instant,
};

use hickory_resolver::{
    net::{DnsError, NetError},
    proto::{
        op::{DnsResponse, Message, MessageType, Query},
        rr::{Name, RData, RecordType},
    },
};

use super::{
    Core, NEGATIVE_TTL,
    answer::{Asked, Client, MAX_UDP, Question, Transport},
    metrics::Source,
    table::{Table, View},
    upstream::Forwarder,
};
use crate::{
    catalog::{Catalog, vip::Vips},
    registry::{self, Snapshot, file::format, rules},
};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

static CORE: LazyLock<Core> = LazyLock::new(|| {
    let mut text = String::from(
        r#"
service = [
  { name = "a", namespace = "service.local", port = 80, vip = "127.128.0.10", aliases = ["short"] },
  { name = "some", namespace = "service.local", port = 80, vip = "127.128.0.12", answer = "instances", instance = [
    { id = "a", address = "10.0.2.45", port = 31080 }, { id = "b", address = "fd00::2", port = 31080 } ] },
"#,
    );
    // More than one answer over UDP can hold.
    text.extend((1..=200).map(|port| {
        format!(
            "  {{ name = \"many\", namespace = \"service.local\", port = {port}, vip = \"127.128.0.11\" }},\n"
        )
    }));
    text.push(']');
    let rules = rules::for_tests();
    let services =
        format::parse(Path::new("services.toml"), &text, &rules).expect("it is good").expect("a list");
    let snapshot = Snapshot::complete(registry::services(services.into_iter().map(Arc::new)));
    let mut vips = Vips::open(Path::new("/nowhere"), rules.vip_ranges.clone()).expect("none are kept");
    let mut catalog = Catalog::build(&[Some(Arc::new(snapshot))], &mut vips);
    catalog.delivered = true;
    let core = Core::default();
    let suffixes = ["service.local".into()];
    core.table.store(Arc::new(Table::build(Some(&catalog), &suffixes, &rules.vip_ranges, |_| true)));
    core
});

/// A message of a client: what goes out is an answer to it, and fits, and no name of the node's own leaves it.
pub(crate) fn query(bytes: &[u8]) {
    for (transport, view) in
        [(Transport::Udp, View::Node), (Transport::Tcp, View::Node), (Transport::Udp, View::Outside)]
    {
        match CORE.ask(bytes, Client::new(0, view, HERE, HERE), transport) {
            Asked::Ignored => assert!(bytes.len() < 12 || bytes[2] & 0x80 != 0, "a question is ignored"),
            Asked::Answered(reply) => {
                let answer = Message::from_vec(&reply).expect("a message");
                assert_eq!(answer.metadata.id.to_be_bytes(), bytes[..2]);
                assert_eq!(answer.metadata.message_type, MessageType::Response);
                assert!(transport == Transport::Tcp || reply.len() <= MAX_UDP.into());
                if let Some(record) = answer.answers.first() {
                    assert_eq!(record.name, answer.queries[0].name);
                }
            }
            Asked::Elsewhere(question) => {
                assert_eq!(view, View::Node, "nobody outside asks through the node");
                let name = &question.query().expect("a whole question").name;
                let suffix = Name::from_ascii("service.local.").expect("a name");
                assert!(!suffix.zone_of(name), "{name} leaves the node");
            }
        }
    }
}

/// A message of a name server, as it is kept, passed on to a client, and taken by the DNS registry: what goes out
/// is an answer to what was asked, and fits, and what says no is kept by nobody.
pub(crate) fn reply(bytes: &[u8]) {
    let Ok(response) = DnsResponse::from_buffer(bytes.to_vec()) else { return };
    registry::dns::fuzz(&response.answers);
    let mut asked = Message::query();
    asked.metadata.recursion_desired = true;
    asked.queries.push(Query::query(Name::from_ascii("www.example.com.").expect("a name"), RecordType::A));
    let query = &asked.queries[0];
    // As its pool of name servers has it.
    let said = DnsError::from_response(response).map(DnsResponse::into_message).map_err(NetError::from);
    let forwarder = Forwarder::nobody(false);
    let kept = forwarder.keep(query, said.clone(), Instant::now());
    for said in [Some(said), kept].into_iter().flatten() {
        for transport in [Transport::Udp, Transport::Tcp] {
            let question = Question::forwarded(&asked, transport);
            let own = super::upstream::own(said.clone());
            for record in &own.authorities {
                if let RData::SOA(soa) = &record.data {
                    assert_eq!((record.ttl, soa.minimum), (NEGATIVE_TTL, NEGATIVE_TTL), "{own:?}");
                }
            }
            let reply = CORE.reply(&question, Source::Forwarded, own);
            let answer = Message::from_vec(&reply).expect("a message");
            assert_eq!(answer.metadata.id, asked.metadata.id);
            assert_eq!(answer.metadata.message_type, MessageType::Response);
            assert!(!answer.metadata.authoritative && !answer.metadata.authentic_data);
            assert!(transport == Transport::Tcp || reply.len() <= 512);
        }
    }
}
