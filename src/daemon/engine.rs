//! The daemon's mind. Pure: a state, an event and the time in, orders out; no clock, no process, no file.
//!
//! Invariants
//! - A domain has one run at a time, and a run that ends is followed by nothing else on its domain before it has ended.
//! - A run that is under way keeps the policy it began with, whatever is reloaded.
//! - While libvirt is not there no run begins, and nobody is forgotten.
//! - After [`Event::Stop`] no run begins.

use super::event::{About, Event, Level, Listed, Now, Order, Setup, StartRun};
use super::pair::{End, Key, Pair, RunResult};
use super::run::{Phase, Run, hook_env};
use crate::daemon::checking::Checking;
use crate::name::DomainUuid;
use crate::policy::admission::{self, BreachChange, Running, Waiting};
use crate::policy::schedule::{Due, Shift};
use crate::policy::select::{SeenDomain, SeenReplica, select, store_url};
use crate::policy::{Policy, retry};
use crate::replica::left_out::Skipped;
use jiff::{SignedDuration, Timestamp};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Days after its last run for which a domain is remembered that libvirt does not know any more.
const FORGET_DAYS: i64 = 90;

/// Longest sleep: clocks are set, and a laptop wakes up.
const SLEEP_MAX: Duration = Duration::from_secs(60);

/// Who goes where by the policies and the domains of this moment.
#[derive(Debug, Clone)]
pub(super) struct Assigned {
    pub(super) policy: usize,
    pub(super) target: String,
    pub(super) domain: SeenDomain,
}

/// State of the daemon and all its decisions. It takes events and returns orders, and does nothing itself.
pub struct Engine {
    pub(super) setup: Setup,
    pub(super) pairs: BTreeMap<Key, Pair>,
    pub(super) assigned: BTreeMap<Key, Assigned>,
    pub(super) runs: BTreeMap<u64, Run>,
    pub(super) checking: BTreeMap<u64, Checking>,
    pub(super) paused: BTreeSet<DomainUuid>,
    pub(super) all_paused: bool,
    /// Runs that a person asked for.
    asked: BTreeSet<Key>,
    pub(super) next_run: u64,
    domains: Vec<Listed>,
    /// Domains of this host that were handed over, and where they live: nothing is promised of them here.
    pub(super) handed: BTreeMap<DomainUuid, String>,
    /// Replicas of this host's stores whose domains were brought up here, and since when: no source may send a younger
    /// point, so nothing is promised of their age.
    pub(super) promoted: BTreeMap<Key, Timestamp>,
    listed: bool,
    pub(super) libvirt_error: Option<String>,
    pub(super) config_error: Option<String>,
    /// What was said of a pair, so that it is not said again: the deadline it will miss.
    foreseen: BTreeMap<Key, Timestamp>,
    /// What was said of the selection.
    said: BTreeSet<String>,
    pub(super) stop_at: Option<Duration>,
    /// Ends by itself when nothing is due.
    once: bool,
    /// Runs that failed since this daemon began. With `once`, a failure to ask libvirt counts too.
    pub failed_runs: u64,
}

pub(super) fn signed(d: Duration) -> SignedDuration {
    SignedDuration::try_from(d).unwrap_or(SignedDuration::MAX)
}

impl Engine {
    /// `pairs`, `paused`: what an earlier daemon knew. `once`: [`Order::Exit`] comes as soon as nothing is due.
    pub fn new(setup: Setup, pairs: Vec<Pair>, paused: BTreeSet<DomainUuid>, all_paused: bool, once: bool) -> Engine {
        Engine {
            setup,
            pairs: pairs.into_iter().map(|p| (p.key.clone(), p)).collect(),
            assigned: BTreeMap::new(),
            runs: BTreeMap::new(),
            checking: BTreeMap::new(),
            paused,
            all_paused,
            asked: BTreeSet::new(),
            next_run: 1,
            domains: Vec::new(),
            handed: BTreeMap::new(),
            promoted: BTreeMap::new(),
            listed: false,
            libvirt_error: None,
            config_error: None,
            foreseen: BTreeMap::new(),
            said: BTreeSet::new(),
            stop_at: None,
            once,
            failed_runs: 0,
        }
    }

