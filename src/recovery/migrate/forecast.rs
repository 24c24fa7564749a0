//! How long the guest would be down if it went down now, from the rounds so far. Pure.
//!
//! Invariants
//! - A rate comes from a sample that is large enough to show it. Without one the forecast uses an assumption, and says
//!   so.
//! - Each term of the sum is shown ([`Forecast::terms`]), so that a person sees which one to doubt.

use crate::block::BLOCK_LEN;
use crate::engine::stats::{DiskStats, Mode};
use crate::image::Format;
use crate::replicate::plan::Plan;
use crate::replicate::state::handover_record::Learned;
use crate::replicate::state::report::Report as RunReport;
use jiff::Timestamp;
use serde::Serialize;
use std::time::Duration;

/// What a guest is given to shut down, and a target to start it, as long as nobody has seen how long they take.
const SHUTDOWN_ASSUMED: Duration = Duration::from_secs(15);
const START_ASSUMED: Duration = Duration::from_secs(10);
/// A round that sent less says more of its own cost than of the link.
const TELLING_BYTES: u64 = 4 << 20;
/// A round that read less says more of its own cost than of the storage.
const TELLING_READ_BYTES: u64 = 64 << 20;
/// What one hard disk reads in a row, in bytes a second: assumed until a large round was quicker.
const READ_RATE_ASSUMED: f64 = (100 << 20) as f64;
/// What is written in so short a time says nothing of what is written in a long one.
const TELLING_TIME: Duration = Duration::from_millis(200);

/// What one run told, and how the disks stood right after it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ran {
    /// Bytes that the run sent to the target, all disks together.
    pub bytes_sent: u64,
    /// Bytes that the run read from the source's images, all disks together.
    pub bytes_read: u64,
    /// Whole blocks that differed.
    pub changed_bytes: u64,
    /// Duration of the whole run.
    pub took: Duration,
    /// When the disks stood still, by the source's clock; the start of the run if it sealed no point.
    pub frozen_at: Timestamp,
    /// How long after the freeze the next figure was asked for.
    pub since_freeze: Duration,
    /// Bytes of blocks that the guest has written to since the freeze; `None`: not all its disks have a bitmap that
    /// tells.
    pub written_bytes: Option<u64>,
    /// Data of the disks whose bitmap goes with their QEMU: the last run has to read it from end to end. Holes cost
    /// nothing.
    pub unmapped_bytes: u64,
}

impl Ran {
    /// `plan`: what the next run would do, asked for at `now`; `None`: that could not be found out.
    pub fn of(report: &RunReport, plan: Option<&Plan>, now: Timestamp) -> Ran {
        let disks = report.point.iter().flat_map(|point| &point.disks);
        let sum = |of: &dyn Fn(&DiskStats) -> u64| disks.clone().map(|d| of(&d.stats)).sum::<u64>();
        let frozen_at = report.point.as_ref().map_or(report.started_at, |point| point.frozen_at);
        let planned = plan.map(|plan| &plan.disks[..]);
        let by_bitmap = planned.is_some_and(|disks| disks.iter().all(|d| d.mode == Mode::Bitmap));
        let planned = planned.unwrap_or_default();
        let unmapped = planned.iter().filter(|d| d.chain.top().format != Format::Qcow2);
        Ran {
            bytes_sent: sum(&|s| s.bytes_sent),
            bytes_read: sum(&|s| s.bytes_read),
            changed_bytes: sum(&|s| s.blocks_changed * BLOCK_LEN as u64),
            took: Duration::from_secs_f64(report.duration_ms.max(0.0) / 1e3),
            frozen_at,
            since_freeze: now.duration_since(frozen_at).try_into().unwrap_or_default(),
            written_bytes: by_bitmap.then(|| planned.iter().map(|d| d.reserve_bytes).sum()),
            unmapped_bytes: unmapped.map(|d| d.data_bytes.min(d.size.0)).sum(),
        }
    }

    fn took_s(&self) -> f64 {
        self.took.as_secs_f64().max(0.001)
    }
}

