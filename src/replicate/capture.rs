//! Three ways to make a domain's disks stand still while they are read, behind one trait: an overlay over each disk of
//! a running domain, a backup job that serves them as they were ([`backup`]), or
//! nothing but attention for a domain that is off.

pub mod backup;
pub mod freeze_hooks;
pub(super) mod held;
pub mod names;
pub mod quiesce;
pub(crate) mod space_watch;
pub mod still;

use super::settle::{Goal, Outcome, Settler};
use crate::error::{Error, Kind, Result, advice};
use crate::failpoint;
use crate::file_id::Stamp;
use crate::hypervisor::{DomainView, FreezeDisk, Hypervisor, Power};
use crate::image::{Chain, qemu_img};
use crate::name::{DiskName, DomainUuid, RunId};
use crate::replica::Consistency;
use crate::replicate::capture::names::overlay_path;
use crate::replicate::capture::quiesce::Quiescer;
use crate::replicate::capture::still::{Capture, Frozen, Release, Source};
use crate::replicate::plan::label;
use crate::replicate::plan::planned::{DiskPlan, Plan};
use crate::replicate::run::Ports;
use crate::replicate::settle::account::Account;
use crate::replicate::settle::decide::{Job, Phase, Stand, Under};
use crate::replicate::settle::guard::PauseGuard;
use crate::replicate::settle::halts::halt_error;
use crate::replicate::settle::observe::observe;
use crate::replicate::settle::options::SettleOptions;
use crate::replicate::settle::stopped::{self, StoppedWatch};
use crate::replicate::state::journal::{Journal, boot_id};
use crate::replicate::state::record::{DiskRecord, Record};
use jiff::Timestamp;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// From so many disks on the overlays are made before the freeze call, whoever holds the guest meanwhile.
const PREPARED_FROM: usize = 4;

/// Hard bound of the freeze call.
const FREEZE_WITHIN: Duration = Duration::from_secs(10);

/// Overlays over a running (or paused) domain's disks.
pub struct OverlayCapture<'a> {
    hypervisor: &'a dyn Hypervisor,
    journal: &'a Journal,
    guard: &'a mut dyn PauseGuard,
    options: SettleOptions,
    clock: &'a (dyn Fn() -> Timestamp + Sync),
    quiescer: Quiescer<'a>,
    record: Record,
    /// What was planned to stand still, in the record's order.
    planned: Vec<Chain>,
    stopped: StoppedWatch,
}

