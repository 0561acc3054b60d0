//! What the daemon does about sockets: it closes those that are left behind on backends that are gone,
//! in every network namespace, and takes those off the counts that ended unseen.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    io,
    os::fd::BorrowedFd,
    path::PathBuf,
    sync::{Arc, RwLock, mpsc},
    time::{Duration, Instant},
};

use crate::{
    datapath::{Pins, Place, Record, Sockets},
    model::Protocol,
    netns::{self, sockets},
    plan::{Applied, Endpoint},
};

mod counts;

/// How long until sockets are looked at again that were to be closed, or that do not fit.
const PERIOD: Duration = Duration::from_secs(1);
/// The least time between two looks.
const SHORTEST: Duration = Duration::from_millis(20);
/// When it is tried again to close what could not be.
const RETRY: Duration = Duration::from_secs(10);
/// How often the counts are compared with the sockets that there are.
const AUDIT: Duration = Duration::from_secs(60);

/// A backend that is gone, and when the sockets that are connected to it are closed.
#[derive(Clone, Copy, Debug)]
pub struct Leaving {
    pub backend: u32,
    was: (Protocol, Endpoint),
    drain: Duration,
    due: Instant,
    /// Whether a service had it again, under another id, when it was due.
    was_back: bool,
}

impl Leaving {
    pub fn new(backend: u32, was: (Protocol, Endpoint), drain: Duration) -> Self {
        Self { backend, was, drain, due: Instant::now() + drain, was_back: false }
    }
}

/// What the writer of the maps tells.
#[derive(Clone, Copy, Debug)]
pub enum News {
    Left(Leaving),
    /// The sockets of another version were taken over. Some may have ended unseen meanwhile.
    TakenOver,
}

/// Sockets to close.
#[derive(Default)]
struct Left {
    /// Those with a place, by their cookies.
    places: HashMap<u64, Place>,
    /// The backends of those without one.
    stored: HashSet<(u64, Endpoint)>,
}

/// Sockets by their cookies, and what they are connected to.
type Peers = HashMap<u64, (Protocol, Endpoint)>;

pub struct Upkeep {
    cgroup: PathBuf,
    sockets: Sockets,
    applied: Arc<RwLock<Applied>>,
    leaving: BTreeMap<u32, Leaving>,
    /// Places that did not fit their sockets at the last audit.
    suspects: Vec<Place>,
    warned: BTreeSet<&'static str>,
}

impl Upkeep {
    pub fn new(
        pins: &Pins,
        cgroup: PathBuf,
        applied: Arc<RwLock<Applied>>,
    ) -> Result<Self, crate::datapath::Error> {
        Ok(Self {
            cgroup,
            sockets: Sockets::open(pins)?,
            applied,
            leaving: BTreeMap::new(),
            suspects: Vec::new(),
            warned: BTreeSet::new(),
        })
    }

    /// Works until the sender is gone. Blocks: run it on a thread of its own.
    pub fn run(mut self, news: &mpsc::Receiver<News>) {
        let mut audit = Instant::now();
        loop {
            if audit <= Instant::now() {
                let result = self.audit();
                let result = result.and_then(|()| self.recount());
                self.report("cannot compare the counts with the sockets", result);
                audit = Instant::now() + if self.suspects.is_empty() { AUDIT } else { PERIOD };
            }
            let result = self.close();
            self.report("cannot close sockets that are left behind", result);
            let next = self.leaving.values().map(|leaving| leaving.due).chain([audit]).min().unwrap_or(audit);
            // A socket that could not be closed is tried again, but not at once.
            let wait = next.saturating_duration_since(Instant::now()).max(SHORTEST);
            let first = match news.recv_timeout(wait) {
                Ok(first) => first,
                Err(mpsc::RecvTimeoutError::Timeout) => continue,
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
            };
            // All who leave are looked at for each look: where many do, they come together.
            std::thread::sleep(SHORTEST);
            for new in std::iter::once(first).chain(news.try_iter()) {
                match new {
                    News::Left(new) => drop(self.leaving.insert(new.backend, new)),
                    News::TakenOver => audit = Instant::now(),
                }
            }
        }
    }

