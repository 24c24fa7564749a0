//! One run of one domain. This page is the whole story; every other file of the crate is a word in it.
//!
//! 1. **settle**: finish or undo what an earlier run left behind, by the same code as step 7
//! 2. **observe**: the domain and its disks; connect to the target, read the replica's head and generation
//! 3. **plan**: per disk how its changes are found, with a reason; or a conflict. Reserve space at the target
//! 4. **freeze**: record the intent durably, arm the dead-man, put overlays over all disks in one transaction; or
//!    begin a backup job, which needs no commit ([`backup`](super::backup))
//! 5. **ship**: read the frozen images, compare, send; the target writes into an open, unnamed point
//! 6. **seal**: everything durable at the target, then the manifest names the point: *now it exists*
//! 7. **commit**: each overlay into its base, then pause, pivot, rename the overlay away, resume
//! 8. **retire**: drop what is superseded, write the report
//!
//! What holds at every moment, whatever is killed (all of it with tests: docs/replication.md):
//!
//! - The production guest comes first: 7 happens even if 5 or 6 failed.
//! - No overlay exists without an earlier durable record that lets any later run finish (I1); only our own layer is ever
//!   committed, and only if the chain is the recorded one (I4).
//! - The guest is never held: every pause is bounded by a dead-man that outlives this process (I2).
//! - Between the pivot and the durable end of the overlay's name the guest runs nothing (I3).
//! - A point is all disks of one instant and exists if and only if the manifest names it (I9, I10).
//! - A dead or full target never costs an overlay: 2 and 3 come before 4.

use super::backup::BackupCapture;
use super::capture::{Capture, OffCapture, OverlayCapture, Source, Still};
use super::demoted::{self, HandoverRecord};
use super::freeze_hooks::FreezeHooks;
use super::journal::Journal;
pub use super::leftover::{record_in_domain, settle_domain};
use super::marks::{Marked, doubted_again, unless_cut};
use super::observe;
use super::plan::{CaptureKind, DiskPlan, Plan, PlanOptions};
use super::pump::{self, Progress, Shipment};
use super::quiesce::{self, Quiescer, Settled};
use super::report::{Report, RunOutcome, millis};
use super::room::RoomWatch;
use super::settle::{PauseGuard, SettleOptions};
use super::stopped;
use super::survey::make_plan;
use super::throttle::Throttle;
use crate::block::ByteRange;
use crate::error::{Error, Kind, Result, ResultExt};
use crate::failpoint;
use crate::hypervisor::custody::Custody;
use crate::hypervisor::guest::GuestAgent;
use crate::hypervisor::{Backups, DomainView, Hypervisor, Power, Tracking};
use crate::image::open::{OpenOptions, Opened};
use crate::image::{Chain, Image};
use crate::name::{DiskName, DomainUuid, RunId};
use crate::patch::Compression;
use crate::replica::{BeginDisk, BeginPoint, DiskStats, Mode, PointView, Replica, SealDisk, SealPoint};
use jiff::Timestamp;
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// The world as a run sees it: ports only. Adapters are chosen in `site`.
pub struct Ports<'a> {
    pub hypervisor: &'a dyn Hypervisor,
    /// The bitmaps of a running domain.
    pub tracking: &'a dyn Tracking,
    /// Those that lie in the images of a domain that is off.
    pub stored: &'a dyn Tracking,
    /// The guest agent of a running domain.
    pub guest: &'a dyn GuestAgent,
    /// A domain that was handed to its target and comes back.
    pub custody: &'a dyn Custody,
    /// Backup jobs of a running domain.
    pub backups: &'a dyn Backups,
    /// Connects to the replica of a domain on the target.
    pub replica: &'a dyn Fn(&DomainUuid) -> Result<Box<dyn Replica>>,
    /// Starts a dead-man for a domain.
    pub guard: &'a dyn Fn(&DomainUuid) -> Result<Box<dyn PauseGuard>>,
    /// Opens a chain for reading.
    pub open_image: &'a dyn Fn(&Chain, &OpenOptions) -> Result<Opened>,
    /// Opens an export on a unix socket for reading.
    pub open_export: &'a dyn Fn(&Path, &str, &OpenOptions) -> Result<Opened>,
    /// Says how a chain would be read, and why.
    pub explain_image: &'a dyn Fn(&Chain) -> Result<String>,
    pub clock: &'a (dyn Fn() -> Timestamp + Sync),
}

