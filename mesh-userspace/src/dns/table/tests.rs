use std::sync::Arc;

use super::*;
use crate::{
    catalog::{tests::said, vip::Vips},
    model::{Protocol, Service},
    registry::rules,
};

/// `name.namespace:port/protocol`, VIP, aliases.
pub(in crate::dns) fn service(id: &str, vip: &str, aliases: &[&str]) -> Service {
    let (name, port) = id.split_once(':').unwrap();
    let (name, namespace) = name.split_once('.').unwrap();
    let (port, protocol) = port.split_once('/').unwrap();
    let mut service = crate::catalog::tests::service(name, port.parse().unwrap(), Some(vip), &[]);
    service.id.namespace = namespace.into();
    service.id.protocol = if protocol == "udp" { Protocol::Udp } else { Protocol::Tcp };
    service.aliases = aliases.iter().map(ToString::to_string).collect();
    service
}

pub(in crate::dns) fn catalog(services: &[Service]) -> Catalog {
    let dir = tempfile::TempDir::new().unwrap();
    let mut vips = Vips::open(dir.path(), rules::for_tests().vip_ranges).unwrap();
    let snapshot = said(services);
    let mut catalog = Catalog::build(&[Some(Arc::new(snapshot))], &mut vips);
    assert_eq!(catalog.conflicts, [""; 0]);
    catalog.delivered = true;
    catalog
}

pub(in crate::dns) fn table(services: &[Service]) -> Table {
    Table::build(Some(&catalog(services)), &["service.local".into()], &rules::for_tests().vip_ranges, |_| {
        true
    })
}

/// The code, and each record as text; of a negative answer its zone.
fn ask(table: &Table, name: &str, kind: RecordType) -> String {
    let Some(own) = table.answer(&Name::from_ascii(name).unwrap(), kind) else { return "elsewhere".into() };
    let mut records: Vec<_> = own.answers.iter().map(|record| record.data.to_string()).collect();
    records.extend(own.authorities.iter().map(|record| format!("in {}", record.name)));
    records.sort();
    format!("{:?} {}", own.code, records.join(" + "))
}

const A: RecordType = RecordType::A;
const VIP: &str = "127.128.0.10";

#[test]
fn a_service_has_its_name_and_its_aliases_with_and_without_the_namespace() {
    let table = table(&[service("backend.service.local:80/tcp", VIP, &["api", "api.corp.example"])]);
    for name in [
        "backend.service.local.",
        "BackEnd.Service.LOCAL.",
        "api.service.local.",
        "api.",
        "api.corp.example.",
    ] {
        assert_eq!(ask(&table, name, A), "NoError 127.128.0.10", "{name}");
    }
    // A name alone is nothing, and what a search domain makes of an alias is somebody else's.
    for name in
        ["backend.", "api.ec2.internal.", "backend.service.local.ec2.internal.", "corp.example.", "x.api."]
    {
        assert_eq!(ask(&table, name, A), "elsewhere", "{name}");
    }
    let one_label = Name::from_labels([&b"backend.service"[..], b"local"]).unwrap();
    assert_eq!(table.answer(&one_label, A), None);
    let asked = Name::from_ascii("BackEnd.Service.LOCAL.").unwrap();
    let own = table.answer(&asked, A).unwrap();
    assert!(own.answers[0].name.eq_case(&asked), "the answer keeps the case");
    assert_eq!(own.answers[0].ttl, 5);
}

#[test]
fn what_exists_has_no_records_of_other_types_and_what_does_not_exist_is_said_not_to() {
    let own_zone = table(&[service("a.b.service.local:80/tcp", VIP, &["short"])]);
    let nodata = "NoError in service.local.";
    for kind in [RecordType::AAAA, RecordType::MX, RecordType::TXT, RecordType::HTTPS, RecordType::SOA] {
        assert_eq!(ask(&own_zone, "a.b.service.local.", kind), "NoError in b.service.local.", "{kind}");
    }
    assert_eq!(ask(&own_zone, "short.", RecordType::AAAA), "NoError in short.");
    // Names that exist because others do, or because they are suffixes.
    let between = table(&[service("a.service.local:80/tcp", VIP, &["x.y"])]);
    assert_eq!(ask(&between, "y.service.local.", A), nodata);
    assert_eq!(ask(&between, "_tcp.a.service.local.", A), nodata);
    assert_eq!(ask(&between, "_tcp.x.y.", A), "NoError in x.y.");
    assert_eq!(ask(&between, "service.local.", A), nodata);
    assert!(ask(&between, "service.local.", RecordType::SOA).contains("hostmaster.service.local."));
    for name in ["nobody.service.local.", "z.a.service.local.", "_81._tcp.a.service.local."] {
        assert_eq!(ask(&between, name, A), "NXDomain in service.local.", "{name}");
    }
    let own = between.answer(&Name::from_ascii("nobody.service.local.").unwrap(), A).unwrap();
    let RData::SOA(soa) = &own.authorities[0].data else { panic!("{own:?}") };
    assert_eq!((own.authorities[0].ttl, soa.minimum), (0, 0));
}

#[test]
fn names_below_any_namespace_stay_here() {
    let table = table(&[service("a.prod:80/tcp", VIP, &[])]);
    assert_eq!(ask(&table, "nobody.prod.", A), "NXDomain in prod.");
    assert_eq!(ask(&table, "nobody.service.local.", A), "NXDomain in service.local.");
    assert_eq!(ask(&table, "nobody.production.", A), "elsewhere");
}

