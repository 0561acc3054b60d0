//! Telling systemd, or whoever else started the daemon and listens, how far it is: `sd_notify(3)`.

use std::{
    env,
    ffi::OsStr,
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
};

/// The daemon does what it is there for.
pub const READY: &str = "READY=1";
/// It has begun to end.
pub const STOPPING: &str = "STOPPING=1";

/// Where the teller of the news is heard; nobody need listen.
const PLACE: &str = "NOTIFY_SOCKET";

/// Tells it, if anybody wants to know.
pub fn tell(news: &str) {
    if let Some(place) = env::var_os(PLACE)
        && let Err(error) = send(&place, news)
    {
        tracing::warn!("cannot tell {} that {news}: {error}", place.display());
    }
}

/// To a path, or to the name of an abstract socket after an `@`.
fn send(place: &OsStr, news: &str) -> io::Result<()> {
    let address = match place.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(place)?,
    };
    UnixDatagram::unbound()?.send_to_addr(news.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hear(socket: &UnixDatagram) -> String {
        let mut bytes = [0; 64];
        let length = socket.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..length].to_vec()).unwrap()
    }

    #[test]
    fn a_path_and_an_abstract_name_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        send(path.as_os_str(), READY).unwrap();
        assert_eq!(hear(&socket), "READY=1");

        let name = format!("mesh-test-notify-{}", std::process::id());
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        send(format!("@{name}").as_ref(), STOPPING).unwrap();
        assert_eq!(hear(&socket), "STOPPING=1");
    }

    #[test]
    fn nobody_at_the_place_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert!(send(folder.path().join("nobody").as_os_str(), READY).is_err());
    }
}
