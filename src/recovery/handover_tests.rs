//! A handover in a world that misbehaves: a guest that does not hear its power button, a target that answers late,
//! never, twice, or no; the power failing after every single act. At no time may the guest run on both sides, and what
//! starts on the target is all that the guest wrote here.

#[path = "handover_crash_tests.rs"]
mod crash;

use super::super::bringup::{Coming, Readiness};
use super::super::ready::{Color, Finding, Question};
use super::*;
use crate::error::advice::{Advice, Handover};
use crate::hypervisor::departure::Asking;
use crate::hypervisor::machine::{HostView, Machine};
use crate::hypervisor::swtpm::TpmVersion;
use crate::name::Generation;
use crate::recovery::record::{FailoverRecord, GaveWay};
use crate::replica::upkeep::Promoted;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";
const TO: &str = "ssh://b";

/// How the target behaves when it is asked to bring the domain up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
enum Target {
    #[default]
    Good,
    /// Does it, and its answer is lost; so many times.
    Deaf(u32),
    /// Is not reached any more; so many times.
    Away(u32),
    /// Another hand is at work; so many times.
    Busy(u32),
    /// libvirt there says no, before the guest was started.
    Refuses,
    /// Was handed over by hand, from another point.
    Elsewhere,
}

#[derive(Debug, Default)]
struct Inner {
    // Here.
    runs: bool,
    written: u64,
    autostart: bool,
    mark: Option<String>,
    deaf_guest: bool,
    paused: bool,
    guest_agent: bool,
    pressed: u32,
    transient: bool,
    // There.
    points: Vec<(PointId, u64)>,
    promoted: Option<PointId>,
    up: Option<FailoverRecord>,
    runs_there: bool,
    called_off: Vec<RunId>,
    target: Target,
    started_there: u32,
    // All of it.
    now_ms: i64,
    acts_left: Option<u32>,
    run_fails: bool,
    red: bool,
    unsendable: bool,
}

#[derive(Clone, Default)]
struct World(Arc<Mutex<Inner>>);

impl World {
    fn new() -> World {
        let world = World::default();
        let mut inner = world.0.lock().unwrap();
        (inner.runs, inner.autostart, inner.written) = (true, true, 5);
        drop(inner);
        world
    }

    /// Does it, unless the power has failed before, and looks at what must always hold.
    fn does<T>(&self, act: impl FnOnce(&mut Inner) -> T) -> Result<T> {
        let mut inner = self.0.lock().unwrap();
        if let Some(left) = &mut inner.acts_left {
            match left.checked_sub(1) {
                Some(n) => *left = n,
                None => return Err(Error::new(Kind::Io, "the power has failed")),
            }
        }
        let done = act(&mut inner);
        assert!(!(inner.runs && inner.runs_there), "the guest runs on both sides: {inner:?}");
        Ok(done)
    }
}

impl Machines for World {
    fn start(&self, _: &DomainUuid) -> Result<()> {
        self.does(|w| w.runs = true)
    }
    fn destroy(&self, _: &DomainUuid) -> Result<()> {
        self.does(|w| w.runs = false)
    }
    fn power(&self, _: &DomainUuid) -> Result<Option<Power>> {
        self.does(|w| {
            Some(match (w.runs, w.paused) {
                (false, _) => Power::Off,
                (true, false) => Power::Running,
                (true, true) => Power::Paused,
            })
        })
    }
    fn host(&self, _: &Machine) -> Result<HostView> {
        unreachable!("a handover looks at no host")
    }
    fn accepts(&self, _: &str) -> Result<Result<(), String>> {
        unreachable!("a handover looks at no host")
    }
    fn firmware_for(&self, _: &str) -> Result<Option<PathBuf>> {
        unreachable!("a handover looks at no host")
    }
    fn start_transient(&self, _: &str) -> Result<()> {
        unreachable!("a handover starts what is defined")
    }
    fn define(&self, _: &str) -> Result<()> {
        unreachable!("a handover defines nothing")
    }
    fn undefine(&self, _: &DomainUuid) -> Result<()> {
        unreachable!("a handover leaves the definition")
    }
    fn put_tpm(&self, _: &DomainUuid, _: TpmVersion, _: &[u8]) -> Result<()> {
        unreachable!("a handover leaves the state of a TPM")
    }
    fn forget_tpm(&self, _: &DomainUuid) -> Result<()> {
        unreachable!("a handover leaves the state of a TPM")
    }
    fn start_network(&self, _: &str, _: &str) -> Result<()> {
        unreachable!("a handover makes no network")
    }
    fn stop_network(&self, _: &str) -> Result<()> {
        unreachable!("a handover makes no network")
    }
    fn join_network(&self, _: &str, _: &str, _: (Ipv4Addr, u8)) -> Result<()> {
        unreachable!("a handover makes no network")
    }
    fn connects(&self, _: &str, _: SocketAddr, _: Duration) -> Result<bool> {
        unreachable!("a handover makes no network")
    }
    fn leave_network(&self, _: &str) -> Result<()> {
        unreachable!("a handover makes no network")
    }
    fn ping_guest_agent(&self, _: &DomainUuid, _: Duration) -> Result<()> {
        unreachable!("a handover waits for no evidence")
    }
    fn screenshot(&self, _: &DomainUuid) -> Result<Vec<u8>> {
        unreachable!("a handover waits for no evidence")
    }
}

