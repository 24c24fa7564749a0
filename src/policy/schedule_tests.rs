//! Slots, catching up, clocks that are set, in small notations.

use super::schedule::{Due, Past, Schedule, Shift, When};
use super::window::Window;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use std::time::Duration;

fn at(text: &str) -> Timestamp {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

/// `"every 15m"`, `"every 1h jitter 10m"`, `"cron 30 2 * * *"`.
fn schedule(text: &str, zone: &str) -> Schedule {
    let zone = TimeZone::get(zone).unwrap();
    let (text, jitter) = text.split_once(" jitter ").unwrap_or((text, "0s"));
    let jitter = crate::units::parse_age(jitter).unwrap();
    let when = match text.split_once(' ').unwrap() {
        ("every", span) => When::Every(crate::units::parse_age(span).unwrap()),
        (_, pattern) => When::Cron(Box::new(super::cron(pattern).unwrap())),
    };
    Schedule { when, jitter, blackout: Vec::new(), zone }
}

fn shift() -> Shift {
    Shift::of("6695eb01-f6a4-8304-79aa-97f2502e193f", "ssh://dr1")
}

fn past(since: &str, begun: &str) -> Past {
    Past { since: at(since), begun: (!begun.is_empty()).then(|| at(begun)), retry_at: None }
}

/// Slots after a moment.
fn slots(s: &Schedule, from: &str, count: usize) -> Vec<String> {
    let next = |t: &Timestamp| Some(s.slot_after(shift(), *t));
    std::iter::successors(Some(s.slot_after(shift(), at(from))), next).take(count).map(|t| t.to_string()).collect()
}

#[test]
fn the_grid_hangs_on_the_epoch_and_never_moves() {
    let s = schedule("every 15m", "Europe/Berlin");
    assert_eq!(slots(&s, "2026-11-25T10:07:31Z", 2), ["2026-11-25T10:15:00Z", "2026-11-25T10:30:00Z"]);
    assert_eq!(slots(&s, "2026-11-25T10:15:00Z", 1), ["2026-11-25T10:30:00Z"]);
    // Not a quarter of an hour after a late run, but at the next quarter.
    let due = s.due(shift(), &past("2026-01-01T00:00:00Z", "2026-11-25T10:28:00Z"), at("2026-11-25T10:29:00Z"));
    assert_eq!(due, Due::At(at("2026-11-25T10:30:00Z")));
}

#[test]
fn thirty_domains_do_not_begin_at_once_and_each_keeps_its_place() {
    let s = schedule("every 1h jitter 1h", "UTC");
    let slot = |n: usize, from: &str| s.slot_after(Shift::of(&format!("domain {n}"), "dr1"), at(from));
    let mut begins: Vec<Timestamp> = (0..30).map(|n| slot(n, "2026-11-25T00:00:00Z")).collect();
    for (n, begin) in begins.iter().enumerate() {
        let later = slot(n, "2027-03-29T12:00:00Z");
        assert_eq!(later.as_second() % 3600, begin.as_second() % 3600, "domain {n} has moved");
    }
    begins.sort();
    let quarter = |n: i64| begins.iter().filter(|t| t.as_second() % 3600 / 900 == n).count();
    let quarters: Vec<usize> = (0..4).map(quarter).collect();
    assert!(quarters.iter().all(|n| (3..=14).contains(n)), "not spread: {quarters:?}");
}

#[test]
fn a_first_copy_is_owed_at_once_but_a_nightly_one_waits_for_the_night() {
    let now = at("2026-11-25T12:00:00Z");
    let new = past("2026-11-25T12:00:00Z", "");
    assert_eq!(schedule("every 1h", "UTC").due(shift(), &new, now), Due::Now { since: now });
    let night = schedule("cron 0 2 * * *", "Europe/Berlin").due(shift(), &new, now);
    assert_eq!(night, Due::At(at("2026-11-26T01:00:00Z")));
}

#[test]
fn what_was_missed_in_a_downtime_is_one_run() {
    let s = schedule("every 15m", "UTC");
    let back = at("2026-11-28T09:01:00Z");
    let before = past("2026-01-01T00:00:00Z", "2026-11-25T10:15:03Z");
    assert_eq!(s.due(shift(), &before, back), Due::Now { since: at("2026-11-25T10:30:00Z") });
    let after = Past { begun: Some(back), ..before };
    assert_eq!(s.due(shift(), &after, back), Due::At(at("2026-11-28T09:15:00Z")));
}

#[test]
fn a_clock_that_was_set_back_does_not_stop_replication() {
    let s = schedule("every 15m", "UTC");
    let from_the_future = past("2031-01-01T00:00:00Z", "2031-01-01T00:15:00Z");
    let now = at("2026-11-25T10:07:00Z");
    assert_eq!(s.due(shift(), &from_the_future, now), Due::At(at("2026-11-25T10:15:00Z")));
    let never_run = past("2031-01-01T00:00:00Z", "");
    assert_eq!(s.due(shift(), &never_run, now), Due::Now { since: now });
}

#[test]
fn failures_and_blackouts_hold_a_run_back_and_do_not_lose_it() {
    let mut s = schedule("every 15m", "UTC");
    let mut p = past("2026-01-01T00:00:00Z", "2026-11-25T10:15:00Z");
    p.retry_at = Some(at("2026-11-25T11:10:00Z"));
    assert_eq!(s.due(shift(), &p, at("2026-11-25T10:40:00Z")), Due::At(at("2026-11-25T11:10:00Z")));
    s.blackout = vec![serde_json::from_value::<Window>(serde_json::json!({ "from": "11:00", "to": "12:30" })).unwrap()];
    assert_eq!(s.due(shift(), &p, at("2026-11-25T10:40:00Z")), Due::At(at("2026-11-25T12:30:00Z")));
    let since = at("2026-11-25T10:30:00Z");
    assert_eq!(s.due(shift(), &p, at("2026-11-25T12:30:00Z")), Due::Now { since });
    let next = s.next(shift(), &p, at("2026-11-25T10:40:00Z"), 3);
    assert_eq!(
        next.iter().map(Timestamp::to_string).collect::<Vec<_>>(),
        ["2026-11-25T12:30:00Z", "2026-11-25T12:45:00Z", "2026-11-25T13:00:00Z"]
    );
}

/// 2026: Berlin goes forward on 29 March at 02:00, back on 25 October at 03:00.
#[test]
fn a_time_that_the_clock_leaves_out_is_made_up_for_and_one_that_it_repeats_is_run_once() {
    let berlin = schedule("cron 30 2 * * *", "Europe/Berlin");
    assert_eq!(slots(&berlin, "2026-03-28T12:00:00Z", 2), ["2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"]);
    assert_eq!(slots(&berlin, "2026-10-24T12:00:00Z", 2), ["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]);
    let new_york = schedule("cron 30 1 * * *", "America/New_York");
    assert_eq!(slots(&new_york, "2026-10-31T12:00:00Z", 2), ["2026-11-01T05:30:00Z", "2026-11-02T06:30:00Z"]);
    // An interval goes on through the repeated hour.
    let quarters = schedule("cron */15 * * * *", "America/New_York");
    let night = slots(&quarters, "2026-11-01T04:59:00Z", 13);
    assert_eq!((night[0].as_str(), night[12].as_str()), ("2026-11-01T05:00:00Z", "2026-11-01T08:00:00Z"));
}

/// One run a day for three years, whatever the clocks do, and the wall shows the time that was asked for.
#[test]
fn a_daily_run_is_daily_in_every_zone() {
    for zone in ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "UTC"] {
        for (pattern, hour, minute) in [("30 2 * * *", 2, 30), ("0 0 * * *", 0, 0), ("59 23 * * *", 23, 59)] {
            let s = schedule(&format!("cron {pattern}"), zone);
            let mut t = at("2025-12-31T23:59:30Z");
            let mut days = std::collections::BTreeSet::new();
            let (mut runs, mut moved) = (0, 0);
            loop {
                t = s.slot_after(shift(), t);
                if t >= at("2028-12-31T00:00:00Z") {
                    break;
                }
                let wall = t.to_zoned(s.zone.clone());
                runs += 1;
                assert!(days.insert(wall.date()), "{zone} {pattern}: twice on {}", wall.date());
                moved += usize::from((wall.hour(), wall.minute()) != (hour, minute));
            }
            assert!((1095..=1096).contains(&runs), "{zone} {pattern}: {runs} runs in three years");
            assert!(moved <= 3, "{zone} {pattern}: {moved} runs at another time than was asked for");
        }
    }
}

#[test]
fn jitter_shifts_a_cron_slot_and_keeps_them_in_order() {
    let (plain, shifted) = (schedule("cron 0 2 * * *", "UTC"), schedule("cron 0 2 * * * jitter 2h", "UTC"));
    let (a, b) = (slots(&plain, "2026-11-25T12:00:00Z", 3), slots(&shifted, "2026-11-25T12:00:00Z", 3));
    let by: Vec<i64> = a.iter().zip(&b).map(|(a, b)| at(b).duration_since(at(a)).as_secs()).collect();
    assert!(by[0] > 0 && by[0] < 7200 && by.iter().all(|s| *s == by[0]), "{by:?}");
    // Between the plain slot and its own, the slot of the day is still ahead.
    let between = at(&a[0]) + jiff::SignedDuration::from_secs(by[0] / 2);
    assert_eq!(shifted.slot_after(shift(), between), at(&b[0]));
}

#[test]
fn without_an_rpo_a_run_is_owed_before_the_next_one_is() {
    let s = schedule("every 1h", "UTC");
    let p = past("2026-11-25T08:00:00Z", "2026-11-25T10:00:00Z");
    assert_eq!(s.deadline(shift(), None, None, &p), at("2026-11-25T12:00:00Z"));
    let hour = Some(Duration::from_secs(3600));
    assert_eq!(s.deadline(shift(), hour, Some(at("2026-11-25T10:00:01Z")), &p), at("2026-11-25T11:00:01Z"));
    // Never replicated: the clock runs from when this host began to look after it.
    assert_eq!(s.deadline(shift(), hour, None, &p), at("2026-11-25T09:00:00Z"));
}
