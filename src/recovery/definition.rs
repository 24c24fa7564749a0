//! From the definition that travels with a point to one that starts here. Pure: XML and wishes in, XML and remarks out.
//!
//! The XML is a stranger's: it may name any file, device, program or network of this host. So nothing of it is spliced
//! into what is defined here. Elements on the allow-list are written anew, value by value. We put in whatever reaches
//! the host (disks, networks, emulator, firmware, consoles). The rest is left out with a reason, or refused.
//!
//! Invariants
//! - No path in the result comes from the source but through the operator's mapping.
//! - The disks are exactly those of the point.
//! - What came through reads the same the second time: the result is its own fixed point (but for what is replaced).

mod boot_disk;
mod devices;
pub mod limits;
pub mod remark;
mod render;
mod rule;
mod rules;
mod size;

use crate::error::{Error, Kind, Result, advice, printable};
use crate::hypervisor::machine::Machine;
use crate::hypervisor::swtpm::TpmVersion;
use crate::hypervisor::xml::{child, children, document, domain_element, path_text, text_of};
use crate::name::{DiskName, DomainName, DomainUuid};
use crate::recovery::mapping::{Attach, Mapping};
use boot_disk::boot_disk;
use limits::Limits;
use remark::{Remark, Verdict};
use render::{LeaveOut, Out, path_of, shown};
use roxmltree::Node;
use rule::{Check, is_word};
use size::Size;
use std::path::{Path, PathBuf};

/// Largest definition that is read, in bytes. Real ones are some ten KiB.
pub const DEFINITION_MAX: usize = 256 << 10;

/// Deepest nesting that is read.
const DEPTH_MAX: usize = 32;

/// What is put in the place of what the source had.
#[derive(Debug, Clone)]
pub struct Wish<'a> {
    /// Name in the new definition. A drill uses a name of its own.
    pub name: DomainName,
    /// UUID in the new definition. A drill uses a UUID of its own.
    pub uuid: DomainUuid,
    /// Every disk of the point, with the qcow2 image that the guest is to write to.
    pub disks: &'a [(DiskName, PathBuf)],
    /// Where the network interfaces are attached: by the mapping, or all to one isolated network.
    pub nics: Nics,
    /// Whether the interfaces keep the source's MAC addresses or get new ones.
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

/// Which MAC addresses the interfaces of the new definition get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Macs {
    /// Each interface keeps its MAC address from the source.
    Keep,
    /// Made of these random bits, different for each interface.
    New(u64),
}

/// A definition for this host, and what it asks of it.
#[derive(Debug, Clone)]
pub struct Definition {
    xml: String,
    /// Domain type, architecture and machine type in the new definition; this host's QEMU must support them.
    pub machine: Machine,
    /// The model that the guest's processor has to have; `None`: one of the host's choice, or the host's own.
    pub cpu: Option<String>,
    /// Memory of the guest in bytes; 0 if the source's definition gives no usable size.
    pub memory_bytes: u64,
    /// Number of virtual processors of the guest; 1 if the source's definition gives no usable number.
    pub vcpus: u64,
    /// Networks and bridges of this host that the interfaces use, each listed once.
    pub attached: Vec<Attach>,
    /// MAC addresses in the new definition, in lower case. An interface whose address libvirt chooses has none here.
    pub macs: Vec<String>,
    /// The guest boots with UEFI firmware.
    pub uefi: bool,
    /// The source's definition asks for secure boot. Only set together with `uefi`.
    pub secure_boot: bool,
    /// The emulated TPM of the new definition. `None`: the definition has none.
    pub tpm: Option<Tpm>,
    /// It has a channel for the guest agent.
    pub guest_agent: bool,
    /// It has a serial line.
    pub serial: bool,
    /// Images that a disk may consist of here; `None`: as many as there are.
    pub images_max: Option<u64>,
    /// Sources of interfaces that nobody has said of what they are here.
    pub unmapped: Vec<String>,
    /// The disk that the guest boots from, if it boots from a disk. It may be in no point.
    pub boot_disk: Option<DiskName>,
    /// Elements of the source's definition that did not come through unchanged, each with the reason.
    pub remarks: Vec<Remark>,
    /// Paths of the elements that came through by their rule: what could be left out, if libvirt refuses it.
    written: Vec<String>,
}

/// An emulated TPM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tpm {
    /// Version of the TPM, 1.2 or 2.0.
    pub version: TpmVersion,
    /// Its state comes with the point.
    pub state: bool,
    /// Its state is encrypted with this secret of libvirt's.
    pub secret: Option<DomainUuid>,
}

