//! The second port to a replica: what is done with points that exist. Nothing here makes one.
//!
//! Near and far are the same trait here too: the store implements it, and so does the agent's client.

use super::{Attachment, PointView};
use crate::error::Result;
use crate::image::Chain;
use crate::name::{DiskName, Generation, PointId};
pub use crate::replica::Promoted;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Keeping the points of one domain: who holds which, removing, handing out. Methods block.
pub trait Upkeep: Send + Sync {
    /// What stands in the way of removing points, and what is left of removed ones.
    fn holds(&self) -> Result<Holds>;

    /// Removes points, and folds what is left of removed ones into the points above. With no points named, only the
    /// latter.
    ///
    /// All or nothing as to what may be asked for: an unknown point ([`Kind::NotFound`](crate::error::Kind::NotFound)),
    /// the newest one, or one younger than the target's floor ([`Kind::Refused`](crate::error::Kind::Refused)), and
    /// none of them is removed. A point that is pinned or in use is passed by, and so are links that somebody reads
    /// through: the report says so. When this returns, what is reported as removed is so durably. `progress` gets
    /// (done, total) bytes of copying.
    fn prune(&self, remove: &[PointId], progress: &mut dyn FnMut(u64, u64)) -> Result<PruneReport>;

    /// Keeps a point from being removed, for a reason in words, or no longer (`None`). Durable when it returns.
    fn pin(&self, point: &PointId, reason: Option<&str>) -> Result<()>;

    /// The whole content of a disk at a point, as a patch that starts from nothing. The point is leased as long as the
    /// stream lives and is read.
    fn export(&self, point: &PointId, disk: &DiskName) -> Result<Box<dyn PatchStream>>;

    /// The patch that leads from a disk at the point `since` to the same at `point`, whichever of them is older. Both
    /// are leased as above.
    fn changes(&self, since: &PointId, point: &PointId, disk: &DiskName) -> Result<Box<dyn PatchStream>>;

    /// The content of an attachment. [`Kind::NotFound`](crate::error::Kind::NotFound) if the point has none of this
    /// name, [`Kind::Corrupt`](crate::error::Kind::Corrupt) if it is not what was sealed.
    fn attachment(&self, point: &PointId, name: Attachment) -> Result<Box<dyn PatchStream>>;

    /// Begins to read all points again, or goes on where the last one was left, unless `restart`. One at a time:
    /// [`Kind::Busy`](crate::error::Kind::Busy) otherwise. Replication goes on beside it.
    fn scrub(&self, restart: bool) -> Result<Box<dyn Scrubbing>>;

    /// Begins to give the newest point images that stand alone, where one of its disks consists of as many images as
    /// the target allows. `None`: none does. One at a time ([`Kind::Busy`](crate::error::Kind::Busy) otherwise);
    /// replication goes on beside it. [`Kind::Space`](crate::error::Kind::Space) where the target has no room for a
    /// second whole copy.
    fn shorten(&self) -> Result<Option<Box<dyn Shortening>>>;
}

/// A point that stays as it is while somebody else, such as a QEMU program, reads its images.
pub trait Held: Send {
    /// Describes the point that is held.
    fn point(&self) -> &PointView;

    /// The images of a disk, uppermost first.
    fn images(&self, disk: &DiskName) -> Result<Chain>;

    /// The content of an attachment, if the point has it. [`Kind::Corrupt`](crate::error::Kind::Corrupt) if it is not
    /// what was sealed.
    fn attachment(&self, name: Attachment) -> Result<Option<Vec<u8>>>;

    /// Prolongs the lease; to be called every minute.
    fn renew(&mut self) -> Result<()>;

    /// Ends the lease: the point may be removed from now on. A lease that is not released expires.
    fn release(self: Box<Self>);
}

/// A replica whose domain is brought up on the host of the store: who may write to it, and that its point stays.
pub trait Promoting: Send + Sync {
    /// The promotion that is in force.
    fn promoted(&self) -> Result<Option<Promoted>>;

    /// From its return no run is accepted, and the point stays with all it stands on; durable. The same one again is no
    /// error; [`Kind::Conflict`](crate::error::Kind::Conflict) while another is in force,
    /// [`Kind::Busy`](crate::error::Kind::Busy) while somebody writes to the replica.
    fn promote(&self, point: &PointId) -> Result<()>;

    /// Runs are accepted again; durable. No error if there is no promotion;
    /// [`Kind::Refused`](crate::error::Kind::Refused) once it was committed.
    fn withdraw(&self) -> Result<()>;

    /// There is no way back: the generation rises, durably. Gives the new one; the second time the same.
    fn commit(&self) -> Result<Generation>;

    /// The promotion is over, also a committed one: the domain here stands alone, or lives elsewhere again. Runs of
    /// `generation` and later are accepted, older ones are not; durable. No error if there is no promotion;
    /// [`Kind::Refused`](crate::error::Kind::Refused) if `generation` is older than the replica.
    fn conclude(&self, generation: Generation) -> Result<()>;
}

/// Images that stand alone under way. As with a scrub, nothing happens but in [`Shortening::step`]; what was copied of
/// a disk that did not come to its end is copied again by the next one.
pub trait Shortening: Send {
    /// Says which point is shortened, and how much is to be copied.
    fn start(&self) -> ShortenStart;

