//! A check under way, as plain data.

use crate::daemon::check::Check;
use crate::daemon::event::{Setup, StartRun};
use crate::daemon::pair::Key;
use jiff::Timestamp;
use std::time::Duration;

/// How long a check that was asked to end may go on before it is killed.
const TERM_GRACE: Duration = Duration::from_secs(30);

/// A check under way.
#[derive(Debug)]
pub struct Checking {
    pub(super) key: Key,
    pub(super) check: Check,
    pub(super) job: StartRun,
    pub(super) begun: Timestamp,
    pub(super) last_sign: Duration,
    pub(super) terminated: bool,
}

impl Checking {
    /// When its silence has lasted too long, by the clock that nobody sets.
    pub(super) fn patience_ends(&self, setup: &Setup, stop_at: Option<Duration>) -> Option<Duration> {
        Some(match (self.terminated, stop_at) {
            (true, Some(stop_at)) => stop_at.min(self.last_sign + TERM_GRACE),
            (true, None) => self.last_sign + TERM_GRACE,
            (false, _) => self.last_sign + setup.stall_timeout,
        })
    }
}
