//! The definition that travels with a point of a running domain. Pure: the two documents that libvirt has in, one out.
//!
//! A running domain has a live and a stored definition, and they may differ: a disk or a network interface was attached
//! without `--persistent`, or the stored one was edited for the next start. The disks of a point are those of the
//! running instance. A failover is the guest's next start, as a start at its source would be. So the document that
//! travels is the stored definition, with every disk of the point and every network interface that only the running
//! instance has.
//!
//! Invariants
//! - Every disk of the point is in the result.
//! - What comes from the live document takes no address, boot order or alias that the stored document uses already, and
//!   a controller that it needs comes along.
//! - Each difference that a failover would show is a note.
//! - Two documents that agree give back the stored one, byte for byte.

use super::xml::{parse, target};
use crate::error::{Error, Kind, Result};
use crate::hypervisor::element::{child, children, document, domain_element, splice, text_of};
use crate::name::DiskName;
use roxmltree::Node;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::ops::Range;

/// What travels, and how it differs from what the running domain or its next start at the source would be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Travelling {
    /// Definition that travels with the point.
    pub xml: String,
    /// Sentences without a full stop.
    pub notes: Vec<String>,
}

/// Makes the definition that travels from the stored and the live one. `disks`: those of the point. An error: one of
/// the two is no domain's XML, or the live one lacks a disk of the point.
pub fn definition(stored: &str, live: &str, disks: &[DiskName]) -> Result<Travelling> {
    let (stored_doc, live_doc) = (document(stored)?, document(live)?);
    let (s, l) = (domain_element(&stored_doc)?, domain_element(&live_doc)?);
    let devices = |root| child(root, "devices").ok_or_else(|| Error::new(Kind::Corrupt, "the domain has no devices"));
    let mut merge = Merge::new(stored, live, devices(s)?, devices(l)?);
    for disk in disks {
        merge.disk(disk)?;
    }
    merge.disks_left_out(disks);
    merge.interfaces();
    merge.others();
    merge.notes.extend(edited(s, l));
    let xml = merge.write();
    check(&xml, disks)?;
    Ok(Travelling { xml, notes: merge.notes })
}

/// What was made is a domain's XML and has every disk of the point.
fn check(xml: &str, disks: &[DiskName]) -> Result<()> {
    let made = parse(xml)?;
    match disks.iter().find(|d| made.disk(d).is_none()) {
        None => Ok(()),
        Some(disk) => {
            Err(Error::new(Kind::Conflict, "the definition that would travel lacks a disk of the point").disk(disk))
        }
    }
}

/// The result while it is made.
struct Merge<'a, 'i> {
    stored_text: &'a str,
    live_text: &'a str,
    stored: Node<'a, 'i>,
    live: Node<'a, 'i>,
    edits: Vec<(Range<usize>, String)>,
    /// Elements that come behind the stored devices.
    added: Vec<String>,
    /// Addresses that are taken.
    addresses: BTreeSet<String>,
    /// Boot orders that are taken; `None`: the stored definition says it in `<os>`, and libvirt allows one way only.
    orders: Option<BTreeSet<String>>,
    /// Controllers that are there, as (type, index).
    controllers: BTreeSet<(String, String)>,
    notes: Vec<String>,
}

impl<'a, 'i> Merge<'a, 'i> {
    fn new(stored_text: &'a str, live_text: &'a str, stored: Node<'a, 'i>, live: Node<'a, 'i>) -> Self {
        let elements = || stored.children().filter(Node::is_element);
        let os = stored.parent().and_then(|root| child(root, "os"));
        let by_os = os.is_some_and(|os| child(os, "boot").is_some());
        let orders = elements().filter_map(|d| child(d, "boot")?.attribute("order")).map(str::to_owned).collect();
        Self {
            stored_text,
            live_text,
            stored,
            live,
            edits: Vec::new(),
            added: Vec::new(),
            addresses: elements().filter_map(|d| Some(address(child(d, "address")?))).collect(),
            orders: (!by_os).then_some(orders),
            controllers: children(stored, "controller").map(controller).collect(),
            notes: Vec::new(),
        }
    }

    /// A disk of the point.
    fn disk(&mut self, name: &DiskName) -> Result<()> {
        let there = find_disk(self.stored, name.as_str());
        if there.is_some_and(is_plain_disk) {
            return Ok(());
        }
        let Some(live) = find_disk(self.live, name.as_str()) else {
            return Err(Error::new(Kind::Conflict, "the running domain does not have this disk any more")
                .disk(name)
                .hint("run again"));
        };
        match there {
            None => self.notes.push(format!(
                "disk '{name}' is attached to the running instance only: it is in the point and in the definition that \
                 travels, but after a stop of the domain here it is gone (keep it with `virsh attach-disk --config`)"
            )),
            Some(other) => {
                let device = other.attribute("device").unwrap_or("disk");
                self.notes.push(format!(
                    "'{name}' is a disk of the running instance and a {device} in the definition for the next start: the \
                     disk travels"
                ));
                self.edits.push((other.range(), String::new()));
            }
        }
        self.add(live);
        Ok(())
    }

