use std::num::NonZeroU16;

use tempfile::TempDir;

use super::*;
use crate::{
    model::{Answer, DRAIN, Eject, Policy},
    registry::services,
};

pub(crate) fn service(name: &str, port: u16, vip: Option<&str>, addresses: &[(&str, Health)]) -> Service {
    let instance = |(n, (address, health)): (usize, &(&str, Health))| Instance {
        id: format!("{name}-{n}"),
        address: address.parse().unwrap(),
        port: NonZeroU16::new(8080).unwrap(),
        weight: 100,
        zone: None,
        health: *health,
    };
    Service {
        id: ServiceId {
            namespace: "service.local".into(),
            name: name.into(),
            protocol: Protocol::Tcp,
            port: NonZeroU16::new(port).unwrap(),
        },
        vip: vip.map(|vip| vip.parse().unwrap()),
        port_name: None,
        aliases: Vec::new(),
        answer: Answer::default(),
        api_only: false,
        policy: Policy::default(),
        affinity: None,
        drain: DRAIN,
        eject: Eject::default(),
        slow_start: None,
        panic_percent: 0,
        instances: addresses.iter().enumerate().map(instance).collect(),
    }
}

/// All that a registry has to say.
pub(crate) fn said(all: &[Service]) -> Snapshot {
    Snapshot::complete(services(all.iter().cloned().map(Arc::new)))
}

fn build(registries: &[&[Service]]) -> Catalog {
    let dir = TempDir::new().unwrap();
    let ranges = ["127.128.0.0/10", "fd00:6d65:7368::/96"].map(|range| range.parse().unwrap());
    let mut vips = Vips::open(dir.path(), ranges.to_vec()).unwrap();
    let snapshot = |services: &&[Service]| Some(Arc::new(said(services)));
    Catalog::build(&registries.iter().map(snapshot).collect::<Vec<_>>(), &mut vips)
}

/// A node without a zone that has seen nothing yet.
struct Nowhere;

impl Node for Nowhere {
    fn zone(&self) -> Option<&str> {
        None
    }

    fn is_adopted(&self, _: &Frontend) -> bool {
        false
    }

    fn is_ejected(&self, _: &Frontend, _: &Endpoint) -> bool {
        false
    }

    fn age(&self, _: &Frontend, _: &Endpoint) -> Option<Duration> {
        None
    }
}

const OK: Health = Health::Healthy;

#[test]
fn vips_follow_the_families_of_the_instances() {
    let families = |vip, addresses| {
        let catalog = build(&[&[service("a", 80, vip, addresses)]]);
        assert_eq!(catalog.conflicts, Vec::<String>::new());
        let vips = &catalog.services.values().next().unwrap().vips;
        vips.iter().map(|vip| if vip.is_ipv4() { 4 } else { 6 }).collect::<Vec<_>>()
    };
    assert_eq!(families(None, &[]), [4]);
    assert_eq!(families(None, &[("10.0.0.1", OK)]), [4]);
    assert_eq!(families(None, &[("fd01::1", OK)]), [6]);
    assert_eq!(families(None, &[("10.0.0.1", OK), ("fd01::1", OK)]), [4, 6]);
    assert_eq!(families(Some("127.128.0.1"), &[("10.0.0.1", OK)]), [4]);
    assert_eq!(families(Some("127.128.0.1"), &[("fd01::1", OK)]), [4, 6]);
    assert_eq!(families(Some("fd00:6d65:7368::1"), &[("10.0.0.1", OK)]), [6]);
    assert_eq!(families(Some("fd00:6d65:7368::1"), &[("10.0.0.1", OK), ("fd01::1", OK)]), [6, 4]);
}

#[test]
fn every_backend_is_behind_exactly_one_vip_it_can_be_reached_by() {
    for vip in [None, Some("127.128.0.1"), Some("fd00:6d65:7368::1")] {
        for addresses in [&[("10.0.0.1", OK)][..], &[("fd01::1", OK)], &[("10.0.0.1", OK), ("fd01::1", OK)]] {
            let catalog = build(&[&[service("a", 80, vip, addresses)]]);
            let desired = catalog.desired(&Nowhere);
            let reached: Vec<_> = desired
                .iter()
                .flat_map(|(frontend, backends)| {
                    backends.backends.keys().map(|endpoint| (frontend.address, endpoint.address))
                })
                .collect();
            assert_eq!(reached.len(), addresses.len(), "{vip:?} {addresses:?}");
            assert!(reached.iter().all(|(vip, backend)| !vip.is_v4() || backend.is_v4()), "{reached:?}");
        }
    }
}

