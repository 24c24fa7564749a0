//! The port to a domain that is about to leave its host: that nobody starts it by accident, and that its guest goes
//! down cleanly.
//!
//! Every verb blocks, at most its deadline, and may be repeated.

use crate::error::Result;
use crate::name::DomainUuid;

/// The port to a domain that is about to leave its host: autostart, mark and shutdown.
pub trait Departure: Send + Sync {
    /// Whether libvirt starts it with the host. A transient domain is not.
    fn autostart(&self, uuid: &DomainUuid) -> Result<bool>;

    /// Sets whether libvirt starts the domain with the host. No error if it is so already.
    fn set_autostart(&self, uuid: &DomainUuid, on: bool) -> Result<()>;

    /// Stores (or with `None` removes) words about where the domain lives, in its `<metadata>`, live and persistent:
    /// who looks at its XML before he starts it by hand reads them. Nobody decides by them.
    fn set_mark(&self, uuid: &DomainUuid, mark: Option<&str>) -> Result<()>;

    /// Asks the guest to shut down, and does not wait for it. [`Refused`](crate::error::Kind::Refused) if it could not
    /// be asked; no error if the domain is off.
    fn ask_to_shut_down(&self, uuid: &DomainUuid, by: Asking) -> Result<()>;
}

/// Who is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asking {
    /// The guest agent.
    GuestAgent,
    /// The guest itself, as by its power button.
    PowerButton,
}
