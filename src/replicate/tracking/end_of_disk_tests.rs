//! Disks of one value a block, cut off, grown again, written before and after, and what the search makes of them.

use super::*;
use crate::block::digest::{BlockPieces, node_digest};
use crate::block::extent::{Content, Extent};
use crate::engine::disk_target::{DiskApplied, DiskTarget};
use std::sync::atomic::{AtomicU64, Ordering};

const B: u64 = BLOCK_LEN as u64;

/// Every block filled with one value.
struct Disk(Vec<u8>);

impl Image for Disk {
    fn size(&self) -> DiskSize {
        DiskSize(self.0.len() as u64 * B)
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        Ok(vec![Extent { range, content: Content::Data }])
    }

    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<()> {
        assert!(offset_bytes.is_multiple_of(B) && buf.len() as u64 == B, "one whole block is read");
        buf.fill(self.0[(offset_bytes / B) as usize]);
        Ok(())
    }
}

/// A head, by level.
struct Head {
    levels: Vec<Vec<Digest>>,
    asked: AtomicU64,
}

impl Head {
    fn of(values: &[u8]) -> Head {
        let by_value: Vec<Digest> = (0..=255u8).map(|v| block_digest(&[v; BLOCK_LEN])).collect();
        let mut levels = vec![values.iter().map(|v| by_value[*v as usize]).collect::<Vec<_>>()];
        while levels.len() < 2 || levels.last().unwrap().len() > 1 {
            levels.push(levels.last().unwrap().chunks(FANOUT).map(node_digest).collect());
        }
        Head { levels, asked: AtomicU64::new(0) }
    }
}

impl DiskTarget for Head {
    fn nodes(&self, _: &DiskName, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let level = &self.levels[level as usize];
        Ok(range.map(|i| level.get(i as usize).copied().unwrap_or(Digest::ZERO)).collect())
    }
    fn pieces(&self, _: &DiskName, _: &[BlockIndex]) -> Result<Vec<BlockPieces>> {
        unreachable!()
    }
    fn apply(&self, _: &DiskName, _: &[u8]) -> Result<()> {
        unreachable!()
    }
    fn finish_disk(&self, _: &DiskName) -> Result<DiskApplied> {
        unreachable!()
    }
}

fn ranges(marked: &[bool]) -> Vec<ByteRange> {
    let of = |(at, _): (usize, &bool)| ByteRange::new(at as u64 * B, (at as u64 + 1) * B);
    marked.iter().enumerate().filter(|(_, m)| **m).map(of).collect()
}

fn stands_now(image: &[u8], head: &[u8], marked: &[bool]) -> bool {
    let disk = DiskName::new("vda").unwrap();
    let size = DiskSize(head.len() as u64 * B);
    end_unchanged(&Disk(image.to_vec()), &Head::of(head), &disk, size, &ranges(marked)).unwrap()
}

/// A small generator with a printed seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) % sides as u64) as usize
    }
}

/// A disk as it is now, and what its bitmap marks.
struct Now {
    image: Vec<u8>,
    marked: Vec<bool>,
}

impl Now {
    fn write(&mut self, dice: &mut Dice) {
        for _ in 0..dice.roll(40) {
            let at = dice.roll(self.image.len());
            self.image[at] = [0, 7, 8, 9][dice.roll(4)];
            self.marked[at] = true;
        }
    }
}

#[test]
fn no_cut_that_loses_a_block_goes_unnoticed_and_without_one_nothing_is_said() {
    let seed = 0x5eed_0001;
    let mut dice = Dice(seed);
    let (mut cuts, mut noticed) = (0, 0);
    for round in 0..600 {
        let why = format!("seed {seed:#x}, round {round}");
        let blocks = 1 + dice.roll(300);
        let head: Vec<u8> = (0..blocks).map(|_| [0, 0, 1, 2, 3][dice.roll(5)]).collect();
        let mut now = Now { image: head.clone(), marked: vec![false; blocks] };
        now.write(&mut dice);
        assert!(stands_now(&now.image, &head, &now.marked), "{why}: nothing was cut");
        // Cut off, grown again: zeros, and no mark.
        let cut = dice.roll(blocks);
        now.image[cut..].fill(0);
        now.marked[cut..].fill(false);
        now.write(&mut dice);
        let missed = (0..blocks).any(|b| now.image[b] != head[b] && !now.marked[b]);
        assert_eq!(stands_now(&now.image, &head, &now.marked), !missed, "{why}: cut at {cut} of {blocks}");
        cuts += 1;
        noticed += u32::from(missed);
    }
    assert!(noticed > cuts / 4 && noticed < cuts, "{noticed} of {cuts} lost a block: not much was tried");
}

#[test]
fn a_disk_that_is_all_marked_or_all_zero_has_nothing_to_lose() {
    assert!(stands_now(&[5; 130], &[1; 130], &[true; 130]));
    assert!(stands_now(&[0; 130], &[0; 130], &[false; 130]));
    assert!(stands_now(&[], &[], &[]));
}

#[test]
fn a_search_that_would_take_too_long_ends_as_a_doubt() {
    // Every group has data, all of it marked, and zeros that are not: each costs a question.
    let groups = QUESTIONS_MAX as usize + 8;
    let pattern = |value: u8| (0..groups * FANOUT).map(|b| if b % FANOUT == 0 { value } else { 0 }).collect::<Vec<_>>();
    let marked: Vec<bool> = (0..groups * FANOUT).map(|b| b % FANOUT == 0).collect();
    assert!(!stands_now(&pattern(2), &pattern(1), &marked));
}

#[test]
fn the_search_is_short() {
    let values: Vec<u8> = (0..FANOUT * FANOUT * 3).map(|b| u8::from(b == 70)).collect();
    let head = Head::of(&values);
    let size = DiskSize(values.len() as u64 * B);
    assert!(end_unchanged(&Disk(values), &head, &DiskName::new("vda").unwrap(), size, &[]).unwrap());
    assert_eq!(head.asked.load(Ordering::Relaxed), 2);
}
