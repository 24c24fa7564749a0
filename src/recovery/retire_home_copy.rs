//! What a host has of a domain that lives elsewhere by now gives way: its content becomes a point of the host's own
//! store, pinned, and its definition goes. From then on the host is a target like any other: who has the domain sends
//! only what differs from that point, and nothing of the old content is lost until somebody unpins it.
//!
//! Invariants
//! - The definition goes last (k3), when the point is sealed (k1), which carries it, and pinned (k2).
//! - A domain that runs here gives way to nobody.
//!
//! Steps: docs/recovery.md.

use crate::error::advice::{self, Advice};
use crate::error::{Error, Kind, Result};
use crate::failpoint;
use crate::hypervisor::Power;
use crate::name::{DomainUuid, PointId};
use crate::recovery::record::FailoverRecord;
pub use crate::recovery::record::GaveWay;

/// Why such a point is pinned.
pub const REASON: &str = "what this host had when its domain lived elsewhere; unpin it when nobody misses anything";

/// What is needed of the world.
pub struct Ports<'a> {
    /// How the domain stands here; `None`: libvirt knows no such domain.
    pub power: &'a dyn Fn() -> Result<Option<Power>>,
    /// libvirt has saved the memory of its guest here.
    pub memory_saved: &'a dyn Fn() -> Result<bool>,
    /// One run of the domain, which is off, into this host's own store; gives the sealed point.
    pub run: &'a dyn Fn() -> Result<PointId>,
    /// Keeps a point of that store, for a reason in words; durable when it returns.
    pub pin: &'a dyn Fn(&PointId, &str) -> Result<()>,
    /// Removes the definition of the domain, and nothing of its files.
    pub undefine: &'a dyn Fn() -> Result<()>,
    /// Told what is done now, in words.
    pub say: &'a dyn Fn(&str),
}

/// Durable when it returns; takes as long as a first copy of the disks. `failover`: the domain reads a point of this
/// store. [`Kind::Conflict`] if it runs here, [`Kind::Refused`] while it reads a point.
pub fn run(ports: &Ports, uuid: &DomainUuid, failover: Option<&FailoverRecord>) -> Result<GaveWay> {
    if !is_off(ports, uuid)? {
        return Ok(GaveWay { point: None });
    }
    if let Some(record) = failover {
        let what = format!("the domain reads point {} of this very store", record.point);
        return Err(Error::new(Kind::Refused, what).domain(&record.domain).advise(match record.stage.is_committed() {
            true => Advice::from(advice::Failover::DetachFirst),
            false => "undo or commit that failover first".into(),
        }));
    }
    // It goes with the definition, and no point holds it.
    if (ports.memory_saved)()? {
        let what =
            "libvirt has saved the memory of its guest here, which no point holds and which goes with the definition";
        return Err(Error::new(Kind::Conflict, what)
            .domain(uuid)
            .hint("if nobody needs it: `virsh managedsave-remove DOMAIN` here first"));
    }
    (ports.say)("keeping what this host has as a point of its own store");
    let point = (ports.run)()?;
    failpoint!("k1");
    (ports.pin)(&point, REASON)?;
    failpoint!("k2");
    // A moment ago is not now: to undefine a running domain would only hide it.
    if is_off(ports, uuid)? {
        (ports.say)("removing its definition");
        (ports.undefine)()?;
    }
    failpoint!("k3");
    Ok(GaveWay { point: Some(point) })
}

/// `false`: there is none.
fn is_off(ports: &Ports, uuid: &DomainUuid) -> Result<bool> {
    match (ports.power)()? {
        None => Ok(false),
        Some(Power::Off) => Ok(true),
        Some(Power::Running | Power::Paused) => {
            Err(Error::new(Kind::Conflict, "the domain runs on this host: there is nothing to give way to")
                .domain(uuid)
                .hint(
                    "if it lives elsewhere, two of them write now: shut one of them off, and decide which one counts",
                ))
        }
    }
}

#[cfg(test)]
#[path = "retire_home_copy_tests.rs"]
mod tests;
