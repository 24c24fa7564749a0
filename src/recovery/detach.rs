//! Gives a domain that was brought up here, for good, images of its own: what its overlays have only by the point is
//! copied into them, while the guest works, or to raw images ([`raw`]). Then the point is free, and the replica takes
//! runs again from whoever is of this generation.
//!
//! Invariants
//! - The guest writes to the same images, under the same names, from beginning to end: no crash can bring back an older
//!   one. Raw ones excepted, which have rules of their own for that.
//! - The point stays leased until every image stands alone, durably (g3 before g4). QEMU changes an image's header
//!   before its tables are safe, so an image that names no backing image is believed only after it was flushed by the
//!   very QEMU that copied it; otherwise it gets its point back first, which it then covers again.
//! - Every step may be done twice. Whatever dies, the same command goes on from the record, and copying goes on in QEMU
//!   meanwhile.
//!
//! Steps: docs/recovery.md.

pub mod raw;

use super::failover::FailoverState;
use crate::error::{Error, Kind, Result, advice};
use crate::failpoint;
use crate::hypervisor::flatten::Flattening;
use crate::hypervisor::relocate::Relocating;
use crate::image::{Chain, Format, Layer, qemu_img};
use crate::name::{DiskName, Generation};
use crate::recovery::record::{FailoverRecord, Instance, Stage};
use crate::replica::upkeep::{Held, Promoting};
use crate::replicate::settle::guard::PauseGuard;
use crate::replicate::state::journal::boot_id;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How often is looked after a copy.
const LOOK: Duration = Duration::from_millis(500);

/// What is needed of the world.
pub struct Ports<'a> {
    /// QEMU's jobs that copy a backing image into the overlay above it.
    pub flattening: &'a dyn Flattening,
    /// QEMU's jobs that copy a disk to another image. Used for disks that become raw.
    pub relocating: &'a dyn Relocating,
    /// A dead-man for the domain.
    pub guard: &'a dyn Fn() -> Result<Box<dyn PauseGuard>>,
    /// The domain's replica in this host's store. It is told when the domain needs its point no longer.
    pub replica: &'a dyn Promoting,
    /// Told what is done now, in words.
    pub say: &'a dyn Fn(&str),
    /// Told how far a disk is: bytes done, bytes in all.
    pub progress: &'a dyn Fn(&DiskName, u64, u64),
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// That of this host.
    pub generation: Generation,
    /// Most bytes that QEMU copies in one second. `None`: no limit.
    pub rate_bytes: Option<u64>,
    /// See [`raw::disks`].
    pub raw: Vec<DiskName>,
}

/// What was done.
#[derive(Debug, Clone, PartialEq)]
pub struct Detached {
    /// Record of the failover at stage `Detached`, as it stood before it was closed.
    pub record: FailoverRecord,
    /// Where an image may be a mixture, and why.
    pub warnings: Vec<String>,
}

/// A disk, at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Its image names a backing image.
    pub backed: bool,
    /// A job of QEMU's is at work on it.
    pub job: bool,
    /// It runs, in the instance that is recorded, or in another one.
    pub runs: Option<Instanced>,
}

/// Whether the running QEMU is the one that was recorded when the copying began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instanced {
    /// The domain still runs in the recorded QEMU instance.
    AsRecorded,
    /// The domain runs in another QEMU instance: it was restarted after the record was written.
    Another,
}

/// What is to be done next about a disk that does not stand alone durably yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Until the job has ended.
    Wait,
    /// Let QEMU copy.
    Pull,
    /// Copy it here: the domain is off.
    Copy,
    /// Have it written out: then it stands alone.
    Flush,
    /// The same, and say that nobody knows whether its tables had been complete.
    FlushInDoubt,
    /// Its tables may not be complete: it gets the point below it again. That is harmless where they are: what the
    /// guest wrote, zeroed or discarded since is marked in them (QEMU marks a discarded cluster as zeros), and covers
    /// the point.
    Reattach,
}

/// Pure; the whole of it is walked through in a test.
pub fn step(seen: Seen) -> Step {
    match seen {
        Seen { job: true, .. } => Step::Wait,
        Seen { backed: true, runs: Some(_), .. } => Step::Pull,
        Seen { backed: true, runs: None, .. } => Step::Copy,
        Seen { backed: false, runs: Some(Instanced::AsRecorded), .. } => Step::Flush,
        // The guest has been writing to it since: what it covers now must not come up from below again.
        Seen { backed: false, runs: Some(Instanced::Another), .. } => Step::FlushInDoubt,
        Seen { backed: false, runs: None, .. } => Step::Reattach,
    }
}

