//! Moves one disk's changes from a frozen image into an open point: read, hash, compare, compress, send in order.
//!
//! Work goes in groups of 64 blocks (4 MiB). Workers read and hash groups side by side; where the group's node in the
//! head's digest tree is the same, nothing more happens; where it differs, the 64 block digests are asked for and the
//! blocks that differ are encoded: whole, or, hash large and ship small, only those 4 KiB pieces that differ. One
//! sender, the calling thread, puts the records into the patch in order and builds the root over everything that was
//! read.
//!
//! Memory: at most `IN_FLIGHT_MAX` groups between reading and sending, whatever the size of the disk. A hole costs
//! nothing on either side unless the head has data there.

mod adaptive_compression;
mod planner;

use self::adaptive_compression::AdaptiveCompression;
use self::planner::Planner;
pub(crate) use self::planner::expect_nodes;
pub(crate) use self::planner::suspects;
use super::throttle::Throttle;
use crate::block::digest::{BlockPieces, Digest, block_digest, node_digest, piece_digests};
use crate::block::tree::RootBuilder;
use crate::block::{BLOCK_LEN, BlockIndex, ByteRange, DiskSize, FANOUT, GROUP_LEN, GroupIndex, PIECE_LEN};
use crate::engine::disk_target::DiskTarget;
use crate::engine::stats::{CompressionStats, DiskStats, Mode};
pub use crate::engine::throttle::KeepGoing;
use crate::error::{Error, Kind, Result, advice};
use crate::image::Image;
use crate::name::{DiskName, DomainUuid};
use crate::patch::{Compression, Header, PieceMask, RecordEncoder, StreamTail};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Groups between reading and sending: 32 MiB read and as much encoded, at worst.
const IN_FLIGHT_MAX: usize = 8;

/// Bytes of image whose extents are asked for at once.
pub(crate) const EXTENT_WINDOW: u64 = 64 << 30;

/// One disk to ship, and how.
#[derive(Debug, Clone)]
pub struct Shipment {
    /// UUID of the domain; the patch's header carries it.
    pub uuid: DomainUuid,
    /// Name of the disk, for example vda; the patch's header carries it.
    pub disk: DiskName,
    /// Size of the disk now. It may differ from the size in the head.
    pub size: DiskSize,
    /// The disk in the head: its size and root. `None` starts from nothing.
    pub head: Option<(DiskSize, Digest)>,
    /// How the changes are found.
    pub mode: Mode,
    /// Why this mode and no cheaper one. The report repeats it.
    pub reason: String,
    /// In mode `bitmap`: the only ranges that may differ from the head, ascending, without overlap.
    pub dirty: Option<Vec<ByteRange>>,
    /// Nothing is sent, and no point is open at the target.
    pub compare_only: bool,
    /// Worker threads.
    pub workers: usize,
    /// How the content is compressed before it is sent.
    pub compression: Compression,
    /// How fast the patch may be sent; `None`: as fast as it goes.
    pub throttle: Option<Arc<Throttle>>,
}

/// Counters that a progress display may read at any time.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes of the disk dealt with, holes included.
    pub scanned: AtomicU64,
    /// Bytes read from the source image.
    pub read: AtomicU64,
    /// Bytes of patch handed to the target.
    pub sent: AtomicU64,
    /// Blocks that differ from the head, zeroed ones included.
    pub changed_blocks: AtomicU64,
}

/// Result of a disk that was shipped. The target found the same root.
#[derive(Debug)]
pub struct Shipped {
    /// Root over the image as read.
    pub root: Digest,
    /// How the changes were found, and what that cost.
    pub stats: DiskStats,
}

/// Ships one disk into the replica's open point. Returns once the target has applied everything and found the same
/// root.
pub fn ship(
    image: &dyn Image,
    replica: &dyn DiskTarget,
    shipment: &Shipment,
    progress: &Progress,
    keep_going: KeepGoing,
) -> Result<Shipped> {
    let mut out = Vec::with_capacity(BLOCK_LEN);
    let header = Header {
        domain: shipment.uuid.clone(),
        disk: shipment.disk.clone(),
        size_from: shipment.head.map_or(DiskSize(0), |(size, _)| size),
        size: shipment.size,
        from_root: shipment.head.map(|(_, root)| root),
    };
    let mut tail = StreamTail::begin(&header, &mut out);
    send(replica, shipment, progress, keep_going, &out)?;
    let (root, compression) = scan(image, replica, shipment, progress, keep_going, &mut |records| {
        tail.observe(records);
        send(replica, shipment, progress, keep_going, records)
    })?;
    keep_going()?;
    out.clear();
    tail.trailer(root, &mut out);
    send(replica, shipment, progress, keep_going, &out)?;
    let applied = replica.finish_disk(&shipment.disk)?;
    if applied.root != root {
        return Err(Error::new(
            Kind::Corrupt,
            format!("the target has root {} where the source read {root}", applied.root),
        )
        .advise(advice::Store::VerifyTarget));
    }
    let stats = DiskStats {
        mode: shipment.mode,
        reason: shipment.reason.clone(),
        bytes_read: progress.read.load(Ordering::Relaxed),
        bytes_sent: progress.sent.load(Ordering::Relaxed),
        bytes_written: applied.bytes_written,
        blocks_changed: applied.blocks_changed,
        audit: None,
        tracking_doubt: false,
        compression,
    };
    Ok(Shipped { root, stats })
}

