//! Keeping to a rate: how long to rest after so many bytes. Pure; whoever rests has the clock.

use std::time::Duration;

/// Idle time that may be made up for by going faster afterwards: none but this, or a stall would become a burst.
const SLACK: Duration = Duration::from_secs(1);

/// Bytes per second over a time that `Duration`s count from any one moment.
#[derive(Debug, Clone)]
pub struct Pace {
    rate_bytes: u64,
    /// When all that was done so far is paid for.
    paid: Duration,
}

impl Pace {
    /// `rate_bytes` per second, at least 1.
    pub fn new(rate_bytes: u64, now: Duration) -> Self {
        Self { rate_bytes: rate_bytes.max(1), paid: now }
    }

    /// From now on at this rate. What was done at another is paid for at that.
    pub fn change(&mut self, rate_bytes: u64) {
        self.rate_bytes = rate_bytes.max(1);
    }

    /// How much to do at once: a quarter of a second's worth, between `least` and `most`.
    pub fn portion(&self, least: u64, most: u64) -> u64 {
        (self.rate_bytes / 4).clamp(least, most)
    }

    /// How long to rest, now that `bytes` more were done.
    pub fn rest(&mut self, bytes: u64, now: Duration) -> Duration {
        let cost = Duration::try_from_secs_f64(bytes as f64 / self.rate_bytes as f64).unwrap_or(Duration::MAX);
        self.paid = self.paid.max(now.saturating_sub(SLACK)).saturating_add(cost);
        self.paid.saturating_sub(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn over_time_it_is_the_rate() {
        let mut pace = Pace::new(1000, MS(5000));
        let mut now = MS(5000);
        for step in [100, 900, 0, 2500, 500] {
            now += MS(20);
            now += pace.rest(step, now);
        }
        assert_eq!(now, MS(9000), "4000 bytes at 1000 a second");
    }

    #[test]
    fn slow_work_needs_no_rest_and_a_stall_makes_no_burst() {
        let mut pace = Pace::new(1000, MS(0));
        assert_eq!(pace.rest(100, MS(400)), MS(0));
        // Ten seconds of nothing: one second of it may be made up for.
        assert_eq!(pace.rest(1000, MS(10_000)), MS(0));
        assert_eq!(pace.rest(1000, MS(10_000)), MS(1000));
    }

    #[test]
    fn portions_are_a_quarter_of_a_second_within_bounds() {
        let of = |rate| Pace::new(rate, MS(0)).portion(10, 1000);
        assert_eq!((of(0), of(20), of(400), of(1 << 40)), (10, 10, 100, 1000));
    }
}
