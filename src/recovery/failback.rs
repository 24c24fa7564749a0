//! The way home: a domain that was brought up on this host goes back to where it came from, or on to any other host
//! that has an old copy of it. What the home still has gives way first, so that only what differs is sent, then the
//! domain is handed over as in every planned failover, and in the end this host is its target again.
//!
//! Invariants
//! - Who loses is said beforehand: the home's old content. It stays as a pinned point of the home's store (k1 to k3).
//! - Home is asked first whether it could bring up the domain as it is here now: a home that is not ready keeps what it
//!   has.
//! - Nothing here is thrown away before the home has committed (k4 before k5): until then the handover can be called
//!   off.
//! - Every step may be done twice. Whatever dies, the same command goes on from what the home says, and from the
//!   records.
//!
//! Steps: docs/recovery.md.

use super::bringup::{BringUp, Coming, refuse_red};
use super::handover;
use crate::error::Result;
use crate::failpoint;
use crate::name::{Generation, PointId};

/// What is needed of the world.
pub struct Ports<'a> {
    /// The home; connects anew where the last connection has broken.
    pub home: &'a dyn Fn() -> Result<Box<dyn BringUp>>,
    /// The domain as it would come to its home now.
    pub coming: &'a dyn Fn() -> Result<Coming>,
    /// Hands the domain over to it: see [`handover::over`].
    pub hand_over: &'a dyn Fn() -> Result<handover::Report>,
    /// See [`hand_back`](super::hand_back).
    pub hand_back: &'a dyn Fn(Generation) -> Result<()>,
    /// An earlier attempt has handed it over: the home has nothing of its own any more.
    pub handed_over: bool,
    /// Told what is done now, in words.
    pub say: &'a dyn Fn(&str),
}

/// How it went.
#[derive(Debug, Clone)]
pub struct CameHome {
    /// Report of the planned failover that brought the domain home.
    pub handover: handover::Report,
    /// The point that holds what the home had; absent if it had nothing, or gave way in an earlier attempt.
    pub old: Option<PointId>,
    /// From now on; absent if it can still be undone.
    pub generation: Option<Generation>,
}

/// Brings the domain home. Durable when it returns. `keep_undo`: the home does not commit, and this host keeps what it
/// has. Blocks for as long as a first copy of the home's disks, and the runs, take.
pub fn run(ports: &Ports, keep_undo: bool) -> Result<CameHome> {
    let home = (ports.home)()?;
    let standing = home.state()?;
    let mut old = None;
    // A home that has brought it up already is what an earlier attempt led to.
    if !ports.handed_over && standing.failover.is_none() && standing.promoted.is_none() {
        (ports.say)("asking home whether it could bring the domain up");
        refuse_red(&home.ready_for(&(ports.coming)()?)?, "its home")?;
        old = home.give_way(ports.say)?.point;
    }
    drop(home);
    let handover = (ports.hand_over)()?;
    if keep_undo {
        return Ok(CameHome { handover, old, generation: None });
    }
    let generation = (ports.home)()?.commit(ports.say)?;
    failpoint!("k4");
    (ports.hand_back)(generation)?;
    Ok(CameHome { handover, old, generation: Some(generation) })
}

#[cfg(test)]
#[path = "failback_tests.rs"]
mod tests;
