//! What one table costs: `scale SERVICES BACKENDS CHANGES`, with so many backends per service.
//!
//! From a registry's snapshot to maps of its own that are attached to nothing, then look-ups by the kernel's
//! code, then one change after the other. Prints one JSON object a line: `{"what", "value", "unit"}`.
//! `scale programs` prints what the verifier says of the daemon's programs instead.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU16,
    os::fd::{AsFd, AsRawFd},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use aya::{
    maps::MapData,
    programs::{ProgramInfo, loaded_programs},
};
use aya_obj::generated::bpf_insn;
use mesh_common::{
    abi::{self, ServiceWord},
    lookup, select,
};
use mesh_tests::maps::{Lookups, Written, bench_object};
use mesh_userspace::{
    catalog::{self, Catalog, vip::Vips},
    datapath::{Pins, pinned_maps},
    model::{Answer, DRAIN, Eject, Health, Instance, Policy, Protocol, Service, ServiceId},
    plan::{Endpoint, Op, Prune, applied::Sizes},
    registry::{self, Snapshot},
};

fn main() {
    let args: Vec<_> = std::env::args().skip(1).collect();
    match &args[..] {
        [what] if what == "programs" => programs(),
        [services, backends, changes] => {
            let [services, backends, changes] =
                [services, backends, changes].map(|number| number.parse().expect("a number"));
            table(services, backends, changes);
        }
        _ => panic!("scale SERVICES BACKENDS CHANGES | scale programs"),
    }
}

fn say(what: &str, value: f64, unit: &str) {
    println!("{}", serde_json::json!({"what": what, "value": value, "unit": unit}));
}

/// Where the services' backends are: no zone, none ejected, none new.
struct Node;

impl catalog::Node for Node {
    fn zone(&self) -> Option<&str> {
        None
    }

    fn is_adopted(&self, _: &abi::Frontend) -> bool {
        false
    }

    fn is_ejected(&self, _: &abi::Frontend, _: &Endpoint) -> bool {
        false
    }

    fn age(&self, _: &abi::Frontend, _: &Endpoint) -> Option<Duration> {
        None
    }
}

fn service(number: u32, backends: u32) -> Service {
    let instance = |backend| {
        let (address, _) = lookup::endpoint(number, 1, backend);
        Instance {
            id: format!("task-{number}-{backend}"),
            address: IpAddr::V6(Ipv6Addr::from(address.octets())),
            port: NonZeroU16::new(8080).expect("not zero"),
            weight: 100,
            zone: None,
            health: Health::Healthy,
        }
    };
    let id = ServiceId {
        namespace: "service.local".into(),
        name: format!("service-{number}"),
        protocol: Protocol::Tcp,
        port: NonZeroU16::new(80).expect("not zero"),
    };
    Service {
        id,
        vip: Some(lookup::frontend(number).address.ip()),
        port_name: None,
        aliases: Vec::new(),
        answer: Answer::default(),
        api_only: false,
        policy: Policy::LeastConnections,
        affinity: None,
        drain: DRAIN,
        eject: Eject::default(),
        slow_start: None,
        panic_percent: 0,
        instances: (0..backends).map(instance).collect(),
    }
}

fn table(services: u32, backends: u32, changes: u32) {
    let all = services * backends;
    let sizes = Sizes { frontends: services, services: services + 1, backends: all + 2, slots: 2 * all + 2 };
    let state = tempfile::tempdir().expect("a folder");
    let mut vips = Vips::open(state.path(), Vec::new()).expect("no VIPs yet");
    let mut written = Written::new(sizes);
    let before = anonymous();
    let all_services = (0..services).map(|n| Arc::new(service(n, backends)));
    let snapshots = [Some(Arc::new(Snapshot::complete(registry::services(all_services))))];

    let mut times = BTreeMap::new();
    let start = Instant::now();
    let catalog = Catalog::build(&snapshots, &mut vips);
    times.insert("catalog", start.elapsed());
    let kept = anonymous();
    let desired_from = Instant::now();
    let desired = catalog.desired(&Node);
    times.insert("desired", desired_from.elapsed());
    let plan_from = Instant::now();
    let ops = written.plan(&desired, Prune::Yes);
    times.insert("plan", plan_from.elapsed());
    let write_from = Instant::now();
    for op in &ops {
        written.write(op);
    }
    times.insert("write", write_from.elapsed());
    say("cold load", start.elapsed().as_secs_f64() * 1e3, "ms");
    for (part, time) in times {
        say(&format!("cold load: {part}"), time.as_secs_f64() * 1e3, "ms");
    }
    drop((ops, desired));
    say("memory of snapshot and catalog", (kept - before) / f64::from(all), "B");
    // Of what is copied anew, twice: the first one goes into holes that the load has left.
    let hole = written.applied.clone();
    let from = anonymous();
    let copy = written.applied.clone();
    say("memory of the mirror", (anonymous() - from) / f64::from(all), "B");
    drop((hole, copy));
    say("kernel memory", locked(written.pin_dir(), &sizes), "B");

    look_up(&mut written, services);
    change(&mut written, snapshots, catalog, (services, backends, changes));
}

