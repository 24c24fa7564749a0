//! [`Hypervisor`] on libvirt: each verb is one call through the gate, and looks at the domain anew before it acts.
//!
//! Invariants
//! - What a verb is about to change is checked inside the same call, against the live XML: a commit starts only
//!   if base lies directly below top, a definition is written only for a domain that has one.
//! - A block job counts as ready by libvirt's own word only. 100 % is not ready, and ready is not equal: while the
//!   vCPUs run, READY only means that a pivot will succeed (docs/replication.md, step 7).
//! - After [`Kind::Unavailable`] the verb's effect is not known: observe. Any other error is a no.
//!
//! Tried with libvirt 9.0 and QEMU 7.2 in tests/hypervisor.rs.

pub(super) mod backups;
pub(super) mod departure;
pub mod gate;
pub(super) mod guest_agent;
pub(super) mod locality;
pub(super) mod machine;
pub mod names;
pub(super) mod queries;
pub(super) mod sys;
pub(super) mod tracking;
pub(super) mod volumes;

use super::releases::{Version, version_of};
use super::state::power_and_reason;
pub(super) use super::state::{is_lost, power};
use super::view::{OBSERVE_TRIES_MAX, Sizes, job_view, view};
use super::volumes::as_files;
use super::xml::{self, DiskXml, DomainXml};
use super::{BlockJob, Confinement, DomainView, FreezeDisk, Hypervisor, PauseReason, bitmap};
use crate::error::{Error, Kind, Result, advice};
use crate::hypervisor::libvirt::gate::{Call, Failure, Gate, Line, Repeat};
use crate::hypervisor::libvirt::queries::{firmware_for, lookup};
use crate::hypervisor::libvirt::volumes::parsed;
use crate::image::Layer;
use crate::name::{DiskName, DomainName, DomainUuid};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error as VirtError, ErrorDomain, ErrorNumber};
use virt::sys as c;

/// Prefix under which libvirt stores our record in `<metadata>`.
const RECORD_PREFIX: &str = "virt-replica";

/// How often a block job is asked for, beside libvirt's events: soon at first, then less often.
const JOB_POLL_MIN: Duration = Duration::from_millis(250);
const JOB_POLL_MAX: Duration = Duration::from_secs(1);

/// How long a verb waits for libvirt's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// Questions.
    pub query: Duration,
    /// What makes files or ends jobs: freeze, start and cancel of a commit.
    pub change: Duration,
    /// What happens while the guest stands, and what lets it run: pause, pivot, resume, record.
    pub standing: Duration,
    /// What may make libvirt look at its emulators anew, as the first call after an upgrade of QEMU does: define,
    /// redefine, and questions for capabilities. Honest answers took up to 48 s.
    pub probing: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            query: Duration::from_secs(10),
            change: Duration::from_secs(30),
            standing: Duration::from_secs(10),
            probing: Duration::from_secs(180),
        }
    }
}

/// The version of the libvirt that this program was started with, which is that of the host's packages; `None`: it does
/// not say.
pub fn library_version() -> Option<Version> {
    Connect::version().ok().map(version_of)
}

/// libvirt behind one connection, which is reopened when it breaks.
pub struct LibvirtHypervisor {
    pub(super) gate: Gate,
    pub(super) deadlines: Deadlines,
}

impl LibvirtHypervisor {
    /// Connects to `uri`; `None`: libvirt decides, as `virsh` without `-c` (environment, `libvirt.conf`, probing).
    pub fn connect(uri: Option<&str>) -> Result<Self> {
        Self::connect_with(uri, Deadlines::default())
    }

    /// Connects as `connect` does, with deadlines of the caller's choice. Blocks for `deadlines.query` at most.
    pub fn connect_with(uri: Option<&str>, deadlines: Deadlines) -> Result<Self> {
        let this = Self { gate: Gate::new(uri)?, deadlines };
        let call =
            Call { what: "ask for its version", domain: None, deadline: deadlines.query, repeat: Repeat::Harmless };
        this.gate.call(call, |conn| Ok(conn.lib_version()?))?;
        Ok(this)
    }

