//! A domain that was handed to its target, or is being handed: no run of this host goes over it (I15, I16), and whoever
//! asks is told where it lives.
//!
//! The record is durable before the guest is shut down, and goes only when the target has said that the domain cannot
//! run there. It is written by `recovery::handover`; runs, `status` and `doctor` read it.
//!
//! Format: docs/formats/recovery.md. Steps: docs/recovery.md.

use crate::durable::{read_json, remove_durably, replace_json};
use crate::error::{Error, Kind, Result, advice};
use crate::flock::Flock;
use crate::hypervisor::Power;
use crate::hypervisor::departure::Departure;
use crate::name::{DomainName, DomainUuid, PointId, RunId};
use crate::replica::ReplicaView;
use crate::replicate::state::locked_dir;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

const RECORD: &str = "record.json";
const LEARNED: &str = "learned.json";

/// A domain on its way to its target, from the first step until it is let back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HandoverRecord {
    /// Version of this document: 1.
    pub format: u32,
    /// Names the handover in everything that is asked of the target.
    pub handover: RunId,
    /// Name of the domain that is handed over.
    pub domain: DomainName,
    /// UUID of the domain that is handed over.
    pub uuid: DomainUuid,
    /// The target's canonical URL.
    pub to: String,
    /// When the handover began, by this host's clock.
    pub since: Timestamp,
    /// How far the handover has come. A repeated command goes on from it.
    pub stage: Stage,
    /// As it was found: so it is put back.
    pub ran: bool,
    /// Autostart as it was before the handover. If the domain is put back, it gets this again.
    pub autostart: bool,
    /// The target may have been asked to start it: only its word that it called that off lets the domain run here
    /// again.
    #[serde(default)]
    pub asked: bool,
    /// It is committed there in the end: a migration, that needs no way back.
    #[serde(default)]
    pub commit: bool,
    /// What its images are to be there, once they are its own.
    #[serde(default)]
    pub disk_format: DiskFormat,
    /// When the guest was asked to go down, and when it was off.
    #[serde(default)]
    pub down_from: Option<Timestamp>,
    /// When the handover found the domain off, by this host's clock. `None`: not yet.
    #[serde(default)]
    pub off_at: Option<Timestamp>,
    /// What the target is to bring up: sealed after `off_at`.
    #[serde(default)]
    pub point: Option<PointId>,
    /// Sent by the last run, in bytes.
    #[serde(default)]
    pub last_run_bytes: u64,
    /// When the last run had sealed its point, by this host's clock. `None`: not yet.
    #[serde(default)]
    pub sent_at: Option<Timestamp>,
    /// When the target had started it, by this host's clock.
    #[serde(default)]
    pub up_at: Option<Timestamp>,
}

/// What the images of a domain are to be where it was brought up, once they are its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// What its guest has written to since it was brought up.
    #[default]
    Qcow2,
    /// All images become raw.
    Raw,
    /// Raw where it was raw at the source.
    Same,
}

/// How far a handover has come, as its record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Nothing has been changed.
    Begun,
    /// Nothing starts it by itself any more.
    Secured,
    /// The guest was shut down.
    Off,
    /// All that it wrote is at the target.
    Sent,
    /// The target may have started it.
    Asked,
    /// It runs there.
    Moved,
    /// It is being put back.
    Aborting,
    /// The target has called it off, or was never asked: it may run here.
    Undone,
}

/// How long the parts of this domain's last handover took, in milliseconds: what the next one is foretold from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Learned {
    /// From the request to shut down to the guest's end.
    pub shutdown_ms: Option<f64>,
    /// From the seal of the last point to the start there.
    pub start_ms: Option<f64>,
}

impl HandoverRecord {
    /// From where on a guest that runs here may be a second one.
    pub fn may_run_there(&self) -> bool {
        self.asked && self.stage != Stage::Undone
    }

    /// What an operator must learn at once.
    pub fn alarm(&self, power: Power) -> Option<String> {
        let (domain, to, since) = (&self.domain, &self.to, self.since);
        let wrong = self.may_run_there() && power != Power::Off;
        wrong.then(|| {
            format!(
                "{domain} RUNS ON BOTH SIDES: it was handed to {to} at {since:.0}, and somebody has started it here; what the \
                 two of them write cannot be put together again"
            )
        })
    }

    /// Why no run goes over it, to be read at 3 a.m., and what to do.
    pub fn refusal(&self, power: Power) -> Error {
        let since = self.since;
        let (domain, to) = (self.domain.to_string(), self.to.to_string());
        if let Some(alarm) = self.alarm(power) {
            return Error::new(Kind::Conflict, alarm)
                .domain(&self.domain)
                .advise(advice::Handover::ShutOffHere { domain, to });
        }
        let (what, advice) = match self.stage {
            Stage::Moved => (
                format!(
                    "the domain lives on {to} since {since:.0}: it was handed over, and this host has an old copy of it"
                ),
                advice::Handover::LivesThere { domain, to },
            ),
            Stage::Asked => (
                format!(
                    "the domain may run on {to}: the target was asked to start it ({since:.0}), and its answer was lost"
                ),
                advice::Handover::AskAgain { domain, to },
            ),
            Stage::Aborting | Stage::Undone => (
                format!("a handover to {to} of {since:.0} is being called off"),
                advice::Handover::Abort { domain, to },
            ),
            _ => (
                format!("a handover to {to} of {since:.0} was cut short before the target was asked"),
                advice::Handover::GoOnOrAbort { domain, to },
            ),
        };
        Error::new(Kind::Conflict, what).domain(&self.domain).advise(advice)
    }
}

