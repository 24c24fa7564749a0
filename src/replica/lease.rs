//! Who uses which point: a file each in `leases/`, with an owner, a purpose and an expiry. Whoever reads a point for
//! longer than a moment takes one, and prune goes around it.
//!
//! Invariants
//! - A lease is written before the manifest is read for the point, both under the gate that prune holds alone: a point
//!   that was found under a lease stays, and its images stay as they are, until the lease is over.
//! - A lease is over when it is released, and at the latest when it expires: a reader that was killed is in nobody's
//!   way for long. The clock is the target's. A failover's lease alone knows no end but its release.

use super::files::Dir;
use super::manifest::LEASES_DIR;
use super::upkeep::Lease;
use crate::error::{Error, Kind, Result};
use crate::flock::Flock;
use crate::name::PointId;
use crate::words;
use jiff::{SignedDuration, Timestamp};
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a reader's lease lasts if it is not renewed, and how often it is.
const LASTS: SignedDuration = SignedDuration::from_mins(10);
const RENEWED_AFTER: SignedDuration = SignedDuration::from_mins(2);

/// How long a reader waits for a prune that folds just now.
const PATIENCE: Duration = Duration::from_secs(60);

/// Largest file of a lease in bytes, and most leases of a replica.
const LEASE_MAX: usize = 4096;
const LEASES_MAX: usize = 4096;

/// The lock of the gate. Never removed.
const GATE_FILE: &str = "gate";
const SUFFIX: &str = ".json";
/// The lease of a failover: one at a time, for as long as that takes.
const KEPT_FILE: &str = "failover.json";

pub(super) struct Leases {
    dir: Dir,
}

/// Held: prune alone, or readers that are just taking their leases.
pub(super) struct Gate {
    _lock: Flock,
}

/// How the gate is locked: by one alone, or beside others.
type Take = fn(File) -> io::Result<std::result::Result<Flock, File>>;

impl Leases {
    /// Of the replica in `dir`. Creates the directory where it is missing.
    pub fn of(replica: &Dir) -> Result<Leases> {
        match replica.sub(LEASES_DIR)? {
            Some(dir) => Ok(Leases { dir }),
            None => Ok(Leases { dir: replica.sub_or_create(LEASES_DIR)? }),
        }
    }

    /// Keeps everybody from taking a lease while it is held. [`Kind::Busy`] if somebody is just taking one.
    pub fn close_gate(&self) -> Result<Gate> {
        self.gate(Flock::exclusive, Duration::from_secs(2))
    }

    fn gate(&self, take: Take, patience: Duration) -> Result<Gate> {
        let mut file = self.dir.open_or_create(GATE_FILE)?;
        let deadline = Instant::now() + patience;
        loop {
            match take(file).map_err(|e| Error::io("cannot lock the leases", self.dir.join(GATE_FILE), e))? {
                Ok(lock) => return Ok(Gate { _lock: lock }),
                Err(again) if Instant::now() < deadline => {
                    file = again;
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(_) => {
                    return Err(Error::new(Kind::Busy, "removed points are being folded just now")
                        .path(self.dir.join(GATE_FILE))
                        .hint("try again when the prune is over"));
                }
            }
        }
    }

    /// Those in force. What cannot be read as one is passed by with a warning: it protects nothing anybody knows of.
    pub fn in_force(&self, now: Timestamp) -> Result<Vec<Lease>> {
        let mut found = Vec::new();
        for name in self.dir.entries()?.into_iter().filter(|n| n.ends_with(SUFFIX)).take(LEASES_MAX) {
            let Some(content) = self.dir.read(&name, LEASE_MAX)? else { continue };
            match serde_json::from_slice::<Lease>(&content) {
                Ok(lease) if lease.expires > now => found.push(lease),
                Ok(_) => {}
                Err(e) => tracing::warn!(path = %self.dir.join(&name).display(), error = %e, "this is no lease"),
            }
        }
        Ok(found)
    }

    /// Removes those that are over, and remains of those that were being written. The caller has closed the gate.
    pub fn sweep(&self, now: Timestamp) -> Result<()> {
        for name in self.dir.entries()?.into_iter().filter(|n| n != GATE_FILE) {
            let lease = self.dir.read(&name, LEASE_MAX).ok().flatten();
            let lease = lease.and_then(|content| serde_json::from_slice::<Lease>(&content).ok());
            if lease.is_none_or(|lease| lease.expires <= now) {
                self.dir.remove_all(&name)?;
            }
        }
        Ok(())
    }

    /// Keeps `point` as it is until [`Leases::let_go`], whoever is alive then. Durable when it returns. The caller
    /// holds the writer's lock.
    pub fn keep(replica: &Dir, point: &PointId, now: Timestamp) -> Result<()> {
        let leases = Self::of(replica)?;
        let _gate = leases.gate(Flock::shared, PATIENCE)?;
        let lease = Lease {
            point: point.clone(),
            owner: "this host".to_owned(),
            purpose: "failover".to_owned(),
            since: now,
            expires: Timestamp::MAX,
        };
        let holder = Holder { dir: leases.dir, name: KEPT_FILE.to_owned(), lease };
        holder.write()?;
        holder.dir.sync()
    }

    /// Ends what [`Leases::keep`] began; no error if nothing did.
    pub fn let_go(replica: &Dir) -> Result<()> {
        Self::of(replica)?.dir.remove(KEPT_FILE)
    }

    /// Takes a lease on `point`, looks with `find` whether the point is there, and gives what it found.
    pub fn take<T>(
        replica: &Dir,
        point: &PointId,
        purpose: &str,
        now: Timestamp,
        find: impl FnOnce() -> Result<T>,
    ) -> Result<(Holder, T)> {
        let leases = Self::of(replica)?;
        let _gate = leases.gate(Flock::shared, PATIENCE)?;
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let lease = Lease {
            point: point.clone(),
            owner: format!("process {}", std::process::id()),
            purpose: purpose.to_owned(),
            since: now,
            expires: now.saturating_add(LASTS).expect("a span of minutes fits"),
        };
        let name = loop {
            // A process of the same number before the last boot may have left one.
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let name = format!("{}-{number}{SUFFIX}", std::process::id());
            if leases.dir.open(&name)?.is_none() {
                break name;
            }
        };
        let holder = Holder { dir: leases.dir, name, lease };
        holder.write()?;
        match find() {
            Ok(found) => Ok((holder, found)),
            Err(e) => {
                holder.release();
                Err(e)
            }
        }
    }
}

/// A lease that is held. One that is not released expires.
pub(super) struct Holder {
    dir: Dir,
    name: String,
    lease: Lease,
}

impl Holder {
    /// Prolongs it, if it is time to.
    pub fn renew(&mut self, now: Timestamp) -> Result<()> {
        let expires = now.saturating_add(LASTS).expect("a span of minutes fits");
        if expires.duration_since(self.lease.expires) < RENEWED_AFTER {
            return Ok(());
        }
        self.lease.expires = expires;
        self.write()
    }

