//! What a record must fulfil, whoever wrote it: registries are hostile input.

use std::net::IpAddr;

use ipnet::IpNet;

/// The part of the configuration that records are checked against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    pub vip_ranges: Vec<IpNet>,
    pub allow: Vec<IpNet>,
    pub allow_loopback: bool,
}

impl Rules {
    /// Whether a VIP may be used.
    pub fn vip(&self, vip: IpAddr) -> Result<(), String> {
        if in_any(&self.vip_ranges, vip) {
            return Ok(());
        }
        Err(format!("vip {vip} is outside the configured ranges ({})", list(&self.vip_ranges)))
    }

    /// Whether a backend may have this address: a hostile registry must not reach what only the
    /// node, or nobody, should reach.
    pub fn backend(&self, address: IpAddr) -> Result<(), String> {
        let address = address.to_canonical();
        let link_local = match address {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
        let why = if in_any(&self.vip_ranges, address) {
            "lies in a VIP range"
        } else if address.is_unspecified() {
            "is the unspecified address"
        } else if address.is_multicast() || broadcast {
            "is not a unicast address"
        } else if link_local {
            "is link-local"
        } else if address.is_loopback() {
            if self.allow_loopback {
                return Ok(());
            }
            "is a loopback address (backends.allow_loopback permits it)"
        } else if !in_any(&self.allow, address) {
            "is not in backends.allow"
        } else {
            return Ok(());
        };
        Err(format!("address {address} {why}"))
    }
}

/// A host name: labels of letters, digits, `-` and `_`, 253 characters at most.
pub fn dns_name(what: &str, name: &str) -> Result<(), String> {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    if name.len() <= 253 && name.split('.').all(label) {
        return Ok(());
    }
    Err(format!("{what} {name:?} is not a DNS name"))
}

/// The name of a port, as RFC 6335 has it: never one that could be a number.
pub fn port_name(name: &str) -> Result<(), String> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
    let ends = name.starts_with('-') || name.ends_with('-') || name.contains("--");
    if (1..=15).contains(&name.len())
        && name.bytes().all(allowed)
        && name.bytes().any(|b| b.is_ascii_alphabetic())
        && !ends
    {
        return Ok(());
    }
    Err(format!("port_name {name:?} is not 1 to 15 letters, digits and single dashes, with a letter"))
}

/// An instance id: what Cloud Map allows, in Kubernetes' length.
pub fn instance_id(id: &str) -> Result<(), String> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"_/:.@-".contains(&b);
    if (1..=253).contains(&id.len()) && id.bytes().all(allowed) {
        return Ok(());
    }
    Err(format!("instance id {id:?} is not 1 to 253 letters, digits and _/:.@-"))
}

/// What others wrote, within a message: on one line, and nothing that a terminal acts on.
pub fn shown(text: &impl ToString) -> String {
    let escaped = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.into() };
    text.to_string().chars().map(escaped).collect()
}

fn in_any(ranges: &[IpNet], address: IpAddr) -> bool {
    ranges.iter().any(|range| range.contains(&address))
}

fn list(ranges: &[IpNet]) -> String {
    let ranges: Vec<_> = ranges.iter().map(ToString::to_string).collect();
    ranges.join(", ")
}

#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn for_tests() -> Rules {
    Rules {
        vip_ranges: vec!["127.128.0.0/10".parse().unwrap(), "fd00:6d65:7368::/96".parse().unwrap()],
        allow: vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()],
        allow_loopback: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_cannot_name_an_address_that_only_the_node_reaches() {
        let rules = for_tests();
        for (address, why) in [
            ("127.0.0.1", "loopback"),
            ("::1", "loopback"),
            ("::ffff:127.0.0.1", "loopback"),
            ("169.254.169.254", "link-local"),
            ("::ffff:169.254.169.254", "link-local"),
            ("fe80::1", "link-local"),
            ("0.0.0.0", "unspecified"),
            ("::", "unspecified"),
            ("224.0.0.1", "unicast"),
            ("ff02::1", "unicast"),
            ("255.255.255.255", "unicast"),
            ("127.128.0.10", "VIP range"),
            ("fd00:6d65:7368::1", "VIP range"),
        ] {
            let refused = rules.backend(address.parse().unwrap()).unwrap_err();
            assert!(refused.contains(why), "{address}: {refused}");
        }
        assert_eq!(rules.backend("10.0.2.45".parse().unwrap()), Ok(()));
    }

    #[test]
    fn loopback_is_a_matter_of_configuration_but_a_vip_never_is() {
        let rules = Rules { allow_loopback: true, allow: vec!["10.0.0.0/8".parse().unwrap()], ..for_tests() };
        assert_eq!(rules.backend("127.0.0.1".parse().unwrap()), Ok(()));
        assert!(rules.backend("127.128.0.1".parse().unwrap()).is_err());
        assert!(rules.backend("192.168.0.1".parse().unwrap()).unwrap_err().contains("backends.allow"));
    }

    #[test]
    fn a_port_s_name_is_no_number() {
        for good in ["http", "h2", "x-1"] {
            assert_eq!(port_name(good), Ok(()));
        }
        for bad in ["", "80", "-a", "a-", "a--b", "a_b", "a.b", "abcdefghijklmnop"] {
            assert!(port_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_dns_names() {
        for good in ["backend", "my_service.v2", "a-b"] {
            assert_eq!(dns_name("name", good), Ok(()));
        }
        for bad in ["", "a..b", "a b", "é", &"a".repeat(64), "a/b"] {
            assert!(dns_name("name", bad).is_err(), "{bad}");
        }
    }
}
