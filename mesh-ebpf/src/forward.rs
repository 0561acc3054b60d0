//! Forward translation: VIP → backend.

use aya_ebpf::helpers::generated::{bpf_get_current_cgroup_id, bpf_get_prandom_u32};
use mesh_common::{
    abi::{Backend, Client, Connection, Frontend, MAX_PEERS, Origin, Peers, ServiceWord},
    health::Fitness,
    outcome::Outcome,
    select::{self, Draw, Policy},
};

use crate::{
    context::{self, Hook},
    health, maps, names,
};

/// Where the first draw leads to an ejected backend: how many more there are, and how many slots
/// are then searched, one after the other, before health is ignored.
const DRAWS: u32 = 8;
const SEARCH: u32 = 32;

/// A `connect()`, of any protocol.
#[inline(always)]
pub(crate) fn connect<const V4: bool>(hook: &Hook<V4>) -> i32 {
    if !maps::in_vip_ranges(&hook.address()) {
        let Some(origin) = names::redirected(hook) else { return context::ALLOW };
        return match hook.connection_to_write() {
            Some(place) => ask(hook, origin, place),
            None => context::ALLOW,
        };
    }
    match translate(hook) {
        // The counter comes before the connection: adding to it waits for all that was written
        // before, and the connection's memory is hardly ever in the CPU's cache.
        Ok(Some(note)) => {
            let answer = finish(Outcome::Translated);
            *note.place = note.connection;
            answer
        }
        Ok(None) => finish(Outcome::OriginLost),
        Err(outcome) => finish(outcome),
    }
}

/// A datagram sent with an address, on a connected socket or not.
#[inline(always)]
pub(crate) fn datagram<const V4: bool>(hook: &Hook<V4>) -> i32 {
    if !maps::in_vip_ranges(&hook.address()) {
        let Some(origin) = names::redirected(hook) else { return context::ALLOW };
        if keep(hook, origin) && hook.rewrite(&origin.backend_address, origin.backend_port) {
            maps::count(Outcome::Answered);
        }
        return context::ALLOW;
    }
    let (Ok(outcome) | Err(outcome)) = translate_datagram(hook);
    finish(outcome)
}

#[inline(always)]
pub(crate) fn finish(outcome: Outcome) -> i32 {
    maps::count(outcome);
    context::answer(outcome.verdict())
}

/// Sends a connect to the daemon's name server.
#[inline(always)]
fn ask<const V4: bool>(hook: &Hook<V4>, origin: Origin, place: &mut Connection) -> i32 {
    *place = Connection::new(0, origin, 0);
    if hook.rewrite(&origin.backend_address, origin.backend_port) {
        maps::count(Outcome::Answered);
    }
    context::ALLOW
}

/// What is still to be written of a connect.
struct Note {
    place: &'static mut Connection,
    connection: Connection,
}

/// None where there is no memory to remember the VIP.
#[inline(always)]
fn translate<const V4: bool>(hook: &Hook<V4>) -> Result<Option<Note>, Outcome> {
    let Choice { origin, flags } = redirect(hook)?;
    let Some(place) = hook.connection_to_write() else { return Ok(None) };
    maps::add_load(origin.backend);
    Ok(Some(Note { place, connection: Connection::new(origin.backend, origin, flags | Connection::DIALS) }))
}

/// Sends a call to a backend, and keeps nothing of it.
#[inline(always)]
pub(crate) fn redirect<const V4: bool>(hook: &Hook<V4>) -> Result<Choice, Outcome> {
    let choice = choose(hook.frontend(hook.address()))?;
    send_to(hook, &choice.origin)?;
    Ok(choice)
}

/// A socket keeps the backend it has for a VIP for as long as that backend is selectable.
#[inline(always)]
fn translate_datagram<const V4: bool>(hook: &Hook<V4>) -> Result<Outcome, Outcome> {
    let service = Service::at(hook.frontend(hook.address()))?;
    if let Some(origin) = service.kept(hook)
        && service.still_selects(&origin)
    {
        send_to(hook, &origin)?;
        return Ok(Outcome::Continued);
    }
    let origin = service.choose()?.origin;
    send_to(hook, &origin)?;
    // Where it goes is looked for only now: were it known before, the verifier would go through
    // the choice once for each place.
    if keep(hook, origin) { Ok(Outcome::Translated) } else { Ok(Outcome::OriginLost) }
}

