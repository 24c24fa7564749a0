//! Whether a domain could be brought up here, and what is missing. Pure: a definition and a view of the host in, one
//! finding for each question out. A red one keeps a failover from being tried; every red one says what to do.

use super::definition::Definition;
use super::definition::remark::{Remark, Verdict};
use super::fitting::Fitted;
use super::mapping::{Attach, Mapping};
use crate::error::advice::{self, Advice};
use crate::error::{Context, Error, Words};
use crate::hypervisor::firmware::Firmware;
use crate::hypervisor::machine::{Capabilities, HostView};
use crate::hypervisor::releases;
use crate::hypervisor::swtpm::{self, Programs};
use crate::name::{DomainName, DomainUuid};
use crate::recovery::record::Copied;
use crate::replica::left_out::Cause;
use crate::replica::{PointView, ReplicaView};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Memory that this host's own programs keep, on top of what the guest is given.
const MEMORY_SPARE: u64 = 64 << 20;

/// Below so much free room for the overlays a start is asking for trouble: the guest is paused when it runs out.
const ROOM_MIN: u64 = 1 << 30;

/// What is said where a state is in the way.
const TPM_IS_HERE: &str = "the state of a TPM of this very domain is here";

/// The answer to one question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The question that this finding answers.
    pub question: Question,
    /// Whether the answer is good, needs attention, or prevents the failover.
    pub color: Color,
    /// A sentence.
    pub what: String,
    /// What to do, in words: plain ones, or those of the program that sent the finding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
    /// What to do, as facts, where the words name commands. A red finding has this, or the words, or both.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "Advice::known")]
    pub advised: Option<Advice>,
}

impl Finding {
    /// The error with this finding's advice.
    pub fn advise(&self, error: Error) -> Error {
        match (&self.advised, &self.advice) {
            (Some(advised), _) => error.advise(advised.clone()),
            (None, Some(words)) => error.hint(words.clone()),
            (None, None) => error,
        }
    }

    /// With the advice in this program's words. `words`: `None` for a program without any.
    pub fn spoken(self, words: Option<Words>) -> Finding {
        let said = self.advised.as_ref().zip(words).map(|(advised, words)| words(advised, &Context::default()));
        Finding { advice: said.or(self.advice), ..self }
    }
}

/// Severity of a finding. The order is from harmless to serious.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Color {
    /// Nothing is in the way.
    Green,
    /// The domain can be brought up, but the operator should know something first.
    Yellow,
    /// The failover or drill is refused until the operator acts on the advice.
    Red,
}

/// One thing that must fit before a domain can be brought up here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// Whether the recovery point is whole, has all disks, and has a chain that this libvirt can start.
    Point,
    /// Whether this host runs the machine type and architecture, and whether libvirt accepts the definition.
    Machine,
    /// Whether this host offers the processor model and has as many processors as the guest.
    Cpu,
    /// Whether this host has UEFI firmware, with secure boot if needed, and which build it is.
    Firmware,
    /// Whether this host can emulate the TPM and read the state that comes with the point.
    Tpm,
    /// Whether the networks and bridges that the interfaces use exist here and are started.
    Network,
    /// Whether an element of the source's definition is left out or refused; one finding for each remark.
    Devices,
    /// Whether another domain on this host has the same name.
    Name,
    /// Whether a domain of another name on this host has the same UUID.
    Uuid,
    /// Whether another domain on this host has one of the MAC addresses.
    Mac,
    /// Whether this host has enough free memory for the guest.
    Memory,
    /// Whether the directory for the overlays exists, is writable and has free space.
    Room,
}

impl Question {
    /// Gives the question's name in messages, for example `MAC addresses`.
    pub fn words(self) -> &'static str {
        match self {
            Question::Point => "point",
            Question::Machine => "machine",
            Question::Cpu => "processor",
            Question::Firmware => "firmware",
            Question::Tpm => "TPM",
            Question::Network => "networks",
            Question::Devices => "devices",
            Question::Name => "name",
            Question::Uuid => "UUID",
            Question::Mac => "MAC addresses",
            Question::Memory => "memory",
            Question::Room => "room",
        }
    }
}

/// Where the overlays are to lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// Directory where the overlays of a failover or drill lie.
    pub dir: PathBuf,
    /// `None`: there is no such directory.
    pub free_bytes: Option<u64>,
}

