//! What comes to the [`engine`](super::engine) and what it orders: plain values. [`Setup`] is what the operator wrote, ready for use.

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
    pub wall: Timestamp,
    /// Since the daemon began, by a clock that nobody sets.
    pub up: Duration,
    pub random: u64,
}

/// What the operator wrote, ready for use.
#[derive(Debug, Clone)]
pub struct Setup {
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
    pub domain: SeenDomain,
    /// A replica of this store on this host, and no domain of it.
    pub store: Option<PathBuf>,
    pub points: Vec<(String, Timestamp, Timestamp)>,
    /// It was handed over, and lives on this target.
    pub lives_on: Option<String>,
    /// Of a replica: its domain was brought up on this host then, and its source is refused.
    pub promoted_since: Option<Timestamp>,
}

#[derive(Debug)]
pub enum Event {
    /// Time has passed.
    Tick,
    Domains(Vec<Listed>),
    DomainsFailed(String),
    Reloaded(Setup),
    ReloadFailed(String),
    /// A run showed that it lives; `step`: it entered this one.
    Sign {
        run: u64,
        step: Option<u8>,
    },
    Ended {
        run: u64,
        end: End,
    },
    /// A check ended; `error`: what is wrong, or why it could not be found out.
    Checked {
        run: u64,
        error: Option<(Option<Kind>, String)>,
    },
    Stop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Info,
    Warn,
    Error,
}

/// Whom a line of the log is about: fields for whoever searches it. The text names them too.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct About {
    pub domain: Option<DomainName>,
    /// The target's name in the configuration, or its URL.
    pub target: Option<String>,
}

impl About {
    pub fn job(job: &StartRun) -> About {
        About { domain: Some(job.domain.name.clone()), target: Some(job.target.clone()) }
    }

    pub fn pair(pair: &Pair) -> About {
        About { domain: Some(pair.domain.clone()), target: Some(pair.key.url.clone()) }
    }
}

#[derive(Debug, PartialEq)]
pub enum Order {
    /// Begin `virt-replica sync`.
    Start {
        run: u64,
        job: Box<StartRun>,
    },
    /// Begin `virt-replica verify` or `scrub`.
    Check {
        run: u64,
        check: Check,
        job: Box<StartRun>,
    },
    /// Begin `virt-replica doctor --repair`, under the number of the run that left the domain behind.
    Repair {
        run: u64,
        uuid: DomainUuid,
        ready_timeout: Duration,
    },
    /// Ask a run to end in order (SIGTERM).
    Terminate(u64),
    /// End it where it stands (SIGKILL): its dead-man lets the guest go.
    Kill(u64),
    Hook {
        hook: Hook,
        env: Env,
    },
    Say(Level, About, String),
    /// What changed has to survive a crash.
    Save,
    Exit,
}

/// All that a run needs to know.
#[derive(Debug, Clone, PartialEq)]
pub struct StartRun {
    pub domain: SeenDomain,
    /// The target's name in the configuration.
    pub target: String,
    pub policy: Policy,
}