#[test]
fn ports_of_one_name_share_its_vip() {
    let catalog =
        build(&[&[service("a", 80, None, &[]), service("a", 81, None, &[]), service("b", 80, None, &[])]]);
    let vips: Vec<_> = catalog.services.values().map(|entry| entry.vips[0]).collect();
    assert_eq!(vips[0], vips[1]);
    assert_ne!(vips[0], vips[2]);
    let catalog = build(&[&[service("a", 80, Some("127.128.0.9"), &[]), service("a", 81, None, &[])]]);
    assert!(catalog.services.values().all(|entry| entry.vips == [IpAddr::from([127, 128, 0, 9])]));
}

#[test]
fn the_first_registry_that_names_a_service_owns_it() {
    let first = [service("a", 80, Some("127.128.0.1"), &[("10.0.0.1", OK)])];
    let second = [service("a", 80, None, &[("10.0.0.2", OK)]), service("b", 80, Some("127.128.0.1"), &[])];
    let catalog = build(&[&first, &second]);
    assert_eq!(catalog.services.len(), 1);
    assert_eq!(catalog.conflicts.len(), 2);
    assert!(catalog.conflicts[1].contains("already taken by service a.service.local:80/tcp"));
}

#[test]
fn a_vip_that_was_given_out_is_not_taken_over() {
    let dir = TempDir::new().unwrap();
    let mut vips = Vips::open(dir.path(), vec!["127.128.0.0/10".parse().unwrap()]).unwrap();
    let snapshot = |services: Vec<Service>| [Some(Arc::new(said(&services)))];
    let b = service("b", 80, None, &[]);
    let before = Catalog::build(&snapshot(vec![b.clone()]), &mut vips);
    let vip = before.services[&b.id].vips[0];
    let a = service("a", 80, Some(&vip.to_string()), &[]);
    let after = Catalog::build(&snapshot(vec![a.clone(), b.clone()]), &mut vips);
    assert_eq!(after.services[&b.id].vips, [vip]);
    assert!(after.services[&a.id].vips.is_empty());
    assert!(
        after.conflicts[0].contains("already belongs to service b.service.local:80/tcp"),
        "{:?}",
        after.conflicts
    );
}

#[test]
fn names_that_are_one_in_dns_are_one_service() {
    let mut other = service("backend.service", 80, None, &[]);
    other.id.namespace = "local".into();
    let mut alias = service("b", 80, None, &[]);
    alias.aliases = vec!["Backend".into()];
    let catalog = build(&[&[service("backend", 80, None, &[])], &[other, alias]]);
    assert_eq!(catalog.services.len(), 1);
    assert!(
        catalog.conflicts.iter().all(|conflict| conflict.contains("already belongs to service backend in"))
    );
    assert_eq!(catalog.conflicts.len(), 2);
}

#[test]
fn only_the_best_health_there_is_gets_connections() {
    let weights = |healths: &[Health]| {
        let addresses = ["10.0.0.1", "10.0.0.2", "10.0.0.3"];
        let list: Vec<_> = addresses.into_iter().zip(healths.iter().copied()).collect();
        let desired = build(&[&[service("a", 80, None, &list)]]).desired(&Nowhere);
        desired.values().next().unwrap().backends.values().copied().collect::<Vec<_>>()
    };
    use Health::{Draining, Healthy, Unhealthy};
    assert_eq!(weights(&[Healthy, Unhealthy, Draining]), [100, 0, 0]);
    assert_eq!(weights(&[Unhealthy, Unhealthy, Draining]), [100, 100, 0]);
    assert_eq!(weights(&[Draining, Draining, Draining]), [100, 100, 100]);
}

