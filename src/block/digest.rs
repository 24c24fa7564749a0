//! Digest of a block, of a node above blocks, and of a whole disk.
//!
//! - A block: BLAKE3 of its 64 KiB; a short last block is hashed as if padded with zeros, so that growing a disk by
//!   zeros changes no digest. A block of zeros has the constant [`Digest::ZERO`], so that holes cost nothing.
//! - A node: BLAKE3 in key-derivation mode (its own domain) over its 64 children; all children zero: zero.
//!   Missing children on the right edge count as zero.
//! - A disk's root: BLAKE3 in a third domain over size and topmost node: it binds the size.
//! - A piece: the first 16 bytes of BLAKE3 in a fourth domain over its 4 KiB. Not part of the tree, never stored: a
//!   hint of what need not travel, and whoever relies on it compares the digest of the whole block afterwards.
//!
//! Leaves, nodes, roots and pieces are hashed in domains of their own, so that no content of a block can pose as a
//! node, and no node as a root. Specified in docs/formats/digest.md.

use super::extent::is_zero;
use super::{BLOCK_LEN, DiskSize, FANOUT, PIECE_LEN};
use blake3::Hasher;
use blake3::hazmat::{ContextKey, HasherExt, hash_derive_key_context};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::LazyLock;

/// 32 bytes of BLAKE3, or all zero for zeros.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Of a block, a subtree that reads as zeros.
    pub const ZERO: Digest = Digest([0; 32]);
    /// Bytes of a digest.
    pub const LEN: usize = 32;

    /// True for the digest of content that reads as zeros.
    pub fn is_zero(&self) -> bool {
        *self == Self::ZERO
    }

    /// Parses 64 hexadecimal digits of either case. `None`: the text is anything else.
    pub fn from_hex(text: &str) -> Option<Digest> {
        let mut out = [0u8; 32];
        // `from_str_radix` alone would take "+1".
        if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Digest(out))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        Digest::from_hex(&text).ok_or_else(|| serde::de::Error::custom("a digest has 64 hex digits"))
    }
}

/// 16 bytes of BLAKE3, or all zero for zeros. Half the length of a [`Digest`], and enough: nothing is decided by it
/// that the digest of the whole block does not decide again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct PieceDigest(pub [u8; 16]);

impl PieceDigest {
    /// Of a piece that reads as zeros.
    pub const ZERO: PieceDigest = PieceDigest([0; 16]);
    /// Bytes of a piece's digest.
    pub const LEN: usize = 16;

    /// True for the digest of a piece that reads as zeros.
    pub fn is_zero(&self) -> bool {
        *self == Self::ZERO
    }
}

impl fmt::Debug for PieceDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// Pieces of a block.
pub const BLOCK_PIECES: usize = BLOCK_LEN / PIECE_LEN;

/// The digests of a block's pieces, first piece first. Those beyond the end of a short block are zero.
pub type BlockPieces = [PieceDigest; BLOCK_PIECES];

/// The context strings of the derived domains. They are part of the format and never change.
const NODE_CONTEXT: &str = "virt-replica 2026-11-22 digest tree: node";
const ROOT_CONTEXT: &str = "virt-replica 2026-11-22 digest tree: root";
const PIECE_CONTEXT: &str = "virt-replica 2026-11-22 piece of a block";

static NODE_KEY: LazyLock<ContextKey> = LazyLock::new(|| hash_derive_key_context(NODE_CONTEXT));
static ROOT_KEY: LazyLock<ContextKey> = LazyLock::new(|| hash_derive_key_context(ROOT_CONTEXT));
static PIECE_KEY: LazyLock<ContextKey> = LazyLock::new(|| hash_derive_key_context(PIECE_CONTEXT));

/// What a short last block is padded with, without copying the block.
static ZEROS: [u8; BLOCK_LEN] = [0; BLOCK_LEN];

/// Digest of one block. `data` has at most [`BLOCK_LEN`] bytes; fewer are hashed as if zeros followed up to that
/// length. Zeros only, and so also no bytes at all, give [`Digest::ZERO`].
///
/// # Panics
/// If `data` is longer than a block.
pub fn block_digest(data: &[u8]) -> Digest {
    assert!(data.len() <= BLOCK_LEN, "a block has at most {BLOCK_LEN} bytes");
    if is_zero(data) {
        return Digest::ZERO;
    }
    if data.len() == BLOCK_LEN {
        return Digest(*blake3::hash(data).as_bytes());
    }
    let mut hasher = Hasher::new();
    hasher.update(data).update(&ZEROS[data.len()..]);
    Digest(*hasher.finalize().as_bytes())
}

