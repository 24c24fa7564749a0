//! Forecasts, each on figures that were chosen to be easy to check by head.

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

/// A first copy that was mostly zeros says nothing of the link: what is left is taken to need long until a round has
/// shown it.
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
    assert_eq!((f.transfer_ms, f.read_ms), (10_182.0, 10_000.0), "18 MiB are sent, and 100 MiB/s were read at best");
}

/// A raw disk of 1 GiB, 40 MiB of it data, written at 3 KiB/s: each round reads and sends next to nothing, and none of
/// them says how fast the disk is read. With the rate of such a round the guest would be down for a quarter of an hour.
#[test]
fn a_raw_disk_that_is_hardly_written_converges() {
    let quiet = |second: i64| Ran {
        bytes_sent: 200 << 10,
        bytes_read: 800 << 10,
        changed_bytes: 800 << 10,
        took: Duration::from_millis(900),
        frozen_at: at(second),
        since_freeze: Duration::from_millis(800),
        written_bytes: Some(192 << 10),
        unmapped_bytes: 40 * MIB,
    };
    let rounds = [Ran { bytes_sent: 30 * MIB, bytes_read: 40 * MIB, ..quiet(0) }, quiet(60), quiet(120)];
    let f = forecast(&rounds, &Learned::default()).unwrap();
    assert!(f.read_rate_assumed && f.read_rate_bytes == 100 * MIB && f.read_ms == 400.0, "{f:?}");
    assert!(f.downtime_ms < 30_000.0, "{f:?}");
    // The last window alone saw a burst; with the minute before it the guest writes next to nothing.
    assert!(f.dirty_rate_bytes < 8 << 10, "{f:?}");
    let terms = f.terms();
    for term in
        ["shutdown 15.0 s (assumed)", "reading 40.0 MiB", "100.0 MiB/s (assumed) 0.4 s", "start 10.0 s (assumed)"]
    {
        assert!(terms.contains(term), "{terms}");
    }
}

#[test]
fn a_large_round_shows_more_than_is_assumed_and_a_small_one_nothing() {
    let of = |mib: u64, took: u64| Ran { unmapped_bytes: 1000 * MIB, ..ran(0, mib, took, Some(1)) };
    let rate = |r: Ran| {
        let f = forecast(&[r], &known()).unwrap();
        (f.read_rate_bytes / MIB, f.read_rate_assumed)
    };
    assert_eq!(rate(of(2000, 4)), (500, false));
    // It waited for the link: the storage does that at the least, and more is assumed of it.
    assert_eq!(rate(of(2000, 200)), (100, true));
    assert_eq!(rate(of(63, 1)), (100, true), "too little to tell");
}

/// A round of 5 MiB that takes two seconds because every round does says little of the link.
#[test]
fn what_a_round_costs_by_itself_is_no_slowness_of_the_link() {
    let f = forecast(&[ran(0, 1, 2, None), ran(10, 8, 3, Some(1))], &known()).unwrap();
    assert_eq!(f.link_rate_bytes, Some(16 * MIB / 3), "half of its time at most is its own cost");
    let f = forecast(&[ran(0, 1, 2, None), ran(10, 80, 10, Some(1))], &known()).unwrap();
    assert_eq!(f.link_rate_bytes, Some(10 * MIB), "80 MiB in 8 s");
}

#[test]
fn a_ratio_of_a_few_blocks_foretells_nothing() {
    let tiny = Ran { changed_bytes: 65536, bytes_sent: 300, ..ran(10, 0, 1, Some(100)) };
    let f = forecast(&[ran(0, 1000, 10, Some(100)), tiny], &known()).unwrap();
    assert!(f.left_bytes >= 100 * MIB, "all of it is assumed to travel: {f:?}");
}

#[test]
fn only_what_travels_of_a_written_block_counts() {
    let small = Ran { changed_bytes: 1000 * MIB, ..ran(10, 100, 1, Some(100)) };
    let f = forecast(&[ran(0, 1000, 10, Some(100)), small], &known()).unwrap();
    assert_eq!(f.dirty_rate_bytes / MIB, 10, "a tenth of 100 MiB/s");
}
