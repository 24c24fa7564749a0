//! The header of a qcow2 image, read by us before anything else looks at the file, and what it means for who may read
//! it.
//!
//! Pure but for one bounded read. Every field is a stranger's word: names found here are shown and compared, never
//! opened.
//!
//! Format: QEMU's docs/interop/qcow2.txt.

use crate::block::DiskSize;
use crate::error::{Error, Kind, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MAGIC: &[u8] = b"QFI\xfb";
const V2_LEN: usize = 72;
const V3_LEN: usize = 104;

/// The header, its extensions and the names lie in the first cluster. QEMU and imago write them at its very beginning.
const READ_LEN: usize = 64 << 10;

/// Longest backing file name, by the specification. Data file names are held to it as well.
const NAME_MAX: usize = 1023;

/// Largest L1 table QEMU accepts, in bytes; it is read at once into memory.
const L1_LEN_MAX: u64 = 32 << 20;

// Incompatible features.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

// Types of header extensions.
const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_DATA_FILE_NAME: u32 = 0x4441_5441;

/// The fields on which our decisions rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Version of the format, as the header says; versions 2 and 3 are known.
    pub version: u32,
    /// Size the guest sees, as the header says.
    pub size: DiskSize,
    /// Name of the backing image as written, lossily decoded. Never to be opened for a stranger's image.
    pub backing: Option<String>,
    /// Format of the backing image, as written and lossily decoded. `None`: the header names none.
    pub backing_format: Option<String>,
    /// Name of the external data file as written, where there is one and it is named.
    pub data_file: Option<String>,
    /// The header names a method of encryption.
    pub encrypted: bool,
    /// Number of internal snapshots.
    pub snapshots: u32,
    incompatible: u64,
    autoclear: u64,
    compression_type: u8,
    cluster_bits: u32,
    l1_entries: u32,
}

