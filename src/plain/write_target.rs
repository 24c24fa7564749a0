//! Where a patch lands: chosen once its header has come, from what is there and what was wished.

use super::incoming::Writer;
use super::redo::Spool;
use super::{Way, WayWish, Wish, file_name};
use crate::block::digest::Digest;
use crate::block::extent::{Content, is_zero};
use crate::block::{BLOCK_LEN, ByteRange, DiskSize, SECTOR_LEN};
use crate::engine::pump::EXTENT_WINDOW;
use crate::error::{Error, Kind, Result, advice};
use crate::image::foreign::format::{self, AnyFormat};
use crate::image::foreign::writer::{self, ForeignWriter};
use crate::image::qcow2::{self, Header as Qcow2Header};
use crate::image::raw::RawWriter;
use crate::image::{Format, Image, ImageMut, Layer, qemu_img};
use crate::patch::Header;
use crate::plain::beside::{self, PartLock, duplicate, part_of, remove};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const RAW: AnyFormat = AnyFormat::Own(Format::Raw);

/// Bytes copied at once from an image to another one.
const COPY_LEN: usize = 16 * BLOCK_LEN;

/// A place that takes a patch.
pub(super) struct WriteTarget {
    pub(super) into: Writer,
    pub(super) way: Way,
    /// The lock of a part file.
    held: Option<PartLock>,
}

/// All that decides where a patch lands.
pub(super) struct Choice {
    pub(super) wish: Wish,
    /// With its path real.
    pub(super) layer: Layer,
    pub(super) exists: bool,
    /// What a copy that was cut short left, and its lock.
    pub(super) part: Option<(PathBuf, PartLock)>,
    pub(super) redo: PathBuf,
    /// Size and root of what is there.
    pub(super) base: Option<(DiskSize, Digest)>,
    /// What is there.
    pub(super) image: Option<Arc<dyn Image>>,
    /// For the sockets of `qemu-nbd`.
    pub(super) runtime_dir: PathBuf,
}

fn instead(ways: &[advice::Way]) -> advice::Image {
    advice::Image::ChooseWay { ways: ways.to_vec() }
}

/// Refuses wishes that cannot be fulfilled, before anything is read.
pub(super) fn check_way(wish: &Wish, layer: &Layer) -> Result<()> {
    let (name, raw) = (wish.format.as_str(), wish.format == RAW);
    let refuse =
        |what: String, instead: advice::Image| Err(Error::new(Kind::Refused, what).path(&layer.path).advise(instead));
    match (layer.block_device, wish.way) {
        (true, _) if !raw => {
            refuse(format!("a {name} image on a block device is not written"), advice::Image::WriteRaw)
        }
        (true, WayWish::Reflink | WayWish::Copy) => refuse(
            "nothing can take the place of a block device".to_owned(),
            instead(&[advice::Way::Redo, advice::Way::InPlace]),
        ),
        (_, WayWish::Redo | WayWish::InPlace) if !raw => refuse(
            format!("a {name} image is not changed in place: what is cut short could leave its tables torn"),
            instead(&[advice::Way::Copy, advice::Way::Auto]),
        ),
        _ => Ok(()),
    }
}

/// Refuses images that we cannot write, before anything is read.
pub(super) fn check_writable(layer: &Layer, format: AnyFormat) -> Result<()> {
    match format {
        AnyFormat::Own(Format::Raw) => Ok(()),
        AnyFormat::Own(Format::Qcow2) => check_qcow2(layer),
        AnyFormat::Of(format) => writer::check_writable(layer, format),
    }
}

fn check_qcow2(layer: &Layer) -> Result<()> {
    let file = File::open(&layer.path).map_err(|e| Error::io("cannot open the image", &layer.path, e))?;
    let header = Qcow2Header::read(&file, &layer.path)?;
    let why = match header.has_backing() {
        true => Some("has a backing image, which others may read".to_owned()),
        false => header.beyond_us().or_else(|| {
            (header.autoclear() != 0)
                .then(|| "has dirty bitmaps or other extensions that would no longer be true".into())
        }),
    };
    match why {
        None => Ok(()),
        Some(why) => Err(Error::new(Kind::Refused, format!("the image {why}"))
            .path(&layer.path)
            .hint("copy to a new name, which makes a plain qcow2 image, or to a raw one")),
    }
}

