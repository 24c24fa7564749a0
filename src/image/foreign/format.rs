//! Images of other hypervisors: read and written through `qemu-nbd`.
//!
//! Owns what has to hold before QEMU opens one. Its drivers follow what some of these headers name: extents of a VMDK
//! in other files (any file, and QEMU may run as root), parents. So only images that are whole in themselves are
//! opened, and that is looked for here, in the few bytes that say it; what else is wrong with an image QEMU says.
//! [`crate::image::foreign::writer`] writes.
use crate::block::{DiskSize, SECTOR_LEN};
use crate::error::{Error, Kind, Result};
use crate::image::{Format, Layer, raw};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::str::FromStr;

/// Longest description inside a VMDK that is looked at; they have a few hundred bytes.
pub(in crate::image) const DESCRIPTION_MAX: u64 = 64 << 10;

/// A format of somebody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Foreign {
    /// VMware's format, `.vmdk`.
    Vmdk,
    /// VirtualBox's format, `.vdi`.
    Vdi,
    /// Hyper-V's newer format, `.vhdx`.
    Vhdx,
    /// Of Virtual PC and older Hyper-V: `.vhd`.
    Vpc,
    /// QEMU's older format, `.qed`.
    Qed,
}

impl Foreign {
    /// All foreign formats.
    pub const ALL: [Foreign; 5] = [Foreign::Vmdk, Foreign::Vdi, Foreign::Vhdx, Foreign::Vpc, Foreign::Qed];

    /// QEMU's name for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Foreign::Vmdk => "vmdk",
            Foreign::Vdi => "vdi",
            Foreign::Vhdx => "vhdx",
            Foreign::Vpc => "vpc",
            Foreign::Qed => "qed",
        }
    }
}

impl FromStr for Foreign {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Foreign::ALL.into_iter().find(|f| f.as_str() == text).ok_or_else(|| "it is no format that is known".to_owned())
    }
}

/// A format that a plain image may have, named as QEMU does: on the wire, too, so that who does not know one refuses
/// it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum AnyFormat {
    /// A format that a domain's disk may have: raw or qcow2.
    Own(Format),
    /// A foreign format.
    Of(Foreign),
}

impl AnyFormat {
    /// QEMU's name for the format.
    pub fn as_str(self) -> &'static str {
        match self {
            AnyFormat::Own(format) => format.as_str(),
            AnyFormat::Of(format) => format.as_str(),
        }
    }

    /// Whether it is one of others.
    pub fn foreign(self) -> Option<Foreign> {
        match self {
            AnyFormat::Own(_) => None,
            AnyFormat::Of(format) => Some(format),
        }
    }

    /// What stands in the layer of such an image: of a format of others only the place counts there.
    pub fn of_layer(self) -> Format {
        match self {
            AnyFormat::Own(format) => format,
            AnyFormat::Of(_) => Format::Raw,
        }
    }
}

impl From<Format> for AnyFormat {
    fn from(format: Format) -> Self {
        AnyFormat::Own(format)
    }
}

impl From<Foreign> for AnyFormat {
    fn from(format: Foreign) -> Self {
        AnyFormat::Of(format)
    }
}

impl FromStr for AnyFormat {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "raw" => Ok(Format::Raw.into()),
            "qcow2" => Ok(Format::Qcow2.into()),
            other => other.parse::<Foreign>().map(AnyFormat::Of),
        }
    }
}

/// `Conflict` if the image is not of this format, `Refused` if there is more of it in other files.
pub(in crate::image) fn check(layer: &Layer, format: Foreign) -> Result<()> {
    let file = raw::open_file(layer, false)?;
    let looked = match format {
        Foreign::Vmdk => vmdk(&file),
        Foreign::Vdi => begins(&file, 0x40, &[0x7f, 0x10, 0xda, 0xbe]),
        Foreign::Vhdx => begins(&file, 0, b"vhdxfile"),
        Foreign::Vpc => vpc(&file),
        Foreign::Qed => qed(&file),
    };
    match looked.map_err(|e| Error::io("cannot read the image", &layer.path, e))? {
        Found::Whole => Ok(()),
        Found::Other => {
            let what = format!("this is no {} image, or not all in one file", format.as_str());
            Err(Error::new(Kind::Conflict, what)
                .path(&layer.path)
                .hint("`qemu-img info FILE` says what it may be; `qemu-img convert -O raw` makes one file of several"))
        }
        Found::HasParent => {
            Err(Error::new(Kind::Refused, "the image has only what differs from another one, its parent")
                .path(&layer.path)
                .hint("make one image of both with the program it comes from, or with `qemu-img convert -O raw`"))
        }
    }
}

