//! Qcow2 images, in process, with the crate `imago`: reading what it understands completely, and writing what our own
//! store made.
//!
//! Owns the gate in front of `imago`: [`Header`] is read here, by us and bounded, before anything else looks at the
//! file. An image that is not plain qcow2 through and through is *not understood*, with the reason, and goes to
//! `qemu-nbd`.
//!
//! Invariants
//! - No header opens a file: backing images come from the recorded chain, or, for the store's own images, from a
//!   reference as only the store makes it (`NAME` or `../DIR/NAME`); `imago` is given a gate that refuses everything
//!   else.
//! - Nothing is opened for writing that our store did not make: `imago` takes no QEMU locks and knows no bitmaps.
//!
//! Format: QEMU's docs/interop/qcow2.txt.

pub mod check;
pub mod header;
mod rebase;

use super::raw::{self, Poison};
use super::{Chain, Cover, Format, Image, ImageMut, Layer, within};
use crate::block::extent::{Content, Extent};
use crate::block::{BLOCK_LEN, ByteRange, DiskSize};
use crate::error::{Error, Kind, Result, printable};
use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping};
use std::fs::File;
use std::path::{Component, Path, PathBuf};
use std::sync::{RwLock, RwLockReadGuard};

/// Cluster of the images we make: a block, so that one block is one entry in one table.
const CLUSTER_LEN: usize = BLOCK_LEN;

/// Most layers below an image of our own store. A loop of names ends here.
const OWN_DEPTH_MAX: usize = 4096;

pub use header::Header;
pub use rebase::rebase;

/// A chain read in process. Every qcow2 layer is understood completely; the lowest may be raw.
pub struct Qcow2Image {
    path: PathBuf,
    access: FormatAccess<Storage>,
    files: Files,
}

impl Qcow2Image {
    /// Opens the chain read-only, every layer as the format it records. Fails with [`Kind::Refused`] where a layer is
    /// not understood; [`super::open`] asks before.
    pub fn open(chain: &Chain) -> Result<Self> {
        let (access, files) = open_layers(&chain.0)?;
        Ok(Self { path: chain.top().path.clone(), access, files })
    }
}

impl Image for Qcow2Image {
    fn size(&self) -> DiskSize {
        DiskSize(self.access.size())
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        extents(&self.access, &self.files, range).map_err(|e| e.path(&self.path))
    }

    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<()> {
        read_at(&self.access, offset_bytes, buf).map_err(|e| e.path(&self.path))
    }
}

/// A qcow2 image of our own store, open for writing; its backing images are open for reading.
/// Several threads may write at once; [`ImageMut::zero`] has the image to itself.
pub struct Qcow2Writer {
    path: PathBuf,
    size: DiskSize,
    access: RwLock<FormatAccess<Storage>>,
    files: Files,
    poison: Poison,
}

/// Creates a qcow2 image (version 3, clusters of 64 KiB, mode 0600) that must not exist yet, and opens it.
///
/// `size` must be a multiple of 512 bytes. `backing` is recorded as given: `NAME` in the directory of `path` or
/// `../DIR/NAME`, and its format; the image there must exist. Larger or smaller than `size` will do. Durable only after
/// [`ImageMut::sync`] and an fsync of the directory; after an error a half-made file may be left.
pub fn create(path: &Path, size: DiskSize, backing: Option<(&str, Format)>) -> Result<Qcow2Writer> {
    raw::check_sectors(path, size)?;
    if let Some((name, _)) = backing {
        check_own_name(name).map_err(|e| e.path(path))?;
    }
    let storage =
        Storage::try_from(raw::create_file(path)?).map_err(|e| Error::io("cannot create the image", path, e))?;
    let mut builder = Qcow2::<Storage>::create_builder(storage).size(size.0).cluster_size(CLUSTER_LEN);
    if let Some((name, format)) = backing {
        builder = builder.backing(name.to_owned(), format.as_str().to_owned());
    }
    builder.create().map_err(|e| imago_error("cannot create the image", e).path(path))?;
    open_write(path)
}

/// Opens an image that our own store made for writing, and below it, read-only, the images its header names, as
/// [`create`] recorded them. Anything else is refused: it is not ours.
///
/// The caller holds the store's lock; nothing else may have the image open.
pub fn open_write(path: &Path) -> Result<Qcow2Writer> {
    let (file, header) = open_own(path)?;
    let below = own_chain_below(path, header)?;
    writer(path, file, &below)
}

/// As [`open_write`], with `below` under it, uppermost first, whatever its header names: for who is about to change
/// that.
pub fn open_write_over(path: &Path, below: &[Layer]) -> Result<Qcow2Writer> {
    writer(path, open_own(path)?.0, below)
}

