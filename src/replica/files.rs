//! Files of a store: opened relative to a directory that is held open, never through a symbolic link, made durable
//! by the order restic and SQLite use: write, fsync, rename, fsync of the directory.
//!
//! Modes do not depend on the umask: directories 0700, files 0600 while they grow, 0400 once sealed. Errors carry the
//! path. A failed fsync condemns the file: nothing here retries one, because the kernel marks pages clean after it.

use crate::block::DiskSize;
use crate::error::{Error, Kind, Result};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

const DIR_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
const SEALED_MODE: u32 = 0o400;

/// Most entries read from one directory of a store: more is damage or an attack, and is refused.
const ENTRIES_MAX: usize = 1 << 20;

/// An open directory of a store. Its name may be moved under it; what is opened below stays below.
#[derive(Debug)]
pub struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

impl Dir {
    /// Opens the root of a store. The operator names it, so it may be reached through links. `None` if it is not there.
    pub fn open_root(path: &Path) -> Result<Option<Dir>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(Dir { fd, path: path.to_owned() })),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(Error::io("cannot open the store", path, e.into())),
        }
    }

    /// As [`Dir::open_root`], creating what is missing. The new directories are durable when it returns.
    pub fn create_root(path: &Path) -> Result<Dir> {
        if let Some(dir) = Self::open_root(path)? {
            return Ok(dir);
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Error::new(Kind::Usage, "this cannot be the root of a store").path(path));
        };
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        let parent = Self::create_root(parent)?;
        match rustix::fs::mkdirat(&parent.fd, name, Mode::from_raw_mode(DIR_MODE)) {
            Ok(()) | Err(Errno::EXIST) => parent.sync()?,
            Err(e) => return Err(Error::io("cannot create the store", path, e.into())),
        }
        Self::open_root(path)?.ok_or_else(|| Error::new(Kind::Io, "the directory vanished").path(path))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The directory `name` in this one; `None` if there is nothing of that name.
    pub fn sub(&self, name: &str) -> Result<Option<Dir>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(Dir { fd, path: self.join(name) })),
            Err(Errno::NOENT) => Ok(None),
            Err(Errno::NOTDIR | Errno::LOOP) => Err(self.foreign(name, "a directory")),
            Err(e) => Err(Error::io("cannot open the directory", self.join(name), e.into())),
        }
    }

    /// As [`Dir::sub`], created if it is missing; its name is durable when this returns.
    pub fn sub_or_create(&self, name: &str) -> Result<Dir> {
        let created = match rustix::fs::mkdirat(&self.fd, name, Mode::from_raw_mode(DIR_MODE)) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(e) => return Err(Error::io("cannot create the directory", self.join(name), e.into())),
        };
        let dir = self.sub(name)?.ok_or_else(|| self.vanished(name))?;
        if created {
            rustix::fs::fchmod(&dir.fd, Mode::from_raw_mode(DIR_MODE))
                .map_err(|e| Error::io("cannot set the mode", &dir.path, e.into()))?;
        }
        // Also when it was there: whoever created it may have died before this.
        self.sync()?;
        Ok(dir)
    }

    /// A new file, for reading and writing; one that is there already is an error. Durable after its own fsync and
    /// [`Dir::sync`].
    pub fn create(&self, name: &str) -> Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = self.open_with(name, flags)?.ok_or_else(|| self.vanished(name))?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(FILE_MODE))
            .map_err(|e| Error::io("cannot set the mode", self.join(name), e.into()))?;
        Ok(file)
    }

    /// The regular file `name` for reading; `None` if it is not there.
    pub fn open(&self, name: &str) -> Result<Option<File>> {
        self.open_with(name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK)
    }

    /// The regular file `name` for reading and writing, created empty if it is missing.
    pub fn open_or_create(&self, name: &str) -> Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        self.open_with(name, flags)?.ok_or_else(|| self.vanished(name))
    }

    /// The regular file `name` for reading and writing; `None` if it is not there.
    pub fn open_mut(&self, name: &str) -> Result<Option<File>> {
        self.open_with(name, OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK)
    }

    fn open_with(&self, name: &str, flags: OFlags) -> Result<Option<File>> {
        let fd = match rustix::fs::openat(&self.fd, name, flags, Mode::from_raw_mode(FILE_MODE)) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP | Errno::ISDIR | Errno::NXIO) => return Err(self.foreign(name, "a regular file")),
            Err(e) => return Err(Error::io("cannot open the file", self.join(name), e.into())),
        };
        let stat =
            rustix::fs::fstat(&fd).map_err(|e| Error::io("cannot inspect the file", self.join(name), e.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(self.foreign(name, "a regular file"));
        }
        Ok(Some(File::from(fd)))
    }

    /// Whole content of a file of at most `bytes_max` bytes; `None` if it is not there.
    pub fn read(&self, name: &str, bytes_max: usize) -> Result<Option<Vec<u8>>> {
        let Some(file) = self.open(name)? else { return Ok(None) };
        let mut content = Vec::new();
        let read = file.take(bytes_max as u64 + 1).read_to_end(&mut content);
        read.map_err(|e| Error::io("cannot read the file", self.join(name), e))?;
        if content.len() > bytes_max {
            let what = format!("the file is larger than the {bytes_max} bytes it may have");
            return Err(Error::new(Kind::Corrupt, what).path(self.join(name)));
        }
        Ok(Some(content))
    }

    /// Names of all entries, sorted; a name that is not UTF-8 is none of ours and comes out mangled.
    pub fn entries(&self) -> Result<Vec<String>> {
        let fail = |e: Errno| Error::io("cannot list the directory", &self.path, e.into());
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
            if names.len() > ENTRIES_MAX {
                return Err(Error::new(Kind::Corrupt, "the directory has too many entries").path(&self.path));
            }
        }
        names.sort();
        Ok(names)
    }

    /// Makes the names in this directory durable.
    pub fn sync(&self) -> Result<()> {
        rustix::fs::fsync(&self.fd).map_err(|e| Error::io("cannot sync the directory", &self.path, e.into()))?;
        crate::traced_step!("sync", self.path);
        Ok(())
    }

    /// Makes the content of a file durable that is found finished: whoever finished it may have died before its own
    /// fsync.
    pub fn sync_file(&self, name: &str) -> Result<()> {
        let file = self.open(name)?.ok_or_else(|| self.vanished(name))?;
        file.sync_all().map_err(|e| Error::io("cannot sync the file", self.join(name), e))?;
        crate::traced_step!("sync", self.join(name));
        Ok(())
    }

    /// Removes a file; nothing happens if it is not there.
    pub fn remove(&self, name: &str) -> Result<()> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(Error::io("cannot remove the file", self.join(name), e.into())),
        }
    }

    /// Removes whatever has this name: a file, a link (not what it points to), or a directory of our two levels with
    /// all that is in it. Nothing happens if it is not there.
    pub fn remove_all(&self, name: &str) -> Result<()> {
        crate::traced_step!("remove", self.join(name));
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(e) => return Err(Error::io("cannot remove the file", self.join(name), e.into())),
        }
        let Some(dir) = self.sub(name)? else { return Ok(()) };
        for entry in dir.entries()? {
            dir.remove(&entry)?;
        }
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(Error::io("cannot remove the directory", self.join(name), e.into())),
        }
    }

    /// Writes a new file and fsyncs it; its name is durable after [`Dir::sync`].
    pub fn write_new(&self, name: &str, content: &[u8]) -> Result<File> {
        let mut file = self.create(name)?;
        file.write_all(content).map_err(|e| Error::io("cannot write the file", self.join(name), e))?;
        file.sync_all().map_err(|e| Error::io("cannot sync the file", self.join(name), e))?;
        Ok(file)
    }

    /// Puts a fully written and synced file into the place of another, in one step as any reader sees it. Durable
    /// after [`Dir::sync`].
    pub fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.rename_into(from, self, to)
    }

    /// As [`Dir::rename`], but only if nothing has the new name yet: false if something has.
    pub fn rename_new(&self, from: &str, to: &str) -> Result<bool> {
        match rustix::fs::renameat_with(&self.fd, from, &self.fd, to, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => Ok(false),
            // A file system that cannot do both at once: two at the same moment are not to be expected there.
            Err(Errno::INVAL | Errno::NOSYS) if self.open(to)?.is_some() => Ok(false),
            Err(Errno::INVAL | Errno::NOSYS) => self.rename(from, to).map(|()| true),
            Err(e) => Err(Error::io("cannot rename the file", self.join(from), e.into())),
        }
    }

    /// As [`Dir::rename`], into another directory of the same store. Durable after [`Dir::sync`] of both.
    pub fn rename_into(&self, from: &str, other: &Dir, to: &str) -> Result<()> {
        rustix::fs::renameat(&self.fd, from, &other.fd, to)
            .map_err(|e| Error::io("cannot rename the file", self.join(from), e.into()))?;
        crate::traced_step!("rename", other.join(to));
        Ok(())
    }

    /// Makes a sealed file writable for its owner again.
    pub fn unseal_file(&self, name: &str) -> Result<()> {
        let file = self.open(name)?.ok_or_else(|| self.vanished(name))?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(FILE_MODE))
            .map_err(|e| Error::io("cannot set the mode", self.join(name), e.into()))
    }

    /// Makes a finished file, durable already, read-only. The mode itself is not worth a sync: a crash that loses it
    /// loses no data.
    pub fn seal_file(&self, name: &str) -> Result<()> {
        let file = self.open(name)?.ok_or_else(|| self.vanished(name))?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(SEALED_MODE))
            .map_err(|e| Error::io("cannot set the mode", self.join(name), e.into()))
    }

    /// Space of the file system this directory lies on.
    pub fn space(&self) -> Result<Space> {
        Space::of(rustix::fs::fstatvfs(self.fd.as_fd()), &self.path)
    }

    fn vanished(&self, name: &str) -> Error {
        Error::new(Kind::Io, "it vanished while it was in use").path(self.join(name))
    }

    fn foreign(&self, name: &str, wanted: &str) -> Error {
        Error::new(
            Kind::Refused,
            format!("this is not {wanted} of the store (a symbolic link or another kind of file)"),
        )
        .path(self.join(name))
        .hint("the store follows no links: remove what was put there, or put the real thing back")
    }
}

