//! Which domains there are, and how they are tagged: little is asked, and of no domain's QEMU.

use super::gate::{Call, Repeat};
use crate::error::Result;
use crate::hypervisor::libvirt::LibvirtHypervisor;
use crate::hypervisor::xml;
use crate::name::{DomainName, DomainUuid};
use virt::domain::Domain;
use virt::error::ErrorNumber;
use virt::sys as c;

/// A domain of this host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct NamedDomain {
    /// Name of the domain in libvirt. An operator may change it; the UUID stays.
    pub name: DomainName,
    /// UUID by which libvirt knows the domain.
    pub uuid: DomainUuid,
    /// Words that its owner has put into its metadata ([`xml::TAGS_NS`]), sorted.
    pub tags: Vec<String>,
}

impl LibvirtHypervisor {
    /// All domains, running or not, by name.
    pub fn names(&self) -> Result<Vec<NamedDomain>> {
        let deadline = self.deadlines.query;
        let call = Call { what: "list the domains", domain: None, deadline, repeat: Repeat::Harmless };
        let found = self.gate.call(call, |conn| {
            let mut found = Vec::new();
            for domain in conn.list_all_domains(0)? {
                found.push((domain.name()?, domain.uuid_string()?, tags(&domain)));
            }
            Ok(found)
        })?;
        let mut names = Vec::with_capacity(found.len());
        for (name, uuid, tags) in found {
            match DomainName::new(name) {
                Ok(name) => names.push(NamedDomain { name, uuid: DomainUuid::new(uuid.as_str())?, tags }),
                // One domain that we cannot name must not hide the others.
                Err(e) => tracing::warn!(uuid, error = e.chain(), "domain left out"),
            }
        }
        names.sort();
        Ok(names)
    }
}

/// The tags of the definition and of what runs: whoever sets one of them means the domain.
fn tags(domain: &Domain) -> Vec<String> {
    let mut tags = Vec::new();
    for which in [c::VIR_DOMAIN_AFFECT_CONFIG, c::VIR_DOMAIN_AFFECT_LIVE] {
        match domain.metadata(c::VIR_DOMAIN_METADATA_ELEMENT as i32, Some(xml::TAGS_NS), which) {
            Ok(element) => tags.extend(xml::tags(&element)),
            // It has none, is off, or has no definition; or it has gone away meanwhile.
            Err(e) if e.code().is(ErrorNumber::NoDomainMetadata) => {}
            Err(e) => tracing::debug!("tags were not read: {e}"),
        }
    }
    tags.sort();
    tags.dedup();
    tags
}
