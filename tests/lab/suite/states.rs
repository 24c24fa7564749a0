//! The states a domain can be in when a run begins, what may happen to it meanwhile, and what is refused.

use super::domain::{Disk, Domain, by_backup};
use super::support::{Host, Lab, PATIENCE, SyncResult};
use serde_json::Value;

fn small() -> Disk {
    Disk::qcow2("32M").then("write -P 0x11 1M 3M")
}

/// A run that is refused touches nothing: no overlay ever, no point.
fn refused(vm: &Domain, result: SyncResult, code: i32, words: &[&str]) -> SyncResult {
    let result = result.exit(code).says(words);
    assert!(result.step() < 5, "it was refused before anything was read");
    assert_eq!(result.report["id"], serde_json::Value::Null);
    assert!(!vm.record().exists(), "a record is left");
    result
}

/// A guest that writes all the time. The point is exactly what stood still, every line acknowledged before is in it,
/// and what the guest wrote meanwhile is on the domain's own image afterwards.
fn replicates_a_writer(name: &str, disk: Disk) {
    let lab = Lab::get();
    let vm = lab.domain(name).guest().disk(disk).running();
    let before = vm.acked();
    let mut run = vm.start_sync("5f=sleep:2500", &[]);
    run.wait_step(5);
    let frozen = vm.copy_frozen(0);
    let result = SyncResult::of(run.wait(PATIENCE)).sealed();
    let after = vm.acked();
    assert_eq!(result.report["consistency"], "crash");
    assert!(result.report["freeze_ms"].as_f64() > Some(0.0), "{:#}", result.report);
    // Nothing to commit, nothing to pause for.
    assert_eq!(result.report["pause_ms"].as_f64() > Some(0.0), !by_backup(), "{:#}", result.report);
    assert_eq!(result.report["capture"], if by_backup() { "backup" } else { "overlay" }, "{:#}", result.report);
    let head = vm.head();
    vm.compare_with_frozen(&head, 0, &frozen);
    let lines = vm.lines(&head, 0);
    assert!((before..=after).contains(&lines), "{before} <= {lines} <= {after}");
    assert_eq!(vm.state(), "running");
    vm.assert_home();
    vm.still_writes();
    vm.virsh(&["destroy"]);
    let (acked, own) = (vm.acked(), vm.own_lines(0));
    assert!(own >= acked, "acknowledged {acked}, on the disk {own}");
}

#[test]
fn running_on_qcow2() {
    replicates_a_writer("running", Disk::ext4("32M", "qcow2"));
}

#[test]
fn running_on_a_block_device() {
    replicates_a_writer("rundevice", Disk::ext4("32M", "raw").on_a_device());
}

#[test]
fn running_on_a_golden_image() {
    let script = r#"/lab/tools/guest disk "$2/golden.raw" 32M raw
        qemu-img create -q -f qcow2 -F raw -b golden.raw "$1""#;
    replicates_a_writer("rungolden", Disk::made_by("qcow2", script));
}

#[test]
fn paused_stays_paused() {
    let lab = Lab::get();
    let vm = lab.domain("paused").disk(small()).paused();
    vm.sync().sealed();
    assert_eq!(vm.state(), "paused");
    vm.compare_with_head();
    vm.assert_home();
}

#[test]
fn off() {
    let lab = Lab::get();
    let vm = lab.domain("off").disk(small()).disk(Disk::raw("16M").then("write -P 0x22 0 1M")).off();
    let first = vm.sync().sealed();
    assert_eq!(first.report["consistency"], "off");
    assert_eq!((first.report["freeze_ms"].as_f64(), first.report["pause_ms"].as_f64()), (Some(0.0), Some(0.0)));
    vm.compare_with_head();
    let second = vm.sync().sealed();
    assert_eq!(second.bytes("vda", "blocks_changed") + second.bytes("vdb", "blocks_changed"), 0);
    assert_eq!(vm.state(), "shut off");
    vm.assert_home();
}

/// It must be possible to start it meanwhile; the run notices and takes the point of a running domain instead.
#[test]
fn off_and_started_while_it_is_read() {
    let lab = Lab::get();
    let vm = lab.domain("started").guest().disk(Disk::ext4("32M", "qcow2")).off();
    started_at(&vm, "5b=sleep:3000");
    let lines = vm.lines(&vm.head(), 0);
    assert!(lines <= vm.acked() + 1);
    vm.still_writes();
}

/// The same when every byte was read already: nothing of that reading may become a point.
#[test]
fn off_and_started_after_it_was_read() {
    let lab = Lab::get();
    let vm = lab.domain("startedlate").disk(small()).off();
    started_at(&vm, "5f=sleep:3000");
}

