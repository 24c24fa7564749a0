//! What has an identity is compared where it matters: stores, sources, hosts. A mismatch names both sides and the way
//! out.

use super::domain::{Disk, Domain};
use super::support::{Done, Host, Lab, SyncResult, TARGET};

fn small() -> Disk {
    Disk::qcow2("32M").then("write -P 0x11 1M 3M")
}

/// The program as an operator starts it: the lab's own hosts create stores wherever a test puts one.
fn plainly(host: Host, args: &[&str]) -> Done {
    let mut words = vec!["env", "-u", "VIRT_REPLICA_CREATE_STORE", "virt-replica"];
    words.extend(args);
    host.run(&words)
}

fn sync(vm: &Domain, to: &str, more: &[&str]) -> SyncResult {
    let mut words = vec!["sync", &vm.name, "--to", to, "--json"];
    words.extend(more);
    SyncResult::of(plainly(Host::A, &words))
}

/// Case B4. A misspelt directory and a mount point without its file system became stores by being named.
#[test]
fn a_directory_becomes_a_store_only_on_purpose() {
    let lab = Lab::get();
    let vm = lab.domain("store").disk(small()).paused();
    let root = format!("/srv/{}", vm.name);
    let to = format!("{TARGET}{root}");
    let refusal = ["there is no store here", &root, "virt-replica store init", "--create-store"];

    for command in ["plan", "sync", "points"] {
        plainly(Host::A, &[command, &vm.name, "--to", &to]).exit(4).says(&refusal);
    }
    Host::B.ok(&["test", "!", "-e", &root]);
    Host::B.ok(&["mkdir", &root]);
    sync(&vm, &to, &[]).exit(4).says(&refusal);
    let seed = ["seed", &vm.uuid, "--from", "/etc/hostname", "--format", "raw", "--root", &root];
    plainly(Host::B, &seed).exit(4).says(&refusal);
    for command in [&["ready"][..], &["drill", "--probe", "agent"], &["detach"]] {
        let words = [command, &[&vm.name, "--root", &root]].concat();
        plainly(Host::B, &words).exit(4).says(&["there is no store here"]);
    }
    assert_eq!(Host::B.output(&["ls", "-A", &root]), "", "what is refused stays as it was");
    vm.assert_home();

    plainly(Host::B, &["store", "init", &root]).success().says(&["is a store now"]);
    sync(&vm, &to, &[]).sealed();
    vm.write(0, "-P 0x12 1M 64k");

    // Its file system is gone: not even a script that always passes the option fills the one below.
    Host::B.script("mv \"$1\" \"$1.away\"; mkdir \"$1\"", &[&root]);
    sync(&vm, &to, &["--create-store"]).exit(4).says(&["was here, and is not any more", "mounted"]);
    assert_eq!(Host::B.output(&["ls", "-A", &root]), "");
    Host::B.script("rmdir \"$1\"; mv \"$1.away\" \"$1\"", &[&root]);

    // A store of version 0.1 is adopted once, with a word.
    Host::B.ok(&["rm", &format!("{root}/store.json")]);
    let adopted = sync(&vm, &to, &[]).sealed().says(&["made by an earlier version"]);
    assert_eq!(adopted.mode("vda"), "digest", "the replica is the one that it was, under an id that no bitmap has");
    let said = sync(&vm, &to, &[]).sealed().done;
    assert!(!said.stderr.contains("earlier version"), "{}", said.stderr);

    // Another one, for a script.
    let other = format!("{TARGET}{root}/other");
    sync(&vm, &other, &["--create-store"]).sealed();
    vm.assert_home();
}

/// Case B4: with a forced command the directory of the URL was ignored without a word.
#[test]
fn a_forced_command_and_a_url_have_to_agree_on_the_store() {
    let lab = Lab::get();
    let mut vm = lab.domain("forced").disk(small()).paused();
    let root = vm.own_store();
    let shared = vm.shared();
    plainly(Host::B, &["store", "init", &root]).success();
    let agent = r#"mkdir -p "$1"; printf '#!/bin/sh\nexec virt-replica agent --root %s\n' "$2" >"$1/agent"; chmod 755 "$1/agent""#;
    Host::B.script(agent, &[&shared, &root]);
    let key = r#"ssh-keygen -q -t ed25519 -N '' -f "$1/key"
        printf 'restrict,command="%s/agent" %s\n' "$1" "$(cat "$1/key.pub")""#;
    let line = Host::A.script(key, &[&shared]);
    let _key = super::support::KeyLine::add(&line);
    let identity = format!("{shared}/key");
    let with = ["--identity", identity.as_str()];

    let other = format!("{TARGET}/srv/elsewhere-{}", std::process::id());
    let words = ["the URL names the store /srv/elsewhere", "bound to", &root];
    sync(&vm, &other, &with).exit(1).says(&words);
    vm.assert_home();
    sync(&vm, &vm.to.clone(), &with).sealed();
    // Without a directory the URL means the store that is served. Host a shall not take that for its default one.
    let state = format!("{}/state", vm.dir);
    let served = sync(&vm, TARGET, &[&with[..], &["--state-dir", &state, "--take-over"]].concat()).sealed();
    let image = served.disk("vda")["image"].as_str().expect("an image has a path").to_owned();
    assert!(image.starts_with(&root), "{image}");
}

