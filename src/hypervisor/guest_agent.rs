//! [`GuestAgent`] on libvirt: the guest agent's own commands, passed through, each with a time of its own.
//!
//! Not `virDomainFSFreeze`: it waits for an answer for ever unless the domain was told otherwise, for everybody who asks it.

use super::guest::{GuestAgent, HOLD, STATUS, THAW, answer, as_refusal, held};
use super::libvirt::LibvirtHypervisor;
use crate::error::Result;
use crate::name::DomainUuid;
use std::time::Duration;

impl GuestAgent for LibvirtHypervisor {
    fn hold_file_systems(&self, uuid: &DomainUuid, within: Duration) -> Result<u64> {
        answer(&self.ask_guest("hold the guest's file systems", uuid, HOLD, within).map_err(as_refusal)?)
    }

    fn are_file_systems_held(&self, uuid: &DomainUuid, within: Duration) -> Result<bool> {
        held(&self.ask_guest("ask for the guest's file systems", uuid, STATUS, within).map_err(as_refusal)?)
    }

    fn thaw_file_systems(&self, uuid: &DomainUuid, within: Duration) -> Result<u64> {
        answer(&self.ask_guest("let the guest's file systems go", uuid, THAW, within).map_err(as_refusal)?)
    }
}