    /// What to do about it.
    pub fn handle(&mut self, event: Event, now: Now) -> Vec<Order> {
        let mut orders = Vec::new();
        match event {
            Event::Tick => {}
            Event::Domains(domains) => {
                if self.libvirt_error.take().is_some() {
                    orders.push(Order::Say(Level::Info, About::default(), "libvirt is there again".to_owned()));
                }
                let handed = domains.iter().filter_map(|l| Some((l.domain.uuid.clone(), l.lives_on.clone()?)));
                self.handed = handed.collect();
                let promoted = domains.iter().filter_map(|l| {
                    Some((Key { uuid: l.domain.uuid.clone(), url: store_url(l.store.as_ref()?) }, l.promoted_since?))
                });
                self.promoted = promoted.collect();
                self.domains = domains;
                self.listed = true;
                self.assign(now, &mut orders);
            }
            Event::DomainsFailed(why) => {
                if self.libvirt_error.is_none() {
                    let text = format!("libvirt cannot be asked, no run begins until it can: {why}");
                    orders.push(Order::Say(Level::Error, About::default(), text));
                }
                self.libvirt_error = Some(why);
                if self.once {
                    self.failed_runs += 1;
                    orders.push(Order::Exit);
                }
            }
            Event::Reloaded(setup) => {
                self.setup = setup;
                self.config_error = None;
                self.said.clear();
                let text = format!("policies read: {}", self.setup.policies.len());
                orders.push(Order::Say(Level::Info, About::default(), text));
                self.assign(now, &mut orders);
            }
            Event::ReloadFailed(why) => {
                let text = format!("THE NEW CONFIGURATION IS WRONG; the old one stays in force: {why}");
                orders.push(Order::Say(Level::Error, About::default(), text));
                self.config_error = Some(why);
            }
            Event::Sign { run, step } => {
                if let Some(checking) = self.checking.get_mut(&run) {
                    checking.last_sign = now.up;
                }
                if let Some(run) = self.runs.get_mut(&run) {
                    run.last_sign = now.up;
                    if let Some(step) = step.filter(|s| *s != run.step) {
                        run.count_step(self.pairs.get_mut(&run.key), now.up);
                        run.step = step;
                    }
                }
            }
            Event::Ended { run, end } => self.ended(run, end, now, &mut orders),
            Event::Checked { run, error } => self.checked(run, error, now, &mut orders),
            Event::Stop => self.stop(now, &mut orders),
        }
        self.look(now, &mut orders);
        orders
    }

    /// Pairs policies and domains anew; pairs that are new begin to exist, known ones learn of points made by others.
    fn assign(&mut self, now: Now, orders: &mut Vec<Order>) {
        let (replicas, domains): (Vec<&Listed>, Vec<&Listed>) = self.domains.iter().partition(|l| l.store.is_some());
        let domains: Vec<SeenDomain> = domains.iter().map(|l| l.domain.clone()).collect();
        let replica = |l: &&Listed| Some(SeenReplica { domain: l.domain.clone(), store: l.store.clone()? });
        let replicas: Vec<SeenReplica> = replicas.iter().filter_map(replica).collect();
        let found = select(&self.setup.policies, &domains, &replicas, &self.setup.urls);
        let mut to_say: Vec<(Level, String)> = Vec::new();
        for e in &found.clashes {
            to_say.push((Level::Error, format!("{e}; {}", e.hint_text().unwrap_or_default())));
        }
        for (at, selector) in &found.unmatched {
            let policy = &self.setup.policies[*at];
            let what = if policy.store.is_some() { "no replica that is here" } else { "no domain of this host" };
            to_say.push((Level::Warn, format!("policy '{}': '{selector}' is {what}", policy.name)));
        }
        let texts: BTreeSet<String> = to_say.iter().map(|(_, t)| t.clone()).collect();
        orders.extend(
            to_say.into_iter().filter(|(_, t)| !self.said.contains(t)).map(|(l, t)| Order::Say(l, About::default(), t)),
        );
        self.said = texts;
        let mut assigned = BTreeMap::new();
        for pair in found.pairs {
            let key = Key { uuid: pair.domain.uuid.clone(), url: self.setup.url(&pair.target) };
            let state = self.pairs.entry(key.clone()).or_insert_with(|| {
                orders.push(Order::Save);
                Pair::new(key.clone(), pair.domain.name.clone(), now.wall)
            });
            if state.domain != pair.domain.name {
                let text = format!("domain '{}' is called '{}' now", state.domain, pair.domain.name);
                orders.push(Order::Say(Level::Info, About::pair(state), text));
                state.domain = pair.domain.name.clone();
            }
            assigned.insert(key, Assigned { policy: pair.policy, target: pair.target, domain: pair.domain });
        }
        self.assigned = assigned;
        self.forget(now.wall);
        for listed in &self.domains {
            for (url, begun, frozen_at) in &listed.points {
                let key = Key { uuid: listed.domain.uuid.clone(), url: url.clone() };
                if self.pairs.get_mut(&key).is_some_and(|p| p.learn(*begun, *frozen_at, now.wall)) {
                    orders.push(Order::Save);
                }
            }
        }
    }

