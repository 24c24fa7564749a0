//! A chain of patches made one: what the first leads from, the last leads to.

use super::patchfile::Incoming;
use crate::block::digest::Digest;
use crate::block::{BLOCK_LEN, BlockIndex};
use crate::error::{Error, Kind, Result};
use crate::patch::{Compression, Header, Item, PieceMask, RecordEncoder, StreamTail, Trailer};
use std::io::{Read, Write};
use std::ops::Range;

/// One patch of the chain, with the record that is next.
struct Link<R> {
    patch: Incoming<R>,
    header: Header,
    next: Option<Item>,
    trailer: Option<Trailer>,
}

impl<R: Read> Link<R> {
    fn new(input: R) -> Result<Self> {
        let mut patch = Incoming::new(input)?;
        let header = patch.header()?;
        let mut link = Self { patch, header, next: None, trailer: None };
        link.advance()?;
        Ok(link)
    }

    fn advance(&mut self) -> Result<()> {
        self.next = self.patch.next_item()?;
        if let Some(Item::Trailer(trailer)) = self.next {
            self.trailer = Some(trailer);
            // Whatever follows it is an error.
            self.next = self.patch.next_item()?;
        }
        Ok(())
    }

    /// The blocks of the next record.
    fn blocks(&self) -> Option<Range<u64>> {
        match &self.next {
            Some(Item::Data { block, .. } | Item::Pieces { block, .. }) => Some(block.0..block.0 + 1),
            Some(Item::Zero { first, count }) => Some(first.0..first.0 + count),
            _ => None,
        }
    }

    /// Takes what the next record says of the blocks `start..end`, which it begins with or does not touch.
    fn take(&mut self, start: u64, end: u64) -> Result<Option<Item>> {
        let Some(blocks) = self.blocks().filter(|b| b.start == start) else { return Ok(None) };
        if blocks.end > end {
            self.next = Some(Item::Zero { first: BlockIndex(end), count: blocks.end - end });
            return Ok(Some(Item::Zero { first: BlockIndex(start), count: end - start }));
        }
        let item = self.next.take();
        self.advance()?;
        Ok(item)
    }
}

/// What the patches so far make of one block.
enum State {
    Untouched,
    Zero,
    /// The whole block is known.
    Whole(Digest),
    /// Only these pieces are.
    Pieces(PieceMask, Digest),
}

/// Merges the patches, oldest first, into one. `Conflict` if one does not lead to where the next begins; that is
/// certain only at the end, so whoever writes into a pipe must know that a patch without its end is none. Memory: a few
/// records per patch.
pub fn merge<R: Read>(patches: Vec<R>, out: &mut dyn Write) -> Result<Header> {
    let mut links = patches.into_iter().map(Link::new).collect::<Result<Vec<_>>>()?;
    let [first, .., last] = links.as_slice() else {
        return Err(Error::new(Kind::Usage, "there are no two patches to be merged"));
    };
    let (size, header) = (last.header.size, Header { size: last.header.size, ..first.header.clone() });
    check_headers(&links)?;
    let cannot = |e| Error::from_io("cannot write the patch", e);
    let mut encoder = RecordEncoder::new(Compression::FAST)?;
    let mut bytes = Vec::new();
    let mut tail = StreamTail::begin(&header, &mut bytes);
    let mut buffer = vec![0; BLOCK_LEN];
    loop {
        out.write_all(&bytes).map_err(cannot)?;
        bytes.clear();
        let Some(blocks) = next_blocks(&links) else { break };
        let mut state = if header.from_root.is_some() { State::Untouched } else { State::Zero };
        for link in &mut links {
            if let Some(item) = link.take(blocks.start, blocks.end)? {
                state = lay_over(state, item, &mut buffer);
            }
        }
        let (block, len) = (BlockIndex(blocks.start), BlockIndex(blocks.start).bytes(size).len() as usize);
        match state {
            State::Untouched => {}
            State::Zero => encoder.zero(block, blocks.end - blocks.start, &mut bytes),
            State::Whole(digest) => encoder.data(block, digest, &buffer[..len], &mut bytes),
            State::Pieces(mask, digest) => encoder.pieces(block, digest, mask, &buffer[..len], &mut bytes),
        }
        tail.observe(&bytes);
    }
    check_roots(&links)?;
    let to_root = links.last().and_then(|l| l.trailer).expect("a link ends with its trailer").to_root;
    tail.trailer(to_root, &mut bytes);
    out.write_all(&bytes).and_then(|()| out.flush()).map_err(cannot)?;
    Ok(header)
}

