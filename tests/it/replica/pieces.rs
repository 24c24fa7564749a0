//! Pieces of blocks: what the store tells of the head's, and what it makes of those that come.
//!
//! Kept here: the answer is of the head and of nothing newer, on disks of every awkward size and over any number of
//! points; pieces laid over the head's block either make the block that the patch promises or condemn the point (I12).

use super::support::*;
use virt_replica::block::digest::{BLOCK_PIECES, BlockPieces, PieceDigest, block_digest, piece_digests};
use virt_replica::block::extent::is_zero;
use virt_replica::block::{BLOCK_LEN, BlockIndex, PIECE_LEN};
use virt_replica::engine::disk_target::{DiskApplied, DiskTarget as _, PIECES_MAX};
use virt_replica::error::Kind;
use virt_replica::name::DiskName;
use virt_replica::patch::PieceMask;
use virt_replica::replica::store::Store;
use virt_replica::replica::{PointView, Replica};

const MIB: usize = 1 << 20;
const NO_PIECES: BlockPieces = [PieceDigest::ZERO; BLOCK_PIECES];

fn vda() -> DiskName {
    DiskName::new("vda").unwrap()
}

fn indices(blocks: impl IntoIterator<Item = usize>) -> Vec<BlockIndex> {
    blocks.into_iter().map(|n| BlockIndex(n as u64)).collect()
}

/// The block of a disk, empty beyond its end.
fn block(disk: &[u8], n: usize) -> &[u8] {
    disk.chunks(BLOCK_LEN).nth(n).unwrap_or_default()
}

/// The replica says of every block, and of some beyond the end, what the model says.
fn assert_pieces(store: &Store, model: &[u8]) {
    let blocks: Vec<usize> = (0..model.len().div_ceil(BLOCK_LEN) + 3).collect();
    for some in blocks.chunks(PIECES_MAX) {
        let expected: Vec<_> = some.iter().map(|n| piece_digests(block(model, *n))).collect();
        assert!(store.pieces(&vda(), &indices(some.iter().copied())).unwrap() == expected, "{some:?}");
    }
}

fn begin_above(store: &Store, run: u64, head: &PointView, size: usize) {
    store.begin(&begin(run, Some(head.id.clone()), &[("vda", size, false)])).unwrap();
}

/// The patch as a source makes it that holds only the new content: it asks for the pieces of every block that differs,
/// and sends those that differ of them. Returns how many it sent.
fn patch_by_pieces(store: &Store, old: &[u8], new: &[u8]) -> (Vec<u8>, u32) {
    let mut sent = 0;
    let patch = patch_of("vda", Some(old), new, |n, bytes, out, encoder| {
        let (index, digest) = (BlockIndex(n as u64), block_digest(bytes));
        if digest == block_digest(block(old, n)) {
            return;
        }
        let head = store.pieces(&vda(), &[index]).unwrap();
        let mask = PieceMask::differing_digests(&head[0], &piece_digests(bytes), bytes.len());
        if mask.is_empty() || is_zero(bytes) {
            encoder.data(index, digest, bytes, out);
        } else {
            encoder.pieces(index, digest, mask, bytes, out);
            sent += mask.count();
        }
    });
    (patch, sent)
}

/// A whole run by pieces; the pieces told do not change while they are applied.
fn sync_by_pieces(store: &Store, run: u64, head: &PointView, old: &[u8], new: &[u8]) -> (PointView, DiskApplied, u32) {
    begin_above(store, run, head, new.len());
    let (patch, sent) = patch_by_pieces(store, old, new);
    store.apply(&vda(), &patch).unwrap();
    assert_pieces(store, old);
    let applied = store.finish_disk(&vda()).unwrap();
    assert_eq!(applied.root, root(new));
    (store.seal(&seal(&[("vda", new)])).unwrap(), applied, sent)
}

