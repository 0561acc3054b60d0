//! Asking the kernel over netlink, in the namespace of the calling thread.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};

/// How often a list is asked for that changed while the kernel was telling it.
const TRIES: u32 = 5;

pub(super) struct Netlink(Socket);

impl Netlink {
    pub(super) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// From now on what a request for a list says narrows the list, where the kernel can do that.
    pub(super) fn filter(&self) -> io::Result<()> {
        self.0.set_netlink_get_strict_chk(true)
    }

    /// Asks for something to be done.
    pub(super) fn ask(&self, request: impl NetlinkSerializable, flags: u16) -> io::Result<()> {
        self.send(request, NLM_F_ACK | flags)?;
        let (bytes, _) = self.0.recv_from_full()?;
        match NetlinkMessage::<Never>::deserialize(&bytes).map_err(invalid)?.payload {
            NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
            NetlinkPayload::Error(_) => Ok(()),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// What `keep` makes of everything the kernel tells; where the list keeps changing, of what was
    /// told last.
    pub(super) fn list<T: NetlinkDeserializable, U>(
        &self,
        request: &(impl NetlinkSerializable + Clone),
        keep: impl Fn(T) -> Option<U>,
    ) -> io::Result<Vec<U>> {
        let mut list = Vec::new();
        for _ in 0..TRIES {
            list.clear();
            if self.dump(request.clone(), |told| list.extend(keep(told)))? {
                break;
            }
        }
        Ok(list)
    }

    /// Whether the list stayed as it was meanwhile.
    fn dump<T: NetlinkDeserializable>(
        &self,
        request: impl NetlinkSerializable,
        mut take: impl FnMut(T),
    ) -> io::Result<bool> {
        self.send(request, NLM_F_DUMP)?;
        let mut steady = true;
        loop {
            let (bytes, _) = self.0.recv_from_full()?;
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let message = NetlinkMessage::<T>::deserialize(rest).map_err(invalid)?;
                steady &= message.header.flags & NLM_F_DUMP_INTR == 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => take(inner),
                    NetlinkPayload::Done(_) => return Ok(steady),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    _ => {}
                }
                // Messages begin at multiples of 4.
                let length = (message.header.length as usize).next_multiple_of(4).max(4);
                rest = rest.get(length..).unwrap_or_default();
            }
        }
    }

    fn send(&self, request: impl NetlinkSerializable, flags: u16) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(request));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.0.send(&bytes, 0).map(drop)
    }
}

/// The answer to [`Netlink::ask`] is an acknowledgement or an error, nothing else.
struct Never;

impl NetlinkDeserializable for Never {
    type Error = io::Error;

    fn deserialize(_: &NetlinkHeader, _: &[u8]) -> io::Result<Self> {
        Err(io::ErrorKind::InvalidData.into())
    }
}

fn invalid(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
