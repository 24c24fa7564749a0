//! What is done to images of a domain that no QEMU runs: resolving chains, and holding QEMU's own locks.

use crate::error::{Error, Kind, Result, advice, printable};
use crate::file_id::Stamp;
use crate::image::locks::QemuLock;
use crate::image::look::{self, Seen};
use crate::image::qemu_img::ImageInfo;
use crate::image::{Chain, Format, Layer, qemu_img};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Deepest chain that is followed; a loop of backing files ends here.
const DEPTH_MAX: usize = 256;

/// The chain below `top`, by the backing files recorded in the images. Domains define these images, so their headers
/// are believed as libvirt believes them; a format that is not recorded is refused, never probed.
pub fn resolve_chain(top: &Layer) -> Result<Chain> {
    resolve_chain_where(top, &|_| Ok(()))
}

/// As [`resolve_chain`]; `may` is asked of each file before anything else is done with it, and its error ends the walk.
pub fn resolve_chain_where(top: &Layer, may: &dyn Fn(&Path) -> Result<()>) -> Result<Chain> {
    let mut layers = Vec::new();
    let mut next = Some(top.clone());
    while let Some(mut layer) = next.take() {
        if layers.len() == DEPTH_MAX {
            return Err(
                Error::new(Kind::Refused, format!("the chain is deeper than {DEPTH_MAX} images")).path(&top.path)
            );
        }
        may(&layer.path)?;
        if layer.format == Format::Qcow2 {
            // The domain may be started by anybody while we look, and must not be hindered.
            let info = qemu_img::info(&layer.path, layer.format, true)?;
            take_data_file(&mut layer, &info)?;
            layer.data_file.as_deref().map_or(Ok(()), may)?;
            next = match info.backing {
                Some(name) => Some(backing_layer(&layer.path, &name, info.backing_format.as_deref())?),
                None => None,
            };
        }
        layers.push(layer);
    }
    Ok(Chain(layers))
}

/// The chain below `top` as far as its headers lead, read by us and under no lock; and why it goes no further, if it
/// should. For a look at images from anywhere: the layers that can be read are told whatever is wrong below them.
pub fn look_along(top: &Layer, may: &dyn Fn(&Path) -> Result<()>) -> (Vec<Seen>, Option<Error>) {
    let mut layers: Vec<Seen> = Vec::new();
    let mut next = Some(top.clone());
    while let Some(layer) = next.take() {
        if layers.len() == DEPTH_MAX {
            let what = format!("the chain is deeper than {DEPTH_MAX} images");
            return (layers, Some(Error::new(Kind::Refused, what).path(&top.path)));
        }
        let mut seen = match may(&layer.path).and_then(|()| look::look(&layer)) {
            Ok(seen) => seen,
            Err(e) => return (layers, Some(e)),
        };
        let below = named_in(&mut seen, may);
        layers.push(seen);
        match below {
            Ok(below) => next = below,
            Err(e) => return (layers, Some(e)),
        }
    }
    (layers, None)
}

/// Takes note of the data file that a header names, and gives the layer below.
fn named_in(seen: &mut Seen, may: &dyn Fn(&Path) -> Result<()>) -> Result<Option<Layer>> {
    let (Some(header), image) = (&seen.header, &seen.layer.path) else { return Ok(None) };
    let data_file = header.data_file.as_deref().map(|name| beside(image, name)).transpose()?;
    data_file.as_deref().map_or(Ok(()), may)?;
    let below = header.backing.as_deref().map(|name| backing_layer(image, name, header.backing_format.as_deref()));
    let below = below.transpose()?;
    seen.layer.data_file = data_file;
    Ok(below)
}

