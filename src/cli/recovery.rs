//! Commands that bring a domain up elsewhere, for a while or for good, and home again.

pub(super) mod detach;
pub(super) mod drill;
pub(super) mod failback;
// A build without libvirt reads the arguments and goes no further.
#[cfg_attr(not(feature = "libvirt"), allow(dead_code))]
pub(super) mod failover;
// A build without libvirt reads the arguments and goes no further.
#[cfg_attr(not(feature = "libvirt"), allow(dead_code))]
pub(super) mod give_way;
// A build without libvirt reads the arguments and goes no further.
#[cfg_attr(not(feature = "libvirt"), allow(dead_code))]
pub(super) mod handover;
// A build without libvirt reads the arguments and goes no further.
#[cfg_attr(not(feature = "libvirt"), allow(dead_code))]
pub(super) mod here;
#[cfg_attr(not(feature = "libvirt"), allow(dead_code))]
pub(super) mod migrate;
pub(super) mod ready;
