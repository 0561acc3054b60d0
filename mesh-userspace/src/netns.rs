//! Network namespaces of the node, and what the daemon does inside them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
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

const OURS: &str = "/proc/self/ns/net";

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

    /// `None` if the process has ended.
    pub fn of_process(pid: u32) -> io::Result<Option<Self>> {
        unless_gone(Self::open(Path::new(&format!("/proc/{pid}/ns/net"))))
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

/// Namespaces that are held open; and if some that are there could not be opened, why.
pub type Opened = (Vec<NetNs>, io::Result<()>);

/// Every namespace that a thread is in or that has a name.
pub fn all() -> Opened {
    match places() {
        Ok(paths) => open(paths),
        Err(error) => (Vec::new(), Err(error)),
    }
}

/// Where the namespaces of all threads are shown, and those with a name.
fn places() -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for process in fs::read_dir("/proc")? {
        let process = process?;
        if process.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            let Some(tasks) = unless_gone(fs::read_dir(process.path().join("task")))? else { continue };
            // The first thread may have ended before the others, and with it `/proc/<pid>/ns`.
            paths.extend(tasks.map_while(Result::ok).map(|task| task.path().join("ns/net")));
        }
    }
    paths.extend(names()?);
    Ok(paths)
}

/// The namespaces that have a name.
pub fn with_names() -> Opened {
    match names() {
        Ok(paths) => open(paths),
        Err(error) => (Vec::new(), Err(error)),
    }
}

fn names() -> io::Result<impl Iterator<Item = PathBuf>> {
    Ok(named(&fs::read_to_string("/proc/self/mountinfo")?).into_iter().map(Into::into))
}

/// The numbers of the namespaces that these threads are in and of those that have a name.
pub fn present(tasks: &BTreeSet<u32>) -> io::Result<BTreeSet<u64>> {
    let mut present = BTreeSet::new();
    let of_tasks = tasks.iter().map(|task| format!("/proc/{task}/ns/net").into());
    for path in of_tasks.chain(names()?) {
        present.extend(unless_gone(fs::metadata(path))?.map(|meta| meta.ino()));
    }
    Ok(present)
}

/// The namespaces of the threads in a cgroup and everything below it, but only of those that are
/// not in `known`; it holds all of them afterwards.
pub fn of_cgroup(cgroup: &Path, known: &mut BTreeSet<u32>) -> Opened {
    let tasks = tasks(cgroup);
    let new = tasks.difference(known).map(|task| format!("/proc/{task}/ns/net").into());
    let namespaces = open(new);
    *known = tasks;
    namespaces
}

/// An error where this process' PID namespace hides tasks of a cgroup.
pub fn sees_all(cgroup: &Path) -> io::Result<()> {
    // cgroup_procs_show() in kernel/cgroup/cgroup.c: their number here is zero.
    if tasks(cgroup).contains(&0) {
        return Err(io::Error::other("the daemon is not in the PID namespace of all tasks"));
    }
    Ok(())
}

/// Whether this process is in the PID namespace that all others of the host are below.
pub fn is_host_pid_namespace() -> io::Result<bool> {
    /// `PROC_PID_INIT_INO` of linux/proc_ns.h.
    const HOST: u64 = 0xEFFF_FFFC;
    Ok(fs::metadata("/proc/self/ns/pid")?.ino() == HOST)
}

/// The threads in a cgroup and everything below it.
fn tasks(cgroup: &Path) -> BTreeSet<u32> {
    let mut tasks = BTreeSet::new();
    let mut folders = vec![cgroup.to_owned()];
    while let Some(folder) = folders.pop() {
        // A cgroup may go at any time, and its threads with it.
        let threads = fs::read_to_string(folder.join("cgroup.threads")).unwrap_or_default();
        tasks.extend(threads.lines().filter_map(|task| task.parse::<u32>().ok()));
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        folders
            .extend(entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
    }
    tasks
}

/// Each once; one that has gone meanwhile is left out.
fn open(paths: impl IntoIterator<Item = PathBuf>) -> Opened {
    let mut found = BTreeMap::new();
    let mut complete = Ok(());
    for path in paths {
        let known = fs::metadata(&path).is_ok_and(|meta| found.contains_key(&meta.ino()));
        if known {
            continue;
        }
        match unless_gone(NetNs::open(&path)) {
            Ok(netns) => drop(netns.map(|netns| found.insert(netns.inode, netns))),
            // A thread with more rights than the daemon, but no sockets of another namespace.
            Err(_) if device_list(&path).is_some_and(|list| Some(list) == device_list(OURS.as_ref())) => {}
            Err(error) => {
                complete = Err(io::Error::new(error.kind(), format!("{}: {error}", path.display())));
            }
        }
    }
    (found.into_values().collect(), complete)
}

/// The number of a file that each namespace has of its own, and that shows which one a thread is
/// in where it may not be opened; from the path of the thread's namespace.
fn device_list(netns: &Path) -> Option<u64> {
    let thread = netns.parent()?.parent()?;
    fs::metadata(thread.join("net/dev")).ok().map(|meta| meta.ino())
}

/// `None` for what a thread or a name left behind when it went.
fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENXIO)) => Ok(None),
        Err(error) => Err(error),
    }
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
        let paths = [file.path().to_owned(), OURS.into()];
        let (namespaces, complete) = open(paths);
        assert_eq!(namespaces.len(), 1);
        complete.unwrap();
    }

    #[test]
    fn a_namespace_that_cannot_be_opened_is_an_error_not_one_that_has_gone() {
        let folder = tempfile::tempdir().unwrap();
        let gone = folder.path().join("gone");
        let closed = folder.path().join("closed");
        std::os::unix::fs::symlink(&closed, &closed).unwrap();
        let paths = [closed, gone, OURS.into()];
        let (namespaces, complete) = open(paths);
        assert_eq!(namespaces.len(), 1);
        assert!(complete.unwrap_err().to_string().contains("closed"));
    }

    #[test]
    fn the_namespace_of_a_thread_is_found() {
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = thread::spawn(move || {
            tell.send(fs::read_link("/proc/thread-self").unwrap()).unwrap();
            let _ = ended.recv();
        });
        let place = Path::new("/proc").join(told.recv().unwrap()).join("ns/net");
        assert!(places().unwrap().contains(&place));
        drop(end);
        thread.join().unwrap();
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
