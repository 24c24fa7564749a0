//! The settle loop over a libvirt of the tests' own: how often it looks, how long the guest stands, and that no guest
//! runs while the overlay of a pivoted disk has its name (I3).

use super::*;
use crate::hypervisor::{
    BlockJob, BlockJobKind, DiskKind, DiskView, DomainView, Ended, FreezeDisk, Power as DomainPower,
};
use crate::name::DomainUuid;
use crate::replicate::settle::guard::Unguarded;
use crate::replicate::settle::halts::halt_error;
use crate::replicate::state::journal::boot_id;
use crate::replicate::state::journal::tests::record;
use crate::replicate::state::record::DiskRecord;
use jiff::Timestamp;
use std::path::Path;
use std::sync::Mutex;

/// What happened, in order, without the looks.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Did {
    Paused,
    Pivoted(String),
    Resumed,
}

#[derive(Debug)]
struct FakeDisk {
    on_overlay: bool,
    job: Option<bool>,
}

#[derive(Debug)]
struct State {
    paused: bool,
    disks: Vec<FakeDisk>,
    did: Vec<Did>,
    looks: usize,
    looks_while_held: usize,
    /// The job of this disk falls back from ready at its next pivot.
    falls_back: Option<usize>,
}

struct Fake {
    record: Record,
    state: Mutex<State>,
}

impl Fake {
    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.state.lock().unwrap())
    }

    fn at(&self, disk: &DiskName) -> usize {
        self.record.disks.iter().position(|d| d.name == *disk).unwrap()
    }

    fn view(&self, s: &State) -> DomainView {
        let disk = |(d, now): (&DiskRecord, &FakeDisk)| {
            let overlay =
                Layer { path: d.overlay.clone(), format: Format::Qcow2, block_device: false, data_file: None };
            let mut chain = vec![d.base.clone()];
            if now.on_overlay {
                chain.insert(0, overlay);
            }
            let job = |ready| BlockJob { kind: BlockJobKind::ActiveCommit, ready, done_bytes: 1, total_bytes: 1 };
            DiskView {
                name: d.name.clone(),
                kind: DiskKind::Image,
                inactive: chain.first().cloned(),
                live: Some(Chain(chain)),
                size: None,
                job: now.job.map(job),
                read_only: false,
                shareable: false,
            }
        };
        DomainView {
            name: self.record.domain.clone(),
            uuid: self.record.uuid.clone(),
            id: self.record.instance,
            power: if s.paused { DomainPower::Paused } else { DomainPower::Running },
            persistent: true,
            managed_save: false,
            ended: Ended::Unknown,
            paused: None,
            domain_job: None,
            disks: self.record.disks.iter().zip(&s.disks).map(disk).collect(),
            record: None,
            nvram: None,
            tpm: None,
            guest_agent: false,
        }
    }
}

impl Hypervisor for Fake {
    fn observe_without_sizes(&self, _: &DomainUuid) -> Result<DomainView> {
        self.with(|s| {
            s.looks += 1;
            s.looks_while_held += usize::from(s.paused);
            Ok(self.view(s))
        })
    }

    fn confinement(&self, _: &DomainUuid) -> Result<crate::hypervisor::Confinement> {
        unreachable!("no commit is denied here")
    }

    fn warm_up(&self, _: &DomainUuid) -> Result<()> {
        Ok(())
    }

    fn start_commit(&self, _: &DomainUuid, disk: &DiskName, _: &Path, _: &Path, _: bool) -> Result<()> {
        self.with(|s| s.disks[self.at(disk)].job = Some(true));
        Ok(())
    }

    fn wait_job(&self, _: &DomainUuid, disk: &DiskName, _: Duration) -> Result<Option<BlockJob>> {
        self.with(|s| s.disks[self.at(disk)].job = Some(true));
        Ok(None)
    }

    fn pivot(&self, _: &DomainUuid, disk: &DiskName) -> Result<()> {
        self.with(|s| {
            let at = self.at(disk);
            assert!(s.paused, "{disk} is pivoted under a guest that runs");
            if s.falls_back == Some(at) {
                (s.falls_back, s.disks[at].job) = (None, Some(false));
                return Err(Error::new(Kind::Busy, "the job is not ready"));
            }
            assert_eq!(s.disks[at].job, Some(true));
            s.disks[at] = FakeDisk { on_overlay: false, job: None };
            s.did.push(Did::Pivoted(disk.to_string()));
            Ok(())
        })
    }

    fn pause(&self, _: &DomainUuid) -> Result<()> {
        self.with(|s| {
            s.paused = true;
            s.did.push(Did::Paused);
        });
        Ok(())
    }

