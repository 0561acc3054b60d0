//! Maps of other sizes, without a connect that fails and without a socket that is forgotten.
//!
//! New maps are filled beside the old ones, then the programs are swapped for ones that use them. Maps
//! whose size does not depend on the configuration, those of sockets among them, are shared by both.
//! Entries keep their places, so what sockets refer to stays true. A crash on the way is settled by
//! the next start: the set that the running programs use is the one that counts.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use aya::maps::MapData;
use mesh_common::abi::{Settings, map};

use super::{
    Datapath, Maps, Options, Pins, Result, io_error, map_error,
    migrate::affinity,
    pins::{is_complete, is_in_use, unpin_maps},
};
use crate::plan::applied::Sizes;

/// Maps that both sets share.
const SHARED: [&str; 8] = [
    map::SOCKETS,
    map::CONNECTIONS,
    map::ORIGIN,
    map::PEERS,
    map::STATS,
    map::NAMESERVERS,
    map::SIGHTS,
    map::EXCLUDED,
];

/// Ends what an earlier start was cut short in.
pub(super) fn settle(options: &Options, pins: &Pins, lock: &File) -> Result<()> {
    let resized = pins.resized();
    if !resized.exists() {
        return Ok(());
    }
    if is_complete(&resized) {
        if !is_complete(&pins.maps()) {
            return replace(pins);
        }
        if is_in_use(pins, &resized)? {
            // Perhaps not by all of the programs yet.
            let lock = lock.try_clone().map_err(io_error("cannot hold the lock"))?;
            let mut datapath = Datapath::on(options, &resized, pins.clone(), lock)?;
            datapath.attach()?;
            return take_over(pins, &Maps::open_in(&pins.maps())?, &datapath.maps);
        }
    }
    unpin_maps(&resized)?;
    fs::remove_dir(&resized).map_err(io_error(format!("cannot remove {}", resized.display())))
}

/// Nobody counts in the old maps any more once every run that began with them has ended: then
/// their counts go to the new maps, and these take their place.
fn take_over(pins: &Pins, old: &Maps, new: &Maps) -> Result<()> {
    new.grace()()?;
    for id in 0..old.sizes.backends.min(new.sizes.backends) {
        // One after the other, so that a crash in between adds none twice.
        new.load.add(id, old.load.swap(id, 0));
    }
    replace(pins)
}

/// Puts the resized maps in the place of the old ones.
fn replace(pins: &Pins) -> Result<()> {
    let (resized, maps) = (pins.resized(), pins.maps());
    let what = || io_error(format!("cannot put {} in the place of {}", resized.display(), maps.display()));
    unpin_maps(&maps)?;
    fs::remove_dir(&maps).map_err(what())?;
    fs::rename(&resized, &maps).map_err(what())
}

/// Fills maps of the configured sizes, and puts programs that use them in place.
pub(super) fn resize(options: &Options, pins: Pins, lock: File, old: &Maps) -> Result<Datapath> {
    let (maps, resized) = (pins.maps(), pins.resized());
    fs::create_dir_all(&resized).map_err(io_error(format!("cannot make {}", resized.display())))?;
    for name in SHARED {
        let data = MapData::from_pin(maps.join(name)).map_err(map_error(name))?;
        data.pin(resized.join(name))
            .map_err(io::Error::other)
            .map_err(io_error(format!("cannot pin map {name}")))?;
    }
    let mut datapath = Datapath::on(options, &resized, pins, lock)?;
    old.copy_to(&mut datapath.maps)?;
    copy_affinity(&maps, &resized)?;
    datapath.attach()?;
    take_over(&datapath.pins, old, &datapath.maps)?;
    let (from, to) = (old.sizes, datapath.maps.sizes);
    tracing::info!(
        "the maps hold {} services and {} backends now, {} and {} before",
        to.frontends,
        to.backends - 1,
        from.frontends,
        from.backends - 1
    );
    Ok(datapath)
}

impl Maps {
    /// Whether everything that is in use has a place in maps of other sizes.
    pub(super) fn fit(&self, sizes: Sizes) -> bool {
        let Ok(dump) = self.dump() else { return false };
        let below = |last: Option<u32>, size: u32| last.is_none_or(|last| last < size);
        let slots = dump.services.values().map(|word| word.base() + word.count()).max();
        dump.frontends.len() <= sizes.frontends as usize
            && below(dump.services.keys().last().copied(), sizes.services)
            && below(dump.backends.keys().last().copied(), sizes.backends)
            && below(dump.busy.last().copied(), sizes.backends)
            && slots.is_none_or(|end| end <= sizes.slots)
    }

    /// Copies every entry to where it is in these maps, but for the connection counts: what is counted
    /// meanwhile is added to what was.
    fn copy_to(&self, new: &mut Self) -> Result<()> {
        let dump = self.dump()?;
        for id in 0..self.sizes.services.min(new.sizes.services) {
            new.ejected.store(id, self.ejected.load(id));
            for word in id * Settings::WORDS..(id + 1) * Settings::WORDS {
                new.settings.store(word, self.settings.load(word));
            }
        }
        for index in 0..self.sizes.slots.min(new.sizes.slots) {
            new.slots.store(index, self.slots.load(index));
        }
        for (id, backend) in &dump.backends {
            new.put_backend(*id, *backend);
        }
        for (id, word) in &dump.services {
            new.services.store(*id, word.0);
        }
        for (frontend, id) in &dump.frontends {
            new.frontends.insert(frontend, id, 0).map_err(map_error(map::FRONTENDS))?;
        }
        for id in 0..self.sizes.backends.min(new.sizes.backends) {
            new.health.store(id, self.health.load(id));
        }
        Ok(())
    }
}

/// Which backends workloads have.
fn copy_affinity(from: &Path, to: &Path) -> Result<()> {
    let (from, mut to) = (affinity(from)?, affinity(to)?);
    // An entry that goes meanwhile is not missed.
    for (client, word) in from.iter().flatten() {
        to.insert(client, word, 0).map_err(map_error(map::AFFINITY))?;
    }
    Ok(())
}
