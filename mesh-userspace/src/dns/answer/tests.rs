use std::sync::Arc;

use hickory_resolver::proto::{op::EdnsFlags, rr::Name};
use proptest::prelude::*;

use super::*;
use crate::dns::{
    fuzz,
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
    Client::new(0, View::Node, "127.64.0.53".parse().unwrap(), "127.0.0.1".parse().unwrap())
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
    let at = |at: &str, from: &str| Client::new(0, View::Node, at.parse().unwrap(), from.parse().unwrap());
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
fn outside_nobody_is_asked_for_anybody() {
    let core = core();
    let here = "127.0.0.1".parse().unwrap();
    for client in [
        Client::new(0, View::Outside, here, here),
        Client::new(0, View::Outside, "10.0.0.5".parse().unwrap(), "10.0.0.5".parse().unwrap()),
    ] {
        let ask = |name: &str| {
            let bytes = question(name, RecordType::A).to_vec().unwrap();
            ask_bytes(&core, &bytes, client, Transport::Udp).unwrap().0.metadata
        };
        let others = ask("www.example.com.");
        assert_eq!((others.response_code, others.recursion_available), (ResponseCode::Refused, false));
        let own = ask("a.service.local.");
        assert_eq!((own.response_code, own.recursion_available), (ResponseCode::NoError, false));
        assert!(own.authoritative);
    }
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
    let other = Client::new(1, View::Node, "127.64.0.53".parse().unwrap(), "127.0.0.1".parse().unwrap());
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

/// A question, mostly a good one: names of ours, above, below and beside them, any type, flags and EDNS.
fn questions() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![
        4 => proptest::sample::select(vec![
            "a.service.local.", "short.", "many.service.local.", "_80._tcp.a.service.local.", "service.local.",
            "nobody.service.local.", "x.a.service.local.", "10.0.128.127.in-addr.arpa.", "www.example.com.", ".",
        ])
        .prop_map(|name| Name::from_ascii(name).unwrap()),
        1 => proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..=63), 0..=3)
            .prop_map(|labels| Name::from_labels(labels).unwrap()),
    ];
    let kind = prop_oneof![3 => proptest::sample::select(vec![1, 28, 33, 12, 255]), 1 => any::<u16>()];
    // Version, payload, options as they are.
    let edns = (0u8..2, any::<u16>(), proptest::collection::vec(any::<u8>(), 0..20));
    (name, kind, proptest::option::of(edns), 0u8..=255, 0u16..3).prop_map(
        |(name, kind, edns, flags, more)| {
            let mut message = question("x.", RecordType::from(kind)).to_vec().unwrap();
            message.truncate(12);
            message[2] = if flags < 32 { flags } else { 1 };
            // Rarely another number of questions than there is.
            message[5] = if more == 2 { flags % 4 } else { 1 };
            message[11] = edns.is_some().into();
            message.extend(name.to_bytes().unwrap());
            message.extend([kind.to_be_bytes(), [0, 1]].concat());
            if let Some((version, payload, options)) = edns {
                let length = u16::try_from(options.len()).unwrap();
                message.extend([0, 0, 41]);
                message.extend([payload.to_be_bytes(), [0, version], [0, 0], length.to_be_bytes()].concat());
                message.extend(options);
            }
            message
        },
    )
}

/// What is done to its bytes; places and lengths are taken modulo what there is.
#[derive(Clone, Debug)]
enum Damage {
    Set(usize, u8),
    Cut(usize),
    /// A compression pointer, also to itself and to others.
    Point(usize, u16),
    /// A part comes a second time.
    Repeat(usize, usize),
    Insert(usize, Vec<u8>),
}

fn damages() -> impl Strategy<Value = Vec<Damage>> {
    let at = || 0usize..600;
    let damage = prop_oneof![
        3 => (at(), any::<u8>()).prop_map(|(at, byte)| Damage::Set(at, byte)),
        1 => at().prop_map(Damage::Cut),
        3 => (at(), 0u16..80).prop_map(|(at, to)| Damage::Point(at, to)),
        1 => (at(), at()).prop_map(|(at, length)| Damage::Repeat(at, length)),
        1 => (at(), proptest::collection::vec(any::<u8>(), 1..40)).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
    ];
    proptest::collection::vec(damage, 0..4)
}

fn damaged(mut bytes: Vec<u8>, damages: Vec<Damage>) -> Vec<u8> {
    for damage in damages {
        let length = bytes.len();
        match damage {
            Damage::Set(at, byte) if length > 0 => bytes[at % length] = byte,
            Damage::Cut(at) => bytes.truncate(at % (length + 1)),
            Damage::Point(at, to) if length > 1 => {
                let at = at % (length - 1);
                bytes[at..at + 2].copy_from_slice(&(0xc000 | to).to_be_bytes());
            }
            Damage::Repeat(at, part) if length > 0 => {
                let at = at % length;
                bytes.extend_from_within(at..(at + part).min(length));
            }
            Damage::Insert(at, more) => drop(bytes.splice(at % (length + 1)..at % (length + 1), more)),
            _ => {}
        }
    }
    bytes
}

proptest! {
    // `PROPTEST_CASES` says otherwise.
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    /// Whatever comes, what goes out is a message, is an answer to it, and fits.
    #[test]
    fn no_bytes_break_it(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        fuzz::query(&bytes);
    }

    #[test]
    fn no_damage_to_a_question_breaks_it(bytes in questions(), damages in damages()) {
        fuzz::query(&damaged(bytes, damages));
    }
}
