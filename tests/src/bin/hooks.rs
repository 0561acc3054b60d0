//! Holds the benchmark's own programs on a cgroup: `hooks OBJECT PIN_DIR PREFIXES CGROUP`.
//!
//! Attaches those programs of the object whose names begin with one of the prefixes, on the
//! maps that a daemon has pinned. For each line on its input it prints how many nanoseconds they have run so
//! far, by the kernel's own statistics; at the end of its input it takes them away.

use std::{env, fs::File, io, net::IpAddr, path::Path};

use aya::{
    EbpfLoader,
    programs::{CgroupAttachMode, Program},
};
use mesh_common::{
    abi::{self, VipRanges},
    address::Prefix,
};

/// The default `[vip] ranges`.
fn ranges() -> VipRanges {
    let address = |text: &str| text.parse::<IpAddr>().expect("an address").into();
    let mut ranges = [Prefix::NONE; abi::MAX_VIP_RANGES];
    ranges[0] = Prefix::new(address("127.128.0.0"), 96 + 10);
    ranges[1] = Prefix::new(address("fd00:6d65:7368::"), 96);
    ranges
}

fn main() {
    let [object, pins, prefixes, cgroup] = &env::args().skip(1).collect::<Vec<_>>()[..] else {
        panic!("hooks OBJECT PIN_DIR PREFIXES CGROUP");
    };
    let pins = Path::new(pins).join(format!("abi-{}", abi::VERSION));
    let cgroup = File::open(cgroup).expect("a cgroup");
    let ranges = ranges();
    let paths = abi::map::ALL.map(|name| (name, pins.join(name)));
    let mut loader = EbpfLoader::new();
    loader.override_global("VIP_RANGES", ranges.as_slice(), true);
    for (name, path) in &paths {
        loader.map_pin_path(name, path.as_path());
    }
    let mut ebpf = loader.load_file(object).expect("the object loads");
    let ours =
        ebpf.programs_mut().filter(|(name, _)| prefixes.split(',').any(|prefix| name.starts_with(prefix)));
    let mut programs: Vec<_> = ours.map(|(_, program)| program).collect();
    let mode = CgroupAttachMode::Single;
    for program in &mut programs {
        match program {
            Program::CgroupSockAddr(program) => {
                program.load().and_then(|()| program.attach(&cgroup, mode)).map(drop)
            }
            Program::CgroupSock(program) => {
                program.load().and_then(|()| program.attach(&cgroup, mode)).map(drop)
            }
            Program::SockOps(program) => {
                program.load().and_then(|()| program.attach(&cgroup, mode)).map(drop)
            }
            other => panic!("a {:?} program", other.prog_type()),
        }
        .expect("the program attaches");
    }
    for line in io::stdin().lines() {
        line.expect("readable input");
        let run = |program: &&mut Program| program.info().expect("its own program").run_time().as_nanos();
        println!("{}", programs.iter().map(run).sum::<u128>());
    }
}
