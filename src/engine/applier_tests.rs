//! Patches applied to disks in a tiny notation: a letter is a block of that letter, `.` a block of zeros, and a digit
//! at the end a last block of so many bytes of `x`.

use super::*;
use crate::block::digest::{block_digest, node_digest, root_digest};
use crate::block::extent::{Content, Extent};
use crate::block::{FANOUT, PIECE_LEN};
use crate::image::Image;
use crate::patch::PieceMask;
use std::cell::RefCell;
use std::sync::Mutex;

const B: usize = BLOCK_LEN;

fn disk(notation: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for c in notation.chars() {
        match c {
            '.' => bytes.resize(bytes.len() + B, 0),
            '0'..='9' => bytes.resize(bytes.len() + c as usize - '0' as usize, b'x'),
            c => bytes.resize(bytes.len() + B, c as u8),
        }
    }
    bytes
}

fn tree(bytes: &[u8]) -> Vec<Vec<Digest>> {
    let mut levels = vec![bytes.chunks(B).map(block_digest).collect::<Vec<_>>()];
    loop {
        let next: Vec<Digest> = levels.last().unwrap().chunks(FANOUT).map(node_digest).collect();
        let is_top = next.len() <= 1;
        levels.push(next);
        if is_top {
            return levels;
        }
    }
}

fn root(bytes: &[u8]) -> Digest {
    let top = tree(bytes).last().unwrap().first().copied().unwrap_or(Digest::ZERO);
    root_digest(DiskSize(bytes.len() as u64), top)
}

fn before(bytes: &[u8]) -> TreeBefore {
    let levels = tree(bytes);
    let nodes = move |level: u8, range: Range<u64>| {
        let of = |i| levels.get(usize::from(level)).and_then(|l| l.get(i as usize)).copied().unwrap_or(Digest::ZERO);
        Ok(range.map(of).collect())
    };
    TreeBefore { nodes: Box::new(nodes), size: DiskSize(bytes.len() as u64) }
}

/// Bytes in memory, which may be longer than the disk in them.
struct Memory {
    bytes: Mutex<Vec<u8>>,
    /// What was written: first byte, length, whether it was zeroed.
    writes: Mutex<Vec<(u64, u64, bool)>>,
    /// A write to this block fails.
    bad_block: Option<u64>,
}

impl Image for Memory {
    fn size(&self) -> DiskSize {
        DiskSize(self.bytes.lock().unwrap().len() as u64)
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        Ok(vec![Extent::new(range.start, range.end, Content::Data)])
    }

    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<()> {
        buf.copy_from_slice(&self.bytes.lock().unwrap()[offset_bytes as usize..][..buf.len()]);
        Ok(())
    }
}

impl ImageMut for Memory {
    fn write_at(&self, offset_bytes: u64, data: &[u8]) -> Result<()> {
        if self.bad_block.is_some_and(|bad| bad * B as u64 == offset_bytes) {
            return Err(Error::new(Kind::Io, "bad sector").offset(offset_bytes));
        }
        self.bytes.lock().unwrap()[offset_bytes as usize..][..data.len()].copy_from_slice(data);
        self.writes.lock().unwrap().push((offset_bytes, data.len() as u64, false));
        Ok(())
    }

