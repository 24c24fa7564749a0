//! The port of a capture, and the data it gives: disks that stand still, and how they were let go.

use crate::error::Result;
use crate::image::Chain;
use crate::name::DiskName;
use crate::replica::Consistency;
use crate::replicate::settle::account::Account;
use jiff::Timestamp;
use std::path::PathBuf;
use std::time::Duration;

/// Makes disks stand still and lets them go again.
pub trait Capture {
    /// From when this returns until [`Capture::release`], the images in the answer do not change, and are one instant
    /// of all disks. On an error nothing is left behind, or what is left is in the journal.
    fn freeze(&mut self) -> Result<Frozen>;

    /// Whether they still stand still; `Interrupted` if not. Cheap; asked many times while reading.
    fn check(&self) -> Result<()>;

    /// Asked once after the last byte was read and before the point is sealed: did they stand still all along (I5)?
    fn confirm(&self) -> Result<()>;

    /// Brings the domain back onto its own images. Runs whether or not the point was sealed: the guest comes first.
    fn release(&mut self) -> Result<Release>;
}

/// Images that stand still.
#[derive(Debug, Clone)]
pub struct Frozen {
    /// Each disk that stands still, with the place where its content is read.
    pub disks: Vec<(DiskName, Source)>,
    /// Taken just before the disks were frozen: nothing acknowledged earlier can be missing.
    pub frozen_at: Timestamp,
    /// What a point made from these disks may promise of the guest's file systems.
    pub consistency: Consistency,
    /// Why it is not `file_system` although that was asked for.
    pub consistency_reason: Option<String>,
    /// How long the guest's file systems were held.
    pub held: Option<Duration>,
    /// Duration of the freeze call, an upper bound of what the guest can have felt of it.
    pub freeze: Option<Duration>,
    /// A domain that is off may be started at any time: readers must not take QEMU's locks.
    pub may_start: bool,
}

/// Where the still content of a disk is read.
#[derive(Debug, Clone)]
pub enum Source {
    /// From images that stand still.
    Chain(Chain),
    /// From an NBD server on a unix socket.
    Export {
        /// Absolute path of QEMU's unix socket on this host.
        socket: PathBuf,
        /// Name of the NBD export; it is the name of the disk.
        name: String,
    },
}

/// Result of bringing a domain back onto its own images.
#[derive(Debug, Clone)]
pub struct Release {
    /// Steps, alarms and the longest pause of the way back. Empty for a domain that was off.
    pub account: Account,
    /// The commit did not become ready in time, or a person has to look: the domain still is on its overlay.
    pub left_open: Option<String>,
}
