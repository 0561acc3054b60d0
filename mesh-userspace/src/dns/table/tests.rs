use std::{collections::BTreeSet, num::NonZeroU16, sync::Arc};

use super::*;
use crate::{
    catalog::{tests::said, vip::Vips},
    model::{Answer, Health, Instance, Protocol, Service},
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
    ask_as(View::Node, table, name, kind)
}

fn ask_as(view: View, table: &Table, name: &str, kind: RecordType) -> String {
    let Some(own) = answer(view, table, name, kind) else { return "elsewhere".into() };
    let mut records: Vec<_> = own.answers.iter().map(|record| record.data.to_string()).collect();
    records.extend(own.authorities.iter().map(|record| format!("in {}", record.name)));
    records.sort();
    format!("{:?} {}", own.code, records.join(" + "))
}

fn answer(view: View, table: &Table, name: &str, kind: RecordType) -> Option<Own> {
    table.answer(&Name::from_ascii(name).unwrap(), kind, view)
}

const A: RecordType = RecordType::A;
const AAAA: RecordType = RecordType::AAAA;
const SRV: RecordType = RecordType::SRV;
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
    assert_eq!(table.answer(&one_label, A, View::Node), None);
    let asked = Name::from_ascii("BackEnd.Service.LOCAL.").unwrap();
    let own = table.answer(&asked, A, View::Node).unwrap();
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
    let own = answer(View::Node, &between, "nobody.service.local.", A).unwrap();
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
    let own = answer(View::Node, &table, "short.", srv).unwrap();
    assert_eq!(own.additionals[0].name.to_string(), "a.service.local.");
    assert_eq!(ask(&table, "a.service.local.", RecordType::ANY), format!("NoError {all} + {VIP}"));
}

