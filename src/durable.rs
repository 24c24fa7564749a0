//! Documents and names that survive a power cut: replaced whole, read within a bound, removed for good.
//!
//! A file is durable when its content and its directory are synced. Every function here has done both when it returns.

use crate::error::{Error, Kind, Result, advice};
use serde::Serialize;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

/// Largest record or report that is read, in bytes.
pub const DOCUMENT_MAX: u64 = 4 << 20;

/// An error about this host's own state; where a right is missing, with the way out.
pub(crate) fn denied(error: Error) -> Error {
    let cause = std::error::Error::source(&error).and_then(|cause| cause.downcast_ref::<std::io::Error>());
    match cause.map(std::io::Error::kind) {
        Some(std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem) => {
            error.advise(advice::Host::StateDir)
        }
        _ => error,
    }
}

pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let mut text = Vec::new();
    match File::open(path).and_then(|f| f.take(DOCUMENT_MAX).read_to_end(&mut text)) {
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(denied(Error::io("cannot read", path, e))),
    }
    serde_json::from_slice(&text).map(Some).map_err(|e| {
        Error::new(Kind::Corrupt, "this document of our own cannot be understood")
            .path(path)
            .source(e)
            .hint("it is written atomically, so something else changed it; look at it before you move it away")
    })
}

pub(crate) fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec_pretty(value).expect("our documents are plain data")
}

/// Replaces `dir/name` by this value, after it was read back by the type that reads it: what this program could not
/// read must never take the place of what it can.
pub(crate) fn replace_json<T: Serialize + serde::de::DeserializeOwned>(
    dir: &Path,
    name: &str,
    value: &T,
) -> Result<()> {
    let json = to_json(value);
    serde_json::from_slice::<T>(&json).map_err(|e| {
        Error::new(Kind::Corrupt, "a new document could not be read again; the old one stays")
            .path(dir.join(name))
            .source(e)
    })?;
    replace(dir, name, &json)
}

/// Replaces `dir/name` whole: temp, fsync, rename, directory fsync. Refuses what [`read_json`] would cut.
pub(crate) fn replace(dir: &Path, name: &str, content: &[u8]) -> Result<()> {
    let path = dir.join(name);
    if content.len() as u64 >= DOCUMENT_MAX {
        let what = format!("a document of {} bytes is larger than any that is read again", content.len());
        return Err(Error::new(Kind::Refused, what).path(path));
    }
    let fail = |e: std::io::Error| Error::io("cannot write durably", &path, e);
    let mut temp = tempfile::Builder::new().prefix(".new-").tempfile_in(dir).map_err(fail)?;
    temp.write_all(content).map_err(fail)?;
    temp.as_file().sync_all().map_err(fail)?;
    temp.persist(&path).map_err(|e| fail(e.error))?;
    sync_dir(dir)
}

/// Removes `dir/name`. Durable when it returns, also where the name is gone already: whoever removed it may have died
/// before the directory was synced, and the file would be back after a power cut.
pub(crate) fn remove_durably(dir: &Path, name: &str, cannot: &'static str) -> Result<()> {
    let path = dir.join(name);
    match fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(cannot, &path, e)),
        // Nothing comes back into a directory that is not there.
        Err(_) if !dir.is_dir() => Ok(()),
        _ => sync_dir(dir),
    }
}

/// Makes renames and removals in a directory durable.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::io("cannot sync the directory", dir, e))?;
    crate::traced_step!("sync", dir);
    Ok(())
}
