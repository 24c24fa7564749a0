//! Decides which groups of a disk are read, and what is taken from the head as it is.

use super::{ALL_SUSPECT, Done, EXTENT_WINDOW, Progress, Shipment, Work};
use crate::block::digest::Digest;
use crate::block::extent::Content;
use crate::block::tree::TreeShape;
use crate::block::{BLOCK_LEN, ByteRange, DiskSize, FANOUT, GROUP_LEN, GroupIndex};
use crate::engine::disk_target::{DiskTarget, NODES_MAX};
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, SyncSender};

pub(super) struct Planner<'a> {
    pub(super) image: &'a dyn Image,
    pub(super) replica: &'a dyn DiskTarget,
    pub(super) shipment: &'a Shipment,
    pub(super) progress: &'a Progress,
    pub(super) work: SyncSender<Work>,
    pub(super) token: SyncSender<()>,
    pub(super) done: Sender<Result<Done>>,
    pub(super) stop: &'a AtomicBool,
    pub(super) seq: u64,
}

/// The sender has ended, with an error of its own: nothing more is wanted.
struct Unwanted;

impl Planner<'_> {
    pub(super) fn run(&mut self) -> Result<()> {
        match &self.shipment.dirty {
            None => self.whole_disk(),
            Some(dirty) => self.marked_only(dirty),
        }
    }

    /// Walks the disk once, giving out every group that has data on either side.
    fn whole_disk(&mut self) -> Result<()> {
        let size = self.shipment.size;
        let mut start = 0;
        while start < size.0 {
            let window = ByteRange::new(start, size.0.min(start.saturating_add(EXTENT_WINDOW)));
            let data = self.data_in(window)?;
            let groups = start / GROUP_LEN..window.end.div_ceil(GROUP_LEN);
            if self.window(groups, &data)?.is_err() {
                return Ok(());
            }
            start = window.end;
        }
        Ok(())
    }

    /// Visits only what a bitmap marks. The rest of the tree is taken from the head: whole subtrees of 16 GiB where
    /// nothing is marked, single groups inside the others, so that the cost follows the changes and not the size.
    fn marked_only(&mut self, dirty: &[ByteRange]) -> Result<()> {
        let (head_size, _) = self.shipment.head.expect("a bitmap leads on from a head");
        let size = self.shipment.size;
        let tall = TreeShape::new(head_size).top() >= SUBTREE_LEVEL && TreeShape::new(size).top() >= SUBTREE_LEVEL;
        let subtrees = size.0.div_ceil(SUBTREE_LEN);
        let known =
            if tall { self.replica.nodes(&self.shipment.disk, SUBTREE_LEVEL, 0..subtrees)? } else { Vec::new() };
        let mut dirty = Ranges::new(dirty);
        for subtree in 0..subtrees {
            let bytes = ByteRange::new(subtree * SUBTREE_LEN, size.0.min((subtree + 1).saturating_mul(SUBTREE_LEN)));
            if tall && !dirty.touches(bytes) {
                let digest = known.get(subtree as usize).copied().unwrap_or(Digest::ZERO);
                if self.as_in_head((SUBTREE_LEVEL, subtree, digest), bytes.len()).is_err() {
                    return Ok(());
                }
            } else if self.marked_groups(bytes, &mut dirty)?.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn marked_groups(&mut self, bytes: ByteRange, dirty: &mut Ranges) -> Result<Result<(), Unwanted>> {
        let groups = bytes.start / GROUP_LEN..bytes.end.div_ceil(GROUP_LEN);
        let mut head_nodes = HeadNodes::default();
        for g in groups.clone() {
            let group = GroupIndex(g);
            let range = group.bytes(self.shipment.size);
            let head_node = head_nodes.get(g, groups.end, self)?;
            let marked = dirty.inside(range);
            let handed_on = if marked.is_empty() {
                self.as_in_head((1, g, head_node), range.len())
            } else {
                let suspects = suspects(group, &marked);
                // Allocation is asked for inside the marked ranges only: it can be dear, and the rest does not matter.
                let mut data = Vec::new();
                for part in whole_blocks(&marked, self.shipment.size) {
                    data.extend(self.data_in(part)?);
                }
                self.hand_out(group, data, head_node, suspects)
            };
            if handed_on.is_err() {
                return Ok(Err(Unwanted));
            }
        }
        Ok(Ok(()))
    }

    fn data_in(&self, range: ByteRange) -> Result<Vec<ByteRange>> {
        let extents = self.image.extents(range)?;
        Ok(extents.into_iter().filter(|e| e.content == Content::Data).map(|e| e.range).collect())
    }

    fn window(&mut self, groups: Range<u64>, data: &[ByteRange]) -> Result<Result<(), Unwanted>> {
        let mut data = Ranges::new(data);
        let mut head_nodes = HeadNodes::default();
        for g in groups.clone() {
            let group = GroupIndex(g);
            let bytes = group.bytes(self.shipment.size);
            let inside = data.inside(bytes);
            let head_node = head_nodes.get(g, groups.end, self)?;
            if inside.is_empty() && head_node.is_zero() {
                self.progress.scanned.fetch_add(bytes.len(), Ordering::Relaxed);
                if self.stop.load(Ordering::Relaxed) {
                    return Ok(Err(Unwanted));
                }
            } else if self.hand_out(group, inside, head_node, ALL_SUSPECT).is_err() {
                return Ok(Err(Unwanted));
            }
        }
        Ok(Ok(()))
    }

    fn hand_out(
        &mut self,
        group: GroupIndex,
        data: Vec<ByteRange>,
        head_node: Digest,
        suspects: u64,
    ) -> Result<(), Unwanted> {
        self.token.send(()).map_err(|_| Unwanted)?;
        let work = Work { seq: self.seq, group, data, head_node, suspects };
        self.seq += 1;
        self.work.send(work).map_err(|_| Unwanted)
    }

    /// A node that needs no reading: it goes straight to the sender, in its place.
    fn as_in_head(&mut self, node: (u8, u64, Digest), bytes: u64) -> Result<(), Unwanted> {
        self.progress.scanned.fetch_add(bytes, Ordering::Relaxed);
        if node.2.is_zero() {
            return if self.stop.load(Ordering::Relaxed) { Err(Unwanted) } else { Ok(()) };
        }
        self.token.send(()).map_err(|_| Unwanted)?;
        let done = Done { seq: self.seq, node, records: Vec::new(), payload: 0, compressed: false };
        self.seq += 1;
        self.done.send(Ok(done)).map_err(|_| Unwanted)
    }
}

/// Level and length of the subtrees that are taken from the head whole where nothing in them is marked: their group
/// nodes fit one request each.
const SUBTREE_LEVEL: u8 = 3;
const SUBTREE_LEN: u64 = GROUP_LEN * (FANOUT * FANOUT) as u64;

/// The blocks of a group that marked ranges touch, one bit each.
pub(crate) fn suspects(group: GroupIndex, marked: &[ByteRange]) -> u64 {
    let first = group.0 * FANOUT as u64;
    marked.iter().fold(0, |mask, range| {
        let blocks = range.start / BLOCK_LEN as u64 - first..range.end.div_ceil(BLOCK_LEN as u64) - first;
        blocks.fold(mask, |mask, block| mask | 1 << block)
    })
}

/// The ranges widened to whole blocks, merged: a digest needs all of its block.
pub(super) fn whole_blocks(marked: &[ByteRange], size: DiskSize) -> Vec<ByteRange> {
    let mut wide: Vec<ByteRange> = Vec::with_capacity(marked.len());
    for range in marked {
        let start = range.start / BLOCK_LEN as u64 * BLOCK_LEN as u64;
        let end = range.end.next_multiple_of(BLOCK_LEN as u64).min(size.0);
        match wide.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ => wide.push(ByteRange::new(start, end)),
        }
    }
    wide
}