/// Digest of a node over its children, first child first. Missing children at the end count as zeros; if all
/// are zero, so is the node.
///
/// # Panics
/// If there are more than [`FANOUT`] children.
pub fn node_digest(children: &[Digest]) -> Digest {
    assert!(children.len() <= FANOUT, "a node has at most {FANOUT} children");
    if children.iter().all(Digest::is_zero) {
        return Digest::ZERO;
    }
    let mut bytes = [0u8; FANOUT * Digest::LEN];
    for (slot, child) in bytes.chunks_exact_mut(Digest::LEN).zip(children) {
        slot.copy_from_slice(&child.0);
    }
    Digest(*Hasher::new_from_context_key(&NODE_KEY).update(&bytes).finalize().as_bytes())
}

/// Root of a disk: its size and the topmost node of its tree. Never zero, also not of an empty disk.
pub fn root_digest(size: DiskSize, top: Digest) -> Digest {
    let mut hasher = Hasher::new_from_context_key(&ROOT_KEY);
    hasher.update(&size.0.to_le_bytes()).update(&top.0);
    Digest(*hasher.finalize().as_bytes())
}

/// Digest of one piece. `data` has at most [`PIECE_LEN`] bytes; fewer are hashed as if zeros followed up to that
/// length. Zeros only, and so also no bytes at all, give [`PieceDigest::ZERO`].
///
/// # Panics
/// If `data` is longer than a piece.
pub fn piece_digest(data: &[u8]) -> PieceDigest {
    assert!(data.len() <= PIECE_LEN, "a piece has at most {PIECE_LEN} bytes");
    if is_zero(data) {
        return PieceDigest::ZERO;
    }
    let mut hasher = Hasher::new_from_context_key(&PIECE_KEY);
    hasher.update(data).update(&ZEROS[..PIECE_LEN - data.len()]);
    PieceDigest(*hasher.finalize().as_bytes().first_chunk().expect("a hash has 32 bytes"))
}