fn started_at(vm: &Domain, failpoint: &str) {
    let mut run = vm.start_sync(failpoint, &[]);
    run.wait_step(5);
    vm.virsh(&["start"]);
    let result = SyncResult::of(run.wait(PATIENCE)).sealed().says(&["started", "starting over"]);
    assert_eq!(result.report["consistency"], "crash", "the point is one of a running domain");
    assert_eq!(vm.points().len(), 1);
    assert_eq!(vm.state(), "running");
    vm.assert_home();
}

#[test]
fn transient() {
    let lab = Lab::get();
    let vm = lab.domain("transient").disk(small()).transient();
    vm.sync().sealed();
    vm.write(0, "-P 0x33 5M 64k");
    let second = vm.sync().sealed();
    assert_eq!(second.bytes("vda", "blocks_changed"), 1);
    vm.compare_with_head();
    vm.assert_home();
    let head = vm.head();
    assert_eq!(head["attachments"], serde_json::json!(["live_xml"]), "it has no other definition");
}

/// A disk on somebody's own snapshot overlay: that overlay is the image we freeze and go back to.
#[test]
fn on_a_snapshot_of_its_owner() {
    let lab = Lab::get();
    let mut vm = lab.domain("snapshot").disk(small()).paused();
    vm.virsh(&["snapshot-create-as", "mine", "--disk-only"]);
    let snapshot = vm.live_images().remove(0);
    assert_ne!(snapshot, vm.images[0]);
    vm.images = vec![snapshot];
    vm.write(0, "-P 0x22 2M 64k");
    vm.sync().sealed();
    vm.compare_with_head();
    vm.assert_home();
    assert!(vm.virsh(&["snapshot-list", "--name"]).contains("mine"), "the owner's snapshot is still known");
    vm.write(0, "-P 0x33 6M 64k");
    assert_eq!(vm.sync().sealed().bytes("vda", "blocks_changed"), 1);
    vm.compare_with_head();
}

#[test]
fn saved_memory_does_not_travel_and_is_told_of() {
    let lab = Lab::get();
    let vm = lab.domain("saved").disk(small()).paused();
    vm.virsh(&["managedsave"]);
    assert_eq!(vm.state(), "shut off");
    let plan = vm.plan();
    assert!(plan["notes"].to_string().contains("saved memory"), "{plan:#}");
    let sealed = vm.sync().sealed().says(&["memory is saved"]);
    assert_eq!(sealed.report["consistency"], "crash", "{:#}", sealed.report);
    vm.compare_with_head();
    vm.assert_home();
    assert!(Host::A.output(&["virsh", "dominfo", &vm.name]).contains("Managed save:   yes"), "it was left alone");
    // Ended by hand it is off as well, and no more shut down than that; after a shutdown the label is what it says.
    vm.virsh(&["managedsave-remove"]);
    vm.start_paused();
    vm.virsh(&["destroy"]);
    let ended = vm.sync().sealed().report;
    assert_eq!(ended["consistency"], "crash", "{ended:#}");
    assert!(ended["consistency_reason"].as_str().unwrap().contains("virsh destroy"), "{ended:#}");
}

#[test]
fn another_block_job_is_refused_and_left_alone() {
    let lab = Lab::get();
    let vm = lab.domain("job").disk(small()).paused();
    let copy = format!("{}/copy.qcow2", vm.dir);
    vm.virsh(&["blockcopy", "vda", &copy, "--transient-job"]);
    refused(&vm, vm.sync(), 11, &["vda", "block job", "virsh blockjob"]);
    assert!(vm.virsh(&["blockjob", "vda", "--raw"]).contains("type=Block Copy"), "the job goes on");
    let plan = Host::A.virt_replica(&["plan", &vm.name, "--to", &vm.to, "--json"]).exit(11);
    assert!(plan.stdout.contains("block_job"), "{}", plan.stdout);
    vm.virsh(&["blockjob", "vda", "--abort"]);
    vm.sync().sealed();
    vm.assert_home();
}

#[test]
fn a_second_run_at_once_is_refused_and_told_who_has_it() {
    let lab = Lab::get();
    let vm = lab.domain("twice").disk(small()).paused();
    let mut first = vm.start_sync("5f=sleep:2500", &[]);
    first.wait_step(5);
    let second = vm.sync().exit(11).says(&["sync to ssh://root@192.0.2.2", "(pid "]);
    assert!(second.lines.is_empty() || second.step() == 0, "{:?}", second.lines);
    SyncResult::of(first.wait(PATIENCE)).sealed();
    vm.assert_home();
    assert_eq!(vm.points().len(), 1);
}

