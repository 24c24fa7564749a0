//! Making a patch: [`RecordEncoder`] turns blocks into records, one per worker thread; [`StreamTail`] sees the records
//! in their order and closes the stream.

use super::record::{Codec, HEAD_LEN, Head, RecordKind};
use super::{Compression, Header, PieceMask};
use crate::block::digest::Digest;
use crate::block::{BLOCK_LEN, BlockIndex, DiskSize};
use crate::error::{Error, Kind, Result};

/// Payloads below this many bytes are stored: a zstd frame costs more than it could save.
const COMPRESS_MIN: usize = 64;

/// After so many incompressible payloads in a row the encoder stops trying for a while.
const GIVE_UP_AFTER: u32 = 4;

/// Payloads stored untried after the first giving up; doubled each time the next try fails as well, up to the maximum.
const REST_FIRST: u32 = 8;
const REST_MAX: u32 = 64;

/// Encodes records, each independent of the others. Not bound to a disk or a stream.
///
/// Compression adapts to what it meets: a payload is stored when zstd does not save a sixteenth of it, and after some
/// failures in a row the next payloads are stored untried. Encrypted and compressed guest data lies in long runs, and
/// there the worker is spared; a run of at most 64 compressible blocks behind it pays with bandwidth. The bytes of a
/// patch therefore depend on how its blocks fell to the workers; its meaning does not.
pub struct RecordEncoder {
    /// `None`: every payload is stored.
    compressor: Option<zstd::bulk::Compressor<'static>>,
    /// Where compressed payloads are made; as long as a block.
    scratch: Vec<u8>,
    gathered: Vec<u8>,
    effort: Effort,
    /// For now payloads are stored untried, whatever they are.
    resting: bool,
}

impl RecordEncoder {
    /// An encoder that compresses as `compression` says. `Io` if zstd cannot be set up.
    pub fn new(compression: Compression) -> Result<Self> {
        let compressor = compression.level().map(zstd::bulk::Compressor::new).transpose();
        let compressor = compressor.map_err(|e| Error::new(Kind::Io, "cannot set up compression").source(e))?;
        Ok(Self {
            compressor,
            scratch: vec![0; BLOCK_LEN],
            gathered: Vec::new(),
            effort: Effort::default(),
            resting: false,
        })
    }

    /// Whether payloads are compressed from here on, if they are at all.
    pub fn set_compressing(&mut self, yes: bool) {
        self.resting = !yes;
    }

    /// Appends a record with the whole content of a block to `out`, or that it is zero if `digest` says so.
    /// `bytes` is the block within the disk: shorter than [`BLOCK_LEN`] only at its end.
    ///
    /// # Panics
    /// If `bytes` is empty or longer than a block.
    pub fn data(&mut self, block: BlockIndex, digest: Digest, bytes: &[u8], out: &mut Vec<u8>) {
        assert!((1..=BLOCK_LEN).contains(&bytes.len()), "a block has 1 to {BLOCK_LEN} bytes");
        if digest.is_zero() {
            return self.zero(block, 1, out);
        }
        self.record(RecordKind::Data, block, digest, PieceMask::default(), bytes, out);
    }

    /// Appends a record with the pieces `mask` of a block to `out`; `digest` and `block_bytes` are those of the whole
    /// block. A mask of all pieces makes a [`RecordEncoder::data`] record.
    ///
    /// # Panics
    /// If the mask is empty or has pieces beyond the block, or `block_bytes` is longer than a block.
    pub fn pieces(
        &mut self,
        block: BlockIndex,
        digest: Digest,
        mask: PieceMask,
        block_bytes: &[u8],
        out: &mut Vec<u8>,
    ) {
        assert!(!mask.is_empty() && mask.fits(block_bytes.len()), "pieces lie within their block");
        if digest.is_zero() || mask == PieceMask::all(block_bytes.len()) {
            return self.data(block, digest, block_bytes, out);
        }
        let mut gathered = std::mem::take(&mut self.gathered);
        gathered.clear();
        mask.gather(block_bytes, &mut gathered);
        self.record(RecordKind::Pieces, block, digest, mask, &gathered, out);
        self.gathered = gathered;
    }

    /// Appends a record that says that `count` blocks from `first` on read as zeros.
    ///
    /// # Panics
    /// If `count` is 0.
    pub fn zero(&self, first: BlockIndex, count: u64, out: &mut Vec<u8>) {
        assert!(count > 0, "a run of zero blocks is not empty");
        out.extend_from_slice(&Head::zero(first.0, count).encode());
    }