/// Whether a qcow2 image that was being written when something ended that holds together, counted anew.
pub(super) fn mended(part: &Path) -> bool {
    qemu_img::check(part, Format::Qcow2).is_ok_and(|report| report.is_sound()) && qemu_img::repair(part).is_ok()
}

impl Choice {
    /// Opens the place for a patch of this header; `Conflict` if the patch is for another base.
    pub(super) fn land(mut self, header: &Header) -> Result<WriteTarget> {
        self.check(header)?;
        // qemu-img makes no image empty that was not made so.
        if header.from_root.is_none() || (header.size == DiskSize(0) && self.wish.format == Format::Qcow2.into()) {
            return self.anew(header);
        }
        // And gives one of others no other size.
        if self.wish.format.foreign().is_some() && header.size != header.size_from {
            return self.anew(header);
        }
        if let Some((part, held)) = self.part.take() {
            let way = if self.exists { Way::Copy } else { Way::New };
            return Ok(WriteTarget { into: self.open(&part, header.size)?, way, held: Some(held) });
        }
        let wish = match self.wish.way {
            WayWish::Auto if self.layer.block_device => WayWish::Redo,
            WayWish::Auto if self.wish.format == RAW && !beside::can_reflink(&self.layer.path) => WayWish::Redo,
            wish => wish,
        };
        match wish {
            WayWish::Redo => {
                let into = Writer::Spool(Spool::create(&self.layer, self.redo)?);
                Ok(WriteTarget { into, way: Way::Redo, held: None })
            }
            WayWish::InPlace => {
                let mut writer = RawWriter::open_exact(&self.layer, Some(header.size))?;
                if writer.size() < header.size {
                    writer.resize(header.size)?;
                }
                Ok(WriteTarget { into: Writer::Raw(writer), way: Way::InPlace, held: None })
            }
            wish => {
                let part = part_of(&self.layer.path)?;
                let way = duplicate(&self.layer.path, &part, wish)?;
                let held = self.worth(beside::hold(&part)?, &part);
                Ok(WriteTarget { into: self.open(&part, header.size)?, way, held: Some(held) })
            }
        }
    }

    fn check(&self, header: &Header) -> Result<()> {
        let path = &self.layer.path;
        let is = self.base.map_or("nothing".to_owned(), |(size, root)| format!("root {root} ({size} bytes)"));
        let wanted = header.from_root.map(|root| (header.size_from, root));
        if let Some((size, root)) = wanted
            && self.base != wanted
        {
            let what = format!("the patch is for an image with root {root} ({size} bytes), and this one has {is}");
            return Err(Error::new(Kind::Conflict, what).path(path));
        }
        let impossible = match self.wish.format {
            AnyFormat::Own(Format::Qcow2) if !header.size.0.is_multiple_of(SECTOR_LEN) => {
                Some("it ends with a sector of 512 bytes")
            }
            AnyFormat::Own(_) => None,
            AnyFormat::Of(format) => format::impossible_size(format, header.size),
        };
        if let Some(why) = impossible {
            let name = self.wish.format.as_str();
            let what = format!("{} bytes is not a size that a {name} image can have: {why}", header.size);
            return Err(Error::new(Kind::Refused, what).path(path).hint("bring a raw image into step with it"));
        }
        if self.layer.block_device && self.base.map(|(size, _)| size) != Some(header.size) {
            let what = format!("the patch is for {} bytes, and a block device is not resized", header.size);
            return Err(Error::new(Kind::Refused, what).path(path));
        }
        if self.layer.block_device && wanted.is_none() {
            let what = "the patch starts from nothing, and a block device always has a content";
            return Err(Error::new(Kind::Refused, what).path(path));
        }
        Ok(())
    }

