//! Telling when files change.

use std::{ffi::OsString, path::Path};

use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode, ModifyKind},
};
use tokio::sync::mpsc;

/// Watches a folder, or one name in it, for files that were completely written, moved or
/// removed: never for a write in progress. Ends with the returned watcher.
pub(crate) fn folder(
    dir: &Path,
    only: Option<OsString>,
    tell: mpsc::Sender<()>,
) -> Option<RecommendedWatcher> {
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        let Ok(event) = event else { return };
        let done = match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) | EventKind::Remove(_) => true,
            EventKind::Modify(kind) => matches!(kind, ModifyKind::Name(_)),
            _ => false,
        };
        let ours =
            only.as_ref().is_none_or(|only| event.paths.iter().any(|path| path.file_name() == Some(only)));
        if done && ours {
            // Full means that the receiver will look anyway.
            let _ = tell.try_send(());
        }
    });
    let mut watcher = watcher.ok()?;
    watcher.watch(dir, RecursiveMode::NonRecursive).ok()?;
    Some(watcher)
}
