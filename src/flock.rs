//! A lock on a file by `flock`, held until it is dropped.
//!
//! The kernel frees such a lock when the last descriptor of the open file is closed, however the holder dies. Closing
//! ours is not enough to free it at once. A child that another thread forks at that moment has copies of all
//! descriptors until it runs its program (O_CLOEXEC closes them there, not before). For those milliseconds the lock
//! would seem taken, and the next caller would be turned away. So dropping unlocks explicitly, which counts for every
//! copy.

use std::fs::{File, TryLockError};
use std::io;

/// Held until dropped.
#[derive(Debug)]
pub struct Flock(File);

impl Flock {
    /// A lock for one holder. It does not wait: it returns the file if another holder has any lock on it.
    pub fn exclusive(file: File) -> io::Result<Result<Flock, File>> {
        Self::take(file, File::try_lock)
    }

    /// A lock that many may share. It does not wait: it returns the file if another holder has it exclusively.
    pub fn shared(file: File) -> io::Result<Result<Flock, File>> {
        Self::take(file, File::try_lock_shared)
    }

    /// std calls `flock` for both on Linux, the lock that older versions of this program take too.
    fn take(file: File, lock: fn(&File) -> Result<(), TryLockError>) -> io::Result<Result<Flock, File>> {
        match lock(&file) {
            Ok(()) => Ok(Ok(Flock(file))),
            Err(TryLockError::WouldBlock) => Ok(Err(file)),
            Err(TryLockError::Error(e)) => Err(e),
        }
    }

    /// The locked file.
    pub fn file(&self) -> &File {
        &self.0
    }
}

impl Drop for Flock {
    fn drop(&mut self) {
        // Unlocking an open file cannot fail; if it did, closing the file would free the lock.
        let _ = self.0.unlock();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A copy of the descriptor stands for a child that has been forked and does not run its program yet.
    #[test]
    fn what_was_let_go_is_free_though_a_child_has_a_copy_still() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let open = || File::options().write(true).create(true).truncate(false).open(&path).unwrap();
        let held = Flock::exclusive(open()).unwrap().unwrap();
        let copy = held.file().try_clone().unwrap();
        assert!(Flock::exclusive(open()).unwrap().is_err(), "as long as it is held nobody else has it");
        assert!(Flock::shared(open()).unwrap().is_err());
        drop(held);
        let again = Flock::exclusive(open()).unwrap();
        assert!(again.is_ok(), "it was let go, whoever has a copy");
        drop((again, copy));
        let (one, two) = (Flock::shared(open()).unwrap(), Flock::shared(open()).unwrap());
        assert!(one.is_ok() && two.is_ok() && Flock::exclusive(open()).unwrap().is_err());
    }
    /// std promises no particular call. Another program, such as an older version of this one, must see the same lock.
    #[test]
    fn the_lock_is_that_of_flock() {
        use rustix::fs::FlockOperation::{NonBlockingLockExclusive, NonBlockingLockShared};
        use rustix::io::Errno;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let open = || File::options().write(true).create(true).truncate(false).open(&path).unwrap();
        let held = Flock::exclusive(open()).unwrap().unwrap();
        assert_eq!(rustix::fs::flock(open(), NonBlockingLockShared), Err(Errno::WOULDBLOCK));
        drop(held);
        let shared = Flock::shared(open()).unwrap().unwrap();
        assert_eq!(rustix::fs::flock(open(), NonBlockingLockShared), Ok(()));
        assert_eq!(rustix::fs::flock(open(), NonBlockingLockExclusive), Err(Errno::WOULDBLOCK));
        drop(shared);
        assert_eq!(rustix::fs::flock(open(), NonBlockingLockExclusive), Ok(()));
    }
}
