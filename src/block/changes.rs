//! The change list of a point: which blocks differ from the point before, and their digests. A file beside the point.
//!
//! The lists of a replica's points, laid over each other ([`MergedChanges`]), are the digests of any of these points:
//! an old point is verified, and a damaged digest file rebuilt, without believing the images.
//!
//! Invariants
//! - Runs ascend, do not overlap and lie within the disk.
//! - Nothing read is certain before the end was reached: only there the checksum is compared. Whoever acts on
//!   runs that cannot be undone reads the list twice.
//! - Memory is one run, at most [`RUN_DIGESTS_MAX`] digests, whatever the list says.
//!
//! Specified in docs/formats/changes.md.

use super::digest::Digest;
use super::layout::{Banner, Fields};
use super::tree::RootBuilder;
use super::{BlockIndex, DiskSize};
use crate::error::{Error, Kind, Result};
use std::io::{ErrorKind, Read, Write};

mod merged;
mod without;
pub use merged::MergedChanges;
pub use without::Without;

const BANNER: Banner = Banner { what: "changes", version: 1 };

/// Bytes of the header behind the banner: flags, size, from-root.
const HEADER_LEN: usize = 4 + 8 + Digest::LEN;

/// Bytes in front of a run: first block, count, kind.
const RUN_LEN: usize = 8 + 4 + 4;

/// Flag: the point has one before it, whose root is given.
const FLAG_FROM_ROOT: u32 = 1;

const KIND_ZERO: u32 = 0;
const KIND_DIGESTS: u32 = 1;
/// The trailer; `first` is the number of runs before it.
const KIND_END: u32 = 2;

/// Most digests in one run (32 KiB); a longer one is written as several.
pub const RUN_DIGESTS_MAX: usize = 1024;

/// What a list is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChangesHeader {
    /// Size of the disk at this point.
    pub size: DiskSize,
    /// Root of the point before; `None`: this point starts from nothing.
    pub from_root: Option<Digest>,
}

impl ChangesHeader {
    fn encode(&self) -> Vec<u8> {
        let mut out = BANNER.line().into_bytes();
        out.extend_from_slice(&if self.from_root.is_some() { FLAG_FROM_ROOT } else { 0 }.to_le_bytes());
        out.extend_from_slice(&self.size.0.to_le_bytes());
        out.extend_from_slice(&self.from_root.unwrap_or(Digest::ZERO).0);
        out
    }
}

/// Neighbouring blocks that changed alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Run {
    /// `count` blocks, at least one, that read as zeros now.
    Zero {
        /// First block of the run.
        first: BlockIndex,
        /// Number of blocks, at least one.
        count: u64,
    },
    /// Blocks from `first` on, one for each digest, at least one; none of the digests is zero.
    Digests {
        /// Block that the first digest belongs to.
        first: BlockIndex,
        /// New digest of each block, in order; at most `RUN_DIGESTS_MAX` of them in a list.
        digests: Vec<Digest>,
    },
}

impl Run {
    /// First block of the run.
    pub fn first(&self) -> BlockIndex {
        match self {
            Run::Zero { first, .. } | Run::Digests { first, .. } => *first,
        }
    }

    /// Blocks in the run.
    pub fn count(&self) -> u64 {
        match self {
            Run::Zero { count, .. } => *count,
            Run::Digests { digests, .. } => digests.len() as u64,
        }
    }

    /// The first block behind the run.
    pub fn end(&self) -> u64 {
        self.first().0 + self.count()
    }

    /// The blocks `start..end` of the run, which must have them.
    fn part(&self, start: u64, end: u64) -> Run {
        debug_assert!(self.first().0 <= start && start < end && end <= self.end(), "a part lies within its run");
        match self {
            Run::Zero { .. } => Run::Zero { first: BlockIndex(start), count: end - start },
            Run::Digests { first, digests } => {
                let range = (start - first.0) as usize..(end - first.0) as usize;
                Run::Digests { first: BlockIndex(start), digests: digests[range].to_vec() }
            }
        }
    }
}

/// How a list ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChangesTrailer {
    /// Number of runs in the list.
    pub runs: u64,
    /// Root of this point.
    pub to_root: Digest,
}

/// Writes a list, blocks in ascending order. Neighbours become one run. Writes in pieces of a run; not durable by
/// itself.
pub struct ChangesWriter<W: Write> {
    out: W,
    size: DiskSize,
    checksum: blake3::Hasher,
    /// The run that may still grow.
    open: Option<Run>,
    runs: u64,
    next_block: u64,
}

impl<W: Write> ChangesWriter<W> {
    /// Begins a list and writes its header to `out`.
    pub fn new(out: W, header: &ChangesHeader) -> Result<Self> {
        let checksum = blake3::Hasher::new();
        let mut writer = Self { out, size: header.size, checksum, open: None, runs: 0, next_block: 0 };
        writer.write(&header.encode())?;
        Ok(writer)
    }

