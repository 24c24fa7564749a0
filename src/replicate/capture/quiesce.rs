//! Holding the guest's file systems for the moment in which its disks are frozen, so that a point is what a clean
//! unmount leaves and not what a power cut does.
//!
//! Invariants
//! - The guest is never held (I2): before it is asked to hold anything, the journal says durably that it may have to be
//!   asked to let go, and the dead-man is armed. Whoever comes next asks: the run itself, the dead-man, the next run,
//!   `doctor`.
//! - A guest agent that does not answer costs the run some seconds and the point its name, never the point.
//! - A point is called consistent only if the guest agent said *after* the disks were frozen that it still held.
//!
//! Steps 4c.held and 4d.thawed of docs/replication.md.

use crate::error::{Error, Kind, Result, advice};
use crate::failpoint;
use crate::hypervisor::guest::GuestAgent;
use crate::hypervisor::{DomainView, Hypervisor, Power};
use crate::name::DomainUuid;
use crate::replica::{Consistency, PointView};
use crate::replicate::settle::account::Account;
use crate::replicate::settle::guard::PauseGuard;
use crate::replicate::state::journal::Journal;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// How long libvirt may take, beside the time it was given, to find out that nobody answers.
const SILENCE: Duration = Duration::from_secs(6);

/// How long a guest agent may take to say how it stands, and to let go.
const WORD_WITHIN: Duration = Duration::from_secs(2);
const THAW_WITHIN: Duration = Duration::from_secs(3);

/// Whether the guest agent is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quiesce {
    /// The guest agent is not asked. A point of a running domain has `crash` consistency.
    #[default]
    No,
    /// Where it cannot be had, the point is as after a power cut, and says why.
    Try,
    /// Where it cannot be had there is no point.
    Require,
}

impl std::str::FromStr for Quiesce {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "no" => Ok(Quiesce::No),
            "try" => Ok(Quiesce::Try),
            "require" => Ok(Quiesce::Require),
            _ => Err(format!("'{text}' is none of: no, try, require")),
        }
    }
}

/// When and for how long the guest agent holds the guest's file systems.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuiesceOptions {
    /// Whether the guest agent is asked, in runs that `every` selects. The default is `No`.
    pub wish: Quiesce,
    /// Only if none of the newest points, one less than this many, is consistent; 1: in every run.
    pub every: u32,
    /// Longest time that the guest's file systems may be held, from the question to the word that they were let go; the
    /// dead-man sees to it. At least 1 s.
    pub budget: Duration,
}

impl Default for QuiesceOptions {
    fn default() -> Self {
        Self { wish: Quiesce::No, every: 1, budget: Duration::from_secs(10) }
    }
}

impl QuiesceOptions {
    /// What is wished of the run after these points, oldest first.
    pub fn after(&self, points: &[PointView]) -> Quiesce {
        let rest = (self.every.max(1) - 1) as usize;
        let held = |p: &PointView| p.consistency == Consistency::FileSystem;
        if points.iter().rev().take(rest).any(held) { Quiesce::No } else { self.wish }
    }
}

/// Who holds and lets go.
pub struct Quiescer<'a> {
    /// The guest agent of the domain, reached through libvirt.
    pub agent: &'a dyn GuestAgent,
    /// Journal of the domain. It records that the guest is owed a thaw before the agent is asked.
    pub journal: &'a Journal,
    /// UUID of the domain whose guest agent is asked.
    pub uuid: &'a DomainUuid,
    /// What is wished of this run.
    pub wish: Quiesce,
    /// As [`QuiesceOptions::budget`].
    pub budget: Duration,
    /// Why it cannot be done, as far as that was seen before.
    pub can: std::result::Result<(), &'static str>,
}

/// Why the guest agent of a domain cannot hold anything, by what libvirt says of it.
pub fn can_hold(domain: &DomainView) -> std::result::Result<(), &'static str> {
    match (domain.power, domain.guest_agent) {
        (Power::Running, true) => Ok(()),
        (Power::Running, false) => Err("no guest agent is connected"),
        (Power::Paused, _) => Err("the domain is paused, and its guest agent with it"),
        (Power::Off, _) => Err("the domain is shut off"),
    }
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Held {
    /// Since when; `None` if nothing is held.
    since: Option<Instant>,
    /// Why a point is not consistent although that was asked for.
    pub why_not: Option<String>,
}

impl Held {
    fn not(why: impl Into<String>) -> Held {
        Held { since: None, why_not: Some(why.into()) }
    }
}

/// How the freeze went for the guest's file systems.
#[derive(Debug, PartialEq)]
pub struct Thawed {
    /// `FileSystem` if the guest agent confirmed after the freeze that it still held; otherwise `Crash`.
    pub consistency: Consistency,
    /// Why the point has only `crash` consistency. `None`: it is consistent, or quiescing was not asked for.
    pub why_not: Option<String>,
    /// How long they were held, at most.
    pub held: Option<Duration>,
}

