//! Disks that are named as a volume of a storage pool (`<disk type='volume'>`): where those lie, by libvirt's word.
//!
//! A definition names pool and volume, and only libvirt knows the path. It is asked before a document is read, so that
//! reading stays pure: text and a map in, values out. Definitions keep naming the volume here; what goes to another host
//! names the file, because that host has no such pool.
//!
//! Format: <https://libvirt.org/formatdomain.html#hard-drives-floppy-disks-cdroms>, <https://libvirt.org/formatstorage.html>.

use super::xml::{child, children, document, domain_element, escape, path_text, splice};
use crate::error::Result;
use roxmltree::Node;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Most volumes that one document may name: each is a question to libvirt.
const VOLUMES_MAX: usize = 256;

/// A volume by its pool's name and its own.
pub type Named = (String, String);

/// Where a volume lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub path: PathBuf,
    pub block_device: bool,
}

/// Where the volumes of a document lie, or why that is not known: a sentence part behind "is a volume of the storage pool".
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Volumes(pub BTreeMap<Named, Result<Place, String>>);

impl Volumes {
    /// Where the volume of a `<source>` lies; an error is a reason, as a sentence part ("is a volume of …").
    pub fn place(&self, source: Node) -> Result<&Place, String> {
        let Some((pool, volume)) = named(source) else { return Err("is a volume without a pool or a name".to_owned()) };
        let what = format!("is the volume '{volume}' of the storage pool '{pool}'");
        match self.0.get(&(pool, volume)) {
            Some(Ok(place)) => Ok(place),
            Some(Err(why)) => Err(format!("{what}, {why}")),
            None => Err(format!("{what}, and libvirt was not asked where that lies")),
        }
    }

    /// Whether what this element (`<disk>`, `<backingStore>`) describes is a volume that lies there.
    pub fn is_at(&self, node: Node, path: &Path) -> bool {
        let source = child(node, "source").filter(|_| node.attribute("type") == Some("volume"));
        source.and_then(|source| self.place(source).ok()).is_some_and(|place| place.path == path)
    }
}

fn named(source: Node) -> Option<Named> {
    Some((source.attribute("pool")?.to_owned(), source.attribute("volume")?.to_owned()))
}

/// `<disk>` and `<backingStore>` elements that name a volume.
fn elements<'a, 'i: 'a>(root: Node<'a, 'i>) -> impl Iterator<Item = Node<'a, 'i>> {
    let disks = child(root, "devices").into_iter().flat_map(|devices| children(devices, "disk"));
    let layers = disks.flat_map(|disk| {
        disk.descendants().filter(move |n| *n == disk || n.has_tag_name("backingStore") || n.has_tag_name("mirror"))
    });
    layers.filter(|n| n.attribute("type") == Some("volume"))
}

/// The volumes that a definition names, each once.
pub fn named_in(xml: &str) -> Result<Vec<Named>> {
    // Nearly no document names any.
    if !xml.contains("volume=") {
        return Ok(Vec::new());
    }
    let doc = document(xml)?;
    let mut found: Vec<Named> = elements(domain_element(&doc)?).filter_map(|n| named(child(n, "source")?)).collect();
    found.sort();
    found.dedup();
    found.truncate(VOLUMES_MAX);
    Ok(found)
}

/// The definition with the path in the place of every volume whose place is known.
pub fn as_files(xml: &str, volumes: &Volumes) -> Result<String> {
    if volumes.0.is_empty() {
        return Ok(xml.to_owned());
    }
    let doc = document(xml)?;
    let mut edits: Vec<(Range<usize>, String)> = Vec::new();
    for node in elements(domain_element(&doc)?) {
        let (Some(source), Some(kind)) = (child(node, "source"), node.attribute_node("type")) else { continue };
        let Ok(place) = volumes.place(source) else { continue };
        let (name, attribute) = if place.block_device { ("block", "dev") } else { ("file", "file") };
        edits.push((kind.range_value(), name.to_owned()));
        let at = source.range().start + 1 + source.tag_name().name().len();
        edits.push((at..at, format!(" {attribute}='{}'", escape(path_text(&place.path)?)?)));
        let gone = source.attributes().filter(|a| matches!(a.name(), "pool" | "volume" | "mode"));
        // The white space before an attribute goes with it.
        edits.extend(gone.map(|a| (a.range().start - 1..a.range().end, String::new())));
    }
    Ok(splice(xml, edits))
}

