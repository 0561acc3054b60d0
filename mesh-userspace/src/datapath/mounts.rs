//! Where the cgroup2 hierarchy and the BPF file system are.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::statfs,
    mount::{MountFlags, mount},
};

const CGROUP2_MAGIC: u64 = 0x6367_7270;
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// The cgroup2 mount, from `/proc/self/mountinfo`.
pub fn cgroup2_root() -> io::Result<PathBuf> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo")?;
    parse_cgroup2_root(&mountinfo)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroup2 file system is mounted"))
}

// proc(5): "36 35 98:0 /root /mount/point options - type source super-options", spaces as \040.
fn parse_cgroup2_root(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        if filesystem.split(' ').next()? != "cgroup2" {
            return None;
        }
        Some(mount.split(' ').nth(4)?.replace("\\040", " ").into())
    })
}

/// Whether `path` is a directory of a cgroup2 hierarchy.
pub fn is_cgroup2(path: &Path) -> bool {
    magic_of(path) == Some(CGROUP2_MAGIC)
}

/// The id by which the kernel names a cgroup: the inode of its directory.
pub fn cgroup_id(path: &Path) -> io::Result<u64> {
    Ok(fs::metadata(path)?.ino())
}

/// Whether the nearest existing folder of `path` lies on a BPF file system.
pub fn is_bpffs(path: &Path) -> bool {
    let existing = path.ancestors().find(|path| path.exists());
    existing.and_then(magic_of) == Some(BPF_FS_MAGIC)
}

/// Mounts the BPF file system at its usual place where `path` needs it.
pub fn ensure_bpffs(path: &Path) -> io::Result<()> {
    const USUAL: &str = "/sys/fs/bpf";
    if is_bpffs(path) {
        return Ok(());
    }
    if !path.starts_with(USUAL) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} is not on a BPF file system", path.display()),
        ));
    }
    // Two daemons that start at once would each mount one, and the first would lose its own beneath the
    // other's: the folder that is mounted over is the lock.
    let place = fs::File::open(USUAL)?;
    place.lock()?;
    if is_bpffs(path) {
        return Ok(());
    }
    mount("bpf", USUAL, "bpf", MountFlags::empty(), Some(c"mode=0700"))?;
    tracing::info!("mounted the BPF file system at {USUAL}");
    Ok(())
}

fn magic_of(path: &Path) -> Option<u64> {
    statfs(path).ok().map(|stat| stat.f_type.cast_unsigned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_on_a_hybrid_hierarchy() {
        let mountinfo = "\
31 23 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
32 31 0:27 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
33 31 0:28 / /sys/fs/cgroup/the\\040one rw shared:9 - cgroup2 cgroup2 rw
";
        assert_eq!(parse_cgroup2_root(mountinfo), Some("/sys/fs/cgroup/the one".into()));
        assert_eq!(parse_cgroup2_root("1 2 0:1 / / rw - ext4 /dev/sda rw"), None);
    }
}
