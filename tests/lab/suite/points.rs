//! Points come and go while replication goes on: retention, pins, exports, a store that removes nothing young.

use super::domain::{Disk, Domain};
use super::support::{Host, KeyLine, Lab, PATIENCE, SyncResult, Undo};
use serde_json::Value;

fn small() -> Disk {
    Disk::qcow2("32M").then("write -P 0x11 1M 3M")
}

fn ids(vm: &Domain) -> Vec<String> {
    vm.points().iter().map(|p| p["id"].as_str().unwrap().to_owned()).collect()
}

fn sequences(vm: &Domain) -> Vec<u64> {
    ids(vm).iter().map(|id| id.split('-').next().unwrap().parse().unwrap()).collect()
}

/// A key that starts an agent with these options, whatever the client asks for: what sshd does with
/// `command="virt-replica agent --min-age 7d"`.
struct OwnAgent {
    file: String,
    _line: KeyLine,
}

impl OwnAgent {
    fn of(vm: &Domain, options: &str) -> OwnAgent {
        let shared = vm.shared();
        let script =
            r#"mkdir -p "$1"; printf '#!/bin/sh\nexec virt-replica agent %s\n' "$2" >"$1/agent"; chmod 755 "$1/agent""#;
        Host::B.script(script, &[&shared, options]);
        let own_key = r#"
            ssh-keygen -q -t ed25519 -N '' -f "$1/key"
            printf 'restrict,command="%s/agent" %s\n' "$1" "$(cat "$1/key.pub")""#;
        let line = Host::A.script(own_key, &[&shared]);
        OwnAgent { file: format!("{shared}/key"), _line: KeyLine::add(&line) }
    }
}

/// Every run prunes; what is left can be read, exported, and compared with what the guest had at that freeze.
#[test]
fn points_are_pruned_by_every_run_and_exported_over_ssh() {
    let lab = Lab::get();
    let vm = lab.domain("points").disk(small()).disk(Disk::raw("8M").then("write -P 0x22 1M 1M")).paused();
    let kept = |n: u64, disk: &str| format!("{}/{n}-{disk}", vm.shared());
    for n in 1..=6 {
        vm.write(0, &format!("-P {n} {n}M 256k"));
        vm.write(1, &format!("-z {n}M 64k"));
        let result = vm.sync_with("", &["--keep", "last=3"]).sealed();
        // It is paused: this is what it had at the freeze. Before the run QEMU might have kept tables to itself.
        for (disk, name) in ["vda", "vdb"].iter().enumerate() {
            Host::A.ok(&["cp", "--sparse=always", &vm.copy(disk).file, &kept(n, name)]);
        }
        vm.assert_home();
        if n == 2 {
            Host::A.virt_replica(&["pin", &vm.name, result.id(), "--to", &vm.to, "--reason", "before"]).success();
        }
    }
    assert_eq!(sequences(&vm), [2, 4, 5, 6], "three newest and the pinned one");
    vm.compare_with_head();
    let out = format!("{}/out", vm.shared());
    for (id, n) in ids(&vm).iter().zip(sequences(&vm)) {
        Host::A.virt_replica(&["verify", &vm.name, "--to", &vm.to, "--point", id]).success();
        for disk in ["vda", "vdb"] {
            let words =
                ["export", &vm.name, "--to", &vm.to, "--point", id, "--disk", disk, "--output", &out, "--force"];
            Host::A.virt_replica(&words).success();
            Host::A.ok(&["cmp", &out, &kept(n, disk)]);
        }
    }
    // On the host of the store, without a source.
    let local = ["export", &vm.name, "--to", "local:/var/lib/virt-replica", "--disk", "vda", "--output", &out];
    Host::B.virt_replica(&[&local[..], &["--force", "--format", "qcow2"]].concat()).success();
    Host::B.ok(&["qemu-img", "check", "-q", &out]);
    // And by hand.
    let pruned = Host::A.json(&["prune", &vm.name, "--to", &vm.to, "--keep", "last=1", "--json"]);
    assert_eq!(pruned["removed"].as_array().unwrap().len(), 2, "{pruned:#}");
    assert_eq!(sequences(&vm), [2, 6]);
    vm.write(0, "-P 0x77 9M 64k");
    vm.sync().sealed().incremental("vda");
    vm.compare_with_head();
}

