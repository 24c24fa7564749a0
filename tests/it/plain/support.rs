//! Images drawn in letters, and copies of them.

#![allow(dead_code)]

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use virt_replica::block::extent::is_zero;
use virt_replica::block::{BLOCK_LEN, ByteRange, DiskSize};
use virt_replica::engine::pump::Progress;
use virt_replica::error::Result;
use virt_replica::image::foreign::format::{AnyFormat, Foreign};
use virt_replica::image::open::{OpenOptions, open_read};
use virt_replica::image::{Chain, Format, ImageMut, Layer, qcow2};
use virt_replica::patch::Compression;
use virt_replica::plain::copy::{Copied, Copy, Sending, copy};
use virt_replica::plain::source::{ReadOptions, Source};
use virt_replica::plain::target::{LocalOptions, LocalTarget};
use virt_replica::plain::{FileMeta, Finish, WayWish, Wish};

pub struct Bench(tempfile::TempDir);

/// What is asked of a copy.
#[derive(Default)]
pub struct Asked<'a> {
    pub way: WayWish,
    pub digests: Option<PathBuf>,
    pub changed: Option<Vec<ByteRange>>,
    pub meta: Option<FileMeta>,
    pub force_share: bool,
    pub dry_run: bool,
    /// Done once, while the copy is under way.
    pub meanwhile: Option<&'a dyn Fn()>,
}

impl Bench {
    pub fn new() -> Bench {
        Bench(tempfile::tempdir().unwrap())
    }