fn open_own(path: &Path) -> Result<(File, Header)> {
    let file = raw::open_file(&own_layer(path.to_owned(), Format::Qcow2), true)?;
    let header = understood(&file, path)?;
    if header.autoclear() != 0 {
        // Opening would clear those bits and so condemn what they vouch for, such as bitmaps.
        return Err(Error::new(Kind::Refused, "the image has features our store never uses").path(path));
    }
    Ok((file, header))
}

fn writer(path: &Path, file: File, below: &[Layer]) -> Result<Qcow2Writer> {
    let mut files = Files::default();
    let storage = files.add(file, path, true)?;
    let mut image = open_qcow2(storage, true, path)?;
    if !below.is_empty() {
        let (backing, mut backing_files) = open_layers(below)?;
        image.set_backing(Some(backing));
        // `imago` lists the lowest storage first, and so do we.
        backing_files.0.append(&mut files.0);
        files = backing_files;
    }
    let access = FormatAccess::new(image);
    let size = DiskSize(access.size());
    Ok(Qcow2Writer { path: path.to_owned(), size, access: RwLock::new(access), files, poison: Poison::default() })
}

/// The chain of an image that our own store made, uppermost first, as its headers record it in the way of [`create`].
/// Refuses anything else.
pub fn own_chain(path: &Path) -> Result<Chain> {
    let top = own_layer(path.to_owned(), Format::Qcow2);
    let header = understood(&raw::open_file(&top, false)?, path)?;
    let mut layers = own_chain_below(path, header)?;
    layers.insert(0, top);
    Ok(Chain(layers))
}

impl Qcow2Writer {
    fn access(&self) -> Result<RwLockReadGuard<'_, FormatAccess<Storage>>> {
        self.access.read().map_err(|_| self.panicked())
    }

    /// Makes the data written so far durable before any table that leads to it is written to the file: behind this, and
    /// the [`ImageMut::sync`] after it, a power cut leaves no cluster whose content did not arrive. As far as the
    /// tables touched fit into `imago`'s cache; it writes them when it needs the room.
    pub fn sync_data(&self) -> Result<()> {
        self.poison.check(&self.path)?;
        // Our own image is the uppermost, and stands last.
        let (file, _) = self.files.0.last().expect("a writer has a file");
        let synced = file.sync_data().map_err(|e| Error::io("cannot make the image durable", &self.path, e));
        self.poison.guard(synced)
    }

    fn panicked(&self) -> Error {
        Error::new(Kind::Corrupt, "the image is condemned: a write to it panicked").path(&self.path)
    }
}

impl Image for Qcow2Writer {
    fn size(&self) -> DiskSize {
        self.size
    }

    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>> {
        extents(&*self.access()?, &self.files, range).map_err(|e| e.path(&self.path))
    }

    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<()> {
        read_at(&*self.access()?, offset_bytes, buf).map_err(|e| e.path(&self.path))
    }
}

impl ImageMut for Qcow2Writer {
    fn write_at(&self, offset_bytes: u64, data: &[u8]) -> Result<()> {
        self.poison.check(&self.path)?;
        within(self.size, offset_bytes, data.len() as u64)?;
        self.access()?
            .write(data, offset_bytes)
            .map_err(|e| imago_error("cannot write the image", e).path(&self.path).offset(offset_bytes))
    }

