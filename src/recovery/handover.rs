//! A planned failover, at the source: the guest goes down cleanly, what is left is sent, the target brings it up.
//! Nothing is lost, and nothing runs twice.
//!
//! Invariants
//! - From the moment the target may have been asked (h5) the domain is started here only after the target has said,
//!   durably, that it called that off (h9). An answer that was lost is asked for again, and never guessed (I15, I16).
//! - What the target is asked to bring up was sealed while the guest was off (h4), by this very process: whoever goes
//!   on with the record of another sends again, since nobody watched in between.
//! - Until it was asked, whatever fails puts the domain back as it was: started, if it ran; autostart as it was.
//! - Every step may be done twice. Whatever dies, the same command goes on from the record.
//!
//! Steps: docs/recovery.md. [`next`] decides, and is pure; [`over`] and [`back`] act.

mod run;

use self::run::Run;
use super::bringup::{BringUp, Order, Standing};
use super::failover;
use crate::error::{Error, Kind, Result, advice};
use crate::failpoint;
use crate::hypervisor::Power;
use crate::hypervisor::departure::Departure;
use crate::hypervisor::machine::Machines;
use crate::name::{DomainName, DomainUuid, PointId, RunId};
use crate::recovery::record::Wanted;
pub use crate::replicate::state::handover_record::{DiskFormat, HandoverRecord, HandoverState, Stage};
use jiff::Timestamp;
use serde::Serialize;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// How long a target that does not answer, or is at work, is asked again.
const ASK_WITHIN: Duration = Duration::from_secs(120);
const ASK_EVERY: Duration = Duration::from_secs(2);
/// How often is looked whether the guest is off, and how often its power button is pressed: one that boots does not
/// hear it.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const PRESS_EVERY: Duration = Duration::from_secs(15);

/// What a handover needs of the world.
pub struct Ports<'a> {
    /// The source's libvirt, for shutting the domain down and starting it again.
    pub machines: &'a dyn Machines,
    /// Sets the domain's autostart and its handover mark in libvirt at the source.
    pub custody: &'a dyn Departure,
    /// Looks at the domain.
    pub look: &'a dyn Fn() -> Result<Look>,
    /// One run to the target; with a handover, as a part of it.
    pub run: &'a dyn Fn(Option<&RunId>) -> Result<Sent>,
    /// What would keep the last run from its end, or the domain as it is now from coming up there, found out while the
    /// guest works. Touches nothing.
    pub preflight: &'a dyn Fn(&dyn BringUp) -> Result<()>,
    /// When the newest point there stood still.
    pub head: &'a dyn Fn() -> Result<Option<Timestamp>>,
    /// The target; connects anew where the last connection has broken.
    pub there: &'a dyn Fn() -> Result<Box<dyn BringUp>>,
    /// Gives the current time of this host.
    pub clock: &'a dyn Fn() -> Timestamp,
    /// Waits for this time.
    pub sleep: &'a dyn Fn(Duration),
    /// Told what is done now, in words.
    pub say: &'a dyn Fn(&str),
    /// A signal came. Heeded until the target is asked.
    pub stop: &'a AtomicBool,
}

/// A domain, as far as it decides whether it can be handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// libvirt keeps the domain's definition when the domain is off.
    pub persistent: bool,
    /// libvirt holds a saved memory image of the domain (`virsh managedsave`).
    pub managed_save: bool,
    /// The guest agent is connected and can be asked to shut the guest down.
    pub guest_agent: bool,
}

/// What a run led to.
#[derive(Debug, Clone, PartialEq)]
pub struct Sent {
    /// Recovery point that the run sealed.
    pub point: PointId,
    /// When the disks of the point stood still, by the source's clock.
    pub frozen_at: Timestamp,
    /// It was read as shut off, from its beginning to its end.
    pub off: bool,
    /// Bytes that the run sent to the target.
    pub bytes: u64,
    /// Warnings of the run, for the operator.
    pub warnings: Vec<String>,
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// Name of the domain to hand over.
    pub domain: DomainName,
    /// UUID of the domain to hand over.
    pub uuid: DomainUuid,
    /// The target's canonical URL.
    pub to: String,
    /// Of a new one.
    pub handover: RunId,
    /// How long the guest may take to shut down.
    pub timeout: Duration,
    /// Then it is ended as by a power cut.
    pub force_off: bool,
    /// It is going to be committed there.
    pub commit: bool,
    /// An older head is brought up to date while the guest works, so that it is down for a short time. Zero: every head
    /// is.
    pub head_age_max: Duration,
    /// What its images are to be there, once they are its own.
    pub disk_format: DiskFormat,
}

