//! Images of its own for a domain, broken off at every verb, with real images and a QEMU of the test's making.

use super::*;
use crate::block::DiskSize;
use crate::hypervisor::relocate::{CopyJob, Place};
use crate::hypervisor::{BlockJob, BlockJobKind, Power};
use crate::image::{Image as _, ImageMut as _, qcow2};
use crate::name::{DomainName, DomainUuid, PointId};
use crate::recovery::point_tests::Point;
use crate::replica::upkeep::Promoted;
use crate::replicate::settle::guard::Unguarded;
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
    /// The guest is on the raw image; its definition names that.
    live_raw: bool,
    defined_raw: bool,
    /// Looks until the copy is ready.
    copy: Option<u32>,
    held: bool,
    /// So many moves are refused: the copy is not ready after all.
    refused: u32,
    moves: u32,
    /// libvirt moves the guest, and dies before it has written that down.
    forgetful: bool,
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
        let done = act(&mut inner);
        if inner.id.is_some() && !inner.held && inner.live_raw {
            assert!(
                inner.defined_raw && !self.chain.top().path.exists(),
                "the guest runs, and an old image may come back"
            );
        }
        Ok(done)
    }

    fn raw(&self) -> PathBuf {
        self.chain.top().path.with_extension("raw")
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
        let inner = self.inner.lock().unwrap();
        let job = inner.job.or(inner.copy);
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
            w.copy = w.copy.map(|n| n.saturating_sub(1)).filter(|_| !w.fails);
            w.job.is_none() && w.copy.is_none() && !w.fails
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

impl Relocating for World {
    fn place(&self, _: &DomainUuid, _: &DiskName) -> Result<Place> {
        let inner = self.inner.lock().unwrap();
        let layer = |raw| match raw {
            false => self.chain.top().clone(),
            true => Layer { path: self.raw(), format: Format::Raw, block_device: false, data_file: None },
        };
        let power = match inner.id {
            Some(_) if inner.held => Power::Paused,
            Some(_) => Power::Running,
            None => Power::Off,
        };
        Ok(Place {
            power,
            live: inner.id.map(|_| layer(inner.live_raw)),
            inactive: Some(layer(inner.defined_raw)),
            copy: inner.copy.map(|looks| CopyJob { to: self.raw(), ready: looks == 0 }),
        })
    }
    fn begin_copy(&self, _: &DomainUuid, _: &DiskName, to: &Path, rate_bytes: Option<u64>) -> Result<()> {
        assert_eq!((to, rate_bytes), (self.raw().as_path(), Some(7)));
        assert_eq!(std::fs::metadata(to).unwrap().len(), 1 << 20);
        self.does(|w| {
            assert!(w.id.is_some() && w.copy.is_none());
            w.copy = Some(2);
        })?;
        qemu_img::to_raw(&self.chain, to)
    }
    fn move_over(&self, _: &DomainUuid, _: &DiskName) -> Result<()> {
        self.does(|w| {
            assert!(w.held && w.copy == Some(0));
            w.moves += 1;
            if w.refused > 0 {
                w.refused -= 1;
                return Err(Error::new(Kind::Busy, "the copy is not ready"));
            }
            (w.copy, w.live_raw, w.defined_raw) = (None, true, !w.forgetful);
            Ok(())
        })?
    }
    fn define_on(&self, _: &DomainUuid, _: &DiskName, image: &Layer) -> Result<()> {
        assert_eq!(image.path, self.raw());
        self.does(|w| w.defined_raw = true)
    }
    fn hold(&self, _: &DomainUuid) -> Result<()> {
        self.does(|w| w.held = true)
    }
    fn let_run(&self, _: &DomainUuid) -> Result<()> {
        self.does(|w| w.held = false)
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
        let own = if self.inner.lock().unwrap().defined_raw { self.raw().exists() } else { !self.is_backed() };
        assert!(own, "the point is let go, and an image still reads it");
        self.does(|w| w.concluded = Some(generation))
    }
}

struct Bench {
    temp: tempfile::TempDir,
    world: World,
    /// Opened once, as by one command.
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
            raw: Vec::new(),
            moving: None,
            wanted: Default::default(),
        };
        self.state.write(&record).unwrap();
    }

    fn run(&self, verbs: Option<usize>) -> Result<Detached> {
        self.run_to(verbs, &[])
    }

    fn run_raw(&self, verbs: Option<usize>) -> Result<Detached> {
        self.run_to(verbs, &[DiskName::new("vda").unwrap()])
    }

    fn run_to(&self, verbs: Option<usize>, raw: &[DiskName]) -> Result<Detached> {
        self.world.inner.lock().unwrap().verbs_left = verbs;
        let say = |_: &str| {};
        let ports = Ports {
            flattening: &self.world,
            relocating: &self.world,
            guard: &|| Ok(Box::new(Unguarded)),
            replica: &self.world,
            say: &say,
            progress: &|_, done, total| assert!(done < total),
        };
        let point = Point::in_dir(self.temp.path(), 1, None);
        let request = Request { generation: Generation(2), rate_bytes: Some(7), raw: raw.to_vec() };
        run(&ports, &self.state, Some(&point), &request, &AtomicBool::new(false))
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

/// What its dead-man does for a guest that may be held.
impl Bench {
    fn release(&self) {
        self.world.inner.lock().unwrap().verbs_left = None;
        if let Some(mut record) = self.state.record().unwrap() {
            raw::let_go(&self.world, &self.state, &mut record).unwrap();
        }
        assert!(!self.world.inner.lock().unwrap().held, "nobody lets the guest go");
    }

    #[track_caller]
    fn is_raw(&self) {
        let dir = self.world.raw();
        let mut left: Vec<_> =
            std::fs::read_dir(dir.parent().unwrap()).unwrap().flatten().map(|e| e.file_name()).collect();
        left.retain(|name| name != "lock");
        assert_eq!(left, ["vda.raw"], "nothing of the overlay stays");
        let content = std::fs::read(dir).unwrap();
        assert_eq!(content.len(), 1 << 20);
        assert!(content[..65536].iter().all(|b| *b == 0x11) && content[65536..].iter().all(|b| *b == 0));
        let inner = self.world.inner.lock().unwrap();
        assert!(inner.defined_raw && inner.live_raw == inner.id.is_some());
    }
}

#[test]
fn to_raw_broken_off_anywhere_the_guest_is_let_go_and_the_same_command_finishes() {
    for forgetful in [false, true] {
        for verbs in 0..9 {
            let bench = Bench::new(Some(3));
            bench.world.inner.lock().unwrap().forgetful = forgetful;
            let broken = bench.run_raw(Some(verbs));
            bench.release();
            if broken.is_err() {
                bench.run_raw(None).unwrap();
            }
            bench.is_raw();
            // To begin, two looks, to hold, to move, to let run, to let the point go.
            assert_eq!(broken.is_ok(), verbs >= 7 + usize::from(forgetful), "after {verbs} verbs");
        }
    }
}

#[test]
fn to_raw_with_a_qemu_that_dies_after_any_verb_no_old_image_comes_back() {
    for verbs in 0..7 {
        let bench = Bench::new(Some(3));
        bench.world.inner.lock().unwrap().forgetful = true;
        bench.run_raw(Some(verbs)).unwrap_err();
        let mut inner = bench.world.inner.lock().unwrap();
        // By its definition, with what there is under that name; the guest has run on since if nothing says that it was
        // held.
        (inner.id, inner.copy, inner.live_raw, inner.held) = (None, None, false, false);
        drop(inner);
        bench.release();
        bench.run_raw(None).unwrap();
        bench.is_raw();
    }
}

#[test]
fn to_raw_with_a_qemu_that_refuses_to_move_the_guest_is_not_paused_for_ever() {
    let bench = Bench::new(Some(3));
    bench.world.inner.lock().unwrap().refused = u32::MAX;
    let e = bench.run_raw(None).unwrap_err();
    assert!(e.kind() == Kind::Busy && e.chain().contains("refused 10 times"), "{}", e.chain());
    {
        let mut inner = bench.world.inner.lock().unwrap();
        assert!(inner.moves == 10 && !inner.held, "{} moves", inner.moves);
        inner.refused = 3;
    }
    bench.run_raw(None).unwrap();
    bench.is_raw();
    assert_eq!(bench.world.inner.lock().unwrap().moves, 14);
}

#[test]
fn to_raw_of_a_domain_that_is_off() {
    let bench = Bench::new(None);
    bench.run_raw(Some(0)).unwrap_err();
    assert!(!bench.world.chain.top().path.exists() && bench.world.raw().exists(), "the definition is behind");
    bench.run_raw(None).unwrap();
    bench.is_raw();
}

#[test]
fn what_may_still_be_undone_keeps_its_point() {
    let bench = Bench::new(Some(3));
    let record = bench.state.record().unwrap().unwrap();
    bench.record(record.dir, record.point, Stage::Running);
    assert_eq!(bench.run(None).unwrap_err().kind(), Kind::Refused);
    assert!(bench.world.is_backed());
}
