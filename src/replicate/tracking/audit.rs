//! The audit: a dirty bitmap's word is checked before it is relied on.
//!
//! A bitmap cannot know of a write that went past QEMU (a mount on the host, a restored file, a storage that forgot),
//! and nothing in it tells when it is wrong. So in every run by bitmap some blocks that it calls clean are read and
//! compared with the head all the same: a rotating slice, so that the whole disk is compared once in so many runs, and
//! a random sample, so that a fault does not wait for its turn. One block that lies, and the disk is compared by digest
//! in the same run, over the same frozen image: the point is right, and an operator is told.
//!
//! Cost: bounded in bytes and in time per disk and run. Holes cost nothing; an unchanged group costs 32 bytes on the
//! wire. Which blocks are sampled follows from the run's id, which nobody knows beforehand and everybody can look up
//! afterwards.

use crate::block::digest::{Digest, block_digest, node_digest};
use crate::block::extent::Content;
use crate::block::{BLOCK_LEN, BlockIndex, ByteRange, DiskSize, FANOUT, GROUP_LEN, GroupIndex};
use crate::engine::disk_target::DiskTarget;
use crate::engine::pump::{KeepGoing, Shipment, suspects};
use crate::engine::stats::{AuditStats, Mode};
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::name::{DiskName, RunId};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How much is audited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditOptions {
    /// The slices of this many runs cover a whole disk, unless the budgets cut them short; 0 audits nothing.
    pub every_runs: u32,
    /// Most bytes to read per disk and run; a group (4 MiB) that was begun is finished.
    pub bytes_max: u64,
    /// Most time to spend per disk and run.
    pub within: Duration,
}

impl Default for AuditOptions {
    /// With a run every five minutes: a third of a day for a disk of up to 100 GiB of data; longer for a larger one.
    fn default() -> Self {
        Self { every_runs: 100, bytes_max: 1 << 30, within: Duration::from_secs(5) }
    }
}

/// What is to be audited of a disk in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct AuditPlan {
    /// The slice, in bytes of the disk: whole groups.
    pub from: u64,
    /// End of the slice: first byte of the disk after it.
    pub to: u64,
    /// Limits of bytes and time for the audit.
    #[serde(skip)]
    pub options: AuditOptions,
}

/// Places of the random sample, and blocks that are compared around each.
const SPOTS: u64 = 16;
const BLOCKS_PER_SPOT: u32 = 4;

/// Groups whose nodes are asked for at once, and after which the run's signals are looked at.
const CHUNK_GROUPS: u64 = 32;

/// The slice that follows on `cursor`, where the last audit ended. Pure. `None`: nothing is to be audited.
pub fn plan(cursor: u64, size: DiskSize, options: &AuditOptions) -> Option<AuditPlan> {
    if options.every_runs == 0 || size.0 == 0 {
        return None;
    }
    let groups = size.groups();
    // A cursor behind the end (the round is complete, the disk shrank) begins anew.
    let first = if cursor < size.0 { cursor / GROUP_LEN } else { 0 };
    let last = groups.min(first + groups.div_ceil(u64::from(options.every_runs)));
    Some(AuditPlan { from: first * GROUP_LEN, to: size.0.min(last * GROUP_LEN), options: *options })
}

/// What an audit found.
#[derive(Debug, Default)]
struct Found {
    blocks: u64,
    bytes_read: u64,
    /// Blocks that differ from the head although the bitmap calls them clean; each once or twice, in no order.
    lies: Vec<BlockIndex>,
}

impl Found {
    fn add(&mut self, other: Found) {
        self.blocks += other.blocks;
        self.bytes_read += other.bytes_read;
        self.lies.extend(other.lies);
    }
}

/// What an audit leads to.
pub(in crate::replicate) struct Audited {
    /// What is to be shipped: if the bitmap lied, every block is compared.
    pub shipment: Shipment,
    pub stats: Option<AuditStats>,
    /// The lie, for the operator.
    pub alarm: Option<String>,
}

/// Audits a disk that is planned by bitmap. Another one is shipped as it is planned.
pub(in crate::replicate) fn audited(
    (image, replica): (&dyn Image, &dyn DiskTarget),
    shipment: &Shipment,
    plan: Option<&AuditPlan>,
    run: &RunId,
    keep_going: KeepGoing,
) -> Result<Audited> {
    let (Mode::Bitmap, Some(dirty), Some(plan)) = (shipment.mode, &shipment.dirty, plan) else {
        return Ok(Audited { shipment: shipment.clone(), stats: None, alarm: None });
    };
    let auditor = Auditor { image, replica, disk: &shipment.disk, size: shipment.size, dirty };
    let stats = auditor.run(plan, run, shipment.workers, keep_going)?;
    if stats.lies == 0 {
        return Ok(Audited { shipment: shipment.clone(), stats: Some(stats), alarm: None });
    }
    let reason = lie(&stats);
    let alarm = Some(format!("disk '{}': {reason}", shipment.disk));
    let reason = format!("{reason}; every block was read and compared by digest");
    let shipment = Shipment { mode: Mode::Digest, dirty: None, reason, ..shipment.clone() };
    Ok(Audited { shipment, stats: Some(stats), alarm })
}

