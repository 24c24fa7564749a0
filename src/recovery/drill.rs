//! A drill: a throw-away copy of a point is booted under another name, UUID and MAC addresses, on a network that leads
//! nowhere, until there is evidence that it works. Then nothing is left of it but the report.
//!
//! Invariants
//! - What is made is in the record before it is made (d1): whatever dies, [`settle`] finds it. The normal end is the
//!   same function.
//! - The point is leased while its images are read, and none of them is written to (I20): the report has the proof.
//! - The copy leaves no definition behind: it ends with its QEMU, and is never started by itself.
//!
//! Steps: docs/recovery.md.

use super::definition::{self, Definition, Macs, Nics, Wish};
use super::drills::{self, DrillRecord, DrillState};
use super::fitting;
use super::mapping::{Attach, Mapping};
use super::probe::{self, Probe};
use super::ready::{self, Builds, Color, Room};
use super::{definition_of, overlays};
use crate::error::{Error, Kind, Result, printable};
use crate::failpoint;
use crate::hypervisor::drill_network;
use crate::hypervisor::machine::{Machines, NetworkView};
use crate::name::{DomainName, DomainUuid, PointId, RunId};
use crate::replica::upkeep::Held;
use definition::remark::Remark;
use jiff::Timestamp;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often evidence is looked for.
const POLL: Duration = Duration::from_millis(250);

/// How long the guest agent, somebody who is connected to, and a script may take for one answer.
const AGENT_WITHIN: Duration = Duration::from_secs(2);
const CONNECT_WITHIN: Duration = Duration::from_secs(1);
const SCRIPT_WITHIN: Duration = Duration::from_secs(60);

/// How much of what the guest said goes into the report, and is kept beside it, in bytes.
const TAIL_SHOWN: u64 = 2 << 10;
const TAIL_KEPT: u64 = 4 << 20;

/// What is to be drilled, and what is to be seen.
pub struct Request<'a> {
    /// Id of the drill. Its directories, its network and its copy are named after it.
    pub id: RunId,
    /// Of the throw-away copy.
    pub drill_uuid: DomainUuid,
    /// Name of the replicated domain that is drilled.
    pub domain: DomainName,
    /// UUID of the replicated domain that is drilled.
    pub uuid: DomainUuid,
    /// Evidence to wait for. The drill passes only if every probe succeeds in time.
    pub probes: Vec<Probe>,
    /// How long the evidence may take, from the start of the copy.
    pub within: Duration,
    /// State directory of the program on this host.
    pub state: &'a Path,
    /// The mapping of this host, from `recovery.yaml`.
    pub mapping: &'a Mapping,
    /// Random bits for MAC addresses.
    pub bits: u64,
}

/// What a drill needs of the world.
pub struct Ports<'a> {
    /// This host's libvirt, for starting, watching and ending the copy.
    pub machines: &'a dyn Machines,
    /// Gives the current time of this host.
    pub clock: &'a dyn Fn() -> Timestamp,
    /// Bytes that are free in a directory; `None`: there is none.
    pub room: &'a dyn Fn(&Path) -> Option<u64>,
    /// Told what is done now, in words.
    pub say: &'a dyn Fn(&str),
}

/// How a drill went. The JSON of this struct is a contract with scripts: fields are added, never renamed.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Version of this document: 1.
    pub format: u32,
    /// Id of the drill.
    pub id: RunId,
    /// Name of the replicated domain that was drilled.
    pub domain: DomainName,
    /// UUID of the replicated domain that was drilled.
    pub uuid: DomainUuid,
    /// Recovery point that the copy was booted from.
    pub point: PointId,
    /// When the disks of that point stood still at the source.
    pub frozen_at: Timestamp,
    /// Name of the throw-away copy.
    pub drill_domain: DomainName,
    /// When the drill began, by this host's clock.
    pub started_at: Timestamp,
    /// Whether the drill passed.
    pub outcome: Outcome,
    /// From the beginning of the drill to the last evidence; absent if any is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rto_ms: Option<u64>,
    /// Until the copy was started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_ms: Option<u64>,
    /// Milliseconds from the beginning of the drill until the copy was removed.
    pub duration_ms: u64,
    /// One entry for each probe of the request, in the same order.
    pub evidence: Vec<Evidence>,
    /// The point's images are the same files as before, of the same length, written at the same time.
    pub point_untouched: bool,
    /// The end of what the guest said on its first serial line.
    pub console_tail: String,
    /// Directory of the files that are kept: this report, the console, the picture.
    pub kept: PathBuf,
    /// A screenshot of the guest was kept as `screen` in the directory `kept`.
    pub picture: bool,
    /// Elements of the source's definition that the copy does without or has otherwise.
    pub remarks: Vec<Remark>,
    /// Everything that was made for the drill is gone.
    pub cleaned: bool,
    /// Why the drill failed, with all causes. `None`: it passed.
    pub error: Option<String>,
    /// Kind of the error in `error`. `None`: the drill passed.
    pub error_kind: Option<Kind>,
}