/// A key that may start just this agent cannot remove what is young; and nobody prunes beside a run.
#[test]
fn young_points_and_a_run_under_way_are_safe_from_a_prune() {
    let lab = Lab::get();
    let vm = lab.domain("floor").disk(small()).paused();
    vm.sync().sealed();
    vm.write(0, "-P 0x33 2M 64k");
    vm.sync().sealed();
    let key = OwnAgent::of(&vm, "--min-age 7d");
    let with_key = ["--identity", key.file.as_str()];
    let refused = Host::A.virt_replica(
        &[&["prune", &vm.name, "--to", &vm.to, "--point", &ids(&vm)[0], "--json"][..], &with_key].concat(),
    );
    drop(key);
    let said: Value = serde_json::from_str(refused.success().stdout.lines().last().unwrap()).unwrap();
    assert_eq!(said["points"][0]["action"], "keep", "{said:#}");
    assert!(said["points"][0]["reasons"][0]["young"].as_u64().unwrap() > 6 * 86_400, "{said:#}");
    assert_eq!(ids(&vm).len(), 2);

    let mut run = vm.start_sync("5f=sleep:2500", &[]);
    run.wait_step(5);
    Host::A.virt_replica(&["prune", &vm.name, "--to", &vm.to, "--keep", "last=1"]).exit(11).says(&["run"]);
    SyncResult::of(run.wait(PATIENCE)).sealed();
    assert_eq!(ids(&vm).len(), 3);
    vm.assert_home();
}

/// The target keeps the chain short by itself, and no point is lost for it; where it has no room for that, it says so.
#[test]
fn a_chain_stays_as_short_as_the_target_wants_it() {
    let lab = Lab::get();
    let vm = lab.domain("short").disk(small()).disk(Disk::raw("8M").then("write -P 0x22 1M 1M")).paused();
    let kept = |n: u64, disk: &str| format!("{}/{n}-{disk}", vm.shared());
    let root = format!("/srv/short-{}", vm.name);
    lab.tool(&["small-fs", "b", &root, "256M"]);
    let _undo = Undo(|| drop(lab.tool(&["small-fs", "b", &root, "off"])));
    let key = OwnAgent::of(&vm, &format!("--root {root}/store --max-depth 3"));
    let with_key = ["--identity", key.file.as_str()];
    let holds = || Host::A.json(&[&["points", &vm.name, "--to", &vm.to, "--json"][..], &with_key].concat());
    let mut shortened = Vec::new();
    for n in 1..=6u64 {
        vm.write(0, &format!("-P {n} {n}M 256k"));
        vm.write(1, &format!("-z {n}M 64k"));
        let run = vm.sync_with("", &with_key).sealed();
        if n > 1 {
            // The bitmaps lead on over a chain that was changed beneath them.
            run.incremental("vda");
        }
        let of_run = run.lines.iter().filter(|l| l["message_type"] == "shorten");
        shortened.extend(of_run.map(|m| (n, m["disks"].as_array().unwrap().len())));
        for (disk, name) in ["vda", "vdb"].iter().enumerate() {
            Host::A.ok(&["cp", "--sparse=always", &vm.copy(disk).file, &kept(n, name)]);
        }
        let depth = holds()["depth"].as_u64().unwrap();
        assert!(depth < 3, "run {n}: {depth}: {:#?}", run.done);
    }
    assert_eq!(shortened, [(3, 2), (5, 2)]);
    let out = format!("{}/out", vm.shared());
    let all = holds()["points"].as_array().unwrap().clone();
    assert_eq!(all.len(), 6);
    for (point, n) in all.iter().zip(1..) {
        for disk in ["vda", "vdb"] {
            let which = ["--point", point["id"].as_str().unwrap(), "--disk", disk, "--output", &out, "--force"];
            Host::A.virt_replica(&[&["export", &vm.name, "--to", &vm.to], &which[..], &with_key].concat()).success();
            Host::A.ok(&["cmp", &out, &kept(n, disk)]);
        }
    }
    // No room for a second copy: the run is one all the same, and says what to do.
    let free = Host::B.output(&["df", "--output=avail", "-B1M", &root]);
    let free: u64 = free.lines().last().unwrap().trim().parse().unwrap();
    Host::B.ok(&["fallocate", "-l", &format!("{}M", free - 68), &format!("{root}/filler")]);
    vm.write(0, "-P 0x77 20M 64k");
    let run = vm.sync_with("", &with_key).sealed();
    let warnings = run.report["warnings"].to_string();
    assert!(warnings.contains("more images than the target allows") && warnings.contains("prune"), "{warnings}");
    Host::B.ok(&["rm", &format!("{root}/filler")]);
    Host::A.virt_replica(&[&["verify", &vm.name, "--to", &vm.to][..], &with_key].concat()).success();
    vm.assert_home();
}
