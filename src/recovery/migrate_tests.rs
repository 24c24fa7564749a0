//! Forecasts and decisions, each on figures that were chosen to be easy to check by head.

use super::*;

const MIB: u64 = 1 << 20;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

/// A run at this second that sent so many MiB in so many seconds; the guest wrote so many MiB in those seconds.
fn ran(second: i64, sent_mib: u64, took_s: u64, written_mib: Option<u64>) -> Ran {
    Ran {
        bytes_sent: sent_mib * MIB,
        bytes_read: sent_mib * MIB,
        changed_bytes: sent_mib * MIB,
        took: Duration::from_secs(took_s),
        frozen_at: at(second),
        since_freeze: Duration::from_secs(took_s),
        written_bytes: written_mib.map(|mib| mib * MIB),
        unmapped_bytes: 0,
    }
}

fn known() -> Learned {
    Learned { shutdown_ms: Some(2000.0), start_ms: Some(3000.0) }
}

#[test]
fn a_forecast_is_the_shutdown_the_transfer_and_what_every_run_costs() {
    // 100 MiB/s; 10 MiB/s are written: 100 are left, and 20 more come while it goes down.
    let f = forecast(&[ran(0, 1000, 10, Some(100))], &known()).unwrap();
    assert_eq!((f.left_bytes / MIB, f.dirty_rate_bytes / MIB, f.link_rate_bytes), (120, 10, Some(100 * MIB)));
    assert_eq!((f.shutdown_ms, f.transfer_ms, f.fixed_ms, f.downtime_ms), (2000.0, 1200.0, 13000.0, 16200.0));
    // A short round shows what a run costs.
    let rounds = [ran(0, 1000, 10, Some(100)), ran(10, 100, 1, Some(10))];
    let f = forecast(&rounds, &known()).unwrap();
    assert_eq!((f.left_bytes / MIB, f.fixed_ms, f.downtime_ms), (30, 4000.0, 6300.0));
    // Nobody has seen it go down or come up.
    let f = forecast(&rounds, &Learned::default()).unwrap();
    assert_eq!((f.shutdown_ms, f.fixed_ms), (15_000.0, 11_000.0));
}

/// A first copy that was mostly zeros says nothing of the link: what is left is taken to need long until a round has shown it.
#[test]
fn a_link_that_nobody_has_seen_is_not_taken_to_be_fast() {
    let f = forecast(&[ran(0, 1, 10, Some(100))], &known()).unwrap();
    assert_eq!((f.link_rate_bytes, f.left_bytes / MIB, f.transfer_ms), (None, 120, 1_200_000.0));
    let f = forecast(&[ran(0, 1, 10, Some(3))], &known()).unwrap();
    assert_eq!((f.link_rate_bytes, f.transfer_ms), (None, 0.0), "a round's own cost is all there is to it");
}

#[test]
fn without_bitmaps_the_last_run_tells_and_the_first_tells_nothing() {
    assert_eq!(forecast(&[], &known()), None);
    assert_eq!(forecast(&[ran(0, 1000, 10, None)], &known()), None);
    // 50 MiB in the 10 s between the freezes; 1 s has passed since the last.
    let f = forecast(&[ran(0, 1000, 10, None), ran(10, 50, 1, None)], &known()).unwrap();
    assert_eq!((f.dirty_rate_bytes / MIB, f.left_bytes / MIB), (5, 15));
}

#[test]
fn a_disk_whose_bitmap_goes_with_its_qemu_is_read_from_end_to_end() {
    let raw = Ran { unmapped_bytes: 1000 * MIB, ..ran(10, 100, 1, Some(0)) };
    let f = forecast(&[ran(0, 1000, 10, Some(100)), raw], &known()).unwrap();
    assert_eq!(f.transfer_ms, 10_000.0, "100 MiB/s were read at best");
}

#[test]
fn only_what_travels_of_a_written_block_counts() {
    let small = Ran { changed_bytes: 1000 * MIB, ..ran(10, 100, 1, Some(100)) };
    let f = forecast(&[ran(0, 1000, 10, Some(100)), small], &known()).unwrap();
    assert_eq!(f.dirty_rate_bytes / MIB, 10, "a tenth of 100 MiB/s");
}

/// So many ms of downtime, with so many MiB left; written and carried in MiB/s.
fn cast(downtime_ms: f64, left_mib: u64, dirty: u64, link: Option<u64>) -> Forecast {
    Forecast {
        downtime_ms,
        shutdown_ms: 0.0,
        transfer_ms: 0.0,
        fixed_ms: 0.0,
        left_bytes: left_mib * MIB,
        dirty_rate_bytes: dirty * MIB,
        link_rate_bytes: link.map(|rate| rate * MIB),
    }
}

#[test]
fn every_decision_has_its_reason() {
    use Decision::*;
    let limits = Limits { downtime_max: Duration::from_secs(30), at: None, rounds_max: 3, now: false };
    let at_100 = Limits { at: Some(at(100)), ..limits };
    let (good, bad) = (cast(30_000.0, 10, 1, Some(100)), cast(30_001.0, 500, 100, Some(100)));
    let shrinking = cast(40_000.0, 400, 100, Some(100));
    let slow_guest = cast(40_000.0, 600, 99, Some(100));
    let unknown_link = cast(40_000.0, 600, 99, None);
    for (what, rounds, forecasts, limits, now, asked, decision) in [
        ("nothing is known", 1, &[][..], &limits, 0, false, GoOn),
        ("little is left", 1, &[good], &limits, 0, false, CutOver(Why::Forecast)),
        ("one bad round is no trend", 1, &[bad], &limits, 0, false, GoOn),
        ("written as fast as it is carried", 2, &[bad, bad], &limits, 0, false, Diverges),
        ("but less each time", 2, &[bad, shrinking], &limits, 0, false, GoOn),
        ("a guest that is slower than the link", 2, &[bad, slow_guest], &limits, 0, false, GoOn),
        ("a link that nobody knows", 2, &[bad, unknown_link], &limits, 0, false, GoOn),
        ("no end", 3, &[bad, slow_guest], &limits, 0, false, TooManyRounds),
        ("a key", 1, &[bad], &limits, 0, true, CutOver(Why::Asked)),
        ("--now", 1, &[], &Limits { now: true, ..limits }, 0, false, CutOver(Why::Asked)),
        ("before its time", 1, &[good], &at_100, 99, false, Wait),
        ("before its time, much left", 9, &[bad, bad], &at_100, 99, false, GoOn),
        ("at its time", 9, &[bad, bad], &at_100, 100, false, CutOver(Why::Time)),
        ("a key before its time", 9, &[bad], &at_100, 0, true, CutOver(Why::Asked)),
    ] {
        assert_eq!(decide(rounds, forecasts, limits, at(now), asked), decision, "{what}");
    }
}

#[test]
fn who_does_not_converge_is_told_the_figures_and_what_to_do() {
    let forecast = Some(cast(90_000.0, 500, 100, Some(50)));
    let round = Round { round: 2, bytes_sent: 1, duration_ms: 1.0, forecast, decision: Decision::Diverges };
    let e = does_not_converge(&[round.clone(), round]);
    assert!(e.what().contains("102400 KiB/s of a link that carries 51200 KiB/s") && e.what().contains("90 s"), "{e}");
    assert!(e.what().contains("runs here as before") && e.hint_text().unwrap().contains("--max-downtime"), "{e}");
}
