//! The one gate through which a run asks its target anything once a point is begun.
//!
//! An agent can be alive, answer every ping, and never answer the request: its storage hangs, or a person stopped
//! it. While the guest writes to overlays, nothing may wait for such an answer without asking whether the guest may
//! still be held. So each call runs on a thread of its own, and its caller waits until the first of three things:
//! the answer comes, the run is [`Cut`], or the time for one answer has passed.
//!
//! Invariants
//! - No caller waits longer than that, whatever the target, the link or the adapter behind [`Replica`] do.
//! - The first reason that cuts a run is the reason of everything that ends with it.
//! - The commit comes first. Only after it [`TargetGate::last_word`] waits for what the target still owes: the
//!   answer to a seal counts however late it comes, for all bytes had been read and confirmed before the seal was
//!   asked for (I5, I14).
//!
//! Price: a thread for each call (some 30 µs), and a copy of the patch bytes. A call that was left behind keeps its
//! thread until the session ends. docs/decisions/0030-waits-for-the-target-are-bounded.md has the reasons.

use super::plan::CaptureKind;
use crate::block::BlockIndex;
use crate::block::digest::{BlockPieces, Digest};
use crate::engine::disk_target::{DiskApplied, DiskTarget};
use crate::error::{Error, Kind, Result};
use crate::name::{DiskName, PointId};
use crate::replica::{Attachment, BeginPoint, Begun, PointView, Replica, ReplicaView, SealPoint, VerifyReport};
use crate::units::duration;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often a caller that waits asks whether the run was cut.
const TICK: Duration = Duration::from_millis(50);

/// How often the watch looks at the limits.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Longest wait for one answer while a guest writes to overlays, or QEMU to scratch files. A group of blocks on a
/// thin link takes a minute at worst; a seal that takes longer is waited for after the commit.
const ANSWER_WITHIN: Duration = Duration::from_secs(5 * 60);

/// The same of a domain that is off, and not by our hand.
const ANSWER_WITHIN_OFF: Duration = Duration::from_secs(30 * 60);

/// How long the answer to a seal is waited for once the guest is back on its own images.
const SEAL_WITHIN: Duration = Duration::from_secs(10 * 60);

/// The same after a signal: somebody waits for the end of the run.
const SEAL_WITHIN_STOPPED: Duration = Duration::from_secs(30);

/// How long a target may take to give up a point. The agent does so by itself when the session ends.
const GIVE_UP_WITHIN: Duration = Duration::from_secs(30);

/// The same after a signal.
const GIVE_UP_WITHIN_STOPPED: Duration = Duration::from_secs(5);

/// A wait that is worth a word in the report.
const LONG: Duration = Duration::from_secs(1);

/// Why nothing is waited for any more; the first reason counts.
#[derive(Default)]
pub(super) struct Cut(Mutex<Option<Error>>);

impl Cut {
    pub fn because(&self, why: Error) {
        lock(&self.0).get_or_insert(why);
    }

    pub fn check(&self) -> Result<()> {
        lock(&self.0).as_ref().map_or(Ok(()), |why| Err(why.again()))
    }
}

/// Runs `body` while `good` is asked again and again on a thread of its own, whatever `body` waits for. The first
/// error of `good` cuts.
pub(super) fn watched<T>(cut: &Cut, good: &(dyn Fn() -> Result<()> + Sync), body: impl FnOnce() -> T) -> T {
    let (end, ended) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while ended.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
                if let Err(e) = good() {
                    return cut.because(e);
                }
            }
        });
        // Dropped behind the body, and by a panic in it too: both end the watch.
        let _end = end;
        body()
    })
}

/// An answer that is owed.
pub(super) struct Owed<T> {
    answer: Receiver<Result<T>>,
    asker: Option<JoinHandle<()>>,
    asked: Instant,
}

impl<T> Owed<T> {
    /// The answer, if it comes within `time`.
    fn within(&mut self, time: Duration) -> Option<Result<T>> {
        match self.answer.recv_timeout(time) {
            Ok(answer) => Some(answer),
            Err(RecvTimeoutError::Timeout) => None,
            // Only a panic in the call drops the sender: the panic belongs to the caller.
            Err(RecvTimeoutError::Disconnected) => match self.asker.take().map(JoinHandle::join) {
                Some(Err(panic)) => std::panic::resume_unwind(panic),
                _ => unreachable!("the thread sends before it ends"),
            },
        }
    }
}

