//! The contract between the kernel programs and the daemon.
//!
//! [`abi`] is what lies in the maps, byte for byte; [`outcome`] what can become of a
//! `connect()`; [`select`] how a backend is drawn. Everything here is pure and compiled both
//! for the BPF target and for the host, so the rules the kernel follows are tested on the host.
#![cfg_attr(not(test), no_std)]

pub mod abi;
pub mod address;
pub mod health;
pub mod lookup;
pub mod outcome;
pub mod select;
