//! Points of a store from the outside: listed, verified, pruned, handed out as files and over NBD.

use super::*;

/// The contract of issue and docs/formats/json.md: names, order, absolute paths.
#[test]
fn points_are_listed_oldest_first_also_without_a_source() {
    let store = StoreWithPoints::new();
    for domain in ["web01", UUID] {
        let output = run(&["points", domain, "--to", &store.target(), "--json"]);
        expect_code(&output, 0);
        assert_eq!(stdout(&output).lines().count(), 1);
        let json: Value = serde_json::from_str(&stdout(&output)).unwrap();
        let points = json["points"].as_array().unwrap();
        let ids: Vec<&str> = points.iter().map(|p| p["id"].as_str().unwrap()).collect();
        assert_eq!(ids, ["000001-00000001", "000002-00000002"]);
        for point in points {
            for name in ["id", "generation", "frozen_at", "sealed_at", "consistency", "disks"] {
                assert!(point.get(name).is_some(), "'{name}' is missing in {point}");
            }
            for disk in point["disks"].as_array().unwrap() {
                for name in ["name", "image", "mode", "reason", "bytes_read", "bytes_sent", "bytes_written"] {
                    assert!(disk.get(name).is_some(), "'{name}' is missing in {disk}");
                }
                let image = Path::new(disk["image"].as_str().unwrap());
                assert!(image.is_absolute() && image.exists(), "{image:?}");
            }
        }
        assert_eq!(points[0]["frozen_at"], "2026-01-02T03:01:05Z");
        assert_eq!(points[1]["disks"][0]["mode"], "digest");
    }
    let output = run(&["points", "web01", "--to", &store.target()]);
    expect_code(&output, 0);
    check("points.txt", &store.plain(&stdout(&output)));
    expect_code(&run(&["points", "web02", "--to", &store.target()]), 4);
}

#[test]
fn verify_says_whole_or_damaged_with_code_13() {
    let store = StoreWithPoints::new();
    let verify = |more: &[&str]| run(&[&["verify", "web01", "--to", &store.target()], more].concat());
    let whole = verify(&[]);
    expect_code(&whole, 0);
    check("verify.txt", &store.plain(&stdout(&whole)));
    expect_code(&verify(&["--point", "000001-00000001"]), 0);
    expect_code(&verify(&["--point", "000009-00000009"]), 4);

    let listed: Value =
        serde_json::from_str(&stdout(&run(&["points", UUID, "--to", &store.target(), "--json"]))).unwrap();
    let image = listed["points"][1]["disks"][0]["image"].as_str().unwrap().to_owned();
    let mut bytes = std::fs::read(&image).unwrap();
    let at =
        bytes.windows(4096).position(|w| w.iter().all(|b| *b == 0xbb)).expect("the guest's bytes are in its image");
    bytes[at + 100] ^= 1;
    std::fs::write(&image, bytes).unwrap();

    let damaged = verify(&["--json"]);
    expect_code(&damaged, 13);
    let text = stdout(&damaged);
    let end: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!((&end["message_type"], &end["equal"]), (&"verify".into(), &false.into()));
    assert_eq!((&end["point"], &end["disks"][0]["damaged"][0]), (&"000002-00000002".into(), &0.into()));
    let for_people = verify(&[]);
    expect_code(&for_people, 13);
    check("verify-damaged.txt", &store.plain(&(stdout(&for_people) + &stderr(&for_people))));
    // The point below it is what it was.
    expect_code(&verify(&["--point", "000001-00000001"]), 0);

    let scrubbed = run(&["scrub", "web01", "--to", &store.target()]);
    expect_code(&scrubbed, 13);
    check("scrub-damaged.txt", &store.plain(&(stdout(&scrubbed) + &stderr(&scrubbed))));
    let json = run(&["scrub", "web01", "--to", &store.target(), "--rate", "1G", "--json"]);
    expect_code(&json, 13);
    let end: Value = serde_json::from_str(stdout(&json).lines().last().unwrap()).unwrap();
    assert_eq!((&end["finished"], &end["damage"][0]["point"]), (&true.into(), &"000002-00000002".into()), "{end:#}");
    let known: Value =
        serde_json::from_str(&stdout(&run(&["points", UUID, "--to", &store.target(), "--json"]))).unwrap();
    assert_eq!(known["scrub"]["damage"], end["damage"]);
    let again = verify(&["--json"]);
    let again: Value = serde_json::from_str(stdout(&again).lines().last().unwrap()).unwrap();
    assert_eq!(again["known_damage"], end["damage"]);
    expect_code(&run(&["scrub", "web01", "--to", &store.target(), "--rate", "0"]), 2);
}

