//! The end of a stay: a domain that was brought up on this host has been handed on, and lives where it was handed to.
//! What it wrote here went with it; its overlays go, and the replica is open for its new home.
//!
//! Invariants
//! - The caller has it from the new home, durably, that the domain is there for good: its generation is the proof.
//! - The replica lets its new home in last (k8), and never anybody older.
//! - What runs is not handed back.
//!
//! Steps: docs/recovery.md.

use super::failover::{FailoverState, Ports, remove_files};
use crate::error::{Error, Kind, Result};
use crate::failpoint;
use crate::hypervisor::Power;
use crate::name::Generation;
use crate::recovery::record::Stage;

/// Durable when it returns. No error where the domain reads no point here (any more): then it has images of its own,
/// which stay. `generation`: that of the new home.
pub fn run(ports: &Ports, state: &FailoverState, generation: Generation) -> Result<()> {
    let Some(mut record) = state.record()? else {
        return Ok(());
    };
    if let Some(Power::Running | Power::Paused) = ports.machines.power(&record.uuid)? {
        return Err(Error::new(Kind::Conflict, "the domain RUNS ON BOTH SIDES: it was handed on, and runs here")
            .domain(&record.domain)
            .hint("shut it off here (`virsh destroy`): the one at its new home is the domain"));
    }
    if record.stage == Stage::Detached {
        // It has images of its own, and only the replica does not know yet: they stay.
        ports.replica.conclude(generation)?;
        return state.close();
    }
    record.stage = Stage::HandingBack;
    state.write(&record)?;
    failpoint!("k5");
    (ports.say)("removing the domain here");
    ports.machines.undefine(&record.uuid)?;
    failpoint!("k6");
    remove_files(ports, &record)?;
    failpoint!("k7");
    ports.replica.conclude(generation)?;
    failpoint!("k8");
    state.close()?;
    failpoint!("k9");
    Ok(())
}
