//! How a domain as a whole stands, in libvirt's words and in ours: whether it runs, why it is paused, which job runs on
//! it.

use super::{Ended, PauseReason, Power};
use crate::hypervisor::libvirt::sys;
use virt::domain::Domain;
use virt::error::{Error as VirtError, ErrorNumber};
use virt::sys as c;

pub(super) fn power(domain: &Domain) -> Result<Power, VirtError> {
    Ok(power_and_reason(domain)?.0)
}

/// One question, so that the reason belongs to the state.
pub(super) fn power_and_reason(domain: &Domain) -> Result<(Power, Option<PauseReason>), VirtError> {
    let (state, reason) = sys::state(domain)?;
    Ok(match state {
        _ if domain.id().is_none() => (Power::Off, None),
        c::VIR_DOMAIN_SHUTOFF => (Power::Off, None),
        c::VIR_DOMAIN_PAUSED => (Power::Paused, Some(pause_reason(reason))),
        // A crashed domain that still has its QEMU stands.
        c::VIR_DOMAIN_PMSUSPENDED | c::VIR_DOMAIN_CRASHED => (Power::Paused, Some(PauseReason::Other)),
        // Shutting down included: it runs until it is off.
        _ => (Power::Running, None),
    })
}

/// What libvirt knows of how a domain came to be off.
pub(super) fn ended(domain: &Domain) -> Result<Ended, VirtError> {
    let (state, reason) = sys::state(domain)?;
    Ok(match (state, reason as u32) {
        (c::VIR_DOMAIN_CRASHED, _) => Ended::Crashed,
        (c::VIR_DOMAIN_SHUTOFF, c::VIR_DOMAIN_SHUTOFF_SHUTDOWN) => Ended::ShutDown,
        (c::VIR_DOMAIN_SHUTOFF, c::VIR_DOMAIN_SHUTOFF_DESTROYED) => Ended::Destroyed,
        // libvirt ends what it finds hollow when it comes back.
        (c::VIR_DOMAIN_SHUTOFF, c::VIR_DOMAIN_SHUTOFF_CRASHED | c::VIR_DOMAIN_SHUTOFF_DAEMON) => Ended::Crashed,
        (c::VIR_DOMAIN_SHUTOFF, c::VIR_DOMAIN_SHUTOFF_SAVED) => Ended::Saved,
        _ => Ended::Unknown,
    })
}

fn pause_reason(reason: i32) -> PauseReason {
    match reason as u32 {
        c::VIR_DOMAIN_PAUSED_IOERROR => PauseReason::IoError,
        c::VIR_DOMAIN_PAUSED_USER => PauseReason::Asked,
        _ => PauseReason::Other,
    }
}

pub(super) fn job_of_domain(domain: &Domain) -> Result<Option<String>, VirtError> {
    match sys::domain_job(domain) {
        // Everything else about the domain can be said all the same.
        Err(e) if is_lost(&e) => {
            Ok(Some("a job that libvirt has lost (it goes when the domain is shut off and libvirtd restarted)".into()))
        }
        other => Ok(other?.map(job_words)),
    }
}

/// libvirt's answer to the question for a domain's job when it holds one and has lost what it was ("backup job data
/// missing"): seen of libvirt 9.0 when libvirtd was killed inside the begin of a backup.
pub(super) fn is_lost(e: &VirtError) -> bool {
    e.code().is(ErrorNumber::InternalError)
}

fn job_words(operation: u32) -> String {
    match operation {
        c::VIR_DOMAIN_JOB_OPERATION_START => "start".into(),
        c::VIR_DOMAIN_JOB_OPERATION_SAVE => "save".into(),
        c::VIR_DOMAIN_JOB_OPERATION_RESTORE => "restore".into(),
        c::VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN => "incoming migration".into(),
        c::VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT => "outgoing migration".into(),
        c::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT => "snapshot".into(),
        c::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT_REVERT => "return to a snapshot".into(),
        c::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT_DELETE => "deletion of a snapshot".into(),
        c::VIR_DOMAIN_JOB_OPERATION_DUMP => "memory dump".into(),
        c::VIR_DOMAIN_JOB_OPERATION_BACKUP => "backup".into(),
        other => format!("job of a kind we do not know ({other})"),
    }
}
