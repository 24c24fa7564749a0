//! What surrounds the disks of a run: the machine's description that travels with the point.

use crate::durable::to_json;
use crate::error::{Error, Result};
use crate::hypervisor::departure::Departure;
use crate::hypervisor::firmware::Firmware;
use crate::hypervisor::{DomainView, Hypervisor, Power, swtpm, travel, xml};
use crate::name::DiskName;
use crate::replica::{Attachment, Replica, TpmPrograms};
use crate::replicate::plan::planned::Plan;
use crate::replicate::run::{Ports, Request};
use crate::replicate::state::handover_record;
use std::path::Path;

/// The machine's description that travels with a point, as it was decided before the freeze.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Described {
    /// What a failover brings up. `None`: the domain is transient, and its live definition is all there is.
    stored: Option<String>,
    /// The running instance's, if it runs.
    live: Option<String>,
}

/// Step 3: reads the definitions and decides which one travels. Before the freeze, as it may show that the point could
/// not be brought up; and while both documents name the domain's own images. `notes` gets how the definition that
/// travels differs from what runs, or would be started, here.
pub(super) fn describe(
    ports: &Ports,
    request: &Request,
    domain: &DomainView,
    plan: &Plan,
    notes: &mut Vec<String>,
) -> Result<Described> {
    let read = |inactive| ports.hypervisor.definition(&domain.uuid, inactive, request.with_secrets);
    let stored = if domain.persistent { Some(read(true)?) } else { None };
    let live = if domain.power == Power::Off { None } else { Some(read(false)?) };
    let disks: Vec<DiskName> = plan.replicated().map(|d| d.name.clone()).collect();
    decided(stored, live, &disks, notes).map_err(|e| e.domain(&domain.name))
}

/// Pure. Nobody who defines a domain from what travels inherits a run that was under way here.
fn decided(
    stored: Option<String>,
    live: Option<String>,
    disks: &[DiskName],
    notes: &mut Vec<String>,
) -> Result<Described> {
    let stored = match (stored, &live) {
        (Some(stored), Some(live)) => {
            let travelling = travel::definition(&stored, live, disks)?;
            notes.extend(travelling.notes);
            Some(travelling.xml)
        }
        (stored, _) => stored,
    };
    let bare = |xml: Option<String>| xml.map(|xml| xml::without_record(&xml)).transpose();
    Ok(Described { stored: bare(stored)?, live: bare(live)? })
}

/// The machine's description: its definitions as they were decided before the freeze, the rest as it is a moment after.
pub(super) fn attach(
    hypervisor: &dyn Hypervisor,
    replica: &dyn Replica,
    domain: &DomainView,
    described: &Described,
) -> Result<()> {
    for (name, xml) in [(Attachment::InactiveXml, &described.stored), (Attachment::LiveXml, &described.live)] {
        if let Some(xml) = xml {
            replica.attach(name, xml.as_bytes())?;
        }
    }
    let files = [
        (Attachment::Nvram, &domain.nvram, "cannot read the UEFI variables"),
        (Attachment::Tpm, &domain.tpm, "cannot read the state of the TPM"),
    ];
    for (name, path, failed) in files {
        let Some(path) = path else { continue };
        match std::fs::read(path) {
            Ok(content) => replica.attach(name, &content)?,
            // Not there before the first start.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(failed, path, e)),
        }
    }
    match firmware(hypervisor, domain) {
        Ok(Some(firmware)) => replica.attach(Attachment::Firmware, &to_json(&firmware)),
        Ok(None) => Ok(()),
        // The point is as good without; what it comes from is then not known where it is asked for.
        Err(e) => {
            tracing::warn!(error = e.chain(), "the point does not say which firmware its source boots from");
            Ok(())
        }
    }
}

/// Whether the domain starts with this host, which its definition does not say. `None` where that could not be found
/// out: the point is as good without.
pub(super) fn starts_with_host(custody: &dyn Departure, state: &Path, domain: &DomainView) -> Option<bool> {
    // In this order: a handover is on record before it takes autostart away (h2), and the record says how it was.
    let asked = custody.autostart(&domain.uuid);
    match (asked, handover_record::peek(state, &domain.uuid)) {
        (_, Ok(Some(handed))) => Some(handed.autostart),
        (Ok(autostart), Ok(None)) => Some(autostart),
        (Err(e), _) | (_, Err(e)) => {
            tracing::warn!(error = e.chain(), "the point does not say whether the domain starts with its host");
            None
        }
    }
}

/// What has written the state of the domain's TPM. `None`: it has none, or the programs do not say: the point is as
/// good without.
pub(super) fn tpm_programs(domain: &DomainView) -> Option<TpmPrograms> {
    domain.tpm.as_ref()?;
    swtpm::programs().map(|swtpm::Programs { swtpm, libtpms }| TpmPrograms { swtpm, libtpms })
}

fn firmware(hypervisor: &dyn Hypervisor, domain: &DomainView) -> Result<Option<Firmware>> {
    let path = hypervisor.firmware(&domain.uuid)?;
    path.map_or(Ok(None), |path| Firmware::of(&path))
}
