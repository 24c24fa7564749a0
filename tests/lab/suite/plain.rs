//! Images that belong to no domain, from host to host: over ssh, and as patches through a pipe of the user's own.

use super::support::{Host, Job, Lab, PATIENCE, Undo};

const TO: &str = "ssh://root@192.0.2.2";

/// A directory of the same name on both hosts, gone with the value.
fn directory() -> (String, Undo<impl FnMut()>) {
    let dir = format!("/var/tmp/plain-{}", std::process::id());
    for host in [Host::A, Host::B] {
        host.ok(&["mkdir", "-p", &dir]);
    }
    let gone = dir.clone();
    let undo = Undo(move || {
        for host in [Host::A, Host::B] {
            host.run(&["rm", "-rf", &gone]);
        }
    });
    (dir, undo)
}

fn sum(host: Host, path: &str) -> String {
    host.script("sha256sum <\"$1\"", &[path])
}

#[test]
fn images_are_copied_over_ssh_and_only_what_differs_travels() {
    let _lab = Lab::get();
    let (dir, _undo) = directory();
    let (image, to) = (format!("{dir}/a.raw"), format!("{TO}{dir}/a.raw"));
    Host::A.script(
        "truncate -s 200M \"$1\"; head -c 24M /dev/urandom | dd of=\"$1\" bs=1M seek=50 conv=notrunc",
        &[&image],
    );
    let copy = |args: &[&str]| {
        let done = Host::A.virt_replica(&[&["copy", &image, &to, "--json"], args].concat()).success();
        // What took long has said how far it was, in lines of its own.
        let last: serde_json::Value = serde_json::from_str(done.stdout.lines().last().unwrap()).unwrap();
        last["copied"].clone()
    };
    let first = copy(&["-a"]);
    assert_eq!((first["way"].as_str(), first["size"].as_u64()), (Some("new"), Some(200 << 20)));
    assert_eq!(sum(Host::A, &image), sum(Host::B, &image));
    let room: u64 = Host::B.script("stat -c %b \"$1\"", &[&image]).trim().parse().unwrap();
    assert!(room * 512 < 30 << 20, "sparse on the other side: {room}");
    assert!(copy(&[])["equal"].as_bool().unwrap());
    Host::A.script("printf x | dd of=\"$1\" bs=1 seek=55000000 conv=notrunc", &[&image]);
    let second = copy(&["--digests", &format!("{dir}/digests")]);
    assert_eq!(second["blocks_changed"], 1);
    assert!(second["bytes_sent"].as_u64().unwrap() < 10_000, "{second}");
    let third = copy(&["--digests", &format!("{dir}/digests")]);
    assert_eq!((third["equal"].as_bool(), third["bytes_read_target"].as_u64()), (Some(true), Some(0)));
    assert_eq!(sum(Host::A, &image), sum(Host::B, &image));
    // An image that a QEMU has there is left alone.
    Host::A.script("printf y | dd of=\"$1\" bs=1 seek=1 conv=notrunc", &[&image]);
    let hold = "(echo 'read 0 512'; exec sleep 600) | qemu-io -f raw \"$1\"";
    let mut held = Job::start(Host::B.command(&["bash", "-c", hold, "hold", &image]));
    held.wait_line(PATIENCE, "what it read", |line| line.contains("read 512/512"));
    Host::A.virt_replica(&["copy", &image, &to]).exit(11).says(&["a QEMU program has the image open"]);
}

#[test]
fn a_patch_is_made_against_the_other_host_and_carried_by_any_transport() {
    let _lab = Lab::get();
    let (dir, _undo) = directory();
    let image = format!("{dir}/a.qcow2");
    Host::A.script("head -c 8M /dev/urandom >\"$1.raw\"; qemu-img convert -O qcow2 \"$1.raw\" \"$1\"", &[&image]);
    Host::A.virt_replica(&["copy", &image, &format!("{TO}{image}")]).success();
    Host::A.script("qemu-io -f qcow2 -c 'write -P 7 1M 200k' \"$1\" >/dev/null", &[&image]);
    let carry =
        r#"virt-replica diff "$1" --base "$2$1" -o - | ssh root@192.0.2.2 virt-replica apply - "$1" --undo "$1.undo""#;
    Host::A.script(carry, &[&image, TO]);
    Host::A.virt_replica(&["copy", &image, &format!("{TO}{image}")]).success().says(&["is as its source"]);
    Host::B.virt_replica(&["apply", &format!("{image}.undo"), &image]).success();
    let compared = Host::B.script("qemu-img convert -O raw \"$1\" \"$1.raw\"; sha256sum <\"$1.raw\"", &[&image]);
    assert_eq!(compared, sum(Host::A, &format!("{image}.raw")), "back to what it was");
}

/// The other host's QEMU writes them, and its qemu-img is the judge.
#[test]
fn images_in_formats_of_others_are_written_on_the_other_host() {
    let _lab = Lab::get();
    let (dir, _undo) = directory();
    let image = format!("{dir}/a.raw");
    Host::A
        .script("truncate -s 70M \"$1\"; head -c 5M /dev/urandom | dd of=\"$1\" bs=1M seek=50 conv=notrunc", &[&image]);
    for format in ["vmdk", "vdi", "vhdx", "vpc", "qed"] {
        let there = format!("{dir}/a.{format}");
        let copy = |args: &[&str]| {
            let to = format!("{TO}{there}");
            let done =
                Host::A.virt_replica(&[&["copy", &image, &to, "--target-format", format, "--json"], args].concat());
            let done = done.success();
            let last: serde_json::Value = serde_json::from_str(done.stdout.lines().last().unwrap()).unwrap();
            last["copied"].clone()
        };
        let as_here = || {
            let judge = r#"qemu-img convert -f "$2" -O raw "$1" "$1.judge"; sha256sum <"$1.judge""#;
            assert_eq!(Host::B.script(judge, &[&there, format]), sum(Host::A, &image), "{format}");
        };
        assert_eq!(copy(&["-a"])["way"], "new", "{format}");
        as_here();
        assert_eq!(copy(&[])["equal"], true, "{format}");
        Host::A.script("printf \"$2\" | dd of=\"$1\" bs=1 seek=55000000 conv=notrunc", &[&image, &format[1..]]);
        let second = copy(&[]);
        assert_eq!((second["blocks_changed"].as_u64(), second["way"].as_str()), (Some(1), Some("copy")), "{format}");
        assert!(second["bytes_sent"].as_u64().unwrap() < 10_000, "{second}");
        as_here();
        assert_eq!(Host::B.script("ls -A \"$1\" | grep -c vr- || true", &[&dir]).trim(), "0", "{format}");
    }
    let (vdi, to) = (format!("{dir}/a.vdi"), format!("{TO}{dir}/a.vdi"));
    Host::A.script("printf y | dd of=\"$1\" bs=1 seek=1 conv=notrunc", &[&image]);
    let in_place = ["copy", &image, &to, "--target-format", "vdi", "--in-place"];
    Host::A.virt_replica(&in_place).exit(1).says(&["a vdi image is not changed in place"]);
    let hold = "(echo 'read 0 512'; exec sleep 600) | qemu-io -f vdi \"$1\"";
    let mut held = Job::start(Host::B.command(&["bash", "-c", hold, "hold", &vdi]));
    held.wait_line(PATIENCE, "what it read", |line| line.contains("read 512/512"));
    let held_there = ["copy", &image, &to, "--target-format", "vdi"];
    Host::A.virt_replica(&held_there).exit(11).says(&["a QEMU program has the image open"]);
}
