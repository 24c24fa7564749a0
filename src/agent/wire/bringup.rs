//! Requests and replies about bringing a domain up on the agent's host: what
//! [`BringUp`](crate::recovery::bringup::BringUp) offers.

use crate::name::{Generation, PointId};
use crate::recovery::bringup::{Coming, Order, Readiness, Standing};
use crate::recovery::failover::FailoverRecord;
use crate::recovery::ready::Finding;
use crate::recovery::retire_home_copy::GaveWay;
use serde::{Deserialize, Serialize};

/// Each is answered by the [`BringUpReply`] of the same name.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BringUpRequest {
    /// Asks whether the domain could be brought up there from a point that is there. Changes nothing.
    Ready {
        /// Point to judge. `None`: the head.
        point: Option<PointId>,
    },
    /// Asks the same of a domain before any point of it is there. Changes nothing.
    ReadyFor {
        /// Name, definition and disks that the next point would bring.
        coming: Coming,
    },
    /// Asks for promotion, failover and power state of the domain there. Does not wait for a verb at work.
    State {},
    /// Brings the domain up from one point. It is started and the failover durable when the agent answers.
    BringUp {
        /// Point, handover and settings of the domain.
        order: Order,
    },
    /// Calls an order off, durably. The guest's writes there are lost, and later orders of that handover are refused.
    CallOff {
        /// Order to call off.
        order: Order,
    },
    /// Undoes the failover on record. `NotFound` if there is none.
    Undo {},
    /// Commits the failover. It cannot be undone afterwards.
    Commit {},
    /// Makes the host's own copy of the domain, which is off, a pinned point and removes its definition.
    GiveWay {},
}

/// Answer to the `BringUpRequest` of the same name.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BringUpReply {
    /// The point was judged.
    Ready {
        /// Point that was judged and the findings. A red finding prevents the failover.
        readiness: Readiness,
    },
    /// The coming domain was judged.
    ReadyFor {
        /// One finding for each question that was answered.
        findings: Vec<Finding>,
    },
    /// State of the domain on that host.
    State {
        /// Promotion, failover and power state; each of them is absent if there is none.
        standing: Standing,
    },
    /// The domain runs there, and its failover is durable.
    BringUp {
        /// Record of the failover.
        record: FailoverRecord,
    },
    /// The order is called off durably. The source may run the domain again.
    CallOff {},
    /// The failover was undone.
    Undo {
        /// Record of the failover that was undone.
        record: FailoverRecord,
    },
    /// The failover is final.
    Commit {
        /// Generation of the replica from now on.
        generation: Generation,
    },
    /// The host's own copy of the domain gave way.
    GiveWay {
        /// Point that the copy became, and the rest of the outcome.
        gave_way: GaveWay,
    },
}
