//! The sockets that the kernel keeps count of.

use std::{
    collections::BTreeMap,
    mem::offset_of,
    os::fd::{AsFd, BorrowedFd},
    time::Duration,
};

use aya::maps::MapData;
use mesh_common::{
    abi::{Connection, Cookies, Origin, Port, SETS, Settings, WAYS, map},
    address::Address,
};

use super::{
    Pins, Result,
    maps::{entries, words},
    pins::pinned,
};
use crate::{model::DRAIN, plan::Endpoint, sys::Words};

/// A socket, as `SOCKETS` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    index: u32,
    pub cookie: u64,
    /// The backend on whose count it is; zero if on none.
    pub backend: u64,
    /// The service whose VIP it dialled. The id may be another one's by now.
    pub service: u32,
    /// Where it was sent. It may have dialled something else since.
    pub peer: Endpoint,
}

#[expect(clippy::cast_possible_truncation, reason = "4")]
pub(super) const PLACES: u32 = SETS * WAYS as u32;
const CONNECTION_WORDS: u32 = in_words(size_of::<Connection>());
const PEER_ADDRESS: usize = offset_of!(Connection, origin) + offset_of!(Origin, backend_address);
const PEER_PORT: usize = offset_of!(Connection, origin) + offset_of!(Origin, backend_port);
const SERVICE: usize = offset_of!(Connection, origin) + offset_of!(Origin, service);
const _: () = assert!(offset_of!(Connection, held) == 0 && PEER_ADDRESS.is_multiple_of(8));
const _: () = assert!(in_words(PEER_PORT) == in_words(SERVICE));

/// The places that a socket may have one of.
#[expect(clippy::cast_possible_truncation, reason = "the low bits choose the set; 4")]
fn set_of(cookie: u64) -> std::ops::Range<u32> {
    let first = (cookie as u32 & (SETS - 1)) * WAYS as u32;
    first..first + WAYS as u32
}

/// The word that a byte of a connection is in.
#[expect(clippy::cast_possible_truncation, reason = "at most 64 bytes")]
const fn in_words(bytes: usize) -> u32 {
    (bytes / size_of::<u64>()) as u32
}

/// What a connection says of its socket, as in [`Place`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    pub backend: u64,
    pub service: u32,
    pub peer: Endpoint,
}

impl Record {
    fn read(word: impl Fn(u32) -> u64) -> Self {
        let bytes = |at: usize| word(in_words(at)).to_ne_bytes();
        let mut octets = [0; 16];
        octets[..8].copy_from_slice(&bytes(PEER_ADDRESS));
        octets[8..].copy_from_slice(&bytes(PEER_ADDRESS + 8));
        let rest = bytes(PEER_PORT);
        let (port, service) = (PEER_PORT % size_of::<u64>(), SERVICE % size_of::<u64>());
        let port = u16::from_be_bytes([rest[port], rest[port + 1]]);
        let service = u32::from_ne_bytes(rest[service..service + 4].try_into().expect("4 bytes"));
        let peer = Endpoint { address: Address::from_octets(octets), port: Port::new(port) };
        Self { backend: word(0), service, peer }
    }

    /// From a value of `ORIGIN`.
    pub fn parse(value: &[u8]) -> Option<Self> {
        let words: Vec<_> = value.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word)).collect();
        (value.len() == size_of::<Connection>()).then(|| Self::read(|word| words[word as usize]))
    }
}

/// A backend's count, and how many places hold it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drift {
    pub backend: u32,
    pub count: u64,
    pub held: u64,
}

/// The sockets that have a place in `SOCKETS`.
pub struct Sockets {
    cookies: Words,
    connections: Words,
    load: Words,
    backends: u32,
    settings: Words,
    services: u32,
    storage: MapData,
}

