//! What can become of a `connect()`, or of a datagram, to a VIP.

/// One outcome, one counter in `STATS`, one verdict.
///
/// An address outside the VIP ranges has no outcome, unless it is a name server's: it passes untouched and
/// uncounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Outcome {
    /// Rewritten to a backend.
    Translated = 0,
    /// Rewritten, but the kernel had no memory to remember the VIP: the socket shows the backend.
    OriginLost = 1,
    /// In a VIP range, but no such frontend: an unknown address or port, or a removed service.
    NoFrontend = 2,
    /// The service has no usable backend.
    NoBackend = 3,
    /// A slot or backend entry is missing, or of the wrong family: a fault in the tables.
    BadTable = 4,
    /// A datagram, to the backend that its socket already has for this VIP.
    Continued = 5,
    /// A query to a name server, to the daemon.
    Answered = 6,
}

/// What the kernel is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Go on.
    Allow,
    /// Fail the call with `ECONNREFUSED`.
    Refuse,
}

impl Outcome {
    /// Every outcome, in the order of the counters.
    pub const ALL: [Self; 7] = [
        Self::Translated,
        Self::OriginLost,
        Self::NoFrontend,
        Self::NoBackend,
        Self::BadTable,
        Self::Continued,
        Self::Answered,
    ];

    #[inline(always)]
    pub const fn verdict(self) -> Verdict {
        match self {
            Self::Translated | Self::OriginLost | Self::Continued | Self::Answered => Verdict::Allow,
            Self::NoFrontend | Self::NoBackend | Self::BadTable => Verdict::Refuse,
        }
    }

    /// Its name in metrics and output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Translated => "translated",
            Self::OriginLost => "origin_lost",
            Self::NoFrontend => "no_frontend",
            Self::NoBackend => "no_backend",
            Self::BadTable => "bad_table",
            Self::Continued => "continued",
            Self::Answered => "answered",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_its_own_counter() {
        for (index, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(outcome as usize, index);
        }
    }
}
