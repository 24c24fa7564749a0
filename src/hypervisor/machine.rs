//! The port to a host that is to run a domain which is not its own: what it can do, and the verbs that bring one up and
//! away.
//!
//! Every verb blocks, at most its deadline. Every verb is idempotent: asking for a state that already holds succeeds. A
//! program that was killed in the middle does it all again.

use super::Power;
use super::releases::Version;
use super::swtpm::{Programs, TpmVersion};
use crate::error::{Error, Kind, Result};
use crate::hypervisor::element::{child, children, document, text_of};
use crate::name::DomainUuid;
use serde::Serialize;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// The port to a host that brings up domains: what the host can do, and the verbs for definition, start and end.
pub trait Machines: Send + Sync {
    /// Looks at the host, as far as it decides whether this machine can run there.
    fn host(&self, machine: &Machine) -> Result<HostView>;

    /// The file of the UEFI firmware that a domain of this definition would start with. `None`: libvirt does not say.
    fn firmware_for(&self, xml: &str) -> Result<Option<PathBuf>>;

    /// libvirt's verdict on what would be defined and started: it reads the XML, completes it and makes QEMU's command
    /// line of it. Nothing is defined, started or written. `Err`: its words, why not.
    fn accepts(&self, xml: &str) -> Result<Result<(), String>>;

    /// Starts a domain that leaves no definition behind. `Refused`, with libvirt's words, if it cannot be.
    fn start_transient(&self, xml: &str) -> Result<()>;

    /// Defines a domain, or defines it anew. `Refused` if libvirt finds fault with the XML.
    fn define(&self, xml: &str) -> Result<()>;

    /// Starts a defined domain.
    fn start(&self, uuid: &DomainUuid) -> Result<()>;

    /// Ends a domain at once, as a power cut does. Returns when its QEMU is gone.
    fn destroy(&self, uuid: &DomainUuid) -> Result<()>;

    /// Removes the definition of a domain that is off, with the state of its TPM, and nothing else of its files.
    fn undefine(&self, uuid: &DomainUuid) -> Result<()>;

    /// Gives a domain that is off this state of its TPM, in the place of any other. Durable when it returns.
    fn put_tpm(&self, uuid: &DomainUuid, version: TpmVersion, state: &[u8]) -> Result<()>;

    /// Removes the state of a domain's TPM.
    fn forget_tpm(&self, uuid: &DomainUuid) -> Result<()>;

    /// How a domain stands; `None`: there is no such domain.
    fn power(&self, uuid: &DomainUuid) -> Result<Option<Power>>;

    /// Makes a network that leads nowhere, gone with the host's next boot. The bridge's name has at most 15 bytes.
    fn start_network(&self, name: &str, bridge: &str) -> Result<()>;

    /// Removes a network that `start_network` made. No error if it is gone already.
    fn stop_network(&self, name: &str) -> Result<()>;

    /// Joins a network of [`Machines::start_network`] from a namespace of its own, beside a guest of this address. The
    /// host stays outside.
    fn join_network(&self, name: &str, bridge: &str, guest: (Ipv4Addr, u8)) -> Result<()>;

    /// Whether somebody in there accepts a connection, within this time. Needs [`Machines::join_network`].
    fn connects(&self, network: &str, to: SocketAddr, within: Duration) -> Result<bool>;

    /// Leaves a network that `join_network` joined. No error if the host has not joined it.
    fn leave_network(&self, name: &str) -> Result<()>;

    /// Asks the guest agent whether it is there.
    fn ping_guest_agent(&self, uuid: &DomainUuid, within: Duration) -> Result<()>;

    /// A picture of the first screen, in a format of QEMU's choice (PNG or PPM).
    fn screenshot(&self, uuid: &DomainUuid) -> Result<Vec<u8>>;
}

/// What kind of machine a definition asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// `kvm` or `qemu`.
    pub virt_type: String,
    /// Architecture of the processor, as the definition calls it: `x86_64`.
    pub arch: String,
    /// As the definition calls it: `pc-q35-7.2`.
    pub machine: String,
}

