//! A check of a pair as plain data: its kind, and what is remembered of it.

use crate::policy::Policy;
use crate::policy::schedule::Schedule;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

/// A check that a policy orders beside the runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// Every block of the head against the digest it was sealed with.
    Verify,
    /// All points, and the files beside them.
    Scrub,
    /// A throw-away copy of the head is booted on this host, the target.
    Drill,
}

impl Check {
    /// All checks, in the order in which they are listed.
    pub const ALL: [Check; 3] = [Check::Verify, Check::Scrub, Check::Drill];

    /// The command that does it.
    pub fn word(self) -> &'static str {
        match self {
            Check::Verify => "verify",
            Check::Scrub => "scrub",
            Check::Drill => "drill",
        }
    }

    /// Those that a policy wants, and when.
    pub fn schedules(policy: &Policy, local: &TimeZone) -> Vec<(Check, Schedule)> {
        let wanted = Check::ALL.into_iter().filter_map(|check| {
            let timed = match check {
                Check::Verify => policy.verify.as_ref(),
                Check::Scrub => policy.scrub.as_ref(),
                Check::Drill => policy.drill.as_ref().map(|d| &d.when),
            };
            Some((check, policy.schedule_of(timed?, local)))
        });
        wanted.collect()
    }
}

/// What is remembered of a check of one domain on one target.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CheckState {
    /// Begin of the newest that ended with a verdict.
    pub begun: Option<Timestamp>,
    /// When the newest that found everything right had ended.
    pub whole_at: Option<Timestamp>,
    /// What the newest found, or why it found nothing out; `None`: it was right.
    pub error: Option<String>,
    /// Earliest time of the next try after a check without a verdict. `None`: no retry is pending.
    pub retry_at: Option<Timestamp>,
    /// In a row.
    pub failures: u32,
    /// Number of checks that found everything right.
    pub passed: u64,
    /// Number of checks that found a fault or did not come to an end.
    pub failed: u64,
}
