//! Requests and replies about points that exist: what [`crate::replica::upkeep`] offers.

use crate::name::{DiskName, PointId};
use crate::replica::Attachment;
use crate::replica::upkeep::{Holds, PruneReport, ScrubStart, ScrubStep, ShortenStart, ShortenStep};
use serde::{Deserialize, Serialize};

/// Names a patch stream, a scrub or a shortening within one session; never reused within it.
pub type StreamId = u32;

/// Each is answered by the [`Told`] of the same name; `Chunk` by a Data frame, which is empty at the end.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    Holds {},
    Prune {
        remove: Vec<PointId>,
    },
    /// Without a reason: unpin.
    Pin {
        point: PointId,
        reason: Option<String>,
    },
    Export {
        point: PointId,
        disk: DiskName,
    },
    /// Answered as an export is.
    Changes {
        since: PointId,
        point: PointId,
        disk: DiskName,
    },
    /// Likewise.
    Attachment {
        point: PointId,
        name: Attachment,
    },
    Chunk {
        stream: StreamId,
    },
    Close {
        stream: StreamId,
    },
    Scrub {
        restart: bool,
    },
    ScrubStep {
        stream: StreamId,
        bytes_max: u64,
    },
    Shorten {},
    ShortenStep {
        stream: StreamId,
        bytes_max: u64,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    Holds {
        holds: Holds,
    },
    Prune {
        report: PruneReport,
    },
    Pin {},
    Export {
        stream: StreamId,
    },
    Close {},
    Scrub {
        stream: StreamId,
        start: ScrubStart,
    },
    ScrubStep {
        step: ScrubStep,
    },
    /// Without a stream where there is nothing to be shortened.
    Shorten {
        begun: Option<(StreamId, ShortenStart)>,
    },
    ShortenStep {
        step: ShortenStep,
    },
}
