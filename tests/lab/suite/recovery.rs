//! What the replica is for, with a guest that writes: it is drilled on host b while replication goes on.

use super::crash_drill::Drills;
use super::crash_failover::OnB;
use super::domain::Disk;
use super::support::{Host, Lab, PATIENCE, eventually};

/// The number behind `resume` on the console of a copy: the last line that it found on its disks.
fn resumed_at(console: &str) -> u64 {
    let line = console.lines().find_map(|l| l.trim().strip_prefix("resume ")).expect("the copy's guest has begun");
    line.parse().expect("a number")
}

#[test]
fn two_drills_at_once_while_replication_goes_on() {
    let lab = Lab::get();
    let vm = lab
        .domain("drill")
        .disk(Disk::ext4("64M", "qcow2"))
        .disk(Disk::ext4("64M", "raw"))
        .devices("<interface type='user'><model type='virtio'/></interface>")
        .agent("yes")
        .running();
    vm.wait_acked(5);
    let acked = vm.acked();
    let first = vm.sync().sealed();
    let point = first.id().to_owned();
    let drills = Drills::of(&vm);
    let ready = drills.run("", &["ready", &vm.name, "--json"]).success();
    assert_eq!(Drills::report(&ready)["ready"], true);

    let name = vm.name.as_str();
    let one = drills.start(
        "",
        &[
            "drill",
            name,
            "--point",
            &point,
            "--probe",
            "agent",
            "--probe",
            "serial:ack ",
            "--probe",
            "tcp:192.0.2.10/24:22",
            "--json",
        ],
    );
    let two = drills.start("", &["drill", name, "--probe", "serial:ack ", "--json"]);
    // Runs and a prune beside them: the point that is drilled is in use.
    vm.sync().sealed();
    vm.sync_with("", &["--keep", "last=1"]).sealed();
    for drill in [one, two] {
        let report = Drills::report(&drill.wait(PATIENCE).success());
        assert_eq!((&report["outcome"], &report["point_untouched"]), (&"passed".into(), &true.into()), "{report:#}");
        assert!(report["rto_ms"].as_u64() > report["start_ms"].as_u64(), "{report:#}");
        let found = resumed_at(report["console_tail"].as_str().unwrap());
        assert!(found >= acked, "line {acked} was acknowledged before the freeze, the copy has {found}: {report:#}");
    }
    assert_eq!(drills.left(), [""; 0]);
    vm.still_writes();
    let store = super::support::STORE;
    Host::B.virt_replica(&["verify", name, "--to", store]).success();

    // What is not seen is a failure, and leaves nothing either.
    let failed = drills.run("", &["drill", name, "--probe", "serial:never", "--within", "1s", "--json"]).exit(1);
    let report = Drills::report(&failed);
    assert_eq!((&report["outcome"], &report["cleaned"]), (&"failed".into(), &true.into()), "{report:#}");
    assert_eq!(drills.left(), [""; 0]);
}

/// The source is lost, the domain runs on b; the source comes back and is refused; it is undone, and done for good.
#[test]
fn an_unplanned_failover_loses_nothing_older_than_the_freeze_and_the_old_source_is_refused() {
    let lab = Lab::get();
    let vm = lab.domain("failover").disk(Disk::ext4("64M", "qcow2")).guest().running();
    vm.wait_acked(5);
    let acked = vm.acked();
    vm.sync().sealed();
    let (b, there) = (Drills::of(&vm), OnB(&vm));
    let name = vm.name.as_str();
    // Nobody fails over by accident.
    b.run("", &["failover", name, "--unplanned"]).exit(2).says(&["--source-is-dead"]);
    let up = ["failover", name, "--unplanned", "--source-is-dead", "--json"];
    vm.virsh(&["destroy"]);
    b.run("", &up).success();
    assert!(there.runs());
    // Once more: it is done already.
    b.run("", &up).success();

    // The old source is back, and boots its guest: nothing of it gets in.
    vm.virsh(&["start"]);
    let refused = vm.sync_with("", &[]).failed(1).says(&["brought up on the target", "leave the domain here shut off"]);
    assert_eq!(refused.step(), 3, "before the guest is touched");
    vm.virsh(&["destroy"]);

    // What the guest on b writes goes on from where the point was.
    let overlay = format!("{}/vda.qcow2", there.overlays());
    there.writes(&overlay);
    Host::B.ok(&["virsh", "-q", "destroy", name]);
    let lines = Host::B.output(&["/lab/tools/guest", "lines", &overlay, "qcow2"]).lines().count() as u64;
    assert!(lines > acked, "line {acked} was acknowledged before the freeze, b has {lines}");
    let point = super::domain::image_of(&vm.head(), "vda");
    let kept = Host::B.output(&["/lab/tools/guest", "lines", &point, "qcow2"]).lines().count() as u64;
    assert!(acked <= kept && kept < lines, "the point has {kept} lines, the guest on b wrote up to {lines}");

    // Undone: its source replicates again.
    b.run("", &["failover", name, "--undo"]).exit(2).says(&["--lose-its-writes"]);
    b.run("", &["failover", name, "--undo", "--lose-its-writes"]).success().says(&["may replicate again"]);
    vm.virsh(&["start"]);
    vm.wait_acked(vm.acked() + 1);
    vm.sync().sealed();
    Host::B.virt_replica(&["verify", name, "--to", super::support::STORE]).success();
}

