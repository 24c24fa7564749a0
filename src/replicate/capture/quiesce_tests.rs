//! The guest agent as a script, and what a run makes of its answers.

use super::*;
use jiff::Timestamp;
use std::cell::RefCell;
use std::sync::Mutex;

/// A guest agent that answers as it is told: `h3` holds three, `h?` does not answer, `h!` refuses; `s+`, `s-`, `s?`;
/// `t+`, `t?`.
struct Agent {
    script: Vec<&'static str>,
    asked: Mutex<Vec<char>>,
}

impl Agent {
    fn of(script: &'static str) -> Agent {
        Agent { script: script.split(' ').collect(), asked: Mutex::default() }
    }

    fn answer(&self, verb: char) -> Result<char> {
        self.asked.lock().unwrap().push(verb);
        let answer = self.script.iter().find(|a| a.starts_with(verb)).map_or('?', |a| a.chars().nth(1).unwrap());
        match answer {
            '?' => Err(Error::new(Kind::Unavailable, "nobody answers")),
            '!' => Err(Error::new(Kind::Refused, "the guest agent refused: no")),
            other => Ok(other),
        }
    }

    fn asked(&self) -> String {
        self.asked.lock().unwrap().iter().collect()
    }
}

impl GuestAgent for Agent {
    fn hold_file_systems(&self, _: &DomainUuid, _: Duration) -> Result<u64> {
        self.answer('h').map(|c| c.to_digit(10).unwrap().into())
    }

    fn are_file_systems_held(&self, _: &DomainUuid, _: Duration) -> Result<bool> {
        self.answer('s').map(|c| c == '+')
    }

    fn thaw_file_systems(&self, _: &DomainUuid, _: Duration) -> Result<u64> {
        self.answer('t').map(|_| 1)
    }
}

/// Remembers how it was armed, in seconds.
#[derive(Default)]
struct Guard(RefCell<Vec<u64>>);

impl PauseGuard for Guard {
    fn arm(&mut self, within: Duration) -> Result<()> {
        self.0.borrow_mut().push(within.as_secs());
        Ok(())
    }

    fn disarm(&mut self) -> Result<()> {
        Ok(())
    }
}

struct Bench {
    state: tempfile::TempDir,
    uuid: DomainUuid,
}

impl Bench {
    fn new() -> Bench {
        let uuid = DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap();
        Bench { state: tempfile::tempdir().unwrap(), uuid }
    }

    fn journal(&self) -> Journal {
        Journal::open(self.state.path(), &self.uuid, "a test", Timestamp::UNIX_EPOCH).unwrap()
    }
}

/// What the point is called, why not better, what was asked, and whether the guest is still owed a thaw.
fn freeze(script: &'static str, wish: Quiesce) -> (Result<Thawed>, String, bool) {
    let (bench, agent, mut guard) = (Bench::new(), Agent::of(script), Guard::default());
    let journal = bench.journal();
    let budget = Duration::from_secs(10);
    let quiescer = Quiescer { agent: &agent, journal: &journal, uuid: &bench.uuid, wish, budget, can: Ok(()) };
    let thawed = quiescer.hold(&mut guard).map(|held| quiescer.release(held));
    (thawed, agent.asked(), journal.is_thaw_owed().unwrap())
}

#[test]
fn a_point_is_consistent_only_if_the_guest_still_held_when_the_disks_stood() {
    let cases = [
        ("h2 s+ t+", Consistency::FileSystem, "", "hst", false),
        ("h2 s- t+", Consistency::Crash, "had let its file systems go", "hst", false),
        ("h2 s? t+", Consistency::Crash, "does not say whether it still held", "hst", false),
        // The point is what it is; that the guest may hang is another matter.
        ("h2 s+ t?", Consistency::FileSystem, "", "hst", true),
        ("h0 t+", Consistency::Crash, "no file system to hold", "ht", false),
        ("h! t+", Consistency::Crash, "refused: no", "ht", false),
        ("h? t+", Consistency::Crash, "nobody answers", "ht", false),
        // It may be held all the same: whoever comes next asks again.
        ("h? t?", Consistency::Crash, "nobody answers", "ht", true),
    ];
    for (script, consistency, why_not, asked, owed) in cases {
        let (thawed, was_asked, is_owed) = freeze(script, Quiesce::Try);
        let thawed = thawed.unwrap();
        assert_eq!((thawed.consistency, was_asked.as_str(), is_owed), (consistency, asked, owed), "{script}");
        let said = thawed.why_not.unwrap_or_default();
        assert!(said.contains(why_not) && said.is_empty() == why_not.is_empty(), "{script}: {said}");
    }
}