/// Room on a file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// What an unprivileged writer may still write.
    pub free_bytes: u64,
    pub total_bytes: u64,
}

impl Space {
    /// Of the file system that `path`, or its nearest ancestor that exists, lies on.
    pub fn at(path: &Path) -> Result<Space> {
        for ancestor in path.ancestors().map(|a| if a.as_os_str().is_empty() { Path::new(".") } else { a }) {
            match rustix::fs::statvfs(ancestor) {
                Err(Errno::NOENT) => {}
                stat => return Self::of(stat, ancestor),
            }
        }
        Err(Error::new(Kind::NotFound, "there is no such path").path(path))
    }

    fn of(stat: rustix::io::Result<rustix::fs::StatVfs>, path: &Path) -> Result<Space> {
        let s = stat.map_err(|e| Error::io("cannot ask for the free space", path, e.into()))?;
        Ok(Space {
            free_bytes: s.f_bavail.saturating_mul(s.f_frsize),
            total_bytes: s.f_blocks.saturating_mul(s.f_frsize),
        })
    }

    /// What is left alone whatever a run asks for: a file system that is full to the last byte harms more than us.
    pub fn floor_bytes(self) -> u64 {
        (64 << 20).max(self.total_bytes / 100)
    }
}

/// Of the image of a disk of this size.
pub(super) fn image_size(disk: DiskSize) -> DiskSize {
    disk.whole_sectors()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    fn temp() -> (tempfile::TempDir, Dir) {
        let t = tempfile::tempdir().unwrap();
        let d = Dir::open_root(t.path()).unwrap().unwrap();
        (t, d)
    }

    /// I21: nothing is opened, created, written or removed through a link.
    #[test]
    fn links_are_refused_wherever_we_expect_our_own() {
        let (t, d) = temp();
        let outside = tempfile::tempdir().unwrap();
        let canary = outside.path().join("canary");
        std::fs::write(&canary, "untouched").unwrap();
        symlink(&canary, t.path().join("file")).unwrap();
        symlink(outside.path(), t.path().join("dir")).unwrap();
        for e in [
            d.open("file").unwrap_err(),
            d.open_mut("file").unwrap_err(),
            d.open_or_create("file").unwrap_err(),
            d.read("file", 100).unwrap_err(),
            d.seal_file("file").unwrap_err(),
            d.sub("dir").unwrap_err(),
            d.sub_or_create("dir").unwrap_err(),
        ] {
            assert_eq!(e.kind(), Kind::Refused, "{e}");
        }
        assert!(d.create("file").is_err());
        d.remove_all("file").unwrap();
        d.remove_all("dir").unwrap();
        assert_eq!(std::fs::read_to_string(&canary).unwrap(), "untouched");
        assert!(d.entries().unwrap().is_empty());
    }

    #[test]
    fn a_fifo_is_refused_and_not_waited_for() {
        let (t, d) = temp();
        rustix::fs::mknodat(rustix::fs::CWD, t.path().join("pipe"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert_eq!(d.open("pipe").unwrap_err().kind(), Kind::Refused);
    }

    #[test]
    fn modes_are_ours() {
        let (t, d) = temp();
        let sub = d.sub_or_create("sub").unwrap();
        sub.write_new("f", b"x").unwrap();
        let mode = |p: &str| std::fs::metadata(t.path().join(p)).unwrap().mode() & 0o7777;
        assert_eq!((mode("sub"), mode("sub/f")), (0o700, 0o600));
        sub.seal_file("f").unwrap();
        assert_eq!(mode("sub/f"), 0o400);
    }

    #[test]
    fn a_file_larger_than_its_bound_is_not_read() {
        let (_t, d) = temp();
        d.write_new("f", b"12345").unwrap();
        assert_eq!(d.read("f", 5).unwrap().unwrap(), b"12345");
        assert_eq!(d.read("f", 4).unwrap_err().kind(), Kind::Corrupt);
        assert_eq!(d.read("g", 4).unwrap(), None);
    }

    #[test]
    fn a_root_is_created_with_its_parents_and_space_is_known_before() {
        let (t, _d) = temp();
        let deep = t.path().join("a/b/c");
        assert!(Space::at(&deep).unwrap().total_bytes > 0);
        assert!(Dir::open_root(&deep).unwrap().is_none());
        Dir::create_root(&deep).unwrap().write_new("f", b"").unwrap();
        assert!(deep.join("f").exists());
    }
}
