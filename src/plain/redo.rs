//! The redo file: a whole patch, durable beside an image before the first byte of that image is overwritten.
//!
//! Two lines of text, then a patch. As long as it bears its name, the image is torn, and applying the patch once more
//! ends it (each record leaves its block the same, however often and however far it was done before). A name with
//! `.part` behind it is a patch that is still coming; it means nothing.
//!
//! ```text
//! i1   the redo file is whole, known to be right, durable, and bears its name
//! i2   every record is in the image, and the image is durable
//! i3   the redo file is gone, durably
//! ```

use super::file_name;
use super::identity::Identity;
use super::reading;
use crate::block::{BlockIndex, ByteRange, DiskSize};
use crate::error::{Error, Kind, Result, advice};
use crate::file_id::{BootId, FileId};
use crate::image::raw::RawWriter;
use crate::image::{Format, Image, ImageMut, Layer};
use crate::patch::{self, Decoder, Item, Limits, PieceMask};
use crate::plain::beside::{NAME_MAX, dir_of, fitting, remove, sync_dir};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const BANNER: &str = "virt-replica redo 1\n";

/// Longest second line: two paths and some numbers.
const LINE_MAX: usize = 16 << 10;

/// Bytes of patch read at once.
const CHUNK_LEN: usize = 1 << 20;

/// Bytes of a patch that surely hold its header.
const BEGINNING_LEN: u64 = 4096;

/// Which image a redo file is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Of {
    path: PathBuf,
    /// Device and inode; `None` for a block device, which keeps neither over a restart.
    file: Option<(u64, u64)>,
    /// As in [`FileId`]; earlier versions wrote neither.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    born: Option<(i64, u32)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    boot: Option<BootId>,
}

impl Of {
    fn image(layer: &Layer) -> Result<Of> {
        let id = match layer.block_device {
            true => None,
            false => Some(Identity::of(&layer.path)?.id),
        };
        let (file, born) = (id.map(|id| (id.device, id.inode)), id.and_then(|id| id.born));
        Ok(Of { path: layer.path.clone(), file, born, boot: id.and_then(|id| id.boot) })
    }

    fn id(&self) -> Option<FileId> {
        let (born, boot) = (self.born, self.boot);
        self.file.map(|(device, inode)| FileId { device, inode, born, boot })
    }

    /// Whether both are of one image. A file's redo file lies beside it, so where births tell that it is this file, the
    /// path is of no account: a file system that was mounted elsewhere to be mended is mended there.
    fn is(&self, other: &Of) -> bool {
        match (self.id(), other.id()) {
            (None, None) => self.path == other.path,
            (Some(a), Some(b)) => a.is(&b) && (self.path == other.path || a.born.is_some() && b.born.is_some()),
            _ => false,
        }
    }
}

impl std::fmt::Display for Of {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.id() {
            Some(id) => write!(f, "{} ({id})", self.path.display()),
            None => write!(f, "{} (a block device)", self.path.display()),
        }
    }
}

/// Where the redo file of an image lies: beside a file, in `device_dir` for a block device.
pub fn path_of(image: &Path, block_device: bool, device_dir: &Path) -> Result<PathBuf> {
    let name = file_name(image)?;
    Ok(match block_device {
        false => {
            image.with_file_name(format!(".{}.vr-redo", fitting(&name, NAME_MAX - "..vr-redo".len() - PART.len())))
        }
        true => {
            let hash = blake3::hash(image.as_os_str().as_encoded_bytes()).to_hex();
            device_dir.join(format!("{name}-{}.vr-redo", &hash[..16]))
        }
    })
}

/// Behind the name of a redo file that is not whole yet.
const PART: &str = ".part";

fn part_of(redo: &Path) -> PathBuf {
    let mut name = redo.as_os_str().to_owned();
    name.push(PART);
    PathBuf::from(name)
}

/// `Conflict` if the image is torn: a patch was being applied to it when something ended that.
pub(super) fn refuse_if_torn(image: &Path, block_device: bool, device_dir: &Path) -> Result<()> {
    let redo = path_of(image, block_device, device_dir)?;
    match redo.exists() {
        false => Ok(()),
        true => Err(Error::new(Kind::Conflict, "a change of this image was cut short, and the image is torn")
            .path(image)
            .advise(advice::Image::FinishChange)),
    }
}

/// A patch on its way into a redo file.
pub(super) struct Spool {
    out: BufWriter<File>,
    part: PathBuf,
    redo: PathBuf,
    published: bool,
}

