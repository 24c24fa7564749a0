//! Taking a patch apart, pushed in whatever cuts the bytes arrive.

use super::record::{Codec, HEAD_LEN, Head, RecordKind, TRAILER_LEN};
use super::{BANNER, HEADER_LEN_MAX, HEADER_LEN_MIN, Header, PieceMask, Trailer};
use crate::block::digest::Digest;
use crate::block::layout::Banner;
use crate::block::{BlockIndex, DiskSize};
use crate::error::{Error, Kind, Result};

/// What the stream may ask for, before it is believed in anything.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Largest disk, before and after.
    pub size_max: DiskSize,
}

impl Default for Limits {
    /// As large as a file can be.
    fn default() -> Self {
        Self { size_max: DiskSize(i64::MAX as u64) }
    }
}

/// One part of a patch, in the order of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// Always the first.
    Header(Header),
    /// A whole block: `bytes` is exactly the block's part of the disk. Its digest is promised, not yet compared.
    Data {
        /// Block that the bytes are of.
        block: BlockIndex,
        /// Digest that the patch promises for the block.
        digest: Digest,
        /// Content of the block, decompressed; shorter than a block only at the end of the disk.
        bytes: Vec<u8>,
    },
    /// Pieces of a block, to be put in place by [`PieceMask::scatter`]. `digest` is that of the whole block afterwards.
    Pieces {
        /// Block that the pieces belong to.
        block: BlockIndex,
        /// Digest that the patch promises for the whole block afterwards.
        digest: Digest,
        /// Pieces of the block that the record brings.
        mask: PieceMask,
        /// Content of those pieces one after another, decompressed.
        bytes: Vec<u8>,
    },
    /// `count` blocks, at least one, read as zeros.
    Zero {
        /// First of the blocks.
        first: BlockIndex,
        /// Number of blocks.
        count: u64,
    },
    /// Always the last; the structure of the whole stream was found in order.
    Trailer(Trailer),
}

/// A push parser: [`Decoder::push`] takes bytes, [`Decoder::next_item`] gives what is complete.
///
/// Holds at most what was pushed since the last `None`, and one record. Anything off is [`Kind::Corrupt`] with the
/// record, the block and the position in the stream, another version [`Kind::Protocol`]; after an error the decoder is
/// done for.
pub struct Decoder {
    limits: Limits,
    decompressor: zstd::bulk::Decompressor<'static>,
    buffer: Vec<u8>,
    /// Bytes of `buffer` already used.
    used: usize,
    /// Position of `buffer[0]` in the stream.
    buffer_offset: u64,
    state: State,
    headers: blake3::Hasher,
    records: u64,
    next_block: u64,
}

enum State {
    Begin,
    /// Between records, or waiting for the payload of the one whose header was checked.
    Records(Header, Option<Head>),
    Done(Trailer),
    Failed,
}

impl Decoder {
    /// A decoder at the begin of a patch. `Io` if zstd cannot be set up.
    pub fn new(limits: Limits) -> Result<Self> {
        let decompressor = zstd::bulk::Decompressor::new()
            .map_err(|e| Error::new(Kind::Io, "cannot set up decompression").source(e))?;
        Ok(Self {
            limits,
            decompressor,
            buffer: Vec::new(),
            used: 0,
            buffer_offset: 0,
            state: State::Begin,
            headers: blake3::Hasher::new(),
            records: 0,
            next_block: 0,
        })
    }

    /// Takes the next bytes of the stream. Call [`Decoder::next_item`] until `None` before the next push, or they pile
    /// up.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.used);
        self.buffer_offset += self.used as u64;
        self.used = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next item; `None` when more bytes are needed, or when all is said.
    pub fn next_item(&mut self) -> Result<Option<Item>> {
        let result = match &self.state {
            State::Begin => self.header(),
            State::Records(header, head) => {
                let (size, disk, head) = (header.size, header.disk.clone(), *head);
                self.record(size, head).map_err(|e| e.disk(disk))
            }
            State::Done(_) if self.rest().is_empty() => Ok(None),
            State::Done(_) => Err(self.corrupt("there is something after its trailer")),
            State::Failed => Err(Error::new(Kind::Corrupt, "this patch was refused already")),
        };
        if result.is_err() {
            self.state = State::Failed;
        }
        result
    }

    /// Bytes of the stream that are taken apart: where the next item begins.
    pub fn position(&self) -> u64 {
        self.buffer_offset + self.used as u64
    }

    /// To be called when no more bytes will come: the trailer, or an error if the stream was cut.
    pub fn finish(&mut self) -> Result<Trailer> {
        match (self.next_item()?, &self.state) {
            (None, State::Done(trailer)) => Ok(*trailer),
            (Some(_), _) => Err(Error::new(Kind::Usage, "items of the patch are still to be taken")),
            (None, _) => {
                let error = self.corrupt(format!("it ends after {} whole records, before its trailer", self.records));
                self.state = State::Failed;
                Err(error)
            }
        }
    }

    fn rest(&self) -> &[u8] {
        &self.buffer[self.used..]
    }

    fn corrupt(&self, why: impl AsRef<str>) -> Error {
        Error::new(Kind::Corrupt, format!("the patch is damaged: {}", why.as_ref())).offset(self.position())
    }

    fn corrupt_record(&self, block: Option<u64>, why: &str) -> Error {
        let block = block.map(|b| format!(" (block {b})")).unwrap_or_default();
        self.corrupt(format!("record {}{block}: {why}", self.records))
    }

