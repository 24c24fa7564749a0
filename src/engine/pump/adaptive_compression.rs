//! Whether compressing is worth its while on this link and at this moment.
//!
//! It shortens what goes over the link and lengthens the work of both hosts. Which of the two a run waits for depends
//! on the link, the cores, the cipher, the guests beside it, and changes while it runs; so it is not computed but
//! tried: one stretch is sent compressed, the next as it is, and the quicker way is kept for a good while. What is too
//! short to be tried, as most runs are, is compressed; and so is everything where it makes little difference: the link
//! has other users.
//!
//! Which way was taken, and why, is in the report.

use crate::engine::stats::CompressionStats;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A stretch has at least so many bytes of payload and takes at least so long: less is the jitter of groups and
/// buffers.
const STRETCH_BYTES: u64 = 32 << 20;
const STRETCH_TIME: Duration = Duration::from_millis(250);

/// On a thin link fewer bytes will do after so long: enough to be more than what the pipes hold.
const THIN_BYTES: u64 = 8 << 20;
const THIN_TIME: Duration = Duration::from_secs(10);

/// Nothing is sent as it is before so much has been sent compressed. To be tried costs a shipment up to two stretches,
/// one to measure and one that is under way by then, of bytes that compression would have spared: of 100 MiB more than
/// half. To win there is little: one core compresses that much in some tenths of a second, less than it takes to reach
/// the other host and to make the copy durable.
const UNTRIED_BYTES: u64 = 128 << 20;

/// After a trial, keep the winner for this many times the bytes the trial took. Bytes under way at a change go the
/// slower way too: all in all one byte in thirty does.
const KEPT_FOR: u64 = 24;

/// Skip compression only if that is at least 10 % faster.
const STORED_ADVANTAGE_MIN: f64 = 1.1;

/// One way of sending payloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Compressed,
    Stored,
}

impl Way {
    fn other(self) -> Way {
        match self {
            Way::Compressed => Way::Stored,
            Way::Stored => Way::Compressed,
        }
    }
}

#[derive(Debug)]
enum Doing {
    /// Sending a stretch to measure it, from the end of the first group that went this way. `other`: what came out for
    /// the other way, and the bytes it took.
    Trying { since: Option<Duration>, bytes: u64, other: Option<(f64, u64)> },
    /// Sending so many more bytes before the next try.
    Keeping { left: u64 },
}

/// The trials of one shipment. Time is an argument.
#[derive(Debug)]
struct Trials {
    way: Way,
    doing: Doing,
    /// Bytes of payload that went either way.
    compressed_bytes: u64,
    stored_bytes: u64,
    trials: u32,
    /// What the newest trial came to: bytes of payload per second, compressed and as they are.
    found: Option<(f64, f64)>,
}

impl Trials {
    fn new() -> Trials {
        Trials {
            way: Way::Compressed,
            // The stretch that is measured compressed is part of what comes before anything goes as it is.
            doing: Doing::Keeping { left: UNTRIED_BYTES - STRETCH_BYTES },
            compressed_bytes: 0,
            stored_bytes: 0,
            trials: 0,
            found: None,
        }
    }

    /// A group with so many bytes of payload, before compression, has been sent this way by `now`.
    fn sent(&mut self, way: Way, payload: u64, now: Duration) {
        match way {
            Way::Compressed => self.compressed_bytes += payload,
            Way::Stored => self.stored_bytes += payload,
        }
        // What was under way when the way changed says nothing of either.
        if way != self.way || payload == 0 {
            return;
        }
        match &mut self.doing {
            Doing::Keeping { left } => {
                *left = left.saturating_sub(payload);
                if *left == 0 {
                    self.doing = Doing::Trying { since: None, bytes: 0, other: None };
                }
            }
            Doing::Trying { since: since @ None, .. } => *since = Some(now),
            Doing::Trying { since: Some(since), bytes, other } => {
                *bytes += payload;
                let (bytes, took, other) = (*bytes, now.saturating_sub(*since), *other);
                let enough = bytes >= STRETCH_BYTES && took >= STRETCH_TIME || bytes >= THIN_BYTES && took >= THIN_TIME;
                if enough {
                    self.tried(bytes as f64 / took.as_secs_f64(), bytes, other);
                }
            }
        }
    }

