//! libvirtd, QEMU, or everything at once dies, at the worst moments; and the reversion that the order of step 7
//! prevents.
//!
//! "Everything at once" is what a power cut leaves, short of lost caches: dead-man, driver, QEMU and libvirtd get
//! SIGKILL in one go. Whoever then starts the domain without asking us must find every flushed write, or no disk at
//! all.

use crate::crash_bench::{Driver, Lab, wait_for};
use crate::crash_machine::Machine;
use std::thread::sleep;
use std::time::Duration;

/// Points at which everything dies, and how many overlays the recovery may set aside for a person there.
const POINTS: [(&str, usize); 14] = [
    ("4d", 0),
    ("4e", 0),
    ("5b", 0),
    ("6f", 0),
    ("7a", 0),
    ("7b", 0),
    ("7d", 0),
    ("7e", 0),
    // Pivoted and saved by libvirt, its overlay's name still there: what made it stale was not seen by us.
    ("7f", 1),
    // Both disks are pivoted before the first overlay loses its name.
    ("7g", 2),
    ("7h", 0),
    ("7i", 0),
    ("7j", 0),
    ("7n", 0),
];

/// The vCPUs run at these after the pivot, so the guest writes once more before everything dies.
const AFTER_THE_RESUME: [&str; 3] = ["7i", "7j", "7n"];

#[test]
fn everything_dies_and_the_domain_is_started_first() {
    everything_dies(true);
}

#[test]
fn everything_dies_and_doctor_comes_first() {
    everything_dies(false);
}

fn everything_dies(start_first: bool) {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "cut");
    for (point, kept) in POINTS {
        let why = format!("everything died at {point}, {} first", if start_first { "started" } else { "mended" });
        eprintln!("{why}");
        let mut driver = machine.spawn_sync(&format!("4f=sleep:700,{point}=sleep:60000"));
        if !["4d", "4e"].contains(&point) {
            machine.write_to_overlays(&mut driver);
        }
        driver.stands_at(point);
        if AFTER_THE_RESUME.contains(&point) || point.starts_with('4') {
            machine.write();
        }
        cut(&machine, driver);
        recover(&mut machine, start_first, kept, &why);
    }
}

/// Everything dies; then libvirtd starts, as after a boot.
fn cut(machine: &Machine, driver: Driver) {
    machine.kill_everything(driver);
    machine.lab.lab(&["libvirtd", "a", "start"]);
    machine.wait_off();
}

/// Started first: every flushed write is there or the start fails. Then, or at once, `doctor --repair`.
fn recover(machine: &mut Machine, start_first: bool, kept: usize, why: &str) {
    let started = start_first && machine.try_virsh("start", &[]).status.success();
    if started {
        machine.check_live(&format!("{why}: before any repair"));
        machine.write();
    }
    machine.doctor("", true).ok(why);
    assert_eq!(machine.take_kept(), kept, "{why}: overlays set aside");
    machine.check_settled(why);
    if !started {
        machine.virsh("start", &[]);
        machine.check_live(why);
    }
    machine.check_next_sync(why);
    machine.check_settled(why);
}

/// A job that libvirt calls ready while a part of what the guest flushed is in the overlay only: READY is not equal.
#[test]
fn everything_dies_while_ready_is_not_equal() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "dirty");
    for start_first in [true, false] {
        let why = format!("everything died while ready was not equal, started first: {start_first}");
        let mut driver = machine.spawn_sync("4f=sleep:700,7b=sleep:60000");
        machine.write_to_overlays(&mut driver);
        driver.stands_at("7b");
        wait_for("the commit of vda is ready", || machine.virsh("dumpxml", &[]).contains("ready='yes'").then_some(()));
        // From here on the job copies 64 KiB in many seconds, and calls itself ready all the while.
        machine.virsh("blockjob", &["vda", "--bandwidth", "4096", "--bytes"]);
        machine.fill(0, 8);
        machine.write();
        assert!(machine.virsh("dumpxml", &[]).contains("ready='yes'"), "{why}: still calls itself ready");
        cut(&machine, driver);
        recover(&mut machine, start_first, 0, &why);
    }
}

/// QEMU alone dies, or is destroyed in order; the driver lives and copes, or a later `doctor` does.
#[test]
fn qemu_dies_under_the_driver() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "qemu");
    for (point, kept) in [("5b", 0), ("7b", 0), ("7e", 0), ("7f", 1), ("7h", 0)] {
        for by in ["kill", "destroy"] {
            let why = format!("QEMU ended by {by} at {point}");
            eprintln!("{why}");
            let mut driver = machine.spawn_sync(&format!("4f=sleep:700,{point}=sleep:2000"));
            machine.write_to_overlays(&mut driver);
            driver.stands_at(point);
            match by {
                "kill" => machine.kill_qemu(),
                _ => drop(machine.virsh("destroy", &[])),
            }
            let ended = driver.wait();
            machine.doctor("", true).ok(&format!("{why}: after {ended:#?}"));
            assert!(machine.take_kept() <= kept, "{why}: an overlay was set aside");
            machine.check_settled(&why);
            machine.virsh("start", &[]);
            machine.check_next_sync(&why);
            machine.check_settled(&why);
        }
    }
}