/// Digests of the pieces of one block of at most [`BLOCK_LEN`] bytes.
///
/// # Panics
/// If `block` is longer than a block.
pub fn piece_digests(block: &[u8]) -> BlockPieces {
    assert!(block.len() <= BLOCK_LEN, "a block has at most {BLOCK_LEN} bytes");
    let mut pieces = [PieceDigest::ZERO; BLOCK_PIECES];
    pieces.iter_mut().zip(block.chunks(PIECE_LEN)).for_each(|(digest, piece)| *digest = piece_digest(piece));
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(n: u8) -> Digest {
        Digest([n; 32])
    }

    #[test]
    fn a_short_block_is_hashed_as_if_zeros_followed() {
        for len in [1, 511, 4096, BLOCK_LEN - 1] {
            let mut whole = vec![0u8; BLOCK_LEN];
            whole[..len].fill(7);
            assert_eq!(block_digest(&whole[..len]), block_digest(&whole), "{len}");
        }
    }

    #[test]
    fn zeros_have_the_constant_at_every_length() {
        let zeros = vec![0u8; BLOCK_LEN];
        for len in [0, 1, 4096, BLOCK_LEN] {
            assert_eq!(block_digest(&zeros[..len]), Digest::ZERO);
        }
        assert_eq!(node_digest(&[]), Digest::ZERO);
        assert_eq!(node_digest(&[Digest::ZERO; FANOUT]), Digest::ZERO);
        assert_ne!(root_digest(DiskSize(0), Digest::ZERO), Digest::ZERO);
    }

    #[test]
    fn a_whole_block_is_plain_blake3() {
        let data: Vec<u8> = (0..BLOCK_LEN).map(|i| (i % 251) as u8).collect();
        assert_eq!(block_digest(&data).0, *blake3::hash(&data).as_bytes());
    }

    #[test]
    fn the_place_of_a_child_counts_and_missing_children_are_zeros() {
        assert_ne!(node_digest(&[leaf(1), Digest::ZERO]), node_digest(&[Digest::ZERO, leaf(1)]));
        let mut padded = [Digest::ZERO; FANOUT];
        padded[0] = leaf(1);
        assert_eq!(node_digest(&[leaf(1)]), node_digest(&padded));
    }

    /// By the other road: the library's own one-call derivation over the bytes the specification names.
    #[test]
    fn nodes_and_roots_are_blake3_key_derivation() {
        let mut material = [0u8; 2048];
        material[..32].fill(1);
        assert_eq!(node_digest(&[leaf(1)]).0, blake3::derive_key(NODE_CONTEXT, &material));
        let material = [&[2, 1, 0, 0, 0, 0, 0, 0][..], &leaf(9).0].concat();
        assert_eq!(root_digest(DiskSize(0x102), leaf(9)).0, blake3::derive_key(ROOT_CONTEXT, &material));
    }

    /// A guest that writes the bytes of a node into a block gets a block, not that node.
    #[test]
    fn the_domains_are_apart() {
        let children: Vec<Digest> = (1..=64).map(leaf).collect();
        let bytes: Vec<u8> = children.iter().flat_map(|d| d.0).collect();
        assert_ne!(node_digest(&children), block_digest(&bytes));
        assert_ne!(node_digest(&children).0, *blake3::hash(&bytes).as_bytes());
        assert_ne!(root_digest(DiskSize(1), leaf(1)), root_digest(DiskSize(2), leaf(1)), "the root binds the size");
    }

    #[test]
    fn a_piece_is_half_of_a_key_derivation_over_itself_and_zeros() {
        let data: Vec<u8> = (0..PIECE_LEN).map(|i| (i % 251) as u8).collect();
        for len in [2, 511, PIECE_LEN - 1, PIECE_LEN] {
            let mut material = data[..len].to_vec();
            material.resize(PIECE_LEN, 0);
            let expected = blake3::derive_key(PIECE_CONTEXT, &material);
            assert_eq!(piece_digest(&data[..len]).0, expected[..16], "{len}");
            assert_eq!(piece_digest(&material), piece_digest(&data[..len]), "{len}");
        }
        for len in [0, 1, PIECE_LEN] {
            assert_eq!(piece_digest(&ZEROS[..len]), PieceDigest::ZERO);
        }
        assert_ne!(piece_digest(&data).0, block_digest(&data).0[..16], "a domain of its own");
    }

    /// `a`, `b`: a piece of that byte; `.`: a piece of zeros.
    #[test]
    fn the_pieces_of_a_block_stand_in_their_places() {
        let of = |notation: &str| -> Vec<u8> {
            notation.bytes().flat_map(|b| [if b == b'.' { 0 } else { b }; PIECE_LEN]).collect()
        };
        let (a, b) = (piece_digest(&of("a")), piece_digest(&of("b")));
        let pieces = piece_digests(&of("a.b............a"));
        assert_eq!((pieces[0], pieces[1], pieces[2], pieces[15]), (a, PieceDigest::ZERO, b, a));
        // A short block: its last piece is padded, and what lies behind it is zero.
        let short = piece_digests(&of("ab")[..PIECE_LEN + 5]);
        assert_eq!((short[0], short[1]), (a, piece_digest(b"bbbbb")));
        assert!(short[2..].iter().all(PieceDigest::is_zero));
        assert_eq!(piece_digests(&[]), [PieceDigest::ZERO; BLOCK_PIECES]);
    }

    /// The same vectors stand in docs/formats/digest.md; they hold for ever.
    #[test]
    fn golden_vectors() {
        let pieces = [piece_digest(&[0xaa; PIECE_LEN]), piece_digest(b"virt-replica")];
        assert_eq!(pieces.map(|d| format!("{d:?}")), GOLDEN_PIECES);
        let block = vec![0xaau8; BLOCK_LEN];
        let short = block_digest(b"virt-replica");
        let vectors = [
            block_digest(&block),
            short,
            node_digest(&[block_digest(&block), short]),
            root_digest(DiskSize(65548), short),
        ];
        assert_eq!(vectors.map(|d| d.to_string()), GOLDEN);
    }

    const GOLDEN_PIECES: [&str; 2] = ["616511b6e5dbc8d704f01c74e9875821", "7a21f628b711b62fff6eab208ff76367"];

    const GOLDEN: [&str; 4] = [
        "ee00c7e36a586431b00b681cb2e951bcb2d342addb04adc55e502972e06d8d42",
        "7205d42e2a84c5bc69c4734d189572919e03b96db76ae28fccc4772f5c6509c4",
        "d145123654023b1c5cb472fcd9d8630f32b1a77249df33d6100081511fac4865",
        "cec5e9713fe6bd610f2409091ed6b3712fe74760e52b17e356cafade6b03f046",
    ];

    #[test]
    fn hex_round_trips_and_refuses_anything_else() {
        let d = block_digest(b"x");
        assert_eq!(Digest::from_hex(&d.to_string()), Some(d));
        for bad in ["", "00", &"g".repeat(64), &"+1".repeat(32), &"\u{e9}".repeat(32)] {
            assert_eq!(Digest::from_hex(bad), None, "{bad:?}");
        }
    }
}