    /// Whether libvirt knows the domain. Before the first list nobody is known to be gone.
    pub(super) fn is_there(&self, uuid: &DomainUuid) -> bool {
        !self.listed || self.domains.iter().any(|l| l.domain.uuid == *uuid)
    }

    /// Forgets domains that are gone for long: one that was moved away for a while comes back to its counters.
    fn forget(&mut self, now: Timestamp) {
        let there: BTreeSet<&DomainUuid> = self.domains.iter().map(|l| &l.domain.uuid).collect();
        self.pairs.retain(|key, pair| {
            let last = pair.last.as_ref().map_or(pair.since, |l| l.ended_at);
            there.contains(&key.uuid) || now.duration_since(last) < SignedDuration::from_hours(24 * FORGET_DAYS)
        });
    }

    fn ended(&mut self, number: u64, end: End, now: Now, orders: &mut Vec<Order>) {
        let Some(run) = self.runs.get_mut(&number) else { return };
        if run.phase == Phase::Repairing {
            let run = self.runs.remove(&number).expect("it was just found");
            let text = format!("domain '{}': looked after what the killed run left", run.job.domain.name);
            orders.push(Order::Say(Level::Warn, About::job(&run.job), text));
            return;
        }
        run.count_step(self.pairs.get_mut(&run.key), now.up);
        let (key, job, begun, killed) = (run.key.clone(), run.job.clone(), run.begun, run.phase == Phase::Killed);
        if killed && self.stop_at.is_none() {
            // It could not put the domain back itself.
            run.phase = Phase::Repairing;
            (run.last_sign, run.begun_up) = (now.up, now.up);
            let (uuid, ready_timeout) = (job.domain.uuid.clone(), job.policy.ready_timeout);
            orders.push(Order::Repair { run: number, uuid, ready_timeout });
        } else {
            self.runs.remove(&number);
        }
        self.asked.remove(&key);
        self.foreseen.remove(&key);
        let Some(pair) = self.pairs.get_mut(&key) else { return };
        if let Some(to) = end.lives_on.as_ref().filter(|_| end.alarms.is_empty()) {
            // As it should be, and no failure. It is asked again: the target may have let it back.
            pair.retry_at = now.wall.checked_add(signed(job.policy.retry.max)).ok();
            pair.failures = 0;
            let text = format!("domain '{}' lives on {to}: nothing is replicated from here", job.domain.name);
            orders.extend([Order::Say(Level::Info, About::job(&job), text), Order::Save]);
            self.handed.insert(key.uuid, to.clone());
            return;
        }
        let before = pair.unprotected.clone();
        pair.ended(begun, now.wall, end.clone());
        orders.extend(pair.unprotected.iter().filter(|s| !before.contains(s)).map(|s| partly(&job, s)));
        let (name, target) = (&job.domain.name, &job.target);
        match (end.result, &end.error) {
            (RunResult::Failed, error) => {
                self.failed_runs += 1;
                pair.failures += 1;
                let wait = retry::delay(job.policy.retry, end.error_kind, pair.failures, now.random);
                pair.retry_at = now.wall.checked_add(signed(wait)).ok();
                let why = error.as_deref().unwrap_or("it said nothing");
                let text =
                    format!("domain '{name}' has no new point on {target}: {why}; again in {} s", wait.as_secs());
                orders.push(Order::Say(Level::Error, About::job(&job), text));
            }
            _ => {
                let text =
                    format!("domain '{name}' is replicated to {target}, point {}", end.point.as_deref().unwrap_or("?"));
                orders.push(Order::Say(Level::Info, About::job(&job), text));
            }
        }
        let alarm = |a| Order::Say(Level::Error, About::job(&job), format!("domain '{name}': ALARM: {a}"));
        orders.extend(end.alarms.iter().chain(end.guest_stopped.iter().map(|g| &g.why)).map(alarm));
        orders.push(Order::Save);
        let failed = end.result == RunResult::Failed;
        let hooks = &job.policy.hooks;
        for (name, hook) in [("after_run", &hooks.after_run), ("on_failure", &hooks.on_failure)] {
            if let Some(hook) = hook.as_ref().filter(|_| failed || name == "after_run") {
                let mut env = hook_env(name, &job);
                env.push(("VIRT_REPLICA_OUTCOME".to_owned(), end.result.word().to_owned()));
                env.push(("VIRT_REPLICA_POINT".to_owned(), end.point.clone().unwrap_or_default()));
                env.push(("VIRT_REPLICA_ERROR".to_owned(), end.error.clone().unwrap_or_default()));
                let kind = end.error_kind.map(|k| serde_json::json!(k).as_str().unwrap_or_default().to_owned());
                env.push(("VIRT_REPLICA_ERROR_KIND".to_owned(), kind.unwrap_or_default()));
                orders.push(Order::Hook { hook: hook.clone(), env });
            }
        }
    }

