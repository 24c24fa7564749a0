//! Names beside an image, and how a finished file takes the image's place.
//!
//! `.NAME.vr-part` is what will become NAME: a new file, a clone or a copy. It is left where a copy is cut short, so
//! that the next one goes on from it. Who writes it holds a lock on it.

use super::{FileMeta, WayWish, file_name};
use crate::error::{Error, Kind, Result, advice};
use crate::flock::Flock;
use rustix::fs::{Access, AtFlags, CWD, Mode, SeekFrom, accessat};
use rustix::io::Errno;
use std::borrow::Cow;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::Way;

/// Bytes copied by one call of the kernel.
const COPY_MAX: u64 = 1 << 30;

/// The path itself, links followed: of a file that is not there yet, its directory's. An image must not be replaced by
/// way of a link that points to it.
pub(super) fn real_path(path: &Path) -> Result<PathBuf> {
    match fs::canonicalize(path) {
        Ok(real) => Ok(real),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let dir = fs::canonicalize(dir).map_err(|e| Error::io("there is no such directory", dir, e))?;
            Ok(dir.join(file_name(path)?))
        }
        Err(e) => Err(Error::io("cannot look at the image", path, e)),
    }
}

/// Whether this is the name of a file that we keep beside an image.
pub(super) fn is_beside_an_image(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    name.starts_with('.') && (name.ends_with(".vr-part") || name.ends_with(".vr-redo"))
}

/// The real path, if it lies below `root`. What lies elsewhere is refused with the same words whether it is there or
/// not; and so is what we keep beside an image ourselves: put in its place while it is written to, a file that names
/// others would lead QEMU out of `root`.
pub(super) fn check_within(path: &Path, root: &Path) -> Result<PathBuf> {
    let root = fs::canonicalize(root).map_err(|e| Error::io("cannot look at the directory of images", root, e))?;
    let ours = || Error::new(Kind::Refused, "this file belongs to an image, and is none itself").path(path);
    if is_beside_an_image(path) {
        return Err(ours());
    }
    match real_path(path) {
        // Where it is a link, what that leads to is not there.
        Ok(real) if real.starts_with(&root) && real != root && !real.is_symlink() => {
            if is_beside_an_image(&real) {
                Err(ours())
            } else {
                Ok(real)
            }
        }
        Err(e) if !leads_out(path, &root) => Err(e),
        _ => Err(Error::new(Kind::Refused, format!("only what lies below {} is handed out", root.display()))
            .path(path)
            .advise(advice::Host::ServedRoot)),
    }
}

/// Whether a path of which something is missing would lie outside of `root`, which is real, as far as there is a way.
fn leads_out(path: &Path, root: &Path) -> bool {
    for part in path.ancestors() {
        match fs::canonicalize(part) {
            Ok(real) => return !real.starts_with(root),
            // A link to what is not there, or may not be looked at.
            Err(_) if part.symlink_metadata().is_ok() => return true,
            Err(_) => {}
        }
    }
    true
}

pub(super) fn part_of(image: &Path) -> Result<PathBuf> {
    Ok(image.with_file_name(format!(".{}.vr-part", fitting(&file_name(image)?, NAME_MAX - "..vr-part".len()))))
}

/// Longest name of a file, in bytes.
pub(super) const NAME_MAX: usize = 255;

/// The name of an image in that of a file beside it, at most `room` bytes long. Of a long one the beginning and a hash
/// are kept: two images of one directory never meet, and every run finds the same name.
pub(super) fn fitting(name: &str, room: usize) -> Cow<'_, str> {
    if name.len() <= room {
        return name.into();
    }
    let hash = &blake3::hash(name.as_bytes()).to_hex()[..16];
    let most = room.saturating_sub(hash.len() + "-".len());
    let kept = (0..=most).rev().find(|at| name.is_char_boundary(*at)).unwrap_or(0);
    format!("{}-{hash}", &name[..kept]).into()
}

