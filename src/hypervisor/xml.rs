//! Domain XML as libvirt prints it: read into plain descriptions, and edited by splicing. Pure: text in, values out.
//!
//! The text may be a stranger's (a manifest, a source host), so it is bounded before it is parsed, document type
//! definitions are refused, and nothing in it can make this module panic.
//!
//! Invariants
//! - An edit replaces the byte ranges it is about; every other byte of the document survives, known to us or not.
//! - A format is what the XML records, never a guess: a layer without one makes its disk unsupported.
//! - A chain is reported only if libvirt said where it ends (`<backingStore/>`); half a chain is no chain.
//!
//! Format: <https://libvirt.org/formatdomain.html#hard-drives-floppy-disks-cdroms>.

use super::swtpm::{self, TpmXml};
use super::volumes::Volumes;
use super::{DiskKind, FreezeDisk};
use crate::error::{Error, Kind, Result};
pub(crate) use crate::hypervisor::element::child;
pub(crate) use crate::hypervisor::element::children;
pub(crate) use crate::hypervisor::element::document;
pub(crate) use crate::hypervisor::element::domain_element;
pub(crate) use crate::hypervisor::element::escape;
pub(crate) use crate::hypervisor::element::path_text;
pub(crate) use crate::hypervisor::element::text_of;
use crate::hypervisor::element::{bad_xml, splice};
use crate::image::{Format, Layer};
use crate::name::{DiskName, DomainName, DomainUuid};
use roxmltree::{Document, Node, ParsingOptions};
use std::fmt::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Namespace of our record in a domain's `<metadata>`. The number rises when the meaning of the record changes.
pub const RECORD_NS: &str = "https://virt-replica.org/xmlns/record/1";

/// Namespace of the words that a domain's owner sorts it by: `virsh metadata DOMAIN URI --key vr --set
/// "<tags>gold</tags>"`.
pub const TAGS_NS: &str = "https://virt-replica.org/xmlns/tags/1";

/// Namespace of the words in a domain's `<metadata>` that say where it lives, of one that was handed to another host.
pub const LIVES_NS: &str = "https://virt-replica.org/xmlns/lives/1";

/// Largest record we store: it travels inside every copy of the XML.
pub const RECORD_LEN_MAX: usize = 64 << 10;

/// Longest backing chain we follow. QEMU itself becomes unusable before.
const CHAIN_LEN_MAX: usize = 256;

/// The words of an element of [`TAGS_NS`]: separated by white space or commas. What cannot be read has none.
pub fn tags(element: &str) -> Vec<String> {
    let options = ParsingOptions { allow_dtd: false, ..ParsingOptions::default() };
    let Ok(document) = Document::parse_with_options(element, options) else { return Vec::new() };
    let text: String = document.root_element().descendants().filter_map(|n| n.text().filter(|_| n.is_text())).collect();
    let words = text.split(|c: char| c.is_whitespace() || c == ',').filter(|w| !w.is_empty());
    words.map(str::to_owned).collect()
}

/// What one XML says about a domain.
#[derive(Debug, Clone, PartialEq)]
pub struct DomainXml {
    /// Content of `<name>`: the name of the domain.
    pub name: DomainName,
    /// Content of `<uuid>`: the UUID of the domain.
    pub uuid: DomainUuid,
    /// Set if and only if this is the definition of a running instance.
    pub id: Option<u32>,
    /// In the order of the document.
    pub disks: Vec<DiskXml>,
    /// Our record, unescaped.
    pub record: Option<String>,
    /// Absolute path of the file with the UEFI variables. `None`: the XML names no such file.
    pub nvram: Option<PathBuf>,
    /// Emulated TPM. `None`: there is none, or the host's own TPM is passed through.
    pub tpm: Option<TpmXml>,
    /// A guest agent channel is there and its guest end is open; only known of a running instance.
    pub guest_agent: bool,
}

/// What one XML says about a disk.
#[derive(Debug, Clone, PartialEq)]
pub struct DiskXml {
    /// Name of the disk: the `dev` attribute of its `<target>`.
    pub name: DiskName,
    /// Whether the disk can be frozen, and if not why.
    pub kind: DiskKind,
    /// Of a running instance the whole chain, uppermost first; of a stored definition the uppermost layer alone,
    /// as libvirt looks for the rest when it starts the domain. Empty if the kind is unsupported.
    pub layers: Vec<Layer>,
    /// Copy or active commit that is under way. `None`: there is none.
    pub mirror: Option<Mirror>,
    /// The definition says `<readonly/>`.
    pub read_only: bool,
    /// The definition says `<shareable/>`.
    pub shareable: bool,
}