    fn stop(&mut self, now: Now, orders: &mut Vec<Order>) {
        if self.stop_at.is_some() {
            return;
        }
        self.stop_at = Some(now.up + self.setup.stop_timeout);
        orders.push(Order::Say(
            Level::Info,
            About::default(),
            format!("stopping; runs under way: {}", self.runs.len()),
        ));
        for (number, run) in self.runs.iter_mut().filter(|(_, r)| r.phase == Phase::Working) {
            run.phase = Phase::Terminated;
            run.last_sign = now.up;
            orders.push(Order::Terminate(*number));
        }
        self.stop_checks(now, orders);
    }

    /// What follows from the time alone: breaches, runs that hang, runs that are due.
    fn look(&mut self, now: Now, orders: &mut Vec<Order>) {
        self.watch_breaches(now, orders);
        for (number, run) in &mut self.runs {
            run.watch(*number, &self.setup, self.stop_at, now, orders);
        }
        self.watch_checks(now, orders);
        match self.stop_at {
            Some(_) if self.runs.is_empty() && self.checking.is_empty() => orders.push(Order::Exit),
            Some(_) => {}
            None if self.listed && self.libvirt_error.is_none() => {
                self.begin_runs(now, orders);
                self.begin_check(now, orders);
                if self.once && self.is_idle(now.wall) {
                    orders.push(Order::Exit);
                }
            }
            None => {}
        }
    }

    fn watch_breaches(&mut self, now: Now, orders: &mut Vec<Order>) {
        for (key, pair) in &mut self.pairs {
            let assigned = self.assigned.get(key);
            let policy = assigned.map(|a| &self.setup.policies[a.policy]);
            // Before the first list nothing is known to be without a policy.
            if !self.listed || (policy.is_none() && pair.breach_since.is_none()) {
                continue;
            }
            let lives_on = policy.and_then(|p| lives_on(&self.handed, key, p));
            let promoted = self.promoted.contains_key(key);
            let rpo = policy.and_then(|p| p.rpo).filter(|_| lives_on.is_none() && !promoted);
            // What is seen as the future was seen by a clock that was ahead.
            pair.since = pair.since.min(now.wall);
            let deadline = rpo.map(|rpo| deadline(pair, rpo, now.wall));
            let since = pair.breach_since;
            let change = admission::breach(&mut pair.breach_since, deadline, now.wall);
            let (word, level) = match change {
                BreachChange::Unchanged => continue,
                BreachChange::Entered => {
                    pair.totals.breaches += 1;
                    ("entered", Level::Error)
                }
                BreachChange::Left => ("left", Level::Warn),
            };
            orders.push(Order::Save);
            let text = match (change, since) {
                (BreachChange::Left, _) if lives_on.is_some() => {
                    format!("it lives on {} now", lives_on.unwrap_or_default())
                }
                (BreachChange::Left, _) if promoted => "the domain was brought up here, and lives here now".to_owned(),
                (BreachChange::Left, _) if deadline.is_none() => "it has no RPO any more".to_owned(),
                (BreachChange::Left, Some(since)) => format!("the RPO is kept again; it was broken since {since:.0}"),
                _ => "the RPO is broken".to_owned(),
            };
            orders.push(Order::Say(
                level,
                About::pair(pair),
                format!("domain '{}' to {}: {text}", pair.domain, key.url),
            ));
            if let (Some(a), Some(policy)) = (assigned, policy)
                && let Some(hook) = &policy.hooks.on_breach
            {
                let job = StartRun { domain: a.domain.clone(), target: a.target.clone(), policy: policy.clone() };
                let mut env = hook_env("on_breach", &job);
                env.push(("VIRT_REPLICA_BREACH".to_owned(), word.to_owned()));
                orders.push(Order::Hook { hook: hook.clone(), env });
            }
        }
    }

