//! What the daemon does on the node besides the maps: in every network namespace it refuses the
//! VIP ranges to whatever is not translated, closes sockets that are left behind on backends that
//! are gone, and takes sockets off the counts that ended unseen.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    io,
    path::PathBuf,
    sync::{Arc, RwLock, mpsc},
    time::{Duration, Instant},
};

use ipnet::IpNet;
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    datapath::{Pins, Place, Sockets},
    model::Protocol,
    netns::{self, routes, sockets},
    plan::{Applied, Endpoint},
};

/// How often new namespaces are looked for.
const PERIOD: Duration = Duration::from_secs(1);
/// Every so many looks all namespaces are looked at.
const FULL_LOOK: u32 = 30;
/// How often the counts are compared with the sockets that there are.
const AUDIT: Duration = Duration::from_secs(60);

/// A backend that is gone, and when the sockets that are connected to it are closed.
#[derive(Clone, Copy, Debug)]
pub struct Leaving {
    pub backend: u32,
    pub due: Instant,
    /// What it was, unless it went while no daemon ran.
    pub was: Option<(Protocol, Endpoint)>,
}

pub struct Upkeep {
    cgroup: PathBuf,
    ranges: Vec<IpNet>,
    priority: u32,
    sockets: Sockets,
    applied: Arc<RwLock<Applied>>,
    leaving: BTreeMap<u32, Leaving>,
    /// Processes whose namespaces have been dealt with. A namespace's number may soon be another
    /// one's, so it is no use to remember those.
    pids: BTreeSet<u32>,
    looks: u32,
    /// Places whose sockets were not to be found at the last audit.
    missing: Vec<Place>,
    warned: bool,
}

impl Upkeep {
    pub fn new(
        pins: &Pins,
        cgroup: PathBuf,
        ranges: Vec<IpNet>,
        applied: Arc<RwLock<Applied>>,
    ) -> Result<Self, crate::datapath::Error> {
        Ok(Self {
            cgroup,
            ranges,
            priority: priority(pins),
            sockets: Sockets::open(pins)?,
            applied,
            leaving: BTreeMap::new(),
            pids: BTreeSet::new(),
            looks: 0,
            missing: Vec::new(),
            warned: false,
        })
    }

