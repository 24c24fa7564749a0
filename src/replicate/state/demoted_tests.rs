//! Which runs go over a domain that is being handed away, and what is said to the others.

use super::*;
use crate::error::advice::Handover;

pub(crate) fn record(stage: Stage, asked: bool) -> HandoverRecord {
    HandoverRecord {
        format: 1,
        handover: RunId::from_bits(7),
        domain: DomainName::new("web01").unwrap(),
        uuid: DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap(),
        to: "ssh://b".into(),
        since: Timestamp::UNIX_EPOCH,
        stage,
        ran: true,
        autostart: true,
        disk_format: DiskFormat::Qcow2,
        asked,
        commit: false,
        down_from: None,
        off_at: None,
        point: None,
        last_run_bytes: 0,
        sent_at: None,
        up_at: None,
    }
}

#[test]
fn only_its_own_last_run_goes_over_a_domain_that_is_being_handed() {
    use Stage::*;
    let own = RunId::from_bits(7);
    for (stage, asked) in
        [(Begun, false), (Secured, false), (Off, false), (Sent, false), (Asked, true), (Aborting, true), (Undone, true)]
    {
        let record = record(stage, asked);
        for target in ["ssh://b", "ssh://c"] {
            let e = may_run(Some(record.clone()), Power::Off, target, None).unwrap_err();
            assert_eq!(e.kind(), Kind::Conflict, "{stage:?}");
            let (domain, to) = ("web01".to_owned(), "ssh://b".to_owned());
            let next = match stage {
                Asked => Handover::AskAgain { domain, to },
                Aborting | Undone => Handover::Abort { domain, to },
                _ => Handover::GoOnOrAbort { domain, to },
            };
            assert_eq!(e.advice(), Some(&next.into()), "{stage:?}: {e}");
            let other = RunId::from_bits(8);
            assert!(may_run(Some(record.clone()), Power::Off, target, Some(&other)).is_err());
        }
        assert_eq!(may_run(Some(record), Power::Off, "ssh://b", Some(&own)).is_ok(), !asked, "{stage:?}");
    }
    assert_eq!(may_run(None, Power::Running, "ssh://b", None).unwrap(), None);
}

/// Only the target that has it can say that it has it no more.
#[test]
fn a_moved_domain_is_asked_for_at_its_own_target() {
    let moved = record(Stage::Moved, true);
    assert_eq!(may_run(Some(moved.clone()), Power::Off, "ssh://b", None).unwrap(), Some(moved.clone()));
    let e = may_run(Some(moved), Power::Off, "ssh://c", None).unwrap_err();
    assert!(e.what().contains("lives on ssh://b"), "{e}");
}

#[test]
fn a_guest_that_runs_here_is_an_alarm_from_the_moment_the_target_was_asked() {
    use Stage::*;
    for (stage, asked, wrong) in [
        (Begun, false, false),
        (Secured, false, false),
        (Sent, false, false),
        (Asked, true, true),
        (Moved, true, true),
        (Aborting, true, true),
        (Aborting, false, false),
        (Undone, true, false),
    ] {
        let record = record(stage, asked);
        for power in [Power::Running, Power::Paused] {
            assert_eq!(record.alarm(power).is_some(), wrong, "{stage:?}");
        }
        assert_eq!(record.alarm(Power::Off), None);
        let e = record.refusal(Power::Running);
        assert_eq!(e.what().contains("RUNS ON BOTH SIDES"), wrong, "{e}");
    }
}

#[test]
fn a_record_is_there_until_the_domain_is_back_and_one_hand_is_on_it() {
    let dir = tempfile::tempdir().unwrap();
    let written = record(Stage::Asked, true);
    let held = HandoverState::open(dir.path(), &written.uuid).unwrap();
    assert_eq!(HandoverState::open(dir.path(), &written.uuid).err().unwrap().kind(), Kind::Busy);
    held.write(&written).unwrap();
    assert_eq!(peek(dir.path(), &written.uuid).unwrap(), Some(written.clone()));
    assert_eq!(all(dir.path()).unwrap(), std::slice::from_ref(&written));
    held.close().unwrap();
    held.close().unwrap();
    assert_eq!(all(dir.path()).unwrap(), []);
    held.write(&HandoverRecord { format: 2, ..written.clone() }).unwrap();
    assert_eq!(peek(dir.path(), &written.uuid).unwrap_err().kind(), Kind::Protocol);
}

#[test]
fn a_domain_that_has_come_home_is_nobody_elses_and_one_on_its_way_is() {
    let dir = tempfile::tempdir().unwrap();
    for (stage, forgotten) in [(Stage::Asked, false), (Stage::Sent, false), (Stage::Moved, true)] {
        let written = record(stage, true);
        HandoverState::open(dir.path(), &written.uuid).unwrap().write(&written).unwrap();
        has_come_home(dir.path(), &written.uuid).unwrap();
        assert_eq!(peek(dir.path(), &written.uuid).unwrap().is_none(), forgotten, "{stage:?}");
    }
}