    fn begin_runs(&mut self, now: Now, orders: &mut Vec<Order>) {
        let waiting = self.waiting(now.wall);
        let running = self.running(now);
        for miss in admission::foresee(&waiting, &running, &self.setup.caps, now.wall) {
            let has_rpo = self.assigned.get(&miss.key).is_some_and(|a| self.rpo(&miss.key, a).is_some());
            let late = miss.deadline > now.wall;
            if has_rpo && late && self.foreseen.insert(miss.key.clone(), miss.deadline) != Some(miss.deadline) {
                let name = &self.pairs[&miss.key].domain;
                let text = format!(
                    "domain '{name}' to {}: the RPO will be broken at {}; its next point is expected at {}",
                    miss.key.url, miss.deadline, miss.expected_end
                );
                orders.push(Order::Say(Level::Warn, About::pair(&self.pairs[&miss.key]), text));
            }
        }
        for key in admission::admit(&waiting, &running, &self.setup.caps) {
            let a = &self.assigned[&key];
            let job = StartRun {
                domain: a.domain.clone(),
                target: a.target.clone(),
                policy: self.setup.policies[a.policy].clone(),
            };
            let run = Run {
                expected: self.pairs[&key].expected(),
                key,
                job: job.clone(),
                begun: now.wall,
                begun_up: now.up,
                last_sign: now.up,
                step: 0,
                step_since: now.up,
                phase: Phase::Working,
            };
            self.runs.insert(self.next_run, run);
            orders.push(Order::Start { run: self.next_run, job: Box::new(job) });
            self.next_run += 1;
        }
    }

    /// Nothing is under way, and nothing is due.
    fn is_idle(&self, now: Timestamp) -> bool {
        let busy = !self.runs.is_empty() || !self.checking.is_empty();
        !busy && self.waiting(now).is_empty() && self.checks_due(now).next().is_none()
    }

    /// Runs that are due, and not under way.
    fn waiting(&self, now: Timestamp) -> Vec<Waiting<Key>> {
        let mut waiting = Vec::new();
        for (key, a) in &self.assigned {
            let pair = &self.pairs[key];
            let asked = self.asked.contains(key);
            let due = asked || (!self.is_paused(key) && matches!(self.due(key, now), Due::Now { .. }));
            if !due || self.runs.values().any(|r| r.key == *key) {
                continue;
            }
            let (schedule, rpo) = (&self.setup.schedules[a.policy], self.rpo(key, a));
            let deadline = schedule.deadline(shift(key), rpo, pair.as_of(now), &pair.past());
            waiting.push(Waiting {
                key: key.clone(),
                domain: key.uuid.to_string(),
                target: key.url.clone(),
                // Who is asked for goes before all that are only due.
                deadline: if asked { Timestamp::UNIX_EPOCH } else { deadline },
                expected: pair.expected(),
            });
        }
        waiting
    }

    fn running(&self, now: Now) -> Vec<Running> {
        let ends_at = |run: &Run| {
            let left = run.expected.saturating_sub(now.up.saturating_sub(run.begun_up));
            now.wall.checked_add(signed(left)).unwrap_or(Timestamp::MAX)
        };
        let runs = self.runs.values();
        runs.map(|r| Running { domain: r.key.uuid.to_string(), target: r.key.url.clone(), ends_at: ends_at(r) })
            .collect()
    }

    pub(super) fn is_paused(&self, key: &Key) -> bool {
        self.all_paused || self.paused.contains(&key.uuid)
    }

    pub(super) fn due(&self, key: &Key, now: Timestamp) -> Due {
        let a = &self.assigned[key];
        self.setup.schedules[a.policy].due(shift(key), &self.pairs[key].past(), now)
    }

    /// What is promised of it.
    fn rpo(&self, key: &Key, assigned: &Assigned) -> Option<Duration> {
        let policy = &self.setup.policies[assigned.policy];
        policy.rpo.filter(|_| lives_on(&self.handed, key, policy).is_none() && !self.promoted.contains_key(key))
    }