/// Reads the image and compares it with the head, sending nothing. Returns the root and the number of differing blocks.
pub fn compare(
    image: &dyn Image,
    replica: &dyn DiskTarget,
    shipment: &Shipment,
    progress: &Progress,
    keep_going: KeepGoing,
) -> Result<(Digest, u64)> {
    let (root, _) = scan(image, replica, shipment, progress, keep_going, &mut |_| Ok(()))?;
    Ok((root, progress.changed_blocks.load(Ordering::Relaxed)))
}

fn send(
    replica: &dyn DiskTarget,
    shipment: &Shipment,
    progress: &Progress,
    keep_going: KeepGoing,
    bytes: &[u8],
) -> Result<()> {
    let mut apply = |part: &[u8]| {
        replica.apply(&shipment.disk, part)?;
        progress.sent.fetch_add(part.len() as u64, Ordering::Relaxed);
        Ok(())
    };
    match &shipment.throttle {
        Some(throttle) => throttle.send(bytes, keep_going, &mut apply),
        None => apply(bytes),
    }
}

/// One group's work: where it has data, and what the head has there.
struct Work {
    seq: u64,
    group: GroupIndex,
    data: Vec<ByteRange>,
    head_node: Digest,
    /// The blocks that may differ, one bit each; the others are as in the head.
    suspects: u64,
}

/// Every block of a group may differ.
const ALL_SUSPECT: u64 = u64::MAX;

/// The result of a group, or of a subtree that is as in the head.
struct Done {
    seq: u64,
    /// Its node in the digest tree: level, index, digest.
    node: (u8, u64, Digest),
    records: Vec<u8>,
    /// Bytes of content in the records, before compression.
    payload: u64,
    /// Whether compressing was tried.
    compressed: bool,
}

/// The root over what was read, and which way the content went.
type Scanned = (Digest, Option<CompressionStats>);

