//! The dead-man: a second process, armed before the guest is frozen or paused, that lets the guest go if the driver is
//! killed, hangs, or takes too long (I2).
//!
//! It runs in a session of its own with its own libvirt connection, so that neither a signal to the driver's process
//! group nor a stuck call in the driver reaches it. Driver and dead-man talk in lines over its stdin and stdout:
//!
//! ```text
//! > arm 5000         from now on act at end of file, or after 5000 ms
//! < armed
//! > disarm
//! < disarmed         or "fired", if it has acted: the driver has to observe again
//! ```
//!
//! It never resumes blindly: it runs the same [`settle`](crate::replicate::settle) loop with [`Goal::Released`], which
//! retires what was pivoted before it resumes (I3). A driver that is still alive when the deadline passes is killed
//! first: two hands on one domain are worse than none.
//!
//! A run by backup arms it only while the guest's file systems are held: there is nothing else to let go. But while the
//! job goes on every write of the guest's fills the scratch files, which only the driver watches; so at end of file a
//! backup that is still on record is ended at once. So is a hook run that the driver owes.

use super::guard::{PauseGuard, Unguarded};
use super::stopped;
use crate::error::{Error, Kind, Result};
use crate::hypervisor::backup::BackupJob;
use crate::hypervisor::guest::GuestAgent;
use crate::hypervisor::{Backups, Hypervisor};
use crate::name::DomainUuid;
use crate::replicate::capture::quiesce::{self, Settled};
use crate::replicate::capture::{backup, freeze_hooks};
use crate::replicate::settle::options::SettleOptions;
use crate::replicate::settle::{Goal, Outcome, Settler};
use crate::replicate::state::journal::{self, DEADMAN, Journal};
use crate::replicate::state::record::Record;
use jiff::Timestamp;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How long the dead-man may take to start and to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);

/// How long it goes on trying to reach a libvirt that does not answer, before it gives up.
const TRY_FOR: Duration = Duration::from_secs(600);

/// The driver's end. Dropping it (or dying) is the dead-man's end of file.
#[derive(Debug)]
pub struct Deadman {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    armed: bool,
}

impl Deadman {
    /// Starts `command` (this program's own dead-man subcommand) and waits until it has its libvirt connection.
    pub fn start(mut command: Command) -> Result<Deadman> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        // A crash test kills the driver, not its rescuer.
        command.env_remove("VIRT_REPLICA_FAILPOINT");
        // SAFETY: setsid is async-signal-safe and touches nothing of this process's memory.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                Ok(())
            });
        }
        let mut child = command.spawn().map_err(|e| Error::from_io("cannot start the dead-man", e))?;
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("it was piped"));
        let mut deadman = Deadman { child, input, output, armed: false };
        deadman.expect(&["ready"])?;
        Ok(deadman)
    }

    /// Ends it: nothing may be armed any more.
    pub fn close(mut self) -> Result<()> {
        self.input = None;
        self.child.wait().map(drop).map_err(|e| Error::from_io("cannot wait for the dead-man", e))
    }

    fn say(&mut self, line: &str) -> Result<()> {
        let input = self.input.as_mut().ok_or_else(|| Error::new(Kind::Io, "the dead-man was already closed"))?;
        writeln!(input, "{line}").and_then(|()| input.flush()).map_err(|e| Error::from_io("the dead-man is gone", e))
    }

    /// Reads one line and returns which of the expected it is.
    fn expect(&mut self, expected: &[&str]) -> Result<usize> {
        let give_up_at = Instant::now() + ANSWER_WITHIN;
        while self.output.buffer().is_empty() {
            let left = give_up_at.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let mut fds = [PollFd::new(self.output.get_ref(), PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => {
                    return Err(Error::new(
                        Kind::Interrupted,
                        "the dead-man does not answer; the guest is not touched",
                    ));
                }
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(Error::from_io("cannot wait for the dead-man", e.into())),
            }
        }
        let mut line = String::new();
        self.output.by_ref().take(4096).read_line(&mut line).map_err(|e| Error::from_io("the dead-man is gone", e))?;
        let line = line.trim_end();
        expected.iter().position(|e| *e == line).ok_or_else(|| {
            let said = if line.is_empty() { "nothing, it has ended" } else { line };
            Error::new(Kind::Refused, format!("the dead-man cannot guard the guest: it said {said}"))
        })
    }
}

impl PauseGuard for Deadman {
    fn arm(&mut self, within: Duration) -> Result<()> {
        self.say(&format!("arm {}", within.as_millis()))?;
        self.expect(&["armed"])?;
        self.armed = true;
        Ok(())
    }