impl<T> Owed<T> {
    /// The answer, if it comes within `time` from now; after a signal within the other one.
    fn within_either(&mut self, time: Duration, stopped: Duration, stop: &AtomicBool) -> Option<Result<T>> {
        let began = Instant::now();
        loop {
            if let Some(answer) = self.within(TICK) {
                return Some(answer);
            }
            let within = if stop.load(Ordering::Relaxed) { stopped } else { time };
            if began.elapsed() >= within {
                return None;
            }
        }
    }
}

/// The time for each kind of wait. Tests have other ones.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    pub answer: Duration,
    pub seal: Duration,
    pub seal_stopped: Duration,
    pub give_up: Duration,
    pub give_up_stopped: Duration,
}

impl Patience {
    /// `handover`: the domain is off because we shut it down, and somebody waits for its service.
    pub fn of(capture: CaptureKind, handover: bool) -> Self {
        let answer = match capture {
            CaptureKind::Off if !handover => ANSWER_WITHIN_OFF,
            CaptureKind::Overlay | CaptureKind::Backup | CaptureKind::Off => ANSWER_WITHIN,
        };
        let (seal, seal_stopped) = (SEAL_WITHIN, SEAL_WITHIN_STOPPED);
        let (give_up, give_up_stopped) = (GIVE_UP_WITHIN, GIVE_UP_WITHIN_STOPPED);
        Self { answer, seal, seal_stopped, give_up, give_up_stopped }
    }
}

/// A replica whose answers are waited for only as long as the run may wait.
pub(super) struct TargetGate {
    replica: Arc<dyn Replica>,
    cut: Cut,
    patience: Patience,
    /// The seal that was asked for and not answered when the run was cut.
    sealing: Mutex<Option<Owed<PointView>>>,
}

impl TargetGate {
    pub fn new(replica: Box<dyn Replica>, patience: Patience) -> Self {
        Self { replica: Arc::from(replica), cut: Cut::default(), patience, sealing: Mutex::default() }
    }

    pub fn cut(&self) -> &Cut {
        &self.cut
    }

    /// Asks on a thread of its own, and does not wait.
    fn begin<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Replica) -> Result<T> + Send + 'static,
    ) -> Result<Owed<T>> {
        let (tell, answer) = mpsc::sync_channel(1);
        let replica = Arc::clone(&self.replica);
        let asker = std::thread::Builder::new()
            .name("ask-target".into())
            .spawn(move || {
                // Nobody listens any more if the caller has left.
                let _ = tell.send(work(replica.as_ref()));
            })
            .map_err(|e| Error::from_io("cannot start a thread that asks the target", e))?;
        Ok(Owed { answer, asker: Some(asker), asked: Instant::now() })
    }

    /// Waits; the outer error says that the caller leaves without the answer. `what`: in the infinitive.
    fn wait<T>(&self, owed: &mut Owed<T>, what: &str) -> Result<Result<T>> {
        loop {
            if let Some(answer) = owed.within(TICK) {
                return Ok(answer);
            }
            let waited = owed.asked.elapsed();
            if waited >= self.patience.answer {
                self.cut.because(no_answer(self.patience.answer));
            }
            self.cut.check().map_err(|e| match waited >= LONG {
                true => e.more(&format!("it had waited {} for the target to {what}", seconds(waited))),
                false => e,
            })?;
        }
    }

    fn ask<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce(&dyn Replica) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.cut.check()?;
        self.wait(&mut self.begin(work)?, what)?
    }

    /// Tells the target to give up the open point, and does not wait for it: see [`TargetGate::last_word`]. A
    /// target that still seals is told nothing: its answer decides.
    pub fn give_up(&self) -> Option<Owed<()>> {
        if lock(&self.sealing).is_some() {
            return None;
        }
        self.begin(|replica| replica.abandon()).map_err(|e| tracing::debug!("{}", e.chain())).ok()
    }

    /// What became of the point, once the guest is back on its own images: waits, in a bounded time, for the answer
    /// to a seal that was left behind, and for a point to be given up. The second value: what an operator should
    /// know about a late seal.
    pub fn last_word(
        &self,
        sealed: Result<PointView>,
        given_up: Option<Owed<()>>,
        stop: &AtomicBool,
    ) -> (Result<PointView>, Option<String>) {
        if let Some(owed) = given_up {
            self.note_given_up(owed, stop);
        }
        let (Err(why), Some(mut owed)) = (&sealed, lock(&self.sealing).take()) else { return (sealed, None) };
        let answer = match owed.within_either(self.patience.seal, self.patience.seal_stopped, stop) {
            Some(answer) => answer,
            None => {
                let e = why.again().more("the target has not said whether it sealed the point");
                return (
                    Err(e.hint("the next run asks the target for its newest point; look at the target's storage")),
                    None,
                );
            }
        };
        match answer {
            Ok(point) => {
                let took = seconds(owed.asked.elapsed());
                (Ok(point), Some(format!("{why}; the target sealed the point all the same, after {took}")))
            }
            Err(e) => (Err(e), None),
        }
    }

    fn note_given_up(&self, mut owed: Owed<()>, stop: &AtomicBool) {
        match owed.within_either(self.patience.give_up, self.patience.give_up_stopped, stop) {
            Some(Ok(())) => {}
            // It is rubbish by definition; the next run throws it away.
            Some(Err(e)) => tracing::debug!("cannot abandon the open point: {}", e.chain()),
            None => tracing::debug!("the target did not say that it gave up the open point"),
        }
    }
}

