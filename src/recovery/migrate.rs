//! A migration, at the source: runs while the guest works (precopy) until what is left is so little that the guest may
//! go down for it; then a planned failover (cutover).
//!
//! Invariants
//! - Until the cutover a migration is runs, and nothing else: whatever ends it leaves the domain as after any run.
//! - The cutover is [`handover`]'s, with all that holds there. One that was begun is gone on with, whatever the
//!   forecast.
//!
//! [`forecast`](forecast::forecast) and [`decide`] are pure.

mod forecast;

pub use forecast::{Forecast, Ran, forecast};

use super::bringup::refuse_red;
use super::handover::{self, HandoverState, Stage};
use crate::error::{Error, Kind, Result, advice};
use crate::hypervisor::Power;
use crate::name::Generation;
use jiff::Timestamp;
use serde::Serialize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Between two rounds, where the forecast is good and the time to cut over has not come.
const IDLE: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// When is cut over, and when is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest downtime that is acceptable. A forecast within it starts the cutover, or, with `at`, waits for that
    /// time.
    pub downtime_max: Duration,
    /// Not before this time, and then whatever the forecast.
    pub at: Option<Timestamp>,
    /// Give up after this many rounds, unless `at` is set.
    pub rounds_max: u32,
    /// After one round, whatever the forecast.
    pub now: bool,
}

/// What follows from a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// Run another round at once.
    GoOn,
    /// There is time: what is left is little enough, or the time to cut over has not come.
    Wait,
    /// Shut the guest down and hand the domain over, for this reason.
    CutOver(Why),
    /// The guest writes as fast as the link carries: rounds do not get shorter.
    Diverges,
    /// Give up: `rounds_max` rounds were run and the forecast is still too long.
    TooManyRounds,
}

/// Reason for a cutover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// The forecast downtime is within `downtime_max`.
    Forecast,
    /// The time that `at` names has come.
    Time,
    /// A key, a signal, or `--now`.
    Asked,
}

/// Pure. `forecasts`: of each round so far that had one, `rounds`: how many there were, `asked`: a person wants it now.
pub fn decide(rounds: usize, forecasts: &[Forecast], limits: &Limits, now: Timestamp, asked: bool) -> Decision {
    if asked || limits.now {
        return Decision::CutOver(Why::Asked);
    }
    let last = forecasts.last();
    let small = last.is_some_and(|f| f.downtime_ms <= limits.downtime_max.as_secs_f64() * 1e3);
    match limits.at {
        Some(at) if now >= at => return Decision::CutOver(Why::Time),
        Some(_) if small => return Decision::Wait,
        // The time is given: it comes, however much is left.
        Some(_) => return Decision::GoOn,
        None if small => return Decision::CutOver(Why::Forecast),
        None => {}
    }
    if let [.., before, last] = forecasts
        && last.link_rate_bytes.is_some_and(|link| last.dirty_rate_bytes >= link)
        && last.left_bytes as f64 >= 0.9 * before.left_bytes as f64
    {
        return Decision::Diverges;
    }
    if rounds >= limits.rounds_max as usize {
        return Decision::TooManyRounds;
    }
    Decision::GoOn
}

/// A round, as it is told.
#[derive(Debug, Clone, Serialize)]
pub struct Round {
    /// Number of the round, from 1.
    pub round: usize,
    /// Bytes that the round sent to the target.
    pub bytes_sent: u64,
    /// Milliseconds that the round took.
    pub duration_ms: f64,
    /// Absent as long as nobody can tell.
    pub forecast: Option<Forecast>,
    /// What the migration does after this round.
    pub decision: Decision,
}

/// Who sees it, and may want it to end.
pub struct Ui<'a> {
    /// Called after each round with its figures.
    pub told: &'a dyn Fn(&Round),
    /// A key, or SIGUSR1: cut over now.
    pub cut: &'a AtomicBool,
}

/// What a migration needs of the world.
pub struct Ports<'a> {
    /// Ports of the cutover. The precopy uses its clock, its sleep and its stop signal too.
    pub handover: &'a handover::Ports<'a>,
    /// One run while the guest works.
    pub round: &'a dyn Fn() -> Result<Ran>,
    /// Receives the figures of each round and says whether a person wants the cutover now.
    pub ui: &'a Ui<'a>,
}

/// What to migrate, and when to cut over.
#[derive(Debug, Clone)]
pub struct Request {
    /// Order for the cutover: domain, target, timeout of the shutdown, and whether to commit there.
    pub handover: handover::Request,
    /// When the migration cuts over and when it gives up.
    pub limits: Limits,
}

/// Result of a migration: the report of its handover, with the rounds before it.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Report of the cutover. In JSON its fields stand at the top level.
    #[serde(flatten)]
    pub handover: handover::Report,
    /// Rounds of the precopy, oldest first. Empty if the command went on with a cutover that had begun earlier.
    pub rounds: Vec<Round>,
    /// From the request to shut down to the start there, as it was forecast after the last round; absent where it was
    /// not.
    pub forecast_ms: Option<f64>,
    /// The same, as it was; absent if the domain did not run.
    pub measured_ms: Option<f64>,
    /// Since it was committed; absent if that can still be undone.
    pub generation: Option<Generation>,
}

