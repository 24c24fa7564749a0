//! Commands at the source: one run of a domain, what it would do, and the way back from one that was cut short.

pub(super) mod doctor;
#[cfg(feature = "libvirt")]
pub(super) mod foresee;
pub(super) mod limits;
#[cfg(feature = "libvirt")]
pub(super) mod source;
pub(super) mod sync;
pub(super) mod verify;
#[cfg(feature = "libvirt")]
pub(super) mod watch;
