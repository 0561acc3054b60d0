//! The kernel side of the daemon: loading, pinning, attaching, and writing the maps.
//!
//! Links and maps are pinned, so they work on while no daemon runs. Below the pin folder:
//! `abi-<version>/<MAP>` and `link/<program>`. A start adopts the maps that are there, loads its
//! own programs on them, and puts those in place of the running ones by a link update, so that
//! no `connect()` falls between two programs.

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io,
    mem::offset_of,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, Map, MapData, MapError, MapInfo, PerCpuArray},
    programs::{CgroupAttachMode, Program, ProgramError, links::FdLink},
};
use mesh_common::{
    abi::{
        self, Backend, Client, Connection, Cookies, Frontend, Origin, Port, SETS, ServiceWord, Settings,
        SlotWord, VipRanges, WAYS, map,
    },
    address::Address,
    health::HealthWord,
    outcome::Outcome,
};

pub use aya::programs::ProgramInfo;
pub use nameservers::{Excluded, NameServers, Sights};

use crate::{
    model::DRAIN,
    plan::{
        Applied, Endpoint, Op,
        applied::{Dump, Sizes},
    },
};

mod migrate;
pub mod mounts;
mod nameservers;
mod resize;
pub mod sys;

use sys::{Grace, Link, LinkInfo, Words};

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("MESH_BPF_OBJECT"));

