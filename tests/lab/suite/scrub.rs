//! A scrub over ssh: it finds what has rotted in the head, can be stopped, and the next run mends the head and says so.

use super::domain::Disk;
use super::support::{Host, Lab};
use serde_json::Value;

#[test]
fn a_scrub_finds_damage_and_the_next_run_mends_the_head() {
    let lab = Lab::get();
    let disk = Disk::qcow2("32M").then("write -P 0x11 1M 3M");
    let vm = lab.domain("rot").disk(disk).disk(Disk::raw("8M").then("write -P 0x22 1M 1M")).paused();
    vm.sync().sealed();
    vm.write(0, "-P 0x33 2M 64k");
    vm.sync().sealed();
    let ids: Vec<String> = vm.points().iter().map(|p| p["id"].as_str().unwrap().to_owned()).collect();
    let scrub = |more: &[&str]| Host::A.virt_replica(&[&["scrub", &vm.name, "--to", &vm.to][..], more].concat());
    let last = |text: &str| -> Value { serde_json::from_str(text.lines().last().unwrap()).unwrap() };
    let sound = last(&scrub(&["--json"]).success().stdout);
    assert_eq!((&sound["finished"], &sound["damage"]), (&true.into(), &serde_json::json!([])), "{sound:#}");

    // In the head's own cluster, and in one of the first point that the head reads through.
    for (point, byte) in [(1, "0x33"), (0, "0x22")] {
        let image = vm.points()[point]["disks"][1 - point]["image"].as_str().unwrap().to_owned();
        let map: Value = serde_json::from_str(&Host::B.output(&["qemu-img", "map", "--output=json", &image])).unwrap();
        let own = |e: &&Value| e["data"] == true && e["depth"] == 0;
        let at = map.as_array().unwrap().iter().find(own).unwrap()["offset"].as_u64().unwrap() + 4711;
        let script = r#"
            was=$(od -An -tx1 -j "$2" -N 1 "$1" | tr -d ' ')
            [ "0x$was" = "$3" ] || { echo "there is $was" >&2; exit 1; }
            printf '\377' | dd of="$1" bs=1 seek="$2" conv=notrunc status=none"#;
        Host::B.script(script, &[&image, &at.to_string(), byte]);
    }
    let words = scrub(&[]).exit(13).says(&["vda", "vdb", &ids[0], &ids[1]]);
    assert!(words.stdout.contains(&format!("vda of {}, bytes 2097152 to 2162688", ids[1])), "{}", words.stdout);
    assert!(
        words.stdout.contains(&format!("vdb of {}, bytes 1048576 to 1114112; also read by {}", ids[0], ids[1])),
        "{}",
        words.stdout
    );
    // On the target itself; in the list of points; in the state.
    Host::B.virt_replica(&["scrub", &vm.name, "--to", "local:/var/lib/virt-replica", "--rate", "64M"]).exit(13);
    let points = Host::A.json(&["points", &vm.name, "--to", &vm.to, "--json"]);
    assert_eq!(points["scrub"]["damage"].as_array().unwrap().len(), 2, "{points:#}");
    let status = Host::A.json(&["status", &vm.name, "--to", &vm.to, "--json"]);
    assert_eq!(status["domains"][0]["state"], "needs_attention", "{status:#}");

    let synced = Host::A.virt_replica(&["sync", &vm.name, "--to", &vm.to, "--json"]).success();
    let report = last(&synced.stdout);
    for disk in report["disks"].as_array().unwrap() {
        assert_eq!((&disk["mode"], &disk["blocks_changed"]), (&"digest".into(), &1.into()), "{report:#}");
        assert!(disk["reason"].as_str().unwrap().contains("scrub"), "{report:#}");
    }
    let warnings = report["warnings"].to_string();
    assert!(warnings.contains("vda") && warnings.contains("vdb") && warnings.contains("sent again"), "{warnings}");
    vm.assert_home();
    Host::A.virt_replica(&["verify", &vm.name, "--to", &vm.to]).success();
    vm.compare_with_head();
    let status = Host::A.json(&["status", &vm.name, "--to", &vm.to, "--json"]);
    assert_eq!(status["domains"][0]["state"], "ok", "{status:#}");
    // The points before stay as they are; the next run is a cheap one again.
    let known = scrub(&["--json"]).exit(13);
    assert_eq!(last(&known.stdout)["damage"].as_array().unwrap().len(), 2, "{}", known.stdout);
    vm.write(0, "-P 0x44 3M 64k");
    vm.sync().sealed().incremental("vda");
}

/// The rate leaves hours; the signal does not wait for them.
#[test]
fn a_scrub_that_is_stopped_leaves_the_rest_to_the_next() {
    let lab = Lab::get();
    let vm = lab.domain("stop").disk(Disk::qcow2("32M").then("write -P 0x11 1M 8M")).paused();
    vm.sync().sealed();
    let script = r#"
        virt-replica scrub "$1" --to "$2" --rate 64K --json >"$3" 2>"$3.err" & pid=$!
        n=0
        until grep -q '"progress"' "$3"; do
            n=$((n + 1)); [ "$n" -lt 600 ] && kill -0 "$pid" || { cat "$3.err" >&2; exit 1; }
            sleep 0.1
        done
        kill -TERM "$pid"; code=0; wait "$pid" || code=$?
        echo "$code"; tail -n 1 "$3""#;
    let said = Host::A.script(script, &[&vm.name, &vm.to, &format!("{}/scrubbed", vm.shared())]);
    let (code, message) = said.trim().split_once('\n').unwrap();
    let stopped: Value = serde_json::from_str(message).unwrap();
    assert_eq!((code, &stopped["finished"]), ("130", &false.into()), "{said}");
    let read = stopped["bytes_read"].as_u64().unwrap();
    assert!(read > 0);
    let rest = Host::A.virt_replica(&["scrub", &vm.name, "--to", &vm.to, "--json"]).success();
    let rest: Value = serde_json::from_str(rest.stdout.lines().last().unwrap()).unwrap();
    assert_eq!((&rest["resumed"], &rest["finished"]), (&true.into(), &true.into()), "{rest:#}");
    assert_eq!(read + rest["bytes_read"].as_u64().unwrap(), 8 << 20, "nothing twice: {rest:#}");
    let points = Host::A.json(&["points", &vm.name, "--to", &vm.to, "--json"]);
    assert_eq!(
        (&points["leases"], &points["scrub"]["last"]["bytes_read"]),
        (&serde_json::json!([]), &(8 << 20).into())
    );
}
