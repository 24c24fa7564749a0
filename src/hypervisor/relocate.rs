//! The port to what moves a running disk to another image: QEMU copies it while the guest works, then the guest writes
//! to the copy alone (`virsh blockcopy`).
//!
//! From the beginning of the copy every write of the guest's goes to both images before the guest is told that it is
//! done (synchronous writes, libvirt 8.0): once the copy is ready the two are equal at every moment, and stay so until
//! the move. That is asked for because QEMU's own word at the move says nothing of what is durable: whoever holds the
//! guest can make the copy durable first.

use super::Power;
use crate::error::Result;
use crate::image::Layer;
use crate::name::{DiskName, DomainUuid};
use std::path::{Path, PathBuf};

/// Where a disk lies, by libvirt's two definitions: QEMU itself is not asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Place {
    /// Whether the domain runs, is paused, or is off.
    pub power: Power,
    /// The image that the guest writes to; `None`: it does not run.
    pub live: Option<Layer>,
    /// The one that it will be started on.
    pub inactive: Option<Layer>,
    /// Copy of the disk that is under way. `None`: there is none.
    pub copy: Option<CopyJob>,
}

/// A copy that goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyJob {
    /// Image that the job writes.
    pub to: PathBuf,
    /// The two are equal, and stay so.
    pub ready: bool,
}

/// The port that moves a running domain's disk to another image by a copy job.
pub trait Relocating: Send + Sync {
    /// Observes where the disk lies. `NotFound` if there is no such domain or disk.
    fn place(&self, uuid: &DomainUuid, disk: &DiskName) -> Result<Place>;

    /// Begins to copy the disk, all its chain, to a raw file of its size that is there; at most so many bytes in a
    /// second, the guest's own writes not counted. The job goes on when this process dies.
    fn begin_copy(&self, uuid: &DomainUuid, disk: &DiskName, to: &Path, rate_bytes: Option<u64>) -> Result<()>;

    /// The guest writes to the copy alone from now on, and the persistent definition names it.
    /// [`Busy`](crate::error::Kind::Busy): the copy is not ready, and nothing has changed. After another error it may
    /// have been done: look.
    fn move_over(&self, uuid: &DomainUuid, disk: &DiskName) -> Result<()>;

    /// Points the persistent definition of the disk at this image.
    fn define_on(&self, uuid: &DomainUuid, disk: &DiskName, image: &Layer) -> Result<()>;

    /// Stops the vCPUs. No error if they stood already.
    fn hold(&self, uuid: &DomainUuid) -> Result<()>;

    /// Lets the vCPUs run. No error if they ran already.
    fn let_run(&self, uuid: &DomainUuid) -> Result<()>;
}

#[cfg(feature = "libvirt")]
mod on_libvirt {
    use super::*;
    use crate::hypervisor::libvirt::LibvirtHypervisor;
    use crate::hypervisor::libvirt::gate::Repeat;
    use crate::hypervisor::libvirt::queries::lookup;
    use crate::hypervisor::libvirt::sys;
    use crate::hypervisor::{Hypervisor as _, xml};
    use virt::sys as c;

    /// Tried with libvirt 9.0 and QEMU 7.2 in tests/lab/suite/crash_raw.rs.
    impl Relocating for LibvirtHypervisor {
        fn place(&self, uuid: &DomainUuid, disk: &DiskName) -> Result<Place> {
            let name = disk.clone();
            self.query("look where the disk lies", uuid, move |conn, uuid| {
                let domain = lookup(conn, uuid)?;
                let power = crate::hypervisor::libvirt::power(&domain)?;
                let of = |flags| -> Result<xml::DiskXml, crate::hypervisor::libvirt::gate::Failure> {
                    let xml = crate::hypervisor::libvirt::volumes::parsed(conn, &domain, flags)?;
                    Ok(crate::hypervisor::libvirt::live_disk(&xml, &name)?.clone())
                };
                let live = if power == Power::Off { None } else { Some(of(0)?) };
                let inactive = if domain.is_persistent()? { Some(of(c::VIR_DOMAIN_XML_INACTIVE)?) } else { None };
                let mirror = live.as_ref().and_then(|disk| disk.mirror.clone()).filter(|mirror| mirror.job == "copy");
                let top = |disk: xml::DiskXml| disk.layers.into_iter().next();
                let copy = mirror.map(|m| CopyJob { to: m.to.unwrap_or_default(), ready: m.ready });
                Ok(Place { power, copy, live: live.and_then(top), inactive: inactive.and_then(top) })
            })
            .map_err(|e| e.disk(disk))
        }

        fn begin_copy(&self, uuid: &DomainUuid, disk: &DiskName, to: &Path, rate_bytes: Option<u64>) -> Result<()> {
            let (name, xml) = (disk.clone(), xml::raw_copy_xml(to)?);
            self.on_domain("start to copy the disk", self.deadlines.change, Repeat::Never, uuid, move |conn, uuid| {
                let domain = lookup(conn, uuid)?;
                conn.about_to_change()?;
                Ok(sys::block_copy(&domain, name.as_str(), &xml, rate_bytes.unwrap_or(0))?)
            })
            .map_err(|e| e.disk(disk))
        }

        fn move_over(&self, uuid: &DomainUuid, disk: &DiskName) -> Result<()> {
            self.pivot(uuid, disk)
        }

        fn define_on(&self, uuid: &DomainUuid, disk: &DiskName, image: &Layer) -> Result<()> {
            self.redefine(uuid, &[(disk.clone(), image.clone())])
        }

        fn hold(&self, uuid: &DomainUuid) -> Result<()> {
            self.pause(uuid)
        }

        fn let_run(&self, uuid: &DomainUuid) -> Result<()> {
            self.resume(uuid)
        }
    }
}
