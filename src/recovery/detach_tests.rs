//! Images of its own for a domain, broken off at every verb, with real images and a QEMU of the test's making.

use super::*;
use crate::block::DiskSize;
use crate::hypervisor::{BlockJob, BlockJobKind};
use crate::image::{Image as _, ImageMut as _, qcow2};
use crate::name::{DomainName, DomainUuid, PointId};
use crate::recovery::point_tests::Point;
use crate::replica::upkeep::Promoted;
use jiff::Timestamp;
use std::path::PathBuf;
use std::sync::Mutex;

const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";

#[test]
fn every_state_of_a_disk_has_its_step() {
    use Instanced::{Another, AsRecorded};
    for backed in [false, true] {
        for runs in [None, Some(AsRecorded), Some(Another)] {
            assert_eq!(step(Seen { backed, job: true, runs }), Step::Wait);
            let wanted = match (backed, runs) {
                (true, None) => Step::Copy,
                (true, Some(_)) => Step::Pull,
                (false, None) => Step::Reattach,
                (false, Some(AsRecorded)) => Step::Flush,
                (false, Some(Another)) => Step::FlushInDoubt,
            };
            assert_eq!(step(Seen { backed, job: false, runs }), wanted);
        }
    }
}

/// A QEMU that copies a little at each look, and a replica.
struct World {
    inner: Mutex<Inner>,
    chain: Chain,
}

#[derive(Default)]
struct Inner {
    id: Option<u32>,
    /// Looks until the copy is done.
    job: Option<u32>,
    flushed: bool,
    /// Copies end without having copied.
    fails: bool,
    concluded: Option<Generation>,
    verbs_left: Option<usize>,
}

impl World {
    fn does<T>(&self, act: impl FnOnce(&mut Inner) -> T) -> Result<T> {
        let mut inner = self.inner.lock().unwrap();
        if let Some(left) = &mut inner.verbs_left {
            match left.checked_sub(1) {
                Some(n) => *left = n,
                None => return Err(Error::new(Kind::Unavailable, "the power has failed")),
            }
        }
        Ok(act(&mut inner))
    }

    fn is_backed(&self) -> bool {
        qemu_img::info(&self.chain.top().path, Format::Qcow2, true).unwrap().backing.is_some()
    }
}

impl Flattening for World {
    fn instance(&self, _: &DomainUuid) -> Result<Option<u32>> {
        Ok(self.inner.lock().unwrap().id)
    }
    fn job(&self, _: &DomainUuid, _: &DiskName) -> Result<Option<BlockJob>> {
        let job = self.inner.lock().unwrap().job;
        Ok(job.map(|n| BlockJob { kind: BlockJobKind::Other, ready: false, done_bytes: n.into(), total_bytes: 9 }))
    }
    fn begin_pull(&self, _: &DomainUuid, _: &DiskName, rate_bytes: Option<u64>) -> Result<()> {
        assert_eq!(rate_bytes, Some(7));
        self.does(|w| {
            assert!(w.id.is_some() && w.job.is_none());
            w.job = Some(2);
        })
    }
    fn wait(&self, uuid: &DomainUuid, disk: &DiskName, _: Duration) -> Result<Option<BlockJob>> {
        let ended = self.does(|w| {
            w.job = w.job.and_then(|n| n.checked_sub(1));
            w.job.is_none() && !w.fails
        })?;
        if ended && self.is_backed() {
            qemu_img::stand_alone(&self.chain)?;
        }
        self.job(uuid, disk)
    }
    fn flush(&self, _: &DomainUuid, _: &Layer) -> Result<()> {
        self.does(|w| w.flushed = true)
    }
}

impl Promoting for World {
    fn promoted(&self) -> Result<Option<Promoted>> {
        unreachable!("the record knows")
    }
    fn promote(&self, _: &PointId) -> Result<()> {
        unreachable!("it is long promoted")
    }
    fn withdraw(&self) -> Result<()> {
        unreachable!("it was committed")
    }
    fn commit(&self) -> Result<Generation> {
        unreachable!("it was committed")
    }
    fn conclude(&self, generation: Generation) -> Result<()> {
        assert!(!self.is_backed(), "the point is let go, and an image still reads it");
        self.does(|w| w.concluded = Some(generation))
    }
}

struct Bench {
    temp: tempfile::TempDir,
    world: World,
    /// Opened once: a child of another test's, forked just then, would hold its lock a moment longer.
    state: FailoverState,
}

