//! Space for an open point: asked for before anything is written, held while it is filled (I18).
//!
//! A run that would not fit fails before the source freezes anything. What it asked for is held by a preallocated file
//! that shrinks ahead of the writes, so that two runs cannot both count on the same room. A file system that cannot
//! preallocate gets the check alone.

use super::BeginDisk;
use super::files::{Dir, Space};
use super::manifest::RESERVATION_FILE;
use crate::block::BLOCK_LEN;
use crate::error::{Error, Kind, Result};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use std::fs::File;
use std::sync::Mutex;

/// The file gives room back in steps of this, one step ahead of the writes; the floor below the check covers the step.
const STEP_BYTES: u64 = 16 << 20;

/// Bytes that one L2 table of qcow2 covers, with clusters of 64 KiB.
const L2_COVERS: u64 = 512 << 20;

/// The held space of one open point. Its file lies in the point's directory and goes with it.
#[derive(Debug)]
pub struct Reservation {
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    file: Option<File>,
    len: u64,
    /// Reserved and not yet spent.
    left: u64,
}

impl Reservation {
    /// Fails with [`Kind::Space`] before anything is written if the file system of `store` cannot take these disks and
    /// keep its floor.
    pub fn check(space: Space, disks: &[BeginDisk]) -> Result<u64> {
        let need = disks.iter().fold(0u64, |sum, d| sum.saturating_add(need_bytes(d)));
        let usable = space.free_bytes.saturating_sub(space.floor_bytes());
        if need > usable {
            return Err(Error::new(
                Kind::Space,
                format!(
                    "the target has no room: this run may write {need} bytes, {usable} are usable ({} free, {} of them kept free)",
                    space.free_bytes,
                    space.floor_bytes()
                ),
            )
            .hint("free space on the target's store, or prune old points"));
        }
        Ok(need)
    }

    /// Holds `bytes` in a new file in `point`. Nothing is created for nothing.
    pub fn hold(point: &Dir, bytes: u64) -> Result<Reservation> {
        if bytes == 0 {
            return Ok(Self { held: Mutex::new(Held { file: None, len: 0, left: 0 }) });
        }
        let file = point.create(RESERVATION_FILE)?;
        let file = match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes) {
            Ok(()) => Some(file),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                tracing::debug!(path = %point.path().display(), "the file system cannot reserve; only checked");
                None
            }
            Err(e) => return Err(Error::io("cannot reserve space", point.join(RESERVATION_FILE), e.into())),
        };
        let len = if file.is_some() { bytes } else { 0 };
        Ok(Self { held: Mutex::new(Held { file, len, left: bytes }) })
    }

    /// Says that `bytes` are about to be written, and makes room for them.
    pub fn spend(&self, bytes: u64) -> Result<()> {
        let mut held = self.held.lock().expect("no code panics with this lock");
        held.left = held.left.saturating_sub(bytes);
        let len = held.left.saturating_sub(STEP_BYTES);
        // Not at every block: a truncation is a transaction of the file system.
        if held.len.saturating_sub(len) >= STEP_BYTES || (len == 0 && held.len > 0) {
            if let Some(file) = &held.file {
                file.set_len(len).map_err(|e| Error::from_io("cannot shrink the reservation", e))?;
            }
            held.len = len;
        }
        Ok(())
    }

    /// Gives back what is left.
    pub fn release(&self, point: &Dir) -> Result<()> {
        let mut held = self.held.lock().expect("no code panics with this lock");
        *held = Held { file: None, len: 0, left: 0 };
        point.remove(RESERVATION_FILE)
    }
}

/// Guest data and what it costs to keep track of it, at worst: every block far from every other.
fn need_bytes(disk: &BeginDisk) -> u64 {
    let disk_blocks = disk.size.blocks();
    let blocks = disk.reserve_bytes.div_ceil(BLOCK_LEN as u64).min(disk_blocks);
    let l2_tables = disk.size.0.div_ceil(L2_COVERS);
    let image = blocks.min(l2_tables) * BLOCK_LEN as u64 + l2_tables * 8 + blocks * 2;
    let change_list = blocks * 40;
    let digest_file = (blocks * 8192).min(disk_blocks * 33);
    let fixed = 1 << 20;
    disk.reserve_bytes.saturating_add(image + change_list + digest_file + fixed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::DiskSize;
    use crate::name::DiskName;

    const MIB: u64 = 1 << 20;

    fn disk(size: u64, reserve_bytes: u64) -> BeginDisk {
        BeginDisk {
            name: DiskName::new("vda").unwrap(),
            size: DiskSize(size),
            fresh: false,
            reserve_bytes,
            resume: false,
            repair: false,
        }
    }

    fn held(dir: &Dir) -> u64 {
        dir.open(RESERVATION_FILE).unwrap().unwrap().metadata().unwrap().len()
    }

    #[test]
    fn what_does_not_fit_above_the_floor_is_refused() {
        let space = Space { free_bytes: 200 * MIB, total_bytes: 1000 * MIB };
        assert!(Reservation::check(space, &[disk(1 << 30, 100 * MIB)]).is_ok());
        let e = Reservation::check(space, &[disk(1 << 30, 60 * MIB), disk(1 << 30, 80 * MIB)]).unwrap_err();
        assert_eq!(e.kind(), Kind::Space);
        assert!(Reservation::check(space, &[disk(1 << 50, u64::MAX), disk(1 << 50, u64::MAX)]).is_err());
    }

    #[test]
    fn keeping_track_is_cheap_and_never_free() {
        let whole = need_bytes(&disk(100 << 30, 100 << 30));
        assert!(whole > 100 << 30 && whole < (100 << 30) / 100 * 101, "{whole}");
        assert!(need_bytes(&disk(1 << 50, 0)) < 64 * MIB);
    }

    #[test]
    fn the_file_shrinks_ahead_of_the_writes_and_is_gone_in_the_end() {
        let t = tempfile::tempdir().unwrap();
        let dir = Dir::open_root(t.path()).unwrap().unwrap();
        let r = Reservation::hold(&dir, 64 * MIB).unwrap();
        assert_eq!(held(&dir), 64 * MIB);
        r.spend(MIB).unwrap();
        assert_eq!(held(&dir), 47 * MIB, "one step ahead");
        r.spend(MIB).unwrap();
        assert_eq!(held(&dir), 47 * MIB, "not at every write");
        r.spend(50 * MIB).unwrap();
        assert_eq!(held(&dir), 0);
        r.spend(50 * MIB).unwrap();
        r.release(&dir).unwrap();
        assert!(dir.open(RESERVATION_FILE).unwrap().is_none());
        Reservation::hold(&dir, 0).unwrap();
        assert!(dir.entries().unwrap().is_empty());
    }
}
