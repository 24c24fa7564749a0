//! Finds a replica by the name of its domain. Names are not unique over time, and this host knows most: where it has a
//! domain of that name, its UUID says which replica is meant.

use crate::cli::globals::Globals;
use std::sync::Arc;
use virt_replica::agent::client::AgentClient;
use virt_replica::error::Result;
use virt_replica::name::{DomainName, DomainUuid};
use virt_replica::wiring;

/// The one replica that is meant; what the name alone would not have told is said.
pub fn find(client: &Arc<AgentClient>, name_or_uuid: &str, globals: &Globals) -> Result<(DomainUuid, DomainName)> {
    let here = || here(globals, name_or_uuid);
    let (found, note) = wiring::find_replica(client, name_or_uuid, &here)?;
    if let Some(note) = note {
        tracing::warn!("{note}");
    }
    Ok(found)
}

/// The UUID of this host's domain of that name. A host without a libvirt has none.
#[cfg(feature = "libvirt")]
fn here(globals: &Globals, name: &str) -> Option<DomainUuid> {
    // Without a URI libvirt would begin a session for such a user.
    if !rustix::process::geteuid().is_root() && globals.uri().is_none() {
        return None;
    }
    let names = crate::cli::run::source::connect(globals).and_then(|site| site.hypervisor().names());
    let names = names.inspect_err(|e| tracing::debug!("no libvirt tells which domain is meant: {}", e.chain())).ok()?;
    names.into_iter().find(|d| d.name.as_str() == name).map(|d| d.uuid)
}

#[cfg(not(feature = "libvirt"))]
fn here(_: &Globals, _: &str) -> Option<DomainUuid> {
    None
}
