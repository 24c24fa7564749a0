//! The commands that look: `verify` finds what is damaged and what differs, `status` and `doctor` say how a domain
//! stands.

use super::WAY;
use super::domain::{Disk, Domain, by_backup, image_of};
use super::support::{Done, Host, Lab, PATIENCE, SyncResult};
use serde_json::Value;

fn small() -> Disk {
    Disk::qcow2("32M").then("write -P 0x11 1M 3M")
}

fn verify(vm: &Domain, args: &[&str]) -> Done {
    let mut words = vec!["verify", &vm.name, "--to", &vm.to, "--json"];
    words.extend(args);
    if args.contains(&"--against-source") {
        words.extend(WAY);
    }
    Host::A.virt_replica(&words)
}

/// One bit anywhere in what a point stands on: found, and named with disk and block.
#[test]
fn verify_finds_one_flipped_byte() {
    let lab = Lab::get();
    let vm = lab.domain("flip").disk(small()).disk(Disk::raw("8M").then("write -P 0x22 1M 1M")).paused();
    vm.sync().sealed();
    let first = vm.head();
    vm.write(1, "-P 0x33 2M 64k");
    vm.sync().sealed();
    let whole = verify(&vm, &[]).success();
    assert!(whole.stdout.contains("\"equal\":true"), "{}", whole.stdout);
    // The source may be gone: the target reads its own points.
    let local = ["verify", &vm.name, "--to", "local:/var/lib/virt-replica"];
    Host::B.virt_replica(&local).success();

    // In the older point's image, where the first 0x22 of block 16 lies; the newer one stands on it.
    let image = image_of(&first, "vdb");
    let map: Value = serde_json::from_str(&Host::B.output(&["qemu-img", "map", "--output=json", &image])).unwrap();
    let extent = map.as_array().unwrap().iter().find(|e| e["data"] == true).unwrap();
    assert_eq!(extent["start"], 1 << 20);
    let offset = extent["offset"].as_u64().unwrap() + 4711;
    Host::B.script(
        "printf '\\x23' | dd of=\"$1\" bs=1 seek=\"$2\" conv=notrunc status=none",
        &[&image, &offset.to_string()],
    );
    for args in [vec![], vec!["--point", first["id"].as_str().unwrap()]] {
        let damaged = verify(&vm, &args).exit(13);
        let said: Value = serde_json::from_str(damaged.stdout.lines().last().unwrap()).unwrap();
        assert_eq!(said["equal"], false);
        let disk = |name| said["disks"].as_array().unwrap().iter().find(|d| d["name"] == name).unwrap();
        assert_eq!((&disk("vdb")["damaged"], &disk("vda")["damaged_count"]), (&serde_json::json!([16]), &0.into()));
    }
    let words = Host::A.virt_replica(&["verify", &vm.name, "--to", &vm.to]).exit(13);
    let words = words.says(&["vdb", "16", "damaged"]);
    assert!(words.stderr.contains("hint:"), "{}", words.stderr);
    Host::B.virt_replica(&local).exit(13);
    verify(&vm, &["--point", "000009-00000000"]).exit(4);
}

#[test]
fn verify_against_the_source() {
    let lab = Lab::get();
    let vm = lab.domain("against").disk(small()).paused();
    verify(&vm, &["--against-source"]).exit(4);
    vm.sync().sealed();
    let last = |done: Done| -> Value { serde_json::from_str(done.stdout.lines().last().unwrap()).unwrap() };
    let equal = last(verify(&vm, &["--against-source"]).success());
    assert_eq!((&equal["equal"], &equal["disks"][0]["equal"]), (&true.into(), &true.into()), "{equal:#}");
    vm.assert_home();
    vm.write(0, "-P 0x44 6M 64k");
    let differs = last(verify(&vm, &["--against-source"]).exit(13));
    assert_eq!((&differs["equal"], &differs["disks"][0]["blocks_differ"]), (&false.into(), &1.into()), "{differs:#}");
    vm.assert_home();
    assert_eq!(vm.points().len(), 1, "it changes nothing at the target");
}

/// While a run holds a domain `status` and `doctor` say so, and touch nothing.
#[test]
fn status_and_doctor() {
    let lab = Lab::get();
    let vm = lab.domain("status").disk(small()).paused();
    let state = || {
        let all = Host::A.json(&["status", &vm.name, "--json"]);
        all["domains"][0].clone()
    };
    assert_eq!(state()["state"], "never_replicated");
    let mut run = vm.start_sync("5f=sleep:2500", &[]);
    run.wait_step(5);
    assert_eq!(state()["state"], if by_backup() { "by_backup" } else { "on_overlay" });
    assert_eq!(vm.live_images()[0].contains(".vr-"), !by_backup());
    let done = SyncResult::of(run.wait(PATIENCE)).sealed();
    let after = state();
    assert_eq!(after["state"], "ok", "{after:#}");
    assert!(after.to_string().contains(done.id()), "the head is named: {after:#}");
    Host::A.virt_replica(&["doctor", &vm.name]).success();
    vm.assert_home();
}
