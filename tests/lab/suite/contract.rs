//! What scripts depend on: names in JSON, exit codes, and that a plan touches nothing. Additions are fine, renames are
//! not.

use super::domain::Disk;
use super::support::{Done, Host, Lab};
use serde_json::Value;

fn small() -> Disk {
    Disk::qcow2("32M").then("write -P 0x11 1M 3M")
}

const OF_A_POINT: [&str; 6] = ["id", "generation", "frozen_at", "sealed_at", "consistency", "disks"];
const OF_A_DISK: [&str; 7] = ["name", "image", "mode", "reason", "bytes_read", "bytes_sent", "bytes_written"];

fn has_shape(point: &Value) {
    let has = |value: &Value, keys: &[&str]| {
        for key in keys {
            assert!(!value[key].is_null(), "{key} is missing in {value:#}");
        }
    };
    has(point, &OF_A_POINT);
    let disks = point["disks"].as_array().unwrap();
    assert!(!disks.is_empty());
    for disk in disks {
        has(disk, &OF_A_DISK);
        assert!(disk["image"].as_str().unwrap().starts_with('/'), "{disk:#}");
        for bytes in &OF_A_DISK[4..] {
            assert!(disk[bytes].is_u64(), "{disk:#}");
        }
    }
    for time in ["frozen_at", "sealed_at"] {
        point[time].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    }
    assert!(point["generation"].is_u64(), "{point:#}");
}

#[test]
fn the_names_in_json() {
    let lab = Lab::get();
    let vm = lab.domain("names").disk(small()).disk(Disk::raw("8M")).paused();
    let first = vm.sync().sealed();
    let second = vm.sync().sealed();
    for report in [&first.report, &second.report] {
        has_shape(report);
        for time in ["freeze_ms", "pause_ms", "pause_sum_ms", "pauses", "duration_ms"] {
            assert!(report[time].is_number(), "{time} in {report:#}");
        }
    }
    let points = vm.points();
    points.iter().for_each(has_shape);
    let ids: Vec<&Value> = points.iter().map(|p| &p["id"]).collect();
    assert_eq!(ids, [&first.report["id"], &second.report["id"]], "oldest first");
    for (point, report) in points.iter().zip([&first.report, &second.report]) {
        for key in OF_A_POINT {
            assert_eq!(point[key], report[key], "{key}");
        }
    }
    assert!(points[0]["frozen_at"].as_str() < points[1]["frozen_at"].as_str());
    for (at, step) in (1..=8).enumerate() {
        let steps: Vec<u64> = first.lines.iter().filter_map(|l| l["step"].as_u64()).collect();
        assert_eq!(steps[at], step, "{steps:?}");
    }
}

#[test]
fn exit_codes_and_the_last_line_of_stderr() {
    let lab = Lab::get();
    let vm = lab.domain("codes").disk(small()).off();
    let to = vm.to.as_str();
    let last = |done: &Done| -> Value { serde_json::from_str(done.stderr.lines().last().unwrap()).unwrap() };
    for (args, code) in [
        (vec!["sync", "no-such-domain", "--to", to, "--json"], 4),
        (vec!["points", "no-such-domain", "--to", to, "--json"], 4),
        (vec!["sync", &vm.name, "--to", "no-such-target", "--json"], 4),
        (vec!["sync", &vm.name, "--to", "root@b:/srv", "--json"], 2),
        (vec!["sync", &vm.name, "--json"], 2),
    ] {
        let done = Host::A.virt_replica(&args).exit(code);
        let error = last(&done);
        assert_eq!((&error["message_type"], &error["code"]), (&"exit_error".into(), &code.into()), "{error:#}");
        assert!(done.stdout.is_empty(), "results only: {}", done.stdout);
    }
}

/// A plan may be asked for at any time: it touches nothing, here or there.
#[test]
fn a_plan_touches_nothing() {
    let lab = Lab::get();
    let vm = lab.domain("plan").disk(small()).paused();
    let before = vm.virsh(&["dumpxml"]);
    let plan = vm.plan();
    assert_eq!((&plan["disks"][0]["mode"], &plan["capture"]), (&"full".into(), &"overlay".into()), "{plan:#}");
    assert!(!plan["disks"][0]["reason"].as_str().unwrap().is_empty());
    assert_eq!(plan["conflicts"], serde_json::json!([]));
    assert_eq!(vm.virsh(&["dumpxml"]), before);
    vm.assert_home();
    assert!(!Host::B.file(vm.replica()).exists(), "nothing was made at the target");
    vm.sync().sealed();
    assert_ne!(vm.plan()["disks"][0]["mode"], "full");
}

/// A program that ends has taken leave of libvirtd, which crashes now and then over one that just goes (see `Gate`).
#[test]
fn a_program_that_ends_takes_leave_of_libvirtd() {
    let lab = Lab::alone();
    let vm = lab.domain("leaves").disk(small()).paused();
    let broken_off = || {
        let log = std::fs::read_to_string(Host::A.file("/var/log/libvirt/libvirtd.log")).unwrap();
        log.lines().filter(|l| l.contains("End of file while reading data")).count()
    };
    let before = broken_off();
    vm.sync().sealed();
    for command in ["doctor", "status"] {
        for _ in 0..5 {
            Host::A.virt_replica(&[command, &vm.name]).success();
        }
    }
    assert_eq!(broken_off(), before, "libvirtd found the socket broken");
}
