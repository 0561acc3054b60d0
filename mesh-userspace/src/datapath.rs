//! The kernel side of the daemon: loading, pinning, attaching, and writing the maps.
//!
//! Links and maps are pinned, so they work on while no daemon runs. Below the pin folder:
//! `abi-<version>/<MAP>` and `link/<program>`. A start adopts the maps that are there, loads its
//! own programs on them, and puts those in place of the running ones by a link update, so that
//! no `connect()` falls between two programs.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::MapError,
    programs::{CgroupAttachMode, Program, ProgramError, links::FdLink},
};
use mesh_common::abi::{VipRanges, map};

pub use aya::programs::ProgramInfo;
pub use maps::Maps;
pub use nameservers::{Excluded, NameServers, Sights};
pub use pins::{Pins, cleanup, pinned_maps};
pub use sockets::{Drift, Place, Record, Sockets};
pub use stats::Stats;

use crate::{
    plan::{Applied, applied::Sizes},
    sys::{self, Link},
};

mod maps;
mod migrate;
pub mod mounts;
mod nameservers;
mod pins;
mod resize;
mod sockets;
mod stats;

use pins::{Stamps, is_complete, remove_file, unpin_maps};

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

/// What the programs and maps are made from.
#[derive(Clone, Debug)]
pub struct Options {
    pub cgroup: PathBuf,
    pub pin_dir: PathBuf,
    pub vip_ranges: VipRanges,
    /// Sizes of maps that are not pinned yet.
    pub sizes: Sizes,
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
    /// The folders as they were at the beginning of the last look at the pins, and as they are while no pin is
    /// missing.
    looked: Option<Stamps>,
    whole: Option<Stamps>,
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
        let (cgroup, links) = (options.cgroup.clone(), BTreeMap::new());
        Ok(Self { maps, ebpf, pins, cgroup, lock, links, looked: None, whole: None })
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
        self.maps.grace()()?;
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
        let mut mended = self.mend_pins()?;
        let mut detached = false;
        for (name, link) in &self.links {
            let info = link.info().map_err(io_error(format!("cannot look at program {name}")))?;
            detached |= info.cgroup == 0;
        }
        if detached {
            self.attach()?;
            mended.push("programs that were not attached any more".into());
        }
        Ok(mended)
    }

    /// Nothing is missing from folders that have not changed.
    fn mend_pins(&mut self) -> Result<Vec<String>> {
        let stamps = self.pins.stamps();
        if stamps.is_some() && stamps == self.whole {
            return Ok(Vec::new());
        }
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
        for (name, link) in &self.links {
            let pin = self.pins.link(name);
            if !pin.exists() {
                link.pin(&pin).map_err(io_error(format!("cannot pin program {name}")))?;
                mended.push(format!("the pin of program {name}"));
            }
        }
        // A change right after this look may have the same time as the one before: what was the same at the
        // beginning of two looks was whole at the second.
        self.whole = stamps.filter(|_| stamps == self.looked && mended.is_empty());
        self.looked = stamps;
        Ok(mended)
    }

    pub fn pins(&self) -> &Pins {
        &self.pins
    }
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
