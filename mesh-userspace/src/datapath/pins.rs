//! Where links and maps are pinned, and taking that away.

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use aya::maps::{MapData, MapInfo};
use mesh_common::abi::{self, Frontend, map};

use super::{Error, PROGRAMS, Result, io_error, map_error, mounts, program_info};
use crate::sys::{Link, LinkInfo};

/// What the name of a folder of maps begins with; the version of their layout follows.
const LAYOUT: &str = "abi-";

/// Of each folder its device, its inode, and when it changed last.
pub(super) type Stamps = [(u64, u64, i64, i64); 3];

/// The places below the pin folder.
#[derive(Clone, Debug)]
pub struct Pins(PathBuf);

impl Pins {
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self(dir.into())
    }

    /// The pin folder.
    pub fn dir(&self) -> &Path {
        &self.0
    }

    /// Whether anything may be pinned here; an error where that cannot be seen.
    pub fn exist(&self) -> Result<bool> {
        // A folder below a private one looks as if it were not there, so it is opened.
        match fs::read_dir(&self.0) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(io_error(format!("cannot read {}", self.0.display()))(error)),
        }
    }

    pub(super) fn maps(&self) -> PathBuf {
        self.0.join(format!("{LAYOUT}{}", abi::VERSION))
    }

    /// That there are maps of ours here.
    pub(super) fn check(&self) -> Result<()> {
        if self.exist()? && is_complete(&self.maps()) {
            Ok(())
        } else {
            Err(Error::NotPinned(self.0.clone()))
        }
    }

    /// The folders of maps, of this and other versions.
    pub(super) fn layouts(&self) -> Result<Vec<PathBuf>> {
        let what = || io_error(format!("cannot read {}", self.0.display()));
        let entries =
            fs::read_dir(&self.0).map_err(what())?.collect::<io::Result<Vec<_>>>().map_err(what())?;
        let is_layout =
            |entry: &fs::DirEntry| entry.file_name().as_encoded_bytes().starts_with(LAYOUT.as_bytes());
        Ok(entries.iter().filter(|entry| is_layout(entry)).map(fs::DirEntry::path).collect())
    }

    /// Where maps of other sizes are filled; not a layout.
    pub(super) fn resized(&self) -> PathBuf {
        self.0.join("resized")
    }

    pub(super) fn links(&self) -> PathBuf {
        self.0.join("link")
    }

    pub(super) fn link(&self, program: &str) -> PathBuf {
        self.links().join(program)
    }

    /// Makes the folders, and takes the one writer's place.
    pub(super) fn make(&self) -> Result<File> {
        let what = || format!("cannot make the pin folder {}", self.0.display());
        mounts::ensure_bpffs(&self.0).map_err(io_error(what()))?;
        fs::create_dir_all(&self.0).map_err(io_error(what()))?;
        set_private(&self.0).map_err(io_error(what()))?;
        let lock = self.lock()?;
        for dir in [self.maps(), self.links()] {
            fs::create_dir_all(dir).map_err(io_error(what()))?;
        }
        Ok(lock)
    }

    /// Takes the one writer's place for as long as the file is held, however the process ends.
    fn lock(&self) -> Result<File> {
        let what = || format!("cannot lock {}", self.0.display());
        let dir = File::open(&self.0).map_err(io_error(what()))?;
        match dir.try_lock() {
            Ok(()) => Ok(dir),
            Err(TryLockError::WouldBlock) => Err(Error::Locked(self.0.clone())),
            Err(TryLockError::Error(error)) => Err(io_error(what())(error)),
        }
    }

    /// Which folders they are, and when something was last put in or taken away; none if one is missing.
    pub(super) fn stamps(&self) -> Option<Stamps> {
        let stamp = |dir: &Path| {
            fs::metadata(dir).ok().map(|dir| (dir.dev(), dir.ino(), dir.mtime(), dir.mtime_nsec()))
        };
        Some([stamp(&self.0)?, stamp(&self.maps())?, stamp(&self.links())?])
    }

    /// What the kernel says of a program's link; `None` where it is not attached.
    pub fn link_info(&self, program: &str) -> Option<LinkInfo> {
        let info = Link::open(&self.link(program)).and_then(|link| link.info());
        info.ok().filter(|info| info.cgroup != 0)
    }
}

/// Detaches the programs and removes every pin, touching nothing that mesh did not put there.
/// Returns what was removed.
pub fn cleanup(pins: &Pins) -> Result<Vec<PathBuf>> {
    if !pins.exist()? {
        return Ok(Vec::new());
    }
    let _lock = pins.lock()?;
    let mut removed = Vec::new();
    // Links first: without its maps a program would refuse every VIP.
    for path in PROGRAMS.iter().map(|name| pins.link(name)) {
        if remove_file(&path)? {
            removed.push(path);
        }
    }
    let layouts = pins.layouts()?;
    for layout in &layouts {
        removed.extend(unpin_maps(layout)?);
    }
    removed.extend(unpin_maps(&pins.resized())?);
    for dir in layouts.into_iter().chain([pins.resized(), pins.links(), pins.0.clone()]) {
        // A folder that holds something else stays.
        if fs::remove_dir(&dir).is_ok() {
            removed.push(dir);
        }
    }
    Ok(removed)
}

pub(super) fn pinned(dir: &Path, name: &'static str, key: usize, value: usize) -> Result<MapData> {
    let path = dir.join(name);
    let data = MapData::from_pin(&path).map_err(map_error(name))?;
    let info = data.info().map_err(map_error(name))?;
    if (info.key_size() as usize, info.value_size() as usize) != (key, value) {
        return Err(Error::ForeignMap { name: name.into(), path });
    }
    Ok(data)
}

/// What the kernel says of each pinned map.
pub fn pinned_maps(pins: &Pins) -> Result<Vec<(&'static str, MapInfo)>> {
    let info = |name| {
        let data = MapData::from_pin(pins.maps().join(name)).map_err(map_error(name))?;
        Ok((name, data.info().map_err(map_error(name))?))
    };
    map::ALL.into_iter().map(info).collect()
}

/// Whether a folder holds every map.
pub(super) fn is_complete(maps: &Path) -> bool {
    map::ALL.iter().all(|name| maps.join(name).exists())
}

/// Whether the first program that is swapped uses the maps in a folder.
pub(super) fn is_in_use(pins: &Pins, maps: &Path) -> Result<bool> {
    let frontends = pinned(maps, map::FRONTENDS, size_of::<Frontend>(), size_of::<u32>())?;
    let id = frontends.info().map_err(map_error(map::FRONTENDS))?.id();
    let program = pins.link_info(PROGRAMS[0]).and_then(|link| program_info(link.program));
    let maps = program.and_then(|program| program.map_ids().ok().flatten());
    Ok(maps.is_some_and(|maps| maps.contains(&id)))
}

/// Removes the maps of one layout.
pub(super) fn unpin_maps(layout: &Path) -> Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for path in map::ALL.iter().map(|name| layout.join(name)) {
        if remove_file(&path)? {
            removed.push(path);
        }
    }
    Ok(removed)
}

pub(super) fn remove_file(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io_error(format!("cannot remove {}", path.display()))(error)),
    }
}

fn set_private(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
}
