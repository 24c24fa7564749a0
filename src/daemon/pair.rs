//! What is remembered of one domain on one target. Plain data, kept in the state file; names are added, never renamed.

use crate::daemon::check::{Check, CheckState};
use crate::error::Kind;
use crate::name::{DomainName, DomainUuid};
use crate::policy::schedule::Past;
use crate::replica::lag::is_future;
use crate::replica::left_out::Skipped;
use crate::replicate::settle::stopped::GuestStopped;
use crate::replicate::state::report::TargetSeen;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// A domain on a target.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Key {
    /// UUID of the domain, which stays if the domain is renamed.
    pub uuid: DomainUuid,
    /// The target's URL: a name may be given to another target tomorrow.
    pub url: String,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunResult {
    /// The run made a point, and the domain is back on its own images.
    Sealed,
    /// A point, and a disk is still on an overlay.
    CommitPending,
    /// The run made no point.
    Failed,
}

impl RunResult {
    /// All results, in the order in which they are listed.
    pub const ALL: [RunResult; 3] = [RunResult::Sealed, RunResult::CommitPending, RunResult::Failed];

    /// Name of the result in JSON and in metrics.
    pub fn word(self) -> &'static str {
        match self {
            RunResult::Sealed => "sealed",
            RunResult::CommitPending => "commit_pending",
            RunResult::Failed => "failed",
        }
    }
}

/// A run that ended, as far as the daemon heard of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct End {
    /// Whether the run made a point, and whether its commit has ended.
    pub result: RunResult,
    /// From when the age of its point counts.
    pub frozen_at: Option<Timestamp>,
    /// So far, at least, the source's clock was ahead of the target's when the point was made.
    #[serde(default)]
    pub clock_ahead_s: Option<i64>,
    /// Disks that it could not replicate. `None`: it did not come to plan them.
    #[serde(default)]
    pub unprotected: Option<Vec<Skipped>>,
    /// Id of the point that the run made. `None`: it made none.
    pub point: Option<String>,
    /// Kind of the error. `None`: the run did not fail, or the daemon does not know the kind.
    pub error_kind: Option<Kind>,
    /// Why the run failed, in words. `None`: it did not fail.
    pub error: Option<String>,
    /// Alarms of the run, one sentence each. A person must look at every one.
    pub alarms: Vec<String>,
    /// QEMU stopped the guest after an I/O error.
    #[serde(default)]
    pub guest_stopped: Option<GuestStopped>,
    /// Duration of the freeze call in milliseconds, an upper bound of what the guest felt; 0 without a freeze.
    pub freeze_ms: f64,
    /// The longest pause of the guest.
    pub pause_ms: f64,
    /// All its pauses together; absent if it is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_sum_ms: Option<f64>,
    /// How often the run paused the guest. `None`: a run of an older program, or one that did not bring the domain
    /// home.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pauses: Option<u32>,
    /// Bytes that the run read from the source's images.
    pub bytes_read: u64,
    /// Bytes of patches that the run sent.
    pub bytes_sent: u64,
    /// Bytes of guest data that the target wrote.
    pub bytes_written: u64,
    /// Points and free space on the target after the run. `None`: the run did not see them.
    #[serde(default)]
    pub seen: Option<TargetSeen>,
    /// It made no point because its domain lives on this target.
    #[serde(default)]
    pub lives_on: Option<String>,
}

impl End {
    /// A run that made no point.
    pub fn failed(kind: Option<Kind>, error: impl Into<String>) -> End {
        End {
            result: RunResult::Failed,
            frozen_at: None,
            clock_ahead_s: None,
            unprotected: None,
            point: None,
            error_kind: kind,
            error: Some(error.into()),
            alarms: Vec::new(),
            guest_stopped: None,
            freeze_ms: 0.0,
            pause_ms: 0.0,
            pause_sum_ms: None,
            pauses: None,
            bytes_read: 0,
            bytes_sent: 0,
            bytes_written: 0,
            seen: None,
            lives_on: None,
        }
    }
}

