//! What the replica is for: to bring a domain up on this host, the target, whether for a while or for good.
//!
//! [`definition`] makes of the source's definition one that may be started here, [`ready`] says beforehand whether it can
//! be. Both are pure. [`mapping`] is what the operator says of this host's networks, machines and paths.
//!
//! A point is never booted itself (I20): the guest writes to overlays. Crash order: docs/recovery.md.

pub mod definition;
pub mod mapping;
pub mod ready;