    fn tried(&mut self, rate: f64, bytes: u64, other: Option<(f64, u64)>) {
        let Some((other_rate, other_bytes)) = other else {
            self.way = self.way.other();
            self.doing = Doing::Trying { since: None, bytes: 0, other: Some((rate, bytes)) };
            return;
        };
        let (compressed, stored) = match self.way {
            Way::Compressed => (rate, other_rate),
            Way::Stored => (other_rate, rate),
        };
        (self.trials, self.found) = (self.trials + 1, Some((compressed, stored)));
        self.way = if stored > compressed * STORED_ADVANTAGE_MIN { Way::Stored } else { Way::Compressed };
        self.doing = Doing::Keeping { left: (bytes + other_bytes).max(2 * STRETCH_BYTES) * KEPT_FOR };
        tracing::debug!(compressed, stored, way = ?self.way, "bytes per second of payload, and what is kept");
    }

    /// Of a shipment that came to its end.
    fn stats(&self) -> CompressionStats {
        CompressionStats {
            compressed_bytes: self.compressed_bytes,
            stored_bytes: self.stored_bytes,
            trials: self.trials,
            compressed_rate_bytes: self.found.map(|(compressed, _)| compressed as u64),
            stored_rate_bytes: self.found.map(|(_, stored)| stored as u64),
            reason: reason(self.found),
        }
    }
}

/// What the newest trial came to (compressed, stored), in words.
fn reason(found: Option<(f64, f64)>) -> String {
    let Some((compressed, stored)) = found else {
        return "compressed: too little was sent to try it without".to_owned();
    };
    let mib = |rate: f64| format!("{:.1} MiB/s", rate / f64::from(1 << 20));
    let (compressed_rate, stored_rate) = (mib(compressed), mib(stored));
    if stored > compressed * STORED_ADVANTAGE_MIN {
        format!("as it is: the link is quicker than the compression ({stored_rate}, and compressed {compressed_rate})")
    } else if stored > compressed {
        format!("compressed: as it is it went hardly quicker ({stored_rate}, and compressed {compressed_rate})")
    } else {
        format!("compressed: the link is slower than the compression ({compressed_rate}, and as it is {stored_rate})")
    }
}

/// What the workers ask, and the sender finds out.
#[derive(Debug)]
pub(super) struct AdaptiveCompression {
    compress: AtomicBool,
    /// Nothing is tried: it is said.
    fixed: bool,
}

impl AdaptiveCompression {
    /// Compresses at first; `fixed`: and always.
    pub(super) fn new(fixed: bool) -> AdaptiveCompression {
        AdaptiveCompression { compress: AtomicBool::new(true), fixed }
    }

    /// Whether what is encoded next is to be compressed.
    pub(super) fn compress(&self) -> bool {
        self.compress.load(Ordering::Relaxed)
    }

    /// The sender's side of it.
    pub(super) fn watch(&self) -> Watching<'_> {
        Watching { worth: self, trials: Trials::new() }
    }
}

/// The one that sends finds out.
#[derive(Debug)]
pub(super) struct Watching<'a> {
    worth: &'a AdaptiveCompression,
    trials: Trials,
}

