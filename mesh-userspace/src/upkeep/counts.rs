//! Counts that do not fit the sockets there are: a daemon ended between two of its writes.

use std::{io, thread, time::Duration};

use super::Upkeep;
use crate::{
    datapath::{Drift, Record},
    model::Protocol,
    netns::{self, sockets},
};

/// A count changes a moment before or after its socket's place. What is the same after this long is not
/// being changed.
const MOMENT: Duration = Duration::from_millis(10);

impl Upkeep {
    /// Sets counts right.
    pub(super) fn recount(&self) -> io::Result<()> {
        let mut drifts = self.sockets.drifts();
        if drifts.is_empty() {
            return Ok(());
        }
        thread::sleep(MOMENT);
        let again = self.sockets.drifts();
        drifts.retain(|drift| again.contains(drift));
        if drifts.is_empty() {
            return Ok(());
        }
        // Sockets without a place are counted as well. The kernel lists those of TCP alone.
        let (namespaces, complete) = netns::all();
        complete?;
        let mut stored = Vec::new();
        for namespace in namespaces {
            let values = namespace.run(|| sockets::stored(self.sockets.storage()))?;
            stored.extend(values.iter().filter_map(|(_, value)| Record::parse(value)));
        }
        for Drift { backend, count, held } in drifts {
            let elsewhere =
                stored.iter().filter(|record| record.backend == u64::from(backend)).count() as u64;
            let held = held + elsewhere;
            let whereabouts = self.applied.read().expect("no writer panics").whereabouts(backend);
            let may_be_unseen = whereabouts.is_some_and(|(protocol, _)| protocol == Protocol::Udp.number());
            let too_many = count.wrapping_sub(held).cast_signed() > 0;
            if count != held && !(too_many && may_be_unseen) && self.sockets.recount(backend, count, held) {
                tracing::warn!(
                    "backend {backend} was counted {} times for {held} sockets",
                    count.cast_signed()
                );
            }
        }
        Ok(())
    }
}