enum Found {
    Whole,
    Other,
    HasParent,
}

fn when(whole: bool) -> Found {
    if whole { Found::Whole } else { Found::Other }
}

/// Bytes at an offset; fewer where the file ends.
pub(in crate::image) fn bytes(file: &File, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
    let mut buffer = vec![0; len];
    let mut filled = 0;
    while filled < len {
        match file.read_at(&mut buffer[filled..], offset + filled as u64)? {
            0 => break,
            more => filled += more,
        }
    }
    buffer.truncate(filled);
    Ok(buffer)
}

fn begins(file: &File, offset: u64, magic: &[u8]) -> std::io::Result<Found> {
    Ok(when(bytes(file, offset, magic.len())? == magic))
}

/// One sparse file that says how large it is (else its description counts, which names files), and has no parent.
fn vmdk(file: &File) -> std::io::Result<Found> {
    let header = bytes(file, 0, 44)?;
    let number = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
    if header.len() < 44 || &header[..4] != b"KDMV" || number(12) == 0 {
        return Ok(Found::Other);
    }
    let (at, len) = (number(28).saturating_mul(512), number(36).saturating_mul(512));
    if at == 0 || at > i64::MAX as u64 || len == 0 || len > DESCRIPTION_MAX {
        return Ok(Found::Other);
    }
    let description = bytes(file, at, len as usize)?;
    let description = String::from_utf8_lossy(&description).to_ascii_lowercase();
    let parents = description.lines().filter_map(|line| line.trim().strip_prefix("parentcid="));
    let none = parents.map(str::trim).map(|id| id == "ffffffff").reduce(|a, b| a && b);
    Ok(match none {
        Some(true) if !description.contains("parentfilenamehint") => Found::Whole,
        Some(_) => Found::HasParent,
        None => Found::Other,
    })
}

/// The footer, which is the last sector, and at the start too if the image grows as it is written.
fn vpc(file: &File) -> std::io::Result<Found> {
    let end = rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))?;
    let mut footer = bytes(file, 0, 64)?;
    if !footer.starts_with(b"conectix") {
        footer = bytes(file, end.saturating_sub(512), 64)?;
    }
    if footer.len() < 64 || !footer.starts_with(b"conectix") {
        return Ok(Found::Other);
    }
    Ok(match footer[60..64] {
        [0, 0, 0, 2 | 3] => Found::Whole,
        [0, 0, 0, 4] => Found::HasParent,
        _ => Found::Other,
    })
}

fn qed(file: &File) -> std::io::Result<Found> {
    let header = bytes(file, 0, 24)?;
    Ok(match header.len() == 24 && header.starts_with(b"QED\0") {
        true if header[16] & 1 != 0 => Found::HasParent,
        whole => when(whole),
    })
}

/// Why an image of this format cannot have this size, where that is known beforehand; QEMU has more to say.
pub fn impossible_size(format: Foreign, size: DiskSize) -> Option<&'static str> {
    match (format, size.0) {
        (Foreign::Vmdk, 0) => Some("it is never empty"),
        (_, size) if !size.is_multiple_of(SECTOR_LEN) => Some("it ends with a sector of 512 bytes"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What older agents know is said as they know it, and what they do not know they refuse.
    #[test]
    fn a_format_travels_by_the_name_that_qemu_has_for_it() {
        let own = [Format::Raw, Format::Qcow2].map(AnyFormat::from).into_iter();
        for format in own.chain(Foreign::ALL.map(AnyFormat::from)) {
            let said = serde_json::to_string(&format).unwrap();
            assert_eq!(said, format!("\"{}\"", format.as_str()));
            assert_eq!(serde_json::from_str::<AnyFormat>(&said).unwrap(), format);
            assert_eq!(format.as_str().parse(), Ok(format));
            assert_eq!(serde_json::from_str::<Format>(&said).is_ok(), format.foreign().is_none());
        }
        for unknown in ["\"parallels\"", "\"Raw\"", "\"VMDK\"", "1", "null"] {
            assert!(serde_json::from_str::<AnyFormat>(unknown).is_err(), "{unknown}");
        }
    }

    #[test]
    fn sizes_end_with_a_sector() {
        for format in Foreign::ALL {
            for (size, possible) in
                [(0, format != Foreign::Vmdk), (1, false), (511, false), (512, true), (1 << 40, true)]
            {
                assert_eq!(impossible_size(format, DiskSize(size)).is_none(), possible, "{format:?} {size}");
            }
        }
    }
}