#[test]
fn pieces_are_of_the_head_whatever_was_applied_since() {
    let lab = Lab::new();
    let store = lab.store();
    let size = 40 * BLOCK_LEN + PIECE_LEN + 700;
    let one = content(size, &[(0, 3), (9, 1), (38, 3)]);
    let first = sync(&store, 1, None, &[("vda", None, &one)]);
    let mut two = one.clone();
    two[9 * BLOCK_LEN..10 * BLOCK_LEN].fill(0);
    two[20 * BLOCK_LEN + 5] = 5;
    let second = sync(&store, 2, Some(&first), &[("vda", Some(&one), &two)]);

    begin_above(&store, 3, &second, size);
    assert_pieces(&store, &two);
    let three = content(size, &[(0, 41)]);
    let patch = patch("vda", Some(&two), &three, false);
    for part in patch.chunks(patch.len() / 3) {
        store.apply(&vda(), part).unwrap();
        assert_pieces(&store, &two);
    }
    store.finish_disk(&vda()).unwrap();
    assert_pieces(&store, &two);
    let third = store.seal(&seal(&[("vda", &three)])).unwrap();
    begin_above(&store, 4, &third, size);
    assert_pieces(&store, &three);
}

/// Several threads ask while another one applies.
#[test]
fn pieces_are_told_while_a_patch_is_applied() {
    let lab = Lab::new();
    let store = lab.store();
    let (old, new) = (content(16 * MIB, &[(0, 250)]), content(16 * MIB, &[(1, 255)]));
    let first = sync(&store, 1, None, &[("vda", None, &old)]);
    begin_above(&store, 2, &first, old.len());
    // Block n has the content of block n + 1, so that nothing of it is the head's.
    let mut new = new[BLOCK_LEN..].to_vec();
    new.resize(old.len(), 0);
    let patch = patch("vda", Some(&old), &new, false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| (0..3).for_each(|_| assert_pieces(&store, &old)));
        }
        patch.chunks(100_000).for_each(|part| store.apply(&vda(), part).unwrap());
    });
    assert_eq!(store.finish_disk(&vda()).unwrap().root, root(&new));
}

#[test]
fn a_state_that_has_no_such_block_has_pieces_of_zeros() {
    let lab = Lab::new();
    let store = lab.store();
    let disk = content(MIB, &[(0, 16)]);
    let every: Vec<BlockIndex> = indices(0..16).into_iter().chain([1 << 20, u64::MAX].map(BlockIndex)).collect();
    store.begin(&begin(1, None, &[("vda", MIB, false)])).unwrap();
    assert_eq!(store.pieces(&vda(), &every).unwrap(), [NO_PIECES; 18], "a first run");
    send(&store, "vda", None, &disk);
    let first = store.seal(&seal(&[("vda", &disk)])).unwrap();

    store.begin(&begin(2, Some(first.id.clone()), &[("vda", MIB, true), ("vdb", MIB, false)])).unwrap();
    assert_eq!(store.pieces(&vda(), &every).unwrap(), [NO_PIECES; 18], "begun afresh");
    assert_eq!(store.pieces(&DiskName::new("vdb").unwrap(), &every).unwrap(), [NO_PIECES; 18], "new in this point");
    begin_above(&store, 3, &first, 2 * MIB);
    let told = store.pieces(&vda(), &every).unwrap();
    assert!(told[..16].iter().all(|pieces| *pieces != NO_PIECES) && told[16..] == [NO_PIECES; 2]);
}

#[test]
fn what_may_not_be_asked_is_refused_and_costs_the_open_point_nothing() {
    let lab = Lab::new();
    let store = lab.store();
    let disk = content(MIB, &[(0, 3)]);
    let first = sync(&store, 1, None, &[("vda", None, &disk)]);
    let refused = |disk: &DiskName, blocks: &[BlockIndex]| store.pieces(disk, blocks).unwrap_err().kind();
    assert_eq!(refused(&vda(), &indices([0])), Kind::Usage, "nothing keeps the head in place");
    begin_above(&store, 2, &first, MIB);
    assert_eq!(refused(&vda(), &indices(0..PIECES_MAX + 1)), Kind::Usage);
    assert_eq!(refused(&vda(), &indices([3, 3])), Kind::Usage);
    assert_eq!(refused(&vda(), &indices([3, 2])), Kind::Usage);
    assert_eq!(refused(&DiskName::new("vdb").unwrap(), &indices([0])), Kind::Usage);
    assert_eq!(store.pieces(&vda(), &indices(0..PIECES_MAX)).unwrap().len(), PIECES_MAX);
    assert!(store.pieces(&vda(), &[]).unwrap().is_empty());
    send(&store, "vda", Some(&disk), &disk);
    store.seal(&seal(&[("vda", &disk)])).unwrap();
}

