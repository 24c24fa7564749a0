//! Whose pause it is, and whether it may be ended.

use super::*;
use crate::hypervisor::Power;
use crate::name::DomainName;
use jiff::Timestamp;

fn uuid() -> DomainUuid {
    DomainUuid::new("6695eb01-f6a4-8304-79aa-97f2502e193f").unwrap()
}

/// A running or paused domain without disks.
fn domain(paused: Option<PauseReason>, id: Option<u32>) -> DomainView {
    let power = match (paused, id) {
        (_, None) => Power::Off,
        (Some(_), _) => Power::Paused,
        (None, _) => Power::Running,
    };
    DomainView {
        name: DomainName::new("db01").unwrap(),
        uuid: uuid(),
        id,
        power,
        paused,
        ended: crate::hypervisor::Ended::Unknown,
        persistent: true,
        managed_save: false,
        domain_job: None,
        disks: Vec::new(),
        record: None,
        nvram: None,
        tpm: None,
        guest_agent: false,
    }
}

fn record(instance: Option<u32>) -> StoppedRecord {
    StoppedRecord { run: RunId::from_bits(7), instance, boot: Some("this".into()) }
}

fn place(free_bytes: Option<u64>) -> Place {
    Place { disk: DiskName::new("vda").unwrap(), path: "/pool/a.qcow2".into(), free_bytes }
}

#[test]
fn only_an_io_error_after_our_freeze_is_ours() {
    let io = Some(PauseReason::IoError);
    for (ran, instance, boot, seen, expected) in [
        (true, Some(3), Some("this"), domain(io, Some(3)), true),
        (true, Some(3), None, domain(io, Some(3)), true),
        // It stood before its disks were frozen.
        (false, Some(3), Some("this"), domain(io, Some(3)), false),
        // An operator's pause is an operator's.
        (true, Some(3), Some("this"), domain(Some(PauseReason::Asked), Some(3)), false),
        (true, Some(3), Some("this"), domain(Some(PauseReason::Other), Some(3)), false),
        (true, Some(3), Some("this"), domain(None, Some(3)), false),
        // Another start, another boot, no QEMU at all.
        (true, Some(3), Some("this"), domain(io, Some(4)), false),
        (true, Some(3), Some("earlier"), domain(io, Some(3)), false),
        (true, None, Some("this"), domain(None, None), false),
    ] {
        assert_eq!(is_ours(ran, instance, boot, &seen, Some("this")), expected, "{ran} {instance:?} {boot:?} {seen:?}");
    }
}

#[test]
fn it_is_resumed_only_where_its_own_images_have_room() {
    let io = domain(Some(PauseReason::IoError), Some(3));
    let enough = place(Some(ROOM_MIN));
    let full = place(Some(ROOM_MIN - 1));
    let record = record(Some(3));
    let of = |seen: &DomainView, places: &[Place]| next(&record, seen, Some("this"), places);
    assert_eq!(of(&io, &[]), Next::Resume);
    // A block device, or an image that has all of its bytes, needs no room.
    assert_eq!(of(&io, &[place(None), enough.clone()]), Next::Resume);
    assert_eq!(of(&io, &[enough, full.clone()]), Next::Leave(full.clone()));
    // Resumed, or paused by an operator meanwhile: no longer ours.
    assert_eq!(of(&domain(None, Some(3)), std::slice::from_ref(&full)), Next::Forget);
    assert_eq!(of(&domain(Some(PauseReason::Asked), Some(3)), &[]), Next::Forget);
    let said = no_room(&full);
    assert!(said.contains("63 MiB are free") && said.contains("/pool/a.qcow2") && said.contains("64 MiB"), "{said}");
}

#[test]
fn what_is_owed_is_kept_once_and_survives() {
    let state = tempfile::tempdir().unwrap();
    let journal = Journal::open(state.path(), &uuid(), "test", Timestamp::UNIX_EPOCH).unwrap();
    let io = domain(Some(PauseReason::IoError), Some(3));
    let run = RunId::from_bits(7);
    assert!(!owe(&journal, &run, false, Some(3), &io).unwrap());
    assert_eq!(journal.stopped().unwrap(), None);
    assert!(owe(&journal, &run, true, Some(3), &io).unwrap());
    let first = journal.stopped().unwrap().unwrap();
    // A later run that finds it still standing does not make it its own.
    assert!(owe(&journal, &RunId::from_bits(8), true, Some(3), &io).unwrap());
    assert_eq!(journal.stopped().unwrap(), Some(first));
    journal.resume_is_paid().unwrap();
    journal.resume_is_paid().unwrap();
    assert_eq!(crate::replicate::state::journal::peek_stopped(state.path(), &uuid()).unwrap(), None);
}