/// A host, at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct HostView {
    /// What it can do with such a machine; `Err`: libvirt's words, why it cannot.
    pub machine: Result<Capabilities, String>,
    /// All of libvirt's networks, active or not; empty if libvirt has no network driver.
    pub networks: Vec<NetworkView>,
    /// Network devices of the host that are bridges.
    pub bridges: Vec<String>,
    /// All domains of the host, running or not.
    pub domains: Vec<Neighbour>,
    /// Memory that is available for new processes, in bytes.
    pub free_memory_bytes: u64,
    /// The user that QEMU runs as unless a domain says otherwise; `None`: libvirt does not say.
    pub qemu_uid: Option<u32>,
    /// Domains of which the state of a TPM is here, by their UUIDs, whether or not there is such a domain.
    pub tpm_states: Vec<String>,
    /// UUIDs of libvirt's secrets that are there for the state of a TPM.
    pub tpm_secrets: Vec<String>,
    /// What emulates TPMs; `None`: nothing, or nobody knows.
    pub tpm_programs: Option<Programs>,
    /// Processors that work.
    pub cpus: u64,
    /// `None`: not known.
    pub libvirt: Option<Version>,
    /// Version of QEMU. `None`: not known.
    pub qemu: Option<Version>,
    /// Machine types of this architecture, under the names that libvirt gives them.
    pub machines: Vec<String>,
}

impl HostView {
    /// The host as it will be once its own domain of this UUID, which is off, has given way. That of a domain which
    /// runs stays.
    pub fn without(mut self, uuid: &DomainUuid) -> HostView {
        let ours = |n: &Neighbour| n.uuid == uuid.as_str() && !n.running;
        if self.domains.iter().any(ours) {
            // Its definition goes, and the state of its TPM with it.
            self.tpm_states.retain(|known| known != uuid.as_str());
        }
        self.domains.retain(|n| !ours(n));
        self
    }
}

/// libvirt's word on what QEMU of this host can do for one kind of machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Path of the emulator, as libvirt would start it.
    pub emulator: String,
    /// Of the processor's models those that this host can show a guest.
    pub cpu_models: Vec<String>,
    /// The guest can have the host's own processor model.
    pub host_passthrough: bool,
    /// Modes of a processor that it has.
    pub cpu_modes: Vec<String>,
    /// The most processors that a guest of this machine may have; `None`: not said.
    pub vcpus_max: Option<u64>,
    /// Models of screens.
    pub videos: Vec<String>,
    /// libvirt can choose a UEFI firmware for this machine.
    pub uefi: bool,
    /// A UEFI firmware with secure boot is available. Only set together with `uefi`.
    pub secure_boot: bool,
    /// QEMU can have an emulated TPM.
    pub tpm_emulator: bool,
}

/// A network of libvirt's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkView {
    /// Name of the network, as definitions refer to it.
    pub name: String,
    /// The network is started.
    pub active: bool,
}

/// A domain that is there already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Name of that domain, which a domain that comes up here must not have.
    pub name: String,
    /// UUID of that domain, as libvirt writes it.
    pub uuid: String,
    /// The domain has a QEMU.
    pub running: bool,
    /// In lower case.
    pub macs: Vec<String>,
}

/// Reads libvirt's `<domainCapabilities>`.
pub fn parse_capabilities(xml: &str) -> Result<Capabilities> {
    let doc = document(xml)?;
    let root = doc.root_element();
    if !root.has_tag_name("domainCapabilities") {
        return Err(Error::new(Kind::Protocol, "these are no capabilities of a host"));
    }
    let values = |node: Option<roxmltree::Node<'_, '_>>, name: &str| -> Vec<String> {
        let enums = node.into_iter().flat_map(|n| n.children()).filter(|e| e.has_tag_name("enum"));
        let named = enums.filter(|e| e.attribute("name") == Some(name));
        named.flat_map(|e| children(e, "value")).map(text_of).collect()
    };
    let modes: Vec<_> = child(root, "cpu").into_iter().flat_map(|c| children(c, "mode")).collect();
    let mode = |name: &str| modes.iter().find(|m| m.attribute("name") == Some(name)).copied();
    let models = mode("custom").into_iter().flat_map(|m| children(m, "model"));
    let os = child(root, "os");
    let loader = os.and_then(|o| child(o, "loader"));
    let uefi = values(os, "firmware").iter().any(|f| f == "efi");
    let devices = child(root, "devices");
    let device = |name: &'static str| devices.and_then(|d| child(d, name));
    let supported = modes.iter().filter(|m| m.attribute("supported") == Some("yes"));
    Ok(Capabilities {
        emulator: child(root, "path").map(text_of).unwrap_or_default(),
        cpu_models: models.filter(|m| m.attribute("usable") != Some("no")).map(text_of).collect(),
        host_passthrough: mode("host-passthrough").is_some_and(|m| m.attribute("supported") == Some("yes")),
        cpu_modes: supported.filter_map(|m| m.attribute("name")).map(str::to_owned).collect(),
        vcpus_max: child(root, "vcpu").and_then(|v| v.attribute("max")?.parse().ok()),
        videos: values(device("video"), "modelType"),
        uefi,
        secure_boot: uefi && values(loader, "secure").iter().any(|v| v == "yes"),
        tpm_emulator: values(device("tpm"), "backendModel").iter().any(|b| b == "emulator"),
    })
}

