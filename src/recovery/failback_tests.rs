//! The order of the way home, broken off at every verb: nothing is thrown away here before home has committed.

use super::*;
use crate::error::{Error, Kind};
use crate::name::{DomainName, DomainUuid, RunId};
use crate::recovery::bringup::{Order, Readiness, Standing};
use crate::recovery::ready::{Color, Finding, Question};
use crate::recovery::record::{FailoverRecord, GaveWay};
use crate::replica::upkeep::Promoted;
use jiff::Timestamp;
use std::sync::{Arc, Mutex};

fn point() -> PointId {
    PointId::from_parts(1, &RunId::from_bits(7))
}

#[derive(Clone, Default)]
struct Home(Arc<World>);

/// The home, and what was done in which order.
#[derive(Default)]
struct World {
    done: Mutex<Vec<&'static str>>,
    verbs_left: Mutex<Option<usize>>,
    promoted: Mutex<bool>,
    red: Mutex<bool>,
}

impl World {
    fn does<T>(&self, verb: &'static str, told: T) -> Result<T> {
        match &mut *self.verbs_left.lock().unwrap() {
            Some(0) => return Err(Error::new(Kind::Unavailable, "the power has failed")),
            Some(left) => *left -= 1,
            None => {}
        }
        self.done.lock().unwrap().push(verb);
        Ok(told)
    }
}

impl Home {
    fn run(&self, verbs: Option<usize>, keep_undo: bool) -> Result<CameHome> {
        *self.0.verbs_left.lock().unwrap() = verbs;
        let hand_over = || {
            *self.0.promoted.lock().unwrap() = true;
            self.0.does("hand over", report())
        };
        let hand_back = |generation| {
            assert_eq!(generation, Generation(2));
            self.0.does("hand back", ())
        };
        let ports = Ports {
            home: &|| Ok(Box::new(self.clone())),
            coming: &|| Ok(coming()),
            hand_over: &hand_over,
            hand_back: &hand_back,
            handed_over: false,
            say: &|_| {},
        };
        run(&ports, keep_undo)
    }

    fn done(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.0.done.lock().unwrap())
    }
}

fn coming() -> Coming {
    Coming {
        name: DomainName::new("web01").unwrap(),
        definition: "<domain/>".into(),
        disks: Vec::new(),
        nvram: true,
        tpm: false,
    }
}

fn report() -> handover::Report {
    handover::Report {
        domain: DomainName::new("web01").unwrap(),
        uuid: DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap(),
        to: "ssh://home".into(),
        handover: RunId::from_bits(1),
        point: None,
        downtime_ms: None,
        shutdown_ms: None,
        last_run_ms: None,
        last_run_bytes: 0,
        forced_off: false,
        warnings: Vec::new(),
    }
}

impl BringUp for Home {
    fn ready(&self, _: Option<&PointId>) -> Result<Readiness> {
        unreachable!("the handover asks for that")
    }
    fn ready_for(&self, coming: &Coming) -> Result<Vec<Finding>> {
        assert_eq!(coming, &self::coming());
        let color = if *self.0.red.lock().unwrap() { Color::Red } else { Color::Yellow };
        let advice = Some("say under `networks:` what that is here".to_owned());
        let what = "libvirt here knows no network 'lan'".to_owned();
        self.0.does("ready for", vec![Finding { question: Question::Network, color, what, advice, advised: None }])
    }
    fn state(&self) -> Result<Standing> {
        let promoted = *self.0.promoted.lock().unwrap();
        let promoted = promoted.then(|| Promoted { point: point(), since: Timestamp::UNIX_EPOCH, committed: false });
        Ok(Standing { promoted, ..Standing::default() })
    }
    fn bring_up(&self, _: &Order, _: &dyn Fn(&str)) -> Result<FailoverRecord> {
        unreachable!("the handover does that")
    }
    fn call_off(&self, _: &Order, _: &dyn Fn(&str)) -> Result<()> {
        unreachable!("nothing is called off")
    }
    fn undo(&self, _: &dyn Fn(&str)) -> Result<FailoverRecord> {
        unreachable!("nothing is undone")
    }
    fn commit(&self, _: &dyn Fn(&str)) -> Result<Generation> {
        self.0.does("commit", Generation(2))
    }
    fn give_way(&self, _: &dyn Fn(&str)) -> Result<GaveWay> {
        self.0.does("give way", GaveWay { point: Some(point()) })
    }
}

#[test]
fn broken_off_anywhere_the_same_command_finishes_and_nothing_goes_before_home_has_committed() {
    let whole = ["ready for", "give way", "hand over", "commit", "hand back"];
    for verbs in 0..whole.len() {
        let world = Home::default();
        world.run(Some(verbs), false).unwrap_err();
        assert_eq!(world.done(), whole[..verbs]);
        // Home has brought it up, so far as anybody knows: then it has nothing of its own to give way.
        let rest = if verbs <= 1 { &whole[..] } else { &whole[2..] };
        let came = world.run(None, false).unwrap();
        let done = world.done();
        assert!(done == rest || done == whole, "after {verbs} verbs: {done:?}");
        assert_eq!(came.generation, Some(Generation(2)));
    }
}

#[test]
fn what_can_still_be_undone_is_neither_committed_nor_handed_back() {
    let world = Home::default();
    let came = world.run(None, true).unwrap();
    assert_eq!((came.old, came.generation), (Some(point()), None));
    assert_eq!(world.done(), ["ready for", "give way", "hand over"]);
}

#[test]
fn a_home_that_is_not_ready_keeps_what_it_has() {
    let world = Home::default();
    *world.0.red.lock().unwrap() = true;
    let e = world.run(None, false).unwrap_err();
    assert!(e.kind() == Kind::Conflict && e.what().contains("knows no network 'lan'"), "{e}");
    assert!(e.hint_text().unwrap().contains("networks:"), "{e}");
    assert_eq!(world.done(), ["ready for"]);
}