    /// Disks of either document that are in no point: nothing of theirs travels.
    fn disks_left_out(&mut self, disks: &[DiskName]) {
        let plain = |devices: Node<'a, 'i>| children(devices, "disk").filter(|d| is_plain_disk(*d)).filter_map(target);
        let ours = |dev: &str| disks.iter().any(|d| d.as_str() == dev);
        for dev in plain(self.stored).filter(|dev| find_disk(self.live, dev).is_none()) {
            self.notes.push(format!(
                "disk '{dev}' is in the definition for the next start only: the running instance does not have it, so it \
                 is not in the point"
            ));
        }
        for dev in plain(self.live).filter(|dev| !ours(dev) && find_disk(self.stored, dev).is_none()) {
            self.notes.push(format!(
                "disk '{dev}' is attached to the running instance only and is not replicated: it does not travel"
            ));
        }
    }

    /// An interface is known by its MAC address.
    fn interfaces(&mut self) {
        let known: BTreeSet<String> = children(self.stored, "interface").filter_map(mac).collect();
        let running: BTreeSet<String> = children(self.live, "interface").filter_map(mac).collect();
        for nic in children(self.live, "interface") {
            let Some(mac) = mac(nic).filter(|mac| !known.contains(mac)) else { continue };
            self.notes.push(format!(
                "the network interface {mac} is attached to the running instance only: it is in the definition that travels"
            ));
            self.add(nic);
        }
        for mac in known.difference(&running) {
            self.notes.push(format!(
                "the network interface {mac} is in the definition for the next start only: a failover has it too"
            ));
        }
    }

    /// Other devices that were plugged in: known by where they sit. What is in no place is made anew at each start.
    fn others(&mut self) {
        let place = |d: Node| Some((d.tag_name().name().to_owned(), address(child(d, "address")?)));
        let known: BTreeSet<_> = self.stored.children().filter(Node::is_element).filter_map(place).collect();
        for device in self.live.children().filter(Node::is_element) {
            let name = device.tag_name().name();
            if matches!(name, "disk" | "interface" | "controller") || place(device).is_none_or(|p| known.contains(&p)) {
                continue;
            }
            self.notes.push(format!(
                "a device ({name}) is attached to the running instance only: it is not in the definition that travels"
            ));
        }
    }

    /// Takes a device of the live document over, without what only a running instance has.
    fn add(&mut self, device: Node<'a, 'i>) {
        if let Some((kind, index)) = needed_controller(device)
            && !self.controllers.contains(&(kind.clone(), index.clone()))
        {
            let wanted = (kind, index);
            if let Some(node) = children(self.live, "controller").find(|c| controller(*c) == wanted) {
                self.controllers.insert(wanted);
                let text = self.stripped(node);
                self.added.push(text);
            }
        }
        let text = self.stripped(device);
        self.added.push(text);
    }

    /// The device's text, fit for a stored definition that has the addresses and the boot orders seen so far.
    fn stripped(&mut self, device: Node<'a, 'i>) -> String {
        let mut cuts: Vec<(Range<usize>, String)> = Vec::new();
        for inner in device.children().filter(Node::is_element) {
            match inner.tag_name().name() {
                "alias" | "backingStore" | "mirror" => cuts.push((with_space(inner), String::new())),
                // The name of the host's end (`vnet3`) is drawn anew at each start.
                "target" if device.has_tag_name("interface") => cuts.push((with_space(inner), String::new())),
                "address" if !self.takes(inner) => cuts.push((with_space(inner), String::new())),
                "boot" if !self.boots(inner) => cuts.push((with_space(inner), String::new())),
                "source" => {
                    // Where libvirt put it this time: numbers of nodes, ports and bridges.
                    let live = ["index", "portid", "bridge"].into_iter().filter(|name| match *name {
                        "bridge" => device.attribute("type") == Some("network"),
                        _ => true,
                    });
                    let found = live.filter_map(|name| inner.attribute_node(name));
                    cuts.extend(found.map(|a| (a.range().start - 1..a.range().end, String::new())));
                }
                _ => {}
            }
        }
        let start = device.range().start;
        let cuts = cuts.into_iter().map(|(r, text)| (r.start - start..r.end - start, text)).collect();
        splice(&self.live_text[device.range()], cuts)
    }