/// How long the guest would be down, if it went down now.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Forecast {
    /// Expected downtime in milliseconds: `shutdown_ms`, `transfer_ms` and `fixed_ms` together.
    pub downtime_ms: f64,
    /// What that consists of.
    pub shutdown_ms: f64,
    /// Nobody has seen a shutdown of this guest.
    pub shutdown_assumed: bool,
    /// To send what is left, and to read what no bitmap covers.
    pub transfer_ms: f64,
    /// Of which reading.
    pub read_ms: f64,
    /// Cost that does not depend on the data, in milliseconds: the shortest round so far, and the start at the
    /// target.
    pub fixed_ms: f64,
    /// Of which the start at the target.
    pub start_ms: f64,
    /// Nobody has seen it start there.
    pub start_assumed: bool,
    /// What the last run would have to send, in bytes.
    pub left_bytes: u64,
    /// What it would have to read from end to end.
    pub read_bytes: u64,
    /// Bytes per second that the source's storage reads; see `read_rate_assumed`.
    pub read_rate_bytes: u64,
    /// No round has read enough to show how fast the storage is.
    pub read_rate_assumed: bool,
    /// Sent for what the guest writes, in bytes a second.
    pub dirty_rate_bytes: u64,
    /// In bytes a second; absent as long as no round has sent enough to tell.
    pub link_rate_bytes: Option<u64>,
}

impl Forecast {
    /// The sum, term by term, in words.
    pub fn terms(&self) -> String {
        let assumed = |is: bool| if is { " (assumed)" } else { "" };
        let seconds = |ms: f64| format!("{:.1} s", ms / 1e3);
        let mut terms = vec![format!("shutdown {}{}", seconds(self.shutdown_ms), assumed(self.shutdown_assumed))];
        let link = self.link_rate_bytes.map_or("a rate not seen yet".to_owned(), |rate| format!("{}/s", size(rate)));
        let sending = seconds(self.transfer_ms - self.read_ms);
        terms.push(format!("sending {} at {link} {sending}", size(self.left_bytes)));
        if self.read_bytes > 0 {
            let rate = format!("{}/s{}", size(self.read_rate_bytes), assumed(self.read_rate_assumed));
            let read = size(self.read_bytes);
            terms.push(format!("reading {read} of disks without a bitmap at {rate} {}", seconds(self.read_ms)));
        }
        terms.push(format!("the run itself {}", seconds(self.fixed_ms - self.start_ms)));
        terms.push(format!("start {}{}", seconds(self.start_ms), assumed(self.start_assumed)));
        terms.join(", ")
    }
}

fn size(bytes: u64) -> String {
    match bytes {
        bytes if bytes >= 1 << 20 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        bytes => format!("{:.1} KiB", bytes as f64 / 1024.0),
    }
}

/// From all rounds so far; `None` as long as nobody can tell: nothing but the first copy has been made. Pure.
pub fn forecast(rounds: &[Ran], learned: &Learned) -> Option<Forecast> {
    let (left, dirty_rate) = written(rounds)?;
    let shutdown = learned.shutdown_ms.map_or(SHUTDOWN_ASSUMED, ms);
    let start = learned.start_ms.map_or(START_ASSUMED, ms);
    // The guest goes on writing until it is off.
    let left = left + dirty_rate * shutdown.as_secs_f64();
    let shortest = rounds.iter().map(|r| r.took).min().unwrap_or_default();
    let link = link_rate(rounds);
    // It carries this at the least.
    let carried = rounds.iter().map(|r| r.bytes_sent as f64 / r.took_s()).fold(1.0, f64::max);
    let sending = match link {
        Some(rate) => left / rate,
        // So little is sent that the cost of a round is all there is to it.
        None if left <= TELLING_BYTES as f64 => 0.0,
        None => left / carried,
    };
    let (read_rate, read_rate_assumed) = read_rate(rounds);
    let unmapped = rounds.last()?.unmapped_bytes;
    let reading = unmapped as f64 / read_rate;
    let fixed = (shortest + start).as_secs_f64();
    Some(Forecast {
        downtime_ms: rounded(shutdown.as_secs_f64() + sending + reading + fixed),
        shutdown_ms: rounded(shutdown.as_secs_f64()),
        shutdown_assumed: learned.shutdown_ms.is_none(),
        transfer_ms: rounded(sending + reading),
        read_ms: rounded(reading),
        fixed_ms: rounded(fixed),
        start_ms: rounded(start.as_secs_f64()),
        start_assumed: learned.start_ms.is_none(),
        left_bytes: left as u64,
        read_bytes: unmapped,
        read_rate_bytes: read_rate as u64,
        read_rate_assumed,
        dirty_rate_bytes: dirty_rate as u64,
        link_rate_bytes: link.map(|rate| rate as u64),
    })
}