/// An overlay with our kind of name that no record speaks of: whose it is cannot be known, so nobody commits it.
#[test]
fn an_overlay_of_ours_without_a_record_is_refused() {
    let lab = Lab::get();
    let mut vm = lab.domain("stray").disk(small()).paused();
    let own = vm.images.clone();
    let stray = format!("{}/vda.vda.vr-0123abcd.qcow2", vm.dir);
    let diskspec = format!("vda,file={stray}");
    vm.virsh(&["snapshot-create-as", "--disk-only", "--no-metadata", "--diskspec", &diskspec]);
    refused(&vm, vm.sync(), 1, &["vr-0123abcd", "no record", "virsh blockcommit"]);
    assert_eq!(vm.live_images(), std::slice::from_ref(&stray), "it was left alone");
    // The advice is right: after it the domain is replicated again.
    vm.virsh(&["blockcommit", "vda", "--active", "--shallow", "--pivot", "--wait"]);
    Host::A.ok(&["rm", &stray]);
    vm.images = own;
    vm.sync().sealed();
    vm.compare_with_head();
    vm.assert_home();
}

#[test]
fn a_disk_resized_between_plan_and_freeze_ends_the_run() {
    let lab = Lab::get();
    let vm = lab.domain("resized").disk(small()).paused();
    vm.sync().sealed();
    let mut run = vm.start_sync("3=sleep:3000", &[]);
    run.wait_step(3);
    // A size is looked at in step 2; the step after that has begun, and sleeps before the freeze.
    vm.virsh(&["blockresize", "vda", "48M"]);
    SyncResult::of(run.wait(PATIENCE)).exit(11).says(&["vda", "resized"]);
    vm.assert_home();
    assert_eq!(vm.points().len(), 1, "the old point is all there is");
    let next = vm.sync().sealed();
    assert_eq!(next.disk("vda")["size"], 48 << 20);
    vm.compare_with_head();
    vm.assert_home();
}

#[test]
fn disks_grow_and_shrink_between_runs() {
    let lab = Lab::get();
    let vm = lab.domain("grow").disk(small()).disk(Disk::raw("16M").then("write -P 0x22 14M 2M")).paused();
    vm.sync().sealed();
    vm.virsh(&["blockresize", "vda", "48M"]);
    vm.write(0, "-P 0x33 47M 1M");
    let grown = vm.sync().sealed();
    grown.incremental("vda");
    grown.incremental("vdb");
    assert_eq!(grown.bytes("vda", "blocks_changed"), 16);
    vm.compare_with_head();
    vm.assert_home();

    vm.virsh(&["destroy"]);
    Host::A.ok(&["qemu-img", "resize", "-q", "--shrink", &vm.images[0], "20M"]);
    Host::A.ok(&["qemu-img", "resize", "-q", "--shrink", "-f", "raw", &vm.images[1], "15M"]);
    let shrunk = vm.sync().sealed();
    assert_eq!(shrunk.disk("vda")["size"], 20 << 20);
    vm.compare_with_head();

    // Growing again must not bring back what was cut off.
    Host::A.ok(&["qemu-img", "resize", "-q", "-f", "raw", &vm.images[1], "16M"]);
    vm.sync().sealed();
    vm.compare_with_head();
    assert_eq!(vm.points().len(), 4);
}

#[test]
fn disks_come_and_go_between_runs() {
    let lab = Lab::get();
    let vm = lab.domain("comego").disk(small()).disk(Disk::qcow2("16M").then("write -P 0x22 0 1M")).off();
    let with_vdb = std::fs::read_to_string(Host::A.file(format!("{}/domain.xml", vm.dir))).unwrap();
    let second = with_vdb.rfind("<disk ").unwrap()..with_vdb.rfind("</disk>").unwrap() + "</disk>".len();
    let without_vdb = format!("{}{}", &with_vdb[..second.start], &with_vdb[second.end..]);
    let names = |result: &SyncResult| -> Vec<String> {
        let disks = result.report["disks"].as_array().unwrap();
        disks.iter().map(|d| format!("{}:{}", d["name"].as_str().unwrap(), d["mode"].as_str().unwrap())).collect()
    };

    vm.redefine(|_| without_vdb.clone());
    assert_eq!(names(&vm.sync().sealed()), ["vda:full"]);
    vm.redefine(|_| with_vdb.clone());
    let added = vm.sync().sealed();
    assert_eq!(names(&added), ["vda:bitmap", "vdb:full"]);
    assert!(added.disk("vdb")["reason"].as_str().unwrap().contains("does not have this disk"));
    vm.compare_with_head();
    vm.redefine(|_| without_vdb.clone());
    assert_eq!(names(&vm.sync().sealed()), ["vda:bitmap"]);
    vm.redefine(|_| with_vdb.clone());
    assert_eq!(names(&vm.sync().sealed()), ["vda:bitmap", "vdb:full"]);
    vm.compare_with_head();
}