/// libvirtd dies beneath the driver and is back at once, or after two seconds.
#[test]
fn libvirtd_killed() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "lvd");
    for point in ["4c", "5b", "7b", "7e", "7f", "7h", "7j"] {
        for back_after in [0, 2000] {
            let why = format!("libvirtd killed at {point}, back after {back_after} ms");
            eprintln!("{why}");
            let (points, _) = machine.points();
            let sealed = machine.sealed.clone();
            machine.write();
            let frozen = machine.model.clone();
            let mut driver = machine.spawn_sync(&format!("4f=sleep:700,{point}=sleep:1000"));
            if point != "4c" {
                machine.write_to_overlays(&mut driver);
            }
            driver.stands_at(point);
            lab.lab(&["libvirtd", "a", "kill9"]);
            sleep(Duration::from_millis(back_after));
            lab.lab(&["libvirtd", "a", "start"]);
            let back = std::time::Instant::now();
            let ended = driver.wait();
            // While libvirtd is away nobody can let the guest go; the bound runs from its return.
            machine.check_let_go(back.max(ended.at), &why);
            machine.write();
            machine.check_live(&why);
            machine.check_head(&points, &sealed, &frozen, &why);
            machine.doctor("", true).ok(&format!("{why}: after {ended:#?}"));
            machine.check_settled(&why);
            machine.check_next_sync(&why);
        }
    }
}

/// libvirtd dies inside the freeze call itself: as soon as the first overlay's file is there.
#[test]
fn libvirtd_killed_inside_the_freeze() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "lvf");
    for delay_ms in [0, 5, 10, 20, 30, 40, 60, 80] {
        let why = format!("libvirtd killed {delay_ms} ms after the first overlay's file appeared");
        eprintln!("{why}");
        let polls = format!("/run/{}-polls", machine.name);
        let killer = format!(
            "touch {polls}; until compgen -G '/var/lib/libvirt/images/{}-*.vr-*.qcow2' >/dev/null; do \
             ((SECONDS < 30)) || exit 1; done; sleep {}; kill -9 $(cat /run/libvirtd.pid); rm {polls}",
            machine.name,
            f64::from(delay_ms) / 1e3,
        );
        let mut killer = machine.start_script(&killer);
        wait_for("the killer to look", || lab.try_exec("a", &["test", "-e", &polls]).status.success().then_some(()));
        // Overlays that are gone again between two looks would be waited for in vain, so the run keeps them for a
        // moment.
        let driver = machine.spawn_sync("5a=sleep:1000");
        killer.wait_end();
        lab.lab(&["libvirtd", "a", "kill9"]);
        lab.lab(&["libvirtd", "a", "start"]);
        let ended = driver.wait();
        machine.write();
        machine.check_live(&why);
        let mended = machine.doctor("", true);
        if mended.says("has lost track") {
            end_where_libvirt_lost_track(&mut machine, &why);
        } else {
            mended.ok(&format!("{why}: after {ended:#?}"));
        }
        machine.check_settled(&why);
        machine.check_next_sync(&why);
    }
}

/// A moment inside the freeze that no clock hits at will: QEMU has opened the overlay's file, libvirtd died before it
/// noted the node's number. It counts on from its notes, and would give the next overlay the name of that node.
#[test]
fn libvirtd_dies_with_the_overlay_half_opened() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "half");
    for disks in [1, 2] {
        let why = format!("libvirtd died with the files of {disks} overlays open");
        let mut driver = machine.spawn_sync("4c=sleep:60000");
        driver.stands_at("4c");
        let record: serde_json::Value = serde_json::from_str(&machine.record().unwrap()).unwrap();
        machine.kill_all_but_qemu(driver);
        let next = machine.node_index_noted() + 1;
        let mut qmp = machine.qmp();
        for (at, disk) in record["disks"].as_array().unwrap().iter().take(disks).enumerate() {
            let overlay = disk["overlay"].as_str().unwrap();
            lab.exec("a", &["install", "-o", "libvirt-qemu", "-m", "600", "/dev/null", overlay]);
            qmp.open_as_libvirt(overlay, next + at as u64);
        }
        drop(qmp);
        lab.lab(&["libvirtd", "a", "start"]);
        machine.write();
        machine.doctor("", true).ok(&why);
        machine.check_settled(&why);
        machine.check_next_sync(&why);
    }
}