    /// A file of its own, whatever is there. If the patch starts from that, it holds what that holds.
    fn anew(self, header: &Header) -> Result<WriteTarget> {
        let part = part_of(&self.layer.path)?;
        // What is there may be another program's, which began after we looked.
        let _old = match self.part {
            Some((_, held)) => Some(held),
            None if part.symlink_metadata().is_ok() => Some(beside::hold(&part)?),
            None => None,
        };
        remove(&part)?;
        let format = match self.wish.format {
            AnyFormat::Own(Format::Raw) => {
                let into = Writer::Raw(RawWriter::create_exact(&part, header.size)?);
                return Ok(WriteTarget { into, way: Way::New, held: Some(beside::hold(&part)?) });
            }
            AnyFormat::Own(Format::Qcow2) => {
                let into = Writer::Qcow2(qcow2::create(&part, header.size, None)?);
                return Ok(WriteTarget { into, way: Way::New, held: Some(beside::hold(&part)?) });
            }
            AnyFormat::Of(format) => format,
        };
        beside::create(&part)?;
        let held = beside::hold(&part)?.or_nothing(&part);
        let name = file_name(&self.layer.path)?;
        let writer = ForeignWriter::create(&part, format, header.size, &name, &self.runtime_dir)?;
        if let Some(old) = self.image.filter(|_| header.from_root.is_some()) {
            copy_content(old.as_ref(), &writer)?;
        }
        Ok(WriteTarget { into: Writer::Served(writer), way: Way::New, held: Some(held) })
    }

    /// A part in a format of others is worth nothing until it is whole: its tables may be torn, and nothing tells for
    /// sure.
    fn worth(&self, held: PartLock, part: &Path) -> PartLock {
        if self.wish.format.foreign().is_some() { held.or_nothing(part) } else { held }
    }

    /// Opens what will take the image's place, at least as large as it is to be.
    fn open(&self, part: &Path, size: DiskSize) -> Result<Writer> {
        let format = self.wish.format.of_layer();
        let layer = Layer { path: part.to_owned(), format, block_device: false, data_file: None };
        match self.wish.format {
            AnyFormat::Own(Format::Raw) => {
                let mut writer = RawWriter::open_exact(&layer, None)?;
                if writer.size() < size {
                    writer.resize(size)?;
                }
                Ok(Writer::Raw(writer))
            }
            AnyFormat::Own(Format::Qcow2) => {
                if qcow2::open_write(part)?.size() < size {
                    qemu_img::resize(part, size)?;
                }
                qcow2::open_write(part).map(Writer::Qcow2)
            }
            AnyFormat::Of(format) => ForeignWriter::open(part, format, &self.runtime_dir).map(Writer::Served),
        }
    }
}

/// Writes what `from` holds, as far as both reach, into an image that is all zeros.
fn copy_content(from: &dyn Image, into: &dyn ImageMut) -> Result<()> {
    let size = from.size().min(into.size());
    let mut buffer = vec![0; COPY_LEN];
    for window in (0..size.0).step_by(EXTENT_WINDOW as usize) {
        let window = ByteRange::new(window, size.0.min(window + EXTENT_WINDOW));
        for extent in from.extents(window)?.into_iter().filter(|e| e.content == Content::Data) {
            for at in (extent.range.start..extent.range.end).step_by(COPY_LEN) {
                let bytes = &mut buffer[..(extent.range.end - at).min(COPY_LEN as u64) as usize];
                from.read_at(at, bytes)?;
                for (n, block) in bytes.chunks(BLOCK_LEN).enumerate().filter(|(_, block)| !is_zero(block)) {
                    into.write_at(at + (n * BLOCK_LEN) as u64, block)?;
                }
            }
        }
    }
    Ok(())
}

impl WriteTarget {
    /// Ends the writing: durable, cut to its size, and closed. `part` is the file, `None` where it is the image itself.
    /// Returns its lock.
    pub(super) fn finish(self, size: DiskSize, part: Option<&Path>) -> Result<Option<PartLock>> {
        let done = match self.into {
            Writer::Raw(mut writer) => {
                if writer.size() > size {
                    writer.resize(size)?;
                }
                writer.sync()
            }
            Writer::Qcow2(writer) => {
                writer.sync()?;
                let larger = writer.size() > size;
                drop(writer);
                part.filter(|_| larger).map_or(Ok(()), |part| qemu_img::resize(part, size))
            }
            Writer::Served(writer) => writer.close(),
            Writer::Spool(_) => Err(Error::new(Kind::Usage, "a redo file is published, and no image")),
        };
        done.map(|()| self.held)
    }
}