/// The builds of the UEFI firmware; `None`: not known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Builds {
    /// Build that the source boots from, as the point carries it. `None`: the point does not say.
    pub source: Option<Firmware>,
    /// Build that libvirt on this host would choose. `None`: libvirt does not say, or the file cannot be read.
    pub here: Option<Firmware>,
}

/// Answers every question about a failover of a definition that was fitted to this host, and bears this name and UUID.
pub fn judge(fitted: &Fitted, name: &DomainName, uuid: &DomainUuid, room: &Room, builds: &Builds) -> Vec<Finding> {
    let Fitted { definition, host, refused } = fitted;
    let mut findings = vec![machine(definition, host, refused.as_deref())];
    if let Ok(capabilities) = &host.machine {
        findings.extend(cpu(definition, capabilities));
        findings.extend(firmware(definition, capabilities, builds));
        findings.extend(tpm(definition, uuid, host, capabilities));
    }
    findings.extend(processors(definition, host));
    findings.extend(networks(definition, host));
    findings.extend(definition.remarks.iter().map(device));
    findings.extend(collisions(definition, name, uuid, host));
    findings.push(memory(definition, host));
    findings.push(room_for(room));
    findings
}

/// What a chain that is too long for this host's libvirt costs: the uppermost images are copied before the guest
/// starts.
pub fn chain(fitted: &Fitted, copied: Copied, room: &Room) -> Option<Finding> {
    let max = fitted.definition.images_max.filter(|_| copied.bytes > 0 || copied.images > 0)?;
    let libvirt = match fitted.host.libvirt {
        Some((major, minor, release)) => format!("libvirt {major}.{minor}.{release} here"),
        None => "the libvirt here, of a version that nobody knows,".to_owned(),
    };
    let mib = copied.bytes.div_ceil(1 << 20);
    let what = format!(
        "a disk of the point consists of {} images, and {libvirt} starts {max} at most: the uppermost {} are copied first, up to {mib} MiB",
        copied.deepest, copied.images
    );
    let free = room.free_bytes.unwrap_or(0);
    if free < copied.bytes.saturating_add(ROOM_MIN) {
        let advice =
            format!("make room in {}, or name another directory as `images:` in recovery.yaml", room.dir.display());
        return Some(red(Question::Point, format!("{what}; {} MiB are free there", free >> 20), advice));
    }
    Some(yellow(Question::Point, what, advice::Failover::ShortenChain))
}

/// Whether what emulates TPMs here reads what the source's has written. `None`: there is nothing to say.
pub fn tpm_programs(fitted: &Fitted, point: &PointView) -> Option<Finding> {
    fitted.definition.tpm.as_ref().filter(|tpm| tpm.state)?;
    let said = point.tpm_programs.clone()?;
    let source = Programs { swtpm: said.swtpm, libtpms: said.libtpms };
    let here = fitted.host.tpm_programs.as_ref()?;
    let version = |text: &Option<String>| text.as_deref().and_then(releases::parse_version);
    let library = version(&source.libtpms).zip(version(&here.libtpms));
    let swtpm = releases::parse_version(&source.swtpm).zip(releases::parse_version(&here.swtpm));
    let older = [library, swtpm].into_iter().flatten().any(|(source, here)| here < source);
    let what = format!("the state of the TPM is of {}, and this host has {}", source.words(), here.words());
    let advice = advice::Failover::UpdateTpmAndDrill;
    match library {
        Some((source, here)) if !releases::reads_state(source, here) => {
            Some(red(Question::Tpm, format!("{what}: it is known not to read it"), advice))
        }
        _ if older => Some(yellow(Question::Tpm, format!("{what}, which is older"), advice)),
        _ => Some(green(Question::Tpm, what)),
    }
}

/// What is known of the point that it would come from.
pub fn point(view: &ReplicaView, point: &PointView) -> Finding {
    let is_head = view.head().is_some_and(|head| head.id == point.id);
    match view.damaged.first().filter(|_| is_head) {
        Some(damage) => red(
            Question::Point,
            format!("point {}: a scrub found {} of it damaged", point.id, damage.disk),
            advice::Failover::OlderPoint,
        ),
        None => {
            let frozen = point.frozen_at.strftime("%Y-%m-%d %H:%M:%S UTC");
            green(Question::Point, format!("point {}, frozen at {frozen}", point.id))
        }
    }
}

