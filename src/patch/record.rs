//! The fixed header in front of every record: 64 bytes, the last eight of which guard the others.
//!
//! Byte table: docs/formats/patch.md.

use super::PieceMask;
use crate::block::digest::Digest;
use crate::block::layout::Fields;

pub(super) const HEAD_LEN: usize = 64;

/// Bytes of the trailer's payload: the hash over all headers.
pub(super) const TRAILER_LEN: usize = 32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RecordKind {
    /// A whole block.
    Data = 1,
    /// Some pieces of a block.
    Pieces = 2,
    /// A run of blocks that read as zeros.
    Zero = 3,
    /// The trailer.
    End = 4,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codec {
    Stored = 0,
    Zstd = 1,
}

/// A record's header. Fields that a kind does not use are zero, in memory as on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub kind: RecordKind,
    pub codec: Codec,
    pub mask: PieceMask,
    /// Bytes that follow the header.
    pub payload_len: u32,
    /// First block; in the trailer the number of records before it.
    pub first: u64,
    /// Blocks; 0 in the trailer.
    pub count: u64,
    /// Of the block after the record; in the trailer the to-root.
    pub digest: Digest,
}

impl Head {
    pub fn encode(&self) -> [u8; HEAD_LEN] {
        let mut out = [0u8; HEAD_LEN];
        out[0] = self.kind as u8;
        out[1] = self.codec as u8;
        out[2..4].copy_from_slice(&self.mask.0.to_le_bytes());
        out[4..8].copy_from_slice(&self.payload_len.to_le_bytes());
        out[8..16].copy_from_slice(&self.first.to_le_bytes());
        out[16..24].copy_from_slice(&self.count.to_le_bytes());
        out[24..56].copy_from_slice(&self.digest.0);
        let check = check_of(&out[..HEAD_LEN - CHECK_LEN]);
        out[HEAD_LEN - CHECK_LEN..].copy_from_slice(&check);
        out
    }

    /// Checks the guard and that each field has a value its kind allows; what depends on the disk is the decoder's.
    pub fn decode(bytes: &[u8]) -> Result<Head, &'static str> {
        let (guarded, check) = bytes[..HEAD_LEN].split_at(HEAD_LEN - CHECK_LEN);
        if check != check_of(guarded) {
            return Err("its header is damaged");
        }
        let mut fields = Fields(guarded);
        let kind = match fields.u8() {
            1 => RecordKind::Data,
            2 => RecordKind::Pieces,
            3 => RecordKind::Zero,
            4 => RecordKind::End,
            _ => return Err("it is of an unknown kind"),
        };
        let codec = match fields.u8() {
            0 => Codec::Stored,
            1 => Codec::Zstd,
            _ => return Err("it is compressed in an unknown way"),
        };
        let mask = PieceMask(fields.u16());
        let (payload_len, first, count, digest) = (fields.u32(), fields.u64(), fields.u64(), fields.digest());
        let head = Head { kind, codec, mask, payload_len, first, count, digest };
        let plausible = match kind {
            RecordKind::Data => mask.is_empty() && count == 1 && !digest.is_zero(),
            RecordKind::Pieces => !mask.is_empty() && count == 1 && !digest.is_zero(),
            RecordKind::Zero => head == Head::zero(first, count) && count > 0,
            RecordKind::End => head == Head::end(first, digest),
        };
        if plausible { Ok(head) } else { Err("its header contradicts itself") }
    }

    pub fn zero(first: u64, count: u64) -> Head {
        let (mask, digest) = (PieceMask::default(), Digest::ZERO);
        Head { kind: RecordKind::Zero, codec: Codec::Stored, mask, payload_len: 0, first, count, digest }
    }

    pub fn end(records: u64, to_root: Digest) -> Head {
        Head {
            kind: RecordKind::End,
            codec: Codec::Stored,
            mask: PieceMask::default(),
            payload_len: TRAILER_LEN as u32,
            first: records,
            count: 0,
            digest: to_root,
        }
    }
}

/// Bytes of the checks that guard headers: the first bytes of their BLAKE3.
pub(crate) const CHECK_LEN: usize = 8;

pub(crate) fn check_of(bytes: &[u8]) -> [u8; CHECK_LEN] {
    blake3::hash(bytes).as_bytes()[..CHECK_LEN].try_into().expect("a hash is longer than a check")
}
