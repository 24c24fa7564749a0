//! What surrounds the disks of a run: the machine's description that travels with the point, and the operator's programs
//! before and after the freeze.

use super::cycle::Run;
use super::demoted;
use super::freeze_hooks;
use super::journal::to_json;
use super::plan::{CaptureKind, Plan};
use crate::error::{Error, Result};
use crate::hypervisor::firmware::Firmware;
use crate::hypervisor::{DomainView, Power, swtpm, xml};
use crate::replica::{Attachment, Replica, TpmPrograms};

impl Run<'_> {
    /// Step 3d.
    pub(super) fn before_freeze(&self, plan: &Plan) -> Result<()> {
        if plan.capture == CaptureKind::Off {
            return Ok(());
        }
        let (domain, target, run) = ((&plan.domain, &plan.uuid), &self.request.target, self.request.run.as_str());
        self.request.hooks.before(self.journal, &|event| freeze_hooks::told(event, domain, target, run))
    }

    /// Step 4g. What of it has to be known.
    pub(super) fn after_freeze(&self) -> Option<String> {
        // What could not be noted is owed still, and run again by whoever comes next.
        freeze_hooks::settle(self.journal).unwrap_or_else(|e| Some(e.chain()))
    }

    /// The machine's description, as it was at the freeze or a moment later.
    pub(super) fn attach(&self, replica: &dyn Replica, domain: &DomainView) -> Result<()> {
        let secure = self.request.with_secrets;
        if domain.persistent {
            let xml = self.ports.hypervisor.definition(&domain.uuid, true, secure)?;
            replica.attach(Attachment::InactiveXml, self.as_its_owner_wrote(xml)?.as_bytes())?;
        }
        if domain.power != Power::Off {
            let xml = self.ports.hypervisor.definition(&domain.uuid, false, secure)?;
            replica.attach(Attachment::LiveXml, self.as_its_owner_wrote(xml)?.as_bytes())?;
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
        match self.firmware(domain) {
            Ok(Some(firmware)) => replica.attach(Attachment::Firmware, &to_json(&firmware)),
            Ok(None) => Ok(()),
            // The point is as good without; what it comes from is then not known where it is asked for.
            Err(e) => {
                tracing::warn!(error = e.chain(), "the point does not say which firmware its source boots from");
                Ok(())
            }
        }
    }

    /// Whether the domain starts with this host, which its definition does not say. `None` where that could not be found out: the
    /// point is as good without.
    pub(super) fn starts_with_host(&self, domain: &DomainView) -> Option<bool> {
        // In this order: a handover is on record before it takes autostart away (h2), and the record says how it was.
        let asked = self.ports.custody.autostart(&domain.uuid);
        match (asked, demoted::peek(&self.request.state, &domain.uuid)) {
            (_, Ok(Some(handed))) => Some(handed.autostart),
            (Ok(autostart), Ok(None)) => Some(autostart),
            (Err(e), _) | (_, Err(e)) => {
                tracing::warn!(error = e.chain(), "the point does not say whether the domain starts with its host");
                None
            }
        }
    }

    /// What has written the state of the domain's TPM. `None`: it has none, or the programs do not say: the point is as good without.
    pub(super) fn tpm_programs(&self, domain: &DomainView) -> Option<TpmPrograms> {
        domain.tpm.as_ref()?;
        swtpm::programs().map(|swtpm::Programs { swtpm, libtpms }| TpmPrograms { swtpm, libtpms })
    }

    fn firmware(&self, domain: &DomainView) -> Result<Option<Firmware>> {
        let path = self.ports.hypervisor.firmware(&domain.uuid)?;
        path.map_or(Ok(None), |path| Firmware::of(&path))
    }

    /// While we hold the disks, both definitions name our overlays and carry our record; those to keep name the images
    /// themselves, and nobody who defines a domain from them inherits a run that was under way.
    fn as_its_owner_wrote(&self, xml: String) -> Result<String> {
        let Some(record) = self.journal.record()? else { return Ok(xml) };
        let bases: Vec<_> = record.disks.iter().map(|d| (d.name.clone(), d.base.clone())).collect();
        xml::without_record(&xml::set_layers(&xml, &bases)?)
    }
}