#[test]
fn where_it_is_required_there_is_no_point_without_it_and_nobody_asks_where_it_is_not_wished() {
    for script in ["h0 t+", "h! t+", "h? t?"] {
        assert_eq!(freeze(script, Quiesce::Require).0.unwrap_err().kind(), Kind::Refused, "{script}");
    }
    assert!(freeze("h1 s+ t+", Quiesce::Require).0.is_ok());
    let (thawed, asked, owed) = freeze("h1 s+ t+", Quiesce::No);
    assert_eq!((thawed.unwrap().why_not, asked.as_str(), owed), (None, "", false));
}

/// What was seen beforehand is not asked for.
#[test]
fn a_guest_without_an_agent_is_not_asked() {
    let (bench, agent, mut guard) = (Bench::new(), Agent::of("h1"), Guard::default());
    let journal = bench.journal();
    let (wish, budget, can) = (Quiesce::Try, Duration::from_secs(10), Err("it has none"));
    let quiescer = Quiescer { agent: &agent, journal: &journal, uuid: &bench.uuid, wish, budget, can };
    let held = quiescer.hold(&mut guard).unwrap();
    assert_eq!((held.why_not.as_deref(), agent.asked().as_str()), (Some("it has none"), ""));
}

/// The dead-man's deadline never passes while only libvirt waits, and is the budget as soon as something is held.
#[test]
fn the_guard_is_armed_before_the_question_and_bounds_what_is_held() {
    let armed = |script: &'static str| {
        let (bench, agent, mut guard) = (Bench::new(), Agent::of(script), Guard::default());
        let journal = bench.journal();
        let (wish, budget) = (Quiesce::Try, Duration::from_secs(8));
        let quiescer = Quiescer { agent: &agent, journal: &journal, uuid: &bench.uuid, wish, budget, can: Ok(()) };
        quiescer.hold(&mut guard).unwrap();
        guard.0.take()
    };
    assert_eq!(armed("h1 s+ t+"), [14, 7], "seven and some: what is left of eight");
    assert_eq!(armed("h? t?"), [14, 17, 8]);
}

#[test]
fn what_is_owed_is_asked_for_until_it_is_paid() {
    let bench = Bench::new();
    let journal = bench.journal();
    let silent = Agent::of("t?");
    assert!(!journal.is_thaw_owed().unwrap());
    journal.owe_thaw().unwrap();
    for _ in 0..2 {
        let settled = settle_owed(&silent, &journal, &bench.uuid, true).unwrap();
        assert!(matches!(&settled, Settled::Silent(alarm) if alarm.contains("a repair, asks it again")), "{settled:?}");
    }
    assert_eq!(settle_owed(&Agent::of("t+"), &journal, &bench.uuid, true).unwrap(), Settled::LetGo);
    assert!(!journal.is_thaw_owed().unwrap());
    // A domain that is off holds nothing.
    journal.owe_thaw().unwrap();
    assert_eq!(settle_owed(&silent, &journal, &bench.uuid, false).unwrap(), Settled::Nothing);
    assert!(!journal.is_thaw_owed().unwrap());
}

/// `"ffc"`: points oldest first, consistent or as after a power cut.
#[test]
fn every_so_many_points_one_is_consistent() {
    let asked = |points: &str, every: u32| {
        let points: Vec<PointView> = points
            .chars()
            .map(|c| PointView {
                consistency: if c == 'f' { Consistency::FileSystem } else { Consistency::Crash },
                ..crate::replicate::state::report::tests::report(true).point.unwrap()
            })
            .collect();
        QuiesceOptions { wish: Quiesce::Try, every, ..QuiesceOptions::default() }.after(&points) == Quiesce::Try
    };
    for (points, every, due) in [
        ("", 3, true),
        ("f", 1, true),
        ("f", 2, false),
        ("fc", 2, true),
        ("fc", 3, false),
        ("fcc", 3, true),
        // One that failed is made up for by the next.
        ("fccc", 3, true),
        ("ccccf", 3, false),
        ("f", 0, true),
    ] {
        assert_eq!(asked(points, every), due, "{points} every {every}");
    }
}