    fn resume(&self, _: &DomainUuid) -> Result<()> {
        self.with(|s| {
            for (disk, now) in self.record.disks.iter().zip(&s.disks) {
                let stale = !now.on_overlay && disk.overlay.exists();
                assert!(!stale, "the guest runs on the base of {}, whose overlay has its name", disk.name);
            }
            s.paused = false;
            crate::traced_step!("resume", "the guest");
            s.did.push(Did::Resumed);
        });
        Ok(())
    }

    fn set_record(&self, _: &DomainUuid, _: Option<&str>) -> Result<()> {
        Ok(())
    }

    fn find(&self, _: &str) -> Result<DomainView> {
        unreachable!("the loop knows its domain")
    }

    fn observe(&self, _: &DomainUuid) -> Result<DomainView> {
        unreachable!("the loop asks for no sizes")
    }

    fn firmware(&self, _: &DomainUuid) -> Result<Option<PathBuf>> {
        unreachable!("the loop asks for no firmware")
    }

    fn list(&self) -> Result<Vec<DomainView>> {
        unreachable!("the loop knows its domain")
    }

    fn freeze(&self, _: &DomainUuid, _: &[FreezeDisk]) -> Result<()> {
        unreachable!("the loop freezes nothing")
    }

    fn cancel_job(&self, _: &DomainUuid, _: &DiskName) -> Result<()> {
        unreachable!("the loop cancels nothing")
    }

    fn redefine(&self, _: &DomainUuid, _: &[(DiskName, Layer)]) -> Result<()> {
        unreachable!("this libvirt saves what it pivots")
    }

    fn close_unused(&self, _: &DomainUuid, _: &Path) -> Result<()> {
        unreachable!("nothing is left open here")
    }

    fn definition(&self, _: &DomainUuid, _: bool, _: bool) -> Result<String> {
        unreachable!("the loop reads no definition")
    }
}

/// A running domain of so many disks, all on their overlays, the run's record behind it.
struct Bench {
    fake: Fake,
    dir: tempfile::TempDir,
}

impl Bench {
    fn of(disks: usize) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let mut record = Record { boot: boot_id(), ..record(Phase::Frozen) };
        let template = record.disks.remove(0);
        for n in 0..disks {
            let (base, overlay) = (dir.path().join(format!("{n}.qcow2")), dir.path().join(format!("{n}.vr-0.qcow2")));
            std::fs::write(&base, b"base").unwrap();
            std::fs::write(&overlay, b"overlay").unwrap();
            let name = DiskName::new(format!("vd{n}")).unwrap();
            let overlay_id = Stamp::of(&overlay).unwrap().map(|s| s.id);
            let base = Layer { path: base, ..template.base.clone() };
            record.disks.push(DiskRecord { name, base, overlay, overlay_id, ..template.clone() });
        }
        let disks = (0..disks).map(|_| FakeDisk { on_overlay: true, job: None }).collect();
        let (did, looks, looks_while_held, falls_back) = (Vec::new(), 0, 0, None);
        let state = Mutex::new(State { paused: false, disks, did, looks, looks_while_held, falls_back });
        Bench { fake: Fake { record, state }, dir }
    }

    fn settle(&self, pause_share: Duration) -> Account {
        let record = self.fake.record.clone();
        let journal = Journal::open(self.dir.path(), &record.uuid, "test", Timestamp::UNIX_EPOCH).unwrap();
        journal.write(&record).unwrap();
        let options = SettleOptions { pause_share, ..SettleOptions::default() };
        let mut guard = Unguarded;
        let mut settler = Settler::new(&self.fake, &journal, record, &mut guard, options);
        assert_eq!(settler.run(Goal::Settled).unwrap(), Outcome::Reached);
        assert_eq!(journal.record().unwrap(), None);
        for disk in &self.fake.record.disks {
            assert!(!disk.overlay.exists() && !disk.retired().exists(), "{} is left", disk.overlay.display());
        }
        self.fake.with(|s| assert!(!s.paused && s.disks.iter().all(|d| !d.on_overlay)));
        settler.account
    }

    fn did(&self) -> Vec<Did> {
        self.fake.with(|s| s.did.clone())
    }
}

/// Observed anew before every step of every disk, 12 disks were ended by the dead-man: 5 s were not enough.
#[test]
fn looks_while_the_guest_stands_do_not_grow_with_the_disks() {
    let looks = |disks| {
        let bench = Bench::of(disks);
        bench.settle(Duration::from_secs(3600));
        let pauses = bench.did().iter().filter(|d| **d == Did::Paused).count();
        assert_eq!(pauses, 1);
        bench.fake.with(|s| (s.looks_while_held, s.looks))
    };
    let one = looks(1);
    assert!(one.0 >= 2, "pivot and retirement have to be decided from what is seen");
    assert_eq!(looks(8), one);
    assert_eq!(looks(32), one);
}

