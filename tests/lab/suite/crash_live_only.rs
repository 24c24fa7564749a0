//! What only the running instance has: a disk and a network interface that were attached without `--persistent`.

use super::crash_drill::Drills;
use super::crash_failover::OnB;
use super::domain::{Disk, Domain, image_of};
use super::support::{Host, Lab, TARGET};

/// Room to plug something in: q35 makes no port for it by itself.
const PORTS: &str = "<controller type='pci' index='0' model='pcie-root'/>\
    <controller type='pci' index='11' model='pcie-root-port'/><controller type='pci' index='12' model='pcie-root-port'/>\
    <controller type='pci' index='13' model='pcie-root-port'/>";

fn hot(vm: &Domain) -> String {
    let file = format!("{}/hot.qcow2", vm.dir);
    let make = "qemu-img create -q -f qcow2 \"$1\" 16M; qemu-io -f qcow2 -c 'write -P 0x5a 0 1M' \"$1\" >&2";
    Host::A.script(make, &[&file]);
    file
}

fn plug(vm: &Domain, file: &str) {
    vm.virsh(&[
        "attach-disk",
        file,
        "vdb",
        "--targetbus",
        "virtio",
        "--driver",
        "qemu",
        "--subdriver",
        "qcow2",
        "--live",
    ]);
}

/// The disk's content of this image on a host, its first block all of this byte.
#[track_caller]
fn holds(host: Host, image: &str, byte: &str) {
    let read = format!("read -P {byte} 0 64k");
    let said = host.output(&["qemu-io", "-r", "-U", "-f", "qcow2", "-c", &read, image]);
    assert!(!said.contains("verification failed"), "{image}: {said}");
}

#[test]
fn a_disk_of_the_running_instance_alone_is_brought_up() {
    let lab = Lab::get();
    let vm = lab.domain("liveonly").disk(Disk::qcow2("16M").then("write -P 0x11 1M 3M")).devices(PORTS).paused();
    let file = hot(&vm);
    plug(&vm, &file);
    let nic = format!("{}/nic.xml", vm.dir);
    let xml = "<interface type='user'><mac address='52:54:00:aa:bb:01'/><model type='virtio'/></interface>";
    std::fs::write(Host::A.file(&nic), xml).expect("write the XML");
    vm.virsh(&["attach-device", &nic, "--live"]);
    let plan = vm.plan();
    let notes = plan["notes"].to_string();
    assert!(notes.contains("disk 'vdb' is attached to the running instance only"), "{plan:#}");
    assert!(notes.contains("52:54:00:aa:bb:01 is attached to the running instance only"), "{plan:#}");

    // By overlay and by backup: the disk is in the point, and the warning says what becomes of it.
    for way in ["overlay", "backup"] {
        vm.write(0, "-P 0x22 2M 64k");
        let sealed = vm.sync_with("", &["--capture", way]).sealed().says(&["vdb", "running instance only"]);
        holds(Host::B, &image_of(&sealed.report, "vdb"), "0x5a");
    }
    assert!(vm.virsh(&["domblklist"]).contains(&file) && !vm.virsh(&["domblklist", "--inactive"]).contains(&file));

    // Its instance ends in mid-run, on our overlay: what was written there is in the disk's own image again.
    let killed = vm.sync_with("5f=kill", &["--capture", "overlay"]);
    assert_eq!(killed.done.code, 137);
    let hmp = "qemu-io -d /machine/peripheral/virtio-disk1/virtio-backend \"write -P 0x77 0 64k\"";
    vm.virsh(&["qemu-monitor-command", "--hmp", hmp]);
    vm.virsh(&["destroy"]);
    Host::A.virt_replica(&["doctor", &vm.name, "--repair", "--json"]).success();
    vm.assert_home();
    holds(Host::A, &file, "0x77");

    // The newest point has the disk as it was, and comes up with it and with the interface.
    let (b, there) = (Drills::of(&vm), OnB(&vm));
    let mapping = format!("{}/recovery.yaml", vm.shared());
    Host::B.script("sed -i 's/user: none/user: live-only/' \"$1\"", &[&mapping]);
    let network = "<network><name>live-only</name></network>";
    std::fs::write(Host::B.file("/var/tmp/live-only.xml"), network).expect("write the XML");
    Host::B.run(&["virsh", "-q", "net-create", "/var/tmp/live-only.xml"]);
    b.run("", &["ready", &vm.name, "--json"]).success();
    b.run("", &["failover", &vm.name, "--unplanned", "--source-is-dead", "--json"]).success();
    assert!(there.runs());
    let up = Host::B.output(&["virsh", "dumpxml", &vm.name]);
    assert!(up.contains("dev='vdb'") && up.contains("52:54:00:aa:bb:01"), "{up}");
    holds(Host::B, &format!("{}/vdb.qcow2", there.overlays()), "0x5a");
    b.run("", &["failover", &vm.name, "--undo", "--lose-its-writes"]).success();

    // A planned failover would lose the disk with the shutdown: it is refused while the guest runs.
    vm.start_paused();
    plug(&vm, &file);
    Host::A
        .virt_replica(&["failover", &vm.name, "--to", TARGET, "--force-off"])
        .exit(1)
        .says(&["vdb", "--exclude-disk"]);
    assert_eq!(vm.state(), "paused", "it was left alone");
}
