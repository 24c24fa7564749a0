//! A domain as libvirt describes it, put into plain views.

use super::state::{ended, job_of_domain, power_and_reason};
use super::xml::{DiskXml, DomainXml};
use super::{BlockJob, BlockJobKind, DiskKind, DiskView, DomainView, swtpm};
use crate::block::DiskSize;
use crate::error::{Error, Kind};
use crate::hypervisor::libvirt::gate::Failure;
use crate::hypervisor::libvirt::queries::lookup;
use crate::hypervisor::libvirt::sys;
use crate::hypervisor::libvirt::volumes::{self, parsed};
use crate::image::{Chain, Format};
use std::path::Path;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error as VirtError, ErrorDomain};
use virt::sys as c;

/// A domain may be started or stopped while it is looked at; then it is looked at again, this often.
pub(super) const OBSERVE_TRIES_MAX: usize = 4;

/// Whether the sizes of the disks are asked for. With `n` disks that is most of the price of a view: for each of them
/// QEMU describes all images of all disks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Sizes {
    Asked,
    Left,
}

/// The domain at one moment: if it was started or stopped meanwhile, everything is asked again.
pub(super) fn view(conn: &Connect, uuid: &str, sizes: Sizes) -> Result<DomainView, Failure> {
    for _ in 0..OBSERVE_TRIES_MAX {
        let domain = lookup(conn, uuid)?;
        let view = view_once(conn, &domain, swtpm::root_of(&conn.uri()?).as_deref(), sizes);
        // The id is told by the lookup; it changes with every start.
        if lookup(conn, uuid)?.id() == domain.id() {
            return view;
        }
    }
    Err(Error::new(Kind::Busy, "the domain was started and stopped all the while it was looked at").into())
}

fn view_once(conn: &Connect, domain: &Domain, tpm_root: Option<&Path>, sizes: Sizes) -> Result<DomainView, Failure> {
    let runs = domain.id().is_some();
    let persistent = domain.is_persistent()?;
    let live = if runs { Some(parsed(conn, domain, 0)?) } else { None };
    let inactive = if persistent { Some(parsed(conn, domain, c::VIR_DOMAIN_XML_INACTIVE)?) } else { None };
    let shown = live.as_ref().or(inactive.as_ref()).ok_or_else(|| {
        // Neither runs nor is defined: it is going at this moment.
        Error::new(Kind::NotFound, "the domain is gone")
    })?;
    let mut disks = Vec::with_capacity(shown.disks.len());
    for disk in &shown.disks {
        let size = match disk.kind {
            DiskKind::Image if sizes == Sizes::Asked => size_of((conn, domain), disk, runs)?,
            _ => None,
        };
        disks.push(DiskView { size, ..disk_view(domain, disk, runs, inactive.as_ref())? });
    }
    let record = live.as_ref().and_then(|l| l.record.clone());
    let (power, paused) = power_and_reason(domain)?;
    Ok(DomainView {
        name: shown.name.clone(),
        uuid: shown.uuid.clone(),
        id: domain.id(),
        power,
        paused,
        ended: ended(domain)?,
        persistent,
        managed_save: domain.has_managed_save(0)?,
        domain_job: if runs { job_of_domain(domain)? } else { None },
        record: record.or_else(|| inactive.as_ref().and_then(|i| i.record.clone())),
        nvram: shown.nvram.clone(),
        tpm: shown.tpm.as_ref().and_then(|tpm| tpm.state_file(tpm_root, &shown.uuid)),
        guest_agent: shown.guest_agent,
        disks,
    })
}

fn size_of((conn, domain): (&Connect, &Domain), disk: &DiskXml, runs: bool) -> Result<Option<DiskSize>, Failure> {
    let mut size = known(sys::capacity_bytes(domain, disk.name.as_str()))?;
    if let (None, Some(top), false) = (size, disk.layers.first(), runs) {
        // Of a volume of a domain that is off only the pool knows.
        size = volumes::capacity(conn, &top.path)?;
    }
    // Of a raw image of a domain that is off libvirt tells the length of the file; of one that runs, what the guest
    // sees.
    let seen = |bytes| match disk.layers.first() {
        Some(top) if top.format == Format::Raw => DiskSize(bytes).whole_sectors(),
        _ => DiskSize(bytes),
    };
    Ok(size.map(seen))
}

/// The disk, without its size.
fn disk_view(domain: &Domain, disk: &DiskXml, runs: bool, inactive: Option<&DomainXml>) -> Result<DiskView, Failure> {
    let name = disk.name.as_str();
    let image = disk.kind == DiskKind::Image;
    let info = if runs { known(sys::block_job_info(domain, name))?.flatten() } else { None };
    Ok(DiskView {
        name: disk.name.clone(),
        kind: disk.kind.clone(),
        live: (runs && image).then(|| Chain(disk.layers.clone())),
        inactive: inactive.and_then(|i| i.disk(&disk.name)).and_then(|d| d.layers.first().cloned()),
        size: None,
        job: if runs { job_view(info, Some(disk)) } else { None },
        read_only: disk.read_only,
        shareable: disk.shareable,
    })
}

/// What libvirt cannot tell of one disk (a missing file, a drive without a medium) is unknown; the view goes on.
/// A broken connection is not an answer.
pub(super) fn known<T>(result: Result<T, VirtError>) -> Result<Option<T>, VirtError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.domain().is(ErrorDomain::Rpc) => Err(e),
        Err(e) => {
            tracing::debug!(error = e.message(), "libvirt does not tell");
            Ok(None)
        }
    }
}

pub(super) fn job_view(info: Option<sys::BlockJobInfo>, disk: Option<&DiskXml>) -> Option<BlockJob> {
    let mirror = disk.and_then(|d| d.mirror.as_ref());
    let active_mirror = mirror.filter(|m| m.job == "active-commit");
    let kind = match info.map(|i| i.kind) {
        Some(c::VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT) => BlockJobKind::ActiveCommit,
        Some(c::VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT) => BlockJobKind::Commit,
        Some(_) => BlockJobKind::Other,
        // libvirt still holds the mirror of a job that QEMU has ended: it is ending, not gone.
        None if active_mirror.is_some() => BlockJobKind::ActiveCommit,
        None if mirror.is_some() => BlockJobKind::Other,
        None => return None,
    };
    let ready = kind == BlockJobKind::ActiveCommit && info.is_some() && active_mirror.is_some_and(|m| m.ready);
    let (done_bytes, total_bytes) = info.map_or((0, 0), |i| (i.done_bytes, i.total_bytes));
    Some(BlockJob { kind, ready, done_bytes, total_bytes })
}
