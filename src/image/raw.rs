//! Raw images, in process: a file or a block device whose bytes are the disk's bytes.
//!
//! Owns the rule for a raw image's size: QEMU rounds it up to its sector of 512 bytes, so the guest sees up to 511
//! zeros behind the end of the file, and so do we. Extents are what the file system says (`SEEK_DATA`, `SEEK_HOLE`); a
//! block device has no holes to show. Takes no locks; whoever opens a [`RawWriter`] holds the store's.

use super::{Cover, Image, ImageMut, Layer, within};
use crate::block::extent::{Content, Extent};
use crate::block::{ByteRange, DiskSize, SECTOR_LEN};
use crate::error::{Error, Kind, Result};
use crate::image::write_behind::Behind;
use rustix::fs::{Advice, FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Zeros are written in pieces of this size where a hole cannot be punched.
const ZEROS: &[u8] = &[0; 256 << 10];

/// A raw image, open for reading.
pub struct RawImage {
    path: PathBuf,
    file: File,
    /// Bytes that are there; the guest sees [`RawImage::size`], which may be up to 511 more.
    file_len: u64,
    size: DiskSize,
    holes: bool,
}

impl RawImage {
    /// Opens the layer, which must be a regular file or, where it says so, a block device. Follows no header: there is
    /// none. Tells the kernel that it will be read from start to end.
    pub fn open(layer: &Layer) -> Result<Self> {
        let file = open_file(layer, false)?;
        // Advice: where it is refused, reading is only slower.
        let _ = rustix::fs::fadvise(&file, 0, None::<NonZeroU64>, Advice::Sequential);
        Self::over(file, &layer.path, !layer.block_device)
    }

    /// As [`RawImage::open`], but the disk ends where the file does, in the middle of a sector if need be: for images
    /// that are looked at as files. Of a block device the first `device_max` bytes are the disk, if it has as many.
    pub fn open_exact(layer: &Layer, device_max: Option<DiskSize>) -> Result<Self> {
        let file = open_file(layer, false)?;
        let _ = rustix::fs::fadvise(&file, 0, None::<NonZeroU64>, Advice::Sequential);
        Self::exact(file, layer, device_max)
    }

    fn exact(file: File, layer: &Layer, device_max: Option<DiskSize>) -> Result<Self> {
        let there = file_len(&file, &layer.path)?;
        let file_len = device_max.filter(|_| layer.block_device).map_or(there, |max| there.min(max.0));
        Ok(Self { path: layer.path.clone(), file, file_len, size: DiskSize(file_len), holes: !layer.block_device })
    }

    fn over(file: File, path: &Path, holes: bool) -> Result<Self> {
        let file_len = file_len(&file, path)?;
        let size = file_len
            .checked_next_multiple_of(SECTOR_LEN)
            .ok_or_else(|| Error::new(Kind::Corrupt, "the raw image is too large").path(path))?;
        Ok(Self { path: path.to_owned(), file, file_len, size: DiskSize(size), holes })
    }
}

impl Image for RawImage {
    fn size(&self) -> DiskSize {
        self.size
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        within(self.size, range.start, range.len())?;
        let mut cover = Cover::from(range.start);
        let there = ByteRange { start: range.start, end: range.end.min(self.file_len).max(range.start) };
        if self.holes {
            file_extents(&self.file, there.start, there.len(), &mut cover)
                .map_err(|e| Error::io("cannot ask for the holes of the image", &self.path, e.into()))?;
        } else {
            cover.extend_to(there.end, Content::Data);
        }
        cover.extend_to(range.end, Content::Zero);
        Ok(cover.finish())
    }

    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<()> {
        within(self.size, offset_bytes, buf.len() as u64)?;
        let there = self.file_len.saturating_sub(offset_bytes).min(buf.len() as u64) as usize;
        let (head, tail) = buf.split_at_mut(there);
        // `read_exact_at` goes on after EINTR and short reads; an early end means that the file shrank under us.
        self.file
            .read_exact_at(head, offset_bytes)
            .map_err(|e| Error::io("cannot read the image", &self.path, e).offset(offset_bytes))?;
        tail.fill(0);
        Ok(())
    }

    fn expect(&self, range: ByteRange) {
        // Advice, as above.
        let _ = rustix::fs::fadvise(&self.file, range.start, NonZeroU64::new(range.len()), Advice::WillNeed);
    }
}

/// A raw image of our own store, open for reading and writing.
pub struct RawWriter {
    image: RawImage,
    poison: Poison,
    behind: Behind,
}

impl RawWriter {
    /// Creates the file, which must not exist, sparse, mode 0600. `size` must be a multiple of 512 bytes.
    /// Durable only after [`ImageMut::sync`] and an fsync of the directory.
    pub fn create(path: &Path, size: DiskSize) -> Result<Self> {
        check_sectors(path, size)?;
        let file = create_file(path)?;
        file.set_len(size.0).map_err(|e| Error::io("cannot size the image", path, e))?;
        Ok(Self { image: RawImage::over(file, path, true)?, poison: Poison::default(), behind: Behind::default() })
    }

    /// Opens an existing regular file.
    pub fn open(path: &Path) -> Result<Self> {
        let layer = Layer { path: path.to_owned(), format: super::Format::Raw, block_device: false, data_file: None };
        Ok(Self {
            image: RawImage::over(open_file(&layer, true)?, path, true)?,
            poison: Poison::default(),
            behind: Behind::default(),
        })
    }

    /// As [`RawImage::open_exact`], for writing. A block device is opened for us alone: one that is mounted, or part of
    /// a volume group, is `Busy`.
    pub fn open_exact(layer: &Layer, device_max: Option<DiskSize>) -> Result<Self> {
        let file = match layer.block_device {
            false => open_file(layer, true)?,
            true => open_device(layer)?,
        };
        Ok(Self {
            image: RawImage::exact(file, layer, device_max)?,
            poison: Poison::default(),
            behind: Behind::default(),
        })
    }

    /// Creates a file as [`RawWriter::create`] does, of any size.
    pub fn create_exact(path: &Path, size: DiskSize) -> Result<Self> {
        let mut writer = Self {
            image: RawImage::over(create_file(path)?, path, true)?,
            poison: Poison::default(),
            behind: Behind::default(),
        };
        writer.resize(size)?;
        Ok(writer)
    }

    /// Cuts the file, or lets it grow by a hole. Not of a block device. Durable with the next [`ImageMut::sync`].
    pub fn resize(&mut self, size: DiskSize) -> Result<()> {
        self.poison.check(&self.image.path)?;
        if !self.image.holes {
            return Err(Error::new(Kind::Usage, "a block device is not resized by us").path(&self.image.path));
        }
        self.image.file.set_len(size.0).map_err(|e| Error::io("cannot size the image", &self.image.path, e))?;
        (self.image.file_len, self.image.size) = (size.0, size);
        Ok(())
    }

    fn io(&self, what: &'static str, offset_bytes: u64, e: impl Into<std::io::Error>) -> Error {
        Error::io(what, &self.image.path, e.into()).offset(offset_bytes)
    }
}

impl Image for RawWriter {
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

impl ImageMut for RawWriter {
    fn write_at(&self, offset_bytes: u64, data: &[u8]) -> Result<()> {
        self.poison.check(&self.image.path)?;
        within(self.image.size, offset_bytes, data.len() as u64)?;
        let written = self.image.file.write_all_at(data, offset_bytes);
        written.map_err(|e| self.io("cannot write the image", offset_bytes, e))?;
        self.behind.wrote(&self.image.file, data.len() as u64);
        Ok(())
    }

    fn zero(&self, range: ByteRange) -> Result<()> {
        self.poison.check(&self.image.path)?;
        within(self.image.size, range.start, range.len())?;
        if range.is_empty() {
            return Ok(());
        }
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match retry(|| rustix::fs::fallocate(&self.image.file, punch, range.start, range.len())) {
            Ok(()) => Ok(()),
            Err(e) if punching_is_unsupported(e) => self.write_zeros(range),
            // Of a device only whole sectors can be discarded.
            Err(Errno::INVAL) if !self.image.holes => self.write_zeros(range),
            Err(e) => Err(self.io("cannot punch a hole into the image", range.start, e)),
        }
    }

    fn sync(&self) -> Result<()> {
        self.poison.check(&self.image.path)?;
        // Once only: after a failed fdatasync the kernel may have dropped the pages and say yes the second time.
        self.poison.guard(
            rustix::fs::fdatasync(&self.image.file)
                .map_err(|e| Error::io("cannot make the image durable", &self.image.path, e.into())),
        )
    }
}

impl RawWriter {
    fn write_zeros(&self, range: ByteRange) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(ZEROS.len() as u64) as usize;
            self.image
                .file
                .write_all_at(&ZEROS[..len], at)
                .map_err(|e| self.io("cannot write zeros to the image", at, e))?;
            at += len as u64;
        }
        Ok(())
    }
}

