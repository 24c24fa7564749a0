//! The digest tree of a disk: its shape, building a root from the leaves, and carrying a tree from one point to the
//! next.
//!
//! Owns no storage. [`RootBuilder`] makes a root out of a stream of digests; [`TreeUpdate`] reads a few nodes of an old
//! tree through [`NodeSource`] and reports the nodes that change.
//!
//! Invariants
//! - Memory is one partial node per level (18 KiB), whatever the size of the disk.
//! - What is zero is skipped: a gap between two blocks costs a few steps per level, not per block.
//! - Both compute the same root (property test below).
//!
//! Specified in docs/formats/digest.md.

use super::digest::{Digest, node_digest, root_digest};
use super::{BlockIndex, DiskSize, FANOUT, GroupIndex};
use crate::error::{Error, Kind, Result};
use std::ops::Range;

/// Most levels a tree can have: 2^48 blocks fill a `u64` of bytes, and 64^8 = 2^48.
pub const LEVELS_MAX: u8 = 9;

/// Bits of an index that number a child within its node.
const FANOUT_BITS: u32 = FANOUT.trailing_zeros();

/// How many levels the tree of a disk has, and how many nodes each of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TreeShape {
    size: DiskSize,
    levels: u8,
}

impl TreeShape {
    /// Shape of the tree over a disk of this size: at least two levels, even for an empty disk.
    pub fn new(size: DiskSize) -> Self {
        let mut levels = 2;
        while size.blocks().div_ceil(span(levels - 1)) > 1 {
            levels += 1;
        }
        Self { size, levels }
    }

    /// Size of the disk that the tree covers.
    pub fn size(self) -> DiskSize {
        self.size
    }

    /// Levels, from 2 to [`LEVELS_MAX`]. Level 0 are the blocks, level 1 the groups: both are always there.
    pub fn levels(self) -> u8 {
        self.levels
    }

    /// The highest level; it has exactly one node, even in the tree of an empty disk (where that node is zero).
    pub fn top(self) -> u8 {
        self.levels - 1
    }

    /// Nodes at a level; none above the top. Level 0 has as many as the disk has blocks.
    pub fn nodes_at(self, level: u8) -> u64 {
        match level {
            _ if level == self.top() => 1,
            _ if level > self.top() => 0,
            _ => self.size.blocks().div_ceil(span(level)),
        }
    }

    /// The part of `range` that exists at `level`.
    pub fn clip(self, level: u8, range: Range<u64>) -> Range<u64> {
        let end = range.end.min(self.nodes_at(level));
        range.start.min(end)..end
    }
}

/// Blocks below one node of a level.
fn span(level: u8) -> u64 {
    1 << (FANOUT_BITS * u32::from(level))
}

/// The node above: its index, and which child of it this one is.
fn parent_of(index: u64) -> (u64, usize) {
    (index >> FANOUT_BITS, (index % FANOUT as u64) as usize)
}

/// The children of one node while they are being gathered.
#[derive(Clone, Copy)]
struct Partial {
    /// Index of the node these are the children of.
    parent: u64,
    children: [Digest; FANOUT],
}

impl Partial {
    fn zero(parent: u64) -> Self {
        Self { parent, children: [Digest::ZERO; FANOUT] }
    }
}

/// Computes the root of a disk from the digests of its blocks, or of whole nodes where they are known, in ascending
/// order. What is not pushed is zero.
pub struct RootBuilder {
    shape: TreeShape,
    /// `partials[n]` gathers the children, at level n, of one node of level n + 1.
    partials: Vec<Option<Partial>>,
    /// The first block that may still be pushed.
    next_block: u64,
    top: Digest,
}

impl RootBuilder {
    /// Begins with a disk of this size that reads as zeros throughout.
    pub fn new(size: DiskSize) -> Self {
        let shape = TreeShape::new(size);
        Self { shape, partials: vec![None; shape.top().into()], next_block: 0, top: Digest::ZERO }
    }

    /// # Panics
    /// As [`RootBuilder::push_node`].
    pub fn push_block(&mut self, block: BlockIndex, digest: Digest) {
        self.push_node(0, block.0, digest);
    }

    /// The digest of a whole group, in place of its blocks.
    ///
    /// # Panics
    /// As [`RootBuilder::push_node`].
    pub fn push_group(&mut self, group: GroupIndex, digest: Digest) {
        self.push_node(1, group.0, digest);
    }