    fn header(&mut self) -> Result<Option<Item>> {
        let rest = self.rest();
        let line_max = rest.len().min(Banner::LEN_MAX);
        let Some(newline) = rest[..line_max].iter().position(|&b| b == b'\n') else {
            return if line_max == Banner::LEN_MAX { Err(BANNER.not_this()) } else { Ok(None) };
        };
        let banner_len = newline + 1;
        BANNER.check(&rest[..banner_len])?;
        let Some(len_field) = rest[banner_len..].first_chunk::<4>() else { return Ok(None) };
        let header_len = u32::from_le_bytes(*len_field) as usize;
        if !(HEADER_LEN_MIN..=HEADER_LEN_MAX).contains(&header_len) {
            return Err(self.corrupt("the length of its header is wrong"));
        }
        let Some(encoded) = rest.get(..banner_len + header_len) else { return Ok(None) };
        let header = Header::decode(encoded, banner_len).map_err(|why| self.corrupt(why))?;
        if header.size.max(header.size_from) > self.limits.size_max {
            let what = format!(
                "the patch is for a disk of {} bytes, and at most {} are allowed",
                header.size, self.limits.size_max
            );
            return Err(Error::new(Kind::Refused, what).disk(&header.disk));
        }
        self.headers.update(&self.buffer[self.used..][..banner_len + header_len]);
        self.used += banner_len + header_len;
        self.state = State::Records(header.clone(), None);
        Ok(Some(Item::Header(header)))
    }

    fn record(&mut self, size: DiskSize, head: Option<Head>) -> Result<Option<Item>> {
        let head = match head {
            Some(head) => head,
            None => {
                let Some(encoded) = self.rest().get(..HEAD_LEN) else { return Ok(None) };
                let head = Head::decode(encoded).map_err(|why| self.corrupt_record(None, why))?;
                self.check_against_disk(&head, size)?;
                head
            }
        };
        // The header stays in the buffer until its payload is there: an error names where the record begins.
        let whole_len = HEAD_LEN + head.payload_len as usize;
        if self.rest().len() < whole_len {
            if let State::Records(_, waiting) = &mut self.state {
                *waiting = Some(head);
            }
            return Ok(None);
        }
        let item = match head.kind {
            RecordKind::Data => {
                let block = BlockIndex(head.first);
                Item::Data { block, digest: head.digest, bytes: self.payload(&head, size)? }
            }
            RecordKind::Pieces => {
                let (block, bytes) = (BlockIndex(head.first), self.payload(&head, size)?);
                Item::Pieces { block, digest: head.digest, mask: head.mask, bytes }
            }
            RecordKind::Zero => Item::Zero { first: BlockIndex(head.first), count: head.count },
            RecordKind::End => self.trailer(&head)?,
        };
        if let State::Records(_, waiting) = &mut self.state {
            *waiting = None;
            self.headers.update(&self.buffer[self.used..][..HEAD_LEN]);
            self.records += 1;
            self.next_block = head.first + head.count;
        }
        self.used += whole_len;
        Ok(Some(item))
    }

    /// What a header must fulfil for this disk and at this place, before anything is buffered or allocated for it.
    fn check_against_disk(&self, head: &Head, size: DiskSize) -> Result<()> {
        if head.kind == RecordKind::End {
            return Ok(());
        }
        let fail = |why| Err(self.corrupt_record(Some(head.first), why));
        let blocks = size.blocks();
        if head.first >= blocks || head.count > blocks - head.first {
            return fail("it lies beyond the disk");
        }
        if head.first < self.next_block {
            return fail("it is not in ascending order");
        }
        let block_len = BlockIndex(head.first).bytes(size).len() as usize;
        if !head.mask.fits(block_len) {
            return fail("it has pieces beyond the disk");
        }
        let payload_len = head.payload_len as usize;
        let raw_len = raw_len(head, size);
        match head.codec {
            Codec::Stored if payload_len != raw_len => fail("its length does not fit its content"),
            Codec::Zstd if payload_len >= raw_len => fail("it is compressed to more than it was"),
            _ => Ok(()),
        }
    }

    fn payload(&mut self, head: &Head, size: DiskSize) -> Result<Vec<u8>> {
        let payload = &self.buffer[self.used + HEAD_LEN..][..head.payload_len as usize];
        let raw_len = raw_len(head, size);
        match head.codec {
            Codec::Stored => Ok(payload.to_vec()),
            Codec::Zstd => {
                // zstd writes into the vector's capacity and never beyond, whatever the frame promises of itself.
                let mut raw = Vec::with_capacity(raw_len);
                let outcome = self.decompressor.decompress_to_buffer(payload, &mut raw);
                match outcome {
                    Ok(_) if raw.len() == raw_len => Ok(raw),
                    Ok(_) => Err(self.corrupt_record(Some(head.first), "it decompresses to another length")),
                    Err(e) => Err(self.corrupt_record(Some(head.first), "it does not decompress").source(e)),
                }
            }
        }
    }

    fn trailer(&mut self, head: &Head) -> Result<Item> {
        if head.first != self.records {
            return Err(self.corrupt(format!("its trailer counts {} records, and {} came", head.first, self.records)));
        }
        let hash = &self.buffer[self.used + HEAD_LEN..][..TRAILER_LEN];
        if hash != self.headers.finalize().as_bytes() {
            return Err(self.corrupt("its records are not those its trailer was made for"));
        }
        let trailer = Trailer { records: head.first, to_root: head.digest };
        self.state = State::Done(trailer);
        Ok(Item::Trailer(trailer))
    }
}

/// Bytes of a record's content once decompressed.
fn raw_len(head: &Head, size: DiskSize) -> usize {
    let block_len = BlockIndex(head.first).bytes(size).len() as usize;
    match head.kind {
        RecordKind::Data => block_len,
        RecordKind::Pieces => head.mask.bytes_len(block_len),
        RecordKind::Zero => 0,
        RecordKind::End => TRAILER_LEN,
    }
}