/// `<mirror>`: a copy or an active commit is going on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// The `job` attribute: `active-commit` or `copy`.
    pub job: String,
    /// libvirt saw QEMU's ready event (`ready='yes'`); `abort` and `pivot` mean that it is ending.
    pub ready: bool,
    /// The image that is written.
    pub to: Option<PathBuf>,
}

impl DomainXml {
    /// Disk of this name. `None`: the XML has none.
    pub fn disk(&self, name: &DiskName) -> Option<&DiskXml> {
        self.disks.iter().find(|d| &d.name == name)
    }
}

/// Reads a domain's XML, live or inactive. A disk that is named as a volume of a pool is unsupported: [`parse_with`].
pub fn parse(xml: &str) -> Result<DomainXml> {
    parse_with(xml, &Volumes::default())
}

/// The same, where it is known where the volumes lie that it names.
pub fn parse_with(xml: &str, volumes: &Volumes) -> Result<DomainXml> {
    let doc = document(xml)?;
    let root = domain_element(&doc)?;
    let id = match root.attribute("id") {
        Some(text) => Some(text.parse().map_err(|e| bad_xml("the domain's id is not a number").source(e))?),
        None => None,
    };
    let name = child(root, "name").map(text_of).ok_or_else(|| bad_xml("the domain has no name"))?;
    let uuid = child(root, "uuid").map(text_of).ok_or_else(|| bad_xml("the domain has no UUID"))?;
    let devices = child(root, "devices");
    let mut disks: Vec<DiskXml> = Vec::new();
    for node in devices.into_iter().flat_map(|d| children(d, "disk")) {
        let disk = disk(node, id.is_some(), volumes)?;
        if disks.iter().any(|d| d.name == disk.name) {
            return Err(bad_xml("two disks have the same target").disk(&disk.name));
        }
        disks.push(disk);
    }
    Ok(DomainXml {
        name: DomainName::new(name).map_err(|e| bad_xml("the name is not usable").source(e))?,
        uuid: DomainUuid::new(uuid.trim()).map_err(|e| bad_xml("the UUID is not usable").source(e))?,
        id,
        disks,
        record: record(root),
        nvram: nvram(root),
        tpm: devices.and_then(swtpm::of),
        guest_agent: devices.is_some_and(agent_connected),
    })
}

/// Whether a running domain's XML says that its QEMU is confined by this security model (`apparmor`).
pub fn confined_by(xml: &str, model: &str) -> Result<bool> {
    let doc = document(xml)?;
    let label = |l: Node| l.attribute("model") == Some(model) && l.attribute("type") != Some("none");
    Ok(children(domain_element(&doc)?, "seclabel").any(label))
}

/// The `<disk>` that a copy is written to: a raw file.
pub fn raw_copy_xml(path: &Path) -> Result<String> {
    Ok(format!("<disk type='file'><driver type='raw'/><source file='{}'/></disk>", escape(path_text(path)?)?))
}

/// The `<domainsnapshot>` that puts an overlay on the disks in `freeze` and leaves every other disk of `all` alone.
/// Every disk is named, because libvirt snapshots those that are not.
pub fn snapshot_xml(freeze: &[FreezeDisk], all: &[DiskName]) -> Result<String> {
    let mut xml = String::from("<domainsnapshot><disks>");
    for name in all {
        match freeze.iter().find(|f| &f.name == name) {
            Some(f) => {
                let path = escape(path_text(&f.overlay)?)?;
                write!(
                    xml,
                    "<disk name='{name}' snapshot='external' type='file'>\
                     <driver type='qcow2'/><source file='{path}'/></disk>"
                )
            }
            None => write!(xml, "<disk name='{name}' snapshot='no'/>"),
        }
        .expect("writing to a String cannot fail");
    }
    xml.push_str("</disks></domainsnapshot>");
    Ok(xml)
}

/// The element to store as our record; libvirt adds prefix and namespace.
pub fn record_xml(record: &str) -> Result<String> {
    if record.len() > RECORD_LEN_MAX {
        return Err(Error::new(Kind::Usage, format!("a record has at most {RECORD_LEN_MAX} bytes")));
    }
    Ok(format!("<record>{}</record>", escape(record)?))
}