impl Spool {
    /// The image is locked by the caller, who is the only one to have a spool of it.
    pub(super) fn create(layer: &Layer, redo: PathBuf) -> Result<Spool> {
        let part = part_of(&redo);
        if layer.block_device {
            let dir = dir_of(&redo);
            fs::create_dir_all(dir).map_err(|e| Error::io("cannot create the directory for redo files", dir, e))?;
        }
        remove(&part)?;
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&part);
        let file = file.map_err(|e| Error::io("cannot create the redo file", &part, e))?;
        let mut spool = Spool { out: BufWriter::with_capacity(1 << 20, file), part, redo, published: false };
        let line = serde_json::to_string(&Of::image(layer)?).expect("paths and numbers");
        spool.write(BANNER.as_bytes())?;
        spool.write(line.as_bytes())?;
        spool.write(b"\n")?;
        Ok(spool)
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|e| {
            Error::io("cannot write the redo file", &self.part, e).advise(advice::Image::InPlaceNeedsNoRoom)
        })
    }

    /// Step i1. From here on the image counts as torn, and the patch as applied.
    pub(super) fn publish(mut self) -> Result<()> {
        let synced = self.out.flush().and_then(|()| self.out.get_ref().sync_all());
        synced.map_err(|e| Error::io("cannot make the redo file durable", &self.part, e))?;
        fs::rename(&self.part, &self.redo).map_err(|e| Error::io("cannot name the redo file", &self.redo, e))?;
        self.published = true;
        sync_dir(dir_of(&self.redo))?;
        crate::failpoint!("i1");
        Ok(())
    }
}

impl Drop for Spool {
    /// What was not published is rubbish; if it cannot be removed, the next spool does it.
    fn drop(&mut self) {
        if !self.published {
            drop(fs::remove_file(&self.part));
        }
    }
}

/// Steps i2 and i3: applies the redo file of an image, if there is one, and removes it. The caller holds the image's
/// lock. `Conflict` if the redo file is for another file of that name, `Corrupt` if the image was changed since.
/// Durable.
///
/// `just_checked`: it was published by this process, under the lock that is still held. Then it was taken apart, and
/// every block it makes compared with its digest, on the way in, and neither is done a second time.
pub(super) fn roll(layer: &Layer, redo: &Path, just_checked: bool) -> Result<bool> {
    let file = match File::open(redo) {
        Ok(file) => file,
        // Whoever ended it may have died before its absence was durable: over what is written next it must not come
        // back.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return sync_dir_if_there(dir_of(redo)).map(|()| false),
        Err(e) => return Err(Error::io("cannot open the redo file", redo, e)),
    };
    let mut input = BufReader::with_capacity(CHUNK_LEN, file);
    let of = read_head(&mut input).map_err(|e| e.path(redo))?;
    let here = Of::image(layer)?;
    if !of.is(&here) {
        let what = format!("the redo file is for another file: it names {of}, and here is {here}");
        return Err(Error::new(Kind::Conflict, what).path(redo).advise(advice::Image::PutBackAndFinish));
    }
    if !just_checked {
        // Whoever named it may have died before the name was durable; from here on the image may be torn.
        sync_dir(dir_of(redo))?;
    }
    let start = input.stream_position().map_err(|e| Error::io("cannot read the redo file", redo, e))?;
    let (before, after) = match just_checked {
        true => header(&mut input),
        // Whole before the first byte: it was, but it has lain on a disk since.
        false => for_each_item(&mut input, |_, _| Ok(())),
    }
    .map_err(|e| e.path(redo))?;
    input.seek(SeekFrom::Start(start)).map_err(|e| Error::io("cannot read the redo file", redo, e))?;
    let mut writer = RawWriter::open_exact(layer, Some(before.max(after)))?;
    if writer.size() < after && !layer.block_device {
        writer.resize(after)?;
    }
    let applied = for_each_item(&mut input, |size, item| apply(&writer, size, item, just_checked));
    applied.map_err(|e| e.path(&layer.path))?;
    if writer.size() > after && !layer.block_device {
        writer.resize(after)?;
    }
    writer.sync()?;
    crate::failpoint!("i2");
    remove(redo)?;
    sync_dir(dir_of(redo))?;
    crate::failpoint!("i3");
    Ok(true)
}

/// The directory of block devices' redo files is made with the first of them.
fn sync_dir_if_there(dir: &Path) -> Result<()> {
    if dir.is_dir() { sync_dir(dir) } else { Ok(()) }
}

fn read_head(input: &mut impl Read) -> Result<Of> {
    let mut line = |max: usize| -> Result<Vec<u8>> {
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0u8];
            let read = input.read_exact(&mut byte);
            if line.len() == max || read.is_err() {
                return Err(Error::new(Kind::Corrupt, "this is no redo file"));
            }
            line.push(byte[0]);
        }
        Ok(line)
    };
    if line(BANNER.len())? != BANNER.as_bytes() {
        return Err(Error::new(Kind::Protocol, "this redo file is of another version"));
    }
    let of = line(LINE_MAX)?;
    serde_json::from_slice(&of).map_err(|e| Error::new(Kind::Corrupt, "this is no redo file").source(e))
}

