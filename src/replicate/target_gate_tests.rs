//! Targets that take their time: some answer late, some never.

use super::*;
use crate::engine::pump::tests::{Disk, Fault, Memory, pattern, shipment};
use crate::engine::pump::{self, Progress};
use crate::name::{Generation, RunId};
use crate::replica::left_out::LeftOut;
use crate::replica::{Consistency, VerifyReport};
use jiff::Timestamp;
use std::sync::Condvar;
use std::sync::atomic::AtomicUsize;

/// A replica that does not answer one verb until it is let go.
struct Mute {
    verb: &'static str,
    memory: Memory,
    go: (Mutex<bool>, Condvar),
    given_up: AtomicUsize,
}

impl Mute {
    fn at(&self, verb: &str) {
        if verb == self.verb {
            drop(self.go.1.wait_while(self.go.0.lock().unwrap(), |go| !*go).unwrap());
        }
    }
}

/// The test's hold on it; what was left behind ends with the test.
struct Hold(Arc<Mute>);

impl Hold {
    fn let_go(&self) {
        *self.0.go.0.lock().unwrap() = true;
        self.0.go.1.notify_all();
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.let_go();
    }
}

struct Far(Arc<Mute>);

impl DiskTarget for Far {
    fn nodes(&self, disk: &DiskName, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        self.0.at("nodes");
        self.0.memory.nodes(disk, level, range)
    }

    fn pieces(&self, disk: &DiskName, blocks: &[BlockIndex]) -> Result<Vec<BlockPieces>> {
        self.0.at("pieces");
        self.0.memory.pieces(disk, blocks)
    }

    fn apply(&self, disk: &DiskName, patch_bytes: &[u8]) -> Result<()> {
        self.0.at("apply");
        self.0.memory.apply(disk, patch_bytes)
    }

    fn finish_disk(&self, disk: &DiskName) -> Result<DiskApplied> {
        self.0.at("finish_disk");
        self.0.memory.finish_disk(disk)
    }
}

fn point() -> PointView {
    let run = RunId::from_bits(7);
    PointView {
        id: PointId::from_parts(1, &run),
        generation: Generation(1),
        frozen_at: Timestamp::UNIX_EPOCH,
        sealed_at: Timestamp::UNIX_EPOCH,
        consistency: Consistency::Crash,
        consistency_reason: None,
        autostart: None,
        tpm_programs: None,
        left_out: LeftOut::default(),
        run,
        disks: Vec::new(),
        attachments: Vec::new(),
    }
}

impl Replica for Far {
    fn describe(&self) -> Result<ReplicaView> {
        unreachable!("not asked here")
    }

    fn begin(&self, _: &BeginPoint) -> Result<Begun> {
        unreachable!("not asked here")
    }

    fn attach(&self, _: Attachment, _: &[u8]) -> Result<()> {
        self.0.at("attach");
        Ok(())
    }

    fn seal(&self, _: &SealPoint) -> Result<PointView> {
        self.0.at("seal");
        match self.0.verb {
            "seal fails" => Err(Error::new(Kind::Corrupt, "another root")),
            _ => Ok(point()),
        }
    }

    fn abandon(&self) -> Result<()> {
        self.0.given_up.fetch_add(1, Ordering::SeqCst);
        self.0.at("abandon");
        Ok(())
    }

