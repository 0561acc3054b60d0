use std::sync::Arc;

use hickory_resolver::proto::{op::EdnsFlags, rr::Name};
use proptest::prelude::*;

use super::*;
use crate::dns::{
    table::tests::{service, table},
    upstream::Forwarder,
};

fn core() -> Core {
    let many: Vec<_> = (1..=200).map(|port| format!("many.service.local:{port}/tcp")).collect();
    let many = many.iter().map(|id| service(id, "127.128.0.11", &[]));
    let core = Core::default();
    let one = [service("a.service.local:80/tcp", "127.128.0.10", &["short"])];
    core.table.store(Arc::new(table(&one.into_iter().chain(many).collect::<Vec<_>>())));
    core
}

fn local() -> Client {
    Client::new(0, "127.64.0.53".parse().unwrap(), "127.0.0.1".parse().unwrap())
}

fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.queries.push(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

/// The answer to a message of bytes; none where there is none, or it is for others to give.
fn ask_bytes(core: &Core, bytes: &[u8], client: Client, transport: Transport) -> Option<(Message, usize)> {
    match core.ask(bytes, client, transport) {
        Asked::Answered(reply) => Some((Message::from_vec(&reply).unwrap(), reply.len())),
        Asked::Ignored | Asked::Elsewhere(_) => None,
    }
}

fn ask(core: &Core, message: &Message) -> Message {
    ask_bytes(core, &message.to_vec().unwrap(), local(), Transport::Udp).expect("an answer").0
}

fn code(core: &Core, message: &Message) -> ResponseCode {
    ask(core, message).metadata.response_code
}

#[test]
fn an_answer_repeats_the_question_and_speaks_with_authority() {
    let question = question("A.Service.Local.", RecordType::A);
    let answer = ask(&core(), &question);
    assert_eq!(answer.metadata.id, question.metadata.id);
    assert!(answer.metadata.authoritative && answer.metadata.recursion_available);
    assert!(answer.metadata.recursion_desired && !answer.metadata.truncation);
    assert!(answer.queries[0].name.eq_case(&question.queries[0].name));
    assert_eq!((answer.answers.len(), answer.edns), (1, None));
}

#[test]
fn edns_is_answered_with_edns_and_an_unknown_version_with_badvers() {
    let core = core();
    let mut message = question("a.service.local.", RecordType::A);
    message.edns = Some(Edns::new());
    let edns = ask(&core, &message).edns.expect("EDNS");
    assert_eq!((edns.version(), edns.max_payload()), (0, MAX_UDP));
    assert_eq!(edns.flags(), &EdnsFlags::default());
    message.edns.as_mut().unwrap().set_version(1);
    // 16 has another name where there is a signature.
    assert_eq!(u16::from(code(&core, &message)), u16::from(ResponseCode::BADVERS));
}

#[test]
fn what_does_not_fit_is_cut_for_udp_and_whole_over_tcp() {
    let core = core();
    let srv = |payload: Option<u16>, transport| {
        let mut message = question("many.service.local.", RecordType::SRV);
        message.edns = payload.map(|payload| {
            let mut edns = Edns::new();
            edns.set_max_payload(payload);
            edns
        });
        ask_bytes(&core, &message.to_vec().unwrap(), local(), transport).unwrap()
    };
    for (payload, most) in [(None, 512), (Some(100), 512), (Some(1000), 1000), (Some(65535), 1232)] {
        let (answer, length) = srv(payload, Transport::Udp);
        assert!(answer.metadata.truncation && length <= most, "{payload:?}: {length}");
        assert_eq!((answer.queries.len(), answer.answers.len()), (1, 0));
        assert_eq!(answer.edns.is_some(), payload.is_some());
    }
    let (answer, _) = srv(None, Transport::Tcp);
    assert!(!answer.metadata.truncation);
    assert_eq!(answer.answers.len(), 200);
}

#[test]
fn what_is_no_plain_question_is_refused() {
    let core = core();
    let mut message = question("a.service.local.", RecordType::A);
    message.metadata.op_code = OpCode::Notify;
    assert_eq!(code(&core, &message), ResponseCode::NotImp);
    message.metadata.op_code = OpCode::Query;
    message.queries[0].query_class = DNSClass::CH;
    assert_eq!(code(&core, &message), ResponseCode::Refused);
    assert_eq!(code(&core, &question("service.local.", RecordType::AXFR)), ResponseCode::Refused);
    let mut two = question("a.service.local.", RecordType::A);
    two.queries.push(two.queries[0].clone());
    assert_eq!(code(&core, &two), ResponseCode::FormErr);
    two.queries.clear();
    assert_eq!(code(&core, &two), ResponseCode::FormErr);
    let mut answer = question("a.service.local.", RecordType::A);
    answer.metadata.message_type = MessageType::Response;
    assert!(matches!(core.ask(&answer.to_vec().unwrap(), local(), Transport::Udp), Asked::Ignored));
}

#[test]
fn names_that_point_in_circles_are_malformed() {
    let core = core();
    // A header for one question, then a name that points at itself, or beyond the end.
    for name in [[0xc0, 12], [0xc0, 0xff], [0x3f, b'a'], [0x80, 0]] {
        let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        bytes.extend(name);
        bytes.extend([0, 1, 0, 1]);
        let (answer, length) = ask_bytes(&core, &bytes, local(), Transport::Udp).unwrap();
        assert_eq!((answer.metadata.id, answer.metadata.response_code), (0x1234, ResponseCode::FormErr));
        assert_eq!(length, 12);
    }
}

#[test]
fn others_are_asked_only_for_who_is_on_the_node() {
    let core = core();
    let bytes = question("www.example.com.", RecordType::A).to_vec().unwrap();
    let at = |at: &str, from: &str| Client::new(0, at.parse().unwrap(), from.parse().unwrap());
    let forwarded = |client| matches!(core.ask(&bytes, client, Transport::Udp), Asked::Elsewhere(_));
    assert!(forwarded(at("127.64.0.53", "127.0.0.1")));
    assert!(forwarded(at("127.64.0.53", "10.0.0.5")), "a task's socket that is bound to its address");
    assert!(forwarded(at("10.0.0.5", "10.0.0.5")));
    assert!(!forwarded(at("10.0.0.5", "10.0.0.6")));
    let stranger = at("10.0.0.5", "10.0.0.6");
    let (answer, length) = ask_bytes(&core, &bytes, stranger, Transport::Udp).unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
    assert!(length <= bytes.len(), "no more than was asked");
    let own = question("a.service.local.", RecordType::A).to_vec().unwrap();
    assert_eq!(ask_bytes(&core, &own, stranger, Transport::Udp).unwrap().0.answers.len(), 1);
    // Nor where it is not wanted.
    let mut plain = question("www.example.com.", RecordType::A);
    plain.metadata.recursion_desired = false;
    assert_eq!(code(&core, &plain), ResponseCode::Refused);
}

#[test]
fn a_flood_of_others_names_ends_in_servfail_and_own_names_are_answered() {
    let core = core();
    let bytes = question("www.example.com.", RecordType::A).to_vec().unwrap();
    let open = |client| match core.ask(&bytes, client, Transport::Udp) {
        Asked::Elsewhere(question) => Some(question),
        _ => None,
    };
    let flood: Vec<_> = (0..1000).map_while(|_| open(local())).collect();
    assert!(flood.len() < 1000);
    assert_eq!(code(&core, &question("www.example.com.", RecordType::A)), ResponseCode::ServFail);
    assert_eq!(code(&core, &question("short.", RecordType::A)), ResponseCode::NoError);
    let other = Client::new(1, "127.64.0.53".parse().unwrap(), "127.0.0.1".parse().unwrap());
    assert!(open(other).is_some(), "another namespace");
}

#[tokio::test]
async fn without_anybody_to_ask_questions_are_refused_where_that_is_meant_to_be() {
    let core = core();
    let bytes = question("www.example.com.", RecordType::A).to_vec().unwrap();
    for (none, code) in [(false, ResponseCode::ServFail), (true, ResponseCode::Refused)] {
        core.forwarder.store(Arc::new(Forwarder::nobody(none)));
        let Asked::Elsewhere(question) = core.ask(&bytes, local(), Transport::Udp) else { panic!("kept") };
        let answer = Message::from_vec(&core.forward(*question).await).unwrap();
        assert_eq!(answer.metadata.response_code, code);
        assert!(!answer.metadata.authoritative);
    }
}

proptest! {
    /// Whatever comes, what goes out is a message, is an answer to it, and fits.
    #[test]
    fn no_bytes_break_it(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        answers_or_ignores(&bytes);
    }

    #[test]
    fn no_damage_to_a_question_breaks_it(at in 0usize..64, with in any::<u8>(), cut in 0usize..80) {
        let mut message = question("many.service.local.", RecordType::SRV);
        message.edns = Some(Edns::new());
        let mut bytes = message.to_vec().unwrap();
        bytes.truncate(cut);
        if let Some(byte) = bytes.get_mut(at) {
            *byte = with;
        }
        answers_or_ignores(&bytes);
    }
}

fn answers_or_ignores(bytes: &[u8]) {
    if let Some((answer, length)) = ask_bytes(&core(), bytes, local(), Transport::Udp) {
        assert_eq!(answer.metadata.id.to_be_bytes(), bytes[..2]);
        assert_eq!(answer.metadata.message_type, MessageType::Response);
        assert!(length <= MAX_UDP.into());
        if let Some(record) = answer.answers.first() {
            assert_eq!(record.name, answer.queries[0].name);
        }
    }
}