#[test]
fn what_is_only_kept_does_not_change_what_the_maps_held_already() {
    struct Adopted(Frontend);
    impl Node for Adopted {
        fn zone(&self) -> Option<&str> {
            None
        }

        fn is_adopted(&self, frontend: &Frontend) -> bool {
            *frontend == self.0
        }

        fn is_ejected(&self, _: &Frontend, _: &Endpoint) -> bool {
            false
        }

        fn age(&self, _: &Frontend, _: &Endpoint) -> Option<Duration> {
            None
        }
    }
    let dir = TempDir::new().unwrap();
    let mut vips = Vips::open(dir.path(), vec!["127.128.0.0/10".parse().unwrap()]).unwrap();
    let two = ["a", "b"].map(|name| service(name, 80, None, &[("10.0.0.1", Health::Healthy)])).to_vec();
    let kept = Snapshot { kept: said(&two).services, ..Snapshot::default() };
    let said = Snapshot { complete: false, ..said(&two) };
    let catalog = Catalog::build(&[Some(Arc::new(kept))], &mut vips);
    assert_eq!((catalog.services.len(), catalog.prune()), (2, Prune::No));
    let first = *catalog.desired(&Nowhere).keys().next().unwrap();
    let desired = catalog.desired(&Adopted(first));
    assert!(desired.len() == 1 && !desired.contains_key(&first));
    let catalog = Catalog::build(&[Some(Arc::new(said))], &mut vips);
    assert_eq!(catalog.desired(&Adopted(first)).len(), 2);
}

#[test]
fn nothing_is_pruned_before_every_registry_has_delivered() {
    let dir = TempDir::new().unwrap();
    let mut vips = Vips::open(dir.path(), vec!["127.128.0.0/10".parse().unwrap()]).unwrap();
    let full = Some(Arc::new(Snapshot { complete: true, ..Snapshot::default() }));
    let part = Some(Arc::new(Snapshot::default()));
    assert_eq!(Catalog::build(&[full.clone(), full.clone()], &mut vips).prune(), Prune::Yes);
    assert_eq!(Catalog::build(&[full.clone(), None], &mut vips).prune(), Prune::No);
    assert_eq!(Catalog::build(&[full, part], &mut vips).prune(), Prune::No);
    assert_eq!(Catalog::build(&[], &mut vips).prune(), Prune::No);
}

/// Catalogs that follow one another are those that are built anew, or are built anew.
#[test]
fn what_follows_is_what_would_be_built() {
    use Health::{Healthy, Unhealthy};
    let dir = TempDir::new().unwrap();
    let ranges = ["127.128.0.0/10", "fd00:6d65:7368::/96"].map(|range| range.parse().unwrap());
    let mut vips = Vips::open(dir.path(), ranges.to_vec()).unwrap();
    let given = Some("127.128.0.9");
    let (one, other, six) = (("10.0.0.1", Healthy), ("10.0.0.2", Healthy), ("fd00::1", Healthy));
    let mut alias = service("a", 80, None, &[one]);
    alias.aliases = vec!["b".into()];
    let steps = [
        (service("a", 80, None, &[one, other]), true),
        (service("a", 80, None, &[("10.0.0.1", Unhealthy)]), true),
        (service("a", 80, None, &[one, six]), false),
        (service("a", 80, given, &[one]), false),
        (service("a", 81, None, &[one]), false),
        (alias, false),
    ];
    let second = Some(Arc::new(said(&[service("c", 80, given, &[other]), service("a", 80, None, &[other])])));
    for (new, follows) in steps {
        let first = said(&[service("a", 80, None, &[one]), service("b", 80, None, &[])]);
        let now = said(&[new, service("b", 80, None, &[])]);
        let before = [Some(Arc::new(first)), second.clone()];
        let now = [Some(Arc::new(now)), second.clone()];
        let catalog = Catalog::build(&before, &mut vips);
        let built = Catalog::build(&now, &mut vips);
        let followed = catalog.follow(&before, &now);
        assert_eq!(followed, follows.then_some(built.clone()));
        assert_ne!(built, catalog);
        let vips =
            |catalog: &Catalog| catalog.services.values().map(|entry| entry.vips.clone()).collect::<Vec<_>>();
        let changes = built.changes(&catalog);
        assert_eq!(changes.map(|changes| changes.len()), (vips(&built) == vips(&catalog)).then_some(1));
    }
    // Nothing of the second registry's is followed where the first one's counts.
    let before = [Some(Arc::new(said(&[service("a", 80, None, &[one])]))), second.clone()];
    let third = said(&[service("c", 80, given, &[other]), service("a", 80, None, &[one])]);
    let catalog = Catalog::build(&before, &mut vips);
    assert_eq!(catalog.follow(&before, &[before[0].clone(), Some(Arc::new(third))]), None);
    assert_eq!(catalog.follow(&before, &before), Some(catalog.clone()));
    assert_eq!(catalog.follow(&before[..1], &before), None);
}
