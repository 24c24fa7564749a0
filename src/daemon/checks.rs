//! Checks beside the runs: the head read again on the target, or all points; on a target, the head booted. The engine's
//! part for them. Pure.
//!
//! A check takes no lock of the domain's and holds no run up; the target's disks bear it, so there is one at a time.

use super::engine::{Engine, signed};
use super::event::{About, Event, Level, Now, Order, StartRun};
use super::pair::Key;
use super::run::hook_env;
use crate::daemon::check::Check;
use crate::daemon::checking::Checking;
use crate::error::Kind;
use crate::policy::retry;
use crate::policy::schedule::{Due, Past, Shift};
use jiff::Timestamp;

/// Checks of a pair are spread, and not at the moment of its runs.
fn shift(key: &Key, check: Check) -> Shift {
    Shift::of(key.uuid.as_str(), &format!("{} {}", check.word(), key.url))
}

impl Engine {
    /// Checks of pairs that have a point, with when they are due; none of what is paused.
    fn all_checks(&self, now: Timestamp) -> impl Iterator<Item = (&Key, Check, Due)> {
        let pairs = self.assigned.iter().filter(|(key, _)| !self.is_paused(key));
        pairs.flat_map(move |(key, a)| {
            let pair = &self.pairs[key];
            self.setup.checks[a.policy].iter().filter_map(move |(check, schedule)| {
                pair.frozen_at?;
                let state = pair.checks.get(check);
                let past = Past {
                    since: pair.since,
                    begun: state.and_then(|s| s.begun),
                    retry_at: state.and_then(|s| s.retry_at),
                };
                Some((key, *check, schedule.due(shift(key, *check), &past, now)))
            })
        })
    }

    pub(super) fn checks_due(&self, now: Timestamp) -> impl Iterator<Item = (&Key, Check, Timestamp)> {
        self.all_checks(now).filter_map(|(key, check, due)| match due {
            Due::Now { since } => Some((key, check, since)),
            Due::At(_) => None,
        })
    }

    pub(super) fn checks_ahead(&self, now: Timestamp) -> impl Iterator<Item = Timestamp> {
        self.all_checks(now).filter_map(|(_, _, due)| match due {
            Due::Now { .. } => None,
            Due::At(at) => Some(at),
        })
    }

    /// The one that has been owed longest.
    pub(super) fn begin_check(&mut self, now: Now, orders: &mut Vec<Order>) {
        if !self.checking.is_empty() {
            return;
        }
        let first = self.checks_due(now.wall).min_by_key(|(key, check, since)| (*since, (*key).clone(), *check));
        let Some((key, check, _)) = first else { return };
        let (key, a) = (key.clone(), &self.assigned[key]);
        let job = StartRun {
            domain: a.domain.clone(),
            target: a.target.clone(),
            policy: self.setup.policies[a.policy].clone(),
        };
        let run = self.next_run;
        self.next_run += 1;
        let checking = Checking { key, check, job: job.clone(), begun: now.wall, last_sign: now.up, terminated: false };
        self.checking.insert(run, checking);
        orders.push(Order::Check { run, check, job: Box::new(job) });
    }

    pub(super) fn checked(
        &mut self,
        run: u64,
        error: Option<(Option<Kind>, String)>,
        now: Now,
        orders: &mut Vec<Order>,
    ) {
        let Some(done) = self.checking.remove(&run) else { return };
        let Some(pair) = self.pairs.get_mut(&done.key) else { return };
        let (name, target, word) = (&done.job.domain.name, &done.job.target, done.check.word());
        let state = pair.checks.entry(done.check).or_default();
        let stopped = done.terminated && self.stop_at.is_some();
        let Some((kind, why)) = error.filter(|_| !stopped) else {
            if !stopped {
                (state.begun, state.whole_at) = (Some(done.begun), Some(now.wall));
                (state.error, state.retry_at, state.failures) = (None, None, 0);
                state.passed += 1;
                orders.push(Order::Say(
                    Level::Info,
                    About::job(&done.job),
                    format!("domain '{name}': {word} on {target} found everything right"),
                ));
                orders.push(Order::Save);
            }
            return;
        };
        // A verdict is a verdict: what is damaged now is not read again at once. Where there is none, it is tried
        // again.
        let is_verdict = match (done.check, kind) {
            (_, Some(Kind::Corrupt)) => true,
            // The copy was booted, and did not show what it was to show.
            (Check::Drill, kind) => kind == Some(Kind::Refused),
            _ => false,
        };
        state.failed += 1;
        state.failures += 1;
        state.error = Some(why.clone());
        if is_verdict {
            (state.begun, state.retry_at) = (Some(done.begun), None);
        } else {
            let wait = retry::delay(done.job.policy.retry, kind, state.failures, now.random);
            state.retry_at = now.wall.checked_add(signed(wait)).ok();
        }
        let (level, what) = match (is_verdict, done.check) {
            (true, Check::Drill) => (Level::Error, "ALARM: found no proof that it works"),
            (true, _) => (Level::Error, "ALARM: found damage"),
            (false, _) => (Level::Warn, "did not come to an end"),
        };
        orders.push(Order::Say(
            level,
            About::job(&done.job),
            format!("domain '{name}': {word} on {target} {what}: {why}"),
        ));
        if let Some(hook) = &done.job.policy.hooks.on_failure {
            let mut env = hook_env("on_failure", &done.job);
            let kind = kind.map(|k| serde_json::json!(k).as_str().unwrap_or_default().to_owned());
            for (name, value) in [("CHECK", word.to_owned()), ("ERROR", why), ("ERROR_KIND", kind.unwrap_or_default())]
            {
                env.push((format!("VIRT_REPLICA_{name}"), value));
            }
            orders.push(Order::Hook { hook: hook.clone(), env });
        }
        orders.push(Order::Save);
    }

    pub(super) fn stop_checks(&mut self, now: Now, orders: &mut Vec<Order>) {
        for (run, checking) in &mut self.checking {
            (checking.terminated, checking.last_sign) = (true, now.up);
            orders.push(Order::Terminate(*run));
        }
    }

    /// Ends a check that hangs.
    pub(super) fn watch_checks(&mut self, now: Now, orders: &mut Vec<Order>) {
        for (run, checking) in &mut self.checking {
            if checking.patience_ends(&self.setup, self.stop_at).is_none_or(|at| now.up < at) {
                continue;
            }
            let (name, word) = (&checking.job.domain.name, checking.check.word());
            let (order, what) = match checking.terminated {
                false => (Order::Terminate(*run), "shows no sign of life and is ended"),
                true => (Order::Kill(*run), "does not end and is killed"),
            };
            orders.push(Order::Say(Level::Error, About::job(&checking.job), format!("domain '{name}': {word} {what}")));
            orders.push(order);
            (checking.terminated, checking.last_sign) = (true, now.up);
        }
    }
}

/// How a check that could not be begun ends.
pub fn not_begun(run: u64, kind: Kind, why: String) -> Event {
    Event::Checked { run, error: Some((Some(kind), why)) }
}