/// One domain's handover, with its lock held. Released when dropped, also by `kill -9`.
pub struct HandoverState {
    dir: PathBuf,
    _lock: Flock,
}

impl HandoverState {
    /// [`Kind::Busy`] while another hand is on it.
    pub fn open(state: &Path, uuid: &DomainUuid) -> Result<HandoverState> {
        let dir = state_dir(state, uuid);
        locked_dir::make(&dir)?;
        let busy = || Error::new(Kind::Busy, "another program works on this handover").path(&dir).domain(uuid);
        let lock = locked_dir::lock(&dir)?.ok_or_else(busy)?;
        Ok(HandoverState { dir, _lock: lock })
    }

    /// Reads the record of the handover. `None`: none is open. Fails with `Protocol` for another version.
    pub fn record(&self) -> Result<Option<HandoverRecord>> {
        peek_in(&self.dir)
    }

    /// Durable when it returns.
    pub fn write(&self, record: &HandoverRecord) -> Result<()> {
        replace_json(&self.dir, RECORD, record)
    }

    /// A help to guess, and no more: where it cannot be read there is a default.
    pub fn learned(&self) -> Learned {
        read_json(&self.dir.join(LEARNED)).ok().flatten().unwrap_or_default()
    }

    /// Keeps these times for the next forecast. Durable when it returns.
    pub fn learn(&self, learned: &Learned) -> Result<()> {
        replace_json(&self.dir, LEARNED, learned)
    }

    /// The domain is this host's again; durable when it returns.
    pub fn close(&self) -> Result<()> {
        remove_durably(&self.dir, RECORD, "cannot remove the record of the handover")
    }
}

fn state_dir(state: &Path, uuid: &DomainUuid) -> PathBuf {
    state.join("recovery").join("handovers").join(uuid.as_str())
}

/// The record of a domain's handover, read without its lock.
pub fn peek(state: &Path, uuid: &DomainUuid) -> Result<Option<HandoverRecord>> {
    peek_in(&state_dir(state, uuid))
}

fn peek_in(dir: &Path) -> Result<Option<HandoverRecord>> {
    let path = dir.join(RECORD);
    match read_json::<HandoverRecord>(&path)? {
        Some(record) if record.format != 1 => {
            let what = format!("the record of a handover has version {}, this program reads version 1", record.format);
            Err(Error::new(Kind::Protocol, what).path(path))
        }
        record => Ok(record),
    }
}

/// Handovers of this host that are on record, whatever their stage.
pub fn all(state: &Path) -> Result<Vec<HandoverRecord>> {
    let dir = state.join("recovery").join("handovers");
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("cannot read the directory of handovers", &dir, e)),
    };
    let mut all = Vec::new();
    for entry in entries.flatten() {
        all.extend(peek_in(&entry.path())?);
    }
    all.sort_by(|a, b| a.domain.cmp(&b.domain));
    Ok(all)
}

/// Whether a run to `target` may go over the domain. `Ok` with a record: only if that target has let it back, which
/// [`let_back`] finds out. `handover`: the one that the run belongs to.
pub fn may_run(
    record: Option<HandoverRecord>,
    power: Power,
    target: &str,
    handover: Option<&RunId>,
) -> Result<Option<HandoverRecord>> {
    match record {
        None => Ok(None),
        // Its own last run.
        Some(record) if handover == Some(&record.handover) && !record.asked => Ok(None),
        Some(record) if record.stage == Stage::Moved && record.to == target => Ok(Some(record)),
        Some(record) => Err(record.refusal(power)),
    }
}

/// Takes the mark off a domain that its target has withdrawn: it had been promoted there, and is not any more, so that
/// it cannot run there (f9 comes before f11). Gives the words for the report, if there was a mark; the refusal as long
/// as it lives there.
pub fn let_back(
    custody: &dyn Departure,
    state: &Path,
    record: Option<&HandoverRecord>,
    power: Power,
    replica: &ReplicaView,
) -> Result<Option<String>> {
    let Some(record) = record else { return Ok(None) };
    if replica.promoted.is_some() {
        return Err(record.refusal(power));
    }
    let held = HandoverState::open(state, &record.uuid)?;
    if held.record()?.as_ref() != Some(record) {
        return Err(Error::new(Kind::Busy, "the domain is being handed over just now").domain(&record.domain));
    }
    custody.set_autostart(&record.uuid, record.autostart)?;
    custody.set_mark(&record.uuid, None)?;
    held.close()?;
    Ok(Some(format!(
        "the failover to {} was undone there: the domain is this host's again{}",
        record.to,
        if record.autostart { ", and starts with it" } else { "" }
    )))
}

/// Forgets that the domain was handed away: it was brought up on this host from a replica of where it went. What is
/// still on its way there stays on record.
pub fn has_come_home(state: &Path, uuid: &DomainUuid) -> Result<()> {
    if peek(state, uuid)?.is_none_or(|record| record.stage != Stage::Moved) {
        return Ok(());
    }
    HandoverState::open(state, uuid)?.close()
}

#[cfg(test)]
#[path = "demoted_tests.rs"]
mod tests;