/// What a dry run says is what happens, and what is held stays.
#[test]
fn points_are_pruned_as_was_said() {
    let store = StoreWithPoints::new();
    let target = store.target();
    let prune = |more: &[&str]| run(&[&["prune", "web01", "--to", &target], more].concat());
    let json = |output: &Output| -> Value {
        expect_code(output, 0);
        serde_json::from_str(stdout(output).lines().last().unwrap()).unwrap()
    };
    let ids = || -> Vec<String> {
        let listed = json(&run(&["points", "web01", "--to", &target, "--json"]));
        listed["points"].as_array().unwrap().iter().map(|p| p["id"].as_str().unwrap().to_owned()).collect()
    };
    let thought = prune(&["--keep", "last=1", "--dry-run"]);
    expect_code(&thought, 0);
    check("prune-dry-run.txt", &store.plain(&stdout(&thought)));
    assert_eq!(ids().len(), 2, "a dry run removes nothing");

    expect_code(&run(&["pin", "web01", "000001-00000001", "--to", &target, "--reason", "before the upgrade"]), 0);
    expect_code(&run(&["pin", "web01", "000009-00000009", "--to", &target]), 4);
    let listed = run(&["points", "web01", "--to", &target]);
    check("points-pinned.txt", &store.plain(&stdout(&listed)));
    let pinned = prune(&["--keep", "last=1"]);
    expect_code(&pinned, 0);
    check("prune-pinned.txt", &store.plain(&stdout(&pinned)));
    assert_eq!(ids().len(), 2);
    expect_code(&run(&["unpin", "web01", "000001-00000001", "--to", &target]), 0);

    let end = json(&prune(&["--point", "000001-00000001", "--json"]));
    assert_eq!((&end["message_type"], &end["dry_run"]), (&"prune".into(), &false.into()));
    assert_eq!(end["points"][0]["action"], "remove");
    assert_eq!(end["points"][1]["reasons"], serde_json::json!(["head", "not_named"]));
    assert_eq!(
        (&end["removed"], &end["folded"]),
        (&serde_json::json!(["000001-00000001"]), &serde_json::json!(["000001-00000001"]))
    );
    assert_eq!(ids(), ["000002-00000002"]);
    expect_code(&run(&["verify", "web01", "--to", &target]), 0);
    expect_code(&prune(&["--point", "000001-00000001"]), 4);
    // The newest one stays whatever is asked for.
    expect_code(&prune(&["--point", "000002-00000002"]), 1);
    assert_eq!(ids(), ["000002-00000002"]);
}

