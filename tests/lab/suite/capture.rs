//! By which way the disks are made to stand still: what is asked for, and what `auto` finds out. What a point promises
//! either way, the rest of the suite tries over both (`by_backup`).

use super::domain::{Disk, Domain};
use super::support::{Host, Lab, PATIENCE, SyncResult};
use serde_json::Value;

const AUTO: [&str; 2] = ["--capture", "auto"];

fn small() -> Disk {
    Disk::qcow2("32M").then("write -P 0x11 1M 3M")
}

/// What a run would do and why, and what it did: the same.
#[track_caller]
fn captured(vm: &Domain, way: &str, why: &str) {
    let plan = Host::A.json(&[&["plan", &vm.name, "--to", &vm.to, "--json"], &AUTO[..]].concat());
    let run = vm.sync_with("", &AUTO).sealed();
    for said in [&plan, &run.report] {
        assert_eq!(said["capture"], way, "{said:#}");
        assert!(said["capture_reason"].as_str().unwrap().contains(why), "{said:#}");
    }
    vm.compare_with_head();
    vm.assert_home();
}

#[test]
fn auto_takes_an_overlay_unless_an_image_holds_internal_snapshots() {
    let lab = Lab::get();
    let vm = lab.domain("auto").disk(small()).paused();
    captured(&vm, "overlay", "nothing is known");
    // libvirt makes one of a domain that is off.
    vm.virsh(&["destroy"]);
    Host::A.ok(&["qemu-img", "snapshot", "-c", "inside", &vm.images[0]]);
    captured(&vm, "off", "the domain is off");
    vm.start_paused();
    vm.flush(0);
    captured(&vm, "backup", "disk 'vda' holds internal snapshots");
    assert!(
        Host::A.output(&["qemu-img", "snapshot", "-U", "-l", &vm.images[0]]).contains("inside"),
        "it is still there"
    );
}

/// A commit that does not get ready in time: backups from then on, until somebody asks for an overlay and it goes well.
#[test]
fn auto_goes_around_a_commit_that_could_not_be_finished() {
    let lab = Lab::get();
    let vm = lab.domain("autopending").disk(Disk::raw("64M").then("write -P 0x21 0 64M")).paused();
    vm.sync().sealed();
    let mut run = vm.start_sync("5f=sleep:1000", &["--capture", "auto", "--ready-timeout", "0s"]);
    run.wait_step(5);
    for at in 0..16 {
        vm.write(0, &format!("-P 0x22 {}M 4M", at * 4));
    }
    let pending = SyncResult::of(run.wait(PATIENCE)).exit(3);
    assert_eq!(pending.report["outcome"], "commit_pending");
    Host::A.virt_replica(&["doctor", &vm.name, "--repair"]).success();
    captured(&vm, "backup", "could not finish its commit");
    captured(&vm, "backup", "a run that asks for overlays tries it again");
    vm.sync_with("", &["--capture", "overlay"]).sealed();
    captured(&vm, "overlay", "nothing is known");
}

/// The way of the configuration holds where the command line says nothing, also for `verify --against-source`.
#[test]
fn the_configuration_says_which_way() {
    let lab = Lab::get();
    let vm = lab.domain("configured").disk(small()).paused();
    let config = format!("{}/virt-replica.yaml", vm.dir);
    Host::A.script("echo 'defaults: {capture: backup}' >\"$1\"", &[&config]);
    let ask = |words: &[&str]| -> Value { Host::A.json(&[&["--config", &config], words].concat()) };
    let plan = ["plan", &vm.name, "--to", &vm.to, "--json"];
    assert_eq!(ask(&plan)["capture"], "backup");
    assert_eq!(ask(&[&plan[..], &["--capture", "overlay"]].concat())["capture"], "overlay");
    Host::A.virt_replica(&["--config", &config, "sync", &vm.name, "--to", &vm.to]).success().says(&["end the backup"]);
    let compared = ["--config", &config, "verify", &vm.name, "--to", &vm.to, "--against-source"];
    Host::A.virt_replica(&compared).success();
    let bad = Host::A.virt_replica(&["plan", &vm.name, "--to", &vm.to, "--capture", "snapshot"]);
    bad.exit(2).says(&["overlay, backup or auto"]);
    vm.assert_home();
}