/// Migrates, or goes on where an earlier attempt was left in its cutover. Blocks for as long as it takes.
pub fn run(ports: &Ports, state: &HandoverState, request: &Request) -> Result<Report> {
    let rounds = match state.record()? {
        // It lives there already, and not by a migration: whether that is to stay is for a person to say.
        Some(record) if record.stage == Stage::Moved && !record.commit => {
            let power = ports.handover.machines.power(&record.uuid)?;
            return Err(record.refusal(power.unwrap_or(Power::Off)));
        }
        Some(_) => Vec::new(),
        None => precopy(ports, state, request)?,
    };
    (ports.handover.say)("cutting over");
    let handover = handover::over(ports.handover, state, &request.handover)?;
    let mut report = Report {
        measured_ms: handover.downtime_ms.zip(handover.shutdown_ms).map(|(down, shutdown)| down + shutdown),
        forecast_ms: rounds.last().and_then(|r| r.forecast).map(|f| f.downtime_ms),
        handover,
        rounds,
        generation: None,
    };
    if request.handover.commit {
        (ports.handover.say)("committing it there");
        match (ports.handover.there)().and_then(|there| there.commit(ports.handover.say)) {
            Ok(generation) => report.generation = Some(generation),
            // It runs there, and its source is refused: nothing is at stake but the way back.
            Err(e) => report.handover.warnings.push(format!(
                "it was not committed there, and can still be undone: {}; commit the failover on the target",
                e.chain()
            )),
        }
    }
    Ok(report)
}

fn precopy(ports: &Ports, state: &HandoverState, request: &Request) -> Result<Vec<Round>> {
    let learned = state.learned();
    let (mut all, mut forecasts, mut told) = (Vec::new(), Vec::new(), Vec::new());
    if (ports.handover.head)()?.is_some() {
        can_be_brought_up(ports, request)?;
    }
    loop {
        let off = !matches!(ports.handover.machines.power(&request.handover.uuid)?, Some(p) if p != Power::Off);
        all.push((ports.round)()?);
        let ran = all.last().expect("it was pushed just now");
        if all.len() == 1 {
            can_be_brought_up(ports, request)?;
        }
        let forecast = forecast::forecast(&all, &learned).filter(|_| !off);
        forecasts.extend(forecast);
        // Of a domain that is off there is nothing to wait for.
        let asked = ports.ui.cut.load(Ordering::Relaxed) || off;
        let decision = decide(all.len(), &forecasts, &request.limits, (ports.handover.clock)(), asked);
        let round = Round {
            round: all.len(),
            bytes_sent: ran.bytes_sent,
            duration_ms: forecast::rounded(ran.took.as_secs_f64()),
            forecast,
            decision,
        };
        (ports.ui.told)(&round);
        told.push(round);
        match decision {
            Decision::CutOver(_) => return Ok(told),
            Decision::GoOn => stopped(ports)?,
            Decision::Wait => wait(ports, &request.limits)?,
            Decision::Diverges | Decision::TooManyRounds => return Err(does_not_converge(&told)),
        }
    }
}

fn stopped(ports: &Ports) -> Result<()> {
    match ports.handover.stop.load(Ordering::Relaxed) {
        true => Err(Error::new(Kind::Interrupted, "the migration was stopped; the domain runs here as before")),
        false => Ok(()),
    }
}

/// Until somebody wants it, its time has come, or it is worth another round.
fn wait(ports: &Ports, limits: &Limits) -> Result<()> {
    let mut waited = Duration::ZERO;
    while waited < IDLE {
        stopped(ports)?;
        let due = limits.at.is_some_and(|at| (ports.handover.clock)() >= at);
        if due || ports.ui.cut.load(Ordering::Relaxed) {
            return Ok(());
        }
        (ports.handover.sleep)(LOOK_EVERY);
        waited += LOOK_EVERY;
    }
    Ok(())
}

fn can_be_brought_up(ports: &Ports, request: &Request) -> Result<()> {
    refuse_red(&(ports.handover.there)()?.ready(None)?.findings, &request.handover.to)
}

fn does_not_converge(rounds: &[Round]) -> Error {
    let count = rounds.len();
    let figures = rounds.last().and_then(|r| r.forecast).map_or(String::new(), |f| {
        let link = f.link_rate_bytes.map_or("an unknown rate".to_owned(), |rate| format!("{} KiB/s", rate >> 10));
        format!(
            ": the guest's writes need {} KiB/s of a link that carries {link}, and it would be down for {:.0} s ({})",
            f.dirty_rate_bytes >> 10,
            f.downtime_ms / 1e3,
            f.terms()
        )
    });
    let what = format!("the migration does not converge after {count} rounds{figures}; the domain runs here as before");
    Error::new(Kind::Conflict, what).advise(advice::Handover::Converge)
}

#[cfg(test)]
#[path = "migrate_tests.rs"]
mod tests;