/// Result of a drill.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// All evidence was there in time, and nothing is left.
    Passed,
    /// The copy did not start, evidence is missing, the point's images were written to, or the copy could not be
    /// removed.
    Failed,
}

/// What became of one probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Evidence {
    /// The probe as the operator writes it, for example `tcp:192.0.2.10/24:22`.
    pub probe: String,
    /// From the beginning of the drill until it was seen; absent: it never was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after_ms: Option<u64>,
}

/// A drill that has begun.
struct Drill<'a> {
    ports: &'a Ports<'a>,
    request: &'a Request<'a>,
    state: DrillState,
    record: DrillRecord,
    definition: Definition,
    since: Instant,
}

/// Drills the point that is held. An error: nothing was made. From then on how it went is in the report, which is kept,
/// and the copy is gone with all that was made for it, or is in a record that the next drill settles.
pub fn run(ports: &Ports, request: &Request, held: &mut dyn Held, stop: &AtomicBool) -> Result<Report> {
    let since = Instant::now();
    let (record, definition, qemu_uid) = prepare(ports, request, held)?;
    overlays::let_qemu_pass(held, qemu_uid)?;
    let before = overlays::stamps(held)?;
    let state = DrillState::create(request.state, &request.id)?;
    state.write(&record)?;
    let drill = Drill { ports, request, state, record, definition, since };
    let mut evidence: Vec<Evidence> =
        request.probes.iter().map(|p| Evidence { probe: p.to_string(), after_ms: None }).collect();
    let mut start_ms = None;
    let seen = drill.boot(held).and_then(|()| {
        start_ms = Some(drill.elapsed_ms());
        (ports.say)("waiting for evidence");
        drill.gather(&mut evidence, held, stop)
    });
    let (console_tail, picture) = drill.keep_proof();
    (ports.say)("ending the copy, and removing what was made for it");
    let cleaned = clean(ports.machines, &drill.record);
    let untouched = overlays::stamps(held).is_ok_and(|after| after == before);
    let error = match (seen, &cleaned) {
        (Err(e), _) => Some((e.chain(), e.kind())),
        (Ok(()), Err(e)) => {
            Some((format!("the guest works, and its copy could not be removed: {}", e.chain()), e.kind()))
        }
        (Ok(()), Ok(())) if !untouched => Some(("the point's images were written to".to_owned(), Kind::Corrupt)),
        (Ok(()), Ok(())) => None,
    };
    let report = Report {
        format: 1,
        id: request.id.clone(),
        domain: request.domain.clone(),
        uuid: request.uuid.clone(),
        point: drill.record.point.clone(),
        frozen_at: held.point().frozen_at,
        drill_domain: drill.record.drill_domain.clone(),
        started_at: drill.record.started_at,
        outcome: if error.is_none() { Outcome::Passed } else { Outcome::Failed },
        rto_ms: evidence.iter().map(|e| e.after_ms).collect::<Option<Vec<_>>>().and_then(|all| all.into_iter().max()),
        start_ms,
        duration_ms: drill.elapsed_ms(),
        evidence,
        point_untouched: untouched,
        console_tail,
        kept: drill.state.dir.clone(),
        picture,
        remarks: drill.definition.remarks.clone(),
        cleaned: cleaned.is_ok(),
        error_kind: error.as_ref().map(|(_, kind)| *kind),
        error: error.map(|(what, _)| what),
    };
    // The evidence decides how a drill went, and not whether that could be written down.
    if let Err(e) = drill.state.keep_report(&report) {
        tracing::warn!("the report of the drill could not be kept on this host: {}", e.chain());
    }
    if report.cleaned {
        drill.state.close()?;
        failpoint!("d8");
    }
    Ok(report)
}

/// Settles drills that were cut short, or only this one of them: their copies are ended, and what was made for them is
/// removed. Gives their records; those under way are left alone.
pub fn settle(machines: &dyn Machines, state: &Path, only: Option<&RunId>) -> Result<Vec<DrillRecord>> {
    let mut settled = Vec::new();
    for (drill, record) in drills::abandoned(state)?.into_iter().filter(|(_, r)| only.is_none_or(|id| r.id == *id)) {
        clean(machines, &record).map_err(|e| e.domain(&record.domain))?;
        drill.close()?;
        settled.push(record);
    }
    Ok(settled)
}