/// The moment inside the freeze that no clock hits at will: QEMU has switched to the overlays, libvirtd died before it
/// noted that. It believes in the bases, and a restart would boot them.
#[test]
fn libvirtd_loses_track_of_the_freeze() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "track");
    for started_first in [true, false] {
        let why = format!("libvirt lost track of the freeze, started first: {started_first}");
        eprintln!("{why}");
        let mut driver = machine.spawn_sync("4c=sleep:60000");
        driver.stands_at("4c");
        let record: serde_json::Value = serde_json::from_str(&machine.record().unwrap()).unwrap();
        machine.kill_all_but_qemu(driver);
        let mut qmp = machine.qmp();
        for disk in record["disks"].as_array().unwrap() {
            let [overlay, base, format] =
                [&disk["overlay"], &disk["base"]["path"], &disk["base"]["format"]].map(|v| v.as_str().unwrap());
            lab.exec("a", &["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", format, overlay]);
            qmp.freeze_onto(base, overlay);
        }
        drop(qmp);
        lab.lab(&["libvirtd", "a", "start"]);
        assert!(machine.images(false).values().all(|i| !i.contains(".vr-")), "{why}: libvirt knows: no test of it");
        machine.write();
        for again in [false, true] {
            let found = machine.doctor("", true);
            assert!(found.code() == Some(1) && found.says("has lost track"), "{why}, again {again}: {found:#?}");
            machine.write();
        }
        if started_first {
            machine.kill_qemu();
            machine.virsh("start", &[]);
            machine.check_live(&format!("{why}: before any repair"));
            machine.doctor("", true).ok(&why);
        } else {
            end_where_libvirt_lost_track(&mut machine, &why);
        }
        machine.check_settled(&why);
        machine.check_next_sync(&why);
    }
}

/// What `doctor` advises: shut the domain down, then repair.
fn end_where_libvirt_lost_track(machine: &mut Machine, why: &str) {
    machine.write();
    machine.virsh("destroy", &[]);
    machine.doctor("", true).ok(why);
    machine.check_settled(why);
    machine.virsh("start", &[]);
}

/// The control: with the guest running over the pivot, the same faults give it its old data back. If this stops failing
/// the way it does, the tests beside it prove nothing any more.
#[test]
fn reversion_without_our_order() {
    let lab = Lab::up();
    let mut machine = Machine::running(&lab, "rev");
    machine.write();
    let name = machine.name.clone();
    let overlay = |disk: &str| format!("/var/lib/libvirt/images/{name}-{disk}.by-hand.qcow2");
    machine.virsh(
        "snapshot-create-as",
        &[
            "--disk-only",
            "--atomic",
            "--no-metadata",
            "--diskspec",
            &format!("vda,file={}", overlay("vda")),
            "--diskspec",
            "vdb,snapshot=no",
        ],
    );
    machine.write();
    machine.virsh("blockcommit", &["vda", "--active", "--shallow", "--wait"]);
    let old = machine.model.clone();
    lab.lab(&["libvirtd", "a", "kill9"]);
    let mut qmp = machine.qmp();
    qmp.pivot_all();
    // The guest was never stopped: it writes to the base, and flushes.
    machine.write_by(&mut qmp);
    machine.kill9(&[qmp.qemu_pid.clone()]);
    drop(qmp);
    lab.lab(&["libvirtd", "a", "start"]);
    machine.wait_off();
    assert_eq!(machine.images(true)["vda"], overlay("vda"), "libvirt's definition still names the overlay");
    machine.virsh("start", &[]);
    assert!(machine.lost(0), "the flushed write survived: this control has lost its teeth");
    // It is the old content, not rubbish.
    machine.model.retain(|(disk, _), _| *disk == 1);
    machine.model.extend(old.into_iter().filter(|((disk, _), _)| *disk == 0));
    machine.check_live("the old content");
}

/// The same faults with our order: libvirtd dies before it has seen the pivot, QEMU dies, and the domain is started by
/// somebody who asks nobody. The vCPUs stood still, so there was no newer write to lose.
#[test]
fn no_reversion_with_our_order() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "norev");
    for (start_first, libvirtd_returns) in [(true, false), (false, false), (true, true), (false, true)] {
        let why = format!("pivot unseen by libvirt, started first: {start_first}, libvirtd back: {libvirtd_returns}");
        eprintln!("{why}");
        // Where libvirtd returns the driver has to go on before its dead-man ends it, 5 s after it was armed.
        let pause_ms = if libvirtd_returns { 3500 } else { 60_000 };
        let mut driver = machine.spawn_sync(&format!("4f=sleep:700,7e=sleep:{pause_ms},7i=sleep:60000"));
        machine.write_to_overlays(&mut driver);
        driver.stands_at("7e");
        let mut driver = Some(driver);
        match libvirtd_returns {
            true => drop(lab.lab(&["libvirtd", "a", "kill9"])),
            false => machine.kill_all_but_qemu(driver.take().unwrap()),
        }
        let mut qmp = machine.qmp();
        qmp.pivot_all();
        assert!(!qmp.running(), "{why}: the guest runs while nothing is retired");
        if let Some(mut driver) = driver {
            // The driver sees what has happened, retires, resumes; the guest goes on writing; then everything dies.
            drop(qmp);
            lab.lab(&["libvirtd", "a", "start"]);
            driver.stands_at("7i");
            assert_eq!(machine.named_overlays(), [""; 0], "{why}: names are left although the guest runs");
            machine.write();
            cut(&machine, driver);
        } else {
            machine.kill9(&[qmp.qemu_pid.clone()]);
            drop(qmp);
            lab.lab(&["libvirtd", "a", "start"]);
            machine.wait_off();
        }
        recover(&mut machine, start_first, 0, &why);
    }
}