/// The disks of the domain that are not in the point: the guest has to do without them. It cannot boot without the disk
/// that it boots from, so that is red until the mapping of this host says that it is to be started so.
pub fn left_out(definition: &Definition, point: &PointView, mapping: &Mapping) -> Vec<Finding> {
    let finding = |skipped: &crate::replica::left_out::Skipped| {
        let name = &skipped.name;
        let boots = definition.boot_disk.as_ref() == Some(name);
        let what = match boots {
            true => format!("disk '{name}', from which the guest boots, is not in the point: it {}", skipped.reason),
            false => format!("disk '{name}' is not in the point: it {}", skipped.reason),
        };
        match (skipped.cause, boots && !mapping.without_disks.contains(name)) {
            (Cause::Unprotected, true) => red(
                Question::Point,
                what,
                format!(
                    "bring up an older point that has it, or write `without_disks: [{name}]` into the mapping here, start \
                     the guest without it, and give it a disk to boot from by hand (`virsh attach-disk`)"
                ),
            ),
            (Cause::Unprotected | Cause::NotSaid, _) => {
                yellow(Question::Point, what, "bring a copy of it here by other means, or let the guest do without")
            }
            (Cause::Excluded | Cause::Removable, _) => green(Question::Point, what),
        }
    };
    // A drive for media is there, and empty.
    point.left_out.iter().filter(|s| s.cause != Cause::Removable).map(finding).collect()
}

/// The directory for the overlays is there, and this process may make no files in it.
pub fn no_right(dir: &Path, why: &std::io::Error) -> Finding {
    let what = format!("no overlays can be made in {}: {why}", dir.display());
    red(Question::Room, what, "run the agent, or this command, as root; or name another directory as `images:`")
}

/// The worst of them; green if there is none.
pub fn worst(findings: &[Finding]) -> Color {
    findings.iter().map(|f| f.color).max().unwrap_or(Color::Green)
}

fn green(question: Question, what: impl Into<String>) -> Finding {
    Finding { question, color: Color::Green, what: what.into(), advice: None, advised: None }
}

fn red(question: Question, what: impl Into<String>, advice: impl Into<Advice>) -> Finding {
    Finding { color: Color::Red, ..yellow(question, what, advice) }
}

fn yellow(question: Question, what: impl Into<String>, advice: impl Into<Advice>) -> Finding {
    let advice = advice.into();
    let (words, advised) = match advice.text() {
        Some(words) => (Some(words.to_owned()), None),
        None => (None, Some(advice)),
    };
    Finding { question, color: Color::Yellow, what: what.into(), advice: words, advised }
}

fn machine(d: &Definition, host: &HostView, refused: Option<&str>) -> Finding {
    let m = &d.machine;
    match &host.machine {
        Ok(_) if refused.is_some() => red(
            Question::Machine,
            format!("libvirt here would not start it: {}", refused.unwrap_or_default()),
            "name the element that it speaks of under `leave_out:` in recovery.yaml, or another machine type under `machines:`; or bring libvirt and QEMU here up to the source's versions",
        ),
        Ok(found) => {
            green(Question::Machine, format!("{} ({}, {}) runs on {}", m.machine, m.arch, m.virt_type, found.emulator))
        }
        Err(said) => {
            let what = format!("this host cannot run a {} ({}, {}): {said}", m.machine, m.arch, m.virt_type);
            let advice = match m.virt_type.as_str() {
                "kvm" => {
                    "check that /dev/kvm is there and that QEMU for this architecture is installed; if it is the machine type, name one of this host's (`virsh capabilities`) under `machines:` in recovery.yaml"
                }
                _ => {
                    "install QEMU for this architecture; if it is the machine type, name one of this host's (`virsh capabilities`) under `machines:` in recovery.yaml"
                }
            };
            red(Question::Machine, what, advice)
        }
    }
}

fn cpu(d: &Definition, host: &Capabilities) -> Option<Finding> {
    let model = d.cpu.as_ref()?;
    // A QEMU that lists no model at all has not been asked, or emulates: then it is libvirt's word at the start.
    Some(match host.cpu_models.is_empty() || host.cpu_models.contains(model) {
        true => green(Question::Cpu, format!("this host has the processor model {model}")),
        false => red(
            Question::Cpu,
            format!("this host cannot show a guest the processor model {model}"),
            "name one that this host has (`virsh domcapabilities`) under `cpus:` in recovery.yaml",
        ),
    })
}