/// The newest run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LastRun {
    /// When the run began, by this host's clock.
    pub started_at: Timestamp,
    /// When the run ended, by this host's clock.
    pub ended_at: Timestamp,
    /// Result of the run and its measurements.
    #[serde(flatten)]
    pub end: End,
}

/// A run of the past, for the chart.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Brief {
    /// When the run began, by this host's clock.
    pub started_at: Timestamp,
    /// Duration of the run in seconds.
    pub seconds: u64,
    /// Whether the run made a point, and whether its commit has ended.
    pub result: RunResult,
}

/// How many of them are remembered.
const BRIEFS_MAX: usize = 40;

/// Counted since the daemon first looked after the pair; they only grow, also over restarts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Totals {
    /// Runs that made a point and left the domain on its own images.
    pub sealed: u64,
    /// Runs that made a point and left a disk on an overlay.
    pub commit_pending: u64,
    /// Runs that made no point.
    pub failed: u64,
    /// Alarms that runs reported.
    pub alarms: u64,
    /// Times that the lag became greater than the RPO.
    pub breaches: u64,
    /// Bytes that runs read from the source's images.
    pub bytes_read: u64,
    /// Bytes of patches that runs sent.
    pub bytes_sent: u64,
    /// Bytes of guest data that the target wrote.
    pub bytes_written: u64,
    /// Time from begin to end of all runs, in seconds.
    pub run_seconds: f64,
    /// Duration of all freeze calls, in seconds.
    pub freeze_seconds: f64,
    /// Sum of the longest pause of each run, in seconds.
    pub pause_seconds: f64,
    /// Time spent in each step of a run, 1 to 8.
    pub step_seconds: [f64; 8],
}

impl Totals {
    /// Number of runs with this result.
    pub fn runs(&self, result: RunResult) -> u64 {
        match result {
            RunResult::Sealed => self.sealed,
            RunResult::CommitPending => self.commit_pending,
            RunResult::Failed => self.failed,
        }
    }
}

/// How many durations are remembered to foresee the next.
const RECENT_MAX: usize = 5;

/// History of one domain on one target, kept over restarts of the daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// Domain and target that the history is about.
    #[serde(flatten)]
    pub key: Key,
    /// Name of the domain when the daemon last saw it.
    pub domain: DomainName,
    /// When this host began to look after it.
    pub since: Timestamp,
    /// Begin of the newest run that made a point, and from when the age of that point counts.
    #[serde(default)]
    pub begun: Option<Timestamp>,
    /// When the disks of the newest point stood still. `None`: no point is known.
    #[serde(default)]
    pub frozen_at: Option<Timestamp>,
    /// Earliest time of the next run, after a failure or a handover. `None`: no wait applies.
    #[serde(default)]
    pub retry_at: Option<Timestamp>,
    /// Failures in a row since the newest point.
    #[serde(default)]
    pub failures: u32,
    /// Durations of the newest runs that made a point, in seconds, oldest first; at most five.
    #[serde(default)]
    pub recent_s: Vec<u64>,
    /// The newest runs, oldest first.
    #[serde(default)]
    pub recent: Vec<Brief>,
    /// Since when the lag is greater than the RPO. `None`: it is not.
    #[serde(default)]
    pub breach_since: Option<Timestamp>,
    /// The newest run that ended. `None`: none has ended yet.
    #[serde(default)]
    pub last: Option<LastRun>,
    /// Counters over all runs of the pair.
    #[serde(default)]
    pub totals: Totals,
    /// What the newest run that made a point saw of the target.
    #[serde(default)]
    pub seen: Option<TargetSeen>,
    /// Results of the checks that the policy orders. A check that never ran may be absent.
    #[serde(default)]
    pub checks: BTreeMap<Check, CheckState>,
    /// Disks that the newest run could not replicate: the domain is partly protected.
    #[serde(default)]
    pub unprotected: Vec<Skipped>,
    /// So far, at least, the source's clock was ahead of the target's when the newest point was made.
    #[serde(default)]
    pub clock_ahead_s: Option<i64>,
}

