//! The port to what gives a running domain's disk an image that stands alone: everything below is copied into the
//! uppermost image while the guest works (QEMU's block stream, `virsh blockpull`).
//!
//! The uppermost image stays the one that the guest writes to, under its name, from beginning to end: unlike a copy
//! that is pivoted to, there is no moment at which a crash could bring back an older image.

use super::BlockJob;
use crate::error::Result;
use crate::image::Layer;
use crate::name::{DiskName, DomainUuid};
use std::time::Duration;

/// The port to QEMU's block stream, which makes the uppermost image of a running domain's disk stand alone.
pub trait Flattening: Send + Sync {
    /// libvirt's id of the running instance; `None`: it does not run.
    fn instance(&self, uuid: &DomainUuid) -> Result<Option<u32>>;

    /// The job at work on the disk, of whatever kind.
    fn job(&self, uuid: &DomainUuid, disk: &DiskName) -> Result<Option<BlockJob>>;

    /// Begins to copy, at most so many bytes in a second. The job goes on when this process dies.
    fn begin_pull(&self, uuid: &DomainUuid, disk: &DiskName, rate_bytes: Option<u64>) -> Result<()>;

    /// Waits for the end of the disk's job; `None`: there is none any more, which says nothing about how it ended.
    fn wait(&self, uuid: &DomainUuid, disk: &DiskName, timeout: Duration) -> Result<Option<BlockJob>>;

    /// QEMU writes out what it holds of the image, its tables too. Durable when it returns.
    fn flush(&self, uuid: &DomainUuid, image: &Layer) -> Result<()>;
}

#[cfg(feature = "libvirt")]
mod on_libvirt {
    use super::*;
    use crate::error::{Error, Kind};
    use crate::hypervisor::libvirt::LibvirtHypervisor;
    use crate::hypervisor::libvirt::gate::Repeat;
    use crate::hypervisor::libvirt::queries::lookup;
    use crate::hypervisor::libvirt::sys;
    use crate::hypervisor::libvirt::tracking::node_name;
    use crate::hypervisor::{Hypervisor as _, bitmap};

    /// Tried with libvirt 9.0 and QEMU 7.2 in tests/lab/suite/crash_detach.rs.
    impl Flattening for LibvirtHypervisor {
        fn instance(&self, uuid: &DomainUuid) -> Result<Option<u32>> {
            // Nothing that has QEMU walk through its block nodes (as `observe` does): asked in the moment in which a
            // copy is brought to its end, QEMU 7.2 trips over a node that has lost its child, and the guest is gone
            // (seen).
            self.query("look whether the domain runs", uuid, |conn, uuid| {
                let domain = lookup(conn, uuid)?;
                Ok(if domain.is_active()? { domain.id() } else { None })
            })
        }

        fn job(&self, uuid: &DomainUuid, disk: &DiskName) -> Result<Option<BlockJob>> {
            self.wait_job(uuid, disk, Duration::ZERO)
        }

        fn begin_pull(&self, uuid: &DomainUuid, disk: &DiskName, rate_bytes: Option<u64>) -> Result<()> {
            let name = disk.clone();
            self.on_domain("start to copy the disk", self.deadlines.change, Repeat::Never, uuid, move |conn, uuid| {
                let domain = lookup(conn, uuid)?;
                conn.about_to_change()?;
                Ok(sys::block_pull(&domain, name.as_str(), rate_bytes.unwrap_or(0))?)
            })
            .map_err(|e| e.disk(disk))
        }

        fn wait(&self, uuid: &DomainUuid, disk: &DiskName, timeout: Duration) -> Result<Option<BlockJob>> {
            self.wait_job(uuid, disk, timeout)
        }

        fn flush(&self, uuid: &DomainUuid, image: &Layer) -> Result<()> {
            let nodes = self.nodes(uuid)?;
            let node = node_name(&nodes, image)?;
            // There is no command of QMP for it, and to stop the guest for a moment would flush as well, but hold it.
            let said: String = bitmap::reply(&self.qmp("flush the image", uuid, bitmap::flush(node))?)?;
            // The human monitor answers in words; silence means that it was done.
            match said.trim() {
                "" => Ok(()),
                words => {
                    let what = format!("QEMU could not write out the image: {words}");
                    Err(Error::new(Kind::Refused, what).path(&image.path))
                }
            }
        }
    }
}