#[test]
fn ports_are_found_at_the_name_and_each_below_it() {
    let table = table(&[
        service("a.service.local:80/tcp", VIP, &["short"]),
        service("a.service.local:81/tcp", VIP, &[]),
        service("a.service.local:53/udp", VIP, &[]),
    ]);
    let srv = RecordType::SRV;
    let all = ["53", "80", "81"].map(|port| format!("1 1 {port} a.service.local.")).join(" + ");
    assert_eq!(ask(&table, "a.service.local.", srv), format!("NoError {all}"));
    assert_eq!(ask(&table, "_53._udp.a.service.local.", srv), "NoError 1 1 53 a.service.local.");
    assert_eq!(ask(&table, "_80._tcp.short.", srv), "NoError 1 1 80 a.service.local.");
    assert_eq!(ask(&table, "_53._tcp.a.service.local.", srv), "NXDomain in service.local.");
    assert_eq!(ask(&table, "short.", srv), format!("NoError {all}"));
    let own = table.answer(&Name::from_ascii("short.").unwrap(), srv).unwrap();
    assert_eq!(own.additionals[0].name.to_string(), "a.service.local.");
    assert_eq!(ask(&table, "a.service.local.", RecordType::ANY), format!("NoError {all} + {VIP}"));
}

#[test]
fn a_vip_has_the_names_of_those_that_share_it() {
    let table = table(&[
        service("a.service.local:80/tcp", VIP, &["alias"]),
        service("b.service.local:81/tcp", VIP, &[]),
        service("c.service.local:81/tcp", "fd00:6d65:7368::5", &[]),
    ]);
    let ptr = RecordType::PTR;
    assert_eq!(ask(&table, "10.0.128.127.in-addr.arpa.", ptr), "NoError a.service.local. + b.service.local.");
    let v6 = Name::from("fd00:6d65:7368::5".parse::<IpAddr>().unwrap()).to_string();
    assert_eq!(ask(&table, &v6, ptr), "NoError c.service.local.");
    assert_eq!(ask(&table, "c.service.local.", RecordType::AAAA), "NoError fd00:6d65:7368::5");
    assert_eq!(ask(&table, "c.service.local.", A), "NoError in service.local.");
    // The rest of the range is nobody's, and other addresses somebody else's.
    assert_eq!(ask(&table, "11.0.128.127.in-addr.arpa.", ptr), "NXDomain in 11.0.128.127.in-addr.arpa.");
    assert_eq!(ask(&table, "128.127.in-addr.arpa.", ptr), "NoError in 128.127.in-addr.arpa.");
    for name in
        ["1.0.0.127.in-addr.arpa.", "127.in-addr.arpa.", "arpa.", "x.in-addr.arpa.", "9.9.9.9.in-addr.arpa."]
    {
        assert_eq!(ask(&table, name, ptr), "elsewhere", "{name}");
    }
}

#[test]
fn an_alias_that_several_claim_goes_to_the_first_suffix_and_never_takes_a_service_s_own_name() {
    let services = [
        service("a.early:80/tcp", "127.128.0.1", &["short"]),
        service("b.late:80/tcp", "127.128.0.2", &["short", "a.early"]),
        service("c.other:80/tcp", "127.128.0.3", &["short"]),
    ];
    let build = |suffixes: &[&str]| {
        let suffixes: Vec<_> = suffixes.iter().map(ToString::to_string).collect();
        Table::build(Some(&catalog(&services)), &suffixes, &[], |_| true)
    };
    assert_eq!(ask(&build(&[]), "short.", A), "NoError 127.128.0.1");
    assert_eq!(ask(&build(&["x", "late"]), "short.", A), "NoError 127.128.0.2");
    assert_eq!(ask(&build(&["x", "late"]), "a.early.", A), "NoError 127.128.0.1");
    let why = build(&["late"]).explain(&Name::from_ascii("short.").unwrap()).unwrap();
    assert_eq!(why, "alias of service b.late; also an alias of a.early, c.other, which does not get it");
}

#[test]
fn a_registry_cannot_take_names_that_every_program_relies_on() {
    let table = table(&[service("a.arpa:80/tcp", VIP, &["localhost", "x.localhost"])]);
    for name in ["localhost.", "x.localhost.", "a.arpa.", "1.1.1.1.in-addr.arpa."] {
        assert_eq!(ask(&table, name, A), "elsewhere", "{name}");
    }
}

#[test]
fn only_what_is_programmed_has_a_name() {
    let services =
        [service("a.service.local:80/tcp", VIP, &["x"]), service("b.service.local:81/tcp", VIP, &["y"])];
    let ports = |port: u16| {
        let suffixes = ["service.local".to_owned()];
        Table::build(Some(&catalog(&services)), &suffixes, &[], move |frontend| frontend.port.get() == port)
    };
    assert_eq!(ask(&ports(81), "b.service.local.", A), format!("NoError {VIP}"));
    assert_eq!(ask(&ports(81), "a.service.local.", A), "NXDomain in service.local.");
    assert_eq!(ask(&ports(81), "x.", A), "elsewhere");
    assert_eq!(ask(&ports(0), "b.service.local.", A), "NXDomain in service.local.");
}

#[test]
fn nothing_is_said_not_to_exist_before_every_registry_was_heard() {
    let mut half = catalog(&[service("a.service.local:80/tcp", VIP, &[])]);
    half.delivered = false;
    for known in [None, Some(&half)] {
        let table = Table::build(known, &["service.local".into()], &rules::for_tests().vip_ranges, |_| true);
        for name in ["b.service.local.", "short.", "9.0.128.127.in-addr.arpa."] {
            assert_eq!(ask(&table, name, A), "ServFail ", "{name}");
        }
        assert_eq!(ask(&table, "www.example.com.", A), "elsewhere");
        let expected = if known.is_some() { "NoError 127.128.0.10" } else { "ServFail " };
        assert_eq!(ask(&table, "a.service.local.", A), expected);
    }
}