fn firmware(d: &Definition, host: &Capabilities, builds: &Builds) -> Option<Finding> {
    Some(match (d.uefi, d.secure_boot) {
        (false, _) => return None,
        (true, _) if !host.uefi => {
            red(Question::Firmware, "this host has no UEFI firmware", "install it (Debian: ovmf, Fedora: edk2-ovmf)")
        }
        (true, true) if !host.secure_boot => red(
            Question::Firmware,
            "this host has no UEFI firmware with secure boot",
            "install one (Debian: ovmf has it)",
        ),
        _ => build(builds),
    })
}

fn build(builds: &Builds) -> Finding {
    let what = match (&builds.source, &builds.here) {
        (Some(source), Some(here)) if source.blake3 == here.blake3 => {
            return green(Question::Firmware, format!("UEFI: {} is the build that the source boots from", here.path));
        }
        (Some(source), Some(here)) => {
            format!("UEFI: {} is another build than the source's {}", here.path, source.path)
        }
        (None, _) => "UEFI: the point does not say from which build the source boots".to_owned(),
        (Some(_), None) => "UEFI: this host's libvirt does not say which build it would choose".to_owned(),
    };
    yellow(Question::Firmware, what, advice::Failover::AlikeFirmwareAndDrill)
}

fn tpm(d: &Definition, uuid: &DomainUuid, host: &HostView, able: &Capabilities) -> Option<Finding> {
    let tpm = d.tpm.as_ref()?;
    let missing = tpm.secret.as_ref().filter(|s| !host.tpm_secrets.iter().any(|known| known == s.as_str()));
    Some(match missing {
        _ if !able.tpm_emulator => red(
            Question::Tpm,
            "this host cannot emulate a TPM",
            "install swtpm; or let the guest do without: `leave_out: [devices/tpm]` in recovery.yaml",
        ),
        Some(secret) => red(
            Question::Tpm,
            format!("the state of the TPM is encrypted, and libvirt here has no secret {secret} for it"),
            "define it here as it is at the source (`virsh secret-dumpxml`, `virsh secret-define`), and give it the same value (`virsh secret-set-value`)",
        ),
        None if host.tpm_states.iter().any(|known| known == uuid.as_str()) => red(
            Question::Tpm,
            format!("{TPM_IS_HERE} already, and none of the point's may replace it"),
            format!("if no domain here needs it, move it away: {}/{uuid}", swtpm::ROOT),
        ),
        None if tpm.state => {
            green(Question::Tpm, format!("TPM {}: its state comes with the point", tpm.version.words()))
        }
        // The remark on it says so.
        None => return None,
    })
}

/// A guest of more processors than the host has starts, and is slow.
fn processors(d: &Definition, host: &HostView) -> Option<Finding> {
    let what = format!("the guest has {} processors, this host has {}", d.vcpus, host.cpus);
    (d.vcpus > host.cpus)
        .then(|| yellow(Question::Cpu, what, "expect it to be slow, or bring it up on a host that has as many"))
}

/// `None`: what an interface is attached to is not decided yet, which the remarks tell.
fn networks(d: &Definition, host: &HostView) -> Option<Finding> {
    for attach in &d.attached {
        match attach {
            Attach::None => {}
            Attach::Bridge(name) if host.bridges.contains(name) => {}
            Attach::Bridge(name) => {
                let what = format!("there is no bridge '{name}' on this host");
                let advice = "make it, or name another one under `networks:` in recovery.yaml";
                return Some(red(Question::Network, what, advice));
            }
            Attach::Network(name) => match host.networks.iter().find(|n| n.name == *name) {
                Some(network) if network.active => {}
                Some(_) => {
                    let what = format!("the network '{name}' is not started");
                    let advice = format!("start it: virsh net-start {name}; virsh net-autostart {name}");
                    return Some(red(Question::Network, what, advice));
                }
                None => {
                    let what = format!("libvirt here knows no network '{name}'");
                    let advice =
                        "define it (`virsh net-list --all`), or name another one under `networks:` in recovery.yaml";
                    return Some(red(Question::Network, what, advice));
                }
            },
        }
    }
    match d.attached.len() {
        _ if !d.unmapped.is_empty() => None,
        0 if d.remarks.iter().any(|r| r.what == "devices/interface") => {
            Some(green(Question::Network, "the domain is on no network here: its interfaces are left out"))
        }
        0 => Some(green(Question::Network, "the domain has no network interface")),
        n => Some(green(Question::Network, format!("all there ({n})"))),
    }
}