fn check_headers<R>(links: &[Link<R>]) -> Result<()> {
    for (at, pair) in links.windows(2).enumerate() {
        let (one, next) = (&pair[0].header, &pair[1].header);
        if (&one.domain, &one.disk) != (&next.domain, &next.disk) {
            let what = format!("patches {} and {} are of different disks", at + 1, at + 2);
            return Err(Error::new(Kind::Conflict, what));
        }
        if next.from_root.is_none() || next.size_from != one.size {
            return Err(broken(at));
        }
        if next.size < one.size || one.size < one.size_from {
            let what = format!("the image shrinks in patch {} or {}", at + 1, at + 2);
            return Err(Error::new(Kind::Refused, what)
                .hint("merge what comes before it and what comes behind it, each for itself"));
        }
    }
    Ok(())
}

fn check_roots<R>(links: &[Link<R>]) -> Result<()> {
    let leads = |pair: &[Link<R>]| pair[0].trailer.map(|t| t.to_root) == pair[1].header.from_root;
    match links.windows(2).position(|pair| !leads(pair)) {
        Some(at) => Err(broken(at)),
        None => Ok(()),
    }
}

fn broken(at: usize) -> Error {
    let what = format!("patch {} does not lead to where patch {} begins", at + 1, at + 2);
    Error::new(Kind::Conflict, what).hint("name the patches in the order in which they are applied")
}

/// Blocks that are dealt with at once: one, or a run that is zero in all records that say anything of it.
fn next_blocks<R: Read>(links: &[Link<R>]) -> Option<Range<u64>> {
    let start = links.iter().filter_map(|l| l.blocks()).map(|b| b.start).min()?;
    let ends = links.iter().filter_map(|l| l.blocks()).map(|b| if b.start > start { b.start } else { b.end });
    Some(start..ends.min().expect("one begins at the start"))
}

/// What the item makes of the block, whose known bytes are in `buffer`, zeros behind the end of a short one.
fn lay_over(state: State, item: Item, buffer: &mut [u8]) -> State {
    match (item, state) {
        (Item::Zero { .. }, _) => State::Zero,
        (Item::Data { digest, bytes, .. }, _) => {
            buffer[..bytes.len()].copy_from_slice(&bytes);
            buffer[bytes.len()..].fill(0);
            State::Whole(digest)
        }
        (Item::Pieces { digest, mask, bytes, .. }, state) => {
            if !matches!(state, State::Whole(_) | State::Pieces(..)) {
                buffer.fill(0);
            }
            scatter(mask, &bytes, buffer);
            match state {
                State::Untouched => State::Pieces(mask, digest),
                State::Pieces(before, _) => State::Pieces(PieceMask(before.0 | mask.0), digest),
                State::Zero | State::Whole(_) => State::Whole(digest),
            }
        }
        (Item::Header(_) | Item::Trailer(_), state) => state,
    }
}

/// As [`PieceMask::scatter`], into a whole block: the last piece of a short one is filled up with zeros.
fn scatter(mask: PieceMask, pieces: &[u8], buffer: &mut [u8]) {
    let mut rest = pieces;
    for range in mask.ranges(BLOCK_LEN) {
        let (piece, after) = rest.split_at(range.len().min(rest.len()));
        buffer[range.start..range.start + piece.len()].copy_from_slice(piece);
        buffer[range.start + piece.len()..range.end].fill(0);
        rest = after;
    }
}
