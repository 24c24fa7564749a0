//! A guest that QEMU stopped because a write failed, while it wrote to a file of ours.
//!
//! Where an overlay or a scratch file finds no room, QEMU pauses the guest, and only a resume ends that. Nobody asked
//! for this pause: it came under our hands, so ending it is our task. The commit comes first, as it gives the room
//! back. Then the guest is resumed, if its own images have room. If they have none, it stays on record, is reported by
//! every run, by `doctor` and by `status`, and each run tries again.
//!
//! A guest that an operator paused is never resumed here, nor one that stood before its disks were frozen.

use super::account::Account;
use crate::error::{Error, Kind, Result, advice};
use crate::hypervisor::{DiskKind, DomainView, Hypervisor, PauseReason};
use crate::name::{DiskName, DomainUuid, RunId};
use crate::replicate::free_space::free_bytes;
use crate::replicate::state::journal::{Journal, boot_id};
pub use crate::replicate::state::record::GuestStopped;
use crate::replicate::state::record::StoppedRecord;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Room that a file system has to have before a guest is resumed that writes to a growing image there, in bytes.
const ROOM_MIN: u64 = 64 << 20;

/// After a resume QEMU repeats the write that failed. For so long it is watched whether that fails again.
const WATCHED_FOR: Duration = Duration::from_secs(1);

/// libvirt is asked this often, while disks are read, whether the guest still runs.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// An image that the guest writes to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    disk: DiskName,
    path: PathBuf,
    /// Of its file system; `None` where the image needs no more room, or where that cannot be known.
    free_bytes: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Next {
    /// Its pause has ended, or is no longer ours.
    Forget,
    Resume,
    /// This image has no room.
    Leave(Place),
}

/// Whether the pause of `domain` came after its disks were frozen by a run that found it running. Pure.
pub fn is_ours(ran: bool, instance: Option<u32>, boot: Option<&str>, domain: &DomainView, now: Option<&str>) -> bool {
    let same_boot = boot.is_none() || boot == now;
    ran && domain.paused == Some(PauseReason::IoError) && domain.id.is_some() && domain.id == instance && same_boot
}

/// Pure.
fn next(record: &StoppedRecord, domain: &DomainView, boot: Option<&str>, places: &[Place]) -> Next {
    if !is_ours(true, record.instance, record.boot.as_deref(), domain, boot) {
        return Next::Forget;
    }
    match places.iter().find(|place| place.free_bytes.is_some_and(|free| free < ROOM_MIN)) {
        Some(full) => Next::Leave(full.clone()),
        None => Next::Resume,
    }
}

/// Records that the guest is ours to resume, if it is. Durable when it returns.
pub fn owe(journal: &Journal, run: &RunId, ran: bool, instance: Option<u32>, domain: &DomainView) -> Result<bool> {
    let boot = boot_id();
    if !is_ours(ran, instance, boot.as_deref(), domain, boot.as_deref()) {
        return Ok(false);
    }
    if journal.stopped()?.is_none() {
        journal.owe_resume(&StoppedRecord { run: run.clone(), instance, boot })?;
    }
    Ok(true)
}

