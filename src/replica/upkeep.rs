//! The second port to a replica: what is done with points that exist. Nothing here makes one.
//!
//! Near and far are the same trait here too: the store implements it, and so does the agent's client.

use crate::error::Result;
use crate::name::{DiskName, PointId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Keeping the points of one domain: who holds which, removing, handing out. Methods block.
pub trait Upkeep: Send + Sync {
    /// What stands in the way of removing points, and what is left of removed ones.
    fn holds(&self) -> Result<Holds>;

    /// Removes points, and folds what is left of removed ones into the points above. With no points named, only the
    /// latter.
    ///
    /// All or nothing as to what may be asked for: an unknown point ([`Kind::NotFound`](crate::error::Kind::NotFound)), the
    /// newest one, or one younger than the target's floor ([`Kind::Refused`](crate::error::Kind::Refused)), and none of them
    /// is removed. A point that is pinned or in use is passed by, and so are links that somebody reads through: the report
    /// says so. When this returns, what is reported as removed is so durably. `progress` gets (done, total) bytes of copying.
    fn prune(&self, remove: &[PointId], progress: &mut dyn FnMut(u64, u64)) -> Result<PruneReport>;

    /// Keeps a point from being removed, for a reason in words, or no longer (`None`). Durable when it returns.
    fn pin(&self, point: &PointId, reason: Option<&str>) -> Result<()>;

    /// The whole content of a disk at a point, as a patch that starts from nothing. The point is leased as long as the
    /// stream lives and is read.
    fn export(&self, point: &PointId, disk: &DiskName) -> Result<Box<dyn PatchStream>>;
}

/// A patch that is made while it is read.
pub trait PatchStream: Send {
    /// The next bytes, at most 1 MiB and some; empty at the end. After an error there is nothing more to come.
    fn next_chunk(&mut self) -> Result<Vec<u8>>;

    /// Ends it, and with it the lease.
    fn close(self: Box<Self>) -> Result<()>;
}

/// What stands in the way of removing points.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Holds {
    /// Now, by the target's clock.
    pub now: Timestamp,
    /// Points sealed less long ago than this are not removed by anybody.
    pub min_age_s: u64,
    pub pins: Vec<Pin>,
    pub leases: Vec<Lease>,
    /// Removed points that are still read through.
    pub links: Vec<PointId>,
    /// Images that the deepest disk of the head consists of.
    pub depth: u64,
    /// From here on the target advises to prune.
    pub depth_max: u64,
}

/// A point that is not to be removed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pin {
    pub point: PointId,
    /// May be empty.
    pub reason: String,
    pub since: Timestamp,
}

/// A point in use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Lease {
    pub point: PointId,
    /// Who, in words.
    pub owner: String,
    /// What for: `verify`, `export`.
    pub purpose: String,
    pub since: Timestamp,
    /// In force until then, unless it is renewed or released.
    pub expires: Timestamp,
}

/// What a prune did.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct PruneReport {
    /// These do not exist any more.
    pub removed: Vec<PointId>,
    /// These were to be removed, and are still there.
    pub kept: Vec<Kept>,
    /// Removed points, also of earlier prunes, whose room is given back.
    pub folded: Vec<PointId>,
    /// Removed points that still take room, and why.
    pub waiting: Vec<Kept>,
    /// Bytes of guest data that were copied from image to image.
    pub bytes_copied: u64,
}

/// A point, and why it stays.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    pub point: PointId,
    pub why: String,
}
