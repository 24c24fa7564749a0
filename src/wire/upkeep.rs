//! Requests and replies about points that exist: what [`crate::replica::upkeep`] offers.

use crate::name::{DiskName, PointId};
use crate::replica::upkeep::{Holds, PruneReport, ScrubStart, ScrubStep};
use serde::{Deserialize, Serialize};

/// Names a patch stream or a scrub within one session; never reused within it.
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
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    Holds { holds: Holds },
    Prune { report: PruneReport },
    Pin {},
    Export { stream: StreamId },
    Close {},
    Scrub { stream: StreamId, start: ScrubStart },
    ScrubStep { step: ScrubStep },
}
