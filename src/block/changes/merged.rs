//! Several change lists laid over each other.

use super::{ChangesHeader, ChangesReader, Run, root_of_runs};
use crate::block::digest::Digest;
use crate::block::{BlockIndex, DiskSize};
use crate::error::{Error, Kind, Result};
use std::io::Read;

/// The change lists of consecutive points as one: what differs between the point before the oldest and the newest. An
/// iterator of runs in ascending order; where several lists name a block, the newest wins. One run per list in memory.
///
/// If the oldest list starts from nothing, the runs are the whole of the newest point, and
/// [`MergedChanges::check_root`] verifies that they are.
///
/// What lies beyond the end of a list's disk was cut off at that point, and is zero if the disk grew again later.
/// Blocks beyond the shortest of the disks are therefore reported even if no list names them: as zeros.
///
/// Once the last item was taken, every list was read to its end, every checksum was right, and each list ended with the
/// root from which the next one starts. Before that, nothing is certain.
pub struct MergedChanges<R: Read> {
    /// Oldest first; never empty.
    layers: Vec<Layer<R>>,
    /// Everything before was yielded, or no list names it.
    at: u64,
    done: bool,
    to_root: Option<Digest>,
}

/// One list, seen as runs that always end with a run of zeros without end: what it cut off.
struct Layer<R: Read> {
    reader: ChangesReader<R>,
    /// The run that ends behind `MergedChanges::at`.
    run: Run,
}

impl<R: Read> MergedChanges<R> {
    /// `readers` oldest first, each at its beginning, at least one. Each list starts where the one before it ends.
    pub fn new(readers: impl IntoIterator<Item = ChangesReader<R>>) -> Result<Self> {
        let layers = readers.into_iter().map(Layer::new).collect::<Result<Vec<_>>>()?;
        if layers.is_empty() {
            return Err(Error::new(Kind::Usage, "no change lists to merge"));
        }
        if let Some(n) = (1..layers.len()).find(|&n| layers[n].reader.header().from_root.is_none()) {
            return Err(joint(n));
        }
        Ok(Self { layers, at: 0, done: false, to_root: None })
    }

    /// Of the list that these amount to: the newest size, the oldest from-root.
    pub fn header(&self) -> ChangesHeader {
        let oldest = self.layers.first().expect("there is at least one list");
        ChangesHeader { size: self.size(), from_root: oldest.reader.header().from_root }
    }

    /// The newest root; `None` until the last item was taken.
    pub fn to_root(&self) -> Option<Digest> {
        self.to_root
    }

    /// Reads everything, and compares the root of what the lists say with the root that the newest promises.
    /// Refused if the oldest does not start from nothing.
    pub fn check_root(mut self) -> Result<Digest> {
        if self.header().from_root.is_some() {
            return Err(Error::new(Kind::Usage, "the oldest change list does not start from nothing"));
        }
        let root = root_of_runs(self.size(), self.by_ref())?;
        if self.to_root == Some(root) {
            Ok(root)
        } else {
            Err(Error::new(Kind::Corrupt, "the change lists do not amount to the root of their newest point"))
        }
    }

    fn size(&self) -> DiskSize {
        self.layers.last().expect("there is at least one list").reader.header().size
    }

    fn next_run(&mut self) -> Result<Option<Run>> {
        let begin = |layer: &Layer<R>| layer.run.first().0.max(self.at);
        let begins: Vec<u64> = self.layers.iter().map(begin).collect();
        let at = begins.iter().copied().min().expect("there is at least one list");
        if at >= self.size().blocks() {
            self.read_out()?;
            return Ok(None);
        }
        let winner = begins.iter().rposition(|&b| b == at).expect("it is someone's minimum");
        // The winner's word holds until its run ends or a newer list has something to say.
        let newer = begins[winner + 1..].iter().copied().min().unwrap_or(u64::MAX);
        let end = self.layers[winner].run.end().min(newer).min(self.size().blocks());
        let word = self.layers[winner].run.part(at, end);
        self.at = end;
        self.layers.iter_mut().try_for_each(|layer| layer.skip_to(end))?;
        Ok(Some(word))
    }

    /// Reads every list to its end, for the checksums, and compares the joints.
    fn read_out(&mut self) -> Result<()> {
        let mut end: Option<Digest> = None;
        for (n, layer) in self.layers.iter_mut().enumerate() {
            if end.is_some() && layer.reader.header().from_root != end {
                return Err(joint(n));
            }
            layer.reader.by_ref().try_for_each(|run| run.map(drop))?;
            let trailer = layer.reader.trailer().expect("a list that ended without an error has a trailer");
            end = Some(trailer.to_root);
        }
        self.to_root = end;
        Ok(())
    }
}

fn joint(n: usize) -> Error {
    Error::new(Kind::Corrupt, format!("change list {n} of a sequence does not start where the one before it ends"))
}

impl<R: Read> Layer<R> {
    fn new(reader: ChangesReader<R>) -> Result<Self> {
        let mut layer = Self { reader, run: Run::Zero { first: BlockIndex(0), count: 0 } };
        layer.skip_to(0)?;
        Ok(layer)
    }

    /// Drops the runs that end at or before `block`.
    fn skip_to(&mut self, block: u64) -> Result<()> {
        while self.run.end() <= block {
            let size = self.reader.header().size;
            self.run = match self.reader.next() {
                Some(run) => run?,
                None => Run::Zero { first: BlockIndex(size.blocks()), count: u64::MAX - size.blocks() },
            };
        }
        Ok(())
    }
}

impl<R: Read> Iterator for MergedChanges<R> {
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
