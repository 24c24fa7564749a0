//! How long ago a point was sealed, by a clock that nobody sets (I17).
//!
//! The clock of a replica counts the seconds that this host was up, as far as the replica was looked at:
//! `CLOCK_BOOTTIME` within one boot; over a boot, the time since that boot. A wall clock that is set forward ages no
//! point. Time while the host was off does not count: a point may seem younger than it is, and never older.
//!
//! Invariants
//! - The clock never falls: it is at least what the newest point was sealed at.
//! - What cannot be written is no error: the next who looks counts from what was written before.
//! - Points of an earlier version have no such time. They keep the age that the wall clock gave them when the clock was
//!   first set up, and age by it from then on.

use super::files::Dir;
use super::manifest::{Manifest, Point};
use crate::error::{Error, Kind, Result};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

const FILE: &str = "clock.json";
const FILE_MAX: usize = 4096;
const FORMAT: &str = "virt-replica clock";

/// Time of a host that nobody sets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootTime {
    /// Names the boot.
    pub boot: String,
    /// Seconds since then, sleep included.
    pub up_s: u64,
}

pub(super) type BootClock = Arc<dyn Fn() -> BootTime + Send + Sync>;

/// The clock of this host.
pub(super) fn this_host() -> BootClock {
    Arc::new(|| {
        let up = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        // Without a name every look is one at another boot: then only the time since the last boot counts.
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        BootTime { boot: boot.trim().to_owned(), up_s: u64::try_from(up.tv_sec).unwrap_or(0) }
    })
}

/// The clock as it was left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stored {
    format: String,
    version: u32,
    boot: String,
    up_s: u64,
    clock_s: u64,
    /// When it was set up: by the wall clock, and by itself.
    adopted_at: Timestamp,
    adopted_clock_s: u64,
}

/// A look at the clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Look {
    pub now_s: u64,
    adopted_at: Timestamp,
    adopted_clock_s: u64,
}

impl Look {
    /// How long ago the point was sealed, at least.
    pub fn age(&self, point: &Point) -> Duration {
        let since_s = |then_s: u64| Duration::from_secs(self.now_s.saturating_sub(then_s));
        match point.sealed_clock_s {
            Some(then_s) => since_s(then_s),
            None => {
                let then = Duration::try_from(self.adopted_at.duration_since(point.sealed_at)).unwrap_or_default();
                then.saturating_add(since_s(self.adopted_clock_s))
            }
        }
    }
}

/// Where the clock stands. Pure.
fn tick(stored: Option<&Stored>, manifest: &Manifest, boot: &BootTime, wall: Timestamp) -> Look {
    let newest_s = manifest.points().iter().filter_map(|p| p.sealed_clock_s).max().unwrap_or(0);
    let Some(stored) = stored else {
        return Look { now_s: newest_s, adopted_at: wall, adopted_clock_s: newest_s };
    };
    let passed_s = match !boot.boot.is_empty() && stored.boot == boot.boot {
        true => boot.up_s.saturating_sub(stored.up_s),
        // All of this boot came after that look.
        false => boot.up_s,
    };
    let now_s = stored.clock_s.saturating_add(passed_s).max(newest_s);
    Look { now_s, adopted_at: stored.adopted_at, adopted_clock_s: stored.adopted_clock_s }
}

fn read(replica: &Dir) -> Option<Stored> {
    let content = replica.read(FILE, FILE_MAX).ok().flatten()?;
    serde_json::from_slice::<Stored>(&content).ok().filter(|s| s.format == FORMAT && s.version == 1)
}

/// Looks at the clock of the replica in `replica`, and changes nothing.
pub(super) fn look(replica: &Dir, manifest: &Manifest, boot: &BootTime, wall: Timestamp) -> Look {
    tick(read(replica).as_ref(), manifest, boot, wall)
}

/// Looks at it, and writes down where it stands. The caller holds the writer's lock.
pub(super) fn observe(replica: &Dir, manifest: &Manifest, boot: &BootTime, wall: Timestamp) -> Look {
    let stored = read(replica);
    let look = tick(stored.as_ref(), manifest, boot, wall);
    let old = manifest.points().iter().filter(|p| p.sealed_clock_s.is_none()).count();
    if stored.is_none() && old > 0 {
        tracing::info!(
            "{old} points keep the age that the wall clock gives them now; from here on they age by this host's uptime"
        );
    }
    if let Err(e) = write(replica, &look, boot) {
        tracing::debug!("the replica's clock was not written: {}", e.chain());
    }
    look
}

fn write(replica: &Dir, look: &Look, boot: &BootTime) -> Result<()> {
    let stored = Stored {
        format: FORMAT.to_owned(),
        version: 1,
        boot: boot.boot.clone(),
        up_s: boot.up_s,
        clock_s: look.now_s,
        adopted_at: look.adopted_at,
        adopted_clock_s: look.adopted_clock_s,
    };
    let mut json = serde_json::to_vec(&stored)
        .map_err(|e| Error::new(Kind::Corrupt, "the replica's clock cannot be written").source(e))?;
    json.push(b'\n');
    let aside = format!("{FILE}.new");
    replica.remove_all(&aside)?;
    replica.write_new(&aside, &json)?;
    replica.rename(&aside, FILE)
}

/// Tells the time of this host; an argument, so that tests own it.
pub(super) type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::{DomainName, DomainUuid, Generation};

    const DAY: u64 = 86_400;

    fn at(day: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + day * DAY as i64).unwrap()
    }

    fn boot(name: &str, up_s: u64) -> BootTime {
        BootTime { boot: name.to_owned(), up_s }
    }

    fn empty() -> Manifest {
        let uuid = DomainUuid::new("0a1b2c3d-0000-4000-8000-000000000001").unwrap();
        Manifest::new(uuid, DomainName::new("shop").unwrap(), Generation(1))
    }

    fn temp() -> (tempfile::TempDir, Dir) {
        let t = tempfile::tempdir().unwrap();
        let d = Dir::open_root(t.path()).unwrap().unwrap();
        (t, d)
    }

    #[test]
    fn only_time_that_this_host_was_up_counts() {
        let (_t, dir) = temp();
        let seen = |boot: &BootTime, day| observe(&dir, &empty(), boot, at(day)).now_s;
        assert_eq!(seen(&boot("a", 1000), 0), 0, "it begins");
        assert_eq!(seen(&boot("a", 1600), 8), 600, "the wall clock is set eight days ahead");
        assert_eq!(seen(&boot("a", 1500), -100), 600, "it never falls");
        assert_eq!(seen(&boot("b", 50), 9), 650, "after a boot, the time since that boot");
        assert_eq!(seen(&boot("", 10), 9), 660);
        assert_eq!(seen(&boot("", 30), 9), 690, "without a name, every look is at another boot");
    }

    #[test]
    fn a_clock_that_is_lost_goes_on_from_the_newest_point() {
        let (_t, dir) = temp();
        dir.write_new(FILE, b"{}").unwrap();
        assert_eq!(look(&dir, &empty(), &boot("a", 5), at(0)).now_s, 0);
        observe(&dir, &empty(), &boot("a", 5), at(0));
        assert_eq!(look(&dir, &empty(), &boot("a", 9), at(0)).now_s, 4);
    }
}
