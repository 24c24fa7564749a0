//! What was written goes to the disk while more is being written, so that the sync at the end has little left to do.
//!
//! Promises nothing of durability and reports no errors: both are the sync's, which meets every error that the writing
//! here met, because the kernel keeps it for the open file.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

/// Bytes written between two nudges. Less, and what is written twice goes to the disk twice.
const STEP_LEN: u64 = 8 << 20;

/// A thread that has the kernel write a file out, from the first [`STEP_LEN`] bytes on.
#[derive(Default)]
pub(super) struct Behind {
    written: AtomicU64,
    /// `None` where there was no thread or descriptor to be had: then the sync does it all.
    thread: OnceLock<Option<Running>>,
}

struct Running {
    nudge: SyncSender<()>,
    thread: JoinHandle<()>,
}

impl Behind {
    /// So many bytes have been written to the file. Does not block.
    pub(super) fn wrote(&self, file: &File, len: u64) {
        let before = self.written.fetch_add(len, Ordering::Relaxed);
        if before / STEP_LEN == (before + len) / STEP_LEN {
            return;
        }
        if let Some(Running { nudge, .. }) = self.thread.get_or_init(|| start(file)) {
            // Where one is waiting already, it stands for this one, too.
            let _ = nudge.try_send(());
        }
    }

    /// Ends the thread, and waits for it: it must not be in the way of what follows.
    pub(super) fn end(&mut self) {
        let Some(Some(Running { nudge, thread })) = self.thread.take() else { return };
        drop(nudge);
        // It has nothing to tell.
        let _ = thread.join();
        self.written.store(0, Ordering::Relaxed);
    }
}

impl Drop for Behind {
    fn drop(&mut self) {
        self.end();
    }
}

fn start(file: &File) -> Option<Running> {
    let file = file.try_clone().ok()?;
    let (nudge, nudges) = sync_channel::<()>(1);
    let work = move || {
        while nudges.recv().is_ok() {
            write_out(&file);
        }
    };
    let thread = std::thread::Builder::new().name("write-behind".to_owned()).spawn(work).ok()?;
    Some(Running { nudge, thread })
}

/// Begins to write out what is dirty of the whole file. Without a flag that waits it takes no error from the sync.
fn write_out(file: &File) {
    // SAFETY: the descriptor is open as long as `file` is, and the call touches no memory of ours.
    unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_thread_runs_from_the_first_step_on_and_ends_with_its_owner() {
        let file = tempfile::tempfile().unwrap();
        let mut behind = Behind::default();
        behind.wrote(&file, STEP_LEN - 1);
        assert!(behind.thread.get().is_none(), "small files are not worth a thread");
        file.write_all_at(&[1; 4096], 0).unwrap();
        behind.wrote(&file, 1);
        assert!(behind.thread.get().is_some());
        for _ in 0..100 {
            behind.wrote(&file, STEP_LEN);
        }
        behind.end();
        assert!(behind.thread.get().is_none());
        file.sync_all().unwrap();
    }
}
