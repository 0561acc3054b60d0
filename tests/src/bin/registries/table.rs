//! What is in the registry.

/// Where the first service is dialled, at port 80.
pub(crate) const VIP: &str = "127.128.60.1";
/// Where the others' instances are.
pub(crate) const PORT: usize = 8080;

/// Services `s0`, `s1`, … of `service.local` with so many instances each; the first has only one, on this machine.
#[derive(Clone, Copy)]
pub(crate) struct Table {
    pub(crate) services: usize,
    pub(crate) instances: usize,
}

impl Table {
    /// Services, and numbers of instances, of all but the first.
    pub(crate) fn others(self) -> impl Iterator<Item = (usize, usize)> + Clone {
        (1..self.services).flat_map(move |service| (0..self.instances).map(move |number| (service, number)))
    }

    pub(crate) fn backends(self) -> usize {
        1 + (self.services - 1) * self.instances
    }

    /// Maps that have room for it, and for what is replaced.
    pub(crate) fn datapath(self) -> String {
        format!(
            "[datapath]\nmax_services = {}\nmax_backends = {}\n",
            2 * self.services,
            2 * self.backends() + 1000
        )
    }

    /// All instances of a service: address and port.
    pub(crate) fn places(self, service: usize, port: u16) -> Vec<(String, usize)> {
        match service {
            0 => vec![("127.0.0.1".into(), port.into())],
            _ => (0..self.instances).map(|number| (address(service, number), PORT)).collect(),
        }
    }
}

pub(crate) fn address(service: usize, number: usize) -> String {
    format!("10.{}.{}.{}", service >> 8, service & 255, number + 1)
}