/// The programs, as the kernel shows them; each hooks the call that its name says.
pub const PROGRAMS: [&str; 10] = [
    "mesh_connect4",
    "mesh_connect6",
    "mesh_getpeer4",
    "mesh_getpeer6",
    "mesh_sendmsg4",
    "mesh_sendmsg6",
    "mesh_recvmsg4",
    "mesh_recvmsg6",
    "mesh_release",
    "mesh_sockops",
];

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("pin folder {} is in use by another mesh daemon; stop it, or set another node.pin_dir", .0.display())]
    Locked(PathBuf),
    #[error("{} holds no maps of mesh: has a daemon run here? (node.pin_dir)", .0.display())]
    NotPinned(PathBuf),
    #[error("map {name} at {} is not what this version of mesh pins there; run `mesh cleanup` and start again", path.display())]
    ForeignMap { name: String, path: PathBuf },
    #[error("the kernel refuses the programs: {0:#}")]
    Load(#[source] Box<aya::EbpfError>),
    #[error("program {name}: {source}")]
    Program { name: &'static str, source: Box<ProgramError> },
    #[error("map {name}: {source}")]
    Map { name: &'static str, source: Box<MapError> },
}

pub type Result<T> = std::result::Result<T, Error>;

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    |source| Error::Io { what, source }
}

fn map_error(name: &'static str) -> impl FnOnce(MapError) -> Error {
    move |source| Error::Map { name, source: Box::new(source) }
}

/// What the name of a folder of maps begins with; the version of their layout follows.
const LAYOUT: &str = "abi-";

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

    fn maps(&self) -> PathBuf {
        self.0.join(format!("{LAYOUT}{}", abi::VERSION))
    }

    /// That there are maps of ours here.
    fn check(&self) -> Result<()> {
        if self.exist()? && is_complete(&self.maps()) {
            Ok(())
        } else {
            Err(Error::NotPinned(self.0.clone()))
        }
    }

    /// The folders of maps, of this and other versions.
    fn layouts(&self) -> Result<Vec<PathBuf>> {
        let what = || io_error(format!("cannot read {}", self.0.display()));
        let entries =
            fs::read_dir(&self.0).map_err(what())?.collect::<io::Result<Vec<_>>>().map_err(what())?;
        let is_layout =
            |entry: &fs::DirEntry| entry.file_name().as_encoded_bytes().starts_with(LAYOUT.as_bytes());
        Ok(entries.iter().filter(|entry| is_layout(entry)).map(fs::DirEntry::path).collect())
    }

    /// Where maps of other sizes are filled; not a layout.
    fn resized(&self) -> PathBuf {
        self.0.join("resized")
    }

    fn links(&self) -> PathBuf {
        self.0.join("link")
    }

    fn link(&self, program: &str) -> PathBuf {
        self.links().join(program)
    }

    /// Makes the folders, and takes the one writer's place.
    fn make(&self) -> Result<File> {
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

    /// What the kernel says of a program's link; `None` where it is not attached.
    pub fn link_info(&self, program: &str) -> Option<LinkInfo> {
        let info = Link::open(&self.link(program)).and_then(|link| link.info());
        info.ok().filter(|info| info.cgroup != 0)
    }
}

/// What the programs and maps are made from.
#[derive(Clone, Debug)]
pub struct Options {
    pub cgroup: PathBuf,
    pub pin_dir: PathBuf,
    pub vip_ranges: VipRanges,
    /// Sizes of maps that are not pinned yet.
    pub sizes: Sizes,
}

/// The maps, opened for writing.
pub struct Maps {
    frontends: HashMap<MapData, Frontend, u32>,
    backends: Words,
    services: Words,
    settings: Words,
    slots: Words,
    load: Words,
    health: Words,
    ejected: Words,
    grace: Grace,
    sizes: Sizes,
}

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

/// The datapath as the daemon holds it. Dropping it leaves everything in place.
pub struct Datapath {
    pub maps: Maps,
    ebpf: Ebpf,
    pins: Pins,
    cgroup: PathBuf,
    lock: File,
    /// Held open, so that a program stays attached when its pin is taken away.
    links: BTreeMap<&'static str, Link>,
}

impl Datapath {
    /// Adopts what is pinned, or makes it. Programs are loaded, but not yet attached.
    pub fn open(options: &Options) -> Result<Self> {
        let pins = Pins::new(&options.pin_dir);
        let lock = pins.make()?;
        resize::settle(options, &pins, &lock)?;
        if !is_complete(&pins.maps()) {
            // A start that was cut short, or someone removed a pin: half a set is of no use.
            unpin_maps(&pins.maps())?;
        }
        let old = is_complete(&pins.maps()).then(|| Maps::open(&pins)).transpose()?;
        if let Some(old) = old.filter(|old| old.sizes != options.sizes && old.fit(options.sizes)) {
            return resize::resize(options, pins, lock, &old);
        }
        Self::on(options, &pins.maps(), pins.clone(), lock)
    }

    /// On the maps in a folder, or on new ones there.
    fn on(options: &Options, maps: &Path, pins: Pins, lock: File) -> Result<Self> {
        let mut ebpf = load(options, maps)?;
        load_programs(&mut ebpf)?;
        let maps = Maps::open_in(maps)?;
        Ok(Self { maps, ebpf, pins, cgroup: options.cgroup.clone(), lock, links: BTreeMap::new() })
    }

    /// Whether the programs that run use maps of another layout.
    pub fn is_another_version_in_use(&self) -> Result<bool> {
        Ok(migrate::Old::open(&self.pins)?.is_some())
    }

    /// Puts the programs in place of those of another layout, if it is such that run, and takes
    /// over what these know. A socket that connects at the same moment may show its backend as its
    /// peer until this returns. Returns whether it was so.
    pub fn take_over(&mut self, applied: &Applied) -> Result<bool> {
        let Some(old) = migrate::Old::open(&self.pins)? else {
            return self.attach().map(|()| false);
        };
        let sockets = Sockets::open(&self.pins)?;
        old.carry_tables(&mut self.maps, &self.pins, applied)?;
        let (before, _) = old.carry_sockets(&sockets, applied);
        self.attach()?;
        self.maps.grace.wait().map_err(io_error("cannot wait for readers"))?;
        // Those that the old programs have seen since.
        let (after, lost) = old.carry_sockets(&sockets, applied);
        tracing::info!("took over {} sockets from another version of mesh", before + after);
        if lost > 0 {
            tracing::warn!("no place for {lost} more: they show their backends, and are on no count");
        }
        Ok(true)
    }

    /// Puts the programs in place: into the pinned links, or into new ones where there are none.
    pub fn attach(&mut self) -> Result<()> {
        let what = || format!("cannot attach to cgroup {}", self.cgroup.display());
        let cgroup = File::open(&self.cgroup).map_err(io_error(what()))?;
        let cgroup_id = mounts::cgroup_id(&self.cgroup).map_err(io_error(what()))?;
        for name in PROGRAMS {
            let pin = self.pins.link(name);
            let program = program(&mut self.ebpf, name);
            let error = |source| Error::Program { name, source: Box::new(source) };
            let old = Link::open(&pin).ok();
            let is_here = |link: &Link| link.info().is_ok_and(|info| info.cgroup == cgroup_id);
            if let Some(link) = old.filter(is_here) {
                let fd = program.fd().map_err(error)?;
                link.update(fd.as_fd()).map_err(io_error(format!("cannot replace program {name}")))?;
                self.links.insert(name, link);
                continue;
            }
            let link = attach(program, &cgroup).map_err(error)?;
            let cannot_pin = || io_error(format!("cannot pin {}", pin.display()));
            // The old link was for another cgroup, or its cgroup is gone.
            remove_file(&pin)?;
            link.pin(&pin).map_err(io::Error::other).map_err(cannot_pin())?;
            self.links.insert(name, Link::open(&pin).map_err(cannot_pin())?);
        }
        // No program uses the maps of another version any more.
        for layout in self.pins.layouts()?.iter().filter(|layout| **layout != self.pins.maps()) {
            unpin_maps(layout)?;
            // A folder that holds something else stays.
            let _ = fs::remove_dir(layout);
        }
        Ok(())
    }

    /// Puts back what somebody took away: the pin folder, pins of maps and links, and programs that
    /// are no longer attached. Returns what it was.
    pub fn mend(&mut self) -> Result<Vec<String>> {
        let mut mended = Vec::new();
        let what = || format!("cannot look at {}", self.pins.dir().display());
        let held = self.lock.metadata().map_err(io_error(what()))?;
        if !fs::metadata(self.pins.dir()).is_ok_and(|dir| (dir.dev(), dir.ino()) == (held.dev(), held.ino()))
        {
            self.lock = self.pins.make()?;
            mended.push(format!("the pin folder {}", self.pins.dir().display()));
        }
        for dir in [self.pins.maps(), self.pins.links()] {
            fs::create_dir_all(dir).map_err(io_error(what()))?;
        }
        for (name, map) in self.ebpf.maps() {
            let pin = self.pins.maps().join(name);
            if map::ALL.contains(&name) && !pin.exists() {
                map.pin(&pin)
                    .map_err(io::Error::other)
                    .map_err(io_error(format!("cannot pin map {name}")))?;
                mended.push(format!("the pin of map {name}"));
            }
        }
        let mut detached = false;
        for (name, link) in &self.links {
            let pin = self.pins.link(name);
            let cannot = || io_error(format!("cannot pin program {name}"));
            if link.info().map_err(cannot())?.cgroup == 0 {
                detached = true;
            } else if !pin.exists() {
                link.pin(&pin).map_err(cannot())?;
                mended.push(format!("the pin of program {name}"));
            }
        }
        if detached {
            self.attach()?;
            mended.push("programs that were not attached any more".into());
        }
        Ok(mended)
    }

    pub fn pins(&self) -> &Pins {
        &self.pins
    }
}

impl Maps {
    /// Opens the pinned maps.
    pub fn open(pins: &Pins) -> Result<Self> {
        pins.check()?;
        Self::open_in(&pins.maps())
    }

    fn open_in(dir: &Path) -> Result<Self> {
        let frontends = pinned(dir, map::FRONTENDS, size_of::<Frontend>(), size_of::<u32>())?;
        let services = pinned(dir, map::SERVICES, size_of::<u32>(), size_of::<u64>())?;
        let slots = pinned(dir, map::SLOTS, size_of::<u32>(), size_of::<u64>())?;
        let backends = pinned(dir, map::BACKENDS, size_of::<u32>(), size_of::<Backend>())?;
        let load = pinned(dir, map::LOAD, size_of::<u32>(), size_of::<u64>())?;
        let settings = pinned(dir, map::SETTINGS, size_of::<u32>(), size_of::<Settings>())?;
        let health = pinned(dir, map::HEALTH, size_of::<u32>(), size_of::<u64>())?;
        let ejected = pinned(dir, map::EJECTED, size_of::<u32>(), size_of::<u64>())?;
        pinned(dir, map::AFFINITY, size_of::<Client>(), size_of::<u64>())?;
        let sizes = Sizes {
            frontends: entries(&frontends, map::FRONTENDS)?,
            services: entries(&services, map::SERVICES)?,
            backends: entries(&backends, map::BACKENDS)?,
            slots: entries(&slots, map::SLOTS)?,
        };
        Ok(Self {
            services: words(&services, map::SERVICES, sizes.services)?,
            slots: words(&slots, map::SLOTS, sizes.slots)?,
            settings: words(&settings, map::SETTINGS, sizes.services * Settings::WORDS)?,
            load: words(&load, map::LOAD, sizes.backends)?,
            health: words(&health, map::HEALTH, sizes.backends)?,
            ejected: words(&ejected, map::EJECTED, sizes.services)?,
            frontends: HashMap::try_from(Map::HashMap(frontends)).map_err(map_error(map::FRONTENDS))?,
            backends: words(&backends, map::BACKENDS, sizes.backends * Backend::WORDS)?,
            grace: Grace::new().map_err(io_error("cannot make a map of maps"))?,
            sizes,
        })
    }

    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// Reads back everything that is in use.
    pub fn dump(&self) -> Result<Dump> {
        let mut dump = Dump::default();
        for entry in self.frontends.iter() {
            let (frontend, id) = entry.map_err(map_error(map::FRONTENDS))?;
            dump.frontends.insert(frontend, id);
        }
        for id in 0..self.sizes.services {
            let word = ServiceWord(self.services.load(id));
            if word.exists() {
                dump.services.insert(id, word);
                dump.settings.insert(id, self.settings(id));
            }
        }
        let backends = (0..self.sizes.backends).map(|id| (id, self.backend(id)));
        dump.backends = backends.filter(|(_, backend)| backend.in_use()).collect();
        dump.busy = (1..self.sizes.backends).filter(|id| self.load(*id) > 0).collect();
        Ok(dump)
    }

    /// How many sockets are counted on a backend.
    pub fn load(&self, backend: u32) -> u64 {
        self.load.load(backend)
    }

    /// What connects say of a backend.
    pub fn health(&self, backend: u32) -> HealthWord {
        HealthWord(self.health.load(backend))
    }

    fn backend(&self, id: u32) -> Backend {
        let first = id * Backend::WORDS;
        Backend::from_words([0, 1, 2, 3].map(|word| self.backends.load(first + word)))
    }

    /// The last word comes last: by it a socket or workload that knows the id from before sees
    /// whether the entry is its backend still. No slot refers to an entry that is not in use.
    fn put_backend(&self, id: u32, backend: Backend) {
        let first = id * Backend::WORDS;
        for (word, value) in (first..).zip(backend.words()) {
            self.backends.store(word, value);
        }
    }

    /// The other way round.
    fn clear_backend(&self, id: u32) {
        let first = id * Backend::WORDS;
        (first..first + Backend::WORDS).rev().for_each(|word| self.backends.store(word, 0));
    }

    fn settings(&self, service: u32) -> Settings {
        let first = service * Settings::WORDS;
        Settings::from_words([0, 1, 2, 3].map(|word| self.settings.load(first + word)))
    }

    /// Forgets what was said against a backend that leaves.
    fn forget(&self, backend: u32, service: u32) {
        if HealthWord(self.health.swap(backend, 0)).is_ejected() {
            self.ejected.add(service, u64::MAX);
        }
    }

    /// Sets right how many backends of each service are ejected: a daemon may have ended between
    /// two of its writes.
    fn recount(&self, dump: &Dump) {
        let counted: Vec<_> = (0..self.sizes.services).map(|id| self.ejected.load(id)).collect();
        let mut ejected = BTreeMap::<u32, u64>::new();
        for (id, backend) in &dump.backends {
            *ejected.entry(backend.service).or_default() += u64::from(self.health(*id).is_ejected());
        }
        for (id, counted) in (0..).zip(counted) {
            // One that has changed meanwhile is right, or will be set right another time.
            self.ejected.replace(id, counted, ejected.get(&id).copied().unwrap_or(0));
        }
    }

    /// A service's slots.
    pub fn slots(&self, word: ServiceWord) -> Vec<SlotWord> {
        let range = word.base()..word.base() + word.count();
        range.map(|index| SlotWord(self.slots.load(index))).collect()
    }

    /// The mirror of what is in the maps, after removing what an interrupted change left behind.
    pub fn restore(&mut self) -> Result<Applied> {
        let dump = self.dump()?;
        self.recount(&dump);
        let (mut applied, repairs) = Applied::restore(self.sizes, &dump, |word| self.slots(word));
        for op in repairs {
            self.write(&op)?;
            applied.apply(&op);
        }
        Ok(applied)
    }

    /// Writes one operation.
    pub fn write(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::PutBackend { id, service, endpoint, weight } => {
                let backend = Backend::new(endpoint.address, endpoint.port, *service, *weight);
                if !self.backend(*id).in_use() {
                    // A connect that failed at the last moment may have spoken of who had the id before.
                    self.health.store(*id, 0);
                }
                self.put_backend(*id, backend);
            }
            Op::PutSlots { base, words, .. } => {
                for (index, word) in (*base..).zip(words) {
                    self.slots.store(index, word.0);
                }
            }
            Op::PutSettings { service, settings } => {
                for (word, value) in (service * Settings::WORDS..).zip(settings.words()) {
                    self.settings.store(word, value);
                }
            }
            Op::PutService { id, word } => self.services.store(*id, word.0),
            Op::PutFrontend { frontend, service } => {
                self.frontends.insert(frontend, service, 0).map_err(map_error(map::FRONTENDS))?;
            }
            Op::DeleteFrontend { frontend } => {
                self.frontends.remove(frontend).map_err(map_error(map::FRONTENDS))?;
            }
            Op::DeleteBackend { id, .. } => {
                let service = self.backend(*id).service;
                self.clear_backend(*id);
                self.forget(*id, service);
            }
            Op::Grace => self.grace.wait().map_err(io_error("cannot wait for readers"))?,
        }
        Ok(())
    }
}

