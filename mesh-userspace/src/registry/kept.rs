//! What each registry last delivered, kept in the state folder: a node that starts without its
//! registries serves that until they answer.
//!
//! One file per registry, replaced when what the registry says has changed. Its time of
//! modification is when the registry was last known to say so. Whoever can write there could as
//! well write the registry, so it is trusted as little: every record is checked again.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};
use xxhash_rust::xxh3::xxh3_64;

use super::{
    Rules, Snapshot, State, Sync,
    file::format::{self, Records, ToRecords},
    rules,
};
use crate::{durable, model::Service};

/// Raised when older programs would misread the files.
const VERSION: u32 = 1;

/// The largest file that is read, in bytes; a million instances take a quarter of it.
const MAX: u64 = 512 << 20;

/// The shortest pause between two writes, and how many times as long as the last write it is at
/// least: what changes faster is written once.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSES: u32 = 9;

/// How often the files of registries that answer are marked as current.
const MARK: Duration = Duration::from_secs(60);

#[derive(Serialize)]
struct Written<'a> {
    version: u32,
    r#type: &'a str,
    source: &'a str,
    service: ToRecords<'a>,
}

/// Read first: the rest may have another form in another version.
#[derive(Deserialize)]
struct Head {
    version: u32,
    r#type: String,
    source: String,
}

#[derive(Deserialize)]
struct Body {
    service: Records,
}

fn folder(state_dir: &Path) -> PathBuf {
    state_dir.join("registries")
}

fn path_of(folder: &Path, kind: &str, source: &str) -> PathBuf {
    folder.join(format!("{kind}-{:016x}.json", xxh3_64(source.as_bytes())))
}

/// A registry's state as an earlier run left it, or as one of which nothing is known.
pub fn restore(state_dir: &Path, kind: &'static str, source: String, rules: &Rules) -> State {
    let path = path_of(&folder(state_dir), kind, &source);
    let mut state = State::new(kind, source);
    match read(&path, &state, rules) {
        Ok(None) => {}
        Ok(Some((snapshot, last_sync))) => {
            tracing::info!(
                "registry {kind} {}: {} services are known from an earlier run",
                state.source,
                snapshot.kept.len()
            );
            state.sync = Sync::Stale;
            state.last_sync = Some(last_sync);
            state.snapshot = Some(Arc::new(snapshot));
        }
        Err(why) => tracing::warn!("{}: {why}; what it held is ignored", path.display()),
    }
    state
}

fn read(path: &Path, state: &State, rules: &Rules) -> Result<Option<(Snapshot, SystemTime)>, String> {
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    if !meta.is_file() || meta.len() > MAX {
        return Err(format!("this is no file of at most {MAX} bytes"));
    }
    let text = fs::read(path).map_err(|error| error.to_string())?;
    let (kept, refused) = parse(&text, state.kind, &state.source, rules)?;
    for why in refused {
        tracing::warn!("{}: {why}; it is left out", path.display());
    }
    let last_sync = meta.modified().map_err(|error| error.to_string())?;
    let kept = super::services(kept.into_iter().map(Arc::new));
    Ok(Some((Snapshot { kept, ..Snapshot::default() }, last_sync)))
}

/// The services of a file, and what is wrong with others.
pub(super) fn parse(
    text: &[u8],
    kind: &str,
    source: &str,
    rules: &Rules,
) -> Result<(Vec<Service>, Vec<String>), String> {
    let head: Head = serde_json::from_slice(text).map_err(|error| rules::shown(&error))?;
    if head.version != VERSION {
        return Err(format!("its version is {}; this program knows version {VERSION}", head.version));
    }
    if (&*head.r#type, &*head.source) != (kind, source) {
        return Err(format!("it is about the registry {} {:?}", head.r#type, head.source));
    }
    let body: Body = serde_json::from_slice(text).map_err(|error| rules::shown(&error))?;
    Ok(format::check(body.service, rules))
}

/// Writes what the registries deliver.
pub struct Keeper {
    folder: PathBuf,
    /// What the files hold.
    held: BTreeMap<PathBuf, Arc<Snapshot>>,
    /// Why the last write failed.
    error: Option<String>,
}

impl Keeper {
    /// For registries in the states that [`restore`] gave them.
    pub fn new(state_dir: &Path, restored: &[State]) -> Self {
        let folder = folder(state_dir);
        let held = restored
            .iter()
            .filter_map(|state| Some((path_of(&folder, state.kind, &state.source), state.snapshot.clone()?)));
        Self { held: held.collect(), folder, error: None }
    }

    /// Follows the registries until told to end, or until its teller is gone; writes the last news
    /// then. Never waited for by those who publish them.
    pub async fn run(mut self, mut registries: watch::Receiver<Vec<State>>, mut end: oneshot::Receiver<()>) {
        // Somebody may have published before this looked.
        registries.mark_changed();
        let mut ended = false;
        while !ended {
            ended = tokio::select! {
                changed = registries.changed() => changed.is_err(),
                () = tokio::time::sleep(MARK) => false,
                _ = &mut end => true,
            };
            let took = self.follow(&mut registries);
            if !ended {
                ended = tokio::select! {
                    () = tokio::time::sleep(PAUSE.max(took * PAUSES)) => false,
                    _ = &mut end => true,
                };
                if ended {
                    self.follow(&mut registries);
                }
            }
        }
    }

    /// Writes what is new; how long that took.
    fn follow(&mut self, registries: &mut watch::Receiver<Vec<State>>) -> Duration {
        let states = registries.borrow_and_update().clone();
        let start = Instant::now();
        tokio::task::block_in_place(|| self.write(&states));
        start.elapsed()
    }

    fn write(&mut self, states: &[State]) {
        let result =
            states.iter().try_for_each(|state| self.keep(state)).and_then(|()| self.drop_others(states));
        let error = result.err().map(|error| error.to_string());
        if let Some(error) = error.as_ref().filter(|error| self.error.as_ref() != Some(*error)) {
            tracing::error!(
                "cannot keep what the registries delivered in {}: {error}",
                self.folder.display()
            );
        }
        self.error = error;
    }

    fn keep(&mut self, state: &State) -> io::Result<()> {
        let Some(snapshot) = &state.snapshot else { return Ok(()) };
        let path = path_of(&self.folder, state.kind, &state.source);
        let same = |held: &Arc<Snapshot>| Arc::ptr_eq(held, snapshot) || held.all().eq(snapshot.all());
        if !(self.held.get(&path).is_some_and(same) && path.exists()) {
            let State { kind, source, .. } = state;
            let written = Written { version: VERSION, r#type: kind, source, service: ToRecords(snapshot) };
            durable::write(&path, &serde_json::to_vec(&written)?)?;
        }
        self.held.insert(path.clone(), snapshot.clone());
        if let (Sync::Synced, Some(last_sync)) = (state.sync, state.last_sync) {
            File::options().write(true).open(path)?.set_modified(last_sync)?;
        }
        Ok(())
    }

    /// Forgets registries that are not configured any more. Without any, nobody says that
    /// anything is gone.
    fn drop_others(&mut self, states: &[State]) -> io::Result<()> {
        if states.is_empty() {
            return Ok(());
        }
        let ours: Vec<_> =
            states.iter().map(|state| path_of(&self.folder, state.kind, &state.source)).collect();
        self.held.retain(|path, _| ours.contains(path));
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            let unused = !ours.contains(&path) && path.extension().is_some_and(|end| end == "json");
            let unfinished = path.extension().is_some_and(|end| end == "new");
            if unused || unfinished {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
