//! The checks beside the runs, with a made-up clock.

use super::engine_tests::{Bench, said, words};
use super::event::{Event, Level, Listed, Order};
use super::pair::RunResult;
use crate::daemon::check::{Check, CheckState};
use crate::error::Kind;

const CHECKED: &str = "name: p\ndomains: [\"*\"]\ntargets: [dr1]\nevery: 1h\njitter: 0s\nverify: {every: 1d}\n\
    retry: {first: 60s, max: 1h}\nhooks: {on_failure: {command: [/bin/true]}}\n";

impl Bench {
    fn checked(&mut self, run: u64, error: Option<(Option<Kind>, &str)>) -> Vec<Order> {
        let error = error.map(|(kind, why)| (kind, why.to_owned()));
        self.tell(Event::Checked { run, error })
    }

    /// Passes time until a check begins, and gives its number; runs seal at once.
    fn until_checked(&mut self, hours: u64) -> u64 {
        for _ in 0..hours * 12 {
            for word in words(&self.pass(300)) {
                let (run, what) = word.split_once(':').expect("a begin");
                let run = run.parse().expect("its number");
                if what.starts_with("verify ") {
                    return run;
                }
                self.seals(run);
            }
        }
        panic!("no check within {hours} hours");
    }

    fn verify_of(&self, domain: usize) -> CheckState {
        self.engine.status(self.now).domains[domain].checks[&Check::Verify].clone()
    }
}

#[test]
fn checks_go_beside_runs_one_at_a_time_and_on_a_schedule_of_their_own() {
    let mut b = Bench::new(&[CHECKED]);
    assert_eq!(
        words(&b.domains("a b")),
        ["1:a>dr1", "2:b>dr1"],
        "there is nothing to be checked before there is a point"
    );
    assert_eq!(words(&b.seals(1)), ["3:verify a>dr1"]);
    assert_eq!(words(&b.seals(2)), [""; 0], "one at a time");
    // A check of hours holds no run up.
    for _ in 0..11 {
        b.tell(Event::Sign { run: 3, step: None });
        assert_eq!(words(&b.pass(300)), [""; 0]);
    }
    b.tell(Event::Sign { run: 3, step: None });
    assert_eq!(words(&b.pass(300)), ["4:a>dr1", "5:b>dr1"]);
    assert_eq!(words(&b.checked(3, None)), ["6:verify b>dr1"]);
    b.checked(6, None);
    b.seals(4);
    b.seals(5);
    assert_eq!((b.verify_of(0).passed, b.verify_of(1).passed), (1, 1));
    b.until_checked(25);
}

#[test]
fn damage_is_an_alarm_and_is_not_read_again_at_once() {
    let mut b = Bench::new(&[CHECKED]);
    b.domains("a");
    b.seals(1);
    let orders = b.checked(2, Some((Some(Kind::Corrupt), "vda: 3 blocks")));
    assert!(said(&orders, Level::Error).contains("ALARM") && said(&orders, Level::Error).contains("vda: 3 blocks"));
    assert_eq!(words(&orders), ["hook on_failure"]);
    assert_eq!(words(&b.pass(600)), [""; 0]);
    assert_eq!((b.verify_of(0).error.as_deref(), b.verify_of(0).failed), (Some("vda: 3 blocks"), 1));
    // The next one, in its slot, found it mended.
    let next = b.until_checked(25);
    b.checked(next, None);
    assert_eq!(b.verify_of(0).error, None);
}

#[test]
fn a_check_without_a_verdict_is_tried_again_and_one_that_hangs_is_ended() {
    let mut b = Bench::new(&[CHECKED]);
    b.domains("a");
    b.seals(1);
    let orders = b.checked(2, Some((Some(Kind::Unavailable), "away")));
    assert!(said(&orders, Level::Warn).contains("did not come to an end"), "{orders:?}");
    assert_eq!(words(&b.pass(59)), [""; 0]);
    assert_eq!(words(&b.pass(1)), ["3:verify a>dr1"]);
    assert_eq!(words(&b.pass(15 * 60)), ["term 3"]);
    assert_eq!(words(&b.pass(30)), ["kill 3"]);
    b.checked(3, Some((None, "signal 9")));
    assert_eq!(words(&b.pass(119)), [""; 0], "longer from one attempt to the next");
    // One that is paused is not checked either.
    b.engine.pause(Some("a"), true);
    assert_eq!(words(&b.pass(600)), [""; 0]);
    b.engine.pause(Some("a"), false);
    assert_eq!(words(&b.tell(Event::Tick)), ["4:verify a>dr1"]);
    // The daemon's end ends it, and that is no failure of it.
    assert_eq!(words(&b.tell(Event::Stop)), ["term 4"]);
    assert_eq!(words(&b.checked(4, Some((Some(Kind::Interrupted), "stopped")))), ["exit"]);
    assert_eq!(b.verify_of(0).failed, 2);
}

#[test]
fn one_pass_does_the_checks_that_are_due_too() {
    let mut b = Bench::with(&[CHECKED], Vec::new(), true);
    b.domains("a");
    assert_eq!(words(&b.seals(1)), ["2:verify a>dr1"]);
    assert_eq!(words(&b.checked(2, None)), ["exit"]);
}

const OF_A_TARGET: &str = "name: t\nreplicas: [\"*\"]\nroot: /r\nrpo: 2h\ndrill: {every: 7d, probes: [agent]}\n\
    hooks: {on_breach: {command: [/bin/true]}}\n";

impl Bench {
    /// `"a b"`: replicas of the store, whose heads are of this moment.
    fn replicas(&mut self, names: &str) -> Vec<Order> {
        let frozen_at = self.now.wall;
        let listed = self.listed(names).into_iter().map(|l| Listed {
            store: Some("/r".into()),
            points: vec![("local:/r".to_owned(), frozen_at, frozen_at)],
            ..l
        });
        self.tell(Event::Domains(listed.collect()))
    }
}

/// A target's own policy: nothing is sent, each replica is booted in its turn, and a source that has died is noticed.
#[test]
fn a_target_drills_its_replicas_and_watches_their_age() {
    let mut b = Bench::new(&[OF_A_TARGET]);
    assert_eq!(words(&b.replicas("a b")), ["1:drill a>local:/r"]);
    assert_eq!(words(&b.checked(1, None)), ["2:drill b>local:/r"]);
    assert_eq!(words(&b.checked(2, None)), [""; 0]);
    let row = &b.engine.status(b.now).domains[0];
    assert_eq!((row.rpo_s, row.lag_s, row.next_at, row.totals.runs(RunResult::Sealed)), (Some(7200), Some(0), None, 0));
    assert_eq!(words(&b.pass(7200)), [""; 0]);
    assert_eq!(words(&b.pass(1)), ["hook on_breachentered", "hook on_breachentered"]);
    assert_eq!(words(&b.replicas("a b")), ["hook on_breachleft", "hook on_breachleft"], "points have arrived");
    // A domain of this host that is called the same is somebody else.
    assert_eq!(words(&b.domains("a")), [""; 0]);
}
