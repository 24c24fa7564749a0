//! What this host makes of the source's world: networks, machine types, paths. Read from `recovery.yaml` beside the
//! configuration of the target; without the file nothing is mapped.
//!
//! ```yaml
//! networks:                 # of the source, as `TYPE:NAME`, or NAME alone for one of libvirt's networks
//!   default: default
//!   "bridge:br0": lan       # here: one of libvirt's networks, or `bridge:NAME`, or `none` to leave the interface out
//! machines:
//!   pc-q35-9.0: pc-q35-7.2
//! cpus:
//!   Icelake-Server: Haswell
//! paths:                    # where a guest that is booted by its kernel finds kernel and initrd here
//!   /srv/kernels: /srv/kernels
//! macs: keep                # or `new`; a drill always has new ones
//! leave_out:                # elements that the guest does without here, as `ready` calls them
//!   - launchSecurity
//! images_max: 25            # images that a disk may consist of here; without it libvirt's release decides
//! images: /var/lib/libvirt/images    # overlays of drills and failovers lie here
//! without_disks: [vda]      # of a guest whose boot disk is in no point: start it without
//! ```
//!
//! A key that is not known is an error, and so is one that stands twice.

use crate::error::{Error, Kind, Result, advice, printable};
use crate::name::DiskName;
use crate::trust;
use crate::yaml;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

/// Its name, in the directory of the configuration.
pub const MAPPING_FILE: &str = "recovery.yaml";

/// Where overlays lie unless the mapping says otherwise: QEMU may enter it, wherever libvirt is.
pub const IMAGES_DIR: &str = "/var/lib/libvirt/images";

/// Largest file that is read, in bytes.
const FILE_MAX: u64 = 1 << 20;

/// The mapping of this host, as `recovery.yaml` says it. The default maps nothing.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mapping {
    /// Network of the source (`TYPE:NAME`, or `NAME` for libvirt's) to network here: `NAME`, `bridge:NAME` or `none`.
    pub networks: BTreeMap<String, String>,
    /// Machine type of the source to machine type here. A type that is not listed stays as it is.
    pub machines: BTreeMap<String, String>,
    /// Processor model of the source to processor model here. A model that is not listed stays as it is.
    pub cpus: BTreeMap<String, String>,
    /// Path of the source to path here, for kernel, initrd and firmware files. The longest matching entry applies.
    pub paths: BTreeMap<PathBuf, PathBuf>,
    /// Whether interfaces keep their MAC addresses in a failover. A drill always makes new ones.
    pub macs: MacPolicy,
    /// Elements of a definition, as remarks call them.
    pub leave_out: Vec<String>,
    /// Images that a disk may consist of here; `None`: as libvirt's release says.
    pub images_max: Option<u64>,
    /// Absolute directory for the overlays of drills and failovers. `None`: `IMAGES_DIR`.
    pub images: Option<PathBuf>,
    /// Disks that are in no point and that a guest is to be started without, though it boots from one of them.
    pub without_disks: Vec<DiskName>,
}

/// The key `macs:` in `recovery.yaml`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MacPolicy {
    /// Interfaces keep the MAC addresses that they have at the source.
    #[default]
    Keep,
    /// Interfaces get new MAC addresses, made from the domain's UUID, so that a repeated failover makes the same
    /// ones.
    New,
}

/// What an interface of the source is attached to here.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Attach {
    /// One of libvirt's networks.
    Network(String),
    /// A bridge of the host.
    Bridge(String),
    /// Nothing: the interface is left out.
    None,
}

