//! Whether an image that our store made is sound enough to be written to: what `qemu-img check` would ask, for the
//! plain images of the store, without the program.
//!
//! Reading a damaged image shows wrong data, which digests find. Writing to one destroys: a cluster that is in use and
//! not counted is given out a second time. So before an image is built on that nobody sealed, every table is walked:
//! each cluster must be inside the file, have one user, and be counted once. Clusters that are counted and not used
//! (leaked) do no harm.
//!
//! Cost: the tables are read (one 64 KiB table per 512 MiB of data, one per 2 GiB of file), a bit of memory per
//! cluster. Format: QEMU's docs/interop/qcow2.txt.

use super::header::Header;
use crate::error::{Error, Kind, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const CLUSTER: u64 = super::CLUSTER_LEN as u64;
/// Entries of an L2 table, and of a table of refcount blocks.
const ENTRIES: usize = super::CLUSTER_LEN / 8;
/// 16-bit counts in a refcount block.
const COUNTS: u64 = CLUSTER / 2;
/// Bits 9 to 55 of an entry: where in the file.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// In an entry that leads to a cluster with one user.
const COPIED: u64 = 1 << 63;
/// In an entry of an L2 table: reads as zeros, whatever the cluster holds.
const ZERO: u64 = 1;

/// [`Kind::Corrupt`], with the place, if the image must not be written to. Only plain images are known: version 3,
/// clusters of 64 KiB, counts of 16 bits, one file, no backing image, no internal snapshots; others are refused.
pub fn check_plain(file: &File, path: &Path) -> Result<()> {
    let header = Header::read(file, path)?;
    let mut head = [0; 112];
    read(file, 0, &mut head).map_err(|e| e.path(path))?;
    let be32 = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("four bytes"));
    let be64 = |at: usize| u64::from_be_bytes(head[at..at + 8].try_into().expect("eight bytes"));
    // No backing name and no table of snapshots, not even unused; behind the fixed fields the compression type, if at
    // all.
    let bare = be64(8) == 0 && be64(64) == 0 && matches!(be32(100), 104 | 112) && (be32(100) == 104 || be64(104) == 0);
    let plain = header.version == 3 && be32(20) == 16 && be32(96) == 4 && be64(72) == 0 && bare;
    if !plain || header.backing.is_some() || header.encrypted || header.snapshots != 0 {
        return Err(Error::new(Kind::Refused, "the image is not a plain one of the store").path(path));
    }
    let len = file.metadata().map_err(|e| Error::io("cannot look at the image", path, e))?.len();
    let (l1, l1_entries) = (be64(40), u64::from(be32(36)));
    let (table, table_clusters) = (be64(48), u64::from(be32(56)));
    let mut used = Used::new(len);
    let walk = |used: &mut Used| -> Result<()> {
        used.take(0, "the header")?;
        used.take_all(l1, (l1_entries * 8).div_ceil(CLUSTER), "the L1 table")?;
        used.take_all(table, table_clusters, "the refcount table")?;
        if l1_entries * ENTRIES as u64 * CLUSTER < header.size.0 {
            return Err(Error::new(Kind::Corrupt, "the L1 table is too short for the disk"));
        }
        let blocks = entries(file, table, table_clusters * ENTRIES as u64)?;
        for block in blocks.iter().filter(|b| **b != 0) {
            used.take(*block, "a refcount block")?;
        }
        for l2 in entries(file, l1, l1_entries)?.into_iter().filter(|entry| *entry != 0) {
            let l2 = leads_to(l2, l1)?;
            used.take(l2, "an L2 table")?;
            for entry in entries(file, l2, ENTRIES as u64)?.into_iter().filter(|entry| entry & !ZERO != 0) {
                used.take(leads_to(entry & !ZERO, l2)?, "a data cluster")?;
            }
        }
        used.are_counted(file, &blocks)
    };
    walk(&mut used).map_err(|e| e.path(path))
}

/// A bit per cluster of the file.
struct Used {
    len: u64,
    bits: Vec<u64>,
}

impl Used {
    fn new(len: u64) -> Self {
        Self { len, bits: vec![0; len.div_ceil(CLUSTER).div_ceil(64) as usize] }
    }

    fn take(&mut self, offset: u64, what: &str) -> Result<()> {
        let wrong = |why: &str| Err(Error::new(Kind::Corrupt, format!("{what} {why}")).offset(offset));
        if !offset.is_multiple_of(CLUSTER) {
            return wrong("does not begin with a cluster");
        }
        if offset >= self.len {
            return wrong("lies behind the end of the file");
        }
        let (word, bit) = ((offset / CLUSTER / 64) as usize, offset / CLUSTER % 64);
        if self.bits[word] >> bit & 1 == 1 {
            return wrong("shares its cluster with something else");
        }
        self.bits[word] |= 1 << bit;
        Ok(())
    }

    fn take_all(&mut self, offset: u64, clusters: u64, what: &str) -> Result<()> {
        if clusters > self.len.div_ceil(CLUSTER) {
            return Err(Error::new(Kind::Corrupt, format!("{what} is larger than the file")).offset(offset));
        }
        (0..clusters).try_for_each(|n| self.take(offset.saturating_add(n * CLUSTER), what))
    }

    /// Every cluster in use is counted once.
    fn are_counted(&self, file: &File, blocks: &[u64]) -> Result<()> {
        let clusters = self.len.div_ceil(CLUSTER);
        for (n, first) in (0..clusters).step_by(COUNTS as usize).enumerate() {
            let mut counts = vec![0; CLUSTER as usize];
            if let Some(block) = blocks.get(n).filter(|b| **b != 0) {
                read(file, *block, &mut counts)?;
            }
            for cluster in first..clusters.min(first + COUNTS) {
                let at = 2 * (cluster - first) as usize;
                let count = u16::from_be_bytes([counts[at], counts[at + 1]]);
                let used = self.bits[(cluster / 64) as usize] >> (cluster % 64) & 1 == 1;
                if used && count != 1 {
                    let what = format!("a cluster in use is counted {count} times");
                    return Err(Error::new(Kind::Corrupt, what).offset(cluster * CLUSTER));
                }
            }
        }
        Ok(())
    }
}

/// Where an entry that is not empty leads. One that is compressed, shared or has a bit that means nothing is none of
/// ours.
fn leads_to(entry: u64, table: u64) -> Result<u64> {
    if entry & !OFFSET != COPIED {
        return Err(Error::new(Kind::Corrupt, format!("{entry:#x} is no entry of a plain image's table")).offset(table));
    }
    Ok(entry & OFFSET)
}

/// `count` entries of a table; the caller has seen that it lies in the file.
fn entries(file: &File, at: u64, count: u64) -> Result<Vec<u64>> {
    let mut bytes = vec![0; count as usize * 8];
    read(file, at, &mut bytes)?;
    Ok(bytes.chunks_exact(8).map(|e| u64::from_be_bytes(e.try_into().expect("eight bytes"))).collect())
}

/// What lies behind the end of the file reads as zeros: a file may end within its last table.
fn read(file: &File, at: u64, buf: &mut [u8]) -> Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], at + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::from_io("cannot read a table of the image", e).offset(at)),
        }
    }
    Ok(())
}
