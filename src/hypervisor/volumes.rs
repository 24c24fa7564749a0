//! Disks that are named as a volume of a storage pool (`<disk type='volume'>`): where those lie, by libvirt's word.
//!
//! A definition names pool and volume, and only libvirt knows the path. It is asked before a document is read, so that
//! reading stays pure: text and a map in, values out. Definitions keep naming the volume here; what goes to another
//! host names the file, because that host has no such pool.
//!
//! Format: <https://libvirt.org/formatdomain.html#hard-drives-floppy-disks-cdroms>,
//! <https://libvirt.org/formatstorage.html>.

use crate::error::Result;
use crate::hypervisor::element::{child, children, document, domain_element, escape, path_text, splice};
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
    /// Absolute path of the file or block device.
    pub path: PathBuf,
    /// The volume is a block device and no file.
    pub block_device: bool,
}

/// Where the volumes of a document lie, or why that is not known: a sentence part behind "is a volume of the storage
/// pool".
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

#[cfg(test)]
#[path = "volumes_tests.rs"]
mod tests;