/// Cases B2 and D5. Two hosts with a domain of one UUID (a clone by copied XML) took turns at one replica; and a domain
/// that had moved was refused for ever.
#[test]
fn another_source_is_refused_and_takes_over_when_it_is_told_to() {
    let lab = Lab::get();
    let mut vm = lab.domain("source").disk(small()).off();
    let root = vm.own_store();
    let to = vm.to.clone();
    let here = format!("local:{root}");
    sync(&vm, &to, &["--create-store"]).sealed();

    // The clone: the same XML on host b, with an image of its own.
    let xml = Host::A.output(&["virsh", "dumpxml", "--inactive", &vm.name]);
    let file = format!("{}/clone.xml", vm.shared());
    std::fs::write(Host::A.file(format!("{}/clone.xml", vm.dir)), xml).expect("write the XML");
    Host::A.ok(&["cp", &format!("{}/clone.xml", vm.dir), &file]);
    Host::B.script(
        "mkdir -p \"$1\"; qemu-img create -q -f qcow2 \"$2\" 32M; virsh -q define \"$3\"",
        &[&vm.dir, &vm.images[0], &file],
    );
    let _clone = super::support::Undo(|| {
        Host::B.run(&[
            "bash",
            "-c",
            "virsh -q undefine \"$1\"; rm -rf \"${2:?}\" \"$3/domains/$4\"",
            "x",
            &vm.name,
            &vm.dir,
            "/var/lib/virt-replica/source",
            &vm.uuid,
        ]);
    });
    let on_b = |more: &[&str]| {
        let mut words = vec!["sync", &vm.name, "--to", &here, "--json"];
        words.extend(more);
        SyncResult::of(plainly(Host::B, &words))
    };
    let both = ["the replica follows lab-a", "this source is lab-b", "--take-over"];
    on_b(&[]).exit(1).says(&both);
    plainly(Host::B, &["plan", &vm.name, "--to", &here]).exit(1).says(&both);
    sync(&vm, &to, &[]).sealed();

    on_b(&["--take-over"]).sealed().says(&["the replica followed lab-a"]);
    let manifest = Host::B.output(&["cat", &format!("{root}/replicas/{}/manifest.json", vm.uuid)]);
    assert!(manifest.contains("taken_over") && manifest.contains("lab-b") && manifest.contains("lab-a"), "{manifest}");
    on_b(&[]).sealed();
    sync(&vm, &to, &[]).exit(1).says(&["the replica follows lab-b", "this source is lab-a", "--take-over"]);
    sync(&vm, &to, &["--take-over"]).sealed();

    // Another state directory of the same host is another source: nobody knows whether the old one still works.
    let state = format!("{}/state", vm.dir);
    let words = ["--state-dir", &state, "sync", &vm.name, "--to", &to];
    plainly(Host::A, &words).exit(1).says(&["another state directory", "--take-over"]);

    // A generation that this host does not know.
    let domain = format!("/var/lib/virt-replica/source/domains/{}/generation.json", vm.uuid);
    std::fs::write(Host::A.file(&domain), "{\"format\":1,\"generation\":2}").expect("write the generation");
    sync(&vm, &to, &[]).sealed();
    Host::A.ok(&["rm", &domain]);
    sync(&vm, &to, &[]).exit(1).says(&["generation 2", "generation 1", "--take-over"]);
    sync(&vm, &to, &["--take-over"]).sealed();
    sync(&vm, &to, &[]).sealed();
}