    /// The digest of a whole node of any level, in place of everything below it.
    ///
    /// # Panics
    /// If the node lies beyond the disk, or before or over something already pushed: whoever pushes has ordered and
    /// bounded what came from outside.
    pub fn push_node(&mut self, level: u8, index: u64, digest: Digest) {
        assert!(index < self.shape.nodes_at(level), "node {index} of level {level} lies beyond the disk");
        let first_block = index * span(level);
        assert!(first_block >= self.next_block, "node {index} of level {level} is not in ascending order");
        // Cannot overflow: first_block < 2^48 and a span is at most 2^48.
        self.next_block = first_block + span(level);
        if digest.is_zero() {
            return;
        }
        // Whatever is gathered below this level ends before this node begins.
        for below in 0..level {
            self.flush(below);
        }
        self.put(level, index, digest);
    }

    /// The root. What was not pushed is zero.
    pub fn finish(mut self) -> Digest {
        for level in 0..self.shape.top() {
            self.flush(level);
        }
        root_digest(self.shape.size, self.top)
    }

    fn put(&mut self, level: u8, index: u64, digest: Digest) {
        if level == self.shape.top() {
            self.top = digest;
            return;
        }
        let (parent, child) = parent_of(index);
        if self.partials[usize::from(level)].is_some_and(|p| p.parent != parent) {
            self.flush(level);
        }
        let partial = self.partials[usize::from(level)].get_or_insert_with(|| Partial::zero(parent));
        partial.children[child] = digest;
    }

    fn flush(&mut self, level: u8) {
        if let Some(partial) = self.partials[usize::from(level)].take() {
            self.put(level + 1, partial.parent, node_digest(&partial.children));
        }
    }
}

/// The nodes of a tree kept somewhere.
pub trait NodeSource {
    /// The nodes `range` of `level`, exactly as many as asked for. Only nodes within the tree's shape are asked for, at
    /// most [`FANOUT`] at a time.
    fn nodes(&mut self, level: u8, range: Range<u64>) -> Result<Vec<Digest>>;
}

impl<F: FnMut(u8, Range<u64>) -> Result<Vec<Digest>>> NodeSource for F {
    fn nodes(&mut self, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        self(level, range)
    }
}

/// The tree of a disk that reads as zeros throughout: where a first copy starts from.
pub struct ZeroNodes;

impl NodeSource for ZeroNodes {
    fn nodes(&mut self, _level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        Ok(vec![Digest::ZERO; (range.end - range.start) as usize])
    }
}

/// A node that differs from what the old tree has in its place (zero, where the old tree has no such place).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChangedNode {
    /// Level of the node: 0 for a block, 1 for a group, and so on.
    pub level: u8,
    /// Number of the node within its level.
    pub index: u64,
    /// New digest of the node.
    pub digest: Digest,
}

/// Carries a tree from one point to the next: takes the changed blocks in ascending order, reads the old tree only
/// along their paths, hands every node that differs to `emit`, and returns the new root. Work is proportional to the
/// changed blocks times the levels.
///
/// Emitted are blocks and nodes alike; a node comes after everything below it, and within a level the order is
/// ascending, so that a writer needs one position per level. Nodes beyond the new size are not emitted, they cease to
/// exist: whoever stores the tree must see to it that they read as zero, or a later growth would find them again.
///
/// The old nodes are read before a node above them is emitted, and never after: source and writer may be one file.
pub struct TreeUpdate<S, E> {
    old: S,
    old_shape: TreeShape,
    shape: TreeShape,
    emit: E,
    /// `partials[n]`: children at level n, the old ones until replaced.
    partials: Vec<Option<Partial>>,
    next_block: u64,
    /// The new topmost node, as soon as it was computed.
    top: Option<Digest>,
}

impl<S: NodeSource, E: FnMut(ChangedNode) -> Result<()>> TreeUpdate<S, E> {
    /// Reads the old topmost node if the tree grows by a level.
    pub fn new(old: S, size_from: DiskSize, size: DiskSize, emit: E) -> Result<Self> {
        let (old_shape, shape) = (TreeShape::new(size_from), TreeShape::new(size));
        let partials = vec![None; shape.top().into()];
        let mut update = Self { old, old_shape, shape, emit, partials, next_block: 0, top: None };
        // Where the tree grows by levels, the old topmost node gets nodes above it that the old tree does not have.
        // They change even if no block does: their children are gathered from the start.
        if shape.levels > old_shape.levels {
            let mut first = update.old_node(old_shape.top(), 0)?;
            for level in old_shape.top()..shape.top() {
                let mut partial = Partial::zero(0);
                partial.children[0] = first;
                update.partials[usize::from(level)] = Some(partial);
                first = node_digest(&[first]);
            }
        }
        Ok(update)
    }

