//! The records of the journal, as plain data: what a run may have changed at the source, until it has been put right.
//!
//! Format: docs/formats/journal.md. [`journal`](super::journal) writes and reads them.

use crate::block::DiskSize;
use crate::file_id::{FileId, Stamp};
use crate::hypervisor::backup::Backup;
use crate::image::Layer;
use crate::name::{DiskName, DomainName, DomainUuid, PointId, RunId};
use crate::replicate::settle::decide::Phase;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A program that has to be run because another was, before the freeze.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwedHook {
    /// Program and its arguments.
    pub command: Vec<String>,
    /// Seconds that the program may take.
    pub timeout_s: u64,
    /// Environment variables that the program gets, as name and value.
    pub env: Vec<(String, String)>,
}

/// A guest that ran when its disks were frozen, and that QEMU stopped for an I/O error since: ours to let go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoppedRecord {
    /// The run that had frozen its disks.
    pub run: RunId,
    /// libvirt's id of the instance, and the boot of this host in which it has that id.
    pub instance: Option<u32>,
    /// Id of the host's boot in which `instance` was given. `None`: the kernel did not say.
    pub boot: Option<String>,
}

/// A guest that an I/O error has stopped, for reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStopped {
    /// It runs again.
    pub resumed: bool,
    /// What happened, and what to do: a sentence.
    pub why: String,
}

/// A run that has (or may have) changed something at the source, until it has been put right.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Version of this document: 1.
    pub format: u32,
    /// Id of the open run.
    pub run: RunId,
    /// Name of the domain.
    pub domain: DomainName,
    /// UUID of the domain.
    pub uuid: DomainUuid,
    /// libvirt's id of the instance that was frozen.
    pub instance: Option<u32>,
    /// The boot of this host in which it has that id: libvirt counts anew after each.
    #[serde(default)]
    pub boot: Option<String>,
    /// The domain had a persistent definition when the run began.
    pub persistent: bool,
    /// The step that the run has begun. It is written before the step.
    pub phase: Phase,
    /// We paused, or were about to pause, a domain that ran.
    pub resume_after: bool,
    /// The guest ran when its disks were frozen: an I/O error that has stopped it came later, and is ours.
    #[serde(default)]
    pub ran: bool,
    /// libvirt's id of the instance whose QEMU was refused to write to a base; in the boot above.
    #[serde(default)]
    pub commit_denied: Option<u32>,
    /// Disks that the run freezes, in the order of the plan.
    pub disks: Vec<DiskRecord>,
    /// When the record was made, by this host's clock.
    pub started_at: Timestamp,
    /// When the disks stood still; set with [`Phase::Frozen`].
    pub frozen_at: Option<Timestamp>,
    /// The point that the run led to, once it was sealed.
    pub point: Option<PointId>,
}

/// What the record of a run says of one disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Name of the disk as the domain has it.
    pub name: DiskName,
    /// The image that was frozen and that the domain is to end on: as planned, then as seen right below our overlay.
    pub base: Layer,
    /// Absolute path of our overlay. Until it is retired, the overlay chain is the valid view of the disk.
    pub overlay: PathBuf,
    /// Virtual size of the disk in bytes, when the run was planned.
    pub size: DiskSize,
    /// Set with [`Phase::Frozen`]: the base as it stood, to notice a stranger's writes.
    pub base_stamp: Option<Stamp>,
    /// Set with [`Phase::Frozen`]: the overlay's identity.
    pub overlay_id: Option<FileId>,
    /// The base is complete, and the overlay was like this when that was seen.
    pub complete_at: Option<Stamp>,
    /// Only the running instance had the disk: when that is over no definition names it, and our record is all there
    /// is.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub live_only: bool,
    /// A commit by `qemu-img` was begun: if the base has changed since the freeze, that is why.
    #[serde(default)]
    pub off_commit: bool,
}

impl DiskRecord {
    /// The overlay's name once it is retired. The kind of name that no tool opens by itself.
    pub fn retired(&self) -> PathBuf {
        suffixed(&self.overlay, ".retired")
    }

    /// The overlay's name once it is set aside for a person.
    pub fn kept(&self) -> PathBuf {
        suffixed(&self.overlay, ".kept")
    }
}

fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// A backup that was, or may have been, begun, until nothing of it is left.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackupRecord {
    /// Version of this document: 1.
    pub format: u32,
    /// Id of the run that began the backup.
    pub run: RunId,
    /// Name of the domain that is backed up.
    pub domain: DomainName,
    /// UUID of the domain that is backed up.
    pub uuid: DomainUuid,
    /// libvirt's id of the instance it was begun on, and the boot of this host in which it has that id. For people: the
    /// job is known by its files.
    pub instance: Option<u32>,
    /// Id of the host's boot in which `instance` was given. `None`: the kernel did not say.
    pub boot: Option<String>,
    /// The guest ran when the job was begun: an I/O error that has stopped it came later, and is ours.
    #[serde(default)]
    pub ran: bool,
    /// Socket and scratch files of the job. By these the job is recognized as ours.
    pub backup: Backup,
    /// When the record was written, just before the job began, by the source's clock.
    pub started_at: Timestamp,
}
