//! Disks that are named as volumes of a storage pool, as Terraform's provider writes them.

use super::domain::{Disk, Domain};
use super::support::{Host, Lab, Undo};

/// The domain's disks by pool and volume instead of path; the pool is called as the domain.
fn by_volume(xml: String, dir: &str) -> String {
    let pool = dir.rsplit('/').next().expect("a directory has a name");
    let source = format!("source pool='{pool}' volume='");
    xml.replace("disk type='file'", "disk type='volume'").replace(&format!("source file='{dir}/"), &source)
}

/// Both definitions name the volumes, and nothing of ours is left.
#[track_caller]
fn at_home(vm: &Domain) {
    let mut definitions = vec![vm.virsh(&["dumpxml", "--inactive"])];
    if vm.state() != "shut off" {
        definitions.push(vm.virsh(&["dumpxml"]));
    }
    for xml in definitions {
        for volume in ["vda.qcow2", "vdb.raw"] {
            assert!(xml.contains(&format!("<source pool='{}' volume='{volume}'", vm.name)), "{xml}");
        }
        assert!(!xml.contains(".vr-") && !xml.contains("virt-replica"), "{xml}");
    }
    assert_eq!(Host::A.output(&["find", &vm.dir, "-name", "*.vr-*"]), "", "overlays are left");
    assert!(!vm.record().exists(), "a record is left");
}

#[test]
fn volumes_of_a_pool_are_replicated_and_stay_volumes() {
    let lab = Lab::get();
    let disks = [Disk::qcow2("32M").then("write -P 0x11 1M 3M"), Disk::raw("16M").then("write -P 0x22 0 1M")];
    let [vda, vdb] = disks;
    let vm = lab.domain("volume").disk(vda).disk(vdb).xml(by_volume).off();
    let unknown = Host::A.virt_replica(&["plan", &vm.name, "--to", &vm.to, "--json"]).exit(1);
    unknown.says(&["is the volume 'vda.qcow2' of the storage pool", "Storage pool not found"]);
    Host::A.ok(&["virsh", "-q", "pool-define-as", &vm.name, "dir", "--target", &vm.dir]);
    let _undo = Undo(|| {
        Host::A.run(&["virsh", "-q", "pool-destroy", &vm.name]);
        Host::A.run(&["virsh", "-q", "pool-undefine", &vm.name]);
    });
    let start = ["virsh", "-q", "pool-start", &vm.name];
    Host::A.ok(&start);

    // Off, by overlay, by backup.
    vm.sync().sealed();
    vm.compare_with_head();
    vm.start_paused();
    vm.write(0, "-P 0x33 5M 64k");
    vm.write(1, "-P 0x44 2M 64k");
    let second = vm.sync().sealed();
    assert_eq!(second.mode("vda"), "bitmap", "{:#}", second.report);
    vm.compare_with_head();
    at_home(&vm);
    vm.sync_with("", &["--capture", "backup"]).sealed();
    at_home(&vm);

    // What travels names files: the target has no such pool.
    let attached = Host::B.output(&["cat", &format!("{}/points/{}/domain.xml", vm.replica(), second.id())]);
    assert!(
        attached.contains(&format!("<source file='{}/vda.qcow2'", vm.dir)) && !attached.contains("pool="),
        "{attached}"
    );

    // Cut short in the commit, and on the overlay with its QEMU gone: the definition is put back to the volumes (7m).
    assert_eq!(vm.sync_with("7b=kill", &[]).done.code, 137);
    vm.sync().sealed();
    at_home(&vm);
    // The pool may be stopped under a running domain, also while it is on our overlays.
    assert_eq!(vm.sync_with("5f=kill", &[]).done.code, 137);
    Host::A.ok(&["virsh", "-q", "pool-destroy", &vm.name]);
    vm.write(0, "-P 0x77 0 64k");
    Host::A.virt_replica(&["doctor", &vm.name, "--repair"]).success();
    Host::A.ok(&start);
    at_home(&vm);
    assert_eq!(vm.sync_with("5f=kill", &[]).done.code, 137);
    vm.write(0, "-P 0x78 0 64k");
    vm.virsh(&["destroy"]);
    Host::A.virt_replica(&["doctor", &vm.name, "--repair"]).success();
    at_home(&vm);
    let own = format!("{}/vda.qcow2", vm.dir);
    let read = Host::A.output(&["qemu-io", "-f", "qcow2", "-c", "read -P 0x78 0 64k", &own]);
    assert!(!read.contains("verification failed"), "{read}");
    vm.sync().sealed();
    vm.compare_with_head();
    at_home(&vm);
}
