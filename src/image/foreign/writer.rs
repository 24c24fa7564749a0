//! An image in a format of others, written through a `qemu-nbd` child.
//!
//! Invariant: nothing ends a write into the tables of such an image that was cut short, so only a file that nobody
//! needs yet is written: a new one, or a copy. Whoever gives it its name has closed it, asked [`check_sound`], and read
//! it.

use crate::block::extent::Extent;
use crate::block::{ByteRange, DiskSize};
use crate::error::{Error, Kind, Result};
use crate::image::foreign::format::{DESCRIPTION_MAX, Foreign, bytes, check};
use crate::image::nbd::NbdImage;
use crate::image::qemu_nbd::{QemuNbd, Serve};
use crate::image::{Chain, Format, Image, ImageMut, Layer, qemu_img, raw};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Refuses an image that cannot be changed, before anything is read: `check`, and `Refused` where its kind is written
/// once only, `Corrupt` where it does not hold together. The caller has the whole lock of it.
pub fn check_writable(layer: &Layer, format: Foreign) -> Result<()> {
    check(layer, format)?;
    if format == Foreign::Vmdk && is_compressed(layer)? {
        return Err(Error::new(
            Kind::Refused,
            "a compressed VMDK (streamOptimized) is written once, and never changed",
        )
        .path(&layer.path)
        .hint("copy to another name, which makes an image that can be changed"));
    }
    sound(layer, format, true)
}

/// As [`check_writable`], of what was just written and closed. Takes QEMU's locks.
pub fn check_sound(path: &Path, format: Foreign) -> Result<()> {
    let layer = alone(path);
    check(&layer, format)?;
    sound(&layer, format, false)
}

fn sound(layer: &Layer, format: Foreign, held: bool) -> Result<()> {
    let hint = "`qemu-img check FILE` says more; put a sound image there, or copy to another name";
    let report = qemu_img::check_foreign(layer, format, held).map_err(|e| e.hint(hint))?;
    if report.is_sound() {
        return Ok(());
    }
    let faults = report.corruptions + report.check_errors;
    Err(Error::new(Kind::Corrupt, format!("the {} image is damaged: qemu-img finds {faults} faults", format.as_str()))
        .path(&layer.path)
        .hint(hint))
}

fn alone(path: &Path) -> Layer {
    Layer { path: path.to_owned(), format: Format::Raw, block_device: false, data_file: None }
}

/// Whether what is in it is compressed, as QEMU decides it: by the algorithm, or flags 16 and 17.
fn is_compressed(layer: &Layer) -> Result<bool> {
    let file = raw::open_file(layer, false)?;
    let header = bytes(&file, 0, 79).map_err(|e| Error::io("cannot read the image", &layer.path, e))?;
    Ok(header.len() < 79 || header[77..79] != [0, 0] || header[10] & 3 != 0)
}

/// An image that is written through a `qemu-nbd` child. Dropped without [`ForeignWriter::close`] it is worth nothing.
pub struct ForeignWriter {
    // In this order: the connection says goodbye before the child is ended.
    image: NbdImage,
    child: QemuNbd,
}

impl ForeignWriter {
    /// Makes a new image in the place of the file at `path`, which is empty and ours, and opens it. It goes by the name
    /// of `name`, where the format writes a name down. `Refused` where the format cannot have the size. Blocks; starts
    /// a process.
    pub fn create(path: &Path, format: Foreign, size: DiskSize, name: &str, runtime_dir: &Path) -> Result<Self> {
        qemu_img::create_foreign(path, format, size)?;
        if format == Foreign::Vmdk {
            name_in_description(path, name)?;
        }
        let writer = Self::open(path, format, runtime_dir)?;
        if writer.size() != size {
            let what = format!("QEMU makes an image of {} bytes where {size} are wanted", writer.size());
            return Err(Error::new(Kind::Refused, what).path(path).hint("take another format: raw has any size"));
        }
        Ok(writer)
    }

    /// Opens an image that nobody else has, to be changed. The errors are those of `check`, and QEMU's. Blocks; starts
    /// a process.
    pub fn open(path: &Path, format: Foreign, runtime_dir: &Path) -> Result<Self> {
        let layer = alone(path);
        check(&layer, format)?;
        let chain = Chain(vec![layer]);
        let serve = Serve { chain: &chain, runtime_dir, force_share: false, connections: 1, bitmap: None };
        let mut child = QemuNbd::start_foreign_write(&serve, format)?;
        let image = NbdImage::connect(child.socket(), "", &[], 1)?;
        child.close_the_door();
        Ok(Self { image, child })
    }

