//! From the definition that travels with a point to one that can be started here. Pure: XML and wishes in, XML and remarks
//! out.
//!
//! The XML is a stranger's: it may name any file, device, program or network of this host. So nothing of it is spliced into
//! what is defined here. Elements on the allow-list are written anew, value by value; whatever reaches the host (disks, networks,
//! emulator, firmware, consoles) is put in by us; all the rest is left out, with a reason, or refused.
//!
//! Invariants
//! - No path in the result comes from the source but through the operator's mapping.
//! - The disks are exactly those of the point.
//! - What came through reads the same the second time: the result is its own fixed point (but for what is replaced).

mod devices;
pub mod remark;
mod render;
mod rules;

use crate::error::{Error, Kind, Result, printable};
use crate::hypervisor::machine::Machine;
use crate::hypervisor::swtpm::TpmVersion;
use crate::hypervisor::xml::{child, children, document, domain_element, path_text, text_of};
use crate::name::{DiskName, DomainName, DomainUuid};
use crate::recovery::mapping::{Attach, Mapping};
use remark::{Remark, Verdict};
use render::{Check, Out, is_word, shown};
use roxmltree::Node;
use std::path::{Path, PathBuf};

/// Largest definition that is read, in bytes. Real ones are some ten KiB.
pub const DEFINITION_MAX: usize = 256 << 10;

/// Deepest nesting that is read.
const DEPTH_MAX: usize = 32;

/// What is put in the place of what the source had.
#[derive(Debug, Clone)]
pub struct Wish<'a> {
    pub name: DomainName,
    pub uuid: DomainUuid,
    /// Every disk of the point, with the qcow2 image that the guest is to write to.
    pub disks: &'a [(DiskName, PathBuf)],
    pub nics: Nics,
    pub macs: Macs,
    /// The first serial line writes to this file; without it, it is a terminal of libvirt's (`virsh console`).
    pub console: Option<PathBuf>,
    /// A copy of the UEFI variables, if the point has any.
    pub nvram: Option<PathBuf>,
    /// The point has the state of the TPM.
    pub tpm: bool,
}

/// What network interfaces are attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Nics {
    /// What the mapping says.
    Mapped,
    /// All of them to this one of libvirt's networks.
    Isolated(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Macs {
    Keep,
    /// Made of these random bits, different for each interface.
    New(u64),
}

/// A definition for this host, and what it asks of it.
#[derive(Debug, Clone)]
pub struct Definition {
    xml: String,
    pub machine: Machine,
    /// The model that the guest's processor has to have; `None`: one of the host's choice, or the host's own.
    pub cpu: Option<String>,
    pub memory_bytes: u64,
    pub attached: Vec<Attach>,
    pub macs: Vec<String>,
    pub uefi: bool,
    pub secure_boot: bool,
    pub tpm: Option<Tpm>,
    /// It has a channel for the guest agent.
    pub guest_agent: bool,
    /// It has a serial line.
    pub serial: bool,
    /// The disk that the guest boots from, if it boots from a disk. It may be in no point.
    pub boot_disk: Option<DiskName>,
    pub remarks: Vec<Remark>,
}

/// An emulated TPM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tpm {
    pub version: TpmVersion,
    /// Its state comes with the point.
    pub state: bool,
    /// Its state is encrypted with this secret of libvirt's.
    pub secret: Option<DomainUuid>,
}

impl Definition {
    /// The XML, if nothing of it was refused.
    pub fn xml(&self) -> Result<&str> {
        let refused: Vec<String> = self
            .remarks
            .iter()
            .filter(|r| r.verdict == Verdict::Refused)
            .map(|r| format!("{} {}", r.what, r.why))
            .collect();
        match refused.as_slice() {
            [] => Ok(&self.xml),
            all => Err(Error::new(Kind::Refused, format!("the definition cannot be used here: {}", all.join("; ")))
                .hint("`virt-replica ready DOMAIN` says what to do about each")),
        }
    }
}

