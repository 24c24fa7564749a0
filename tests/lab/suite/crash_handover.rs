//! kill -9 at every numbered step of a planned failover and of its calling off (docs/recovery.md). The same command finishes what
//! was begun, the other one puts it back, and at no time does the domain run on both sides.

use super::domain::{Disk, Domain};
use super::handover::{Traveller, message};
use super::support::{Host, Lab};

const BEFORE: [&str; 4] = ["h1", "h2", "h3", "h4"];
const AFTER: [&str; 3] = ["h5", "h6", "h7"];
const BACK: [&str; 5] = ["h8", "h9", "h10", "h11", "h12"];

/// The guest has no operating system: it hears no button.
const OVER: [&str; 3] = ["--timeout", "1s", "--force-off"];
const ABORT: [&str; 2] = ["--abort", "--lose-its-writes"];

#[track_caller]
fn never_both(vm: &Domain, t: &Traveller, step: &str) {
    let here = vm.state();
    assert!(!(t.there.runs() && here != "shut off"), "{step}: it runs on b, and here it is {here}");
}

/// Whatever it was, it runs here again, and replicates.
#[track_caller]
fn is_home(vm: &Domain, t: &Traveller, step: &str) {
    assert!(!t.there.runs(), "{step}");
    assert!(vm.state() == "running" && t.autostart(Host::A), "{step}: {}", vm.state());
    assert!(!vm.virsh(&["dumpxml"]).contains("do not start it here"), "{step}");
    vm.sync().sealed();
}

#[test]
fn a_handover_killed_at_each_step_is_finished_by_the_same_command_or_put_back() {
    let lab = Lab::get();
    let vm = lab.domain("crash-handover").disk(Disk::qcow2("16M").then("write -P 0x11 1M 3M")).paused();
    vm.virsh(&["resume"]);
    vm.virsh(&["autostart"]);
    let t = Traveller::of(&vm);
    vm.sync().sealed();
    for (at, step) in BEFORE.iter().chain(&AFTER).enumerate() {
        t.failover(&format!("{step}=kill"), &OVER).exit(137);
        never_both(&vm, &t, step);
        let told = if *step == "h7" { 0 } else { 1 };
        Host::A.virt_replica(&["doctor", &vm.name]).exit(told).says(&["handover", "--to"].map(|w| match *step {
            "h7" => "lives on",
            "h5" | "h6" if w == "handover" => "may run on",
            _ => w,
        }));
        vm.sync_with("", &[]).failed(1);
        // What is written between the two is not lost either: it is written by a domain that was started in the middle.
        if at == 3 {
            vm.start_paused();
            vm.qemu_io(0, "write -P 0x55 4M 1M");
        }
        let done = t.failover("", &OVER).success();
        assert!(t.there.runs() && vm.state() == "shut off", "{step}");
        let point = vm.head();
        assert_eq!(message(&done, "handover")["point"], point["id"], "{step}");
        if at == 3 {
            let image = super::domain::image_of(&point, "vda");
            Host::B.ok(&["qemu-io", "-U", "-r", "-f", "qcow2", "-c", "read -P 0x55 4M 1M", &image]);
        }
        t.failover("", &ABORT).success();
        is_home(&vm, &t, step);
    }
    for step in BEFORE.iter().chain(&AFTER) {
        t.failover(&format!("{step}=kill"), &OVER).exit(137);
        t.failover("", &ABORT).success();
        is_home(&vm, &t, step);
    }
}

#[test]
fn a_handover_killed_before_the_target_was_asked_is_put_back_by_doctor() {
    let lab = Lab::get();
    let vm = lab.domain("crash-handover-doctor").disk(Disk::qcow2("16M").then("write -P 0x11 1M 3M")).paused();
    vm.virsh(&["resume"]);
    vm.virsh(&["autostart"]);
    let t = Traveller::of(&vm);
    vm.sync().sealed();
    for step in BEFORE {
        t.failover(&format!("{step}=kill"), &OVER).exit(137);
        Host::A.virt_replica(&["doctor", &vm.name, "--repair"]).success().says(&["is back as it was"]);
        is_home(&vm, &t, step);
    }
    // The target was asked: doctor does not guess.
    t.failover("h5=kill", &OVER).exit(137);
    Host::A.virt_replica(&["doctor", &vm.name, "--repair"]).exit(1).says(&["may run on"]);
    assert_eq!(vm.state(), "shut off");
    t.failover("", &["--abort"]).success();
    is_home(&vm, &t, "h5");
}

#[test]
fn calling_off_killed_at_each_step_is_finished_by_the_same_command() {
    let lab = Lab::get();
    let vm = lab.domain("crash-handover-back").disk(Disk::qcow2("16M").then("write -P 0x11 1M 3M")).paused();
    vm.virsh(&["resume"]);
    vm.virsh(&["autostart"]);
    let t = Traveller::of(&vm);
    for step in BACK {
        t.failover("", &OVER).success();
        t.failover(&format!("{step}=kill"), &ABORT).exit(137);
        never_both(&vm, &t, step);
        match step {
            "h12" => drop(t.failover("", &ABORT).exit(4)),
            _ => {
                t.failover("", &OVER).exit(1).says(&["being called off"]);
                t.failover("", &ABORT).success();
            }
        }
        is_home(&vm, &t, step);
    }
}