/// The guest runs between two disks once the pause has lasted long enough; no disk is half done then.
#[test]
fn a_long_pause_ends_between_two_disks() {
    let bench = Bench::of(3);
    let pauses = bench.settle(Duration::ZERO).pauses;
    assert!(pauses.count == 3 && pauses.longest > Duration::ZERO, "{pauses:?}");
    assert!(pauses.longest < pauses.sum && pauses.sum <= pauses.longest * 3, "each counts: {pauses:?}");
    let each = |n: usize| [Did::Paused, Did::Pivoted(format!("vd{n}")), Did::Resumed];
    assert_eq!(bench.did(), [each(0), each(1), each(2)].concat());
}

/// The intent of the pause stands for the disk that was pivoted just before, or its retirement would look like a
/// stranger's deed.
#[test]
fn a_job_that_falls_back_ends_the_pause_and_nothing_else() {
    for falls_back in 0..3 {
        let bench = Bench::of(3);
        bench.fake.with(|s| s.falls_back = Some(falls_back));
        let account = bench.settle(Duration::from_secs(3600));
        assert_eq!(account.alarms, [""; 0], "disk {falls_back} fell back");
        let pauses = bench.did().iter().filter(|d| **d == Did::Paused).count();
        assert_eq!(pauses, 2, "disk {falls_back} fell back");
    }
}

/// The overlay of a driver that was killed behind the rename and before the fsync: the dead-man finds the name gone,
/// and after a power cut it would be back, older than the base by what the guest has flushed meanwhile.
#[cfg(feature = "failpoints")]
#[test]
fn a_retirement_that_is_found_done_is_durable_before_the_guest_runs() {
    let bench = Bench::of(2);
    let record = Record { phase: Phase::PivotIntent, resume_after: true, ..bench.fake.record.clone() };
    for disk in &record.disks {
        std::fs::rename(&disk.overlay, disk.retired()).unwrap();
    }
    bench.fake.with(|s| {
        s.paused = true;
        s.disks = (0..2).map(|_| FakeDisk { on_overlay: false, job: None }).collect();
    });
    let state = tempfile::tempdir().unwrap();
    let journal = Journal::open(state.path(), &record.uuid, "test", Timestamp::UNIX_EPOCH).unwrap();
    let mut guard = Unguarded;
    let mut settler = Settler::new(&bench.fake, &journal, record, &mut guard, SettleOptions::default());
    let (outcome, steps) = crate::failpoint::traced(|| settler.run(Goal::Released).unwrap());
    assert_eq!(outcome, Outcome::Reached);
    let at = |step: String| steps.iter().position(|s| *s == step).unwrap_or_else(|| panic!("{step:?} in {steps:?}"));
    let (synced, resumed) = (at(format!("sync {}", bench.dir.path().display())), at("resume the guest".to_owned()));
    assert!(synced < resumed, "{steps:?}");
}

/// The file system of overlays and bases is back under another number of its device, after a boot; the record is of
/// before.
#[test]
fn the_overlay_is_known_again_on_a_file_system_that_came_back() {
    use crate::file_id::{BootId, FileId};
    let mut bench = Bench::of(2);
    let before: BootId = serde_json::from_str(r#""0b5c8d4e-1f2a-4b3c-8d4e-5f6a7b8c9d0e""#).unwrap();
    let moved = |id: FileId| FileId { device: id.device + 1, boot: Some(before), ..id };
    let old = |id: FileId| FileId { born: None, boot: None, ..moved(id) };
    let as_kept: [&dyn Fn(FileId) -> FileId; 2] = [&moved, &old];
    for (disk, kept) in bench.fake.record.disks.iter_mut().zip(as_kept) {
        let base = Stamp::of(&disk.base.path).unwrap().unwrap();
        disk.base_stamp = Some(Stamp { id: kept(base.id), ..base });
        disk.overlay_id = disk.overlay_id.map(kept);
    }
    assert_eq!(bench.settle(Duration::from_secs(3600)).alarms, [""; 0]);
}

/// Both sides of a mismatch are named, and the file stays.
#[test]
fn another_file_under_the_overlays_name_is_told_from_ours() {
    let mut bench = Bench::of(1);
    let disk = &mut bench.fake.record.disks[0];
    let ours = disk.overlay_id.unwrap();
    disk.overlay_id = Some(crate::file_id::FileId { inode: ours.inode + 1, ..ours });
    let record = bench.fake.record.clone();
    let journal = Journal::open(bench.dir.path(), &record.uuid, "test", Timestamp::UNIX_EPOCH).unwrap();
    let mut guard = Unguarded;
    let mut settler = Settler::new(&bench.fake, &journal, record, &mut guard, SettleOptions::default());
    let Outcome::Halted(halt) = settler.run(Goal::Settled).unwrap() else { panic!("it has to halt") };
    assert_eq!(halt.reason, HaltReason::OverlayReplaced);
    let e = halt_error(&settler.record, &halt);
    for inode in [ours.inode, ours.inode + 1] {
        assert!(e.what().contains(&format!("inode {inode} on device")), "{e}");
    }
}