impl Pair {
    /// A pair without a history, first looked after at `since`.
    pub fn new(key: Key, domain: DomainName, since: Timestamp) -> Pair {
        Pair {
            key,
            domain,
            since,
            begun: None,
            frozen_at: None,
            retry_at: None,
            failures: 0,
            recent_s: Vec::new(),
            recent: Vec::new(),
            breach_since: None,
            last: None,
            totals: Totals::default(),
            seen: None,
            checks: BTreeMap::new(),
            unprotected: Vec::new(),
            clock_ahead_s: None,
        }
    }

    /// The part of the history that decides when the next run is due.
    pub fn past(&self) -> Past {
        Past { since: self.since, begun: self.begun, retry_at: self.retry_at }
    }

    /// Expected duration of the next run: the longest of the last few.
    pub fn expected(&self) -> Duration {
        let recent: Vec<Duration> = self.recent_s.iter().map(|s| Duration::from_secs(*s)).collect();
        crate::policy::admission::expected(&recent)
    }

    /// From when the age of the newest point counts; `None` if there is none, or if nobody can know.
    pub fn as_of(&self, now: Timestamp) -> Option<Timestamp> {
        self.frozen_at.filter(|t| !is_future(*t, now))
    }

    /// So far, at least, a clock was ahead when the newest point was made, or is behind now.
    pub fn ahead_s(&self, now: Timestamp) -> Option<i64> {
        let future = self.frozen_at.filter(|t| is_future(*t, now)).map(|t| t.duration_since(now).as_secs());
        self.clock_ahead_s.max(future)
    }

    /// A point made by a run, ours or somebody else's, is news if it is newer than what we know. What we know to lie in
    /// the future came of a clock that was wrong: it is older than any point of now.
    pub fn learn(&mut self, begun: Timestamp, frozen_at: Timestamp, now: Timestamp) -> bool {
        let is_news =
            self.frozen_at.is_none_or(|known| frozen_at > known || (is_future(known, now) && frozen_at != known));
        if is_news {
            self.begun = Some(begun);
            self.frozen_at = Some(frozen_at);
            self.retry_at = None;
            self.failures = 0;
        }
        is_news
    }

    /// Takes down how a run ended; waiting after a failure is the caller's.
    pub fn ended(&mut self, started_at: Timestamp, ended_at: Timestamp, end: End) {
        let seconds = ended_at.duration_since(started_at).as_secs().max(0) as u64;
        let t = &mut self.totals;
        match end.result {
            RunResult::Sealed => t.sealed += 1,
            RunResult::CommitPending => t.commit_pending += 1,
            RunResult::Failed => t.failed += 1,
        }
        t.alarms += end.alarms.len() as u64;
        t.bytes_read += end.bytes_read;
        t.bytes_sent += end.bytes_sent;
        t.bytes_written += end.bytes_written;
        t.run_seconds += seconds as f64;
        t.freeze_seconds += end.freeze_ms / 1e3;
        t.pause_seconds += end.pause_sum_ms.unwrap_or(end.pause_ms) / 1e3;
        if let Some(frozen_at) = end.frozen_at {
            self.learn(started_at, frozen_at, ended_at);
            self.clock_ahead_s = end.clock_ahead_s;
            self.recent_s.push(seconds);
            let surplus = self.recent_s.len().saturating_sub(RECENT_MAX);
            self.recent_s.drain(..surplus);
        }
        self.recent.push(Brief { started_at, seconds, result: end.result });
        let surplus = self.recent.len().saturating_sub(BRIEFS_MAX);
        self.recent.drain(..surplus);
        if let Some(unprotected) = &end.unprotected {
            self.unprotected = unprotected.clone();
        }
        self.seen = end.seen.or(self.seen);
        self.last = Some(LastRun { started_at, ended_at, end });
    }
}