/// A lie in words.
fn lie(stats: &AuditStats) -> String {
    let first = stats.first_lie.unwrap_or_default();
    format!(
        "the audit found {} of {} blocks changed that the dirty bitmap calls clean (the first at byte {first}): something \
         wrote to the image behind QEMU's back, or storage lost a write here or at the target",
        stats.lies, stats.blocks
    )
}

struct Auditor<'a> {
    image: &'a dyn Image,
    replica: &'a dyn DiskTarget,
    disk: &'a DiskName,
    size: DiskSize,
    /// Ascending, without overlap.
    dirty: &'a [ByteRange],
}

impl Auditor<'_> {
    fn run(&self, plan: &AuditPlan, run: &RunId, workers: usize, keep_going: KeepGoing) -> Result<AuditStats> {
        let started = Instant::now();
        let mut found = self.sample(&seed(run, self.disk))?;
        keep_going()?;
        let groups = plan.from / GROUP_LEN..plan.to.div_ceil(GROUP_LEN);
        let mut next = groups.start;
        while next < groups.end {
            let chunk = next..groups.end.min(next + CHUNK_GROUPS);
            let over = |read: u64| {
                found.bytes_read + read >= plan.options.bytes_max || started.elapsed() >= plan.options.within
            };
            let (done, in_chunk) = self.chunk(chunk.clone(), workers, &over)?;
            found.add(in_chunk);
            next = done;
            if done < chunk.end {
                break;
            }
            keep_going()?;
        }
        found.lies.sort_unstable();
        found.lies.dedup();
        Ok(AuditStats {
            blocks: found.blocks,
            bytes_read: found.bytes_read,
            lies: found.lies.len() as u64,
            first_lie: found.lies.first().map(|b| b.offset()),
            next_offset: self.size.0.min(next * GROUP_LEN),
        })
    }

    /// Compares the clean blocks of groups that follow one another, until `over` says that the budget is spent. Returns
    /// the first group that was not looked at.
    fn chunk(&self, groups: Range<u64>, workers: usize, over: &(dyn Fn(u64) -> bool + Sync)) -> Result<(u64, Found)> {
        let nodes = self.nodes(1, groups.clone())?;
        let next = AtomicU64::new(groups.start);
        let read = AtomicU64::new(0);
        let failed = AtomicBool::new(false);
        let found = Mutex::new(Ok(Found::default()));
        let work = || {
            while !failed.load(Ordering::Relaxed) && !over(read.load(Ordering::Relaxed)) {
                let g = next.fetch_add(1, Ordering::Relaxed);
                if g >= groups.end {
                    return;
                }
                let group = GroupIndex(g);
                let one = self.group(group, self.clean(group), Some(nodes[(g - groups.start) as usize]));
                let mut found = found.lock().expect("nothing panics while it is held");
                match (found.as_mut(), one) {
                    (Ok(all), Ok(one)) => {
                        read.fetch_add(one.bytes_read, Ordering::Relaxed);
                        all.add(one);
                    }
                    (Ok(_), Err(e)) => {
                        failed.store(true, Ordering::Relaxed);
                        *found = Err(e);
                    }
                    (Err(_), _) => {}
                }
            }
        };
        std::thread::scope(|scope| (0..workers.max(1)).for_each(|_| drop(scope.spawn(work))));
        let found = found.into_inner().expect("nothing panics while it is held")?;
        Ok((next.into_inner().min(groups.end), found))
    }

    /// Compares a few clean blocks with data at each of the random places; side by side, as each waits for the target.
    fn sample(&self, seed: &[u8; 32]) -> Result<Found> {
        let mut random = Random::new(seed);
        let spots: Vec<(u64, u64)> = (0..SPOTS).map(|_| (random.below(self.size.0.max(1)), random.next())).collect();
        let results: Vec<Result<Found>> = std::thread::scope(|scope| {
            let spot = |(at, bits)| scope.spawn(move || self.spot(at, bits));
            let running: Vec<_> = spots.into_iter().map(spot).collect();
            running.into_iter().map(|t| t.join().expect("a spot does not panic")).collect()
        });
        let mut found = Found::default();
        for one in results {
            found.add(one?);
        }
        Ok(found)
    }

    fn spot(&self, at: u64, bits: u64) -> Result<Found> {
        let Some(data) = self.data_from(at)? else { return Ok(Found::default()) };
        // Anywhere in the stretch of data, lest only the first blocks behind holes are ever looked at.
        let block = BlockIndex((data.start + bits % data.len()) / BLOCK_LEN as u64);
        let group = block.group();
        let clean = self.clean(group);
        let mut mask = 0u64;
        let first = block.0 - group.0 * FANOUT as u64;
        for at in first..FANOUT as u64 {
            if mask.count_ones() < BLOCKS_PER_SPOT && clean >> at & 1 == 1 {
                mask |= 1 << at;
            }
        }
        self.group(group, mask, None)
    }

    /// The first stretch of data at or behind `at`, or else from the start of the disk. Looks at growing windows, so
    /// that the cost follows the distance.
    fn data_from(&self, at: u64) -> Result<Option<ByteRange>> {
        for (mut start, end) in [(at, self.size.0), (0, at)] {
            let mut window = GROUP_LEN;
            while start < end {
                let range = ByteRange::new(start, end.min(start.saturating_add(window)));
                let extents = self.image.extents(range)?;
                if let Some(data) = extents.iter().find(|e| e.content == Content::Data) {
                    return Ok(Some(data.range));
                }
                start = range.end;
                window = (window * 2).min(SEARCH_MAX);
            }
        }
        Ok(None)
    }

    /// The blocks of a group that the bitmap calls clean, one bit each.
    fn clean(&self, group: GroupIndex) -> u64 {
        let range = group.bytes(self.size);
        // The first dirty range that ends behind the group's start: the list may be long.
        let first = self.dirty.partition_point(|r| r.end <= range.start);
        let inside: Vec<ByteRange> =
            self.dirty[first..].iter().take_while(|r| r.start < range.end).filter_map(|r| r.intersect(range)).collect();
        !suspects(group, &inside) & all_blocks(group, self.size)
    }

    /// Compares the blocks of a group that `mask` names with the head's. `node`: the head's node of the group, if
    /// known.
    fn group(&self, group: GroupIndex, mask: u64, node: Option<Digest>) -> Result<Found> {
        let mut found = Found { blocks: u64::from(mask.count_ones()), ..Found::default() };
        if mask == 0 {
            return Ok(found);
        }
        let blocks = group.blocks(self.size);
        let extents = self.image.extents(group.bytes(self.size))?;
        let data: Vec<ByteRange> =
            extents.into_iter().filter(|e| e.content == Content::Data).map(|e| e.range).collect();
        let mut digests = [Digest::ZERO; FANOUT];
        let mut buffer = vec![0; BLOCK_LEN];
        for (at, block) in blocks.clone().enumerate().filter(|(at, _)| mask >> at & 1 == 1) {
            let range = BlockIndex(block).bytes(self.size);
            if data.iter().any(|d| d.intersect(range).is_some()) {
                let buffer = &mut buffer[..range.len() as usize];
                self.image.read_at(range.start, buffer)?;
                found.bytes_read += range.len();
                digests[at] = block_digest(buffer);
            }
        }
        // A whole group is as in the head if its node is: 32 bytes instead of 2048.
        if mask == all_blocks(group, self.size) && node == Some(node_digest(&digests)) {
            return Ok(found);
        }
        let head = self.nodes(0, blocks.clone())?;
        let differs = |at: &usize| mask >> at & 1 == 1 && head[*at] != digests[*at];
        found.lies = (0..head.len()).filter(differs).map(|at| BlockIndex(blocks.start + at as u64)).collect();
        Ok(found)
    }

    fn nodes(&self, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        let nodes = self.replica.nodes(self.disk, level, range.clone())?;
        if nodes.len() as u64 != range.end - range.start {
            let what = format!("asked for digests {range:?}, got {} of them", nodes.len());
            return Err(Error::new(Kind::Protocol, what));
        }
        Ok(nodes)
    }
}

/// Widest window that is searched for data at once, in bytes.
const SEARCH_MAX: u64 = 64 << 30;

/// A bit for every block that the group has: the last group of a disk may have fewer than 64.
fn all_blocks(group: GroupIndex, size: DiskSize) -> u64 {
    let blocks = group.blocks(size);
    match blocks.end - blocks.start {
        64 => u64::MAX,
        n => (1 << n) - 1,
    }
}

/// What a run's sample of a disk follows from.
fn seed(run: &RunId, disk: &DiskName) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("virt-replica 2026 audit sample");
    hasher.update(run.as_str().as_bytes()).update(b"/").update(disk.as_str().as_bytes());
    *hasher.finalize().as_bytes()
}

/// Numbers drawn from a seed by BLAKE3's output stream.
struct Random(blake3::OutputReader);

impl Random {
    fn new(seed: &[u8; 32]) -> Self {
        Self(blake3::Hasher::new_keyed(seed).finalize_xof())
    }

    fn next(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// A number below `end`; the bias of the remainder is below 2^-20 for every disk up to 16 TiB.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

#[cfg(test)]
#[path = "audit_tests.rs"]
mod tests;
