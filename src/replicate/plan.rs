//! What a run will do, per disk and with its reason, or why it will not: decided from plain views, touching nothing.

pub mod capture_choice;
pub mod conflict;
pub mod facts;
pub mod forecast;
pub(super) mod label;
pub mod options;
pub mod planned;
pub mod rights;
pub mod survey;

use crate::block::DiskSize;
use crate::engine::stats::Mode;
use crate::hypervisor::{DiskKind, DiskView, DomainView, Power};
use crate::image::{Chain, Layer};
use crate::name::{DiskName, Generation};
use crate::replica::left_out::{Cause, LeftOut, Skipped};
use crate::replica::{HeadDamage, ReplicaView};
pub use crate::replicate::capture::names::is_our_overlay;
use crate::replicate::capture::quiesce::{self, Quiesce};
use crate::replicate::plan::capture_choice::Choice;
use crate::replicate::plan::conflict::Conflict;
use crate::replicate::plan::facts::DiskFacts;
pub use crate::replicate::plan::options::{CaptureKind, PlanOptions};
pub use crate::replicate::plan::planned::Plan;
use crate::replicate::plan::planned::{DiskPlan, compared, in_words};
use crate::replicate::tracking::bitmap_rotation::Tracked;
use crate::replicate::tracking::{audit, failover_bitmap};
use std::path::{Path, PathBuf};

/// Plans a run, by the capture that was chosen. Pure. Whether its overlays will have room is
/// [`forecast`]'s.
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
