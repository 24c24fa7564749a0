//! What a run needs this process to be allowed to do, found out in step 3: before anything is frozen. [`judge`] is
//! pure.
//!
//! libvirt makes overlays as its own user, mode 0600, and the run locks, renames and removes them. A run that finds out
//! only afterwards that it may not leaves an overlay behind. So each right is asked for by name: the path, its owner,
//! its mode, the way out.

use crate::error::Error;
use crate::error::advice::{self, Advice};
use crate::hypervisor::Backups;
use crate::name::RunId;
use crate::replicate::capture::names::{overlay_path, scratch_path};
use crate::replicate::plan::CaptureKind;
use crate::replicate::plan::conflict::Hindrance;
use crate::replicate::plan::planned::Plan;
use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::io::Errno;
use std::error::Error as _;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const CAP_DAC_OVERRIDE: u32 = 1;
const CAP_FOWNER: u32 = 3;

const STICKY: u32 = 0o1000;

/// The way out of most of it.
const ROOT: &str = "run it as root (sudo), or give it the capabilities CAP_DAC_OVERRIDE and CAP_FOWNER";

/// What is longest behind an overlay's name while it is put away.
const PUT_AWAY: &str = ".retired";

/// This process, as far as the kernel asks who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// Effective user id.
    pub uid: u32,
    /// It reads, writes and enters whatever the modes say.
    pub overrides_modes: bool,
    /// It counts as the owner of every file.
    pub owns_all: bool,
}

impl Process {
    /// Reads the user id and the effective capabilities of this process. If the kernel does not tell, only root has
    /// all capabilities.
    pub fn this() -> Process {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        Process::of(rustix::process::geteuid().as_raw(), &status)
    }

    /// `status`: of `/proc/PID/status`. A kernel that does not tell leaves root what root has.
    fn of(uid: u32, status: &str) -> Process {
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let told = line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
        let capabilities = told.unwrap_or(if uid == 0 { u64::MAX } else { 0 });
        let has = |bit: u32| capabilities & (1 << bit) != 0;
        Process { uid, overrides_modes: has(CAP_DAC_OVERRIDE), owns_all: has(CAP_FOWNER) }
    }

    fn may_all(&self) -> bool {
        self.overrides_modes && self.owns_all
    }
}

/// A directory in which libvirt will make a file that the run removes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dir {
    /// Path of the directory.
    pub path: PathBuf,
    /// User id of the directory's owner.
    pub uid: u32,
    /// Mode of the directory, as `stat` gives it; the sticky bit matters.
    pub mode: u32,
    /// The kernel's word on making and removing files in it.
    pub write: Result<(), Errno>,
    /// Its word on the longest name that the file will have.
    pub name: Result<(), Errno>,
    /// libvirt runs as this very user: what it makes is ours.
    pub made_by_us: bool,
}

/// The first thing that keeps `process` from a run whose `what` (an overlay, a scratch file) lies in `dir`, and the way
/// out. Pure.
pub fn judge(process: Process, dir: &Dir, what: &str) -> Option<(String, Advice)> {
    let Process { uid, .. } = process;
    let at = format!("{} (owner {}, mode {:04o})", dir.path.display(), dir.uid, dir.mode & 0o7777);
    match (dir.name, dir.write) {
        (Err(Errno::NAMETOOLONG), _) => {
            let why = format!("the file system of {} takes no name as long as that of its {what}", dir.path.display());
            return Some((why, advice::Overlay::AnotherFileSystem.into()));
        }
        (_, Err(Errno::ROFS)) => {
            let why = format!("its {what} would lie in {}, which is read-only", dir.path.display());
            return Some((why, advice::Overlay::AnotherDirectory.into()));
        }
        (_, Err(Errno::ACCESS | Errno::PERM)) => {
            return Some((
                format!("user {uid} may not make and remove files in {at}, where its {what} would lie"),
                ROOT.into(),
            ));
        }
        _ => {}
    }
    if !dir.made_by_us && !process.overrides_modes {
        let why = format!("libvirt makes its {what} for root alone, in {at}, and user {uid} may not open it");
        return Some((why, ROOT.into()));
    }
    if !dir.made_by_us && dir.mode & STICKY != 0 && dir.uid != uid && !process.owns_all {
        let why =
            format!("user {uid} may not remove the {what} that libvirt makes in {at}: only owners remove files there");
        return Some((why, ROOT.into()));
    }
    None
}

