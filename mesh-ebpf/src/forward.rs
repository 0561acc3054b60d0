//! Forward translation: VIP → backend.

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use mesh_common::{
    abi::{Backend, Frontend, MAX_PEERS, Origin, Peers, ServiceWord},
    outcome::Outcome,
    select::{self, Draw, Policy},
};

use crate::{
    context::{self, Hook},
    maps,
};

/// A `connect()`, of any protocol.
#[inline(always)]
pub(crate) fn connect<const V4: bool>(hook: &Hook<V4>) -> i32 {
    if !maps::in_vip_ranges(&hook.address()) {
        return context::ALLOW;
    }
    finish(translate(hook))
}

/// A datagram sent with an address, on a connected socket or not.
#[inline(always)]
pub(crate) fn datagram<const V4: bool>(hook: &Hook<V4>) -> i32 {
    if !maps::in_vip_ranges(&hook.address()) {
        return context::ALLOW;
    }
    finish(translate_datagram(hook))
}

#[inline(always)]
fn finish(result: Result<Outcome, Outcome>) -> i32 {
    let (Ok(outcome) | Err(outcome)) = result;
    maps::count(outcome);
    context::answer(outcome.verdict())
}

#[inline(always)]
fn translate<const V4: bool>(hook: &Hook<V4>) -> Result<Outcome, Outcome> {
    let service = Service::dialled(hook)?;
    let origin = service.choose()?;
    send_to(hook, &origin)?;
    let Some(stored) = hook.origin_mut() else { return Ok(Outcome::OriginLost) };
    // A socket that dials again has left its last backend.
    release(stored);
    *stored = Origin { counted: 1, ..origin };
    maps::add_load(origin.backend, 1);
    Ok(Outcome::Translated)
}

/// A socket keeps the backend it has for a VIP for as long as that backend is selectable.
#[inline(always)]
fn translate_datagram<const V4: bool>(hook: &Hook<V4>) -> Result<Outcome, Outcome> {
    let service = Service::dialled(hook)?;
    let Some(peers) = hook.peers_mut() else {
        send_to(hook, &service.choose()?)?;
        return Ok(Outcome::OriginLost);
    };
    let known = peers.peers.iter().position(|peer| service.is_dialled_by(peer));
    if let Some(peer) = known.and_then(|at| peers.peers.get(at))
        && service.still_selects(peer)
    {
        send_to(hook, peer)?;
        return Ok(Outcome::Continued);
    }
    let origin = service.choose()?;
    send_to(hook, &origin)?;
    store(peers, known, origin);
    Ok(Outcome::Translated)
}

/// Takes a socket off its backend's count, if it is on it.
#[inline(always)]
pub(crate) fn release(origin: &mut Origin) {
    if origin.counted == 1 {
        origin.counted = 0;
        maps::add_load(origin.backend, -1);
    }
}

#[inline(always)]
fn store(peers: &mut Peers, known: Option<usize>, origin: Origin) {
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

/// A service that a call dialled.
struct Service {
    frontend: Frontend,
    id: u32,
    word: ServiceWord,
}

impl Service {
    #[inline(always)]
    fn dialled<const V4: bool>(hook: &Hook<V4>) -> Result<Self, Outcome> {
        let frontend = hook.frontend(hook.address());
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

    #[inline(always)]
    fn choose(&self) -> Result<Origin, Outcome> {
        let count = self.word.count();
        let draw = match self.word.policy() {
            Policy::RoundRobin => select::turn(maps::take_turn(self.id), count),
            Policy::Random | Policy::LeastConnections => random_draw(count),
        };
        let (mut id, mut backend) = self.at(draw)?;
        if self.word.policy() == Policy::LeastConnections && count > 1 {
            let (other_id, other) = self.at(random_draw(count))?;
            let (load, other_load) = (maps::load_of(id), maps::load_of(other_id));
            if !select::is_lighter(load, backend.weight, other_load, other.weight) {
                (id, backend) = (other_id, other);
            }
        }
        Ok(Origin {
            vip: self.frontend.address,
            vip_port: self.frontend.port,
            backend_address: backend.address,
            backend_port: backend.port,
            service: self.id,
            backend: id,
            counted: 0,
        })
    }

    /// The backend that a draw leads to.
    #[inline(always)]
    fn at(&self, draw: Draw) -> Result<(u32, &'static Backend), Outcome> {
        let slot = maps::slot(self.word.base() + draw.slot).ok_or(Outcome::BadTable)?;
        let id = select::pick(slot, draw.fraction);
        Ok((id, maps::backend(id).ok_or(Outcome::BadTable)?))
    }

    #[inline(always)]
    fn is_dialled_by(&self, peer: &Origin) -> bool {
        peer.vip_port == self.frontend.port && peer.vip == self.frontend.address
    }

    /// Ids are used again, so the entry must still be this service's backend at this address.
    #[inline(always)]
    fn still_selects(&self, peer: &Origin) -> bool {
        maps::backend(peer.backend).is_some_and(|backend| {
            backend.weight > 0
                && backend.service == self.id
                && backend.port == peer.backend_port
                && backend.address == peer.backend_address
        })
    }
}

#[inline(always)]
fn random_draw(count: u32) -> Draw {
    // SAFETY: a plain helper call.
    select::draw(unsafe { bpf_get_prandom_u32() }, count)
}