    /// Asks something about a domain.
    pub(super) fn query<T, F>(&self, what: &'static str, uuid: &DomainUuid, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: Fn(&Line<'_>, &str) -> Result<T, Failure> + Send + 'static,
    {
        self.on_domain(what, self.deadlines.query, Repeat::Harmless, uuid, work)
    }

    pub(super) fn on_domain<T, F>(
        &self,
        what: &'static str,
        deadline: Duration,
        repeat: Repeat,
        uuid: &DomainUuid,
        work: F,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: Fn(&Line<'_>, &str) -> Result<T, Failure> + Send + 'static,
    {
        let owned = uuid.as_str().to_owned();
        let call = Call { what, domain: Some(uuid.as_str()), deadline, repeat };
        self.gate.call(call, move |conn| work(conn, &owned))
    }

    /// As [`LibvirtHypervisor::on_domain`], for a change of this content that may take long: see [`Gate::call_once`].
    fn once_on_domain<T, F>(&self, what: &'static str, uuid: &DomainUuid, content: &str, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: Fn(&Line<'_>, &str) -> Result<T, Failure> + Send + 'static,
    {
        let owned = uuid.as_str().to_owned();
        let deadline = self.deadlines.probing;
        let call = Call { what, domain: Some(uuid.as_str()), deadline, repeat: Repeat::Harmless };
        self.gate.call_once(call, content, move |conn| work(conn, &owned))
    }

    /// Passes a QMP command to the domain's QEMU and returns the reply's text, which may be an error of QEMU's.
    pub(super) fn qmp(&self, what: &'static str, uuid: &DomainUuid, command: String) -> Result<String> {
        self.on_domain(what, self.deadlines.change, Repeat::Never, uuid, move |conn, uuid| {
            Ok(lookup(conn, uuid)?.qemu_monitor_command(&command, 0)?)
        })
    }

    /// Passes a command to the guest agent and returns its answer's text. libvirt first finds out whether anybody is
    /// there, for up to 5 s.
    pub(super) fn ask_guest(
        &self,
        what: &'static str,
        uuid: &DomainUuid,
        command: &'static str,
        within: Duration,
    ) -> Result<String> {
        let seconds = within.as_secs().max(1);
        let deadline = Duration::from_secs(seconds + 7);
        self.on_domain(what, deadline, Repeat::Never, uuid, move |conn, uuid| {
            let domain = lookup(conn, uuid)?;
            conn.about_to_change()?;
            Ok(domain.qemu_agent_command(command, seconds as i32, 0)?)
        })
    }

    fn block_job(&self, uuid: &DomainUuid, disk: &DiskName, deadline: Duration) -> Result<Option<BlockJob>> {
        let name = disk.clone();
        self.on_domain("ask for the block job", deadline, Repeat::Harmless, uuid, move |conn, uuid| {
            let domain = lookup(conn, uuid)?;
            let info = sys::block_job_info(&domain, name.as_str())?;
            // Only an active commit becomes ready, and only the XML tells that it is.
            match info {
                Some(i) if i.kind != c::VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT => Ok(job_view(Some(i), None)),
                _ => {
                    let live = parsed(conn, &domain, 0)?;
                    Ok(job_view(info, live.disk(&name)))
                }
            }
        })
        .map_err(|e| e.disk(disk))
    }
}

impl Hypervisor for LibvirtHypervisor {
    fn find(&self, name_uuid_or_id: &str) -> Result<DomainView> {
        let wanted = DomainName::new(name_uuid_or_id)?;
        let call = Call {
            what: "look up the domain",
            domain: Some(name_uuid_or_id),
            deadline: self.deadlines.query,
            repeat: Repeat::Harmless,
        };
        self.gate
            .call(call, move |conn| match look_everywhere(conn, wanted.as_str())? {
                Some(domain) => view(conn, &domain.uuid_string()?, Sizes::Asked),
                None => Err(Error::new(Kind::NotFound, "no domain has this name, UUID or id").into()),
            })
            .map_err(|e| match e.kind() {
                Kind::NotFound => e.advise(advice::Host::FindDomain),
                _ => e,
            })
    }

    fn observe(&self, uuid: &DomainUuid) -> Result<DomainView> {
        self.query("look at the domain", uuid, |conn, uuid| view(conn, uuid, Sizes::Asked))
    }

    fn observe_without_sizes(&self, uuid: &DomainUuid) -> Result<DomainView> {
        self.query("look at the domain", uuid, |conn, uuid| view(conn, uuid, Sizes::Left))
    }

    fn warm_up(&self, uuid: &DomainUuid) -> Result<()> {
        let (what, deadline) = ("look at the domain's emulator", self.deadlines.probing);
        self.on_domain(what, deadline, Repeat::Harmless, uuid, |conn, uuid| {
            let Some(emulator) = xml::emulator(&lookup(conn, uuid)?.xml_desc(0)?)? else { return Ok(()) };
            match conn.domain_capabilities(Some(&emulator), None, None, None, 0) {
                Err(e) if e.domain().is(ErrorDomain::Rpc) => Err(e.into()),
                Err(e) => {
                    tracing::debug!(emulator, said = e.message(), "libvirt does not tell what the emulator can do");
                    Ok(())
                }
                Ok(_) => Ok(()),
            }
        })
    }

    fn firmware(&self, uuid: &DomainUuid) -> Result<Option<PathBuf>> {
        self.query("ask for the firmware", uuid, |conn, uuid| firmware_for(conn, &lookup(conn, uuid)?.xml_desc(0)?))
    }

    fn list(&self) -> Result<Vec<DomainView>> {
        let deadline = self.deadlines.query;
        let call = Call { what: "list the domains", domain: None, deadline, repeat: Repeat::Harmless };
        let uuids = self.gate.call(call, |conn| {
            let domains = conn.list_all_domains(0)?;
            Ok(domains.iter().map(Domain::uuid_string).collect::<Result<Vec<_>, _>>()?)
        })?;
        let mut views = Vec::with_capacity(uuids.len());
        for uuid in uuids {
            match self.observe(&DomainUuid::new(uuid.as_str())?) {
                Ok(view) => views.push(view),
                // It went between the list and the look.
                Err(e) if e.kind() == Kind::NotFound => {}
                Err(e) if e.kind() == Kind::Unavailable => return Err(e),
                // One domain that we cannot describe must not hide the others.
                Err(e) => tracing::warn!(uuid, error = e.chain(), "domain left out"),
            }
        }
        views.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(views)
    }

    fn freeze(&self, uuid: &DomainUuid, disks: &[FreezeDisk]) -> Result<()> {
        if disks.is_empty() {
            return Err(Error::new(Kind::Usage, "no disk to freeze").domain(uuid));
        }
        let disks = disks.to_vec();
        self.on_domain("freeze the disks", self.deadlines.change, Repeat::Never, uuid, move |conn, uuid| {
            let domain = lookup(conn, uuid)?;
            let live = running(conn, &domain)?;
            for (index, d) in disks.iter().enumerate() {
                if disks[..index].iter().any(|other| other.name == d.name || other.overlay == d.overlay) {
                    return Err(Error::new(Kind::Usage, "disk or overlay is named twice").disk(&d.name).into());
                }
                let disk = live_disk(&live, &d.name)?;
                if let Some(why) = disk.kind.refusal() {
                    return Err(Error::new(Kind::Refused, format!("the disk {why}")).disk(&d.name).into());
                }
                // libvirt cannot be told what is expected, so this is looked at as late as can be.
                if disk.layers.first().is_none_or(|top| top.path != d.over) {
                    let what =
                        "the disk's chain changed while the run was planned: somebody made or removed a snapshot";
                    return Err(Error::new(Kind::Busy, what).disk(&d.name).hint("run again").into());
                }
            }
            let all: Vec<DiskName> = live.disks.iter().map(|d| d.name.clone()).collect();
            let snapshot = xml::snapshot_xml(&disks, &all)?;
            let prepared = disks.iter().filter(|d| d.prepared).count();
            let reuse = match prepared {
                0 => 0,
                n if n == disks.len() => c::VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT,
                _ => return Err(Error::new(Kind::Usage, "of some disks the overlays are prepared").into()),
            };
            let flags = c::VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
                | c::VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
                | c::VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
                | reuse;
            conn.about_to_change()?;
            domain.create_snapshot_xml(&snapshot, flags)?;
            Ok(())
        })
    }

    fn start_commit(&self, uuid: &DomainUuid, disk: &DiskName, top: &Path, base: &Path, active: bool) -> Result<()> {
        let (name, top, base) = (disk.clone(), top.to_owned(), base.to_owned());
        self.on_domain("start the commit", self.deadlines.change, Repeat::Never, uuid, move |conn, uuid| {
            let domain = lookup(conn, uuid)?;
            let live = running(conn, &domain)?;
            check_commit(&live_disk(&live, &name)?.layers, &top, &base, active)?;
            let flags = if active { c::VIR_DOMAIN_BLOCK_COMMIT_ACTIVE } else { 0 };
            let (base, top) = (path_text(&base)?, path_text(&top)?);
            conn.about_to_change()?;
            Ok(sys::block_commit(&domain, name.as_str(), base, top, flags)?)
        })
        .map_err(|e| e.disk(disk))
    }

    fn wait_job(&self, uuid: &DomainUuid, disk: &DiskName, timeout: Duration) -> Result<Option<BlockJob>> {
        let until = Instant::now() + timeout;
        // Before the first question: an event between question and subscription would be missed.
        let wake = self.gate.subscribe(uuid.as_str(), disk.as_str());
        let mut pause = JOB_POLL_MIN;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let deadline = self.deadlines.query.min(left.max(JOB_POLL_MAX));
            match self.block_job(uuid, disk, deadline) {
                Ok(Some(job)) if !job.ready && Instant::now() < until => {}
                // libvirtd restarting does not end the job; the next question opens a new connection.
                Err(e) if e.kind() == Kind::Unavailable && Instant::now() < until => {}
                other => return other,
            }
            wake.wait(pause.min(until.saturating_duration_since(Instant::now())));
            pause = (pause * 2).min(JOB_POLL_MAX);
        }
    }

    fn pivot(&self, uuid: &DomainUuid, disk: &DiskName) -> Result<()> {
        let name = disk.clone();
        self.on_domain("pivot", self.deadlines.standing, Repeat::Never, uuid, move |conn, uuid| {
            let domain = lookup(conn, uuid)?;
            conn.about_to_change()?;
            Ok(sys::block_job_abort(&domain, name.as_str(), c::VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)?)
        })
        .map_err(|e| e.disk(disk))
    }

    fn cancel_job(&self, uuid: &DomainUuid, disk: &DiskName) -> Result<()> {
        let name = disk.clone();
        self.on_domain("cancel the block job", self.deadlines.change, Repeat::Harmless, uuid, move |conn, uuid| {
            let domain = lookup(conn, uuid)?;
            conn.about_to_change()?;
            match sys::block_job_abort(&domain, name.as_str(), 0) {
                Err(e) if sys::block_job_info(&domain, name.as_str())?.is_some() => Err(e.into()),
                // Without a job libvirt refuses; what was asked for is so.
                _ => Ok(()),
            }
        })
        .map_err(|e| e.disk(disk))
    }

    fn pause(&self, uuid: &DomainUuid) -> Result<()> {
        self.on_domain("pause the domain", self.deadlines.standing, Repeat::Harmless, uuid, |conn, uuid| {
            let domain = lookup(conn, uuid)?;
            conn.about_to_change()?;
            match domain.suspend() {
                // Asleep by its own wish is standing, too, though libvirt refuses to suspend it.
                Err(e) if sys::state(&domain)?.0 != c::VIR_DOMAIN_PMSUSPENDED => Err(e.into()),
                _ => Ok(()),
            }
        })
    }

    fn resume(&self, uuid: &DomainUuid) -> Result<()> {
        let deadline = self.deadlines.standing;
        self.on_domain("resume the domain", deadline, Repeat::Harmless, uuid, |conn, uuid| {
            let domain = lookup(conn, uuid)?;
            conn.about_to_change()?;
            match domain.resume() {
                // libvirt refuses to resume what runs.
                Err(e) if sys::state(&domain)?.0 != c::VIR_DOMAIN_RUNNING => Err(e.into()),
                _ => Ok(()),
            }
        })
    }

    fn set_record(&self, uuid: &DomainUuid, record: Option<&str>) -> Result<()> {
        let element = record.map(xml::record_xml).transpose()?;
        self.on_domain("store the record", self.deadlines.standing, Repeat::Harmless, uuid, move |conn, uuid| {
            let mut tries = 0;
            loop {
                tries += 1;
                let domain = lookup(conn, uuid)?;
                let live = domain.id().map_or(0, |_| c::VIR_DOMAIN_AFFECT_LIVE);
                let config = if domain.is_persistent()? { c::VIR_DOMAIN_AFFECT_CONFIG } else { 0 };
                let kind = c::VIR_DOMAIN_METADATA_ELEMENT as i32;
                let (key, ns) = (Some(RECORD_PREFIX), Some(xml::RECORD_NS));
                conn.about_to_change()?;
                match domain.set_metadata(kind, element.as_deref(), key, ns, live | config) {
                    Ok(()) => return Ok(()),
                    // To remove what is not there.
                    Err(e) if element.is_none() && e.code().is(ErrorNumber::NoDomainMetadata) => return Ok(()),
                    // It was started or stopped between the two questions: other flags.
                    Err(e) if e.code().is(ErrorNumber::OperationInvalid) && tries < OBSERVE_TRIES_MAX => {}
                    Err(e) => return Err(e.into()),
                }
            }
        })
    }

    fn redefine(&self, uuid: &DomainUuid, disks: &[(DiskName, Layer)]) -> Result<()> {
        let disks = disks.to_vec();
        let content = format!("{disks:?}");
        self.once_on_domain("redefine the domain", uuid, &content, move |conn, uuid| {
            let domain = lookup(conn, uuid)?;
            // To define a transient domain would make it persistent.
            if !domain.is_persistent()? {
                let e = Error::new(Kind::Refused, "the domain is transient: it has no definition to change");
                return Err(e.into());
            }
            // With secrets: without them they would be lost.
            let flags = c::VIR_DOMAIN_XML_INACTIVE | c::VIR_DOMAIN_XML_SECURE;
            let old = domain.xml_desc(flags)?;
            let volumes = volumes::of(conn, &old, domain.id().is_some())?;
            let new = xml::set_layers_with(&old, &disks, &volumes)?;
            conn.about_to_change()?;
            conn.define_domain_xml(&new)?;
            let stored = xml::parse_with(&domain.xml_desc(c::VIR_DOMAIN_XML_INACTIVE)?, &volumes)?;
            for (name, layer) in &disks {
                let top = live_disk(&stored, name)?.layers.first();
                if !top.is_some_and(|t| t.path == layer.path && t.format == layer.format) {
                    let e = Error::new(Kind::Refused, "libvirt did not take over the new image of the disk");
                    return Err(e.disk(name).path(&layer.path).into());
                }
            }
            Ok(())
        })
    }

    fn paused(&self, uuid: &DomainUuid) -> Result<Option<PauseReason>> {
        self.query("ask why the domain is paused", uuid, |conn, uuid| Ok(power_and_reason(&lookup(conn, uuid)?)?.1))
    }

    fn close_unused(&self, uuid: &DomainUuid, image: &Path) -> Result<()> {
        for node in bitmap::nodes_on(&self.nodes(uuid)?, image) {
            bitmap::done(&self.qmp("close an unused image", uuid, bitmap::remove_node(&node))?)
                .map_err(|e| e.path(image))?;
        }
        Ok(())
    }

    fn confinement(&self, uuid: &DomainUuid) -> Result<Confinement> {
        self.query("ask how the domain is confined", uuid, |conn, uuid| {
            let version = conn.lib_version()?;
            let apparmor = xml::confined_by(&lookup(conn, uuid)?.xml_desc(0)?, "apparmor")?;
            Ok(Confinement { libvirt: (version / 1_000_000, version / 1000 % 1000, version % 1000), apparmor })
        })
    }

    fn definition(&self, uuid: &DomainUuid, inactive: bool, secure: bool) -> Result<String> {
        let flags = if inactive { c::VIR_DOMAIN_XML_INACTIVE } else { 0 };
        let flags = flags | if secure { c::VIR_DOMAIN_XML_SECURE } else { 0 };
        self.query("read the definition", uuid, move |conn, uuid| {
            let domain = lookup(conn, uuid)?;
            let text = domain.xml_desc(flags)?;
            Ok(as_files(&text, &volumes::of(conn, &text, domain.id().is_some())?)?)
        })
    }
}

// --- looking ---------------------------------------------------------------------------------------------------------

/// By name, then UUID, then id, as a name may look like either.
fn look_everywhere(conn: &Connect, wanted: &str) -> Result<Option<Domain>, VirtError> {
    let uuid = DomainUuid::new(wanted.to_ascii_lowercase()).ok();
    let id: Option<u32> = wanted.parse().ok();
    let by_uuid = || uuid.as_ref().map(|u| lookup(conn, u.as_str()));
    let by_id = || id.map(|id| conn.lookup_domain_by_id(id));
    let by_name = || Some(conn.lookup_domain_by_name(wanted));
    let ways: [&dyn Fn() -> Option<Result<Domain, VirtError>>; 3] = [&by_name, &by_uuid, &by_id];
    for found in ways.iter().filter_map(|way| way()) {
        match found {
            Err(e) if e.code().is(ErrorNumber::NoDomain) => {}
            Err(e) => return Err(e),
            Ok(domain) => return Ok(Some(domain)),
        }
    }
    Ok(None)
}

/// The live XML of a domain that must run.
pub(super) fn running(conn: &Connect, domain: &Domain) -> Result<DomainXml, Failure> {
    let live = parsed(conn, domain, 0)?;
    if live.id.is_none() {
        return Err(Error::new(Kind::Refused, "the domain does not run").into());
    }
    Ok(live)
}

pub(super) fn live_disk<'a>(xml: &'a DomainXml, name: &DiskName) -> Result<&'a DiskXml> {
    xml.disk(name).ok_or_else(|| Error::new(Kind::Conflict, "the domain has no such disk").disk(name))
}

/// A commit of anything but `top` into its own direct backing image would mix up images.
fn check_commit(chain: &[Layer], top: &Path, base: &Path, active: bool) -> Result<()> {
    let conflict = |what: String| Err(Error::new(Kind::Conflict, what).path(top));
    match chain.iter().position(|l| l.path == top) {
        None => conflict("the layer to commit is not in the disk's chain".into()),
        Some(at) if chain.get(at + 1).is_none_or(|l| l.path != base) => {
            conflict(format!("{} does not lie directly below the layer to commit", base.display()))
        }
        Some(0) if !active => conflict("the layer to commit is the one that the guest writes to".into()),
        Some(1..) if active => conflict("another layer lies above the one to commit".into()),
        Some(_) => Ok(()),
    }
}

fn path_text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| Error::new(Kind::Usage, "libvirt takes no path that is not UTF-8").path(path))
}
