//! Telling when files change.

use std::{
    collections::HashSet,
    ffi::OsString,
    path::Path,
    sync::{Arc, Mutex},
};

use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode, ModifyKind},
};
use tokio::sync::Notify;

/// The names of changed files, gathered until somebody asks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes(Arc<(Mutex<HashSet<OsString>>, Notify)>);

impl Changes {
    fn add(&self, names: impl Iterator<Item = OsString>) {
        let (gathered, told) = &*self.0;
        gathered.lock().expect("nobody panics holding it").extend(names);
        told.notify_one();
    }

    /// What has changed since the last call, once anything has.
    pub(crate) async fn wait(&self) -> HashSet<OsString> {
        let (gathered, told) = &*self.0;
        loop {
            told.notified().await;
            let names = std::mem::take(&mut *gathered.lock().expect("nobody panics holding it"));
            if !names.is_empty() {
                return names;
            }
        }
    }
}

/// Watches a folder, or one name in it, for files that were completely written, moved or
/// removed: never for a write in progress. Ends with the returned watcher.
pub(crate) fn folder(dir: &Path, only: Option<OsString>, changes: Changes) -> Option<RecommendedWatcher> {
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        let Ok(event) = event else { return };
        let done = match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) | EventKind::Remove(_) => true,
            EventKind::Modify(kind) => matches!(kind, ModifyKind::Name(_)),
            _ => false,
        };
        let names = event.paths.iter().filter_map(|path| path.file_name().map(ToOwned::to_owned));
        let names: Vec<_> = names.filter(|name| only.as_ref().is_none_or(|only| only == name)).collect();
        if done && !names.is_empty() {
            changes.add(names.into_iter());
        }
    });
    let mut watcher = watcher.ok()?;
    watcher.watch(dir, RecursiveMode::NonRecursive).ok()?;
    Some(watcher)
}