impl Departure for World {
    fn autostart(&self, _: &DomainUuid) -> Result<bool> {
        self.does(|w| w.autostart)
    }
    fn set_autostart(&self, _: &DomainUuid, on: bool) -> Result<()> {
        self.does(|w| w.autostart = on)
    }
    fn set_mark(&self, _: &DomainUuid, mark: Option<&str>) -> Result<()> {
        self.does(|w| w.mark = mark.map(str::to_owned))
    }
    fn ask_to_shut_down(&self, _: &DomainUuid, by: Asking) -> Result<()> {
        self.does(|w| {
            if by == Asking::PowerButton {
                w.pressed += 1;
            }
            // It hears its agent, or its button, and writes until the end.
            if !w.deaf_guest {
                w.written += 1;
                w.runs = false;
            }
        })
    }
}

impl BringUp for World {
    fn ready(&self, _: Option<&PointId>) -> Result<Readiness> {
        let (point, red) = self.does(|w| (w.points.last().cloned(), w.red))?;
        let (point, _) = point.ok_or_else(|| Error::new(Kind::NotFound, "no point"))?;
        let (what, advice) = ("no such network".to_owned(), Some("map it".to_owned()));
        let finding = Finding { question: Question::Network, color: Color::Red, what, advice, advised: None };
        Ok(Readiness { point, findings: red.then_some(finding).into_iter().collect(), suggestion: Vec::new() })
    }
    fn ready_for(&self, _: &Coming) -> Result<Vec<Finding>> {
        unreachable!("the preflight asks for that")
    }
    fn state(&self) -> Result<Standing> {
        self.does(|w| Standing {
            promoted: w.promoted.clone().map(|point| Promoted { point, since: at(0), committed: false }),
            failover: w.up.clone(),
            power: w.up.as_ref().map(|_| if w.runs_there { Power::Running } else { Power::Off }),
        })
    }
    fn bring_up(&self, order: &Order, _: &dyn Fn(&str)) -> Result<FailoverRecord> {
        self.does(|w| {
            let e = |kind| Err(Error::new(kind, "so it is"));
            let target = w.target;
            match target {
                Target::Away(n @ 1..) => {
                    w.target = Target::Away(n - 1);
                    e(Kind::Unavailable)?;
                }
                Target::Busy(n @ 1..) => {
                    w.target = Target::Busy(n - 1);
                    e(Kind::Busy)?;
                }
                Target::Elsewhere => {
                    w.up = Some(there(&w.points[0].0, failover::Stage::Running));
                    w.runs_there = true;
                    e(Kind::Conflict)?;
                }
                _ => {}
            }
            let wanted = Wanted { autostart: true, disk_format: DiskFormat::Same };
            assert_eq!(order.wanted, wanted, "as it was at the source, and as it was asked for");
            if w.called_off.contains(&order.handover) {
                e(Kind::Refused)?;
            }
            let (_, content) = w.points.iter().find(|(id, _)| *id == order.point).expect("a point that was sealed");
            assert_eq!(*content, w.written, "what the guest wrote last is not in the point");
            w.promoted = Some(order.point.clone());
            w.up = Some(there(&order.point, failover::Stage::Made));
            if target == Target::Refuses {
                e(Kind::Refused)?;
            }
            w.up = Some(there(&order.point, failover::Stage::Running));
            w.started_there += u32::from(!w.runs_there);
            w.runs_there = true;
            if let Target::Deaf(n @ 1..) = target {
                w.target = Target::Deaf(n - 1);
                e(Kind::Unavailable)?;
            }
            Ok(there(&order.point, failover::Stage::Running))
        })?
    }
    fn call_off(&self, order: &Order, _: &dyn Fn(&str)) -> Result<()> {
        self.does(|w| {
            if w.up.as_ref().is_some_and(|up| up.point != order.point) {
                return Err(Error::new(Kind::Conflict, "another failover"));
            }
            w.called_off.push(order.handover.clone());
            (w.runs_there, w.up, w.promoted) = (false, None, None);
            Ok(())
        })?
    }
    fn undo(&self, _: &dyn Fn(&str)) -> Result<FailoverRecord> {
        unreachable!("a handover calls off")
    }
    fn commit(&self, _: &dyn Fn(&str)) -> Result<Generation> {
        unreachable!("that is for the operator, or a migration")
    }
    fn give_way(&self, _: &dyn Fn(&str)) -> Result<GaveWay> {
        unreachable!("nobody comes home")
    }
}