pub(super) fn dir_of(path: &Path) -> &Path {
    path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

pub(super) use crate::durable::sync_dir;

/// Makes an image durable that is found to be what was wanted: whoever made it so may have died before its own fsync.
pub(super) fn make_durable(image: &Path) -> Result<()> {
    let synced = File::open(image).and_then(|f| f.sync_all());
    synced.map_err(|e| Error::io("cannot make the file durable", image, e))?;
    crate::traced_step!("sync", image);
    sync_dir(dir_of(image))
}

/// Whether this process may make, rename and remove files beside an image.
pub(super) fn check_may_put(image: &Path) -> Result<()> {
    let dir = dir_of(image);
    match accessat(CWD, dir, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS) {
        Err(e @ (Errno::ACCESS | Errno::PERM | Errno::ROFS)) => {
            let whose = fs::metadata(dir)
                .map_or(String::new(), |m| format!(" (owner {}, mode {:04o})", m.uid(), m.mode() & 0o7777));
            let what =
                format!("user {} may not make files in its directory{whose}", rustix::process::geteuid().as_raw());
            Err(Error::io(what, dir, e.into()).advise(advice::Image::MakeFiles))
        }
        // Whatever else is wrong with it is told by what comes next.
        _ => Ok(()),
    }
}

/// Removes a file, or finds it gone.
pub(super) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("cannot remove the file", path, e)),
        _ => Ok(()),
    }
}

/// A part file, held: until it is let go nobody else begins to write beside the image.
#[derive(Debug)]
pub(super) struct PartLock {
    /// Removed when it is let go.
    worthless: Option<PathBuf>,
    _lock: Flock,
}

impl PartLock {
    /// Nothing can go on from this file if it is left half made: it goes, unless it takes the place first.
    pub(super) fn or_nothing(mut self, part: &Path) -> Self {
        self.worthless = Some(part.to_owned());
        self
    }

    /// It has taken the place.
    pub(super) fn let_go(mut self) {
        self.worthless = None;
    }
}

impl Drop for PartLock {
    /// Removes before the lock goes with the field.
    fn drop(&mut self) {
        if let Some(part) = self.worthless.take() {
            drop(fs::remove_file(part));
        }
    }
}

/// Holds a part file. `Busy` if another program does, or has put another one there meanwhile.
pub(super) fn hold(part: &Path) -> Result<PartLock> {
    let cannot = |e| Error::io("cannot open the file", part, e);
    let busy = || Error::new(Kind::Busy, "another copy into this image is under way").path(part);
    let file = OpenOptions::new().read(true).open(part).map_err(cannot)?;
    let held = Flock::exclusive(file).map_err(|e| Error::io("cannot lock the file", part, e))?.map_err(|_| busy())?;
    // Whoever had it may have removed it before letting go: then the lock is one on a file without a name.
    let (ours, there) = (held.file().metadata().map_err(cannot)?, fs::symlink_metadata(part).map_err(cannot)?);
    match (ours.dev(), ours.ino()) == (there.dev(), there.ino()) {
        true => Ok(PartLock { worthless: None, _lock: held }),
        false => Err(busy()),
    }
}

/// Makes an empty file, which is not there yet, its owner's.
pub(super) fn create(part: &Path) -> Result<File> {
    let create = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(part);
    create.map_err(|e| Error::io("cannot create the file", part, e))
}

/// Makes `part`, which is not there, a second file of the same content, sparse where the image is. `wish` says how;
/// without one a clone, or else a copy. `Refused` where a clone was asked for and cannot be had.
pub(super) fn duplicate(image: &Path, part: &Path, wish: WayWish) -> Result<Way> {
    let from = File::open(image).map_err(|e| Error::io("cannot open the image", image, e))?;
    let to = create(part)?;
    let done = fill(&from, &to, image, wish);
    if done.is_err() {
        // A half-made copy is worth nothing: it was made in no time, or it will be made again.
        drop(fs::remove_file(part));
    }
    done
}

fn fill(from: &File, to: &File, image: &Path, wish: WayWish) -> Result<Way> {
    if wish != WayWish::Copy {
        match rustix::fs::ioctl_ficlone(to, from) {
            Ok(()) => return Ok(Way::Reflink),
            Err(e) if wish == WayWish::Reflink => {
                return Err(Error::new(Kind::Refused, "the file system shares no blocks between files")
                    .path(image)
                    .source(std::io::Error::from(e))
                    .advise(advice::Image::ChooseWay {
                        ways: vec![advice::Way::Redo, advice::Way::Copy, advice::Way::Auto],
                    }));
            }
            Err(_) => {}
        }
    }
    copy_sparse(from, to).map_err(|e| Error::io("cannot copy the image", image, e.into()))?;
    Ok(Way::Copy)
}

/// Whether the file system that holds `image` shares blocks between files.
pub(super) fn can_reflink(image: &Path) -> bool {
    let Ok(from) = File::open(image) else { return false };
    let Ok(to) = tempfile::tempfile_in(dir_of(image)) else { return false };
    rustix::fs::ioctl_ficlone(&to, &from).is_ok()
}

