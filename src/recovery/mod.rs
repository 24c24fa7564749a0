//! What the replica is for: to bring a domain up on this host, the target, whether for a while or for good.
//!
//! [`definition`] makes of the source's definition one that may be started here, [`ready`] says beforehand whether it
//! can be. Both are pure. [`mapping`] is what the operator says of this host's networks, machines and paths. [`drill`]
//! and [`failover`] act, [`detach`] gives what was brought up images of its own; [`bringup`] is the port to all that,
//! here or on another host.
//!
//! At the source, [`handover`] is a planned failover and [`migrate`] what goes before it; [`failback`] is the way home.
//!
//! A point is never booted itself (I20): the guest writes to overlays. Crash order: docs/recovery.md.

pub mod bringup;
pub mod definition;
pub mod detach;
pub mod drill;
pub mod drills;
pub mod failback;
pub mod failover;
pub mod fitting;
pub mod hand_back;
pub mod handover;
pub mod mapping;
pub mod migrate;
pub mod overlays;
#[cfg(test)]
mod point_tests;
pub mod probe;
pub mod ready;
pub mod record;
pub mod retire_home_copy;
pub mod suggest;

use crate::error::{Error, Kind, Result, advice};
use crate::replica::Attachment;
use crate::replica::upkeep::Held;

/// The definition that travels with a point: the persistent one, or that of a transient domain.
pub fn definition_of(held: &dyn Held) -> Result<String> {
    for name in [Attachment::InactiveXml, Attachment::LiveXml] {
        if let Some(content) = held.attachment(name)? {
            return String::from_utf8(content)
                .map_err(|e| Error::new(Kind::Corrupt, "the definition is no text").path(name.file_name()).source(e));
        }
    }
    Err(Error::new(Kind::NotFound, "the point carries no definition").advise(advice::Run::NewPoint))
}
