//! A guest that QEMU stops while a run holds its disks: it is let go, whoever of us dies on the way.

use super::domain::Disk;
use super::support::{Host, Job, Lab, PATIENCE, Undo, eventually};

/// Somebody else fills the file system of the overlay, faster than any watch: QEMU stops the guest. The commit comes
/// first, then the guest goes on. A run that died in between leaves that to the next one, and nobody calls it sound.
#[test]
fn a_guest_whose_overlay_is_full_is_resumed_after_the_commit() {
    let lab = Lab::get();
    let vm = lab.domain("nospace").disk(Disk::ext4("64M", "qcow2")).guest().running();
    vm.wait_acked(2);
    vm.sync().sealed();
    let dir = format!("/srv/overlays-{}", vm.name);
    lab.tool(&["small-fs", "a", &dir, "64M"]);
    let _undo = Undo(|| drop(lab.tool(&["small-fs", "a", &dir, "off"])));
    let fill = || {
        let script =
            "dd if=/dev/zero of=$1/filler bs=1M 2>/dev/null || dd if=/dev/zero of=$1/filler2 bs=4k 2>/dev/null || true";
        Host::A.script(script, &[&dir]);
        let stopped = || vm.virsh(&["domstate", "--reason"]).contains("I/O error").then_some(());
        eventually("QEMU to stop the guest", PATIENCE, stopped);
    };
    let limits = ["--overlay-dir", &dir, "--min-free-source", "16M", "--compare"];

    // A driver that is away meanwhile.
    vm.start_sync("5b=kill", &limits).wait(PATIENCE).exit(137);
    fill();
    let status = || Host::A.json(&["status", &vm.name, "--json"])["domains"][0].clone();
    let seen = status();
    assert_eq!(seen["state"], "needs_attention", "{seen:#}");
    assert!(seen["notes"].to_string().contains("stopped the guest after an I/O error"), "{seen:#}");
    Host::A.virt_replica(&["doctor", &vm.name, "--json"]).exit(1).says(&["stopped the guest after an I/O error"]);
    let mut killed = Host::A.command(&["virt-replica", "doctor", &vm.name, "--repair"]);
    killed.env("VIRT_REPLICA_FAILPOINT", format!("{}=kill", "7n.owed"));
    Job::start(killed).wait(PATIENCE).exit(137);
    assert_eq!(vm.state(), "paused", "the last step was not made");
    Host::A.virt_replica(&["doctor", &vm.name, "--repair", "--json"]).exit(0).says(&["the guest was resumed"]);
    vm.still_writes();
    vm.assert_home();
    assert_eq!(status()["state"], "ok", "{:#}", status());

    // The same by the next run.
    Host::A.script("rm -f $1/filler $1/filler2", &[&dir]);
    vm.start_sync("5b=kill", &limits).wait(PATIENCE).exit(137);
    fill();
    let settled = vm.sync().sealed();
    assert_eq!(settled.report["guest_stopped"]["resumed"], true, "{:#}", settled.report);
    vm.still_writes();
    vm.assert_home();
    let next = vm.sync().sealed();
    assert!(next.report.get("guest_stopped").is_none(), "{:#}", next.report);
}
