//! A planned failover and a migration, with the adapters of this host as their ports.

use super::{Connection, Site};
use crate::error::{Error, Kind, Result, advice};
use crate::hypervisor::{DiskKind, DiskView, DomainView, Hypervisor as _, Power};
use crate::name::{DiskName, DomainUuid, RunId};
use crate::recovery::bringup::{BringUp, Coming, refuse_red};
use crate::recovery::failback::{self, CameHome};
use crate::recovery::handover::{self, HandoverRecord, HandoverState, Look, Ports, Sent};
use crate::recovery::migrate;
use crate::replica::Replica as _;
use crate::replicate::cycle::{Request, Watch};
use crate::replicate::plan::capture_choice::CaptureKind;
use crate::replicate::plan::conflict::Conflict;
use crate::replicate::plan::skip_reason;
use crate::replicate::state::handover_record::{self, Stage};
use crate::replicate::state::report::Report;
use crate::wiring::local_target::Here;
use jiff::Timestamp;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// What a handover is done with: the way there, how its runs are made, and who is told.
pub struct Means<'a> {
    /// Its agent brings domains up, or refuses.
    pub target: &'a Connection,
    /// Of every run; each gets an id of its own.
    pub runs: &'a Request,
    /// Draws the id of a new run.
    pub new_run: &'a dyn Fn() -> Result<RunId>,
    /// Told how each run goes on.
    pub watch: &'a dyn Watch,
    /// Told what the handover does now, in words.
    pub say: &'a dyn Fn(&str),
    /// Becomes true when a signal came. It is heeded until the target is asked.
    pub stop: &'a AtomicBool,
}

impl Means<'_> {
    fn request(&self, handover: Option<&RunId>) -> Result<Request> {
        Ok(Request { run: (self.new_run)()?, handover: handover.cloned(), ..self.runs.clone() })
    }
}

impl Site {
    /// See [`handover::over`].
    pub fn hand_over(&self, means: &Means, request: &handover::Request) -> Result<handover::Report> {
        let state = HandoverState::open(self.state(), &request.uuid)?;
        self.with_handover(means, &request.uuid, |ports| handover::over(ports, &state, request))
    }

    /// See [`handover::back`].
    pub fn call_off(&self, means: &Means, uuid: &DomainUuid, lose_its_writes: bool) -> Result<HandoverRecord> {
        let state = HandoverState::open(self.state(), uuid)?;
        self.with_handover(means, uuid, |ports| handover::back(ports, &state, lose_its_writes))
    }

    /// See [`handover::settle`]: no target is needed for it.
    pub fn settle_handover(&self, uuid: &DomainUuid) -> Result<Option<HandoverRecord>> {
        let state = HandoverState::open(self.state(), uuid)?;
        let never = || Error::new(Kind::Usage, "this needs a target");
        handover::settle(
            &Ports {
                machines: self.hypervisor(),
                custody: self.hypervisor(),
                look: &|| Err(never()),
                run: &|_| Err(never()),
                preflight: &|_| Err(never()),
                head: &|| Err(never()),
                there: &|| Err(never()),
                clock: &Timestamp::now,
                sleep: &std::thread::sleep,
                say: &|_| {},
                stop: &AtomicBool::new(false),
            },
            &state,
        )
    }

    /// See [`migrate::run`].
    pub fn migrate(&self, means: &Means, request: &migrate::Request, ui: &migrate::Ui) -> Result<migrate::Report> {
        let uuid = &request.handover.uuid;
        let state = HandoverState::open(self.state(), uuid)?;
        let round = || -> Result<migrate::Ran> {
            let report = self.run_once(means, None)?;
            // What the guest has written since is a help to foretell, and no more.
            let plan = self.plan(means.target, &means.request(None)?).ok();
            Ok(migrate::Ran::of(&report, plan.as_ref(), Timestamp::now()))
        };
        self.with_handover(means, uuid, |ports| {
            migrate::run(&migrate::Ports { handover: ports, round: &round, ui }, &state, request)
        })
    }

    /// See [`failback::run`]. `here`: this host as the target that the domain goes home from.
    pub fn fail_back(
        &self,
        here: &Here,
        means: &Means,
        request: &handover::Request,
        keep_undo: bool,
    ) -> Result<CameHome> {
        let home =
            || -> Result<Box<dyn BringUp>> { Ok(Box::new(means.target.client_again()?.bring_up(&request.uuid))) };
        let handed = handover_record::peek(self.state(), &request.uuid)?;
        failback::run(
            &failback::Ports {
                home: &home,
                coming: &|| self.coming(means, &request.uuid),
                hand_over: &|| self.hand_over(means, request),
                hand_back: &|generation| here.hand_back(&request.uuid, generation, means.say),
                handed_over: handed.is_some_and(|r| r.stage == Stage::Moved && r.to == request.to),
                say: means.say,
            },
            keep_undo,
        )
        .map_err(|e| e.domain(&request.domain))
    }

