//! mesh's node daemon: registry → catalog → plan → datapath → kernel.

pub mod catalog;
pub mod config;
pub mod datapath;
pub mod model;
pub mod plan;
pub mod registry;
