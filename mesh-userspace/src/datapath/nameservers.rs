//! Where the daemon listens for queries, and from which network namespaces they come that it does not
//! listen in yet.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use aya::maps::{HashMap, Map, MapData, RingBuf};
use mesh_common::abi::{NameServer, Namespace, Sight, map};

use super::{Pins, Result, map_error, pins::pinned};

/// The map of listeners. Only sockets that are open count there: a listener that has gone is as good
/// as none.
pub struct NameServers(HashMap<MapData, Namespace, NameServer>);

impl NameServers {
    pub fn open(pins: &Pins) -> Result<Self> {
        let data = pinned(&pins.maps(), map::NAMESERVERS, size_of::<Namespace>(), size_of::<NameServer>())?;
        Ok(Self(HashMap::try_from(Map::HashMap(data)).map_err(map_error(map::NAMESERVERS))?))
    }

    pub fn set(&mut self, namespace: Namespace, server: NameServer) -> Result<()> {
        self.0.insert(namespace, server, 0).map_err(map_error(map::NAMESERVERS))
    }

    /// Forgets every namespace but these: also those that were only seen, so that they are told of again.
    pub fn retain(&mut self, keep: impl Fn(&Namespace) -> bool) -> Result<()> {
        let known: Vec<_> = self.0.keys().flatten().collect();
        for namespace in known.iter().filter(|namespace| !keep(namespace)) {
            match self.0.remove(namespace) {
                Err(error) if !is_gone(&error) => return Err(map_error(map::NAMESERVERS)(error)),
                _ => {}
            }
        }
        Ok(())
    }
}

fn is_gone(error: &aya::maps::MapError) -> bool {
    use aya::maps::MapError;
    match error {
        MapError::KeyNotFound => true,
        MapError::SyscallError(error) => error.io_error.kind() == io::ErrorKind::NotFound,
        _ => false,
    }
}

/// The cgroups whose queries go where they are sent.
pub struct Excluded(HashMap<MapData, u64, u64>);

impl Excluded {
    pub fn open(pins: &Pins) -> Result<Self> {
        let data = pinned(&pins.maps(), map::EXCLUDED, size_of::<u64>(), size_of::<u64>())?;
        Ok(Self(HashMap::try_from(Map::HashMap(data)).map_err(map_error(map::EXCLUDED))?))
    }

    /// These and no others, by their ids.
    pub fn set(&mut self, cgroups: &BTreeSet<u64>) -> Result<()> {
        let known: BTreeSet<_> = self.0.keys().flatten().collect();
        for cgroup in cgroups.difference(&known) {
            self.0.insert(cgroup, 0, 0).map_err(map_error(map::EXCLUDED))?;
        }
        for cgroup in known.difference(cgroups) {
            self.0.remove(cgroup).map_err(map_error(map::EXCLUDED))?;
        }
        Ok(())
    }
}

/// First queries from network namespaces that the daemon does not listen in.
pub struct Sights(RingBuf<MapData>);

impl Sights {
    pub fn open(pins: &Pins) -> Result<Self> {
        let data = MapData::from_pin(pins.maps().join(map::SIGHTS)).map_err(map_error(map::SIGHTS))?;
        Ok(Self(RingBuf::try_from(Map::RingBuf(data)).map_err(map_error(map::SIGHTS))?))
    }

    /// Takes what there is.
    pub fn take(&mut self) -> Vec<Sight> {
        let mut sights = Vec::new();
        while let Some(entry) = self.0.next() {
            if let Ok(bytes) = <[u8; size_of::<Sight>()]>::try_from(&*entry) {
                sights.push(Sight::from_bytes(bytes));
            }
        }
        sights
    }
}

impl AsFd for Sights {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
