//! What the operator asks of a run, and the ways to make its disks stand still.

use crate::name::DiskName;
use crate::replicate::capture::quiesce::QuiesceOptions;
use crate::replicate::tracking::audit::AuditOptions;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

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
    /// Disks that the operator does not want in any point.
    pub exclude_disks: Vec<DiskName>,
    /// Read everything and send everything, whatever the target has.
    pub full: bool,
    /// Read everything and compare, whatever a bitmap says.
    pub compare: bool,
    /// The operator says that this host is the domain's source from now on, whatever the replica knows.
    pub take_over: bool,
    /// How many blocks that a bitmap calls clean are compared all the same.
    pub audit: AuditOptions,
    /// How much space stays free at the source, and how far an overlay may grow.
    pub space: SpaceOptions,
}

/// Space that is kept free where overlays lie unless told otherwise, in bytes, or the freeze is not begun.
pub const OVERLAY_SPACE_MIN: u64 = 256 << 20;

/// How the disks are made to stand still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CaptureKind {
    /// An overlay over each disk while it is read, committed afterwards.
    Overlay,
    /// A backup job of libvirt's in pull mode: QEMU serves the disks as they were.
    Backup,
    /// The domain is off: nothing is frozen, and a start is noticed.
    Off,
}

impl CaptureKind {
    /// Step 7, to an operator.
    pub fn release_words(self) -> &'static str {
        match self {
            CaptureKind::Overlay => "commit the overlays",
            CaptureKind::Backup => "end the backup",
            CaptureKind::Off => "let go of the images",
        }
    }
}

/// What the operator asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CaptureWish {
    /// Capture a running domain by overlay. This is the default.
    #[default]
    Overlay,
    /// Capture a running domain by backup.
    Backup,
    /// By overlay, unless something is known that could keep it from being committed.
    Auto,
}

impl std::str::FromStr for CaptureWish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "overlay" => Ok(CaptureWish::Overlay),
            "backup" => Ok(CaptureWish::Backup),
            "auto" => Ok(CaptureWish::Auto),
            _ => Err(format!("'{text}' is not a way to capture: overlay, backup or auto")),
        }
    }
}

/// What is kept free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SpaceOptions {
    /// Where overlays lie, beside what they are expected to grow to.
    pub min_free_source_bytes: u64,
    /// Limits at which a run is cut short, for the size and the age of an overlay or scratch file.
    pub overlay: OverlayLimits,
}

impl Default for SpaceOptions {
    fn default() -> Self {
        Self { min_free_source_bytes: OVERLAY_SPACE_MIN, overlay: OverlayLimits::default() }
    }
}

/// How far an overlay, or a scratch file, may go before its run is cut short.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OverlayLimits {
    /// Of each.
    pub bytes_max: Option<u64>,
    /// Since the freeze.
    pub age_max: Option<Duration>,
}