/// What the source's definition had and the one for here has not.
fn device(remark: &Remark) -> Finding {
    let what = format!("{} {}", remark.what, remark.why);
    match remark.verdict {
        Verdict::LeftOut => green(Question::Devices, what),
        Verdict::Missing => yellow(Question::Devices, what, advice::Failover::Drill),
        Verdict::Refused => {
            let advice: Advice = match remark.what.as_str() {
                "devices/interface" => advice::Failover::MapNetwork.into(),
                "os/kernel" | "os/initrd" | "os/loader" => {
                    "copy the file to this host and map its directory under `paths:` in recovery.yaml".into()
                }
                what => {
                    format!("decide whether the guest can do without: `leave_out: ['{what}']` in recovery.yaml").into()
                }
            };
            red(Question::Devices, what, advice)
        }
    }
}

fn collisions(d: &Definition, name: &DomainName, uuid: &DomainUuid, host: &HostView) -> Vec<Finding> {
    let mut found = Vec::new();
    match host.domains.iter().find(|n| n.name == name.as_str()) {
        Some(other) => found.push(red(
            Question::Name,
            match other.running {
                true => {
                    format!("a domain '{}' is here already (UUID {}), and runs on this host", other.name, other.uuid)
                }
                false => format!("a domain '{}' is here already (UUID {})", other.name, other.uuid),
            },
            match other.uuid == uuid.as_str() {
                true if other.running => {
                    "if it lives elsewhere, two of them write now: shut one of them off, and decide which one counts"
                        .into()
                }
                true => advice::Failover::GiveWay.into(),
                false => Advice::from("rename one of the two"),
            },
        )),
        None => found.push(green(Question::Name, format!("no other domain here is called '{name}'"))),
    }
    if let Some(other) = host.domains.iter().find(|n| n.uuid == uuid.as_str() && n.name != name.as_str()) {
        let what = format!("the domain '{}' here has the same UUID", other.name);
        found.push(red(Question::Uuid, what, advice::Failover::GiveWayByUuid));
    }
    let owner = |mac: &String| host.domains.iter().find(|n| n.uuid != uuid.as_str() && n.macs.contains(mac));
    if let Some((mac, other)) = d.macs.iter().find_map(|mac| Some((mac, owner(mac)?))) {
        let what = format!("the domain '{}' here has the MAC address {mac} too", other.name);
        found.push(red(
            Question::Mac,
            what,
            "give one of the two another address, or write `macs: new` into recovery.yaml",
        ));
    }
    found
}

fn memory(d: &Definition, host: &HostView) -> Finding {
    let mib = |bytes: u64| bytes >> 20;
    let (wanted, free) = (d.memory_bytes, host.free_memory_bytes);
    match wanted.saturating_add(MEMORY_SPARE) <= free {
        true => green(Question::Memory, format!("the guest wants {} MiB, {} MiB are free", mib(wanted), mib(free))),
        false => red(
            Question::Memory,
            format!("the guest wants {} MiB, only {} MiB are free", mib(wanted), mib(free)),
            "stop what is not needed here, or bring it up on a larger host; a guest in swap is a guest that stands",
        ),
    }
}

fn room_for(room: &Room) -> Finding {
    let dir = room.dir.display();
    match room.free_bytes {
        None => red(
            Question::Room,
            format!("there is no directory {dir} for the overlays"),
            "make it, or name another one as `images:` in recovery.yaml",
        ),
        Some(free) if free < ROOM_MIN => yellow(
            Question::Room,
            format!("{} MiB are free in {dir}, where the guest's writes would go", free >> 20),
            "make room, or name another directory as `images:` in recovery.yaml",
        ),
        Some(free) => green(Question::Room, format!("{} MiB are free in {dir} for the guest's writes", free >> 20)),
    }
}

#[cfg(test)]
#[path = "ready_tests.rs"]
mod tests;
