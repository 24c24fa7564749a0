//! The engine with a made-up clock and scripted runs.

use super::engine::Engine;
use super::event::{Event, Level, Listed, Now, Order, Setup};
use super::pair::{End, Key, Pair, RunResult};
use super::status::Row;
use crate::config::Config;
use crate::error::Kind;
use crate::name::{DomainName, DomainUuid};
use crate::policy::select::SeenDomain;
use crate::replicate::settle::stopped::GuestStopped;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

const CONFIG: &str =
    "targets: {dr1: {url: ssh://dr1}, vault: {url: ssh://vault, runs_max: 1}}\ndaemon: {runs_max: 2}\n";

fn setup(policies: &[&str]) -> Setup {
    let config = Config::parse(CONFIG, Path::new("vr.yaml")).unwrap();
    let read = |(n, text): (usize, &&str)| {
        let path = format!("{n}.yaml");
        crate::policy::Policy::parse(text, Path::new(&path), &["dr1", "vault"]).unwrap()
    };
    Setup::new(&config, policies.iter().enumerate().map(read).collect(), &TimeZone::UTC)
}

fn uuid(n: u32) -> DomainUuid {
    DomainUuid::new(format!("00000000-0000-0000-0000-{n:012}")).unwrap()
}

/// An engine, its clock, and what it ordered last.
pub(super) struct Bench {
    pub(super) engine: Engine,
    pub(super) now: Now,
}

const HOURLY: &str = "name: p\ndomains: [\"*\"]\ntargets: [dr1]\nevery: 1h\njitter: 0s\nrpo: 2h\n";

impl Bench {
    pub(super) fn new(policies: &[&str]) -> Bench {
        Bench::with(policies, Vec::new(), false)
    }

    pub(super) fn with(policies: &[&str], pairs: Vec<Pair>, once: bool) -> Bench {
        let wall = "2026-11-25T12:00:00Z".parse().unwrap();
        let now = Now { wall, up: Duration::ZERO, random: u64::MAX };
        Bench { engine: Engine::new(setup(policies), pairs, BTreeSet::new(), false, once), now }
    }

    pub(super) fn pass(&mut self, seconds: u64) -> Vec<Order> {
        self.now.wall += SignedDuration::from_secs(seconds as i64);
        self.now.up += Duration::from_secs(seconds);
        self.tell(Event::Tick)
    }

    pub(super) fn tell(&mut self, event: Event) -> Vec<Order> {
        self.engine.handle(event, self.now)
    }

    /// `"a b c"`: domains by name; each has a UUID by its first letter.
    pub(super) fn domains(&mut self, names: &str) -> Vec<Order> {
        let listed = self.listed(names);
        self.tell(Event::Domains(listed))
    }

    pub(super) fn listed(&self, names: &str) -> Vec<Listed> {
        let domain = |name: &str| Listed {
            domain: SeenDomain {
                name: DomainName::new(name).unwrap(),
                uuid: uuid(u32::from(name.as_bytes()[0])),
                tags: Vec::new(),
            },
            store: None,
            points: Vec::new(),
            lives_on: None,
            promoted_since: None,
        };
        names.split_whitespace().map(domain).collect()
    }

    pub(super) fn seals(&mut self, run: u64) -> Vec<Order> {
        let frozen_at = self.now.wall;
        self.tell(Event::Ended { run, end: sealed(frozen_at) })
    }

    fn fails(&mut self, run: u64, kind: Kind) -> Vec<Order> {
        self.tell(Event::Ended { run, end: End::failed(Some(kind), "no") })
    }
}

fn sealed(frozen_at: Timestamp) -> End {
    End {
        result: RunResult::Sealed,
        frozen_at: Some(frozen_at),
        point: Some("000001-deadbeef".into()),
        error: None,
        bytes_sent: 5,
        ..End::failed(None, "")
    }
}