/// Ends the copy and removes what was made for it, as far as it is there. Repeating it is harmless.
fn clean(machines: &dyn Machines, record: &DrillRecord) -> Result<()> {
    machines.destroy(&record.drill_uuid)?;
    failpoint!("d5");
    if let Some(network) = &record.network {
        machines.leave_network(network)?;
        machines.stop_network(network)?;
    }
    failpoint!("d6");
    overlays::remove(&record.dir)?;
    machines.forget_tpm(&record.drill_uuid)?;
    failpoint!("d7");
    Ok(())
}

/// Decides everything, and touches nothing.
fn prepare(ports: &Ports, request: &Request, held: &mut dyn Held) -> Result<(DrillRecord, Definition, Option<u32>)> {
    let place = |e: Error| e.domain(&request.domain).point(&held.point().id);
    let name = drills::dir_name(&request.id);
    let dir = request.mapping.images_dir().join(&name);
    let overlays = overlays::named(held, &dir);
    // libvirt's limit on names is that of a file.
    let head: String = request.domain.as_str().chars().take(40).collect();
    let wish = Wish {
        name: DomainName::new(format!("{head}-{name}"))?,
        uuid: request.drill_uuid.clone(),
        disks: &overlays.disks,
        nics: Nics::Isolated(name.clone()),
        macs: Macs::New(request.bits),
        console: Some(dir.join("console.log")),
        nvram: overlays.nvram.clone(),
        tpm: overlays.tpm,
    };
    let xml = definition_of(held).map_err(place)?;
    let mut fitted = fitting::fit(ports.machines, &xml, &wish, request.mapping).map_err(place)?;
    let definition = fitted.definition.clone();
    definition.xml().map_err(place)?;
    let guests: Vec<_> = request.probes.iter().filter_map(Probe::guest).collect();
    if guests
        .windows(2)
        .any(|pair| drill_network::beside(pair[0].0, pair[0].1) != drill_network::beside(pair[1].0, pair[1].1))
    {
        return Err(place(Error::new(Kind::Usage, "the probes by tcp cannot all be reached from one address")));
    }
    for probe in &request.probes {
        let missing = match probe {
            Probe::Agent if !definition.guest_agent => "the domain has no channel for the guest agent",
            Probe::Serial(_) if !definition.serial => "the domain has no serial line",
            Probe::Tcp { .. } if definition.attached.is_empty() => "the domain is on no network",
            _ => continue,
        };
        return Err(place(Error::new(Kind::Usage, format!("'{probe}' can never be seen: {missing}"))));
    }
    // It is made for the occasion.
    fitted.host.networks.push(NetworkView { name: name.clone(), active: true });
    let room =
        Room { dir: request.mapping.images_dir().to_owned(), free_bytes: (ports.room)(request.mapping.images_dir()) };
    // Another build of the firmware keeps no copy from being tried.
    let mut findings = ready::judge(&fitted, &wish.name, &wish.uuid, &room, &Builds::default());
    findings.extend(ready::chain(&fitted, overlays::to_copy(held, definition.images_max)?, &room));
    findings.extend(ready::tpm_programs(&fitted, held.point()));
    if let Some(red) = findings.iter().find(|f| f.color == Color::Red) {
        let e = Error::new(Kind::Conflict, format!("the copy cannot be started here: {}", red.what));
        return Err(place(red.advise(e)));
    }
    let record = DrillRecord {
        format: 1,
        id: request.id.clone(),
        domain: request.domain.clone(),
        uuid: request.uuid.clone(),
        point: held.point().id.clone(),
        drill_domain: wish.name.clone(),
        drill_uuid: request.drill_uuid.clone(),
        network: definition.attached.contains(&Attach::Network(name.clone())).then_some(name),
        dir,
        started_at: (ports.clock)(),
    };
    Ok((record, definition, fitted.host.qemu_uid))
}

