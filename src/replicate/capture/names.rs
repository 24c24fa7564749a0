//! The names of the files that a run puts beside a domain's images, and how they are known again.

use crate::name::RunId;
use crate::replicate::plan::planned::DiskPlan;
use std::path::{Path, PathBuf};

/// `DIR/STEM.DISK.vr-RUN.qcow2`: a human sees whose it is, AppArmor sees an image's suffix, and no two runs meet.
pub(in crate::replicate) fn overlay_path(disk: &DiskPlan, run: &RunId) -> PathBuf {
    run_file(disk, run, "qcow2")
}

/// `DIR/STEM.vr-RUN.scratch.qcow2`, where the disk's overlay would lie.
pub(in crate::replicate) fn scratch_path(disk: &DiskPlan, run: &RunId) -> PathBuf {
    run_file(disk, run, "scratch.qcow2")
}

/// Longest name of a file, in bytes. File systems that take less are asked in step 3: see
/// [`rights`](crate::replicate::plan::rights).
const NAME_MAX: usize = 255;

/// Longest path that the kernel takes, its end included.
const PATH_MAX: usize = 4096;

/// What is put behind the name of an overlay that is put away: `.retired`, or `.kept`.
const PUT_AWAY_LEN: usize = ".retired".len();

/// A file of a run for a disk, where its overlays lie. Of an image's long name only the beginning is kept: disk and run
/// tell it apart.
pub(in crate::replicate) fn run_file(disk: &DiskPlan, run: &RunId, suffix: &str) -> PathBuf {
    let stem = disk.chain.top().path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    // Block devices of different domains share names like "dm-3"; the disk's own name keeps two of one domain apart.
    let rest = format!(".{}{OVERLAY_MARK}{}.{suffix}", disk.name, &run.as_str()[..8]);
    let dir_len = disk.overlay_dir.as_os_str().len() + "/".len() + "\0".len();
    let room = NAME_MAX.min(PATH_MAX.saturating_sub(dir_len)).saturating_sub(rest.len() + PUT_AWAY_LEN);
    let kept = (0..=stem.len().min(room)).rev().find(|at| stem.is_char_boundary(*at)).unwrap_or(0);
    disk.overlay_dir.join(format!("{}{rest}", &stem[..kept]))
}

/// Whether a file's name says that it is an overlay of ours.
pub fn is_our_overlay(path: &Path) -> bool {
    let Some(name) = path.file_name().and_then(|n| n.to_str()) else { return false };
    let Some((_, rest)) = name.rsplit_once(OVERLAY_MARK) else { return false };
    rest.strip_suffix(".qcow2").is_some_and(|run| run.len() == 8 && run.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// In the file name of every overlay of ours.
pub const OVERLAY_MARK: &str = ".vr-";