/// For [`resolve_chain_where`], of an image from anywhere: the files that it names lie in its own directory, or below
/// one of `more`. Otherwise the maker of the image would choose which file of this host is read.
pub fn named_beside(image: &Path, more: &[PathBuf]) -> impl Fn(&Path) -> Result<()> {
    let real = |path: &Path| std::fs::canonicalize(path).ok();
    // QEMU looks for relative names beside the name that it was given; a link's file may lie elsewhere.
    let own = [Some(image.to_owned()), real(image)].into_iter().flatten();
    let own = own.filter_map(|path| real(path.parent().filter(|dir| !dir.as_os_str().is_empty())?));
    let dirs: Vec<PathBuf> = own.chain(more.iter().filter_map(|dir| real(dir))).collect();
    let image = image.to_owned();
    move |file: &Path| {
        // A missing file has no content; opening it gives the error.
        let Ok(there) = std::fs::canonicalize(file) else { return Ok(()) };
        if file == image || dirs.iter().any(|dir| there.starts_with(dir)) {
            return Ok(());
        }
        // The name is a stranger's words.
        let shown = |path: &Path| printable(&path.to_string_lossy(), 1000);
        let what = format!("the image names {}, which lies outside of the image's directory", shown(file));
        let dir = shown(there.parent().unwrap_or(Path::new("/")));
        Err(Error::new(Kind::Refused, what).path(&image).advise(advice::Image::AllowBacking { dir }))
    }
}

/// A chain as libvirt reports it, with the external data files of which libvirt before 10.10 does not tell.
pub fn with_data_files(mut chain: Chain) -> Result<Chain> {
    for layer in chain.0.iter_mut().filter(|l| l.format == Format::Qcow2 && l.data_file.is_none()) {
        // A running QEMU holds its locks on it; the name of a data file never changes.
        let info = qemu_img::info(&layer.path, layer.format, true)?;
        take_data_file(layer, &info)?;
    }
    Ok(chain)
}

fn take_data_file(layer: &mut Layer, info: &ImageInfo) -> Result<()> {
    if let Some(file) = info.data_file.as_ref().filter(|_| layer.data_file.is_none()) {
        layer.data_file = Some(beside(&layer.path, file)?);
    }
    Ok(())
}

fn backing_layer(image: &Path, name: &str, format: Option<&str>) -> Result<Layer> {
    let path = beside(image, name)?;
    let format = match format {
        Some("qcow2") => Format::Qcow2,
        Some("raw") => Format::Raw,
        Some(other) => {
            return Err(
                Error::new(Kind::Refused, format!("the backing file has the unsupported format {other}")).path(path)
            );
        }
        None => {
            return Err(
                Error::new(Kind::Refused, "the image does not record the format of its backing file").path(image)
            );
        }
    };
    Ok(Layer { block_device: is_block_device(&path), path, format, data_file: None })
}

/// The image right below this qcow2 image, by its header; `None` if it has none.
pub fn backing_of(image: &Path) -> Result<Option<Layer>> {
    let info = qemu_img::info(image, Format::Qcow2, true)?;
    info.backing.map(|name| backing_layer(image, &name, info.backing_format.as_deref())).transpose()
}

/// Whether both names lead to one image.
pub fn is_same_image(a: &Path, b: &Path) -> bool {
    let file = |path| Stamp::of(path).ok().flatten().map(|stamp| stamp.id);
    a == b || file(a).is_some_and(|id| Some(id) == file(b))
}

/// `Conflict` unless the overlay's own header says that it lies over `base`: into any other image its commit would mix
/// two disks.
pub fn commits_into(overlay: &Path, base: &Layer) -> Result<()> {
    let found = backing_of(overlay)?;
    if found.as_ref().is_some_and(|layer| is_same_image(&layer.path, &base.path)) {
        return Ok(());
    }
    let over = found.map_or("nothing".to_owned(), |layer| layer.path.display().to_string());
    let what = format!("the overlay lies over {over}, and not over {}", base.path.display());
    Err(Error::new(Kind::Conflict, what).path(overlay))
}

/// Why no bitmap of ours may be on this image although it could, as a sentence: its owner comes first. QEMU goes back
/// to no internal snapshot while a bitmap is there, and libvirt has ended the domain by the time it is told so.
pub fn must_not_be_tracked(layer: &Layer) -> Option<String> {
    let held = layer.format == Format::Qcow2 && qemu_img::holds_snapshots(layer).unwrap_or(false);
    held.then(|| "the image holds internal snapshots, and QEMU goes back to none while a dirty bitmap is there".into())
}

