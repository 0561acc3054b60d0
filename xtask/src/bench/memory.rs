//! What a task costs that does nothing: memory and CPU time of the daemon and its maps, and of an Envoy in
//! each task; and how long a new task waits for its first answer.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::{
    Effort,
    load::order,
    rivals::{State, envoy, envoy_template, fill, load_assignment, run_envoy, write_endpoints},
    stats::{comparison, median},
    usage::of_cgroup,
    world::{Cgroup, Namespace, OURS, Place, Process, Service, Topology, World, check_interrupted},
};
use crate::{
    node::{Node, cgroup2},
    tools::{self, output},
};

/// What its rows begin with.
pub(super) const PREFIX: &str = "memory: ";
pub(super) const STARTUP: &str = "memory: start of a task until its first answer";

pub(super) const TASKS: [usize; 4] = [1, 10, 50, 100];
/// Services, each with so many backends.
pub(super) const SERVICES: [usize; 2] = [10, 1000];
const BACKENDS: usize = 10;
pub(super) const ABOUT: &str = "Tasks that do nothing, each in a namespace and a cgroup of its own. mesh: the daemon's proportional set size \
    without the pages of its maps, and what the kernel says those take: at the usual sizes (16,384 services, 65,536 backends), \
    in a row of their own with room for twice what is there. envoy-pair-http: the sum over an Envoy in each task, with a listener and a cluster for \
    each service, two workers, and no statistics sink. The start of a task counts from before its processes (and its Envoy) are \
    started to the first answer to an HTTP request; the server's side is up.";

pub(super) const BOTH: &str = "PSS and maps";
pub(super) const ROOM: &str = "maps with room for twice as much";
/// The arm that has an Envoy in each task.
const ENVOY: &str = "envoy-pair-http";
/// No Envoy is started where less of the machine's memory is left, in percent.
const SPARE: u64 = 20;
/// After the last start, before anything is read.
const SETTLE: Duration = Duration::from_secs(3);

pub(super) fn measure(effort: &Effort) -> anyhow::Result<Vec<Value>> {
    let mut world = World::new(Topology::Namespaces, 1, false)?;
    let mut rows = start_up(effort, &mut world)?;
    for services in SERVICES.into_iter().filter(|services| *services == 1000 || !effort.quick()) {
        check_interrupted()?;
        let mut table = Table { effort, services, rows: Vec::new() };
        for (arm, result) in [("mesh", table.mesh(&world)), (ENVOY, table.envoys(&world))] {
            if let Err(error) = result {
                check_interrupted()?;
                eprintln!("bench: memory of {arm}: {error:#}");
                table.missing(TASKS[0], arm, &format!("{error:#}"));
            }
        }
        rows.extend(table.rows);
    }
    Ok(rows)
}

fn catalog(services: usize, http: Option<SocketAddr>) -> String {
    let mut text = String::new();
    let mut service = |name: &str, port: u16, backends: &[SocketAddr]| {
        text += &format!("[[service]]\nname = \"{name}\"\nnamespace = \"service.local\"\nport = {port}\n");
        if name == "http" {
            text += &format!("vip = \"{VIP}\"\n");
        }
        for at in backends {
            text += &format!(
                "[[service.instance]]\nid = \"{}\"\naddress = \"{}\"\nport = {}\n",
                at.ip(),
                at.ip(),
                at.port()
            );
        }
    };
    if let Some(at) = http {
        service("http", Service::Http.port(), &[at]);
    }
    for number in 0..services {
        service(&format!("s{number}"), 80, &backends(number));
    }
    text
}

const VIP: &str = "127.128.0.30";

fn backends(service: usize) -> Vec<SocketAddr> {
    let at = |number: usize| {
        let [high, low] =
            u16::try_from(service * BACKENDS + number).expect("at most 65,536 backends").to_be_bytes();
        SocketAddr::from(([10, 78, high, low], 80))
    };
    (0..BACKENDS).map(at).collect()
}

