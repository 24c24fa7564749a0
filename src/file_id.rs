//! Which file it is: now, later, and after a restart of the host.
//!
//! A path and an inode are not enough, as numbers are used again. The number of a device is not either: it is handed
//! out anew at each boot, and to loop devices, LVM, multipath, NFS and btrfs at each mount. So the time of a file's
//! birth decides where the file system keeps it, and the device's number only where it does not, and only within one
//! boot. Reason: docs/decisions/0036-which-file-it-is.md.

use crate::error::{Error, Result};
use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::OnceLock;
use std::time::UNIX_EPOCH;

/// One boot of this host, as the kernel numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootId(u128);

impl BootId {
    /// The boot that runs. `None` where the kernel does not tell.
    pub fn current() -> Option<BootId> {
        static CURRENT: OnceLock<Option<BootId>> = OnceLock::new();
        *CURRENT.get_or_init(|| Self::parse(&fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?))
    }

    fn parse(text: &str) -> Option<BootId> {
        let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
        let is_whole = digits.len() == 32 && digits.bytes().all(|b| b.is_ascii_hexdigit());
        is_whole.then(|| u128::from_str_radix(&digits, 16).ok()).flatten().map(BootId)
    }
}

/// As the kernel writes it: hex digits in five groups.
impl fmt::Display for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = format!("{:032x}", self.0);
        write!(f, "{}-{}-{}-{}-{}", &all[..8], &all[8..12], &all[12..16], &all[16..20], &all[20..])
    }
}

impl Serialize for BootId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BootId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<BootId, D::Error> {
        let text = String::deserialize(deserializer)?;
        BootId::parse(&text).ok_or_else(|| serde::de::Error::custom("this is no boot id"))
    }
}

/// Which file it is. Two of one moment are compared by `==`; one that was kept is compared by [`FileId::is`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    /// Of the file system, or of a block device itself. Of its boot only.
    pub device: u64,
    /// 0 for a block device: its node is made anew at every boot.
    pub inode: u64,
    /// Seconds and nanoseconds since the epoch; `None` where the file system keeps no time of birth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub born: Option<(i64, u32)>,
    /// The boot in which the device has its number; `None` in what earlier versions wrote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootId>,
}

impl FileId {
    /// Identity of the file or block device that this metadata belongs to.
    pub fn of(m: &Metadata) -> FileId {
        let boot = BootId::current();
        if m.file_type().is_block_device() {
            return FileId { device: m.rdev(), inode: 0, born: None, boot };
        }
        let since = m.created().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
        let born = since.filter(|t| !t.is_zero()).map(|t| (t.as_secs() as i64, t.subsec_nanos()));
        FileId { device: m.dev(), inode: m.ino(), born, boot }
    }

    /// Whether both are of one file. What an older version kept has no birth and no boot: then the inode decides, as no
    /// device's number can be held against a restart.
    pub fn is(&self, other: &FileId) -> bool {
        let comparable = self.boot.is_some() && self.boot == other.boot;
        let old_node = (self.inode == 0 || other.inode == 0) && (self.boot.is_none() || other.boot.is_none());
        if self.inode != other.inode {
            return old_node;
        }
        match (self.born, other.born) {
            (Some(a), Some(b)) => a == b,
            _ => self.device == other.device || !comparable,
        }
    }
}

/// For people who have to find out which of two files is which.
impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = (rustix::fs::major(self.device), rustix::fs::minor(self.device));
        match self.inode {
            0 => write!(f, "block device {major}:{minor}"),
            inode => write!(f, "inode {inode} on device {major}:{minor}"),
        }?;
        match self.born.and_then(|(s, _)| Timestamp::from_second(s).ok()) {
            Some(born) => write!(f, ", made {born:.0}"),
            None => Ok(()),
        }
    }
}

/// Which file it is and when it was last written; equal stamps of one moment mean an untouched file, and one that was
/// kept is compared by [`Stamp::is`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// Identity of the file.
    pub id: FileId,
    /// Length of the file in bytes, as the file system reports it.
    pub len_bytes: u64,
    /// Time of the last write, in seconds since the epoch; 0 for a block device.
    pub modified_s: i64,
    /// Nanoseconds of the time of the last write; 0 for a block device.
    pub modified_ns: i64,
}

