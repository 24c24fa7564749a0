//! Disks of every awkward shape, pumped into a replica in memory that can misbehave.

#[path = "pump_sparse_tests.rs"]
mod sparse;

use super::planner::whole_blocks;
use super::*;
use crate::block::PIECE_LEN;
use crate::block::digest::{BlockPieces, piece_digests, root_digest};
use crate::block::extent::{Content, Extent, is_zero, merge};
use crate::block::tree::TreeShape;
use crate::engine::disk_target::{DiskApplied, NODES_MAX, check_blocks};
use crate::patch::{Decoder, Item, Limits};

const B: usize = BLOCK_LEN;

/// A disk in memory. Runs of zero sectors are holes, as a file system would have them.
pub(crate) struct Disk {
    bytes: Vec<u8>,
    reads: AtomicU64,
    pub(crate) fail_at: Option<u64>,
}

impl Disk {
    pub(crate) fn new(bytes: Vec<u8>) -> Disk {
        Disk { bytes, reads: AtomicU64::new(0), fail_at: None }
    }
}

impl Image for Disk {
    fn size(&self) -> DiskSize {
        DiskSize(self.bytes.len() as u64)
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        let sectors = (range.start..range.end).step_by(512).map(|start| {
            let end = (start + 512).min(range.end);
            let zero = is_zero(&self.bytes[start as usize..end as usize]);
            Extent::new(start, end, if zero { Content::Zero } else { Content::Data })
        });
        Ok(merge(sectors))
    }

    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<()> {
        if self.fail_at.is_some_and(|at| (offset_bytes..offset_bytes + buf.len() as u64).contains(&at)) {
            return Err(Error::new(Kind::Io, "bad sector").offset(offset_bytes));
        }
        buf.copy_from_slice(&self.bytes[offset_bytes as usize..offset_bytes as usize + buf.len()]);
        self.reads.fetch_add(buf.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// The head's content, and the stream that was sent.
pub(crate) struct Memory {
    head: Vec<u8>,
    new: Mutex<Vec<u8>>,
    decoder: Mutex<Decoder>,
    fault: Fault,
    nodes_asked: AtomicU64,
}

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Fault {
    None,
    TooFewNodes,
    NoPieces,
    ApplyFailsAfter(u64),
    LyingRoot,
}

impl Memory {
    pub(crate) fn new(head: &[u8], size: usize, fault: Fault) -> Memory {
        let mut new = head.to_vec();
        new.resize(size, 0);
        Memory {
            head: head.to_vec(),
            new: Mutex::new(new),
            decoder: Mutex::new(Decoder::new(Limits::default()).unwrap()),
            fault,
            nodes_asked: AtomicU64::new(0),
        }
    }
}

/// The root of these bytes, by the slow and obvious way.
fn root_of(bytes: &[u8]) -> Digest {
    let mut level: Vec<Digest> = bytes.chunks(B).map(block_digest).collect();
    loop {
        level = level.chunks(FANOUT).map(node_digest).collect();
        if level.len() <= 1 {
            break;
        }
    }
    root_digest(DiskSize(bytes.len() as u64), level.first().copied().unwrap_or(Digest::ZERO))
}

impl DiskTarget for Memory {
    fn nodes(&self, _: &DiskName, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        let mut nodes: Vec<Digest> = self.head.chunks(B).map(block_digest).collect();
        for _ in 0..level {
            nodes = nodes.chunks(FANOUT).map(node_digest).collect();
        }
        self.nodes_asked.fetch_add(range.end - range.start, Ordering::Relaxed);
        let short = u64::from(self.fault == Fault::TooFewNodes && level == 0);
        Ok((range.start..range.end - short).map(|i| nodes.get(i as usize).copied().unwrap_or(Digest::ZERO)).collect())
    }

    fn pieces(&self, _: &DiskName, blocks: &[BlockIndex]) -> Result<Vec<BlockPieces>> {
        assert!(self.fault != Fault::NoPieces, "a group written as a whole needs no pieces");
        check_blocks(blocks)?;
        let of = |block: &BlockIndex| {
            let range = block.bytes(DiskSize(self.head.len() as u64));
            piece_digests(&self.head[range.start as usize..range.end as usize])
        };
        Ok(blocks.iter().map(of).collect())
    }

    fn apply(&self, _: &DiskName, patch_bytes: &[u8]) -> Result<()> {
        let mut decoder = self.decoder.lock().unwrap();
        let mut new = self.new.lock().unwrap();
        decoder.push(patch_bytes);
        let mut blocks = 0;
        while let Some(item) = decoder.next_item()? {
            match item {
                Item::Data { block, digest, bytes } => {
                    assert_eq!(block_digest(&bytes), digest, "the digest is of the data");
                    let at = block.offset() as usize;
                    new[at..at + bytes.len()].copy_from_slice(&bytes);
                    blocks += 1;
                }
                Item::Pieces { block, digest, mask, bytes } => {
                    // Into the head's copy, which the disk may have outgrown or be cut from.
                    let range = block.bytes(DiskSize(new.len() as u64));
                    let old = &self.head[(range.start as usize).min(self.head.len())..];
                    let mut whole = old[..old.len().min(range.len() as usize)].to_vec();
                    whole.resize(range.len() as usize, 0);
                    mask.scatter(&bytes, &mut whole);
                    assert_eq!(block_digest(&whole), digest, "the pieces make up the block");
                    new[range.start as usize..range.end as usize].copy_from_slice(&whole);
                    blocks += 1;
                }
                Item::Zero { first, count } => {
                    let start = first.offset() as usize;
                    let end = (start + count as usize * B).min(new.len());
                    new[start..end].fill(0);
                }
                _ => {}
            }
            if matches!(self.fault, Fault::ApplyFailsAfter(n) if blocks > n) {
                return Err(Error::new(Kind::Space, "the target is full"));
            }
        }
        Ok(())
    }

    fn finish_disk(&self, _: &DiskName) -> Result<DiskApplied> {
        let trailer = self.decoder.lock().unwrap().finish()?;
        let root = root_of(&self.new.lock().unwrap());
        assert_eq!(trailer.to_root, root, "the source's root is the content's");
        let root = if self.fault == Fault::LyingRoot { Digest([9; 32]) } else { root };
        Ok(DiskApplied { root, bytes_written: 0, blocks_changed: 0 })
    }
}

pub(crate) fn shipment(size: usize, head: Option<&[u8]>) -> Shipment {
    Shipment {
        uuid: DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap(),
        disk: DiskName::new("vda").unwrap(),
        size: DiskSize(size as u64),
        head: head.map(|h| (DiskSize(h.len() as u64), root_of(h))),
        mode: if head.is_some() { Mode::Digest } else { Mode::Full },
        dirty: None,
        compare_only: false,
        reason: "a test".into(),
        workers: 3,
        compression: Compression::default(),
        throttle: None,
    }
}

pub(crate) fn always() -> Result<()> {
    Ok(())
}

/// Ships `new` over `old` and checks content, root and statistics. Returns the blocks found changed.
fn shipped(old: Option<&[u8]>, new: &[u8]) -> u64 {
    let disk = Disk::new(new.to_vec());
    let replica = Memory::new(old.unwrap_or_default(), new.len(), Fault::None);
    let progress = Progress::default();
    let shipped = ship(&disk, &replica, &shipment(new.len(), old), &progress, &always).unwrap();
    assert!(*replica.new.lock().unwrap() == new, "the content arrived");
    assert_eq!(shipped.root, root_of(new));
    assert_eq!(shipped.stats.bytes_read, disk.reads.load(Ordering::Relaxed));
    assert_eq!(progress.scanned.load(Ordering::Relaxed), new.len() as u64);
    progress.changed_blocks.load(Ordering::Relaxed)
}

pub(crate) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i / 7 % 251) as u8 ^ seed | 1).collect()
}

