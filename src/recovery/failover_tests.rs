//! A failover broken off at every step, in every order, against a host and a replica of the test's making: at no time
//! may the guest run here while its source is let in, and no overlay that it may have written to is made anew.

use super::*;
use crate::hypervisor::departure::Asking;
use crate::hypervisor::machine::{HostView, Machine};
use crate::hypervisor::swtpm::TpmVersion;
use crate::name::{DiskName, PointId};
use crate::recovery::definition::{self, Macs, Nics, Wish};
use crate::recovery::mapping::Mapping;
use crate::recovery::point_tests::Point;
use crate::replica::upkeep::Promoted;
use std::sync::Mutex;
use std::time::Duration;

const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";
const XML: &str = "<domain type='qemu'><memory unit='MiB'>64</memory><os><type arch='x86_64' machine='pc'>hvm</type></os>\
    <devices><disk type='file' device='disk'><target dev='vda' bus='virtio'/></disk>\
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm></devices></domain>";

/// What the point has of the TPM, and what the guest makes of it.
const SEALED: &[u8] = b"sealed";
const WRITTEN: &[u8] = b"written by the guest";

/// Host and replica in one, so that what must never be together is seen at once.
#[derive(Default)]
struct World {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    defined: bool,
    running: bool,
    /// Starts with the host.
    autostart: bool,
    promoted: Option<Promoted>,
    generation: u64,
    /// Verbs that may still be done; then the power fails.
    verbs_left: Option<usize>,
    /// Where the overlays are: the guest writes to them when it starts.
    dir: PathBuf,
    tpm: Option<Vec<u8>>,
}

impl World {
    /// Does it, unless the power has failed before, and looks at what must always hold.
    fn does<T>(&self, act: impl FnOnce(&mut Inner) -> T) -> Result<T> {
        let mut inner = self.inner.lock().unwrap();
        if let Some(left) = &mut inner.verbs_left {
            match left.checked_sub(1) {
                Some(n) => *left = n,
                None => return Err(Error::new(Kind::Unavailable, "the power has failed")),
            }
        }
        let done = act(&mut inner);
        assert!(!inner.running || inner.promoted.is_some(), "the guest runs, and its source is let in");
        Ok(done)
    }
}

impl Machines for World {
    fn host(&self, _: &Machine) -> Result<HostView> {
        unreachable!("whoever plans has asked")
    }
    fn accepts(&self, _: &str) -> Result<Result<(), String>> {
        unreachable!("whoever plans has asked")
    }
    fn firmware_for(&self, _: &str) -> Result<Option<PathBuf>> {
        unreachable!("whoever plans has asked")
    }
    fn start_transient(&self, _: &str) -> Result<()> {
        unreachable!("a failover is defined")
    }
    fn define(&self, _: &str) -> Result<()> {
        self.does(|w| w.defined = true)
    }
    fn start(&self, _: &DomainUuid) -> Result<()> {
        self.does(|w| {
            assert!(w.defined);
            w.running = true;
            assert!(w.tpm.is_some(), "it starts with the state that came with the point");
            w.tpm = Some(WRITTEN.to_vec());
            fs::write(w.dir.join("written"), "by the guest").unwrap();
        })
    }
    fn destroy(&self, _: &DomainUuid) -> Result<()> {
        self.does(|w| w.running = false)
    }
    fn undefine(&self, _: &DomainUuid) -> Result<()> {
        self.does(|w| (w.defined, w.autostart) = (false, false))
    }
    fn put_tpm(&self, uuid: &DomainUuid, version: TpmVersion, state: &[u8]) -> Result<()> {
        assert_eq!((uuid.as_str(), version), (UUID, TpmVersion::V2_0));
        self.does(|w| {
            assert!(w.tpm.as_deref() != Some(WRITTEN), "what the guest has written is not replaced");
            w.tpm = Some(state.to_vec());
        })
    }
    fn forget_tpm(&self, _: &DomainUuid) -> Result<()> {
        self.does(|w| w.tpm = None)
    }
    fn power(&self, _: &DomainUuid) -> Result<Option<Power>> {
        let inner = self.inner.lock().unwrap();
        Ok(inner.defined.then_some(if inner.running { Power::Running } else { Power::Off }))
    }
    fn start_network(&self, _: &str, _: &str) -> Result<()> {
        unreachable!("a failover goes where its network is")
    }
    fn stop_network(&self, _: &str) -> Result<()> {
        unreachable!("a failover goes where its network is")
    }
    fn join_network(&self, _: &str, _: &str, _: (std::net::Ipv4Addr, u8)) -> Result<()> {
        unreachable!("a failover goes where its network is")
    }
    fn connects(&self, _: &str, _: std::net::SocketAddr, _: Duration) -> Result<bool> {
        unreachable!("a failover goes where its network is")
    }
    fn leave_network(&self, _: &str) -> Result<()> {
        unreachable!("a failover goes where its network is")
    }
    fn ping_guest_agent(&self, _: &DomainUuid, _: Duration) -> Result<()> {
        unreachable!("nobody waits for evidence")
    }
    fn screenshot(&self, _: &DomainUuid) -> Result<Vec<u8>> {
        unreachable!("nobody waits for evidence")
    }
}