/// Starts as `"1:a>dr1"`, signals as `"term 1"` and `"kill 1"`, `"repair 1"`, `"exit"`, hooks as `"hook on_breach
/// entered"`.
pub(super) fn words(orders: &[Order]) -> Vec<String> {
    let env = |env: &[(String, String)], name: &str| {
        env.iter().find(|(n, _)| *n == name).map(|(_, v)| v.clone()).unwrap_or_default()
    };
    orders
        .iter()
        .filter_map(|o| match o {
            Order::Start { run, job } => Some(format!("{run}:{}>{}", job.domain.name, job.target)),
            Order::Check { run, check, job } => {
                Some(format!("{run}:{} {}>{}", check.word(), job.domain.name, job.target))
            }
            Order::Repair { run, .. } => Some(format!("repair {run}")),
            Order::Terminate(run) => Some(format!("term {run}")),
            Order::Kill(run) => Some(format!("kill {run}")),
            Order::Hook { env: e, .. } => {
                let words =
                    [env(e, "VIRT_REPLICA_EVENT"), env(e, "VIRT_REPLICA_BREACH"), env(e, "VIRT_REPLICA_OUTCOME")];
                Some(format!("hook {}", words.concat()))
            }
            Order::Exit => Some("exit".to_owned()),
            Order::Say(..) | Order::Save => None,
        })
        .collect()
}

pub(super) fn said(orders: &[Order], level: Level) -> String {
    let text = |o: &Order| match o {
        Order::Say(l, _, text) if *l == level => Some(text.clone()),
        _ => None,
    };
    orders.iter().filter_map(text).collect::<Vec<_>>().join("\n")
}

#[test]
fn new_domains_run_at_once_within_the_caps_and_then_on_the_grid() {
    let mut b = Bench::new(&[HOURLY]);
    assert_eq!(words(&b.tell(Event::Tick)), [""; 0], "nothing is known of the domains yet");
    assert_eq!(words(&b.domains("a b c")), ["1:a>dr1", "2:b>dr1"]);
    assert_eq!(words(&b.pass(30)), [""; 0]);
    assert_eq!(words(&b.seals(1)), ["3:c>dr1"]);
    b.seals(2);
    b.seals(3);
    assert_eq!(words(&b.pass(3000)), [""; 0]);
    // Its next moment is one at which something happens.
    let sleep = b.engine.sleep(b.now);
    assert!(sleep <= Duration::from_secs(60) && !sleep.is_zero(), "{sleep:?}");
    assert_eq!(words(&b.pass(600)), ["4:a>dr1", "5:b>dr1"]);
}

#[test]
fn a_failure_waits_longer_each_time_and_a_point_made_by_hand_ends_that() {
    let mut b = Bench::new(&[HOURLY]);
    b.domains("a");
    let orders = b.fails(1, Kind::Unavailable);
    assert!(said(&orders, Level::Error).contains("again in 30 s"), "{orders:?}");
    assert_eq!(words(&b.pass(29)), [""; 0]);
    assert_eq!(words(&b.pass(1)), ["2:a>dr1"]);
    assert!(said(&b.fails(2, Kind::Unavailable), Level::Error).contains("again in 60 s"));
    // Somebody replicated it by hand meanwhile.
    let listed = Listed {
        domain: SeenDomain { name: DomainName::new("a").unwrap(), uuid: uuid(97), tags: Vec::new() },
        store: None,
        points: vec![("ssh://dr1".into(), b.now.wall, b.now.wall)],
        lives_on: None,
        promoted_since: None,
    };
    b.tell(Event::Domains(vec![listed]));
    assert_eq!(words(&b.pass(120)), [""; 0], "it has a point of two minutes ago");
}

#[test]
fn a_run_that_hangs_is_ended_then_killed_and_its_domain_looked_after() {
    let mut b = Bench::new(&[HOURLY]);
    b.domains("a");
    b.tell(Event::Sign { run: 1, step: Some(5) });
    assert_eq!(words(&b.pass(14 * 60)), [""; 0]);
    b.tell(Event::Sign { run: 1, step: None });
    assert_eq!(words(&b.pass(14 * 60)), [""; 0], "it lives");
    assert_eq!(words(&b.pass(60)), ["term 1"]);
    assert_eq!(words(&b.pass(119)), [""; 0]);
    assert_eq!(words(&b.pass(1)), ["kill 1"]);
    assert_eq!(words(&b.tell(Event::Ended { run: 1, end: End::failed(None, "signal 9") })), ["repair 1"]);
    // Nothing else on the domain before that has ended, though it is due again.
    assert_eq!(words(&b.pass(60)), [""; 0]);
    assert_eq!(words(&b.tell(Event::Ended { run: 1, end: End::failed(None, "") })), ["2:a>dr1"]);
}

#[test]
fn a_commit_may_be_silent_for_as_long_as_its_policy_lets_it() {
    let mut b = Bench::new(&[HOURLY]);
    b.domains("a");
    b.tell(Event::Sign { run: 1, step: Some(7) });
    assert_eq!(words(&b.pass(74 * 60)), [""; 0]);
    assert_eq!(words(&b.pass(60)), ["term 1"]);
}

