//! An unplanned failover: the domain is brought up on this host from a point, because its source is gone. The way back
//! is to undo it, which loses what the guest wrote here, or to commit it, which makes this the truth.
//!
//! Invariants
//! - The replica refuses its source durably (f2) before the guest can start here (f6), and until it cannot run here any
//!   more (f9): at no time may both sides write.
//! - The guest writes to overlays, never to a point (I20). Its overlays are made anew only as long as it was never
//!   started: the record says `made` (f4) before anything can start it, and from then on they are kept.
//! - Every step may be done twice. Whatever dies, the same command goes on from the record.
//!
//! Steps: docs/recovery.md.

use super::definition::Definition;
use super::overlays;
use crate::durable::{read_json, replace_json, sync_dir};
use crate::error::{Error, Kind, Result, advice};
use crate::failpoint;
use crate::flock::Flock;
use crate::hypervisor::Power;
use crate::hypervisor::departure::Departure;
use crate::hypervisor::machine::Machines;
use crate::name::{DomainName, DomainUuid, Generation, RunId};
use crate::recovery::record::Wanted;
pub use crate::recovery::record::{FailoverRecord, Stage};
use crate::replica::upkeep::{Held, Promoting};
use crate::replicate::state::{generation, locked_dir};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

const RECORD: &str = "record.json";

/// Handovers that were called off, whether or not they had begun.
const CALLED_OFF: &str = "called-off.json";
/// Of so many an order is known to be too late. One that is older has had no living connection for long.
const CALLED_OFF_MAX: usize = 64;

#[derive(Default, Serialize, Deserialize)]
struct CalledOff {
    format: u32,
    handovers: Vec<RunId>,
}

/// A name for the overlays of a domain's failover: the first, and others where images of an earlier one have stayed.
fn dir_name(uuid: &DomainUuid, n: u32) -> String {
    match n {
        1 => format!("vr-failover-{uuid}"),
        n => format!("vr-failover-{uuid}.{n}"),
    }
}

/// Whether a directory of this name is one of a failover of this domain.
fn is_dir_name(uuid: &DomainUuid, name: &OsStr) -> bool {
    let rest = name.to_str().and_then(|name| name.strip_prefix(&dir_name(uuid, 1)));
    rest.is_some_and(|rest| rest.is_empty() || rest.strip_prefix('.').is_some_and(|n| n.parse::<u32>().is_ok()))
}

/// Where in `images` the overlays of a failover that was not begun yet would lie: images of an earlier one that a
/// domain was given for its own ([`detach`](super::detach)) may lie there still.
pub fn free_dir(images: &Path, uuid: &DomainUuid) -> PathBuf {
    let mut dirs = (1..).map(|n| images.join(dir_name(uuid, n)));
    dirs.find(|dir| fs::symlink_metadata(dir).is_err()).expect("numbers do not end before directories do")
}

/// One domain's state of failover, with its lock held. Released when dropped, also by `kill -9`.
pub struct FailoverState {
    /// This host's own state.
    state: PathBuf,
    dir: PathBuf,
    _lock: Flock,
}

impl FailoverState {
    /// [`Kind::Busy`] while another hand is on it.
    pub fn open(state: &Path, uuid: &DomainUuid) -> Result<FailoverState> {
        let dir = state_dir(state, uuid);
        locked_dir::make(&dir)?;
        let busy = || Error::new(Kind::Busy, "another program works on this failover").path(&dir);
        let lock = locked_dir::lock(&dir)?.ok_or_else(busy)?;
        Ok(FailoverState { state: state.to_owned(), dir, _lock: lock })
    }

    /// Reads the record of the failover. `None`: there is no failover of this domain. Fails with `Protocol` for
    /// another version and `Corrupt` for a wrong directory.
    pub fn record(&self) -> Result<Option<FailoverRecord>> {
        peek_in(&self.dir)
    }

    /// Refuses every order of this handover from now on; durable when it returns. Whoever holds the lock at the same
    /// time as such an order has seen it, or will be seen by it.
    pub fn call_off(&self, handover: &RunId) -> Result<()> {
        if self.is_called_off(handover)? {
            return Ok(());
        }
        let mut all = read_json::<CalledOff>(&self.dir.join(CALLED_OFF))?.unwrap_or_default();
        all.format = 1;
        all.handovers.push(handover.clone());
        let old = all.handovers.len().saturating_sub(CALLED_OFF_MAX);
        all.handovers.drain(..old);
        replace_json(&self.dir, CALLED_OFF, &all)
    }

