//! The file registry: a file, or a folder of files, read again whenever they change.
//!
//! A file is taken whole or not at all; what it held before stays while it is unreadable, and
//! neither an empty file nor a missing folder takes away what works.

use std::{
    collections::{BTreeMap, HashSet},
    ffi::OsString,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use notify::RecommendedWatcher;
use tokio::{sync::watch::Receiver, time::MissedTickBehavior};

use super::{Claims, Publisher, Rules, Snapshot};
use crate::{
    model::Service,
    watch::{self, Changes},
};

pub(crate) mod format;

pub use format::FileError;

/// The largest file that is read, in bytes.
pub const MAX_FILE: u64 = 32 << 20;

/// How often files are looked at without being told to: what the watch cannot see (network file
/// systems, a folder that comes back) is noticed by then.
const POLL: Duration = Duration::from_secs(1);

/// So many files are looked at where the clock is; to look at more takes another thread.
const FEW: usize = 16;

/// How long a file of a folder must be away before it counts as removed: editors move the old one
/// away before they write the new one.
const GONE: Duration = Duration::from_millis(300);

/// Publishes the content of a source for as long as it runs. `reload` asks for a fresh read.
pub async fn run(mut source: Source, publisher: Publisher, mut reload: Receiver<u64>) {
    let changes = Changes::default();
    let mut watcher: Option<(RecommendedWatcher, (u64, u64))> = None;
    let mut poll = tokio::time::interval(POLL);
    poll.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut which = Which::All;
    loop {
        // The watch first, then the read: a change between the two is seen by one of them.
        // A folder that was removed and made again is another one.
        let (dir, only) = source.watched();
        let inode = fs::metadata(&dir).ok().map(|meta| (meta.dev(), meta.ino()));
        if watcher.as_ref().map(|(_, inode)| *inode) != inode {
            watcher = inode.and_then(|inode| Some((watch::folder(&dir, only, changes.clone())?, inode)));
        }
        if matches!(which, Which::Settled) && source.is_settled() {
            publisher.heard();
        } else {
            let read = tokio::task::spawn_blocking(move || {
                let news = source.read(&which);
                (source, news)
            });
            let news;
            (source, news) = read.await.expect("reading files does not panic");
            publisher.publish(news.snapshot.map(Arc::new), news.error.map(|error| error.to_string()));
        }
        which = tokio::select! {
            _ = poll.tick() => Which::Settled,
            names = changes.wait() => Which::Named(names),
            () = tokio::time::sleep(GONE), if source.misses_one() => Which::Settled,
            Ok(()) = reload.changed() => Which::All,
        };
    }
}

/// The files to read.
#[derive(Debug)]
enum Which {
    All,
    /// These were completely written, moved or removed.
    Named(HashSet<OsString>),
    /// Those that changed and then stayed as they are for a whole period: nobody said that they
    /// are complete, so a write may be under way.
    Settled,
}

/// What tells one content of a file from another without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Signature(u64, u64, i64, i64, u64);

impl Signature {
    fn of(path: &Path) -> io::Result<Self> {
        let meta = fs::metadata(path)?;
        Ok(Self(meta.dev(), meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.len()))
    }
}

#[derive(Debug, Default)]
struct Entry {
    /// What was read last.
    read: Option<Signature>,
    /// What was there when it was last looked at.
    seen: Option<Signature>,
    /// The last good content.
    services: Option<Vec<Arc<Service>>>,
    /// Whether that is a list the file gave, rather than the nothing of an empty file.
    complete: bool,
    error: Option<FileError>,
    /// Since when the file is away.
    gone: Option<Instant>,
}

/// The outcome of a read: a snapshot if something changed, and what is wrong at the moment.
#[derive(Debug, Default)]
struct News {
    snapshot: Option<Snapshot>,
    error: Option<FileError>,
}

/// A services file, or a folder of them.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    rules: Rules,
    files: BTreeMap<PathBuf, Entry>,
    published: Option<Snapshot>,
    /// What was wrong when the files were last merged.
    error: Option<FileError>,
    /// Why there was nothing to read, until there is again.
    lost: Option<FileError>,
    /// What an earlier source of the same path has published, until everything is read: less than
    /// that is not news, but a loss.
    kept: Option<Arc<Snapshot>>,
}