/// What to do.
#[derive(Debug, Clone)]
pub struct Request {
    /// Name, UUID or id of the domain.
    pub domain: String,
    /// The target's canonical URL: in reports, and the key of its dirty bitmaps.
    pub target: String,
    pub run: RunId,
    pub state: PathBuf,
    pub plan: PlanOptions,
    pub settle: SettleOptions,
    pub open: OpenOptions,
    /// Keep secrets (graphics passwords) in the definitions that travel with the point.
    pub with_secrets: bool,
    pub workers: usize,
    pub compression: Compression,
    /// How fast the run may send; `None`: as fast as it goes.
    pub throttle: Option<Arc<Throttle>>,
    pub hooks: FreezeHooks,
    /// The handover that this run belongs to.
    pub handover: Option<RunId>,
    /// The domain lives elsewhere, and what is here becomes a point of this host's own store; only while it is off.
    pub gives_way: bool,
}

/// Told what happens while it happens. Called from several threads.
pub trait Watch: Sync {
    /// A step of the run begins, by its number in docs/replication.md.
    fn step(&self, number: u8, what: &str);
    /// A disk is about to be read; `progress` counts from now on.
    fn disk(&self, name: &DiskName, size_bytes: u64, mode: Mode, progress: &Arc<Progress>);
    /// Called now and then while a disk is read.
    fn tick(&self);
    fn warn(&self, text: &str);
}

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
        duration_ms: 0.0,
        skipped: Vec::new(),
        alarms: Vec::new(),
        guest_stopped: None,
        warnings: Vec::new(),
        target_seen: None,
        error: None,
        error_kind: None,
    };
    let run = Run::new(ports, request, watch, stop, &journal);
    let mut result = run.eight_steps(&found.uuid, &mut report);
    for _ in 1..STARTS_MAX {
        match &result {
            Err(Retry::StartedMeanwhile) => {
                watch.warn("the domain was started while it was read as shut off: starting over as for a running one");
                result = run.eight_steps(&found.uuid, &mut report);
            }
            _ => break,
        }
    }
    report.duration_ms = millis(started.elapsed());
    report.alarms = run.alarms.take();
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
    journal.keep_report(&report)?;
    failpoint!("8c");
    Ok((report, error))
}

/// What is done with a frozen image while it is open.
type ReadDisk<'a, T> = &'a mut dyn FnMut(&dyn Image, &Shipment, &Progress, pump::StillGood) -> Result<T>;

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

/// One run while it lasts.
pub(super) struct Run<'a> {
    pub(super) ports: &'a Ports<'a>,
    pub(super) request: &'a Request,
    pub(super) watch: &'a dyn Watch,
    pub(super) stop: &'a AtomicBool,
    pub(super) journal: &'a Journal,
    /// What must not be lost, however the run ends.
    alarms: RefCell<Vec<String>>,
}

impl<'a> Run<'a> {
    pub(super) fn new(
        ports: &'a Ports<'a>,
        request: &'a Request,
        watch: &'a dyn Watch,
        stop: &'a AtomicBool,
        journal: &'a Journal,
    ) -> Self {
        Self { ports, request, watch, stop, journal, alarms: RefCell::default() }
    }

    /// Something that an operator must learn of: said at once, and kept for the report, whether or not a point is made.
    pub(super) fn alarm(&self, text: String) {
        self.watch.warn(&text);
        self.alarms.borrow_mut().push(text);
    }

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
        report.warnings.extend(demoted::let_back(custody, state, handed.as_ref(), domain.power, &view)?);
        failpoint!("2");

        self.watch.step(3, "plan, reserve space");
        let mut plan = make_plan(self.ports, self.request, &domain, &view)?;
        report.skipped = plan.skipped.clone();
        (report.capture, report.capture_reason) = (Some(plan.capture), Some(plan.capture_reason.clone()));
        if let Some(refusal) = plan.refusal() {
            return Err(refusal.into());
        }
        let begun = replica.begin(&self.begin_request(&domain, &plan))?;
        plan.start_from(&begun.seeds);
        failpoint!("3");
        let untracked = self.begin_bitmaps(&plan);
        failpoint!("3c");