/// Remembers that an image's durability is lost; from then on everything is refused (I11).
#[derive(Default)]
pub(super) struct Poison(std::sync::atomic::AtomicBool);

impl Poison {
    pub(super) fn check(&self, path: &Path) -> Result<()> {
        if self.0.load(std::sync::atomic::Ordering::Acquire) {
            return Err(Error::new(Kind::Io, "the image is condemned: an earlier sync of it failed").path(path));
        }
        Ok(())
    }

    pub(super) fn guard<T>(&self, outcome: Result<T>) -> Result<T> {
        if outcome.is_err() {
            self.0.store(true, std::sync::atomic::Ordering::Release);
        }
        outcome
    }
}

/// Covers the next `len` bytes of the disk with what the file system says of the file's bytes from `file_start`, where
/// they are stored. Bytes behind the end of the file are a hole.
pub(super) fn file_extents(file: &File, file_start: u64, len: u64, cover: &mut Cover) -> Result<(), Errno> {
    let (disk_start, file_end) = (cover.at(), file_start + len);
    let mut at = file_start;
    while at < file_end {
        let data = match retry(|| rustix::fs::seek(file, SeekFrom::Data(at))) {
            Ok(data) => data.min(file_end),
            // No data behind this point.
            Err(Errno::NXIO) => file_end,
            // A file system that knows nothing of holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                cover.extend_to(disk_start + len, Content::Data);
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        cover.extend_to(disk_start + (data - file_start), Content::Zero);
        at = data;
        if data < file_end {
            // A file that shrank in between has no hole to find; reading it will say so.
            at = match retry(|| rustix::fs::seek(file, SeekFrom::Hole(data))) {
                Ok(hole) => hole.clamp(data + 1, file_end),
                Err(Errno::NXIO) => file_end,
                Err(e) => return Err(e),
            };
            cover.extend_to(disk_start + (at - file_start), Content::Data);
        }
    }
    Ok(())
}

/// Opens a layer's file. Refuses anything but what the chain recorded: a regular file, or a block device.
pub(super) fn open_file(layer: &Layer, write: bool) -> Result<File> {
    // O_NONBLOCK: a FIFO in the place of an image must not hang the run; it means nothing to files and devices.
    let file = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(OFlags::NONBLOCK.bits() as i32)
        .open(&layer.path)
        .map_err(|e| Error::io("cannot open the image", &layer.path, e))?;
    let kind = file.metadata().map_err(|e| Error::io("cannot look at the image", &layer.path, e))?.file_type();
    match (layer.block_device, kind.is_block_device(), kind.is_file()) {
        (true, true, _) | (false, _, true) => Ok(file),
        (true, ..) => {
            Err(Error::new(Kind::Conflict, "the chain records a block device, and it is none").path(&layer.path))
        }
        (false, ..) => Err(Error::new(Kind::Conflict, "the chain records a file, and it is none").path(&layer.path)),
    }
}

/// Opens a block device for writing, for us alone.
fn open_device(layer: &Layer) -> Result<File> {
    open_file(layer, false)?;
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags((OFlags::EXCL | OFlags::NONBLOCK).bits() as i32)
        .open(&layer.path)
        .map_err(|e| match e.kind() {
            std::io::ErrorKind::ResourceBusy => Error::new(Kind::Busy, "the block device is in use")
                .path(&layer.path)
                .source(e)
                .hint("unmount it first"),
            _ => Error::io("cannot open the block device", &layer.path, e),
        })
}

/// Creates an image file that must not exist yet, mode 0600.
pub(super) fn create_file(path: &Path) -> Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path).map_err(|e| {
        if e.kind() == std::io::ErrorKind::AlreadyExists {
            return Error::new(Kind::Conflict, "an image that should be new exists already").path(path).source(e);
        }
        Error::io("cannot create the image", path, e)
    })
}