/// How it went.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Name of the domain that was handed over.
    pub domain: DomainName,
    /// UUID of the domain that was handed over.
    pub uuid: DomainUuid,
    /// Canonical URL of the target.
    pub to: String,
    /// Id of the handover.
    pub handover: RunId,
    /// Recovery point that the target brought the domain up from. `None`: no point is recorded.
    pub point: Option<PointId>,
    /// From the guest's end here to its start there; absent if it did not run.
    pub downtime_ms: Option<f64>,
    /// Of which before the end: from the request to shut down to the guest's end. Absent as above.
    pub shutdown_ms: Option<f64>,
    /// From the end to the seal of the last point.
    pub last_run_ms: Option<f64>,
    /// Bytes that the last run sent, while the guest was off.
    pub last_run_bytes: u64,
    /// It was ended as by a power cut: what it had not flushed is lost.
    pub forced_off: bool,
    /// Warnings of the runs and of the handover, for the operator.
    pub warnings: Vec<String>,
}

/// What is known when is decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Stage of the recorded handover. `None`: no handover is recorded.
    pub stage: Option<Stage>,
    /// It has a QEMU here.
    pub runs: bool,
    /// The last run was made by this process, and the domain has been off since.
    pub sent_by_us: bool,
}

/// What is to be done next about a handover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// See whether it can be done, and record it.
    Begin,
    /// Let nothing start it by accident.
    Secure,
    /// Shut the guest down: it still runs, or it was started again before the target was asked.
    ShutDown,
    /// It is off: record it.
    NoteOff,
    /// Run the last run: the domain is off, and no point of this process holds its final state.
    Send,
    /// Record that the target is going to be asked.
    Commit,
    /// Ask the target to bring the domain up.
    Ask,
    /// Nothing is left to do: the domain lives on the target.
    Done,
    /// It runs here, and may run there.
    Both,
    /// It is being put back: that comes to its end first.
    FinishBack,
}

/// Pure.
pub fn next(seen: Seen) -> Step {
    match (seen.stage, seen.runs) {
        (None, _) => Step::Begin,
        (Some(Stage::Begun), _) => Step::Secure,
        // Also where somebody started it in the middle: what it wrote is sent again.
        (Some(Stage::Secured | Stage::Off | Stage::Sent), true) => Step::ShutDown,
        (Some(Stage::Secured), false) => Step::NoteOff,
        (Some(Stage::Off), false) => Step::Send,
        (Some(Stage::Sent), false) if seen.sent_by_us => Step::Commit,
        (Some(Stage::Sent), false) => Step::Send,
        (Some(Stage::Asked | Stage::Moved), true) => Step::Both,
        (Some(Stage::Asked), false) => Step::Ask,
        (Some(Stage::Moved), false) => Step::Done,
        (Some(Stage::Aborting | Stage::Undone), _) => Step::FinishBack,
    }
}

/// What came of asking the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Ask again: it is at work, or was not heard.
    Again,
    /// It said no, and has not started it.
    No,
    /// It said no, and whether the guest ran there in between is not known.
    Unclear,
}

/// From the error that came back, and how it stands there afterwards (`None`: it did not say). `first`: no earlier
/// process had asked.
pub fn judge(error: &Error, first: bool, order: &Order, standing: Option<&Standing>) -> Verdict {
    match error.kind() {
        Kind::Unavailable | Kind::Interrupted | Kind::Busy => return Verdict::Again,
        // Nobody knows what it understood.
        Kind::Protocol | Kind::Auth => return Verdict::Unclear,
        _ => {}
    }
    let Some(standing) = standing else { return Verdict::Unclear };
    let quiet = !matches!(standing.power, Some(Power::Running | Power::Paused));
    let ours = match &standing.failover {
        None => true,
        Some(record) => {
            let before = matches!(record.stage, failover::Stage::Begun | failover::Stage::Made);
            record.point == order.point && before
        }
    };
    if first && quiet && ours { Verdict::No } else { Verdict::Unclear }
}

/// Whether a guest may have written there what calling it off would lose. Pure.
pub fn writes_may_matter(standing: &Standing) -> bool {
    let runs = matches!(standing.power, Some(Power::Running | Power::Paused));
    let started = standing
        .failover
        .as_ref()
        .is_some_and(|record| !matches!(record.stage, failover::Stage::Begun | failover::Stage::Undoing));
    runs || started
}

