//! Performs what [`mod@decide`] says until the domain is on its own images, a person is needed, or a deadline passed.
//!
//! The same loop commits at the end of a normal run, mends after a crash, and, in the dead-man, lets a held guest go.
//! Every step is decided from a fresh observation. A step checks again, under QEMU's own locks, what it relies on. One
//! observation serves the same step of all disks ([`decide_all`]): the work in a pause grows with the disks, not with
//! their square. A pause ends after [`SettleOptions::pause_share`]; the next one takes on the rest.
//!
//! Step numbers are those of docs/replication.md; a failpoint stands behind each.

pub mod account;
pub(crate) mod away;
pub mod deadman;
pub mod decide;
pub mod guard;
pub mod halts;
pub mod leftover;
pub mod observe;
pub mod options;
pub mod stopped;

use crate::error::{Error, Kind, Result, ResultExt, advice};
use crate::failpoint;
use crate::file_id::Stamp;
use crate::hypervisor::{Hypervisor, is_denied};
use crate::image::locks::QemuLock;
use crate::image::{Chain, Format, Layer, chain, qemu_img};
use crate::name::DiskName;
use crate::replicate::settle::account::Account;
use crate::replicate::settle::away::{Away, How};
use crate::replicate::settle::decide::{
    Action, DiskSeen, Halt, HaltReason, Job, OverlayFile, Phase, PowerState, Stand, decide, decide_all,
};
use crate::replicate::settle::guard::PauseGuard;
use crate::replicate::settle::observe::{Observation, observe};
use crate::replicate::settle::options::SettleOptions;
use crate::replicate::state::journal::{self, Journal};
use crate::replicate::state::record::{DiskRecord, Record};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How far to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// The domain on its own images, the record closed.
    Settled,
    /// Only: the guest is not held by us. Starts nothing that takes time.
    Released,
}

/// How a pass of the settle loop ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The goal is reached.
    Reached,
    /// "Commit pending": the commit goes on in QEMU, the next run attaches to it. The disk it waits for.
    Pending(DiskName),
    /// A person has to look; nothing further was touched.
    Halted(Halt),
}

/// The settle loop of one domain with an open record.
pub struct Settler<'a> {
    /// This host's libvirt, which is observed before every step.
    pub hypervisor: &'a dyn Hypervisor,
    /// Journal of the domain, with its lock held.
    pub journal: &'a Journal,
    /// The record that the loop works from. Every change is written to the journal before the step it allows.
    pub record: Record,
    /// Dead-man that bounds each pause of the guest; the dead-man's own loop has none.
    pub guard: &'a mut dyn PauseGuard,
    /// How long a commit and a pause may take.
    pub options: SettleOptions,
    /// Steps, alarms and the longest pause so far, for the report.
    pub account: Account,
    paused_at: Option<Instant>,
    /// Disks that were pivoted in the pause that lasts.
    pivoted: usize,
    pauses: u32,
    away: Away,
    /// What acting has found out and deciding cannot know.
    lost: Option<Halt>,
}

/// Failed steps in a row after which the loop gives up with the last error.
const FAILURES_MAX: u32 = 20;
/// Pauses, beside one for each disk, after which the pivot is left to the next run. Nothing resets their count.
const PAUSES_MAX: u32 = 10;
/// How long the guest runs at least between two pauses; more each time, up to the second.
const BETWEEN_PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Actions after which the loop gives up: no sound history needs as many.
const ACTIONS_MAX: u32 = 10_000;

impl<'a> Settler<'a> {
    /// Prepares the loop with an empty account. Touches nothing.
    pub fn new(
        hypervisor: &'a dyn Hypervisor,
        journal: &'a Journal,
        record: Record,
        guard: &'a mut dyn PauseGuard,
        options: SettleOptions,
    ) -> Self {
        let (account, away) = (Account::default(), Away::default());
        Self {
            hypervisor,
            journal,
            record,
            guard,
            options,
            account,
            paused_at: None,
            pivoted: 0,
            pauses: 0,
            away,
            lost: None,
        }
    }

