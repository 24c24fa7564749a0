//! A patch that starts from nothing, written into a file of its own: the other end of an export.
//!
//! Invariants
//! - The file appears under its name when it is whole and durable, and not before; whatever was there stays until then.
//! - Every block is compared with its digest, and all of them with the point's root: what was damaged on the target or
//!   on the way is not handed out as the point.

use super::PointDisk;
use super::upkeep::PatchStream;
use crate::block::{BLOCK_LEN, BlockIndex};
use crate::engine::applier::{Applier, PatchedImage};
use crate::error::{Error, Kind, Result, advice};
use crate::image::raw::RawWriter;
use crate::image::{Format, ImageMut, qcow2};
use crate::name::DomainUuid;
use crate::patch::{Decoder, Item, Limits, Trailer};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Where an export goes.
#[derive(Debug, Clone)]
pub struct Output {
    /// Path of the new file. A temporary file lies beside it until the content is whole and durable.
    pub path: PathBuf,
    /// Format of the new file: raw or qcow2.
    pub format: Format,
    /// Replace a file that is there.
    pub force: bool,
}

/// Writes `disk` of `domain`, as `stream` brings it, into a new file, sparse, mode 0600. Returns the bytes of guest
/// data written. `progress` gets (done, total) bytes of the disk. [`Kind::Conflict`] if the file is there already and
/// is not to be replaced, [`Kind::Corrupt`] if what came is not the point. Durable when it returns; after an error
/// nothing is left.
pub fn receive_file(
    stream: &mut dyn PatchStream,
    domain: &DomainUuid,
    disk: &PointDisk,
    output: &Output,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<u64> {
    check_free(output)?;
    let name = output
        .path
        .file_name()
        .ok_or_else(|| Error::new(Kind::Usage, "this is no name of a file").path(&output.path))?;
    let dir = output.path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let part = dir.join(format!(".{}.{}.part", name.to_string_lossy(), std::process::id()));
    // Left by a process of the same number that was killed.
    let _ = fs::remove_file(&part);
    let written = write(stream, domain, disk, &part, output.format, progress).and_then(|bytes| {
        put_in_place(&part, output)?;
        let synced = File::open(dir).and_then(|d| d.sync_all());
        synced.map_err(|e| Error::io("cannot sync the directory", dir, e))?;
        Ok(bytes)
    });
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written
}

fn check_free(output: &Output) -> Result<()> {
    match fs::symlink_metadata(&output.path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io("cannot look at the output", &output.path, e)),
        Ok(there) if !there.is_file() => {
            Err(Error::new(Kind::Conflict, "this is there, and it is not a plain file").path(&output.path))
        }
        Ok(_) if !output.force => Err(exists(&output.path)),
        Ok(_) => Ok(()),
    }
}

fn exists(path: &Path) -> Error {
    Error::new(Kind::Conflict, "the file is there already").path(path).advise(advice::Image::OtherNameOrOverwrite)
}

fn put_in_place(part: &Path, output: &Output) -> Result<()> {
    use rustix::fs::{CWD, RenameFlags};
    let cannot = |e: std::io::Error| Error::io("cannot put the file in its place", &output.path, e);
    if output.force {
        return fs::rename(part, &output.path).map_err(cannot);
    }
    match rustix::fs::renameat_with(CWD, part, CWD, &output.path, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::EXIST) => Err(exists(&output.path)),
        // A file system that does not know how: it was not there when we began.
        Err(rustix::io::Errno::INVAL) => fs::rename(part, &output.path).map_err(cannot),
        Err(e) => Err(cannot(e.into())),
    }
}

fn write(
    stream: &mut dyn PatchStream,
    domain: &DomainUuid,
    disk: &PointDisk,
    part: &Path,
    format: Format,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<u64> {
    let size = disk.size.whole_sectors();
    let image: Box<dyn ImageMut> = match format {
        Format::Raw => Box::new(RawWriter::create(part, size)?),
        Format::Qcow2 => Box::new(qcow2::create(part, size, None)?),
    };
    let bytes = fill(stream, domain, disk, image.as_ref(), progress)?;
    image.sync()?;
    drop(image);
    if format == Format::Raw && size != disk.size {
        let cut =
            File::options().write(true).open(part).and_then(|f| f.set_len(disk.size.0).and_then(|()| f.sync_all()));
        cut.map_err(|e| Error::io("cannot cut the file to the size of the disk", part, e))?;
    }
    Ok(bytes)
}

fn fill(
    stream: &mut dyn PatchStream,
    domain: &DomainUuid,
    disk: &PointDisk,
    image: &dyn ImageMut,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<u64> {
    let mut decoder = Decoder::new(Limits { size_max: disk.size })?;
    let mut applier = Applier::new(None, disk.size, None)?;
    let mut ended = false;
    while !ended {
        let chunk = stream.next_chunk()?;
        ended = chunk.is_empty();
        decoder.push(&chunk);
        while let Some(item) = decoder.next_item()? {
            match &item {
                Item::Header(header) => {
                    if header.domain != *domain || header.disk != disk.name || header.size != disk.size {
                        return Err(other("another disk's"));
                    }
                    if header.from_root.is_some() {
                        return Err(other("one that builds on another point"));
                    }
                }
                Item::Data { block, .. } => progress(block.offset() + BLOCK_LEN as u64, disk.size.0),
                _ => {}
            }
            applier.take(item, &mut NewFile(image))?;
        }
    }
    let damaged = |e: Error| match e.kind() {
        Kind::Corrupt => e.advise(advice::Store::VerifyPoint),
        _ => e,
    };
    // Whatever root the stream names: it has to be the point's.
    let trailer = Trailer { to_root: disk.root, ..decoder.finish()? };
    let applied = applier.finish(&trailer).map_err(damaged)?;
    progress(disk.size.0, disk.size.0);
    Ok(applied.disk.bytes_written)
}

/// A new file: zero where nothing is written.
struct NewFile<'a>(&'a dyn ImageMut);

impl PatchedImage for NewFile<'_> {
    fn image(&self) -> Result<Option<&dyn ImageMut>> {
        Ok(Some(self.0))
    }

    fn block_before(&self, _: BlockIndex) -> Result<Vec<u8>> {
        Err(other("one with pieces of blocks"))
    }
}

fn other(what: &str) -> Error {
    Error::new(Kind::Protocol, format!("the patch that came is {what}"))
}
