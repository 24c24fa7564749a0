//! A directory of state with a lock: one hand at a time on a drill, a failover, a handover.
//!
//! The kernel frees the lock when its holder dies, however it dies. The file is never removed: a lock on an unlinked
//! file excludes nobody.

use crate::durable::{denied, sync_dir};
use crate::error::{Error, Result};
use crate::flock::Flock;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

const LOCK: &str = "lock";

/// Makes `dir` if it is not there, for nobody else to look into.
pub(crate) fn make(dir: &Path) -> Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|e| denied(Error::io("cannot make the directory of the state", dir, e)))
}

/// Takes the lock of `dir`, which is there; held until dropped. Does not wait; `None`: another hand has it. What is
/// seen in it from here on is durable, also where an earlier holder died behind a rename and before its fsync.
pub(crate) fn lock(dir: &Path) -> Result<Option<Flock>> {
    let path = dir.join(LOCK);
    let mut options = fs::OpenOptions::new();
    let file = options.write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.map_err(|e| denied(Error::io("cannot open the lock", &path, e)))?;
    let lock = Flock::exclusive(file).map_err(|e| Error::io("cannot take the lock", path, e))?.ok();
    if lock.is_some() {
        sync_dir(dir)?;
    }
    Ok(lock)
}