/// The element to store as our words about where it lives; libvirt adds prefix and namespace.
pub fn lives_xml(words: &str) -> Result<String> {
    Ok(format!("<lives>{}</lives>", escape(words)?))
}

/// Points the named disks of an inactive definition at other layers.
///
/// If the layer lies in the disk's own recorded chain (our overlay's base), the definition goes back to what it says
/// about that layer, including what its owner wrote there (security labels, the chain below). Otherwise only path, type
/// and format change and the recorded chain goes: libvirt then takes it from the image's header.
pub fn set_layers(xml: &str, disks: &[(DiskName, Layer)]) -> Result<String> {
    set_layers_with(xml, disks, &Volumes::default())
}

/// The same of a definition that names volumes of pools: it goes back to naming the volume that lies there.
pub fn set_layers_with(xml: &str, disks: &[(DiskName, Layer)], volumes: &Volumes) -> Result<String> {
    let doc = document(xml)?;
    let devices = child(domain_element(&doc)?, "devices").ok_or_else(|| bad_xml("the domain has no devices"))?;
    let mut edits: Vec<(Range<usize>, String)> = Vec::new();
    for (index, (name, layer)) in disks.iter().enumerate() {
        if disks[..index].iter().any(|(n, _)| n == name) {
            return Err(Error::new(Kind::Usage, "the disk is named twice").disk(name));
        }
        let node = children(devices, "disk")
            .find(|d| target(*d) == Some(name.as_str()))
            .ok_or_else(|| Error::new(Kind::Conflict, "the definition has no such disk").disk(name))?;
        edit_disk(xml, node, layer, volumes, &mut edits).map_err(|e| e.disk(name))?;
    }
    Ok(splice(xml, edits))
}

/// The definition without our record and mark, and without a `<metadata>` that held nothing else: what travels with a
/// point must not tell another host of a run that was open here.
pub fn without_record(xml: &str) -> Result<String> {
    let doc = document(xml)?;
    let Some(metadata) = child(domain_element(&doc)?, "metadata") else { return Ok(xml.to_owned()) };
    let is_record = |n: &Node| n.has_tag_name((RECORD_NS, "record")) || n.has_tag_name((LIVES_NS, "lives"));
    let others = metadata.children().any(|n| n.is_element() && !is_record(&n));
    let gone: Vec<Node> = if others { metadata.children().filter(is_record).collect() } else { vec![metadata] };
    let edits = gone.iter().map(|n| {
        // The line's indentation goes with it.
        let start = xml[..n.range().start].trim_end().len();
        (start..n.range().end, String::new())
    });
    Ok(splice(xml, edits.collect()))
}

/// Path of the emulator that a domain's XML names.
pub fn emulator(xml: &str) -> Result<Option<String>> {
    let document = document(xml)?;
    let devices = child(domain_element(&document)?, "devices");
    Ok(devices.and_then(|d| child(d, "emulator")).map(text_of).filter(|path| !path.is_empty()))
}

// --- reading ---------------------------------------------------------------------------------------------------------

pub(crate) fn target<'a>(disk: Node<'a, '_>) -> Option<&'a str> {
    child(disk, "target")?.attribute("dev")
}

fn record(root: Node) -> Option<String> {
    let metadata = child(root, "metadata")?;
    metadata.children().find(|c| c.has_tag_name((RECORD_NS, "record"))).map(text_of)
}

/// `<nvram>path</nvram>`, or since libvirt 8.5 `<nvram type='file'><source file='path'/></nvram>`.
fn nvram(root: Node) -> Option<PathBuf> {
    let nvram = child(child(root, "os")?, "nvram")?;
    let path = match child(nvram, "source") {
        Some(source) => source.attribute("file")?.to_owned(),
        None => text_of(nvram).trim().to_owned(),
    };
    path.starts_with('/').then(|| PathBuf::from(path))
}

fn agent_connected(devices: Node) -> bool {
    children(devices, "channel").filter_map(|c| child(c, "target")).any(|t| {
        t.attribute("name").is_some_and(|n| n.starts_with("org.qemu.guest_agent."))
            && t.attribute("state") == Some("connected")
    })
}