impl Departure for World {
    fn autostart(&self, _: &DomainUuid) -> Result<bool> {
        unreachable!("it is told, and not asked")
    }
    fn set_autostart(&self, _: &DomainUuid, on: bool) -> Result<()> {
        self.does(|w| w.autostart = on)
    }
    fn set_mark(&self, _: &DomainUuid, _: Option<&str>) -> Result<()> {
        unreachable!("it lives here")
    }
    fn ask_to_shut_down(&self, _: &DomainUuid, _: Asking) -> Result<()> {
        unreachable!("it is to run")
    }
}

impl Promoting for World {
    fn promoted(&self) -> Result<Option<Promoted>> {
        Ok(self.inner.lock().unwrap().promoted.clone())
    }
    fn promote(&self, point: &PointId) -> Result<()> {
        let promoted = Promoted { point: point.clone(), since: Timestamp::UNIX_EPOCH, committed: false };
        self.does(|w| {
            w.promoted.get_or_insert(promoted);
        })
    }
    fn withdraw(&self) -> Result<()> {
        self.does(|w| {
            assert!(!w.promoted.as_ref().is_some_and(|p| p.committed));
            w.promoted = None;
        })
    }
    fn commit(&self) -> Result<Generation> {
        self.does(|w| {
            let promoted = w.promoted.as_mut().expect("it runs here");
            if !promoted.committed {
                (promoted.committed, w.generation) = (true, w.generation + 1);
            }
            Generation(w.generation)
        })
    }
    fn conclude(&self, _: Generation) -> Result<()> {
        unreachable!("nothing is given images of its own")
    }
}

struct Bench {
    temp: tempfile::TempDir,
    world: World,
    /// Opened once, as by one command.
    state: FailoverState,
    definition: Definition,
}

impl Bench {
    fn new() -> Bench {
        let temp = tempfile::tempdir().unwrap();
        let disks = [(DiskName::new("vda").unwrap(), PathBuf::from("/images/vda.qcow2"))];
        let (name, uuid) = (DomainName::new("web01").unwrap(), DomainUuid::new(UUID).unwrap());
        let (nics, macs) = (Nics::Mapped, Macs::Keep);
        let wish = Wish { name, uuid, disks: &disks, nics, macs, console: None, nvram: None, tpm: true };
        let definition = definition::render(XML, &wish, &Mapping::default()).unwrap();
        let world = World::default();
        world.inner.lock().unwrap().dir = free_dir(temp.path(), &wish.uuid);
        let state = FailoverState::open(temp.path(), &wish.uuid).unwrap();
        Bench { temp, world, state, definition }
    }

    fn point(&self, seq: u64) -> Point {
        Point::in_dir(self.temp.path(), seq, None).with_tpm(SEALED)
    }

    fn with<T>(&self, verbs: Option<usize>, act: impl FnOnce(&Ports, &FailoverState) -> Result<T>) -> Result<T> {
        self.world.inner.lock().unwrap().verbs_left = verbs;
        let clock = || Timestamp::UNIX_EPOCH;
        let (machines, replica, custody) = (&self.world, &self.world, &self.world);
        act(&Ports { machines, replica, custody, clock: &clock, say: &|_| {} }, &self.state)
    }

    fn run(&self, verbs: Option<usize>, seq: u64) -> Result<FailoverRecord> {
        self.run_wanted(verbs, seq, &Wanted { autostart: true, ..Wanted::default() })
    }