#[expect(clippy::cast_possible_truncation, reason = "4")]
const PLACES: u32 = SETS * WAYS as u32;
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

/// Has the kernel verify the programs, attaching and pinning nothing. The ranges matter: without
/// any, the verifier drops all that comes behind the range check as dead.
pub fn probe(vip_ranges: &VipRanges) -> Result<()> {
    let mut loader = EbpfLoader::new();
    loader.override_global("VIP_RANGES", vip_ranges.as_slice(), true);
    let mut ebpf = loader.load(OBJECT).map_err(|error| Error::Load(Box::new(error)))?;
    load_programs(&mut ebpf)
}

fn load_programs(ebpf: &mut Ebpf) -> Result<()> {
    for name in PROGRAMS {
        let loaded = match program(ebpf, name) {
            Program::CgroupSockAddr(program) => program.load(),
            Program::CgroupSock(program) => program.load(),
            Program::SockOps(program) => program.load(),
            other => unreachable!("{name} is a {:?} program", other.prog_type()),
        };
        loaded.map_err(|source| Error::Program { name, source: Box::new(source) })?;
    }
    Ok(())
}

/// Attaches a program to a cgroup; the link is ours alone.
fn attach(program: &mut Program, cgroup: &File) -> std::result::Result<FdLink, ProgramError> {
    let mode = CgroupAttachMode::Single;
    let link = match program {
        Program::CgroupSockAddr(program) => {
            let id = program.attach(cgroup, mode)?;
            FdLink::try_from(program.take_link(id)?)
        }
        Program::CgroupSock(program) => {
            let id = program.attach(cgroup, mode)?;
            FdLink::try_from(program.take_link(id)?)
        }
        Program::SockOps(program) => {
            let id = program.attach(cgroup, mode)?;
            FdLink::try_from(program.take_link(id)?)
        }
        other => unreachable!("a {:?} program", other.prog_type()),
    };
    Ok(link.expect("Linux 5.7 and later attach by links"))
}

