//! What the daemon remembers over a crash: `daemon.json` in the state directory, replaced whole.
//!
//! It can be lost without harm: the journals know the newest points, and nothing in here decides about data. Written by
//! temporary file, fsync, rename, fsync of the directory.

use super::pair::Pair;
use crate::durable::sync_dir;
use crate::error::{Error, Kind, Result, advice};
use crate::flock::Flock;
use crate::name::DomainUuid;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const FILE: &str = "daemon.json";
const FORMAT: u32 = 1;

/// The state file: all that the daemon remembers over a restart.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Version of the file's format.
    pub format: u32,
    /// True if the operator paused all domains.
    #[serde(default)]
    pub all_paused: bool,
    /// Domains that the operator paused one by one.
    #[serde(default)]
    pub paused: BTreeSet<DomainUuid>,
    /// History of each domain on each target.
    #[serde(default)]
    pub pairs: Vec<Pair>,
}

/// Held as long as a daemon, or one pass, works in this state directory.
pub struct Lock(#[expect(dead_code, reason = "held, and released by the kernel at the process's end")] Flock);

/// Takes the directory for this process. [`Kind::Busy`]: another has it.
pub fn take(dir: &Path) -> Result<Lock> {
    let fail = |e| Error::io("cannot use the state directory", dir, e);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(fail)?;
    let path = dir.join("daemon.lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path).map_err(fail)?;
    let lock = Flock::exclusive(file).map_err(fail)?.map_err(|_| {
        Error::new(Kind::Busy, "a daemon works with this state already").path(dir).advise(advice::Host::AskDaemon)
    })?;
    Ok(Lock(lock))
}

/// What an earlier daemon knew. What cannot be understood is put aside, and its path is returned: everything is learnt
/// again.
pub fn load(dir: &Path) -> Result<(State, Option<PathBuf>)> {
    let path = dir.join(FILE);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok((State::default(), None)),
        Err(e) => return Err(Error::io("cannot read what an earlier daemon knew", &path, e)),
    };
    match serde_json::from_slice::<State>(&text) {
        Ok(state) if state.format == FORMAT => Ok((state, None)),
        _ => {
            let aside = dir.join("daemon.json.unreadable");
            std::fs::rename(&path, &aside).map_err(|e| Error::io("cannot put aside", &path, e))?;
            Ok((State::default(), Some(aside)))
        }
    }
}

/// Replaces the file; durable when it returns.
pub fn save(dir: &Path, state: State) -> Result<()> {
    let path = dir.join(FILE);
    let fail = |e| Error::io("cannot keep what the daemon knows", &path, e);
    let mut text = serde_json::to_vec_pretty(&State { format: FORMAT, ..state }).expect("plain data");
    text.push(b'\n');
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(fail)?;
    file.write_all(&text).and_then(|()| file.as_file().sync_all()).map_err(fail)?;
    file.persist(&path).map_err(|e| fail(e.error))?;
    sync_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::pair::{End, Key};
    use crate::name::DomainName;
    use jiff::Timestamp;

    #[test]
    fn what_is_kept_is_what_is_read_and_what_is_torn_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let uuid = DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap();
        let key = Key { uuid: uuid.clone(), url: "ssh://dr1".into() };
        let mut pair = Pair::new(key, DomainName::new("web01").unwrap(), Timestamp::UNIX_EPOCH);
        pair.ended(Timestamp::UNIX_EPOCH, Timestamp::UNIX_EPOCH, End::failed(Some(Kind::Space), "full"));
        let state = State { format: FORMAT, all_paused: true, paused: [uuid].into(), pairs: vec![pair] };
        assert_eq!(load(dir.path()).unwrap(), (State::default(), None));
        save(dir.path(), state.clone()).unwrap();
        assert_eq!(load(dir.path()).unwrap(), (state, None));
        std::fs::write(dir.path().join(FILE), "{\"format\":1,\"pai").unwrap();
        let (state, aside) = load(dir.path()).unwrap();
        assert!(state.pairs.is_empty() && aside.is_some_and(|a| a.exists()));
    }

    #[test]
    fn two_daemons_do_not_share_a_state() {
        let dir = tempfile::tempdir().unwrap();
        let first = take(dir.path()).unwrap();
        assert_eq!(take(dir.path()).err().map(|e| e.kind()), Some(Kind::Busy));
        drop(first);
        take(dir.path()).unwrap();
    }
}