/// Nobody is left to give an order: the point has to know whether its domain starts with its host.
#[test]
fn after_an_unplanned_failover_it_starts_with_its_new_host_as_it_did_with_the_old_one() {
    let lab = Lab::get();
    let vm = lab.domain("autostart").disk(Disk::qcow2("16M").then("write -P 0x11 1M 3M")).off();
    let t = super::handover::Traveller::of(&vm);
    let b = Drills::of(&vm);
    let name = vm.name.as_str();
    let up = |point: &str, after: Option<bool>| {
        let done = b.run("", &["failover", name, "--unplanned", "--source-is-dead", "--point", point, "--json"]);
        let report = super::handover::message(&done.success(), "failover");
        assert_eq!(report["autostart"].as_bool(), after, "{report:#}");
        assert!(t.there.runs() && t.autostart(Host::B) == (after == Some(true)), "{report:#}");
        b.run("", &["failover", name, "--undo", "--lose-its-writes"]).success();
        assert!(!t.autostart(Host::B));
    };
    let without = vm.sync().sealed().id().to_owned();
    vm.virsh(&["autostart"]);
    let with = vm.sync().sealed().id().to_owned();
    assert_eq!(vm.head()["autostart"], true);
    // A drill of that point is a copy, and starts with nothing.
    let drill = b.start("", &["drill", name, "--probe", "serial:never", "--within", "5s", "--json"]);
    let copy = |list: &[&str]| Host::B.output(list).lines().any(|l| l.contains(&format!("{name}-vr-drill-")));
    eventually("the copy to run", PATIENCE, || copy(&["virsh", "-q", "list", "--name"]).then_some(()));
    assert!(!copy(&["virsh", "-q", "list", "--all", "--autostart", "--name"]), "a drill starts with no host");
    drill.wait(PATIENCE).exit(1);
    // It is the point that counts, and not how it is at the source today.
    up(&with, Some(true));
    up(&without, Some(false));
    // Of a point of before nobody knows.
    let forget = r#"sed -i '/"autostart"/d' "$1/replicas/$2/manifest.json""#;
    Host::B.script(forget, &[super::support::STORE, &vm.uuid]);
    up(&with, None);
    let told = b.run("", &["failover", name, "--unplanned", "--source-is-dead"]).success();
    told.says(&[&format!("virsh autostart {name}")]);
    b.run("", &["failover", name, "--undo", "--lose-its-writes"]).success();
}

/// OVMF of the lab's cache, which no host has installed: libvirt finds it by a descriptor.
const OVMF: &str = "/lab/guest/ovmf/usr/share/OVMF";

/// As after an update of the package on one host only.
fn another_build(b: &Drills, name: &str) {
    let other = r#"cp "$1/OVMF_CODE_4M.fd" /var/tmp/other.fd; printf x >>/var/tmp/other.fd
        sed -i "s#$1/OVMF_CODE_4M.fd#/var/tmp/other.fd#" /etc/qemu/firmware/60-lab.json"#;
    Host::B.script(other, &[OVMF]);
    let ready = Drills::report(&b.run("", &["ready", name, "--json"]).success());
    let firmware = ready["findings"].as_array().unwrap().iter().find(|f| f["question"] == "firmware").unwrap();
    let what = firmware["what"].as_str().unwrap();
    assert!(firmware["color"] == "yellow" && what.contains("/var/tmp/other.fd"), "{firmware:#}");
    assert!(what.contains(&format!("another build than the source's {OVMF}/OVMF_CODE_4M.fd")), "{firmware:#}");
    Host::B.script("sed -i \"s#/var/tmp/other.fd#$1/OVMF_CODE_4M.fd#\" /etc/qemu/firmware/60-lab.json", &[OVMF]);
}

#[test]
fn a_guest_of_uefi_boots_on_the_target_with_its_variables() {
    let lab = Lab::get();
    for host in [Host::A, Host::B] {
        let script = r#"mkdir -p /etc/qemu/firmware
            sed "s#/usr/share/OVMF#$1#" /lab/guest/ovmf/usr/share/qemu/firmware/60-edk2-x86_64.json >/etc/qemu/firmware/60-lab.json"#;
        host.script(script, &[OVMF]);
    }
    let firmware = |xml: String, dir: &str| {
        let loader = format!(
            "hvm</type><loader readonly='yes' type='pflash'>{OVMF}/OVMF_CODE_4M.fd</loader>\
             <nvram template='{OVMF}/OVMF_VARS_4M.fd'>{dir}/vars.fd</nvram>"
        );
        xml.replace("hvm</type>", &loader).replace("<memory unit='MiB'>32<", "<memory unit='MiB'>160<")
    };
    let vm = lab.domain("uefi").disk(Disk::qcow2("16M")).xml(firmware).running();
    // The firmware has gone through its boot options, and written some of its own.
    super::support::eventually("the firmware to boot", PATIENCE, || vm.console().contains("BdsDxe").then_some(()));
    vm.sync().sealed();
    let (b, there) = (Drills::of(&vm), OnB(&vm));
    let ready = Drills::report(&b.run("", &["ready", &vm.name, "--json"]).success());
    let findings = ready["findings"].as_array().unwrap();
    assert!(findings.iter().any(|f| f["question"] == "firmware" && f["color"] == "green"), "{ready:#}");
    assert!(findings.iter().all(|f| f["question"] != "devices"), "its variables are in the point: {ready:#}");
    another_build(&b, &vm.name);
    let drill = ["drill", &vm.name, "--probe", "serial:BdsDxe", "--within", "1m", "--json"];
    assert_eq!(Drills::report(&b.run("", &drill).success())["outcome"], "passed");
    vm.virsh(&["destroy"]);
    b.run("", &["failover", &vm.name, "--unplanned", "--source-is-dead"]).success();
    // What it started with are the source's variables, not the empty ones that libvirt makes where there are none.
    let fresh = format!("{OVMF}/OVMF_VARS_4M.fd");
    Host::B.run(&["cmp", "-s", &format!("{}/nvram.fd", there.overlays()), &fresh]).exit(1);
    b.run("", &["failover", &vm.name, "--undo", "--lose-its-writes"]).success();
}