fn load(options: &Options, maps: &Path) -> Result<Ebpf> {
    let paths = map::ALL.map(|name| (name, maps.join(name)));
    let sizes = options.sizes;
    let mut loader = EbpfLoader::new();
    loader
        .override_global("VIP_RANGES", options.vip_ranges.as_slice(), true)
        .map_max_entries(map::FRONTENDS, sizes.frontends)
        .map_max_entries(map::SERVICES, sizes.services)
        .map_max_entries(map::BACKENDS, sizes.backends)
        .map_max_entries(map::LOAD, sizes.backends)
        .map_max_entries(map::HEALTH, sizes.backends)
        .map_max_entries(map::SETTINGS, sizes.services)
        .map_max_entries(map::EJECTED, sizes.services)
        .map_max_entries(map::AFFINITY, sizes.frontends)
        .map_max_entries(map::CURSORS, sizes.services)
        .map_max_entries(map::SLOTS, sizes.slots);
    for (name, path) in &paths {
        loader.map_pin_path(name, path.as_path());
    }
    loader.load(OBJECT).map_err(|error| Error::Load(Box::new(error)))
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> &'a mut Program {
    ebpf.program_mut(name).expect("the object holds every program")
}

fn pinned(dir: &Path, name: &'static str, key: usize, value: usize) -> Result<MapData> {
    let path = dir.join(name);
    let data = MapData::from_pin(&path).map_err(map_error(name))?;
    let info = data.info().map_err(map_error(name))?;
    if (info.key_size() as usize, info.value_size() as usize) != (key, value) {
        return Err(Error::ForeignMap { name: name.into(), path });
    }
    Ok(data)
}

