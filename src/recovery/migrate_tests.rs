//! Decisions, each on figures that were chosen to be easy to check by head.

use super::*;

const MIB: u64 = 1 << 20;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

/// So many ms of downtime, with so many MiB left; written and carried in MiB/s.
fn cast(downtime_ms: f64, left_mib: u64, dirty: u64, link: Option<u64>) -> Forecast {
    Forecast {
        downtime_ms,
        shutdown_ms: 0.0,
        shutdown_assumed: false,
        transfer_ms: 0.0,
        read_ms: 0.0,
        fixed_ms: 0.0,
        start_ms: 0.0,
        start_assumed: false,
        read_bytes: 0,
        read_rate_bytes: 0,
        read_rate_assumed: true,
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
    assert!(
        e.what().contains("runs here as before")
            && e.advice() == Some(&crate::error::advice::Handover::Converge.into()),
        "{e}"
    );
}