#[test]
fn only_what_differs_is_sent_and_the_rest_of_the_block_is_filled_up() {
    let lab = Lab::new();
    let store = lab.store();
    // Ends with a piece of 700 bytes in a block of two pieces.
    let size = 40 * BLOCK_LEN + PIECE_LEN + 700;
    let one = content(size, &[(0, 3), (38, 3)]);
    let first = sync(&store, 1, None, &[("vda", None, &one)]);

    let mut two = one.clone();
    two[BLOCK_LEN + 5] ^= 1; // one byte: one piece
    two[2 * BLOCK_LEN + PIECE_LEN - 1..][..2].fill(7); // across a border: two
    two[10 * BLOCK_LEN + 3 * PIECE_LEN..][..PIECE_LEN].fill(9); // over a zero block: one
    two[39 * BLOCK_LEN + 8 * PIECE_LEN..][..2 * PIECE_LEN].fill(0); // half of it to zeros: two
    *two.last_mut().unwrap() ^= 1; // the short piece of the short block: one
    let (second, applied, sent) = sync_by_pieces(&store, 2, &first, &one, &two);
    assert_eq!((sent, applied.blocks_changed), (7, 5));
    assert_image(&second.disks[0].image, &two);

    // Once more over the same blocks: now they lie in the second point's image, or are zero in it.
    let mut three = two.clone();
    three[BLOCK_LEN + 5] ^= 2;
    three[BLOCK_LEN + 9 * PIECE_LEN] ^= 2;
    three[10 * BLOCK_LEN..11 * BLOCK_LEN].fill(0);
    *three.last_mut().unwrap() ^= 2;
    let (third, _, sent) = sync_by_pieces(&store, 3, &second, &two, &three);
    assert_eq!(sent, 3);
    let mut four = three.clone();
    four[10 * BLOCK_LEN + 15 * PIECE_LEN] = 1;
    let (fourth, _, sent) = sync_by_pieces(&store, 4, &third, &three, &four);
    assert_eq!(sent, 1, "over a block that a point made zero");
    for (point, disk) in [(&first, &one), (&second, &two), (&third, &three), (&fourth, &four)] {
        assert_image(&point.disks[0].image, disk);
        assert!(store.verify(&point.id, &mut |_, _| {}).unwrap().is_whole());
    }
}

/// The last block of the head has another length than the same block of the new point.
#[test]
fn a_resized_disk_is_filled_up_with_zeros_and_cut_off() {
    let long = content(20 * BLOCK_LEN + 5 * PIECE_LEN + 12, &[(0, 21)]);
    let (inside, at_piece) = (20 * BLOCK_LEN + PIECE_LEN + 100, 20 * BLOCK_LEN + 2 * PIECE_LEN);
    for short_len in [inside, at_piece, 20 * BLOCK_LEN, 19 * BLOCK_LEN + 1, 512] {
        let lab = Lab::new();
        let store = lab.store();
        let short = long[..short_len].to_vec();
        let first = sync(&store, 1, None, &[("vda", None, &long)]);
        let (second, _, _) = sync_by_pieces(&store, 2, &first, &long, &short);
        assert_image(&second.disks[0].image, &short.iter().copied().chain(padding(short_len)).collect::<Vec<_>>());
        // What was cut off is not what comes back.
        let mut again = short.clone();
        again.resize(long.len(), 0);
        again[long.len() - 1] = 1;
        let (third, _, _) = sync_by_pieces(&store, 3, &second, &short, &again);
        assert_image(&third.disks[0].image, &again.iter().copied().chain(padding(again.len())).collect::<Vec<_>>());
        let (fourth, _, _) = sync_by_pieces(&store, 4, &third, &again, &long);
        assert!(store.verify(&fourth.id, &mut |_, _| {}).unwrap().is_whole());
        assert_nodes(&store, "vda", &long);
    }
}

/// What an image has beyond the disk, up to the next sector.
fn padding(len: usize) -> impl Iterator<Item = u8> {
    std::iter::repeat_n(0, len.next_multiple_of(512) - len)
}