/// The sizes before and after that the patch begins with.
fn header(input: &mut impl Read) -> Result<(DiskSize, DiskSize)> {
    let mut decoder = Decoder::new(Limits::default())?;
    let mut beginning = Vec::new();
    let read = input.take(BEGINNING_LEN).read_to_end(&mut beginning);
    read.map_err(|e| Error::from_io("cannot read the patch", e))?;
    decoder.push(&beginning);
    match decoder.next_item()? {
        Some(Item::Header(header)) => Ok((header.size_from, header.size)),
        _ => Err(Error::new(Kind::Corrupt, "the patch is empty")),
    }
}

/// Hands every item of the patch on, with the size after it; returns the sizes before and after.
fn for_each_item(
    input: &mut impl Read,
    mut each: impl FnMut(DiskSize, Item) -> Result<()>,
) -> Result<(DiskSize, DiskSize)> {
    let mut decoder = Decoder::new(Limits::default())?;
    let mut chunk = vec![0; CHUNK_LEN];
    let mut sizes = (DiskSize(0), DiskSize(0));
    loop {
        let len = input.read(&mut chunk).map_err(|e| Error::from_io("cannot read the patch", e))?;
        if len == 0 {
            decoder.finish()?;
            return Ok(sizes);
        }
        decoder.push(&chunk[..len]);
        while let Some(item) = decoder.next_item()? {
            match item {
                Item::Header(header) => sizes = (header.size_from, header.size),
                item => each(sizes.1, item)?,
            }
        }
    }
}

/// One record, in place. Of pieces only those that came are written, so that it can be done again from wherever it was
/// cut.
fn apply(image: &RawWriter, size: DiskSize, item: Item, just_checked: bool) -> Result<()> {
    match item {
        Item::Data { block, digest, bytes } => {
            patch::check_block(block, &bytes, digest)?;
            image.write_at(block.offset(), &bytes)
        }
        Item::Pieces { block, mask, bytes, .. } if just_checked => {
            let mut whole = vec![0; block.bytes(size).len() as usize];
            mask.scatter(&bytes, &mut whole);
            write_pieces(image, block, mask, &whole)
        }
        Item::Pieces { block, digest, mask, bytes } => {
            let mut whole = reading::read_block(image, block, size)?;
            mask.scatter(&bytes, &mut whole);
            patch::check_block(block, &whole, digest).map_err(|e| {
                e.hint(
                    "somebody has written to the image since, and this redo file cannot mend it; move the redo file to \
                     another directory, and copy the image anew",
                )
            })?;
            write_pieces(image, block, mask, &whole)
        }
        Item::Zero { first, count } => {
            let end = BlockIndex(first.0 + count - 1).bytes(size).end;
            image.zero(ByteRange::new(first.offset(), end))
        }
        Item::Header(_) | Item::Trailer(_) => Ok(()),
    }
}

fn write_pieces(image: &RawWriter, block: BlockIndex, mask: PieceMask, whole: &[u8]) -> Result<()> {
    mask.ranges(whole.len()).try_for_each(|r| image.write_at(block.offset() + r.start as u64, &whole[r]))
}