/// Reads the source's definition and writes the one for this host. An error: it is no domain's XML. What cannot be used of
/// it, and what was left out, is in the remarks.
pub fn render(xml: &str, wish: &Wish, mapping: &Mapping) -> Result<Definition> {
    if xml.len() > DEFINITION_MAX {
        let what = format!("the definition has {} bytes; at most {DEFINITION_MAX} are read", xml.len());
        return Err(Error::new(Kind::Refused, what));
    }
    let doc = document(xml)?;
    let root = domain_element(&doc)?;
    if root.descendants().any(|n| n.ancestors().nth(DEPTH_MAX).is_some()) {
        return Err(Error::new(Kind::Refused, format!("the definition is nested more than {DEPTH_MAX} deep")));
    }
    let mut state = Rendering {
        wish,
        mapping,
        out: Out::default(),
        attached: Vec::new(),
        macs: Vec::new(),
        guest_agent: false,
        serial: false,
        tpm: None,
    };
    let virt_type = state.domain_type(root);
    state.out.open("domain", &[("type", virt_type.as_str())])?;
    state.out.text("name", &[], wish.name.as_str())?;
    state.out.text("uuid", &[], wish.uuid.as_str())?;
    let boot = state.top(root)?;
    state.out.close("domain");
    let Boot { arch, machine, uefi, secure_boot } = boot;
    Ok(Definition {
        machine: Machine { virt_type, arch, machine },
        cpu: state.cpu_model(root),
        memory_bytes: memory_bytes(root),
        attached: state.attached,
        macs: state.macs,
        uefi,
        secure_boot,
        tpm: state.tpm,
        guest_agent: state.guest_agent,
        serial: state.serial,
        boot_disk: boot_disk(root),
        xml: state.out.xml,
        remarks: state.out.remarks,
    })
}

/// The disk that a guest boots from: the first by its own order, or the first of all where `<os>` says `hd`, or nothing. A guest
/// that is booted by its kernel needs none to begin.
fn boot_disk(root: Node) -> Option<DiskName> {
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

/// How the guest boots.
#[derive(Default)]
struct Boot {
    arch: String,
    machine: String,
    uefi: bool,
    secure_boot: bool,
}

/// A definition that is being written.
struct Rendering<'a> {
    wish: &'a Wish<'a>,
    mapping: &'a Mapping,
    out: Out,
    attached: Vec<Attach>,
    macs: Vec<String>,
    guest_agent: bool,
    serial: bool,
    tpm: Option<Tpm>,
}