    /// Works until the sender is gone. Blocks: run it on a thread of its own.
    pub fn run(mut self, leaving: &mpsc::Receiver<Leaving>) {
        let mut look = Instant::now();
        let mut audit = Instant::now();
        loop {
            if look <= Instant::now() {
                look = Instant::now() + PERIOD;
                self.guard();
            }
            if audit <= Instant::now() {
                let result = self.audit();
                self.report("cannot compare the counts with the sockets", result);
                audit = Instant::now() + if self.missing.is_empty() { AUDIT } else { PERIOD };
            }
            let result = self.close();
            self.report("cannot close sockets that are left behind", result);
            let next = self.leaving.values().map(|leaving| leaving.due).chain([look]).min().unwrap_or(look);
            // A socket that could not be closed is tried again, but not at once.
            let wait = next.saturating_duration_since(Instant::now()).max(Duration::from_millis(20));
            match leaving.recv_timeout(wait) {
                Ok(new) => drop(self.leaving.insert(new.backend, new)),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Refuses the VIP ranges in the namespaces of new processes, and now and then in all of them:
    /// a process may have changed its namespace.
    fn guard(&mut self) {
        if self.looks.is_multiple_of(FULL_LOOK) {
            self.pids.clear();
            let result = routes::refuse(&self.ranges, self.priority);
            self.report("cannot set a route for the VIP ranges", result);
        }
        self.looks = self.looks.wrapping_add(1);
        for namespace in netns::of_cgroup(&self.cgroup, &mut self.pids) {
            let result = namespace.run(|| routes::refuse(&self.ranges, self.priority));
            self.report("cannot set a route for the VIP ranges in a network namespace", result);
        }
    }

    /// Closes what is due.
    fn close(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let due: Vec<_> = self.leaving.values().filter(|leaving| leaving.due <= now).copied().collect();
        if due.is_empty() {
            return Ok(());
        }
        // Looked at again, until none of its sockets is found any more.
        let ids: HashSet<_> = due.iter().map(|leaving| u64::from(leaving.backend)).collect();
        let mut left: HashMap<_, _> = HashMap::new();
        for place in self.sockets.taken().iter().filter(|place| ids.contains(&place.backend)) {
            left.insert(place.cookie, *place);
        }
        for leaving in &due {
            let held = left.values().any(|place| place.backend == u64::from(leaving.backend));
            if !held || self.is_back(leaving) {
                left.retain(|_, place| place.backend != u64::from(leaving.backend));
                self.leaving.remove(&leaving.backend);
            }
        }
        if left.is_empty() {
            return Ok(());
        }
        let mut found = HashSet::new();
        for namespace in netns::all()? {
            let closed = namespace.run(|| close(&left))?;
            if !closed.is_empty() {
                let count = closed.len();
                tracing::info!("closed {count} sockets that were left behind on backends that are gone");
            }
            found.extend(closed);
        }
        for leaving in due {
            if found.contains(&u64::from(leaving.backend)) {
                self.leaving.insert(leaving.backend, Leaving { due: now + PERIOD, ..leaving });
            } else {
                self.leaving.remove(&leaving.backend);
            }
        }
        Ok(())
    }

    /// Whether a service has this backend again, under another id.
    fn is_back(&self, leaving: &Leaving) -> bool {
        let applied = self.applied.read().expect("no writer panics");
        leaving.was.is_some_and(|(protocol, endpoint)| applied.has(protocol.number(), &endpoint))
    }

    /// Frees the places of sockets that are not in any namespace, twice in a row: their end came
    /// while no program was there to see it.
    fn audit(&mut self) -> io::Result<()> {
        let places = self.sockets.taken();
        if places.is_empty() {
            self.missing.clear();
            return Ok(());
        }
        let mut alive = HashSet::new();
        for namespace in netns::all()? {
            alive.extend(namespace.run(cookies)?);
        }
        let missing = places.into_iter().filter(|place| !alive.contains(&place.cookie));
        let (again, new): (Vec<_>, Vec<_>) = missing.partition(|place| self.missing.contains(place));
        again.into_iter().for_each(|place| self.sockets.free(place));
        self.missing = new;
        Ok(())
    }

    /// Says once that something does not work here.
    fn report(&mut self, what: &str, result: io::Result<()>) {
        if let Err(error) = result
            && !std::mem::replace(&mut self.warned, true)
        {
            tracing::warn!("{what}: {error}");
        }
    }
}

fn cookies() -> io::Result<Vec<u64>> {
    let mut cookies = Vec::new();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        cookies.extend(sockets::list(protocol.number())?.iter().map(sockets::Socket::cookie));
    }
    Ok(cookies)
}

/// Closes those of these sockets that are in the namespace of the calling thread, but none that
/// has dialled something else since; returns their backends.
fn close(left: &HashMap<u64, Place>) -> io::Result<Vec<u64>> {
    let mut closed = Vec::new();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for socket in sockets::list(protocol.number())? {
            if let Some(place) = left.get(&socket.cookie())
                && place.peer == socket.peer()
                && sockets::destroy(&socket)?
            {
                closed.push(place.backend);
            }
        }
    }
    Ok(closed)
}

/// Removes the routes of the daemon with these pins, from every namespace.
pub fn cleanup(pins: &Pins) -> io::Result<()> {
    let priority = priority(pins);
    for namespace in netns::all()? {
        namespace.run(|| routes::refuse(&[], priority))?;
    }
    Ok(())
}

/// Each daemon has routes of its own, told apart by its pin folder.
fn priority(pins: &Pins) -> u32 {
    const LARGE: u32 = 1 << 30;
    #[expect(clippy::cast_possible_truncation, reason = "any bits will do")]
    let hash = xxh3_64(pins.dir().as_os_str().as_encoded_bytes()) as u32;
    LARGE | hash >> 2
}
