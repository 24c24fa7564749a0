//! A lock on a file by `flock`, held until it is dropped.
//!
//! The kernel frees such a lock when the last descriptor of the opened file is closed, however its holder dies. Closing ours is not
//! enough to let it go: a child that another thread forks just then has all descriptors of this process until it runs its
//! program (O_CLOEXEC closes them there, and not before), so that the lock would seem taken for some milliseconds more, and
//! whoever asks next without waiting would be turned away. So it is let go in so many words, which counts for every copy.

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use std::fs::File;
use std::io;

/// Held until dropped.
#[derive(Debug)]
pub struct Flock(File);

impl Flock {
    /// For one holder alone. Does not wait; the file is given back where somebody has it.
    pub fn exclusive(file: File) -> io::Result<Result<Flock, File>> {
        Self::take(file, FlockOperation::NonBlockingLockExclusive)
    }

    /// The same, beside others who share it.
    pub fn shared(file: File) -> io::Result<Result<Flock, File>> {
        Self::take(file, FlockOperation::NonBlockingLockShared)
    }

    fn take(file: File, how: FlockOperation) -> io::Result<Result<Flock, File>> {
        match rustix::fs::flock(&file, how) {
            Ok(()) => Ok(Ok(Flock(file))),
            Err(Errno::WOULDBLOCK) => Ok(Err(file)),
            Err(e) => Err(e.into()),
        }
    }

    /// The locked file.
    pub fn file(&self) -> &File {
        &self.0
    }
}

impl Drop for Flock {
    fn drop(&mut self) {
        // It cannot fail on a file that is open; if it did, closing the file would have to do.
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
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
}