#[test]
fn stopping_ends_runs_in_order_and_kills_what_does_not_end() {
    let mut b = Bench::new(&[HOURLY]);
    b.domains("a b c");
    assert_eq!(words(&b.tell(Event::Stop)), ["term 1", "term 2"]);
    assert_eq!(words(&b.fails(1, Kind::Interrupted)), [""; 0], "c does not begin");
    assert_eq!(words(&b.pass(119)), [""; 0]);
    assert_eq!(words(&b.pass(1)), ["kill 2"]);
    assert_eq!(words(&b.fails(2, Kind::Interrupted)), ["exit"], "no repair: its dead-man, or the next run, does it");
    assert_eq!(words(&Bench::new(&[HOURLY]).tell(Event::Stop)), ["exit"]);
}

/// A replica whose domain was brought up here gets no younger point: its source is refused, as it should be.
#[test]
fn of_a_replica_that_was_promoted_no_age_is_counted_until_it_is_withdrawn() {
    let hooks = "hooks: {on_breach: {command: [/bin/true]}}\n";
    let mut b = Bench::new(&[&format!("name: t\nreplicas: [a, b]\nroot: /store\nrpo: 1h\n{hooks}")]);
    let listed = |b: &Bench, frozen_at: Timestamp, promoted_since: Option<Timestamp>| {
        let there = b.listed("a b").into_iter().map(|l| Listed {
            store: Some("/store".into()),
            points: vec![("local:/store".into(), frozen_at, frozen_at)],
            promoted_since: promoted_since.filter(|_| l.domain.name.as_str() == "a"),
            ..l
        });
        there.collect::<Vec<Listed>>()
    };
    let frozen_at = b.now.wall;
    let seen = listed(&b, frozen_at, None);
    b.tell(Event::Domains(seen));
    assert_eq!(words(&b.pass(3601)), ["hook on_breachentered", "hook on_breachentered"]);
    // It was brought up: of this one, and of no other, the RPO is not counted any more.
    let since = b.now.wall;
    let seen = listed(&b, frozen_at, Some(since));
    let orders = b.tell(Event::Domains(seen));
    assert_eq!(words(&orders), ["hook on_breachleft"]);
    assert!(
        said(&orders, Level::Warn).contains("domain 'a' to local:/store: the domain was brought up here"),
        "{orders:?}"
    );
    assert_eq!(words(&b.pass(36_000)), [""; 0]);
    let rows = b.engine.status(b.now).domains;
    let of = |row: &Row| (row.promoted_since, row.lag_s.is_some(), row.rpo_s, row.breach_since.is_some());
    assert_eq!(of(&rows[0]), (Some(since), false, None, false));
    assert_eq!(of(&rows[1]), (None, true, Some(3600), true));
    // It was undone: its source may send points again, and has not.
    let seen = listed(&b, frozen_at, None);
    assert_eq!(words(&b.tell(Event::Domains(seen))), ["hook on_breachentered"]);
}

