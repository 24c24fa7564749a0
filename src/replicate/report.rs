//! What a run did, as data: printed by the command line, kept by the journal, read by scripts.

use super::plan::Skipped;
use crate::error::Error;
use crate::name::{DomainName, DomainUuid, RunId};
use crate::replica::PointView;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The report of one run. The fields of the new point stand at its top level, as in `points --json`; scripts depend on
/// the names: fields are added, never renamed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    pub domain: DomainName,
    pub uuid: DomainUuid,
    pub target: String,
    /// The run, whether or not it led to a point (whose own `run` stands below).
    pub run_id: RunId,
    pub started_at: Timestamp,
    pub outcome: RunOutcome,
    /// The new point; absent if none was sealed.
    #[serde(flatten)]
    pub point: Option<PointView>,
    /// Duration of the freeze call in milliseconds, an upper bound of what the guest felt; 0 for a domain that is off.
    pub freeze_ms: f64,
    /// Longest time the guest's vCPUs stood still at the end of the commit, in milliseconds; 0 if they did not.
    pub pause_ms: f64,
    pub duration_ms: f64,
    pub skipped: Vec<Skipped>,
    /// What an operator should know although the run went on.
    pub warnings: Vec<String>,
    pub error: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunOutcome {
    /// A new point exists and the domain is back on its own images.
    Sealed,
    /// A new point exists, and the domain is still on an overlay: see the warnings.
    CommitPending,
    /// No new point.
    Failed,
}

impl Report {
    pub fn failed(mut self, error: &Error) -> Self {
        self.outcome = RunOutcome::Failed;
        self.error = Some(error.chain());
        self
    }
}

/// Milliseconds with three decimals, as the reports have them.
pub fn millis(d: Duration) -> f64 {
    (d.as_secs_f64() * 1e6).round() / 1e3
}