fn at(ms: i64) -> Timestamp {
    Timestamp::from_millisecond(ms).unwrap()
}

fn there(point: &PointId, stage: failover::Stage) -> FailoverRecord {
    FailoverRecord {
        format: 1,
        domain: DomainName::new("web01").unwrap(),
        uuid: DomainUuid::new(UUID).unwrap(),
        point: point.clone(),
        frozen_at: at(0),
        dir: "/i".into(),
        stage,
        started_at: at(0),
        detached: Vec::new(),
        detaching_in: None,
        tpm: false,
        raw: Vec::new(),
        moving: None,
        wanted: Default::default(),
    }
}

struct Bench {
    world: World,
    dir: tempfile::TempDir,
    stop: AtomicBool,
}

impl Bench {
    fn new() -> Bench {
        Bench { world: World::new(), dir: tempfile::tempdir().unwrap(), stop: AtomicBool::new(false) }
    }

    fn set(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.world.0.lock().unwrap());
    }

    fn get<T>(&self, of: impl FnOnce(&Inner) -> T) -> T {
        of(&self.world.0.lock().unwrap())
    }

    fn act<T>(&self, act: impl FnOnce(&Ports, &HandoverState) -> T) -> T {
        let state = HandoverState::open(self.dir.path(), &DomainUuid::new(UUID).unwrap()).unwrap();
        let w = &self.world;
        let look = || w.does(|w| Look { persistent: !w.transient, managed_save: false, guest_agent: w.guest_agent });
        let run = |_: Option<&RunId>| {
            w.does(|w| {
                if w.run_fails {
                    return Err(Error::new(Kind::Space, "the target is full"));
                }
                w.now_ms += 1000;
                let point = PointId::from_parts(w.points.len() as u64 + 1, &RunId::from_bits(1));
                w.points.push((point.clone(), w.written));
                let sent = Sent { point, frozen_at: at(w.now_ms), off: !w.runs, bytes: 10, warnings: Vec::new() };
                // It does not stand still while it is replicated.
                w.written += u64::from(w.runs);
                Ok(sent)
            })?
        };
        let head = || w.does(|w| w.points.last().map(|_| at(w.now_ms)));
        let there = || -> Result<Box<dyn BringUp>> { Ok(Box::new(w.clone())) };
        let clock = || at(w.0.lock().unwrap().now_ms);
        let sleep = |time: Duration| w.0.lock().unwrap().now_ms += i64::try_from(time.as_millis()).unwrap();
        act(
            &Ports {
                machines: w,
                custody: w,
                look: &look,
                run: &run,
                head: &head,
                preflight: &|_| {
                    w.does(
                        |w| if w.unsendable { Err(Error::new(Kind::Space, "no room for overlays")) } else { Ok(()) },
                    )?
                },
                there: &there,
                clock: &clock,
                sleep: &sleep,
                say: &|_| {},
                stop: &self.stop,
            },
            &state,
        )
    }

    fn over_as(&self, change: impl FnOnce(&mut Request)) -> Result<Report> {
        let mut request = Request {
            domain: DomainName::new("web01").unwrap(),
            uuid: DomainUuid::new(UUID).unwrap(),
            to: TO.into(),
            handover: RunId::from_bits(u64::from(self.get(|w| w.started_there)) + 7),
            timeout: Duration::from_secs(60),
            force_off: false,
            commit: false,
            head_age_max: Duration::from_secs(120),
            disk_format: DiskFormat::Same,
        };
        change(&mut request);
        self.act(|ports, state| over(ports, state, &request))
    }

    fn over(&self) -> Result<Report> {
        self.over_as(|_| {})
    }

    fn back(&self, lose: bool) -> Result<HandoverRecord> {
        self.act(|ports, state| back(ports, state, lose))
    }

    fn stage(&self) -> Option<Stage> {
        crate::replicate::state::handover_record::peek(self.dir.path(), &DomainUuid::new(UUID).unwrap())
            .unwrap()
            .map(|r| r.stage)
    }

    #[track_caller]
    fn is_home(&self) {
        self.get(|w| {
            assert!(w.runs && w.autostart && w.mark.is_none() && !w.runs_there && w.promoted.is_none(), "{w:?}");
        });
        assert_eq!(self.stage(), None);
    }

    #[track_caller]
    fn has_moved(&self) {
        self.get(|w| {
            assert!(!w.runs && !w.autostart && w.runs_there, "{w:?}");
            assert!(w.mark.as_ref().unwrap().contains("lives on ssh://b"), "{w:?}");
        });
        assert_eq!(self.stage(), Some(Stage::Moved));
    }
}