impl Quiescer<'_> {
    /// Whether anything will be asked.
    pub fn will_ask(&self) -> bool {
        self.wish != Quiesce::No && self.can.is_ok()
    }

    /// Has the file systems held, if that is wished. Who holds something has armed the guard by then.
    pub fn hold(&self, guard: &mut dyn PauseGuard) -> Result<Held> {
        let held = match (self.wish, self.can) {
            (Quiesce::No, _) => return Ok(Held::default()),
            (_, Err(why)) => Held::not(why),
            (_, Ok(())) => self.ask(guard)?,
        };
        match (&held.why_not, self.wish) {
            (Some(why), Quiesce::Require) => {
                Err(Error::new(Kind::Refused, format!("the guest's file systems could not be held: {why}"))
                    .domain(self.uuid)
                    .advise(advice::Run::WithoutGuestAgent))
            }
            _ => Ok(held),
        }
    }

    fn ask(&self, guard: &mut dyn PauseGuard) -> Result<Held> {
        let budget = self.budget;
        // Nothing is held while libvirt waits for a sign of life; the budget counts from the answer.
        guard.arm(budget + SILENCE)?;
        self.journal.owe_thaw()?;
        let asked = Instant::now();
        let held = match self.agent.hold_file_systems(self.uuid, budget / 2) {
            Ok(0) => Held::not("the guest agent has no file system to hold"),
            Ok(_) => {
                guard.arm(budget.saturating_sub(asked.elapsed()).max(Duration::from_secs(1)))?;
                failpoint!("4c.held");
                return Ok(Held { since: Some(asked), why_not: None });
            }
            Err(e) => Held::not(e.chain()),
        };
        // Also after a no: of several file systems some may have been held, and a command may be on its way yet.
        guard.arm(budget + THAW_WITHIN + SILENCE)?;
        self.thaw();
        guard.arm(budget)?;
        Ok(held)
    }

    /// Lets the file systems go, whatever became of the freeze, and says what the point is.
    pub fn release(&self, held: Held) -> Thawed {
        let Some(since) = held.since else {
            return Thawed { consistency: Consistency::Crash, why_not: held.why_not, held: None };
        };
        let word = self.agent.are_file_systems_held(self.uuid, WORD_WITHIN);
        let thawed = self.thaw();
        let held = Some(since.elapsed());
        let why_not = match word {
            Ok(true) => None,
            Ok(false) => Some("the guest had let its file systems go before the disks were frozen".to_owned()),
            Err(e) => Some(format!("the guest agent does not say whether it still held: {}", e.chain())),
        };
        if !thawed {
            tracing::error!(domain = %self.uuid, "the guest agent does not let the guest's file systems go");
        }
        match why_not {
            None => Thawed { consistency: Consistency::FileSystem, why_not: None, held },
            why_not => Thawed { consistency: Consistency::Crash, why_not, held },
        }
    }

    /// After a freeze that failed: the guest must not be held for it. What is left is said, and asked for again by
    /// whoever comes next.
    pub fn settle(&self, hypervisor: &dyn Hypervisor) {
        match settle(hypervisor, self.agent, self.journal, self.uuid) {
            Ok(Settled::Nothing | Settled::LetGo) => {}
            Ok(Settled::Silent(alarm)) => tracing::error!(domain = %self.uuid, "{alarm}"),
            Err(e) => tracing::error!(domain = %self.uuid, "after the failed freeze: {}", e.chain()),
        }
    }

    /// Whether the guest agent has said that it lets go.
    fn thaw(&self) -> bool {
        thaw(self.agent, self.journal, self.uuid).is_ok()
    }
}

fn thaw(agent: &dyn GuestAgent, journal: &Journal, uuid: &DomainUuid) -> Result<u64> {
    let thawed = agent.thaw_file_systems(uuid, THAW_WITHIN)?;
    journal.thaw_is_paid()?;
    Ok(thawed)
}

/// Whether the domain has a QEMU, without which its guest holds nothing.
fn may_hold(hypervisor: &dyn Hypervisor, uuid: &DomainUuid) -> Result<bool> {
    match hypervisor.observe(uuid) {
        Ok(domain) => Ok(domain.power != Power::Off),
        Err(e) if e.kind() == Kind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// What became of what a run may have left held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settled {
    /// No thaw was owed, or the domain has no QEMU any more.
    Nothing,
    /// The guest agent has said that it let go.
    LetGo,
    /// It does not answer: what an operator has to know.
    Silent(String),
}

impl Settled {
    /// Takes down what was done, or has to be known.
    pub fn note(self, account: &mut Account) {
        match self {
            Settled::Nothing => {}
            Settled::LetGo => account.steps.push("the guest agent has let the guest's file systems go".to_owned()),
            Settled::Silent(alarm) => account.alarms.push(alarm),
        }
    }
}

/// Lets go of what a run may have left held; libvirt is asked only if there may be something. Repeating it is harmless.
pub fn settle(
    hypervisor: &dyn Hypervisor,
    agent: &dyn GuestAgent,
    journal: &Journal,
    uuid: &DomainUuid,
) -> Result<Settled> {
    match journal.is_thaw_owed()? {
        true => settle_owed(agent, journal, uuid, may_hold(hypervisor, uuid)?),
        false => Ok(Settled::Nothing),
    }
}

/// `runs`: the domain has a QEMU; without one nothing is held.
fn settle_owed(agent: &dyn GuestAgent, journal: &Journal, uuid: &DomainUuid, runs: bool) -> Result<Settled> {
    if !runs {
        journal.thaw_is_paid()?;
        return Ok(Settled::Nothing);
    }
    match thaw(agent, journal, uuid) {
        Ok(_) => Ok(Settled::LetGo),
        Err(e) => Ok(Settled::Silent(format!(
            "the guest agent was asked to hold the guest's file systems and does not answer any more ({}): if the guest hangs, restart the guest agent in it, or the guest; each run, and a repair, asks it again to let go",
            e.chain()
        ))),
    }
}

#[cfg(test)]
#[path = "quiesce_tests.rs"]
mod tests;
