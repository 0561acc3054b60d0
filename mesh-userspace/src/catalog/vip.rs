//! VIPs for the names that are given none: derived from the name, unique, kept in a file. Those of a name
//! that is gone are another's after a day at the earliest: clients may know them for a while.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use serde::de::DeserializeOwned;
use xxhash_rust::xxh3::xxh3_128_with_seed;

use crate::durable;

/// How many places are tried for a name before a range counts as full.
const TRIES: u64 = 4096;

/// How many hours a name must be gone before its VIPs are free. Hours in which a daemon ran: a clock that
/// jumps does not shorten them.
const KEPT: u32 = 24;

/// The VIPs handed out so far.
#[derive(Debug)]
pub struct Vips {
    ranges: Vec<IpNet>,
    path: PathBuf,
    /// "name.namespace" → its VIPs.
    given: BTreeMap<String, BTreeSet<IpAddr>>,
    taken: HashSet<IpAddr>,
    changed: bool,
    /// In a file of its own: programs that do not free VIPs read the other one.
    gone_path: PathBuf,
    /// Names that are gone, and for how many whole hours at least.
    gone: BTreeMap<String, u32>,
    gone_changed: bool,
}

impl Vips {
    /// Reads what earlier runs handed out. Without it, most names get the VIPs again that they had, because
    /// those follow from the names.
    pub fn open(state_dir: &Path, ranges: Vec<IpNet>) -> io::Result<Self> {
        let path = state_dir.join("vips.json");
        let given: BTreeMap<String, BTreeSet<IpAddr>> = read(&path)?;
        let gone_path = state_dir.join("vips-gone.json");
        let mut gone: BTreeMap<String, u32> = read(&gone_path)?;
        gone.retain(|name, _| given.contains_key(name));
        let taken = given.values().flatten().copied().collect();
        Ok(Self { ranges, path, given, taken, changed: false, gone_path, gone, gone_changed: false })
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
        self.gone_changed |= self.gone.remove(&key).is_some();
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

    /// To be told each hour while every registry's content is known, with the names that there are: frees
    /// the VIPs of those that have been gone for long enough.
    pub fn hour(&mut self, present: &HashSet<String>) {
        self.gone.retain(|name, _| !present.contains(name));
        for name in self.given.keys().filter(|name| !present.contains(*name)) {
            self.gone.entry(name.clone()).and_modify(|hours| *hours += 1).or_default();
            self.gone_changed = true;
        }
        for (name, _) in self.gone.extract_if(.., |_, hours| *hours >= KEPT) {
            tracing::info!("{name} has been gone for {KEPT} hours: its VIPs may be others' from now on");
            for vip in self.given.remove(&name).into_iter().flatten() {
                self.taken.remove(&vip);
            }
            self.changed = true;
        }
    }

    /// Writes what has changed to disk, whole or not at all.
    pub fn save(&mut self) -> io::Result<()> {
        if self.changed {
            durable::write(&self.path, &serde_json::to_vec_pretty(&self.given)?)?;
            self.changed = false;
        }
        if self.gone_changed {
            durable::write(&self.gone_path, &serde_json::to_vec_pretty(&self.gone)?)?;
            self.gone_changed = false;
        }
        Ok(())
    }
}

/// A file of an earlier run. One that holds something else is set aside.
fn read<T: DeserializeOwned + Default>(path: &Path) -> io::Result<T> {
    match fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).or_else(|error| {
            let aside = path.with_extension("json.spoilt");
            tracing::error!("{}: {error}; it is now {}", path.display(), aside.display());
            fs::rename(path, aside)?;
            Ok(T::default())
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(T::default()),
        Err(error) => Err(error),
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

    /// So many hours in which these names are there.
    fn hours(vips: &mut Vips, count: u32, present: &[&str]) {
        let present = present.iter().map(|name| format!("{name}.service.local")).collect();
        (0..count).for_each(|_| vips.hour(&present));
    }

    #[test]
    fn the_vip_of_a_name_that_is_gone_is_no_other_s_for_a_day_and_free_after_it() {
        let dir = TempDir::new().unwrap();
        let none = BTreeSet::new();
        // Room for one.
        let open = || Vips::open(dir.path(), ranges(&["127.128.0.1/32"])).unwrap();
        let mut vips = open();
        let get = |vips: &mut Vips, name| vips.get("service.local", name, true, &none);
        let vip = get(&mut vips, "a");
        assert!(vip.is_some());
        hours(&mut vips, 100, &["a"]);
        vips.save().unwrap();
        assert!(get(&mut vips, "b").is_none(), "it is there all the time");

        // What is not a whole hour does not count, and a restart does not begin anew.
        hours(&mut vips, 12, &[]);
        vips.save().unwrap();
        let mut vips = open();
        hours(&mut vips, 12, &[]);
        assert!(get(&mut vips, "b").is_none());
        // Somebody who comes back has it as before, and has another day.
        assert_eq!(get(&mut vips, "a"), vip);
        hours(&mut vips, 24, &[]);
        vips.save().unwrap();
        let mut vips = open();
        assert!(get(&mut vips, "b").is_none());
        hours(&mut vips, 1, &[]);
        vips.save().unwrap();
        assert_eq!(get(&mut open(), "b"), vip);
        assert_eq!(get(&mut vips, "b"), vip);
        assert!(get(&mut vips, "a").is_none());
    }

    #[test]
    fn without_the_file_of_names_that_are_gone_their_day_begins_anew() {
        let dir = TempDir::new().unwrap();
        let none = BTreeSet::new();
        let open = || Vips::open(dir.path(), ranges(&["127.128.0.1/32"])).unwrap();
        let mut vips = open();
        assert!(vips.get("service.local", "a", true, &none).is_some());
        hours(&mut vips, 24, &[]);
        vips.save().unwrap();
        fs::write(dir.path().join("vips-gone.json"), "nonsense").unwrap();
        let mut vips = open();
        hours(&mut vips, 24, &[]);
        assert!(vips.get("service.local", "b", true, &none).is_none());
        hours(&mut vips, 1, &[]);
        assert!(vips.get("service.local", "b", true, &none).is_some());
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