/// Keeps what a socket that sends datagrams is to take a peer for; false where there is no memory for it.
#[inline(always)]
fn keep<const V4: bool>(hook: &Hook<V4>, origin: Origin) -> bool {
    match hook.connection() {
        Some(connection) if connection.held == 0 && connection.origin.is_of(&origin) => {
            connection.origin = origin;
        }
        // All name servers are the same listener: its answer is from the one that was asked last.
        Some(connection) if connection.held == 0 && connection.origin.service == 0 && origin.service == 0 => {
            connection.origin = origin;
        }
        Some(_) => {
            let Some(peers) = hook.peers_mut() else { return false };
            store(peers, origin);
        }
        None => {
            let Some(connection) = hook.new_connection() else { return false };
            *connection = Connection::new(0, origin, 0);
        }
    }
    true
}

/// In the place that the VIP has, else in the oldest one.
#[inline(always)]
fn store(peers: &mut Peers, origin: Origin) {
    let known = peers.peers.iter().position(|peer| peer.is_of(&origin));
    let at = known.unwrap_or_else(|| {
        let next = peers.next;
        peers.next = next.wrapping_add(1);
        next as usize
    });
    // A power of two: the mask is what the verifier needs to see.
    if let Some(peer) = peers.peers.get_mut(at & (MAX_PEERS - 1)) {
        *peer = origin;
    }
}

#[inline(always)]
fn send_to<const V4: bool>(hook: &Hook<V4>, origin: &Origin) -> Result<(), Outcome> {
    if hook.rewrite(&origin.backend_address, origin.backend_port) { Ok(()) } else { Err(Outcome::BadTable) }
}

/// A backend for a call.
pub(crate) struct Choice {
    pub(crate) origin: Origin,
    /// For the call's [`Connection`].
    flags: u32,
}

/// A backend that a draw led to.
struct Drawn {
    id: u32,
    weight: u16,
    fitness: Fitness,
}

impl Drawn {
    /// The one that is due to be tried, else the one with fewer connections for its weight.
    #[inline(always)]
    fn or_better(self, other: Self) -> Self {
        let stays = match (self.fitness, other.fitness) {
            (Fitness::Due, _) | (_, Fitness::Ejected) => true,
            (Fitness::Ejected, _) | (_, Fitness::Due) => false,
            (Fitness::Fit, Fitness::Fit) => {
                let (load, other_load) = (maps::load_of(self.id), maps::load_of(other.id));
                select::is_lighter(load, self.weight, other_load, other.weight)
            }
        };
        if stays { self } else { other }
    }
}

/// The backend that whoever dials a frontend is sent to.
#[inline(always)]
pub(crate) fn choose(frontend: Frontend) -> Result<Choice, Outcome> {
    Service::at(frontend)?.choose()
}

/// A service that a call dialled.
struct Service {
    frontend: Frontend,
    id: u32,
    word: ServiceWord,
}

impl Service {
    #[inline(always)]
    fn at(frontend: Frontend) -> Result<Self, Outcome> {
        let id = maps::service_of(&frontend).ok_or(Outcome::NoFrontend)?;
        let word = maps::service(id);
        if !word.exists() {
            return Err(Outcome::NoFrontend);
        }
        if word.count() == 0 {
            return Err(Outcome::NoBackend);
        }
        Ok(Self { frontend, id, word })
    }

    /// What the socket has for this VIP from before.
    #[inline(always)]
    fn kept<const V4: bool>(&self, hook: &Hook<V4>) -> Option<Origin> {
        if let Some(connection) = hook.connection()
            && self.is_dialled_by(&connection.origin)
        {
            return Some(connection.origin);
        }
        hook.peers()?.peers.iter().find(|peer| self.is_dialled_by(peer)).copied()
    }

    /// The workload's own backend, or one by the service's policy.
    #[inline(always)]
    fn choose(&self) -> Result<Choice, Outcome> {
        if !self.word.is_sticky() {
            return self.draw();
        }
        let timeout_ms = maps::settings(self.id).map_or(0, |settings| settings.affinity_ms);
        let (client, now) = (Client::new(workload(), self.id), health::now_ms());
        if let Some(id) = maps::affinity(&client, now, timeout_ms)
            && let Some(backend) = maps::backend(id)
            && self.may_use(backend)
        {
            match self.fitness(id) {
                Fitness::Fit => return Ok(self.choice(id, backend, 0)),
                Fitness::Due => return Ok(self.choice(id, backend, Connection::PROBE)),
                Fitness::Ejected => {}
            }
        }
        let choice = self.draw()?;
        maps::set_affinity(&client, now, choice.origin.backend);
        Ok(choice)
    }

