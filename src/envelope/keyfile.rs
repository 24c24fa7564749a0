//! Files with keys: short, text, and nobody else's business.

use crate::error::{Error, Kind, Result};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Longest file with keys that is read.
const LEN_MAX: u64 = 64 << 10;

/// Bits of a mode that let others read or write.
const OTHERS: u32 = 0o077;

/// The text of a file that anybody may read.
pub(super) fn read(path: &Path, what: &str) -> Result<String> {
    let file = File::open(path).map_err(|e| Error::io(format!("cannot open the {what}"), path, e))?;
    text(file, path, what)
}

/// The text of a file that only its owner should be able to read. Others are warned of, and not refused: it may lie in
/// a directory of its own.
pub(super) fn read_secret(path: &Path, what: &str) -> Result<String> {
    let cannot = |e| Error::io(format!("cannot open the {what}"), path, e);
    let file = File::open(path).map_err(cannot)?;
    let mode = file.metadata().map_err(cannot)?.mode();
    if mode & OTHERS != 0 {
        let (mode, path) = (mode & 0o7777, path.display());
        tracing::warn!("{path}: others may read the {what} (mode {mode:04o}); `chmod 600` keeps it to its owner");
    }
    text(file, path, what)
}

fn text(file: File, path: &Path, what: &str) -> Result<String> {
    let mut text = String::new();
    let read = file.take(LEN_MAX + 1).read_to_string(&mut text);
    match read {
        Ok(len) if len as u64 <= LEN_MAX => Ok(text),
        Err(e) if e.kind() != std::io::ErrorKind::InvalidData => {
            Err(Error::io(format!("cannot read the {what}"), path, e))
        }
        _ => Err(Error::new(Kind::Usage, format!("this is no {what}: it is long, or no text")).path(path)),
    }
}

/// The lines that say something.
pub(super) fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}
