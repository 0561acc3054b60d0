//! Maps of another layout, an older or a newer version's: what established sockets, ejections and
//! affinities need of them is taken over.
//!
//! Services and backends come from the registries, or from what these last delivered; ids and the
//! packing of words may be others. What is read here means the same in every layout: `FRONTENDS`,
//! `SOCKETS`, the first words of `CONNECTIONS`, and, where their entries have our sizes, `BACKENDS`,
//! `HEALTH` and `AFFINITY`. A map whose entries get another meaning gets another name. `ORIGIN` and
//! `PEERS`, the storage of sockets, cannot be written from outside: what only they have is left behind.

use std::{collections::BTreeMap, path::Path};

use aya::maps::{Array, HashMap, Map, MapData};
use mesh_common::{
    abi::{AffinityWord, Backend, Client, Connection, Frontend, map},
    health::HealthWord,
};

use super::{
    Maps, Pins, Result, Sockets, map_error,
    maps::{entries, words},
    pins::{is_in_use, pinned},
};
use crate::{
    plan::{Applied, Endpoint},
    sys::Words,
};

/// The maps that the running programs use.
pub(super) struct Old {
    /// The frontend of each service id there.
    frontends: BTreeMap<u32, Frontend>,
    backends: BTreeMap<u32, Backend>,
    health: Option<Words>,
    affinity: Option<HashMap<MapData, Client, u64>>,
    cookies: Words,
    places: u32,
    connections: Words,
    /// Words of a connection there.
    length: u32,
}

impl Old {
    /// None if the running programs use maps of our layout, or if no programs run.
    pub(super) fn open(pins: &Pins) -> Result<Option<Self>> {
        for layout in pins.layouts()? {
            if layout != pins.maps() && is_in_use(pins, &layout)? {
                return Self::open_in(&layout).map(Some);
            }
        }
        Ok(None)
    }

    fn open_in(dir: &Path) -> Result<Self> {
        let frontends = pinned(dir, map::FRONTENDS, size_of::<Frontend>(), size_of::<u32>())?;
        let frontends = HashMap::<_, Frontend, u32>::try_from(Map::HashMap(frontends));
        let frontends = frontends.map_err(map_error(map::FRONTENDS))?;
        let (cookies, places) = of_words(dir, map::SOCKETS)?;
        let (connections, connection_words) = of_words(dir, map::CONNECTIONS)?;
        Ok(Self {
            frontends: frontends.iter().flatten().map(|(frontend, id)| (id, frontend)).collect(),
            backends: backends(dir).unwrap_or_default(),
            health: health(dir).ok(),
            affinity: affinity(dir).ok(),
            cookies,
            places,
            connections,
            length: connection_words / places,
        })
    }

    /// Takes over ejections and affinities. No program may use our maps yet.
    pub(super) fn carry_tables(&self, maps: &mut Maps, pins: &Pins, applied: &Applied) -> Result<()> {
        if let Some(health) = &self.health {
            for id in self.backends.keys() {
                let word = HealthWord(health.load(*id));
                if let Some(new) = self.backend(applied, *id).filter(|_| word.is_ejected()) {
                    maps.health.store(new, word.0);
                }
            }
            maps.recount(&maps.dump()?);
        }
        let mut to = affinity(&pins.maps())?;
        for (client, word) in self.affinity.iter().flat_map(|affinity| affinity.iter()).flatten() {
            let word = AffinityWord(word);
            let frontend = self.frontends.get(&client.service);
            if let Some(service) = frontend.and_then(|frontend| applied.frontends.get(frontend))
                && let Some(backend) = self.backend(applied, word.backend())
            {
                let client = Client::new(client.workload, *service);
                to.insert(client, word.moved_to(backend).0, 0).map_err(map_error(map::AFFINITY))?;
            }
        }
        Ok(())
    }

    /// Takes over the sockets that are not known yet; returns how many there were, and for how many
    /// there was no place.
    pub(super) fn carry_sockets(&self, sockets: &Sockets, applied: &Applied) -> (usize, usize) {
        let (mut carried, mut lost) = (0, 0);
        for place in 0..self.places {
            let cookie = self.cookies.load(place);
            if cookie == 0 || sockets.has(cookie) {
                continue;
            }
            if sockets.adopt(cookie, &self.connection(applied, place)) {
                carried += 1;
            } else {
                lost += 1;
            }
        }
        (carried, lost)
    }

    /// A socket's connection, with our ids in it: none where a service or a backend is gone.
    fn connection(&self, applied: &Applied, place: u32) -> Connection {
        let word = |at| self.connections.load(place * self.length + at);
        let mut connection = Connection::from_words([0, 1, 2, 3, 4, 5, 6].map(word));
        let origin = &mut connection.origin;
        let endpoint = Endpoint { address: origin.backend_address, port: origin.backend_port };
        let frontend = self.frontends.get(&origin.service);
        let id = |frontend| applied.frontends.get(frontend).copied();
        origin.service = frontend.and_then(id).unwrap_or(0);
        origin.backend = frontend.and_then(|frontend| applied.backend_id(frontend, &endpoint)).unwrap_or(0);
        if connection.held != 0 {
            connection.held = origin.backend.into();
        }
        connection
    }

    /// Our id of a backend.
    fn backend(&self, applied: &Applied, id: u32) -> Option<u32> {
        let backend = self.backends.get(&id)?;
        let endpoint = Endpoint { address: backend.address, port: backend.port };
        applied.backend_id(self.frontends.get(&backend.service)?, &endpoint)
    }
}

/// An array of whole words, and how many there are.
fn of_words(dir: &Path, name: &'static str) -> Result<(Words, u32)> {
    let data = MapData::from_pin(dir.join(name)).map_err(map_error(name))?;
    let len = entries(&data, name)? * data.info().map_err(map_error(name))?.value_size().div_ceil(8);
    Ok((words(&data, name, len)?, len))
}

fn backends(dir: &Path) -> Result<BTreeMap<u32, Backend>> {
    let data = pinned(dir, map::BACKENDS, size_of::<u32>(), size_of::<Backend>())?;
    let array = Array::<_, Backend>::try_from(Map::Array(data)).map_err(map_error(map::BACKENDS))?;
    Ok((0..).zip(array.iter().flatten()).filter(|(_, backend)| backend.in_use()).collect())
}

fn health(dir: &Path) -> Result<Words> {
    let data = pinned(dir, map::HEALTH, size_of::<u32>(), size_of::<HealthWord>())?;
    words(&data, map::HEALTH, entries(&data, map::HEALTH)?)
}

pub(super) fn affinity(dir: &Path) -> Result<HashMap<MapData, Client, u64>> {
    let data = pinned(dir, map::AFFINITY, size_of::<Client>(), size_of::<u64>())?;
    HashMap::try_from(Map::LruHashMap(data)).map_err(map_error(map::AFFINITY))
}