impl Source {
    pub fn new(path: PathBuf, rules: Rules, kept: Option<Arc<Snapshot>>) -> Self {
        Self { path, rules, files: BTreeMap::new(), published: None, error: None, lost: None, kept }
    }

    /// The folder whose changes matter, and the one name in it if this is about one file.
    fn watched(&self) -> (PathBuf, Option<OsString>) {
        if self.path.is_dir() {
            return (self.path.clone(), None);
        }
        let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        (parent.unwrap_or(Path::new(".")).into(), self.path.file_name().map(ToOwned::to_owned))
    }

    fn read(&mut self, which: &Which) -> News {
        let paths = match list(&self.path) {
            Ok(paths) => paths,
            Err(error) => return self.lost(error),
        };
        let had_services = self.published.as_ref().is_some_and(|snapshot| !snapshot.services.is_empty());
        if paths.is_empty() && (had_services || self.kept.is_some()) {
            let error = FileError::new(
                &self.path,
                "the folder holds no services file any more; what it held is kept",
            );
            return self.lost(error);
        }
        let mut changed = false;
        let mut unread = false;
        for (_, entry) in self.files.iter_mut().filter(|(path, _)| !paths.contains(*path)) {
            changed |= entry.gone.is_none();
            entry.gone.get_or_insert_with(Instant::now);
        }
        let known = self.files.len();
        self.files.retain(|_, entry| entry.gone.is_none_or(|since| since.elapsed() < GONE));
        changed |= self.files.len() != known;
        for path in paths {
            let entry = self.files.entry(path.clone()).or_default();
            changed |= entry.gone.take().is_some();
            let signature = Signature::of(&path).ok();
            let due = match which {
                Which::All => true,
                Which::Named(names) => path.file_name().is_some_and(|name| names.contains(name)),
                Which::Settled => entry.read != signature && entry.seen == signature,
            };
            entry.seen = signature;
            if due {
                let known = [self.published.as_ref(), self.kept.as_deref()];
                entry.read(&path, &self.rules, known, self.kept.is_some());
                entry.read = signature;
                changed = true;
            }
            unread |= entry.read != signature;
        }
        if let Some(error) = self.lost.take_if(|_| !changed && unread) {
            // What is there again may still be being written.
            return self.lost(error);
        }
        changed |= self.lost.take().is_some();
        if changed || self.published.is_none() {
            return self.merge();
        }
        News { snapshot: None, error: self.error.clone() }
    }

    /// Whether all is as it was read. A look that finds nothing new, once a second, must cost next to nothing.
    fn is_settled(&self) -> bool {
        let as_read = |(path, entry): (&PathBuf, &Entry)| {
            entry.gone.is_none() && entry.read.is_some() && entry.read == Signature::of(path).ok()
        };
        self.files.len() <= FEW
            && self.published.is_some()
            && self.lost.is_none()
            && list(&self.path).is_ok_and(|paths| paths.iter().eq(self.files.keys()))
            && self.files.iter().all(as_read)
    }

    /// Whether a file is away and still counts.
    fn misses_one(&self) -> bool {
        self.files.values().any(|entry| entry.gone.is_some())
    }

    /// There is nothing to read at the moment.
    fn lost(&mut self, error: FileError) -> News {
        self.lost = Some(error.clone());
        News { snapshot: None, error: Some(error) }
    }

    fn merge(&mut self) -> News {
        let news = self.merge_files();
        self.error.clone_from(&news.error);
        news
    }