impl Watching<'_> {
    /// Told of every group that has been sent: whether compressing was tried, its bytes of payload, and when.
    pub(super) fn sent(&mut self, compressed: bool, payload: u64, now: Duration) {
        if self.worth.fixed {
            return;
        }
        self.trials.sent(if compressed { Way::Compressed } else { Way::Stored }, payload, now);
        self.worth.compress.store(self.trials.way == Way::Compressed, Ordering::Relaxed);
    }

    /// What became of it; `None` where nothing was to be found out, or nothing was sent.
    pub(super) fn stats(&self) -> Option<CompressionStats> {
        let any = self.trials.compressed_bytes + self.trials.stored_bytes > 0;
        (any && !self.worth.fixed).then(|| self.trials.stats())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::GROUP_LEN;

    /// Sends `mib` of payload where a group takes so many milliseconds either way, with eight groups under way at any
    /// time. Returns the MiB that went compressed.
    fn send(mib: u64, compressed_ms: u64, stored_ms: u64) -> u64 {
        send_and_say(mib, compressed_ms, stored_ms).0
    }

    fn send_and_say(mib: u64, compressed_ms: u64, stored_ms: u64) -> (u64, CompressionStats) {
        let worth = AdaptiveCompression::new(false);
        let mut told = worth.watch();
        let mut under_way: std::collections::VecDeque<bool> = (0..8).map(|_| worth.compress()).collect();
        let (mut now, mut sum) = (Duration::ZERO, 0);
        for _ in 0..mib / 4 {
            let compressed = under_way.pop_front().expect("eight are under way");
            now += Duration::from_millis(if compressed { compressed_ms } else { stored_ms });
            sum += if compressed { 4 } else { 0 };
            told.sent(compressed, GROUP_LEN, now);
            under_way.push_back(worth.compress());
        }
        let stats = told.stats().expect("something was sent");
        assert_eq!((stats.compressed_bytes, stats.stored_bytes), (sum << 20, (mib - sum) << 20));
        (sum, stats)
    }

    #[test]
    fn the_quicker_way_takes_nearly_all() {
        let stored = 20_000 - send(20_000, 40, 10);
        assert!(stored > 19_000, "a link quicker than the cores: {stored} MiB of 20000 as they are");
        let compressed = send(20_000, 10, 40);
        assert!(compressed > 19_000, "a link slower than the cores: {compressed} MiB of 20000 compressed");
    }

    #[test]
    fn where_it_makes_little_difference_the_link_is_spared() {
        let compressed = send(20_000, 21, 20);
        assert!(compressed > 19_000, "{compressed} MiB of 20000 compressed");
    }

    #[test]
    fn what_is_short_is_compressed_and_a_thin_link_is_not_tried_for_long() {
        assert_eq!(send(128, 40, 1), 128);
        assert!((129..=168).contains(&send(256, 40, 1)), "beyond that it is tried, and what is under way goes with it");
        // 400 KiB/s compressed, 200 as it is: one stretch of 8 MiB, and what was under way.
        let stored = 400 - send(400, 10_000, 20_000);
        assert!((8..=48).contains(&stored), "{stored} MiB as they are");
    }

    #[test]
    fn what_is_said_is_not_tried() {
        let worth = AdaptiveCompression::new(true);
        let mut told = worth.watch();
        for n in 1..1000 {
            told.sent(true, GROUP_LEN, Duration::from_secs(n));
            assert!(worth.compress());
        }
        assert_eq!(told.stats(), None);
    }

    /// The report is what an operator decides by whether to say a level or `no`.
    #[test]
    fn the_report_says_which_way_was_kept_and_why() {
        let of = |mib, compressed_ms, stored_ms| {
            let stats = send_and_say(mib, compressed_ms, stored_ms).1;
            (stats.trials, stats.stored_rate_bytes > stats.compressed_rate_bytes, stats.reason)
        };
        let untried = "compressed: too little was sent to try it without";
        assert_eq!(of(100, 40, 1), (0, false, untried.to_owned()));
        let stored = "as it is: the link is quicker than the compression (400.0 MiB/s, and compressed 100.0 MiB/s)";
        assert_eq!(of(1000, 40, 10), (1, true, stored.to_owned()));
        let slow = "compressed: the link is slower than the compression (100.0 MiB/s, and as it is 50.0 MiB/s)";
        assert_eq!(of(1000, 40, 80), (1, false, slow.to_owned()));
        let little = "compressed: as it is it went hardly quicker (200.0 MiB/s, and compressed 190.5 MiB/s)";
        assert_eq!(of(1000, 21, 20), (1, true, little.to_owned()));
        let worth = AdaptiveCompression::new(false);
        let mut nothing = worth.watch();
        nothing.sent(true, 0, Duration::ZERO);
        assert_eq!(nothing.stats(), None);
    }

    #[test]
    fn a_change_of_the_link_is_noticed() {
        let mut trials = Trials::new();
        let mut now = Duration::ZERO;
        let mut run = |groups: u32, compressed_ms: u64, stored_ms: u64| {
            let mut stored = 0;
            for _ in 0..groups {
                let way = trials.way;
                now += Duration::from_millis(if way == Way::Compressed { compressed_ms } else { stored_ms });
                stored += u32::from(way == Way::Stored);
                trials.sent(way, GROUP_LEN, now);
            }
            stored
        };
        assert!(run(2000, 40, 10) > 1800);
        // The link is shared from here on: within one keeping it goes back to compressing.
        let stored = run(3000, 40, 80);
        assert!(stored < 1500, "{stored} of 3000 groups as they are");
        assert!(run(2000, 40, 80) < 200);
    }
}