/// The machine types of an architecture, by libvirt's `<capabilities>`, without those that are only other names.
pub fn machines(xml: &str, arch: &str) -> Result<Vec<String>> {
    let doc = document(xml)?;
    let guests = children(doc.root_element(), "guest").filter_map(|g| child(g, "arch"));
    let machines = guests.filter(|a| a.attribute("name") == Some(arch)).flat_map(|a| children(a, "machine"));
    let mut found: Vec<String> = machines.filter(|m| m.attribute("canonical").is_none()).map(text_of).collect();
    found.sort();
    found.dedup();
    Ok(found)
}

/// The user that QEMU runs as, by libvirt's `<capabilities>`: its security model `dac` names it.
pub fn qemu_uid(xml: &str) -> Result<Option<u32>> {
    let doc = document(xml)?;
    let models = child(doc.root_element(), "host").into_iter().flat_map(|h| children(h, "secmodel"));
    let mut dac = models.filter(|m| child(*m, "model").is_some_and(|n| text_of(n) == "dac"));
    let label = dac.next().and_then(|m| child(m, "baselabel")).map(text_of);
    // `+64055:+64055`
    Ok(label.and_then(|l| l.split(':').next()?.trim_start_matches('+').parse().ok()))
}

/// The MAC addresses of a domain's interfaces, in lower case.
pub fn macs_of(xml: &str) -> Result<Vec<String>> {
    let doc = document(xml)?;
    let devices = child(doc.root_element(), "devices");
    let interfaces = devices.into_iter().flat_map(|d| children(d, "interface"));
    let macs = interfaces.filter_map(|i| child(i, "mac")?.attribute("address"));
    Ok(macs.map(str::to_ascii_lowercase).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_and_what_is_not_said_is_not_there() {
        let xml = "<domainCapabilities><path>/usr/bin/qemu</path>\
            <os supported='yes'><enum name='firmware'><value>efi</value></enum>\
            <loader supported='yes'><enum name='secure'><value>yes</value><value>no</value></enum></loader></os>\
            <vcpu max='288'/><cpu><mode name='host-passthrough' supported='yes'/><mode name='maximum' supported='no'/><mode name='custom' supported='yes'>\
            <model usable='no'>EPYC</model><model usable='yes'>Haswell</model></mode></cpu>\
            <devices><video supported='yes'><enum name='modelType'><value>vga</value></enum></video><tpm supported='yes'><enum name='backendModel'><value>emulator</value></enum></tpm></devices>\
            </domainCapabilities>";
        let c = parse_capabilities(xml).unwrap();
        assert_eq!((c.emulator.as_str(), c.cpu_models.as_slice()), ("/usr/bin/qemu", &["Haswell".to_owned()][..]));
        assert_eq!((c.vcpus_max, c.videos), (Some(288), vec!["vga".to_owned()]));
        assert_eq!(c.cpu_modes, ["host-passthrough", "custom"]);
        assert!(c.host_passthrough && c.uefi && c.secure_boot && c.tpm_emulator);
        assert_eq!(parse_capabilities("<domainCapabilities/>").unwrap(), Capabilities::default());
        assert_eq!(parse_capabilities("<domain/>").unwrap_err().kind(), Kind::Protocol);
    }

    #[test]
    fn the_user_of_qemu_is_that_of_the_model_dac() {
        let xml = "<capabilities><host><secmodel><model>apparmor</model><baselabel type='kvm'>x</baselabel></secmodel>\
            <secmodel><model>dac</model><baselabel type='kvm'>+64055:+64055</baselabel></secmodel></host></capabilities>";
        assert_eq!(qemu_uid(xml).unwrap(), Some(64055));
        assert_eq!(qemu_uid("<capabilities/>").unwrap(), None);
    }

    #[test]
    fn machine_types_are_listed_once_and_without_their_other_names() {
        let xml = "<capabilities><guest><arch name='x86_64'><machine maxCpus='255'>pc-i440fx-7.2</machine>\
            <machine canonical='pc-i440fx-7.2'>pc</machine><domain type='qemu'><machine>pc-q35-7.2</machine></domain></arch></guest>\
            <guest><arch name='i686'><machine>isapc</machine></arch></guest></capabilities>";
        assert_eq!(machines(xml, "x86_64").unwrap(), ["pc-i440fx-7.2"]);
        assert_eq!(machines(xml, "sparc").unwrap(), [""; 0]);
    }

    #[test]
    fn mac_addresses_are_compared_in_lower_case() {
        let xml =
            "<domain><devices><interface><mac address='52:54:00:AA:bb:01'/></interface><interface/></devices></domain>";
        assert_eq!(macs_of(xml).unwrap(), ["52:54:00:aa:bb:01"]);
    }
}