#[test]
fn every_stage_has_one_next_step() {
    use Stage::*;
    for (stage, runs, ours, step) in [
        (None, true, false, Step::Begin),
        (None, false, false, Step::Begin),
        (Some(Begun), true, false, Step::Secure),
        (Some(Begun), false, false, Step::Secure),
        (Some(Secured), true, false, Step::ShutDown),
        (Some(Secured), false, false, Step::NoteOff),
        (Some(Off), true, false, Step::ShutDown),
        (Some(Off), false, false, Step::Send),
        (Some(Sent), true, true, Step::ShutDown),
        (Some(Sent), false, false, Step::Send),
        (Some(Sent), false, true, Step::Commit),
        (Some(Asked), true, false, Step::Both),
        (Some(Asked), false, false, Step::Ask),
        (Some(Moved), true, false, Step::Both),
        (Some(Moved), false, false, Step::Done),
        (Some(Aborting), true, false, Step::FinishBack),
        (Some(Aborting), false, false, Step::FinishBack),
        (Some(Undone), false, false, Step::FinishBack),
    ] {
        assert_eq!(next(Seen { stage, runs, sent_by_us: ours }), step, "{stage:?} {runs} {ours}");
    }
}

#[test]
fn a_no_counts_only_where_nothing_can_have_run_there() {
    let point = PointId::from_parts(1, &RunId::from_bits(1));
    let order = Order { handover: RunId::from_bits(7), point: point.clone(), wanted: Wanted::default() };
    let standing = |stage: Option<failover::Stage>, power: Option<Power>| Standing {
        promoted: None,
        failover: stage.map(|stage| there(&point, stage)),
        power,
    };
    let made = standing(Some(failover::Stage::Made), Some(Power::Off));
    let runs = standing(Some(failover::Stage::Made), Some(Power::Running));
    let was = standing(Some(failover::Stage::Running), Some(Power::Off));
    let mut other = made.clone();
    other.failover.as_mut().unwrap().point = PointId::from_parts(2, &RunId::from_bits(1));
    let nothing = Standing::default();
    for (kind, first, seen, verdict) in [
        (Kind::Unavailable, true, None, Verdict::Again),
        (Kind::Interrupted, true, None, Verdict::Again),
        (Kind::Busy, true, Some(&nothing), Verdict::Again),
        (Kind::Protocol, true, Some(&nothing), Verdict::Unclear),
        (Kind::Refused, true, None, Verdict::Unclear),
        (Kind::Refused, true, Some(&nothing), Verdict::No),
        (Kind::Space, true, Some(&made), Verdict::No),
        (Kind::Refused, true, Some(&made), Verdict::No),
        (Kind::Refused, false, Some(&made), Verdict::Unclear),
        (Kind::Refused, true, Some(&runs), Verdict::Unclear),
        (Kind::Refused, true, Some(&was), Verdict::Unclear),
        (Kind::Conflict, true, Some(&other), Verdict::Unclear),
    ] {
        let error = Error::new(kind, "no");
        assert_eq!(judge(&error, first, &order, seen), verdict, "{kind:?} {first} {seen:?}");
    }
    for (seen, matter) in [(&nothing, false), (&made, true), (&runs, true), (&was, true)] {
        assert_eq!(writes_may_matter(seen), matter, "{seen:?}");
    }
    assert!(!writes_may_matter(&standing(Some(failover::Stage::Begun), None)));
}