    /// Closes what is due.
    fn close(&mut self) -> io::Result<()> {
        let left = self.left();
        if left.places.is_empty() && left.stored.is_empty() {
            return Ok(());
        }
        let mut found = Vec::new();
        let (namespaces, mut result) = netns::all();
        for namespace in namespaces {
            // What does not work in one may work in the next.
            match namespace.run(|| close(&left, self.sockets.storage())) {
                Ok(closed) => found.extend(closed),
                Err(error) => result = Err(error),
            }
        }
        if !found.is_empty() {
            tracing::info!("closed {} sockets that were left behind on backends that are gone", found.len());
        }
        // Those that had sockets to close are looked at again.
        let placed = left.places.values().map(|place| place.backend);
        let all = placed.chain(left.stored.iter().map(|(backend, _)| *backend));
        let rest = all.filter(|id| !found.contains(id)).filter_map(|id| u32::try_from(id).ok());
        let rest: HashSet<_> = rest.collect();
        // A kernel that cannot close sockets will not learn it.
        let unable = |error: &io::Error| error.raw_os_error() == Some(libc::EOPNOTSUPP);
        if result.as_ref().err().is_none_or(unable) {
            self.leaving.retain(|id, _| !rest.contains(id));
        } else {
            let rest = self.leaving.iter_mut().filter(|(id, _)| rest.contains(id));
            rest.for_each(|(_, leaving)| leaving.due = Instant::now() + RETRY);
        }
        result
    }

    /// The sockets whose time is over.
    fn left(&mut self) -> Left {
        let now = Instant::now();
        let due: Vec<_> = self.leaving.values().filter(|leaving| leaving.due <= now).copied().collect();
        let mut left = Left::default();
        if due.is_empty() {
            return left;
        }
        // Looked at before it is asked whose the ids are: they may be another backend's soon.
        let mut places = HashMap::<_, Vec<_>>::new();
        for place in self.sockets.taken() {
            places.entry((place.backend, place.peer)).or_default().push(place);
        }
        let applied = self.applied.read().expect("no writer panics");
        let was: HashSet<_> =
            due.iter().map(|Leaving { was: (protocol, at), .. }| (protocol.number(), *at)).collect();
        // Services have these again, under another id.
        let back: HashSet<_> = applied.endpoints().filter(|endpoint| was.contains(endpoint)).collect();
        for leaving in due {
            let Leaving { backend, was: (protocol, endpoint), was_back, .. } = leaving;
            let held = places.remove(&(backend.into(), endpoint)).unwrap_or_default();
            if !applied.is_resting(backend) {
                self.leaving.remove(&backend);
                continue;
            }
            let is_back = back.contains(&(protocol.number(), endpoint));
            // One that was back and went for good has its drain time once more. The others are
            // looked at again, until none of their sockets is found any more.
            let goes_again = was_back && !is_back;
            let wait = if goes_again { leaving.drain } else { PERIOD };
            self.leaving.insert(backend, Leaving { due: now + wait, was_back: is_back, ..leaving });
            if !is_back && !goes_again {
                if self.sockets.load(backend) > held.len() as u64 {
                    left.stored.insert((backend.into(), endpoint));
                }
                left.places.extend(held.into_iter().map(|place| (place.cookie, place)));
            }
        }
        left
    }