/// Case B1: with libvirt of another host the paths of its images were opened on this one.
#[test]
fn libvirt_of_another_host_is_refused_before_anything_is_touched() {
    let lab = Lab::get();
    let vm = lab.domain("elsewhere").disk(small()).paused();
    // A file of that name, here: it was replicated, and the guest there was frozen.
    Host::B.script("mkdir -p \"$1\"; qemu-img create -q -f qcow2 \"$2\" 32M", &[&vm.dir, &vm.images[0]]);
    let store = format!("/srv/{}", vm.name);
    let _here = super::support::Undo(|| {
        Host::B.run(&["rm", "-rf", &vm.dir, &store]);
    });
    let uri = "qemu+ssh://root@192.0.2.1/system";
    let to = format!("local:{store}");
    let words = ["runs on lab-a", "this is lab-b", "run virt-replica on lab-a"];
    Host::B.virt_replica(&["-c", uri, "sync", &vm.name, "--to", &to]).exit(1).says(&words);
    for command in [
        &["plan", &vm.name, "--to", &to][..],
        &["doctor", &vm.name],
        &["verify", &vm.name, "--to", &to, "--against-source"],
    ] {
        Host::B
            .run(&[&["env", "LIBVIRT_DEFAULT_URI=qemu+ssh://root@192.0.2.1/system", "virt-replica"], command].concat())
            .exit(1)
            .says(&words);
    }
    // In a mount namespace of its own: the other tests' virsh reads the same file.
    let by_default = r#"echo "uri_default = '$1'" >"$4/libvirt.conf"; mkdir -p /etc/libvirt; touch /etc/libvirt/libvirt.conf
        exec unshare -m bash -c 'mount --bind "$1/libvirt.conf" /etc/libvirt/libvirt.conf; shift; exec virt-replica "$@"' \
            x "$4" sync "$2" --to "$3""#;
    Host::B
        .run(&["bash", "-c", by_default, "x", uri, &vm.name, &to, &vm.dir])
        .exit(1)
        .says(&words)
        .says(&["uri_default"]);
    // What names this host's own libvirt works all the same.
    let own = ["-c", "qemu:///system", "sync", &vm.name, "--to", &to];
    Host::B.virt_replica(&own).exit(4).says(&[&vm.name]);
    assert!(!Host::B.file(&store).exists(), "nothing was created");
    assert_eq!(vm.state(), "paused");
    vm.assert_home();
}

/// Case B3: a store that is reached by two URLs counted as two, each with bitmaps of its own in the live QEMU.
#[test]
fn a_store_is_one_by_whatever_url_it_is_reached() {
    let lab = Lab::get();
    let mut vm = lab.domain("spelling").disk(small()).paused();
    let root = vm.own_store();
    let (one, two) = (format!("ssh://root@192.0.2.2{root}"), format!("ssh://192.0.2.2{root}"));
    let ours = || {
        let all = vm.virsh(&["qemu-monitor-command", "{\"execute\":\"query-named-block-nodes\"}"]);
        let mut names: Vec<String> =
            all.split("\"name\":\"vr-").skip(1).filter_map(|rest| Some(rest.split('"').next()?.to_owned())).collect();
        names.sort();
        names.dedup();
        names
    };
    sync(&vm, &one, &["--create-store"]).sealed();
    vm.write(0, "-P 0x12 1M 64k");
    for to in [&two, &one, &two] {
        let result = sync(&vm, to, &[]).sealed();
        assert_eq!(result.mode("vda"), "bitmap", "{:#}", result.report);
        assert_eq!(ours().len(), 1, "{:?}", ours());
    }
    let status = Host::A.json(&["status", &vm.name, "--json"]);
    assert_eq!(status["domains"].as_array().map(Vec::len), Some(1), "{status:#}");

    // What version 0.1 left: a bitmap named after a URL, and a report; nothing says whose store that was.
    let three = format!("ssh://root@b{root}");
    let nodes = vm.virsh(&["qemu-monitor-command", "{\"execute\":\"query-block\"}"]);
    let node =
        nodes.split("\"node-name\":\"").nth(1).and_then(|rest| rest.split('"').next()).expect("a node").to_owned();
    let leftover =
        format!("{}0123456789abcdef-00000000", virt_replica::replicate::tracking::bitmap_rotation::prefix(&three));
    let add = format!(
        "{{\"execute\":\"block-dirty-bitmap-add\",\"arguments\":{{\"node\":\"{node}\",\"name\":\"{leftover}\",\"persistent\":true}}}}"
    );
    vm.virsh(&["qemu-monitor-command", &add]);
    assert_eq!(ours().len(), 2);
    let history = vm.record().with_file_name("history.jsonl");
    let text = std::fs::read_to_string(&history).expect("there are reports");
    std::fs::write(&history, text.replace(&format!("\"target\":\"{one}\""), &format!("\"target\":\"{three}\"")))
        .expect("rewrite the history");
    let words = [three.as_str(), "are the same store"];
    assert_eq!(sync(&vm, &two, &[]).sealed().says(&words).mode("vda"), "bitmap");
    assert_eq!(ours().len(), 1, "{:?}", ours());
    let status = Host::A.json(&["status", &vm.name, "--json"]);
    assert_eq!(status["domains"].as_array().map(Vec::len), Some(1), "{status:#}");
    vm.assert_home();
}