#[cfg(feature = "libvirt")]
pub(super) use on_libvirt::{capacity, of, parsed};

#[cfg(feature = "libvirt")]
mod on_libvirt {
    use super::*;
    use crate::hypervisor::libvirt::gate::Failure;
    use crate::hypervisor::xml::{DomainXml, parse_with, text_of};
    use std::os::unix::fs::FileTypeExt;
    use virt::connect::Connect;
    use virt::domain::Domain;
    use virt::error::{Error as VirtError, ErrorDomain};
    use virt::storage_pool::StoragePool;

    /// Asks libvirt for the volumes of a definition. `runs`: its instance has them open, so that the pool need not be active.
    pub fn of(conn: &Connect, xml: &str, runs: bool) -> Result<Volumes, Failure> {
        let mut volumes = BTreeMap::new();
        for (pool, volume) in named_in(xml)? {
            let place = look_up(conn, &pool, &volume, runs)?;
            volumes.insert((pool, volume), place);
        }
        Ok(Volumes(volumes))
    }

    /// One of a domain's XMLs, with the volumes that it names looked up.
    pub fn parsed(conn: &Connect, domain: &Domain, flags: u32) -> Result<DomainXml, Failure> {
        let text = domain.xml_desc(flags)?;
        Ok(parse_with(&text, &of(conn, &text, domain.id().is_some())?)?)
    }

    /// Bytes of the disk that an image of a pool is, as a guest sees it. `None` where libvirt does not know.
    pub fn capacity(conn: &Connect, path: &Path) -> Result<Option<u64>, VirtError> {
        let volume = path.to_str().map(|path| conn.lookup_storage_vol_by_path(path));
        match volume.map(|found| found.and_then(|volume| volume.info())) {
            Some(Ok(info)) => Ok(Some(info.capacity)),
            Some(Err(e)) if is_lost(&e) => Err(e),
            _ => Ok(None),
        }
    }

    /// A broken connection is not an answer; any other error is one.
    fn look_up(conn: &Connect, pool: &str, volume: &str, runs: bool) -> Result<Result<Place, String>, VirtError> {
        let answer = |e: VirtError| match is_lost(&e) {
            true => Err(e),
            false => Ok(Err(format!("and libvirt cannot say where that lies: {}", e.message()))),
        };
        let found = match conn.lookup_storage_pool_by_name(pool) {
            Ok(found) => found,
            Err(e) => return answer(e),
        };
        match found.lookup_storage_vol_by_name(volume).and_then(|v| v.path()) {
            Ok(path) => Ok(place(&path)),
            // It was stopped under the running domain, which needs the pool for nothing.
            Err(e) if runs && !is_lost(&e) => match of_directory(&found, volume)? {
                Some(path) => Ok(place(&path)),
                None => answer(e),
            },
            Err(e) => answer(e),
        }
    }

    fn is_lost(e: &VirtError) -> bool {
        e.domain().is(ErrorDomain::Rpc)
    }

    /// A pool that is a directory, or a volume group, names its volumes by their files.
    fn of_directory(pool: &StoragePool, volume: &str) -> Result<Option<String>, VirtError> {
        let xml = pool.xml_desc(0)?;
        let target = || -> Option<String> {
            let doc = document(&xml).ok()?;
            let root = doc.root_element();
            let by_name = matches!(root.attribute("type")?, "dir" | "fs" | "netfs" | "logical");
            let dir = text_of(child(child(root, "target")?, "path")?);
            (by_name && dir.starts_with('/') && !volume.contains('/')).then(|| format!("{}/{volume}", dir.trim()))
        };
        Ok(target())
    }

    fn place(path: &str) -> Result<Place, String> {
        if !path.starts_with('/') {
            return Err(format!("which lies on the network ({path})"));
        }
        match std::fs::metadata(path).map(|m| m.file_type()) {
            Ok(kind) if kind.is_file() || kind.is_block_device() => {
                Ok(Place { path: path.into(), block_device: kind.is_block_device() })
            }
            Ok(_) => Err(format!("which is neither a file nor a block device ({path})")),
            Err(e) => Err(format!("whose path cannot be looked at ({path}: {e})")),
        }
    }
}

#[cfg(test)]
#[path = "volumes_tests.rs"]
mod tests;