fn scan(
    image: &dyn Image,
    replica: &dyn DiskTarget,
    shipment: &Shipment,
    progress: &Progress,
    keep_going: KeepGoing,
    sink: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<Scanned> {
    let stop = AtomicBool::new(false);
    let (work_tx, work_rx) = sync_channel::<Work>(IN_FLIGHT_MAX);
    let (done_tx, done_rx) = channel::<Result<Done>>();
    let (token_tx, token_rx) = sync_channel::<()>(IN_FLIGHT_MAX);
    let work_rx = Mutex::new(work_rx);
    let worth = AdaptiveCompression::new(!shipment.compression.is_auto());

    std::thread::scope(|scope| {
        for _ in 0..shipment.workers.max(1) {
            let done = done_tx.clone();
            let (work, worth, stop) = (&work_rx, &worth, &stop);
            scope.spawn(move || {
                let worker = Worker::new(image, replica, shipment, progress, worth);
                work_on_groups(worker, work, &done, stop);
            });
        }
        let planner_done = done_tx;
        let stop_ref = &stop;
        scope.spawn(move || {
            let mut planner = Planner {
                image,
                replica,
                shipment,
                progress,
                work: work_tx,
                token: token_tx,
                done: planner_done.clone(),
                stop: stop_ref,
                seq: 0,
            };
            if let Err(e) = planner.run() {
                // The receiver is gone only when the sender has already failed, with a better error.
                let _ = planner_done.send(Err(e));
            }
        });
        let result = collect(shipment, &done_rx, &token_rx, &worth, keep_going, sink);
        // Whatever ended the sender, planner and workers must find out: a token is taken from nobody any more.
        stop.store(true, Ordering::Relaxed);
        drop(token_rx);
        result
    })
}

/// The sender: puts finished groups in order, hands their records on, builds the root.
fn collect(
    shipment: &Shipment,
    done: &Receiver<Result<Done>>,
    token: &Receiver<()>,
    worth: &AdaptiveCompression,
    keep_going: KeepGoing,
    sink: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<Scanned> {
    let mut root = RootBuilder::new(shipment.size);
    let mut waiting: BTreeMap<u64, Done> = BTreeMap::new();
    let mut next = 0;
    let (began, mut watching) = (Instant::now(), worth.watch());
    for finished in done {
        let finished = finished?;
        waiting.insert(finished.seq, finished);
        while let Some(group) = waiting.remove(&next) {
            next += 1;
            keep_going()?;
            let (level, index, digest) = group.node;
            if !digest.is_zero() {
                root.push_node(level, index, digest);
            }
            if !group.records.is_empty() {
                sink(&group.records)?;
                watching.sent(group.compressed, group.payload, began.elapsed());
            }
            token.recv().expect("the planner put one in for every group");
        }
    }
    assert!(waiting.is_empty(), "a group was lost between reading and sending");
    Ok((root.finish(), watching.stats()))
}

fn work_on_groups(
    worker: Result<Worker>,
    work: &Mutex<Receiver<Work>>,
    done: &Sender<Result<Done>>,
    stop: &AtomicBool,
) {
    let mut worker = match worker {
        Ok(worker) => worker,
        Err(e) => {
            let _ = done.send(Err(e));
            return;
        }
    };
    loop {
        let next = work.lock().expect("no worker panics while it holds the queue").recv();
        let Ok(next) = next else { return };
        if stop.load(Ordering::Relaxed) {
            continue;
        }
        if done.send(worker.group(next)).is_err() {
            return;
        }
    }
}

/// Fills the front of the buffer with the group's bytes; holes are not read. Returns the bytes read.
pub(crate) fn read_group(image: &dyn Image, group: ByteRange, data: &[ByteRange], buffer: &mut [u8]) -> Result<u64> {
    let mut read = 0;
    let mut at = group.start;
    for range in data {
        buffer[(at - group.start) as usize..(range.start - group.start) as usize].fill(0);
        let part = &mut buffer[(range.start - group.start) as usize..(range.end - group.start) as usize];
        image.read_at(range.start, part)?;
        read += range.len();
        at = range.end;
    }
    buffer[(at - group.start) as usize..group.len() as usize].fill(0);
    Ok(read)
}

struct Worker<'a> {
    image: &'a dyn Image,
    replica: &'a dyn DiskTarget,
    shipment: &'a Shipment,
    progress: &'a Progress,
    worth: &'a AdaptiveCompression,
    encoder: RecordEncoder,
    buffer: Vec<u8>,
}

impl<'a> Worker<'a> {
    fn new(
        image: &'a dyn Image,
        replica: &'a dyn DiskTarget,
        shipment: &'a Shipment,
        progress: &'a Progress,
        worth: &'a AdaptiveCompression,
    ) -> Result<Self> {
        let encoder = RecordEncoder::new(shipment.compression)?;
        Ok(Self { image, replica, shipment, progress, worth, encoder, buffer: vec![0; GROUP_LEN as usize] })
    }

    fn group(&mut self, work: Work) -> Result<Done> {
        let size = self.shipment.size;
        let bytes = work.group.bytes(size);
        let blocks = work.group.blocks(size);
        let partial = work.suspects != ALL_SUSPECT;
        let read = match partial {
            true => self.read_suspects(&work)?,
            false => read_group(self.image, bytes, &work.data, &mut self.buffer)?,
        };
        let mut head = if partial { self.head_blocks(work.head_node, &blocks)? } else { Vec::new() };
        let mut digests = [Digest::ZERO; FANOUT];
        for (at, block) in blocks.clone().enumerate() {
            let range = BlockIndex(block).bytes(size);
            digests[at] = if work.suspects >> at & 1 == 0 {
                head.get(at).copied().unwrap_or(Digest::ZERO)
            } else if work.data.iter().any(|d| d.intersect(range).is_some()) {
                block_digest(self.slice(bytes, range))
            } else {
                // A block without data needs no hashing: its digest is the constant.
                Digest::ZERO
            };
        }
        let node = node_digest(&digests);
        let (mut records, mut payload) = (Vec::new(), 0);
        let compressed = self.worth.compress();
        self.encoder.set_compressing(compressed);
        if node != work.head_node || self.shipment.head.is_none() {
            if !partial {
                head = self.head_blocks(work.head_node, &blocks)?;
            }
            payload = self.encode_differences(bytes, blocks, &digests, &head, &mut records)?;
        }
        self.progress.read.fetch_add(read, Ordering::Relaxed);
        self.progress.scanned.fetch_add(bytes.len(), Ordering::Relaxed);
        Ok(Done { seq: work.seq, node: (1, work.group.0, node), records, payload, compressed })
    }

    /// Fills the places of the blocks that may differ, and no others: few of a group's, as a rule.
    fn read_suspects(&mut self, work: &Work) -> Result<u64> {
        let (size, start) = (self.shipment.size, work.group.bytes(self.shipment.size).start);
        let mut read = 0;
        for (at, block) in work.group.blocks(size).enumerate().filter(|(at, _)| work.suspects >> at & 1 == 1) {
            let range = BlockIndex(block).bytes(size);
            let data: Vec<ByteRange> = work.data.iter().filter_map(|d| d.intersect(range)).collect();
            let place = &mut self.buffer[at * BLOCK_LEN..at * BLOCK_LEN + range.len() as usize];
            debug_assert_eq!(range.start - start, (at * BLOCK_LEN) as u64);
            read += read_group(self.image, range, &data, place)?;
        }
        Ok(read)
    }

    /// The head's digests of a group's blocks; none are asked for where it has nothing.
    fn head_blocks(&self, head_node: Digest, blocks: &Range<u64>) -> Result<Vec<Digest>> {
        if head_node.is_zero() {
            return Ok(Vec::new());
        }
        let nodes = self.replica.nodes(&self.shipment.disk, 0, blocks.clone())?;
        expect_nodes(nodes.len(), blocks)?;
        Ok(nodes)
    }

    fn slice(&self, group: ByteRange, range: ByteRange) -> &[u8] {
        &self.buffer[(range.start - group.start) as usize..(range.end - group.start) as usize]
    }

    /// Returns the bytes of content in the records.
    fn encode_differences(
        &mut self,
        group: ByteRange,
        blocks: Range<u64>,
        digests: &[Digest; FANOUT],
        head: &[Digest],
        out: &mut Vec<u8>,
    ) -> Result<u64> {
        let first = blocks.start;
        let old_of = |block: u64| head.get((block - first) as usize).copied().unwrap_or(Digest::ZERO);
        let new_of = |block: u64| digests[(block - first) as usize];
        let changed: Vec<u64> = blocks.filter(|b| old_of(*b) != new_of(*b)).collect();
        let rewritten: Vec<BlockIndex> = changed
            .iter()
            .filter(|b| !old_of(**b).is_zero() && !new_of(**b).is_zero())
            .map(|b| BlockIndex(*b))
            .collect();
        let old_pieces = self.old_pieces(rewritten)?;
        let (mut zeros, mut payload): (Option<Range<u64>>, u64) = (None, 0);
        for block in &changed {
            let (block, index) = (*block, BlockIndex(*block));
            if new_of(block).is_zero() {
                match &mut zeros {
                    Some(run) if run.end == block => run.end += 1,
                    _ => flush_zeros(&self.encoder, zeros.replace(block..block + 1), out),
                }
                continue;
            }
            flush_zeros(&self.encoder, zeros.take(), out);
            let range = index.bytes(self.shipment.size);
            let data = &self.buffer[(range.start - group.start) as usize..(range.end - group.start) as usize];
            let mask =
                old_pieces.get(&index).map(|old| PieceMask::differing_digests(old, &piece_digests(data), data.len()));
            match mask {
                // None differs where the whole does: a digest there has rotted, or lies. The block is sent anew.
                Some(mask) if (1..=PIECES_WORTH).contains(&mask.count()) => {
                    self.encoder.pieces(index, new_of(block), mask, data, out);
                    payload += u64::from(mask.count()) * PIECE_LEN as u64;
                }
                _ => {
                    self.encoder.data(index, new_of(block), data, out);
                    payload += range.len();
                }
            }
        }
        flush_zeros(&self.encoder, zeros, out);
        self.progress.changed_blocks.fetch_add(changed.len() as u64, Ordering::Relaxed);
        Ok(payload)
    }

    /// The head's piece digests of blocks that were rewritten. Not asked for where nearly all of a group was: such
    /// blocks were written whole, and the target would read them all for nothing.
    fn old_pieces(&self, rewritten: Vec<BlockIndex>) -> Result<BTreeMap<BlockIndex, BlockPieces>> {
        if self.shipment.compare_only || rewritten.is_empty() || rewritten.len() > REWRITTEN_WHOLE {
            return Ok(BTreeMap::new());
        }
        let pieces = self.replica.pieces(&self.shipment.disk, &rewritten)?;
        if pieces.len() != rewritten.len() {
            let what = format!("asked for the pieces of {} blocks, got {}", rewritten.len(), pieces.len());
            return Err(Error::new(Kind::Protocol, what));
        }
        Ok(rewritten.into_iter().zip(pieces).collect())
    }
}

/// Most of a block's 16 pieces that are sent one by one; beyond, the whole block costs hardly more.
const PIECES_WORTH: u32 = 12;

/// Rewritten blocks of one group beyond which it was written as a whole.
const REWRITTEN_WHOLE: usize = FANOUT * 3 / 4;

fn flush_zeros(encoder: &RecordEncoder, run: Option<Range<u64>>, out: &mut Vec<u8>) {
    if let Some(run) = run {
        encoder.zero(BlockIndex(run.start), run.end - run.start, out);
    }
}

#[cfg(test)]
#[path = "pump_tests.rs"]
pub(crate) mod tests;
