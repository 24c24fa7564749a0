//! By which way the disks of a domain are made to stand still, with the reason. Pure.
//!
//! An overlay works on any storage, and has to be committed; a backup needs no commit, and leaves the production chain
//! alone.

use crate::hypervisor::{Confinement, Power};
use crate::name::DiskName;
pub use crate::replicate::plan::options::{CaptureKind, CaptureWish};
use crate::replicate::state::report::{Report, RunOutcome};

/// The choice, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The chosen way. A domain that is off is always read as it is.
    pub kind: CaptureKind,
    /// Why this way was chosen, in words for the report.
    pub reason: String,
}

/// What is known that decides whether an overlay could be committed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CommitFacts {
    /// `None`: not asked.
    pub confinement: Option<Confinement>,
    /// Disks with an image that holds internal snapshots.
    pub internal_snapshots: Vec<DiskName>,
    /// When the newest run by overlay began, if it had to leave its commit unfinished.
    pub unfinished: Option<jiff::Timestamp>,
}

/// Chooses.
pub fn choose(power: Power, wish: CaptureWish, facts: &CommitFacts) -> Choice {
    let chosen = |kind, reason: &str| Choice { kind, reason: reason.to_owned() };
    match (power, wish) {
        (Power::Off, _) => chosen(CaptureKind::Off, "the domain is off: its disks are read as they are"),
        (_, CaptureWish::Overlay) => chosen(CaptureKind::Overlay, "an overlay over each disk, as asked for"),
        (_, CaptureWish::Backup) => chosen(CaptureKind::Backup, "by backup, as asked for"),
        (_, CaptureWish::Auto) => match hindrance(facts) {
            Some(why) => Choice { kind: CaptureKind::Backup, reason: format!("by backup: {why}") },
            None => chosen(CaptureKind::Overlay, "nothing is known that would keep an overlay from being committed"),
        },
    }
}

/// What may keep an overlay from being committed, the surest first.
fn hindrance(facts: &CommitFacts) -> Option<String> {
    if let Some(Confinement { libvirt: (major, minor, release), .. }) = facts.confinement.filter(|c| c.denies_commits())
    {
        return Some(format!(
            "the domain is confined by AppArmor. Should it be started while it is on an overlay, libvirt \
             {major}.{minor}.{release} (before 12.1.0) denies QEMU the commit until it is shut off"
        ));
    }
    if let Some(disk) = facts.internal_snapshots.first() {
        return Some(format!(
            "the image of disk '{disk}' holds internal snapshots, and a commit into it would write beside them"
        ));
    }
    let at = facts.unfinished?;
    Some(format!(
        "the newest run by overlay, of {at:.0}, could not finish its commit (a run that asks for overlays tries it again)"
    ))
}

/// When the newest run by overlay began, if its commit was left unfinished. `past`: reports, oldest first.
pub fn unfinished(past: &[Report]) -> Option<jiff::Timestamp> {
    // Reports from before there was a choice are of overlays, or of a domain that was off, which leaves nothing open.
    let by_overlay = |r: &&Report| r.point.is_some() && r.capture.is_none_or(|kind| kind == CaptureKind::Overlay);
    let newest = past.iter().rev().find(by_overlay)?;
    (newest.outcome == RunOutcome::CommitPending).then_some(newest.started_at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replicate::state::report::tests::report;

    fn confined(libvirt: (u32, u32, u32), apparmor: bool) -> CommitFacts {
        CommitFacts { confinement: Some(Confinement { libvirt, apparmor }), ..CommitFacts::default() }
    }

    /// Every wish in every state, and for `auto` every fact: what is chosen, and a word of the reason.
    #[test]
    fn each_wish_with_each_fact() {
        use CaptureKind::{Backup, Off, Overlay};
        let nothing = CommitFacts::default();
        let snapshots =
            CommitFacts { internal_snapshots: vec![DiskName::new("vdb").unwrap()], ..CommitFacts::default() };
        let unfinished = CommitFacts { unfinished: Some(jiff::Timestamp::UNIX_EPOCH), ..CommitFacts::default() };
        let table: [(CaptureWish, CommitFacts, CaptureKind, &str); 12] = [
            (CaptureWish::Overlay, nothing.clone(), Overlay, "asked for"),
            (CaptureWish::Overlay, confined((9, 0, 0), true), Overlay, "asked for"),
            (CaptureWish::Overlay, unfinished.clone(), Overlay, "asked for"),
            (CaptureWish::Backup, nothing.clone(), Backup, "asked for"),
            (CaptureWish::Auto, nothing, Overlay, "nothing is known"),
            (CaptureWish::Auto, confined((9, 0, 0), false), Overlay, "nothing is known"),
            (
                CaptureWish::Auto,
                confined((9, 0, 0), true),
                Backup,
                "AppArmor. Should it be started while it is on an overlay, libvirt 9.0.0",
            ),
            (CaptureWish::Auto, confined((12, 0, 9), true), Backup, "AppArmor"),
            (CaptureWish::Auto, confined((12, 1, 0), true), Overlay, "nothing is known"),
            (CaptureWish::Auto, confined((13, 0, 0), true), Overlay, "nothing is known"),
            (CaptureWish::Auto, snapshots, Backup, "disk 'vdb' holds internal snapshots"),
            (CaptureWish::Auto, unfinished, Backup, "of 1970-01-01T00:00:00Z, could not finish"),
        ];
        for (wish, facts, kind, word) in table {
            for power in [Power::Running, Power::Paused] {
                let choice = choose(power, wish, &facts);
                assert_eq!(choice.kind, kind, "{wish:?} {facts:?}");
                assert!(choice.reason.contains(word), "{wish:?} {facts:?}: {}", choice.reason);
            }
            assert_eq!(choose(Power::Off, wish, &facts).kind, Off, "{wish:?} {facts:?}");
        }
    }

    #[test]
    fn a_commit_that_failed_counts_until_one_by_overlay_succeeds() {
        let of = |capture, outcome| {
            let sealed = outcome != RunOutcome::Failed;
            Report { capture, outcome, ..report(sealed) }
        };
        let overlay = Some(CaptureKind::Overlay);
        let pending = of(overlay, RunOutcome::CommitPending);
        assert_eq!(unfinished(&[]), None);
        assert_eq!(unfinished(&[of(overlay, RunOutcome::Sealed)]), None);
        assert!(unfinished(std::slice::from_ref(&pending)).is_some());
        assert!(unfinished(&[of(None, RunOutcome::CommitPending)]).is_some(), "a report from before the choice");
        // Neither a run by backup nor one that made no point says anything about commits.
        let backup = of(Some(CaptureKind::Backup), RunOutcome::Sealed);
        let failed = of(overlay, RunOutcome::Failed);
        assert!(unfinished(&[pending.clone(), backup, failed]).is_some());
        assert_eq!(unfinished(&[pending, of(overlay, RunOutcome::Sealed)]), None);
    }

    #[test]
    fn a_wish_is_one_of_three_words() {
        for (text, wish) in
            [("overlay", CaptureWish::Overlay), ("backup", CaptureWish::Backup), ("auto", CaptureWish::Auto)]
        {
            assert_eq!(text.parse(), Ok(wish));
        }
        assert!("snapshot".parse::<CaptureWish>().unwrap_err().contains("overlay, backup or auto"));
    }
}
