//! Finding what differs between two disks, and shipping it: the same for disks of domains and for plain images.
//!
//! It stands below both stories ([`crate::replicate`], [`crate::plain`]) and below the store. It knows images, patches
//! and the port to a disk that is written elsewhere, and neither domains nor libvirt.

pub(crate) mod applier;
pub mod disk_target;
pub(crate) mod find;
pub mod nodefile;
pub(crate) mod ordered;
pub mod pace;
pub mod pump;
pub mod stats;
pub mod throttle;
