//! How a disk's changes were found and what that cost: plain data for reports, manifests and the wire.

use crate::words;
use serde::{Deserialize, Serialize};

/// How a disk's changes are found in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Everything that is not zero is sent; there is nothing to compare with.
    #[default]
    Full,
    /// Every block is read and compared with the head's digests.
    Digest,
    /// Only what a dirty bitmap marks is read.
    Bitmap,
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Mode::Full => "full",
            Mode::Digest => "digest",
            Mode::Bitmap => "bitmap",
        })
    }
}

/// How a disk's changes were found and what that cost.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct DiskStats {
    /// How the changes were found.
    pub mode: Mode,
    /// Why this mode and no cheaper one, as a sentence.
    #[serde(deserialize_with = "words::sentence")]
    pub reason: String,
    /// Bytes read from the source image.
    pub bytes_read: u64,
    /// Bytes of patch put on the wire for this disk.
    pub bytes_sent: u64,
    /// Bytes of guest data written at the target.
    pub bytes_written: u64,
    /// Blocks that differed, zeroed ones included.
    #[serde(default)]
    pub blocks_changed: u64,
    /// Compared by digest because the dirty bitmap that should have told the changes was not there or not believed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tracking_doubt: bool,
    /// What became of the check on the dirty bitmap; absent where no bitmap was relied on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit: Option<AuditStats>,
    /// Which way the content was sent; absent where that was said and not tried, and where nothing was sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<CompressionStats>,
}

/// Which way content was sent where it was for the run to find out, and why so. Rates are in bytes of content, before
/// compression, per second.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CompressionStats {
    /// Bytes of content that went through the compression, and those that went as they are.
    pub compressed_bytes: u64,
    /// Bytes of content that were sent without compression.
    pub stored_bytes: u64,
    /// How often both ways were tried.
    pub trials: u32,
    /// What the newest trial came to; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compressed_rate_bytes: Option<u64>,
    /// Rate without compression in the newest trial, in bytes of content per second. `None`: there was no trial.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored_rate_bytes: Option<u64>,
    /// The way that was kept in the end, and why, as a sentence.
    #[serde(deserialize_with = "words::sentence")]
    pub reason: String,
}

/// Blocks that a dirty bitmap called clean and that were compared with the head all the same.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AuditStats {
    /// Number of blocks that were compared.
    pub blocks: u64,
    /// Bytes read from the source image for it, beside those in [`DiskStats::bytes_read`].
    pub bytes_read: u64,
    /// Of the blocks, those that had changed.
    pub lies: u64,
    /// Byte offset of the first of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_lie: Option<u64>,
    /// Byte offset at which the next run's slice begins. The disk's size: the whole disk has been compared.
    pub next_offset: u64,
}