/// A domain that lives on its target is no domain whose replica is late.
#[test]
fn of_a_domain_that_was_handed_over_nothing_is_promised_and_nobody_is_alarmed() {
    let hooks = "hooks: {on_breach: {command: [/bin/true]}, on_failure: {command: [/bin/true]}}\n";
    let mut b = Bench::new(&[&format!("{HOURLY}{hooks}")]);
    b.domains("a");
    b.seals(1);
    // It was handed over while a run was under way: the daemon learns of it by that.
    assert_eq!(words(&b.pass(3600)), ["2:a>dr1"]);
    let end =
        || End { lives_on: Some("ssh://dr1".into()), ..End::failed(Some(Kind::Conflict), "it lives on ssh://dr1") };
    let orders = b.tell(Event::Ended { run: 2, end: end() });
    assert!(words(&orders).is_empty() && said(&orders, Level::Error).is_empty(), "{orders:?}");
    assert!(said(&orders, Level::Info).contains("lives on ssh://dr1"), "{orders:?}");
    let here = |b: &Bench| b.listed("a");
    let there = |b: &Bench| vec![Listed { lives_on: Some("ssh://dr1".into()), ..here(b).remove(0) }];
    let listed = there(&b);
    b.tell(Event::Domains(listed));
    // Hours beyond its RPO: now and then is asked whether the target has let it back, and nothing is broken.
    let mut asked = 0;
    for _ in 0..20 {
        for word in words(&b.pass(1800)) {
            let run = word.strip_suffix(":a>dr1").unwrap_or_else(|| panic!("{word}")).parse().unwrap();
            asked += 1;
            assert_eq!(words(&b.tell(Event::Ended { run, end: end() })), [""; 0]);
        }
    }
    assert!((5..=20).contains(&asked), "{asked}");
    let row = b.engine.status(b.now).domains.remove(0);
    assert_eq!((row.lives_on.as_deref(), row.lag_s, row.rpo_s, row.slack_s), (Some("ssh://dr1"), None, None, None));
    assert_eq!((row.breach_since, row.failures, row.totals.breaches, row.totals.failed), (None, 0, 0, 0));
    // Somebody starts it here all the same: that is told as loudly as ever.
    let run = words(&b.pass(1800))[0].split(':').next().unwrap().parse().unwrap();
    let end = End { alarms: vec!["a RUNS ON BOTH SIDES".into()], ..end() };
    let orders = b.tell(Event::Ended { run, end });
    assert_eq!(words(&orders), ["hook on_failurefailed"]);
    assert!(said(&orders, Level::Error).contains("RUNS ON BOTH SIDES"), "{orders:?}");
    // It is this host's again: what was promised of it is broken by now.
    let listed = here(&b);
    assert_eq!(words(&b.tell(Event::Domains(listed))), ["hook on_breachentered"]);
}

/// A guest that is down is an alarm, whether or not its point was made.
#[test]
fn a_guest_that_an_io_error_has_stopped_is_an_alarm() {
    let mut b = Bench::new(&[HOURLY]);
    b.domains("a");
    let stopped = GuestStopped { resumed: false, why: "QEMU has stopped the guest".into() };
    let end = End { guest_stopped: Some(stopped), ..sealed(b.now.wall) };
    let orders = b.tell(Event::Ended { run: 1, end });
    assert!(said(&orders, Level::Error).contains("ALARM: QEMU has stopped the guest"), "{orders:?}");
    let status = b.engine.status(b.now);
    assert!(crate::daemon::metrics::render(&status).contains("guest_stopped{domain=\"a\",target=\"ssh://dr1\"} 1"));
    assert!(crate::daemon::page::render(&status).contains("QEMU has stopped the guest"));
}

#[test]
fn breach_is_told_once_when_it_begins_and_once_when_it_ends() {
    let hook =
        format!("{HOURLY}hooks: {{on_breach: {{command: [/bin/true]}}, on_failure: {{command: [/bin/true]}}}}\n");
    let mut b = Bench::new(&[&hook]);
    b.domains("a");
    assert_eq!(words(&b.fails(1, Kind::Conflict)), ["hook on_failurefailed"]);
    let mut told = Vec::new();
    for _ in 0..50 {
        for word in words(&b.pass(180)) {
            match word.split_once(':').and_then(|(run, _)| run.parse().ok()) {
                Some(run) => drop(b.fails(run, Kind::Conflict)),
                None => told.push(word),
            }
        }
    }
    assert_eq!(told, ["hook on_breachentered"]);
    let run = (1..100).rev().find(|r| words(&b.seals(*r)).iter().any(|w| w == "hook on_breachleft"));
    if run.is_none() {
        // No run was under way: the next one ends it.
        let orders = b.pass(1800);
        let run: u64 = words(&orders)[0].split(':').next().unwrap().parse().unwrap();
        assert_eq!(words(&b.seals(run)), ["hook on_breachleft"]);
    }
    assert_eq!(b.engine.status(b.now).domains[0].totals.breaches, 1);
}

#[test]
fn a_reload_keeps_runs_and_a_broken_one_keeps_the_policies() {
    let mut b = Bench::new(&[HOURLY]);
    b.domains("a b");
    let orders = b.tell(Event::ReloadFailed("p.yaml:3:1: unknown key".into()));
    assert!(said(&orders, Level::Error).contains("the old one stays in force"));
    assert!(b.engine.status(b.now).config_error.is_some());
    b.seals(1);
    // Now only b is meant, and elsewhere; what runs goes on to where it was going.
    let other = "name: q\ndomains: [b]\ntargets: [vault]\nevery: 1h\n";
    assert_eq!(words(&b.tell(Event::Reloaded(setup(&[other])))), [""; 0], "b has a run under way");
    assert_eq!(b.engine.status(b.now).config_error, None);
    assert_eq!(words(&b.seals(2)), ["3:b>vault"]);
    let status = b.engine.status(b.now);
    let a = status.domains.iter().find(|r| r.domain.as_str() == "a").unwrap();
    assert_eq!((a.policy.clone(), a.totals.sealed), (None, 1), "what was counted is not forgotten");
}