/// Programs of others that run for our hooks in a cgroup, by name and id. They are left alone.
pub fn foreign_programs(pins: &Pins, cgroup: &Path) -> Result<Vec<(String, u32)>> {
    use aya_obj::generated::bpf_attach_type::{
        BPF_CGROUP_INET_SOCK_RELEASE, BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET4_GETPEERNAME,
        BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_INET6_GETPEERNAME, BPF_CGROUP_SOCK_OPS, BPF_CGROUP_UDP4_RECVMSG,
        BPF_CGROUP_UDP4_SENDMSG, BPF_CGROUP_UDP6_RECVMSG, BPF_CGROUP_UDP6_SENDMSG,
    };
    let what = || io_error(format!("cannot list the programs of {}", cgroup.display()));
    let dir = File::open(cgroup).map_err(what())?;
    let ours: Vec<_> =
        PROGRAMS.iter().filter_map(|name| pins.link_info(name)).map(|link| link.program).collect();
    let mut foreign = Vec::new();
    for hook in [
        BPF_CGROUP_INET4_CONNECT,
        BPF_CGROUP_INET6_CONNECT,
        BPF_CGROUP_INET4_GETPEERNAME,
        BPF_CGROUP_INET6_GETPEERNAME,
        BPF_CGROUP_UDP4_SENDMSG,
        BPF_CGROUP_UDP6_SENDMSG,
        BPF_CGROUP_UDP4_RECVMSG,
        BPF_CGROUP_UDP6_RECVMSG,
        BPF_CGROUP_INET_SOCK_RELEASE,
        BPF_CGROUP_SOCK_OPS,
    ] {
        let ids = sys::programs_on(dir.as_fd(), hook).map_err(what())?;
        for id in ids.into_iter().filter(|id| !ours.contains(id)) {
            let name = program_info(id).and_then(|info| info.name_as_str().map(str::to_owned));
            foreign.push((name.unwrap_or_default(), id));
        }
    }
    Ok(foreign)
}