    fn verify(&self, _: &PointId, _: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport> {
        unreachable!("not asked here")
    }
}

const OLD: usize = 9 << 20;

fn mute_at(verb: &'static str, patience: Patience) -> (Hold, TargetGate) {
    let memory = Memory::new(&pattern(OLD, 2), OLD, Fault::None);
    let mute = Arc::new(Mute { verb, memory, go: Default::default(), given_up: AtomicUsize::new(0) });
    (Hold(mute.clone()), TargetGate::new(Box::new(Far(mute)), patience))
}

const LONG_ENOUGH: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(150);

fn patient() -> Patience {
    Patience {
        answer: LONG_ENOUGH,
        seal: LONG_ENOUGH,
        seal_stopped: SHORT,
        give_up: LONG_ENOUGH,
        give_up_stopped: SHORT,
    }
}

fn too_old() -> Error {
    Error::new(Kind::Interrupted, "the overlay is older than it may get, 1s").hint("allow more")
}

/// Everything that a run asks of its target between freeze and commit.
fn steps_5_and_6(gate: &TargetGate) -> Result<PointView> {
    let (old, mut new) = (pattern(OLD, 2), pattern(OLD, 2));
    // A few bytes, so that pieces are asked for, and a whole group.
    new[70_000..70_010].fill(0xee);
    new[4 << 20..8 << 20].fill(0xdd);
    let disk = Disk::new(new);
    let good = || gate.cut().check();
    pump::ship(&disk, gate, &shipment(OLD, Some(&old)), &Progress::default(), &good)?;
    gate.attach(Attachment::LiveXml, b"<domain/>")?;
    gate.seal(&request())
}

fn request() -> SealPoint {
    SealPoint {
        frozen_at: Timestamp::UNIX_EPOCH,
        consistency: Consistency::Crash,
        consistency_reason: None,
        autostart: None,
        tpm_programs: None,
        left_out: LeftOut::default(),
        disks: Vec::new(),
    }
}

const VERBS: [&str; 6] = ["nodes", "pieces", "apply", "finish_disk", "attach", "seal"];

/// A limit that is reached ends every wait at once, and is the reason that is told, whichever verb has no answer.
#[test]
fn a_limit_ends_the_wait_for_a_target_that_never_answers() {
    for verb in VERBS {
        let (_hold, gate) = mute_at(verb, patient());
        let began = Instant::now();
        let good = || if began.elapsed() > SHORT { Err(too_old()) } else { Ok(()) };
        let e = watched(gate.cut(), &good, || steps_5_and_6(&gate)).unwrap_err();
        assert!(began.elapsed() < Duration::from_secs(10), "{verb}: {:?}", began.elapsed());
        assert_eq!(e.kind(), Kind::Interrupted, "{verb}: {e}");
        assert!(e.what().contains("older than it may get"), "{verb}: {e}");
        assert_eq!(e.hint_text(), Some("allow more"), "{verb}");
    }
}

/// Without any limit there still is an end, and the operator reads where to look.
#[test]
fn a_target_that_never_answers_is_not_waited_for_without_end() {
    for verb in VERBS {
        let (_hold, gate) = mute_at(verb, Patience { answer: SHORT, ..patient() });
        let began = Instant::now();
        let e = watched(gate.cut(), &|| Ok(()), || steps_5_and_6(&gate)).unwrap_err();
        assert!(began.elapsed() < Duration::from_secs(10), "{verb}: {:?}", began.elapsed());
        assert_eq!(e.kind(), Kind::Unavailable, "{verb}: {e}");
        assert!(e.what().contains("did not answer"), "{verb}: {e}");
        assert!(e.hint_text().unwrap().contains("state D"), "{verb}");
        // What is asked later is not even sent.
        assert_eq!(gate.nodes(&DiskName::new("vda").unwrap(), 0, 0..1).unwrap_err().kind(), Kind::Unavailable);
    }
}

/// A wait of seconds is told with what was waited for: the report says what ended the run, and where it stood.
#[test]
fn the_reason_says_what_was_waited_for() {
    let (_hold, gate) = mute_at("finish_disk", patient());
    let began = Instant::now();
    let good = || if began.elapsed() > Duration::from_millis(1200) { Err(too_old()) } else { Ok(()) };
    let e = watched(gate.cut(), &good, || gate.finish_disk(&DiskName::new("vda").unwrap())).unwrap_err();
    assert!(e.what().contains("for the target to finish disk 'vda'"), "{e}");
}

#[test]
fn a_target_that_answers_is_not_in_the_way() {
    let (_hold, gate) = mute_at("nothing", patient());
    let sealed = watched(gate.cut(), &|| Ok(()), || steps_5_and_6(&gate));
    assert_eq!(sealed.unwrap().id, point().id);
    assert!(gate.cut().check().is_ok());
    assert_eq!(gate.last_word(Ok(point()), None, &AtomicBool::new(false)).0.unwrap().id, point().id);
}

/// The commit does not wait for a seal; the seal counts all the same, with a word about the limit.
#[test]
fn a_seal_that_comes_after_the_limit_is_a_point() {
    let (hold, gate) = mute_at("seal", patient());
    let began = Instant::now();
    let good = || if began.elapsed() > SHORT { Err(too_old()) } else { Ok(()) };
    let sealed = watched(gate.cut(), &good, || gate.seal(&request()));
    assert!(sealed.is_err());
    // Here the run commits. It must not tell the target to give up what is being sealed.
    assert!(gate.give_up().is_none());
    hold.let_go();
    let (sealed, word) = gate.last_word(sealed, None, &AtomicBool::new(false));
    assert_eq!(sealed.unwrap().id, point().id);
    let word = word.unwrap();
    assert!(word.contains("older than it may get") && word.contains("sealed the point all the same"), "{word}");
    assert_eq!(hold.0.given_up.load(Ordering::SeqCst), 0);
}

/// A late no is a no.
#[test]
fn a_seal_that_fails_late_is_no_point() {
    let (_hold, gate) = mute_at("seal fails", patient());
    let owed = TargetGate::begin(&gate, |replica| replica.seal(&request())).unwrap();
    *gate.sealing.lock().unwrap() = Some(owed);
    let (sealed, word) = gate.last_word(Err(too_old()), None, &AtomicBool::new(false));
    assert_eq!(sealed.unwrap_err().kind(), Kind::Corrupt);
    assert_eq!(word, None);
}

/// Whether the point exists is not known then: the next run asks for the head (I14).
#[test]
fn a_seal_that_is_never_answered_ends_in_time_and_says_that_nobody_knows() {
    for (stopped, patience) in [(true, patient()), (false, Patience { seal: SHORT, ..patient() })] {
        let (_hold, gate) = mute_at("seal", patience);
        gate.cut().because(too_old());
        let owed = TargetGate::begin(&gate, |replica| replica.seal(&request())).unwrap();
        *gate.sealing.lock().unwrap() = Some(owed);
        let began = Instant::now();
        let (sealed, word) = gate.last_word(Err(too_old()), None, &AtomicBool::new(stopped));
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        let e = sealed.unwrap_err();
        assert!(e.what().contains("older than it may get") && e.what().contains("has not said"), "{e}");
        assert!(e.hint_text().unwrap().contains("newest point"), "{e}");
        assert_eq!(word, None);
    }
}

/// A point is given up beside the commit, also of a run that was cut, and that is not waited for without end either.
#[test]
fn giving_up_a_point_is_asked_for_and_not_waited_for_without_end() {
    let short = Patience { give_up: SHORT, ..patient() };
    for (verb, patience, stopped) in
        [("abandon", short, false), ("abandon", patient(), true), ("nothing", patient(), false)]
    {
        let (hold, gate) = mute_at(verb, patience);
        gate.cut().because(too_old());
        let began = Instant::now();
        let given_up = gate.give_up();
        let (sealed, word) = gate.last_word(Err(too_old()), given_up, &AtomicBool::new(stopped));
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        assert!(sealed.is_err() && word.is_none());
        assert_eq!(hold.0.given_up.load(Ordering::SeqCst), 1, "{verb}");
    }
}

/// A guest that was shut down for a handover is waited for by those whom it serves.
#[test]
fn only_a_domain_that_was_off_anyway_lets_its_target_take_long() {
    let answer = |capture, handover| Patience::of(capture, handover).answer;
    for (capture, handover, long) in [
        (CaptureKind::Overlay, false, false),
        (CaptureKind::Overlay, true, false),
        (CaptureKind::Backup, false, false),
        (CaptureKind::Off, true, false),
        (CaptureKind::Off, false, true),
    ] {
        assert_eq!(answer(capture, handover) > answer(CaptureKind::Overlay, false), long, "{capture:?} {handover}");
    }
}

/// The first reason counts, whatever follows from it.
#[test]
fn the_first_reason_is_the_one_that_is_told() {
    let cut = Cut::default();
    cut.check().unwrap();
    cut.because(too_old());
    cut.because(Error::new(Kind::Io, "a consequence"));
    assert_eq!(cut.check().unwrap_err().kind(), Kind::Interrupted);
}

/// The watch ends with what it watches over, also if that panics.
#[test]
#[should_panic(expected = "of the body")]
fn a_panic_in_the_body_ends_the_watch() {
    watched(&Cut::default(), &|| Ok(()), || panic!("of the body"));
}
