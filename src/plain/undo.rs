//! The undo patch: what leads back from where a patch led, made while that patch is looked at.
//!
//! The old contents are gathered in a file without a name; the patch is written once both roots are known, and is
//! durable before the patch that it undoes is put in place.

use crate::block::digest::{Digest, block_digest};
use crate::block::{BlockIndex, DiskSize};
use crate::error::{Error, Kind, Result};
use crate::patch::{Compression, Header, RecordEncoder, StreamTail};
use crate::plain::beside::{dir_of, sync_dir};
use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

pub(super) struct Undo {
    path: PathBuf,
    /// Records, each behind its length.
    records: BufWriter<File>,
    encoder: RecordEncoder,
    record: Vec<u8>,
}

impl Undo {
    /// `path` must not be there yet.
    pub(super) fn create(path: PathBuf) -> Result<Undo> {
        if path.symlink_metadata().is_ok() {
            return Err(Error::new(Kind::Conflict, "the file is there already").path(path).hint("name another one"));
        }
        let dir = dir_of(&path);
        let file = tempfile::tempfile_in(dir).map_err(|e| Error::io("cannot create a temporary file", dir, e))?;
        let records = BufWriter::with_capacity(1 << 20, file);
        Ok(Undo { path, records, encoder: RecordEncoder::new(Compression::FAST)?, record: Vec::new() })
    }

    /// The block as it was. Blocks ascend.
    pub(super) fn push(&mut self, block: BlockIndex, old: &[u8]) -> Result<()> {
        self.record.clear();
        self.encoder.data(block, block_digest(old), old, &mut self.record);
        let len = (self.record.len() as u32).to_le_bytes();
        let written = self.records.write_all(&len).and_then(|()| self.records.write_all(&self.record));
        written.map_err(|e| Error::io("cannot write the undo patch", &self.path, e))
    }

    /// Writes the patch that leads from `after` back to `before`. Durable when it returns.
    pub(super) fn finish(self, before: (DiskSize, Digest), after: (DiskSize, Digest)) -> Result<()> {
        let path = &self.path;
        let cannot = |e| Error::io("cannot write the undo patch", path, e);
        let file = self.records.into_inner().map_err(|e| cannot(e.into_error()))?;
        let mut records = BufReader::with_capacity(1 << 20, file);
        records.rewind().map_err(cannot)?;
        let out = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(cannot)?;
        let mut out = BufWriter::with_capacity(1 << 20, out);
        let mut bytes = Vec::new();
        let mut tail = StreamTail::begin(&Header::plain(Some(after), before.0), &mut bytes);
        loop {
            out.write_all(&bytes).map_err(cannot)?;
            let mut len = [0; 4];
            match records.read_exact(&mut len) {
                Ok(()) => {}
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => break,
                Err(e) => return Err(cannot(e)),
            }
            bytes.resize(u32::from_le_bytes(len) as usize, 0);
            records.read_exact(&mut bytes).map_err(cannot)?;
            tail.observe(&bytes);
        }
        bytes.clear();
        tail.trailer(before.1, &mut bytes);
        out.write_all(&bytes).and_then(|()| out.flush()).and_then(|()| out.get_ref().sync_all()).map_err(cannot)?;
        sync_dir(dir_of(path))
    }
}
