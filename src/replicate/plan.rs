//! What a run will do, per disk and with its reason, or why it will not: decided from plain views, touching nothing.

pub mod capture_choice;
pub mod conflict;
pub mod forecast;
pub(super) mod label;
pub mod rights;
pub mod survey;

pub use super::capture::is_our_overlay;
use crate::block::DiskSize;
use crate::block::digest::Digest;
use crate::engine::stats::{DiskStats, Mode};
use crate::error::Error;
use crate::hypervisor::{DiskKind, DiskView, DomainView, Power};
use crate::image::{Chain, Layer};
use crate::name::{DiskName, DomainName, DomainUuid, Generation, PointId, RunId};
use crate::replica::left_out::{Cause, LeftOut, Skipped};
use crate::replica::{HeadDamage, ReplicaView, SeedView};
use crate::replicate::capture::quiesce::{self, Quiesce, QuiesceOptions};
pub use crate::replicate::plan::capture_choice::CaptureKind;
use crate::replicate::plan::capture_choice::{CaptureWish, Choice};
use crate::replicate::plan::conflict::Conflict;
use crate::replicate::plan::forecast::{Room, SpaceOptions};
use crate::replicate::tracking::audit::{self, AuditOptions, AuditPlan};
use crate::replicate::tracking::bitmap_rotation::{self, Tracked};
use crate::replicate::tracking::failover_bitmap;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Space that is kept free where overlays lie unless told otherwise, in bytes, or the freeze is not begun.
pub const OVERLAY_SPACE_MIN: u64 = 256 << 20;

#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    pub domain: DomainName,
    pub uuid: DomainUuid,
    pub capture: CaptureKind,
    /// Why so.
    pub capture_reason: String,
    /// Whether the guest agent is asked, this time.
    #[serde(skip)]
    pub quiesce: Quiesce,
    pub generation: Generation,
    /// The head the patches start from.
    pub head: Option<PointId>,
    /// The run that made it, whose bitmaps lead on from it.
    #[serde(skip)]
    pub head_run: Option<RunId>,
    /// Seconds that the disks will stand still, as far as that can be foreseen; absent where nothing is frozen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hold_s: Option<u64>,
    pub disks: Vec<DiskPlan>,
    pub skipped: LeftOut,
    /// Why the run would not begin. Empty: it would.
    pub conflicts: Vec<Conflict>,
    /// What an operator should know beforehand.
    pub notes: Vec<String>,
}

impl Plan {
    pub fn disk(&self, name: &DiskName) -> Option<&DiskPlan> {
        self.disks.iter().find(|d| &d.name == name)
    }

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

#[derive(Debug, Clone, Serialize)]
pub struct DiskPlan {
    pub name: DiskName,
    pub size: DiskSize,
    pub mode: Mode,
    /// Why this mode and no cheaper one.
    pub reason: String,
    /// How the frozen image will be read, and why so.
    pub reader: String,
    /// Most bytes that will be written at the target, as far as it can be known: reserved there.
    pub reserve_bytes: u64,
    /// What its overlay, or its scratch file, is expected to grow to; absent where nobody has seen yet how fast the guest writes.
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
    #[serde(skip)]
    pub overlay_dir: PathBuf,
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