    pub fn within(dir: &Path) -> Bench {
        Bench(tempfile::tempdir_in(dir).unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A new image with what is drawn in it.
    pub fn image(&self, name: &str, format: Format, drawn: (&str, usize)) -> PathBuf {
        let path = self.path(name);
        let _ = fs::remove_file(&path);
        let (letters, tail) = drawn;
        let len = (letters.len() * BLOCK_LEN).saturating_sub(if letters.is_empty() { 0 } else { BLOCK_LEN - tail });
        let block = |at: usize, letter: u8| {
            let len = (len - at * BLOCK_LEN).min(BLOCK_LEN);
            if letter == b'0' { vec![0; len] } else { noise(letter, len) }
        };
        let data = letters.bytes().enumerate().filter(|(_, letter)| *letter != b'.');
        match format {
            Format::Raw => {
                let file = fs::File::create(&path).unwrap();
                file.set_len(len as u64).unwrap();
                data.for_each(|(at, l)| file.write_all_at(&block(at, l), (at * BLOCK_LEN) as u64).unwrap());
            }
            Format::Qcow2 => {
                let image = qcow2::create(&path, DiskSize((len as u64).next_multiple_of(512)), None).unwrap();
                data.for_each(|(at, l)| image.write_at((at * BLOCK_LEN) as u64, &block(at, l)).unwrap());
                image.sync().unwrap();
            }
        }
        path
    }

    pub fn open_options(&self) -> OpenOptions {
        OpenOptions { runtime_dir: self.0.path().to_owned(), force_share: false, readers: 1 }
    }

    pub fn read_options(&self) -> ReadOptions {
        ReadOptions {
            open: self.open_options(),
            exact: true,
            device_max: None,
            redo_dir: self.path("redo"),
            within: None,
            backing: Vec::new(),
        }
    }

    pub fn local_options(&self) -> LocalOptions {
        LocalOptions {
            open: self.open_options(),
            workers: 2,
            within: None,
            backing: Vec::new(),
            redo_dir: self.path("redo"),
            undo: None,
        }
    }

    /// A new image in any format: of others made by qemu-img, of this very size.
    pub fn any_image(&self, name: &str, format: AnyFormat, drawn: (&str, usize)) -> PathBuf {
        match format {
            AnyFormat::Own(format) => self.image(name, format, drawn),
            AnyFormat::Of(format) => {
                let size = if format == Foreign::Vpc { "force_size=on" } else { "" };
                self.foreign_image(name, format, size, drawn)
            }
        }
    }

    /// The same, with options of qemu-img.
    pub fn foreign_image(&self, name: &str, format: Foreign, options: &str, drawn: (&str, usize)) -> PathBuf {
        let (raw, path) = (self.image("drawn.raw", Format::Raw, drawn), self.path(name));
        let mut args = vec!["convert", "-f", "raw", "-O", format.as_str()];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([raw.to_str().unwrap(), path.to_str().unwrap()]);
        self.qemu(&args);
        fs::remove_file(raw).unwrap();
        path
    }

    /// All bytes that a guest sees; of a format of others, those that qemu-img sees.
    pub fn content(&self, path: &Path, format: impl Into<AnyFormat>) -> Vec<u8> {
        let format = match format.into() {
            AnyFormat::Own(Format::Raw) => return fs::read(path).unwrap(),
            AnyFormat::Own(format) => format,
            AnyFormat::Of(format) => {
                let judge = self.path("judge.raw");
                let (from, to) = (path.to_str().unwrap(), judge.to_str().unwrap());
                self.qemu(&["convert", "-f", format.as_str(), "-O", "raw", from, to]);
                let bytes = fs::read(&judge).unwrap();
                fs::remove_file(judge).unwrap();
                return bytes;
            }
        };
        let layer = Layer { path: path.to_owned(), format, block_device: false, data_file: None };
        let opened = open_read(&Chain(vec![layer]), &self.open_options()).unwrap();
        let mut bytes = vec![0; opened.image.size().0 as usize];
        opened.image.read_at(0, &mut bytes).unwrap();
        opened.close().unwrap();
        bytes
    }

    #[track_caller]
    pub fn expect(&self, path: &Path, format: impl Into<AnyFormat>, wanted: &[u8], name: &str) {
        let format = format.into();
        let found = self.content(path, format);
        let wanted = padded(wanted, format);
        assert_eq!(found.len(), wanted.len(), "{name}: length");
        let differs = found.iter().zip(&wanted).position(|(a, b)| a != b);
        assert_eq!(differs, None, "{name}: first byte that differs");
    }

    /// Nothing is left beside the images.
    #[track_caller]
    pub fn clean(&self, name: &str) {
        let left: Vec<_> = fs::read_dir(self.0.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|n| n.starts_with('.') || n.ends_with(".sock"))
            .collect();
        assert!(left.is_empty(), "{name}: {left:?}");
        let redo = fs::read_dir(self.path("redo")).map_or(0, Iterator::count);
        assert_eq!(redo, 0, "{name}: a redo file is left");
    }

    pub fn copy(
        &self,
        source: &Path,
        from: impl Into<AnyFormat>,
        target: &Path,
        to: impl Into<AnyFormat>,
        asked: &Asked,
    ) -> Result<Copied> {
        let to = to.into();
        let read = ReadOptions {
            open: OpenOptions { force_share: asked.force_share, ..self.open_options() },
            exact: to == Format::Raw.into(),
            ..self.read_options()
        };
        let source = Source::open_any(source, from.into(), &read)?;
        let wish = Wish {
            path: target.to_owned(),
            format: to,
            read_only: false,
            way: asked.way,
            digests: asked.digests.clone(),
            size: Some(source.size()),
            force_share: false,
            afresh: false,
        };
        let target = LocalTarget::open(&wish, &self.local_options())?;
        let job = Copy {
            source: &source,
            target: &target,
            changed: asked.changed.clone(),
            finish: Finish { meta: asked.meta.clone() },
            dry_run: asked.dry_run,
            sending: sending(),
        };
        let done = std::cell::Cell::new(false);
        let good = || {
            if let Some(meanwhile) = asked.meanwhile.filter(|_| !done.replace(true)) {
                meanwhile();
            }
            Ok(())
        };
        let copied = copy(&job, &Progress::default(), &good);
        source.close()?;
        copied
    }

    pub fn qemu(&self, args: &[&str]) {
        let done = Command::new("qemu-img").args(args).output().unwrap();
        assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
    }

    pub fn meta(&self, path: &Path) -> FileMeta {
        let m = fs::metadata(path).unwrap();
        FileMeta {
            uid: m.uid(),
            gid: m.gid(),
            mode: m.mode() & 0o7777,
            modified_s: m.mtime(),
            modified_ns: m.mtime_nsec(),
        }
    }

    pub fn set_meta(&self, path: &Path, mode: u32, modified_s: u64) -> FileMeta {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(modified_s);
        fs::File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
        self.meta(path)
    }
}

pub fn sending() -> Sending {
    Sending { workers: 2, compression: Compression::default(), throttle: None }
}

/// As a guest sees it: all but a raw image ends with a sector.
pub fn padded(bytes: &[u8], format: impl Into<AnyFormat>) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if format.into() != Format::Raw.into() {
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    bytes
}

/// Bytes that do not compress, the same for the same letter; never zeros.
pub fn noise(letter: u8, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&[letter]).finalize_xof().fill(&mut out);
    if is_zero(&out) && len > 0 {
        out[0] = 1;
    }
    out
}

/// A loop device, gone with the value; `None` only where the tests do not run as root.
pub struct Loop(PathBuf);

impl Loop {
    pub fn over(file: &Path) -> Option<Loop> {
        Self::with(file, &[])
    }

    pub fn with(file: &Path, options: &[&str]) -> Option<Loop> {
        let done = Command::new("losetup").args(["--find", "--show"]).args(options).arg(file).output().unwrap();
        if !done.status.success() {
            assert!(!rustix::process::geteuid().is_root(), "root has loop devices: {done:?}");
            eprintln!("skipped: only root has loop devices");
            return None;
        }
        Some(Loop(PathBuf::from(String::from_utf8(done.stdout).unwrap().trim())))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}