#[test]
fn every_awkward_size_arrives_whole() {
    for len in [0, 1, 511, 512, B - 1, B, B + 1, 64 * B - 1, 64 * B, 64 * B + 1, 130 * B + 777] {
        let disk = pattern(len, 3);
        let blocks = len.div_ceil(B) as u64;
        assert_eq!(shipped(None, &disk), blocks, "{len} bytes, first");
        assert_eq!(shipped(Some(&disk), &disk), 0, "{len} bytes, nothing changed");
        if len > 0 {
            let mut last = disk.clone();
            *last.last_mut().unwrap() ^= 0x80;
            assert_eq!(shipped(Some(&disk), &last), 1, "{len} bytes, the very last byte");
            let mut first = disk.clone();
            first[0] ^= 0x80;
            assert_eq!(shipped(Some(&disk), &first), 1, "{len} bytes, the very first byte");
            assert_eq!(shipped(Some(&disk), &vec![0; len]), blocks, "{len} bytes, all to zero");
            assert_eq!(shipped(Some(&vec![0; len]), &disk), blocks, "{len} bytes, all from zero");
        }
    }
}

/// What a run found out of compression is in its report; what was said, or not sent, was not found out.
#[test]
fn the_report_has_which_way_the_content_went() {
    let (disk, len) = (Disk::new(pattern(70 * B, 3)), 70 * B);
    let of = |old: Option<&[u8]>, compression: Compression| {
        let replica = Memory::new(old.unwrap_or_default(), len, Fault::None);
        let shipment = Shipment { compression, ..shipment(len, old) };
        ship(&disk, &replica, &shipment, &Progress::default(), &always).unwrap().stats.compression
    };
    let found = of(None, Compression::default()).unwrap();
    assert_eq!((found.compressed_bytes, found.stored_bytes, found.trials), (len as u64, 0, 0));
    assert_eq!(of(None, Compression::FAST), None);
    assert_eq!(of(None, Compression::NONE), None);
    assert_eq!(of(Some(&pattern(len, 3)), Compression::default()), None);
}

