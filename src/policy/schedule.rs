//! When a domain is due. Pure: `now`, the time zone and what happened are arguments, moments come out.
//!
//! `every` is a grid that hangs on the epoch, not on the last run: after downtime, a late run or a restart the slots
//! are where they always were. Each (domain, target) has a constant shift within the jitter, so that thirty domains of
//! one policy do not begin at the same second. `cron` is the wall clock's, in the policy's time zone: a time that a
//! clock set forward leaves out is made up for at once, a time that a clock set back repeats is run once. Slots that
//! were missed are one run, not many.

use super::window::{Window, open_at};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use std::time::Duration;

/// When runs begin.
#[derive(Debug, Clone)]
pub enum When {
    /// Whole seconds, at least one.
    Every(Duration),
    /// At the times of this pattern, by the wall clock of the schedule's zone.
    Cron(Box<croner::Cron>),
    /// By somebody else.
    Never,
}

/// When the runs of a policy begin, and when none may.
#[derive(Debug, Clone)]
pub struct Schedule {
    /// Grid or pattern of the slots.
    pub when: When,
    /// Slots of one pair are later than the grid by a constant below this; whole seconds.
    pub jitter: Duration,
    /// Windows in which no run begins. A slot in such a window waits for its end.
    pub blackout: Vec<Window>,
    /// Time zone of the pattern and of `blackout`.
    pub zone: TimeZone,
}

/// The constant by which a domain's runs to a target are shifted. A hash, so that it is the same after every restart
/// and upgrade.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shift(u64);

impl Shift {
    /// Shift of the domain with this UUID on this target.
    pub fn of(uuid: &str, target: &str) -> Shift {
        let hash = blake3::hash(format!("{uuid}\0{target}").as_bytes());
        Shift(u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes")))
    }

    fn within(self, jitter: Duration) -> i64 {
        match jitter.as_secs() {
            0 => 0,
            s => (self.0 % s) as i64,
        }
    }
}

/// What has happened to a (domain, target) so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Past {
    /// When this host began to look after it.
    pub since: Timestamp,
    /// Begin of the newest run that made a point.
    pub begun: Option<Timestamp>,
    /// Not before this, after a failure.
    pub retry_at: Option<Timestamp>,
}

/// Whether a run is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Since this slot, however many others have passed since.
    Now {
        /// When the run became due.
        since: Timestamp,
    },
    /// The run becomes due at this time. `Timestamp::MAX`: never.
    At(Timestamp),
}

impl Schedule {
    /// The first slot after `t`. A pattern without one is refused where policies are read, so there is always one
    /// within the calendar; at its very end the answer is the end.
    pub fn slot_after(&self, shift: Shift, t: Timestamp) -> Timestamp {
        let shift = shift.within(self.jitter);
        match &self.when {
            When::Never => Timestamp::MAX,
            When::Every(every) => {
                let every = every.as_secs().max(1) as i64;
                let slot = (t.as_second() - shift).div_euclid(every).saturating_add(1).saturating_mul(every);
                Timestamp::from_second(slot.saturating_add(shift)).unwrap_or(Timestamp::MAX)
            }
            When::Cron(cron) => {
                let back = SignedDuration::from_secs(shift);
                let from = t.checked_sub(back).unwrap_or(Timestamp::MIN).to_zoned(self.zone.clone());
                let next = cron.find_next_occurrence(&from, false).map(|z| z.timestamp());
                next.ok().and_then(|n| n.checked_add(back).ok()).unwrap_or(Timestamp::MAX)
            }
        }
    }

    /// The first moment from `t` on at which a run may begin.
    pub fn open_at(&self, t: Timestamp) -> Timestamp {
        // What never comes is held up by nothing.
        if t == Timestamp::MAX {
            return t;
        }
        // A policy whose week has no gap is refused where it is read.
        open_at(&self.blackout, &self.zone, t).unwrap_or(Timestamp::MAX)
    }

    /// The slot that is owed: the first after the newest run that made a point. Before the first run of all, `every`
    /// owes one at once, and `cron` when its time comes: whoever writes nights does not mean the first copy to run at
    /// noon.
    fn owed(&self, shift: Shift, past: &Past, now: Timestamp) -> Timestamp {
        // A clock that was set back must not make the past a future to wait for.
        match (past.begun.map(|b| b.min(now)), &self.when) {
            (_, When::Never) => Timestamp::MAX,
            (Some(begun), _) => self.slot_after(shift, begun),
            (None, When::Every(_)) => past.since.min(now),
            (None, When::Cron(_)) => self.slot_after(shift, past.since.min(now)),
        }
    }

    /// Whether a run is due, or when it will be.
    pub fn due(&self, shift: Shift, past: &Past, now: Timestamp) -> Due {
        let since = self.owed(shift, past, now);
        let ready = past.retry_at.map_or(since, |r| r.max(since));
        match self.open_at(ready.max(now)) {
            at if ready <= now && at <= now => Due::Now { since },
            at => Due::At(at),
        }
    }

    /// The next `count` runs from `now` on, if each is done at once and succeeds.
    pub fn next(&self, shift: Shift, past: &Past, now: Timestamp, count: usize) -> Vec<Timestamp> {
        let first = match self.due(shift, past, now) {
            Due::Now { .. } => now,
            Due::At(at) => at,
        };
        let later = |at: &Timestamp| Some(self.open_at(self.slot_after(shift, *at)));
        std::iter::successors(Some(first), later).take_while(|at| *at < Timestamp::MAX).take(count).collect()
    }

    /// Until when a run has to be done: the RPO counts from the head's `frozen_at`, and before there is a head from the
    /// moment this host began to look after it. Without an RPO a run counts as owed before its next one is.
    pub fn deadline(
        &self,
        shift: Shift,
        rpo: Option<Duration>,
        frozen_at: Option<Timestamp>,
        past: &Past,
    ) -> Timestamp {
        match rpo {
            Some(rpo) => {
                let rpo = SignedDuration::from_secs(rpo.as_secs() as i64);
                frozen_at.unwrap_or(past.since).checked_add(rpo).unwrap_or(Timestamp::MAX)
            }
            None => self.slot_after(shift, self.slot_after(shift, past.begun.unwrap_or(past.since))),
        }
    }
}