impl Bench {
    /// A point with 64 KiB of data, and an overlay that has some of its own.
    fn new(id: Option<u32>) -> Bench {
        let temp = tempfile::tempdir().unwrap();
        let point = Point::in_dir(temp.path(), 1, None);
        let base = point.images(&DiskName::new("vda").unwrap()).unwrap();
        let writer = qcow2::open_write(&base.top().path).unwrap();
        writer.write_at(0, &[0x11; 65536]).unwrap();
        writer.sync().unwrap();
        drop(writer);
        let uuid = DomainUuid::new(UUID).unwrap();
        let dir = super::super::failover::free_dir(temp.path(), &uuid);
        super::super::overlays::make(&point, &dir).unwrap();
        let path = dir.join("vda.qcow2");
        let mut layers = vec![Layer { path, format: Format::Qcow2, block_device: false, data_file: None }];
        layers.extend(base.0);
        let world = World { inner: Mutex::new(Inner { id, ..Inner::default() }), chain: Chain(layers) };
        let state = FailoverState::open(temp.path(), &uuid).unwrap();
        let bench = Bench { temp, world, state };
        bench.record(dir, point.point().id.clone(), Stage::Committed);
        bench
    }

    fn record(&self, dir: PathBuf, point: PointId, stage: Stage) {
        let record = FailoverRecord {
            format: 1,
            domain: DomainName::new("web01").unwrap(),
            uuid: DomainUuid::new(UUID).unwrap(),
            point,
            frozen_at: Timestamp::UNIX_EPOCH,
            dir,
            stage,
            started_at: Timestamp::UNIX_EPOCH,
            detached: Vec::new(),
            detaching_in: None,
            tpm: false,
        };
        self.state.write(&record).unwrap();
    }

    fn run(&self, verbs: Option<usize>) -> Result<Detached> {
        self.world.inner.lock().unwrap().verbs_left = verbs;
        let say = |_: &str| {};
        let ports = Ports {
            flattening: &self.world,
            replica: &self.world,
            say: &say,
            progress: &|_, done, total| assert!(done < total),
        };
        let point = Point::in_dir(self.temp.path(), 1, None);
        run(&ports, &self.state, Some(&point), Generation(2), Some(7), &AtomicBool::new(false))
    }

    #[track_caller]
    fn stands_alone(&self) {
        assert!(!self.world.is_backed());
        let alone = qcow2::Qcow2Image::open(&Chain(vec![self.world.chain.top().clone()])).unwrap();
        assert_eq!(alone.size(), DiskSize(1 << 20));
        let mut data = vec![0; 65536];
        alone.read_at(0, &mut data).unwrap();
        assert!(data.iter().all(|b| *b == 0x11));
    }
}

#[test]
fn broken_off_anywhere_the_same_command_finishes() {
    for verbs in 0..7 {
        let bench = Bench::new(Some(3));
        let broken = bench.run(Some(verbs));
        let done = match &broken {
            Ok(done) => done.clone(),
            Err(_) => bench.run(None).unwrap(),
        };
        assert_eq!(done.warnings, [""; 0], "after {verbs} verbs");
        bench.stands_alone();
        let inner = bench.world.inner.lock().unwrap();
        assert_eq!((inner.flushed, inner.concluded), (true, Some(Generation(2))), "after {verbs} verbs");
        assert_eq!(broken.is_ok(), verbs >= 6, "to begin, three looks, to flush, to let go");
    }
}

#[test]
fn a_domain_that_is_off_is_copied_here() {
    let bench = Bench::new(None);
    bench.run(None).unwrap();
    bench.stands_alone();
    assert_eq!(bench.run(None).unwrap_err().kind(), Kind::NotFound, "it is done, and forgotten");
}

#[test]
fn an_image_whose_tables_may_have_been_lost_gets_its_point_back_first() {
    let bench = Bench::new(Some(3));
    // The copy has ended, and QEMU is gone before anybody had it written out: of what it copied nothing is there.
    bench.run(Some(1)).unwrap_err();
    qemu_img::rebase_unsafe(&bench.world.chain.top().path, None).unwrap();
    *bench.world.inner.lock().unwrap() = Inner::default();
    bench.run(None).unwrap();
    bench.stands_alone();
}

#[test]
fn a_domain_that_was_started_anew_meanwhile_is_doubted_aloud() {
    let bench = Bench::new(Some(3));
    bench.run(Some(1)).unwrap_err();
    qemu_img::stand_alone(&bench.world.chain).unwrap();
    *bench.world.inner.lock().unwrap() = Inner { id: Some(4), ..Inner::default() };
    let done = bench.run(None).unwrap();
    assert!(done.warnings[0].contains("vda") && done.warnings[0].contains("file systems"), "{:?}", done.warnings);
}

#[test]
fn a_copy_that_ends_without_having_copied_is_an_error_and_not_an_endless_one() {
    let bench = Bench::new(Some(3));
    bench.world.inner.lock().unwrap().fails = true;
    let e = bench.run(None).unwrap_err();
    assert!(e.chain().contains("before its end"), "{}", e.chain());
    bench.world.inner.lock().unwrap().fails = false;
    bench.run(None).unwrap();
    bench.stands_alone();
}

#[test]
fn what_may_still_be_undone_keeps_its_point() {
    let bench = Bench::new(Some(3));
    let record = bench.state.record().unwrap().unwrap();
    bench.record(record.dir, record.point, Stage::Running);
    assert_eq!(bench.run(None).unwrap_err().kind(), Kind::Refused);
    assert!(bench.world.is_backed());
}