    /// Says whether this handover was called off here. Only the newest 64 are remembered.
    pub fn is_called_off(&self, handover: &RunId) -> Result<bool> {
        let all = read_json::<CalledOff>(&self.dir.join(CALLED_OFF))?;
        Ok(all.is_some_and(|all| all.handovers.contains(handover)))
    }

    /// Durable when it returns.
    pub(super) fn write(&self, record: &FailoverRecord) -> Result<()> {
        replace_json(&self.dir, RECORD, record)
    }

    /// Durable when it returns.
    pub(super) fn close(&self) -> Result<()> {
        let path = self.dir.join(RECORD);
        fs::remove_file(&path).map_err(|e| Error::io("cannot remove the record of the failover", &path, e))?;
        sync_dir(&self.dir)
    }
}

/// The record of a domain's failover, read without its lock.
pub fn peek(state: &Path, uuid: &DomainUuid) -> Result<Option<FailoverRecord>> {
    peek_in(&state_dir(state, uuid))
}

fn state_dir(state: &Path, uuid: &DomainUuid) -> PathBuf {
    state.join("recovery").join("failovers").join(uuid.as_str())
}

fn peek_in(dir: &Path) -> Result<Option<FailoverRecord>> {
    let path = dir.join(RECORD);
    let Some(record) = read_json::<FailoverRecord>(&path)? else { return Ok(None) };
    if record.format != 1 {
        let what = format!("the record of a failover has version {}, this program reads version 1", record.format);
        return Err(Error::new(Kind::Protocol, what).path(path));
    }
    // Whatever the record says, no other directory is ever removed.
    match record.dir.file_name().is_some_and(|n| is_dir_name(&record.uuid, n)) {
        true => Ok(Some(record)),
        false => {
            Err(Error::new(Kind::Corrupt, "the record of a failover names a directory that is not a failover's")
                .path(path))
        }
    }
}

/// Failovers of this host that were cut short on their way up or down, read without their locks.
pub fn left_behind(state: &Path) -> Result<Vec<FailoverRecord>> {
    let dir = state.join("recovery").join("failovers");
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("cannot read the directory of failovers", &dir, e)),
    };
    let mut left = Vec::new();
    for entry in entries.flatten() {
        if let Some(record) = peek_in(&entry.path())?
            && !matches!(record.stage, Stage::Running | Stage::Committed)
        {
            left.push(record);
        }
    }
    Ok(left)
}

/// What a failover needs of the world.
pub struct Ports<'a> {
    /// This host's libvirt, for defining, starting and ending the domain.
    pub machines: &'a dyn Machines,
    /// The domain's replica in this host's store. It refuses the source while the domain is promoted.
    pub replica: &'a dyn Promoting,
    /// Sets whether libvirt starts the domain with the host.
    pub custody: &'a dyn Departure,
    /// Gives the current time of this host.
    pub clock: &'a dyn Fn() -> Timestamp,
    /// Told what is done now, in words.
    pub say: &'a dyn Fn(&str),
}

/// What is brought up, and where its overlays go.
pub struct Plan<'a> {
    /// Name that the domain has here.
    pub domain: &'a DomainName,
    /// UUID that the domain has here.
    pub uuid: &'a DomainUuid,
    /// Directory for the overlays of a new failover. A failover that has begun keeps the directory in its record.
    pub dir: PathBuf,
    /// Definition that is given to libvirt. The failover fails with `Refused` if the definition has refused elements.
    pub definition: &'a Definition,
    /// Autostart and disk format for a new failover. A failover that has begun keeps its own, unless it moves to a
    /// newer point.
    pub wanted: Wanted,
}