#[test]
fn random_histories_by_pieces_keep_every_point() {
    let seed = seed();
    println!("REPLICA_SEED={seed}");
    let mut rng = Rng(seed);
    for _ in 0..4 {
        let lab = Lab::new();
        let store = lab.store();
        let mut disk = content(2 * MIB + rng.below(3 * MIB as u64) as usize, &[(0, 30)]);
        let mut head = sync(&store, 1, None, &[("vda", None, &disk)]);
        let mut history = vec![(head.clone(), disk.clone())];
        for run in 2..9 {
            let old = disk.clone();
            if rng.below(3) == 0 {
                disk.resize(1 + rng.below(5 * MIB as u64) as usize, 0);
            }
            scribble(&mut rng, &mut disk);
            head = sync_by_pieces(&store, run, &head, &old, &disk).0;
            history.push((head.clone(), disk.clone()));
        }
        for (point, disk) in &history {
            assert!(store.verify(&point.id, &mut |_, _| {}).unwrap().is_whole(), "{}", point.id);
            assert_eq!(point.disks[0].root, root(disk));
        }
    }
}

/// The source built its pieces on a content that the head never had. Whichever piece is missing, the block is refused
/// by number, the point is condemned, nothing is sealed, and the next run starts from the head as it was.
#[test]
fn pieces_over_a_content_that_the_head_does_not_have_seal_nothing() {
    let lab = Lab::new();
    let store = lab.store();
    let disk = content(MIB, &[(0, 3), (8, 1)]);
    let first = sync(&store, 1, None, &[("vda", None, &disk)]);
    // Of block 2; of a zero block; of the last block.
    for (run, n) in (2..).zip([2, 5, 15]) {
        let mut new = disk.clone();
        new[n * BLOCK_LEN..(n + 1) * BLOCK_LEN].fill(0x77);
        let too_few = patch_of("vda", Some(&disk), &new, |m, bytes, out, encoder| {
            if m == n {
                let mask = PieceMask(PieceMask::all(BLOCK_LEN).0 & !(1 << 7));
                encoder.pieces(BlockIndex(m as u64), block_digest(bytes), mask, bytes, out);
            }
        });
        begin_above(&store, run, &first, MIB);
        let e = store.apply(&vda(), &too_few).unwrap_err();
        assert_eq!(e.kind(), Kind::Corrupt);
        assert!(e.to_string().contains(&format!("block {n} does not have the digest that the patch promises")), "{e}");
        assert_eq!(e.context().offset_bytes, Some((n * BLOCK_LEN) as u64));
        assert_eq!(e.context().disk.as_deref(), Some("vda"));
        for later in [
            store.pieces(&vda(), &indices([0])).unwrap_err(),
            store.finish_disk(&vda()).unwrap_err(),
            store.seal(&seal(&[("vda", &new)])).unwrap_err(),
        ] {
            assert_eq!(later.to_string(), e.to_string());
        }
        store.abandon().unwrap();
        assert_eq!(store.describe().unwrap().head(), Some(&first));
    }
    assert_image(&first.disks[0].image, &disk);
    let mut new = disk.clone();
    new[2 * BLOCK_LEN] ^= 1;
    sync_by_pieces(&store, 9, &first, &disk, &new);
}

/// Rot in the head's image under a block that changes is told like any other content, so that it is replaced.
#[test]
fn a_rotten_piece_under_a_changed_block_is_sent_anew() {
    let lab = Lab::new();
    let store = lab.store();
    let disk = content(MIB, &[(0, 3)]);
    let first = sync(&store, 1, None, &[("vda", None, &disk)]);
    let image = &first.disks[0].image;
    flip(image, find(image, &disk[BLOCK_LEN + 2 * PIECE_LEN..][..PIECE_LEN]));
    let mut new = disk.clone();
    new[BLOCK_LEN + 5] ^= 1;
    begin_above(&store, 2, &first, MIB);
    let (patch, sent) = patch_by_pieces(&store, &disk, &new);
    assert_eq!(sent, 2, "the changed piece and the rotten one");
    store.apply(&vda(), &patch).unwrap();
    store.finish_disk(&vda()).unwrap();
    let second = store.seal(&seal(&[("vda", &new)])).unwrap();
    assert_image(&second.disks[0].image, &new);
    assert!(store.verify(&second.id, &mut |_, _| {}).unwrap().is_whole());
    assert_eq!(store.verify(&first.id, &mut |_, _| {}).unwrap().disks[0].damaged, [1]);
}