impl Sockets {
    pub fn open(pins: &Pins) -> Result<Self> {
        let cookies = pinned(&pins.maps(), map::SOCKETS, size_of::<u32>(), size_of::<Cookies>())?;
        let connections = pinned(&pins.maps(), map::CONNECTIONS, size_of::<u32>(), size_of::<Connection>())?;
        let load = pinned(&pins.maps(), map::LOAD, size_of::<u32>(), size_of::<u64>())?;
        let settings = pinned(&pins.maps(), map::SETTINGS, size_of::<u32>(), size_of::<Settings>())?;
        let (backends, services) = (entries(&load, map::LOAD)?, entries(&settings, map::SETTINGS)?);
        let storage = pinned(&pins.maps(), map::ORIGIN, size_of::<u32>(), size_of::<Connection>())?;
        Ok(Self {
            storage,
            cookies: words(&cookies, map::SOCKETS, PLACES)?,
            connections: words(&connections, map::CONNECTIONS, PLACES * CONNECTION_WORDS)?,
            load: words(&load, map::LOAD, backends)?,
            backends,
            settings: words(&settings, map::SETTINGS, services * Settings::WORDS)?,
            services,
        })
    }

    /// The places that are taken.
    pub fn taken(&self) -> Vec<Place> {
        (0..PLACES).filter_map(|index| self.at(index)).collect()
    }

    /// Whether a place is as it was.
    pub fn is_unchanged(&self, place: &Place) -> bool {
        self.at(place.index).as_ref() == Some(place)
    }

    fn at(&self, index: u32) -> Option<Place> {
        let cookie = self.cookies.load(index);
        if cookie == 0 {
            return None;
        }
        let Record { backend, service, peer } =
            Record::read(|word| self.connections.load(index * CONNECTION_WORDS + word));
        Some(Place { index, cookie, backend, service, peer })
    }

    /// The map whose values are kept with the sockets that find no place.
    pub fn storage(&self) -> BorrowedFd<'_> {
        self.storage.fd().as_fd()
    }

    /// How many sockets are counted on a backend.
    pub fn load(&self, backend: u32) -> u64 {
        self.load.load(backend)
    }

    /// Backends whose count is not that of the places with sockets on them.
    pub fn drifts(&self) -> Vec<Drift> {
        let mut held = BTreeMap::<u64, u64>::new();
        for place in self.taken() {
            *held.entry(place.backend).or_default() += 1;
        }
        let drift = |backend: u32| {
            let (count, held) = (self.load(backend), held.get(&backend.into()).copied().unwrap_or(0));
            (count != held).then_some(Drift { backend, count, held })
        };
        (1..self.backends).filter_map(drift).collect()
    }

    /// Sets a count right, unless it has changed meanwhile.
    pub fn recount(&self, backend: u32, count: u64, held: u64) -> bool {
        self.load.replace(backend, count, held)
    }

    /// How long a service's sockets outlive their backends.
    pub fn drain(&self, service: u32) -> Duration {
        if service >= self.services {
            // It went before the map became smaller.
            return DRAIN;
        }
        let word = service * Settings::WORDS + in_words(offset_of!(Settings, drain_ms));
        Duration::from_millis(self.settings.load(word))
    }

    /// Whether a socket has a place.
    pub fn has(&self, cookie: u64) -> bool {
        set_of(cookie).any(|index| self.cookies.load(index) == cookie)
    }

    /// Gives a socket a place; false if there is none.
    pub fn adopt(&self, cookie: u64, connection: &Connection) -> bool {
        let Some(index) = set_of(cookie).find(|index| self.cookies.replace(*index, 0, cookie)) else {
            return false;
        };
        let held = index * CONNECTION_WORDS;
        let words = connection.words();
        for (at, word) in (held..).zip(words).skip(1) {
            self.connections.store(at, word);
        }
        if let Ok(backend @ 1..) = u32::try_from(connection.held) {
            self.connections.store(held, connection.held);
            self.load.add(backend, 1);
            // It may have ended before there was anything to let go of.
            if self.cookies.load(index) != cookie && self.connections.replace(held, connection.held, 0) {
                self.load.add(backend, u64::MAX);
            }
        }
        true
    }

    /// Frees the place of a socket that is no more, unless it has been freed meanwhile.
    pub fn free(&self, place: Place) {
        if self.take_off(place) {
            self.cookies.replace(place.index, place.cookie, 0);
        }
    }

    /// Takes a socket off the count that it is on; false if it has dialled or ended meanwhile.
    pub fn take_off(&self, place: Place) -> bool {
        let held = place.index * CONNECTION_WORDS;
        let unchanged = self.cookies.load(place.index) == place.cookie
            && self.connections.replace(held, place.backend, 0);
        if let Ok(backend) = u32::try_from(place.backend)
            && unchanged
            && backend != 0
        {
            self.load.add(backend, u64::MAX);
        }
        unchanged
    }
}