impl Drill<'_> {
    fn elapsed_ms(&self) -> u64 {
        self.since.elapsed().as_millis() as u64
    }

    fn boot(&self, held: &mut dyn Held) -> Result<()> {
        failpoint!("d1");
        (self.ports.say)("laying overlays on the point");
        overlays::make_within(held, &self.record.dir, self.definition.images_max)?;
        overlays::bring_tpm(self.ports.machines, held, &self.record.drill_uuid, &self.definition)?;
        failpoint!("d2");
        if let Some(network) = &self.record.network {
            // The kernel takes 15 bytes for the name of a device.
            let bridge = format!("vrd{}", &self.request.id.as_str()[..12]);
            self.ports.machines.start_network(network, &bridge)?;
            if let Some(guest) = self.request.probes.iter().find_map(Probe::guest) {
                self.ports.machines.join_network(network, &bridge, guest)?;
            }
        }
        failpoint!("d3");
        (self.ports.say)("starting the copy");
        self.ports.machines.start_transient(self.definition.xml()?)?;
        failpoint!("d4");
        Ok(())
    }

    /// Returns when all evidence is there.
    fn gather(&self, evidence: &mut [Evidence], held: &mut dyn Held, stop: &AtomicBool) -> Result<()> {
        let until = Instant::now() + self.request.within;
        loop {
            let mut probes: Vec<_> = self.request.probes.iter().zip(evidence.iter_mut()).collect();
            // What answers at once first: an agent that is not there yet costs seconds.
            probes.sort_by_key(|(probe, _)| !matches!(probe, Probe::Serial(_)));
            for (probe, evidence) in probes {
                if evidence.after_ms.is_none() && self.seen(probe, until)? {
                    evidence.after_ms = Some(self.elapsed_ms());
                    (self.ports.say)(&format!("seen: {probe}"));
                }
            }
            let missing: Vec<&str> =
                evidence.iter().filter(|e| e.after_ms.is_none()).map(|e| e.probe.as_str()).collect();
            if missing.is_empty() {
                return Ok(());
            }
            let missing = missing.join(", ");
            if stop.load(Ordering::Relaxed) {
                return Err(Error::new(Kind::Interrupted, format!("interrupted before this was seen: {missing}")));
            }
            if self.ports.machines.power(&self.record.drill_uuid)?.is_none() {
                return Err(Error::new(Kind::Refused, format!("the guest ended before this was seen: {missing}")));
            }
            if Instant::now() >= until {
                let what = format!("within {} s this was not seen: {missing}", self.request.within.as_secs());
                return Err(Error::new(Kind::Refused, what));
            }
            held.renew()?;
            std::thread::sleep(POLL);
        }
    }

    fn seen(&self, probe: &Probe, until: Instant) -> Result<bool> {
        match probe {
            Probe::Agent => Ok(self.ports.machines.ping_guest_agent(&self.record.drill_uuid, AGENT_WITHIN).is_ok()),
            Probe::Serial(text) => probe::console_says(&self.console(), text),
            Probe::Tcp { guest, port, .. } => {
                let network = self.record.network.as_deref().expect("without one the probe is refused before");
                self.ports.machines.connects(network, drill_network::socket(*guest, *port), CONNECT_WITHIN)
            }
            Probe::Script(path) => {
                let console = self.console();
                let environment = [
                    ("VIRT_REPLICA_DRILL_DOMAIN", self.record.drill_domain.as_str()),
                    ("VIRT_REPLICA_DRILL_UUID", self.record.drill_uuid.as_str()),
                    ("VIRT_REPLICA_DRILL_NETWORK", self.record.network.as_deref().unwrap_or("")),
                    ("VIRT_REPLICA_DRILL_CONSOLE", console.to_str().unwrap_or("")),
                ];
                let within = until.saturating_duration_since(Instant::now()).clamp(POLL, SCRIPT_WITHIN);
                probe::run_script(path, &environment, &self.state.dir.join("script.log"), within)
            }
        }
    }

    fn console(&self) -> PathBuf {
        self.record.dir.join("console.log")
    }

    /// Keeps what the guest said and what it shows. What of it cannot be had is no reason for anything to fail.
    fn keep_proof(&self) -> (String, bool) {
        let said = probe::console_tail(&self.console(), TAIL_KEPT).unwrap_or_default();
        let kept = std::fs::write(self.state.dir.join("console.log"), &said);
        let picture = self.ports.machines.screenshot(&self.record.drill_uuid);
        let picture = picture.and_then(|p| {
            let path = self.state.dir.join("screen");
            std::fs::write(&path, p).map_err(|e| Error::io("cannot keep the picture", path, e))
        });
        for e in [kept.err().map(|e| e.to_string()), picture.as_ref().err().map(Error::chain)].into_iter().flatten() {
            tracing::debug!(error = e, "a part of the proof is missing");
        }
        let shown = &said[said.len().saturating_sub(TAIL_SHOWN as usize)..];
        let lines = String::from_utf8_lossy(shown);
        let clean: Vec<String> = lines.lines().map(|l| printable(l, 200)).collect();
        (clean.join("\n"), picture.is_ok())
    }
}

#[cfg(test)]
#[path = "drill_tests.rs"]
mod tests;
