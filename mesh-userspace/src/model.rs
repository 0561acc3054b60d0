//! Services and instances, as every registry delivers them.

use std::{fmt, net::IpAddr, num::NonZeroU16, time::Duration};

use mesh_common::select;
use serde::{Deserialize, Serialize};

/// What a service is known by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceId {
    pub namespace: String,
    pub name: String,
    pub protocol: Protocol,
    pub port: NonZeroU16,
}

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}:{}/{}", self.name, self.namespace, self.port, self.protocol)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    /// The IP protocol number.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    pub fn from_number(number: u8) -> Option<Self> {
        [Self::Tcp, Self::Udp].into_iter().find(|protocol| protocol.number() == number)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// How a backend is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    #[default]
    LeastConnections,
    Random,
    RoundRobin,
    Maglev,
}

impl Policy {
    /// The rule the kernel follows.
    pub fn in_kernel(self) -> select::Policy {
        match self {
            Self::LeastConnections => select::Policy::LeastConnections,
            Self::RoundRobin => select::Policy::RoundRobin,
            Self::Random => select::Policy::Random,
            Self::Maglev => select::Policy::Maglev,
        }
    }
}

/// What the names of a service are answered with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    #[default]
    Vip,
    /// The addresses of its instances.
    Instances,
}

/// What a registry says of an instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    #[default]
    Healthy,
    Unhealthy,
    Draining,
}

/// A named set of instances behind one port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub id: ServiceId,
    pub vip: Option<IpAddr>,
    /// What `_NAME._tcp` before its name stands for, such as `http`; in lower case.
    pub port_name: Option<String>,
    pub aliases: Vec<String>,
    pub answer: Answer,
    /// Whether only its aliases are names, as they are written: Cloud Map's API-only.
    pub api_only: bool,
    pub policy: Policy,
    /// A workload keeps its backend until it has not dialled it for this long.
    pub affinity: Option<Duration>,
    /// How long sockets outlive an instance that is gone.
    pub drain: Duration,
    pub eject: Eject,
    /// How long the share of a new instance takes to become whole.
    pub slow_start: Option<Duration>,
    /// With a smaller percentage of instances healthy, health is ignored.
    pub panic_percent: u8,
    pub instances: Vec<Instance>,
}

/// When failed connects take an instance out of selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Eject {
    /// After so many in a row; zero is never.
    pub failures: u16,
    /// The first penalty; it doubles each time in a row.
    pub base: Duration,
    pub max: Duration,
    /// No more of the instances at a time.
    pub max_percent: u8,
}

impl Default for Eject {
    fn default() -> Self {
        Self { failures: 5, base: Duration::from_secs(30), max: Duration::from_secs(300), max_percent: 50 }
    }
}

/// How long sockets outlive an instance that is gone, where the service does not say.
pub const DRAIN: Duration = Duration::from_secs(20);

/// A registry's record of one running copy of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    pub id: String,
    pub address: IpAddr,
    pub port: NonZeroU16,
    /// Its share of new connections, relative to the others'.
    pub weight: u16,
    pub zone: Option<String>,
    pub health: Health,
}