    /// How long nothing happens by itself.
    pub fn sleep(&self, now: Now) -> Duration {
        let mut sleep = SLEEP_MAX;
        let mut until = |t: Timestamp| {
            let left = Duration::try_from(t.duration_since(now.wall)).unwrap_or_default();
            sleep = sleep.min(left);
        };
        if self.stop_at.is_none() && self.libvirt_error.is_none() {
            for key in self.assigned.keys().filter(|k| !self.runs.values().any(|r| r.key == **k)) {
                if let (Due::At(at), false) = (self.due(key, now.wall), self.is_paused(key)) {
                    until(at);
                }
            }
        }
        for (key, a) in &self.assigned {
            let pair = &self.pairs[key];
            if let (Some(rpo), None) = (self.rpo(key, a), pair.breach_since) {
                until(deadline(pair, rpo, now.wall) + SignedDuration::from_millis(1));
            }
        }
        if self.stop_at.is_none() && self.checking.is_empty() {
            self.checks_ahead(now.wall).for_each(&mut until);
        }
        for at in self.checking.values().filter_map(|c| c.patience_ends(&self.setup, self.stop_at)) {
            sleep = sleep.min(at.saturating_sub(now.up));
        }
        for at in self.runs.values().filter_map(|r| r.patience_ends(&self.setup, self.stop_at)) {
            sleep = sleep.min(at.saturating_sub(now.up));
        }
        sleep
    }

    /// A person asks for runs of a domain now, to all its targets; `false`: no policy means it.
    pub fn run_now(&mut self, domain: &str) -> bool {
        let keys: Vec<Key> =
            self.assigned.iter().filter(|(_, a)| is_called(&a.domain, domain)).map(|(k, _)| k.clone()).collect();
        self.asked.extend(keys.iter().cloned());
        !keys.is_empty()
    }

    /// Holds runs of a domain back (of all, with `None`), or lets them begin again; `false`: no such domain.
    pub fn pause(&mut self, domain: Option<&str>, paused: bool) -> bool {
        let Some(domain) = domain else {
            self.all_paused = paused;
            if !paused {
                self.paused.clear();
            }
            return true;
        };
        let known = self.pairs.values().find(|p| p.domain.as_str() == domain || p.key.uuid.as_str() == domain);
        let Some(uuid) = known.map(|p| p.key.uuid.clone()) else { return false };
        match paused {
            true => self.paused.insert(uuid),
            false => self.paused.remove(&uuid),
        };
        true
    }

    /// What has to survive: pairs, paused domains, whether all are paused.
    pub fn memory(&self) -> (Vec<Pair>, BTreeSet<DomainUuid>, bool) {
        (self.pairs.values().cloned().collect(), self.paused.clone(), self.all_paused)
    }

    /// True from the moment the daemon was told to stop.
    pub fn stopping(&self) -> bool {
        self.stop_at.is_some()
    }
}

/// Where the domain of a pair lives, if it was handed over. A replica of a store of this host's is no domain of it.
pub(super) fn lives_on<'a>(handed: &'a BTreeMap<DomainUuid, String>, key: &Key, policy: &Policy) -> Option<&'a str> {
    handed.get(&key.uuid).filter(|_| policy.store.is_none()).map(String::as_str)
}

fn is_called(domain: &SeenDomain, name: &str) -> bool {
    domain.name.as_str() == name || domain.uuid.as_str() == name
}

pub(super) fn shift(key: &Key) -> Shift {
    Shift::of(key.uuid.as_str(), &key.url)
}

/// A disk that a run could not replicate: said when it is news.
fn partly(job: &StartRun, disk: &Skipped) -> Order {
    Order::Say(Level::Warn, About::job(job), format!("domain '{}': {}", job.domain.name, disk.told()))
}

/// The last moment at which the RPO is kept. Of a point whose every time lies in the future nobody knows the age: an
/// RPO that nothing shows to be kept is broken.
pub(super) fn deadline(pair: &Pair, rpo: Duration, now: Timestamp) -> Timestamp {
    let kept = |from: Timestamp| from.checked_add(signed(rpo)).unwrap_or(Timestamp::MAX);
    match (pair.frozen_at, pair.as_of(now)) {
        (Some(_), None) => pair.since.min(now - SignedDuration::from_millis(1)),
        (_, as_of) => kept(as_of.unwrap_or(pair.since)),
    }
}