#[test]
fn disks_grow_and_shrink() {
    let long = pattern(200 * B + 5, 1);
    for cut in [0, 1, B, 63 * B + 1, 64 * B, 129 * B + 100, 200 * B] {
        shipped(Some(&long), &long[..cut]);
        shipped(Some(&long[..cut]), &long);
        let mut grown = long[..cut].to_vec();
        grown.resize(long.len(), 0);
        assert_eq!(shipped(Some(&long[..cut]), &grown), 0, "growing by zeros from {cut} changes no block");
    }
}

#[test]
fn holes_cost_nothing_and_new_holes_arrive() {
    let mut disk = vec![0; 300 * B];
    disk[70 * B..71 * B].copy_from_slice(&pattern(B, 1));
    disk[299 * B + 100] = 1;
    let image = Disk::new(disk.clone());
    let replica = Memory::new(&[], disk.len(), Fault::None);
    ship(&image, &replica, &shipment(disk.len(), None), &Progress::default(), &always).unwrap();
    assert_eq!(image.reads.load(Ordering::Relaxed), B as u64 + 512, "only data is read");
    let mut trimmed = disk.clone();
    trimmed[70 * B..71 * B].fill(0);
    assert_eq!(shipped(Some(&disk), &trimmed), 1);
}

#[test]
fn equal_groups_are_never_asked_for_block_by_block() {
    let disk = pattern(64 * B * 5, 1);
    let mut changed = disk.clone();
    changed[64 * B * 3 + 9] ^= 0xff;
    let replica = Memory::new(&disk, disk.len(), Fault::None);
    let shipment = shipment(disk.len(), Some(&disk));
    ship(&Disk::new(changed), &replica, &shipment, &Progress::default(), &always).unwrap();
    assert_eq!(replica.nodes_asked.load(Ordering::Relaxed), 5 + 64, "five groups, and the blocks of one");
}

