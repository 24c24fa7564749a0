//! How everything stands, as data: the answer of the control socket, and what the metrics are made of.

use super::engine::{Engine, deadline, lives_on};
use super::event::Now;
use super::pair::{Brief, LastRun, Totals};
use super::run::Phase;
use crate::daemon::check::{Check, CheckState};
use crate::name::{DomainName, DomainUuid};
use crate::policy::schedule::Due;
use crate::replica::left_out::Skipped;
use crate::replicate::state::report::TargetSeen;
use jiff::Timestamp;
use serde::Serialize;
use std::collections::BTreeMap;

/// The names are a contract (docs/formats/json.md): added, never renamed.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// Version of the program that the daemon runs.
    pub version: &'static str,
    /// Seconds since the daemon began.
    pub up_s: u64,
    /// The daemon was told to end and waits for its runs.
    pub stopping: bool,
    /// All domains are paused.
    pub paused: bool,
    /// Number of policies in use.
    pub policies: usize,
    /// Number of runs under way.
    pub runs: usize,
    /// Why libvirt cannot be asked. `None`: it answered the last time.
    pub libvirt_error: Option<String>,
    /// Why the newest configuration was refused; the older one is in use. `None`: it was not refused.
    pub config_error: Option<String>,
    /// One of each domain and target.
    pub domains: Vec<Row>,
}

/// State of one domain on one target.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Name of the domain when the daemon last saw it.
    pub domain: DomainName,
    /// UUID of the domain, which stays if the domain is renamed.
    pub uuid: DomainUuid,
    /// URL of the target.
    pub target: String,
    /// The policy that means it; absent for a domain that no policy means any more.
    pub policy: Option<String>,
    /// Runs of the domain are held back, alone or with all others.
    pub paused: bool,
    /// Where it lives since it was handed over: nothing is promised of it here, so lag and RPO are absent.
    pub lives_on: Option<String>,
    /// Of a replica here: since when its domain lives on this host, brought up from one of its points. Its source is
    /// refused, so lag and RPO are absent.
    pub promoted_since: Option<Timestamp>,
    /// When the disks of the newest point stood still. `None`: no point is known.
    pub frozen_at: Option<Timestamp>,
    /// Age of the head in seconds, never negative. `None`: there is no head, or its age cannot be known.
    pub lag_s: Option<i64>,
    /// Allowed age of the head in seconds. `None`: the policy names no RPO.
    pub rpo_s: Option<u64>,
    /// What is left until the RPO is broken; negative: it is.
    pub slack_s: Option<i64>,
    /// Since when the lag is greater than the RPO. `None`: it is not.
    pub breach_since: Option<Timestamp>,
    /// When the next run is due; now or earlier: it waits for its turn.
    pub next_at: Option<Timestamp>,
    /// The run that is under way. `None`: there is none.
    pub running: Option<RunningRow>,
    /// Failures in a row since the newest point.
    pub failures: u32,
    /// The newest run that ended. `None`: none has ended yet.
    pub last_run: Option<LastRun>,
    /// What the newest run that made a point saw of the target.
    pub last_seen: Option<TargetSeen>,
    /// The newest runs, oldest first.
    pub recent: Vec<Brief>,
    /// Counters over all runs of the domain to this target.
    pub totals: Totals,
    /// What the checks on the target found.
    pub checks: BTreeMap<Check, CheckState>,
    /// Disks that the newest run could not replicate: the domain is partly protected.
    pub unprotected: Vec<Skipped>,
    /// So far, at least, a clock was ahead when the newest point was made; absent: nothing shows that.
    pub clock_ahead_s: Option<i64>,
}

/// A run that is under way.
#[derive(Debug, Clone, Serialize)]
pub struct RunningRow {
    /// When the run began, by this host's clock.
    pub since: Timestamp,
    /// The step it is in; 0 before the first.
    pub step: u8,
    /// Phase of the run: `working`, `ending`, `killed` or `repairing`.
    pub state: &'static str,
}

impl Engine {
    /// State of everything at this moment, sorted by domain, then by target.
    pub fn status(&self, now: Now) -> Status {
        let shown =
            self.pairs.iter().filter(|(key, _)| self.is_there(&key.uuid) || self.runs.values().any(|r| r.key == **key));
        let rows = shown.map(|(key, pair)| {
            let assigned = self.assigned.get(key);
            let policy = assigned.map(|a| &self.setup.policies[a.policy]);
            let lives_on = policy.and_then(|p| lives_on(&self.handed, key, p));
            let promoted_since = self.promoted.get(key).copied();
            let counts = lives_on.is_none() && promoted_since.is_none();
            let rpo = policy.and_then(|p| p.rpo).filter(|_| counts);
            let running = self.runs.values().find(|r| r.key == *key);
            Row {
                domain: pair.domain.clone(),
                uuid: key.uuid.clone(),
                target: key.url.clone(),
                policy: policy.map(|p| p.name.clone()),
                paused: self.all_paused || self.paused.contains(&key.uuid),
                frozen_at: pair.frozen_at,
                lives_on: lives_on.map(str::to_owned),
                promoted_since,
                lag_s: pair.as_of(now.wall).filter(|_| counts).map(|f| now.wall.duration_since(f).as_secs().max(0)),
                rpo_s: rpo.map(|r| r.as_secs()),
                slack_s: rpo.map(|r| deadline(pair, r, now.wall).duration_since(now.wall).as_secs()),
                breach_since: pair.breach_since,
                // A target's replicas have no runs that could be due.
                next_at: assigned.and_then(|_| match self.due(key, now.wall) {
                    Due::Now { since } => Some(since),
                    Due::At(at) => (at < Timestamp::MAX).then_some(at),
                }),
                running: running.map(|r| RunningRow {
                    since: r.begun,
                    step: r.step,
                    state: match r.phase {
                        Phase::Working => "working",
                        Phase::Terminated => "ending",
                        Phase::Killed => "killed",
                        Phase::Repairing => "repairing",
                    },
                }),
                failures: pair.failures,
                last_run: pair.last.clone(),
                last_seen: pair.seen,
                recent: pair.recent.clone(),
                totals: pair.totals,
                checks: pair.checks.clone(),
                unprotected: pair.unprotected.clone(),
                clock_ahead_s: pair.ahead_s(now.wall),
            }
        });
        let mut domains: Vec<Row> = rows.collect();
        domains.sort_by(|a, b| (&a.domain, &a.target).cmp(&(&b.domain, &b.target)));
        Status {
            version: env!("CARGO_PKG_VERSION"),
            up_s: now.up.as_secs(),
            stopping: self.stopping(),
            paused: self.all_paused,
            policies: self.setup.policies.len(),
            runs: self.runs.len(),
            libvirt_error: self.libvirt_error.clone(),
            config_error: self.config_error.clone(),
            domains,
        }
    }
}