impl Header {
    /// Reads the header of an open file. [`Kind::Corrupt`] if it is not qcow2, whatever the chain says.
    pub fn read(file: &File, path: &Path) -> Result<Self> {
        let mut bytes = vec![0u8; READ_LEN];
        let mut len = 0;
        while len < bytes.len() {
            match file.read_at(&mut bytes[len..], len as u64) {
                Ok(0) => break,
                Ok(n) => len += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io("cannot read the header of the image", path, e)),
            }
        }
        Self::parse(&bytes[..len]).map_err(|e| e.path(path))
    }

    /// Parses the beginning of a file, or what there is of it.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if bytes.len() < V2_LEN || &bytes[..4] != MAGIC {
            return Err(corrupt("the chain records qcow2, and the file is not qcow2"));
        }
        let version = be32(bytes, 4);
        let v3 = version >= 3;
        if v3 && bytes.len() < V3_LEN {
            return Err(corrupt("the qcow2 header is cut off"));
        }
        let header_len = if v3 { be32(bytes, 100) as usize } else { V2_LEN };
        let mut header = Self {
            version,
            size: DiskSize(be64(bytes, 24)),
            backing: name_at(bytes, be64(bytes, 8), be32(bytes, 16))?,
            backing_format: None,
            data_file: None,
            encrypted: be32(bytes, 32) != 0,
            snapshots: be32(bytes, 60),
            incompatible: if v3 { be64(bytes, 72) } else { 0 },
            autoclear: if v3 { be64(bytes, 88) } else { 0 },
            compression_type: if header_len > V3_LEN { bytes.get(V3_LEN).copied().unwrap_or(0) } else { 0 },
            cluster_bits: be32(bytes, 20),
            l1_entries: be32(bytes, 36),
        };
        header.read_extensions(bytes, header_len)?;
        Ok(header)
    }

    /// Reads the extensions, which end with a marker, with the backing file name, or with the first cluster.
    fn read_extensions(&mut self, bytes: &[u8], header_len: usize) -> Result<()> {
        let cluster_len = 1usize.checked_shl(self.cluster_bits).unwrap_or(usize::MAX);
        let name_at = match be64(bytes, 8) {
            0 => usize::MAX,
            offset => usize::try_from(offset).unwrap_or(usize::MAX),
        };
        let bytes = &bytes[..bytes.len().min(cluster_len).min(name_at)];
        let mut at = header_len;
        while let Some(head) = at.checked_add(8).and_then(|end| bytes.get(at..end)) {
            let (kind, len) = (be32(head, 0), be32(head, 4) as usize);
            if kind == EXT_END {
                break;
            }
            let body = (at + 8).checked_add(len).and_then(|end| bytes.get(at + 8..end));
            let body = body.ok_or_else(|| corrupt("an extension of the qcow2 header is cut off"))?;
            if matches!(kind, EXT_BACKING_FORMAT | EXT_DATA_FILE_NAME) && len > NAME_MAX {
                return Err(corrupt("a name in the qcow2 header is too long"));
            }
            match kind {
                EXT_BACKING_FORMAT => self.backing_format = Some(String::from_utf8_lossy(body).into_owned()),
                EXT_DATA_FILE_NAME => self.data_file = Some(String::from_utf8_lossy(body).into_owned()),
                _ => {}
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(())
    }

    /// True if the header names a backing image.
    pub fn has_backing(&self) -> bool {
        self.backing.is_some()
    }

    /// Whether the guest's data lies in another file, named in the header or not.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & DATA_FILE != 0
    }

    /// True if the image was not closed properly: its refcounts may be wrong.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & DIRTY != 0
    }

    /// True if QEMU found the image's metadata damaged and marked it.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & CORRUPT != 0
    }

    /// Features that a writer who does not know them has to clear; bitmaps are one.
    pub fn autoclear(&self) -> u64 {
        self.autoclear
    }

    /// What about the image is beyond the in-process reader, as the end of a sentence: `has zstd clusters`.
    /// `None`: it is understood completely.
    pub fn beyond_us(&self) -> Option<String> {
        let known = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
        let says = |text: &str| Some(text.to_owned());
        if !(2..=3).contains(&self.version) {
            return Some(format!("has qcow2 version {}", self.version));
        }
        if self.encrypted {
            return says("is encrypted");
        }
        if self.incompatible & !known != 0 {
            return Some(format!("has unknown features ({:#x})", self.incompatible & !known));
        }
        if self.is_corrupt() {
            return says("is marked as corrupt");
        }
        if self.is_dirty() {
            return says("was not closed properly");
        }
        if self.has_data_file() {
            return says("has an external data file");
        }
        match (self.incompatible & COMPRESSION != 0, self.compression_type) {
            (false, 0) => {}
            (_, 1) => return says("has zstd clusters"),
            (_, other) => return Some(format!("has clusters of compression type {other}")),
        }
        if self.incompatible & EXTENDED_L2 != 0 {
            return says("has extended L2 entries");
        }
        if self.snapshots != 0 {
            return says("has internal snapshots");
        }
        if !(9..=21).contains(&self.cluster_bits) {
            return Some(format!("has clusters of 2^{} bytes", self.cluster_bits));
        }
        // An L2 table is one cluster of 8-byte entries.
        let l1_entries = u64::from(self.l1_entries);
        let bytes_per_l1_entry = 1u64 << (2 * self.cluster_bits - 3);
        if l1_entries * 8 > L1_LEN_MAX || self.size.0.div_ceil(bytes_per_l1_entry) > l1_entries {
            return says("has an L1 table that does not fit its size");
        }
        None
    }
}

/// The name of `len` bytes at `offset`; none where either is zero, as QEMU sees it.
fn name_at(bytes: &[u8], offset: u64, len: u32) -> Result<Option<String>> {
    if offset == 0 || len == 0 {
        return Ok(None);
    }
    let len = len as usize;
    let name = usize::try_from(offset)
        .ok()
        .and_then(|start| Some(start..start.checked_add(len)?))
        .and_then(|range| bytes.get(range))
        .filter(|_| len <= NAME_MAX)
        .ok_or_else(|| corrupt("the backing file name in the qcow2 header lies where none can be"))?;
    Ok(Some(String::from_utf8_lossy(name).into_owned()))
}

