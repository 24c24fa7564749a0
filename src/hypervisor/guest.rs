//! The port to the guest agent, as far as a freeze needs it: hold the guest's file systems, and let them go.
//!
//! Every verb blocks, for no longer than `within` and the few seconds that libvirt takes to find out that nobody
//! answers. After [`Refused`](crate::error::Kind::Refused) the guest agent, or libvirt for it, has said no: nothing was
//! held. After any other error of a verb that changes something it may have been done, or may be done yet: a command
//! that nobody waits for any more still lies in the agent's channel.
//!
//! Commands: QEMU's docs/interop/qemu-ga-ref.

use crate::error::Result;
use crate::name::DomainUuid;
use std::time::Duration;

/// The port to the guest agent: hold the guest's file systems, and thaw them.
pub trait GuestAgent: Send + Sync {
    /// Flushes and holds the guest's file systems. Returns how many; what the guest writes to them waits from now on.
    fn hold_file_systems(&self, uuid: &DomainUuid, within: Duration) -> Result<u64>;

    /// Whether they are held, by the guest agent's own word.
    fn are_file_systems_held(&self, uuid: &DomainUuid, within: Duration) -> Result<bool>;

    /// Lets them go. Returns how many; none is no error.
    fn thaw_file_systems(&self, uuid: &DomainUuid, within: Duration) -> Result<u64>;
}