struct Table<'a> {
    effort: &'a Effort,
    services: usize,
    rows: Vec<Value>,
}

impl Table<'_> {
    fn row(&mut self, what: &str, tasks: usize, arm: &str, value: f64, unit: &str) {
        self.rows.push(json!({
            "measure": self.measure(what), "topology": format!("{tasks} tasks"), "arm": arm, "value": value,
            "unit": unit, "vs_direct": null,
        }));
    }

    fn missing(&mut self, tasks: usize, arm: &str, why: &str) {
        self.rows.push(json!({
            "measure": self.measure(BOTH), "topology": format!("{tasks} tasks"), "arm": arm, "value": null,
            "unit": "MiB", "vs_direct": null, "missing": why,
        }));
    }

    fn measure(&self, what: &str) -> String {
        format!("{PREFIX}{} services x {BACKENDS}: {what}", self.services)
    }

    fn mesh(&mut self, world: &World) -> anyhow::Result<()> {
        eprintln!("bench: memory, {} services: mesh", self.services);
        let room =
            mib(map_bytes(&self.node(world, Some([2 * self.services, 2 * self.services * BACKENDS]))?)?);
        let node = self.node(world, None)?;
        let daemon = Cgroup::new(cgroup2()?.join(format!("{OURS}-memory-daemon")))?;
        let pid = node.pid().context("the daemon runs")?;
        fs::write(daemon.path().join("cgroup.procs"), pid.to_string())?;
        let maps = mib(map_bytes(&node)?);
        let mut tasks = Vec::new();
        for count in TASKS.into_iter().filter(|count| [1, 100].contains(count) || !self.effort.quick()) {
            while tasks.len() < count {
                check_interrupted()?;
                let cgroup = node.cgroup.join(format!("task-{}", tasks.len()));
                tasks.push(Task::start(world, tasks.len(), cgroup)?);
            }
            thread::sleep(SETTLE);
            self.row("PSS without files", count, "mesh", mib(pss(pid, "Pss_Anon:")?), "MiB");
            let pss = mib(pss(pid, "Pss:")? - pss_of_maps(pid)?);
            self.row("PSS", count, "mesh", pss, "MiB");
            self.row("maps", count, "mesh", maps, "MiB");
            self.row(ROOM, count, "mesh", room, "MiB");
            self.row(BOTH, count, "mesh", pss + maps, "MiB");
            self.idle(count, "mesh", &[daemon.path()])?;
        }
        Ok(())
    }

    /// A daemon that serves everything.
    fn node(&self, world: &World, room: Option<[usize; 2]>) -> anyhow::Result<Node> {
        let mut node = Node::new(&format!("{OURS}-memory"))?;
        node.namespace = Some(world.switch.clone());
        node.room = room;
        node.write_services(&catalog(self.services, None))?;
        node.start()?;
        Ok(node)
    }

    fn envoys(&mut self, world: &World) -> anyhow::Result<()> {
        eprintln!("bench: memory, {} services: Envoys", self.services);
        let dir = world.dir.join("memory");
        fs::create_dir_all(&dir)?;
        let listener = |number: usize| {
            let [high, low] = u16::try_from(number).expect("few services").to_be_bytes();
            SocketAddr::from(([127, 255, high, low], 80))
        };
        let mut services = Vec::new();
        for number in 0..self.services {
            let (name, at) = (format!("s{number}"), listener(number));
            let endpoints: Vec<_> = backends(number).into_iter().map(|at| (at, State::Active)).collect();
            services.push(vec![
                ("$ENDPOINTS", load_assignment(&name, &endpoints).to_string()),
                ("$NAME", name),
                ("$ADDRESS", at.ip().to_string()),
                ("$PORT", at.port().to_string()),
            ]);
        }
        let config = fill(&without_files(envoy_template("egress-http")), &services, &[]);
        let (mut tasks, mut envoys): (Vec<Task>, Vec<Process>) = (Vec::new(), Vec::new());
        for count in TASKS.into_iter().filter(|count| *count == 1 || !self.effort.quick()) {
            if count > self.effort.most_envoys(self.services) {
                // Where there is more time there are more.
                self.missing(count, ENVOY, "not started here");
                continue;
            }
            while envoys.len() < count {
                check_interrupted()?;
                if spare()? < SPARE {
                    let why = format!("{} Envoys left {SPARE} % of the memory", envoys.len());
                    self.missing(count, ENVOY, &why);
                    return Ok(());
                }
                let cgroup = cgroup2()?.join(format!("{OURS}-task-{}", tasks.len()));
                let task = Task::start(world, tasks.len(), cgroup)?;
                let own = dir.join(format!("task-{}", tasks.len()));
                fs::create_dir_all(&own)?;
                envoys.push(run_envoy(task.place.command(envoy()?), &own, &config)?);
                tasks.push(task);
                // A few start at a time.
                if envoys.len() % 8 == 0 || envoys.len() == count {
                    for task in tasks.iter().rev().take(8) {
                        task.place.first_answer(Service::Bulk, listener(self.services - 1))?;
                    }
                }
            }
            thread::sleep(SETTLE);
            let pss = envoys.iter().map(|envoy| pss(envoy.id(), "Pss:")).sum::<anyhow::Result<u64>>()?;
            self.row(BOTH, count, ENVOY, mib(pss), "MiB");
            let cgroups: Vec<_> = tasks.iter().map(|task| task.place.cgroup.clone()).collect();
            self.idle(count, ENVOY, &cgroups)?;
        }
        Ok(())
    }

    fn idle(&mut self, tasks: usize, arm: &str, cgroups: &[PathBuf]) -> anyhow::Result<()> {
        let used = || cgroups.iter().map(|path| of_cgroup(path)).sum::<anyhow::Result<Duration>>();
        let (before, start) = (used()?, Instant::now());
        thread::sleep(self.effort.idle);
        let used = used()? - before;
        let value = used.as_secs_f64() * 1e3 / start.elapsed().as_secs_f64();
        self.row("idle CPU", tasks, arm, value, "ms/s");
        Ok(())
    }
}

