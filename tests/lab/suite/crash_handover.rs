//! kill -9 at every numbered step of a planned failover and of its calling off (docs/recovery.md). The same command
//! finishes what was begun, the other one puts it back, and at no time does the domain run on both sides.

use super::domain::{Disk, Domain};
use super::handover::{Traveller, message};
use super::support::{Host, Lab, Undo};
use std::os::unix::fs::PermissionsExt;

const BEFORE: [&str; 4] = ["h1", "h2", "h3", "h4"];
const AFTER: [&str; 3] = ["h5", "h6", "h7"];
const BACK: [&str; 5] = ["h8", "h9", "h10", "h11", "h12"];

/// What the agent does for h6 and h9, each step of which may be its last.
const AT_THE_TARGET: [&str; 7] = ["f1", "f2", "f3", "f4", "f5", "f6", "f7"];
const BACK_AT_THE_TARGET: [&str; 5] = ["f8", "f9", "f10", "f11", "f12"];

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

/// The agent of host b dies once behind a step that `arm` names: a program of the same name stands before it.
struct Mortal<'a> {
    lab: &'a Lab,
}

impl<'a> Mortal<'a> {
    const PROGRAM: &'static str = "/lab/bin/virt-replica";
    const ARMED: &'static str = "/tmp/vr-armed";

    fn agent(lab: &'a Lab) -> Mortal<'a> {
        let real = Host::B.file(format!("{}.real", Self::PROGRAM));
        std::fs::copy(Host::B.file(Self::PROGRAM), &real).unwrap();
        let script = format!(
            "#!/bin/sh\nreal=/usr/local/bin/virt-replica.real armed={}\n\
             [ -e $armed ] || exec $real \"$@\"\n\
             VIRT_REPLICA_FAILPOINT=$(cat $armed)=kill $real \"$@\"\ncode=$?\n\
             [ $code != 137 ] || rm $armed\nexit $code\n",
            Self::ARMED
        );
        let wrapper = real.with_extension("wrapper");
        std::fs::write(&wrapper, script).unwrap();
        std::fs::set_permissions(&wrapper, PermissionsExt::from_mode(0o755)).unwrap();
        let agent = Mortal { lab };
        lab.tool(&["bin", "b", wrapper.to_str().unwrap()]);
        agent
    }

    fn arm(&self, step: &str) {
        std::fs::write(Host::B.file(Self::ARMED), step).unwrap();
    }

    fn has_died(&self) -> bool {
        !Host::B.file(Self::ARMED).exists()
    }
}

impl Drop for Mortal<'_> {
    fn drop(&mut self) {
        let _undo = Undo(|| {
            let real = Host::B.file(format!("{}.real", Self::PROGRAM));
            self.lab.tool(&["bin", "b", real.to_str().unwrap()]);
            for gone in [real.with_extension("wrapper"), real, Host::B.file(Self::ARMED)] {
                let _ = std::fs::remove_file(gone);
            }
        });
    }
}

/// Whoever asked it is told nothing when the agent dies. To bring up, it is asked again at once: one command, and the
/// guest runs there, once. To call off, the command ends with an error, starts nothing here, and goes on when it is
/// repeated.
#[test]
fn an_agent_that_dies_at_each_step_of_bringing_up_or_calling_off_is_asked_again() {
    let lab = Lab::alone();
    let vm = lab.domain("crash-bringup").disk(Disk::qcow2("16M").then("write -P 0x11 1M 3M")).paused();
    vm.virsh(&["resume"]);
    vm.virsh(&["autostart"]);
    let t = Traveller::of(&vm);
    vm.sync().sealed();
    let agent = Mortal::agent(&lab);
    for (up, back) in AT_THE_TARGET.into_iter().zip(BACK_AT_THE_TARGET.into_iter().cycle()) {
        agent.arm(up);
        let done = t.failover("", &OVER).success();
        assert!(agent.has_died(), "{up}: never came there");
        assert!(t.there.runs() && vm.state() == "shut off", "{up}");
        assert!(t.autostart(Host::B), "{up}");
        assert_eq!(message(&done, "handover")["point"], vm.head()["id"], "{up}");
        agent.arm(back);
        let broken_off = t.failover("", &ABORT);
        assert!(agent.has_died(), "{back}: never came there");
        assert!(broken_off.code != 0 && vm.state() == "shut off", "{back}: nobody knows yet that it is off there");
        t.failover("", &ABORT).success();
        Host::B.ok(&["test", "!", "-e", &t.there.overlays()]);
        is_home(&vm, &t, back);
    }
}
