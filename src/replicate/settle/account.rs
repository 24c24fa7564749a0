//! What was done to bring a domain home, for its report.

use crate::replicate::state::record::GuestStopped;
use std::time::Duration;

/// What happened, for the report.
#[derive(Debug, Default, Clone)]
pub struct Account {
    /// Longest time the guest's vCPUs were held in one go.
    pub pause: Option<Duration>,
    /// The steps performed, in words, oldest first.
    pub steps: Vec<String>,
    /// What was unusual enough to tell an operator.
    pub alarms: Vec<String>,
    /// The guest that an I/O error had stopped, and what became of it.
    pub stopped: Option<GuestStopped>,
}
