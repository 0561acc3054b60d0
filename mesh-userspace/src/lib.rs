//! mesh's node daemon: registry → catalog → plan → datapath → kernel.

pub mod api;
pub mod catalog;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod datapath;
pub mod dns;
mod durable;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
pub mod model;
pub mod namespaces;
pub mod netns;
pub mod plan;
pub mod reconcile;
pub mod registry;
pub mod sys;
pub mod systemd;
pub mod upkeep;
mod watch;
pub mod web;
