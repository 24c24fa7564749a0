//! Who gives way to whom, and in which order: what a host had is a pinned point before its definition goes.

use super::*;
use crate::error::advice::Failover;
use crate::name::{DomainName, RunId};
use crate::recovery::record::Stage;
use jiff::Timestamp;
use std::cell::RefCell;
use std::path::PathBuf;

const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";

fn point() -> PointId {
    PointId::from_parts(1, &RunId::from_bits(7))
}

/// The memory of a guest is in no point, and libvirt removes it with the definition.
#[test]
fn a_saved_memory_is_not_thrown_away_with_the_definition() {
    let ports = Ports {
        power: &|| Ok(OFF),
        memory_saved: &|| Ok(true),
        run: &|| unreachable!("nothing is read"),
        pin: &|_, _| unreachable!("nothing is pinned"),
        undefine: &|| unreachable!("nothing is removed"),
        say: &|_| {},
    };
    let e = run(&ports, &DomainUuid::new(UUID).unwrap(), None).unwrap_err();
    assert!(e.kind() == Kind::Conflict && e.hint_text().unwrap().contains("managedsave-remove"), "{e}");
}

/// What was done, in order; `powers`: the answers to how it stands, one after the other.
fn give_way(powers: &[Option<Power>], stage: Option<Stage>) -> (Result<GaveWay>, Vec<&'static str>) {
    let (done, powers) = (RefCell::new(Vec::new()), RefCell::new(powers.to_vec()));
    let ports = Ports {
        power: &|| Ok(powers.borrow_mut().remove(0)),
        memory_saved: &|| Ok(false),
        run: &|| {
            done.borrow_mut().push("run");
            Ok(point())
        },
        pin: &|pinned, reason| {
            assert!(*pinned == point() && reason.contains("unpin"));
            done.borrow_mut().push("pin");
            Ok(())
        },
        undefine: &|| {
            done.borrow_mut().push("undefine");
            Ok(())
        },
        say: &|_| {},
    };
    let uuid = DomainUuid::new(UUID).unwrap();
    let record = stage.map(|stage| FailoverRecord {
        format: 1,
        domain: DomainName::new("web01").unwrap(),
        uuid: uuid.clone(),
        point: point(),
        frozen_at: Timestamp::UNIX_EPOCH,
        dir: PathBuf::from("/images"),
        stage,
        started_at: Timestamp::UNIX_EPOCH,
        detached: Vec::new(),
        detaching_in: None,
        tpm: false,
        raw: Vec::new(),
        moving: None,
        wanted: Default::default(),
    });
    let given = run(&ports, &uuid, record.as_ref());
    (given, done.into_inner())
}

const OFF: Option<Power> = Some(Power::Off);

#[test]
fn the_point_is_sealed_and_pinned_before_the_definition_goes() {
    let (given, done) = give_way(&[OFF, OFF], None);
    assert_eq!((given.unwrap().point, done), (Some(point()), vec!["run", "pin", "undefine"]));
}

#[test]
fn who_has_nothing_has_nothing_to_give_way_and_who_runs_does_not() {
    let (given, done) = give_way(&[None], None);
    assert_eq!((given.unwrap().point, done), (None, vec![]));
    for power in [Power::Running, Power::Paused] {
        let (given, done) = give_way(&[Some(power)], None);
        assert_eq!((given.unwrap_err().kind(), done), (Kind::Conflict, vec![]));
        // Somebody starts it while it is read.
        let (given, done) = give_way(&[OFF, Some(power)], None);
        assert_eq!((given.unwrap_err().kind(), done), (Kind::Conflict, vec!["run", "pin"]));
    }
}

#[test]
fn a_domain_that_reads_this_very_store_is_given_images_of_its_own_first() {
    for (stage, advice) in [
        (Stage::Committed, Failover::DetachFirst.into()),
        (Stage::Running, Advice::from("undo or commit that failover first")),
    ] {
        let (given, done) = give_way(&[OFF], Some(stage));
        let e = given.unwrap_err();
        assert!(e.kind() == Kind::Refused && e.advice() == Some(&advice), "{e}");
        assert!(done.is_empty());
    }
}
