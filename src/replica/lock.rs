//! One writer at a time (I15): an flock on a file in the replica's directory.
//!
//! The kernel frees it when its holder dies, however it dies; the content of the file only tells a person who holds
//! it, and nothing is decided on it. The file is never removed: a lock on an unlinked file excludes nobody.

use super::files::Dir;
use super::manifest::LOCK_FILE;
use crate::error::{Error, Kind, Result};
use crate::flock::Flock;
use crate::name::RunId;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::os::unix::fs::FileExt;

const LOCK_MAX: usize = 4096;

/// Held until dropped.
#[derive(Debug)]
pub struct WriterLock {
    _lock: Flock,
}

#[derive(Debug, Serialize, Deserialize)]
struct Holder {
    pid: u32,
    /// The run that holds it; none while a replica is only pruned or repaired.
    run: Option<RunId>,
    since: Timestamp,
}

impl WriterLock {
    /// Takes the lock of the replica in `dir`, or says at once who has it ([`Kind::Busy`]). Does not wait. The manifest
    /// that is seen from here on is durable: a writer that died behind its rename and before its fsync is made good, or
    /// images of points would be changed that a power cut brings back.
    pub fn take(dir: &Dir, run: Option<&RunId>, now: Timestamp) -> Result<WriterLock> {
        let file = dir.open_or_create(LOCK_FILE)?;
        let cannot = |e| Error::io("cannot lock the replica", dir.join(LOCK_FILE), e);
        let lock = Flock::exclusive(file).map_err(cannot)?.map_err(|_| busy(dir))?;
        let file = lock.file();
        let holder = Holder { pid: std::process::id(), run: run.cloned(), since: now };
        let mut line = serde_json::to_vec(&holder).expect("three plain fields");
        line.push(b'\n');
        // Not synced: after a crash of the machine nobody holds it, whatever it says. Longer first, so that a reader
        // who comes between the two calls sees a holder and not nothing.
        file.write_all_at(&line, 0)
            .and_then(|()| file.set_len(line.len() as u64))
            .map_err(|e| Error::io("cannot write the lock", dir.join(LOCK_FILE), e))?;
        dir.sync()?;
        Ok(WriterLock { _lock: lock })
    }
}

fn busy(dir: &Dir) -> Error {
    let holder = dir.read(LOCK_FILE, LOCK_MAX).ok().flatten().and_then(|c| serde_json::from_slice::<Holder>(&c).ok());
    let who = match holder {
        Some(Holder { pid, run: Some(run), since }) => format!("run {run}, process {pid}, since {since}"),
        Some(Holder { pid, run: None, since }) => format!("a prune or a repair, process {pid}, since {since}"),
        None => "a process that has not yet said who it is".to_owned(),
    };
    Error::new(Kind::Busy, format!("the replica is being written by {who}"))
        .path(dir.join(LOCK_FILE))
        .hint("wait for it to end, or end that process; the lock is freed with it")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_writer_is_told_who_the_first_is() {
        let t = tempfile::tempdir().unwrap();
        let dir = Dir::open_root(t.path()).unwrap().unwrap();
        let now: Timestamp = "2024-05-01T12:00:00Z".parse().unwrap();
        let run = RunId::from_bits(7);
        let first = WriterLock::take(&dir, Some(&run), now).unwrap();
        let e = WriterLock::take(&dir, None, now).unwrap_err();
        assert_eq!(e.kind(), Kind::Busy);
        assert!(e.to_string().contains("0000000000000007") && e.to_string().contains("2024-05-01"), "{e}");
        drop(first);
        WriterLock::take(&dir, None, now).unwrap();
    }
}