    /// Clusters that already read as zeros through the whole chain are left alone: in an image without backing they
    /// stay unallocated. The others are freed and become zero clusters, which hide the backing image.
    fn zero(&self, range: ByteRange) -> Result<()> {
        self.poison.check(&self.path)?;
        within(self.size, range.start, range.len())?;
        let mut access = self.access.write().map_err(|_| self.panicked())?;
        let found = extents(&access, &self.files, range).map_err(|e| e.path(&self.path))?;
        for run in whole_clusters(&found, range) {
            access
                .discard_to_zero(run.start, run.len())
                .map_err(|e| imago_error("cannot zero a range of the image", e).path(&self.path).offset(run.start))?;
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.poison.check(&self.path)?;
        let access = self.access()?;
        // Once only: the kernel may say yes to the second fsync of what it lost in the first.
        self.poison.guard(
            access
                .flush()
                .and_then(|()| access.sync())
                .map_err(|e| imago_error("cannot make the image durable", e).path(&self.path)),
        )
    }
}

/// The runs of `range` to be zeroed: the data in it, widened to whole clusters as far as the range goes, so that a
/// cluster half of which reads as zeros from a finer-grained backing image is one zero cluster and not a copy.
fn whole_clusters(extents: &[Extent], range: ByteRange) -> Vec<ByteRange> {
    let cluster = CLUSTER_LEN as u64;
    let mut runs: Vec<ByteRange> = Vec::new();
    for e in extents.iter().filter(|e| e.content == Content::Data) {
        let start = (e.range.start / cluster * cluster).max(range.start);
        let end = e.range.end.next_multiple_of(cluster).min(range.end);
        match runs.last_mut() {
            Some(last) if last.end >= start => last.end = end,
            _ => runs.push(ByteRange::new(start, end)),
        }
    }
    runs
}

/// The files under an open chain, lowest layer first (the order in which `imago` lists its storages), held a second
/// time to ask them for holes: a cluster may be allocated (`preallocation=metadata`, virt-manager's default) and its
/// bytes a hole in the file.
#[derive(Default)]
struct Files(Vec<(File, bool)>);

impl Files {
    /// Keeps a second handle of `file` and makes it a storage.
    fn add(&mut self, file: File, path: &Path, holes: bool) -> Result<Storage> {
        let again = file.try_clone().map_err(|e| Error::io("cannot duplicate the image's descriptor", path, e))?;
        self.0.push((again, holes));
        Storage::try_from(file).map_err(|e| Error::io("cannot open the image", path, e))
    }
}

/// Opens layers, uppermost first, all read-only.
fn open_layers(layers: &[Layer]) -> Result<(FormatAccess<Storage>, Files)> {
    let mut files = Files::default();
    let mut below: Option<FormatAccess<Storage>> = None;
    for layer in layers.iter().rev() {
        let file = raw::open_file(layer, false)?;
        let path = &layer.path;
        below = Some(match (layer.format, below.take()) {
            (Format::Raw, None) => {
                let storage = files.add(file, path, !layer.block_device)?;
                let image = Raw::open_image(storage, false).map_err(|e| Error::io("cannot open the image", path, e))?;
                FormatAccess::new(image)
            }
            (Format::Raw, Some(_)) => {
                return Err(Error::new(Kind::Usage, "a raw image has no backing image").path(path));
            }
            (Format::Qcow2, backing) => {
                understood(&file, path)?;
                let mut image = open_qcow2(files.add(file, path, !layer.block_device)?, false, path)?;
                image.set_backing(backing);
                FormatAccess::new(image)
            }
        });
    }
    let access = below.ok_or_else(|| Error::new(Kind::Usage, "a chain has at least one layer"))?;
    Ok((access, files))
}

/// Opens one layer without anything below it; nothing its header names is opened.
fn open_qcow2(storage: Storage, write: bool, path: &Path) -> Result<Qcow2<Storage>> {
    Qcow2::<Storage>::builder(storage)
        .write(write)
        .backing(None)
        .data_file(None)
        .open(DenyImplicitOpenGate::default())
        .map_err(|e| imago_error("cannot open the qcow2 image", e).path(path))
}

/// Reads the header and refuses what the in-process reader does not understand.
fn understood(file: &File, path: &Path) -> Result<Header> {
    let header = Header::read(file, path)?;
    match header.beyond_us() {
        None => Ok(header),
        Some(why) => {
            Err(Error::new(Kind::Refused, format!("the image {why}, which is not read in process")).path(path))
        }
    }
}

fn own_layer(path: PathBuf, format: Format) -> Layer {
    Layer { path, format, block_device: false, data_file: None }
}

/// A reference as our store records it for a backing image: `NAME` in the same directory, or `../DIR/NAME` in a sister
/// of that; nothing QEMU would take for a protocol or options.
fn check_own_name(name: &str) -> Result<()> {
    let normal = |part: &Component| matches!(part, Component::Normal(_));
    let parts: Vec<Component> = Path::new(name).components().take(4).collect();
    let known = match &parts[..] {
        [file] => normal(file),
        [Component::ParentDir, dir, file] => normal(dir) && normal(file),
        _ => false,
    };
    // `a//b` and `a/.` have the components of what they are not.
    let plain = parts.iter().map(|p| p.as_os_str().len() + 1).sum::<usize>() == name.len() + 1;
    if known && plain && name.len() <= 255 && !name.contains([':', ',']) && !name.contains(char::is_control) {
        return Ok(());
    }
    Err(Error::new(Kind::Refused, format!("{name:?} is not a name of an image in our store")))
}

/// Where the image that `path` refers to by a checked name lies. Without `..` in it: a long chain would not fit a path.
fn own_path(path: &Path, name: &str) -> PathBuf {
    let dir = path.parent().unwrap_or(Path::new(""));
    match (name.strip_prefix("../"), dir.parent()) {
        (Some(below), Some(above)) if dir.file_name().is_some() => above.join(below),
        _ => dir.join(name),
    }
}

/// What the header of one of our own images says lies below it.
fn own_backing(header: &Header, path: &Path) -> Result<Option<(String, Format)>> {
    let Some(name) = &header.backing else { return Ok(None) };
    check_own_name(name).map_err(|e| e.path(path))?;
    let format = match header.backing_format.as_deref() {
        Some("qcow2") => Format::Qcow2,
        Some("raw") => Format::Raw,
        other => {
            let what = match other {
                Some(other) => {
                    format!(
                        "the header records the format '{}' for the backing image, which we do not use",
                        printable(other, 60)
                    )
                }
                None => "the header records no format for the backing image".to_owned(),
            };
            return Err(Error::new(Kind::Refused, what).path(path));
        }
    };
    Ok(Some((name.clone(), format)))
}

/// The layers below one of our own images with this header, uppermost first.
fn own_chain_below(path: &Path, header: Header) -> Result<Vec<Layer>> {
    let mut layers = Vec::new();
    let mut next = own_backing(&header, path)?;
    while let Some((name, format)) = next {
        if layers.len() >= OWN_DEPTH_MAX {
            return Err(Error::new(Kind::Corrupt, "the chain of backing images does not end").path(path));
        }
        let layer = own_layer(own_path(path, &name), format);
        next = match format {
            Format::Raw => None,
            Format::Qcow2 => own_backing(&understood(&raw::open_file(&layer, false)?, &layer.path)?, &layer.path)?,
        };
        layers.push(layer);
    }
    Ok(layers)
}

fn read_at(access: &FormatAccess<Storage>, offset_bytes: u64, buf: &mut [u8]) -> Result<()> {
    within(DiskSize(access.size()), offset_bytes, buf.len() as u64)?;
    access.read(buf, offset_bytes).map_err(|e| imago_error("cannot read the image", e).offset(offset_bytes))
}

/// What the whole chain says of `range`: zero where no layer has data, or where the data is a hole of its file.
fn extents(access: &FormatAccess<Storage>, files: &Files, range: ByteRange) -> Result<Vec<Extent>> {
    within(DiskSize(access.size()), range.start, range.len())?;
    let storages = access.inner().collect_storage_dependencies();
    debug_assert_eq!(storages.len(), files.0.len());
    let mut cover = Cover::from(range.start);
    while cover.at() < range.end {
        let at = cover.at();
        let (mapping, len) = access
            .get_mapping(at, range.end - at)
            .map_err(|e| imago_error("cannot read the map of the image", e).offset(at))?;
        if len == 0 {
            return Err(Error::new(Kind::Corrupt, "the map of the image ends before the image").offset(at));
        }
        match mapping {
            Mapping::Zero { .. } => cover.extend_to(at + len, Content::Zero),
            Mapping::Raw { storage, offset, .. } => {
                let file = storages.iter().zip(&files.0).find(|(s, _)| std::ptr::eq(**s, storage)).map(|(_, f)| f);
                match file {
                    Some((file, true)) => raw::file_extents(file, offset, len, &mut cover)
                        .map_err(|e| Error::from_io("cannot ask for the holes of the image", e.into()).offset(at))?,
                    _ => cover.extend_to(at + len, Content::Data),
                }
            }
            // Compressed, or whatever a later version of the crate may find.
            _ => cover.extend_to(at + len, Content::Data),
        }
    }
    Ok(cover.finish())
}

/// `imago` reports a broken structure as invalid data; everything else is the operating system's.
fn imago_error(what: &'static str, e: std::io::Error) -> Error {
    match e.kind() {
        std::io::ErrorKind::InvalidData => Error::new(Kind::Corrupt, what).source(e),
        _ => Error::from_io(what, e),
    }
}

#[cfg(test)]
mod own_name_tests {
    use super::*;

    #[test]
    fn only_references_as_our_store_makes_them_are_its_own() {
        for good in ["vda.qcow2", "../000001-deadbeef/vda.qcow2"] {
            assert!(check_own_name(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "/etc/hostname",
            "a/b",
            "../vda.qcow2/",
            "../a",
            "../../a/b",
            "../../b",
            "../a/../b",
            "../a/..",
            "../a//b",
            "./a",
            "../a/b/c",
            "json:{}",
            "nbd://h",
            "a,b",
            "a\n",
        ] {
            assert!(check_own_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_path_does_not_grow_with_the_chain() {
        let below = own_path(Path::new("/s/points/3-c/vda.qcow2"), "../2-b/vda.qcow2");
        assert_eq!(below, Path::new("/s/points/2-b/vda.qcow2"));
        assert_eq!(own_path(Path::new("/s/a.qcow2"), "b.qcow2"), Path::new("/s/b.qcow2"));
        assert_eq!(own_path(Path::new("a.qcow2"), "../d/b.qcow2"), Path::new("../d/b.qcow2"));
        assert_eq!(own_path(Path::new("../a.qcow2"), "../d/b.qcow2"), Path::new("../../d/b.qcow2"));
    }
}
