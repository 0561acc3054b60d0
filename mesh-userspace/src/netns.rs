//! Network namespaces of the node, and what the daemon does inside them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::Path,
    thread,
};

use rustix::{
    fs::fstatfs,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

mod netlink;
pub mod routes;
pub mod sockets;

/// `NSFS_MAGIC` of linux/magic.h: the file system of open namespaces.
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// A network namespace, held open.
#[derive(Debug)]
pub struct NetNs {
    /// The number by which the kernel shows it.
    pub inode: u64,
    file: File,
}

impl NetNs {
    /// An error for a plain file too: `ip netns` leaves one behind for a moment when it takes a
    /// namespace away.
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if fstatfs(&file)?.f_type.cast_unsigned() != NSFS_MAGIC {
            return Err(io::Error::new(io::ErrorKind::NotFound, "no namespace"));
        }
        Ok(Self { inode: file.metadata()?.ino(), file })
    }

    /// Runs `work` in the namespace, on a thread of its own: the caller stays where it is.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        let inside = || {
            move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))?;
            work()
        };
        thread::scope(|scope| scope.spawn(inside).join())
            .unwrap_or_else(|_| Err(io::Error::other("the work in a network namespace panicked")))
    }
}

/// Every namespace that a process is in or that has a name.
pub fn all() -> io::Result<Vec<NetNs>> {
    let processes = fs::read_dir("/proc")?.flatten().map(|entry| entry.file_name());
    let processes = processes.filter(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit));
    let of_processes = processes.map(|pid| Path::new("/proc").join(pid).join("ns/net"));
    let mounted = named(&fs::read_to_string("/proc/self/mountinfo")?);
    Ok(open(of_processes.chain(mounted.into_iter().map(Into::into))))
}

/// The namespaces of the processes in a cgroup and everything below it, but only of those that
/// are not in `known`; it holds all of them afterwards.
pub fn of_cgroup(cgroup: &Path, known: &mut BTreeSet<u32>) -> Vec<NetNs> {
    let mut pids = BTreeSet::new();
    let mut folders = vec![cgroup.to_owned()];
    while let Some(folder) = folders.pop() {
        // A cgroup may go at any time, and its processes with it.
        let procs = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        pids.extend(procs.lines().filter_map(|pid| pid.parse::<u32>().ok()));
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        folders
            .extend(entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
    }
    let new = pids.difference(known).map(|pid| format!("/proc/{pid}/ns/net").into());
    let namespaces = open(new);
    *known = pids;
    namespaces
}

/// Each once; one that has gone meanwhile is left out.
fn open(paths: impl Iterator<Item = std::path::PathBuf>) -> Vec<NetNs> {
    let mut found = BTreeMap::new();
    for path in paths {
        let known = fs::metadata(&path).is_ok_and(|meta| found.contains_key(&meta.ino()));
        if !known && let Ok(netns) = NetNs::open(&path) {
            found.insert(netns.inode, netns);
        }
    }
    found.into_values().collect()
}

// proc(5): "36 35 0:4 net:[4026532281] /run/netns/x options - nsfs nsfs rw", spaces as \040.
fn named(mountinfo: &str) -> Vec<String> {
    let place = |line: &str| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, place) = (fields.next()?, fields.next()?);
        (filesystem.starts_with("nsfs ") && root.starts_with("net:")).then(|| place.replace("\\040", " "))
    };
    mountinfo.lines().filter_map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_namespace_is_left_out() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let paths = [file.path().to_owned(), "/proc/self/ns/net".into()];
        assert_eq!(open(paths.into_iter()).len(), 1);
    }

    #[test]
    fn named_namespaces_are_found_among_the_mounts() {
        let mountinfo = "\
31 23 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro
40 23 0:4 net:[4026532281] /run/netns/a\\040b rw shared:9 - nsfs nsfs rw
41 23 0:4 mnt:[4026532282] /run/other rw - nsfs nsfs rw
";
        assert_eq!(named(mountinfo), ["/run/netns/a b"]);
    }
}
