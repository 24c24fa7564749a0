//! Which blocks of two trees differ, without a look at what they have in common.

use crate::block::digest::{BlockPieces, Digest};
use crate::block::tree::TreeShape;
use crate::block::{BLOCK_LEN, BlockIndex, ByteRange, DiskSize, FANOUT};
use crate::engine::disk_target::{DiskApplied, DiskTarget, NODES_MAX};
use crate::engine::nodefile::NodeFile;
use crate::engine::pump::expect_nodes;
use crate::error::Result;
use crate::name::DiskName;
use std::ops::Range;

/// Nodes that are asked for although nobody wants them, to save a question: 16 KiB on the wire are less than a round
/// trip.
const GAP_MAX: u64 = 512;

/// Digests of a target's blocks that are kept while a patch is made: 32 MiB of memory, 64 GiB of groups that differ.
const KNOWN_MAX: usize = 1 << 20;

/// What a comparison found.
#[derive(Default)]
pub(crate) struct Found {
    /// Whole blocks, ascending.
    pub(crate) ranges: Vec<ByteRange>,
    /// Digests of the target's blocks, with the number of the first of each run, ascending.
    known: Vec<(u64, Vec<Digest>)>,
}

/// A target of which the digests that were asked for once are not asked for again.
pub(crate) struct Remembered<'a> {
    pub(crate) target: &'a dyn DiskTarget,
    pub(crate) found: &'a Found,
}

impl DiskTarget for Remembered<'_> {
    fn nodes(&self, disk: &DiskName, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        let known = &self.found.known;
        let at = known.partition_point(|(first, _)| *first <= range.start);
        let inside = at.checked_sub(1).and_then(|at| {
            let (first, digests) = &known[at];
            digests.get((range.start - first) as usize..(range.end - first) as usize)
        });
        match inside {
            Some(digests) if level == 0 => Ok(digests.to_vec()),
            _ => self.target.nodes(disk, level, range),
        }
    }

    fn pieces(&self, disk: &DiskName, blocks: &[BlockIndex]) -> Result<Vec<BlockPieces>> {
        self.target.pieces(disk, blocks)
    }

    fn apply(&self, disk: &DiskName, patch_bytes: &[u8]) -> Result<()> {
        self.target.apply(disk, patch_bytes)
    }

    fn finish_disk(&self, disk: &DiskName) -> Result<DiskApplied> {
        self.target.finish_disk(disk)
    }
}

/// The ranges of the image behind `nodes` that are other than in a target of `head` bytes, whole blocks, ascending.
///
/// One question per level and run of nodes; equal subtrees are not asked for. If the image is the smaller one, its last
/// block is among them, so that whoever builds on the target's nodes recomputes those that the cut goes through.
pub(crate) fn differing(nodes: &NodeFile, target: &dyn DiskTarget, disk: &DiskName, head: DiskSize) -> Result<Found> {
    let (ours, theirs) = (nodes.shape(), TreeShape::new(head));
    // Above the lower top the other tree has no nodes to compare with.
    let mut level = ours.top().min(theirs.top());
    let top = 0..ours.nodes_at(level);
    let mut within: Vec<Range<u64>> = Vec::from([top]);
    let mut known = Vec::new();
    loop {
        within = at_level(nodes, target, disk, (theirs, level), &within, &mut known)?;
        if level == 0 {
            break;
        }
        level -= 1;
        let children = |r: &Range<u64>| ours.clip(level, r.start * FANOUT as u64..r.end * FANOUT as u64);
        within = within.iter().map(children).collect();
    }
    let size = nodes.size();
    let blocks = size.blocks();
    if size < head && blocks > 0 && within.last().is_none_or(|last| last.end < blocks) {
        within.push(blocks - 1..blocks);
    }
    let bytes = |r: &Range<u64>| ByteRange::new(r.start * BLOCK_LEN as u64, size.0.min(r.end * BLOCK_LEN as u64));
    Ok(Found { ranges: within.iter().map(bytes).collect(), known })
}

fn at_level(
    nodes: &NodeFile,
    target: &dyn DiskTarget,
    disk: &DiskName,
    (theirs, level): (TreeShape, u8),
    within: &[Range<u64>],
    known: &mut Vec<(u64, Vec<Digest>)>,
) -> Result<Vec<Range<u64>>> {
    let mut differ: Vec<Range<u64>> = Vec::new();
    for range in questions(within) {
        let ours = nodes.nodes(level, range.clone())?;
        let asked = theirs.clip(level, range.clone());
        let mut answer = match asked.is_empty() {
            true => Vec::new(),
            false => target.nodes(disk, level, asked.clone())?,
        };
        expect_nodes(answer.len(), &asked)?;
        // Beyond its end the target has nothing, which is as good as zeros.
        answer.resize(ours.len(), Digest::ZERO);
        for (at, digest) in ours.iter().enumerate() {
            if *digest == answer[at] {
                continue;
            }
            let index = range.start + at as u64;
            match differ.last_mut() {
                Some(last) if last.end == index => last.end += 1,
                _ => differ.push(index..index + 1),
            }
        }
        if level == 0 && known.iter().map(|(_, digests)| digests.len()).sum::<usize>() + answer.len() <= KNOWN_MAX {
            known.push((range.start, answer));
        }
    }
    Ok(differ)
}

