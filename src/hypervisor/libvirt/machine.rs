//! [`Machines`] on libvirt: each verb is one call through the gate.
//!
//! Tried with libvirt 9.0 in tests/lab/suite/recovery.rs.

use super::gate::{Call, Failure, Line, Repeat};
use crate::error::{Error, Kind, Result};
use crate::hypervisor::element::escape;
use crate::hypervisor::libvirt::LibvirtHypervisor;
use crate::hypervisor::libvirt::queries::{firmware_for, lookup};
use crate::hypervisor::machine::{self, Capabilities, HostView, Machine, Machines, Neighbour, NetworkView};
use crate::hypervisor::releases::version_of;
use crate::hypervisor::swtpm::{self, TpmPlace, TpmVersion};
use crate::hypervisor::{Power, drill_network, xml};
use crate::name::DomainUuid;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;
use virt::domain::Domain;
use virt::error::{Error as VirtError, ErrorNumber};
use virt::stream::Stream;
use virt::sys as c;

/// Starting a QEMU may mean reading firmware and images from slow storage, and before that looking at a changed
/// emulator.
const START_MAX: Duration = Duration::from_secs(240);

/// Largest picture that is taken, in bytes.
const PICTURE_MAX: usize = 32 << 20;

impl LibvirtHypervisor {
    fn on_host<T, F>(&self, what: &'static str, deadline: Duration, repeat: Repeat, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: Fn(&Line<'_>) -> Result<T, Failure> + Send + 'static,
    {
        self.gate.call(Call { what, domain: None, deadline, repeat }, work)
    }
}

impl LibvirtHypervisor {
    /// Where this libvirt keeps the states of TPMs, if that is known.
    fn tpm_root(&self) -> Result<Option<PathBuf>> {
        let uri = self.on_host("ask where it is", self.deadlines.query, Repeat::Harmless, |conn| Ok(conn.uri()?))?;
        Ok(swtpm::root_of(&uri))
    }
}

impl Machines for LibvirtHypervisor {
    fn host(&self, machine: &Machine) -> Result<HostView> {
        let wanted = machine.clone();
        let deadline = self.deadlines.probing;
        let mut view = self.on_host("look at the host", deadline, Repeat::Harmless, move |conn| {
            let mut networks = Vec::new();
            // Without the network driver there is none.
            for network in conn.list_all_networks(0).unwrap_or_default() {
                match network.is_active() {
                    Ok(active) => networks.push(NetworkView { name: network.name()?, active }),
                    // It went between the list and the look, as a drill's does.
                    Err(e) if e.code().is(ErrorNumber::NoNetwork) => {}
                    Err(e) => return Err(e.into()),
                }
            }
            let mut domains = Vec::new();
            for domain in conn.list_all_domains(0)? {
                match neighbour(&domain) {
                    Ok(found) => domains.push(found),
                    // It went between the list and the look.
                    Err(Failure::Libvirt(e)) if e.code().is(ErrorNumber::NoDomain) => {}
                    Err(e) => return Err(e),
                }
            }
            let machine = capabilities(conn, &wanted)?;
            let all = conn.capabilities()?;
            let (qemu_uid, machines) = (machine::qemu_uid(&all)?, machine::machines(&all, &wanted.arch)?);
            // Which release it is decides only about what is asked more of it.
            let libvirt = conn.lib_version().ok().map(version_of);
            let qemu = conn.hyp_version().ok().map(version_of);
            let tpm_states = swtpm::root_of(&conn.uri()?).map(|root| swtpm::states(&root)).unwrap_or_default();
            let tpm_secrets = tpm_secrets(conn)?;
            let (bridges, free_memory_bytes) = (Vec::new(), 0);
            let (tpm_programs, cpus) = (None, 1);
            Ok(HostView {
                machine,
                networks,
                bridges,
                domains,
                free_memory_bytes,
                qemu_uid,
                tpm_states,
                tpm_secrets,
                tpm_programs,
                cpus,
                libvirt,
                qemu,
                machines,
            })
        })?;
        (view.bridges, view.free_memory_bytes) = (bridges(), available_memory_bytes()?);
        view.cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        view.tpm_programs = swtpm::programs();
        Ok(view)
    }

    fn firmware_for(&self, xml: &str) -> Result<Option<PathBuf>> {
        let xml = xml.to_owned();
        let deadline = self.deadlines.probing;
        self.on_host("ask for the firmware", deadline, Repeat::Harmless, move |conn| firmware_for(conn, &xml))
    }

