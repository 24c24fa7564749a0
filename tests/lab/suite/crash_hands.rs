//! Other hands on a domain that stands on our overlay: an operator, a script, a disk that is lost.
//!
//! Either the way back is still clear and is taken, or nothing is touched and it is said why.

use crate::crash_bench::{Lab, wait_for};
use crate::crash_machine::Machine;
use std::fs;

/// Leaves the machine on its overlays, with a write in them, and nobody at work.
fn abandon_on_overlays(machine: &mut Machine) {
    let mut driver = machine.spawn_sync("4f=sleep:700,5b=kill");
    machine.write_to_overlays(&mut driver);
    let ended = driver.wait();
    assert!(ended.killed(), "{ended:#?}");
}

#[test]
fn transient_domain_ends_on_its_overlay() {
    let lab = Lab::up();
    let mut machine = Machine::transient(&lab, "tr");
    machine.write();
    machine.check_next_sync("transient");
    abandon_on_overlays(&mut machine);
    machine.kill_qemu();
    let found = machine.doctor("", false);
    assert!(found.code() == Some(1) && found.says("libvirt does not know the domain any more"), "{found:#?}");
    machine.doctor("", true).ok("transient and gone");
    assert_eq!((machine.overlays(), machine.record()), (vec![], None));
    machine.check_off("transient and gone");
    lab.exec("a", &["virsh", "-q", "create", "/lab/shared/tr.xml"]);
    machine.check_next_sync("transient and back");
}

#[test]
fn transient_domain_lives_on() {
    let lab = Lab::up();
    let mut machine = Machine::transient(&lab, "trl");
    machine.write();
    for point in ["4f", "7b", "7f", "7j"] {
        let mut driver = machine.spawn_sync(&format!("4f=sleep:700,{point}=kill"));
        machine.write_to_overlays(&mut driver);
        let ended = driver.wait();
        assert!(ended.killed(), "transient at {point}: {ended:#?}");
        machine.write();
        machine.doctor("", true).ok(point);
        assert_eq!((machine.overlays(), machine.record()), (vec![], None), "{point}");
        machine.check_live(point);
    }
    machine.check_next_sync("transient");
}

#[test]
fn state_directory_lost() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "lost");
    for (off, by_sync) in [(false, true), (false, false), (true, true), (true, false)] {
        let why = format!("journal lost, off: {off}, by sync: {by_sync}");
        abandon_on_overlays(&mut machine);
        machine.lose_state();
        if off {
            machine.kill_qemu();
        }
        assert!(machine.record_in_metadata(), "{why}");
        match by_sync {
            true => machine.check_next_sync(&why),
            false => drop(machine.doctor("", true).ok(&why)),
        }
        machine.check_settled(&why);
        if off {
            machine.virsh("start", &[]);
        }
        machine.check_next_sync(&why);
    }
}

/// The overlay was deleted before it was committed. What was in it is gone, and no machine may paper over that.
#[test]
fn overlay_deleted() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "del");
    abandon_on_overlays(&mut machine);
    machine.kill_qemu();
    for name in machine.overlays() {
        fs::remove_file(lab.path("a", "/var/lib/libvirt/images").join(name)).unwrap();
    }
    let traces = machine.traces();
    for repair in [false, true] {
        let found = machine.doctor("", repair);
        assert_eq!(found.code(), Some(1), "{found:#?}");
        assert!(found.says("a person has to look") && found.says("deleted"), "{found:#?}");
    }
    let refused = machine.sync("");
    assert!(refused.code() == Some(1) && refused.says("deleted"), "sync refuses as well: {refused:#?}");
    assert_eq!(machine.traces(), traces, "something was touched");
    assert!(!machine.try_virsh("start", &[]).status.success(), "a start fails closed");
}

/// Somebody's own snapshot above our overlay, in mid-ship: it is kept, ours is committed below it.
#[test]
fn foreign_snapshot_above_ours() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "snap");
    let mut driver = machine.spawn_sync("4f=sleep:700,5b=sleep:2500");
    machine.write_to_overlays(&mut driver);
    driver.stands_at("5b");
    machine.virsh("snapshot-create-as", &["user", "--disk-only", "--atomic"]);
    machine.write();
    let ended = driver.wait();
    assert!(ended.says("snapshot above our overlay"), "{ended:#?}");
    assert_eq!((machine.overlays(), machine.record()), (vec![], None));
    for inactive in [false, true] {
        for (disk, image) in machine.images(inactive) {
            assert!(image.ends_with(".user"), "{disk} is on {image}: the user's snapshot is gone");
        }
    }
    machine.check_live("with the user's snapshot");
    machine.check_next_sync("with the user's snapshot");
    machine.check_live("with the user's snapshot");
}

/// A saved memory image belongs to the disks with our overlay: nothing is touched until it was resumed.
#[test]
fn managed_save_on_the_overlay() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "save");
    abandon_on_overlays(&mut machine);
    machine.virsh("managedsave", &[]);
    let traces = machine.traces();
    for repair in [false, true] {
        let found = machine.doctor("", repair);
        assert_eq!(found.code(), Some(1), "{found:#?}");
        assert!(found.says("saved memory image") && found.says("virsh start"), "{found:#?}");
    }
    let refused = machine.sync("");
    assert!(refused.code() == Some(1) && refused.says("saved memory image"), "{refused:#?}");
    assert_eq!(machine.traces(), traces, "something was touched");
    machine.virsh("start", &[]);
    machine.check_live("resumed from the saved image");
    machine.doctor("", true).ok("resumed from the saved image");
    machine.check_settled("resumed from the saved image");
    machine.check_next_sync("resumed from the saved image");
}

/// `virsh resume` by an operator while we hold the pause and have pivoted: the base is complete and running on; the
/// overlay is never committed again, and an alarm says so.
#[test]
fn resumed_by_hand_while_pivoted() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "hand");
    for off in [false, true] {
        let why = format!("resumed by hand, then off: {off}");
        let mut driver = machine.spawn_sync("4f=sleep:700,7f=sleep:2500");
        machine.write_to_overlays(&mut driver);
        driver.stands_at("7f");
        machine.virsh("resume", &[]);
        machine.write();
        if off {
            // The driver goes on, sees it, and marks each base as complete. A disk it had not come to yet would keep its
            // overlay for a person, and rightly so: nobody saw when its base became complete.
            wait_for("the overlays are retired", || machine.named_overlays().is_empty().then_some(()));
            machine.kill_qemu();
        }
        let ended = driver.wait();
        assert!(ended.says("resumed or pivoted by another hand"), "{why}: {ended:#?}");
        machine.doctor("", true).ok(&why);
        machine.check_settled(&why);
        if off {
            machine.virsh("start", &[]);
            machine.check_live(&why);
        }
        machine.check_next_sync(&why);
    }
}