/// Never silently: each disk that is left out stands in the plan and in the report, with its reason.
#[test]
fn what_cannot_be_frozen_is_skipped_with_a_reason() {
    let lab = Lab::get();
    let builder = lab.domain("skipped").disk(small()).disk(Disk::raw("1M")).devices(
        "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='DIR/cd.iso'/>\
           <target dev='sda' bus='sata'/><readonly/></disk>\
         <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='DIR/ro.raw'/>\
           <target dev='vdc' bus='virtio'/><readonly/></disk>\
         <disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/><source file='DIR/shared.raw'/>\
           <target dev='vdd' bus='virtio'/><shareable/></disk>\
         <disk type='network' device='disk'><driver name='qemu' type='raw'/>\
           <source protocol='nbd' name='x'><host name='192.0.2.7' port='10809'/></source>\
           <target dev='vde' bus='virtio'/></disk>",
    );
    let vm = builder.off();
    for file in ["cd.iso", "ro.raw", "shared.raw"] {
        Host::A.ok(&["truncate", "-s", "1M", &format!("{}/{file}", vm.dir)]);
    }
    let expected =
        [("vdb", "excluded"), ("sda", "cdrom"), ("vdc", "read-only"), ("vdd", "shareable"), ("vde", "network")];
    // Partly protected, until each of them is named; a CD drive never has to be.
    let planned = |exclude: &[&str]| {
        let mut words = vec!["plan", &vm.name, "--to", &vm.to, "--json"];
        exclude.iter().for_each(|disk| words.extend(["--exclude-disk", disk]));
        Host::A.virt_replica(&words)
    };
    let plan: Value = serde_json::from_str(&planned(&["vdb"]).exit(15).stdout).unwrap();
    planned(&["vdb", "vdc", "vdd", "vde"]).success();
    let report = vm.sync_with("", &["--exclude-disk", "vdb"]).exit(15).report;
    assert_eq!(report["outcome"], "sealed", "{report:#}");
    let causes: Vec<&str> =
        report["skipped"].as_array().unwrap().iter().map(|s| s["cause"].as_str().unwrap()).collect();
    assert_eq!(causes.iter().filter(|c| **c == "unprotected").count(), 3, "{causes:?}");
    partly_protected(&vm);
    for skipped in [&plan["skipped"], &report["skipped"]] {
        let found = skipped.as_array().unwrap();
        assert_eq!(found.len(), expected.len(), "{skipped:#}");
        for (name, word) in expected {
            let one = found.iter().find(|s| s["name"] == name).unwrap_or_else(|| panic!("no {name} in {skipped:#}"));
            assert!(one["reason"].as_str().unwrap().contains(word), "{one:#}");
        }
    }
    assert_eq!(report["disks"].as_array().unwrap().len(), 1);

    // The same of a domain that runs: freezing leaves the others alone.
    vm.redefine(|xml| {
        let network = xml.find("<disk type='network'").unwrap();
        let end = network + xml[network..].find("</disk>").unwrap() + "</disk>".len();
        format!("{}{}", &xml[..network], &xml[end..])
    });
    vm.start_paused();
    vm.sync_with("", &["--exclude-disk", "vdb"]).exit(15);
    vm.assert_home();
    vm.sync_with("", &["--exclude-disk", "vdb", "--exclude-disk", "vdc", "--exclude-disk", "vdd"]).sealed();
    let row = Host::A.json(&["status", &vm.name, "--json"])["domains"][0].clone();
    assert_eq!(row["state"], "ok", "its operator has named them: {row:#}");
}

/// Every outlet says so, at the source and at the target.
fn partly_protected(vm: &Domain) {
    let row = Host::A.json(&["status", &vm.name, "--json"])["domains"][0].clone();
    assert!(
        row["state"] == "partly_protected" && row["notes"].to_string().contains("'vde' is NOT PROTECTED"),
        "{row:#}"
    );
    Host::A.virt_replica(&["status", &vm.name, "--nagios"]).exit(1).says(&["WARNING", "NOT PROTECTED"]);
    Host::A.virt_replica(&["points", &vm.name, "--to", &vm.to]).success().says(&["Not in the head: vde"]);
    let ready = Host::B.virt_replica(&["ready", &vm.name, "--json"]).success();
    let findings = serde_json::from_str::<Value>(&ready.stdout).unwrap()["findings"].clone();
    let yellow =
        |f: &&Value| f["color"] == "yellow" && f["question"] == "point" && f["what"].as_str().unwrap().contains("vde");
    assert!(findings.as_array().unwrap().iter().any(|f| yellow(&f)), "{findings:#}");
}

#[test]
fn without_a_disk_to_replicate_nothing_begins() {
    let lab = Lab::get();
    let vm = lab.domain("nodisk").disk(small()).paused();
    refused(&vm, vm.sync_with("", &["--exclude-disk", "vda"]), 1, &["no disk is left"]);
    vm.assert_home();
}
