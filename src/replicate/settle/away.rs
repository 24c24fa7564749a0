//! Names of overlays, taken away durably: a name that is gone may still come back after a power cut, until its
//! directory was synced.
//!
//! One hand renames and dies before it syncs; the next one finds the name gone. It must not believe its eyes: it syncs
//! the directory before it does anything that rests on the name's absence ([`Away::make_durable`]).

use crate::durable::sync_dir;
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The directories in which this process has made the absence of overlays durable, and by which names.
#[derive(Debug, Default)]
pub(in crate::replicate) struct Away {
    durable: BTreeSet<PathBuf>,
}

/// Under which name an overlay is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::replicate) enum How {
    Retired,
    Kept,
}

impl Away {
    /// Renames within a directory, never over anything. Durable after [`Away::make_durable`].
    pub fn rename(&mut self, from: &Path, to: &Path) -> Result<()> {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        self.durable.remove(from);
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(()),
            // File systems without flagged renames (NFS): the names are ours alone, so looking first is as good.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) if !to.exists() => {
                fs::rename(from, to).map_err(|e| Error::io("cannot rename the overlay away", from, e))
            }
            Err(e) => Err(Error::io("cannot rename the overlay away", from, e.into())),
        }
    }

    /// Removes a file, or finds it gone. Durable after [`Away::make_durable`].
    pub fn remove(&mut self, path: &Path) -> Result<()> {
        self.durable.remove(path);
        match fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("cannot remove the overlay", path, e)),
            _ => Ok(()),
        }
    }

    /// That these names are gone is durable when this returns, whoever took them away. Each directory is synced once,
    /// however many names it had; what this process has made durable is not synced again.
    pub fn make_durable<'p>(&mut self, gone: impl IntoIterator<Item = &'p Path>) -> Result<()> {
        let new: Vec<&Path> = gone.into_iter().filter(|path| !self.durable.contains(*path)).collect();
        let dirs: BTreeSet<&Path> = new.iter().map(|path| parent(path)).collect();
        // Of a directory that is gone itself no name comes back alone.
        dirs.into_iter().filter(|dir| dir.is_dir()).try_for_each(sync_dir)?;
        self.durable.extend(new.into_iter().map(Path::to_owned));
        Ok(())
    }
}

/// Renames within a directory, never over anything. Durable when it returns.
pub(crate) fn rename_durably(from: &Path, to: &Path) -> Result<()> {
    let mut away = Away::default();
    away.rename(from, to)?;
    away.make_durable([from])
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}
