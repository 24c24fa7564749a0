//! [`Backups`] on libvirt. The server that serves the disks is QEMU's only one, and libvirt's for the time of the job:
//! it is never started or stopped here, only given an export more.
//!
//! Tried with libvirt 9.0 and QEMU 7.2: raw and qcow2, running and paused. libvirt refuses a scratch file that exists,
//! and removes its own with the job, also when the domain ends; the socket it leaves behind. A scratch file without
//! room fails the guest's write, not the job: room has to be watched.

use super::gate::{Failure, Repeat};
use super::sys;
use super::tracking::node_name;
use crate::block::ByteRange;
use crate::error::{Error, Kind, Result};
use crate::hypervisor::backup::{Backup, BackupJob, backup_xml, parse_backup};
use crate::hypervisor::libvirt::queries::lookup;
use crate::hypervisor::libvirt::{LibvirtHypervisor, is_lost, live_disk, running};
use crate::hypervisor::{Backups, Tracking, bitmap};
use crate::image::nbd::{NbdImage, bitmap_context};
use crate::image::{Image, Layer};
use crate::name::{DiskName, DomainUuid};
use std::path::{Path, PathBuf};
use virt::domain::Domain;
use virt::error::ErrorNumber;

/// Name of the backup's socket in the domain's private directory.
const SOCKET: &str = "virt-replica-backup.sock";

/// Our export beside those of the backup.
const EXPORT: &str = "virt-replica-bitmap";

impl Backups for LibvirtHypervisor {
    fn backup_socket(&self, uuid: &DomainUuid) -> Result<PathBuf> {
        Ok(self.private_dir(uuid)?.join(SOCKET))
    }

    fn begin_backup(&self, uuid: &DomainUuid, backup: &Backup) -> Result<()> {
        let backup = backup.clone();
        self.on_domain("begin the backup", self.deadlines.change, Repeat::Never, uuid, move |conn, uuid| {
            let domain = lookup(conn, uuid)?;
            let live = running(conn, &domain)?;
            for d in &backup.disks {
                if let Some(why) = live_disk(&live, &d.name)?.kind.refusal() {
                    return Err(Error::new(Kind::Refused, format!("the disk {why}")).disk(&d.name).into());
                }
            }
            let all: Vec<DiskName> = live.disks.iter().map(|d| d.name.clone()).collect();
            let xml = backup_xml(&backup, &all)?;
            conn.about_to_change()?;
            Ok(sys::backup_begin(&domain, &xml)?)
        })
    }

    fn running_backup(&self, uuid: &DomainUuid) -> Result<BackupJob> {
        self.query("ask for the backup", uuid, |conn, uuid| match lookup(conn, uuid) {
            Err(e) if e.code().is(ErrorNumber::NoDomain) => Ok(BackupJob::None),
            other => job_of(&other?),
        })
    }

    fn end_backup(&self, uuid: &DomainUuid, backup: &Backup) -> Result<()> {
        let backup = backup.clone();
        self.on_domain("end the backup", self.deadlines.change, Repeat::Harmless, uuid, move |conn, uuid| {
            let domain = lookup(conn, uuid)?;
            // Looked at in the same call: a job that somebody else began meanwhile is not ours to end.
            match job_of(&domain)? {
                BackupJob::Running(running) if backup.is(&running) => {}
                _ => return Ok(()),
            }
            conn.about_to_change()?;
            match sys::abort_job(&domain) {
                Err(e) if matches!(job_of(&domain)?, BackupJob::Running(_)) => Err(e.into()),
                _ => Ok(()),
            }
        })
    }

    fn marked(&self, uuid: &DomainUuid, socket: &Path, layer: &Layer, name: &str) -> Result<Vec<ByteRange>> {
        let still = format!("{name}-still");
        self.remove_bitmap(uuid, layer, &still)?;
        let nodes = self.nodes(uuid)?;
        let node = node_name(&nodes, layer)?;
        let copy = bitmap::copy(node, name, &still);
        bitmap::done(&self.qmp("copy a dirty bitmap", uuid, copy)?).map_err(|e| e.path(&layer.path))?;
        let export = bitmap::export(EXPORT, node, &still);
        let answer = bitmap::done(&self.qmp("export a bitmap", uuid, export)?).and_then(|()| {
            let image = NbdImage::connect(socket, EXPORT, &[bitmap_context(&still)], 1)?;
            image.dirty(&still, image.size().range())
        });
        // The connection is closed by now, or never was: nothing keeps the export busy.
        let ended = self.qmp("end our export", uuid, bitmap::remove_export(EXPORT)).and_then(|r| bitmap::done(&r));
        let removed = ended.and_then(|()| self.remove_bitmap(uuid, layer, &still));
        if let Err(e) = removed {
            // It lives no longer than its QEMU, and the next run removes it with all that is superseded.
            tracing::debug!("the copy of a dirty bitmap stays: {}", e.chain());
        }
        answer.map_err(|e| e.path(&layer.path))
    }
}

fn job_of(domain: &Domain) -> Result<BackupJob, Failure> {
    match sys::backup_xml(domain) {
        Ok(xml) => Ok(BackupJob::Running(parse_backup(&xml)?)),
        Err(_) if domain.id().is_none() => Ok(BackupJob::None),
        Err(e) if e.code().is(ErrorNumber::NoDomainBackup) => match sys::domain_job(domain) {
            Err(e) if is_lost(&e) => Ok(BackupJob::Hollow),
            // Another kind of job, or none; one that cannot be asked for is not ours to guess at.
            _ => Ok(BackupJob::None),
        },
        Err(e) => Err(e.into()),
    }
}