/// Goes on until every disk stands alone and the replica is free, durably. Blocks as long as there is data to copy, at
/// most `rate_bytes` in a second. `held`: the point; not needed once the record says [`Stage::Detached`]. `stop`: a
/// signal came; QEMU goes on to copy what it copies.
pub fn run(
    ports: &Ports,
    state: &FailoverState,
    held: Option<&dyn Held>,
    request: &Request,
    stop: &AtomicBool,
) -> Result<Detached> {
    let Some(mut record) = state.record()? else {
        return Err(Error::new(Kind::NotFound, "the domain reads no point: there is no failover of it here"));
    };
    let mut warnings = Vec::new();
    raw::let_go(ports.relocating, state, &mut record)?;
    match (record.stage, held) {
        (Stage::Committed | Stage::Detaching, Some(held)) => {
            record.stage = Stage::Detaching;
            record.raw = request.raw.clone();
            state.write(&record)?;
            failpoint!("g1");
            for disk in held.point().disks.iter().map(|d| &d.name) {
                if record.detached.contains(disk) {
                    continue;
                }
                (ports.say)(&format!("giving disk {disk} an image of its own"));
                let rate_bytes = request.rate_bytes;
                let mut one = One { ports, state, record: &mut record, disk, rate_bytes, stop };
                warnings.extend(one.stand_alone(held).map_err(|e| e.disk(disk))?);
                record.detached.push(disk.clone());
                state.write(&record)?;
                failpoint!("g2");
            }
            record.stage = Stage::Detached;
            state.write(&record)?;
            failpoint!("g3");
        }
        (Stage::Committed | Stage::Detaching, None) => {
            return Err(Error::new(Kind::Usage, "the point that the domain reads is not held"));
        }
        (Stage::Detached, _) => {}
        (Stage::HandingBack, _) => {
            return Err(Error::new(Kind::Refused, "the domain was handed on, and lives elsewhere")
                .advise(advice::Failover::FinishFailback));
        }
        (Stage::Begun | Stage::Made | Stage::Running | Stage::Undoing, _) => {
            return Err(Error::new(Kind::Refused, "the failover was not committed: it may still be undone")
                .advise(advice::Failover::Commit));
        }
    }
    ports.replica.conclude(request.generation)?;
    failpoint!("g4");
    state.close()?;
    failpoint!("g5");
    Ok(Detached { record, warnings })
}

fn stopped(stop: &AtomicBool) -> Result<()> {
    match stop.load(Ordering::Relaxed) {
        true => Err(Error::new(Kind::Interrupted, "stopped; what QEMU copies it goes on copying")
            .advise(advice::Failover::DetachAgain)),
        false => Ok(()),
    }
}

/// One disk on its way.
struct One<'a> {
    ports: &'a Ports<'a>,
    state: &'a FailoverState,
    record: &'a mut FailoverRecord,
    disk: &'a DiskName,
    rate_bytes: Option<u64>,
    stop: &'a AtomicBool,
}

impl One<'_> {
    /// Durable when it returns. Gives what is in doubt.
    fn stand_alone(&mut self, held: &dyn Held) -> Result<Option<String>> {
        let path = self.record.dir.join(format!("{}.qcow2", self.disk));
        let mut layers =
            vec![Layer { path: path.clone(), format: Format::Qcow2, block_device: false, data_file: None }];
        layers.extend(held.images(self.disk)?.0);
        let chain = Chain(layers);
        if self.record.raw.contains(self.disk) {
            return self.become_raw(&chain).map(|()| None);
        }
        let mut copied = 0;
        loop {
            stopped(self.stop)?;
            let seen = self.look(&path)?;
            let todo = step(seen);
            if matches!(todo, Step::Pull | Step::Copy) {
                self.again(&mut copied, &path)?;
            }
            match todo {
                Step::Wait => self.wait()?,
                Step::Pull => {
                    self.note_instance()?;
                    self.ports.flattening.begin_pull(&self.record.uuid, self.disk, self.rate_bytes)?;
                }
                Step::Copy => {
                    self.note_instance()?;
                    qemu_img::stand_alone(&chain)?;
                    // Its program has written out all that it had before it ended.
                    return Ok(None);
                }
                Step::Flush | Step::FlushInDoubt => {
                    self.ports.flattening.flush(&self.record.uuid, chain.top())?;
                    qemu_img::fsync(&path)?;
                    let doubt =
                        "the domain was started anew while it was given images of its own: look at its file systems";
                    return Ok((todo == Step::FlushInDoubt).then(|| format!("disk {}: {doubt}", self.disk)));
                }
                Step::Reattach => self.reattach(&chain)?,
            }
        }
    }

    /// A copy is begun once: it ends without a word, and this is how a failure is known.
    fn again(&self, copied: &mut u32, path: &Path) -> Result<()> {
        *copied += 1;
        match *copied {
            1 => Ok(()),
            _ => Err(Error::new(Kind::Refused, "the copying ended before its end")
                .path(path)
                .advise(advice::Failover::DetachAfterLook)),
        }
    }

    fn look(&self, path: &Path) -> Result<Seen> {
        let uuid = &self.record.uuid;
        let instance = self.ports.flattening.instance(uuid)?;
        let runs = instance.map(|id| match Some(Instance { id, boot: boot_id() }) == self.record.detaching_in {
            true => Instanced::AsRecorded,
            false => Instanced::Another,
        });
        let job = instance.is_some() && self.ports.flattening.job(uuid, self.disk)?.is_some();
        let backed = qemu_img::info(path, Format::Qcow2, true)?.backing.is_some();
        Ok(Seen { backed, job, runs })
    }

    /// Whoever copies is recorded before it begins; durable when it returns.
    fn note_instance(&mut self) -> Result<()> {
        let id = self.ports.flattening.instance(&self.record.uuid)?;
        self.record.detaching_in = id.map(|id| Instance { id, boot: boot_id() });
        self.state.write(self.record)
    }

    fn wait(&self) -> Result<()> {
        if let Some(job) = self.ports.flattening.wait(&self.record.uuid, self.disk, LOOK)? {
            (self.ports.progress)(self.disk, job.done_bytes, job.total_bytes);
        }
        Ok(())
    }

    fn reattach(&self, chain: &Chain) -> Result<()> {
        let [overlay, below, ..] = chain.0.as_slice() else { unreachable!("a point has an image of every disk") };
        let name =
            below.path.to_str().ok_or_else(|| Error::new(Kind::Usage, "its name is no text").path(&below.path))?;
        qemu_img::rebase_unsafe(&overlay.path, Some((name, below.format)))
    }
}

#[cfg(test)]
#[path = "detach_tests.rs"]
mod tests;