    /// Durable and closed when it returns without an error; then nothing of ours has the file open. Whether QEMU wrote
    /// what it was given, a reading tells. At most some minutes.
    pub fn close(self) -> Result<()> {
        self.image.sync()?;
        drop(self.image);
        self.child.close_image()
    }
}

impl Image for ForeignWriter {
    fn size(&self) -> DiskSize {
        self.image.size()
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        self.image.extents(range)
    }

    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<()> {
        self.image.read_at(offset_bytes, buf)
    }
}

impl ImageMut for ForeignWriter {
    fn write_at(&self, offset_bytes: u64, data: &[u8]) -> Result<()> {
        self.image.write_at(offset_bytes, data)
    }

    fn zero(&self, range: ByteRange) -> Result<()> {
        self.image.zero(range)
    }

    fn sync(&self) -> Result<()> {
        self.image.sync()
    }
}

/// Puts `name` into the description of a new VMDK, which names its file as it was made: VMware's programs look at that.
fn name_in_description(path: &Path, name: &str) -> Result<()> {
    let cannot = |e| Error::io("cannot write the description of the image", path, e);
    let file = File::options().read(true).write(true).open(path).map_err(cannot)?;
    let header = bytes(&file, 0, 44).map_err(cannot)?;
    let number = |at: usize| header.get(at..at + 8).map_or(0, |b| u64::from_le_bytes(b.try_into().expect("8 bytes")));
    let (at, len) = (number(28).saturating_mul(512), number(36).saturating_mul(512).min(DESCRIPTION_MAX));
    let old = bytes(&file, at, len as usize).map_err(cannot)?;
    let made_as = path.file_name().map(|made| made.to_string_lossy().into_owned()).unwrap_or_default();
    let text = String::from_utf8_lossy(&old);
    let (made_as, name) = (format!(" SPARSE \"{made_as}\"\n"), format!(" SPARSE \"{name}\"\n"));
    if at == 0 || text.matches(&made_as).count() != 1 {
        return Err(Error::new(Kind::Protocol, "qemu-img has described the new VMDK in an unknown way").path(path));
    }
    let mut new = text.replacen(&made_as, &name, 1).into_bytes();
    if new.len() > old.len() && new[old.len()..].iter().any(|b| *b != 0) {
        return Err(Error::new(Kind::Refused, "the name of the image is too long for a VMDK").path(path));
    }
    new.resize(old.len(), 0);
    file.write_all_at(&new, at).map_err(cannot)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A name that is longer than the one it was made under fits, too, or is refused as a whole.
    #[test]
    fn a_new_vmdk_goes_by_the_name_that_it_will_have() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".disk.vr-part");
        let long = "n".repeat(200);
        for name in ["disk", "a disk with a longer name.vmdk", "\u{fc}ber.vmdk", long.as_str()] {
            std::fs::write(&path, b"").unwrap();
            let writer = ForeignWriter::create(&path, Foreign::Vmdk, DiskSize(1 << 20), name, dir.path()).unwrap();
            writer.write_at(0, &[7; 512]).unwrap();
            writer.close().unwrap();
            check_sound(&path, Foreign::Vmdk).unwrap();
            let start = bytes(&File::open(&path).unwrap(), 0, 64 << 10).unwrap();
            assert!(String::from_utf8_lossy(&start).contains(&format!("RW 2048 SPARSE \"{name}\"\n")), "{name}");
        }
        let before = std::fs::read(&path).unwrap();
        let e = name_in_description(&path, "other").unwrap_err();
        assert_eq!(e.kind(), Kind::Protocol, "it is called otherwise already");
        assert!(std::fs::read(&path).unwrap() == before);
    }

    /// Where nobody closes the image, nobody takes it for written.
    #[test]
    fn a_child_that_is_gone_is_an_error_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.vdi");
        std::fs::write(&path, b"").unwrap();
        let writer = ForeignWriter::create(&path, Foreign::Vdi, DiskSize(1 << 20), "a.vdi", dir.path()).unwrap();
        writer.write_at(0, &[7; 512]).unwrap();
        let child = rustix::process::Pid::from_raw(writer.child.pid() as i32).unwrap();
        rustix::process::kill_process(child, rustix::process::Signal::KILL).unwrap();
        assert!(writer.close().is_err());
    }
}