#[test]
fn without_libvirt_nothing_begins_and_it_is_said_once() {
    let mut b = Bench::new(&[HOURLY]);
    b.domains("a");
    b.seals(1);
    assert!(said(&b.tell(Event::DomainsFailed("away".into())), Level::Error).contains("away"));
    assert_eq!(said(&b.tell(Event::DomainsFailed("away".into())), Level::Error), "");
    assert_eq!(words(&b.pass(3600)), [""; 0]);
    let orders = b.domains("a");
    assert_eq!(words(&orders), ["2:a>dr1"]);
    assert!(said(&orders, Level::Info).contains("there again"));
}

#[test]
fn domains_that_vanish_return_and_are_renamed_are_followed() {
    let mut b = Bench::new(&["name: p\ndomains: [a*]\ntargets: [dr1]\nevery: 1h\njitter: 0s\n"]);
    b.domains("a");
    b.seals(1);
    b.domains("");
    assert_eq!(words(&b.pass(3600)), [""; 0]);
    assert!(b.engine.status(b.now).domains.is_empty(), "nobody is told of what is not there");
    assert_eq!(b.engine.memory().0.len(), 1, "and nothing is forgotten at once");
    // Renamed, and still the same: it does not begin from nothing.
    let orders = b.domains("ab");
    assert!(said(&orders, Level::Info).contains("'a' is called 'ab' now"), "{orders:?}");
    assert_eq!(words(&orders), ["2:ab>dr1"]);
    assert_eq!(b.engine.status(b.now).domains.len(), 1);
}

#[test]
fn a_person_may_pause_resume_and_ask() {
    let mut b = Bench::new(&[HOURLY]);
    b.domains("a");
    b.seals(1);
    assert!(b.engine.pause(Some("a"), true) && !b.engine.pause(Some("nobody"), true));
    assert_eq!(words(&b.pass(3600)), [""; 0]);
    assert!(b.engine.run_now("a") && !b.engine.run_now("nobody"));
    assert_eq!(words(&b.tell(Event::Tick)), ["2:a>dr1"], "who asks means it, also while it is paused");
    b.seals(2);
    assert_eq!(words(&b.pass(3600)), [""; 0]);
    assert!(b.engine.pause(None, false));
    assert_eq!(words(&b.tell(Event::Tick)), ["3:a>dr1"]);
}

#[test]
fn a_domain_with_two_targets_goes_to_one_after_the_other() {
    let mut b = Bench::new(&["name: p\ndomains: [a]\ntargets: [dr1, vault]\nevery: 1h\n"]);
    assert_eq!(words(&b.domains("a")), ["1:a>dr1"]);
    assert_eq!(words(&b.seals(1)), ["2:a>vault"]);
}

#[test]
fn who_will_be_late_is_said_beforehand_and_once() {
    let mut b = Bench::new(&[HOURLY]);
    b.domains("a");
    let begun = b.now.wall;
    b.pass(2 * 3600 - 60);
    // It took almost two hours, and the next one is due since one: what it makes comes too late.
    let mut warnings = said(&b.tell(Event::Ended { run: 1, end: sealed(begun) }), Level::Warn);
    for _ in 0..3 {
        warnings += &said(&b.pass(10), Level::Warn);
    }
    assert_eq!(warnings.matches("will be broken").count(), 1, "{warnings}");
}

