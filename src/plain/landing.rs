//! Where a patch lands: chosen once its header has come, from what is there and what was wished.

use super::incoming::Into;
use super::place::{self, duplicate, part_of, remove};
use super::redo::Spool;
use super::{Way, WayWish, Wish};
use crate::block::DiskSize;
use crate::block::digest::Digest;
use crate::error::{Error, Kind, Result};
use crate::flock::Flock;
use crate::image::qcow2::{self, Header as Qcow2Header};
use crate::image::raw::RawWriter;
use crate::image::{Format, Image, ImageMut, Layer, qemu_img};
use crate::patch::Header;
use std::fs::File;
use std::path::{Path, PathBuf};

/// The size of a qcow2 image is a multiple of this.
const SECTOR_LEN: u64 = 512;

/// A place that takes a patch.
pub(super) struct Landing {
    pub(super) into: Into,
    pub(super) way: Way,
    /// The lock of a part file.
    _held: Option<Flock>,
}

/// All that decides where a patch lands.
pub(super) struct Choice {
    pub(super) wish: Wish,
    /// With its path real.
    pub(super) layer: Layer,
    pub(super) exists: bool,
    /// What a copy that was cut short left, and its lock.
    pub(super) part: Option<(PathBuf, Flock)>,
    pub(super) redo: PathBuf,
    /// Size and root of what is there.
    pub(super) base: Option<(DiskSize, Digest)>,
}

/// Refuses wishes that cannot be fulfilled, before anything is read.
pub(super) fn check_way(wish: &Wish, layer: &Layer) -> Result<()> {
    let refuse =
        |what: &'static str, hint: &'static str| Err(Error::new(Kind::Refused, what).path(&layer.path).hint(hint));
    match (layer.block_device, layer.format, wish.way) {
        (true, Format::Qcow2, _) => {
            refuse("a qcow2 image on a block device is not written", "write raw contents to the device: --format raw")
        }
        (true, _, WayWish::Reflink | WayWish::Copy) => {
            refuse("nothing can take the place of a block device", "use --atomic redo, or --in-place")
        }
        (_, Format::Qcow2, WayWish::Redo | WayWish::InPlace) => refuse(
            "a qcow2 image is not changed in place: what is cut short could leave its tables torn",
            "use --atomic copy, or let `auto` choose",
        ),
        _ => Ok(()),
    }
}

/// Refuses qcow2 images that we cannot write, before anything is read.
pub(super) fn check_qcow2(layer: &Layer) -> Result<()> {
    if layer.format != Format::Qcow2 {
        return Ok(());
    }
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
    pub(super) fn land(self, header: &Header) -> Result<Landing> {
        self.check(header)?;
        // qemu-img makes no image empty that was not made so.
        if header.from_root.is_none() || (header.size == DiskSize(0) && self.layer.format == Format::Qcow2) {
            return self.anew(header);
        }
        if let Some((part, held)) = self.part {
            let way = if self.exists { Way::Copy } else { Way::New };
            return Ok(Landing { into: open(&part, self.layer.format, header.size)?, way, _held: Some(held) });
        }
        let wish = match (self.wish.way, self.layer.format) {
            (WayWish::Auto, _) if self.layer.block_device => WayWish::Redo,
            (WayWish::Auto, Format::Raw) if !place::can_reflink(&self.layer.path) => WayWish::Redo,
            (wish, _) => wish,
        };
        match wish {
            WayWish::Redo => {
                let into = Into::Spool(Spool::create(&self.layer, self.redo)?);
                Ok(Landing { into, way: Way::Redo, _held: None })
            }
            WayWish::InPlace => {
                let mut writer = RawWriter::open_exact(&self.layer, Some(header.size))?;
                if writer.size() < header.size {
                    writer.resize(header.size)?;
                }
                Ok(Landing { into: Into::Raw(writer), way: Way::InPlace, _held: None })
            }
            wish => {
                let part = part_of(&self.layer.path)?;
                let way = duplicate(&self.layer.path, &part, wish)?;
                let held = place::hold(&part)?;
                Ok(Landing { into: open(&part, self.layer.format, header.size)?, way, _held: Some(held) })
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
        if self.layer.format == Format::Qcow2 && !header.size.0.is_multiple_of(SECTOR_LEN) {
            let what = format!("{} bytes is not a size that a qcow2 image can have", header.size);
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

    /// A file of its own, whatever is there.
    fn anew(self, header: &Header) -> Result<Landing> {
        let part = part_of(&self.layer.path)?;
        drop(self.part);
        remove(&part)?;
        let into = match self.layer.format {
            Format::Raw => Into::Raw(RawWriter::create_exact(&part, header.size)?),
            Format::Qcow2 => Into::Qcow2(qcow2::create(&part, header.size, None)?),
        };
        Ok(Landing { into, way: Way::New, _held: Some(place::hold(&part)?) })
    }
}

/// Opens what will take the image's place, at least as large as it is to be.
fn open(part: &Path, format: Format, size: DiskSize) -> Result<Into> {
    let layer = Layer { path: part.to_owned(), format, block_device: false, data_file: None };
    match format {
        Format::Raw => {
            let mut writer = RawWriter::open_exact(&layer, None)?;
            if writer.size() < size {
                writer.resize(size)?;
            }
            Ok(Into::Raw(writer))
        }
        Format::Qcow2 => {
            if qcow2::open_write(part)?.size() < size {
                qemu_img::resize(part, size)?;
            }
            qcow2::open_write(part).map(Into::Qcow2)
        }
    }
}

impl Landing {
    /// Ends the writing: durable, cut to its size, and closed. `part` is the file, `None` where it is the image itself.
    pub(super) fn finish(self, size: DiskSize, part: Option<&Path>) -> Result<()> {
        match self.into {
            Into::Raw(mut writer) => {
                if writer.size() > size {
                    writer.resize(size)?;
                }
                writer.sync()
            }
            Into::Qcow2(writer) => {
                writer.sync()?;
                let larger = writer.size() > size;
                drop(writer);
                part.filter(|_| larger).map_or(Ok(()), |part| qemu_img::resize(part, size))
            }
            Into::Spool(_) => Err(Error::new(Kind::Usage, "a redo file is published, and no image")),
        }
    }
}