fn copy_sparse(from: &File, to: &File) -> Result<(), Errno> {
    let end = rustix::fs::seek(from, SeekFrom::End(0))?;
    rustix::fs::ftruncate(to, end)?;
    let mut at = 0;
    while at < end {
        let data = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            // A file system that knows nothing of holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(e) => return Err(e),
        };
        let hole = rustix::fs::seek(from, SeekFrom::Hole(data)).unwrap_or(end).max(data + 1);
        copy_range(from, to, data, hole.min(end))?;
        at = hole;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> Result<(), Errno> {
    let (mut source, mut target) = (start, start);
    while source < end {
        let len = (end - source).min(COPY_MAX) as usize;
        match rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), len) {
            // The file shrank under us; whoever compares finds out.
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Gives `part`, which is finished and durable, the name of `image`, with the owner and mode of what is there or those
/// of `meta`. Durable when it returns.
pub(super) fn take_place(part: &Path, image: &Path, meta: Option<&FileMeta>) -> Result<()> {
    if let Ok(old) = fs::metadata(image) {
        let keep =
            FileMeta { uid: old.uid(), gid: old.gid(), mode: old.mode() & 0o7777, modified_s: 0, modified_ns: 0 };
        set_owner(part, &keep)?;
    }
    if let Some(meta) = meta {
        set_meta(part, meta)?;
    }
    let file = File::open(part).map_err(|e| Error::io("cannot open the file", part, e))?;
    file.sync_all().map_err(|e| Error::io("cannot make the file durable", part, e))?;
    crate::failpoint!("i4");
    fs::rename(part, image).map_err(|e| Error::io("cannot put the file in its place", image, e))?;
    sync_dir(dir_of(image))?;
    crate::failpoint!("i5");
    Ok(())
}

/// Owner and mode; nothing is called that would change nothing, so that it needs no right to.
fn set_owner(path: &Path, meta: &FileMeta) -> Result<()> {
    let now = fs::metadata(path).map_err(|e| Error::io("cannot look at the file", path, e))?;
    if (now.uid(), now.gid()) != (meta.uid, meta.gid) {
        std::os::unix::fs::chown(path, Some(meta.uid), Some(meta.gid))
            .map_err(|e| Error::io(format!("cannot give the file to {}:{}", meta.uid, meta.gid), path, e))?;
    }
    // After the owner, which takes special bits away.
    rustix::fs::chmod(path, Mode::from_raw_mode(meta.mode & 0o7777))
        .map_err(|e| Error::io("cannot set the mode of the file", path, e.into()))
}

/// Owner, mode and time of the last change.
pub(super) fn set_meta(path: &Path, meta: &FileMeta) -> Result<()> {
    set_owner(path, meta)?;
    let modified = rustix::fs::Timespec { tv_sec: meta.modified_s, tv_nsec: meta.modified_ns as _ };
    let access = rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT as _ };
    let times = rustix::fs::Timestamps { last_access: access, last_modification: modified };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::empty())
        .map_err(|e| Error::io("cannot set the time of the file", path, e.into()))
}

