//! The devices of a definition: those that touch the host are made anew, the others go by their rule.

use super::remark::Verdict;
use super::render::{Out, shown};
use super::{Macs, Nics, Rendering, Tpm, rules};
use crate::error::Result;
use crate::hypervisor::releases;
use crate::hypervisor::swtpm::TpmVersion;
use crate::hypervisor::xml::{child, path_text};
use crate::name::{DiskName, DomainUuid};
use crate::recovery::definition::rule::{Check, is_word, number};
use crate::recovery::mapping::Attach;
use roxmltree::Node;
use std::path::PathBuf;

impl Rendering<'_> {
    pub(super) fn devices(&mut self, devices: Node) -> Result<()> {
        self.out.open("devices", &[])?;
        let mut found: Vec<DiskName> = Vec::new();
        let mut graphics = false;
        for node in devices.children().filter(Node::is_element) {
            let name = node.tag_name().name();
            let path = format!("devices/{name}");
            match name {
                _ if node.tag_name().namespace().is_some() => {
                    self.out.remark(&path, rules::FOREIGN.0, rules::FOREIGN.1);
                }
                "disk" => self.disk(node, &mut found)?,
                "interface" => self.interface(node)?,
                "serial" => self.serial(node)?,
                "console" => self.console(node)?,
                "channel" => self.channel(node)?,
                "graphics" => graphics = true,
                "rng" => self.rng(node)?,
                "tpm" => self.tpm(node)?,
                "watchdog" => self.watchdog(node)?,
                "video" => self.video(node)?,
                _ => match rules::DEVICES.iter().find(|r| r.name == name) {
                    Some(rule) => self.out.copy(node, rule, &path)?,
                    None => self.omit(&path),
                },
            }
        }
        if graphics && !self.out.leaves_out("devices/graphics") {
            // Whoever may log in here may look; nobody else, and without the source's password.
            self.out.open("graphics", &[("type", "vnc"), ("port", "-1"), ("autoport", "yes")])?;
            self.out.leaf("listen", &[("type", "address"), ("address", "127.0.0.1")])?;
            self.out.close("graphics");
        }
        for (disk, _) in self.wish.disks.iter().filter(|(d, _)| !found.contains(d)) {
            let why = format!("has no disk '{disk}', which the point has");
            self.out.remark("devices", Verdict::Refused, why);
        }
        self.out.close("devices");
        Ok(())
    }

    fn disk(&mut self, node: Node, found: &mut Vec<DiskName>) -> Result<()> {
        let dev = child(node, "target").and_then(|t| t.attribute("dev")).unwrap_or("");
        let Ok(name) = DiskName::new(dev) else {
            self.out.remark(
                "devices/disk",
                Verdict::Refused,
                format!("is called {}, which is no name of a disk", shown(dev)),
            );
            return Ok(());
        };
        if found.contains(&name) {
            self.out.remark("devices/disk", Verdict::Refused, format!("'{name}' stands twice"));
            return Ok(());
        }
        let image = self.wish.disks.iter().find(|(d, _)| *d == name).map(|(_, image)| image.clone());
        let kind = node.attribute("device").unwrap_or("disk");
        match (image, kind) {
            (Some(image), "disk" | "lun") => {
                if kind == "lun" {
                    let why = format!(
                        "'{name}' is a device of the source's that the guest spoke to itself: here it is a disk"
                    );
                    self.out.remark("devices/disk/@device", Verdict::Missing, why);
                }
                found.push(name);
                self.replicated(node, image)
            }
            (None, "cdrom") => {
                self.out.open("disk", &[("type", "file"), ("device", "cdrom")])?;
                self.inside_of(node, rules::DISK, "devices/disk")?;
                self.out.leaf("readonly", &[])?;
                self.out.close("disk");
                self.out.remark("devices/disk", Verdict::LeftOut, format!("'{name}' is a CD drive: it is empty here"));
                Ok(())
            }
            (None, "floppy") => {
                self.out.remark("devices/disk", Verdict::LeftOut, format!("'{name}' is a floppy drive"));
                Ok(())
            }
            _ => {
                let why = format!("'{name}' is not replicated, so it is not here");
                self.out.remark("devices/disk", Verdict::Missing, why);
                Ok(())
            }
        }
    }

    fn replicated(&mut self, node: Node, image: PathBuf) -> Result<()> {
        const DRIVER: &[(&str, Check)] = &[
            ("discard", Check::OneOf(&["ignore", "unmap"])),
            ("detect_zeroes", Check::OneOf(&["off", "on", "unmap"])),
            ("cache", Check::OneOf(&["none", "writeback", "writethrough", "directsync", "default"])),
            ("queues", Check::Count(1, 256)),
        ];
        let mut driver = vec![("name", "qemu"), ("type", "qcow2")];
        if let Some(source) = child(node, "driver") {
            // What is not in the list is about the source's storage (io, iothread), or unsafe: not worth a word.
            driver.extend(DRIVER.iter().filter_map(|(name, check)| {
                let value = source.attribute(*name)?;
                check.accepts(value).then_some((*name, value))
            }));
        }
        self.out.open("disk", &[("type", "file"), ("device", "disk")])?;
        self.out.leaf("driver", &driver)?;
        self.out.leaf("source", &[("file", path_text(&image)?)])?;
        self.inside_of(node, rules::DISK, "devices/disk")?;
        self.blockio(node)?;
        self.out.close("disk");
        Ok(())
    }

    /// Sizes of blocks that QEMU takes: powers of two, no logical one larger than the physical one, and IDE knows but
    /// one.
    fn blockio(&mut self, disk: Node) -> Result<()> {
        let path = "devices/disk/blockio";
        let Some(node) = child(disk, "blockio").filter(|_| !self.out.leaves_out(path)) else { return Ok(()) };
        let attrs = self.out.attributes(node, path, rules::BLOCKIO);
        let size = |name: &str| attrs.iter().find(|(n, _)| *n == name).and_then(|(_, v)| number(v));
        let logical = size("logical_block_size").unwrap_or(512);
        let physical = size("physical_block_size").unwrap_or(logical);
        let bus = child(disk, "target").and_then(|t| t.attribute("bus")).unwrap_or("");
        let plain = logical == 512 || !matches!(bus, "ide" | "sata");
        if logical.is_power_of_two() && physical.is_power_of_two() && logical <= physical && plain {
            self.out.written.push(path.to_owned());
            return self.out.leaf("blockio", &attrs);
        }
        self.out.remark(path, Verdict::Missing, "is left out: QEMU takes no blocks of these sizes");
        Ok(())
    }

    /// The children of a device that have a rule; of the others the reason that there is.
    fn inside_of(&mut self, node: Node, rules: &[crate::recovery::definition::rule::Rule], path: &str) -> Result<()> {
        for inner in node.children().filter(Node::is_element) {
            let name = inner.tag_name().name();
            let path = format!("{path}/{name}");
            match rules.iter().find(|r| r.name == name) {
                Some(rule) => self.out.copy(inner, rule, &path)?,
                None => self.omit(&path),
            }
        }
        Ok(())
    }

    fn interface(&mut self, node: Node) -> Result<()> {
        let Some(attach) = self.attach(node) else { return Ok(()) };
        let index = self.macs.len();
        let source = child(node, "mac").and_then(|m| m.attribute("address"));
        let mac = match (self.wish.macs, source) {
            (Macs::Keep, Some(mac)) if is_mac(mac) => Some(mac.to_ascii_lowercase()),
            (Macs::Keep, Some(mac)) => {
                self.out.remark("devices/interface/mac", Verdict::Refused, format!("{} is no MAC address", shown(mac)));
                return Ok(());
            }
            // libvirt draws one.
            (Macs::Keep, None) => None,
            (Macs::New(bits), _) => Some(new_mac(bits, index as u64)),
        };
        let (kind, source) = match &attach {
            Attach::Network(name) => ("network", ("network", name.as_str())),
            Attach::Bridge(name) => ("bridge", ("bridge", name.as_str())),
            Attach::None => return Ok(()),
        };
        self.out.open("interface", &[("type", kind)])?;
        if let Some(mac) = &mac {
            self.out.leaf("mac", &[("address", mac)])?;
        }
        self.out.leaf("source", &[source])?;
        self.nic_model(node)?;
        self.inside_of(node, rules::INTERFACE, "devices/interface")?;
        self.out.close("interface");
        self.macs.extend(mac);
        if !self.attached.contains(&attach) {
            self.attached.push(attach);
        }
        Ok(())
    }

    /// libvirt takes any word for the model of a network card, and QEMU knows but these.
    fn nic_model(&mut self, node: Node) -> Result<()> {
        let Some(model) = child(node, "model").and_then(|m| m.attribute("type")) else { return Ok(()) };
        let here = match model {
            // It came with QEMU 8.0; before, its smaller sister.
            "igb" => match self.limits.qemu {
                Some(qemu) if qemu < releases::IGB_SINCE => "e1000e",
                _ => model,
            },
            _ if rules::NIC_MODELS.contains(&model) => model,
            _ => "virtio",
        };
        if here != model {
            let why = format!("is {} at the source, which this host has not: it is '{here}' here", shown(model));
            self.out.remark("devices/interface/model", Verdict::Missing, why);
        }
        self.out.leaf("model", &[("type", here)])
    }

    /// What an interface is attached to here; `None` if it is left out, or refused.
    fn attach(&mut self, node: Node) -> Option<Attach> {
        let kind = node.attribute("type").unwrap_or("");
        let source = |attr| child(node, "source").and_then(|s| s.attribute(attr)).unwrap_or("");
        let called = match kind {
            "network" => source("network").to_owned(),
            "bridge" => format!("bridge:{}", source("bridge")),
            "direct" => format!("direct:{}", source("dev")),
            other => other.to_owned(),
        };
        let path = "devices/interface";
        if kind == "hostdev" {
            self.out.remark(path, Verdict::Missing, "passes a network device of the source's host through");
            return None;
        }
        if let Nics::Isolated(network) = &self.wish.nics {
            return Some(Attach::Network(network.clone()));
        }
        match self.mapping.network(&called) {
            Some(Attach::None) => {
                self.out.remark(
                    path,
                    Verdict::Missing,
                    format!("on {} is left out, as `networks:` says", shown(&called)),
                );
                None
            }
            Some(attach) => Some(attach),
            None => {
                let why = format!(
                    "is on {}, and `networks:` in recovery.yaml does not say what that is here",
                    shown(&called)
                );
                self.out.remark(path, Verdict::Refused, why);
                if !self.unmapped.contains(&called) {
                    self.unmapped.push(called);
                }
                None
            }
        }
    }

    /// libvirt of 9.1 and later writes one of its own into every q35 machine: it is in the chipset, with or without a
    /// word, and an older libvirt does not know the word.
    fn watchdog(&mut self, node: Node) -> Result<()> {
        let path = "devices/watchdog";
        let built_in = node.attribute("model") == Some("itco");
        let ordinary = matches!(node.attribute("action"), None | Some("reset"));
        let unknown = self.limits.libvirt.is_some_and(|v| v < releases::ITCO_SINCE);
        match built_in {
            true if ordinary => Ok(()),
            true if unknown => {
                let why = "is left out: libvirt here is older than 9.1, and does not know the chipset's own";
                self.out.remark(path, Verdict::Missing, why);
                Ok(())
            }
            _ => self.out.copy(node, &rules::WATCHDOG, path),
        }
    }

    /// A screen of a model that this host's QEMU has.
    fn video(&mut self, node: Node) -> Result<()> {
        let path = "devices/video";
        if self.out.leaves_out(path) {
            return Ok(());
        }
        self.out.written.push(path.to_owned());
        self.out.open("video", &[])?;
        self.inside_of(node, rules::VIDEO, path)?;
        if let Some(model) = child(node, "model") {
            let mut attrs = self.out.attributes(model, &format!("{path}/model"), rules::VIDEO_MODEL);
            let videos = &self.limits.videos;
            let kind = attrs.iter().find(|(name, _)| *name == "type").map_or("", |(_, kind)| *kind);
            let here = ["vga", "virtio"].into_iter().find(|m| videos.iter().any(|v| v == m));
            if let (false, Some(here)) = (videos.iter().any(|v| v == kind), here) {
                let why = format!("is {} at the source, which this host has not: it is '{here}' here", shown(kind));
                self.out.remark(&format!("{path}/model"), Verdict::Missing, why);
                attrs.retain(|(name, _)| *name == "primary");
                attrs.insert(0, ("type", here));
            }
            match child(model, "resolution") {
                None => self.out.leaf("model", &attrs)?,
                Some(resolution) => {
                    self.out.open("model", &attrs)?;
                    self.out.copy(resolution, &rules::RESOLUTION, &format!("{path}/model/resolution"))?;
                    self.out.close("model");
                }
            }
        }
        self.out.close("video");
        Ok(())
    }

    /// A serial line, with an end of ours on the host.
    fn serial(&mut self, node: Node) -> Result<()> {
        let console = self.wish.console.clone().filter(|_| !self.serial);
        self.serial = true;
        match console {
            Some(file) => {
                self.out.open("serial", &[("type", "file")])?;
                self.out.leaf("source", &[("path", path_text(&file)?)])?;
            }
            None => self.out.open("serial", &[("type", "pty")])?,
        }
        self.inside_of(node, rules::CHARACTER, "devices/serial")?;
        self.out.close("serial");
        Ok(())
    }

    /// One for a serial line is made by libvirt itself.
    fn console(&mut self, node: Node) -> Result<()> {
        if child(node, "target").and_then(|t| t.attribute("type")) != Some("virtio") {
            return Ok(());
        }
        self.out.open("console", &[("type", "pty")])?;
        self.inside_of(node, rules::CHARACTER, "devices/console")?;
        self.out.close("console");
        Ok(())
    }

    /// The guest agent's channel, or another program's in the guest: libvirt chooses the socket.
    fn channel(&mut self, node: Node) -> Result<()> {
        let target = child(node, "target");
        let name = target.and_then(|t| t.attribute("name")).unwrap_or("");
        let is_socket =
            node.attribute("type") == Some("unix") && target.and_then(|t| t.attribute("type")) == Some("virtio");
        if !is_socket || !is_word(name) {
            self.out.remark("devices/channel", Verdict::LeftOut, format!("{} has an end on the host", shown(name)));
            return Ok(());
        }
        self.guest_agent |= name.starts_with("org.qemu.guest_agent.");
        self.out.open("channel", &[("type", "unix")])?;
        self.out.leaf("target", &[("type", "virtio"), ("name", name)])?;
        self.optional(node, &rules::ADDRESS, "devices/channel")?;
        self.out.close("channel");
        Ok(())
    }

    fn rng(&mut self, node: Node) -> Result<()> {
        let attrs = self.out.attributes(node, "devices/rng", &[("model", Check::Word)]);
        self.out.open("rng", &attrs)?;
        self.out.text("backend", &[("model", "random")], "/dev/urandom")?;
        self.optional(node, &rules::ADDRESS, "devices/rng")?;
        self.out.close("rng");
        Ok(())
    }

    /// An emulated one; its state is put where libvirt looks for it.
    fn tpm(&mut self, node: Node) -> Result<()> {
        let path = "devices/tpm";
        let backend = child(node, "backend").filter(|b| b.attribute("type") == Some("emulator"));
        let Some(backend) = backend else {
            self.out.remark(path, Verdict::Missing, "passes the TPM of the source's host through");
            return Ok(());
        };
        let version = TpmVersion::parse(backend.attribute("version"));
        // libvirt calls a secret as it calls a domain.
        let secret = child(backend, "encryption").map(|e| DomainUuid::new(e.attribute("secret").unwrap_or("")));
        let attrs = self.out.attributes(node, path, &[("model", Check::Word)]);
        self.out.open("tpm", &attrs)?;
        let mut attrs = vec![("type", "emulator"), ("version", version.words())];
        // Whoever removes the domain by hand is not to lose the state with it. We know what of it is ours to remove.
        attrs.extend(backend.attribute("persistent_state").filter(|v| *v == "yes").map(|v| ("persistent_state", v)));
        match &secret {
            None => self.out.leaf("backend", &attrs)?,
            Some(Ok(uuid)) => {
                self.out.open("backend", &attrs)?;
                self.out.leaf("encryption", &[("secret", uuid.as_str())])?;
                self.out.close("backend");
            }
            Some(Err(_)) => {
                self.out.remark(path, Verdict::Refused, "is encrypted, and the secret for that is not named by a UUID");
            }
        }
        self.out.close("tpm");
        let state = self.wish.tpm;
        self.tpm = Some(Tpm { version, state, secret: secret.and_then(Result::ok) });
        if !state {
            self.out.remark(path, Verdict::Missing, "begins empty: the point has no state of it, and what the guest sealed with it asks for its recovery key");
        }
        Ok(())
    }

    fn optional(&mut self, node: Node, rule: &crate::recovery::definition::rule::Rule, path: &str) -> Result<()> {
        match child(node, rule.name) {
            Some(inner) => Out::copy(&mut self.out, inner, rule, &format!("{path}/{}", rule.name)),
            None => Ok(()),
        }
    }
}

fn is_mac(text: &str) -> bool {
    let groups: Vec<&str> = text.split(':').collect();
    groups.len() == 6 && groups.iter().all(|g| g.len() == 2 && g.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// One of QEMU's own range. Interfaces of one domain differ, and those of two drills do, as far as 24 bits can.
fn new_mac(bits: u64, index: u64) -> String {
    let n = bits.wrapping_add(index);
    format!("52:54:00:{:02x}:{:02x}:{:02x}", n >> 16 & 0xff, n >> 8 & 0xff, n & 0xff)
}
