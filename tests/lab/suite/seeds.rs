//! First copies that do not begin from nothing: one that was broken off goes on, one that was brought is built on.

use super::domain::Disk;
use super::support::{Host, Job, Lab, PATIENCE, STORE, SyncResult, Undo, eventually};
use serde_json::Value;
use std::time::Duration;

const DATA_MIB: u64 = 48;

/// ssh is cut when 60 % are there: the next run sends the rest, and what the guest wrote meanwhile.
#[test]
fn a_first_copy_that_was_cut_off_goes_on() {
    let lab = Lab::alone();
    let script = format!("head -c {DATA_MIB}M /dev/urandom >\"$1\"; truncate -s 256M \"$1\"");
    let vm = lab.domain("resume").disk(Disk::made_by("raw", &script)).paused();
    lab.tool(&["link-rate", "a", "60mbit"]);
    let _undo = Undo(|| drop(lab.tool(&["link-rate", "a", "off"])));
    let mut run = Job::start(Host::A.command(&["virt-replica", "sync", &vm.name, "--to", &vm.to, "--json"]));
    run.wait_line(PATIENCE, "60 % sent", |line| {
        let line: Value = serde_json::from_str(line).unwrap_or_default();
        line["bytes_sent"].as_u64().is_some_and(|sent| sent >= (DATA_MIB * 6 / 10) << 20)
    });
    // The lab is this test's alone: every ssh on host a is this run's.
    Host::A.ok(&["pkill", "-KILL", "-x", "ssh"]);
    SyncResult::of(run.wait(PATIENCE)).exit(1);
    vm.assert_home();
    lab.tool(&["link-rate", "a", "off"]);
    let seed = format!("{}/seeds/vda.qcow2", vm.replica());
    let kept = eventually("what arrived to be kept", Duration::from_secs(40), || {
        let done = Host::B.run(&["du", "-B1", &seed]);
        done.stdout.split_whitespace().next()?.parse::<u64>().ok()
    });
    assert!(kept > (DATA_MIB * 4 / 10) << 20, "{kept} bytes of {DATA_MIB} MiB are kept");

    vm.write(0, "-P 0x77 5M 64k");
    let plan = vm.plan();
    assert!(plan["disks"][0]["reason"].as_str().unwrap().contains("of a copy are there"), "{plan:#}");
    let second = vm.sync().sealed();
    assert_eq!(second.mode("vda"), "digest");
    let sent = second.bytes("vda", "bytes_sent");
    assert!(sent + kept < (DATA_MIB + 4) << 20, "{kept} bytes were there, {sent} were sent again");
    assert!(sent < (DATA_MIB * 6 / 10) << 20, "{sent} bytes");
    vm.compare_with_head();
    vm.assert_home();
    Host::B.script("test ! -e \"$1\"", &[&seed]);
    // From here on it is a replica as any other.
    vm.write(0, "-P 0x78 6M 64k");
    let third = vm.sync().sealed();
    assert_eq!((third.mode("vda"), third.bytes("vda", "blocks_changed")), ("bitmap", 1));
    vm.compare_with_head();
}

/// An old copy came by car: adopted on the target, and the first run sends what is newer.
#[test]
fn a_copy_that_was_brought_is_built_on() {
    let lab = Lab::get();
    let vm = lab.domain("car").disk(Disk::qcow2("128M").then("write -P 0x41 0 32M")).paused();
    let brought = format!("{}/brought.raw", vm.shared());
    Host::A.ok(&["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", &vm.live_images()[0], &brought]);
    let refused = Host::B.virt_replica(&["seed", &vm.name, "--from", &brought, "--format", "raw"]);
    refused.exit(2).says(&["virsh domuuid"]);
    let seeded = Host::B.json(&["seed", &vm.uuid, "--from", &brought, "--format", "raw", "--json"]);
    assert_eq!((&seeded["size"], &seeded["data_bytes"]), (&(128 << 20).into(), &(32 << 20).into()));
    vm.write(0, "-P 0x42 1M 128k");
    let first = vm.sync().sealed();
    assert_eq!((first.mode("vda"), first.bytes("vda", "blocks_changed")), ("digest", 2), "{:#}", first.report);
    assert!(first.bytes("vda", "bytes_sent") < 64 << 10, "{:#}", first.report);
    vm.compare_with_head();
    let late = Host::B.virt_replica(&["seed", &vm.uuid, "--from", &brought, "--format", "raw"]);
    late.exit(1).says(&["nothing to seed"]);
}

/// A whole point came by car, in one file, from a store beside the source: the first run over the network sends what is
/// newer.
#[test]
fn a_point_that_was_brought_in_a_file_is_built_on() {
    let lab = Lab::get();
    let vm = lab.domain("car-point").disk(Disk::qcow2("128M").then("write -P 0x41 0 32M")).paused();
    let (own, file) = (format!("{}/own-store", vm.shared()), format!("{}/point", vm.shared()));
    Host::A.virt_replica(&["sync", &vm.name, "--to", &own]).success();
    Host::A.virt_replica(&["diff", "--point", &vm.name, "--to", &own, "-o", &file]).success();
    for _ in 0..2 {
        Host::B.virt_replica(&["apply", &file, "--to", STORE]).success();
    }
    vm.write(0, "-P 0x42 1M 128k");
    let first = vm.sync().sealed();
    assert_eq!((first.mode("vda"), first.bytes("vda", "blocks_changed")), ("digest", 2), "{:#}", first.report);
    assert!(first.bytes("vda", "bytes_sent") < 64 << 10, "{:#}", first.report);
    vm.compare_with_head();

    // And the way back: what is newer, over ssh and through a pipe, onto the store beside the source.
    let since = Host::A.json(&["points", &vm.name, "--to", &vm.to, "--json"])["points"][0]["id"].clone();
    let script = r#"virt-replica diff --point "$1" --since "$2" --to "$3" -o - | virt-replica apply - --to "$4""#;
    let done = Host::A.script(script, &[&vm.name, since.as_str().unwrap(), &vm.to, &own]);
    println!("{done}");
    Host::A.virt_replica(&["verify", &vm.name, "--to", &own]).success();
}