    /// The block's new digest.
    ///
    /// # Panics
    /// If the block lies beyond the disk or is not in ascending order.
    pub fn push(&mut self, block: BlockIndex, digest: Digest) -> Result<()> {
        if digest.is_zero() {
            return self.push_zero(block, 1);
        }
        self.advance(block, 1);
        if let Some(Run::Digests { first, digests }) = &mut self.open
            && first.0 + digests.len() as u64 == block.0
            && digests.len() < RUN_DIGESTS_MAX
        {
            digests.push(digest);
            return Ok(());
        }
        self.close_run()?;
        self.open = Some(Run::Digests { first: block, digests: vec![digest] });
        Ok(())
    }

    /// `count` blocks that read as zeros now.
    ///
    /// # Panics
    /// If a block lies beyond the disk or is not in ascending order.
    pub fn push_zero(&mut self, first: BlockIndex, count: u64) -> Result<()> {
        self.advance(first, count);
        if count == 0 {
            return Ok(());
        }
        if let Some(Run::Zero { first: start, count: so_far }) = &mut self.open
            && start.0 + *so_far == first.0
        {
            *so_far += count;
            return Ok(());
        }
        self.close_run()?;
        self.open = Some(Run::Zero { first, count });
        Ok(())
    }

    /// Adds all blocks of a run. Panics if a block lies beyond the disk or is out of order.
    pub fn push_run(&mut self, run: &Run) -> Result<()> {
        match run {
            Run::Zero { first, count } => self.push_zero(*first, *count),
            Run::Digests { first, digests } => {
                (first.0..).zip(digests).try_for_each(|(block, digest)| self.push(BlockIndex(block), *digest))
            }
        }
    }

    /// Writes the trailer and gives the writer back. `to_root` is the root of the point.
    pub fn finish(mut self, to_root: Digest) -> Result<W> {
        self.close_run()?;
        let runs = self.runs;
        self.write_run_head(runs, 0, KIND_END)?;
        self.write(&to_root.0)?;
        let checksum = self.checksum.finalize();
        self.out.write_all(checksum.as_bytes()).map_err(cannot_write)?;
        self.out.flush().map_err(cannot_write)?;
        Ok(self.out)
    }

    fn advance(&mut self, first: BlockIndex, count: u64) {
        let blocks = self.size.blocks();
        assert!(first.0 <= blocks && count <= blocks - first.0, "block {} lies beyond the disk", first.0);
        assert!(first.0 >= self.next_block, "block {} is not in ascending order", first.0);
        self.next_block = first.0 + count;
    }

    fn close_run(&mut self) -> Result<()> {
        match self.open.take() {
            None => Ok(()),
            Some(Run::Digests { first, digests }) => {
                self.runs += 1;
                self.write_run_head(first.0, digests.len() as u32, KIND_DIGESTS)?;
                let bytes: Vec<u8> = digests.iter().flat_map(|d| d.0).collect();
                self.write(&bytes)
            }
            Some(Run::Zero { first, count }) => {
                // A count has 32 bits: one run says 256 TiB, and what is beyond takes another.
                let (mut first, mut left) = (first.0, count);
                while left > 0 {
                    let part = u32::try_from(left).unwrap_or(u32::MAX);
                    self.runs += 1;
                    self.write_run_head(first, part, KIND_ZERO)?;
                    first += u64::from(part);
                    left -= u64::from(part);
                }
                Ok(())
            }
        }
    }

    fn write_run_head(&mut self, first: u64, count: u32, kind: u32) -> Result<()> {
        let mut head = [0u8; RUN_LEN];
        head[..8].copy_from_slice(&first.to_le_bytes());
        head[8..12].copy_from_slice(&count.to_le_bytes());
        head[12..].copy_from_slice(&kind.to_le_bytes());
        self.write(&head)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.checksum.update(bytes);
        self.out.write_all(bytes).map_err(cannot_write)
    }
}

fn cannot_write(error: std::io::Error) -> Error {
    Error::from_io("cannot write a change list", error)
}

/// Reads a list run by run. An iterator; after its last item [`ChangesReader::trailer`] is there, and the checksum was
/// right. After an error it yields nothing more, and no trailer. Wants a buffered reader.
pub struct ChangesReader<R: Read> {
    input: R,
    header: ChangesHeader,
    checksum: blake3::Hasher,
    /// Bytes read so far.
    offset: u64,
    runs: u64,
    next_block: u64,
    done: bool,
    trailer: Option<ChangesTrailer>,
}

impl<R: Read> ChangesReader<R> {
    /// Reads the header.
    pub fn new(input: R) -> Result<Self> {
        let header = ChangesHeader { size: DiskSize(0), from_root: None };
        let checksum = blake3::Hasher::new();
        let mut reader =
            Self { input, header, checksum, offset: 0, runs: 0, next_block: 0, done: false, trailer: None };
        reader.banner()?;
        let mut bytes = [0u8; HEADER_LEN];
        reader.read(&mut bytes)?;
        let mut fields = Fields(&bytes);
        let (flags, size, from_root) = (fields.u32(), DiskSize(fields.u64()), fields.digest());
        let from_root = match flags {
            FLAG_FROM_ROOT => Some(from_root),
            0 if from_root.is_zero() => None,
            _ => return Err(reader.corrupt("its header contradicts itself")),
        };
        reader.header = ChangesHeader { size, from_root };
        Ok(reader)
    }