    /// Copies on: about so many bytes at most, of which no store takes more than [`SHORTEN_STEP_MAX`]. With the last
    /// step the images are in their place, durably. [`Kind::Busy`](crate::error::Kind::Busy) if a run or a reader is in
    /// the way just then: what was copied stays, and the next shortening needs no more than this step.
    fn step(&mut self, bytes_max: u64) -> Result<ShortenStep>;

    /// Ends it, and with it the lease.
    fn close(self: Box<Self>) -> Result<()>;
}

/// Most bytes that are copied in one [`Shortening::step`], and one run of a change list more.
pub const SHORTEN_STEP_MAX: u64 = 64 << 20;

/// What is shortened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShortenStart {
    /// The point that gets images that stand alone. It was the newest when the shortening began.
    pub point: PointId,
    /// Disks of the point whose images are copied.
    pub disks: Vec<DiskName>,
    /// Bytes of data that are to be copied.
    pub bytes_total: u64,
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShortenStep {
    /// Since the shortening began.
    pub bytes_done: u64,
    /// The disks of the point stand alone now.
    pub end: bool,
}

/// A scrub under way. It reads only while [`Scrubbing::step`] is called: who wants it slower calls less often, and who
/// wants no more just ends it. What was read stays read, however it ended.
pub trait Scrubbing: Send {
    /// Says where the scrub begins, and how much is to be read.
    fn start(&self) -> ScrubStart;

    /// Reads on: about so many bytes at most, of which no store takes more than [`SCRUB_STEP_MAX`], or to the end of a
    /// disk at a point. Durable when it returns: what was found, and where the next scrub would go on.
    fn step(&mut self, bytes_max: u64) -> Result<ScrubStep>;

    /// Ends it, and with it the lease.
    fn close(self: Box<Self>) -> Result<()>;
}

/// Most bytes that are read in one [`Scrubbing::step`].
pub const SCRUB_STEP_MAX: u64 = 64 << 20;

/// Where a scrub begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubStart {
    /// It goes on where an earlier one was left.
    pub resumed: bool,
    /// Bytes that the earlier one had read.
    pub bytes_done: u64,
    /// Bytes that all points have of their own, by the length of their change lists.
    pub bytes_total: u64,
}

/// What a step of a scrub did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScrubStep {
    /// Bytes read in this step.
    pub bytes_read: u64,
    /// Bytes read since this scrub began, also before it was left and resumed.
    pub bytes_done: u64,
    /// What was found damaged in this step.
    pub found: Vec<Damage>,
    /// All points were read.
    pub end: bool,
}

/// Stored bytes that are not what was sealed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// The point whose files have it; it may be one that was removed and that later ones still read through.
    pub point: PointId,
    /// Name of the damaged disk. `None`: an attachment is damaged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskName>,
    /// What kind of stored data is damaged.
    pub what: DamageKind,
    /// Bytes of the disk, the second behind the last one; both 0 where a file is damaged as a whole.
    pub start: u64,
    /// First byte of the disk after the damage; 0 where a file is damaged as a whole.
    pub end: u64,
    /// The damaged attachment. `None`: a disk is damaged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attachment: Option<Attachment>,
    /// When a scrub found the damage, by the target's clock.
    pub found_at: Timestamp,
    /// The later points that read it, oldest first.
    #[serde(default)]
    pub dependants: Vec<PointId>,
}

/// Which stored data of a point is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DamageKind {
    /// Blocks of a disk.
    Content,
    /// The image of a disk cannot be read at all, or leads elsewhere than the manifest.
    Image,
    /// The change list of a disk, and so the digests of what the point changed.
    Changes,
    /// A file beside the disks, such as the domain's definition or its UEFI variables.
    Attachment,
}

/// What is known of scrubs.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ScrubTold {
    /// Damage that scrubs have found in files that a point still reads.
    pub damage: Vec<Damage>,
    /// One that was left, or is at work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub under_way: Option<ScrubbedOnce>,
    /// The last one that came to its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<ScrubbedOnce>,
}

/// One scrub of all points.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScrubbedOnce {
    /// When the scrub began, by the target's clock.
    pub started_at: Timestamp,
    /// When the scrub came to its end, by the target's clock. `None`: it has not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
    /// Bytes that the scrub has read, also before it was left and resumed.
    pub bytes_read: u64,
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
    /// Those that are younger, with the seconds that are left, by the target's uptime and not by its wall clock.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub young: Vec<(PointId, u64)>,
    /// Points that are pinned, each with its reason.
    pub pins: Vec<Pin>,
    /// Leases in force: points that are being read.
    pub leases: Vec<Lease>,
    /// Removed points that are still read through.
    pub links: Vec<PointId>,
    /// Images that the deepest disk of the head consists of.
    pub depth: u64,
    /// From here on the target gives the newest point images that stand alone.
    pub depth_max: u64,
    /// What scrubs found.
    #[serde(default)]
    pub scrub: ScrubTold,
}

/// A point that is not to be removed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pin {
    /// The pinned point.
    pub point: PointId,
    /// May be empty.
    pub reason: String,
    /// When the point was pinned, by the target's clock.
    pub since: Timestamp,
}

/// A point in use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Lease {
    /// The point that is being read.
    pub point: PointId,
    /// Who, in words.
    pub owner: String,
    /// What for: `verify`, `export`.
    pub purpose: String,
    /// When the lease was taken, by the target's clock.
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
    /// The point that stays, or the removed point that still takes room.
    pub point: PointId,
    /// Reason in words, for the operator.
    pub why: String,
}