        let mut guard = self.guard(&plan)?;
        if let Err(e) = self.before_freeze(&plan) {
            abandon(replica.as_ref());
            return Err(e.into());
        }
        // The marks are asked while everything stands still, and may change how a disk is read.
        let frozen = plan.clone();
        let mut capture = self.capture(&mut guard, &frozen, &domain);
        if self.stop.load(Ordering::Relaxed) {
            report.warnings.extend(self.after_freeze());
            abandon(replica.as_ref());
            return Err(stopped().into());
        }
        self.watch.step(4, "freeze all disks at one instant");
        let still = capture.freeze();
        report.warnings.extend(self.after_freeze());
        let still = match still {
            Ok(still) => still,
            Err(e) => {
                abandon(replica.as_ref());
                return Err(self.if_started(&plan, e));
            }
        };
        report.freeze_ms = still.freeze.map_or(0.0, millis);
        report.held_ms = still.held.map(millis);
        let unheld = still.consistency_reason.iter().map(|why| format!("the point is as after a power cut: {why}"));
        report.warnings.extend(unheld);
        let dirty = self.marked(&mut plan, &still);
        report.warnings.extend(untracked);

        // Whatever becomes of the point, the domain goes back onto its own images.
        let sealed = self.ship_and_seal(replica.as_ref(), &domain, &plan, &still, &dirty, capture.as_ref());
        self.watch.step(7, plan.capture.release_words());
        let released = std::thread::scope(|scope| {
            // The target may have much to put in order before it has given up a point: the guest does not wait for that.
            if sealed.is_err() {
                scope.spawn(|| abandon(replica.as_ref()));
            }
            capture.release()
        });
        drop(replica);
        self.conclude(report, &plan, sealed, released)
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
            (CaptureKind::Off, _) => Box::new(OffCapture::new(self.ports.hypervisor, self.ports.clock, plan)),
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
        let record = demoted::peek(&self.request.state, &domain.uuid)?;
        if self.request.gives_way && domain.power == Power::Off {
            return Ok(None);
        }
        record.iter().filter_map(|r| r.alarm(domain.power)).for_each(|alarm| self.alarm(alarm));
        demoted::may_run(record, domain.power, &self.request.target, self.request.handover.as_ref())
    }

    /// Step 1, and all that is needed after any crash.
    fn settle(&self, uuid: &DomainUuid, report: &mut Report) -> Result<()> {
        let (_, account, left_open) = settle_domain(self.ports, self.journal, uuid, &self.request.settle)?;
        report.warnings.extend(account.alarms);
        report.guest_stopped = account.stopped;
        match left_open {
            None => Ok(()),
            Some(what) => Err(Error::new(Kind::Conflict, format!("an earlier run could not be settled: {what}"))
                .hint("run `virt-replica doctor` for what was found and what to do")),
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
        replica: &dyn Replica,
        domain: &DomainView,
        plan: &Plan,
        still: &Still,
        dirty: &Marked,
        capture: &dyn Capture,
    ) -> Result<PointView> {
        self.watch.step(5, "read, compare, send");
        let mut disks = Vec::new();
        for disk in &still.disks {
            let name = &disk.0;
            let dirty = dirty.get(name).cloned();
            let planned = plan.disk(name);
            let shipped = self.read_disk(plan, still, capture, disk, dirty, &mut |image, shipment, progress, good| {
                let shipment = unless_cut(image, replica, shipment)?;
                let audit = planned.and_then(|d| d.audit.as_ref());
                let (shipment, audit) = self.audited(image, replica, &shipment, audit, good)?;
                let tracking_doubt = planned.is_some_and(|d| d.tracking_doubt || d.mode != shipment.mode);
                let shipped = pump::ship(image, replica, &shipment, progress, good)?;
                let stats = DiskStats { audit, tracking_doubt, ..shipped.stats };
                Ok(SealDisk { name: name.clone(), root: shipped.root, stats })
            });
            disks.push(shipped.on_disk(name)?);
        }
        self.attach(replica, domain)?;
        failpoint!("5f");
        capture.confirm()?;
        self.watch.step(6, "seal the point");
        let point = replica.seal(&SealPoint {
            frozen_at: still.frozen_at,
            consistency: still.consistency,
            consistency_reason: still.consistency_reason.clone(),
            autostart: self.starts_with_host(domain),
            disks,
        })?;
        failpoint!("6f");
        if let Some(mut record) = self.journal.record()? {
            record.point = Some(point.id.clone());
            self.journal.write(&record)?;
        }
        failpoint!("6g");
        Ok(point)
    }

    /// Opens a frozen image, lets `read` work on it, and closes it however that ended: it must be closed before the
    /// commit starts.
    pub(super) fn read_disk<T>(
        &self,
        plan: &Plan,
        still: &Still,
        capture: &dyn Capture,
        (name, source): &(DiskName, Source),
        dirty: Option<Vec<ByteRange>>,
        read: ReadDisk<T>,
    ) -> Result<T> {
        let planned = plan.disk(name).expect("what was frozen was planned");
        let options = OpenOptions { force_share: still.may_start, ..self.request.open.clone() };
        let opened = match source {
            Source::Chain(chain) => (self.ports.open_image)(chain, &options)?,
            Source::Export { socket, name } => (self.ports.open_export)(socket, name, &options)?,
        };
        if opened.image.size() != planned.size {
            let (was, is) = (planned.size, opened.image.size());
            return Err(Error::new(Kind::Busy, format!("the disk was resized meanwhile, from {was} to {is} bytes"))
                .hint("run again"));
        }
        failpoint!("5a");
        let shipment = Shipment {
            uuid: plan.uuid.clone(),
            disk: name.clone(),
            size: planned.size,
            head: planned.head,
            mode: planned.mode,
            reason: planned.reason.clone(),
            dirty,
            compare_only: false,
            workers: self.request.workers,
            compression: self.request.compression,
            throttle: self.request.throttle.clone(),
        };
        let progress = Arc::new(Progress::default());
        self.watch.disk(name, planned.size.0, planned.mode, &progress);
        let room = RoomWatch::new(plan, &self.request.run, &self.request.plan.space);
        let age = || (self.ports.clock)().duration_since(still.frozen_at);
        let still_good = || {
            self.watch.tick();
            failpoint!("5b");
            if self.stop.load(Ordering::Relaxed) {
                return Err(stopped());
            }
            room.check(&age)?;
            capture.check()
        };
        let result = read(opened.image.as_ref(), &shipment, &progress, &still_good);
        let closed = opened.close();
        let result = result?;
        closed?;
        Ok(result)
    }

    fn if_started(&self, plan: &Plan, e: Error) -> Retry {
        if plan.capture == CaptureKind::Off && e.kind() == Kind::Interrupted && !self.stop.load(Ordering::Relaxed) {
            Retry::StartedMeanwhile
        } else {
            Retry::No(e)
        }
    }

    /// Step 8, and the verdict.
    fn conclude(
        &self,
        report: &mut Report,
        plan: &Plan,
        sealed: Result<PointView>,
        released: Result<super::capture::Release>,
    ) -> Result<(), Retry> {
        self.watch.step(8, "retire what is superseded, report");
        // A guest agent that did not let go at the freeze is asked once more, and what it leaves held is said.
        match quiesce::settle(self.ports.hypervisor, self.ports.guest, self.journal, &plan.uuid) {
            Ok(Settled::Silent(alarm)) => report.warnings.push(alarm),
            Ok(Settled::Nothing | Settled::LetGo) => {}
            Err(e) => report.warnings.push(format!("whether the guest is held could not be found out: {}", e.chain())),
        }
        let mut left_open = None;
        let settled = matches!(&released, Ok(r) if r.left_open.is_none());
        match released {
            Ok(release) => {
                report.pause_ms = release.account.pause.map_or(report.pause_ms, millis);
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
            self.retire_bitmaps(report, plan, sealed.is_ok());
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

fn stopped() -> Error {
    Error::new(Kind::Interrupted, "stopped by a signal")
}
