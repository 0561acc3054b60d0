//! What no safe library offers: some system calls, and the C library's heap. The only module of the daemon with `unsafe`.
#![expect(unsafe_code, reason = "raw system calls and shared memory; each block says why it is sound")]

use std::{
    ffi::CString,
    io,
    mem::{self, MaybeUninit},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    ptr::{self, NonNull},
    sync::atomic::{AtomicU64, Ordering},
};

use aya_obj::generated::{
    BPF_F_QUERY_EFFECTIVE, bpf_attach_type, bpf_attr, bpf_cmd, bpf_link_info, bpf_map_type,
};

/// An array map of words, mapped into memory: a store is one plain atomic store.
#[derive(Debug)]
pub struct Words {
    base: NonNull<AtomicU64>,
    len: u32,
}

// SAFETY: the mapping is shared memory that is only touched through atomics.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// Maps the first `len` entries of an array map made with `BPF_F_MMAPABLE` and 8-byte values.
    pub fn map(map: BorrowedFd<'_>, len: u32) -> io::Result<Self> {
        let bytes = len as usize * size_of::<u64>();
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice; the result is checked.
        let base = unsafe { libc::mmap(ptr::null_mut(), bytes, prot, flags, map.as_raw_fd(), 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { base, len })
    }

    fn word(&self, index: u32) -> &AtomicU64 {
        assert!(index < self.len, "word {index} of {}", self.len);
        // SAFETY: in bounds of a live mapping, aligned because the mapping is page-aligned.
        unsafe { self.base.add(index as usize).as_ref() }
    }

    pub fn load(&self, index: u32) -> u64 {
        self.word(index).load(Ordering::Acquire)
    }

    /// Adds, wrapping.
    pub fn add(&self, index: u32, change: u64) {
        self.word(index).fetch_add(change, Ordering::AcqRel);
    }

    /// Stores another value; returns the one that was there.
    pub fn swap(&self, index: u32, value: u64) -> u64 {
        self.word(index).swap(value, Ordering::AcqRel)
    }

    /// Stores another value if `old` is there.
    pub fn replace(&self, index: u32, old: u64, value: u64) -> bool {
        self.word(index).compare_exchange(old, value, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Everything written before, by whatever means, is visible to a hook that sees this word.
    pub fn store(&self, index: u32, value: u64) {
        self.word(index).store(value, Ordering::Release);
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: our own mapping, with the length it was made with.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len as usize * size_of::<u64>()) };
    }
}

/// Waits for readers: a map of maps of our own, in which an entry is replaced.
///
/// The kernel returns from an update of such a map only when every program run that began before
/// has ended (`maybe_wait_bpf_programs()` in kernel/bpf/syscall.c, since Linux 4.20), whatever
/// the number of CPUs. `membarrier(2)` does not: with one CPU online it does nothing.
#[derive(Debug)]
pub struct Grace {
    outer: OwnedFd,
    inner: OwnedFd,
}

impl Grace {
    pub fn new() -> io::Result<Self> {
        let inner = create_array(bpf_map_type::BPF_MAP_TYPE_ARRAY, None)?;
        let outer = create_array(bpf_map_type::BPF_MAP_TYPE_ARRAY_OF_MAPS, Some(inner.as_fd()))?;
        Ok(Self { outer, inner })
    }

    /// Returns when every program run that began before the call has ended.
    pub fn wait(&self) -> io::Result<()> {
        let (key, value) = (0u32, raw(self.inner.as_fd()));
        let mut attr = zeroed();
        attr.__bindgen_anon_2.map_fd = raw(self.outer.as_fd());
        attr.__bindgen_anon_2.key = ptr::from_ref(&key).addr() as u64;
        attr.__bindgen_anon_2.__bindgen_anon_1.value = ptr::from_ref(&value).addr() as u64;
        bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
    }
}