/// The source's clock was far ahead when it made a point, and is right again: the point is as old as the target says,
/// and a replication that is dead from then on is late like any other.
#[test]
fn a_clock_that_was_ahead_hides_no_dead_replication() {
    let mut b = Bench::new(&[HOURLY]);
    b.domains("a");
    let ahead = End { clock_ahead_s: Some(9_000_000), ..sealed(b.now.wall) };
    b.tell(Event::Ended { run: 1, end: ahead });
    let row = |b: &Bench| b.engine.status(b.now).domains.remove(0);
    assert_eq!((row(&b).clock_ahead_s, row(&b).lag_s), (Some(9_000_000), Some(0)), "it is told");
    b.pass(2 * 3600 + 1);
    let late = row(&b);
    assert!(late.breach_since.is_some() && late.lag_s == Some(7201) && late.slack_s < Some(0), "{late:?}");

    // Both clocks were ahead, by 70 years: nobody knows how old the point is, and no RPO is kept by that.
    let mut b = Bench::new(&[HOURLY]);
    b.domains("a");
    let future = b.now.wall + SignedDuration::from_hours(24 * 365 * 70);
    b.tell(Event::Ended { run: 1, end: sealed(future) });
    b.pass(1);
    let unknown = row(&b);
    assert!(
        unknown.lag_s.is_none() && unknown.breach_since.is_some() && unknown.clock_ahead_s > Some(1 << 30),
        "{unknown:?}"
    );
    // The next point of now takes its place, though it is older on paper.
    b.pass(3600);
    b.seals(2);
    b.pass(1);
    let well = row(&b);
    assert_eq!((well.lag_s, well.breach_since, well.clock_ahead_s), (Some(1), None, None));
}

/// Partly protected is a state and no failure: it is said once, shown until a run has planned without it, and outlives
/// runs that fail.
#[test]
fn a_disk_that_is_not_protected_is_shown_and_is_no_failure() {
    let mut b = Bench::new(&[HOURLY]);
    b.domains("a");
    let skipped = r#"{"name":"vdb","reason":"is encrypted by QEMU (luks)","cause":"unprotected"}"#;
    let partly = vec![serde_json::from_str(skipped).unwrap()];
    let end = |b: &Bench, unprotected| End { unprotected, ..sealed(b.now.wall) };
    let first = end(&b, Some(partly.clone()));
    let told = b.tell(Event::Ended { run: 1, end: first });
    assert!(said(&told, Level::Warn).contains("NOT PROTECTED"), "{told:?}");
    let row = |b: &Bench| b.engine.status(b.now).domains.remove(0);
    assert_eq!((row(&b).unprotected, row(&b).failures), (partly.clone(), 0));
    b.pass(3600);
    let again = end(&b, Some(partly.clone()));
    assert_eq!(said(&b.tell(Event::Ended { run: 2, end: again }), Level::Warn), "", "once is enough");
    b.pass(3600);
    b.fails(3, Kind::Unavailable);
    assert_eq!(row(&b).unprotected, partly, "a run that planned nothing knows nothing");
    b.pass(3600);
    let named = end(&b, Some(Vec::new()));
    b.tell(Event::Ended { run: 4, end: named });
    assert_eq!(row(&b).unprotected, []);
}

#[test]
fn one_pass_ends_when_nothing_is_due_and_counts_what_failed() {
    let mut b = Bench::with(&[HOURLY], Vec::new(), true);
    assert_eq!(words(&b.domains("a b c")), ["1:a>dr1", "2:b>dr1"]);
    b.seals(1);
    assert_eq!(words(&b.fails(2, Kind::Io)), [""; 0]);
    assert_eq!(words(&b.seals(3)), ["exit"]);
    assert_eq!(b.engine.failed_runs, 1);
}

#[test]
fn what_an_earlier_daemon_knew_is_gone_on_with() {
    let key = Key { uuid: uuid(97), url: "ssh://dr1".into() };
    let mut pair = Pair::new(key, DomainName::new("a").unwrap(), "2026-11-01T00:00:00Z".parse().unwrap());
    let now = "2026-11-25T12:00:00Z".parse().unwrap();
    pair.learn("2026-11-25T11:59:00Z".parse().unwrap(), "2026-11-25T11:59:01Z".parse().unwrap(), now);
    let mut b = Bench::with(&[HOURLY], vec![pair], false);
    b.now.wall -= SignedDuration::from_secs(30);
    assert_eq!(words(&b.domains("a")), [""; 0], "not due before noon");
    assert_eq!(words(&b.pass(30)), ["1:a>dr1"]);
}

#[test]
fn a_domain_that_is_gone_for_good_is_forgotten_in_the_end() {
    let mut b = Bench::new(&[HOURLY]);
    b.domains("a b");
    b.seals(1);
    b.seals(2);
    b.domains("b");
    b.pass(89 * 86_400);
    b.domains("b");
    assert_eq!(b.engine.memory().0.len(), 2);
    b.pass(2 * 86_400);
    b.domains("b");
    assert_eq!(b.engine.memory().0.len(), 1);
}
