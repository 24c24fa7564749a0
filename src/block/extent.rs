//! A range of a disk with one kind of content, and the small algebra over lists of them.
//!
//! A list of extents is in order and does not overlap; [`merge`] also leaves no two neighbours of equal content.

use super::ByteRange;

/// What an image says of a range without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Content {
    /// There may be anything; it has to be read. (It may still turn out to be zeros.)
    Data,
    /// Reads as zeros, whether never written, trimmed or written as zeros.
    Zero,
}

/// A range of bytes of a disk with one kind of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes of the disk that the extent covers.
    pub range: ByteRange,
    /// Data or zeros, as the image reports it without reading the bytes.
    pub content: Content,
}

impl Extent {
    /// An extent from byte `start` to before byte `end`. `start` must not be behind `end`.
    pub fn new(start: u64, end: u64, content: Content) -> Self {
        Self { range: ByteRange::new(start, end), content }
    }
}

/// Coalesces neighbours of equal content and drops empty extents. Extents that do not touch stay apart.
/// The input is in order and does not overlap.
pub fn merge(extents: impl IntoIterator<Item = Extent>) -> Vec<Extent> {
    let mut out: Vec<Extent> = Vec::new();
    for extent in extents {
        if extent.range.is_empty() {
            continue;
        }
        match out.last_mut() {
            Some(last) if last.range.end == extent.range.start && last.content == extent.content => {
                last.range.end = extent.range.end;
            }
            last => {
                debug_assert!(last.is_none_or(|l| l.range.end <= extent.range.start), "extents are in order");
                out.push(extent);
            }
        }
    }
    out
}

/// The parts of `extents` that lie within `range`.
pub fn clip(extents: &[Extent], range: ByteRange) -> Vec<Extent> {
    let within = |e: &Extent| e.range.intersect(range).map(|range| Extent { range, content: e.content });
    extents.iter().filter_map(within).collect()
}

/// Bytes looked at before the next early exit: long enough for wide registers, short enough to leave data early.
const STRIDE: usize = 128;

/// Whether every byte is zero. Data usually says no within its first bytes; zeros cost one pass over the memory.
///
/// bdsync's version of this function missed the last byte for ten years: the tests below put a single non-zero byte at
/// every position of every length and alignment around the stride.
pub fn is_zero(data: &[u8]) -> bool {
    let mut strides = data.chunks_exact(STRIDE);
    // Plain loads through `from_le_bytes` need no alignment, and the `or` of a whole stride has no branch: the
    // compiler makes vector code of it.
    let all_zero = strides.by_ref().all(|stride| {
        let words = stride.chunks_exact(16);
        words.fold(0u128, |or, w| or | u128::from_le_bytes(w.try_into().expect("chunks of 16 bytes"))) == 0
    });
    all_zero && strides.remainder().iter().all(|&b| b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One letter per byte: `D` data, `0` zeros, `.` not in the list. Equal letters in a row make one extent, `|` ends
    /// one.
    fn list(text: &str) -> Vec<Extent> {
        let (mut out, mut at, mut open) = (Vec::<Extent>::new(), 0, None);
        for c in text.chars() {
            if c == '|' {
                open = None;
                continue;
            }
            let content = if c == 'D' { Content::Data } else { Content::Zero };
            if c != '.' {
                match out.last_mut() {
                    Some(last) if open == Some(c) => last.range.end += 1,
                    _ => out.push(Extent::new(at, at + 1, content)),
                }
            }
            open = Some(c);
            at += 1;
        }
        out
    }

    #[test]
    fn merging_joins_what_touches_and_is_alike() {
        assert_eq!(merge(list("DD|D|0|00")), list("DDD000"));
        assert_eq!(merge(list("DD.D|0")), list("DD.D0"), "a gap stays a gap");
        assert_eq!(merge([Extent::new(0, 0, Content::Data), Extent::new(0, 1, Content::Zero)]), list("0"));
        assert!(merge([]).is_empty());
    }

    #[test]
    fn clipping_keeps_the_part_within() {
        let disk = list("DD00DD");
        assert_eq!(clip(&disk, ByteRange::new(1, 5)), list(".D00D"));
        assert_eq!(clip(&disk, ByteRange::new(2, 4)), list("..00"));
        assert!(clip(&disk, ByteRange::new(6, 9)).is_empty());
        assert!(clip(&disk, ByteRange::new(3, 3)).is_empty());
    }

    /// Every position matters: a byte that is not looked at is a block that is never replicated.
    #[test]
    fn one_byte_anywhere_is_seen() {
        let longest = 3 * STRIDE + 17;
        let mut arena = vec![0u8; longest + 32];
        for align in 0..17 {
            for len in (0..=40).chain(STRIDE - 3..=STRIDE + 18).chain(3 * STRIDE - 2..=longest) {
                // The neighbours are not zero: reading past either end would show as a wrong "no".
                arena.fill(0xff);
                arena[align..align + len].fill(0);
                assert!(is_zero(&arena[align..align + len]), "zeros, length {len} at {align}");
                for at in 0..len {
                    for bit in [0x01, 0x80] {
                        arena[align + at] = bit;
                        assert!(!is_zero(&arena[align..align + len]), "byte {at} of {len} at {align}");
                    }
                    arena[align + at] = 0;
                }
            }
        }
    }

    #[test]
    fn one_byte_anywhere_in_a_block_is_seen() {
        let mut block = vec![0u8; crate::block::BLOCK_LEN];
        assert!(is_zero(&block));
        for at in 0..block.len() {
            block[at] = 1;
            // Only from just before the byte: the whole block for each byte would take a minute.
            assert!(!is_zero(&block[at.saturating_sub(300)..]), "byte {at}");
            block[at] = 0;
        }
        *block.last_mut().unwrap() = 1;
        assert!(!is_zero(&block));
    }
}
