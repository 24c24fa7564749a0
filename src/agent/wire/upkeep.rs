//! Requests and replies about points that exist: what [`crate::replica::upkeep`] offers.

use crate::name::{DiskName, PointId};
use crate::replica::Attachment;
use crate::replica::upkeep::{Holds, PruneReport, ScrubStart, ScrubStep, ShortenStart, ShortenStep};
use serde::{Deserialize, Serialize};

/// Names a patch stream, a scrub or a shortening within one session; never reused within it.
pub type StreamId = u32;

/// Each is answered by the [`UpkeepReply`] of the same name; `Chunk` by a Data frame, which is empty at the end.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpkeepRequest {
    /// Asks which points cannot be removed now, and why.
    Holds {},
    /// Removes points, and folds links into the points above them. What is reported as removed is durable.
    Prune {
        /// Points to remove; empty to fold links only.
        remove: Vec<PointId>,
    },
    /// Without a reason: unpin.
    Pin {
        /// Point to pin or unpin.
        point: PointId,
        /// Reason for the pin, in words. `None`: unpin the point.
        reason: Option<String>,
    },
    /// Opens a stream of the whole content of a disk at a point, as a patch that starts from nothing.
    Export {
        /// Point to read; it is leased while the stream is open and read.
        point: PointId,
        /// Disk of that point to read.
        disk: DiskName,
    },
    /// Answered as an export is.
    Changes {
        /// Point from which the patch leads; it may be older or newer than `point`.
        since: PointId,
        /// Point to which the patch leads.
        point: PointId,
        /// Disk whose change is asked for.
        disk: DiskName,
    },
    /// Likewise.
    Attachment {
        /// Point that carries the attachment.
        point: PointId,
        /// Which of the known attachments to send. `NotFound` if the point has none of that name.
        name: Attachment,
    },
    /// Asks for the next bytes of a stream. A `Data` frame answers; it is empty at the end.
    Chunk {
        /// Stream to read on.
        stream: StreamId,
    },
    /// Ends a stream, a scrub or a shortening, and with it the lease.
    Close {
        /// Stream, scrub or shortening to end.
        stream: StreamId,
    },
    /// Begins a scrub of all points, one at a time for each replica. The agent reads only in later steps.
    Scrub {
        /// Begin at the first point, even if an earlier scrub was left unfinished.
        restart: bool,
    },
    /// Reads on in a scrub. Findings and position are durable when the agent answers.
    ScrubStep {
        /// Scrub to continue.
        stream: StreamId,
        /// About how many bytes the step may read; the store takes at most `SCRUB_STEP_MAX`.
        bytes_max: u64,
    },
    /// Begins to shorten the newest point, if one of its chains is as deep as the target allows.
    Shorten {},
    /// Copies on in a shortening. After the last step the new images are in place, durably.
    ShortenStep {
        /// Shortening to continue.
        stream: StreamId,
        /// About how many bytes the step may copy; the store takes at most `SHORTEN_STEP_MAX`.
        bytes_max: u64,
    },
}

/// Answer to the `UpkeepRequest` of the same name. `Changes` and `Attachment` are answered by `Export`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpkeepReply {
    /// Obstacles to removing points.
    Holds {
        /// Pins, leases, young points, links and what scrubs found.
        holds: Holds,
    },
    /// The prune ended. Points in use or pinned may still be there.
    Prune {
        /// Points that were removed, and those that were left with the reason.
        report: PruneReport,
    },
    /// The pin is set or removed, durably.
    Pin {},
    /// A stream is open: an export, a change or an attachment.
    Export {
        /// Number of the stream, for `Chunk` and `Close`.
        stream: StreamId,
    },
    /// The stream is closed and its lease ended.
    Close {},
    /// A scrub is open.
    Scrub {
        /// Number of the scrub, for `ScrubStep` and `Close`.
        stream: StreamId,
        /// Where the scrub begins, and how much there is to read.
        start: ScrubStart,
    },
    /// A step of a scrub ended.
    ScrubStep {
        /// Bytes read, damage found in this step, and whether the scrub is at its end.
        step: ScrubStep,
    },
    /// Without a stream where there is nothing to be shortened.
    Shorten {
        /// Number and start of the shortening. `None`: no disk needs one.
        begun: Option<(StreamId, ShortenStart)>,
    },
    /// A step of a shortening ended.
    ShortenStep {
        /// Bytes copied, and whether the disks of the point stand alone now.
        step: ShortenStep,
    },
}
