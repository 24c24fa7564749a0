//! Opens what `debug` is told to look into: a regular file or a directory, and nothing that could make it wait.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use virt_replica::error::{Error, Kind, Result};

/// A regular file, open for reading.
pub struct Input {
    pub file: File,
    /// Its length when it was opened; what is added to it later is not looked at.
    pub len: u64,
}

/// Opens a regular file. The operator named it, so a link to one will do. A FIFO, a socket or a device is refused
/// before it is opened: opening some of them waits, and opening others acts.
pub fn open(path: &Path) -> Result<Input> {
    let cannot = |e| Error::io("cannot open the file", path, e).hint("name a file that is there and may be read");
    refuse_other(path, &std::fs::metadata(path).map_err(cannot)?)?;
    // Another file may take its place between the two looks: without waiting for it, and looked at again.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let file = file.map_err(cannot)?;
    let metadata = file.metadata().map_err(cannot)?;
    refuse_other(path, &metadata)?;
    Ok(Input { file, len: metadata.len() })
}

/// The error of what is no regular file.
pub fn refuse_other(path: &Path, metadata: &std::fs::Metadata) -> Result<()> {
    let kind = metadata.file_type();
    let what = match () {
        _ if kind.is_file() => return Ok(()),
        _ if kind.is_dir() => "a directory",
        _ if kind.is_fifo() => "a FIFO",
        _ if kind.is_socket() => "a socket",
        _ => "a device",
    };
    let e = Error::new(Kind::Refused, format!("this is no regular file, but {what}")).path(path);
    Err(e.hint("name a file; what comes from elsewhere can be saved into one first"))
}

impl Input {
    /// What the file had when it was opened.
    pub fn into_reader(self) -> impl Read + Send + 'static {
        self.file.take(self.len)
    }

    /// The first bytes, at most `max`. The position stays at the beginning.
    pub fn beginning(&self, path: &Path, max: usize) -> Result<Vec<u8>> {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; max.min(usize::try_from(self.len).unwrap_or(max))];
        let mut filled = 0;
        while filled < bytes.len() {
            match self.file.read_at(&mut bytes[filled..], filled as u64) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io("cannot read the file", path, e)),
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }

    /// All of it, if it is not longer than a document of this kind may be.
    pub fn document(self, path: &Path, max: u64) -> Result<Vec<u8>> {
        if self.len > max {
            let what = format!("the file has {} bytes, and such a document at most {max}", self.len);
            return Err(Error::new(Kind::Corrupt, what).path(path).offset(max).hint("name a file of another kind"));
        }
        let mut content = Vec::new();
        let read = self.into_reader().read_to_end(&mut content);
        read.map_err(|e| Error::io("cannot read the file", path, e))?;
        Ok(content)
    }
}