/// Hands the domain over, or goes on where an earlier attempt was left. Returns when the target runs it; durable.
/// Blocks for as long as the guest, the last run and the target need.
pub fn over(ports: &Ports, state: &HandoverState, request: &Request) -> Result<Report> {
    let mut run = Run::new(ports, state, request)?;
    loop {
        let runs = ports.machines.power(&request.uuid)?.is_some_and(|power| power != Power::Off);
        let stage = run.record.as_ref().map(|record| record.stage);
        let done = match next(Seen { stage, runs, sent_by_us: run.sent_by_us }) {
            Step::Begin => run.begin(runs),
            Step::Secure => run.secure(),
            Step::ShutDown => run.shut_down(),
            Step::NoteOff => run.note_off(),
            Step::Send => run.send(),
            Step::Commit => run.commit_to_asking(),
            Step::Ask => run.ask(),
            Step::Done => {
                run.mark_moved();
                let report = run.report();
                run.learn(&report);
                return Ok(report);
            }
            Step::Both => return Err(run.held().refusal(Power::Running)),
            Step::FinishBack => return Err(run.held().refusal(Power::Off)),
        };
        if let Err(e) = done {
            return Err(run.put_back_after(e).domain(&request.domain));
        }
    }
}

/// Puts the domain back: what the target brought up is called off there, durably, and only then it is started here.
/// Refused once a guest may have written there, unless `lose_its_writes`.
pub fn back(ports: &Ports, state: &HandoverState, lose_its_writes: bool) -> Result<HandoverRecord> {
    let record = state.record()?;
    let mut record =
        record.ok_or_else(|| Error::new(Kind::NotFound, "there is no handover of this domain to call off"))?;
    let domain = record.domain.clone();
    put_back(ports, state, &mut record, Some(lose_its_writes)).map_err(|e| e.domain(&domain))?;
    Ok(record)
}

/// Puts a domain back that its target was never asked for; touches no other. `None`: there was nothing to do.
pub fn settle(ports: &Ports, state: &HandoverState) -> Result<Option<HandoverRecord>> {
    match state.record()? {
        Some(mut record) if !record.asked || record.stage == Stage::Undone => {
            put_back(ports, state, &mut record, None)?;
            Ok(Some(record))
        }
        _ => Ok(None),
    }
}

fn order_of(record: &HandoverRecord, point: PointId) -> Order {
    let wanted = Wanted { autostart: record.autostart, disk_format: record.disk_format };
    Order { handover: record.handover.clone(), point, wanted }
}

/// `lose`: whether a person has said that what the guest wrote there may be lost; `None`: nobody was asked.
fn put_back(ports: &Ports, state: &HandoverState, record: &mut HandoverRecord, lose: Option<bool>) -> Result<()> {
    if record.stage != Stage::Undone {
        let before = record.stage;
        let there = record.asked.then(|| (ports.there)()).transpose()?;
        let order = record.point.clone().map(|point| order_of(record, point));
        if let (Some(there), Some(false)) = (&there, lose)
            && before != Stage::Aborting
            && writes_may_matter(&there.state()?)
        {
            let what = format!("the domain was started on {}: what its guest wrote there would be lost", record.to);
            return Err(Error::new(Kind::Refused, what).advise(advice::Handover::BringHomeOrLose));
        }
        record.stage = Stage::Aborting;
        state.write(record)?;
        failpoint!("h8");
        if let (Some(there), Some(order)) = (there, order) {
            (ports.say)("the target calls it off");
            if let Err(e) = there.call_off(&order, ports.say) {
                if matches!(e.kind(), Kind::Refused | Kind::Conflict) && before != Stage::Aborting {
                    record.stage = before;
                    state.write(record)?;
                }
                return Err(e);
            }
        }
        record.stage = Stage::Undone;
        state.write(record)?;
        failpoint!("h9");
    }
    ports.custody.set_mark(&record.uuid, None)?;
    ports.custody.set_autostart(&record.uuid, record.autostart)?;
    failpoint!("h10");
    if record.ran && ports.machines.power(&record.uuid)? == Some(Power::Off) {
        (ports.say)("starting the domain here again");
        ports.machines.start(&record.uuid)?;
    }
    failpoint!("h11");
    state.close()?;
    failpoint!("h12");
    Ok(())
}

#[cfg(test)]
#[path = "handover_tests.rs"]
mod tests;
