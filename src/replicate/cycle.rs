//! One run of one domain. This page is the whole story; every other file of the crate is a word in it.
//!
//! 1. **settle**: finish or undo what an earlier run left behind, by the same code as step 7
//! 2. **observe**: the domain and its disks; connect to the target, read the replica's head and generation
//! 3. **plan**: per disk how its changes are found, with a reason; or a conflict. Reserve space at the target
//! 4. **freeze**: record the intent durably, arm the dead-man, put overlays over all disks in one transaction; or
//!    begin a backup job, which needs no commit ([`backup`](crate::replicate::capture::backup))
//! 5. **ship**: read the frozen images, compare, send; the target writes into an open, unnamed point
//! 6. **seal**: everything durable at the target, then the manifest names the point: *now it exists*
//! 7. **commit**: each overlay into its base, then pause, pivot, rename the overlay away, resume
//! 8. **retire**: drop what is superseded, write the report
//!
//! These rules hold at every moment, whichever process dies (each with tests: docs/replication.md):
//!
//! - The production guest comes first: 7 happens even if 5 or 6 failed.
//! - No overlay exists without an earlier durable record that lets any later run finish (I1); only our own layer is
//!   ever committed, and only if the chain is the recorded one (I4).
//! - The guest is never held: every pause is bounded by a dead-man that outlives this process (I2).
//! - Between the pivot and the durable end of the overlay's name the guest runs nothing (I3).
//! - A point is all disks of one instant and exists if and only if the manifest names it (I9, I10).
//! - A dead or full target never costs an overlay: 2 and 3 come before 4.