    fn disarm(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.armed) {
            return Ok(());
        }
        self.say("disarm")?;
        match self.expect(&["disarmed", "fired"])? {
            0 => Ok(()),
            _ => Err(Error::new(Kind::Interrupted, "the dead-man let the guest go: this run took too long")),
        }
    }
}

/// What the dead-man needs to act.
pub struct Charge<'a> {
    /// Connection to libvirt that belongs to the dead-man alone.
    pub hypervisor: &'a dyn Hypervisor,
    /// The guest agent, which is asked to let the guest's file systems go.
    pub guest: &'a dyn GuestAgent,
    /// Backup jobs in libvirt: one that the driver left behind is ended.
    pub backups: &'a dyn Backups,
    /// State directory of the program on this host.
    pub state: &'a Path,
    /// UUID of the domain that is guarded.
    pub uuid: DomainUuid,
    /// Lets go a guest that is held for something that is no run.
    pub others: &'a dyn Fn() -> Result<()>,
    /// The driver, to end it if it hangs.
    pub driver: Option<OwnedFd>,
}

/// The dead-man's end: serves its driver until end of file. Blocks for as long as the driver lives.
pub fn serve(input: impl Read + Send + 'static, mut output: impl Write, charge: &Charge) -> Result<()> {
    let (lines_tx, lines) = channel::<String>();
    std::thread::spawn(move || {
        for line in BufReader::new(input).lines().map_while(std::io::Result::ok) {
            if lines_tx.send(line).is_err() {
                return;
            }
        }
    });
    // A driver that is gone cannot be answered, and does not need to be.
    let mut answer = |text: &str| drop(writeln!(output, "{text}").and_then(|()| output.flush()));
    let mut deadline: Option<Instant> = None;
    let mut fired = false;
    answer("ready");
    loop {
        let line = match deadline {
            Some(at) => lines.recv_timeout(at.saturating_duration_since(Instant::now())),
            None => lines.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match line {
            Ok(line) => match line.split_once(' ').unwrap_or((&line, "")) {
                ("arm", ms) => {
                    let ms = ms.parse().map_err(|_| Error::new(Kind::Protocol, "arm needs milliseconds"))?;
                    deadline = Some(Instant::now() + Duration::from_millis(ms));
                    answer("armed");
                }
                ("disarm", _) => {
                    deadline = None;
                    answer(if std::mem::take(&mut fired) { "fired" } else { "disarmed" });
                }
                _ => return Err(Error::new(Kind::Protocol, format!("the dead-man does not know {line:?}"))),
            },
            Err(RecvTimeoutError::Timeout) => {
                tracing::error!(domain = %charge.uuid, "the driver holds the guest for too long: ending it, letting the guest go");
                kill_driver(charge);
                release(charge)?;
                (deadline, fired) = (None, true);
            }
            Err(RecvTimeoutError::Disconnected) if deadline.is_some() => {
                tracing::error!(domain = %charge.uuid, "the driver died while it may have held the guest: letting the guest go");
                return release(charge).and_then(|()| finish(charge));
            }
            Err(RecvTimeoutError::Disconnected) => return finish(charge),
        }
    }
}

fn kill_driver(charge: &Charge) {
    if let Some(driver) = &charge.driver
        && let Err(e) = rustix::process::pidfd_send_signal(driver, rustix::process::Signal::KILL)
    {
        tracing::error!("cannot end the driver: {e}");
    }
}

/// Lets the guest go, whatever it takes.
fn release(charge: &Charge) -> Result<()> {
    persist(charge, &try_release)
}

/// Ends the backup that a driver left, and runs the hook that it owes; one that ended in order has left none. In this
/// order: while the backup goes on, every write of the guest's fills its scratch files, and a hook may take its time.
fn finish(charge: &Charge) -> Result<()> {
    persist(charge, &end_backup)?;
    persist(charge, &run_owed_hook)
}

fn end_backup(charge: &Charge) -> Result<()> {
    if journal::peek_backup(charge.state, &charge.uuid)?.is_none() {
        return Ok(());
    }
    tracing::error!(domain = %charge.uuid, "the driver is gone and its backup is not: ending it");
    let journal = Journal::open(charge.state, &charge.uuid, DEADMAN, Timestamp::now())?;
    match backup::settle(charge.hypervisor, charge.backups, &journal, &charge.uuid) {
        // What is left is files: the next run, or doctor, removes them. Only a job that goes on fills the host.
        Err(e) if is_left(&e, || charge.backups.running_backup(&charge.uuid)) => {
            tracing::error!(domain = %charge.uuid, "no backup runs; what it left stays for the next run: {}", e.chain());
        }
        done => drop(done?),
    }
    // The scratch files are gone: a guest that found no room in them need not wait for the next run.
    let stopped = stopped::settle(charge.hypervisor, &journal, &charge.uuid)?;
    stopped.iter().for_each(|stopped| tracing::error!(domain = %charge.uuid, "{}", stopped.why));
    Ok(())
}

/// Whether what a backup left stays for the next run. If libvirt did not answer, nothing was found out: it may just
/// have started again, and then it knows of no job the moment after.
fn is_left(error: &Error, running: impl FnOnce() -> Result<BackupJob>) -> bool {
    error.kind() != Kind::Unavailable && !may_go_on(running())
}

/// Whether a job fills scratch files, as far as libvirt knows; one that does not answer may hide one.
fn may_go_on(running: Result<BackupJob>) -> bool {
    !matches!(running, Ok(BackupJob::None))
}

fn run_owed_hook(charge: &Charge) -> Result<()> {
    if !journal::peek_hook(charge.state, &charge.uuid)? {
        return Ok(());
    }
    let journal = Journal::open(charge.state, &charge.uuid, DEADMAN, Timestamp::now())?;
    if let Some(warning) = freeze_hooks::settle(&journal)? {
        tracing::error!(domain = %charge.uuid, "{warning}");
    }
    Ok(())
}

/// Tries until it is done: libvirt may be down, another hand may be settling already.
fn persist(charge: &Charge, act: &dyn Fn(&Charge) -> Result<()>) -> Result<()> {
    let give_up_at = Instant::now() + TRY_FOR;
    loop {
        match act(charge) {
            Ok(()) => return Ok(()),
            Err(e) if Instant::now() > give_up_at => return Err(e),
            Err(e) => tracing::warn!(domain = %charge.uuid, "not yet: {}", e.chain()),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn try_release(charge: &Charge) -> Result<()> {
    (charge.others)()?;
    // Whoever else holds the lock is settling the domain, which lets the guest go first of all; look again after it.
    let journal = Journal::open(charge.state, &charge.uuid, DEADMAN, Timestamp::now())?;
    // What is held longest first: a guest agent is asked for no longer than some seconds.
    let settled = quiesce::settle(charge.hypervisor, charge.guest, &journal, &charge.uuid)?;
    if let Some(record) = journal.record()? {
        release_vcpus(charge, &journal, record)?;
    }
    // Asked again and again until the time is up: the guest may be held.
    match settled {
        Settled::Nothing | Settled::LetGo => Ok(()),
        Settled::Silent(alarm) => Err(Error::new(Kind::Unavailable, alarm)),
    }
}

fn release_vcpus(charge: &Charge, journal: &Journal, record: Record) -> Result<()> {
    let mut guard = Unguarded;
    let mut settler = Settler::new(charge.hypervisor, journal, record, &mut guard, SettleOptions::default());
    match settler.run(Goal::Released)? {
        Outcome::Reached | Outcome::Pending(_) => Ok(()),
        Outcome::Halted(halt) => Err(super::halts::halt_error(&settler.record, &halt)),
    }
}

/// A handle on the process that started this one, for [`Charge::driver`].
pub fn parent() -> Option<OwnedFd> {
    let pid = rustix::process::getppid()?;
    // A driver that died before we looked has made us an orphan: whoever adopted us is not to be killed.
    if pid.as_raw_pid() == 1 {
        return None;
    }
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An error that no waiting mends is told once, and not for ten minutes.
    #[test]
    fn only_a_backup_that_may_go_on_is_tried_again() {
        assert!(!may_go_on(Ok(BackupJob::None)));
        assert!(may_go_on(Ok(BackupJob::Hollow)));
        assert!(may_go_on(Err(Error::new(Kind::Unavailable, "libvirt is down"))));
        // What failed because libvirt was away is tried again, also if it is back when it is asked for a job.
        let was_away = Error::new(Kind::Unavailable, "libvirt was away");
        assert!(!is_left(&was_away, || Ok(BackupJob::None)));
        let damaged = || Error::new(Kind::Corrupt, "the record cannot be understood");
        assert!(is_left(&damaged(), || Ok(BackupJob::None)));
        assert!(!is_left(&damaged(), || Ok(BackupJob::Hollow)));
    }
}
