//! What a point of a domain that is off may be called. Pure.
//!
//! "Off" says nothing about the guest's file systems: a guest that was ended as by a power cut, or whose memory was
//! saved, is off too. The label says what is known, and the reason says the rest.

use crate::hypervisor::{DomainView, Ended};
use crate::replica::Consistency;
use crate::replicate::capture::still::Frozen;

/// The label of a point of a domain that is off, and what is known beside it.
pub fn of_off(domain: &DomainView) -> (Consistency, Option<String>) {
    let (label, why) = match domain.ended {
        // Whatever the state says: the guest goes on from that image, and without it begins as after a power cut.
        _ if domain.managed_save => {
            (Consistency::Crash, "the guest's memory is saved and does not travel (virsh managedsave)")
        }
        Ended::Saved => (Consistency::Crash, "the guest's memory was saved and does not travel"),
        Ended::Destroyed => (Consistency::Crash, "the domain was ended as by a power cut (virsh destroy)"),
        Ended::Crashed => (Consistency::Crash, "the domain's QEMU ended without a shutdown of the guest"),
        Ended::ShutDown => return (Consistency::Off, None),
        Ended::Unknown => (Consistency::Off, "libvirt does not know how the domain came to be off"),
    };
    (label, Some(why.to_owned()))
}

/// The warning of a run that froze and whose point is less than was asked for. How a domain came to be off is no news
/// in each run.
pub fn told(still: &Frozen) -> Option<String> {
    let why = still.consistency_reason.as_ref().filter(|_| still.freeze.is_some())?;
    Some(format!("the point is as after a power cut: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::Power;
    use crate::name::{DomainName, DomainUuid};

    fn label(ended: Ended, managed_save: bool) -> (Consistency, String) {
        let domain = DomainView {
            name: DomainName::new("web01").unwrap(),
            uuid: DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap(),
            id: None,
            power: Power::Off,
            ended,
            paused: None,
            persistent: true,
            managed_save,
            domain_job: None,
            disks: Vec::new(),
            record: None,
            nvram: None,
            tpm: None,
            guest_agent: false,
        };
        let (label, why) = of_off(&domain);
        (label, why.unwrap_or_default())
    }

    #[test]
    fn off_is_clean_only_where_nothing_says_otherwise_and_what_is_known_is_said() {
        for (ended, saved, expected, word) in [
            (Ended::ShutDown, false, Consistency::Off, ""),
            (Ended::Unknown, false, Consistency::Off, "does not know"),
            (Ended::Destroyed, false, Consistency::Crash, "virsh destroy"),
            (Ended::Crashed, false, Consistency::Crash, "without a shutdown"),
            (Ended::Saved, false, Consistency::Crash, "memory was saved"),
            // The saved image counts, whatever the state says; after a restart of libvirtd that is "unknown".
            (Ended::Saved, true, Consistency::Crash, "managedsave"),
            (Ended::Unknown, true, Consistency::Crash, "managedsave"),
            (Ended::ShutDown, true, Consistency::Crash, "managedsave"),
        ] {
            let (found, why) = label(ended, saved);
            assert_eq!(found, expected, "{ended:?} {saved}");
            assert!(why.contains(word) && why.is_empty() == word.is_empty(), "{ended:?} {saved}: {why}");
        }
    }
}
