//! Capture by backup: QEMU serves the disks as they were at one instant, and copies what the guest overwrites into
//! scratch files of ours first. Nothing lies on the production chain, so nothing is committed and the guest is never
//! paused.
//!
//! The steps are b1 to b6 of docs/replication.md. A durable record names the socket and the scratch files before the
//! job begins; the normal end of a run, the next run and `doctor` finish from it by the same [`settle`].
//!
//! Invariants
//! - Only the job that libvirt names with exactly our socket and scratch files is ended. Another program's is left
//!   alone.
//! - The bitmap that leads on was begun before the job (3c), and what the old one marks is asked after it (5): too much
//!   is safe, and too little cannot be.

use super::quiesce::{Held, Quiescer};
use crate::durable::sync_dir;
use crate::error::{Error, Kind, Result, advice};
use crate::failpoint;
use crate::file_id::Stamp;
use crate::hypervisor::backup::{Backup, BackupDisk, BackupJob};
use crate::hypervisor::{Backups, DomainView, Hypervisor, Power};
use crate::name::{DomainUuid, RunId};
use crate::replicate::capture::names::scratch_path;
use crate::replicate::capture::still::{Capture, Frozen, Release, Source};
use crate::replicate::plan::planned::{DiskPlan, Plan};
use crate::replicate::run::Ports;
use crate::replicate::settle::account::Account;
use crate::replicate::settle::guard::PauseGuard;
use crate::replicate::settle::stopped::{self, StoppedWatch};
use crate::replicate::state::journal::{Journal, boot_id};
use crate::replicate::state::record::BackupRecord;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// libvirt is asked this often whether the job still runs; beside that, reading fails without it.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// How long a libvirtd that is away is waited for before a point is sealed.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// How long a job may take to end once libvirt was told.
const END_WITHIN: Duration = Duration::from_secs(30);

/// Disks as a running (or paused) domain's QEMU serves them.
pub struct BackupCapture<'a> {
    ports: &'a Ports<'a>,
    journal: &'a Journal,
    plan: &'a Plan,
    domain: &'a DomainView,
    run: RunId,
    /// Ends the job if this process dies; armed only while the guest's file systems are held.
    guard: Option<&'a mut dyn PauseGuard>,
    quiescer: Quiescer<'a>,
    /// Set once it is recorded.
    backup: Option<Backup>,
    asked: Mutex<Instant>,
    stopped: StoppedWatch,
}

impl<'a> BackupCapture<'a> {
    /// Prepares a capture by backup. Touches neither the domain nor any file.
    pub fn new(
        ports: &'a Ports<'a>,
        journal: &'a Journal,
        plan: &'a Plan,
        domain: &'a DomainView,
        (run, guard, quiescer): (&RunId, Option<&'a mut dyn PauseGuard>, Quiescer<'a>),
    ) -> Self {
        let asked = Mutex::new(Instant::now());
        let stopped = StoppedWatch::new(domain.power == Power::Running);
        Self { ports, journal, plan, domain, run: run.clone(), guard, quiescer, backup: None, asked, stopped }
    }

    fn begin(&mut self) -> Result<Frozen> {
        let backup = self.planned()?;
        for disk in &backup.disks {
            if Stamp::of(&disk.scratch)?.is_some() {
                return Err(Error::new(Kind::Conflict, "a file with the new scratch file's name exists already")
                    .path(&disk.scratch)
                    .disk(&disk.name));
            }
        }
        // No job without an earlier durable record of what is its own.
        self.journal.write_backup(&BackupRecord {
            format: 1,
            run: self.run.clone(),
            domain: self.domain.name.clone(),
            uuid: self.domain.uuid.clone(),
            instance: self.domain.id,
            boot: boot_id(),
            ran: self.domain.power == Power::Running,
            backup: backup.clone(),
            started_at: (self.ports.clock)(),
        })?;
        self.backup = Some(backup.clone());
        failpoint!("b1");
        let held = match self.guard.as_deref_mut() {
            Some(guard) => self.quiescer.hold(guard)?,
            None => Held::default(),
        };
        let frozen_at = (self.ports.clock)();
        let start = Instant::now();
        let begun = self.ports.backups.begin_backup(&self.plan.uuid, &backup);
        let freeze = start.elapsed();
        // The guest first, whatever became of the job.
        let thawed = self.quiescer.release(held);
        if let Some(guard) = self.guard.as_deref_mut() {
            guard.disarm()?;
        }
        begun?;
        failpoint!("b2");
        self.verify()?;
        failpoint!("b3");
        let export = |d: &BackupDisk| {
            (d.name.clone(), Source::Export { socket: backup.socket.clone(), name: d.name.to_string() })
        };
        Ok(Frozen {
            disks: backup.disks.iter().map(export).collect(),
            frozen_at,
            consistency: thawed.consistency,
            consistency_reason: thawed.why_not,
            held: thawed.held,
            freeze: Some(freeze),
            may_start: false,
        })
    }