    fn run_wanted(&self, verbs: Option<usize>, seq: u64, wanted: &Wanted) -> Result<FailoverRecord> {
        let (domain, uuid) = (DomainName::new("web01").unwrap(), DomainUuid::new(UUID).unwrap());
        let (dir, wanted) = (self.dir(), wanted.clone());
        let plan = Plan { domain: &domain, uuid: &uuid, dir, definition: &self.definition, wanted };
        self.with(verbs, |ports, state| run(ports, state, &plan, &self.point(seq)))
    }

    fn undo(&self, verbs: Option<usize>) -> Result<FailoverRecord> {
        self.with(verbs, undo)
    }

    fn dir(&self) -> PathBuf {
        self.world.inner.lock().unwrap().dir.clone()
    }

    fn guest_wrote(&self) -> bool {
        self.dir().join("written").exists()
    }

    fn starts_with_host(&self) -> bool {
        self.world.inner.lock().unwrap().autostart
    }

    fn runs(&self) -> bool {
        self.world.inner.lock().unwrap().running
    }
}

#[test]
fn broken_off_anywhere_the_same_command_finishes_and_no_write_is_lost() {
    for verbs in 0..8 {
        let bench = Bench::new();
        let broken = bench.run(Some(verbs), 1);
        let wrote = bench.guest_wrote();
        let record = bench.run(None, 1).unwrap();
        assert_eq!((record.stage, bench.runs()), (Stage::Running, true), "after {verbs} verbs");
        assert!(bench.guest_wrote() && bench.starts_with_host());
        if wrote {
            // It had been started: what it wrote then is still there, and a third time changes nothing.
            fs::write(bench.dir().join("written"), "more").unwrap();
            bench.run(None, 1).unwrap();
            assert_eq!(fs::read(bench.dir().join("written")).unwrap(), b"more", "after {verbs} verbs");
        }
        assert_eq!(broken.is_ok(), verbs >= 6, "a failover takes six verbs");
    }
}

/// The way home begins from the point's very content: the overlay says so from before the guest's first write.
#[test]
fn each_overlay_has_a_bitmap_that_leads_on_from_the_points_root_however_often_it_is_made_anew() {
    let bench = Bench::new();
    let path = bench.dir().join("vda.qcow2");
    let layer = crate::image::Layer {
        path: path.clone(),
        format: crate::image::Format::Qcow2,
        block_device: false,
        data_file: None,
    };
    // The record, the promotion, overlays: the state of the TPM is what the power fails over.
    assert!(bench.run(Some(1), 1).is_err());
    let before = crate::replicate::tracking::bitmap_rotation::identity(&layer);
    bench.run(None, 1).unwrap();
    let bitmaps = crate::image::qemu_img::info(&path, layer.format, false).unwrap().bitmaps;
    let root = bench.point(1).point().disks[0].root;
    assert_eq!(bitmaps.len(), 1, "{bitmaps:?}");
    assert_eq!(bitmaps[0].name, crate::replicate::tracking::failover_bitmap::name(&root, &layer));
    assert!(!bitmaps[0].name.ends_with(&before), "it is of the overlay that was made anew");
    assert!(bitmaps[0].is_auto() && !bitmaps[0].is_inconsistent() && bitmaps[0].granularity_bytes == 65536);
}

#[test]
fn a_bitmap_that_cannot_be_begun_is_told_and_the_overlay_made_anew_without_it() {
    let bench = Bench::new();
    let point = bench.point(1);
    let made = overlays::make(&point, &bench.dir()).unwrap();
    assert_eq!(overlays::track(&point, &made).unwrap(), [""; 0]);
    // The name is there already: QEMU refuses.
    let told = overlays::track(&point, &made).unwrap();
    assert!(told.len() == 1 && told[0].contains("'vda'") && told[0].contains("not tracked"), "{told:?}");
    let info = crate::image::qemu_img::info(&made.disks[0].1, crate::image::Format::Qcow2, false).unwrap();
    assert!(info.bitmaps.is_empty() && info.backing.is_some());
}

#[test]
fn a_point_that_was_sealed_before_the_source_was_refused_is_not_passed_by() {
    let bench = Bench::new();
    assert!(bench.run(Some(0), 1).is_err(), "the record is there, and nothing else");
    assert_eq!(bench.run(None, 2).unwrap().point.seq(), 2);
}

