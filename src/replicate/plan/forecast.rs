//! Room at the source, foreseen: what the overlays will grow to while the disks stand still, and whether that fits.
//! Pure.
//!
//! How fast the guest writes was seen twice: by the bitmap, since the head, and by the runs before it. How long the
//! disks will stand still follows from what is to be read and from how fast the last runs were. Neither is known of a
//! first run, so a floor is kept free in any case, and `space_watch` watches it while the disks stand still. An overlay
//! that lies beside its image takes its room twice: the commit writes into the image what the overlay still holds.

use crate::block::BLOCK_LEN;
use crate::engine::stats::Mode;
use crate::name::DiskName;
use crate::replica::{PointDisk, ReplicaView};
use crate::replicate::plan::CaptureKind;
use crate::replicate::plan::conflict::Conflict;
use crate::replicate::plan::facts::{DiskFacts, Room};
pub use crate::replicate::plan::options::{OverlayLimits, SpaceOptions};
use crate::replicate::plan::planned::{DiskPlan, Plan};
use crate::replicate::state::report::Report;
use crate::replicate::tracking::bitmap_rotation::Tracked;
use jiff::Timestamp;
use std::collections::BTreeMap;
use std::time::Duration;

/// A domain is held for this long beside the reading: to connect, to seal, to commit.
const HOLD_FIXED: Duration = Duration::from_secs(10);

/// Bytes per second that a run is expected to read while no run has told. A slow disk, or a link of 200 Mbit/s.
const SPEED_DEFAULT: u64 = 24 << 20;

/// A run that read less says more of its fixed costs than of its speed.
const TELLING_BYTES: u64 = 64 << 20;

/// So many runs are looked back at.
const RUNS: usize = 8;

/// A guest seen for a shorter time counts as seen for so long: a burst is no rate.
const SEEN_MIN: Duration = Duration::from_secs(10);

/// The guest may write faster than it did, and writes on while the overlay is committed.
const MARGIN: u64 = 2;

/// Foresees how far the overlays will grow, and adds a conflict for every file system that has too little room for
/// them. A backup's scratch files grow the same way: by each cluster that the guest writes, once. `past`: reports of
/// this domain's runs to this target, oldest first.
pub fn foresee(
    plan: &mut Plan,
    facts: &[DiskFacts],
    replica: &ReplicaView,
    past: &[Report],
    now: Timestamp,
    options: &SpaceOptions,
) {
    if plan.capture == CaptureKind::Off {
        return;
    }
    let hold = hold(plan, facts, past);
    for disk in &mut plan.disks {
        let Some(facts) = facts.iter().find(|f| f.name == disk.name) else { continue };
        disk.overlay_bytes = dirty_rate(facts, replica, past, now).map(|rate| growth(rate, hold, disk.size.0));
        let beside_image = facts.overlay_room.is_some_and(|r| r.beside_image);
        // What the image has already, a commit only overwrites; a scratch file is never committed.
        disk.commit_bytes_max = if beside_image && plan.capture == CaptureKind::Overlay {
            disk.size.0.saturating_sub(facts.allocated_bytes)
        } else {
            0
        };
    }
    plan.hold_s = Some(hold.as_secs());
    let cramped = cramped(plan, facts, options.min_free_source_bytes);
    plan.conflicts.extend(cramped);
}

/// How long the disks will stand still. They are read one after the other, and let go together.
fn hold(plan: &Plan, facts: &[DiskFacts], past: &[Report]) -> Duration {
    let reading = plan.disks.iter().map(|disk| {
        let bytes = bytes_to_read(disk, facts.iter().find(|f| f.name == disk.name));
        let audit = disk.audit.map_or(Duration::ZERO, |a| a.options.within);
        Duration::from_secs(bytes / speed(disk.mode, past)) + audit
    });
    reading.fold(HOLD_FIXED, Duration::saturating_add)
}

fn bytes_to_read(disk: &DiskPlan, facts: Option<&DiskFacts>) -> u64 {
    match (disk.mode, facts) {
        (Mode::Bitmap, _) => disk.reserve_bytes,
        (_, Some(facts)) => facts.allocated_bytes.min(disk.size.0),
        (_, None) => disk.size.0,
    }
}