fn seconds(d: Duration) -> String {
    format!("{:.1} s", d.as_secs_f64())
}

fn no_answer(within: Duration) -> Error {
    let what = format!("the target did not answer within {}; the run was cut short", duration(within));
    Error::new(Kind::Unavailable, what).hint(
        "the agent there lives, and its storage may hang: look at the target for a process in state D (`ps`) and at `dmesg`, then run again",
    )
}

impl DiskTarget for TargetGate {
    fn nodes(&self, disk: &DiskName, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        let disk = disk.clone();
        self.ask("tell its digests", move |replica| replica.nodes(&disk, level, range))
    }

    fn pieces(&self, disk: &DiskName, blocks: &[BlockIndex]) -> Result<Vec<BlockPieces>> {
        let (disk, blocks) = (disk.clone(), blocks.to_vec());
        self.ask("tell the digests of pieces", move |replica| replica.pieces(&disk, &blocks))
    }

    fn apply(&self, disk: &DiskName, patch_bytes: &[u8]) -> Result<()> {
        let (disk, bytes) = (disk.clone(), patch_bytes.to_vec());
        self.ask("take what was sent", move |replica| replica.apply(&disk, &bytes))
    }

    fn finish_disk(&self, disk: &DiskName) -> Result<DiskApplied> {
        let (what, disk) = (format!("finish disk '{disk}'"), disk.clone());
        self.ask(&what, move |replica| replica.finish_disk(&disk))
    }
}

impl Replica for TargetGate {
    fn describe(&self) -> Result<ReplicaView> {
        self.ask("describe the replica", |replica| replica.describe())
    }

    fn begin(&self, request: &BeginPoint) -> Result<Begun> {
        let request = request.clone();
        self.ask("begin a point", move |replica| replica.begin(&request))
    }

    fn attach(&self, name: Attachment, content: &[u8]) -> Result<()> {
        let (what, content) = (format!("take {}", name.file_name()), content.to_vec());
        self.ask(&what, move |replica| replica.attach(name, &content))
    }

    fn seal(&self, request: &SealPoint) -> Result<PointView> {
        self.cut.check()?;
        let request = request.clone();
        let mut owed = TargetGate::begin(self, move |replica| replica.seal(&request))?;
        match self.wait(&mut owed, "seal the point") {
            Ok(answer) => answer,
            Err(e) => {
                *lock(&self.sealing) = Some(owed);
                Err(e)
            }
        }
    }

    /// Also of a run that was cut.
    fn abandon(&self) -> Result<()> {
        if let Some(owed) = self.give_up() {
            self.note_given_up(owed, &AtomicBool::new(false));
        }
        Ok(())
    }

    fn verify(&self, point: &PointId, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport> {
        // No run verifies; whoever does has a session of its own, which bounds it.
        self.replica.verify(point, progress)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while it holds this lock")
}

#[cfg(test)]
#[path = "target_gate_tests.rs"]
mod tests;