/// Owner, mode and time of a file that is read.
pub fn meta_of(path: &Path) -> Result<FileMeta> {
    let m = fs::metadata(path).map_err(|e| Error::io("cannot look at the image", path, e))?;
    let (modified_s, modified_ns) = (m.mtime(), m.mtime_nsec());
    Ok(FileMeta { uid: m.uid(), gid: m.gid(), mode: m.mode() & 0o7777, modified_s, modified_ns })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, symlink};

    #[test]
    fn a_copy_has_the_same_bytes_and_the_same_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (image, part) = (dir.path().join("a.raw"), dir.path().join("b"));
        let file = File::create(&image).unwrap();
        file.set_len(10 << 20).unwrap();
        file.write_all_at(&[7; 5000], 1 << 20).unwrap();
        file.write_all_at(&[8; 3], (9 << 20) + 1).unwrap();
        assert_eq!(duplicate(&image, &part, WayWish::Copy).unwrap(), Way::Copy);
        assert!(fs::read(&image).unwrap() == fs::read(&part).unwrap());
        assert!(fs::metadata(&part).unwrap().blocks() <= fs::metadata(&image).unwrap().blocks() + 16);
        assert_eq!(fs::metadata(&part).unwrap().mode() & 0o777, 0o600);
        if !can_reflink(&image) {
            fs::remove_file(&part).unwrap();
            assert_eq!(duplicate(&image, &part, WayWish::Reflink).unwrap_err().kind(), Kind::Refused);
            assert!(!part.exists());
        }
    }

    #[test]
    fn a_long_name_has_room_for_what_lies_beside_its_image() {
        assert_eq!(fitting("a.raw", 246), "a.raw");
        let (one, other) = (format!("{}1.raw", "ö".repeat(120)), format!("{}2.raw", "ö".repeat(120)));
        let fits = |name: &str| part_of(&Path::new("/srv").join(name)).unwrap();
        for name in [&one, &other] {
            let part = fits(name);
            let len = part.file_name().unwrap().len();
            assert!((200..=NAME_MAX).contains(&len) && is_beside_an_image(&part), "{}", part.display());
            assert_eq!(fits(name), part, "every run finds it");
        }
        assert_ne!(fits(&one), fits(&other));
    }

    #[test]
    fn a_part_is_held_by_one_and_goes_if_it_is_worth_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let part = dir.path().join("part");
        drop(create(&part).unwrap());
        let held = hold(&part).unwrap();
        assert_eq!(hold(&part).unwrap_err().kind(), Kind::Busy);
        drop(held);
        assert!(part.exists());
        drop(hold(&part).unwrap().or_nothing(&part));
        assert!(!part.exists());
        // It has taken the place; what lies under its name by now is another's.
        drop(create(&part).unwrap());
        let held = hold(&part).unwrap().or_nothing(&part);
        fs::rename(&part, dir.path().join("image")).unwrap();
        drop(create(&part).unwrap());
        held.let_go();
        assert!(part.exists());
    }

    #[test]
    fn no_link_leads_out_of_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("images");
        fs::create_dir_all(root.join("sub")).unwrap();
        fs::write(dir.path().join("secret"), b"x").unwrap();
        symlink(dir.path().join("secret"), root.join("link")).unwrap();
        symlink(dir.path(), root.join("up")).unwrap();
        symlink(root.join("sub"), root.join("in")).unwrap();
        for good in ["a.raw", "sub/a.raw", "in/a.raw", "sub/../a.raw"] {
            assert!(check_within(&root.join(good), &root).unwrap().starts_with(fs::canonicalize(&root).unwrap()));
        }
        for bad in ["link", "up/secret", "../secret", "up/new", "sub/../../new", "."] {
            assert_eq!(check_within(&root.join(bad), &root).unwrap_err().kind(), Kind::Refused, "{bad}");
        }
        // A file of ours, by whatever name.
        symlink(root.join(".a.raw.vr-redo"), root.join("sub/redo")).unwrap();
        fs::write(root.join(".a.raw.vr-redo"), b"x").unwrap();
        for ours in [".a.raw.vr-part", "sub/.b.vr-redo", "sub/redo", "none/.a.vr-part"] {
            let e = check_within(&root.join(ours), &root).unwrap_err();
            assert!(e.kind() == Kind::Refused && e.chain().contains("belongs to an image"), "{ours}: {}", e.chain());
        }
        for not_ours in ["a.vr-part", ".vr-part.raw"] {
            check_within(&root.join(not_ours), &root).unwrap();
        }
        // Whether there is something is nobody's business.
        symlink(dir.path().join("missing/further"), root.join("dangling")).unwrap();
        symlink(dir.path().join("missing"), root.join("loose")).unwrap();
        for absent in ["up/missing/x", "../missing/x", "dangling", "dangling/x", "loose/x", "up/secret/x"] {
            let e = check_within(&root.join(absent), &root).unwrap_err();
            let there = check_within(&root.join("up/secret"), &root).unwrap_err();
            assert_eq!((e.kind(), e.what()), (there.kind(), there.what()), "{absent}");
        }
        assert_ne!(check_within(&root.join("none/x"), &root).unwrap_err().kind(), Kind::Refused);
    }

    #[test]
    fn what_takes_the_place_has_owner_and_mode_of_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let (image, part) = (dir.path().join("a.raw"), dir.path().join("p"));
        fs::write(&image, b"old").unwrap();
        rustix::fs::chmod(&image, Mode::from_raw_mode(0o640)).unwrap();
        fs::write(&part, b"new").unwrap();
        take_place(&part, &image, None).unwrap();
        assert_eq!((fs::read(&image).unwrap(), meta_of(&image).unwrap().mode), (b"new".to_vec(), 0o640));
        fs::write(&part, b"newer").unwrap();
        let meta = FileMeta { mode: 0o604, modified_s: 1_000_000, modified_ns: 5, ..meta_of(&image).unwrap() };
        take_place(&part, &image, Some(&meta)).unwrap();
        assert_eq!(meta_of(&image).unwrap(), meta);
        assert!(!part.exists());
    }
}
