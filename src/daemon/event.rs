//! What comes to the [`engine`](super::engine) and what it orders: plain values. [`Setup`] is what the operator wrote,
//! ready for use.

use super::pair::{End, Pair};
use crate::config::Config;
use crate::daemon::check::Check;
use crate::error::Kind;
use crate::hook::{Env, Hook};
use crate::name::{DomainName, DomainUuid};
use crate::policy::Policy;
use crate::policy::admission::Caps;
use crate::policy::schedule::Schedule;
use crate::policy::select::SeenDomain;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// The time, and randomness, as one event sees them.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// Time by this host's clock, which may be set back or forth.
    pub wall: Timestamp,
    /// Since the daemon began, by a clock that nobody sets.
    pub up: Duration,
    /// 64 random bits, new for each event.
    pub random: u64,
}

/// What the operator wrote, ready for use.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Policies that were read. Other lists in this struct have the same order.
    pub policies: Vec<Policy>,
    pub(super) schedules: Vec<Schedule>,
    /// Of each policy, the checks that it wants and when.
    pub(super) checks: Vec<Vec<(Check, Schedule)>>,
    pub(super) urls: BTreeMap<String, String>,
    pub(super) caps: Caps,
    pub(super) stall_timeout: Duration,
    pub(super) stop_timeout: Duration,
}

impl Setup {
    /// Of a target by its name; a store of this host is named by its URL.
    pub(super) fn url(&self, target: &str) -> String {
        self.urls.get(target).map_or_else(|| target.to_owned(), String::clone)
    }

    /// `local`: this host's time zone.
    pub fn new(config: &Config, policies: Vec<Policy>, local: &TimeZone) -> Setup {
        let urls = config.urls();
        let host = config.daemon.runs_max.get() as usize;
        let cap = |name: &String| config.targets[name].runs_max.map(|n| n.get() as usize);
        let targets = urls.iter().filter_map(|(name, url)| Some((url.clone(), cap(name)?))).collect();
        let link = |name: &String| config.targets[name].link.clone();
        let links_of = urls.iter().filter_map(|(name, url)| Some((url.clone(), link(name)?))).collect();
        let links = config.links.iter().map(|(name, link)| (name.clone(), link.runs_max.get() as usize)).collect();
        Setup {
            schedules: policies.iter().map(|p| p.schedule(local)).collect(),
            checks: policies.iter().map(|p| Check::schedules(p, local)).collect(),
            policies,
            urls,
            caps: Caps { host, targets, links_of, links },
            stall_timeout: config.daemon.stall_timeout,
            stop_timeout: config.daemon.stop_timeout,
        }
    }
}

/// A domain as libvirt lists it, with the points that this host's journal knows of it: (target's URL, begin of the run,
/// `frozen_at`).
#[derive(Debug, Clone)]
pub struct Listed {
    /// Name, UUID and tags of the domain.
    pub domain: SeenDomain,
    /// A replica of this store on this host, and no domain of it.
    pub store: Option<PathBuf>,
    /// Newest points that this host knows: the target's URL, begin of the run, and `frozen_at`.
    pub points: Vec<(String, Timestamp, Timestamp)>,
    /// It was handed over, and lives on this target.
    pub lives_on: Option<String>,
    /// Of a replica: its domain was brought up on this host then, and its source is refused.
    pub promoted_since: Option<Timestamp>,
}

/// An input of the engine.
#[derive(Debug)]
pub enum Event {
    /// Time has passed.
    Tick,
    /// libvirt answered: these domains are on this host.
    Domains(Vec<Listed>),
    /// libvirt could not be asked, for this reason. No run begins until it answers again.
    DomainsFailed(String),
    /// The configuration and the policies were read again and are valid.
    Reloaded(Setup),
    /// The new configuration is wrong, for this reason. The old one stays in use.
    ReloadFailed(String),
    /// A run showed that it lives; `step`: it entered this one.
    Sign {
        /// Number of the run.
        run: u64,
        /// Step from 1 to 8 that the run entered. `None`: only a sign of life.
        step: Option<u8>,
    },
    /// The process of a run ended.
    Ended {
        /// Number of the run.
        run: u64,
        /// Result of the run and its measurements.
        end: End,
    },
    /// A check ended; `error`: what is wrong, or why it could not be found out.
    Checked {
        /// Number under which the check was started.
        run: u64,
        /// Kind and text of the failure; the kind is absent if unknown. `None`: everything was right.
        error: Option<(Option<Kind>, String)>,
    },
    /// The daemon is to end. Runs get `stop_timeout` to end in order.
    Stop,
}

/// Severity of a line of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// A normal event.
    Info,
    /// A thing that an operator should know, such as an expected breach or a check without a verdict.
    Warn,
    /// A failure or an alarm, such as a failed run, a breach, damage or a wrong configuration.
    Error,
}

/// Whom a line of the log is about: fields for whoever searches it. The text names them too.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct About {
    /// Domain that the line is about. `None`: the line is about no single domain.
    pub domain: Option<DomainName>,
    /// The target's name in the configuration, or its URL.
    pub target: Option<String>,
}

impl About {
    /// Domain and target of a run.
    pub fn job(job: &StartRun) -> About {
        About { domain: Some(job.domain.name.clone()), target: Some(job.target.clone()) }
    }

    /// Domain and target URL of a pair.
    pub fn pair(pair: &Pair) -> About {
        About { domain: Some(pair.domain.clone()), target: Some(pair.key.url.clone()) }
    }
}

/// An output of the engine that the service carries out.
#[derive(Debug, PartialEq)]
pub enum Order {
    /// Begin `virt-replica sync`.
    Start {
        /// Number of the run. Later events and orders name the run by it.
        run: u64,
        /// Domain, target and policy of the run.
        job: Box<StartRun>,
    },
    /// Begin `virt-replica verify` or `scrub`.
    Check {
        /// Number of the check, from the same sequence as the numbers of runs.
        run: u64,
        /// Check to do.
        check: Check,
        /// Domain, target and policy of the check.
        job: Box<StartRun>,
    },
    /// Begin `virt-replica doctor --repair`, under the number of the run that left the domain behind.
    Repair {
        /// Number of the run that left the domain behind.
        run: u64,
        /// UUID of the domain to repair.
        uuid: DomainUuid,
        /// How long the repair may wait until a commit can pivot.
        ready_timeout: Duration,
    },
    /// Ask a run to end in order (SIGTERM).
    Terminate(u64),
    /// End it where it stands (SIGKILL): its dead-man lets the guest go.
    Kill(u64),
    /// Start a hook of the operator's.
    Hook {
        /// Program to start, and its timeout.
        hook: Hook,
        /// Environment variables that tell the program what happened.
        env: Env,
    },
    /// Write this line to the log, with its level and the domain and target it is about.
    Say(Level, About, String),
    /// What changed has to survive a crash.
    Save,
    /// End the daemon.
    Exit,
}

/// All that a run needs to know.
#[derive(Debug, Clone, PartialEq)]
pub struct StartRun {
    /// Domain to replicate or to check.
    pub domain: SeenDomain,
    /// The target's name in the configuration.
    pub target: String,
    /// Policy that selected the domain; options of the run come from it.
    pub policy: Policy,
}
