//! The build of the UEFI firmware that a guest boots from: a file of its host, which is known elsewhere by its digest.

use crate::block::digest::Digest;
use crate::error::{Error, Kind, Result, printable};
use crate::hypervisor::element::{child, document, text_of};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};

/// Largest file that is read as firmware, in bytes. Builds of OVMF have 2 to 4 MiB.
const FIRMWARE_MAX: u64 = 64 << 20;

/// Largest description of one that is read, in bytes.
const DESCRIPTION_MAX: usize = 16 << 10;

/// A build, as it travels with a point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Firmware {
    /// Version of this document: 1.
    pub format: u32,
    /// Of its file, on the host that has it.
    pub path: String,
    /// Length of the firmware's file in bytes.
    pub size_bytes: u64,
    /// Plain BLAKE3 of the content, as `b3sum` prints it.
    pub blake3: Digest,
}

impl Firmware {
    /// Reads the file; `None` if there is none.
    pub fn of(path: &Path) -> Result<Option<Firmware>> {
        let at = |e| Error::io("cannot read the firmware", path, e);
        let file = match File::open(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            found => found.map_err(at)?,
        };
        let mut content = Vec::new();
        file.take(FIRMWARE_MAX + 1).read_to_end(&mut content).map_err(at)?;
        if content.len() as u64 > FIRMWARE_MAX {
            return Err(Error::new(Kind::Refused, "the file is larger than any firmware").path(path));
        }
        let (path, size_bytes) = (path.to_string_lossy().into_owned(), content.len() as u64);
        Ok(Some(Firmware { format: 1, path, size_bytes, blake3: Digest(*blake3::hash(&content).as_bytes()) }))
    }

    /// What a point says of the source's; a stranger's words.
    pub fn parse(json: &[u8]) -> Result<Firmware> {
        let bad = |what: &'static str| Error::new(Kind::Corrupt, what);
        if json.len() > DESCRIPTION_MAX {
            return Err(bad("the description of the firmware is too long"));
        }
        let found: Firmware = serde_json::from_slice(json)
            .map_err(|e| bad("the description of the firmware cannot be read").source(e))?;
        match found.format {
            1 => Ok(Firmware { path: printable(&found.path, 200), ..found }),
            n => Err(Error::new(Kind::Protocol, format!("the description of the firmware has version {n}"))),
        }
    }
}

/// What a definition says of its firmware.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Loader {
    /// The machine's own, which is no UEFI.
    None,
    /// UEFI, from this file. The path is absolute.
    File(PathBuf),
    /// UEFI, and libvirt is to choose the file.
    Chosen,
}

/// Reads it from a definition, or the XML of a running domain, in which libvirt has chosen.
pub fn loader(xml: &str) -> Result<Loader> {
    let doc = document(xml)?;
    let Some(os) = child(doc.root_element(), "os") else { return Ok(Loader::None) };
    let loader = child(os, "loader");
    let file = loader.filter(|l| l.attribute("type") == Some("pflash")).map(|l| text_of(l).trim().to_owned());
    Ok(match file {
        Some(path) if path.starts_with('/') => Loader::File(path.into()),
        _ if os.attribute("firmware") == Some("efi") => Loader::Chosen,
        _ => Loader::None,
    })
}

/// The file in the command line of a QEMU, as libvirt writes it for people (`virsh domxml-to-native qemu-argv`).
pub fn in_command_line(command: &str) -> Option<PathBuf> {
    #[derive(Deserialize)]
    struct Blockdev {
        #[serde(rename = "node-name")]
        node_name: String,
        filename: Option<PathBuf>,
    }
    let described = command.split('\'').filter(|word| word.starts_with('{'));
    let mut nodes = described.filter_map(|word| serde_json::from_str::<Blockdev>(word).ok());
    nodes.find(|node| node.node_name == "libvirt-pflash0-storage")?.filename
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_is_known_by_its_content_wherever_it_lies() {
        let temp = tempfile::tempdir().unwrap();
        let [one, same, other] = ["one", "same", "other"].map(|name| temp.path().join(name));
        assert_eq!(Firmware::of(&one).unwrap(), None);
        for (path, content) in [(&one, "build 1"), (&same, "build 1"), (&other, "build 2")] {
            std::fs::write(path, content).unwrap();
        }
        let [one, same, other] = [&one, &same, &other].map(|path| Firmware::of(path).unwrap().unwrap());
        assert_eq!((one.blake3, one.size_bytes), (same.blake3, 7));
        assert_ne!(one.blake3, other.blake3);
        let json = serde_json::to_vec(&one).unwrap();
        assert_eq!(Firmware::parse(&json).unwrap(), one);
        let later = String::from_utf8(json).unwrap().replace("\"format\":1", "\"format\":2");
        assert_eq!(Firmware::parse(later.as_bytes()).unwrap_err().kind(), Kind::Protocol);
        assert_eq!(Firmware::parse(&[b' '; DESCRIPTION_MAX + 1]).unwrap_err().kind(), Kind::Corrupt);
        let loud = Firmware { path: "/a\u{1b}[2J".into(), ..one };
        assert!(!Firmware::parse(&serde_json::to_vec(&loud).unwrap()).unwrap().path.contains('\u{1b}'));
    }

    #[test]
    fn a_definition_names_its_firmware_or_leaves_it_to_libvirt() {
        let of = |os: &str| loader(&format!("<domain>{os}</domain>")).unwrap();
        assert_eq!(
            of("<os><loader type='pflash' readonly='yes'>/f/code.fd</loader></os>"),
            Loader::File("/f/code.fd".into())
        );
        assert_eq!(
            of("<os firmware='efi'><loader type='pflash'>/f/code.fd</loader></os>"),
            Loader::File("/f/code.fd".into())
        );
        assert_eq!(of("<os firmware='efi'><loader secure='yes'/></os>"), Loader::Chosen);
        assert_eq!(of("<os><loader type='rom'>/f/bios.bin</loader></os>"), Loader::None);
        assert_eq!(of(""), Loader::None);
    }

    #[test]
    fn libvirt_says_in_a_command_line_what_it_chose() {
        let code = r#"'{"driver":"file","filename":"/f/OVMF CODE.fd","node-name":"libvirt-pflash0-storage","auto-read-only":true}'"#;
        let vars = code.replace("CODE", "VARS").replace("pflash0", "pflash1");
        let command =
            format!("LC_ALL=C /usr/bin/qemu -name 'guest=a' \\\n-blockdev {vars} \\\n-blockdev {code} \\\n-machine pc");
        assert_eq!(in_command_line(&command), Some("/f/OVMF CODE.fd".into()));
        assert_eq!(in_command_line(&format!("qemu -blockdev {vars}")), None);
    }
}
