//! Requests and replies about bringing a domain up on the agent's host: what [`BringUp`](crate::recovery::bringup::BringUp)
//! offers.

use crate::name::{Generation, PointId};
use crate::recovery::bringup::{Coming, Order, Readiness, Standing};
use crate::recovery::failover::FailoverRecord;
use crate::recovery::ready::Finding;
use crate::recovery::retire_home_copy::GaveWay;
use serde::{Deserialize, Serialize};

/// Each is answered by the [`Told`] of the same name.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    Ready { point: Option<PointId> },
    ReadyFor { coming: Coming },
    State {},
    BringUp { order: Order },
    CallOff { order: Order },
    Undo {},
    Commit {},
    GiveWay {},
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    Ready { readiness: Readiness },
    ReadyFor { findings: Vec<Finding> },
    State { standing: Standing },
    BringUp { record: FailoverRecord },
    CallOff {},
    Undo { record: FailoverRecord },
    Commit { generation: Generation },
    GiveWay { gave_way: GaveWay },
}