#[test]
fn a_domain_is_handed_over_with_all_that_its_guest_wrote() {
    for agent in [false, true] {
        let b = Bench::new();
        b.set(|w| w.guest_agent = agent);
        let report = b.over().unwrap();
        b.has_moved();
        assert_eq!(
            b.get(|w| (w.points.len(), w.pressed)),
            (2, u32::from(!agent)),
            "one run while it worked, one after"
        );
        assert_eq!(report.downtime_ms, Some(1000.0), "as long as the last run");
        // Again: it is told once more, and nothing is done.
        let again = b.over().unwrap();
        assert_eq!((again.downtime_ms, b.get(|w| w.started_there)), (report.downtime_ms, 1));
        // A head that is fresh needs no run while the guest works.
        let e = b.back(false).unwrap_err();
        assert_eq!((e.kind(), e.advice()), (Kind::Refused, Some(&Handover::BringHomeOrLose.into())), "{e}");
        b.has_moved();
        b.back(true).unwrap();
        b.is_home();
        assert_eq!(b.back(true).unwrap_err().kind(), Kind::NotFound);
    }
}

#[test]
fn a_guest_that_does_not_go_down_is_left_as_it_was() {
    let b = Bench::new();
    b.set(|w| w.deaf_guest = true);
    let e = b.over().unwrap_err();
    assert!(e.kind() == Kind::Refused && e.what().contains("within 60 s"), "{e}");
    assert_eq!(e.advice(), Some(&Handover::WaitOrForceOff.into()), "{e}");
    b.is_home();
    assert_eq!(b.get(|w| w.pressed), 4, "a guest that boots hears a later press");
    // One that is paused is not even asked.
    b.set(|w| w.paused = true);
    let e = b.over().unwrap_err();
    assert_eq!((e.kind(), e.advice()), (Kind::Conflict, Some(&Handover::ResumeOrForceOff.into())), "{e}");
    b.is_home();
    let report = b.over_as(|r| r.force_off = true).unwrap();
    assert!(report.forced_off && report.warnings.iter().any(|w| w.contains("is lost")), "{report:?}");
    b.has_moved();
}

#[test]
fn whatever_fails_before_the_target_is_asked_puts_the_domain_back() {
    let b = Bench::new();
    b.set(|w| w.transient = true);
    assert_eq!(b.over().unwrap_err().kind(), Kind::Conflict);
    b.set(|w| w.transient = false);
    b.over_as(|r| r.head_age_max = Duration::ZERO).unwrap();
    b.back(true).unwrap();
    b.set(|w| w.run_fails = true);
    assert_eq!(b.over().unwrap_err().kind(), Kind::Space, "the last run fails: the head is fresh");
    b.is_home();
    // A signal, before anything was done.
    b.set(|w| w.run_fails = false);
    b.stop.store(true, Ordering::Relaxed);
    assert_eq!(b.over().unwrap_err().kind(), Kind::Interrupted);
    b.is_home();
}

