//! The weights in effect: which instances get new connections, and in what proportion.

use crate::model::{Health, Instance, Service};

/// An instance and what the node knows of it.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    pub instance: &'a Instance,
    /// Its connects fail, so the kernel avoids it.
    pub ejected: bool,
    /// The part of its share that slow start gives it by now, up to 1.
    pub warmth: f64,
}

/// A zone takes all of the node's connections while this much of it works: Envoy's
/// overprovisioning factor of 1.4, the other way round.
const ZONE_SUFFICES: f64 = 1.0 / 1.4;

/// The weight of each instance; zero for one that gets no new connections.
pub fn weights(service: &Service, instances: &[Seen<'_>], zone: Option<&str>) -> Vec<u16> {
    let usable = usable(service, instances.iter().map(|seen| seen.instance));
    let given =
        |seen: &Seen<'_>| if usable.contains(&seen.instance.health) { seen.instance.weight } else { 0 };
    let mut shares: Vec<f64> = instances.iter().map(|seen| f64::from(given(seen)) * seen.warmth).collect();
    let local = |seen: &Seen<'_>| zone.is_some() && seen.instance.zone.as_deref() == zone;
    prefer(instances, &mut shares, local);
    let plain = instances.iter().zip(&shares).all(|(seen, share)| *share == f64::from(given(seen)));
    if plain {
        return instances.iter().map(given).collect();
    }
    let largest = shares.iter().copied().fold(0.0, f64::max);
    // As fine as a weight can be, and never none for who gets some.
    let scaled = |share: &f64| if *share > 0.0 { (share / largest * 65_535.0).max(1.0) } else { 0.0 };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 65,535")]
    shares.iter().map(|share| scaled(share).round() as u16).collect()
}

/// The instances that get new connections, as far as registries know: of all families, from any zone.
pub fn selectable(service: &Service) -> impl Iterator<Item = &Instance> {
    let usable = usable(service, service.instances.iter());
    service.instances.iter().filter(|one| one.weight > 0 && usable.contains(&one.health))
}

/// Whose turn it is: healthy instances; with too few of them unhealthy ones as well, because
/// health may be wrong but too few surely are; where there is neither, draining ones.
fn usable<'a>(service: &Service, instances: impl Iterator<Item = &'a Instance>) -> &'static [Health] {
    let (mut healthy, mut unhealthy) = (0, 0);
    for instance in instances.filter(|instance| instance.weight > 0) {
        match instance.health {
            Health::Healthy => healthy += 1,
            Health::Unhealthy => unhealthy += 1,
            Health::Draining => {}
        }
    }
    let panic = healthy * 100 < (healthy + unhealthy) * usize::from(service.panic_percent);
    match (healthy, unhealthy) {
        (0, 0) => &[Health::Draining],
        (0, _) => &[Health::Unhealthy],
        _ if panic => &[Health::Healthy, Health::Unhealthy],
        _ => &[Health::Healthy],
    }
}

