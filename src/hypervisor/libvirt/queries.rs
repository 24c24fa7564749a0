//! Questions to one connection that more than one port of libvirt asks.

use crate::error::Result;
use crate::hypervisor::firmware::{self, Loader};
use crate::hypervisor::libvirt::gate::{Failure, Line};
use std::path::PathBuf;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error as VirtError;

pub(in crate::hypervisor) fn lookup(conn: &Connect, uuid: &str) -> Result<Domain, VirtError> {
    conn.lookup_domain_by_uuid_string(uuid)
}

/// libvirt is asked how it would call QEMU, which starts nothing and looks at no image.
pub(in crate::hypervisor) fn firmware_for(conn: &Line<'_>, xml: &str) -> Result<Option<PathBuf>, Failure> {
    match firmware::loader(xml)? {
        Loader::None => Ok(None),
        Loader::File(path) => Ok(Some(path)),
        Loader::Chosen => match conn.domain_xml_to_native("qemu-argv", xml, 0) {
            Ok(command) => Ok(firmware::in_command_line(&command)),
            Err(e) if e.domain().is(virt::error::ErrorDomain::Rpc) => Err(e.into()),
            Err(e) => {
                tracing::debug!(said = e.message(), "libvirt does not say which firmware it would choose");
                Ok(None)
            }
        },
    }
}