#[test]
fn a_random_history_ends_equal() {
    let seed: u64 = std::env::var("VR_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos() as u64
    });
    println!("VR_SEED={seed}");
    let mut state: u64 = seed | 1;
    let mut random = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below.max(1)
    };
    let mut disk = pattern(150 * B + 512, 9);
    for _ in 0..12 {
        let old = disk.clone();
        for _ in 0..random(20) {
            let at = random(disk.len() as u64) as usize;
            let len = random(3 * B as u64) as usize;
            let end = (at + len).min(disk.len());
            let fill = random(3) as u8;
            disk[at..end].fill(fill);
        }
        if random(3) == 0 {
            let len = 512 * (1 + random(400 * 128) as usize);
            disk.resize(len, 0);
        }
        shipped(Some(&old), &disk);
    }
}

#[test]
fn a_bad_sector_ends_the_shipment_with_its_place() {
    let mut disk = Disk::new(pattern(300 * B, 1));
    disk.fail_at = Some(200 * B as u64);
    let replica = Memory::new(&[], 300 * B, Fault::None);
    let e = ship(&disk, &replica, &shipment(300 * B, None), &Progress::default(), &always).unwrap_err();
    assert_eq!((e.kind(), e.what()), (Kind::Io, "bad sector"));
}

#[test]
fn faults_of_the_other_side_end_the_shipment_and_never_hang_it() {
    let old = pattern(300 * B, 1);
    let new = pattern(300 * B, 2);
    for (fault, kind) in [
        (Fault::TooFewNodes, Kind::Protocol),
        (Fault::ApplyFailsAfter(10), Kind::Space),
        (Fault::LyingRoot, Kind::Corrupt),
    ] {
        let replica = Memory::new(&old, new.len(), fault);
        let shipment = shipment(new.len(), Some(&old));
        let e = ship(&Disk::new(new.clone()), &replica, &shipment, &Progress::default(), &always).unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
    }
}

#[test]
fn an_image_that_no_longer_stands_still_is_not_shipped() {
    let disk = pattern(300 * B, 1);
    let asked = AtomicU64::new(0);
    let moved = || match asked.fetch_add(1, Ordering::Relaxed) {
        0..3 => Ok(()),
        _ => Err(Error::new(Kind::Interrupted, "the domain was started")),
    };
    let replica = Memory::new(&[], disk.len(), Fault::None);
    let shipment = shipment(disk.len(), None);
    let e = ship(&Disk::new(disk), &replica, &shipment, &Progress::default(), &moved).unwrap_err();
    assert_eq!(e.kind(), Kind::Interrupted);
}

#[test]
fn comparing_counts_and_sends_nothing() {
    let old = pattern(100 * B, 1);
    let mut new = old.clone();
    new[5 * B] ^= 1;
    new[70 * B] ^= 1;
    let replica = Memory::new(&old, new.len(), Fault::NoPieces);
    let progress = Progress::default();
    let shipment = Shipment { compare_only: true, ..shipment(new.len(), Some(&old)) };
    let (root, differ) = compare(&Disk::new(new.clone()), &replica, &shipment, &progress, &always).unwrap();
    assert_eq!((root, differ), (root_of(&new), 2));
    assert!(*replica.new.lock().unwrap() == old);
}

/// The blocks in which two disks differ, as a bitmap of whole blocks would mark them; what was added counts as marked.
fn marks(old: &[u8], new: &[u8]) -> Vec<ByteRange> {
    let differs = |i: usize| old.chunks(B).nth(i).map(<[u8]>::to_vec) != new.chunks(B).nth(i).map(<[u8]>::to_vec);
    let size = new.len() as u64;
    (0..new.len().div_ceil(B))
        .filter(|i| differs(*i))
        .map(|i| ByteRange::new((i * B) as u64, size.min(((i + 1) * B) as u64)))
        .collect()
}