/// As [`owe`], before a backup job is ended: `ran` and `instance` are those of its begin.
pub fn owe_after_backup(
    hypervisor: &dyn Hypervisor,
    journal: &Journal,
    uuid: &DomainUuid,
    (run, ran, instance): (&RunId, bool, Option<u32>),
) -> Result<bool> {
    match hypervisor.observe(uuid) {
        Ok(domain) => owe(journal, run, ran, instance, &domain),
        Err(e) if e.kind() == Kind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// Resumes a guest that is ours to resume, once its disks are its own images. libvirt is asked only if there is one.
/// Repeating it is harmless.
pub fn settle(hypervisor: &dyn Hypervisor, journal: &Journal, uuid: &DomainUuid) -> Result<Option<GuestStopped>> {
    let Some(record) = journal.stopped()? else { return Ok(None) };
    let domain = match hypervisor.observe(uuid) {
        Ok(domain) => domain,
        Err(e) if e.kind() == Kind::NotFound => return journal.resume_is_paid().map(|()| None),
        Err(e) => return Err(e),
    };
    match next(&record, &domain, boot_id().as_deref(), &places(&domain)) {
        Next::Forget => journal.resume_is_paid().map(|()| None),
        Next::Leave(full) => Ok(Some(GuestStopped { resumed: false, why: no_room(&full) })),
        Next::Resume => {
            hypervisor.resume(uuid)?;
            if stops_again(hypervisor, uuid)? {
                return Ok(Some(GuestStopped { resumed: false, why: STOPPED_AGAIN.into() }));
            }
            journal.resume_is_paid()?;
            Ok(Some(GuestStopped { resumed: true, why: RESUMED.into() }))
        }
    }
}

fn stops_again(hypervisor: &dyn Hypervisor, uuid: &DomainUuid) -> Result<bool> {
    let until = Instant::now() + WATCHED_FOR;
    while Instant::now() < until {
        std::thread::sleep(WATCHED_FOR / 10);
        if hypervisor.paused(uuid)? == Some(PauseReason::IoError) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Looks, while disks are read, whether the guest still runs.
pub struct StoppedWatch {
    /// It ran when its disks were frozen.
    ran: bool,
    asked: Mutex<Instant>,
}

impl StoppedWatch {
    /// Begins to watch. `ran`: the guest ran when its disks were frozen; otherwise `check` never fails.
    pub fn new(ran: bool) -> Self {
        Self { ran, asked: Mutex::new(Instant::now()) }
    }

    /// An error once an I/O error has stopped the guest: the run is to be cut short, as only its end lets the guest go.
    /// Cheap; asked many times while reading.
    pub fn check(&self, hypervisor: &dyn Hypervisor, uuid: &DomainUuid) -> Result<()> {
        {
            let mut asked = self.asked.lock().expect("nothing panics while it is held");
            if !self.ran || asked.elapsed() < ASK_EVERY {
                return Ok(());
            }
            *asked = Instant::now();
        }
        // A libvirtd that is away, or a domain that has ended, is noticed elsewhere.
        match hypervisor.paused(uuid) {
            Ok(Some(PauseReason::IoError)) => Err(Error::new(
                Kind::Space,
                "QEMU has stopped the guest after an I/O error; the run was cut short, so that the guest can be resumed",
            )
            .advise(advice::Overlay::GuestStopped)),
            _ => Ok(()),
        }
    }
}

/// The end of every settling: resumes a guest that is ours to resume, and takes down what has to be known of one that
/// stands. `on_overlay`: a disk still is on an overlay, so that the guest has to wait. Never an error: the disks are
/// right.
pub fn conclude(
    hypervisor: &dyn Hypervisor,
    journal: &Journal,
    uuid: &DomainUuid,
    on_overlay: bool,
    account: &mut Account,
) {
    let found = match on_overlay {
        true => hypervisor.paused(uuid).map(still_on_overlay),
        false => settle(hypervisor, journal, uuid),
    };
    match found {
        Ok(Some(stopped)) => {
            tracing::error!(domain = %uuid, "{}", stopped.why);
            account.alarms.push(stopped.why.clone());
            account.stopped = Some(stopped);
        }
        Ok(None) => {}
        Err(e) if e.kind() == Kind::NotFound => {}
        Err(e) => account.alarms.push(format!("whether the guest runs could not be found out: {}", e.chain())),
    }
}

/// What has to be said of a domain whose guest an I/O error has stopped, and that no run resumes.
pub fn remark(paused: Option<PauseReason>) -> Option<GuestStopped> {
    let why = STANDS.into();
    (paused == Some(PauseReason::IoError)).then_some(GuestStopped { resumed: false, why })
}

/// As [`remark`], where a disk still is on an overlay of ours.
pub fn still_on_overlay(paused: Option<PauseReason>) -> Option<GuestStopped> {
    remark(paused).map(|stopped| GuestStopped { why: ON_OVERLAY.into(), ..stopped })
}

const RESUMED: &str = "QEMU had stopped the guest after an I/O error while a run held its disks. Its disks are its own \
                       images again, and the guest was resumed. Give overlays more room: another directory, or more free space.";
const STOPPED_AGAIN: &str = "QEMU stopped the guest after an I/O error while a run held its disks. It was resumed on its \
                             own images and stopped again at once. `virsh domblkerror DOMAIN` names the disk; put its \
                             storage right. Then the next run, or a repair, resumes the guest.";
const STANDS: &str = "QEMU has stopped the guest after an I/O error. `virsh domblkerror DOMAIN` names the disk; put its \
                      storage right, then run `virsh resume DOMAIN`.";
const ON_OVERLAY: &str = "QEMU has stopped the guest after an I/O error while a disk is on an overlay of ours. The guest \
                          is resumed once the overlay is committed: repair the domain, or wait for the next run.";

fn no_room(full: &Place) -> String {
    format!(
        "QEMU stopped the guest after an I/O error while a run held its disks. It was not resumed: only {} MiB are free where \
         disk '{}' lies ({}). Free at least {} MiB there. Then the next run, or a repair, resumes the guest.",
        full.free_bytes.unwrap_or_default() >> 20,
        full.disk,
        full.path.display(),
        ROOM_MIN >> 20
    )
}

/// Where the guest writes to. Only files need room; one that has all of its bytes already needs no more.
fn places(domain: &DomainView) -> Vec<Place> {
    let images = domain.disks.iter().filter(|disk| disk.kind == DiskKind::Image && !disk.read_only);
    let tops = images.filter_map(|disk| Some((disk, disk.live.as_ref()?.top())));
    tops.map(|(disk, top)| {
        let size = disk.size.map_or(u64::MAX, |size| size.0);
        let grows = std::fs::metadata(&top.path).is_ok_and(|m| m.is_file() && m.blocks().saturating_mul(512) < size);
        let free_bytes = grows.then(|| free_bytes(top.path.parent().unwrap_or(Path::new("/")))).flatten();
        Place { disk: disk.name.clone(), path: top.path.clone(), free_bytes }
    })
    .collect()
}

#[cfg(test)]
#[path = "stopped_tests.rs"]
mod tests;