/// Ascending ranges, taken piece by piece in ascending order.
struct Ranges<'a> {
    rest: &'a [ByteRange],
}

impl<'a> Ranges<'a> {
    fn new(ranges: &'a [ByteRange]) -> Self {
        Self { rest: ranges }
    }

    /// The parts inside `window`; what lies before it is forgotten.
    fn inside(&mut self, window: ByteRange) -> Vec<ByteRange> {
        let mut parts = Vec::new();
        while let Some(range) = self.rest.first() {
            if range.start >= window.end {
                break;
            }
            parts.extend(range.intersect(window));
            if range.end > window.end {
                break;
            }
            self.rest = &self.rest[1..];
        }
        parts
    }

    fn touches(&self, window: ByteRange) -> bool {
        self.rest.iter().take_while(|r| r.start < window.end).any(|r| r.intersect(window).is_some())
    }
}

/// The head's group nodes, fetched ahead in one request per 64 GiB of disk.
#[derive(Default)]
struct HeadNodes {
    first: u64,
    nodes: Vec<Digest>,
}

impl HeadNodes {
    fn get(&mut self, group: u64, end: u64, planner: &Planner) -> Result<Digest> {
        let Some((head_size, _)) = planner.shipment.head else { return Ok(Digest::ZERO) };
        if group >= head_size.groups() {
            return Ok(Digest::ZERO);
        }
        if group < self.first || group >= self.first + self.nodes.len() as u64 {
            let range = group..end.min(group + NODES_MAX).min(head_size.groups());
            self.nodes = planner.replica.nodes(&planner.shipment.disk, 1, range.clone())?;
            expect_nodes(self.nodes.len(), &range)?;
            self.first = group;
        }
        Ok(self.nodes[(group - self.first) as usize])
    }
}

pub(crate) fn expect_nodes(got: usize, range: &Range<u64>) -> Result<()> {
    if got as u64 == range.end - range.start {
        return Ok(());
    }
    Err(Error::new(Kind::Protocol, format!("asked for digests {range:?}, got {got} of them")))
}