impl Mapping {
    /// Reads `path`. A file that is not there maps nothing, unless it was `named` by the operator.
    pub fn load(path: &Path, named: bool) -> Result<Mapping> {
        use std::io::Read as _;
        trust::check(path)?;
        let mut text = String::new();
        match std::fs::File::open(path).and_then(|f| f.take(FILE_MAX + 1).read_to_string(&mut text)) {
            Ok(read) if read as u64 <= FILE_MAX => Mapping::parse(&text, path),
            Ok(_) => Err(Error::new(Kind::Config, "the mapping is larger than 1 MiB").path(path)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !named => Ok(Mapping::default()),
            Err(e) => Err(Error::new(Kind::Config, "cannot read the mapping").path(path).source(e)),
        }
    }

    /// Parses a mapping; `path` is for its errors only.
    pub fn parse(text: &str, path: &Path) -> Result<Mapping> {
        let parsed: Option<Mapping> = yaml::parse(text, path)?;
        let mapping = parsed.unwrap_or_default();
        let absolute = mapping.paths.iter().flat_map(|(from, to)| [from, to]).chain(&mapping.images);
        for dir in absolute {
            if !dir.is_absolute() || !is_plain(dir) {
                let what = format!("{}: '{}' is not an absolute path without '..'", path.display(), dir.display());
                return Err(Error::new(Kind::Config, what));
            }
        }
        let is_path = |what: &String| {
            (1..=120).contains(&what.len()) && what.bytes().all(|b| b.is_ascii_graphic() && !b"'\"<>&".contains(&b))
        };
        if mapping.images_max.is_some_and(|max| max < 2) {
            let what = format!("{}: `images_max` is at least 2: an image and an overlay", path.display());
            return Err(Error::new(Kind::Config, what));
        }
        if let Some(odd) = mapping.leave_out.iter().find(|what| !is_path(what)) {
            let what = format!("{}: '{}' is no element of a definition", path.display(), printable(odd, 60));
            return Err(Error::new(Kind::Config, what).advise(advice::Failover::AskElement));
        }
        Ok(mapping)
    }

    /// Gives the directory for overlays: `images`, or `IMAGES_DIR` if that is not set.
    pub fn images_dir(&self) -> &Path {
        self.images.as_deref().unwrap_or(IMAGES_DIR.as_ref())
    }

    /// What an interface's source is called here. `None`: nobody has said.
    pub fn network(&self, source: &str) -> Option<Attach> {
        Some(match self.networks.get(source)?.as_str() {
            "none" => Attach::None,
            name => match name.strip_prefix("bridge:") {
                Some(bridge) => Attach::Bridge(bridge.to_owned()),
                None => Attach::Network(name.to_owned()),
            },
        })
    }

    /// Where a file of the source is here: by the longest directory that is mapped. `None`: nobody has said.
    pub fn path(&self, source: &Path) -> Option<PathBuf> {
        if !source.is_absolute() || !is_plain(source) {
            return None;
        }
        let inside = self.paths.iter().filter_map(|(from, to)| Some((from, to.join(source.strip_prefix(from).ok()?))));
        // A file that is mapped itself: joined with nothing, it would end in a slash.
        let inside =
            inside.map(|(from, to)| if from == source { (from, self.paths[from].clone()) } else { (from, to) });
        inside.max_by_key(|(from, _)| from.components().count()).map(|(_, to)| to)
    }
}

fn is_plain(path: &Path) -> bool {
    path.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Mapping> {
        Mapping::parse(text, Path::new("recovery.yaml"))
    }

    #[test]
    fn networks_are_mapped_to_networks_bridges_or_nothing() {
        let m = parse("networks: {default: lan, 'bridge:br0': 'bridge:br1', 'direct:eth0': none}").unwrap();
        assert_eq!(m.network("default"), Some(Attach::Network("lan".into())));
        assert_eq!(m.network("bridge:br0"), Some(Attach::Bridge("br1".into())));
        assert_eq!(m.network("direct:eth0"), Some(Attach::None));
        assert_eq!(m.network("lan"), None, "what is here is not what was there");
    }

    #[test]
    fn the_longest_directory_wins_and_nobody_climbs_out_of_it() {
        let m = parse("paths: {/srv: /mnt/a, /srv/k: /boot, /srv/one: /srv/two}").unwrap();
        let path = |p: &str| m.path(Path::new(p));
        assert_eq!(path("/srv/x/y"), Some("/mnt/a/x/y".into()));
        assert_eq!(path("/srv/k/vmlinuz"), Some("/boot/vmlinuz".into()));
        assert_eq!(path("/srv/one").unwrap().to_str(), Some("/srv/two"));
        for stranger in ["/srvk/x", "/etc/passwd", "/srv/../etc/passwd", "srv/x", "/srv/k/../../etc/shadow", ""] {
            assert_eq!(path(stranger), None, "{stranger}");
        }
    }

    #[test]
    fn mistakes_are_told_and_no_file_is_an_empty_one() {
        for (text, said) in [
            ("network: {}", "did you mean `networks`?"),
            ("macs: keepp", "did you mean `keep`?"),
            ("paths: {/srv/..: /x}", "absolute path"),
            ("images: vm", "absolute path"),
            ("leave_out: ['a b']", "no element of a definition"),
            ("images_max: 1", "at least 2"),
        ] {
            let e = parse(text).unwrap_err();
            assert_eq!(e.kind(), Kind::Config);
            let all = format!("{} {}", e.chain(), e.hint_text().unwrap_or_default());
            assert!(all.contains(said), "{all}");
        }
        assert_eq!(parse("# nothing\n").unwrap(), Mapping::default());
        assert_eq!(Mapping::load(Path::new("/no/such/file"), false).unwrap(), Mapping::default());
        assert_eq!(Mapping::load(Path::new("/no/such/file"), true).unwrap_err().kind(), Kind::Config);
    }
}