/// Ships what is marked and checks content, root, and that nothing else was read.
fn shipped_by_bitmap(old: &[u8], new: &[u8], dirty: Vec<ByteRange>) -> u64 {
    let disk = Disk::new(new.to_vec());
    let replica = Memory::new(old, new.len(), Fault::None);
    let progress = Progress::default();
    let whole: u64 = whole_blocks(&dirty, disk.size()).iter().map(|r| r.len()).sum();
    let shipment = Shipment { mode: Mode::Bitmap, dirty: Some(dirty), ..shipment(new.len(), Some(old)) };
    let shipped = ship(&disk, &replica, &shipment, &progress, &always).unwrap();
    assert!(*replica.new.lock().unwrap() == new, "the content arrived");
    assert_eq!(shipped.root, root_of(new), "the root over what was read and what was taken from the head");
    assert!(shipped.stats.bytes_read <= whole, "{} bytes read, {whole} marked", shipped.stats.bytes_read);
    assert_eq!(progress.scanned.load(Ordering::Relaxed), new.len() as u64);
    progress.changed_blocks.load(Ordering::Relaxed)
}

#[test]
fn only_what_is_marked_is_read_and_the_root_is_still_that_of_the_whole_disk() {
    let old = pattern(64 * B * 5 + 3 * B + 512, 1);
    assert_eq!(shipped_by_bitmap(&old, &old, vec![]), 0, "nothing marked");
    for changed in [0, 1, B - 1, B, 64 * B - 1, 64 * B, 200 * B + 7, old.len() - 1] {
        let mut new = old.clone();
        new[changed] ^= 0x55;
        assert_eq!(shipped_by_bitmap(&old, &new, marks(&old, &new)), 1, "byte {changed}");
    }
    let mut trimmed = old.clone();
    trimmed[10 * B..80 * B].fill(0);
    assert_eq!(shipped_by_bitmap(&old, &trimmed, marks(&old, &trimmed)), 70);
}

#[test]
fn marks_that_are_coarse_odd_or_too_many_cost_reading_and_never_change_the_result() {
    let old = pattern(64 * B * 3, 1);
    let mut new = old.clone();
    new[70 * B] ^= 1;
    for dirty in [
        vec![ByteRange::new(0, new.len() as u64)],
        vec![ByteRange::new(70 * B as u64, 70 * B as u64 + 512)],
        vec![ByteRange::new(1, 2), ByteRange::new(70 * B as u64 - 5, 70 * B as u64 + 5)],
        vec![ByteRange::new(69 * B as u64, 70 * B as u64), ByteRange::new(70 * B as u64, 71 * B as u64)],
    ] {
        assert_eq!(shipped_by_bitmap(&old, &new, dirty), 1);
    }
}

#[test]
fn a_disk_that_grew_is_shipped_by_its_marks_and_its_new_range() {
    let new = pattern(64 * B * 2 + 700 * 512, 4);
    for cut in [512, B, 63 * B, 64 * B, 65 * B + 512, 128 * B] {
        let old = new[..cut].to_vec();
        let grown = vec![ByteRange::new(cut as u64, new.len() as u64)];
        shipped_by_bitmap(&old, &new, grown);
    }
}

#[test]
fn random_histories_by_bitmap_end_equal() {
    let seed: u64 = std::env::var("VR_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x5eed);
    println!("VR_SEED={seed}");
    let mut state = seed | 1;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let mut disk = pattern(64 * B * 4 + 512, 2);
    for _ in 0..15 {
        let old = disk.clone();
        for _ in 0..random(12) {
            let at = random(disk.len());
            let end = (at + random(5 * B)).min(disk.len());
            let fill = random(3) as u8;
            disk[at..end].fill(fill);
        }
        shipped_by_bitmap(&old, &disk, marks(&old, &disk));
    }
}
