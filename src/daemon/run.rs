//! A run under way, as the engine sees it, and its watchdog. Pure.
//!
//! What is watched is progress, not duration: a first copy may take a day, but it says something every second.

use super::event::{About, Level, Now, Order, Setup, StartRun};
use super::pair::{Key, Pair};
use crate::hook::Env;
use jiff::Timestamp;
use std::time::Duration;

/// How long a run that was asked to end may say nothing before it is killed; an operator with less patience has less.
const TERM_GRACE: Duration = Duration::from_secs(120);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Working,
    /// It was asked to end; it showed no sign for too long, or the daemon stops.
    Terminated,
    Killed,
    Repairing,
}

/// A run under way.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) key: Key,
    pub(super) job: StartRun,
    pub(super) begun: Timestamp,
    pub(super) begun_up: Duration,
    pub(super) last_sign: Duration,
    pub(super) step: u8,
    pub(super) step_since: Duration,
    pub(super) phase: Phase,
    pub(super) expected: Duration,
}

impl Run {
    /// Adds the time since the step began to the pair's account.
    pub(super) fn count_step(&mut self, pair: Option<&mut Pair>, up: Duration) {
        let at = usize::from(self.step).wrapping_sub(1);
        if let Some(seconds) = pair.and_then(|p| p.totals.step_seconds.get_mut(at)) {
            *seconds += up.saturating_sub(self.step_since).as_secs_f64();
        }
        self.step_since = up;
    }

    /// When its silence has lasted too long, by the clock that nobody sets.
    pub(super) fn patience_ends(&self, setup: &Setup, stop_at: Option<Duration>) -> Option<Duration> {
        // A commit may take `ready_timeout` and says nothing meanwhile; so may what follows the point, and what an
        // earlier run left behind.
        let commit = if matches!(self.step, 2..=6) { Duration::ZERO } else { self.job.policy.ready_timeout };
        match (self.phase, stop_at) {
            (Phase::Working, _) => Some(self.last_sign + setup.stall_timeout + commit),
            (Phase::Terminated, Some(stop_at)) => Some(stop_at),
            (Phase::Terminated, None) => Some(
                self.last_sign
                    + TERM_GRACE.min(setup.stall_timeout)
                    + if self.step == 7 { commit } else { Duration::ZERO },
            ),
            (Phase::Repairing, Some(stop_at)) => Some(stop_at),
            (Phase::Repairing, None) => Some(self.last_sign + self.job.policy.ready_timeout + setup.stall_timeout),
            (Phase::Killed, _) => None,
        }
    }

    /// Ends a run that hangs: first it is asked to, then it is killed.
    pub(super) fn watch(
        &mut self,
        number: u64,
        setup: &Setup,
        stop_at: Option<Duration>,
        now: Now,
        orders: &mut Vec<Order>,
    ) {
        let Some(at) = self.patience_ends(setup, stop_at) else { return };
        if now.up < at {
            return;
        }
        let name = &self.job.domain.name;
        let silent = now.up.saturating_sub(self.last_sign).as_secs();
        match self.phase {
            Phase::Working => {
                let text =
                    format!("domain '{name}': no sign of life for {silent} s in step {}: the run is ended", self.step);
                orders.push(Order::Say(Level::Error, About::job(&self.job), text));
                orders.push(Order::Terminate(number));
                (self.phase, self.last_sign) = (Phase::Terminated, now.up);
            }
            Phase::Terminated | Phase::Repairing => {
                orders.push(Order::Say(
                    Level::Error,
                    About::job(&self.job),
                    format!("domain '{name}': it does not end and is killed"),
                ));
                orders.push(Order::Kill(number));
                // A repair that is killed is over; the next run settles what it left.
                self.phase = if self.phase == Phase::Repairing { Phase::Repairing } else { Phase::Killed };
                self.last_sign = now.up;
            }
            Phase::Killed => {}
        }
    }
}

/// What every hook is told.
pub(super) fn hook_env(event: &str, job: &StartRun) -> Env {
    let env = [
        ("EVENT", event),
        ("DOMAIN", job.domain.name.as_str()),
        ("UUID", job.domain.uuid.as_str()),
        ("TARGET", &job.target),
        ("POLICY", &job.policy.name),
    ];
    env.map(|(name, value)| (format!("VIRT_REPLICA_{name}"), value.to_owned())).into()
}
