//! QEMU's own locks on an image: who holds them keeps every QEMU program out, and who cannot get them knows that one is
//! in.
//!
//! QEMU locks single bytes of the file by open-file-description locks: 100.. for what it does with the image, 200.. for
//! what it does not let others do. Whoever has the whole range excludes them all. The kernel frees it with the file;
//! but not before the last copy of its descriptor is closed, and a child that is being forked has one: so it is let go
//! in so many words.

use crate::error::{Error, Result};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// First byte of the range, and its length.
const RANGE: (i64, i64) = (100, 200);

/// Held until dropped: no QEMU program opens the image, not even to read it.
#[derive(Debug)]
pub struct QemuLock {
    _held: Held,
}

/// The file with our locks on it.
#[derive(Debug)]
struct Held(File);

impl Drop for Held {
    fn drop(&mut self) {
        let mut range = libc::flock { l_type: libc::F_UNLCK as i16, ..range() };
        // It cannot fail on a file that is open; if it did, closing the file would have to do.
        let _ = fcntl(&self.0, libc::F_OFD_SETLK, &mut range);
    }
}

impl QemuLock {
    /// `None` if a QEMU program has the image open; `NotFound` if there is no such file. It must be writable for us.
    /// Does not wait.
    pub fn take(path: &Path) -> Result<Option<QemuLock>> {
        let cannot = |e| Error::io("cannot lock the image", path, e);
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(cannot)?;
        let mut range = range();
        match fcntl(&file, libc::F_OFD_SETLK, &mut range) {
            Ok(()) => Ok(Some(QemuLock { _held: Held(file) })),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(None),
            Err(e) => Err(cannot(e)),
        }
    }

    /// As [`QemuLock::take`], waiting up to `patience` for a QEMU that is just closing the image.
    pub fn take_within(path: &Path, patience: Duration) -> Result<Option<QemuLock>> {
        let start = Instant::now();
        loop {
            match Self::take(path)? {
                Some(lock) => return Ok(Some(lock)),
                None if start.elapsed() >= patience => return Ok(None),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

/// Byte of the lock for "reads what is consistent", and those for "writes" and "resizes"; 100 further on stands what
/// its holder does not let others do.
const READS: i64 = 100;
const WRITES: [i64; 2] = [101, 103];
const LET_NOT: i64 = 100;

/// Held until dropped: no QEMU program opens the image for writing. Several readers, QEMU's own among them, may hold
/// it.
#[derive(Debug)]
pub struct ReadLock {
    _held: Held,
}

impl ReadLock {
    /// `None` if a QEMU program has the image open for writing. Needs no permission to write. Does not wait.
    pub fn take(path: &Path) -> Result<Option<ReadLock>> {
        let cannot = |e| Error::io("cannot lock the image", path, e);
        // O_NONBLOCK: a FIFO in the place of an image must not hang us; it means nothing to files and devices.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(cannot)?;
        let held = Held(file);
        let file = &held.0;
        // In QEMU's order: say what one does and lets nobody do, then look whether somebody does it.
        for byte in [READS, WRITES[0] + LET_NOT, WRITES[1] + LET_NOT] {
            let mut wanted = one(byte, libc::F_RDLCK);
            match fcntl(file, libc::F_OFD_SETLK, &mut wanted) {
                Ok(()) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => return Ok(None),
                Err(e) => return Err(cannot(e)),
            }
        }
        for byte in [WRITES[0], WRITES[1], READS + LET_NOT] {
            let mut seen = one(byte, libc::F_WRLCK);
            fcntl(file, libc::F_OFD_GETLK, &mut seen).map_err(cannot)?;
            if seen.l_type != libc::F_UNLCK as i16 {
                return Ok(None);
            }
        }
        Ok(Some(ReadLock { _held: held }))
    }
}

fn one(byte: i64, kind: i32) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

/// Whether a QEMU program has the image open right now. Takes nothing; an image that is not there is not open.
pub fn is_open_in_qemu(path: &Path) -> Result<bool> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(Error::io("cannot look for locks on the image", path, e)),
    };
    is_locked(&file).map_err(|e| Error::io("cannot look for locks on the image", path, e))
}

/// The same, of a file that is open already.
pub(super) fn is_locked(file: &File) -> std::io::Result<bool> {
    let mut range = range();
    fcntl(file, libc::F_OFD_GETLK, &mut range)?;
    Ok(range.l_type != libc::F_UNLCK as i16)
}

fn range() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: RANGE.0,
        l_len: RANGE.1,
        l_pid: 0,
    }
}

