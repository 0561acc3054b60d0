//! VIPs for the names that are given none: derived from the name, unique, kept in a file.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use xxhash_rust::xxh3::xxh3_128_with_seed;

use crate::durable;

/// How many places are tried for a name before a range counts as full.
const TRIES: u64 = 4096;

/// The VIPs handed out so far.
#[derive(Debug)]
pub struct Vips {
    ranges: Vec<IpNet>,
    path: PathBuf,
    /// "name.namespace" → its VIPs.
    given: BTreeMap<String, BTreeSet<IpAddr>>,
    taken: HashSet<IpAddr>,
    changed: bool,
}

impl Vips {
    /// Reads what earlier runs handed out. A file that holds something else is set aside: most
    /// names get the VIPs again that they had, because those follow from the names.
    pub fn open(state_dir: &Path, ranges: Vec<IpNet>) -> io::Result<Self> {
        let path = state_dir.join("vips.json");
        let given: BTreeMap<String, BTreeSet<IpAddr>> = match fs::read(&path) {
            Ok(text) => match serde_json::from_slice(&text) {
                Ok(given) => given,
                Err(error) => {
                    let aside = path.with_extension("json.spoilt");
                    tracing::error!("{}: {error}; it is now {}", path.display(), aside.display());
                    fs::rename(&path, aside)?;
                    BTreeMap::new()
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error),
        };
        let taken = given.values().flatten().copied().collect();
        Ok(Self { ranges, path, given, taken, changed: false })
    }

    /// The VIP of a name in one family. A name keeps what it was given as long as the ranges
    /// hold it; a new one goes where its hash says, or to the next free place after that.
    /// `elsewhere` are addresses that services name themselves.
    pub fn get(
        &mut self,
        namespace: &str,
        name: &str,
        v4: bool,
        elsewhere: &BTreeSet<IpAddr>,
    ) -> Option<IpAddr> {
        let key = format!("{name}.{namespace}");
        let in_range = |vip: &&IpAddr| self.ranges.iter().any(|range| range.contains(*vip));
        let known =
            self.given.get(&key).into_iter().flatten().filter(|vip| vip.is_ipv4() == v4).find(in_range);
        if let Some(vip) = known {
            return Some(*vip);
        }
        let ranges = self.ranges.iter().filter(|range| range.addr().is_ipv4() == v4);
        let mut places = ranges.flat_map(|range| (0..TRIES).map(|attempt| place(range, &key, attempt)));
        let vip = places.find(|vip| !self.taken.contains(vip) && !elsewhere.contains(vip))?;
        self.given.entry(key).or_default().insert(vip);
        self.taken.insert(vip);
        self.changed = true;
        Some(vip)
    }

    /// Writes new VIPs to disk, whole or not at all.
    pub fn save(&mut self) -> io::Result<()> {
        if !self.changed {
            return Ok(());
        }
        durable::write(&self.path, &serde_json::to_vec_pretty(&self.given)?)?;
        self.changed = false;
        Ok(())
    }
}

/// A host address of `range`, the same for the same name on every node.
fn place(range: &IpNet, key: &str, attempt: u64) -> IpAddr {
    let hash = xxh3_128_with_seed(key.as_bytes(), attempt);
    let host_bits = range.max_prefix_len() - range.prefix_len();
    // The first and the last address of a range are left alone, where there are others.
    let hosts =
        1u128.checked_shl(host_bits.into()).map_or(u128::MAX, |all| if all > 2 { all - 2 } else { all });
    let offset = hash % hosts + u128::from(host_bits > 1);
    match range.network() {
        IpAddr::V4(net) => {
            let offset = u32::try_from(offset).expect("below 2^32 in an IPv4 range");
            Ipv4Addr::from_bits(net.to_bits() + offset).into()
        }
        IpAddr::V6(net) => Ipv6Addr::from_bits(net.to_bits() + offset).into(),
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn ranges(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|range| range.parse().unwrap()).collect()
    }

    #[test]
    fn a_name_keeps_its_vip_over_restarts() {
        let dir = TempDir::new().unwrap();
        let all = ranges(&["127.128.0.0/10", "fd00:6d65:7368::/96"]);
        let mut vips = Vips::open(dir.path(), all.clone()).unwrap();
        let none = BTreeSet::new();
        let v4 = vips.get("service.local", "a", true, &none).unwrap();
        let v6 = vips.get("service.local", "a", false, &none).unwrap();
        assert!(all[0].contains(&v4) && all[1].contains(&v6));
        vips.save().unwrap();

        // Another name takes no part of it, and a service that names this very address changes nothing.
        let mut vips = Vips::open(dir.path(), all).unwrap();
        assert_eq!(vips.get("service.local", "a", true, &BTreeSet::from([v4])), Some(v4));
        assert_eq!(vips.get("service.local", "a", false, &none), Some(v6));
    }

    #[test]
    fn two_nodes_agree() {
        let vip = |name| {
            let dir = TempDir::new().unwrap();
            let mut vips = Vips::open(dir.path(), ranges(&["127.128.0.0/10"])).unwrap();
            vips.get("service.local", name, true, &BTreeSet::new()).unwrap()
        };
        assert_eq!(vip("backend"), vip("backend"));
        assert_ne!(vip("backend"), vip("frontend"));
    }

    #[test]
    fn a_small_range_is_used_up_to_the_last_address() {
        let dir = TempDir::new().unwrap();
        let mut vips = Vips::open(dir.path(), ranges(&["127.128.0.0/29"])).unwrap();
        let taken = BTreeSet::from(["127.128.0.3".parse().unwrap()]);
        let mut given = BTreeSet::new();
        for n in 0..5 {
            given.insert(vips.get("service.local", &format!("s{n}"), true, &taken).unwrap());
        }
        assert_eq!(given.len(), 5);
        assert_eq!(vips.get("service.local", "one-more", true, &taken), None);
    }

    #[test]
    fn a_spoilt_file_is_set_aside() {
        let dir = TempDir::new().unwrap();
        let none = BTreeSet::new();
        let open = || Vips::open(dir.path(), ranges(&["127.128.0.0/10"])).unwrap();
        let vip = open().get("service.local", "a", true, &none);
        fs::write(dir.path().join("vips.json"), "{").unwrap();
        assert_eq!(open().get("service.local", "a", true, &none), vip);
        assert_eq!(fs::read_to_string(dir.path().join("vips.json.spoilt")).unwrap(), "{");
    }
}
