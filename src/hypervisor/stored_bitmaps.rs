//! [`Tracking`] of a domain that is off: the bitmaps that lie in its qcow2 images, by `qemu-img` and `qemu-nbd`.
//!
//! Nobody records while no QEMU runs, because nobody writes; what has the image open for writing meanwhile (`qemu-img
//! commit`, a mount of its file system) is QEMU's own and records too. Adding and removing write to the image's header,
//! under QEMU's locks: for these milliseconds a start of the domain is refused by the lock. Looking takes no lock.

use super::{BitmapView, Tracking};
use crate::block::ByteRange;
use crate::error::{Error, Kind, Result};
use crate::image::nbd::{NbdImage, bitmap_context};
use crate::image::qemu_nbd::{QemuNbd, Serve};
use crate::image::{Chain, Image, Layer, qemu_img};
use crate::name::DomainUuid;
use std::path::PathBuf;

/// The images' own bitmaps; the domain is named for the sake of the trait alone.
pub struct StoredBitmaps {
    runtime_dir: PathBuf,
}

impl StoredBitmaps {
    /// `runtime_dir`: for sockets; its path is short (at most about 90 bytes).
    pub fn new(runtime_dir: PathBuf) -> Self {
        Self { runtime_dir }
    }

    fn dirty_of(&self, layer: &Layer, name: &str) -> Result<Vec<ByteRange>> {
        // The marks alone are wanted: nothing below the image is opened.
        let chain = Chain(vec![layer.clone()]);
        let server = QemuNbd::start(&Serve {
            chain: &chain,
            runtime_dir: &self.runtime_dir,
            force_share: true,
            connections: 1,
            bitmap: Some(name),
        })?;
        let marked = NbdImage::connect(server.socket(), "", &[bitmap_context(name)], 1)
            .and_then(|image| image.dirty(name, image.size().range()));
        let stopped = server.stop();
        let marked = marked?;
        stopped?;
        Ok(marked)
    }
}

impl Tracking for StoredBitmaps {
    /// `dirty_bytes` is not known without reading a bitmap: 0 here.
    fn bitmaps(&self, _domain: &DomainUuid, layers: &[Layer]) -> Result<Vec<Vec<BitmapView>>> {
        layers.iter().map(stored_in).collect()
    }

    fn add_bitmap(&self, _domain: &DomainUuid, layers: &[Layer], name: &str) -> Result<()> {
        for layer in layers {
            qemu_img::add_bitmap(layer, name)?;
            if !stored_in(layer)?.iter().any(|b| b.name == name && b.recording && !b.inconsistent) {
                return Err(Error::new(Kind::Refused, format!("the bitmap {name} was added and is not there"))
                    .path(&layer.path));
            }
        }
        Ok(())
    }

    fn remove_bitmap(&self, _domain: &DomainUuid, layer: &Layer, name: &str) -> Result<()> {
        match stored_in(layer)?.iter().any(|b| b.name == name) {
            true => qemu_img::remove_bitmap(layer, name),
            false => Ok(()),
        }
    }

    fn dirty(&self, _domain: &DomainUuid, wanted: &[(Layer, String)]) -> Result<Vec<Vec<ByteRange>>> {
        wanted.iter().map(|(layer, name)| self.dirty_of(layer, name)).collect()
    }
}

fn stored_in(layer: &Layer) -> Result<Vec<BitmapView>> {
    if !qemu_img::keeps_bitmaps(layer)? {
        return Ok(Vec::new());
    }
    let view = |b: qemu_img::BitmapInfo| BitmapView {
        dirty_bytes: 0,
        granularity_bytes: b.granularity_bytes,
        recording: b.is_auto(),
        persistent: true,
        inconsistent: b.is_inconsistent(),
        busy: false,
        name: b.name,
    };
    Ok(qemu_img::info(&layer.path, layer.format, true)?.bitmaps.into_iter().map(view).collect())
}