    fn accepts(&self, xml: &str) -> Result<Result<(), String>> {
        let xml = xml.to_owned();
        let what = "ask whether libvirt takes the definition";
        self.on_host(what, self.deadlines.change, Repeat::Harmless, move |conn| {
            match conn.domain_xml_to_native("qemu-argv", &xml, 0) {
                Ok(_) => Ok(Ok(())),
                Err(e) if e.domain().is(virt::error::ErrorDomain::Rpc) => Err(e.into()),
                Err(e) => Ok(Err(crate::error::printable(e.message(), 300))),
            }
        })
    }

    fn start_transient(&self, xml: &str) -> Result<()> {
        let xml = xml.to_owned();
        self.on_host("start a domain", START_MAX, Repeat::Never, move |conn| {
            conn.about_to_change()?;
            conn.create_domain_xml(&xml, 0)?;
            Ok(())
        })
    }

    fn define(&self, xml: &str) -> Result<()> {
        let content = xml.to_owned();
        let (what, deadline) = ("define a domain", self.deadlines.probing);
        let call = Call { what, domain: None, deadline, repeat: Repeat::Harmless };
        let xml = content.clone();
        self.gate.call_once(call, &content, move |conn| {
            conn.about_to_change()?;
            conn.define_domain_xml(&xml)?;
            Ok(())
        })
    }

    fn start(&self, uuid: &DomainUuid) -> Result<()> {
        self.on_domain("start the domain", START_MAX, Repeat::Never, uuid, |conn, uuid| {
            let domain = lookup(conn, uuid)?;
            conn.about_to_change()?;
            match domain.create() {
                Err(e) if domain.is_active() != Ok(true) => Err(e.into()),
                _ => Ok(()),
            }
        })
    }

    fn destroy(&self, uuid: &DomainUuid) -> Result<()> {
        self.on_domain("end the domain", START_MAX, Repeat::Harmless, uuid, |conn, uuid| {
            let Some(domain) = present(lookup(conn, uuid))? else { return Ok(()) };
            conn.about_to_change()?;
            match domain.destroy() {
                // It ended by itself meanwhile, and may be gone with that.
                Err(e) if domain.is_active() == Ok(true) => Err(e.into()),
                _ => Ok(()),
            }
        })
    }

    fn undefine(&self, uuid: &DomainUuid) -> Result<()> {
        self.on_domain("remove the definition", self.deadlines.change, Repeat::Harmless, uuid, |conn, uuid| {
            let Some(domain) = present(lookup(conn, uuid))? else { return Ok(()) };
            if !domain.is_persistent()? {
                return Ok(());
            }
            let tpm = xml::parse(&domain.xml_desc(c::VIR_DOMAIN_XML_INACTIVE)?)?.tpm;
            conn.about_to_change()?;
            domain.undefine_flags(c::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | c::VIR_DOMAIN_UNDEFINE_KEEP_NVRAM)?;
            // libvirt leaves that of a domain with `persistent_state`.
            match (tpm.map(|tpm| tpm.place), swtpm::root_of(&conn.uri()?)) {
                (Some(TpmPlace::Libvirts), Some(root)) => Ok(swtpm::forget(&root, &DomainUuid::new(uuid)?)?),
                _ => Ok(()),
            }
        })
    }

    fn put_tpm(&self, uuid: &DomainUuid, version: TpmVersion, state: &[u8]) -> Result<()> {
        let Some(root) = self.tpm_root()? else {
            let what = "it is not known where this libvirt keeps the state of a TPM";
            return Err(Error::new(Kind::Refused, what).hint("bring it up in the system's libvirt (qemu:///system)"));
        };
        swtpm::put(&root, uuid, version, state, swtpm::owner()?)
    }

    fn forget_tpm(&self, uuid: &DomainUuid) -> Result<()> {
        // Where that is not known, nothing was put either.
        self.tpm_root()?.map_or(Ok(()), |root| swtpm::forget(&root, uuid))
    }

    fn power(&self, uuid: &DomainUuid) -> Result<Option<Power>> {
        self.query("look at the domain", uuid, |conn, uuid| {
            present(lookup(conn, uuid))?
                .map(|domain| crate::hypervisor::libvirt::power(&domain))
                .transpose()
                .map_err(Failure::from)
        })
    }

    fn start_network(&self, name: &str, bridge: &str) -> Result<()> {
        // Without an address libvirt starts no name server and the host itself is not in it.
        let xml = format!(
            "<network><name>{}</name><bridge name='{}' stp='off' delay='0'/></network>",
            escape(name)?,
            escape(bridge)?
        );
        let name = name.to_owned();
        self.on_host("make an isolated network", self.deadlines.change, Repeat::Harmless, move |conn| {
            if let Ok(network) = conn.lookup_network_by_name(&name)
                && network.is_active()?
            {
                return Ok(());
            }
            conn.about_to_change()?;
            conn.create_network_xml(&xml)?;
            Ok(())
        })
    }