/// What keeps this process from the run that was planned. Touches nothing.
pub fn hindrances(backups: &dyn Backups, plan: &Plan, run: &RunId) -> Vec<Hindrance> {
    if plan.capture == CaptureKind::Off {
        return Vec::new();
    }
    let process = Process::this();
    // The directory of the domain's sockets belongs to the user that QEMU runs as.
    let sockets = if process.may_all() { None } else { backups.backup_socket(&plan.uuid).ok() };
    let sockets = sockets.as_deref().and_then(Path::parent).map(Path::to_owned);
    let made_by_us = sockets.as_deref().and_then(|dir| fs::metadata(dir).ok()).is_some_and(|m| m.uid() == process.uid);
    let what = if plan.capture == CaptureKind::Backup { "scratch file" } else { "overlay" };
    let mut found = Vec::new();
    for disk in plan.replicated() {
        let path = match plan.capture {
            CaptureKind::Backup => scratch_path(disk, run),
            CaptureKind::Overlay | CaptureKind::Off => overlay_path(disk, run),
        };
        // A directory that is not there has a conflict of its own.
        let Some(dir) = look(&path, made_by_us) else { continue };
        if let Some((why, advice)) = judge(process, &dir, what) {
            found.push(Hindrance { disk: disk.name.clone(), path: dir.path, why, advice });
        }
    }
    found
}

fn look(file: &Path, made_by_us: bool) -> Option<Dir> {
    let path = file.parent()?.to_owned();
    let found = fs::metadata(&path).ok()?;
    let mut longest = file.as_os_str().to_owned();
    longest.push(PUT_AWAY);
    let name = match rustix::fs::lstat(Path::new(&longest)) {
        Err(Errno::NAMETOOLONG) => Err(Errno::NAMETOOLONG),
        _ => Ok(()),
    };
    let write = accessat(CWD, &path, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS);
    Some(Dir { uid: found.uid(), mode: found.mode(), write, name, made_by_us, path })
}

/// An error in words; one of a missing right with who asked, and the way out.
pub fn told(error: &Error) -> String {
    let mut source = error.source();
    while let Some(cause) = source {
        let denied = |e: &std::io::Error| e.kind() == std::io::ErrorKind::PermissionDenied;
        if cause.downcast_ref::<std::io::Error>().is_some_and(denied) {
            let path = error.context().path.as_deref().and_then(|path| Some((path, fs::metadata(path).ok()?)));
            let whose =
                path.map_or(String::new(), |(_, m)| format!(", owner {}, mode {:04o}", m.uid(), m.mode() & 0o7777));
            let uid = rustix::process::geteuid().as_raw();
            return format!("{} (user {uid}{whose}): {ROOT}", error.chain());
        }
        source = cause.source();
    }
    error.chain()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir() -> Dir {
        Dir { path: "/pool".into(), uid: 0, mode: 0o40711, write: Ok(()), name: Ok(()), made_by_us: false }
    }

    const ROOT_USER: Process = Process { uid: 0, overrides_modes: true, owns_all: true };
    const OPERATOR: Process = Process { uid: 2000, overrides_modes: false, owns_all: false };

    #[test]
    fn every_missing_right_is_named_with_its_owner_mode_and_way_out() {
        let judged = |process, change: fn(&mut Dir)| {
            let mut dir = dir();
            change(&mut dir);
            judge(process, &dir, "overlay")
        };
        assert_eq!(judged(ROOT_USER, |_| {}), None);
        assert_eq!(judged(ROOT_USER, |d| d.mode |= STICKY), None);
        assert_eq!(judged(OPERATOR, |d| (d.made_by_us, d.uid) = (true, 2000)), None, "a session");
        for (process, change, words) in [
            (OPERATOR, (|d| d.write = Err(Errno::ACCESS)) as fn(&mut Dir), "/pool (owner 0, mode 0711)"),
            (OPERATOR, |_| {}, "user 2000 may not open it"),
            (Process { overrides_modes: true, ..OPERATOR }, |d| d.mode |= STICKY, "only owners remove files"),
            (ROOT_USER, |d| d.write = Err(Errno::ROFS), "read-only"),
            (ROOT_USER, |d| d.name = Err(Errno::NAMETOOLONG), "takes no name as long"),
        ] {
            let (why, advice) = judged(process, change).unwrap();
            assert!(why.contains(words) && advice.text() != Some(""), "{why}");
        }
    }

    #[test]
    fn capabilities_are_the_kernels_word_and_not_the_users_number() {
        let of = |uid, caps: &str| Process::of(uid, &format!("Name:\tx\nCapEff:\t{caps}\nCapBnd:\t0\n"));
        assert_eq!(of(0, "000001ffffffffff"), ROOT_USER);
        assert!(!of(0, "0000000000000000").overrides_modes, "root of a container that has none");
        let one = of(2000, "0000000000000002");
        assert_eq!((one.overrides_modes, one.owns_all), (true, false));
        assert_eq!((Process::of(0, ""), Process::of(2000, "")), (ROOT_USER, OPERATOR));
    }

    #[test]
    fn a_right_that_an_image_denies_is_told_with_the_way_out() {
        let denied = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
        let words = told(&Error::io("cannot open the image", "/", denied));
        assert!(words.contains("owner 0") && words.contains("CAP_DAC_OVERRIDE"), "{words}");
        let gone = std::io::Error::from(std::io::ErrorKind::NotFound);
        assert!(!told(&Error::io("cannot open the image", "/none", gone)).contains("CAP"));
    }
}
