//! Which file it is, and whether anybody has touched it since.

use crate::error::{Error, Result};
use crate::file_id::FileId;
use serde::{Deserialize, Serialize};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The coarsest tick of the clock that file systems stamp files with, and some more.
const TICK: Duration = Duration::from_millis(20);

/// Equal identities of one moment: the same file, not written to and not renamed over since. One that was kept is
/// compared by [`Identity::is`]. Of a block device it says nothing, since nobody stamps a device that is written to
/// from elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Which file it is.
    #[serde(flatten)]
    pub id: FileId,
    /// Length of the file in bytes.
    pub len_bytes: u64,
    /// Time of the last write: seconds since the epoch, and nanoseconds.
    pub modified: (i64, i64),
    /// Time of the last change of the inode: seconds since the epoch, and nanoseconds. Programs cannot set it.
    pub changed: (i64, i64),
}

impl Identity {
    /// Identity of the file at this path now. Fails if nothing is there.
    pub fn of(path: &Path) -> Result<Identity> {
        let m = std::fs::metadata(path).map_err(|e| Error::io("cannot look at the image", path, e))?;
        Ok(Identity {
            id: FileId::of(&m),
            len_bytes: m.len(),
            modified: (m.mtime(), m.mtime_nsec()),
            changed: (m.ctime(), m.ctime_nsec()),
        })
    }

    /// Whether it is the same file, untouched. Holds over a restart of the host.
    pub fn is(&self, other: &Identity) -> bool {
        let written = |i: &Identity| (i.len_bytes, i.modified, i.changed);
        self.id.is(&other.id) && written(self) == written(other)
    }

    /// As [`Identity::of`], but only once the file has been left alone for a tick of the clock: whoever writes to it
    /// later leaves another time behind. Blocks, some milliseconds at most while nobody writes; `None` if somebody
    /// does.
    pub fn settled(path: &Path) -> Result<Option<Identity>> {
        for _ in 0..3 {
            let seen = Self::of(path)?;
            let changed = Duration::new(seen.changed.0.max(0) as u64, seen.changed.1.max(0) as u32);
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            // A time in the future tells nothing: the clock was set.
            if changed > now {
                return Ok(None);
            }
            std::thread::sleep(TICK.saturating_sub(now - changed));
            if Self::of(path)? == seen {
                return Ok(Some(seen));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn whatever_is_written_after_it_settled_shows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.raw");
        std::fs::write(&path, b"one").unwrap();
        for _ in 0..20 {
            let seen = Identity::settled(&path).unwrap().unwrap();
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.write_all_at(b"two", 0).unwrap();
            assert_ne!(Identity::of(&path).unwrap(), seen);
        }
        let seen = Identity::of(&path).unwrap();
        std::fs::copy(&path, dir.path().join("b")).unwrap();
        std::fs::rename(dir.path().join("b"), &path).unwrap();
        assert_ne!(Identity::of(&path).unwrap(), seen);
    }
}