    /// Sets right, once it is seen twice in a row, what no program was there to see: the places of
    /// sockets that are in no namespace are freed, and sockets that have dialled something else
    /// are taken off the count.
    fn audit(&mut self) -> io::Result<()> {
        let (places, sockets) = self.look()?;
        self.adopt(&places, &sockets);
        self.adopt_stored()?;
        let (again, new): (Vec<_>, Vec<_>) =
            wrong(places, &sockets).partition(|(place, _)| self.suspects.contains(place));
        if !again.is_empty() {
            // Once more, right before: a socket may have dialled meanwhile.
            let (places, sockets) = self.look()?;
            let wrong: HashSet<_> = wrong(places, &sockets).collect();
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

    /// Backends of which nobody told that they are gone, because no daemon ran: the time of their
    /// sockets begins now.
    fn adopt(&mut self, places: &[Place], sockets: &Peers) {
        let applied = self.applied.read().expect("no writer panics");
        for place in places {
            if let Some(was @ (_, peer)) = sockets.get(&place.cookie)
                && *peer == place.peer
                && let Ok(backend) = u32::try_from(place.backend)
                && applied.is_resting(backend)
            {
                let new = || Leaving::new(backend, *was, self.sockets.drain(place.service));
                self.leaving.entry(backend).or_insert_with(new);
            }
        }
    }

    /// The same for backends whose sockets have no places.
    fn adopt_stored(&mut self) -> io::Result<()> {
        let unknown: HashSet<_> = {
            let applied = self.applied.read().expect("no writer panics");
            applied.resting().filter(|id| !self.leaving.contains_key(id)).map(u64::from).collect()
        };
        if unknown.is_empty() {
            return Ok(());
        }
        let (namespaces, complete) = netns::all();
        for namespace in namespaces {
            for (_, value) in namespace.run(|| sockets::stored(self.sockets.storage()))? {
                if let Some(record) = Record::parse(&value).filter(|record| unknown.contains(&record.backend))
                    && let Ok(backend) = u32::try_from(record.backend)
                {
                    let was = (Protocol::Tcp, record.peer);
                    let new = || Leaving::new(backend, was, self.sockets.drain(record.service));
                    self.leaving.entry(backend).or_insert_with(new);
                }
            }
        }
        complete
    }

    /// The places that are taken, and all sockets by their cookies; an error where some may be
    /// missing.
    fn look(&self) -> io::Result<(Vec<Place>, Peers)> {
        let mut places = self.sockets.taken();
        let mut sockets = Peers::new();
        if places.is_empty() {
            return Ok((places, sockets));
        }
        netns::sees_all(&self.cgroup)?;
        let (namespaces, complete) = netns::all();
        complete?;
        for namespace in namespaces {
            sockets.extend(namespace.run(peers)?);
        }
        // An older list says nothing of a socket that has dialled or ended meanwhile.
        places.retain(|place| self.sockets.is_unchanged(place));
        Ok((places, sockets))
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

/// Places that do not fit their sockets, and whether these are alive.
fn wrong(places: Vec<Place>, sockets: &Peers) -> impl Iterator<Item = (Place, bool)> {
    places.into_iter().filter_map(|place| match sockets.get(&place.cookie) {
        None => Some((place, false)),
        Some((_, peer)) => (place.backend != 0 && *peer != place.peer).then_some((place, true)),
    })
}

/// The sockets in the namespace of the calling thread.
fn peers() -> io::Result<Peers> {
    let mut peers = Peers::new();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let sockets = sockets::list(protocol.number())?;
        peers.extend(sockets.iter().map(|socket| (socket.cookie(), (protocol, socket.peer()))));
    }
    Ok(peers)
}

/// Closes those of these sockets that are in the namespace of the calling thread, but none that
/// has dialled something else since.
fn close(left: &Left, storage: BorrowedFd<'_>) -> io::Result<Vec<u64>> {
    let mut closed = Vec::new();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for socket in sockets::list(protocol.number())? {
            if let Some(place) = left.places.get(&socket.cookie())
                && place.peer == socket.peer()
                && sockets::destroy(&socket)?
            {
                closed.push(place.backend);
            }
        }
    }
    if left.stored.is_empty() {
        return Ok(closed);
    }
    for (socket, value) in sockets::stored(storage)? {
        if let Some(Record { backend, peer, .. }) = Record::parse(&value)
            && left.stored.contains(&(backend, peer))
            && peer == socket.peer()
            && sockets::destroy(&socket)?
        {
            closed.push(backend);
        }
    }
    Ok(closed)
}