    /// The block's new digest; equal to the old one does no harm.
    ///
    /// # Panics
    /// If the block lies beyond the disk or is not in ascending order.
    pub fn push(&mut self, block: BlockIndex, digest: Digest) -> Result<()> {
        self.advance(block, 1);
        self.put(0, block.0, digest)
    }

    /// `count` blocks that read as zeros now. Where the old tree says that they did before, whole subtrees are skipped.
    ///
    /// # Panics
    /// If a block lies beyond the disk or is not in ascending order.
    pub fn push_zero(&mut self, first: BlockIndex, count: u64) -> Result<()> {
        self.advance(first, count);
        let (mut block, end) = (first.0, first.0 + count);
        'blocks: while block < end {
            for level in (1..self.shape.top()).rev() {
                let node_end = block + span(level);
                let covered = block.is_multiple_of(span(level)) && node_end <= end;
                if covered && self.child(level, block / span(level))?.is_zero() {
                    block = node_end;
                    continue 'blocks;
                }
            }
            self.put(0, block, Digest::ZERO)?;
            block += 1;
        }
        Ok(())
    }

    /// Emits the rest and returns the root of the new disk.
    pub fn finish(mut self) -> Result<Digest> {
        if self.shape.size < self.old_shape.size {
            // The cut may go through a node of every level: the whole right edge is recomputed.
            let last_group = self.shape.nodes_at(1) - 1;
            self.enter(0, last_group)?;
        }
        for level in 0..self.shape.top() {
            self.flush(level)?;
        }
        let top = match self.top {
            Some(top) => top,
            None => self.old_node(self.shape.top(), 0)?,
        };
        Ok(root_digest(self.shape.size, top))
    }

    fn advance(&mut self, first: BlockIndex, count: u64) {
        let blocks = self.shape.size.blocks();
        assert!(first.0 <= blocks && count <= blocks - first.0, "block {} lies beyond the disk", first.0);
        assert!(first.0 >= self.next_block, "block {} is not in ascending order", first.0);
        self.next_block = first.0 + count;
    }

    fn put(&mut self, level: u8, index: u64, digest: Digest) -> Result<()> {
        let was = if level == self.shape.top() {
            self.top = Some(digest);
            self.old_node(level, index)?
        } else {
            let (parent, child) = parent_of(index);
            let before = std::mem::replace(&mut self.enter(level, parent)?.children[child], digest);
            // Above the old tree nothing is stored yet, whatever the node would have been.
            if level < self.old_shape.levels { before } else { Digest::ZERO }
        };
        if was != digest {
            (self.emit)(ChangedNode { level, index, digest })?;
        }
        Ok(())
    }

    /// The node as it stands: the old one, if nothing below it was pushed yet.
    fn child(&mut self, level: u8, index: u64) -> Result<Digest> {
        let (parent, child) = parent_of(index);
        Ok(self.enter(level, parent)?.children[child])
    }

    /// Makes `partials[level]` the children of `parent`, finishing what was gathered there and below before.
    fn enter(&mut self, level: u8, parent: u64) -> Result<&mut Partial> {
        let slot = usize::from(level);
        if self.partials[slot].is_none_or(|p| p.parent != parent) {
            // Finishing the levels below may itself have brought this level to `parent`; look again before loading.
            for below in 0..level {
                self.flush(below)?;
            }
        }
        if self.partials[slot].is_none_or(|p| p.parent != parent) {
            self.flush(level)?;
            let mut partial = Partial::zero(parent);
            let first = parent * FANOUT as u64;
            // Children beyond either tree are zero: the old tree has none there, or the new one no longer has.
            let old = self.old_nodes(level, self.shape.clip(level, first..first + FANOUT as u64))?;
            partial.children[..old.len()].copy_from_slice(&old);
            self.partials[slot] = Some(partial);
        }
        Ok(self.partials[slot].as_mut().expect("filled just above"))
    }

    fn flush(&mut self, level: u8) -> Result<()> {
        match self.partials[usize::from(level)].take() {
            Some(partial) => self.put(level + 1, partial.parent, node_digest(&partial.children)),
            None => Ok(()),
        }
    }

    fn old_node(&mut self, level: u8, index: u64) -> Result<Digest> {
        Ok(self.old_nodes(level, index..index + 1)?.first().copied().unwrap_or(Digest::ZERO))
    }

    /// Those of the nodes that the old tree has.
    fn old_nodes(&mut self, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        let range = self.old_shape.clip(level, range);
        // The topmost node of an empty disk is a figure of speech; nobody is expected to have stored it.
        if range.is_empty() || self.old_shape.size == DiskSize(0) {
            return Ok(Vec::new());
        }
        let nodes = self.old.nodes(level, range.clone())?;
        if nodes.len() as u64 != range.end - range.start {
            return Err(Error::new(
                Kind::Corrupt,
                format!("asked for nodes {range:?} of level {level} of a digest tree and got {} of them", nodes.len()),
            ));
        }
        Ok(nodes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::BLOCK_LEN;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// Leaves that are not zero, by block.
    type Leaves = BTreeMap<u64, u8>;

    fn digest(n: u8) -> Digest {
        Digest([n; 32])
    }

    fn size_of(blocks: u64) -> DiskSize {
        // The last block is short, so that a size is never a multiple by luck.
        DiskSize((blocks * BLOCK_LEN as u64).saturating_sub(100))
    }

    /// The specification written down naively: all nodes of all levels in memory.
    fn naive_tree(blocks: u64, leaves: &Leaves) -> Vec<Vec<Digest>> {
        let mut level: Vec<Digest> = vec![Digest::ZERO; blocks as usize];
        leaves.iter().for_each(|(&b, &n)| level[b as usize] = digest(n));
        let mut tree = vec![level];
        while tree.len() < 2 || tree.last().unwrap().len() > 1 {
            let above: Vec<Digest> = tree.last().unwrap().chunks(64).map(node_digest).collect();
            tree.push(if above.is_empty() { vec![Digest::ZERO] } else { above });
        }
        tree
    }

    fn naive_root(blocks: u64, tree: &[Vec<Digest>]) -> Digest {
        root_digest(size_of(blocks), tree.last().unwrap()[0])
    }

    fn root_of(blocks: u64, leaves: &Leaves) -> Digest {
        let mut builder = RootBuilder::new(size_of(blocks));
        leaves.iter().for_each(|(&b, &n)| builder.push_block(BlockIndex(b), digest(n)));
        builder.finish()
    }

    #[test]
    fn shapes() {
        // (blocks, nodes at level 0, 1, 2, …)
        for (blocks, nodes) in [
            (0, vec![0, 1]),
            (1, vec![1, 1]),
            (64, vec![64, 1]),
            (65, vec![65, 2, 1]),
            (4096, vec![4096, 64, 1]),
            (4097, vec![4097, 65, 2, 1]),
        ] {
            let shape = TreeShape::new(size_of(blocks));
            assert_eq!((0..shape.levels()).map(|l| shape.nodes_at(l)).collect::<Vec<_>>(), nodes);
            assert_eq!(shape.nodes_at(shape.levels()), 0);
        }
        let largest = TreeShape::new(DiskSize(u64::MAX));
        assert_eq!((largest.levels(), largest.nodes_at(0), largest.nodes_at(8)), (LEVELS_MAX, 1 << 48, 1));
    }

    #[test]
    fn a_group_may_stand_for_its_blocks_and_a_node_for_its_groups() {
        let leaves: Leaves = [(3, 1), (64, 2), (65, 3), (5000, 4)].into();
        let tree = naive_tree(5001, &leaves);
        let mut builder = RootBuilder::new(size_of(5001));
        builder.push_block(BlockIndex(3), digest(1));
        builder.push_group(GroupIndex(1), tree[1][1]);
        builder.push_node(2, 1, tree[2][1]);
        assert_eq!(builder.finish(), naive_root(5001, &tree));
    }

    #[test]
    fn disks_of_any_size_cost_their_blocks_only() {
        let leaves = [(0, 1), (1 << 40, 2), ((1 << 47) - 1, 3)];
        let size = DiskSize(1 << 63);
        let mut builder = RootBuilder::new(size);
        let mut update = TreeUpdate::new(ZeroNodes, DiskSize(0), size, |_| Ok(())).unwrap();
        let mut next = 0;
        for (block, n) in leaves {
            builder.push_block(BlockIndex(block), digest(n));
            update.push_zero(BlockIndex(next), block - next).unwrap();
            update.push(BlockIndex(block), digest(n)).unwrap();
            next = block + 1;
        }
        assert_eq!(builder.finish(), update.finish().unwrap());
    }

    #[test]
    #[should_panic(expected = "ascending")]
    fn a_block_may_not_come_under_a_group() {
        let mut builder = RootBuilder::new(size_of(100));
        builder.push_group(GroupIndex(0), digest(1));
        builder.push_block(BlockIndex(63), digest(1));
    }

    #[test]
    #[should_panic(expected = "beyond")]
    fn a_block_may_not_lie_beyond_the_disk() {
        RootBuilder::new(size_of(100)).push_block(BlockIndex(100), digest(1));
    }

    #[test]
    #[should_panic(expected = "ascending")]
    fn a_block_is_updated_once() {
        let mut update = TreeUpdate::new(ZeroNodes, size_of(100), size_of(100), |_| Ok(())).unwrap();
        update.push_zero(BlockIndex(3), 2).unwrap();
        update.push(BlockIndex(4), digest(1)).unwrap();
    }

    #[test]
    fn a_source_that_gives_too_few_nodes_is_found_out() {
        let short = |_: u8, _: Range<u64>| Ok(vec![Digest::ZERO]);
        let mut update = TreeUpdate::new(short, size_of(100), size_of(100), |_| Ok(())).unwrap();
        assert_eq!(update.push(BlockIndex(0), digest(1)).unwrap_err().kind(), Kind::Corrupt);
    }

    #[test]
    fn errors_of_source_and_writer_come_through() {
        let broken = |_: u8, _: Range<u64>| Err(Error::new(Kind::Io, "broken"));
        let mut update = TreeUpdate::new(broken, size_of(100), size_of(100), |_| Ok(())).unwrap();
        assert_eq!(update.push(BlockIndex(0), digest(1)).unwrap_err().kind(), Kind::Io);
        let full = |_| Err(Error::new(Kind::Space, "full"));
        let mut update = TreeUpdate::new(ZeroNodes, size_of(100), size_of(100), full).unwrap();
        assert_eq!(update.push(BlockIndex(0), digest(1)).unwrap_err().kind(), Kind::Space);
    }

    /// Updates the tree of `old` to `blocks` blocks with `changes` (0: zero), checks everything promised of the way,
    /// and compares tree and root with those made from scratch.
    fn check_update(old_blocks: u64, old: &Leaves, blocks: u64, changes: &Leaves, zero_run: Option<Range<u64>>) {
        let tree = naive_tree(old_blocks, old);
        let mut reads = 0u64;
        let source = |level: u8, range: Range<u64>| {
            assert!(range.end - range.start <= 64);
            reads += 1;
            Ok(tree[usize::from(level)][range.start as usize..range.end as usize].to_vec())
        };
        let mut emitted: Vec<ChangedNode> = Vec::new();
        let emit = |node| {
            emitted.push(node);
            Ok(())
        };
        let mut update = TreeUpdate::new(source, size_of(old_blocks), size_of(blocks), emit).unwrap();
        let mut expected: Leaves = old.range(..blocks).map(|(&b, &n)| (b, n)).collect();
        let zeros = zero_run.unwrap_or(0..0);
        let mut pending = (!zeros.is_empty()).then(|| zeros.clone());
        for (&block, &n) in changes.iter().filter(|(b, _)| !zeros.contains(b)) {
            if let Some(run) = pending.take_if(|run| run.start < block) {
                update.push_zero(BlockIndex(run.start), run.end - run.start).unwrap();
            }
            update.push(BlockIndex(block), digest(n)).unwrap();
            expected.insert(block, n);
        }
        if let Some(run) = pending {
            update.push_zero(BlockIndex(run.start), run.end - run.start).unwrap();
        }
        expected.retain(|b, n| *n != 0 && !zeros.contains(b));
        let root = update.finish().unwrap();

        let wanted = naive_tree(blocks, &expected);
        assert_eq!(root, naive_root(blocks, &wanted), "root");
        assert_eq!(root, root_of(blocks, &expected), "root by RootBuilder");
        // What the writer of a file would have: the old tree, cut or grown by zeros, with the emitted nodes put in.
        let mut stored = tree.clone();
        stored.resize(wanted.len(), Vec::new());
        stored.iter_mut().zip(&wanted).for_each(|(have, want)| have.resize(want.len(), Digest::ZERO));
        let mut last: BTreeMap<u8, u64> = BTreeMap::new();
        for node in &emitted {
            let place = &mut stored[usize::from(node.level)][node.index as usize];
            assert_ne!(*place, node.digest, "{node:?} does not differ");
            *place = node.digest;
            assert!(last.insert(node.level, node.index).is_none_or(|l| l < node.index), "{node:?} is out of order");
            for (&level, &index) in last.range(node.level + 1..) {
                assert!(index < node.index >> (6 * (level - node.level)), "{node:?} comes after a node above it");
            }
        }
        assert!(stored == wanted, "stored tree");
        let touched = changes.len() as u64 + zeros.clone().filter(|b| old.contains_key(b)).count() as u64 * 65;
        assert!(reads <= (touched + 5) * u64::from(LEVELS_MAX), "{reads} reads for {touched} blocks");
    }

    #[test]
    fn edges_of_growing_and_shrinking() {
        let sizes = [0u64, 1, 2, 63, 64, 65, 128, 4095, 4096, 4097, 8200, 262_145];
        for old_blocks in sizes {
            // Something in the first block, in the last, and around every edge.
            let old: Leaves = sizes
                .iter()
                .flat_map(|&s| [s.saturating_sub(1), s])
                .filter(|&b| b < old_blocks)
                .map(|b| (b, (b % 7 + 1) as u8))
                .collect();
            for blocks in sizes {
                check_update(old_blocks, &old, blocks, &Leaves::new(), None);
                check_update(old_blocks, &old, blocks, &Leaves::new(), Some(0..blocks));
                if blocks > 0 {
                    check_update(old_blocks, &old, blocks, &[(blocks - 1, 9)].into(), None);
                    check_update(old_blocks, &old, blocks, &[(0, 9)].into(), Some(1..blocks));
                }
            }
        }
    }

    fn any_blocks() -> impl Strategy<Value = u64> {
        prop_oneof![0u64..=200, 4000u64..=4200, 4097u64..=20_000]
    }

    fn any_leaves(low: u8) -> impl Strategy<Value = Vec<(u64, u8)>> {
        let near = (0u64..300, low..=4);
        let far = (0u64..20_000, low..=4);
        prop_oneof![prop::collection::vec(near, 0..60), prop::collection::vec(far, 0..60)]
    }

    fn within(leaves: &[(u64, u8)], blocks: u64) -> Leaves {
        leaves.iter().copied().filter(|(b, _)| *b < blocks).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

        #[test]
        fn an_update_equals_building_from_scratch(
            old_blocks in any_blocks(), blocks in prop_oneof![Just(None), any_blocks().prop_map(Some)],
            old in any_leaves(1), changes in any_leaves(0),
            zeros in prop_oneof![Just(None), (0u64..20_000, 0u64..20_000).prop_map(Some)],
        ) {
            let blocks = blocks.unwrap_or(old_blocks);
            let zeros = zeros.map(|(a, b)| a.min(b).min(blocks)..a.max(b).min(blocks));
            check_update(old_blocks, &within(&old, old_blocks), blocks, &within(&changes, blocks), zeros);
        }

        #[test]
        fn a_root_does_not_depend_on_how_much_is_given_as_whole_nodes(
            blocks in any_blocks(), leaves in any_leaves(1), levels in prop::collection::vec(0u8..4, 80),
        ) {
            let leaves = within(&leaves, blocks);
            let tree = naive_tree(blocks, &leaves);
            let mut builder = RootBuilder::new(size_of(blocks));
            let mut levels = levels.iter().cycle();
            let mut next = 0;
            for &block in leaves.keys() {
                // As high as wished, as far as the node begins after what was given already.
                let wish = (*levels.next().unwrap()).min(tree.len() as u8 - 1);
                let level = (0..=wish).rev().find(|&l| (block >> (6 * l)) << (6 * l) >= next);
                if let Some(level) = level {
                    let index = block >> (6 * level);
                    builder.push_node(level, index, tree[usize::from(level)][index as usize]);
                    next = (index + 1) << (6 * level);
                }
            }
            prop_assert_eq!(builder.finish(), naive_root(blocks, &tree));
        }
    }
}