    fn stop_network(&self, name: &str) -> Result<()> {
        let name = name.to_owned();
        self.on_host("remove the isolated network", self.deadlines.change, Repeat::Harmless, move |conn| {
            match conn.lookup_network_by_name(&name) {
                Ok(network) => {
                    conn.about_to_change()?;
                    Ok(network.destroy()?)
                }
                Err(e) if e.code().is(ErrorNumber::NoNetwork) => Ok(()),
                Err(e) => Err(e.into()),
            }
        })
    }

    fn join_network(&self, name: &str, bridge: &str, (guest, prefix): (Ipv4Addr, u8)) -> Result<()> {
        let ours = drill_network::beside(guest, prefix)
            .ok_or_else(|| Error::new(Kind::Usage, format!("{guest}/{prefix} has no room for another address")))?;
        // `vrd0123456789ab`, and beside it `vrp0123456789ab`.
        let device = format!("vrp{}", bridge.trim_start_matches("vrd"));
        drill_network::join(name, bridge, &device, (ours, prefix))
    }

    fn connects(&self, network: &str, to: SocketAddr, within: Duration) -> Result<bool> {
        drill_network::connects(network, to, within)
    }

    fn leave_network(&self, name: &str) -> Result<()> {
        drill_network::leave(name)
    }

    fn ping_guest_agent(&self, uuid: &DomainUuid, within: Duration) -> Result<()> {
        self.ask_guest("ask for the guest agent", uuid, r#"{"execute":"guest-ping"}"#, within).map(drop)
    }

    fn screenshot(&self, uuid: &DomainUuid) -> Result<Vec<u8>> {
        self.query("take a picture of the screen", uuid, |conn, uuid| {
            let domain = lookup(conn, uuid)?;
            let stream = Stream::new(conn, 0)?;
            domain.screenshot(&stream, 0, 0)?;
            let mut picture = Vec::new();
            let mut piece = vec![0; 64 << 10];
            loop {
                match stream.recv(&mut piece)? {
                    n if n <= 0 => break,
                    n => picture.extend_from_slice(&piece[..n as usize]),
                }
                if picture.len() > PICTURE_MAX {
                    return Err(Error::new(Kind::Refused, "the picture has no end").into());
                }
            }
            stream.finish()?;
            Ok(picture)
        })
    }
}

/// `None` for a domain that is not there.
fn present(found: Result<Domain, VirtError>) -> Result<Option<Domain>, VirtError> {
    match found {
        Ok(domain) => Ok(Some(domain)),
        Err(e) if e.code().is(ErrorNumber::NoDomain) => Ok(None),
        Err(e) => Err(e),
    }
}

fn neighbour(domain: &Domain) -> Result<Neighbour, Failure> {
    let macs = machine::macs_of(&domain.xml_desc(0)?)?;
    Ok(Neighbour { name: domain.name()?, uuid: domain.uuid_string()?, running: domain.is_active()?, macs })
}

/// libvirt's no is an answer, and a broken connection is none.
fn capabilities(conn: &Line<'_>, machine: &Machine) -> Result<Result<Capabilities, String>, Failure> {
    let (arch, kind) = (Some(machine.arch.as_str()), Some(machine.virt_type.as_str()));
    let name = Some(machine.machine.as_str()).filter(|m| !m.is_empty());
    match conn.domain_capabilities(None, arch, name, kind, 0) {
        Ok(xml) => Ok(Ok(machine::parse_capabilities(&xml)?)),
        Err(e) if e.domain().is(virt::error::ErrorDomain::Rpc) => Err(e.into()),
        Err(e) => Ok(Err(crate::error::printable(e.message(), 200))),
    }
}

/// Without the secret driver there is none.
fn tpm_secrets(conn: &Line<'_>) -> Result<Vec<String>, Failure> {
    let mut found = Vec::new();
    for secret in conn.list_all_secrets(0).unwrap_or_default() {
        // One that cannot be asked went between the list and the look.
        if secret.usage_type().ok() == Some(c::VIR_SECRET_USAGE_TYPE_VTPM) {
            found.push(secret.uuid_string()?);
        }
    }
    Ok(found)
}

/// The kernel's word: libvirt knows only bridges of its own networks.
fn bridges() -> Vec<String> {
    let devices = std::fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    let bridges = devices.filter(|d| d.path().join("bridge").is_dir());
    bridges.map(|d| d.file_name().to_string_lossy().into_owned()).collect()
}

/// What may be given to new programs without swapping, page cache included.
fn available_memory_bytes() -> Result<u64> {
    let path = "/proc/meminfo";
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("cannot ask for free memory", path, e))?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.map(|n| n << 10)
        .ok_or_else(|| Error::new(Kind::Io, "the kernel does not say how much memory is free").path(path))
}