/// What the kernel says of a program, by its id.
pub fn program_info(id: u32) -> Option<ProgramInfo> {
    aya::programs::loaded_programs().flatten().find(|program| program.id() == id)
}

/// What the kernel says of each pinned map.
pub fn pinned_maps(pins: &Pins) -> Result<Vec<(&'static str, MapInfo)>> {
    let info = |name| {
        let data = MapData::from_pin(pins.maps().join(name)).map_err(map_error(name))?;
        Ok((name, data.info().map_err(map_error(name))?))
    };
    map::ALL.into_iter().map(info).collect()
}

fn words(data: &MapData, name: &str, len: u32) -> Result<Words> {
    Words::map(data.fd().as_fd(), len).map_err(io_error(format!("cannot map {name} into memory")))
}

fn entries(data: &MapData, name: &'static str) -> Result<u32> {
    Ok(data.info().map_err(map_error(name))?.max_entries())
}

/// Whether a folder holds every map.
fn is_complete(maps: &Path) -> bool {
    map::ALL.iter().all(|name| maps.join(name).exists())
}

/// Whether the first program that is swapped uses the maps in a folder.
fn is_in_use(pins: &Pins, maps: &Path) -> Result<bool> {
    let frontends = pinned(maps, map::FRONTENDS, size_of::<Frontend>(), size_of::<u32>())?;
    let id = frontends.info().map_err(map_error(map::FRONTENDS))?.id();
    let program = pins.link_info(PROGRAMS[0]).and_then(|link| program_info(link.program));
    let maps = program.and_then(|program| program.map_ids().ok().flatten());
    Ok(maps.is_some_and(|maps| maps.contains(&id)))
}

/// Removes the maps of one layout.
fn unpin_maps(layout: &Path) -> Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for path in map::ALL.iter().map(|name| layout.join(name)) {
        if remove_file(&path)? {
            removed.push(path);
        }
    }
    Ok(removed)
}

fn remove_file(path: &Path) -> Result<bool> {
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