impl Stamp {
    /// `None` where there is no such file. A block device has no telling times: its stamp never changes.
    pub fn of(path: &Path) -> Result<Option<Stamp>> {
        match fs::metadata(path) {
            Ok(m) => Ok(Some(Stamp {
                id: FileId::of(&m),
                len_bytes: m.len(),
                modified_s: if m.is_file() { m.mtime() } else { 0 },
                modified_ns: if m.is_file() { m.mtime_nsec() } else { 0 },
            })),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("cannot look at the image", path, e)),
        }
    }

    /// Whether it is the same file, untouched. Holds over a restart of the host.
    pub fn is(&self, other: &Stamp) -> bool {
        let written = |s: &Stamp| (s.len_bytes, s.modified_s, s.modified_ns);
        self.id.is(&other.id) && written(self) == written(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: BootId = BootId(1);
    const NEXT_BOOT: BootId = BootId(2);

    fn id(device: u64, inode: u64, born: Option<(i64, u32)>, boot: Option<BootId>) -> FileId {
        FileId { device, inode, born, boot }
    }

    #[track_caller]
    fn same(expected: bool, a: FileId, b: FileId) {
        assert_eq!((a.is(&b), b.is(&a)), (expected, expected), "{a:?} and {b:?}");
    }

    #[test]
    fn the_birth_decides_where_it_is_known_and_the_device_within_one_boot_where_it_is_not() {
        let born = Some((1_700_000_000, 5));
        let file = id(7, 12, born, Some(BOOT));
        same(true, file, file);
        // The file system came back under another number: after a boot, or mounted again in the same one.
        same(true, file, id(8, 12, born, Some(NEXT_BOOT)));
        same(true, file, id(8, 12, born, Some(BOOT)));
        // The inode was used again.
        same(false, file, id(7, 12, Some((1_700_000_000, 6)), Some(BOOT)));
        same(false, file, id(7, 13, born, Some(BOOT)));
        // A file system that keeps no births.
        let unborn = id(7, 12, None, Some(BOOT));
        same(true, unborn, unborn);
        same(false, unborn, id(8, 12, None, Some(BOOT)));
        same(true, unborn, id(8, 12, None, Some(NEXT_BOOT)));
        same(false, unborn, id(7, 13, None, Some(NEXT_BOOT)));
    }

    #[test]
    fn what_an_older_version_kept_is_known_again_by_its_inode() {
        let old: FileId = serde_json::from_str(r#"{"device":7,"inode":12}"#).unwrap();
        assert_eq!(old, id(7, 12, None, None));
        let now = |device, inode| id(device, inode, Some((1_700_000_000, 5)), Some(BOOT));
        same(true, old, now(7, 12));
        same(true, old, now(9, 12));
        same(false, old, now(7, 13));
        // The node of a block device, whose number in its directory was kept, and never meant anything.
        same(true, id(5, 300, None, None), id(64_768, 0, None, Some(BOOT)));
        same(false, id(64_768, 0, None, Some(BOOT)), id(64_769, 0, None, Some(BOOT)));
        same(true, id(64_768, 0, None, Some(BOOT)), id(64_769, 0, None, Some(NEXT_BOOT)));
    }

    #[test]
    fn a_boot_is_kept_as_the_kernel_writes_it() {
        let text = r#""0b5c8d4e-1f2a-4b3c-8d4e-5f6a7b8c9d0e""#;
        let boot: BootId = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&boot).unwrap(), text);
        for bad in [r#""""#, r#""x""#, r#""+b5c8d4e-1f2a-4b3c-8d4e-5f6a7b8c9d0e""#] {
            assert!(serde_json::from_str::<BootId>(bad).is_err(), "{bad}");
        }
        assert_eq!(BootId::current(), BootId::current());
    }

    #[test]
    fn people_are_told_what_tells_them_apart() {
        let file = id(rustix::fs::makedev(7, 3), 12, Some((1_700_000_000, 5)), Some(BOOT));
        assert_eq!(file.to_string(), "inode 12 on device 7:3, made 2023-11-14T22:13:20Z");
        assert_eq!(id(rustix::fs::makedev(253, 1), 0, None, None).to_string(), "block device 253:1");
    }
}
