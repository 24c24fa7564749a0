//! Room at the source, watched: a guest that writes faster than was foreseen must never meet a full file system.
//!
//! What is said of overlays here holds for the scratch files of a backup too, but that they are removed, not committed:
//! QEMU fails a guest's write when what it overwrites cannot be kept.
//!
//! While the disks stand still, a thread of its own asks the file systems of their overlays, whatever the run waits
//! for. When one comes near its end, the run is cut short: no point is made, and the overlays are committed at
//! once, while there still is room for what the guest writes meanwhile.

use crate::error::{Error, Kind, Result, advice};
use crate::name::{DiskName, RunId};
use crate::replicate::capture::names::{overlay_path, scratch_path};
use crate::replicate::free_space::free_bytes;
use crate::replicate::plan::CaptureKind;
use crate::replicate::plan::options::{OverlayLimits, SpaceOptions};
use crate::replicate::plan::planned::Plan;
use crate::units::{duration, exact_bytes};
use jiff::SignedDuration;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// This part of the floor is for what the guest writes while the overlays are committed.
const CRITICAL_PART: u64 = 4;

/// Least of it: a floor set to nothing still leaves the guest a moment.
const CRITICAL_MIN: u64 = 8 << 20;

/// The room of one run's overlays.
pub(in crate::replicate) struct RoomWatch {
    overlays: Vec<Overlay>,
    critical_bytes: u64,
    limits: OverlayLimits,
    capture: CaptureKind,
}

struct Overlay {
    disk: DiskName,
    dir: PathBuf,
    path: PathBuf,
    /// Most that its commit can add to an image beside it.
    commit_bytes_max: u64,
}

impl RoomWatch {
    pub fn new(plan: &Plan, run: &RunId, options: &SpaceOptions) -> Self {
        let on_overlays = plan.capture != CaptureKind::Off;
        let overlays = plan.replicated().filter(|_| on_overlays).map(|disk| Overlay {
            disk: disk.name.clone(),
            dir: disk.overlay_dir.clone(),
            path: match plan.capture {
                CaptureKind::Backup => scratch_path(disk, run),
                CaptureKind::Overlay | CaptureKind::Off => overlay_path(disk, run),
            },
            commit_bytes_max: disk.commit_bytes_max,
        });
        let critical_bytes = (options.min_free_source_bytes / CRITICAL_PART).max(CRITICAL_MIN);
        Self { overlays: overlays.collect(), critical_bytes, limits: options.overlay, capture: plan.capture }
    }

    /// `Space` when the overlays have to be committed now for their size, `Interrupted` when it is for their age.
    /// One call of the file system for each disk; asked many times a second by a thread of its own. `age`: how long
    /// ago the disks were frozen.
    pub fn check(&self, age: &dyn Fn() -> SignedDuration) -> Result<()> {
        self.check_limits(age)?;
        // Overlays on one file system are committed one beside the other: to each, its room is that of all.
        let commit_bytes: u64 = self.overlays.iter().map(|o| occupied(&o.path).min(o.commit_bytes_max)).sum();
        for overlay in &self.overlays {
            let Some(free_bytes) = free_bytes(&overlay.dir) else { continue };
            let own = if overlay.commit_bytes_max > 0 { commit_bytes } else { 0 };
            if free_bytes < self.critical_bytes.saturating_add(own) {
                return Err(cut_short(self.capture, overlay, free_bytes));
            }
        }
        Ok(())
    }

    fn check_limits(&self, age: &dyn Fn() -> SignedDuration) -> Result<()> {
        let Some(first) = self.overlays.first() else { return Ok(()) };
        let (what, end) = words(self.capture);
        if let Some(max) = self.limits.age_max
            && age() > SignedDuration::try_from(max).unwrap_or(SignedDuration::MAX)
        {
            let text =
                format!("the {what} is older than it may get, {}; the run was cut short, and {end}", duration(max));
            return Err(Error::new(Kind::Interrupted, text).disk(&first.disk).advise(advice::Overlay::AllowMoreTime));
        }
        for overlay in &self.overlays {
            let grown = occupied(&overlay.path);
            if let Some(max) = self.limits.bytes_max.filter(|max| grown > *max) {
                let (grown, max) = (grown >> 20, exact_bytes(max));
                let text = format!(
                    "the guest writes much: its {what} has grown to {grown} MiB, more than the {max} it may; the run was cut short, and {end}"
                );
                return Err(Error::new(Kind::Space, text).disk(&overlay.disk).advise(advice::Overlay::AllowMoreBytes));
            }
        }
        Ok(())
    }
}

/// What grows while the disks stand still, and how that ends.
fn words(capture: CaptureKind) -> (&'static str, &'static str) {
    match capture {
        CaptureKind::Backup => ("scratch file", "the backup is ended at once"),
        CaptureKind::Overlay | CaptureKind::Off => ("overlay", "the overlay is committed at once"),
    }
}

fn cut_short(capture: CaptureKind, overlay: &Overlay, free_bytes: u64) -> Error {
    let grown = occupied(&overlay.path) >> 20;
    let (what, end) = words(capture);
    Error::new(
        Kind::Space,
        format!(
            "the guest writes faster than was foreseen: its {what} has grown to {grown} MiB and {} MiB are left in {}; \
             the run was cut short, and {end}",
            free_bytes >> 20,
            overlay.dir.display()
        ),
    )
    .disk(&overlay.disk)
    .advise(advice::Overlay::LargerFileSystem)
}

/// Bytes that a file takes on its file system; one that cannot be looked at takes none.
fn occupied(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |m| m.blocks().saturating_mul(512))
}
