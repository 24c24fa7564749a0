//! A range of a disk with one kind of content.

use super::ByteRange;

/// What an image says of a range without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Content {
    /// There may be anything; it has to be read. (It may still turn out to be zeros.)
    Data,
    /// Reads as zeros, whether never written, trimmed or written as zeros.
    Zero,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    pub range: ByteRange,
    pub content: Content,
}
