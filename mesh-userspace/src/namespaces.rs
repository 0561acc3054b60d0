//! What the daemon does in the network namespaces of the node: it refuses the VIP ranges to whatever is
//! not translated, and listens for queries.
//!
//! A namespace is found when it gets a name, when a task of the managed cgroup is in it, and at the
//! latest by its first query.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, PipeReader, Read},
    os::fd::AsFd,
    path::PathBuf,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    time::{ClockId, clock_gettime},
};
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    datapath::Pins,
    netns::{self, NetNs, routes},
};

mod listen;

pub use listen::Names;

/// How often new namespaces are looked for; where there are many tasks less often, so that it takes no more
/// than a thousandth of a processor.
const PERIOD: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(5);
const SHARE: u32 = 1000;
/// How often all namespaces are looked at, too: a thread may have changed its own.
const FULL_LOOK: Duration = Duration::from_secs(30);

pub struct Namespaces {
    cgroup: PathBuf,
    ranges: Vec<IpNet>,
    priority: u32,
    /// None while nobody's queries are answered.
    names: Option<Names>,
    /// The same, until there are answers.
    mute: Option<Names>,
    /// Threads whose namespaces have been dealt with. A namespace's number may soon be another
    /// one's, so it is no use to remember those.
    tasks: BTreeSet<u32>,
    /// When all are looked at next.
    full: Instant,
    warned: BTreeSet<&'static str>,
}

impl Namespaces {
    pub fn new(pins: &Pins, cgroup: PathBuf, ranges: Vec<IpNet>, names: Option<Names>) -> Self {
        Self {
            cgroup,
            ranges,
            priority: priority(pins),
            names: None,
            mute: names,
            tasks: BTreeSet::new(),
            full: Instant::now(),
            warned: BTreeSet::new(),
        }
    }

    /// Works until the other end of `word` is closed; a byte says that queries can be answered from now on.
    /// Blocks: run it on a thread of its own.
    pub fn run(mut self, mut word: PipeReader) -> io::Result<()> {
        let mounts = File::open("/proc/self/mountinfo")?;
        let mut next = Instant::now();
        loop {
            let now = Instant::now();
            if next <= now {
                let before = processor_time();
                self.look();
                let took = processor_time().saturating_sub(before);
                next = now + (took * SHARE).clamp(PERIOD, LONGEST);
            }
            let wait = Timespec::try_from(next.saturating_duration_since(now)).expect("some seconds");
            let mut fds = vec![
                PollFd::new(&word, PollFlags::IN),
                // proc_pid_mountinfo(5): priority data when a file system is mounted or unmounted.
                PollFd::new(&mounts, PollFlags::PRI),
            ];
            fds.extend(
                self.names.as_ref().map(|names| PollFd::from_borrowed_fd(names.as_fd(), PollFlags::IN)),
            );
            match poll(&mut fds, Some(&wait)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let is_told = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
            let (word_came, names_change, is_asked) = (is_told(0), is_told(1), is_told(2));
            if word_came {
                if word.read(&mut [0])? == 0 {
                    return Ok(());
                }
                // All namespaces once more, to listen there.
                self.names = self.mute.take();
                next = Instant::now();
                self.full = next;
            }
            if names_change {
                self.look_at_names();
            }
            if is_asked && let Some(names) = &mut self.names {
                let result = names.answer_sights(self.priority);
                self.report("cannot listen for queries in a network namespace", result);
            }
        }
    }

    /// The namespaces of new threads, and now and then all.
    fn look(&mut self) {
        if let Some(names) = &mut self.names {
            let result = names.exclude();
            self.report("cannot let the queries of dns.exclude go where they are sent", result);
        }
        let full = self.full <= Instant::now();
        if full {
            self.full = Instant::now() + FULL_LOOK;
            self.tasks.clear();
            let result = routes::refuse(&self.ranges, self.priority);
            self.report("cannot set a route for the VIP ranges", result);
        }
        let before = self.tasks.clone();
        let (namespaces, complete) = netns::of_cgroup(&self.cgroup, &mut self.tasks);
        self.report("cannot open every network namespace of the tasks", complete);
        for namespace in &namespaces {
            let result = namespace.run(|| routes::refuse(&self.ranges, self.priority));
            self.report("cannot set a route for the VIP ranges in a network namespace", result);
        }
        self.listen(&namespaces);
        if full {
            self.look_at_names();
        } else if !before.is_subset(&self.tasks) {
            self.leave();
        }
    }

    /// Namespaces with a name have it before a task is in them.
    fn look_at_names(&mut self) {
        if self.names.is_none() {
            return;
        }
        let (namespaces, complete) = netns::with_names();
        self.report("cannot open every network namespace that has a name", complete);
        self.listen(&namespaces);
        drop(namespaces);
        self.leave();
    }

    fn listen(&mut self, namespaces: &[NetNs]) {
        for namespace in namespaces {
            if let Some(names) = &mut self.names {
                let result = names.listen(namespace, self.priority);
                self.report("cannot listen for queries in a network namespace", result);
            }
        }
    }

    /// Closes what is open in namespaces that are gone but for that.
    fn leave(&mut self) {
        if let Some(names) = &mut self.names {
            let result = netns::present(&self.tasks).and_then(|present| names.retain(&present));
            self.report("cannot leave network namespaces that are gone", result);
        }
    }

    /// Says once that something does not work here.
    fn report(&mut self, what: &'static str, result: io::Result<()>) {
        if let Err(error) = result
            && self.warned.insert(what)
        {
            tracing::warn!("{what}: {error}");
        }
    }
}

/// What this thread has had of a processor.
fn processor_time() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap_or_default()
}

/// Removes the routes of the daemon with these pins, from every namespace.
pub fn cleanup(pins: &Pins) -> io::Result<()> {
    let priority = priority(pins);
    let (namespaces, complete) = netns::all();
    for namespace in namespaces {
        namespace.run(|| routes::refuse(&[], priority))?;
    }
    complete
}

/// Each daemon has routes of its own, told apart by its pin folder.
fn priority(pins: &Pins) -> u32 {
    const LARGE: u32 = 1 << 30;
    #[expect(clippy::cast_possible_truncation, reason = "any bits will do")]
    let hash = xxh3_64(pins.dir().as_os_str().as_encoded_bytes()) as u32;
    LARGE | hash >> 2
}