fn fcntl(file: &File, command: i32, range: &mut libc::flock) -> std::io::Result<()> {
    // SAFETY: both commands read and write one `flock`, which the caller owns; the descriptor is open.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, range) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};

    #[test]
    fn what_we_hold_no_qemu_opens_and_the_other_way_round() {
        let t = tempfile::tempdir().unwrap();
        let path = t.path().join("a.qcow2");
        let image = path.to_str().unwrap();
        let done = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", image, "1M"]).status().unwrap();
        assert!(done.success());
        let none = t.path().join("none");
        assert!(!is_open_in_qemu(&path).unwrap() && !is_open_in_qemu(&none).unwrap());
        assert_eq!(QemuLock::take(&none).unwrap_err().kind(), Kind::NotFound);
        let info = || Command::new("qemu-img").args(["info", image]).output().unwrap().status.success();
        let held = QemuLock::take(&path).unwrap().unwrap();
        assert!(QemuLock::take(&path).unwrap().is_none() && is_open_in_qemu(&path).unwrap() && !info());
        drop(held);
        assert!(info() && !is_open_in_qemu(&path).unwrap());

        // A reader that stays: qemu-io waits for commands.
        let mut reader = Command::new("qemu-io")
            .args(["-r", "-f", "qcow2", image])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = reader.stdin.take().unwrap();
        input.write_all(b"read 0 512\n").unwrap();
        input.flush().unwrap();
        let mut said = String::new();
        let mut output = BufReader::new(reader.stdout.take().unwrap());
        while !said.contains("read 512/512") {
            said.clear();
            assert!(output.read_line(&mut said).unwrap() > 0, "qemu-io reads and says so");
        }
        assert!(is_open_in_qemu(&path).unwrap() && QemuLock::take(&path).unwrap().is_none());
        drop(input);
        reader.wait().unwrap();
        assert!(!is_open_in_qemu(&path).unwrap());
    }
    #[test]
    fn readers_share_an_image_and_keep_writers_out() {
        let t = tempfile::tempdir().unwrap();
        let path = t.path().join("a.qcow2");
        let image = path.to_str().unwrap();
        let done = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", image, "1M"]).status().unwrap();
        assert!(done.success());
        let write = || Command::new("qemu-io").args(["-f", "qcow2", "-c", "write 0 512", image]).output().unwrap();
        let read = || Command::new("qemu-io").args(["-r", "-f", "qcow2", "-c", "read 0 512", image]).output().unwrap();
        let one = ReadLock::take(&path).unwrap().unwrap();
        let two = ReadLock::take(&path).unwrap().unwrap();
        assert!(read().status.success() && !write().status.success());
        assert!(QemuLock::take(&path).unwrap().is_none(), "whoever has it all would shut out the readers");
        drop((one, two));
        assert!(write().status.success());
        let all = QemuLock::take(&path).unwrap().unwrap();
        assert!(ReadLock::take(&path).unwrap().is_none());
        drop(all);

        for (mode, readable) in [("-r", true), ("-n", false)] {
            let mut other = Command::new("qemu-io")
                .args([mode, "-f", "qcow2", image])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut input = other.stdin.take().unwrap();
            input.write_all(b"read 0 512\n").unwrap();
            input.flush().unwrap();
            let mut output = BufReader::new(other.stdout.take().unwrap());
            let mut said = String::new();
            while !said.contains("read 512/512") {
                said.clear();
                assert!(output.read_line(&mut said).unwrap() > 0, "qemu-io reads and says so");
            }
            assert_eq!(ReadLock::take(&path).unwrap().is_some(), readable, "{mode}");
            drop(input);
            other.wait().unwrap();
        }
    }
}
