//! The plan of a run as data: what will be read of each disk, how and why, and what speaks against it.

use crate::block::DiskSize;
use crate::block::digest::Digest;
use crate::engine::stats::{DiskStats, Mode};
use crate::error::Error;
use crate::image::Chain;
use crate::name::{DiskName, DomainName, DomainUuid, Generation, PointId, RunId};
use crate::replica::left_out::LeftOut;
use crate::replica::{HeadDamage, SeedView};
use crate::replicate::capture::quiesce::Quiesce;
use crate::replicate::plan::conflict::Conflict;
use crate::replicate::plan::options::CaptureKind;
use crate::replicate::tracking::audit::AuditPlan;
use crate::replicate::tracking::{bitmap_rotation, failover_bitmap};
use serde::Serialize;
use std::path::PathBuf;

/// Everything that a run will do, decided before anything is touched.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// Name of the domain.
    pub domain: DomainName,
    /// UUID of the domain.
    pub uuid: DomainUuid,
    /// How the disks are made to stand still.
    pub capture: CaptureKind,
    /// Why so.
    pub capture_reason: String,
    /// Whether the guest agent is asked, this time.
    #[serde(skip)]
    pub quiesce: Quiesce,
    /// Generation that this host has for the domain; the point is made with it.
    pub generation: Generation,
    /// The head the patches start from.
    pub head: Option<PointId>,
    /// The run that made it, whose bitmaps lead on from it.
    #[serde(skip)]
    pub head_run: Option<RunId>,
    /// Seconds that the disks will stand still, as far as that can be foreseen; absent where nothing is frozen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hold_s: Option<u64>,
    /// Disks that the point will contain. Disks that cannot be planned have a conflict instead.
    pub disks: Vec<DiskPlan>,
    /// Disks that the point will not contain, each with the reason.
    pub skipped: LeftOut,
    /// Why the run would not begin. Empty: it would.
    pub conflicts: Vec<Conflict>,
    /// What an operator should know beforehand.
    pub notes: Vec<String>,
}

impl Plan {
    /// Finds a planned disk by its name. `None`: the disk is skipped, or cannot be planned.
    pub fn disk(&self, name: &DiskName) -> Option<&DiskPlan> {
        self.disks.iter().find(|d| &d.name == name)
    }

    /// Gives the disks that the point will contain, in the order of the definition.
    pub fn replicated(&self) -> impl Iterator<Item = &DiskPlan> {
        self.disks.iter()
    }

    /// Disks that turn out to start from a seed are compared with it.
    pub fn start_from(&mut self, seeds: &[SeedView]) {
        for disk in &mut self.disks {
            let Some(seed) = seeds.iter().find(|s| s.name == disk.name) else { continue };
            disk.mode = Mode::Digest;
            disk.head = Some((seed.size, seed.root));
            disk.reason = format!(
                "the newest point does not have this disk, but the target has {} MiB of a copy: every block is compared with that",
                seed.data_bytes >> 20
            );
        }
    }

    /// The first conflict as the error a run ends with.
    pub fn refusal(&self) -> Option<Error> {
        let conflict = self.conflicts.first()?;
        let mut e = Error::new(conflict.kind(), conflict.to_string()).advise(conflict.advice()).domain(&self.domain);
        if let Some(disk) = conflict.disk() {
            e = e.disk(disk);
        }
        Some(e)
    }
}

/// What a run will do with one disk.
#[derive(Debug, Clone, Serialize)]
pub struct DiskPlan {
    /// Name of the disk as the domain has it, for example `vda`.
    pub name: DiskName,
    /// Virtual size of the disk in bytes.
    pub size: DiskSize,
    /// How the run finds the changes of the disk.
    pub mode: Mode,
    /// Why this mode and no cheaper one.
    pub reason: String,
    /// How the frozen image will be read, and why so.
    pub reader: String,
    /// Most bytes that will be written at the target, as far as it can be known: reserved there.
    pub reserve_bytes: u64,
    /// What its overlay, or its scratch file, is expected to grow to; absent where nobody has seen yet how fast the
    /// guest writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlay_bytes: Option<u64>,
    /// Most that its commit can add to the image on the overlay's own file system.
    #[serde(skip)]
    pub commit_bytes_max: u64,
    /// What is read: the chain as it stands now, uppermost first.
    pub chain: Chain,
    /// The bitmap whose marks are shipped, in mode `bitmap`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bitmap: Option<String>,
    /// What is compared although the bitmap calls it clean, beside a random sample.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<AuditPlan>,
    /// What its images occupy: a run that reads it from end to end reads no more.
    #[serde(skip)]
    pub data_bytes: u64,
    /// Directory for the disk's overlay or scratch file.
    #[serde(skip)]
    pub overlay_dir: PathBuf,
    /// Size and root that the copy has from which the patch starts: the head or a seed. `None`: it starts from
    /// nothing.
    #[serde(skip)]
    pub head: Option<(DiskSize, Digest)>,
    /// Compared by digest because its tracking is in doubt.
    #[serde(skip)]
    pub tracking_doubt: bool,
    /// What a scrub found damaged in the head's copy, which this run therefore sends again.
    #[serde(skip)]
    pub repairs: Option<HeadDamage>,
    /// How the head's copy of it came about.
    #[serde(skip)]
    pub head_stats: DiskStats,
}

impl DiskPlan {
    /// Compares by digest after all, because its tracking is in doubt.
    pub fn doubt(&mut self, why: &str) {
        self.mode = Mode::Digest;
        self.tracking_doubt = true;
        self.reason = compared(why);
    }

    /// The bitmap of its failover has led to this run's point, or to the head (by a run that died before it dropped
    /// it).
    pub fn tracked_from_failover(&self) -> bool {
        self.bitmap.as_deref().is_some_and(failover_bitmap::is_birth)
            || self.head_stats.reason.starts_with(failover_bitmap::REASON)
    }

    /// What an operator is told when the point is sealed.
    pub fn repaired(&self) -> Option<String> {
        let damage = self.repairs.as_ref()?;
        let (name, what) = (&self.name, in_words(damage));
        Some(format!(
            "disk {name}: a scrub of the target had found {what} in the newest point; this run has sent again what was damaged, and the new point is whole. Older points stay as they are: look at the target's storage"
        ))
    }

    /// What an operator is told where that is the second time in a row.
    pub fn doubted_again(&self) -> Option<String> {
        bitmap_rotation::doubted_again(&self.name, &self.head_stats, &self.reason).filter(|_| self.tracking_doubt)
    }
}

/// The reason of a comparison by digest that a bitmap would have saved.
pub(in crate::replicate) fn compared(why: &str) -> String {
    format!("{why}: every block is read and compared by digest")
}

pub(crate) fn in_words(damage: &HeadDamage) -> String {
    match damage.beyond_repair {
        true => "a damaged image or change list".to_owned(),
        false => format!("{} damaged bytes", damage.bytes),
    }
}
