//! The guest agent holds the guest's file systems around the freeze: what a point is then, what it is when the agent
//! does not play along, and who lets the guest go when the run dies in between.

use crate::domain::{Disk, Domain};
use crate::support::{Host, Lab, PATIENCE, SyncResult, eventually};
use std::time::{Duration, Instant};

/// A domain with a guest that writes, on two disks, and a guest agent in it.
fn with_agent(lab: &Lab, name: &str, how: &'static str) -> Domain {
    let disk = || Disk::ext4("24M", "qcow2");
    let vm = lab.domain(name).agent(how).disk(disk()).disk(disk()).running();
    eventually("the guest agent is connected", PATIENCE, || {
        vm.virsh(&["dumpxml"]).contains("state='connected'").then_some(())
    });
    if how == "hang" {
        eventually("the guest agent hangs", PATIENCE, || vm.console().contains("agent hangs").then_some(()));
    }
    vm
}

/// Whether the file system of a disk at the newest point has a journal to be replayed: it was being written.
fn needs_recovery(vm: &Domain, disk: &str) -> bool {
    let out = format!("{}/fs", vm.shared());
    let words = ["export", &vm.name, "--to", &vm.to, "--disk", disk, "--output", &out, "--force"];
    Host::A.virt_replica(&words).success();
    let head = Host::A.output(&["dumpe2fs", "-h", &out]);
    let features = head.lines().find(|l| l.starts_with("Filesystem features:")).expect("it is an ext4");
    features.contains("needs_recovery")
}

/// The control first: without the guest agent's help, the journal of a file system that is being written has to be
/// replayed.
#[test]
fn a_quiesced_point_is_what_a_clean_unmount_leaves() {
    let lab = Lab::get();
    let vm = with_agent(&lab, "quiet", "yes");
    vm.sync().sealed();
    assert_eq!(vm.head()["consistency"], "crash");
    assert!(needs_recovery(&vm, "vda"), "the control: nothing was being written");
    for (capture, wish) in [("overlay", "try"), ("overlay", "require"), ("backup", "try")] {
        let why = format!("by {capture}, {wish}");
        let acked = vm.acked();
        let run = vm.sync_with("", &["--capture", capture, "--quiesce", wish]).sealed();
        assert_eq!(run.report["consistency"], "file_system", "{why}: {:#}", run.report);
        let held = run.report["held_ms"].as_f64().expect("it was held");
        assert!(held > 0.0 && held < 10_000.0, "{why}: held for {held} ms");
        assert_eq!(run.report["warnings"].as_array().map(Vec::len), Some(0), "{why}: {:#}", run.report);
        vm.still_writes();
        let head = vm.head();
        assert_eq!((&head["consistency"], head.get("consistency_reason")), (&"file_system".into(), None), "{why}");
        for disk in ["vda", "vdb"] {
            assert!(!needs_recovery(&vm, disk), "{why}: {disk} is not as after an unmount");
        }
        assert!(vm.lines(&head, 1) >= acked, "{why}");
        vm.assert_home();
    }
    // What is not wished is not asked for.
    let run = vm.sync().sealed();
    assert_eq!((&run.report["consistency"], run.report.get("held_ms")), (&"crash".into(), None));
    // Of three in a row one is to be consistent: there is one, and then there is none any more.
    let third = ["--quiesce", "try", "--quiesce-every", "3"];
    let asked = |_| vm.sync_with("", &third).sealed().report["consistency"].clone();
    assert_eq!((0..3).map(asked).collect::<Vec<_>>(), ["crash", "file_system", "crash"]);
}

#[test]
fn a_hanging_guest_agent_costs_the_point_its_name_and_nothing_else() {
    let lab = Lab::get();
    let vm = with_agent(&lab, "mute", "hang");
    for capture in ["overlay", "backup"] {
        let started = Instant::now();
        let run = vm.sync_with("", &["--capture", capture, "--quiesce", "try"]).sealed();
        assert!(started.elapsed() < Duration::from_secs(40), "{capture}: {:?}", started.elapsed());
        assert_eq!(run.report["consistency"], "crash", "{:#}", run.report);
        let reason = run.report["consistency_reason"].as_str().expect("it says why");
        assert!(reason.contains("guest agent"), "{reason}");
        assert!(run.report["warnings"].to_string().contains("as after a power cut"), "{:#}", run.report);
        vm.still_writes();
        vm.assert_home();
    }
    let refused = vm.sync_with("", &["--quiesce", "require"]).failed(1);
    refused.says(&["could not be held", "--quiesce try"]);
    vm.still_writes();
    vm.assert_home();
    assert_eq!(vm.points().len(), 2);
}

/// What can be seen beforehand is in the plan.
#[test]
fn a_guest_without_an_agent_is_seen_in_the_plan() {
    let lab = Lab::get();
    let vm = lab.domain("agentless").disk(Disk::qcow2("16M")).running();
    let plan = |wish: &str| Host::A.virt_replica(&["plan", &vm.name, "--to", &vm.to, "--json", "--quiesce", wish]);
    let plan_of = |done: &crate::support::Done| -> serde_json::Value { serde_json::from_str(&done.stdout).unwrap() };
    let required = plan("require").exit(1);
    assert_eq!(plan_of(&required)["conflicts"][0]["conflict"], "cannot_quiesce", "{}", required.stdout);
    let tried = plan("try").success();
    assert!(plan_of(&tried)["notes"].to_string().contains("no guest agent is connected"), "{}", tried.stdout);
    let run = vm.sync_with("", &["--quiesce", "try"]).sealed();
    assert_eq!(run.report["consistency_reason"], "no guest agent is connected");
    vm.sync_with("", &["--quiesce", "require"]).failed(1).says(&["qemu-guest-agent"]);
    vm.assert_home();
}

/// Killed, or hanging, while the guest's file systems are held: the dead-man lets them go.
#[test]
fn a_run_that_dies_while_file_systems_are_held() {
    let lab = Lab::get();
    let vm = with_agent(&lab, "held", "yes");
    vm.sync().sealed();
    let quiesced = ["--quiesce", "require", "--freeze-budget", "6s"];
    for point in ["4c.held", "4d", "4d.thawed"] {
        for how in ["kill", "sleep:60000"] {
            let why = format!("{how} at {point}");
            eprintln!("{why}");
            let started = Instant::now();
            let ended = vm.start_sync(&format!("{point}={how}"), &quiesced).wait(PATIENCE);
            // Held since some moment after its start, and let go within the budget and what the thaw takes.
            let acked = vm.acked();
            eventually(&format!("{why}: the guest writes again"), Duration::from_secs(12), || {
                (vm.acked() > acked + 1).then_some(())
            });
            assert!(started.elapsed() < Duration::from_secs(30), "{why}: {:?}", started.elapsed());
            assert_ne!(ended.code, 0, "{why}: it was to be killed: {ended:#?}");
            Host::A.virt_replica(&["doctor", &vm.name, "--repair"]).success();
            vm.assert_home();
            let next = SyncResult::of(vm.start_sync("", &quiesced).wait(PATIENCE)).sealed();
            assert_eq!(next.report["consistency"], "file_system", "{why}: {:#}", next.report);
            next.incremental("vda");
            assert!(!needs_recovery(&vm, "vda"), "{why}");
        }
    }
}
