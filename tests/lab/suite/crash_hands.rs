//! Other hands on a domain that stands on our overlay: an operator, a script, a disk that is lost.
//!
//! Either the way back is still clear and is taken, or nothing is touched and it is said why.

use crate::crash_bench::{Lab, wait_for};
use crate::crash_machine::Machine;
use serde_json::Value;
use std::fs;
use std::path::Path;

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

/// Somebody's snapshot between our plan and our freeze, as a backup tool at the same hour makes it.
///
/// Mostly it is seen in the freeze. A moment later it cannot be: libvirt takes no condition. That is made by hand here:
/// a driver dies before its freeze, and its overlays are put over the stranger's.
#[test]
fn foreign_snapshot_before_our_freeze() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "race");
    let theirs = |machine: &Machine, name: &str| {
        machine.virsh("snapshot-create-as", &[name, "--disk-only", "--atomic", "--no-metadata"]);
    };
    let end_on = |machine: &Machine, name: &str, why: &str| {
        assert_eq!((machine.overlays(), machine.record()), (vec![], None), "{why}");
        for (disk, image) in machine.images(false).iter().chain(&machine.images(true)) {
            assert!(image.ends_with(&format!(".{name}")), "{why}: {disk} is on {image}");
        }
        machine.check_live(why);
    };

    let mut driver = machine.spawn_sync("4c=sleep:3000");
    driver.stands_at("4c");
    theirs(&machine, "seen");
    let ended = driver.wait();
    assert!(ended.code() == Some(11) && ended.says("chain changed while the run was planned"), "{ended:#?}");
    end_on(&machine, "seen", "seen in the freeze");

    for off in [false, true] {
        let why = format!("too late to be seen, off: {off}");
        let name = if off { "off" } else { "live" };
        let ended = machine.sync("4b=kill");
        assert!(ended.killed(), "{why}: {ended:#?}");
        let record: Value = serde_json::from_str(&machine.record().unwrap()).unwrap();
        theirs(&machine, name);
        machine.write();
        let mut words = vec!["ours".to_owned(), "--disk-only".into(), "--atomic".into(), "--no-metadata".into()];
        for disk in record["disks"].as_array().unwrap() {
            let [name, overlay] = [&disk["name"], &disk["overlay"]].map(|v| v.as_str().unwrap());
            words.extend(["--diskspec".to_owned(), format!("{name},file={overlay}")]);
        }
        machine.virsh("snapshot-create-as", &words.iter().map(String::as_str).collect::<Vec<_>>());
        machine.write();
        let found = machine.doctor("", false);
        assert!(found.code() == Some(1) && found.says("over somebody's snapshot"), "{why}: {found:#?}");
        if off {
            machine.kill_qemu();
            machine.doctor("", true).ok(&why);
            machine.virsh("start", &[]);
        } else {
            let ended = machine.sync("").ok(&why);
            assert!(ended.says("committed into the image below it"), "{why}: {ended:#?}");
        }
        end_on(&machine, name, &why);
        machine.check_next_sync(&why);
    }
}

/// Two disks that the domain loses with its QEMU, as hot-plugged ones are: nothing but our record names their images
/// then. One has been written to since the freeze, one has not. The domain goes on without either.
#[test]
fn a_hot_plugged_disk_goes_with_its_qemu() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "plug");
    let images = Path::new("/var/lib/libvirt/images");
    let plugged = [("vdc", "plug-c.qcow2"), ("vdd", "plug-d.qcow2")];
    for (disk, file) in plugged {
        let image = images.join(file).display().to_string();
        lab.exec("a", &["qemu-img", "create", "-q", "-f", "qcow2", &image, "32M"]);
        let how = ["--driver", "qemu", "--subdriver", "qcow2", "--targetbus", "virtio", "--config"];
        machine.virsh("attach-disk", &[&[image.as_str(), disk], how.as_slice()].concat());
    }
    // The lab's machine has no free slots to plug two disks into while it runs.
    machine.kill_qemu();
    machine.virsh("start", &[]);
    let mut driver = machine.spawn_sync("4f=sleep:700,5b=kill");
    driver.stands_at("4f");
    machine.write();
    for command in ["write -P 0x5d 0 64k", "flush"] {
        let hmp = format!("qemu-io -d /machine/peripheral/virtio-disk3/virtio-backend \"{command}\"");
        machine.virsh("qemu-monitor-command", &["--hmp", &hmp]);
    }
    let ended = driver.wait();
    assert!(ended.killed(), "{ended:#?}");
    assert_eq!(machine.named_overlays().len(), 4);
    for (disk, _) in plugged {
        machine.virsh("detach-disk", &[disk, "--config"]);
    }
    machine.kill_qemu();
    let repaired = machine.doctor("", true).ok("both disks are gone");
    assert!(repaired.says("unused overlay of vdc removed"), "{repaired:#?}");
    machine.check_settled("both disks are gone");
    let image = images.join("plug-d.qcow2").display().to_string();
    let read = lab.exec("a", &["qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0x5d 0 64k", &image]);
    assert!(read.contains("read 65536/65536") && !read.contains("failed"), "what was flushed there is gone: {read}");
    machine.virsh("start", &[]);
    machine.check_next_sync("both disks are gone");
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
            // The driver goes on, sees it, and marks each base as complete. A disk it had not come to yet would keep
            // its overlay for a person, and rightly so: nobody saw when its base became complete.
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