    fn merge_files(&mut self) -> News {
        let mut error = None;
        let mut claims = Claims::default();
        let complete = !self.files.is_empty() && !self.misses_one();
        let mut snapshot = Snapshot { complete, ..Snapshot::default() };
        for (path, entry) in self.files.iter().filter(|(_, entry)| entry.gone.is_none()) {
            let services = entry.services.as_deref().unwrap_or_default();
            snapshot.complete &= entry.complete;
            error = error.or_else(|| entry.error.clone());
            match claims.add_file(services) {
                Ok(()) => snapshot.services.extend(super::services(services.iter().cloned())),
                Err(clash) => {
                    snapshot.complete = false;
                    error = error.or_else(|| Some(FileError::new(path, format!("{clash}, in another file"))));
                }
            }
        }
        let nothing = self.files.values().all(|entry| entry.services.is_none());
        if nothing && error.is_some() {
            return News { snapshot: None, error };
        }
        if snapshot.complete {
            self.kept = None;
        }
        let gone = self.files.values().filter(|entry| entry.gone.is_some());
        let gone = gone.filter_map(|entry| entry.services.as_ref()).flatten();
        for service in gone.chain(self.kept.iter().flat_map(|kept| kept.all())) {
            // What is named by now is no longer kept.
            if claims.add(service).is_ok() {
                snapshot.kept.insert(service.id.clone(), service.clone());
            }
        }
        let changed = self.published.as_ref() != Some(&snapshot);
        self.published = Some(snapshot.clone());
        News { snapshot: changed.then_some(snapshot), error }
    }
}

impl Entry {
    /// Takes what the file says; services that are as they are known stay the same ones. An empty file is taken
    /// for an accident where `keep` says that there was something, or where it is known here.
    fn read(&mut self, path: &Path, rules: &Rules, known: [Option<&Snapshot>; 2], keep: bool) {
        let parsed = read_limited(path).and_then(|text| format::parse(path, &text, rules));
        self.error = None;
        match parsed {
            Ok(Some(services)) => {
                let same = |service: &Service| {
                    let known = known.iter().flatten().flat_map(|known| [&known.services, &known.kept]);
                    known.filter_map(|all| all.get(&service.id)).find(|known| ***known == *service).cloned()
                };
                let services = services.into_iter().map(|new| same(&new).unwrap_or_else(|| Arc::new(new)));
                let mut services: Vec<_> = services.collect();
                // They are where the parsed ones were, which are larger.
                services.shrink_to_fit();
                self.services = Some(services);
                self.complete = true;
            }
            Ok(None) if !keep && self.services.as_ref().is_none_or(Vec::is_empty) => {
                // Nothing to keep; an empty file still does not say that nothing exists.
                self.services = Some(Vec::new());
                tracing::warn!("{}: the file is empty", path.display());
            }
            Ok(None) => {
                let kept = "the file is empty; what it held is kept (an empty list of services removes them)";
                self.error = Some(FileError::new(path, kept));
            }
            Err(error) => self.error = Some(error),
        }
    }
}

/// Reads a services file and checks it; for `mesh config validate` and `mesh check`.
pub fn validate(path: &Path, rules: &Rules) -> Result<usize, FileError> {
    let mut source = Source::new(path.to_path_buf(), rules.clone(), None);
    let news = source.read(&Which::All);
    match news.error {
        Some(error) => Err(error),
        None => Ok(news.snapshot.unwrap_or_default().services.len()),
    }
}

fn list(path: &Path) -> Result<Vec<PathBuf>, FileError> {
    let error = |error: io::Error| FileError::new(path, error.to_string());
    if !fs::metadata(path).map_err(error)?.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let mut paths = Vec::new();
    for entry in fs::read_dir(path).map_err(error)? {
        let entry = entry.map_err(error)?.path();
        let hidden = entry.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && format::Format::of(&entry).is_some() && entry.is_file() {
            paths.push(entry);
        }
    }
    paths.sort();
    Ok(paths)
}

fn read_limited(path: &Path) -> Result<String, FileError> {
    use io::Read;
    let error = |error: io::Error| FileError::new(path, error.to_string());
    let mut text = String::new();
    // To open a pipe is to wait for its other end.
    if !fs::metadata(path).map_err(error)?.is_file() {
        return Err(FileError::new(path, "this is not a file"));
    }
    let mut file = fs::File::open(path).map_err(error)?.take(MAX_FILE + 1);
    file.read_to_string(&mut text).map_err(error)?;
    if text.len() as u64 > MAX_FILE {
        let size = fs::metadata(path).map_err(error)?.len();
        return Err(FileError::new(path, format!("the file has {size} bytes; the limit is {MAX_FILE}")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