#[test]
fn a_clear_no_of_the_target_puts_the_domain_back() {
    let b = Bench::new();
    b.set(|w| w.target = Target::Refuses);
    assert_eq!(b.over().unwrap_err().kind(), Kind::Refused);
    b.is_home();
    assert_eq!(b.get(|w| w.called_off.len()), 1, "an order of it that comes late starts nothing");
}

#[test]
fn an_answer_that_is_late_or_lost_is_asked_for_again() {
    for target in [Target::Deaf(3), Target::Away(3), Target::Busy(10)] {
        let b = Bench::new();
        b.set(|w| w.target = target);
        b.over().unwrap();
        b.has_moved();
        assert_eq!(b.get(|w| w.started_there), 1, "{target:?}");
    }
}

#[test]
fn a_target_that_never_answers_keeps_the_source_off_until_it_has_called_it_off() {
    for target in [Target::Deaf(1000), Target::Away(1000)] {
        let b = Bench::new();
        b.set(|w| w.target = target);
        let e = b.over().unwrap_err();
        assert_eq!(e.kind(), Kind::Unavailable);
        assert!(e.what().contains("it may run there"), "{e}");
        assert!(matches!(e.advice(), Some(Advice::Handover(Handover::AskAgainOrAbort { .. }))), "{e}");
        assert!(!b.get(|w| w.runs), "never guessed");
        assert_eq!(b.act(settle).unwrap(), None, "and not by doctor either");
        assert_eq!(b.stage(), Some(Stage::Asked));
        // A no that comes to a later process proves nothing.
        b.set(|w| w.target = Target::Refuses);
        let started = b.get(|w| w.runs_there);
        assert!(b.over().is_err());
        assert!(!b.get(|w| w.runs));
        b.set(|w| w.target = Target::Good);
        if started {
            assert_eq!(b.back(false).unwrap_err().kind(), Kind::Refused);
        }
        b.over().unwrap();
        b.has_moved();
        b.back(true).unwrap();
        b.is_home();
    }
}

#[test]
fn a_failover_from_another_point_is_nobodys_to_call_off() {
    let b = Bench::new();
    b.set(|w| w.target = Target::Elsewhere);
    assert_eq!(b.over().unwrap_err().kind(), Kind::Conflict);
    assert!(!b.get(|w| w.runs), "it runs there");
    assert_eq!(b.back(true).unwrap_err().kind(), Kind::Conflict);
    assert!(b.get(|w| w.runs_there && !w.runs));
    assert_eq!(b.stage(), Some(Stage::Asked), "as it was");
}

/// Somebody starts it at the source while it lives there: the world of this test would say so at once, so he only
/// tries.
#[test]
fn nothing_goes_on_while_it_runs_here_and_may_run_there() {
    let b = Bench::new();
    b.set(|w| w.target = Target::Away(1000));
    b.over().unwrap_err();
    b.set(|w| w.runs = true);
    let e = b.over().unwrap_err();
    assert!(e.what().contains("RUNS ON BOTH SIDES"), "{e}");
    assert!(!b.get(|w| w.runs_there));
}

/// The newest point is young, so no run was made: the guest is not shut down to find out that the last one cannot be.
#[test]
fn a_last_run_that_could_not_be_made_is_found_out_while_the_guest_works() {
    let b = Bench::new();
    b.over().unwrap();
    b.back(true).unwrap();
    b.set(|w| (w.unsendable, w.pressed) = (true, 0));
    let e = b.over().unwrap_err();
    assert_eq!(e.kind(), Kind::Space);
    b.is_home();
    assert_eq!(b.get(|w| w.pressed), 0, "nobody asked the guest to shut down");
}

#[test]
fn a_red_line_of_the_target_is_told_before_anything_is_done() {
    let b = Bench::new();
    b.set(|w| w.red = true);
    let e = b.over().unwrap_err();
    assert!(e.kind() == Kind::Conflict && e.what().contains("on ssh://b: no such network"), "{e}");
    assert_eq!(e.hint_text(), Some("map it"));
    b.is_home();
    assert_eq!(b.get(|w| w.pressed), 0, "the guest did not notice");
}