    /// A backend by the service's policy, an ejected one only if there is no other to be found.
    #[inline(always)]
    fn draw(&self) -> Result<Choice, Outcome> {
        let count = self.word.count();
        let mut drawn = self.drawn(self.next(count))?;
        // Whoever is told that a backend is due must be the one to try it.
        let settled = drawn.fitness == Fitness::Due || count == 1;
        if self.word.policy() == Policy::LeastConnections && !settled {
            drawn = drawn.or_better(self.drawn(random_draw(count))?);
        }
        let (id, flags) = match drawn.fitness {
            Fitness::Fit => (drawn.id, 0),
            Fitness::Due => (drawn.id, Connection::PROBE),
            Fitness::Ejected => self.search(count).unwrap_or((drawn.id, 0)),
        };
        Ok(self.choice(id, maps::backend(id).ok_or(Outcome::BadTable)?, flags))
    }

    /// Another backend that is not ejected: by a few more draws, then from slot to slot.
    #[inline(always)]
    fn search(&self, count: u32) -> Option<(u32, u32)> {
        let (penalty, now) = (maps::settings(self.id)?.penalty, health::now_ms());
        let seed = if self.word.policy() == Policy::Maglev { workload() } else { u64::from(random()) };
        for attempt in 1..=DRAWS + SEARCH {
            let draw = if attempt <= DRAWS {
                select::hashed(seed, attempt, count)
            } else {
                Draw { fraction: 0, ..select::turn(seed.wrapping_add(u64::from(attempt)), count) }
            };
            let slot = maps::slot(self.word.base() + draw.slot)?;
            let id = if attempt <= DRAWS { select::pick(slot, draw.fraction) } else { slot.backend() };
            match health::fitness(id, now, penalty) {
                Fitness::Fit => return Some((id, 0)),
                Fitness::Due => return Some((id, Connection::PROBE)),
                Fitness::Ejected => {}
            }
        }
        None
    }

    #[inline(always)]
    fn next(&self, count: u32) -> Draw {
        match self.word.policy() {
            Policy::RoundRobin => select::turn(maps::take_turn(self.id), count),
            Policy::Maglev => select::hashed(workload(), 0, count),
            Policy::Random | Policy::LeastConnections => random_draw(count),
        }
    }

    #[inline(always)]
    fn drawn(&self, draw: Draw) -> Result<Drawn, Outcome> {
        let (id, backend) = self.led_to(draw)?;
        Ok(Drawn { id, weight: backend.weight, fitness: self.fitness(id) })
    }

    /// Whether a backend may be chosen now. Hardly ever is there more to it than one look-up.
    #[inline(always)]
    fn fitness(&self, id: u32) -> Fitness {
        if !maps::health(id).is_ejected() {
            return Fitness::Fit;
        }
        match maps::settings(self.id) {
            Some(settings) => health::fitness(id, health::now_ms(), settings.penalty),
            None => Fitness::Fit,
        }
    }

    #[inline(always)]
    fn choice(&self, id: u32, backend: &Backend, flags: u32) -> Choice {
        let origin = Origin {
            vip: self.frontend.address,
            vip_port: self.frontend.port,
            backend_address: backend.address,
            backend_port: backend.port,
            service: self.id,
            backend: id,
        };
        Choice { origin, flags }
    }

    /// The backend that a draw leads to.
    #[inline(always)]
    fn led_to(&self, draw: Draw) -> Result<(u32, &'static Backend), Outcome> {
        let slot = maps::slot(self.word.base() + draw.slot).ok_or(Outcome::BadTable)?;
        let id = select::pick(slot, draw.fraction);
        Ok((id, maps::backend(id).ok_or(Outcome::BadTable)?))
    }

    #[inline(always)]
    fn is_dialled_by(&self, peer: &Origin) -> bool {
        peer.vip_port == self.frontend.port && peer.vip == self.frontend.address
    }

    /// Whether a backend is this service's and gets new connections.
    #[inline(always)]
    fn may_use(&self, backend: &Backend) -> bool {
        backend.weight > 0 && backend.service == self.id
    }

    /// Ids are used again, so the entry must still be this service's backend at this address.
    #[inline(always)]
    fn still_selects(&self, peer: &Origin) -> bool {
        maps::backend(peer.backend).is_some_and(|backend| {
            self.may_use(backend)
                && backend.port == peer.backend_port
                && backend.address == peer.backend_address
        })
    }
}

#[inline(always)]
fn random_draw(count: u32) -> Draw {
    select::draw(random(), count)
}

#[inline(always)]
fn random() -> u32 {
    // SAFETY: a plain helper call.
    unsafe { bpf_get_prandom_u32() }
}

/// Who dials: the cgroup of the task, which is a container's own.
#[inline(always)]
fn workload() -> u64 {
    // SAFETY: a plain helper call.
    unsafe { bpf_get_current_cgroup_id() }
}
