//! The nodes of one digest tree in a sparse file: the levels one after another, blocks first; a zero digest is a hole.
//!
//! What stands before the levels is the caller's (`LEVELS_START` bytes), and so is every promise of durability.

use crate::block::changes::Run;
use crate::block::digest::Digest;
use crate::block::tree::{ChangedNode, NodeSource, TreeShape, TreeUpdate};
use crate::block::{BlockIndex, DiskSize};
use crate::error::{Error, Kind, Result};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Every level begins at a multiple of this.
const ALIGNMENT: u64 = 4096;

/// Where level 0 begins; the bytes before it are whatever the owner of the file writes there.
pub(crate) const LEVELS_START: u64 = 2 * ALIGNMENT;

/// Nodes gathered before they are written: 32 KiB of file.
const PENDING_MAX: usize = 1024;

/// Reads at any position by several threads; one writer.
#[derive(Debug)]
pub struct NodeFile {
    file: File,
    path: PathBuf,
    shape: TreeShape,
}

impl NodeFile {
    /// Over a file that holds a tree of this shape already.
    pub(crate) fn over(file: File, path: PathBuf, size: DiskSize) -> Self {
        Self { file, path, shape: TreeShape::new(size) }
    }

    /// In a new file: the tree of a disk of zeros.
    pub(crate) fn create(file: File, path: PathBuf, size: DiskSize) -> Result<Self> {
        let this = Self::over(file, path, size);
        let len = this.offset(this.shape.top() + 1, 0);
        this.file.set_len(len).map_err(|e| this.io("cannot size", e))?;
        Ok(this)
    }

    /// The tree of a disk of zeros, in a file without a name in the directory for temporary files.
    pub fn temporary(size: DiskSize) -> Result<Self> {
        let dir = std::env::temp_dir();
        let file = tempfile::tempfile_in(&dir).map_err(|e| Error::io("cannot create a temporary file", &dir, e))?;
        Self::create(file, dir, size)
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Size of the disk that the tree covers.
    pub fn size(&self) -> DiskSize {
        self.shape.size()
    }

    /// Levels of the tree, and the nodes on each.
    pub fn shape(&self) -> TreeShape {
        self.shape
    }

    /// Nodes of the tree; zero beyond its shape.
    pub fn nodes(&self, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        let inside = self.shape.clip(level, range.clone());
        let mut bytes = vec![0; (inside.end - inside.start) as usize * Digest::LEN];
        let at = self.offset(level, inside.start);
        self.file.read_exact_at(&mut bytes, at).map_err(|e| self.io("cannot read", e))?;
        let mut nodes: Vec<Digest> =
            bytes.chunks_exact(Digest::LEN).map(|d| Digest(d.try_into().expect("chunks of 32 bytes"))).collect();
        nodes.resize((range.end - range.start) as usize, Digest::ZERO);
        Ok(nodes)
    }

    /// Carries the tree from `old` (of the same size; it may be this very file) by what changed, in ascending order,
    /// and returns the new root. [`Kind::Corrupt`] where the runs are out of order or range.
    pub fn apply(&self, old: impl NodeSource, changes: impl Iterator<Item = Result<Run>>) -> Result<Digest> {
        let mut pending: Vec<Pending> = (0..self.shape.levels()).map(|_| Pending::default()).collect();
        let size = self.shape.size();
        let mut update = TreeUpdate::new(old, size, size, |node: ChangedNode| {
            let level = &mut pending[usize::from(node.level)];
            if level.digests.len() == PENDING_MAX || node.index != level.start + level.digests.len() as u64 {
                self.write_pending(node.level, level)?;
                level.start = node.index;
            }
            level.digests.push(node.digest);
            Ok(())
        })?;
        let mut next = 0;
        for run in changes {
            let run = run?;
            // The tree panics on what is out of order or range. The lists are files, and may be of another disk.
            if run.first().0 < next || run.end() > size.blocks() {
                let what = format!("the change list has a run at block {} out of order or range", run.first().0);
                return Err(Error::new(Kind::Corrupt, what));
            }
            next = run.end();
            match run {
                Run::Zero { first, count } => update.push_zero(first, count)?,
                Run::Digests { first, digests } => {
                    (first.0..).zip(digests).try_for_each(|(block, digest)| update.push(BlockIndex(block), digest))?;
                }
            }
        }
        let root = update.finish()?;
        for (level, nodes) in pending.iter_mut().enumerate() {
            self.write_pending(level as u8, nodes)?;
        }
        Ok(root)
    }

    pub(crate) fn write_pending(&self, level: u8, nodes: &mut Pending) -> Result<()> {
        let bytes: Vec<u8> = nodes.digests.iter().flat_map(|d| d.0).collect();
        nodes.digests.clear();
        self.file.write_all_at(&bytes, self.offset(level, nodes.start)).map_err(|e| self.io("cannot write", e))
    }

    /// Where a node lies.
    pub(crate) fn offset(&self, level: u8, index: u64) -> u64 {
        let lower: u64 =
            (0..level).map(|l| (self.shape.nodes_at(l) * Digest::LEN as u64).next_multiple_of(ALIGNMENT)).sum();
        LEVELS_START + lower + index * Digest::LEN as u64
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn io(&self, verb: &str, e: std::io::Error) -> Error {
        Error::io(format!("{verb} the digest file"), &self.path, e)
    }
}

impl NodeSource for &NodeFile {
    fn nodes(&mut self, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        NodeFile::nodes(self, level, range)
    }
}

/// Neighbouring nodes of one level waiting to be written at once.
#[derive(Default)]
pub(crate) struct Pending {
    pub(crate) start: u64,
    pub(crate) digests: Vec<Digest>,
}
