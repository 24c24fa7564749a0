//! How old a point is, by two clocks of which neither is believed alone. Pure.
//!
//! A point has two times: when the source's disks stood still, by the source's clock, and when the point began to
//! exist, by the target's. The first is earlier in truth. Where it is later on paper, a clock was wrong. The age counts
//! from the smaller of the two, so a clock that is ahead makes no point younger. If both lie in the future, the age is
//! not known.

use jiff::{SignedDuration, Timestamp};

/// So far clocks may differ without a word: what a host's clock is off while it is set by the network.
pub const SKEW_MAX: SignedDuration = SignedDuration::from_secs(10);

/// The age of a point at some moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Age {
    /// `None`: not known, as every time of the point lies in the future.
    pub lag_s: Option<i64>,
    /// So far, at least, a clock was ahead when the point was made; `None`: nothing shows that.
    pub ahead_s: Option<i64>,
}

/// From when the age of a point counts.
pub fn as_of(frozen_at: Timestamp, sealed_at: Timestamp) -> Timestamp {
    frozen_at.min(sealed_at)
}

/// So far the source's clock was ahead of the target's when the point was made, at least. `None`: within reason.
pub fn ahead_s(frozen_at: Timestamp, sealed_at: Timestamp) -> Option<i64> {
    let ahead = frozen_at.duration_since(sealed_at);
    (ahead > SKEW_MAX).then(|| ahead.as_secs())
}

/// Whether a time of the past lies in the future by more than clocks may differ.
pub fn is_future(t: Timestamp, now: Timestamp) -> bool {
    t.duration_since(now) > SKEW_MAX
}

/// The age of a point now.
pub fn age(frozen_at: Timestamp, sealed_at: Timestamp, now: Timestamp) -> Age {
    let from = as_of(frozen_at, sealed_at);
    let future = is_future(from, now).then(|| from.duration_since(now).as_secs());
    let lag_s = future.is_none().then(|| now.duration_since(from).as_secs().max(0));
    Age { lag_s, ahead_s: ahead_s(frozen_at, sealed_at).max(future) }
}

/// What an operator reads of a clock that is wrong.
pub fn told(ahead_s: i64) -> String {
    format!(
        "a clock was ahead by {ahead_s} s or more when the newest point was made: its age counts from the target's time; set \
         the clocks of both hosts (chronyc tracking, timedatectl)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds from some day on.
    fn at(s: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + s).unwrap()
    }

    #[test]
    fn a_clock_that_is_ahead_makes_no_point_younger_and_is_told() {
        // (frozen, sealed, now) -> lag, ahead.
        for ((frozen, sealed, now), lag_s, ahead) in [
            ((0, 5, 20), Some(20), None),
            // Within what clocks may differ; a lag is never negative.
            ((8, 5, 20), Some(15), None),
            ((5, 6, 0), Some(0), None),
            // The source was 70 years ahead: the age is the target's, whatever the source's clock says now.
            ((2_274_836_931, 5, 100), Some(95), Some(2_274_836_926)),
            // The target was.
            ((0, 9_000_000, 100), Some(100), None),
            // Both were: nobody knows how old it is, and that is no age of zero.
            ((9_000_000, 9_000_005, 100), None, Some(8_999_900)),
        ] {
            let found = age(at(frozen), at(sealed), at(now));
            assert_eq!(found, Age { lag_s, ahead_s: ahead }, "{frozen} {sealed} {now}");
        }
        assert!(told(75).contains("75 s") && told(75).contains("set the clocks"));
    }
}