fn disk(node: Node, live: bool, volumes: &Volumes) -> Result<DiskXml> {
    let name = target(node).ok_or_else(|| bad_xml("a disk has no target"))?;
    let name = DiskName::new(name).map_err(|e| bad_xml("a disk's target is not usable as a name").source(e))?;
    let (read_only, shareable) = (child(node, "readonly").is_some(), child(node, "shareable").is_some());
    let layers = match refusal(node) {
        Some(why) => Err(why),
        None if live => live_chain(node, volumes),
        None => layer(node, format_attr(node, "driver"), volumes).map(|l| vec![l]),
    };
    let (kind, layers) = match layers {
        Ok(layers) => (DiskKind::Image, layers),
        Err(why) if matches!(node.attribute("device"), Some("cdrom" | "floppy")) => {
            (DiskKind::Removable(why), Vec::new())
        }
        Err(why) => (DiskKind::Unsupported(why), Vec::new()),
    };
    let mirror = child(node, "mirror").map(|m| Mirror {
        job: m.attribute("job").unwrap_or("copy").to_owned(),
        ready: m.attribute("ready") == Some("yes"),
        to: child(m, "source").and_then(|s| s.attribute("file").or(s.attribute("dev"))).map(PathBuf::from),
    });
    Ok(DiskXml { name, kind, layers, mirror, read_only, shareable })
}

/// Why a disk is not replicated, whatever lies behind it.
fn refusal(disk: Node) -> Option<String> {
    match disk.attribute("device").unwrap_or("disk") {
        "disk" => {}
        "lun" => return Some("is a passed-through LUN".into()),
        device @ ("cdrom" | "floppy") => return Some(format!("is a {device}")),
        other => return Some(format!("is a device of a kind we do not know ({other})")),
    }
    if child(disk, "readonly").is_some() {
        Some("is read-only".into())
    } else if child(disk, "shareable").is_some() {
        Some("is shareable (another domain may write to it)".into())
    } else if child(disk, "transient").is_some() {
        Some("is transient (what is written to it is thrown away)".into())
    } else {
        encryption(disk)
    }
}

/// Encryption that QEMU performs: the image then does not hold what the guest sees. Inside the guest is not our matter.
fn encryption(node: Node) -> Option<String> {
    let found = child(node, "encryption").or_else(|| child(child(node, "source")?, "encryption"))?;
    Some(format!("is encrypted by QEMU ({})", found.attribute("format").unwrap_or("unknown format")))
}

fn live_chain(disk: Node, volumes: &Volumes) -> Result<Vec<Layer>, String> {
    let mut layers = vec![layer(disk, format_attr(disk, "driver"), volumes)?];
    let mut above = disk;
    loop {
        let Some(below) = child(above, "backingStore") else {
            return Err("has a backing chain whose end libvirt does not tell".into());
        };
        if !below.has_attribute("type") && child(below, "source").is_none() {
            return Ok(layers);
        }
        if layers.len() == CHAIN_LEN_MAX {
            return Err(format!("has a backing chain of more than {CHAIN_LEN_MAX} layers"));
        }
        let backing = encryption(below).map_or_else(|| layer(below, format_attr(below, "format"), volumes), Err);
        layers.push(backing.map_err(|why| format!("has a backing image that {why}"))?);
        above = below;
    }
}

fn format_attr<'a>(node: Node<'a, '_>, element: &'static str) -> Option<&'a str> {
    child(node, element)?.attribute("type")
}

/// The layer that a `<disk>` or `<backingStore>` describes by its own `type` and `<source>`.
fn layer(node: Node, format: Option<&str>, volumes: &Volumes) -> Result<Layer, String> {
    let source = child(node, "source").ok_or("has no image")?;
    let (path, block_device) = match node.attribute("type").unwrap_or("file") {
        "file" => (source.attribute("file"), false),
        "block" => (source.attribute("dev"), true),
        "volume" => {
            let place = volumes.place(source)?;
            (place.path.to_str(), place.block_device)
        }
        "network" => {
            let protocol = source.attribute("protocol").unwrap_or("unknown protocol");
            return Err(format!("lies on the network ({protocol})"));
        }
        "nvme" => return Err("is a passed-through NVMe device".into()),
        "vhostuser" | "vhostvdpa" => return Err("is served by a vhost back end outside QEMU".into()),
        "dir" => return Err("is a directory shown as a file system".into()),
        other => return Err(format!("has a source of a kind we do not know ({other})")),
    };
    if child(source, "slices").is_some() {
        return Err("is a slice of an image".into());
    }
    let path = path.ok_or("has no image")?;
    if !path.starts_with('/') {
        return Err("has an image with a relative path".into());
    }
    let format = match format {
        Some("raw") => Format::Raw,
        Some("qcow2") => Format::Qcow2,
        Some(other) => return Err(format!("has the format {other}")),
        None => return Err("has no recorded format".into()),
    };
    Ok(Layer { path: path.into(), format, block_device, data_file: data_file(node, source)? })
}