fn corrupt(what: &'static str) -> Error {
    Error::new(Kind::Corrupt, what)
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A plain version 3 header of a 1 GiB disk, with `edits` of (offset, bytes) applied.
    fn bytes(edits: &[(usize, &[u8])]) -> Vec<u8> {
        let mut b = vec![0u8; 512];
        let mut put = |at: usize, value: &[u8]| b[at..at + value.len()].copy_from_slice(value);
        put(0, MAGIC);
        put(4, &3u32.to_be_bytes());
        put(20, &16u32.to_be_bytes());
        put(24, &(1u64 << 30).to_be_bytes());
        put(36, &2u32.to_be_bytes());
        put(40, &(3u64 << 16).to_be_bytes());
        put(100, &104u32.to_be_bytes());
        edits.iter().for_each(|(at, value)| put(*at, value));
        b
    }

    fn doubt(edits: &[(usize, &[u8])]) -> Option<String> {
        Header::parse(&bytes(edits)).unwrap().beyond_us()
    }

    #[test]
    fn a_plain_image_is_understood_and_its_old_version_too() {
        assert_eq!(doubt(&[]), None);
        assert_eq!(doubt(&[(4, &2u32.to_be_bytes()), (76, &[0xff; 36])]), None);
        assert_eq!(Header::parse(&bytes(&[])).unwrap().size, DiskSize(1 << 30));
    }

    #[test]
    fn every_feature_beyond_us_is_named() {
        let bit = |n: u32| (1u64 << n).to_be_bytes();
        for (word, edits) in [
            ("version 4", vec![(4, 4u32.to_be_bytes().to_vec())]),
            ("encrypted", vec![(32, 2u32.to_be_bytes().to_vec())]),
            ("not closed", vec![(72, bit(0).to_vec())]),
            ("corrupt", vec![(72, bit(1).to_vec())]),
            ("data file", vec![(72, bit(2).to_vec())]),
            ("zstd", vec![(72, bit(3).to_vec()), (100, 112u32.to_be_bytes().to_vec()), (104, vec![1])]),
            ("compression type 2", vec![(72, bit(3).to_vec()), (100, 112u32.to_be_bytes().to_vec()), (104, vec![2])]),
            ("extended L2", vec![(72, bit(4).to_vec())]),
            ("unknown features (0x20)", vec![(72, bit(5).to_vec())]),
            ("internal snapshots", vec![(60, 1u32.to_be_bytes().to_vec())]),
            ("clusters of 2^22", vec![(20, 22u32.to_be_bytes().to_vec())]),
            ("clusters of 2^4294967295", vec![(20, u32::MAX.to_be_bytes().to_vec())]),
            ("L1 table", vec![(36, 1u32.to_be_bytes().to_vec())]),
            ("L1 table", vec![(36, u32::MAX.to_be_bytes().to_vec())]),
            ("L1 table", vec![(24, u64::MAX.to_be_bytes().to_vec())]),
        ] {
            let edits: Vec<(usize, &[u8])> = edits.iter().map(|(at, v)| (*at, v.as_slice())).collect();
            let said = doubt(&edits).unwrap_or_default();
            assert!(said.contains(word), "expected {word:?}, got {said:?}");
        }
    }

    #[test]
    fn names_are_read_where_they_may_lie_and_nowhere_else() {
        let mut extensions = Vec::new();
        for (kind, body) in [(0x6803_f857, &b"names"[..]), (EXT_BACKING_FORMAT, b"raw"), (EXT_DATA_FILE_NAME, b"d.raw")]
        {
            extensions.extend(kind.to_be_bytes());
            extensions.extend((body.len() as u32).to_be_bytes());
            extensions.extend(body);
            extensions.resize(extensions.len().next_multiple_of(8), 0);
        }
        let name: &[(usize, &[u8])] =
            &[(104, &extensions), (8, &300u64.to_be_bytes()), (16, &8u32.to_be_bytes()), (300, b"base.raw")];
        let header = Header::parse(&bytes(name)).unwrap();
        assert_eq!(header.backing.as_deref(), Some("base.raw"));
        assert_eq!(header.backing_format.as_deref(), Some("raw"));
        assert_eq!(header.data_file.as_deref(), Some("d.raw"));
        for (offset, len) in [(510u64, 8u32), (u64::MAX, 8), (300, 1024), (300, u32::MAX)] {
            let edits: &[(usize, &[u8])] = &[(8, &offset.to_be_bytes()), (16, &len.to_be_bytes())];
            assert_eq!(Header::parse(&bytes(edits)).unwrap_err().kind(), Kind::Corrupt, "{offset}+{len}");
        }
    }

    #[test]
    fn cut_or_scribbled_headers_never_panic() {
        let whole = bytes(&[(104, &EXT_BACKING_FORMAT.to_be_bytes()), (108, &3u32.to_be_bytes()), (112, b"raw")]);
        for cut in 0..whole.len() {
            let _ = Header::parse(&whole[..cut]).map(|h| h.beyond_us());
        }
        for at in 0..160 {
            for value in [0x01, 0x7f, 0xff] {
                let mut wrong = whole.clone();
                wrong[at] = value;
                let _ = Header::parse(&wrong).map(|h| h.beyond_us());
            }
        }
        assert_eq!(Header::parse(b"RAW!").unwrap_err().kind(), Kind::Corrupt);
    }
}