    /// Not durable: after a crash of the machine nobody uses the point.
    fn write(&self) -> Result<()> {
        let temporary = format!("{}.new", self.name);
        self.dir.remove_all(&temporary)?;
        let mut json = serde_json::to_vec(&self.lease).expect("five plain fields");
        json.push(b'\n');
        self.dir.write_new(&temporary, &json)?;
        self.dir.rename(&temporary, &self.name)
    }

    pub fn release(self) {
        if let Err(e) = self.dir.remove(&self.name) {
            tracing::debug!(point = %self.lease.point, error = %e.chain(), "a lease is left to expire");
        }
    }
}

/// Every lease in a directory of leases with the name of its file, for a look at them; or why it is none.
pub(super) fn look(dir: &Dir) -> Result<Vec<(String, Result<Lease, String>)>> {
    let mut found = Vec::new();
    for name in dir.entries()?.into_iter().filter(|n| n.ends_with(SUFFIX)).take(LEASES_MAX) {
        let lease = match dir.read(&name, LEASE_MAX) {
            Ok(Some(content)) => {
                serde_json::from_slice::<Lease>(&words::of_document(&content)).map_err(|e| e.to_string())
            }
            // It was released while we looked.
            Ok(None) => continue,
            Err(e) => Err(e.what().to_owned()),
        };
        found.push((name, lease));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::RunId;

    fn at(minute: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + minute * 60).unwrap()
    }

    fn temp() -> (tempfile::TempDir, Dir) {
        let t = tempfile::tempdir().unwrap();
        let d = Dir::open_root(t.path()).unwrap().unwrap();
        (t, d)
    }

    fn point() -> PointId {
        PointId::from_parts(1, &RunId::from_bits(1))
    }

    #[test]
    fn a_lease_is_in_force_until_it_expires_or_is_released() {
        let (_t, dir) = temp();
        let leases = Leases::of(&dir).unwrap();
        let (mut first, found) = Leases::take(&dir, &point(), "verify", at(0), || Ok(7)).unwrap();
        let (second, _) = Leases::take(&dir, &point(), "export", at(1), || Ok(())).unwrap();
        assert_eq!((found, leases.in_force(at(2)).unwrap().len()), (7, 2));
        first.renew(at(1)).unwrap();
        assert_eq!(leases.in_force(at(10)).unwrap().len(), 1, "it was not yet time to renew it");
        first.renew(at(9)).unwrap();
        assert_eq!(leases.in_force(at(15)).unwrap()[0].purpose, "verify");
        second.release();
        leases.sweep(at(18)).unwrap();
        assert_eq!(leases.in_force(at(18)).unwrap().len(), 1);
        leases.sweep(at(19)).unwrap();
        assert_eq!(leases.dir.entries().unwrap(), [GATE_FILE]);
    }

    #[test]
    fn a_point_that_is_not_there_is_not_leased_and_rubbish_is_no_lease() {
        let (_t, dir) = temp();
        let e = Leases::take(&dir, &point(), "verify", at(0), || Err::<(), _>(Error::new(Kind::NotFound, "gone")));
        assert_eq!(e.err().unwrap().kind(), Kind::NotFound);
        let leases = Leases::of(&dir).unwrap();
        leases.dir.write_new("1-1.json", b"{").unwrap();
        leases.dir.write_new("1-2.json.new", b"").unwrap();
        assert!(leases.in_force(at(0)).unwrap().is_empty());
        leases.sweep(at(0)).unwrap();
        assert_eq!(leases.dir.entries().unwrap(), [GATE_FILE]);
    }

    #[test]
    fn nobody_takes_a_lease_while_the_gate_is_closed() {
        let (_t, dir) = temp();
        let leases = Leases::of(&dir).unwrap();
        let gate = leases.close_gate().unwrap();
        let e = leases.gate(Flock::shared, Duration::ZERO).err().unwrap();
        assert_eq!(e.kind(), Kind::Busy);
        drop(gate);
        let _one = leases.gate(Flock::shared, Duration::ZERO).unwrap();
        let _two = leases.gate(Flock::shared, Duration::ZERO).unwrap();
    }
}