    fn record(
        &mut self,
        kind: RecordKind,
        block: BlockIndex,
        digest: Digest,
        mask: PieceMask,
        raw: &[u8],
        out: &mut Vec<u8>,
    ) {
        let (codec, payload) = match self.compress(raw) {
            Some(len) => (Codec::Zstd, &self.scratch[..len]),
            None => (Codec::Stored, raw),
        };
        let payload_len = payload.len() as u32;
        let head = Head { kind, codec, mask, payload_len, first: block.0, count: 1, digest };
        out.reserve(HEAD_LEN + payload.len());
        out.extend_from_slice(&head.encode());
        out.extend_from_slice(payload);
    }

    /// Length of the compressed payload in `scratch`; `None`: to be stored.
    fn compress(&mut self, raw: &[u8]) -> Option<usize> {
        let compressor = self.compressor.as_mut()?;
        if self.resting || raw.len() < COMPRESS_MIN || !self.effort.worth_a_try() {
            return None;
        }
        // Room for what is strictly less than 15/16. zstd gives up when it is full: any failure means "store it".
        let room = (raw.len() * 15).div_ceil(16) - 1;
        let len = compressor.compress_to_buffer(raw, &mut self.scratch[..room]).ok();
        self.effort.learn(len.is_some());
        len
    }
}

/// When to try compressing.
#[derive(Debug, Default)]
struct Effort {
    /// Tries in a row that saved nothing.
    failures: u32,
    /// Payloads still to be stored untried.
    resting: u32,
    /// Length of the next rest beyond the first.
    rest_len: u32,
}

impl Effort {
    fn worth_a_try(&mut self) -> bool {
        let resting = self.resting > 0;
        self.resting = self.resting.saturating_sub(1);
        !resting
    }

    fn learn(&mut self, saved: bool) {
        if saved {
            *self = Self::default();
            return;
        }
        self.failures += 1;
        if self.failures >= GIVE_UP_AFTER {
            self.rest_len = (self.rest_len * 2).clamp(REST_FIRST, REST_MAX);
            self.resting = self.rest_len;
            // One more failure after the rest is enough for the next.
            self.failures = GIVE_UP_AFTER - 1;
        }
    }
}

/// Begins a stream, sees every record in its order, and closes the stream with the trailer.
pub struct StreamTail {
    headers: blake3::Hasher,
    size: DiskSize,
    records: u64,
    next_block: u64,
}

impl StreamTail {
    /// Appends banner and header to `out`.
    pub fn begin(header: &Header, out: &mut Vec<u8>) -> Self {
        let encoded = header.encode();
        let mut headers = blake3::Hasher::new();
        headers.update(&encoded);
        out.extend_from_slice(&encoded);
        Self { headers, size: header.size, records: 0, next_block: 0 }
    }

    /// Takes note of records that go into the stream next: whole ones, as a [`RecordEncoder`] made them.
    ///
    /// # Panics
    /// If they are not whole, not in ascending order, overlap, or lie beyond the disk: such a patch would be refused by
    /// every target, so that it must not leave this host.
    pub fn observe(&mut self, mut encoded_records: &[u8]) {
        while !encoded_records.is_empty() {
            let head = encoded_records.get(..HEAD_LEN).map(Head::decode).expect("records are observed whole");
            let head = head.expect("records come from a RecordEncoder");
            assert!(head.kind != RecordKind::End, "the trailer is not a record to observe");
            assert!(head.first >= self.next_block, "block {} is not in ascending order", head.first);
            let blocks = self.size.blocks();
            let within = head.first < blocks && head.count <= blocks - head.first;
            assert!(within, "block {} lies beyond the disk", head.first);
            self.next_block = head.first + head.count;
            self.records += 1;
            self.headers.update(&encoded_records[..HEAD_LEN]);
            let rest = encoded_records.get(HEAD_LEN + head.payload_len as usize..);
            encoded_records = rest.expect("records are observed whole");
        }
    }

    /// Records observed so far.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Appends the trailer; nothing may follow it. `to_root` is the root of the disk after the patch.
    pub fn trailer(self, to_root: Digest, out: &mut Vec<u8>) {
        out.extend_from_slice(&Head::end(self.records, to_root).encode());
        out.extend_from_slice(self.headers.finalize().as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effort_rests_longer_each_time_and_is_woken_by_success() {
        let mut effort = Effort::default();
        // 'T' tried, '.' not; what follows is what the try would yield.
        let mut script = |n: usize, compressible: bool| -> String {
            let mut one = || {
                let tried = effort.worth_a_try();
                if tried {
                    effort.learn(compressible);
                }
                if tried { 'T' } else { '.' }
            };
            (0..n).map(|_| one()).collect()
        };
        assert_eq!(script(14, false), "TTTT........T.");
        assert_eq!(script(16, true), "...............T");
        assert_eq!(script(3, true), "TTT");
        assert_eq!(script(5, false), "TTTT.", "a success forgets all failures");
        let tries = script(10_000, false).chars().filter(|&c| c == 'T').count();
        assert!(tries < 200, "{tries} tries in 10,000 incompressible payloads");
    }
}