/// What is to be done next about a failover; pure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// From the first step.
    Begin,
    /// The overlays anew, and all that follows.
    Remake,
    /// Define and start, with the overlays that there are.
    Start,
    /// It is done.
    Nothing,
    /// It is being thrown away: that comes to its end first.
    FinishUndo,
    /// It is given images of its own, which may be a mixture now: that comes to its end first.
    FinishDetach,
    /// It lives elsewhere: what is left here goes first.
    FinishHandingBack,
}

/// From what is recorded and how the domain stands: what the command to fail over has to do.
pub fn next(stage: Option<Stage>, power: Option<Power>) -> Next {
    let runs = matches!(power, Some(Power::Running | Power::Paused));
    match (stage, runs) {
        (None, _) => Next::Begin,
        // It cannot have been started by us; if somebody else did, its overlays are in use.
        (Some(Stage::Begun), false) => Next::Remake,
        (Some(Stage::Begun), true) => Next::Start,
        (Some(Stage::Undoing), _) => Next::FinishUndo,
        (Some(Stage::Running | Stage::Committed | Stage::Detaching | Stage::Detached), true) => Next::Nothing,
        (Some(Stage::Detaching | Stage::Detached), false) => Next::FinishDetach,
        (Some(Stage::HandingBack), _) => Next::FinishHandingBack,
        (Some(Stage::Made | Stage::Running | Stage::Committed), _) => Next::Start,
    }
}

/// Brings the domain up from the point that is held, or goes on where an earlier attempt was left. Returns when it was
/// started, with the record; durable then.
pub fn run(ports: &Ports, state: &FailoverState, plan: &Plan, held: &dyn Held) -> Result<FailoverRecord> {
    let xml = plan.definition.xml()?;
    let recorded = state.record()?;
    let power = ports.machines.power(plan.uuid)?;
    let todo = next(recorded.as_ref().map(|r| r.stage), power);
    let mut record = record_for(ports, plan, held, (todo, recorded))?;
    if todo == Next::Nothing {
        return Ok(record);
    }
    if matches!(todo, Next::Begin | Next::Remake) {
        state.write(&record)?;
        failpoint!("f1");
        (ports.say)("refusing the source from now on");
        // Whoever goes on from a point replicates it further as of its generation at least.
        generation::raise(&state.state, plan.uuid, held.point().generation)?;
        ports.replica.promote(&record.point)?;
        failpoint!("f2");
        (ports.say)("laying overlays on the point");
        overlays::remove(&record.dir)?;
        let made = overlays::make_within(held, &record.dir, plan.definition.images_max)?;
        // Before the guest's first write: whatever it changes is told to the first run from here.
        for problem in overlays::track(held, &made)? {
            (ports.say)(&problem);
        }
        overlays::bring_tpm(ports.machines, held, &record.uuid, plan.definition)?;
        failpoint!("f3");
        record.stage = Stage::Made;
        state.write(&record)?;
        failpoint!("f4");
    }
    // Once more: whoever starts it must know that the source is refused.
    ports.replica.promote(&record.point)?;
    (ports.say)("starting the domain");
    ports.machines.define(xml)?;
    failpoint!("f5");
    ports.machines.start(plan.uuid)?;
    failpoint!("f6");
    if record.stage == Stage::Made {
        // Before the record: whoever finds it running has this done as well. A boot of this host before the undoing is
        // done (f9 takes it away with the definition) starts what is ended again; its source is refused all the while.
        if record.wanted.autostart {
            match ports.custody.set_autostart(plan.uuid, true) {
                // It runs: that counts for more.
                Err(e) if e.kind() == Kind::Refused => {
                    record.wanted.autostart = false;
                    (ports.say)(&format!("it does not start with its new host (`virsh autostart`): {}", e.chain()));
                }
                other => other?,
            }
        }
        record.stage = Stage::Running;
        state.write(&record)?;
    }
    failpoint!("f7");
    Ok(record)
}

