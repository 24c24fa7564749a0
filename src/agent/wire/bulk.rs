//! Digests of nodes and of pieces as raw bytes: what is asked for most often, and is mostly zero.

use crate::block::digest::{BLOCK_PIECES, BlockPieces, Digest, PieceDigest};
use crate::error::{Error, Kind, Result};

/// Set in a run's count: so many zero digests, none of which is sent.
const ZERO_RUN: u32 = 1 << 31;

/// Digests as runs: a count, then that many digests, or only the count with its high bit set for zero digests.
pub fn encode_nodes(nodes: &[Digest]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for run in nodes.chunk_by(|a, b| a.is_zero() == b.is_zero()) {
        let zero = if run[0].is_zero() { ZERO_RUN } else { 0 };
        bytes.extend_from_slice(&(run.len() as u32 | zero).to_le_bytes());
        if zero == 0 {
            run.iter().for_each(|digest| bytes.extend_from_slice(&digest.0));
        }
    }
    bytes
}

/// Exactly `expected` digests out of their runs; the caller has bounded `expected`.
pub fn decode_nodes(mut bytes: &[u8], expected: usize) -> Result<Vec<Digest>> {
    let wrong = |what: &'static str| Error::new(Kind::Protocol, what);
    let mut nodes = Vec::with_capacity(expected);
    while let Some((count, rest)) = bytes.split_first_chunk() {
        let word = u32::from_le_bytes(*count);
        let count = (word & !ZERO_RUN) as usize;
        if count == 0 || count > expected - nodes.len() {
            return Err(wrong("more or fewer nodes came than were asked for"));
        }
        bytes = rest;
        if word & ZERO_RUN != 0 {
            nodes.resize(nodes.len() + count, Digest::ZERO);
            continue;
        }
        let (run, rest) = bytes.split_at_checked(count * Digest::LEN).ok_or_else(|| wrong("a run of nodes is cut"))?;
        nodes.extend(run.chunks_exact(Digest::LEN).map(|d| Digest(d.try_into().expect("a chunk of that length"))));
        bytes = rest;
    }
    if !bytes.is_empty() || nodes.len() != expected {
        return Err(wrong("more or fewer nodes came than were asked for"));
    }
    Ok(nodes)
}

/// The pieces of each block: a mask of those that are not zero, then their digests.
pub fn encode_pieces(blocks: &[BlockPieces]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for pieces in blocks {
        let given = |(n, digest): (usize, &PieceDigest)| if digest.is_zero() { 0 } else { 1u16 << n };
        let mask = pieces.iter().enumerate().map(given).sum::<u16>();
        bytes.extend_from_slice(&mask.to_le_bytes());
        pieces.iter().filter(|digest| !digest.is_zero()).for_each(|digest| bytes.extend_from_slice(&digest.0));
    }
    bytes
}

const _: () = assert!(BLOCK_PIECES == u16::BITS as usize, "the mask of a block's pieces has a bit for each");

/// The pieces of exactly `expected` blocks; the caller has bounded `expected`.
pub fn decode_pieces(mut bytes: &[u8], expected: usize) -> Result<Vec<BlockPieces>> {
    let wrong = || Error::new(Kind::Protocol, "the pieces of more or fewer blocks came than were asked for");
    let mut blocks = Vec::with_capacity(expected);
    for _ in 0..expected {
        let (mask, rest) = bytes.split_first_chunk().ok_or_else(wrong)?;
        let mask = u16::from_le_bytes(*mask);
        let (given, rest) = rest.split_at_checked(mask.count_ones() as usize * PieceDigest::LEN).ok_or_else(wrong)?;
        let mut pieces = [PieceDigest::ZERO; BLOCK_PIECES];
        let places = pieces.iter_mut().enumerate().filter(|(n, _)| mask & 1 << n != 0);
        for ((_, digest), bytes) in places.zip(given.chunks_exact(PieceDigest::LEN)) {
            *digest = PieceDigest(bytes.try_into().expect("a chunk of that length"));
        }
        blocks.push(pieces);
        bytes = rest;
    }
    if bytes.is_empty() { Ok(blocks) } else { Err(wrong()) }
}
