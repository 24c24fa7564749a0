//! Huge disks that hold little: what a shipment costs.

use super::*;

/// A huge disk that holds a few blocks, image and head alike.
struct Sparse {
    size: u64,
    blocks: BTreeMap<u64, Vec<u8>>,
}

impl Sparse {
    fn node(&self, level: u8, index: u64) -> Digest {
        let span = (FANOUT as u64).pow(level.into());
        if self.blocks.range(index * span..(index + 1) * span).next().is_none() {
            return Digest::ZERO;
        }
        if level == 0 {
            return block_digest(&self.blocks[&index]);
        }
        let first = index * FANOUT as u64;
        let children: Vec<Digest> = (first..first + FANOUT as u64).map(|i| self.node(level - 1, i)).collect();
        node_digest(&children)
    }

    fn root(&self) -> Digest {
        let size = DiskSize(self.size);
        root_digest(size, self.node(TreeShape::new(size).top(), 0))
    }
}

impl Image for Sparse {
    fn size(&self) -> DiskSize {
        DiskSize(self.size)
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        assert!(
            range.len() <= 4 << 30,
            "allocation is asked for inside marked ranges only, not over {} bytes",
            range.len()
        );
        let blocks = range.start / B as u64..range.end.div_ceil(B as u64);
        Ok(merge(blocks.map(|b| {
            let bytes = BlockIndex(b).bytes(self.size()).intersect(range).unwrap();
            Extent { range: bytes, content: if self.blocks.contains_key(&b) { Content::Data } else { Content::Zero } }
        })))
    }

    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<()> {
        for (at, chunk) in buf.chunks_mut(B).enumerate() {
            chunk.copy_from_slice(&self.blocks[&(offset_bytes / B as u64 + at as u64)]);
        }
        Ok(())
    }
}

/// Answers for the head, counts what is asked, and keeps the root it is told.
struct SparseHead {
    head: Sparse,
    asked: AtomicU64,
    decoder: Mutex<Decoder>,
}

impl DiskTarget for SparseHead {
    fn nodes(&self, _: &DiskName, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        assert!(range.end - range.start <= NODES_MAX);
        self.asked.fetch_add(1, Ordering::Relaxed);
        Ok(range.map(|i| self.head.node(level, i)).collect())
    }
    fn pieces(&self, _: &DiskName, blocks: &[BlockIndex]) -> Result<Vec<BlockPieces>> {
        check_blocks(blocks)?;
        let of = |block: &BlockIndex| self.head.blocks.get(&block.0).map_or(&[][..], |bytes| bytes);
        Ok(blocks.iter().map(of).map(piece_digests).collect())
    }
    fn apply(&self, _: &DiskName, patch_bytes: &[u8]) -> Result<()> {
        let mut decoder = self.decoder.lock().unwrap();
        decoder.push(patch_bytes);
        while decoder.next_item()?.is_some() {}
        Ok(())
    }
    fn finish_disk(&self, _: &DiskName) -> Result<DiskApplied> {
        let root = self.decoder.lock().unwrap().finish()?.to_root;
        Ok(DiskApplied { root, bytes_written: 0, blocks_changed: 0 })
    }
}

#[test]
fn the_cost_follows_the_changes_and_not_the_size() {
    const TIB: u64 = 1 << 40;
    let size = 8 * TIB;
    let at = |terabyte: u64, block: u64| terabyte * (TIB / B as u64) + block;
    let old: BTreeMap<u64, Vec<u8>> =
        [at(0, 0), at(1, 5), at(3, 77), at(3, 78), at(7, 9)].map(|b| (b, pattern(B, b as u8))).into();
    let mut new = old.clone();
    new.insert(at(3, 77), pattern(B, 99));
    new.insert(at(5, 1), pattern(B, 98));
    new.remove(&at(7, 9));
    let dirty: Vec<ByteRange> = [at(3, 77), at(5, 1), at(7, 9)].map(|b| BlockIndex(b).bytes(DiskSize(size))).into();
    let head = Sparse { size, blocks: old };
    let shipment = Shipment {
        size: DiskSize(size),
        head: Some((DiskSize(size), head.root())),
        mode: Mode::Bitmap,
        dirty: Some(dirty),
        ..shipment(0, None)
    };
    let replica =
        SparseHead { head, asked: AtomicU64::new(0), decoder: Mutex::new(Decoder::new(Limits::default()).unwrap()) };
    let image = Sparse { size, blocks: new };
    let shipped = ship(&image, &replica, &shipment, &Progress::default(), &always).unwrap();
    assert_eq!(shipped.root, image.root());
    assert_eq!(shipped.stats.bytes_read, 2 * B as u64, "one block changed, one new; the removed one is a hole");
    assert!(replica.asked.load(Ordering::Relaxed) <= 1 + 3 + 2, "requests: {:?}", replica.asked);
}

#[test]
fn inside_a_rewritten_block_only_the_pieces_that_differ_travel() {
    // What zstd cannot shrink, so that bytes on the wire can be counted.
    let mut old = vec![0; 200 * B];
    blake3::Hasher::new().finalize_xof().fill(&mut old);
    let mut new = old.clone();
    for block in [0, 7, 64, 199] {
        new[block * B + 5 * PIECE_LEN + 9] ^= 1;
    }
    let disk = Disk::new(new.clone());
    let replica = Memory::new(&old, new.len(), Fault::None);
    let shipment = shipment(new.len(), Some(&old));
    let shipped = ship(&disk, &replica, &shipment, &Progress::default(), &always).unwrap();
    assert!(*replica.new.lock().unwrap() == new);
    let pieces = 4 * PIECE_LEN as u64;
    let sent = shipped.stats.bytes_sent;
    assert!(sent > pieces && sent < pieces + pieces / 10, "{sent} bytes sent for {pieces} bytes of changed pieces");
}

#[test]
fn a_group_that_was_written_as_a_whole_is_sent_without_asking() {
    let old = pattern(64 * B, 1);
    let new = pattern(64 * B, 2);
    let replica = Memory::new(&old, new.len(), Fault::NoPieces);
    ship(&Disk::new(new.clone()), &replica, &shipment(new.len(), Some(&old)), &Progress::default(), &always).unwrap();
    assert!(*replica.new.lock().unwrap() == new);
}