    /// The length of the first line is its version's affair, so it is read up to its newline.
    fn banner(&mut self) -> Result<()> {
        let mut line = Vec::with_capacity(Banner::LEN_MAX);
        while line.last() != Some(&b'\n') {
            if line.len() == Banner::LEN_MAX {
                return Err(BANNER.not_this());
            }
            let mut byte = [0u8; 1];
            self.read(&mut byte)?;
            line.push(byte[0]);
        }
        BANNER.check(&line)
    }

    /// Header of the list, read when the reader was made.
    pub fn header(&self) -> &ChangesHeader {
        &self.header
    }

    /// `None` until the list was read to its end and found whole.
    pub fn trailer(&self) -> Option<&ChangesTrailer> {
        self.trailer.as_ref()
    }

    /// Reads the rest, for its checksum.
    pub fn into_trailer(mut self) -> Result<ChangesTrailer> {
        self.by_ref().try_for_each(|run| run.map(drop))?;
        self.trailer.ok_or_else(|| Error::new(Kind::Corrupt, "this change list was refused already"))
    }

    fn next_run(&mut self) -> Result<Option<Run>> {
        let mut head = [0u8; RUN_LEN];
        self.read(&mut head)?;
        let mut fields = Fields(&head);
        let (first, count, kind) = (fields.u64(), fields.u32(), fields.u32());
        if kind == KIND_END {
            return self.end(first, count).map(|()| None);
        }
        let blocks = self.header.size.blocks();
        if count == 0 || first >= blocks || u64::from(count) > blocks - first {
            return Err(self.corrupt("a run lies beyond the disk or is empty"));
        }
        if first < self.next_block {
            return Err(self.corrupt("its runs are not in ascending order"));
        }
        self.next_block = first + u64::from(count);
        self.runs += 1;
        let first = BlockIndex(first);
        match kind {
            KIND_ZERO => Ok(Some(Run::Zero { first, count: count.into() })),
            KIND_DIGESTS if count as usize <= RUN_DIGESTS_MAX => self.digests(first, count as usize).map(Some),
            KIND_DIGESTS => Err(self.corrupt("a run is longer than any")),
            _ => Err(self.corrupt("a run is of an unknown kind")),
        }
    }

    fn digests(&mut self, first: BlockIndex, count: usize) -> Result<Run> {
        let mut bytes = vec![0u8; count * Digest::LEN];
        self.read(&mut bytes)?;
        let mut fields = Fields(&bytes);
        let digests: Vec<Digest> = (0..count).map(|_| fields.digest()).collect();
        if digests.iter().any(Digest::is_zero) {
            return Err(self.corrupt("a zero block is among digests"));
        }
        Ok(Run::Digests { first, digests })
    }

    fn end(&mut self, runs: u64, count: u32) -> Result<()> {
        let mut to_root = [0u8; Digest::LEN];
        self.read(&mut to_root)?;
        let computed = self.checksum.finalize();
        let mut stored = [0u8; blake3::OUT_LEN];
        self.read(&mut stored)?;
        if stored != *computed.as_bytes() || runs != self.runs || count != 0 {
            return Err(self.corrupt("its checksum does not match"));
        }
        let mut beyond = [0u8; 1];
        match self.input.read(&mut beyond) {
            Ok(0) => {
                self.trailer = Some(ChangesTrailer { runs, to_root: Digest(to_root) });
                Ok(())
            }
            Ok(_) => Err(self.corrupt("there is something after its end")),
            Err(e) => Err(Error::from_io("cannot read a change list", e)),
        }
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<()> {
        match self.input.read_exact(buf) {
            Ok(()) => {
                self.checksum.update(buf);
                self.offset += buf.len() as u64;
                Ok(())
            }
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => Err(self.corrupt("it ends in the middle")),
            Err(e) => Err(Error::from_io("cannot read a change list", e)),
        }
    }

    fn corrupt(&self, why: &str) -> Error {
        Error::new(Kind::Corrupt, format!("the change list is damaged: {why}")).offset(self.offset)
    }
}

impl<R: Read> Iterator for ChangesReader<R> {
    type Item = Result<Run>;

    fn next(&mut self) -> Option<Result<Run>> {
        if self.done {
            return None;
        }
        let next = self.next_run().transpose();
        self.done = !matches!(next, Some(Ok(_)));
        next
    }
}

/// The root of a disk made of nothing but these runs.
pub fn root_of_runs(size: DiskSize, runs: impl Iterator<Item = Result<Run>>) -> Result<Digest> {
    let mut builder = RootBuilder::new(size);
    for run in runs {
        if let Run::Digests { first, digests } = run? {
            (first.0..).zip(digests).for_each(|(block, digest)| builder.push_block(BlockIndex(block), digest));
        }
    }
    Ok(builder.finish())
}

#[cfg(test)]
mod tests;