impl Rendering<'_> {
    fn domain_type(&mut self, root: Node) -> String {
        match root.attribute("type") {
            Some(kind @ ("kvm" | "qemu")) => kind.to_owned(),
            other => {
                let why = format!("{} is no kind of domain that QEMU runs", shown(other.unwrap_or("")));
                self.out.remark("@type", Verdict::Refused, why);
                "qemu".to_owned()
            }
        }
    }

    /// The children of `<domain>`. libvirt takes the first of two elements of a name: here, that is nobody's to guess.
    fn top(&mut self, root: Node) -> Result<Boot> {
        let mut boot = Boot::default();
        let mut seen: Vec<&str> = Vec::new();
        for node in root.children().filter(Node::is_element) {
            let name = node.tag_name().name();
            if node.tag_name().namespace().is_some() {
                let path = printable(name, 40);
                self.out.remark(&path, rules::FOREIGN.0, rules::FOREIGN.1);
                continue;
            }
            if seen.contains(&name) && name != "seclabel" && name != "sysinfo" {
                self.out.remark(name, Verdict::Refused, "stands twice");
                continue;
            }
            seen.push(name);
            match name {
                "os" => boot = self.os(node)?,
                "cpu" => self.cpu(node)?,
                "devices" => self.devices(node)?,
                "sysinfo" => self.sysinfo(node)?,
                "genid" => self.out.leaf("genid", &[])?,
                _ => match rules::TOP.iter().find(|r| r.name == name) {
                    Some(rule) => self.out.copy(node, rule, name)?,
                    None => self.omit(name),
                },
            }
        }
        for needed in ["os", "devices", "memory"] {
            if !seen.contains(&needed) {
                self.out.remark(needed, Verdict::Refused, "is missing");
            }
        }
        Ok(boot)
    }

    /// An element without a rule: left out for the reason that there is, or because nobody knows it.
    fn omit(&mut self, path: &str) {
        if rules::SILENT.contains(&path) {
            return;
        }
        match rules::REASONS.iter().find(|(p, ..)| *p == path) {
            Some((_, verdict, why)) => self.out.remark(path, *verdict, *why),
            None => self.out.remark(&printable(path, 80), Verdict::LeftOut, "is not known to be harmless here"),
        }
    }

    fn os(&mut self, os: Node) -> Result<Boot> {
        let kind = child(os, "type");
        let arch = kind.and_then(|t| t.attribute("arch")).unwrap_or("x86_64");
        let source_machine = kind.and_then(|t| t.attribute("machine")).unwrap_or("");
        let machine = self.mapping.machines.get(source_machine).map_or(source_machine, String::as_str);
        for (what, value) in [("os/type/@arch", arch), ("os/type/@machine", machine)] {
            if !is_word(value) {
                self.out.remark(what, Verdict::Refused, format!("{} is not a plain word", shown(value)));
            }
        }
        if kind.is_none_or(|t| text_of(t).trim() != "hvm") {
            self.out.remark("os/type", Verdict::Refused, "is no machine that QEMU emulates whole (hvm)");
        }
        let loader = child(os, "loader");
        let uefi =
            os.attribute("firmware") == Some("efi") || loader.is_some_and(|l| l.attribute("type") == Some("pflash"));
        let secure_boot =
            uefi && (loader.is_some_and(|l| l.attribute("secure") == Some("yes")) || asks_for_secure_boot(os));
        self.out.open("os", if uefi { &[("firmware", "efi")] } else { &[] })?;
        // Refused values are not written, not even into XML that nobody gets.
        let word = |value| if is_word(value) { value } else { "refused" };
        self.out.text("type", &[("arch", word(arch)), ("machine", word(machine))], "hvm")?;
        self.firmware(loader, uefi, secure_boot)?;
        for node in os.children().filter(Node::is_element) {
            let name = node.tag_name().name();
            let path = format!("os/{name}");
            match name {
                "type" | "loader" | "firmware" => {}
                "kernel" | "initrd" => self.boot_file(node, name)?,
                // Words for the guest's kernel; without a kernel nobody hears them.
                "cmdline" if child(os, "kernel").is_some() => self.cmdline(node)?,
                "smbios" => self.smbios(node)?,
                "nvram" if self.wish.nvram.is_some() => {}
                _ => match rules::OS.iter().find(|r| r.name == name) {
                    Some(rule) => self.out.copy(node, rule, &path)?,
                    None => self.omit(&path),
                },
            }
        }
        self.out.close("os");
        Ok(Boot { arch: word(arch).to_owned(), machine: word(machine).to_owned(), uefi, secure_boot })
    }

    /// The build of the firmware is this host's: libvirt chooses it.
    fn firmware(&mut self, loader: Option<Node>, uefi: bool, secure_boot: bool) -> Result<()> {
        if !uefi {
            if loader.is_some() {
                self.out.remark("os/loader", Verdict::Refused, "names a file of the source's host as firmware");
            }
            return Ok(());
        }
        if secure_boot {
            self.out.leaf("loader", &[("secure", "yes")])?;
        }
        match &self.wish.nvram {
            Some(nvram) => self.out.text("nvram", &[], path_text(nvram)?),
            None => {
                self.out.remark(
                    "os/nvram",
                    Verdict::Missing,
                    "holds UEFI variables, and the point has none: the firmware starts with fresh ones",
                );
                Ok(())
            }
        }
    }

    /// A kernel or initrd that QEMU loads from a file of the host: of ours, if the operator says which.
    fn boot_file(&mut self, node: Node, name: &str) -> Result<()> {
        let source = text_of(node);
        match self.mapping.path(Path::new(source.trim())) {
            Some(path) => self.out.text(name, &[], path_text(&path)?),
            None => {
                let why = format!("names a file of the source's host, {}, that `paths:` does not map", shown(&source));
                self.out.remark(&format!("os/{name}"), Verdict::Refused, why);
                Ok(())
            }
        }
    }

    fn cmdline(&mut self, node: Node) -> Result<()> {
        let line = text_of(node);
        match line.len() <= 4096 && !line.chars().any(char::is_control) {
            true => self.out.text("cmdline", &[], &line),
            false => {
                self.out.remark("os/cmdline", Verdict::Refused, "is too long, or holds control characters");
                Ok(())
            }
        }
    }

    fn smbios(&mut self, node: Node) -> Result<()> {
        match node.attribute("mode") {
            Some(mode @ ("emulate" | "sysinfo")) => self.out.leaf("smbios", &[("mode", mode)]),
            _ => {
                self.out.remark(
                    "os/smbios",
                    Verdict::Missing,
                    "shows the guest the serial numbers of the source's host",
                );
                Ok(())
            }
        }
    }

    fn sysinfo(&mut self, node: Node) -> Result<()> {
        if node.attribute("type") != Some("smbios") {
            self.out.remark("sysinfo", Verdict::Missing, "hands files of the host to the guest's firmware");
            return Ok(());
        }
        self.out.open("sysinfo", &[("type", "smbios")])?;
        self.out.children(node, rules::SYSINFO, "sysinfo")?;
        self.out.close("sysinfo");
        Ok(())
    }

    fn cpu(&mut self, cpu: Node) -> Result<()> {
        const ATTRS: &[(&str, Check)] = &[
            ("mode", Check::OneOf(&["custom", "host-model", "host-passthrough", "maximum"])),
            ("match", Check::OneOf(&["minimum", "exact", "strict"])),
            ("check", Check::OneOf(&["none", "partial", "full"])),
            ("migratable", Check::Switch),
        ];
        let attrs = self.out.attributes(cpu, "cpu", ATTRS);
        self.out.open("cpu", &attrs)?;
        if let Some(model) = child(cpu, "model") {
            let mut attrs = self.out.attributes(
                model,
                "cpu/model",
                &[("fallback", Check::OneOf(&["allow", "forbid"])), ("vendor_id", Check::Word)],
            );
            let source = text_of(model).trim().to_owned();
            let here = self.mapping.cpus.get(&source).cloned().unwrap_or(source);
            match (here.as_str(), is_word(&here)) {
                ("", _) => attrs.clear(),
                (name, true) => self.out.text("model", &attrs, name)?,
                (name, false) => {
                    self.out.remark("cpu/model", Verdict::Refused, format!("{} is not a plain word", shown(name)))
                }
            }
        }
        for node in cpu.children().filter(Node::is_element).filter(|n| !n.has_tag_name("model")) {
            let name = node.tag_name().name();
            match rules::CPU.iter().find(|r| r.name == name) {
                Some(rule) => self.out.copy(node, rule, &format!("cpu/{name}"))?,
                None => self.omit(&format!("cpu/{name}")),
            }
        }
        self.out.close("cpu");
        Ok(())
    }

    /// The model that this host's QEMU has to know; as written into the definition.
    fn cpu_model(&self, root: Node) -> Option<String> {
        let cpu = child(root, "cpu")?;
        let custom = cpu.attribute("mode").unwrap_or("custom") == "custom";
        let source = text_of(child(cpu, "model").filter(|_| custom)?).trim().to_owned();
        let here = self.mapping.cpus.get(&source).cloned().unwrap_or(source);
        is_word(&here).then_some(here)
    }
}

/// `<firmware><feature enabled='yes' name='secure-boot'/></firmware>`.
fn asks_for_secure_boot(os: Node) -> bool {
    let features = child(os, "firmware").into_iter().flat_map(|f| f.children());
    features
        .filter(|f| f.has_tag_name("feature"))
        .any(|f| f.attribute("name") == Some("secure-boot") && f.attribute("enabled") == Some("yes"))
}

/// What the guest is given at the start; 0 if the definition does not say it in a way that libvirt takes.
fn memory_bytes(root: Node) -> u64 {
    let Some(memory) = child(root, "memory") else { return 0 };
    let Ok(count) = text_of(memory).trim().parse::<u64>() else { return 0 };
    let unit = match memory.attribute("unit").unwrap_or("KiB") {
        "b" | "bytes" => 1,
        "KB" => 1000,
        "k" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "TB" => 1_000_000_000_000,
        "T" | "TiB" => 1 << 40,
        _ => return 0,
    };
    count.saturating_mul(unit)
}

#[cfg(test)]
#[path = "definition_tests.rs"]
mod tests;