    /// Runs the loop. Blocks: a commit takes as long as it takes, at most [`SettleOptions::ready_within`]. An error
    /// leaves the record as it is, for the next run or `doctor`.
    pub fn run(&mut self, goal: Goal) -> Result<Outcome> {
        let give_up_at = Instant::now() + self.options.ready_within;
        let mut failures = 0;
        // A person may have changed the rules meanwhile: each run asks once.
        self.record.commit_denied = None;
        for _ in 0..ACTIONS_MAX {
            let step = self.step(goal, give_up_at);
            match step {
                Ok(Some(outcome)) => return Ok(outcome),
                Ok(None) => failures = 0,
                // What QEMU may not open, it may not open a moment later.
                Err(e) if e.kind() == Kind::Interrupted || is_denied(&e) => {
                    self.release_after_failure();
                    return Err(e.domain(&self.record.domain));
                }
                Err(e) => {
                    failures += 1;
                    tracing::warn!(domain = %self.record.domain, "{}", e.chain());
                    if failures >= FAILURES_MAX || (goal == Goal::Settled && Instant::now() > give_up_at) {
                        self.release_after_failure();
                        return Err(e.domain(&self.record.domain));
                    }
                    // A guest that is held does not wait for a polite back-off.
                    let pause = if self.paused_at.is_some() { 10 } else { 100 * u64::from(failures) };
                    std::thread::sleep(Duration::from_millis(pause));
                }
            }
        }
        Err(Error::new(Kind::Conflict, "the domain does not settle: every step is followed by another")
            .domain(&self.record.domain))
    }

