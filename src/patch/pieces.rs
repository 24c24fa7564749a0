//! Which 4 KiB pieces of a block travel.

use crate::block::digest::BlockPieces;
use crate::block::{BLOCK_LEN, PIECE_LEN};

/// A set of pieces of one block: bit n is the piece that begins n x 4 KiB into the block. The last piece of a short
/// block is short itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct PieceMask(pub u16);

const _: () = assert!(BLOCK_LEN / PIECE_LEN == u16::BITS as usize);

impl PieceMask {
    /// All pieces of a block of `block_len` bytes.
    pub fn all(block_len: usize) -> Self {
        let pieces = block_len.div_ceil(PIECE_LEN);
        assert!(pieces <= u16::BITS as usize, "a block has at most {BLOCK_LEN} bytes");
        // In 32 bits, because all sixteen bits cannot be made by shifting sixteen.
        Self(((1u32 << pieces) - 1) as u16)
    }

    /// The pieces in which two versions of a block, of equal length, differ.
    pub fn differing(old: &[u8], new: &[u8]) -> Self {
        assert_eq!(old.len(), new.len(), "two versions of a block have one length");
        let pairs = old.chunks(PIECE_LEN).zip(new.chunks(PIECE_LEN));
        Self(pairs.enumerate().fold(0, |mask, (n, (a, b))| if a == b { mask } else { mask | 1 << n }))
    }

    /// The pieces of a block of `block_len` bytes whose digests differ from those of its old version, which may have
    /// been longer or shorter: the disk may have been resized. Empty where only the digest of the block itself differs,
    /// and no piece can say why; then the whole block has to travel.
    pub fn differing_digests(old: &BlockPieces, new: &BlockPieces, block_len: usize) -> Self {
        let mask =
            old.iter().zip(new).enumerate().fold(0, |mask, (n, (a, b))| if a == b { mask } else { mask | 1 << n });
        // What was behind a new end is gone without being sent.
        Self(mask & Self::all(block_len).0)
    }

    /// The same set and this piece, numbered from 0 to 15.
    pub fn with(self, piece: usize) -> Self {
        Self(self.0 | 1 << piece)
    }

    /// True if the set has this piece, numbered from 0 to 15.
    pub fn contains(self, piece: usize) -> bool {
        self.0 & (1 << piece) != 0
    }

    /// True if the set has no piece.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Number of pieces in the set, from 0 to 16.
    pub fn count(self) -> u32 {
        self.0.count_ones()
    }

    /// Whether every piece of the set begins within a block of `block_len` bytes.
    pub fn fits(self, block_len: usize) -> bool {
        self.0 & !Self::all(block_len).0 == 0
    }

    /// Bytes of the set's pieces in a block of `block_len` bytes.
    pub fn bytes_len(self, block_len: usize) -> usize {
        self.ranges(block_len).map(|r| r.len()).sum()
    }

    /// Where the set's pieces lie in a block of `block_len` bytes, in order.
    pub fn ranges(self, block_len: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
        let range = move |n: usize| n * PIECE_LEN..((n + 1) * PIECE_LEN).min(block_len);
        (0..u16::BITS as usize).filter(move |&n| self.contains(n)).map(range).take_while(|r| r.start < r.end)
    }

    /// Appends the set's pieces of `block` to `out`.
    pub fn gather(self, block: &[u8], out: &mut Vec<u8>) {
        self.ranges(block.len()).for_each(|range| out.extend_from_slice(&block[range]));
    }

    /// Puts pieces that were gathered back into their places in `block`.
    ///
    /// # Panics
    /// If `pieces` is not exactly as long as the set's pieces of a block of this length; the decoder guarantees it.
    pub fn scatter(self, pieces: &[u8], block: &mut [u8]) {
        assert_eq!(pieces.len(), self.bytes_len(block.len()), "pieces are as long as their mask says");
        let mut rest = pieces;
        for range in self.ranges(block.len()) {
            let (piece, after) = rest.split_at(range.len());
            block[range].copy_from_slice(piece);
            rest = after;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::digest::piece_digests;

    /// The last block of a disk that grows or shrinks has an old version of another length.
    #[test]
    fn digests_of_another_length_are_compared_as_if_zeros_followed() {
        let (long, short) = (vec![1u8; PIECE_LEN * 3], vec![1u8; PIECE_LEN + 5]);
        let mask =
            |old: &[u8], new: &[u8]| PieceMask::differing_digests(&piece_digests(old), &piece_digests(new), new.len());
        assert_eq!(mask(&short, &long), PieceMask(0b110), "grown by ones");
        assert_eq!(mask(&long, &short), PieceMask(0b10), "nothing is sent of what is gone");
        let mut padded = short.clone();
        padded.resize(PIECE_LEN * 3, 0);
        assert_eq!(mask(&short, &padded), PieceMask(0), "grown by zeros");
        assert_eq!(mask(&padded, &short), PieceMask(0), "cut by zeros");
    }

    #[test]
    fn a_short_block_has_fewer_pieces_and_a_short_last_one() {
        assert_eq!(PieceMask::all(BLOCK_LEN), PieceMask(0xffff));
        assert_eq!(PieceMask::all(PIECE_LEN + 1), PieceMask(0b11));
        assert_eq!(PieceMask::all(0), PieceMask(0));
        assert_eq!(PieceMask(0b10).bytes_len(PIECE_LEN + 1), 1);
        assert_eq!(PieceMask(0b11).bytes_len(PIECE_LEN + 1), PIECE_LEN + 1);
        assert!(PieceMask(0b10).fits(PIECE_LEN + 1) && !PieceMask(0b10).fits(PIECE_LEN));
    }

    #[test]
    fn what_differs_is_gathered_and_scattered_back() {
        for block_len in [BLOCK_LEN, PIECE_LEN * 3 + 5] {
            let old = vec![1u8; block_len];
            let mut new = old.clone();
            new[PIECE_LEN] = 2;
            *new.last_mut().unwrap() = 3;
            let mask = PieceMask::differing(&old, &new);
            assert_eq!(mask, PieceMask::default().with(1).with(block_len.div_ceil(PIECE_LEN) - 1));
            assert_eq!(mask, PieceMask::differing_digests(&piece_digests(&old), &piece_digests(&new), block_len));
            let mut pieces = Vec::new();
            mask.gather(&new, &mut pieces);
            assert_eq!(pieces.len(), mask.bytes_len(block_len));
            let mut patched = old;
            mask.scatter(&pieces, &mut patched);
            assert!(patched == new);
        }
    }
}