/// The ranges as few, larger ones that may be asked for at once.
fn questions(within: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut out: Vec<Range<u64>> = Vec::new();
    for range in within {
        match out.last_mut() {
            Some(last) if range.start - last.end <= GAP_MAX && range.end - last.start <= NODES_MAX => {
                last.end = range.end;
            }
            _ => {
                let mut start = range.start;
                while start < range.end {
                    let end = range.end.min(start + NODES_MAX);
                    out.push(start..end);
                    start = end;
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::changes::Run;
    use crate::block::tree::ZeroNodes;
    use crate::patch::plain_names;
    use std::sync::atomic::{AtomicU64, Ordering};

    struct Far(NodeFile, AtomicU64);

    impl DiskTarget for Far {
        fn nodes(&self, _: &DiskName, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
            assert!(range.end - range.start <= NODES_MAX && !range.is_empty());
            self.1.fetch_add(1, Ordering::Relaxed);
            self.0.nodes(level, range)
        }
        fn pieces(&self, _: &DiskName, _: &[BlockIndex]) -> Result<Vec<BlockPieces>> {
            unreachable!("nobody asks")
        }
        fn apply(&self, _: &DiskName, _: &[u8]) -> Result<()> {
            unreachable!("nothing is sent")
        }
        fn finish_disk(&self, _: &DiskName) -> Result<DiskApplied> {
            unreachable!("nothing is sent")
        }
    }

    /// A tree of these many blocks with these (block, content).
    fn tree(blocks: u64, content: &[(u64, u8)]) -> NodeFile {
        let nodes = NodeFile::temporary(DiskSize(blocks * BLOCK_LEN as u64)).unwrap();
        let runs = content
            .iter()
            .map(|(block, n)| Ok(Run::Digests { first: BlockIndex(*block), digests: vec![Digest([*n; 32])] }));
        nodes.apply(ZeroNodes, runs).unwrap();
        nodes
    }

    #[test]
    fn exactly_what_differs_is_found_whatever_the_sizes() {
        let contents: [&[(u64, u8)]; 5] =
            [&[], &[(0, 1)], &[(0, 1), (63, 2), (64, 3)], &[(0, 1), (63, 9)], &[(0, 2), (4096, 1), (5000, 3)]];
        for blocks in [1u64, 64, 65, 4096, 5001] {
            for head in [0u64, 1, 64, 65, 4097, 5001] {
                for (ours, theirs) in contents.iter().flat_map(|a| contents.iter().map(move |b| (a, b))) {
                    let inside =
                        |c: &[(u64, u8)], n: u64| c.iter().copied().filter(|(b, _)| *b < n).collect::<Vec<_>>();
                    let (ours, theirs) = (inside(ours, blocks), inside(theirs, head));
                    let of = |c: &[(u64, u8)], block: u64| c.iter().find(|(b, _)| *b == block).map(|(_, n)| *n);
                    let mut expected: Vec<u64> = (0..blocks).filter(|b| of(&ours, *b) != of(&theirs, *b)).collect();
                    if blocks < head && expected.last() != Some(&(blocks - 1)) {
                        expected.push(blocks - 1);
                    }
                    let far = Far(tree(head, &theirs), AtomicU64::new(0));
                    let found =
                        differing(&tree(blocks, &ours), &far, &plain_names().1, DiskSize(head * BLOCK_LEN as u64));
                    let found: Vec<u64> = found
                        .unwrap()
                        .ranges
                        .iter()
                        .flat_map(|r| r.start / BLOCK_LEN as u64..r.end / BLOCK_LEN as u64)
                        .collect();
                    assert_eq!(found, expected, "{blocks} {head} {ours:?} {theirs:?}");
                }
            }
        }
    }

    #[test]
    fn neighbours_are_asked_for_at_once_and_equal_trees_with_one_question() {
        let content: Vec<(u64, u8)> = (0..2000).map(|n| (n * 64, 1)).collect();
        let far = Far(tree(1 << 20, &content), AtomicU64::new(0));
        let size = DiskSize((1 << 20) * BLOCK_LEN as u64);
        assert_eq!(differing(&tree(1 << 20, &content), &far, &plain_names().1, size).unwrap().ranges, []);
        assert_eq!(far.1.swap(0, Ordering::Relaxed), 1);
        let mut other = content.clone();
        other[3].1 = 7;
        other[5].1 = 7;
        let found = differing(&tree(1 << 20, &other), &far, &plain_names().1, size).unwrap();
        assert_eq!(found.ranges.len(), 2);
        assert!(far.1.swap(0, Ordering::Relaxed) <= 5, "one question a level");
        let again = Remembered { target: &far, found: &found };
        for group in [3u64, 5] {
            let blocks = group * 64..(group + 1) * 64;
            let told = again.nodes(&plain_names().1, 0, blocks.clone()).unwrap();
            assert_eq!(far.1.load(Ordering::Relaxed), 0, "what was asked for once is known");
            assert_eq!(told, far.0.nodes(0, blocks).unwrap());
        }
        again.nodes(&plain_names().1, 0, 900 * 64..901 * 64).unwrap();
        again.nodes(&plain_names().1, 1, 3..5).unwrap();
        assert_eq!(far.1.into_inner(), 2, "the rest is asked for");
    }
}