    /// Observes, decides, performs once. `Some` ends the loop.
    fn step(&mut self, goal: Goal, give_up_at: Instant) -> Result<Option<Outcome>> {
        if let Some(halt) = self.lost.take() {
            return Ok(Some(Outcome::Halted(halt)));
        }
        let mut seen = observe(self.hypervisor, &self.record)?;
        self.adopt_instance(&mut seen)?;
        if goal == Goal::Released && !seen.held(&self.record) {
            return Ok(Some(Outcome::Reached));
        }
        self.make_retired_durable(&seen)?;
        let actions = decide_all(&seen.situation(&self.record));
        tracing::debug!(domain = %self.record.domain, phase = ?self.record.phase, power = ?seen.power, ?actions, "decided");
        match actions[0].clone() {
            Action::Done => {
                self.keep_stopped(&seen)?;
                self.finish()?;
                return Ok(Some(Outcome::Reached));
            }
            Action::Halt(halt) => return Ok(Some(Outcome::Halted(halt))),
            Action::Pause if self.pauses >= PAUSES_MAX + self.record.disks.len() as u32 => {
                return Ok(Some(self.pauses_spent(&seen)));
            }
            // Whoever only lets the guest go does not begin a pivot; nothing is pivoted and unretired here, or decide
            // would have said so.
            Action::Pivot(_) if goal == Goal::Released => self.resume()?,
            // Each disk's rule is its own: what was pivoted in this pause is retired, the others stand on their
            // overlays.
            Action::Pivot(_) if self.pause_is_long() => {
                self.resume()?;
                std::thread::sleep(self.options.pause_share);
            }
            Action::WaitForJob(disk) => {
                let left = give_up_at.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Ok(Some(Outcome::Pending(disk)));
                }
                self.hypervisor.wait_job(&self.record.uuid, &disk, left.min(Duration::from_secs(5)))?;
            }
            Action::Pivot(_) => self.pivot_all(&actions)?,
            Action::Retire(_) => self.rename_all_away(&actions, &seen, How::Retired)?,
            Action::SetAside(_) => self.rename_all_away(&actions, &seen, How::Kept)?,
            _ => {
                for action in actions {
                    self.perform(action, &seen)?;
                    // QEMU would be refused the next disk, too.
                    if self.record.commit_denied.is_some() {
                        break;
                    }
                }
            }
        }
        Ok(None)
    }

    /// Whether the guest is let run although disks are left to pivot. Not before something was done in this pause: a
    /// slow host would pause and resume for ever.
    fn pause_is_long(&self) -> bool {
        let stood = self.paused_at.map_or(Duration::ZERO, |at| at.elapsed());
        self.record.resume_after && self.pivoted > 0 && stood >= self.options.pause_share
    }

    /// A retirement that is found done may be that of a hand that died before it had synced the directory. Nothing is
    /// built on it before that is made good: neither a resume (I3), nor a definition, nor the end of the record.
    fn make_retired_durable(&mut self, seen: &Observation) -> Result<()> {
        let gone = |d: &DiskSeen| matches!(d.overlay, OverlayFile::Retired | OverlayFile::Missing);
        let disks = seen.disks.iter().zip(&self.record.disks);
        self.away.make_durable(disks.filter(|((_, _, d), _)| gone(d)).map(|(_, disk)| disk.overlay.as_path()))
    }

    /// A domain that was started anew while no disk of it had been pivoted is the instance to watch from now on: a
    /// pivot that is seen in it later happened under our eyes, not before it was started.
    fn adopt_instance(&mut self, seen: &mut Observation) -> Result<()> {
        let now = seen.domain.as_ref().and_then(|d| d.id);
        let untouched = |d: &DiskSeen| matches!(d.live, Stand::Ours | Stand::OursBelow) || !d.overlay.is_there();
        if now.is_none() || seen.same_instance || !seen.disks.iter().all(|(_, _, d)| untouched(d)) {
            return Ok(());
        }
        (self.record.instance, self.record.boot) = (now, journal::boot_id());
        self.journal.write(&self.record)?;
        seen.same_instance = true;
        Ok(())
    }

    fn perform(&mut self, action: Action, seen: &Observation) -> Result<()> {
        match action {
            Action::Adopt(disk) => self.adopt(&disk, seen),
            Action::StartCommit(disk) => self.start_commit(&disk, true, seen),
            Action::StartCommitBelow(disk) => {
                self.alarm(format!(
                    "disk '{disk}': somebody put a snapshot above our overlay; it is kept, ours is committed below it"
                ));
                self.start_commit(&disk, false, seen)
            }
            Action::Pause => self.pause(seen),
            Action::Redefine(disk) => self.redefine(&disk, seen),
            Action::MarkComplete(disk) => self.mark_complete(&disk, seen),
            Action::Resume => self.resume(),
            Action::CommitOffline(disk) => self.commit_offline(&disk),
            Action::Discard(disk) => self.discard(&disk, seen),
            Action::Done | Action::Halt(_) | Action::WaitForJob(_) => unreachable!("handled by the loop"),
            Action::Pivot(_) | Action::Retire(_) | Action::SetAside(_) => unreachable!("handled by the loop"),
        }
    }

    /// Somebody's snapshot came between the plan and our freeze, or the chain below us was changed: the image that our
    /// overlay completes is the one right below it. Of its times nothing is known.
    fn adopt(&mut self, disk: &DiskName, seen: &Observation) -> Result<()> {
        let Some(base) = seen.under[self.at(disk)].clone() else { return Ok(()) };
        let was = self.disk(disk).base.path.clone();
        self.alarm(format!(
            "disk '{disk}': our overlay lies over {}, and not over {} as planned; it is committed into the image below it",
            base.path.display(),
            was.display()
        ));
        let recorded = self.disk_mut(disk);
        (recorded.base, recorded.base_stamp) = (base, None);
        self.journal.write(&self.record)
    }

    fn start_commit(&mut self, disk: &DiskName, active: bool, seen: &Observation) -> Result<()> {
        // Step 7a: from here on the base alone is a mixture, and nobody may read it as a point (I5).
        if self.record.phase < Phase::CommitIntent {
            self.record.phase = Phase::CommitIntent;
            self.journal.write(&self.record)?;
        }
        failpoint!("7a");
        let (base, overlay) = {
            let d = self.disk(disk);
            (d.base.path.clone(), d.overlay.clone())
        };
        let started = self.hypervisor.start_commit(&self.record.uuid, disk, &overlay, &base, active).on_disk(disk);
        if let Err(e) = started {
            return self.if_denied(e, &base, seen);
        }
        self.note(format!("7b commit of {disk} started"));
        failpoint!("7b");
        Ok(())
    }

    /// A commit that QEMU may not begin. Under AppArmor its end is the only way out: that is recorded, and decides.
    fn if_denied(&mut self, e: Error, base: &Path, seen: &Observation) -> Result<()> {
        if !is_denied(&e) {
            return Err(e);
        }
        if !self.hypervisor.confinement(&self.record.uuid)?.denies_commits() {
            return Err(e.path(base).advise(advice::Repair::CheckRights));
        }
        tracing::error!(domain = %self.record.domain, "{}", e.chain());
        self.record.commit_denied = seen.domain.as_ref().and_then(|domain| domain.id);
        self.journal.write(&self.record)
    }

    /// The guest was paused often enough: it runs on its overlays, and the next run goes on from there.
    fn pauses_spent(&mut self, seen: &Observation) -> Outcome {
        self.alarm(format!(
            "the guest was paused {} times for a pivot that QEMU refused each time; the next run tries it again",
            self.pauses
        ));
        let ready = seen.disks.iter().find(|(_, _, disk)| disk.job == Job::Ready);
        Outcome::Pending(ready.map_or_else(|| self.record.disks[0].name.clone(), |(name, ..)| name.clone()))
    }

    fn pause(&mut self, seen: &Observation) -> Result<()> {
        failpoint!("7c");
        if self.pauses > 0 {
            std::thread::sleep((BETWEEN_PAUSES.0 * self.pauses).min(BETWEEN_PAUSES.1));
        }
        self.pauses += 1;
        // Step 7d: whoever comes after us must know that the pause is ours, and that a pivot may have happened.
        self.record.phase = Phase::PivotIntent;
        self.record.resume_after = seen.power == PowerState::Running;
        self.journal.write(&self.record)?;
        if self.record.resume_after {
            self.guard.arm(self.options.pause_within)?;
        }
        failpoint!("7d");
        (self.paused_at, self.pivoted) = (Some(Instant::now()), 0);
        self.hypervisor.pause(&self.record.uuid)?;
        failpoint!("7e");
        Ok(())
    }

    /// Step 7f, for as many disks as the pause has time for.
    fn pivot_all(&mut self, actions: &[Action]) -> Result<()> {
        let in_this_pause = self.pivoted;
        for action in actions {
            let Action::Pivot(disk) = action else { unreachable!("the actions of one step are of one kind") };
            if self.pause_is_long() {
                break;
            }
            if let Err(e) = self.hypervisor.pivot(&self.record.uuid, disk) {
                // Busy says for certain that this disk was not pivoted: the job fell back from ready, the loop lets the
                // guest go and waits again. After any other answer it may have been, and the intent has to stand; so it
                // has for disks that were pivoted just before, until they are retired.
                if e.kind() == Kind::Busy && self.pivoted == in_this_pause {
                    self.record.phase = Phase::CommitIntent;
                    self.journal.write(&self.record)?;
                }
                return Err(e.disk(disk));
            }
            self.pivoted += 1;
            self.note(format!("7f {disk} pivoted to its base"));
            failpoint!("7f");
        }
        Ok(())
    }

    fn redefine(&mut self, disk: &DiskName, seen: &Observation) -> Result<()> {
        // A snapshot that somebody put above the base since is part of the disk.
        let live = seen.domain.as_ref().and_then(|d| d.disk(disk)?.live.as_ref());
        let image = live.map_or(&self.disk(disk).base, |chain| chain.top()).clone();
        self.hypervisor.redefine(&self.record.uuid, &[(disk.clone(), image)]).on_disk(disk)?;
        self.note(format!("definition of {disk} put back to its image"));
        Ok(())
    }

    fn mark_complete(&mut self, disk: &DiskName, seen: &Observation) -> Result<()> {
        // A base is complete only if nobody writes to the overlay, whatever libvirt believes.
        let _lock = self.lock_overlay(disk, seen)?;
        let stamp = self.stamp_seen(disk, seen);
        self.alarm(format!(
            "disk '{disk}': the guest ran on the base while our overlay still had its name (resumed or pivoted by another hand)"
        ));
        self.disk_mut(disk).complete_at = stamp;
        self.journal.write(&self.record)
    }

    /// Steps 7g and 7h. The names of all disks go under QEMU's locks, which are held until that is durable; a directory
    /// with many overlays is synced once.
    fn rename_all_away(&mut self, actions: &[Action], seen: &Observation, how: How) -> Result<()> {
        let mut locks = Vec::new();
        let mut gone: Vec<PathBuf> = Vec::new();
        let renamed = actions.iter().try_for_each(|action| {
            let (Action::Retire(disk) | Action::SetAside(disk)) = action else { unreachable!("of one kind") };
            locks.push(self.lock_overlay(disk, seen)?);
            failpoint!("7g");
            let d = self.disk(disk);
            let (overlay, to) = (d.overlay.clone(), if how == How::Retired { d.retired() } else { d.kept() });
            self.away.rename(&overlay, &to)?;
            if how == How::Kept {
                self.alarm(format!(
                    "disk '{disk}': the overlay is no longer part of the disk and was kept as {}",
                    to.display()
                ));
            }
            self.note(format!("7h overlay of {disk} renamed away"));
            gone.push(overlay);
            Ok(())
        });
        // Durable before any instruction of the guest (I3), also where another disk's overlay could not be renamed.
        self.away.make_durable(gone.iter().map(PathBuf::as_path))?;
        failpoint!("7h");
        renamed
    }

    fn resume(&mut self) -> Result<()> {
        self.hypervisor.resume(&self.record.uuid)?;
        if let Some(paused_at) = self.paused_at.take() {
            self.account.pauses.add(paused_at.elapsed());
        }
        failpoint!("7i");
        let late = self.guard.disarm();
        self.record.phase = Phase::CommitIntent;
        self.record.resume_after = false;
        self.journal.write(&self.record)?;
        self.note("7i guest resumed".to_owned());
        failpoint!("7j");
        late
    }

    fn commit_offline(&mut self, disk: &DiskName) -> Result<()> {
        let (overlay, base) = {
            let d = self.disk(disk);
            (d.overlay.clone(), d.base.clone())
        };
        chain::commits_into(&overlay, &base).on_disk(disk)?;
        if self.record.phase < Phase::CommitIntent || !self.disk(disk).off_commit {
            self.record.phase = self.record.phase.max(Phase::CommitIntent);
            self.disk_mut(disk).off_commit = true;
            self.journal.write(&self.record)?;
        }
        // qemu-img takes QEMU's locks itself: a domain that was started meanwhile makes this fail, and is observed
        // next.
        let mut layers =
            vec![Layer { path: overlay.clone(), format: Format::Qcow2, block_device: false, data_file: None }];
        layers.extend(chain::resolve_chain(&base).on_disk(disk)?.0);
        qemu_img::commit(&Chain(layers)).on_disk(disk)?;
        failpoint!("7k");
        let committed = Stamp::of(&overlay)?;
        let _overlay_lock = chain::lock_as_seen(&overlay, committed)?;
        let again = observe(self.hypervisor, &self.record)?;
        let (_, _, now) = again.disks[self.at(disk)];
        if now.live != Stand::Absent {
            return Err(Error::new(Kind::Busy, "the domain was started while its overlay was committed").disk(disk));
        }
        let retired = self.disk(disk).retired();
        self.away.rename(&overlay, &retired)?;
        self.away.make_durable([overlay.as_path()])?;
        failpoint!("7l");
        // One that was plugged in for a running instance only is in no definition.
        let defined = again.domain.as_ref().and_then(|d| d.disk(disk)).is_some_and(|view| view.inactive.is_some());
        if now.inactive == Stand::Ours && defined {
            self.hypervisor.redefine(&self.record.uuid, &[(disk.clone(), base)]).on_disk(disk)?;
        }
        self.note(format!("overlay of {disk} committed while no QEMU had it"));
        failpoint!("7m");
        Ok(())
    }

    fn discard(&mut self, disk: &DiskName, seen: &Observation) -> Result<()> {
        let (overlay, retired) = (self.disk(disk).overlay.clone(), self.disk(disk).retired());
        let _lock = self.lock_overlay(disk, seen)?;
        match self.record.phase {
            Phase::FreezeIntent => self.away.remove(&overlay)?,
            // Once the disks were frozen, an overlay without either name counts as lost.
            _ => self.away.rename(&overlay, &retired)?,
        }
        self.away.make_durable([overlay.as_path()])?;
        self.note(format!("unused overlay of {disk} removed"));
        Ok(())
    }

    /// QEMU's own locks on an overlay that, by libvirt's word, nobody uses; `Busy` if somebody does.
    ///
    /// libvirtd may have died inside the freeze, between QEMU's answer and its own notes. Then QEMU has the overlay
    /// open and libvirt does not know: unused, and it is closed, or libvirt, counting on from its notes, would give the
    /// name of that node to the next overlay and fail; or the guest writes to it, and the next start would boot the
    /// base without what was flushed since the freeze.
    fn lock_overlay(&mut self, disk: &DiskName, seen: &Observation) -> Result<QemuLock> {
        let (overlay, stamp) = (self.disk(disk).overlay.clone(), self.stamp_seen(disk, seen));
        let runs = matches!(seen.power, PowerState::Running | PowerState::Paused);
        let in_freeze = runs && self.record.phase == Phase::FreezeIntent;
        match chain::lock_as_seen(&overlay, stamp) {
            // A node that nothing uses takes no locks.
            Ok(lock) if in_freeze => {
                self.hypervisor.close_unused(&self.record.uuid, &overlay).on_disk(disk)?;
                return Ok(lock);
            }
            Err(e) if e.kind() == Kind::Busy && in_freeze => {}
            other => return other,
        }
        match self.hypervisor.close_unused(&self.record.uuid, &overlay) {
            Ok(()) => return chain::lock_as_seen(&overlay, stamp),
            Err(e) if e.kind() == Kind::Refused => {}
            Err(e) => return Err(e.disk(disk)),
        }
        self.lost_track(disk)?;
        Err(Error::new(Kind::Busy, "the guest writes to the overlay").disk(disk).path(&overlay))
    }

    /// The guest writes to our overlays (the freeze was one transaction) and libvirt believes in the bases: the next
    /// step halts, and until then the definition names what is true.
    fn lost_track(&mut self, disk: &DiskName) -> Result<()> {
        let seen = observe(self.hypervisor, &self.record)?;
        let believed = |d: &DiskSeen| d.live == Stand::Base && d.overlay.is_there();
        if !seen.disks.iter().any(|(name, _, d)| name == disk && believed(d)) {
            return Ok(()); // It moved on meanwhile.
        }
        let mut layers = Vec::new();
        for ((name, _, d), recorded) in seen.disks.iter().zip(&self.record.disks) {
            if self.record.persistent && believed(d) && d.inactive == Stand::Base {
                let path = recorded.overlay.clone();
                layers
                    .push((name.clone(), Layer { path, format: Format::Qcow2, block_device: false, data_file: None }));
            }
        }
        if !layers.is_empty() {
            self.hypervisor.redefine(&self.record.uuid, &layers)?;
            self.alarm(
                "the guest writes to our overlays and libvirt does not know; its definition names them now".into(),
            );
        }
        self.lost = Some(Halt { disk: Some(disk.clone()), reason: HaltReason::LibvirtLostTrack });
        Ok(())
    }

    /// Step 7n.owed: once the record is closed, nobody else knows that the guest's pause is ours to end.
    fn keep_stopped(&self, seen: &Observation) -> Result<()> {
        let Some(domain) = &seen.domain else { return Ok(()) };
        let (run, ran) = (&self.record.run, self.record.ran);
        if stopped::owe(self.journal, run, ran, self.record.instance, domain)? {
            failpoint!("7n.owed");
        }
        Ok(())
    }

    /// Step 7n: nothing refers to the retired overlays any more; then the record itself.
    fn finish(&mut self) -> Result<()> {
        let retired: Vec<PathBuf> = self.record.disks.iter().map(|disk| disk.retired()).collect();
        retired.iter().try_for_each(|path| self.away.remove(path))?;
        // Without the record nobody would remove what came back.
        self.away.make_durable(retired.iter().map(PathBuf::as_path))?;
        failpoint!("7n");
        match self.hypervisor.set_record(&self.record.uuid, None) {
            Ok(()) => {}
            Err(e) if e.kind() == Kind::NotFound => {}
            Err(e) => return Err(e),
        }
        failpoint!("8a");
        self.journal.close()
    }

    /// The loop ends with an error: at least the guest must not be held, if that is safe. Also if a directory cannot be
    /// synced: a guest that stands for ever is worse than a name that a power cut might bring back.
    fn release_after_failure(&mut self) {
        let Ok(seen) = observe(self.hypervisor, &self.record) else { return };
        if seen.held(&self.record)
            && matches!(decide(&seen.situation(&self.record)), Action::Resume | Action::Pivot(_))
            && let Err(e) = self.resume()
        {
            tracing::error!(domain = %self.record.domain, "cannot resume the guest: {}", e.chain());
        }
    }

    fn disk(&self, name: &DiskName) -> &DiskRecord {
        self.record.disks.iter().find(|d| &d.name == name).expect("decide names disks of the record")
    }

    fn disk_mut(&mut self, name: &DiskName) -> &mut DiskRecord {
        self.record.disks.iter_mut().find(|d| &d.name == name).expect("decide names disks of the record")
    }

    fn at(&self, name: &DiskName) -> usize {
        self.record.disks.iter().position(|d| &d.name == name).expect("decide names disks of the record")
    }

    fn stamp_seen(&self, name: &DiskName, seen: &Observation) -> Option<Stamp> {
        seen.overlay_stamps[self.at(name)]
    }

    fn note(&mut self, step: String) {
        tracing::info!(domain = %self.record.domain, run = %self.record.run, step = %step);
        self.account.steps.push(step);
    }

    fn alarm(&mut self, text: String) {
        tracing::warn!(domain = %self.record.domain, "{text}");
        self.account.alarms.push(text);
    }
}

#[cfg(test)]
#[path = "settle_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "settle_denied_tests.rs"]
mod denied_tests;