impl<'a> OverlayCapture<'a> {
    /// Prepares the record and the names of the overlays. Touches neither the domain nor any file.
    pub fn new(
        ports: &'a Ports<'a>,
        journal: &'a Journal,
        guard: &'a mut dyn PauseGuard,
        options: SettleOptions,
        plan: &Plan,
        domain: &DomainView,
        (run, quiescer): (&RunId, Quiescer<'a>),
    ) -> Self {
        let disks = plan.replicated().map(|d| new_disk_record(d, run, domain)).collect();
        let record = Record {
            format: 1,
            run: run.clone(),
            domain: domain.name.clone(),
            uuid: domain.uuid.clone(),
            instance: domain.id,
            boot: boot_id(),
            persistent: domain.persistent,
            phase: Phase::FreezeIntent,
            resume_after: false,
            ran: domain.power == Power::Running,
            commit_denied: None,
            disks,
            started_at: (ports.clock)(),
            frozen_at: None,
            point: None,
        };
        let planned = plan.replicated().map(|d| d.chain.clone()).collect();
        let stopped = StoppedWatch::new(record.ran);
        let (hypervisor, clock) = (ports.hypervisor, ports.clock);
        Self { hypervisor, journal, guard, options, clock, quiescer, record, planned, stopped }
    }

    /// The steps of the freeze; a failure is cleaned up by the caller through the settle loop.
    fn freeze_steps(&mut self) -> Result<Frozen> {
        for disk in &self.record.disks {
            if Stamp::of(&disk.overlay)?.is_some() {
                return Err(Error::new(Kind::Conflict, "a file with the new overlay's name exists already")
                    .path(&disk.overlay)
                    .disk(&disk.name));
            }
        }
        // Steps 4a and 4b: no overlay without an earlier durable record, here and in the domain itself (I1).
        self.journal.write(&self.record)?;
        failpoint!("4a");
        let text = serde_json::to_string(&self.record).expect("a record is plain data");
        self.hypervisor.set_record(&self.record.uuid, Some(&text))?;
        failpoint!("4b");
        let prepared = self.quiescer.will_ask() || self.record.disks.len() >= PREPARED_FROM;
        if prepared {
            self.prepare_overlays()?;
        }
        self.guard.arm(FREEZE_WITHIN)?;
        failpoint!("4c");
        let held = self.quiescer.hold(self.guard)?;

        let frozen_at = (self.clock)();
        let start = Instant::now();
        let disk = |d: &DiskRecord| FreezeDisk {
            name: d.name.clone(),
            overlay: d.overlay.clone(),
            over: d.base.path.clone(),
            prepared,
        };
        let disks: Vec<FreezeDisk> = self.record.disks.iter().map(disk).collect();
        let frozen = self.hypervisor.freeze(&self.record.uuid, &disks);
        let freeze = start.elapsed();
        if frozen.is_ok() {
            failpoint!("4d");
        }
        // The guest first, whatever became of the freeze.
        let thawed = self.quiescer.release(held);
        frozen?;
        failpoint!("4d.thawed");

        let chains = self.verify_frozen(frozen_at)?;
        failpoint!("4e");
        self.guard.disarm()?;
        failpoint!("4f");
        Ok(Frozen {
            disks: chains,
            frozen_at,
            consistency: thawed.consistency,
            consistency_reason: thawed.why_not,
            held: thawed.held,
            freeze: Some(freeze),
            may_start: false,
        })
    }

    /// So that the guest's file systems are held for the transaction only, and not while files are made; and so that
    /// the freeze of many disks stays far below its bound. libvirt has QEMU make each overlay with several jobs in a
    /// row.
    fn prepare_overlays(&self) -> Result<()> {
        for disk in &self.record.disks {
            qemu_img::create_overlay(&disk.overlay, &disk.base, disk.size).map_err(|e| e.disk(&disk.name))?;
        }
        Ok(())
    }

    /// Step 4e: every disk is on its overlay, over exactly the image that was planned; record what stands still.
    fn verify_frozen(&mut self, frozen_at: Timestamp) -> Result<Vec<(DiskName, Source)>> {
        let seen = observe(self.hypervisor, &self.record)?;
        let domain = seen
            .domain
            .as_ref()
            .ok_or_else(|| Error::new(Kind::Interrupted, "the domain ended while it was frozen"))?;
        let mut chains = Vec::new();
        let planned = self.record.disks.iter_mut().zip(&self.planned);
        for ((disk, planned), (_, _, disk_seen)) in planned.zip(&seen.disks) {
            let live = domain.disk(&disk.name).and_then(|d| d.live.as_ref());
            let (Some(live), Stand::Ours) = (live, disk_seen.live) else {
                tracing::warn!(disk = %disk.name, stands = ?disk_seen.live, "after the freeze");
                let what = "after the freeze the disk is not on its overlay";
                return Err(Error::new(Kind::Conflict, what).disk(&disk.name).path(&disk.overlay));
            };
            // The settling that follows this error records what was really frozen, and commits into that (I4).
            // Libvirt knows less of each layer than the plan does (external data files), but it knows which they are.
            if !live.0[1..].iter().map(|l| &l.path).eq(planned.0.iter().map(|l| &l.path)) {
                return Err(Error::new(Kind::Busy, "the disk's chain changed while the run was planned")
                    .disk(&disk.name)
                    .hint("run again"));
            }
            disk.base_stamp = Stamp::of(&disk.base.path)?;
            disk.overlay_id = Stamp::of(&disk.overlay)?.map(|s| s.id);
            chains.push((disk.name.clone(), Source::Chain(planned.clone())));
        }
        self.record.phase = Phase::Frozen;
        self.record.frozen_at = Some(frozen_at);
        self.journal.write(&self.record)?;
        Ok(chains)
    }

    fn settle(&mut self) -> Result<Release> {
        let Some(record) = self.journal.record()? else {
            return Ok(Release { account: Account::default(), left_open: None });
        };
        let mut settler = Settler::new(self.hypervisor, self.journal, record, self.guard, self.options.clone());
        let outcome = settler.run(Goal::Settled)?;
        let left_open = match outcome {
            Outcome::Reached => None,
            Outcome::Pending(disk) => Some(pending(&disk)),
            Outcome::Halted(halt) => Some(halt_error(&settler.record, &halt).chain()),
        };
        let mut account = settler.account;
        stopped::conclude(self.hypervisor, self.journal, &self.record.uuid, left_open.is_some(), &mut account);
        Ok(Release { account, left_open })
    }
}

/// What an operator reads of a commit that goes on by itself.
pub fn pending(disk: &DiskName) -> String {
    format!("commit pending: the overlay of disk '{disk}' is still being committed; the next run, or a repair, ends it")
}

impl Capture for OverlayCapture<'_> {
    fn freeze(&mut self) -> Result<Frozen> {
        self.freeze_steps().map_err(|e| {
            // The guest first: let go, undo or finish, then say what went wrong.
            self.quiescer.settle(self.hypervisor);
            match self.guard.disarm().and_then(|()| self.settle()) {
                Ok(Release { left_open: None, .. }) => e,
                Ok(Release { left_open: Some(what), .. }) => e.hint(what),
                Err(second) => {
                    tracing::error!("after the failed freeze: {}", second.chain());
                    e.advise(advice::Repair::ExplainLeftovers)
                }
            }
        })
    }

