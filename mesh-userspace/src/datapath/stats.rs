//! What the kernel counts.

use std::{collections::BTreeMap, os::fd::AsFd};

use aya::maps::{Map, MapData, PerCpuArray};
use mesh_common::{
    abi::{Client, Cookies, map},
    health::HealthWord,
    outcome::Outcome,
};

use super::{
    Pins, Result, io_error, map_error,
    maps::{entries, words},
    pins::pinned,
    sockets::PLACES,
};
use crate::sys::{self, Words};

/// What the kernel counts.
pub struct Stats {
    outcomes: PerCpuArray<MapData, u64>,
    load: Words,
    health: Words,
    cookies: Words,
    affinity: MapData,
}

impl Stats {
    pub fn open(pins: &Pins) -> Result<Self> {
        let data = pinned(&pins.maps(), map::STATS, size_of::<u32>(), size_of::<u64>())?;
        let outcomes = PerCpuArray::try_from(Map::PerCpuArray(data)).map_err(map_error(map::STATS))?;
        let load = pinned(&pins.maps(), map::LOAD, size_of::<u32>(), size_of::<u64>())?;
        let health = pinned(&pins.maps(), map::HEALTH, size_of::<u32>(), size_of::<u64>())?;
        let len = entries(&load, map::LOAD)?;
        let (load, health) = (words(&load, map::LOAD, len)?, words(&health, map::HEALTH, len)?);
        let cookies = pinned(&pins.maps(), map::SOCKETS, size_of::<u32>(), size_of::<Cookies>())?;
        let cookies = words(&cookies, map::SOCKETS, PLACES)?;
        let affinity = pinned(&pins.maps(), map::AFFINITY, size_of::<Client>(), size_of::<u64>())?;
        Ok(Self { outcomes, load, health, cookies, affinity })
    }

    /// How many places for sockets are taken, and how many there are.
    pub fn places(&self) -> (u32, u32) {
        let taken = (0..PLACES).filter(|index| self.cookies.load(*index) != 0).count();
        (u32::try_from(taken).expect("no more than there are"), PLACES)
    }

    /// How many affinities are remembered, and how many can be.
    pub fn affinities(&self) -> Result<(u32, u32)> {
        let used = sys::count(self.affinity.fd().as_fd(), size_of::<Client>(), size_of::<u64>());
        Ok((
            used.map_err(io_error("cannot count the entries of AFFINITY"))?,
            entries(&self.affinity, map::AFFINITY)?,
        ))
    }

    /// Whether connects to a backend fail, so that the kernel avoids it.
    pub fn is_ejected(&self, backend: u32) -> bool {
        HealthWord(self.health.load(backend)).is_ejected()
    }

    /// How many sockets are counted on a backend.
    pub fn load(&self, backend: u32) -> u64 {
        self.load.load(backend)
    }

    /// The outcome counters, summed over CPUs.
    pub fn outcomes(&self) -> Result<BTreeMap<&'static str, u64>> {
        let read = |outcome: Outcome| {
            let values = self.outcomes.get(&(outcome as u32), 0).map_err(map_error(map::STATS))?;
            Ok((outcome.name(), values.iter().sum()))
        };
        Outcome::ALL.into_iter().map(read).collect()
    }
}