/// Bytes of a file or block device.
pub(super) fn file_len(file: &File, path: &Path) -> Result<u64> {
    // For a block device the metadata says 0; the end of a seek is its size.
    rustix::fs::seek(file, SeekFrom::End(0))
        .map_err(|e| Error::io("cannot learn the size of the image", path, e.into()))
}

pub(super) fn check_sectors(path: &Path, size: DiskSize) -> Result<()> {
    if !size.0.is_multiple_of(SECTOR_LEN) || i64::try_from(size.0).is_err() {
        return Err(Error::new(Kind::Usage, format!("{size} bytes is not a size QEMU gives a disk")).path(path));
    }
    Ok(())
}

fn punching_is_unsupported(e: Errno) -> bool {
    matches!(e, Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV)
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Format;

    fn layer(path: &Path) -> Layer {
        Layer { path: path.to_owned(), format: Format::Raw, block_device: false, data_file: None }
    }

    /// `D` and `.` for each 64 KiB: what the image says.
    fn drawn(image: &dyn Image) -> String {
        let mut text = String::new();
        for e in image.extents(image.size().range()).unwrap() {
            let mark = if e.content == Content::Data { "D" } else { "." };
            text.push_str(&mark.repeat(e.range.len().div_ceil(65536) as usize));
        }
        text
    }

    #[test]
    fn bytes_behind_an_odd_end_are_zeros_up_to_the_sector() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("odd.raw");
        std::fs::write(&path, vec![7u8; 1000]).unwrap();
        let image = RawImage::open(&layer(&path)).unwrap();
        assert_eq!(image.size(), DiskSize(1024));
        let mut buf = [9u8; 30];
        image.read_at(994, &mut buf).unwrap();
        assert_eq!(buf[..6], [7; 6]);
        assert_eq!(buf[6..], [0; 24]);
        assert_eq!(image.read_at(1000, &mut buf).unwrap_err().kind(), Kind::Usage);
        let extents = image.extents(image.size().range()).unwrap();
        assert_eq!(extents.last().unwrap().range.end, 1024);
        assert_eq!(extents.last().unwrap().content, Content::Zero);
    }

    #[test]
    fn holes_are_zero_and_may_be_asked_for_in_parts() {
        let dir = tempfile::tempdir().unwrap();
        let image = RawWriter::create(&dir.path().join("a.raw"), DiskSize(8 << 16)).unwrap();
        image.write_at(2 << 16, &[1; 65536]).unwrap();
        image.write_at(5 << 16, &[1; 65536]).unwrap();
        assert_eq!(drawn(&image), "..D..D..");
        let part = image.extents(ByteRange::new((2 << 16) + 5, (5 << 16) + 5)).unwrap();
        assert_eq!(part.len(), 3);
        assert_eq!((part[0].range.start, part[2].range.end), ((2 << 16) + 5, (5 << 16) + 5));
        image.zero(ByteRange::new(2 << 16, 3 << 16)).unwrap();
        assert_eq!(drawn(&image), ".....D..");
        image.sync().unwrap();
    }

    #[test]
    fn zeros_are_written_where_no_hole_can_be_punched() {
        let dir = tempfile::tempdir().unwrap();
        let image = RawWriter::create(&dir.path().join("a.raw"), DiskSize(1 << 20)).unwrap();
        image.write_at(0, &[1; 1 << 20]).unwrap();
        image.write_zeros(ByteRange::new(7, (1 << 20) - 9)).unwrap();
        let mut buf = vec![0; 1 << 20];
        image.read_at(0, &mut buf).unwrap();
        assert_eq!(buf.iter().filter(|b| **b == 1).count(), 16);
    }

    #[test]
    fn a_file_that_shrank_is_an_error_and_not_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.raw");
        std::fs::write(&path, vec![7u8; 4096]).unwrap();
        let image = RawImage::open(&layer(&path)).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(512).unwrap();
        let error = image.read_at(0, &mut [0; 1024]).unwrap_err();
        assert_eq!(error.kind(), Kind::Io);
        assert_eq!(error.context().offset_bytes, Some(0));
    }

    #[test]
    fn only_what_the_chain_recorded_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(RawImage::open(&layer(dir.path())).err().unwrap().kind(), Kind::Conflict);
        let mut device = layer(&dir.path().join("a.raw"));
        std::fs::write(&device.path, [0; 512]).unwrap();
        device.block_device = true;
        assert_eq!(RawImage::open(&device).err().unwrap().kind(), Kind::Conflict);
        assert_eq!(RawWriter::create(&device.path, DiskSize(512)).err().unwrap().kind(), Kind::Conflict);
        assert_eq!(RawWriter::create(&dir.path().join("b"), DiskSize(511)).err().unwrap().kind(), Kind::Usage);
    }

    #[test]
    fn an_image_whose_sync_failed_is_never_written_again() {
        let poison = Poison::default();
        assert!(poison.guard(Ok(())).is_ok());
        assert!(poison.check(Path::new("a")).is_ok());
        let _ = poison.guard::<()>(Err(Error::new(Kind::Io, "fsync")));
        assert!(poison.check(Path::new("a")).unwrap_err().what().contains("condemned"));
    }
}