#[test]
fn ports_with_names_are_found_by_them_too() {
    let named =
        |id: &str, name: &str| Service { port_name: Some(name.into()), ..service(id, VIP, &["short"]) };
    let table = table(&[
        named("a.service.local:80/tcp", "http"),
        named("a.service.local:81/tcp", "http"),
        named("a.service.local:53/udp", "dns"),
    ]);
    let both = "NoError 1 1 80 a.service.local. + 1 1 81 a.service.local.";
    assert_eq!(ask(&table, "_http._tcp.a.service.local.", SRV), both);
    assert_eq!(ask(&table, "_HTTP._tcp.short.", SRV), both);
    assert_eq!(ask(&table, "_80._tcp.short.", SRV), "NoError 1 1 80 a.service.local.");
    assert_eq!(ask(&table, "_dns._udp.a.service.local.", SRV), "NoError 1 1 53 a.service.local.");
    assert_eq!(ask(&table, "_http._udp.a.service.local.", SRV), "NXDomain in service.local.");
    assert_eq!(ask(&table, "_http._tcp.a.service.local.", A), "NoError in service.local.");
    let why = table.explain(&Name::from_ascii("_http._tcp.short.").unwrap()).unwrap();
    assert_eq!(why, "port 80, 81 of service a.service.local");
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

/// With instances at these addresses and ports.
fn with_instances(mut service: Service, instances: &[(&str, u16, Health)]) -> Service {
    let instance = |(n, (address, port, health)): (usize, &(&str, u16, Health))| Instance {
        id: format!("i/{n}"),
        address: address.parse().unwrap(),
        port: NonZeroU16::new(*port).unwrap(),
        weight: 100 + u16::try_from(n).unwrap(),
        zone: None,
        health: *health,
    };
    service.instances = instances.iter().enumerate().map(instance).collect();
    service
}

use Health::{Draining, Healthy, Unhealthy};

/// Behind two ports, of both families, two on one address, and three that get no connections.
fn mixed(answer: Answer) -> [Service; 2] {
    let mut web = with_instances(
        service("a.service.local:80/tcp", VIP, &["short"]),
        &[
            ("10.0.0.1", 8080, Healthy),
            ("10.0.0.1", 8081, Healthy),
            ("fd00::1", 8080, Healthy),
            ("10.0.0.2", 8080, Unhealthy),
            ("10.0.0.3", 8080, Draining),
            ("10.0.0.4", 8080, Healthy),
        ],
    );
    web.instances[5].weight = 0;
    let udp =
        with_instances(service("a.service.local:53/udp", VIP, &["short"]), &[("10.0.0.1", 5353, Healthy)]);
    [web, udp].map(|service| Service { answer, ..service })
}

#[test]
fn a_service_may_answer_with_its_instances_and_outside_every_service_does() {
    let (by_choice, all) = (table(&mixed(Answer::Instances)), table(&mixed(Answer::Vip)));
    for (view, table) in [(View::Node, &by_choice), (View::Outside, &by_choice), (View::Outside, &all)] {
        let ask = |name: &str, kind| ask_as(view, table, name, kind);
        for name in ["a.service.local.", "short.service.local.", "short."] {
            assert_eq!(ask(name, A), "NoError 10.0.0.1", "{name}");
            assert_eq!(ask(name, AAAA), "NoError fd00::1", "{name}");
            assert_eq!(
                ask(name, SRV),
                "NoError 1 100 5353 10-0-0-1.a.service.local. + 1 100 8080 10-0-0-1.a.service.local. + \
                 1 101 8081 10-0-0-1.a.service.local. + 1 102 8080 fd00-0-0-0-0-0-0-1.a.service.local."
            );
        }
        let udp = ask("_53._udp.short.", SRV);
        assert_eq!(udp, "NoError 1 100 5353 10-0-0-1.a.service.local.");
        let srv = answer(view, table, "a.service.local.", SRV).unwrap();
        let mut more: Vec<_> =
            srv.additionals.iter().map(|record| format!("{} {}", record.name, record.data)).collect();
        more.sort();
        assert_eq!(
            more,
            ["10-0-0-1.a.service.local. 10.0.0.1", "fd00-0-0-0-0-0-0-1.a.service.local. fd00::1"]
        );
        // What is pointed at can be asked for.
        assert_eq!(ask("10-0-0-1.a.service.local.", A), "NoError 10.0.0.1");
        assert_eq!(ask("10-0-0-1.a.service.local.", AAAA), "NoError in service.local.");
        assert_eq!(ask("fd00-0-0-0-0-0-0-1.A.service.local.", AAAA), "NoError fd00::1");
        assert_eq!(ask("10-0-0-2.a.service.local.", A), "NXDomain in service.local.");
    }
    assert_eq!(ask(&all, "a.service.local.", A), format!("NoError {VIP}"));
    assert_eq!(ask(&all, "10-0-0-1.a.service.local.", A), "NXDomain in service.local.");
    let why = |name: &str| by_choice.explain(&Name::from_ascii(name).unwrap()).unwrap();
    assert_eq!(why("short."), "alias of service a.service.local, which answers with its instances");
    assert_eq!(why("10-0-0-1.a.service.local."), "an instance of service a.service.local");
}

#[test]
fn an_answer_has_eight_instances_and_every_one_has_its_turn() {
    let addresses: Vec<_> = (1..=20).map(|n| format!("10.0.0.{n}")).collect();
    let instances: Vec<_> = addresses.iter().map(|address| (&**address, 8080, Healthy)).collect();
    let table = table(&[with_instances(service("a.service.local:80/tcp", VIP, &[]), &instances)]);
    for kind in [A, SRV] {
        let mut seen = BTreeSet::new();
        for _ in 0..1000 {
            let own = answer(View::Outside, &table, "a.service.local.", kind).unwrap();
            assert_eq!((own.answers.len(), own.additionals.len()), (8, if kind == A { 0 } else { 8 }));
            let data: BTreeSet<_> = own.answers.iter().map(|record| record.data.to_string()).collect();
            assert_eq!(data.len(), 8, "no record twice");
            seen.extend(data);
        }
        assert_eq!(seen.len(), 20);
    }
}

#[test]
fn without_a_healthy_instance_the_others_are_answered_and_without_any_there_are_no_records() {
    let ask = |instances: &[(&str, u16, Health)]| {
        let table = table(&[with_instances(service("a.service.local:80/tcp", VIP, &[]), instances)]);
        ask_as(View::Outside, &table, "a.service.local.", A)
    };
    let all = [("10.0.0.1", 80, Unhealthy), ("10.0.0.2", 80, Unhealthy), ("10.0.0.3", 80, Draining)];
    assert_eq!(ask(&all), "NoError 10.0.0.1 + 10.0.0.2");
    assert_eq!(ask(&all[2..]), "NoError 10.0.0.3");
    assert_eq!(ask(&[]), "NoError in service.local.");
}

#[test]
fn of_an_api_only_service_only_the_aliases_are_names_as_they_are_written() {
    let mut hidden = service("a.corp.example:80/tcp", VIP, &["short", "a.in.prod"]);
    hidden.api_only = true;
    let nameless = Service { api_only: true, ..service("b.corp.example:80/tcp", "127.128.0.11", &[]) };
    let table = table(&[hidden, nameless]);
    for name in ["short.", "a.in.prod."] {
        assert_eq!(ask(&table, name, A), format!("NoError {VIP}"), "{name}");
        assert_eq!(ask(&table, name, SRV), "NoError 1 1 80 short.");
    }
    // Its namespace is no zone: names below it are somebody else's.
    for name in ["a.corp.example.", "b.corp.example.", "short.corp.example.", "x.corp.example.", "in.prod."] {
        assert_eq!(ask(&table, name, A), "elsewhere", "{name}");
    }
    assert_eq!(ask(&table, "10.0.128.127.in-addr.arpa.", RecordType::PTR), "NoError short.");
    let nobody = ask(&table, "11.0.128.127.in-addr.arpa.", RecordType::PTR);
    assert_eq!(nobody, "NoError in 11.0.128.127.in-addr.arpa.");
    assert_eq!(
        table.explain(&Name::from_ascii("short.").unwrap()).unwrap(),
        "alias of service a.corp.example"
    );
}

#[test]
fn the_same_table_follows_instances_but_not_names() {
    let hidden = |health| Service {
        api_only: true,
        ..with_instances(service("b.api:80/tcp", "127.128.0.11", &["b"]), &[("10.0.0.3", 80, health)])
    };
    let build = |health, answer| {
        let [web, udp] = mixed(answer);
        let mut udp = udp;
        udp.instances[0].address = "10.0.0.2".parse().unwrap();
        udp.instances[0].health = health;
        let other = with_instances(
            service("c.service.local:80/tcp", "127.128.0.12", &[]),
            &[("10.0.0.5", 80, health), ("10.0.0.6", 80, Healthy)],
        );
        Some(Arc::new(catalog(&[web, udp, hidden(Healthy), other])))
    };
    let old = build(Healthy, Answer::Vip);
    let table = Table::build(old.as_deref(), &["service.local".into()], &[], |_| true);
    let ask = |name: &str| ask_as(View::Outside, &table, name, A);
    assert_eq!(ask("c.service.local."), "NoError 10.0.0.5 + 10.0.0.6");
    let new = build(Unhealthy, Answer::Vip);
    assert!(new.as_ref().unwrap().has_names_of(old.as_ref().unwrap()));
    table.follow(&old, &new);
    assert_eq!(ask("c.service.local."), "NoError 10.0.0.6");
    // The only one of its port is answered all the same.
    assert_eq!(ask("a.service.local."), "NoError 10.0.0.1 + 10.0.0.2");
    assert_eq!(ask("b."), "NoError 10.0.0.3");

    let mut moved = Catalog::clone(new.as_ref().unwrap());
    let id = hidden(Healthy).id;
    let mut entry = (*moved.services[&id]).clone();
    let mut service = hidden(Healthy);
    service.instances[0].address = "10.0.0.4".parse().unwrap();
    entry.service = Arc::new(service);
    moved.services.insert(id, Arc::new(entry));
    table.follow(&new, &Some(Arc::new(moved)));
    assert_eq!(ask("b."), "NoError 10.0.0.4", "an API-only one too");
    let chosen = build(Unhealthy, Answer::Instances).unwrap();
    assert!(!chosen.has_names_of(new.as_ref().unwrap()));
}
