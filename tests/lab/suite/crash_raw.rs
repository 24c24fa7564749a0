//! Raw images of its own for a domain that was brought up on host b for good, while its guest writes; with kill -9 at
//! every numbered step (docs/recovery.md), and the same command after it. The guest is never left held, and no old
//! image comes back.

use super::crash_drill::Drills;
use super::crash_failover::{OnB, lost_after_two_points};
use super::domain::{Disk, Domain};
use super::support::{Host, Lab, eventually};
use std::time::Duration;

/// The images that the domain is on, as it runs and as it is defined: they have to be the same.
#[track_caller]
fn images(vm: &Domain) -> Vec<String> {
    let of = |words: &[&str]| -> Vec<String> {
        let listed = Host::B.output(&[&["virsh", "-q", "domblklist", &vm.name], words].concat());
        listed.lines().filter_map(|l| Some(l.split_whitespace().nth(1)?.to_owned())).collect()
    };
    let (live, inactive) = (of(&[]), of(&["--inactive"]));
    assert_eq!(live, inactive, "what runs, and what would be started");
    live
}

fn state(vm: &Domain) -> String {
    Host::B.output(&["virsh", "-q", "domstate", &vm.name]).trim().to_owned()
}

fn lines(image: &str) -> u64 {
    Host::B.output(&["/lab/tools/guest", "lines", image, "raw"]).lines().count() as u64
}

#[test]
fn a_detaching_to_raw_killed_at_each_step_is_finished_by_the_same_command() {
    let lab = Lab::get();
    let small = || Disk::raw("16M").then("write -P 0x22 1M 3M");
    let vm = lab
        .domain("crash-raw")
        .disk(Disk::ext4("64M", "qcow2"))
        .disk(Disk::ext4("64M", "raw"))
        .disk(small())
        .disk(small())
        .guest()
        .running();
    let (acked, b, there) = lost_after_two_points(&vm);
    let name = vm.name.as_str();
    b.run("", &["failover", name, "--unplanned", "--source-is-dead"]).success();
    b.run("", &["failover", name, "--commit"]).success();

    let detach = ["detach", name, "--disk-format", "raw", "--json"];
    let dir = there.overlays();
    let raw = |disk: &str| format!("{dir}/{disk}.raw");
    let mut moved = 0;
    // Killed at g2c to g2e a disk has moved, and the next time it is only taken note of.
    for step in ["g1", "g2a", "g2b", "g2c", "g2d", "g2e", "g2", "g2", "g3", "g4", "g5"] {
        b.run(&format!("{step}=kill"), &detach).exit(137);
        eventually("the guest to be let go", Duration::from_secs(20), || (state(&vm) == "running").then_some(()));
        // What the dead-man has still to do after that is one write.
        let settled = || {
            let record = Host::B.file(format!("{}/state/recovery/failovers/{}/record.json", vm.shared(), vm.uuid));
            std::fs::read_to_string(record).map_or(true, |record| !record.contains("\"moving\""))
        };
        eventually("its dead-man to end", Duration::from_secs(20), || settled().then_some(()));
        let on = images(&vm);
        let is_raw = on.iter().take_while(|image| image.ends_with(".raw")).count();
        assert!(is_raw >= moved && on[is_raw..].iter().all(|image| image.ends_with(".qcow2")), "{step}: {on:?}");
        moved = is_raw;
        if step == "g2b" {
            assert_eq!(moved, 0, "held, and not moved");
            // The record knows what was begun.
            b.run("", &["detach", name, "--disk-format", "qcow2"])
                .exit(1)
                .says(&["another format", "without --disk-format"]);
        }
        if step == "g2c" {
            assert_eq!(moved, 1, "moved, and let go by its dead-man");
            // Whatever is started now is started on what it has moved to.
            Host::B.ok(&["virsh", "-q", "destroy", name]);
            let before = lines(&raw("vda"));
            Host::B.ok(&["virsh", "-q", "start", name]);
            assert!(before >= acked && images(&vm)[0] == raw("vda"));
        }
        if step != "g5" {
            b.run("", &["doctor", name]).exit(1).says(&["detaching", "virt-replica detach"]);
        }
    }
    b.run("", &detach).exit(4);
    assert_eq!(images(&vm), ["vda", "vdb", "vdc", "vdd"].map(raw));
    let left = Host::B.output(&["ls", &dir]);
    assert_eq!(left.split_whitespace().collect::<Vec<_>>(), ["vda.raw", "vdb.raw", "vdc.raw", "vdd.raw"]);

    // The guest has written all the while, and boots from what it has now.
    std::thread::sleep(Duration::from_secs(4));
    Host::B.ok(&["virsh", "-q", "destroy", name]);
    let written = lines(&raw("vda"));
    assert!(written > acked, "line {acked} was acknowledged before the freeze, b has {written}");
    for disk in ["vdc", "vdd"] {
        let holds = r#"qemu-io -f raw -c 'read -P 0x22 1M 3M' "$1" | grep -v -q 'verification failed'"#;
        Host::B.ok(&["bash", "-c", holds, "x", &raw(disk)]);
        Host::B.ok(&["bash", "-c", r#"(( $(du -k "$1" | cut -f1) < 8192 ))"#, "sparse", &raw(disk)]);
    }
    Host::B.ok(&["virsh", "-q", "start", name]);
    assert!(there.runs());
}

#[test]
fn a_domain_that_is_off_gets_images_in_the_formats_of_its_source() {
    let lab = Lab::get();
    let pattern = "write -P 0x11 1M 3M";
    let vm = lab.domain("raw-off").disk(Disk::qcow2("16M").then(pattern)).disk(Disk::raw("16M").then(pattern)).off();
    vm.sync().sealed();
    let (b, there) = (Drills::of(&vm), OnB(&vm));
    let name = vm.name.as_str();
    b.run("", &["failover", name, "--unplanned", "--source-is-dead"]).success();
    b.run("", &["failover", name, "--commit"]).success();
    Host::B.ok(&["virsh", "-q", "destroy", name]);
    b.run("", &["detach", name, "--disk-format", "same", "--json"]).success().says(&["\"raw\":[\"vdb\"]"]);
    let dir = there.overlays();
    let left = Host::B.output(&["ls", &dir]);
    assert_eq!(left.split_whitespace().collect::<Vec<_>>(), ["vda.qcow2", "vdb.raw"]);
    Host::B.ok(&["virsh", "-q", "start", name]);
    assert_eq!(images(&vm), [format!("{dir}/vda.qcow2"), format!("{dir}/vdb.raw")]);
    Host::B.ok(&["virsh", "-q", "destroy", name]);
    let holds = r#"qemu-io -f raw -c 'read -P 0x11 1M 3M' "$1" | grep -v -q 'verification failed'"#;
    Host::B.ok(&["bash", "-c", holds, "x", &format!("{dir}/vdb.raw")]);
}