    /// Nobody but us commits our overlay, and QEMU holds its locks on it: the base stands. But a guest that found no
    /// room in its overlay stands still until that is committed.
    fn check(&self) -> Result<()> {
        self.stopped.check(self.hypervisor, &self.record.uuid)
    }

    fn confirm(&self) -> Result<()> {
        let record = self.journal.record()?.unwrap_or_else(|| self.record.clone());
        let seen = observe(self.hypervisor, &record)?;
        for (name, _, disk) in &seen.disks {
            let same_chain = match disk.live {
                Stand::Ours | Stand::OursBelow => disk.job == Job::None && disk.under == Under::Recorded,
                // QEMU ended, orderly or not: the overlay is where it was, and nobody has committed it.
                Stand::Absent => disk.overlay.is_there(),
                _ => false,
            };
            if disk.base_touched || !same_chain {
                return Err(Error::new(
                    Kind::Interrupted,
                    "the frozen image did not stand still: somebody committed or changed the chain",
                )
                .disk(name)
                .domain(&record.domain));
            }
        }
        Ok(())
    }

    fn release(&mut self) -> Result<Release> {
        self.settle()
    }
}

fn new_disk_record(disk: &DiskPlan, run: &RunId, domain: &DomainView) -> DiskRecord {
    let defined = domain.disk(&disk.name).is_some_and(|view| view.inactive.is_some());
    DiskRecord {
        name: disk.name.clone(),
        base: disk.chain.top().clone(),
        overlay: overlay_path(disk, run),
        size: disk.size,
        base_stamp: None,
        overlay_id: None,
        complete_at: None,
        live_only: domain.persistent && !defined,
        off_commit: false,
    }
}

/// A domain that is off: read as it is, and noticed when it starts.
pub struct OffCapture<'a> {
    hypervisor: &'a dyn Hypervisor,
    uuid: DomainUuid,
    chains: Vec<(DiskName, Chain)>,
    /// What its point may be called.
    label: (Consistency, Option<String>),
    stamps: Vec<(PathBuf, Option<Stamp>)>,
    clock: &'a (dyn Fn() -> Timestamp + Sync),
    asked: std::sync::Mutex<Instant>,
}

/// libvirt is asked this often whether the domain was started; the stamps are compared at the end in any case.
const ASK_EVERY: Duration = Duration::from_millis(500);

impl<'a> OffCapture<'a> {
    /// Takes the images from the plan. Touches nothing.
    pub fn new(
        hypervisor: &'a dyn Hypervisor,
        clock: &'a (dyn Fn() -> Timestamp + Sync),
        plan: &Plan,
        domain: &DomainView,
    ) -> Self {
        let chains = plan.replicated().map(|d| (d.name.clone(), d.chain.clone())).collect();
        let asked = std::sync::Mutex::new(Instant::now());
        let label = label::of_off(domain);
        Self { hypervisor, uuid: plan.uuid.clone(), chains, label, stamps: Vec::new(), clock, asked }
    }

    fn ensure_off(&self) -> Result<()> {
        if self.hypervisor.observe_without_sizes(&self.uuid)?.power == Power::Off { Ok(()) } else { Err(started()) }
    }
}

fn started() -> Error {
    Error::new(Kind::Interrupted, "the domain was started while its disks were read; nothing of this reading was kept")
}

impl Capture for OffCapture<'_> {
    fn freeze(&mut self) -> Result<Frozen> {
        let frozen_at = (self.clock)();
        for layer in self.chains.iter().flat_map(|(_, chain)| &chain.0) {
            self.stamps.push((layer.path.clone(), Stamp::of(&layer.path)?));
            if let Some(data) = &layer.data_file {
                self.stamps.push((data.clone(), Stamp::of(data)?));
            }
        }
        self.ensure_off()?;
        Ok(Frozen {
            disks: self.chains.iter().map(|(name, chain)| (name.clone(), Source::Chain(chain.clone()))).collect(),
            frozen_at,
            consistency: self.label.0,
            consistency_reason: self.label.1.clone(),
            held: None,
            freeze: None,
            may_start: true,
        })
    }

    fn check(&self) -> Result<()> {
        {
            let mut asked = self.asked.lock().expect("nothing panics while it is held");
            if asked.elapsed() < ASK_EVERY {
                return Ok(());
            }
            *asked = Instant::now();
        }
        self.ensure_off()
    }

    fn confirm(&self) -> Result<()> {
        self.ensure_off()?;
        for (path, stamp) in &self.stamps {
            if Stamp::of(path)? != *stamp {
                return Err(started().path(path));
            }
        }
        Ok(())
    }

    fn release(&mut self) -> Result<Release> {
        Ok(Release { account: Account::default(), left_open: None })
    }
}
