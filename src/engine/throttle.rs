//! Not to send faster than a link is given to us. One throttle is a run's, whatever disks it ships.

use crate::engine::pace::Pace;
use crate::error::Result;
use std::fmt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Longest rest in one piece: whoever rests still looks after the room of its overlays, and after signals.
const REST_MAX: Duration = Duration::from_millis(100);

/// Least and most that is sent at once. The least keeps the target hearing from us however slow the link is.
const PORTION: (u64, u64) = (4 << 10, 1 << 20);

/// Bytes per second at this moment; `None`: as fast as it goes. Asked before every portion, so that it may change with
/// the time of day while a run is under way.
pub type RateNow = Box<dyn Fn() -> Option<u64> + Send + Sync>;

/// Limit on the rate at which a run sends. All disks of the run share it.
pub struct Throttle {
    rate_now: RateNow,
    began: Instant,
    pace: Mutex<Pace>,
}

impl fmt::Debug for Throttle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Throttle({:?})", (self.rate_now)())
    }
}

impl Throttle {
    /// A throttle that asks `rate_now` for the rate before every portion.
    pub fn new(rate_now: RateNow) -> Self {
        Self { rate_now, began: Instant::now(), pace: Mutex::new(Pace::new(1, Duration::ZERO)) }
    }

    /// Hands `bytes` on in portions, and rests behind each as long as the rate asks for. Blocks for that long, but asks
    /// `keep_going` meanwhile; its error, and that of `send`, end it.
    pub fn send(&self, bytes: &[u8], keep_going: KeepGoing, send: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut left = bytes;
        while !left.is_empty() {
            let Some(rate_bytes) = (self.rate_now)() else { return send(left) };
            let (portion, rest) = {
                let mut pace = self.pace.lock().unwrap_or_else(|e| e.into_inner());
                pace.change(rate_bytes);
                let portion = (pace.portion(PORTION.0, PORTION.1) as usize).min(left.len());
                (portion, pace.rest(portion as u64, self.began.elapsed()))
            };
            let (now, later) = left.split_at(portion);
            send(now)?;
            self.rest(rest, keep_going)?;
            left = later;
        }
        Ok(())
    }

    fn rest(&self, rest: Duration, keep_going: KeepGoing) -> Result<()> {
        let until = Instant::now() + rest;
        while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            std::thread::sleep(left.min(REST_MAX));
            keep_going()?;
        }
        Ok(())
    }
}

/// Asked by the calling thread between groups: an error ends the shipment with it (the image no longer stands still, a
/// signal came).
pub type KeepGoing<'a> = &'a dyn Fn() -> Result<()>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, Kind};
    use std::cell::Cell;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn sent(throttle: &Throttle, len: usize) -> (Vec<usize>, Duration) {
        let (mut portions, began) = (Vec::new(), Instant::now());
        let data: Vec<u8> = (0..len).map(|n| n as u8).collect();
        let mut whole = Vec::new();
        throttle
            .send(&data, &|| Ok(()), &mut |part| {
                portions.push(part.len());
                whole.extend_from_slice(part);
                Ok(())
            })
            .unwrap();
        assert_eq!(whole, data, "portions are the bytes, in their order");
        (portions, began.elapsed())
    }

    #[test]
    fn it_takes_the_time_that_the_rate_asks_for() {
        let throttle = Throttle::new(Box::new(|| Some(64 << 10)));
        let (portions, took) = sent(&throttle, 20 << 10);
        assert_eq!(portions, [16 << 10, 4 << 10], "a quarter of a second's worth at once");
        // The clock's slack may be used up first.
        assert!(took >= Duration::from_millis(300), "{took:?}");
    }

    #[test]
    fn without_a_rate_everything_goes_at_once() {
        assert_eq!(sent(&Throttle::new(Box::new(|| None)), 3 << 20).0, [3 << 20]);
    }

    /// At six in the evening the link is ours again: the run that is under way goes faster, not only the next.
    #[test]
    fn the_rate_may_change_under_way() {
        let asked = Arc::new(AtomicU64::new(0));
        let count = asked.clone();
        let rate = move || (count.fetch_add(1, Ordering::Relaxed) < 2).then_some(1 << 20);
        let (portions, _) = sent(&Throttle::new(Box::new(rate)), 2 << 20);
        assert_eq!(portions, [256 << 10, 256 << 10, (2 << 20) - (512 << 10)]);
        assert_eq!(asked.load(Ordering::Relaxed), 3);
    }

    /// A rest of minutes must not keep an overlay from being committed.
    #[test]
    fn a_rest_ends_when_things_are_no_longer_good() {
        let throttle = Throttle::new(Box::new(|| Some(1)));
        let looked = Cell::new(0);
        let good = || match looked.replace(looked.get() + 1) {
            0 => Ok(()),
            _ => Err(Error::new(Kind::Space, "full")),
        };
        let e = throttle.send(&[0; 4096], &good, &mut |_| Ok(())).unwrap_err();
        assert_eq!((e.kind(), looked.get()), (Kind::Space, 2));
    }
}