    /// Whether a device that is added may sit there.
    fn takes(&mut self, node: Node) -> bool {
        // A PCI bus other than the first is a controller's.
        if node.attribute("type") == Some("pci") {
            let bus = node.attribute("bus").map_or(Some(0), number);
            let has = |n: u64| self.controllers.iter().any(|(kind, index)| kind == "pci" && number(index) == Some(n));
            if !bus.is_some_and(|n| n == 0 || has(n)) {
                return false;
            }
        }
        self.addresses.insert(address(node))
    }

    /// Whether a device that is added may keep its boot order.
    fn boots(&mut self, node: Node) -> bool {
        let order = node.attribute("order").unwrap_or_default().to_owned();
        self.orders.as_mut().is_some_and(|orders| orders.insert(order))
    }

    fn write(&mut self) -> String {
        let mut edits = std::mem::take(&mut self.edits);
        let last = self.stored.children().rfind(Node::is_element);
        if let Some(last) = last.filter(|_| !self.added.is_empty()) {
            let mut text = String::new();
            for device in &self.added {
                // Writing to a string does not fail.
                let _ = write!(text, "\n    {device}");
            }
            edits.push((last.range().end..last.range().end, text));
        }
        splice(self.stored_text, edits)
    }
}

/// What an operator edited for the next start, as far as a failover shows it.
fn edited(stored: Node, live: Node) -> Vec<String> {
    let text = |root: Node, name| child(root, name).map(|n| text_of(n).trim().to_owned());
    let machine = |root: Node| child(child(root, "os")?, "type")?.attribute("machine").map(str::to_owned);
    let memory = |root: Node| text(root, "memory").and_then(|kib| kib.parse::<u64>().ok()).map(|kib| kib / 1024);
    let model = |root: Node| {
        let cpu = child(root, "cpu")?;
        let mode = cpu.attribute("mode").unwrap_or("custom").to_owned();
        // What a running instance says of `host-model` is what that came to.
        (mode == "custom").then(|| child(cpu, "model").map(|m| text_of(m).trim().to_owned()).unwrap_or_default())
    };
    let vcpus = |root: Node| {
        let vcpu = child(root, "vcpu")?;
        Some(vcpu.attribute("current").map_or_else(|| text_of(vcpu).trim().to_owned(), str::to_owned))
    };
    let mut notes = Vec::new();
    let mut differ = |what: &str, now: Option<String>, next: Option<String>| {
        if let (Some(now), Some(next)) = (now, next)
            && now != next
        {
            notes.push(format!(
                "the definition was edited for the next start: {what} is {now} now and {next} then; a failover is a start, \
                 and has {next}"
            ));
        }
    };
    let mib = |value: Option<u64>| value.map(|mib| format!("{mib} MiB"));
    differ("the memory", mib(memory(live)), mib(memory(stored)));
    differ("the number of processors", vcpus(live), vcpus(stored));
    differ("the machine type", machine(live), machine(stored));
    differ("the processor model", model(live), model(stored));
    notes
}

fn find_disk<'a, 'i>(devices: Node<'a, 'i>, dev: &str) -> Option<Node<'a, 'i>> {
    children(devices, "disk").find(|d| target(*d) == Some(dev))
}

fn is_plain_disk(disk: Node) -> bool {
    disk.attribute("device").is_none_or(|device| device == "disk")
}

fn mac(nic: Node) -> Option<String> {
    Some(child(nic, "mac")?.attribute("address")?.to_ascii_lowercase())
}

fn controller(node: Node) -> (String, String) {
    let of = |name| node.attribute(name).unwrap_or_default().to_owned();
    (of("type"), of("index"))
}

/// The controller that a disk's address is on, as (type, index).
fn needed_controller(device: Node) -> Option<(String, String)> {
    let place = child(device, "address").filter(|a| a.attribute("type") == Some("drive"))?;
    let bus = child(device, "target")?.attribute("bus")?;
    Some((bus.to_owned(), place.attribute("controller").unwrap_or("0").to_owned()))
}

/// An address in one spelling: attributes by name, numbers by value.
fn address(node: Node) -> String {
    let mut parts: Vec<String> = node
        .attributes()
        .filter(|a| a.name() != "multifunction")
        .map(|a| match number(a.value()) {
            Some(n) => format!("{}={n}", a.name()),
            None => format!("{}={}", a.name(), a.value()),
        })
        .collect();
    parts.sort();
    parts.join(" ")
}

/// Decimal, or hexadecimal behind `0x`.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// The element and the white space before it.
fn with_space(node: Node) -> Range<usize> {
    let before = node.prev_sibling().filter(|p| p.is_text() && p.text().is_some_and(|t| t.trim().is_empty()));
    before.map_or(node.range().start, |p| p.range().start)..node.range().end
}

#[cfg(test)]
#[path = "travel_tests.rs"]
mod tests;
