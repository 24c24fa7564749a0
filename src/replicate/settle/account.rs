//! What was done to bring a domain home, for its report.

use crate::replicate::state::record::GuestStopped;
use std::time::Duration;

/// How often and how long the guest's vCPUs were held.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Pauses {
    /// How often the guest was paused.
    pub count: u32,
    /// All of them together.
    pub sum: Duration,
    /// The longest of the pauses.
    pub longest: Duration,
}

impl Pauses {
    pub(in crate::replicate) fn add(&mut self, held: Duration) {
        self.count += 1;
        self.sum += held;
        self.longest = self.longest.max(held);
    }
}

/// What happened, for the report.
#[derive(Debug, Default, Clone)]
pub struct Account {
    /// How often, and how long, the guest was paused on the way home.
    pub pauses: Pauses,
    /// The steps performed, in words, oldest first.
    pub steps: Vec<String>,
    /// What was unusual enough to tell an operator.
    pub alarms: Vec<String>,
    /// The guest that an I/O error had stopped, and what became of it.
    pub stopped: Option<GuestStopped>,
}