/// What is left to send now, and what comes every second, in bytes that travel.
fn written(rounds: &[Ran]) -> Option<(f64, f64)> {
    let last = rounds.last()?;
    let before = rounds.len().checked_sub(2).map(|at| &rounds[at]);
    let between = before.map(|before| {
        let time = Duration::try_from(last.frozen_at.duration_since(before.frozen_at)).unwrap_or_default();
        (last.bytes_sent as f64, time.max(TELLING_TIME).as_secs_f64())
    });
    let seen = last.written_bytes.map(|written| written as f64 * shrunk(rounds));
    match (seen.filter(|_| last.since_freeze >= TELLING_TIME), between) {
        // Together they are the larger sample: a guest that writes in bursts is seen for longer.
        (Some(left), Some((sent, time))) => Some((left, (left + sent) / (last.since_freeze.as_secs_f64() + time))),
        (Some(left), None) => Some((left, left / last.since_freeze.as_secs_f64())),
        (None, Some((sent, time))) => Some((sent / time * last.since_freeze.as_secs_f64(), sent / time)),
        (None, None) => None,
    }
}

/// Of a block that was written to, only the pieces that differ travel, compressed: so much of it did. Where too little
/// was seen to tell, all of it is assumed to.
fn shrunk(rounds: &[Ran]) -> f64 {
    let sum = |of: &dyn Fn(&Ran) -> u64| rounds.iter().skip(1).map(of).sum::<u64>();
    let (sent, changed) = (sum(&|r| r.bytes_sent), sum(&|r| r.changed_bytes));
    if changed >= TELLING_BYTES { (sent as f64 / changed as f64).min(1.0) } else { 1.0 }
}

/// By the last round that sent enough. A round's own cost is counted for itself, so far as much smaller rounds have
/// shown it.
fn link_rate(rounds: &[Ran]) -> Option<f64> {
    let telling = rounds.iter().rev().find(|r| r.bytes_sent >= TELLING_BYTES)?;
    let smaller = rounds.iter().filter(|r| r.bytes_sent < telling.bytes_sent / 4).map(Ran::took_s);
    let cost = smaller.fold(f64::INFINITY, f64::min);
    let cost = if cost.is_finite() { cost.min(telling.took_s() / 2.0) } else { 0.0 };
    Some(telling.bytes_sent as f64 / (telling.took_s() - cost))
}

/// How fast the disks are read, and whether that is assumed. A round that read much may have waited for the link: it
/// shows what the storage does at the least.
fn read_rate(rounds: &[Ran]) -> (f64, bool) {
    let telling = rounds.iter().filter(|r| r.bytes_read >= TELLING_READ_BYTES);
    let seen = telling.map(|r| r.bytes_read as f64 / r.took_s()).fold(0.0, f64::max);
    (seen.max(READ_RATE_ASSUMED), seen < READ_RATE_ASSUMED)
}

fn ms(ms: f64) -> Duration {
    Duration::from_secs_f64(ms.max(0.0) / 1e3)
}

pub(super) fn rounded(seconds: f64) -> f64 {
    (seconds * 1e3).round()
}

#[cfg(test)]
#[path = "forecast_tests.rs"]
mod tests;