/// The record to go on with: a new one, or what an earlier attempt left, if it is of this point.
fn record_for(
    ports: &Ports,
    plan: &Plan,
    held: &dyn Held,
    begun: (Next, Option<FailoverRecord>),
) -> Result<FailoverRecord> {
    let tpm = plan.definition.tpm.as_ref().is_some_and(|tpm| tpm.state);
    Ok(match begun {
        (Next::FinishUndo, Some(record)) => {
            let what = format!("the failover of {} is being undone", record.started_at);
            return Err(Error::new(Kind::Conflict, what).advise(advice::Failover::FinishUndo));
        }
        (Next::FinishHandingBack, Some(_)) => {
            return Err(Error::new(Kind::Conflict, "the domain was handed on, and lives elsewhere")
                .advise(advice::Failover::FinishFailback));
        }
        (Next::FinishDetach, Some(_)) => {
            return Err(Error::new(Kind::Conflict, "the domain was being given images of its own")
                .advise(advice::Failover::FinishDetach));
        }
        // Nobody was told of that point yet, and there may be a newer one.
        (Next::Remake, Some(record)) if ports.replica.promoted()?.is_none() => {
            let point = held.point().id.clone();
            // What its own order asked for, or else what is known of this point.
            let wanted = if record.point == point { record.wanted } else { plan.wanted.clone() };
            FailoverRecord { point, frozen_at: held.point().frozen_at, tpm, wanted, ..record }
        }
        (_, Some(record)) if record.point != held.point().id => {
            let what =
                format!("the domain was brought up here from point {}, not from {}", record.point, held.point().id);
            return Err(Error::new(Kind::Conflict, what).advise(advice::Failover::UndoOrHead));
        }
        (_, Some(record)) => record,
        (_, None) => FailoverRecord {
            format: 1,
            domain: plan.domain.clone(),
            uuid: plan.uuid.clone(),
            point: held.point().id.clone(),
            frozen_at: held.point().frozen_at,
            dir: plan.dir.clone(),
            stage: Stage::Begun,
            started_at: (ports.clock)(),
            detached: Vec::new(),
            detaching_in: None,
            tpm,
            raw: Vec::new(),
            moving: None,
            wanted: plan.wanted.clone(),
        },
    })
}

/// Throws the failover away: the domain is ended here, what it wrote is lost, and its source may replicate again.
pub fn undo(ports: &Ports, state: &FailoverState) -> Result<FailoverRecord> {
    let Some(mut record) = state.record()? else {
        // The record is removed last: what is left is at most a promotion that nobody remembers.
        return Err(Error::new(Kind::NotFound, "there is no failover of this domain to undo"));
    };
    if record.stage.is_committed() {
        return Err(Error::new(
            Kind::Refused,
            "the failover was committed: what runs here is the domain, and there is no way back by undoing it",
        ));
    }
    record.stage = Stage::Undoing;
    state.write(&record)?;
    failpoint!("f8");
    (ports.say)("ending the domain here");
    ports.machines.destroy(&record.uuid)?;
    ports.machines.undefine(&record.uuid)?;
    failpoint!("f9");
    (ports.say)("removing its overlays");
    remove_files(ports, &record)?;
    failpoint!("f10");
    ports.replica.withdraw()?;
    failpoint!("f11");
    state.close()?;
    failpoint!("f12");
    Ok(record)
}

/// Removes what the domain wrote here, once it cannot run here any more.
pub(super) fn remove_files(ports: &Ports, record: &FailoverRecord) -> Result<()> {
    if record.tpm {
        ports.machines.forget_tpm(&record.uuid)?;
    }
    overlays::remove(&record.dir)
}

/// Makes the failover the truth: the generation rises, and it cannot be undone.
pub fn commit(ports: &Ports, state: &FailoverState) -> Result<(FailoverRecord, Generation)> {
    let mut record =
        state.record()?.ok_or_else(|| Error::new(Kind::NotFound, "there is no failover of this domain to commit"))?;
    if matches!(record.stage, Stage::Begun | Stage::Made | Stage::Undoing | Stage::HandingBack) {
        return Err(Error::new(Kind::Conflict, "the failover has not come to its end")
            .hint("run the same command as before to its end first"));
    }
    // First what can be repeated: a record that said so, with a replica that did not, would let an old source in.
    let generation = ports.replica.commit()?;
    failpoint!("f13");
    generation::raise(&state.state, &record.uuid, generation)?;
    if record.stage == Stage::Running {
        record.stage = Stage::Committed;
        state.write(&record)?;
    }
    failpoint!("f14");
    Ok((record, generation))
}

#[cfg(test)]
#[path = "failover_tests.rs"]
mod tests;