impl Definition {
    /// What could be left out, that which `said` speaks of first: libvirt names the word that it does not know.
    pub fn candidates(&self, said: &str) -> Vec<String> {
        let speaks = |path: &String| {
            let name = path.rsplit(['/', '[']).next().unwrap_or(path).trim_end_matches(']');
            said.contains(name)
        };
        let (mut named, others): (Vec<_>, Vec<_>) = self.written.iter().cloned().partition(speaks);
        // A part before the whole.
        named.sort_by_key(|path| std::cmp::Reverse(path.matches('/').count()));
        let mut all: Vec<String> = Vec::new();
        for path in named.into_iter().chain(others) {
            if !rules::ALWAYS.contains(&path.as_str()) && !all.contains(&path) {
                all.push(path);
            }
        }
        all
    }

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
                .advise(advice::Failover::AskReady)),
        }
    }
}

/// Reads the source's definition and writes the one for a host that nobody has asked yet: see [`render_for`].
pub fn render(xml: &str, wish: &Wish, mapping: &Mapping) -> Result<Definition> {
    render_for(xml, wish, mapping, &Limits::default())
}

/// Reads the source's definition and writes the one for this host. An error: it is no domain's XML. What cannot be used
/// of it, and what was left out, is in the remarks.
pub fn render_for(xml: &str, wish: &Wish, mapping: &Mapping, limits: &Limits) -> Result<Definition> {
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
        limits,
        size: Size::of(root, limits),
        out: Out::without(left_out(root, mapping, limits)),
        attached: Vec::new(),
        unmapped: Vec::new(),
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
        memory_bytes: state.size.memory_bytes.unwrap_or(0),
        vcpus: state.size.vcpus.unwrap_or(1),
        images_max: limits.images_max,
        unmapped: state.unmapped,
        written: state.out.written,
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

/// What is left out although it is known: what the operator of this host says, what libvirt here refuses, and what a
/// processor that is emulated cannot do.
fn left_out(root: Node, mapping: &Mapping, limits: &Limits) -> Vec<LeaveOut> {
    let by_hand = mapping.leave_out.iter().map(|what| LeaveOut {
        what: what.clone(),
        why: "is left out, as `leave_out:` in recovery.yaml says".to_owned(),
    });
    let emulated = (root.attribute("type") == Some("qemu")).then(|| LeaveOut {
        what: "features/hyperv".to_owned(),
        why: "is left out: only KVM can offer it to a guest".to_owned(),
    });
    by_hand.chain(limits.without.iter().cloned()).chain(emulated).collect()
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
    limits: &'a Limits,
    size: Size,
    out: Out,
    attached: Vec<Attach>,
    unmapped: Vec<String>,
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
        self.size.remarks.drain(..).for_each(|r| self.out.remark(&r.what, r.verdict, r.why));
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
                "vcpu" | "memory" | "currentMemory" | "maxMemory" => self.sized(name)?,
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

    /// What [`Size`] has found, in our own words.
    fn sized(&mut self, name: &str) -> Result<()> {
        let kib = |bytes: u64| (bytes >> 10).to_string();
        let size = &self.size;
        match name {
            "vcpu" => {
                let current = size.vcpus_current.map(|n| n.to_string());
                let mut attrs = vec![("placement", "static")];
                attrs.extend(current.as_deref().map(|n| ("current", n)));
                self.out.text(name, &attrs, &size.vcpus.unwrap_or(1).to_string())
            }
            "maxMemory" => match size.hotplug {
                Some((bytes, slots)) => {
                    self.out.text(name, &[("slots", &slots.to_string()), ("unit", "KiB")], &kib(bytes))
                }
                None => Ok(()),
            },
            _ => {
                let bytes = if name == "memory" { size.memory_bytes } else { size.current_bytes };
                bytes.map_or(Ok(()), |bytes| self.out.text(name, &[("unit", "KiB")], &kib(bytes)))
            }
        }
    }

    /// An element without a rule: left out for the reason that there is, or because nobody knows it.
    fn omit(&mut self, path: &str) {
        if !rules::SILENT.contains(&path) {
            self.out.unknown(path);
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
            return loader.map_or(Ok(()), |loader| self.rom(loader));
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

    /// Firmware that is no UEFI, from a file of the host: of ours, if the operator says which.
    fn rom(&mut self, loader: Node) -> Result<()> {
        let source = text_of(loader);
        match self.mapping.path(Path::new(source.trim())) {
            Some(path) => self.out.text("loader", &[("type", "rom")], path_text(&path)?),
            None => {
                let why = format!(
                    "names a file of the source's host as firmware, {}, that `paths:` does not map",
                    shown(&source)
                );
                self.out.remark("os/loader", Verdict::Refused, why);
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
                self.out.remark(
                    "os/cmdline",
                    Verdict::Missing,
                    "is left out: it is too long, or holds control characters",
                );
                Ok(())
            }
        }
    }

    fn smbios(&mut self, node: Node) -> Result<()> {
        let root = node.ancestors().find(|n| n.has_tag_name("domain"));
        let mut infos = root.into_iter().flat_map(|root| children(root, "sysinfo"));
        let has_info = infos.any(|info| info.attribute("type") == Some("smbios"));
        match node.attribute("mode") {
            Some("sysinfo") if !has_info => {
                self.out.remark("os/smbios", Verdict::LeftOut, "shows the guest a table that is not there");
                Ok(())
            }
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
            // "full" is the very processor that QEMU made at the source, bit by bit.
            ("check", Check::Replaced(&["none", "partial"], &[("full", "partial")])),
            ("migratable", Check::Switch),
        ];
        let mut attrs = self.out.attributes(cpu, "cpu", ATTRS);
        self.cpu_mode(&mut attrs);
        let mode = attrs.iter().find(|(name, _)| *name == "mode").map(|(_, mode)| *mode);
        self.out.open("cpu", &attrs)?;
        let has_model = match child(cpu, "model") {
            Some(model) => self.model(model)?,
            None => false,
        };
        for node in cpu.children().filter(Node::is_element).filter(|n| !n.has_tag_name("model")) {
            let name = node.tag_name().name();
            let path = path_of(node, "cpu");
            match name {
                "topology" => self.topology()?,
                "numa" if self.size.numa => self.out.copy(node, &rules::NUMA, &path)?,
                "numa" => {}
                // They change a model, and QEMU's own choice is none.
                "feature" | "vendor"
                    if !has_model && !matches!(mode, Some("host-model" | "host-passthrough" | "maximum")) =>
                {
                    self.out.remark(&path, Verdict::Missing, "is left out: it goes with a model, and there is none");
                }
                _ => match rules::CPU.iter().find(|r| r.name == name) {
                    Some(rule) => self.out.copy(node, rule, &path)?,
                    None => self.omit(&path),
                },
            }
        }
        self.out.close("cpu");
        Ok(())
    }

    /// The mode that this host has in the place of one that it has not.
    fn cpu_mode(&mut self, attrs: &mut Vec<(&str, &str)>) {
        let Some(at) = attrs.iter().position(|(name, _)| *name == "mode") else { return };
        let source = attrs[at].1;
        match self.limits.cpu_mode(source) {
            Some(mode) if mode == source => {}
            Some(mode) => {
                attrs[at].1 = mode;
                let why = format!(
                    "is '{source}' at the source, which this host cannot show such a guest: it is '{mode}' here"
                );
                self.out.remark("cpu/@mode", Verdict::Missing, why);
            }
            None => {
                attrs.clear();
                let why = format!("is left out: this host cannot show such a guest a processor '{source}'");
                self.out.remark("cpu/@mode", Verdict::Missing, why);
            }
        }
    }

    /// Whether there is one.
    fn model(&mut self, model: Node) -> Result<bool> {
        let mut attrs = self.out.attributes(
            model,
            "cpu/model",
            &[("fallback", Check::OneOf(&["allow", "forbid"])), ("vendor_id", Check::Word)],
        );
        let source = text_of(model).trim().to_owned();
        let here = self.mapping.cpus.get(&source).cloned().unwrap_or(source);
        match (here.as_str(), is_word(&here)) {
            ("", _) => attrs.clear(),
            (name, true) => {
                self.out.text("model", &attrs, name)?;
                return Ok(true);
            }
            (name, false) => self.out.remark(
                "cpu/model",
                Verdict::Missing,
                format!("is left out: {} is not a plain word", shown(name)),
            ),
        }
        Ok(false)
    }

    fn topology(&mut self) -> Result<()> {
        let Some([sockets, dies, cores, threads]) = self.size.topology else { return Ok(()) };
        if self.out.leaves_out("cpu/topology") {
            return Ok(());
        }
        let [sockets, dies, cores, threads] = [sockets, dies, cores, threads].map(|n| n.to_string());
        let mut attrs = vec![("sockets", sockets.as_str()), ("cores", cores.as_str()), ("threads", threads.as_str())];
        if dies != "1" {
            attrs.insert(1, ("dies", dies.as_str()));
        }
        self.out.written.push("cpu/topology".to_owned());
        self.out.leaf("topology", &attrs)
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

#[cfg(test)]
#[path = "definition_tests.rs"]
mod tests;