use super::capture::{OffCapture, OverlayCapture};
use super::plan::CaptureKind;
use super::target_gate::{Patience, TargetGate};
use crate::engine::pump;
use crate::engine::stats::DiskStats;
use crate::error::{Error, Kind, Result, ResultExt, advice};
use crate::failpoint;
use crate::hypervisor::{DomainView, Power};
use crate::name::DomainUuid;
use crate::replica::left_out::LeftOut;
use crate::replica::{BeginDisk, BeginPoint, PointView, Replica, SealDisk, SealPoint};
use crate::replicate::attachments::{Described, attach, describe, starts_with_host, tpm_programs};
use crate::replicate::capture::backup::BackupCapture;
use crate::replicate::capture::freeze_hooks;
use crate::replicate::capture::held::{Standing, while_held};
use crate::replicate::capture::quiesce::{self, Quiescer, Settled};
use crate::replicate::capture::still::{Capture, Release};
use crate::replicate::plan::label;
use crate::replicate::plan::planned::{DiskPlan, Plan};
use crate::replicate::plan::survey::make_plan;
pub use crate::replicate::run::{Ports, Request, Watch};
use crate::replicate::run::{Run, stopped};
use crate::replicate::settle::guard::PauseGuard;
pub use crate::replicate::settle::leftover::settle_domain;
pub use crate::replicate::settle::observe::record_in_domain;
use crate::replicate::settle::{observe, stopped};
use crate::replicate::state::handover_record::{self, HandoverRecord};
use crate::replicate::state::journal::Journal;
use crate::replicate::state::record::Record;
use crate::replicate::state::report::{Report, RunOutcome, millis};
use crate::replicate::tracking::audit;
use crate::replicate::tracking::dirty_ranges::{Bitmaps, Marked, doubted_again, unless_cut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// How often a domain that was started while it was read as off is begun again.
const STARTS_MAX: u32 = 3;

/// Runs one domain once. Returns the report, also of a run that sealed no point; an `Err` says that nothing was begun.
/// Blocks for as long as it takes. `stop`: a signal came; the run is cut short at the next group and ends in order.
pub fn run(ports: &Ports, request: &Request, watch: &dyn Watch, stop: &AtomicBool) -> Result<(Report, Option<Error>)> {
    let started = Instant::now();
    let found = observe::find(ports.hypervisor, &request.domain)?;
    let what = format!("sync to {}", request.target);
    let journal =
        Journal::open_after_deadman(&request.state, &found.uuid, &what, (ports.clock)()).on_domain(&found.name)?;
    let mut report = Report {
        domain: found.name.clone(),
        uuid: found.uuid.clone(),
        target: request.target.clone(),
        run_id: request.run.clone(),
        started_at: (ports.clock)(),
        outcome: RunOutcome::Failed,
        point: None,
        capture: None,
        capture_reason: None,
        freeze_ms: 0.0,
        held_ms: None,
        pause_ms: 0.0,
        pause_sum_ms: None,
        pauses: None,
        duration_ms: 0.0,
        skipped: LeftOut::default(),
        alarms: Vec::new(),
        guest_stopped: None,
        warnings: Vec::new(),
        target_seen: None,
        target_lacks: Vec::new(),
        error: None,
        error_kind: None,
    };
    let run = Run::new(ports, request, watch, stop, &journal);
    let mut result = run.eight_steps(&found.uuid, &mut report);
    for _ in 1..STARTS_MAX {
        if !matches!(result, Err(Retry::StartedMeanwhile)) {
            break;
        }
        watch.warn("the domain was started while it was read as shut off: starting over as for a running one");
        result = run.eight_steps(&found.uuid, &mut report);
    }
    report.duration_ms = millis(started.elapsed());
    report.alarms = run.take_alarms();
    let error = match result {
        Ok(()) => None,
        Err(Retry::StartedMeanwhile) => {
            Some(Error::new(Kind::Busy, "the domain is started and stopped faster than it can be read"))
        }
        Err(Retry::No(e)) => Some(e),
    };
    let error = error.map(|e| e.domain(&found.name));
    if let Some(e) = &error {
        report = report.failed(e);
    }
    // The acts of a run decide how it went. A report that cannot be kept does not.
    if let Err(e) = journal.keep_report(&report) {
        let text = format!("this report could not be kept on this host: {}", e.chain());
        watch.warn(&text);
        report.warnings.push(text);
    }
    failpoint!("8c");
    Ok((report, error))
}

/// How a run may end short of a point.
enum Retry {
    StartedMeanwhile,
    No(Error),
}

impl From<Error> for Retry {
    fn from(e: Error) -> Self {
        Retry::No(e)
    }
}

impl Run<'_> {
    fn eight_steps(&self, uuid: &DomainUuid, report: &mut Report) -> Result<(), Retry> {
        self.watch.step(1, "settle what an earlier run left");
        self.settle(uuid, report)?;
        failpoint!("1");

        self.watch.step(2, "observe the domain, connect to the target");
        let domain = self.look(uuid, report)?;
        let handed = self.may_run(&domain)?;
        let replica = (self.ports.replica)(uuid)?;
        let view = replica.describe()?;
        let (custody, state) = (self.ports.custody, &self.request.state);
        report.warnings.extend(handover_record::let_back(custody, state, handed.as_ref(), domain.power, &view)?);
        failpoint!("2");

        self.watch.step(3, "plan, reserve space");
        let mut plan = make_plan(self.ports, self.request, &domain, &view)?;
        report.planned(&plan);
        self.ready_to_freeze(&plan)?;
        let described = describe(self.ports, self.request, &domain, &plan, &mut report.warnings)?;
        let begun = replica.begin(&self.begin_request(&domain, &plan))?;
        // From here on nobody waits for the target but through this gate.
        let patience = Patience::of(plan.capture, self.request.handover.is_some());
        let gate = TargetGate::new(replica, patience);
        plan.start_from(&begun.seeds);
        failpoint!("3");
        let bitmaps = Bitmaps { ports: self.ports, request: self.request };
        let untracked = bitmaps.begin(&plan);
        failpoint!("3c");

        let mut guard = self.guard(&plan)?;
        if let Err(e) = self.before_freeze(&plan) {
            abandon(&gate);
            return Err(e.into());
        }
        // The marks are asked while everything stands still, and may change how a disk is read.
        let frozen = plan.clone();
        let mut capture = self.capture(&mut guard, &frozen, &domain);
        if self.stop.load(Ordering::Relaxed) {
            report.warnings.extend(self.after_freeze());
            abandon(&gate);
            return Err(stopped().into());
        }
        self.watch.step(4, "freeze all disks at one instant");
        let still = capture.freeze();
        report.warnings.extend(self.after_freeze());
        let still = match still {
            Ok(still) => still,
            Err(e) => {
                abandon(&gate);
                return Err(self.if_started(&plan, e));
            }
        };
        report.freeze_ms = still.freeze.map_or(0.0, millis);
        report.held_ms = still.held.map(millis);
        report.warnings.extend(label::told(&still));
        report.warnings.extend(untracked);

        let sealed = while_held(self, (&frozen, &still), &gate, || {
            let dirty = bitmaps.marked(&mut plan, &still, gate.cut())?;
            let standing = Standing { run: self, plan: &plan, still: &still, capture: capture.as_ref(), gate: &gate };
            self.ship_and_seal(&standing, &domain, &described, &dirty)
        });
        let (sealed, released) = self.go_home(report, &plan, capture.as_mut(), gate, sealed);
        self.conclude(report, &plan, sealed, released)
    }

    /// The conditions of a freeze. Asks nothing of the target.
    pub(super) fn ready_to_freeze(&self, plan: &Plan) -> Result<()> {
        match plan.refusal() {
            Some(refusal) => Err(refusal),
            None if plan.capture == CaptureKind::Off => Ok(()),
            None => {
                self.journal.check_room()?;
                self.ports.hypervisor.warm_up(&plan.uuid)
            }
        }
    }

    /// Step 3d.
    fn before_freeze(&self, plan: &Plan) -> Result<()> {
        if plan.capture == CaptureKind::Off {
            return Ok(());
        }
        let (domain, target, run) = ((&plan.domain, &plan.uuid), &self.request.target, self.request.run.as_str());
        self.request.hooks.before(self.journal, &|event| freeze_hooks::told(event, domain, target, run))
    }

    /// Step 4g. Returns a warning if the hook failed.
    fn after_freeze(&self) -> Option<String> {
        // The journal still owes a hook that could not be noted: the next run calls it again.
        freeze_hooks::settle(self.journal).unwrap_or_else(|e| Some(e.chain()))
    }

    /// Step 7: whatever became of the point, the domain goes back onto its own images. The quarrel with the target
    /// comes after.
    fn go_home(
        &self,
        report: &mut Report,
        plan: &Plan,
        capture: &mut dyn Capture,
        gate: TargetGate,
        sealed: Result<PointView>,
    ) -> (Result<PointView>, Result<Release>) {
        self.watch.step(7, plan.capture.release_words());
        // The target may have much to put in order before it has given up a point: the guest does not wait for that.
        let given_up = sealed.as_ref().err().and_then(|_| gate.give_up());
        let released = capture.release();
        report.warnings.extend(self.thaw_again(&plan.uuid));
        let (sealed, late) = gate.last_word(sealed, given_up, self.stop);
        if let (Some(_), Ok(point)) = (&late, &sealed) {
            self.name_in_record(point);
        }
        report.warnings.extend(late);
        (sealed, released)
    }

    pub(super) fn capture<'c>(
        &'c self,
        guard: &'c mut Option<Box<dyn PauseGuard>>,
        plan: &'c Plan,
        domain: &'c DomainView,
    ) -> Box<dyn Capture + 'c> {
        let quiescer = Quiescer {
            agent: self.ports.guest,
            journal: self.journal,
            uuid: &plan.uuid,
            wish: plan.quiesce,
            budget: self.request.plan.quiesce.budget,
            can: quiesce::can_hold(domain),
        };
        match (plan.capture, guard.as_mut()) {
            (CaptureKind::Overlay, Some(guard)) => Box::new(OverlayCapture::new(
                self.ports,
                self.journal,
                guard.as_mut(),
                self.request.settle.clone(),
                plan,
                domain,
                (&self.request.run, quiescer),
            )),
            (CaptureKind::Overlay, None) => unreachable!("an overlay is guarded: see Run::guard"),
            (CaptureKind::Backup, guard) => {
                let guard = guard.map(|g| &mut **g as &mut dyn PauseGuard);
                let more = (&self.request.run, guard, quiescer);
                Box::new(BackupCapture::new(self.ports, self.journal, plan, domain, more))
            }
            (CaptureKind::Off, _) => Box::new(OffCapture::new(self.ports.hypervisor, self.ports.clock, plan, domain)),
        }
    }

    /// The dead-man, where a guest may be held, or a job may outlive us.
    pub(super) fn guard(&self, plan: &Plan) -> Result<Option<Box<dyn PauseGuard>>> {
        match plan.capture {
            CaptureKind::Overlay | CaptureKind::Backup => (self.ports.guard)(&plan.uuid).map(Some),
            CaptureKind::Off => Ok(None),
        }
    }

    /// Observes the domain. A guest that an I/O error has stopped is replicated like any other, and reported.
    fn look(&self, uuid: &DomainUuid, report: &mut Report) -> Result<DomainView> {
        let domain = self.ports.hypervisor.observe(uuid)?;
        if let (None, Some(stopped)) = (&report.guest_stopped, stopped::remark(domain.paused)) {
            self.watch.warn(&stopped.why);
            report.warnings.push(stopped.why.clone());
            report.guest_stopped = Some(stopped);
        }
        Ok(domain)
    }

    /// No run goes over a domain that lives elsewhere; that it runs here too is an alarm, whatever else is found out.
    fn may_run(&self, domain: &DomainView) -> Result<Option<HandoverRecord>> {
        let record = handover_record::peek(&self.request.state, &domain.uuid)?;
        if self.request.gives_way && domain.power == Power::Off {
            return Ok(None);
        }
        record.iter().filter_map(|r| r.alarm(domain.power)).for_each(|alarm| self.alarm(alarm));
        handover_record::may_run(record, domain.power, &self.request.target, self.request.handover.as_ref())
    }

    /// Step 1, and all that is needed after any crash.
    fn settle(&self, uuid: &DomainUuid, report: &mut Report) -> Result<()> {
        let (_, account, left_open) = settle_domain(self.ports, self.journal, uuid, &self.request.settle)?;
        report.warnings.extend(account.alarms);
        report.guest_stopped = account.stopped;
        match left_open {
            None => Ok(()),
            Some(what) => Err(Error::new(Kind::Conflict, format!("an earlier run could not be settled: {what}"))
                .advise(advice::Repair::Explain)),
        }
    }

    fn begin_request(&self, domain: &DomainView, plan: &Plan) -> BeginPoint {
        BeginPoint {
            uuid: domain.uuid.clone(),
            name: domain.name.clone(),
            run: self.request.run.clone(),
            generation: plan.generation,
            expected_head: plan.head.clone(),
            disks: plan
                .replicated()
                .map(|d| BeginDisk {
                    name: d.name.clone(),
                    size: d.size,
                    fresh: d.head.is_none(),
                    reserve_bytes: d.reserve_bytes,
                    resume: d.head.is_none() && !self.request.plan.full,
                    repair: d.repairs.is_some(),
                })
                .collect(),
        }
    }

    /// Steps 5 and 6.
    fn ship_and_seal(
        &self,
        standing: &Standing,
        domain: &DomainView,
        described: &Described,
        dirty: &Marked,
    ) -> Result<PointView> {
        self.watch.step(5, "read, compare, send");
        let Standing { plan, still, capture, gate, .. } = *standing;
        let mut disks = Vec::new();
        for disk in &still.disks {
            let name = &disk.0;
            let dirty = dirty.get(name).cloned();
            let planned = plan.disk(name);
            let shipped = standing.read_disk(disk, dirty, &mut |image, shipment, progress, good| {
                let shipment = unless_cut(image, gate, shipment)?;
                let audit = planned.and_then(|d| d.audit.as_ref());
                let audited = audit::audited((image, gate), &shipment, audit, &self.request.run, good)?;
                audited.alarm.into_iter().for_each(|lie| self.alarm(lie));
                let (shipment, audit) = (audited.shipment, audited.stats);
                let tracking_doubt = planned.is_some_and(|d| d.tracking_doubt || d.mode != shipment.mode);
                let shipped = pump::ship(image, gate, &shipment, progress, good)?;
                let stats = DiskStats { audit, tracking_doubt, ..shipped.stats };
                Ok(SealDisk { name: name.clone(), root: shipped.root, stats })
            });
            disks.push(shipped.on_disk(name)?);
        }
        attach(self.ports.hypervisor, gate, domain, described)?;
        failpoint!("5f");
        capture.confirm()?;
        self.watch.step(6, "seal the point");
        let point = gate.seal(&SealPoint {
            frozen_at: still.frozen_at,
            consistency: still.consistency,
            consistency_reason: still.consistency_reason.clone(),
            autostart: starts_with_host(self.ports.custody, &self.request.state, domain),
            tpm_programs: tpm_programs(domain),
            disks,
            left_out: plan.skipped.clone(),
        })?;
        failpoint!("6f");
        self.name_in_record(&point);
        failpoint!("6g");
        Ok(point)
    }

    /// For people who read the record: the point is sealed whether or not this can be written.
    fn name_in_record(&self, point: &PointView) {
        let named = self.journal.record().and_then(|record| match record {
            Some(record) => self.journal.write(&Record { point: Some(point.id.clone()), ..record }),
            None => Ok(()),
        });
        if let Err(e) = named {
            tracing::warn!("the record does not name the point that was sealed: {}", e.chain());
        }
    }

    fn if_started(&self, plan: &Plan, e: Error) -> Retry {
        if plan.capture == CaptureKind::Off && e.kind() == Kind::Interrupted && !self.stop.load(Ordering::Relaxed) {
            Retry::StartedMeanwhile
        } else {
            Retry::No(e)
        }
    }

    /// A guest agent that did not let go at the freeze is asked once more, and what it leaves held is said.
    fn thaw_again(&self, uuid: &DomainUuid) -> Option<String> {
        match quiesce::settle(self.ports.hypervisor, self.ports.guest, self.journal, uuid) {
            Ok(Settled::Silent(alarm)) => Some(alarm),
            Ok(Settled::Nothing | Settled::LetGo) => None,
            Err(e) => Some(format!("whether the guest is held could not be found out: {}", e.chain())),
        }
    }

    /// Step 8, and the verdict.
    fn conclude(
        &self,
        report: &mut Report,
        plan: &Plan,
        sealed: Result<PointView>,
        released: Result<Release>,
    ) -> Result<(), Retry> {
        self.watch.step(8, "retire what is superseded, report");
        let mut left_open = None;
        let settled = matches!(&released, Ok(r) if r.left_open.is_none());
        match released {
            Ok(release) => {
                report.paused(release.account.pauses);
                report.warnings.extend(release.account.alarms);
                report.guest_stopped = release.account.stopped.or(report.guest_stopped.take());
                left_open = release.left_open;
            }
            Err(e) => {
                let text = format!("the domain could not be brought back onto its own images: {}", e.chain());
                match sealed {
                    Ok(_) => left_open = Some(text),
                    Err(ref first) => tracing::error!("{text} (after: {})", first.chain()),
                }
            }
        }
        if let Some(what) = &left_open {
            self.watch.warn(what);
            report.warnings.push(what.clone());
        }
        if settled {
            Bitmaps { ports: self.ports, request: self.request }.retire(report, plan, sealed.is_ok());
        }
        failpoint!("8b");
        let point = sealed.map_err(|e| self.if_started(plan, e))?;
        report.warnings.extend(doubted_again(plan, &point));
        report.warnings.extend(plan.disks.iter().filter_map(DiskPlan::repaired));
        report.point = Some(point);
        report.outcome = if left_open.is_some() { RunOutcome::CommitPending } else { RunOutcome::Sealed };
        Ok(())
    }
}

fn abandon(replica: &dyn Replica) {
    if let Err(e) = replica.abandon() {
        // It is rubbish by definition; the next run throws it away.
        tracing::debug!("cannot abandon the open point: {}", e.chain());
    }
}