/// Endpoints in the configuration itself: an Envoy that watches a file for each cluster uses an inotify
/// instance for each, of which a user has 128.
fn without_files(template: &str) -> String {
    let line = |line: &str| match line.trim() {
        "type: EDS" => "    type: STATIC\n".to_owned(),
        line if line.starts_with("eds_cluster_config:") => "    load_assignment: $ENDPOINTS\n".to_owned(),
        _ => format!("{line}\n"),
    };
    template.lines().map(line).collect()
}

/// A task that does nothing: a namespace, a cgroup, a process.
struct Task {
    place: Place,
    _sleep: Process,
    _cgroup: Cgroup,
    _namespace: Namespace,
}

impl Task {
    fn start(world: &World, number: usize, cgroup: PathBuf) -> anyhow::Result<Self> {
        let name = format!("{OURS}-task-{number}");
        let (namespace, cgroup) = (Namespace::new(name.clone())?, Cgroup::new(cgroup)?);
        let place = Place::new(&name, cgroup.path());
        let sleep = Process::start(place.command("sleep").arg("infinity"), &world.dir.join("sleep.log"))?;
        Ok(Self { place, _sleep: sleep, _cgroup: cgroup, _namespace: namespace })
    }
}

/// From the start of a task, with its Envoy where it has one, until a call through the arm works.
fn start_up(effort: &Effort, world: &mut World) -> anyhow::Result<Vec<Value>> {
    const ARMS: [&str; 3] = ["direct", "mesh", ENVOY];
    eprintln!("bench: memory, start of a task");
    let backend = SocketAddr::new(world.addresses()[0], Service::Http.backend_port());
    let mut node = Node::new(&format!("{OURS}-memory"))?;
    node.namespace = Some(world.switch.clone());
    node.write_services(&catalog(10, Some(backend)))?;
    node.start()?;
    let dir = world.dir.join("start");
    fs::create_dir_all(&dir)?;
    write_endpoints(&dir, Service::Http.name(), &[(backend, State::Active)])?;
    let values = vec![
        ("$NAME", Service::Http.name().to_owned()),
        ("$ADDRESS", "127.255.0.1".to_owned()),
        ("$PORT", Service::Http.port().to_string()),
    ];
    let config = fill(envoy_template("egress-http"), &[values], &[("$DIR", dir.display().to_string())]);
    let mut taken = [const { Vec::new() }; ARMS.len()];
    for round in 0..effort.starts {
        for arm in order(ARMS.len(), round) {
            check_interrupted()?;
            let namespace = world.plug(&format!("start-{round}-{arm}"))?;
            let (parent, at) = match ARMS[arm] {
                "mesh" => (node.cgroup.clone(), SocketAddr::new(VIP.parse()?, Service::Http.port())),
                "direct" => (cgroup2()?, backend),
                _ => (cgroup2()?, SocketAddr::new(IpAddr::from([127, 255, 0, 1]), Service::Http.port())),
            };
            let cgroup = Cgroup::new(parent.join(format!("{OURS}-start")))?;
            let place = Place::new(&namespace, cgroup.path());
            let start = Instant::now();
            let _envoy = match ARMS[arm] {
                ENVOY => Some(run_envoy(place.command(envoy()?), &dir, &config)?),
                _ => None,
            };
            place.first_answer(Service::Http, at)?;
            taken[arm].push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    let rows = ARMS.iter().zip(&taken).map(|(arm, values)| {
        let ratios = values.iter().zip(&taken[0]).map(|(value, direct)| vec![value / direct]).collect();
        json!({
            "measure": STARTUP, "topology": Topology::Namespaces.name(), "arm": arm,
            "value": median(values.clone()), "unit": "ms",
            "vs_direct": comparison(ratios),
        })
    });
    Ok(rows.collect())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Proportional set size, in bytes.
fn pss(pid: u32, what: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("smaps_rollup"))?;
    Ok(kilobytes(&text, what)? << 10)
}

/// What of it are pages of BPF maps, which the kernel's own figure has in it as well.
fn pss_of_maps(pid: u32) -> anyhow::Result<u64> {
    let text = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("smaps"))?;
    // proc_pid_smaps(5): a line with the name, then one for each figure.
    let (mut is_map, mut sum) = (false, 0);
    for line in text.lines() {
        match line.split_once(' ') {
            Some(("Pss:", figure)) if is_map => sum += kilobytes(figure, "")?,
            Some((key, _)) if !key.ends_with(':') => is_map = line.ends_with("bpf-map"),
            _ => {}
        }
    }
    Ok(sum << 10)
}

fn kilobytes(text: &str, what: &str) -> anyhow::Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(what));
    let line = line.with_context(|| format!("no {what:?}"))?;
    Ok(line.trim().trim_end_matches("kB").trim().parse()?)
}

/// How much of the memory is available, in percent.
fn spare() -> anyhow::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    Ok(kilobytes(&text, "MemAvailable:")? * 100 / kilobytes(&text, "MemTotal:")?)
}

/// What the kernel says that a node's maps take.
fn map_bytes(node: &Node) -> anyhow::Result<u64> {
    let mut list = Command::new(tools::mesh());
    list.args(["bpf", "maps", "-o", "json", "--config"]).arg(&node.config);
    let ours: Vec<Value> = serde_json::from_str(&output(&mut list)?)?;
    let all: Vec<Value> =
        serde_json::from_str(&output(Command::new("bpftool").args(["-j", "map", "show"]))?)?;
    let mut bytes = 0;
    for map in &ours {
        let info = all.iter().find(|info| info["id"] == map["id"]);
        let Some(size) = info.and_then(|info| info["bytes_memlock"].as_u64()) else {
            bail!("bpftool does not know map {}", map["name"]);
        };
        bytes += size;
    }
    Ok(bytes)
}