    fn planned(&self) -> Result<Backup> {
        let socket = self.ports.backups.backup_socket(&self.plan.uuid)?;
        let disk = |d: &DiskPlan| BackupDisk { name: d.name.clone(), scratch: scratch_path(d, &self.run) };
        Ok(Backup { socket, disks: self.plan.replicated().map(disk).collect() })
    }

    /// Step b3: the job is ours, of the instance and the chains that were planned.
    fn verify(&self) -> Result<()> {
        self.runs()?;
        let changed =
            |what: &'static str| Error::new(Kind::Busy, format!("{what} while the run was planned")).hint("run again");
        let seen = self.ports.hypervisor.observe(&self.plan.uuid)?;
        if seen.id != self.domain.id {
            return Err(changed("the domain was restarted"));
        }
        for disk in self.plan.replicated() {
            let live = seen.disk(&disk.name).and_then(|d| d.live.as_ref());
            let paths = |chain: &crate::image::Chain| -> Vec<PathBuf> {
                chain.0.iter().map(|layer| layer.path.clone()).collect()
            };
            if live.map(paths) != Some(paths(&disk.chain)) {
                return Err(changed("the disk's chain changed").disk(&disk.name));
            }
        }
        Ok(())
    }

    fn runs(&self) -> Result<()> {
        let backup = self.backup.as_ref().expect("asked after the begin");
        match self.ports.backups.running_backup(&self.plan.uuid)? {
            BackupJob::Running(running) if backup.is(&running) => Ok(()),
            _ => Err(Error::new(
                Kind::Interrupted,
                "the backup job has ended before everything was read: the domain ended, or somebody aborted it",
            )
            .domain(&self.domain.name)),
        }
    }
}

impl Capture for BackupCapture<'_> {
    fn freeze(&mut self) -> Result<Frozen> {
        self.begin().map_err(|e| {
            self.quiescer.settle(self.ports.hypervisor);
            match settle(self.ports.hypervisor, self.ports.backups, self.journal, &self.plan.uuid) {
                Ok(_) => e,
                Err(second) => {
                    tracing::error!("after the failed begin of a backup: {}", second.chain());
                    e.advise(advice::Repair::ExplainLeftovers)
                }
            }
        })
    }

    fn check(&self) -> Result<()> {
        self.stopped.check(self.ports.hypervisor, &self.plan.uuid)?;
        {
            let mut asked = self.asked.lock().expect("nothing panics while it is held");
            if asked.elapsed() < ASK_EVERY {
                return Ok(());
            }
            *asked = Instant::now();
        }
        match self.runs() {
            // libvirtd may come and go: the job is QEMU's, and reading fails if it ends.
            Err(e) if e.kind() == Kind::Unavailable => Ok(()),
            other => other,
        }
    }

    /// A job that could not keep what the guest overwrote has ended; one that runs has served one instant all along.
    fn confirm(&self) -> Result<()> {
        let give_up_at = Instant::now() + ANSWER_WITHIN;
        loop {
            match self.runs() {
                Err(e) if e.kind() == Kind::Unavailable && Instant::now() < give_up_at => {
                    std::thread::sleep(ASK_EVERY / 5);
                }
                other => return other,
            }
        }
    }

    fn release(&mut self) -> Result<Release> {
        // A job that goes on harms no byte; the next run ends it.
        let (hypervisor, uuid) = (self.ports.hypervisor, &self.plan.uuid);
        let settled = settle(hypervisor, self.ports.backups, self.journal, uuid);
        let left_open = settled.err().map(|e| format!("the backup job could not be ended: {}", e.chain()));
        let mut account = Account::default();
        stopped::conclude(hypervisor, self.journal, uuid, false, &mut account);
        Ok(Release { account, left_open })
    }
}

