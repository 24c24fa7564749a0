//! What a directory on this host still takes: its free space, and whether this process may write there.

use std::path::Path;

/// Free bytes for an unprivileged writer, as QEMU is one; `None` where there is no such directory.
pub(crate) fn free_bytes(dir: &Path) -> Option<u64> {
    let s = rustix::fs::statvfs(dir).ok()?;
    Some(s.f_bavail.saturating_mul(s.f_frsize))
}

/// Whether this process may make and remove files in a directory; one that is not there is somebody else's question.
#[cfg(feature = "libvirt")]
pub(crate) fn may_make_files(dir: &Path) -> std::io::Result<()> {
    use rustix::fs::{Access, AtFlags, CWD, accessat};
    match accessat(CWD, dir, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS) {
        Err(e) if e != rustix::io::Errno::NOENT => Err(e.into()),
        _ => Ok(()),
    }
}