/// `<dataStore>` of libvirt 10.10 and later. Earlier ones do not tell; the image's header does.
fn data_file(node: Node, source: Node) -> Result<Option<PathBuf>, String> {
    let Some(store) = child(source, "dataStore").or_else(|| child(node, "dataStore")) else { return Ok(None) };
    let path = child(store, "source").and_then(|s| s.attribute("file").or_else(|| s.attribute("dev")));
    match path {
        Some(path) if path.starts_with('/') => Ok(Some(path.into())),
        _ => Err("has an external data file that is neither a file nor a block device".into()),
    }
}

// --- editing ---------------------------------------------------------------------------------------------------------

fn edit_disk(
    xml: &str,
    disk: Node,
    layer: &Layer,
    volumes: &Volumes,
    edits: &mut Vec<(Range<usize>, String)>,
) -> Result<()> {
    let source = child(disk, "source").ok_or_else(|| Error::new(Kind::Refused, "the disk has no image"))?;
    let (type_name, attr) = if layer.block_device { ("block", "dev") } else { ("file", "file") };
    let path = path_text(&layer.path)?;
    let here = source.attribute(attr) == Some(path) || volumes.is_at(disk, &layer.path);
    let own = if here { None } else { own_layer(disk, attr, path, volumes) };
    // What its owner named by a pool and a volume stays named so.
    let by_volume = volumes.is_at(own.unwrap_or(disk), &layer.path);
    set_attribute(disk, "type", if by_volume { "volume" } else { type_name }, edits)?;
    match child(disk, "driver") {
        Some(driver) => set_attribute(driver, "type", layer.format.as_str(), edits)?,
        None => {
            let at = source.range().start;
            edits.push((at..at, format!("<driver name='qemu' type='{}'/>", layer.format.as_str())));
        }
    }
    if here {
        return Ok(());
    }
    if let Some(own) = own {
        let own_source = child(own, "source").expect("found by its source");
        edits.push((source.range(), xml[own_source.range()].to_owned()));
        let backing = child(disk, "backingStore").expect("a layer below was found in it");
        match child(own, "backingStore") {
            Some(below) => edits.push((backing.range(), xml[below.range()].to_owned())),
            None => edits.push((with_indent(backing), String::new())),
        }
        return Ok(());
    }
    if source.has_attribute(attr) {
        set_attribute(source, attr, path, edits)?;
    } else {
        edits.push((source.range(), format!("<source {attr}='{}'/>", escape(path)?)));
    }
    if let Some(backing) = child(disk, "backingStore") {
        edits.push((with_indent(backing), String::new()));
    }
    Ok(())
}

/// The `<backingStore>` below `disk` that describes this path.
fn own_layer<'a, 'i: 'a>(disk: Node<'a, 'i>, attr: &str, path: &str, volumes: &Volumes) -> Option<Node<'a, 'i>> {
    let mut below = child(disk, "backingStore");
    for _ in 0..CHAIN_LEN_MAX {
        let node = below?;
        if child(node, "source")?.attribute(attr) == Some(path) || volumes.is_at(node, Path::new(path)) {
            return Some(node);
        }
        below = child(node, "backingStore");
    }
    None
}

/// Changes the value of an attribute, or adds it behind the element's name.
fn set_attribute(node: Node, name: &str, value: &str, edits: &mut Vec<(Range<usize>, String)>) -> Result<()> {
    match node.attribute_node(name) {
        Some(attribute) if attribute.value() == value => {}
        // Both quotes are escaped, so it does not matter which of them stands around the value.
        Some(attribute) => edits.push((attribute.range_value(), escape(value)?)),
        None => {
            let at = node.range().start + 1 + node.tag_name().name().len();
            edits.push((at..at, format!(" {name}='{}'", escape(value)?)));
        }
    }
    Ok(())
}

/// The element and the white space before it, so that no empty line stays.
fn with_indent(node: Node) -> Range<usize> {
    let before = node.prev_sibling().filter(|p| p.is_text() && p.text().is_some_and(|t| t.trim().is_empty()));
    before.map_or(node.range().start, |p| p.range().start)..node.range().end
}

#[cfg(test)]
#[path = "xml_tests.rs"]
mod tests;
