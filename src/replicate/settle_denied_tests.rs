//! The loop, over a hypervisor that misbehaves. What libvirt and QEMU themselves do is told by the lab's tests.

use super::*;
use crate::hypervisor::{Confinement, PauseReason, Power};
use crate::replicate::fake::{FakeHypervisor, layer};
use crate::replicate::settle::guard::Unguarded;
use crate::replicate::settle::halts::halt_error;
use crate::replicate::settle::stopped;
use jiff::Timestamp;
use tempfile::TempDir;

/// A domain on overlays, its record in a journal, and nobody at work.
struct Bench {
    dir: TempDir,
    fake: FakeHypervisor,
    record: Record,
    journal: Journal,
}

fn bench(disks: &[&str]) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let (fake, record) = FakeHypervisor::on_overlays(dir.path(), disks);
    let journal = Journal::open(dir.path(), &record.uuid, "test", Timestamp::UNIX_EPOCH).unwrap();
    journal.write(&record).unwrap();
    Bench { dir, fake, record, journal }
}

impl Bench {
    /// As a run or `doctor --repair` does it.
    fn settle(&self) -> (Result<Outcome>, Account) {
        let record = self.journal.record().unwrap().expect("a record is open");
        let mut guard = Unguarded;
        let mut settler = Settler::new(&self.fake, &self.journal, record, &mut guard, SettleOptions::default());
        let outcome = settler.run(Goal::Settled);
        let mut account = settler.account;
        let open = !matches!(outcome, Ok(Outcome::Reached));
        stopped::conclude(&self.fake, &self.journal, &self.record.uuid, open, &mut account);
        (outcome, account)
    }

    fn power(&self) -> (Power, Option<PauseReason>) {
        let world = self.fake.world.lock().unwrap();
        (world.view.power, world.view.paused)
    }

    /// Where a disk stands: the names of its chain.
    fn chain(&self, disk: usize) -> Vec<String> {
        let world = self.fake.world.lock().unwrap();
        let layers = &world.view.disks[disk].live.as_ref().unwrap().0;
        layers.iter().map(|layer| layer.path.file_name().unwrap().to_string_lossy().into_owned()).collect()
    }

    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name.contains(".vr-"));
        names
    }
}

#[test]
fn overlays_are_committed_and_the_guest_goes_on() {
    let bench = bench(&["vda", "vdb"]);
    let (outcome, account) = bench.settle();
    assert_eq!(outcome.unwrap(), Outcome::Reached);
    assert_eq!((bench.power(), bench.files(), account.stopped), ((Power::Running, None), vec![], None));
    assert_eq!((bench.chain(0), bench.chain(1)), (vec!["vda.qcow2".to_owned()], vec!["vdb.qcow2".to_owned()]));
    assert_eq!((bench.fake.asked("pause"), bench.fake.asked("resume")), (1, 1));
    assert_eq!(bench.journal.record().unwrap(), None);
}

/// The counter of failures begins anew with each good step, and pausing is one: this one is not reset.
#[test]
fn a_pivot_that_is_refused_again_and_again_does_not_pause_the_guest_for_ever() {
    let bench = bench(&["vda"]);
    bench.fake.world.lock().unwrap().busy_pivots = u32::MAX;
    let started = Instant::now();
    let (outcome, account) = bench.settle();
    assert_eq!(outcome.unwrap(), Outcome::Pending(DiskName::new("vda").unwrap()));
    assert_eq!(bench.fake.asked("pause"), PAUSES_MAX as usize + 1);
    assert!(account.alarms.iter().any(|a| a.contains("paused 11 times")), "{:?}", account.alarms);
    // Each pause was ended, and the guest ran longer before each next one.
    assert_eq!(bench.power(), (Power::Running, None));
    assert!(started.elapsed() > BETWEEN_PAUSES.0 * 50, "{:?}", started.elapsed());
    assert_eq!(bench.chain(0).len(), 2, "it still is on its overlay");
    // The next run goes on from there.
    bench.fake.world.lock().unwrap().busy_pivots = 0;
    assert_eq!(bench.settle().0.unwrap(), Outcome::Reached);
    assert_eq!((bench.chain(0).len(), bench.files()), (1, vec![]));
}

/// A domain that was started while it was on its overlay, under AppArmor and a libvirt before 12.1.
#[test]
fn a_commit_that_apparmor_denies_is_told_at_once_and_ends_with_the_guest() {
    let bench = bench(&["vda", "vdb"]);
    {
        let mut world = bench.fake.world.lock().unwrap();
        world.denied = true;
        world.confinement = Confinement { libvirt: (11, 3, 0), apparmor: true };
    }
    for _ in 0..2 {
        let before = bench.fake.asked("commit");
        let started = Instant::now();
        let (outcome, _) = bench.settle();
        let Outcome::Halted(halt) = outcome.unwrap() else { panic!("it has to halt") };
        assert_eq!(halt.reason, HaltReason::CommitDenied);
        let e = halt_error(&bench.record, &halt);
        assert!(e.what().contains("AppArmor"), "{e}");
        assert_eq!(e.advice(), Some(&crate::error::advice::Repair::ShutOff.into()));
        assert_eq!(bench.fake.asked("commit") - before, 1, "each run asks once");
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        assert_eq!(bench.power(), (Power::Running, None));
    }
    // `status` and `doctor` say it without asking anew.
    let record = bench.journal.record().unwrap().unwrap();
    let seen = observe(&bench.fake, &record).unwrap();
    assert!(matches!(decide(&seen.situation(&record)), Action::Halt(Halt { reason: HaltReason::CommitDenied, .. })));
    // Another QEMU may be allowed to.
    bench.fake.world.lock().unwrap().view.id = Some(4);
    let seen = observe(&bench.fake, &record).unwrap();
    assert!(matches!(decide(&seen.situation(&record)), Action::StartCommit(_)));
    bench.fake.world.lock().unwrap().denied = false;
    assert_eq!(bench.settle().0.unwrap(), Outcome::Reached);
}