#[test]
fn a_disk_of_a_point_is_handed_out_as_a_file() {
    let store = StoreWithPoints::new();
    let target = store.target();
    let file = store.dir.path().join("out.img");
    let path = file.to_str().unwrap();
    let export = |more: &[&str]| run(&[&["export", "web01", "--to", &target, "--output", path], more].concat());
    let first = export(&["--point", "000001-00000001"]);
    expect_code(&first, 0);
    check("export.txt", &stdout(&first).replace(path, "/OUT"));
    let content = std::fs::read(&file).unwrap();
    assert!(content.len() == 1 << 20 && content[..64 << 10].iter().all(|b| *b == 0xaa));
    assert!(content[64 << 10..].iter().all(|b| *b == 0));
    use std::os::unix::fs::MetadataExt;
    assert!(std::fs::metadata(&file).unwrap().blocks() * 512 < 256 << 10, "sparse");

    // What is there is not replaced unasked.
    expect_code(&export(&[]), 1);
    assert_eq!(std::fs::read(&file).unwrap(), content);
    expect_code(&export(&["--force", "--format", "qcow2", "--disk", "vda", "--json"]), 0);
    let raw = store.dir.path().join("raw.img");
    let convert = ["convert", "-f", "qcow2", "-O", "raw", path, raw.to_str().unwrap()];
    let done = Command::new("qemu-img").args(convert).status().unwrap();
    let content = std::fs::read(&raw).unwrap();
    assert!(done.success() && content.len() == 1 << 20 && content[..64 << 10].iter().all(|b| *b == 0xbb));
    expect_code(&export(&["--force", "--disk", "vdb"]), 4);
    expect_code(&export(&["--force", "--point", "000009-00000009"]), 4);

    // Damage is not handed out as the point, and nothing half done is left.
    let image = std::fs::read_dir(store.root().join("replicas").join(UUID).join("points/000002-00000002"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.extension().is_some_and(|e| e == "qcow2"))
        .unwrap();
    let mut bytes = std::fs::read(&image).unwrap();
    let at = bytes.windows(4096).position(|w| w.iter().all(|b| *b == 0xbb)).unwrap();
    bytes[at + 9] ^= 1;
    std::fs::write(&image, bytes).unwrap();
    let other = store.dir.path().join("other.img");
    expect_code(&run(&["export", "web01", "--to", &target, "--output", other.to_str().unwrap()]), 13);
    let left: Vec<String> = std::fs::read_dir(store.dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n.contains("other") || n.contains(".part"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Over NBD on the host of the store: QEMU reads it, the point is leased, and all of it ends with the command.
#[test]
fn a_disk_of_a_point_is_served_over_nbd() {
    use std::io::{BufRead, BufReader};
    let store = StoreWithPoints::new();
    let target = store.target();
    let socket = store.dir.path().join("s");
    let args = ["export", "web01", "--to", &target, "--point", "000001-00000001", "--json", "--nbd"];
    let path = std::env::var_os("PATH").unwrap();
    let mut server =
        program().env("PATH", path).args(args).arg(&socket).stdout(Stdio::piped()).spawn().expect("it starts");
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let said: Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&said["message_type"], &said["size"]), (&"nbd".into(), &(1 << 20).into()));
    let raw = store.dir.path().join("raw.img");
    let url = format!("nbd+unix:///?socket={}", socket.display());
    let convert = ["convert", "-f", "raw", "-O", "raw", &url, raw.to_str().unwrap()];
    assert!(Command::new("qemu-img").args(convert).status().unwrap().success());
    assert!(std::fs::read(&raw).unwrap()[..64 << 10].iter().all(|b| *b == 0xaa));
    let listed = |what: &str| -> Value {
        let output = run(&["points", "web01", "--to", &target, "--json"]);
        let json: Value = serde_json::from_str(&stdout(&output)).unwrap();
        json[what].clone()
    };
    assert!(listed("leases").as_array().unwrap().iter().any(|l| l["purpose"] == "nbd"), "{}", listed("leases"));
    let pruned = run(&["prune", "web01", "--to", &target, "--point", "000001-00000001"]);
    expect_code(&pruned, 0);
    assert!(stdout(&pruned).contains("in use"), "{}", stdout(&pruned));
    rustix::process::kill_process(rustix::process::Pid::from_child(&server), rustix::process::Signal::INT).unwrap();
    assert!(server.wait().unwrap().success());
    assert!(!socket.exists() && listed("leases").as_array().unwrap().is_empty(), "{}", listed("leases"));
    // Elsewhere there is no qemu-nbd of ours.
    expect_code(&run(&["export", "web01", "--to", "ssh://nowhere", "--nbd", "/tmp/s"]), 2);
}