/// Ends what was cut short on the image at `path`: says whether there was anything. Blocks.
pub fn finish(path: &Path, device_dir: &Path) -> Result<bool> {
    let path = crate::plain::beside::real_path(path)?;
    let layer = reading::layer(&path, Format::Raw)?;
    let redo = path_of(&path, layer.block_device, device_dir)?;
    if !redo.exists() {
        return sync_dir_if_there(dir_of(&redo)).map(|()| false);
    }
    let _lock = crate::plain::reading::lock_whole(&path)?;
    roll(&layer, &redo, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same lines stand in docs/formats/redo.md.
    #[test]
    fn the_head_is_what_the_format_says() {
        let of = |line: &str| read_head(&mut format!("virt-replica redo 1\n{line}\nvirt-replica patch").as_bytes());
        let file = of(r#"{"path":"/srv/a.raw","file":[7,9]}"#).unwrap();
        let old = Of { path: "/srv/a.raw".into(), file: Some((7, 9)), born: None, boot: None };
        assert_eq!(file, old);
        assert_eq!(serde_json::to_string(&file).unwrap(), r#"{"path":"/srv/a.raw","file":[7,9]}"#);
        let line = r#"{"path":"/srv/a.raw","file":[7,9],"born":[5,6],"boot":"0b5c8d4e-1f2a-4b3c-8d4e-5f6a7b8c9d0e"}"#;
        let file = of(line).unwrap();
        assert_eq!((file.born, file.boot.is_some()), (Some((5, 6)), true));
        assert_eq!(serde_json::to_string(&file).unwrap(), line);
        assert_eq!(of(r#"{"path":"/dev/vda","file":null}"#).unwrap().file, None);
        for bad in ["", "{}", "x", &"x".repeat(LINE_MAX + 1)] {
            assert_eq!(of(bad).unwrap_err().kind(), Kind::Corrupt);
        }
        assert_eq!(read_head(&mut &b"virt-replica redo 2\n{}\n"[..]).unwrap_err().kind(), Kind::Protocol);
        assert_eq!(read_head(&mut &b"virt-replica"[..]).unwrap_err().kind(), Kind::Corrupt);
    }

    /// The only way back must not be thrown away because a number of the kernel's has changed.
    #[test]
    fn an_image_is_known_again_on_a_file_system_that_came_back() {
        let boot = |id: &str| serde_json::from_str(&format!("{id:?}")).unwrap();
        let (this, last) = ("0b5c8d4e-1f2a-4b3c-8d4e-5f6a7b8c9d0e", "1b5c8d4e-1f2a-4b3c-8d4e-5f6a7b8c9d0e");
        let redo = Of { path: "/a".into(), file: Some((7, 9)), born: Some((5, 6)), boot: Some(boot(last)) };
        let here = Of { file: Some((8, 9)), boot: Some(boot(this)), ..redo.clone() };
        assert!(redo.is(&here));
        assert!(redo.is(&Of { path: "/rescue/a".into(), ..here.clone() }), "mounted elsewhere to be mended");
        assert!(!redo.is(&Of { born: Some((5, 7)), ..here.clone() }), "the inode was used again");
        assert!(!redo.is(&Of { file: Some((8, 10)), ..here.clone() }));
        // As an earlier version wrote it: by inode and path.
        let old = Of { born: None, boot: None, ..redo.clone() };
        assert!(old.is(&here));
        assert!(!old.is(&Of { path: "/rescue/a".into(), ..here.clone() }));
        let device = Of { path: "/dev/x".into(), file: None, born: None, boot: None };
        assert!(device.is(&device) && !device.is(&here) && !here.is(&device));
    }

    #[test]
    fn a_redo_file_for_another_file_is_refused_with_both_named_and_is_never_to_be_removed() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("a.raw");
        fs::write(&image, [0; 4096]).unwrap();
        let layer = Layer { path: image.clone(), format: Format::Raw, block_device: false, data_file: None };
        let redo = path_of(&image, false, dir.path()).unwrap();
        let of = Of { file: Some((7, 1)), ..Of::image(&layer).unwrap() };
        fs::write(&redo, format!("{BANNER}{}\n", serde_json::to_string(&of).unwrap())).unwrap();
        let e = roll(&layer, &redo, false).unwrap_err();
        assert_eq!(e.kind(), Kind::Conflict);
        let inode = Identity::of(&image).unwrap().id.inode;
        assert!(e.what().contains("inode 1 on") && e.what().contains(&format!("inode {inode} on")), "{e}");
        assert_eq!(e.advice(), Some(&advice::Image::PutBackAndFinish.into()));
        assert!(redo.exists());
    }

    /// Whoever ended a redo file, or named it, may have died before that was durable.
    #[cfg(feature = "failpoints")]
    #[test]
    fn a_redo_file_that_is_gone_is_gone_durably_before_the_image_is_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("a.raw");
        fs::write(&image, [0; 4096]).unwrap();
        let layer = Layer { path: image.clone(), format: Format::Raw, block_device: false, data_file: None };
        let redo = path_of(&image, false, dir.path()).unwrap();
        let (rolled, steps) = crate::failpoint::traced(|| roll(&layer, &redo, false).unwrap());
        let synced = format!("sync {}", dir.path().display());
        assert_eq!((rolled, steps), (false, vec![synced.clone()]));
        // One that is found: its name is durable before the image may be torn by it, and so before anything else is
        // found out.
        let of = serde_json::to_string(&Of::image(&layer).unwrap()).unwrap();
        fs::write(&redo, format!("{BANNER}{of}\nno patch")).unwrap();
        let (rolled, steps) = crate::failpoint::traced(|| roll(&layer, &redo, false));
        assert!(rolled.is_err());
        assert_eq!(steps, [synced]);
    }

    #[test]
    fn a_redo_file_lies_beside_a_file_and_elsewhere_for_a_device() {
        let beside = path_of(Path::new("/srv/a.raw"), false, Path::new("/state/redo")).unwrap();
        assert_eq!(beside, Path::new("/srv/.a.raw.vr-redo"));
        let device = |path: &str| path_of(Path::new(path), true, Path::new("/state/redo")).unwrap();
        let (one, other) = (device("/dev/vg0/disk"), device("/dev/vg1/disk"));
        assert!(one.starts_with("/state/redo") && one != other, "{} {}", one.display(), other.display());
    }
}