/// An array map with one entry of four bytes.
fn create_array(kind: bpf_map_type, inner: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    let mut attr = zeroed();
    attr.__bindgen_anon_1.map_type = kind as u32;
    attr.__bindgen_anon_1.key_size = 4;
    attr.__bindgen_anon_1.value_size = 4;
    attr.__bindgen_anon_1.max_entries = 1;
    attr.__bindgen_anon_1.inner_map_fd = inner.map_or(0, raw);
    let fd = bpf(bpf_cmd::BPF_MAP_CREATE, &mut attr)?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What the kernel says of a link between a program and a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    pub id: u32,
    pub program: u32,
    /// Zero once the cgroup is gone.
    pub cgroup: u64,
}

/// A cgroup link. It stays for as long as it is open here or pinned somewhere.
#[derive(Debug)]
pub struct Link(OwnedFd);

impl Link {
    /// Opens a pinned one.
    pub fn open(path: &Path) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let mut attr = zeroed();
        attr.__bindgen_anon_4.pathname = path.as_ptr().addr() as u64;
        let fd = bpf(bpf_cmd::BPF_OBJ_GET, &mut attr)?;
        // SAFETY: the kernel just gave us this descriptor.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Replaces the link's program in one step: a call runs either the old or the new one.
    pub fn update(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let mut attr = zeroed();
        attr.link_update.link_fd = raw(self.0.as_fd());
        attr.link_update.__bindgen_anon_1.new_prog_fd = raw(program);
        bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
    }

    /// Pins it, once more or again.
    pub fn pin(&self, path: &Path) -> io::Result<()> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let mut attr = zeroed();
        attr.__bindgen_anon_4.pathname = path.as_ptr().addr() as u64;
        attr.__bindgen_anon_4.bpf_fd = raw(self.0.as_fd());
        bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop)
    }

    pub fn info(&self) -> io::Result<LinkInfo> {
        let mut info = MaybeUninit::<bpf_link_info>::zeroed();
        let mut attr = zeroed();
        attr.info.bpf_fd = raw(self.0.as_fd());
        attr.info.info_len = u32::try_from(size_of::<bpf_link_info>()).expect("a small struct");
        attr.info.info = info.as_mut_ptr().addr() as u64;
        bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
        // SAFETY: plain integers, zeroed, then filled by the kernel; we only open links to cgroups,
        // and a link of another type would show some other number.
        let (info, cgroup) = unsafe {
            let info = info.assume_init();
            (info, info.__bindgen_anon_1.cgroup.cgroup_id)
        };
        Ok(LinkInfo { id: info.id, program: info.prog_id, cgroup })
    }
}

/// How many entries a hash map holds, whose keys and values have these sizes in bytes. Entries that
/// come and go meanwhile may or may not be counted; `BPF_MAP_LOOKUP_BATCH` is in Linux 5.6 and later.
pub fn count(map: BorrowedFd<'_>, key: usize, value: usize) -> io::Result<u32> {
    // More than any bucket of a hash holds.
    const MOST: u32 = 4096;
    let mut keys = vec![0u8; MOST as usize * key];
    let mut values = vec![0u8; MOST as usize * value];
    // Where to go on; the kernel's own numbering of buckets.
    let mut at: Option<u32> = None;
    let mut all = 0;
    loop {
        let mut next = 0u32;
        let mut attr = zeroed();
        attr.batch.map_fd = raw(map);
        attr.batch.in_batch = at.as_ref().map_or(0, |at| ptr::from_ref(at).addr() as u64);
        attr.batch.out_batch = ptr::from_mut(&mut next).addr() as u64;
        attr.batch.keys = keys.as_mut_ptr().addr() as u64;
        attr.batch.values = values.as_mut_ptr().addr() as u64;
        attr.batch.count = MOST;
        let end = match bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr) {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) => return Err(error),
        };
        // SAFETY: the kernel has set this to how many entries it wrote.
        all += unsafe { attr.batch.count };
        if end {
            return Ok(all);
        }
        at = Some(next);
    }
}

