//! mesh's node daemon: registry → catalog → plan → datapath → kernel.

pub mod datapath;
pub mod plan;