/// What to do about a recorded backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Our job runs: end it.
    End,
    /// No job of ours runs: remove its files.
    Clean,
    /// A job that is not ours uses a file of ours: a person has to look.
    Halt,
}

/// Pure.
fn next(ours: &Backup, job: &BackupJob) -> Next {
    match job {
        BackupJob::Running(running) if ours.is(running) => Next::End,
        BackupJob::Running(running) if ours.meets(running) => Next::Halt,
        BackupJob::Running(_) | BackupJob::Hollow | BackupJob::None => Next::Clean,
    }
}

/// Ends the recorded backup, if there is one, and removes what is left of it. Returns what was done, in words. Blocks,
/// at most half a minute and libvirt's deadlines. Repeating it is harmless.
///
/// A guest that found no room in a scratch file is put on record first: [`stopped`] resumes it.
pub fn settle(
    hypervisor: &dyn Hypervisor,
    backups: &dyn Backups,
    journal: &Journal,
    uuid: &DomainUuid,
) -> Result<Vec<String>> {
    let Some(record) = journal.backup()? else { return Ok(Vec::new()) };
    stopped::owe_after_backup(hypervisor, journal, uuid, (&record.run, record.ran, record.instance))?;
    let mut done = Vec::new();
    let give_up_at = Instant::now() + END_WITHIN;
    let mut told = false;
    loop {
        match next(&record.backup, &backups.running_backup(uuid)?) {
            Next::Clean => break,
            Next::Halt => return Err(mixed(&record)),
            Next::End if Instant::now() > give_up_at => {
                return Err(Error::new(Kind::Busy, "the backup job of a run does not end")
                    .domain(&record.domain)
                    .hint("`virsh domjobabort DOMAIN` ends it by hand; the next run tries it again"));
            }
            Next::End if told => std::thread::sleep(Duration::from_millis(20)),
            Next::End => {
                backups.end_backup(uuid, &record.backup)?;
                done.push("ended the backup job".to_owned());
                told = true;
            }
        }
    }
    failpoint!("b4");
    for path in files(&record.backup) {
        if remove(path)? {
            done.push(format!("removed {}", path.display()));
        }
    }
    failpoint!("b5");
    journal.close_backup()?;
    failpoint!("b6");
    Ok(done)
}

fn mixed(record: &BackupRecord) -> Error {
    Error::new(Kind::Conflict, "a backup job that is not ours uses a file that this host has recorded as its own")
        .domain(&record.domain)
        .hint("`virsh backup-dumpxml DOMAIN` shows it; end it with `virsh domjobabort DOMAIN` if nobody needs it")
}

fn files(backup: &Backup) -> impl Iterator<Item = &Path> {
    backup.disks.iter().map(|d| d.scratch.as_path()).chain([backup.socket.as_path()])
}

/// Removes a file, durably, whoever removed its name. Returns whether it was there.
fn remove(path: &Path) -> Result<bool> {
    let there = match std::fs::remove_file(path) {
        Ok(()) => true,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => false,
        Err(e) => return Err(Error::io("cannot remove what a backup left", path, e)),
    };
    match path.parent() {
        // The private directory of a domain that ended has gone with it.
        Some(dir) if dir.is_dir() => sync_dir(dir).map(|()| there),
        _ => Ok(there),
    }
}

/// What was left of a run by backup, sentence by sentence, and whether a person has to look.
pub fn explain(backups: &dyn Backups, record: &BackupRecord) -> Result<(Vec<String>, bool)> {
    let mut said =
        vec![format!("run {} of {:.0} was cut short while it read by backup", record.run, record.started_at)];
    let step = next(&record.backup, &backups.running_backup(&record.uuid)?);
    said.push(match step {
        Next::End => "its backup job still runs: what the guest overwrites goes into the scratch files".to_owned(),
        Next::Clean => "its backup job has ended".to_owned(),
        Next::Halt => {
            let e = mixed(record);
            format!("{e}; {}", e.hint_text().unwrap_or_default())
        }
    });
    for (name, scratch) in record.backup.disks.iter().map(|d| (&d.name, &d.scratch)) {
        let there = if scratch.exists() { "is there" } else { "is gone" };
        said.push(format!("disk '{name}': the scratch file {} {there}", scratch.display()));
    }
    Ok((said, step == Next::Halt))
}

#[cfg(test)]
#[path = "backup_tests.rs"]
mod tests;