/// Ids of the programs that run for a hook in a cgroup, attached there or above, by anyone.
pub fn programs_on(cgroup: BorrowedFd<'_>, hook: bpf_attach_type) -> io::Result<Vec<u32>> {
    const MOST: u32 = 64;
    let mut ids = vec![0u32; MOST as usize];
    let mut attr = zeroed();
    attr.query.__bindgen_anon_1.target_fd = raw(cgroup);
    attr.query.attach_type = hook as u32;
    attr.query.query_flags = BPF_F_QUERY_EFFECTIVE;
    attr.query.prog_ids = ids.as_mut_ptr().addr() as u64;
    attr.query.__bindgen_anon_2.prog_cnt = MOST;
    bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr)?;
    // SAFETY: a union of two integers, filled by the kernel.
    ids.truncate(unsafe { attr.query.__bindgen_anon_2.prog_cnt } as usize);
    Ok(ids)
}

/// The cookie of a socket's network namespace: the kernel's number for it, never used again
/// (`SO_NETNS_COOKIE`, Linux 5.14).
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut size = libc::socklen_t::try_from(size_of::<u64>()).expect("8");
    // SAFETY: the kernel writes at most `size` bytes to an integer of that size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            ptr::from_mut(&mut cookie).cast(),
            &raw mut size,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Sets a socket's priority (`SO_PRIORITY`), which hooks can read. Needs `CAP_NET_ADMIN`.
pub fn set_priority(socket: BorrowedFd<'_>, priority: u32) -> io::Result<()> {
    let size = libc::socklen_t::try_from(size_of::<u32>()).expect("4");
    // SAFETY: the kernel reads `size` bytes of an integer of that size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PRIORITY,
            ptr::from_ref(&priority).cast(),
            size,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn zeroed() -> bpf_attr {
    // SAFETY: a union of integers; the kernel wants unused bytes to be zero.
    unsafe { mem::zeroed() }
}

fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i32> {
    // SAFETY: the caller filled `attr` for `command`, and what it points to outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, ptr::from_mut(attr), size_of::<bpf_attr>()) };
    match i32::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has the C library keep one heap for all threads, of which a large piece is no part: what is read is large, and
/// most of it is soon needed no more. For a start; does nothing with another C library.
pub fn keep_heap_small() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, 64 << 10)] {
        // SAFETY: it takes two numbers, and refuses those that it does not know.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Gives pages of the heap back that hold nothing any more. Takes some milliseconds with a large heap.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it only touches what is free.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Gives back the pages of the program's own file that are mapped: most of what a start needs is not needed again.
/// What is needed again is mapped again, from the page cache as long as it is there.
pub fn drop_program_pages() {
    // SAFETY: the function below fits, and stops at the first object, which is the program.
    unsafe { libc::dl_iterate_phdr(Some(drop_pages_of), ptr::null_mut()) };
}

unsafe extern "C" fn drop_pages_of(
    object: *mut libc::dl_phdr_info,
    _: libc::size_t,
    _: *mut libc::c_void,
) -> libc::c_int {
    // SAFETY: the loader passes an object and the list of its segments.
    let (object, segments) = unsafe {
        (&*object, std::slice::from_raw_parts((*object).dlpi_phdr, usize::from((*object).dlpi_phnum)))
    };
    // SAFETY: a plain call.
    let Ok(page) = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }) else { return 1 };
    for segment in segments.iter().filter(|s| s.p_type == libc::PT_LOAD && s.p_flags & libc::PF_W == 0) {
        #[expect(clippy::cast_possible_truncation, reason = "addresses of this process")]
        let (start, size) = ((object.dlpi_addr + segment.p_vaddr) as usize, segment.p_memsz as usize);
        let before = start % page;
        // SAFETY: this program never writes to the segment, so each page is read again from the file.
        unsafe { libc::madvise((start - before) as *mut libc::c_void, size + before, libc::MADV_DONTNEED) };
    }
    1
}
