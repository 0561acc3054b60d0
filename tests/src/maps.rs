//! The daemon's own maps and writer, without the daemon, and the kernel's own look-ups in them.

use std::{
    net::IpAddr,
    os::fd::AsFd,
    path::{Path, PathBuf},
    thread::JoinHandle,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::Map,
    programs::{SchedClassifier, TestRun, TestRunOptions, TestRunResult},
};
use mesh_common::{
    abi::{self, VipRanges},
    address::Prefix,
    lookup::WORDS,
};
use mesh_userspace::{
    datapath::{self, Datapath, Options, Pins},
    plan::{self, Applied, Desired, Op, Prune, applied::Sizes},
    sys::Words,
};

use crate::{unique, wait_until};

/// The default `[vip] ranges`.
pub fn vip_ranges() -> VipRanges {
    let address = |text: &str| text.parse::<IpAddr>().expect("an address").into();
    let mut ranges = [Prefix::NONE; abi::MAX_VIP_RANGES];
    ranges[0] = Prefix::new(address("127.128.0.0"), 96 + 10);
    ranges[1] = Prefix::new(address("fd00:6d65:7368::"), 96);
    ranges
}

/// The programs that are no part of the daemon, on the maps that are pinned in a folder.
pub fn load_bench(object: &Path, pin_dir: &Path) -> Ebpf {
    let pins = pin_dir.join(format!("abi-{}", abi::VERSION));
    let ranges = vip_ranges();
    let paths = abi::map::ALL.map(|name| (name, pins.join(name)));
    let mut loader = EbpfLoader::new();
    loader.override_global("VIP_RANGES", ranges.as_slice(), true);
    for (name, path) in &paths {
        loader.map_pin_path(name, path.as_path());
    }
    loader.load_file(object).expect("the object loads")
}

/// What `cargo xtask build` leaves of them.
pub fn bench_object() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/bpfel-unknown-none/release/mesh-ebpf-bench")
}

/// The maps, pinned in a folder of their own and attached to nothing, and what is known of them. They
/// go when it is dropped.
pub struct Written {
    pub datapath: Datapath,
    pub applied: Applied,
    /// The grace that is under way.
    grace: Option<JoinHandle<Result<(), datapath::Error>>>,
    // Dropped last: the datapath holds its lock.
    pins: Pinned,
}

struct Pinned(PathBuf);

impl Drop for Pinned {
    fn drop(&mut self) {
        // A process that another test is about to start holds copies of our descriptors, and so the lock, until
        // it runs its program.
        wait_until("the pin folder is let go", || datapath::cleanup(&Pins::new(&self.0)).is_ok());
    }
}

impl Written {
    pub fn new(sizes: Sizes) -> Self {
        assert!(rustix::process::geteuid().is_root(), "the maps need root");
        let pins = Pinned(Path::new("/sys/fs/bpf").join(unique("mesh-maps")));
        let (cgroup, pin_dir) = (PathBuf::from("/"), pins.0.clone());
        let options = Options { cgroup, pin_dir, vip_ranges: vip_ranges(), sizes };
        let mut datapath = Datapath::open(&options).expect("the datapath opens");
        let applied = datapath.maps.restore().expect("empty maps");
        Self { datapath, applied, grace: None, pins }
    }

    pub fn pin_dir(&self) -> &Path {
        &self.pins.0
    }

    /// What leads from what is written to what is desired. Waits for what is out of use only where it is needed.
    pub fn plan(&mut self, desired: &Desired, prune: Prune) -> Vec<Op> {
        let mut plan = plan::plan(desired, &self.applied, prune);
        if !plan.refused.is_empty() {
            self.settle();
            plan = plan::plan(desired, &self.applied, prune);
        }
        assert_eq!(plan.refused, [], "it fits");
        plan.ops
    }

    /// As the reconciler writes.
    pub fn write(&mut self, op: &Op) {
        self.datapath.maps.write(op).expect("the maps can be written");
        self.applied.apply(op);
    }

    /// Frees what waited for a grace that has ended, and begins the next one.
    pub fn free(&mut self) {
        if self.grace.as_ref().is_some_and(JoinHandle::is_finished) {
            self.end_grace();
        }
        self.begin_grace();
    }

    /// Waits until all that is out of use is free.
    pub fn settle(&mut self) {
        self.end_grace();
        self.begin_grace();
        self.end_grace();
    }

    fn begin_grace(&mut self) {
        if self.grace.is_none() && self.applied.begin_grace() {
            self.grace = Some(std::thread::spawn(self.datapath.maps.grace()));
        }
    }

    fn end_grace(&mut self) {
        if let Some(grace) = self.grace.take() {
            grace.join().expect("it does not panic").expect("the kernel waits");
            self.applied.end_grace().iter().for_each(|op| self.write(op));
            self.reclaim();
        }
    }

    /// Backends that are gone, and that no socket is counted on.
    pub fn reclaim(&mut self) {
        let maps = &self.datapath.maps;
        self.applied.reclaim(|id| maps.load(id) == 0);
    }
}

/// Look-ups by the kernel's own code.
pub struct Lookups(Ebpf);

impl Lookups {
    pub fn load(pin_dir: &Path) -> Self {
        let mut ebpf = load_bench(&bench_object(), pin_dir);
        for name in ["lookup_draw", "lookup_choose", "lookup_check"] {
            program(&mut ebpf, name).load().expect("the kernel takes the program");
        }
        Self(ebpf)
    }

    /// See [`mesh_common::lookup`].
    pub fn words(&self) -> Words {
        let Some(Map::Array(map)) = self.0.map("LOOKUPS") else { panic!("the object has an array LOOKUPS") };
        Words::map(map.fd().as_fd(), WORDS).expect("it can be mapped")
    }

    /// So many runs of a program, one look-up each; the kernel says how long one takes.
    pub fn run(&mut self, name: &str, repeat: u32) -> TestRunResult {
        let options = TestRunOptions { data_in: Some(&[0; 64]), repeat, ..TestRunOptions::new() };
        program(&mut self.0, name).test_run(options).expect("the kernel runs the program")
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> &'a mut SchedClassifier {
    ebpf.program_mut(name).expect("the object has the program").try_into().expect("a classifier")
}