/// Why nothing can tell what changes in this image from one QEMU to the next, as a sentence; `None`: a bitmap in it
/// can.
pub fn keeps_no_bitmap(layer: &Layer) -> Option<String> {
    if layer.format == Format::Raw {
        return Some("the domain is off, and a raw image keeps no dirty bitmap".into());
    }
    // Another host may run the domain from it: what is said of the image here may be stale, and writing to it may harm.
    if on_shared_storage(&layer.path) {
        return Some("the domain is off, and its image lies on shared storage".into());
    }
    match qemu_img::keeps_bitmaps(layer) {
        Ok(true) => None,
        Ok(false) => Some("the domain is off, and an image of qcow2 version 2 keeps no dirty bitmap".into()),
        Err(e) => Some(format!("the domain is off, and its image cannot be looked at ({})", e.chain())),
    }
}

/// A file named in an image's header, as QEMU finds it: relative to the image.
fn beside(image: &Path, name: &str) -> Result<PathBuf> {
    if name.starts_with("json:") || name.contains("://") {
        let what = format!("the image refers to {}, which is not a plain file", printable(name, 1000));
        return Err(Error::new(Kind::Refused, what).path(image));
    }
    let name = name.strip_prefix("file:").unwrap_or(name);
    Ok(image.parent().unwrap_or(Path::new("/")).join(name))
}

/// True if the path leads to a block device. False if nothing is there or it cannot be looked at.
pub fn is_block_device(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device())
}

/// Locks an image that must be exactly as it was when `seen`; `Busy` if it is in use or has changed since.
pub fn lock_as_seen(path: &Path, seen: Option<Stamp>) -> Result<QemuLock> {
    let lock = QemuLock::take_within(path, Duration::from_secs(1))?.ok_or_else(|| {
        Error::new(Kind::Busy, "a QEMU program has the image open").path(path).hint("`fuser -v FILE` names it")
    })?;
    if Stamp::of(path)? != seen {
        return Err(Error::new(Kind::Busy, "the image changed while it was looked at").path(path));
    }
    Ok(lock)
}

/// Whether other hosts may have the file open: network and cluster file systems by their magic numbers.
pub fn on_shared_storage(path: &Path) -> bool {
    const NFS: u64 = 0x6969;
    const CIFS: u64 = 0xff53_4d42;
    const SMB2: u64 = 0xfe53_4d42;
    const CEPH: u64 = 0x00c3_6400;
    const GFS2: u64 = 0x0116_1970;
    const OCFS2: u64 = 0x7461_636f;
    const FUSE: u64 = 0x6573_5546; // glusterfs and others
    let dir = path.parent().unwrap_or(Path::new("/"));
    match rustix::fs::statfs(dir) {
        Ok(s) => matches!(s.f_type as u64 & 0xffff_ffff, NFS | CIFS | SMB2 | CEPH | GFS2 | OCFS2 | FUSE),
        // What cannot be looked at is treated with the greater care.
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_changed_is_not_locked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        std::fs::write(&path, b"x").unwrap();
        let seen = Stamp::of(&path).unwrap();
        assert!(lock_as_seen(&path, seen).is_ok());
        std::fs::write(&path, b"xy").unwrap();
        assert_eq!(lock_as_seen(&path, seen).unwrap_err().kind(), Kind::Busy);
    }

    #[test]
    fn backing_files_are_found_as_qemu_finds_them() {
        let image = Path::new("/pool/a/top.qcow2");
        assert_eq!(beside(image, "base.qcow2").unwrap(), Path::new("/pool/a/base.qcow2"));
        assert_eq!(beside(image, "/gold/g.qcow2").unwrap(), Path::new("/gold/g.qcow2"));
        assert_eq!(beside(image, "../g.qcow2").unwrap(), Path::new("/pool/a/../g.qcow2"));
        assert!(beside(image, "nbd://host/x").is_err());
        assert!(beside(image, "json:{}").is_err());
    }
}