/// Without AppArmor it is the file's owner, mode or label: no use in asking twenty times, and another way out.
#[test]
fn a_commit_that_qemu_may_not_begin_is_not_tried_for_minutes() {
    let bench = bench(&["vda"]);
    bench.fake.world.lock().unwrap().denied = true;
    let (outcome, _) = bench.settle();
    let e = outcome.unwrap_err();
    assert!(
        e.chain().contains("Permission denied")
            && e.advice() == Some(&crate::error::advice::Repair::CheckRights.into()),
        "{}",
        e.chain()
    );
    assert_eq!(bench.fake.asked("commit"), 1);
    assert!(bench.journal.record().unwrap().is_some(), "nothing is forgotten");
}

#[test]
fn a_guest_that_found_no_room_is_resumed_once_its_disks_are_its_own() {
    let bench = bench(&["vda"]);
    bench.fake.stop(PauseReason::IoError);
    let (outcome, account) = bench.settle();
    assert_eq!(outcome.unwrap(), Outcome::Reached);
    assert_eq!((bench.power(), bench.files()), ((Power::Running, None), vec![]));
    let stopped = account.stopped.expect("it is told");
    assert!(stopped.resumed && account.alarms == [stopped.why.clone()], "{stopped:?} {:?}", account.alarms);
    let asked = bench.fake.world.lock().unwrap().asked.clone();
    assert_eq!(asked, ["commit vda", "pause", "pivot vda", "resume"], "the commit comes first");
    assert_eq!(bench.journal.stopped().unwrap(), None);
}

#[test]
fn a_pause_that_is_not_ours_is_not_ended() {
    for (reason, ran) in [(PauseReason::Asked, true), (PauseReason::Other, true), (PauseReason::IoError, false)] {
        let bench = bench(&["vda"]);
        bench.journal.write(&Record { ran, ..bench.record.clone() }).unwrap();
        bench.fake.stop(reason);
        let (outcome, account) = bench.settle();
        assert_eq!(outcome.unwrap(), Outcome::Reached);
        assert_eq!(bench.power(), (Power::Paused, Some(reason)));
        assert_eq!((bench.fake.asked("resume"), account.stopped), (0, None), "{reason:?}");
    }
}

#[test]
fn a_guest_that_stops_again_is_reported_by_every_run_until_it_goes_on() {
    let bench = bench(&["vda"]);
    bench.fake.world.lock().unwrap().stops_again = true;
    bench.fake.stop(PauseReason::IoError);
    let (_, account) = bench.settle();
    let stopped = account.stopped.expect("it is told");
    assert!(!stopped.resumed && stopped.why.contains("domblkerror"), "{stopped:?}");
    for resumed in [false, true] {
        bench.fake.world.lock().unwrap().stops_again = !resumed;
        let mut account = Account::default();
        stopped::conclude(&bench.fake, &bench.journal, &bench.record.uuid, false, &mut account);
        assert_eq!(account.stopped.map(|s| s.resumed), Some(resumed));
    }
    assert_eq!((bench.power(), bench.journal.stopped().unwrap()), ((Power::Running, None), None));
}

/// Somebody's snapshot between our plan and our freeze: what was frozen is their image, and ours goes into that.
#[test]
fn an_overlay_over_a_strangers_snapshot_is_committed_into_that() {
    let bench = bench(&["vda"]);
    let theirs = bench.dir.path().join("theirs.qcow2");
    std::fs::write(&theirs, b"theirs").unwrap();
    bench.fake.world.lock().unwrap().view.disks[0].live.as_mut().unwrap().0.insert(1, layer(&theirs));
    // The driver died before it could look.
    bench.journal.write(&Record { phase: Phase::FreezeIntent, ..bench.record.clone() }).unwrap();
    let (outcome, account) = bench.settle();
    assert_eq!(outcome.unwrap(), Outcome::Reached);
    assert_eq!(bench.chain(0), ["theirs.qcow2", "vda.qcow2"]);
    assert_eq!(bench.fake.world.lock().unwrap().view.disks[0].inactive, Some(layer(&theirs)));
    assert_eq!((bench.files(), bench.power()), (vec![], (Power::Running, None)));
    assert!(account.alarms.iter().any(|a| a.contains("theirs.qcow2") && a.contains("as planned")), "{account:?}");
}
