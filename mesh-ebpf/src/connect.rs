//! Forward translation: VIP → backend.

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use mesh_common::{abi::Origin, outcome::Outcome, select};

use crate::{
    context::{self, Hook},
    maps,
};

#[inline(always)]
pub(crate) fn run(hook: &Hook) -> i32 {
    if !maps::in_vip_ranges(&hook.address()) {
        return context::ALLOW;
    }
    let outcome = translate(hook);
    maps::count(outcome);
    context::answer(outcome.verdict())
}

#[inline(always)]
fn translate(hook: &Hook) -> Outcome {
    let frontend = hook.frontend(hook.address());
    let Some(service) = maps::service_of(&frontend) else {
        return Outcome::NoFrontend;
    };
    let word = maps::service(service);
    if !word.exists() {
        return Outcome::NoFrontend;
    }
    if word.count() == 0 {
        return Outcome::NoBackend;
    }

    // SAFETY: a plain helper call.
    let draw = select::draw(unsafe { bpf_get_prandom_u32() }, word.count());
    let Some(slot) = maps::slot(word.base() + draw.slot) else {
        return Outcome::BadTable;
    };
    let id = select::pick(slot, draw.fraction);
    let Some(backend) = maps::backend(id) else {
        return Outcome::BadTable;
    };
    if !hook.rewrite(&backend.address, backend.port) {
        return Outcome::BadTable;
    }
    let mut origin = Origin {
        vip: frontend.address,
        vip_port: frontend.port,
        backend_address: backend.address,
        backend_port: backend.port,
        service,
        backend: id,
    };
    if hook.remember(&mut origin) { Outcome::Translated } else { Outcome::OriginLost }
}