    /// The bitmap of its failover has led to this run's point, or to the head (by a run that died before it dropped it).
    pub fn led_from_birth(&self) -> bool {
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

/// What the operator asked for.
#[derive(Debug, Clone, Default)]
pub struct PlanOptions {
    /// How the disks of a running domain are made to stand still.
    pub capture: CaptureWish,
    /// Whether the guest agent holds the guest's file systems meanwhile.
    pub quiesce: QuiesceOptions,
    /// Directory for the overlays of all disks; of block devices only, if `None` means "beside the image".
    pub overlay_dir: Option<PathBuf>,
    /// Directory for overlays of block devices where no other is given.
    pub block_overlay_dir: PathBuf,
    pub exclude_disks: Vec<DiskName>,
    /// Read everything and send everything, whatever the target has.
    pub full: bool,
    /// Read everything and compare, whatever a bitmap says.
    pub compare: bool,
    /// The operator says that this host is the domain's source from now on, whatever the replica knows.
    pub take_over: bool,
    pub audit: AuditOptions,
    pub space: SpaceOptions,
}

/// What was found out about a disk beyond libvirt's view; gathered by the caller, so that planning stays pure.
#[derive(Debug, Clone)]
pub struct DiskFacts {
    pub name: DiskName,
    /// The chain to read: the live one, or for a domain that is off the resolved one; or why there is none.
    pub chain: Result<Chain, String>,
    /// Bytes the chain's images occupy, all together.
    pub allocated_bytes: u64,
    /// How the image will be read.
    pub reader: String,
    /// Where the overlay would lie; `None` if there is no such directory.
    pub overlay_room: Option<Room>,
    /// Whether the changes since the head are known.
    pub tracked: Tracked,
}

/// Plans a run, by the capture that was chosen. Pure. Whether its overlays will have room is [`forecast`](crate::replicate::plan::forecast)'s.
pub fn plan(
    domain: &DomainView,
    facts: &[DiskFacts],
    replica: &ReplicaView,
    our_generation: Generation,
    options: &PlanOptions,
    capture: Choice,
) -> Plan {
    let mut plan = Plan {
        domain: domain.name.clone(),
        uuid: domain.uuid.clone(),
        capture: capture.kind,
        capture_reason: capture.reason,
        quiesce: options.quiesce.after(&replica.points),
        generation: our_generation,
        head: replica.head().map(|p| p.id.clone()),
        head_run: replica.head().map(|p| p.run.clone()),
        hold_s: None,
        disks: Vec::new(),
        skipped: LeftOut::default(),
        conflicts: Vec::new(),
        notes: Vec::new(),
    };
    if domain.managed_save {
        plan.notes
            .push("the domain has a saved memory image: it does not travel, the point is as after a power cut".into());
    }
    if let Some(promoted) = &replica.promoted {
        plan.conflicts.push(Conflict::BroughtUp { promoted: promoted.clone() });
    } else if replica.generation > our_generation {
        plan.conflicts.push(Conflict::Promoted { ours: our_generation, theirs: replica.generation });
    }
    if let Some(job) = &domain.domain_job {
        plan.conflicts.push(Conflict::DomainJob { job: job.clone() });
    }
    if domain.power != Power::Off {
        match (plan.quiesce, quiesce::can_hold(domain)) {
            (Quiesce::No, _) => {}
            (_, Ok(())) => {
                plan.notes.push("the guest agent holds the guest's file systems while the disks are frozen".into())
            }
            (Quiesce::Try, Err(why)) => plan.notes.push(format!("the point is as after a power cut: {why}")),
            (Quiesce::Require, Err(why)) => plan.conflicts.push(Conflict::CannotQuiesce { why: why.to_owned() }),
        }
    }
    for disk in &domain.disks {
        match skip_reason(disk, options) {
            Some((cause, reason)) => plan.skipped.push(Skipped { name: disk.name.clone(), reason, cause }),
            None => plan_disk(&mut plan, domain, disk, facts, replica, options),
        }
    }
    if plan.disks.is_empty() && plan.conflicts.is_empty() {
        plan.conflicts.push(Conflict::NoDisks);
    }
    let needed_bytes: u64 = plan.disks.iter().map(|d| d.reserve_bytes).sum();
    if needed_bytes > replica.free_bytes {
        plan.conflicts.push(Conflict::NoTargetSpace { free_bytes: replica.free_bytes, needed_bytes });
    }
    plan
}

/// Why a disk is left out of every point; `None`: it is replicated.
pub fn skip_reason(disk: &DiskView, options: &PlanOptions) -> Option<(Cause, String)> {
    if options.exclude_disks.contains(&disk.name) {
        return Some((Cause::Excluded, "is excluded by the operator".into()));
    }
    Some(match &disk.kind {
        DiskKind::Removable(why) => (Cause::Removable, why.clone()),
        DiskKind::Unsupported(why) => (Cause::Unprotected, why.clone()),
        DiskKind::Image if disk.read_only => (Cause::Unprotected, "is read-only".into()),
        DiskKind::Image if disk.shareable => {
            (Cause::Unprotected, "is shareable: another domain may write to it at any time".into())
        }
        DiskKind::Image => return None,
    })
}

fn plan_disk(
    plan: &mut Plan,
    domain: &DomainView,
    disk: &DiskView,
    facts: &[DiskFacts],
    replica: &ReplicaView,
    options: &PlanOptions,
) {
    let name = &disk.name;
    if disk.job.is_some() {
        plan.conflicts.push(Conflict::BlockJob { disk: name.clone() });
    }
    let Some(facts) = facts.iter().find(|f| &f.name == name) else {
        plan.conflicts.push(Conflict::Unreadable { disk: name.clone(), why: "nothing was found out about it".into() });
        return;
    };
    let chain = match &facts.chain {
        Ok(chain) => chain.clone(),
        Err(why) => {
            plan.conflicts.push(Conflict::Unreadable { disk: name.clone(), why: why.clone() });
            return;
        }
    };
    let Some(size) = disk.size else {
        plan.conflicts.push(Conflict::SizeUnknown { disk: name.clone() });
        return;
    };
    plan.conflicts.extend(chain_conflict(domain, disk, &chain));
    let overlay_dir = overlay_dir(chain.top(), options);
    if plan.capture != CaptureKind::Off && facts.overlay_room.is_none() {
        plan.conflicts.push(Conflict::NoOverlayDir { disk: name.clone(), dir: overlay_dir.clone() });
    }
    let in_head = replica.head().and_then(|p| p.disk(name));
    let damage = replica.damaged.iter().find(|d| d.disk == *name);
    let repaired = repair_mode(damage, in_head.map(|d| d.size), options).map(|(mode, reason)| (mode, reason, false));
    let (mode, mut reason, tracking_doubt) =
        repaired.unwrap_or_else(|| choose_mode(in_head.map(|d| d.size), size, replica, &facts.tracked, options));
    let seed_bytes = seed_bytes(name, mode, replica, options);
    if seed_bytes > 0 {
        reason += &format!("; {} MiB of a copy are there to start from", seed_bytes >> 20);
    }
    let bitmap = match &facts.tracked {
        Tracked::By { bitmap, .. } if mode == Mode::Bitmap => Some(bitmap.clone()),
        _ => None,
    };
    // The head remembers where the last audit ended; a run that compared everything begins a new round.
    let cursor = in_head.and_then(|d| d.stats.audit.as_ref()).filter(|a| a.lies == 0).map_or(0, |a| a.next_offset);
    let audit = (mode == Mode::Bitmap).then(|| audit::plan(cursor, size, &options.audit)).flatten();
    let planned = DiskPlan {
        name: name.clone(),
        size,
        mode,
        reason,
        reader: facts.reader.clone(),
        reserve_bytes: reserve(mode, size, in_head.map(|d| d.size), facts).saturating_sub(seed_bytes),
        overlay_bytes: None,
        commit_bytes_max: 0,
        data_bytes: facts.allocated_bytes,
        chain,
        bitmap,
        audit,
        overlay_dir,
        head: in_head.filter(|_| mode != Mode::Full).map(|d| (d.size, d.root)),
        tracking_doubt,
        repairs: damage.filter(|_| in_head.is_some()).cloned(),
        head_stats: in_head.map(|d| d.stats.clone()).unwrap_or_default(),
    };
    plan.notes.extend(planned.doubted_again());
    plan.disks.push(planned);
}

/// What is wrong with the chain a disk stands on.
fn chain_conflict(domain: &DomainView, disk: &DiskView, chain: &Chain) -> Option<Conflict> {
    let top = &chain.top().path;
    if is_our_overlay(top) {
        return Some(Conflict::StrayOverlay { disk: disk.name.clone(), overlay: top.clone() });
    }
    let defined = disk.inactive.as_ref().filter(|d| domain.power != Power::Off && d.path != *top)?;
    Some(Conflict::DefinitionDiffers { disk: disk.name.clone(), live: top.clone(), defined: defined.path.clone() })
}

/// Bytes of a copy that a first copy of this disk can start from.
fn seed_bytes(name: &DiskName, mode: Mode, replica: &ReplicaView, options: &PlanOptions) -> u64 {
    let usable = mode == Mode::Full && !options.full;
    replica.seeds.iter().find(|(disk, _)| usable && disk == name).map_or(0, |(_, bytes)| *bytes)
}

/// Most bytes that a run may write at the target, as far as that is known beforehand.
fn reserve(mode: Mode, size: DiskSize, head_size: Option<DiskSize>, facts: &DiskFacts) -> u64 {
    match (mode, &facts.tracked) {
        (Mode::Full, _) => facts.allocated_bytes.min(size.0),
        // The guest goes on writing until the freeze; the store's floor is for that.
        (Mode::Bitmap, Tracked::By { dirty_bytes, .. }) => {
            let grown = head_size.map_or(0, |head| size.0.saturating_sub(head.0));
            dirty_bytes.saturating_add(grown.min(facts.allocated_bytes)).min(size.0)
        }
        // What a comparison will find is not known; the store keeps its floor for that too.
        _ => 0,
    }
}

/// The reason of a comparison by digest that a bitmap would have saved.
pub(super) fn compared(why: &str) -> String {
    format!("{why}: every block is read and compared by digest")
}

/// The mode of a disk of which the head is damaged, and its reason. Where that is content, it is compared with what is
/// really stored; where there is nothing to compare with any more, the disk starts anew.
fn repair_mode(
    damage: Option<&HeadDamage>,
    in_head: Option<DiskSize>,
    options: &PlanOptions,
) -> Option<(Mode, String)> {
    let damage = damage.filter(|_| in_head.is_some() && !options.full)?;
    let found = format!("a scrub of the target found {} in the newest point", in_words(damage));
    Some(match damage.beyond_repair {
        true => (Mode::Full, format!("{found}: there is nothing to compare with, the disk starts anew")),
        false => (Mode::Digest, format!("{found}: every block is compared with what is really stored there")),
    })
}

fn in_words(damage: &HeadDamage) -> String {
    match damage.beyond_repair {
        true => "a damaged image or change list".to_owned(),
        false => format!("{} damaged bytes", damage.bytes),
    }
}

/// The mode, its reason, and whether a doubt about the tracking is that reason.
fn choose_mode(
    in_head: Option<DiskSize>,
    size: DiskSize,
    replica: &ReplicaView,
    tracked: &Tracked,
    options: &PlanOptions,
) -> (Mode, String, bool) {
    let sure = |mode, reason: String| (mode, reason, false);
    if options.full {
        return sure(Mode::Full, "asked for by the operator".into());
    }
    let Some(head) = replica.head() else {
        return sure(Mode::Full, "the target has no point of this domain".into());
    };
    let Some(head_size) = in_head else {
        return sure(Mode::Full, "the newest point does not have this disk".into());
    };
    if options.compare {
        return sure(Mode::Digest, "asked for by the operator: every block is read and compared".into());
    }
    if size < head_size {
        return sure(
            Mode::Digest,
            format!("the disk shrank from {head_size} to {size} bytes: every block is compared"),
        );
    }
    let recorded = match tracked {
        Tracked::By { bitmap, .. } if failover_bitmap::is_birth(bitmap) => failover_bitmap::REASON.to_owned(),
        _ => format!("a dirty bitmap has recorded every change since {}", head.id),
    };
    match tracked {
        Tracked::By { .. } if size > head_size => {
            sure(Mode::Bitmap, format!("{recorded}; the disk grew, the new range counts as changed"))
        }
        Tracked::By { .. } => sure(Mode::Bitmap, recorded),
        Tracked::Untracked(why) => sure(Mode::Digest, compared(why)),
        Tracked::Doubt(why) => (Mode::Digest, compared(why), true),
    }
}

/// Where the overlay of a disk with this uppermost image lies.
pub fn overlay_dir(top: &Layer, options: &PlanOptions) -> PathBuf {
    match &options.overlay_dir {
        Some(dir) => dir.clone(),
        None if top.block_device => options.block_overlay_dir.clone(),
        None => top.path.parent().unwrap_or(Path::new("/")).to_owned(),
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