/// Without an order nobody but the point knows whether the domain started with its host.
#[test]
fn without_an_order_it_starts_with_its_new_host_if_the_point_says_so() {
    for (said, starts) in [(Some(true), true), (Some(false), false), (None, false)] {
        let bench = Bench::new();
        let mut point = bench.point(1);
        point.view.autostart = said;
        bench.run_wanted(None, 1, &Wanted::of(point.point())).unwrap();
        assert_eq!(bench.starts_with_host(), starts, "{said:?}");
    }
    // What was recorded with a point that was passed by is not held against the one that took its place; an order for
    // this very point is kept to.
    for (point, starts) in [(2, false), (1, true)] {
        let bench = Bench::new();
        assert!(bench.run(Some(0), 1).is_err(), "the record is there, and nothing else");
        bench.run_wanted(None, point, &Wanted::default()).unwrap();
        assert_eq!(bench.starts_with_host(), starts, "point {point}");
    }
}

#[test]
fn an_undo_broken_off_anywhere_is_finished_and_the_source_is_let_in_last() {
    for verbs in 0..6 {
        let bench = Bench::new();
        bench.run(None, 1).unwrap();
        let broken = bench.undo(Some(verbs));
        if broken.is_err() {
            let e = bench.run(None, 1).unwrap_err();
            assert_eq!(e.kind(), Kind::Conflict, "what is half undone is not started again");
            bench.undo(None).unwrap();
        }
        let world = bench.world.inner.lock().unwrap();
        assert!(
            !world.running && !world.defined && world.promoted.is_none() && !world.dir.exists() && world.tpm.is_none(),
            "after {verbs} verbs"
        );
        drop(world);
        assert_eq!(bench.undo(None).unwrap_err().kind(), Kind::NotFound);
        // And it can be brought up again, from another point.
        assert_eq!(bench.run(None, 2).unwrap().point.seq(), 2);
    }
}

#[test]
fn a_guest_that_was_shut_off_is_started_with_what_it_wrote() {
    let bench = Bench::new();
    bench.run(None, 1).unwrap();
    bench.world.inner.lock().unwrap().running = false;
    fs::write(bench.dir().join("mine"), "x").unwrap();
    assert_eq!(bench.run(None, 1).unwrap().stage, Stage::Running);
    assert!(bench.runs() && bench.dir().join("mine").exists());
    let e = bench.run(None, 2).unwrap_err();
    assert!(e.kind() == Kind::Conflict && e.chain().contains("not from"), "{}", e.chain());
}

#[test]
fn what_was_committed_is_not_undone_and_what_is_unfinished_not_committed() {
    let bench = Bench::new();
    let commit = |verbs| bench.with(verbs, commit);
    assert_eq!(commit(None).unwrap_err().kind(), Kind::NotFound);
    assert!(bench.run(Some(1), 1).is_err());
    assert_eq!(commit(None).unwrap_err().kind(), Kind::Conflict);
    bench.run(None, 1).unwrap();
    assert!(commit(Some(0)).is_err());
    for _ in 0..2 {
        assert_eq!(commit(None).unwrap().1, Generation(1), "the second time changes nothing");
    }
    assert_eq!(bench.undo(None).unwrap_err().kind(), Kind::Refused);
    assert!(bench.runs() && bench.guest_wrote());
}

#[test]
fn every_state_has_an_answer_and_overlays_are_remade_only_before_the_first_start() {
    let stages = [
        None,
        Some(Stage::Begun),
        Some(Stage::Made),
        Some(Stage::Running),
        Some(Stage::Undoing),
        Some(Stage::Committed),
    ];
    let powers = [None, Some(Power::Off), Some(Power::Paused), Some(Power::Running)];
    for (stage, power) in stages.iter().flat_map(|s| powers.map(|p| (*s, p))) {
        let todo = next(stage, power);
        if matches!(todo, Next::Begin | Next::Remake) {
            assert!(matches!(stage, None | Some(Stage::Begun)), "{stage:?} {power:?}");
        }
        if todo == Next::Nothing {
            assert!(matches!(power, Some(Power::Running | Power::Paused)), "{stage:?} {power:?}");
        }
    }
}

#[test]
fn a_record_that_names_another_directory_is_not_obeyed() {
    let bench = Bench::new();
    let record = bench.run(None, 1).unwrap();
    let written = bench.with(None, |_, state| state.write(&FailoverRecord { dir: "/var/lib".into(), ..record }));
    written.unwrap();
    assert_eq!(bench.undo(None).unwrap_err().kind(), Kind::Corrupt);
    assert!(bench.runs());
}