/// Leaves others only what the node's own zone cannot take.
fn prefer(instances: &[Seen<'_>], shares: &mut [f64], is_local: impl Fn(&Seen<'_>) -> bool) {
    let (mut all, mut able, mut working, mut others) = (0.0, 0.0, 0.0, 0.0);
    for (seen, share) in instances.iter().zip(shares.iter()) {
        if !is_local(seen) {
            others += share;
            continue;
        }
        if seen.instance.health != Health::Draining {
            all += f64::from(seen.instance.weight);
        }
        if !seen.ejected && *share > 0.0 {
            // Also while it warms up: a zone that grows can take no less than before.
            able += f64::from(seen.instance.weight);
            working += share;
        }
    }
    if all == 0.0 || others == 0.0 {
        return;
    }
    let part = (able / all / ZONE_SUFFICES).min(1.0);
    if part == 0.0 {
        return;
    }
    // Others together get what is left of 1 where the zone's working ones get `part`.
    let factor = working * (1.0 - part) / part / others;
    for (seen, share) in instances.iter().zip(shares) {
        if !is_local(seen) {
            *share *= factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use super::*;
    use crate::catalog::tests::service;

    fn instance(zone: &str, health: Health, weight: u16) -> Instance {
        Instance {
            id: "x".into(),
            address: "10.0.0.1".parse().unwrap(),
            port: NonZeroU16::MIN,
            weight,
            zone: Some(zone.into()),
            health,
        }
    }

    /// Weights as seen from zone `a`, in percent.
    fn shares(panic_percent: u8, instances: &[(&str, Health, u16)], ejected: &[usize]) -> Vec<f64> {
        let mut service = service("x", 80, None, &[]);
        service.panic_percent = panic_percent;
        let instances: Vec<_> =
            instances.iter().map(|(zone, health, weight)| instance(zone, *health, *weight)).collect();
        let seen = |(n, instance)| Seen { instance, ejected: ejected.contains(&n), warmth: 1.0 };
        let seen: Vec<_> = instances.iter().enumerate().map(seen).collect();
        let weights = weights(&service, &seen, Some("a"));
        let total: f64 = weights.iter().copied().map(f64::from).sum();
        weights.iter().map(|weight| (f64::from(*weight) / total * 100.0).round()).collect()
    }

    use Health::{Draining, Healthy, Unhealthy};

    #[test]
    fn healthy_ones_first_then_unhealthy_then_draining_ones() {
        assert_eq!(
            shares(0, &[("b", Healthy, 1), ("b", Unhealthy, 1), ("b", Draining, 1)], &[]),
            [100.0, 0.0, 0.0]
        );
        assert_eq!(shares(0, &[("b", Unhealthy, 1), ("b", Draining, 1)], &[]), [100.0, 0.0]);
        assert_eq!(shares(0, &[("b", Draining, 1), ("b", Healthy, 0)], &[]), [100.0, 0.0]);
    }

    #[test]
    fn health_is_ignored_when_it_would_leave_too_few() {
        let third = [("b", Healthy, 1), ("b", Unhealthy, 1), ("b", Unhealthy, 1), ("b", Draining, 1)];
        assert_eq!(shares(33, &third, &[]), [100.0, 0.0, 0.0, 0.0]);
        assert_eq!(shares(34, &third, &[]), [33.0, 33.0, 33.0, 0.0]);
    }

    #[test]
    fn the_own_zone_takes_all_while_it_suffices() {
        let healthy = |zone| (zone, Healthy, 100);
        assert_eq!(shares(0, &[healthy("a"), healthy("b"), healthy("b")], &[]), [100.0, 0.0, 0.0]);
        assert_eq!(shares(0, &[healthy("b"), healthy("c")], &[]), [50.0, 50.0]);
        // Three of four are more than 1 / 1.4 of the zone; two are half of it, and take 70 %.
        let zone = [healthy("a"), healthy("a"), healthy("a"), ("a", Unhealthy, 100), healthy("b")];
        assert_eq!(shares(0, &zone, &[]), [33.0, 33.0, 33.0, 0.0, 0.0]);
        let zone = [healthy("a"), healthy("a"), ("a", Unhealthy, 100), ("a", Unhealthy, 100), healthy("b")];
        assert_eq!(shares(0, &zone, &[]), [35.0, 35.0, 0.0, 0.0, 30.0]);
        assert_eq!(shares(0, &[("a", Unhealthy, 1), healthy("b")], &[]), [0.0, 100.0]);
    }

    #[test]
    fn a_zone_whose_connects_fail_does_not_suffice() {
        let healthy = |zone| (zone, Healthy, 100);
        // The ejected one keeps its weight: the kernel avoids it, and tries it again.
        assert_eq!(shares(0, &[healthy("a"), healthy("b")], &[0]), [50.0, 50.0]);
        assert_eq!(shares(0, &[healthy("a"), healthy("a"), healthy("b")], &[0]), [41.0, 41.0, 18.0]);
    }

    #[test]
    fn a_zone_that_grows_keeps_its_clients() {
        let service = service("x", 80, None, &[]);
        let instances = ["a", "a", "b"].map(|zone| instance(zone, Healthy, 100));
        let warmth = [1.0, 0.1, 1.0];
        let seen = |(instance, warmth)| Seen { instance, ejected: false, warmth };
        let seen: Vec<_> = instances.iter().zip(warmth).map(seen).collect();
        assert_eq!(weights(&service, &seen, Some("a")), [65_535, 6554, 0]);
    }

    #[test]
    fn a_new_instance_warms_up() {
        let service = service("x", 80, None, &[]);
        let instance = instance("a", Healthy, 100);
        let seen = |warmth| Seen { instance: &instance, ejected: false, warmth };
        assert_eq!(weights(&service, &[seen(1.0), seen(0.1)], None), [65_535, 6554]);
        assert_eq!(weights(&service, &[seen(1.0), seen(1.0)], None), [100, 100]);
    }
}