    fn with_handover<T>(&self, means: &Means, uuid: &DomainUuid, act: impl FnOnce(&Ports) -> Result<T>) -> Result<T> {
        let look = || -> Result<Look> {
            let view = self.hypervisor().observe(uuid)?;
            leaves_no_disk_behind(&view, &means.runs.plan.exclude_disks)?;
            Ok(Look { persistent: view.persistent, managed_save: view.managed_save, guest_agent: view.guest_agent })
        };
        let run = |handover: Option<&RunId>| self.run_once(means, handover).and_then(sent);
        let head = || -> Result<Option<Timestamp>> {
            let view = means.target.client_again()?.open(uuid)?.describe()?;
            Ok(view.head().map(|point| point.as_of()))
        };
        let there = || -> Result<Box<dyn BringUp>> { Ok(Box::new(means.target.client_again()?.bring_up(uuid))) };
        let preflight = |there: &dyn BringUp| self.preflight(means, uuid, there);
        act(&Ports {
            preflight: &preflight,
            machines: self.hypervisor(),
            custody: self.hypervisor(),
            look: &look,
            run: &run,
            head: &head,
            there: &there,
            clock: &Timestamp::now,
            sleep: &|time: Duration| std::thread::sleep(time),
            say: means.say,
            stop: means.stop,
        })
    }

    /// See [`Ports::preflight`](handover::Ports::preflight).
    fn preflight(&self, means: &Means, uuid: &DomainUuid, there: &dyn BringUp) -> Result<()> {
        means.target.client_again()?;
        let mut plan = self.plan(means.target, &means.request(None)?)?;
        plan.conflicts.retain(stays_when_off);
        if let Some(refusal) = plan.refusal() {
            return Err(refusal);
        }
        match there.ready_for(&self.coming(means, uuid)?) {
            // An agent that does not know the question has judged the newest point, and that has to do.
            Err(e) if e.kind() == Kind::Protocol => {
                tracing::debug!("the target judges points only: {}", e.chain());
                Ok(())
            }
            findings => refuse_red(&findings?, &means.runs.target),
        }
    }

    /// The domain as its next run would bring it.
    fn coming(&self, means: &Means, uuid: &DomainUuid) -> Result<Coming> {
        let hypervisor = self.hypervisor();
        let view = hypervisor.observe(uuid)?;
        let wish = &means.runs.plan;
        Ok(Coming {
            definition: hypervisor.definition(uuid, view.persistent, false)?,
            disks: view.disks.iter().filter(|d| skip_reason(d, wish).is_none()).map(|d| d.name.clone()).collect(),
            nvram: view.nvram.as_ref().is_some_and(|path| path.exists()),
            tpm: view.tpm.as_ref().is_some_and(|path| path.exists()),
            name: view.name,
        })
    }

    /// One run that has to lead to a point.
    fn run_once(&self, means: &Means, handover: Option<&RunId>) -> Result<Report> {
        // The runs before may have taken hours: the session of then need not be there any more.
        means.target.client_again()?;
        let (report, error) = self.sync(means.target, &means.request(handover)?, means.watch, means.stop)?;
        match error {
            Some(e) => Err(e),
            None => Ok(report),
        }
    }
}

/// Whether the last run, of a domain that is off, would meet it too: that one makes no overlay and holds no guest.
fn stays_when_off(conflict: &Conflict) -> bool {
    !matches!(
        conflict,
        Conflict::BlockJob { .. }
            | Conflict::DomainJob { .. }
            | Conflict::NoOverlaySpace { .. }
            | Conflict::NoOverlayDir { .. }
            | Conflict::CannotQuiesce { .. }
            | Conflict::Hindered(_)
    )
}

/// A disk that only the running instance has goes when the guest is shut down: the last run, of a domain that is off,
/// would not have it.
fn leaves_no_disk_behind(view: &DomainView, excluded: &[DiskName]) -> Result<()> {
    let runs = view.persistent && view.power != Power::Off;
    let lost = |d: &&DiskView| d.kind == DiskKind::Image && d.inactive.is_none() && !excluded.contains(&d.name);
    match view.disks.iter().find(|d| runs && lost(d)) {
        None => Ok(()),
        Some(disk) => Err(Error::new(
            Kind::Conflict,
            "the disk is attached to the running instance only: it would be gone when the guest is shut down",
        )
        .disk(&disk.name)
        .domain(&view.name)
        .advise(advice::Run::DefineDisk)),
    }
}

fn sent(report: Report) -> Result<Sent> {
    let point = report.point.ok_or_else(|| Error::new(Kind::Io, "the run told of no point"))?;
    Ok(Sent {
        off: report.capture == Some(CaptureKind::Off),
        bytes: point.disks.iter().fold(0, |sum: u64, d| sum.saturating_add(d.stats.bytes_sent)),
        frozen_at: point.frozen_at,
        point: point.id,
        warnings: report.alarms.into_iter().chain(report.warnings).collect(),
    })
}
