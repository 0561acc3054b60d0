//! Holds the benchmark's own programs on a cgroup: `hooks OBJECT PIN_DIR PREFIXES CGROUP`.
//!
//! Attaches those programs of the object whose names begin with one of the prefixes, on the
//! maps that a daemon has pinned. For each line on its input it prints how many nanoseconds they have run so
//! far, by the kernel's own statistics; at the end of its input it takes them away.

use std::{env, fs::File, io, path::Path};

use aya::programs::{CgroupAttachMode, Program};
use mesh_tests::maps::load_bench;

fn main() {
    let [object, pins, prefixes, cgroup] = &env::args().skip(1).collect::<Vec<_>>()[..] else {
        panic!("hooks OBJECT PIN_DIR PREFIXES CGROUP");
    };
    let cgroup = File::open(cgroup).expect("a cgroup");
    let mut ebpf = load_bench(Path::new(object), Path::new(pins));
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
