//! Which disk a guest boots from, by its definition.

use crate::hypervisor::xml::{child, children};
use crate::name::DiskName;
use roxmltree::Node;

/// The disk that a guest boots from: the first by its own order, or the first of all where `<os>` says `hd`, or
/// nothing. A guest that is booted by its kernel needs none to begin.
pub(super) fn boot_disk(root: Node) -> Option<DiskName> {
    let os = child(root, "os")?;
    if child(os, "kernel").is_some() {
        return None;
    }
    let devices = child(root, "devices")?;
    let disks = || children(devices, "disk").filter(|d| d.attribute("device").is_none_or(|kind| kind == "disk"));
    let order = |d: Node| child(d, "boot")?.attribute("order")?.parse::<u32>().ok();
    let says = || children(os, "boot").filter_map(|b| b.attribute("dev"));
    let any_order = devices.children().any(|d| child(d, "boot").is_some());
    let first = match any_order {
        true => disks().filter(|d| order(*d).is_some()).min_by_key(|d| order(*d)),
        false if says().next().is_none() || says().any(|dev| dev == "hd") => disks().next(),
        false => None,
    };
    DiskName::new(child(first?, "target")?.attribute("dev")?).ok()
}
