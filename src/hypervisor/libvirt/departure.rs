//! [`Departure`] on libvirt: each verb is one call through the gate. Tried with libvirt 9.0 in
//! tests/lab/suite/handover.rs.

use super::gate::{Failure, Repeat};
use crate::error::Result;
use crate::hypervisor::departure::{Asking, Departure};
use crate::hypervisor::libvirt::LibvirtHypervisor;
use crate::hypervisor::libvirt::queries::lookup;
use crate::hypervisor::xml;
use crate::name::DomainUuid;
use std::time::Duration;
use virt::error::ErrorNumber;
use virt::sys as c;

/// libvirt waits this long for a guest agent that does not answer, and some more.
const AGENT_MAX: Duration = Duration::from_secs(30);

const PREFIX: &str = "vr-lives";

impl Departure for LibvirtHypervisor {
    fn autostart(&self, uuid: &DomainUuid) -> Result<bool> {
        self.query("ask whether the domain starts with the host", uuid, |conn, uuid| {
            let domain = lookup(conn, uuid)?;
            if !domain.is_persistent()? {
                return Ok(false);
            }
            Ok(domain.autostart()?)
        })
    }

    fn set_autostart(&self, uuid: &DomainUuid, on: bool) -> Result<()> {
        let deadline = self.deadlines.change;
        self.on_domain(
            "set whether the domain starts with the host",
            deadline,
            Repeat::Harmless,
            uuid,
            move |conn, uuid| {
                let domain = lookup(conn, uuid)?;
                if domain.autostart()? != on {
                    conn.about_to_change()?;
                    domain.set_autostart(on)?;
                }
                Ok(())
            },
        )
    }

    fn set_mark(&self, uuid: &DomainUuid, mark: Option<&str>) -> Result<()> {
        let element = mark.map(xml::lives_xml).transpose()?;
        self.on_domain("mark the domain", self.deadlines.change, Repeat::Harmless, uuid, move |conn, uuid| {
            let domain = lookup(conn, uuid)?;
            // Each by itself: a guest that goes down between the two must not keep the other from being marked.
            let mut flags = Vec::new();
            if domain.is_persistent()? {
                flags.push(c::VIR_DOMAIN_AFFECT_CONFIG);
            }
            if domain.id().is_some() {
                flags.push(c::VIR_DOMAIN_AFFECT_LIVE);
            }
            for flag in flags {
                conn.about_to_change()?;
                let kind = c::VIR_DOMAIN_METADATA_ELEMENT as i32;
                match domain.set_metadata(kind, element.as_deref(), Some(PREFIX), Some(xml::LIVES_NS), flag) {
                    Ok(()) => {}
                    // To remove what is not there.
                    Err(e) if element.is_none() && e.code().is(ErrorNumber::NoDomainMetadata) => {}
                    Err(e) if flag == c::VIR_DOMAIN_AFFECT_LIVE && e.code().is(ErrorNumber::OperationInvalid) => {}
                    Err(e) => return Err(e.into()),
                }
            }
            Ok(())
        })
    }

    fn ask_to_shut_down(&self, uuid: &DomainUuid, by: Asking) -> Result<()> {
        let flag = match by {
            Asking::GuestAgent => c::VIR_DOMAIN_SHUTDOWN_GUEST_AGENT,
            Asking::PowerButton => c::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN,
        };
        self.on_domain("ask the guest to shut down", AGENT_MAX, Repeat::Harmless, uuid, move |conn, uuid| {
            let domain = lookup(conn, uuid)?;
            if domain.id().is_none() {
                return Ok(());
            }
            conn.about_to_change()?;
            match domain.shutdown_flags(flag) {
                Err(e) if domain.is_active() != Ok(false) => Err(Failure::from(e)),
                _ => Ok(()),
            }
        })
    }
}
