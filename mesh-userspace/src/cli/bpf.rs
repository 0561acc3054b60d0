//! The raw kernel view: read from the pins, without the daemon.

use std::collections::{BTreeMap, BTreeSet};

use mesh_common::abi::{Backend, Frontend, ServiceWord, map};
use serde::Serialize;

use super::output::{Format, or_dash, print, table};
use crate::{
    api::objects::{Share, join},
    datapath::{Maps, PROGRAMS, Pins, ProgramInfo, Stats, pinned_maps, program_info},
    model::Protocol,
    plan::alias,
};

#[derive(Serialize)]
struct MapRow {
    name: &'static str,
    id: u32,
    r#type: String,
    key_bytes: u32,
    value_bytes: u32,
    used: Option<usize>,
    max: u32,
}

pub(super) fn maps(pins: &Pins, format: Format) -> anyhow::Result<()> {
    let dump = Maps::open(pins)?.dump()?;
    let slots: usize = dump.services.values().map(|word| word.count() as usize).sum();
    let services = dump.services.len();
    // A backend that is gone has its id for as long as a socket is counted on it.
    let backends = dump.backends.keys().chain(&dump.busy).collect::<BTreeSet<_>>().len();
    let stats = Stats::open(pins)?;
    let (places, all_places) = stats.places();
    let (affinities, _) = stats.affinities()?;
    let used = BTreeMap::from([
        (map::FRONTENDS, dump.frontends.len()),
        (map::SERVICES, services),
        (map::SETTINGS, services),
        (map::EJECTED, services),
        (map::CURSORS, services),
        (map::BACKENDS, backends),
        (map::LOAD, backends),
        (map::HEALTH, backends),
        (map::SLOTS, slots),
        (map::SOCKETS, places as usize),
        (map::CONNECTIONS, places as usize),
        (map::AFFINITY, affinities as usize),
    ]);
    let mut rows = Vec::new();
    for (name, info) in pinned_maps(pins)? {
        rows.push(MapRow {
            name,
            id: info.id(),
            r#type: info.map_type().map_or("unknown".into(), |kind| format!("{kind:?}")),
            key_bytes: info.key_size(),
            value_bytes: info.value_size(),
            used: used.get(name).copied(),
            // An entry there is a row of places.
            max: if name == map::SOCKETS { all_places } else { info.max_entries() },
        });
    }
    print(format, &rows, |rows| {
        let headers = ["NAME", "ID", "TYPE", "KEY", "VALUE", "USED", "MAX"];
        let text = |row: &MapRow| {
            let sizes = [
                row.key_bytes.to_string(),
                row.value_bytes.to_string(),
                or_dash(row.used),
                row.max.to_string(),
            ];
            [vec![row.name.into(), row.id.to_string(), row.r#type.clone()], sizes.into()].concat()
        };
        table(&headers, rows.iter().map(text))
    })
}

#[derive(Serialize)]
struct ProgramRow {
    name: &'static str,
    attached: bool,
    link: Option<u32>,
    program: Option<u32>,
    cgroup: Option<u64>,
    /// What the verifier looked at; from Linux 5.16 on.
    verified_instructions: Option<u32>,
    /// Counted only while kernel.bpf_stats_enabled is set.
    runs: Option<u64>,
    run_ns: Option<u128>,
}

pub(super) fn programs(pins: &Pins, format: Format) -> anyhow::Result<()> {
    pins.exist()?;
    let rows = PROGRAMS.map(|name| {
        let info = pins.link_info(name);
        let program = info.and_then(|info| program_info(info.program));
        ProgramRow {
            name,
            attached: info.is_some(),
            link: info.map(|info| info.id),
            program: info.map(|info| info.program),
            cgroup: info.map(|info| info.cgroup),
            verified_instructions: program.as_ref().and_then(ProgramInfo::verified_instruction_count),
            runs: program.as_ref().map(ProgramInfo::run_count),
            run_ns: program.as_ref().map(|program| program.run_time().as_nanos()),
        }
    });
    print(format, &rows, |rows| {
        let headers = ["NAME", "ATTACHED", "LINK", "PROGRAM", "CGROUP", "RUNS"];
        let text = |row: &ProgramRow| {
            let attached = if row.attached { "yes" } else { "no" };
            vec![
                row.name.into(),
                attached.into(),
                or_dash(row.link),
                or_dash(row.program),
                or_dash(row.cgroup),
                or_dash(row.runs),
            ]
        };
        table(&headers, rows.iter().map(text))
    })
}

#[derive(Serialize)]
struct LbRow {
    frontend: String,
    protocol: String,
    service: u32,
    backends: Vec<Share>,
}

pub(super) fn lb(pins: &Pins, format: Format) -> anyhow::Result<()> {
    let maps = Maps::open(pins)?;
    let dump = maps.dump()?;
    let row = |(frontend, service): (&Frontend, &u32)| {
        let word = dump.services.get(service).copied().unwrap_or_default();
        LbRow {
            frontend: join(frontend.address.ip(), frontend.port.get()),
            protocol: protocol(frontend.protocol),
            service: *service,
            backends: backends(&maps, word, &dump.backends),
        }
    };
    let rows: Vec<_> = dump.frontends.iter().map(row).collect();
    print(format, &rows, |rows| {
        let text = |row: &LbRow| {
            let frontend = format!("{}/{}", row.frontend, row.protocol);
            let line = |share: &Share| {
                let backend = join(share.address, share.port);
                vec![
                    frontend.clone(),
                    row.service.to_string(),
                    share.id.to_string(),
                    backend,
                    format!("{:.2} %", share.share * 100.0),
                ]
            };
            match row.backends.is_empty() {
                true => {
                    vec![vec![frontend.clone(), row.service.to_string(), "-".into(), "-".into(), "-".into()]]
                }
                false => row.backends.iter().map(line).collect::<Vec<_>>(),
            }
        };
        table(&["FRONTEND", "SERVICE", "ID", "BACKEND", "SHARE"], rows.iter().flat_map(text))
    })
}

fn backends(maps: &Maps, word: ServiceWord, backends: &BTreeMap<u32, Backend>) -> Vec<Share> {
    let shares = alias::shares(&maps.slots(word)).into_iter();
    let share = |(id, share)| {
        let backend = backends.get(&id)?;
        Some(Share { id, address: backend.address.ip(), port: backend.port.get(), share })
    };
    shares.filter_map(share).collect()
}

fn protocol(number: u8) -> String {
    Protocol::from_number(number).map_or_else(|| number.to_string(), |protocol| protocol.to_string())
}
