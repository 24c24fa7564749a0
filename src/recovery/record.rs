//! The plain data that failover, bring-up and the retiring of a home copy share. Formats: docs/formats/.

use crate::name::{DiskName, DomainName, DomainUuid, PointId};
use crate::replica::PointView;
use crate::replicate::state::handover_record::DiskFormat;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A failover, from its first step until it was undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailoverRecord {
    /// Version of this document: 1.
    pub format: u32,
    /// Name of the domain that is brought up.
    pub domain: DomainName,
    /// UUID of the domain that is brought up.
    pub uuid: DomainUuid,
    /// Recovery point that the overlays lie on.
    pub point: PointId,
    /// When that point's disks stood still.
    pub frozen_at: Timestamp,
    /// Its overlays.
    pub dir: PathBuf,
    /// The last step that is recorded as done. A repeated command goes on from it.
    pub stage: Stage,
    /// When the failover began, by this host's clock.
    pub started_at: Timestamp,
    /// As it was asked for by whoever handed the domain over; without an order, as the point says it was at the source.
    #[serde(default)]
    pub wanted: Wanted,
    /// See [`detach`](super::detach): the disks that stand alone, durably.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub detached: Vec<DiskName>,
    /// Who had the images open when the next one of them was begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detaching_in: Option<Instance>,
    /// It has the state of a TPM here, which came with the point.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tpm: bool,
    /// The disks whose own image is to be raw.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub raw: Vec<DiskName>,
    /// The guest may be held, for this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moving: Option<Moving>,
}

/// A disk whose guest moves from its overlay to its raw image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moving {
    /// Name of the disk that moves, as the domain has it.
    pub disk: DiskName,
    /// The guest ran before, and is let run again.
    pub resume: bool,
}

/// One running of a domain: libvirt counts anew after each boot of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// libvirt's id of the running domain. It is unique only within one boot of the host.
    pub id: u32,
    /// Id of the host's boot in which `id` was given. `None`: the kernel did not say.
    pub boot: Option<String>,
}

/// How far bringing a domain up for good has come. It names what is already done, never what comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The guest was never started: what there is of overlays is worth nothing.
    Begun,
    /// The overlays are complete, and the guest may have written to them.
    Made,
    /// It was started.
    Running,
    /// It is to be thrown away.
    Undoing,
    /// It is what the domain is now.
    Committed,
    /// The same, and it is given images of its own.
    Detaching,
    /// They are complete; the replica may not know yet.
    Detached,
    /// The domain lives elsewhere again: see [`hand_back`](super::hand_back).
    HandingBack,
}

impl Stage {
    /// There is no way back by undoing.
    pub fn is_committed(self) -> bool {
        matches!(self, Stage::Committed | Stage::Detaching | Stage::Detached | Stage::HandingBack)
    }
}

/// What a domain is to be like where it is brought up, beside what its definition says: by order, or as its point says.
/// An agent that does not know of it goes without.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// It starts with the host, as it did at its source.
    #[serde(default)]
    pub autostart: bool,
    /// Image format for the domain's own disks after `detach`. The default is qcow2.
    #[serde(default)]
    pub disk_format: DiskFormat,
}

impl Wanted {
    /// By nobody's order. A point that does not say whether its domain started with its host leaves that off: to start
    /// what nobody wanted is worse than to wait for a word.
    pub fn of(point: &PointView) -> Wanted {
        Wanted { autostart: point.autostart == Some(true), ..Wanted::default() }
    }
}

/// What has given way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GaveWay {
    /// The point that holds what the host had; `None`: libvirt knows no such domain, so there was nothing.
    pub point: Option<PointId>,
}

/// What is copied out of a point's images because a disk may not consist of as many as that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Copied {
    /// Images of the deepest disk, the overlay included.
    pub deepest: u64,
    /// The uppermost ones of a disk that are copied, at most.
    pub images: u64,
    /// What they hold, of all disks; 0 where nothing is copied.
    pub bytes: u64,
}