    fn zero(&self, range: ByteRange) -> Result<()> {
        self.bytes.lock().unwrap()[range.start as usize..range.end as usize].fill(0);
        self.writes.lock().unwrap().push((range.start, range.len(), true));
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

/// An image, and what the applier told of it.
struct Place {
    memory: Memory,
    was: Vec<u8>,
    size: DiskSize,
    rotten: Vec<u64>,
    /// Blocks that were about to change, with their content at that moment.
    offered: RefCell<Vec<(u64, Vec<u8>)>>,
    room: usize,
    is_kept_as_patch: bool,
}

impl Place {
    /// Of this content, in an image of `image_len` bytes whose end holds rubbish.
    fn new(was: &str, size: usize, image_len: usize) -> Place {
        let was = disk(was);
        let mut bytes = was.clone();
        bytes.resize(image_len.max(size), b'#');
        Place {
            memory: Memory { bytes: Mutex::new(bytes), writes: Mutex::default(), bad_block: None },
            was,
            size: DiskSize(size as u64),
            rotten: Vec::new(),
            offered: RefCell::default(),
            room: usize::MAX,
            is_kept_as_patch: false,
        }
    }

    fn content(&self) -> Vec<u8> {
        self.memory.bytes.lock().unwrap().clone()
    }

    fn writes(&self) -> Vec<(u64, u64, bool)> {
        self.memory.writes.lock().unwrap().clone()
    }

    fn applier(&self) -> Applier {
        Applier::new(Some(before(&self.was)), self.size, None).unwrap()
    }
}

impl PatchedImage for Place {
    fn image(&self) -> Result<Option<&dyn ImageMut>> {
        Ok((!self.is_kept_as_patch).then_some(&self.memory as &dyn ImageMut))
    }

    fn block_before(&self, block: BlockIndex) -> Result<Vec<u8>> {
        let mut bytes = self.was.get(block.offset() as usize..).unwrap_or_default().to_vec();
        bytes.resize(block.bytes(self.size).len() as usize, 0);
        Ok(bytes)
    }

    fn before_change(&mut self, block: BlockIndex, change: Change) -> Result<()> {
        if change == Change::Data {
            self.room = self.room.checked_sub(1).ok_or_else(|| Error::new(Kind::Space, "no room"))?;
        }
        let range = block.bytes(self.memory.size());
        let now = self.content()[range.start as usize..range.end as usize].to_vec();
        self.offered.borrow_mut().push((block.0, now));
        Ok(())
    }

    fn rotten(&self, blocks: Range<u64>) -> Vec<u64> {
        self.rotten.iter().copied().filter(|b| blocks.contains(b)).collect()
    }

    fn blame(&self, block: BlockIndex, _: Error) -> Error {
        Error::new(Kind::Corrupt, format!("block {} was bad before", block.0))
    }
}

fn data(block: u64, bytes: &[u8]) -> Item {
    Item::Data { block: BlockIndex(block), digest: block_digest(bytes), bytes: bytes.to_vec() }
}

fn whole(block: u64, letter: char) -> Item {
    data(block, &disk(&letter.to_string()))
}

fn zero(first: u64, count: u64) -> Item {
    Item::Zero { first: BlockIndex(first), count }
}

fn to(bytes: &[u8]) -> Trailer {
    Trailer { records: 0, to_root: root(bytes) }
}

#[test]
fn what_did_not_change_is_neither_written_nor_counted() {
    for (was, items, becomes, changed) in [
        ("abc", vec![whole(1, 'x')], "axc", 1),
        // Said again, and superfluous.
        ("abc", vec![whole(0, 'a'), whole(1, 'b'), zero(2, 1)], "ab.", 1),
        ("....", vec![zero(0, 4)], "....", 0),
        ("ab.c", vec![zero(0, 3)], "...c", 2),
        ("", vec![], "", 0),
    ] {
        let mut place = Place::new(was, was.len() * B, was.len() * B);
        let mut applier = place.applier();
        for item in items {
            applier.take(item, &mut place).unwrap();
        }
        let applied = applier.finish(&to(&disk(becomes))).unwrap();
        assert_eq!(applied.disk.blocks_changed, changed, "{was}");
        assert_eq!(applied.disk.root, root(&disk(becomes)), "{was}");
        assert!(place.content() == disk(becomes), "{was}");
        let blocks: u64 = place.writes().iter().map(|(_, len, _)| len / B as u64).sum();
        assert_eq!(blocks, changed, "{was}: {:?}", place.writes());
    }
}

#[test]
fn a_wrong_digest_writes_nothing() {
    let mut place = Place::new("ab", 2 * B, 2 * B);
    let mut applier = place.applier();
    let lie = Item::Data { block: BlockIndex(1), digest: Digest([7; 32]), bytes: disk("x") };
    let e = applier.take(lie, &mut place).unwrap_err();
    assert_eq!(e.kind(), Kind::Corrupt);
    assert!(place.writes().is_empty() && place.offered.borrow().is_empty());
}

#[test]
fn a_patch_that_leads_elsewhere_is_refused_whatever_was_written() {
    let mut place = Place::new("ab", 2 * B, 2 * B);
    let mut applier = place.applier();
    applier.take(whole(0, 'x'), &mut place).unwrap();
    let e = applier.finish(&to(&disk("xy"))).unwrap_err();
    assert_eq!(e.kind(), Kind::Corrupt, "{e}");
}

#[test]
fn the_last_block_is_padded_to_its_sector_and_no_further() {
    // The image ends with a sector: what lies behind the disk in it becomes zero.
    let size = B + 5;
    let mut place = Place::new("a5", size, B + 512);
    let mut applier = place.applier();
    applier.take(data(1, b"yyyyy"), &mut place).unwrap();
    assert_eq!(place.writes(), [(B as u64, 512, false)]);
    assert_eq!(place.content()[B..B + 5], *b"yyyyy");
    assert!(place.content()[B + 5..].iter().all(|b| *b == 0), "rubbish behind the disk would come back when it grows");

    // Zeroing takes the same bytes.
    let mut place = Place::new("a5", size, B + 512);
    let mut applier = place.applier();
    applier.take(zero(1, 1), &mut place).unwrap();
    assert_eq!(place.writes(), [(B as u64, 512, true)]);

    // An image that ends where the disk does, and a device that is larger: nothing behind the disk is touched.
    for image_len in [size, 3 * B] {
        let mut place = Place::new("a5", size, image_len);
        let mut applier = place.applier();
        applier.take(data(1, b"yyyyy"), &mut place).unwrap();
        assert_eq!(place.writes(), [(B as u64, 5, false)], "{image_len}");
        assert!(place.content()[size..].iter().all(|b| *b == b'#'), "{image_len}");
    }
}

#[test]
fn a_rotten_block_is_written_though_it_did_not_change() {
    let mut place = Place::new("abc.", 4 * B, 4 * B);
    place.rotten = vec![1, 3, 3];
    let mut applier = place.applier();
    for item in [whole(0, 'a'), whole(1, 'b'), whole(2, 'c'), zero(3, 1)] {
        applier.take(item, &mut place).unwrap();
    }
    let b = B as u64;
    assert_eq!(place.writes(), [(b, b, false), (3 * b, b, true)]);
    assert_eq!(applier.finish(&to(&disk("abc."))).unwrap().disk.blocks_changed, 2);
}

#[test]
fn the_old_content_is_offered_before_it_is_gone() {
    let mut place = Place::new("abcd", 4 * B, 4 * B);
    let mut applier = place.applier();
    for item in [whole(0, 'x'), zero(1, 3)] {
        applier.take(item, &mut place).unwrap();
    }
    let offered = place.offered.borrow().clone();
    let old: Vec<(u64, u8)> = offered.iter().map(|(block, bytes)| (*block, bytes[0])).collect();
    assert_eq!(old, [(0, b'a'), (1, b'b'), (2, b'c'), (3, b'd')]);
}

#[test]
fn no_room_ends_the_patch_before_the_write() {
    let mut place = Place::new("abc", 3 * B, 3 * B);
    place.room = 1;
    let mut applier = place.applier();
    applier.take(whole(0, 'x'), &mut place).unwrap();
    assert_eq!(applier.take(whole(1, 'y'), &mut place).unwrap_err().kind(), Kind::Space);
    assert!(place.content() == disk("xbc"));
    assert_eq!(applier.written(), (B as u64, 1));
}

#[test]
fn a_failing_write_is_not_counted() {
    let mut place = Place::new("abc", 3 * B, 3 * B);
    place.memory.bad_block = Some(1);
    let mut applier = place.applier();
    assert_eq!(applier.take(whole(1, 'y'), &mut place).unwrap_err().kind(), Kind::Io);
    assert_eq!(applier.written(), (0, 0));
}

#[test]
fn pieces_are_laid_over_the_block_as_it_was() {
    let mut place = Place::new("ab", 2 * B, 2 * B);
    let mut becomes = disk("ab");
    becomes[B + PIECE_LEN..B + 2 * PIECE_LEN].fill(b'p');
    let pieces =
        |digest| Item::Pieces { block: BlockIndex(1), digest, mask: PieceMask(0b10), bytes: vec![b'p'; PIECE_LEN] };
    // The block itself is to blame: its owner says so.
    let e = place.applier().take(pieces(Digest([7; 32])), &mut place).unwrap_err();
    assert!(e.to_string().contains("was bad before"), "{e}");
    assert!(place.writes().is_empty());
    let mut applier = place.applier();
    applier.take(pieces(block_digest(&becomes[B..])), &mut place).unwrap();
    assert!(place.content() == becomes);
    applier.finish(&to(&becomes)).unwrap();
}

#[test]
fn a_patch_that_is_kept_is_counted_and_written_nowhere() {
    let mut place = Place::new("ab", 2 * B, 2 * B);
    place.is_kept_as_patch = true;
    let mut applier = place.applier();
    applier.take(whole(0, 'x'), &mut place).unwrap();
    applier.take(zero(1, 1), &mut place).unwrap();
    assert!(place.writes().is_empty());
    assert_eq!(applier.finish(&to(&disk("x."))).unwrap().disk.blocks_changed, 2);
}

#[test]
fn a_patch_from_nothing_and_one_that_grows_the_disk() {
    let mut place = Place::new("", 3 * B, 3 * B);
    let mut applier = Applier::new(None, place.size, None).unwrap();
    applier.take(whole(0, 'a'), &mut place).unwrap();
    applier.take(zero(1, 1), &mut place).unwrap();
    applier.take(whole(2, 'c'), &mut place).unwrap();
    // Zeros of a new disk are not written: whoever made its image made it empty.
    assert_eq!(place.writes().len(), 2);
    applier.finish(&to(&disk("a.c"))).unwrap();

    let mut place = Place::new("ab", 3 * B, 3 * B);
    let mut applier = place.applier();
    applier.take(whole(2, 'c'), &mut place).unwrap();
    applier.finish(&to(&disk("abc"))).unwrap();
    assert!(place.content() == disk("abc"));
}

/// Zeroing a huge disk hands out its blocks in steps: runs are joined within a step, and none is left out between two.
#[test]
fn zeros_over_many_steps_miss_no_block() {
    let blocks = 2 * ZERO_STEP + 3;
    let levels = |level: u8, range: Range<u64>| {
        // All blocks alike, and not zero.
        Ok(range.map(|_| Digest([level + 1; 32])).collect::<Vec<_>>())
    };
    struct Counter(u64);
    impl PatchedImage for Counter {
        fn image(&self) -> Result<Option<&dyn ImageMut>> {
            Ok(None)
        }
        fn block_before(&self, _: BlockIndex) -> Result<Vec<u8>> {
            unreachable!("no pieces come")
        }
        fn before_change(&mut self, block: BlockIndex, change: Change) -> Result<()> {
            assert_eq!((block.0, change), (self.0 + 1, Change::Zero), "one after the other");
            self.0 += 1;
            Ok(())
        }
    }
    let size = DiskSize((blocks + 1) * B as u64);
    let mut applier = Applier::new(Some(TreeBefore { nodes: Box::new(levels), size }), size, None).unwrap();
    let mut counter = Counter(0);
    applier.take(zero(1, blocks), &mut counter).unwrap();
    assert_eq!((counter.0, applier.written().1), (blocks, blocks));
}