/// Bytes read per second, commit and all, in the slowest of the last runs that read much in this mode.
fn speed(mode: Mode, past: &[Report]) -> u64 {
    let telling = |report: &Report| {
        let disks = &report.point.as_ref()?.disks;
        let read = |of: &dyn Fn(&PointDisk) -> bool| -> u64 {
            disks.iter().filter(|d| of(d)).fold(0, |sum, d| sum.saturating_add(d.stats.bytes_read))
        };
        let enough = read(&|d| d.stats.mode == mode) >= TELLING_BYTES;
        enough.then(|| (read(&|_| true) as f64 * 1000.0 / report.duration_ms.max(1.0)) as u64)
    };
    past.iter().rev().filter_map(telling).take(RUNS).min().unwrap_or(SPEED_DEFAULT).max(1)
}

/// Bytes per second that the guest changes on a disk, by the larger of two observations; `None`: nobody has seen any.
fn dirty_rate(facts: &DiskFacts, replica: &ReplicaView, past: &[Report], now: Timestamp) -> Option<u64> {
    let by_bitmap = match (&facts.tracked, replica.head()) {
        (Tracked::By { dirty_bytes, .. }, Some(head)) => Some(per_second(*dirty_bytes, head.frozen_at, now)),
        _ => None,
    };
    by_bitmap.max(rate_of_runs(&facts.name, past))
}

/// The average over the last runs that found changes of a disk, each since the one before it.
fn rate_of_runs(name: &DiskName, past: &[Report]) -> Option<u64> {
    let points: Vec<_> = past.iter().filter_map(|r| r.point.as_ref()).collect();
    let last = &points[points.len().saturating_sub(RUNS + 1)..];
    let (first, later) = last.split_first()?;
    // A disk sent whole says what it holds, not what was changed.
    let stats = |disk: &&PointDisk| disk.name == *name && disk.stats.mode != Mode::Full;
    let changed: Vec<u64> = later.iter().filter_map(|p| p.disks.iter().find(stats)).map(changed_bytes).collect();
    let newest = later.last().filter(|_| changed.len() == later.len())?;
    Some(per_second(changed.iter().fold(0, |sum, bytes| sum.saturating_add(*bytes)), first.frozen_at, newest.frozen_at))
}

/// A block written with what it held before is in the overlay too; a bitmap marks it, and then it was read.
fn changed_bytes(disk: &PointDisk) -> u64 {
    let differed = disk.stats.blocks_changed.saturating_mul(BLOCK_LEN as u64);
    if disk.stats.mode == Mode::Bitmap { differed.max(disk.stats.bytes_read) } else { differed }
}

fn per_second(bytes: u64, from: Timestamp, to: Timestamp) -> u64 {
    // A clock that was set back has seen nothing for a while.
    let seen = Duration::try_from(to.duration_since(from)).unwrap_or_default().max(SEEN_MIN);
    bytes.div_ceil(seen.as_secs())
}

/// An overlay holds each cluster once, however often it is written.
fn growth(rate_bytes: u64, hold: Duration, size_bytes: u64) -> u64 {
    rate_bytes.saturating_mul(hold.as_secs()).saturating_mul(MARGIN).min(size_bytes)
}

/// File systems with less room than their overlays will need and the floor.
fn cramped(plan: &Plan, facts: &[DiskFacts], floor_bytes: u64) -> Vec<Conflict> {
    let mut file_systems: BTreeMap<u64, (Room, &DiskPlan, u64)> = BTreeMap::new();
    for disk in &plan.disks {
        let Some(room) = facts.iter().find(|f| f.name == disk.name).and_then(|f| f.overlay_room) else { continue };
        let (_, _, needed_bytes) = file_systems.entry(room.file_system).or_insert((room, disk, 0));
        let overlay_bytes = disk.overlay_bytes.unwrap_or(0);
        let commit_bytes = overlay_bytes.min(disk.commit_bytes_max);
        *needed_bytes = needed_bytes.saturating_add(overlay_bytes).saturating_add(commit_bytes);
    }
    let too_small = |(room, disk, growth_bytes): (Room, &DiskPlan, u64)| {
        let fits = growth_bytes.saturating_add(floor_bytes) <= room.free_bytes;
        (!fits).then(|| Conflict::NoOverlaySpace {
            disk: disk.name.clone(),
            dir: disk.overlay_dir.clone(),
            free_bytes: room.free_bytes,
            growth_bytes,
            floor_bytes,
            hold_s: plan.hold_s.unwrap_or_default(),
        })
    };
    file_systems.into_values().filter_map(too_small).collect()
}

#[cfg(test)]
#[path = "forecast_tests.rs"]
pub(crate) mod tests;
