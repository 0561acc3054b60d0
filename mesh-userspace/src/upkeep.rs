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
    /// Places that did not fit their sockets at the last audit.
    suspects: Vec<Place>,
    warned: BTreeSet<&'static str>,
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
            suspects: Vec::new(),
            warned: BTreeSet::new(),
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
                audit = Instant::now() + if self.suspects.is_empty() { AUDIT } else { PERIOD };
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
        // Looked at before it is asked whose the ids are: they may be another backend's soon.
        let places = self.sockets.taken();
        let mut left = HashMap::new();
        for leaving in due {
            let is_left = |place: &&Place| {
                let was = leaving.was.map_or(place.peer, |(_, endpoint)| endpoint);
                place.backend == u64::from(leaving.backend) && place.peer == was
            };
            let held: Vec<_> = places.iter().filter(is_left).collect();
            if held.is_empty() || self.is_taken(leaving.backend) || self.is_back(&leaving) {
                self.leaving.remove(&leaving.backend);
                continue;
            }
            left.extend(held.into_iter().map(|place| (place.cookie, *place)));
            // Looked at again, until none of its sockets is found any more.
            self.leaving.insert(leaving.backend, Leaving { due: now + PERIOD, ..leaving });
        }
        if left.is_empty() {
            return Ok(());
        }
        let mut found = Vec::new();
        let mut result = Ok(());
        for namespace in netns::all()? {
            // What does not work in one may work in the next.
            match namespace.run(|| close(&left)) {
                Ok(closed) => found.extend(closed),
                Err(error) => result = Err(error),
            }
        }
        if !found.is_empty() {
            tracing::info!("closed {} sockets that were left behind on backends that are gone", found.len());
        }
        if result.is_ok() {
            let closed = |id: &u32| found.iter().any(|place| place.backend == u64::from(*id));
            let ids: HashSet<_> = left.values().map(|place| place.backend).collect();
            self.leaving.retain(|id, _| closed(id) || !ids.contains(&u64::from(*id)));
        }
        result
    }

    /// Whether a backend's id is another one's by now, or nobody's.
    fn is_taken(&self, id: u32) -> bool {
        !self.applied.read().expect("no writer panics").resting().any(|resting| resting == id)
    }

    /// Whether a service has this backend again, under another id.
    fn is_back(&self, leaving: &Leaving) -> bool {
        let applied = self.applied.read().expect("no writer panics");
        leaving.was.is_some_and(|(protocol, endpoint)| applied.has(protocol.number(), &endpoint))
    }

    /// Sets right, once it is seen twice in a row, what no program was there to see: the places of
    /// sockets that are in no namespace are freed, and sockets that have dialled something else
    /// are taken off the count.
    fn audit(&mut self) -> io::Result<()> {
        let (again, new): (Vec<_>, Vec<_>) =
            self.wrong()?.into_iter().partition(|(place, _)| self.suspects.contains(place));
        if !again.is_empty() {
            // Once more, right before: a socket may have dialled meanwhile.
            let wrong = self.wrong()?;
            for (place, is_alive) in again.into_iter().filter(|suspect| wrong.contains(suspect)) {
                if is_alive {
                    self.sockets.take_off(place);
                } else {
                    self.sockets.free(place);
                }
            }
        }
        self.suspects = new.into_iter().map(|(place, _)| place).collect();
        Ok(())
    }

    /// Places that do not fit their sockets, and whether these are alive.
    fn wrong(&self) -> io::Result<Vec<(Place, bool)>> {
        let places = self.sockets.taken();
        if places.is_empty() {
            return Ok(Vec::new());
        }
        let mut alive = HashMap::new();
        for namespace in netns::all()? {
            alive.extend(namespace.run(peers)?);
        }
        let look = |place: Place| match alive.get(&place.cookie) {
            None => Some((place, false)),
            Some(peer) => (place.backend != 0 && *peer != place.peer).then_some((place, true)),
        };
        Ok(places.into_iter().filter_map(look).collect())
    }

    /// Says once that something does not work here.
    fn report(&mut self, what: &'static str, result: io::Result<()>) {
        if let Err(error) = result
            && self.warned.insert(what)
        {
            tracing::warn!("{what}: {error}");
        }
    }
}

/// The sockets in the namespace of the calling thread, by their cookies, and their peers.
fn peers() -> io::Result<HashMap<u64, Endpoint>> {
    let mut peers = HashMap::new();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let sockets = sockets::list(protocol.number())?;
        peers.extend(sockets.iter().map(|socket| (socket.cookie(), socket.peer())));
    }
    Ok(peers)
}

/// Closes those of these sockets that are in the namespace of the calling thread, but none that
/// has dialled something else since.
fn close(left: &HashMap<u64, Place>) -> io::Result<Vec<Place>> {
    let mut closed = Vec::new();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for socket in sockets::list(protocol.number())? {
            if let Some(place) = left.get(&socket.cookie())
                && place.peer == socket.peer()
                && sockets::destroy(&socket)?
            {
                closed.push(*place);
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