/// One choice by the kernel's code, less what drawing a service costs.
fn look_up(written: &mut Written, services: u32) {
    const REPEAT: u32 = 1_000_000;
    const POLICIES: [(select::Policy, &str); 2] =
        [(select::Policy::Random, "random"), (select::Policy::LeastConnections, "least-connections")];
    let mut lookups = Lookups::load(written.pin_dir());
    let words = lookups.words();
    for (policy, name) in POLICIES {
        for (id, service) in &written.applied.services {
            let count = service.words.len().try_into().expect("24 bits");
            let word = ServiceWord::new(service.base, count, policy, false);
            written.datapath.maps.write(&Op::PutService { id: *id, word }).expect("the maps can be written");
        }
        for (what, drawn) in [("hot", 1), ("any", services)] {
            words.store(lookup::SERVICES, drawn.into());
            let mut run = |name| lookups.run(name, REPEAT).duration.as_nanos() as f64;
            // The least of ten: whatever else runs only adds.
            let mut least = |name| (0..10).map(|_| run(name)).fold(f64::MAX, f64::min);
            let ns = least("lookup_choose") - least("lookup_draw");
            say(&format!("look-up by {name}, {what} service"), ns, "ns");
        }
    }
    assert_eq!(words.load(lookup::Verdict::Missed as u32), 0, "every look-up finds a backend");
}

/// From a registry's snapshot, in which one backend has been exchanged, to the store of the service word that
/// shows it; done as the daemon does it.
fn change(
    written: &mut Written,
    mut before: [Option<Arc<Snapshot>>; 1],
    mut catalog: Catalog,
    (services, backends, changes): (u32, u32, u32),
) {
    let mut times = Vec::new();
    for n in 0..changes {
        let mut snapshot = Snapshot::clone(before[0].as_ref().expect("it was made"));
        let changed = service(n.wrapping_mul(2_654_435_761) % services, 0).id;
        let mut changed = Service::clone(&snapshot.services[&changed]);
        let (address, _) = lookup::endpoint(n, 2 + n, backends);
        changed.instances[0].address = IpAddr::V6(Ipv6Addr::from(address.octets()));
        snapshot.services.insert(changed.id.clone(), Arc::new(changed));
        let now = [Some(Arc::new(snapshot))];

        let start = Instant::now();
        let new = catalog.follow(&before, &now).expect("nothing else is claimed");
        let changes = new.changes(&catalog).expect("the frontends are the same");
        let ops = written.plan(&catalog::desired(changes, &Node), Prune::No);
        ops.iter().for_each(|op| written.write(op));
        times.push(start.elapsed());
        // Nobody reads: there is nobody to wait for.
        written.applied.begin_grace();
        written.applied.end_grace().iter().for_each(|op| written.write(op));
        written.reclaim();
        (before, catalog) = (now, new);
    }
    times.sort_unstable();
    for (what, share) in [("one change visible, p50", 50), ("one change visible, p99", 99)] {
        say(what, times[times.len() * share / 100].as_secs_f64() * 1e6, "us");
    }
    say("changes", f64::from(changes), "");
}

/// Bytes of this process's own memory.
fn anonymous() -> f64 {
    let status = fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
    line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") * 1024.0
}

/// Bytes that the kernel has locked for maps whose size follows the number of backends, per backend.
fn locked(pin_dir: &Path, sizes: &Sizes) -> f64 {
    let locked = |name| {
        let pin = pin_dir.join(format!("abi-{}/{name}", abi::VERSION));
        let map = MapData::from_pin(pin).expect("it is pinned");
        let info = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
        let info = fs::read_to_string(info).expect("procfs");
        let line = info.lines().find_map(|line| line.strip_prefix("memlock:")).expect("memlock");
        line.trim().parse::<f64>().expect("a number")
    };
    let maps = [abi::map::BACKENDS, abi::map::SLOTS, abi::map::LOAD, abi::map::HEALTH];
    maps.map(locked).iter().sum::<f64>() / f64::from(sizes.backends)
}

/// What the verifier went through, and how deep the stack of each program is.
fn programs() {
    let written = Written::new(Sizes { frontends: 1, services: 2, backends: 2, slots: 2 });
    let pins = Pins::new(written.pin_dir());
    let maps: Vec<_> = pinned_maps(&pins).expect("they are pinned").iter().map(|(_, map)| map.id()).collect();
    let is_ours = |info: &ProgramInfo| {
        info.map_ids().ok().flatten().is_some_and(|used| used.iter().any(|map| maps.contains(map)))
    };
    let object = bench_object().with_file_name("mesh-ebpf");
    let object =
        aya_obj::Object::parse(&fs::read(object).expect("the daemon's object")).expect("it can be read");
    for info in loaded_programs().flatten().filter(is_ours) {
        let name = info.name_as_str().expect("it has a name");
        let code =
            object.functions.values().find(|function| function.name == name).expect("it is in the object");
        let verified = info.verified_instruction_count().expect("Linux 5.16");
        say(&format!("{name}: verified instructions"), f64::from(verified), "");
        say(&format!("{name}: instructions"), code.instructions.len() as f64, "");
        say(&format!("{name}: stack"), f64::from(stack(&code.instructions)), "B");
    }
}

/// How far below the frame pointer a function reaches.
fn stack(code: &[bpf_insn]) -> i32 {
    const FRAME: u8 = 10;
    const MOVE: u8 = 0xbf;
    const ADD: u8 = 0x07;
    let direct = code
        .iter()
        .filter(|insn| insn.src_reg() == FRAME || insn.dst_reg() == FRAME)
        .map(|insn| -i32::from(insn.off));
    // An address on the stack: the frame pointer's copy, and then what is added to it.
    let address = code.windows(2).filter(|pair| {
        (pair[0].code, pair[0].src_reg(), pair[1].code) == (MOVE, FRAME, ADD)
            && pair[0].dst_reg() == pair[1].dst_reg()
    });
    direct.chain(address.map(|pair| -pair[1].imm)).max().unwrap_or(0)
}
