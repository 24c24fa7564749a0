//! Images, names and users at the edge of what a host takes: what cannot work is said before anything is touched, and
//! the rest works.

use super::domain::Disk;
use super::handover::Traveller;
use super::support::{Done, Host, Lab, TARGET, Undo};

/// A raw image whose length is no multiple of 512, and one whose name is as long as names may be: QEMU rounds the one
/// up, and the other leaves no room behind it. Both are replicated off and running, and handed over; the file keeps its
/// length.
#[test]
fn an_odd_length_and_a_long_name_are_replicated_off_and_running_and_handed_over() {
    let lab = Lab::get();
    let long = format!("{}.qcow2", "l".repeat(229));
    let named = long.clone();
    let odd = Disk::made_by("raw", r#"head -c 1000001 /dev/urandom >"$1""#);
    let other = Disk::made_by("qcow2", &format!("qemu-img create -q -f qcow2 \"$2/{long}\" 16M"));
    let domain = lab.domain("edges").disk(odd).disk(other);
    let mut vm = domain.xml(move |all, dir| all.replace(&format!("{dir}/vdb.qcow2"), &format!("{dir}/{named}"))).off();
    vm.images[1] = format!("{}/{long}", vm.dir);
    let length = || Host::A.output(&["stat", "-c", "%s", &vm.images[0]]);
    let size = || vm.head()["disks"][0]["size"].as_u64();
    for _ in 0..2 {
        vm.sync().sealed();
        assert_eq!(size(), Some(1_000_448));
    }
    vm.virsh(&["start", "--paused"]);
    vm.sync().sealed();
    assert_eq!(size(), Some(1_000_448));
    vm.virsh(&["destroy"]);
    vm.sync().sealed();
    let t = Traveller::of(&vm);
    Host::A.virt_replica(&["ready", &vm.name, "--to", TARGET]).success();
    t.failover("", &["--timeout", "1s", "--force-off"]).success();
    assert!(t.there.runs());
    t.failover("", &["--abort", "--lose-its-writes"]).success();
    assert_eq!(length(), "1000001");
    drop(t);
}

/// A user who may talk to libvirt and read the image, and no more: nobody, as everybody may talk to it in the lab.
fn operator(words: &[&str]) -> Done {
    let who = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "env", "XDG_RUNTIME_DIR=/tmp"];
    Host::A.run(&[&who[..], &["virt-replica", "-c", "qemu:///system"], words].concat())
}

#[test]
fn an_operator_without_the_rights_is_told_before_anything_is_touched() {
    let lab = Lab::get();
    let vm = lab.domain("operator").disk(Disk::qcow2("16M").then("write -P 0x11 0 1M")).paused();
    let own = format!("{}/op", vm.shared());
    let script = r#"chmod 755 "$1"; chmod 644 "$1"/*; mkdir -p "$2"; chown 65534 "$2""#;
    Host::A.script(script, &[&vm.dir, &own]);
    let (state, store) = (format!("{own}/state"), format!("{own}/store"));
    let before = vm.virsh(&["dumpxml"]);
    let untouched = || {
        assert_eq!(vm.virsh(&["dumpxml"]), before);
        assert_eq!(Host::A.output(&["find", &vm.dir, "-name", "*.vr-*"]), "");
    };
    operator(&["sync", &vm.name, "--to", &store]).exit(1).says(&["Permission denied", "--state-dir"]);
    let sync = ["--state-dir", &state, "sync", &vm.name, "--to", &store];
    operator(&sync).exit(1).says(&[
        "user 65534 may not make and remove files",
        &vm.dir,
        "owner 0",
        "mode 0755",
        "as root",
    ]);
    untouched();
    operator(&["--state-dir", &state, "plan", &vm.name, "--to", &store]).exit(1).says(&["user 65534 may not make"]);
    // The directory is free for all: the overlay will be libvirt's all the same.
    Host::A.ok(&["chmod", "777", &vm.dir]);
    operator(&sync).exit(1).says(&["libvirt makes its overlay for root alone", "CAP_DAC_OVERRIDE"]);
    untouched();
    Host::A.ok(&["chmod", "755", &vm.dir]);
    vm.sync().sealed();
}

/// A session's private directory is where its QEMU says, and what its libvirt makes is the user's own.
#[test]
fn a_domain_of_a_session_is_replicated_by_overlay_and_by_backup() {
    let _lab = Lab::get();
    let dir = format!("/tmp/session-{}", std::process::id());
    let script = r#"mkdir -p "$1/run" "$1/store"; chmod 700 "$1/run"
        qemu-img create -q -f qcow2 "$1/a.qcow2" 16M; qemu-img create -q -f raw "$1/b.raw" 8M
        /lab/tools/guest xml s --no-os --memory 32 --disk "$1/a.qcow2:qcow2:file" --disk "$1/b.raw:raw:file" |
            sed "s#/var/log/libvirt/console#$1#" >"$1/s.xml"
        chown -R 65534 "$1""#;
    Host::A.script(script, &[&dir]);
    let home = [format!("HOME={dir}"), format!("XDG_RUNTIME_DIR={dir}/run")];
    let user = |words: &[&str]| {
        let who = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "env", &home[0], &home[1]];
        Host::A.run(&[&who[..], words].concat())
    };
    let virsh = |words: &[&str]| user(&[&["virsh", "-q", "-c", "qemu:///session"], words].concat());
    let _gone = Undo(|| {
        virsh(&["destroy", "s"]);
        // The session's own daemons end by themselves, and need not be waited for.
        let script = r#"for p in /proc/[0-9]*; do
              [[ $(stat -c %u "$p" 2>/dev/null) == 65534 ]] && kill "${p#/proc/}" 2>/dev/null
            done; rm -rf "${1:?}"; true"#;
        Host::A.script(script, &[&dir]);
    });
    virsh(&["define", &format!("{dir}/s.xml")]).success();
    virsh(&["start", "--paused", "s"]).success();
    let (state, store) = (format!("{dir}/state"), format!("{dir}/store"));
    let ours = ["virt-replica", "-c", "qemu:///session", "--state-dir", &state];
    let sync = |more: &[&str]| user(&[&ours[..], &["sync", "s", "--to", &store, "--json"], more].concat()).success();
    sync(&[]);
    // What a raw disk's bitmap marks is read through a socket in that directory.
    sync(&[]).says(&["a dirty bitmap has recorded every change"]);
    sync(&["--capture", "backup"]).says(&["\"capture\":\"backup\""]);
    user(&[&ours[..], &["doctor", "s"]].concat()).success().says(&["sound"]);
    assert_eq!(Host::A.output(&["find", &dir, "-maxdepth", "1", "-name", "*.vr-*"]), "");
}

#[test]
fn a_guest_that_was_made_again_under_its_name_is_found_by_its_own_uuid() {
    let lab = Lab::get();
    let vm = lab.domain("again").disk(Disk::qcow2("16M").then("write -P 0x11 0 1M")).off();
    let name = vm.name.as_str();
    vm.sync().sealed();
    let second = format!("{}{}", &vm.uuid[..35], if vm.uuid.ends_with('0') { '1' } else { '0' });
    let again = |from: &str, to: &str| {
        let script = r#"virsh -q dumpxml "$1" --inactive | sed "s/$2/$3/" >"$4"; virsh -q undefine "$1" >&2; virsh -q define "$4" >&2"#;
        Host::A.script(script, &[name, from, to, &format!("{}/again.xml", vm.shared())]);
    };
    again(&vm.uuid, &second);
    Host::A.virt_replica(&["sync", name, "--to", TARGET]).success();
    for words in [&["points"][..], &["verify"], &["prune", "--keep", "last=3"]] {
        let done = Host::A.virt_replica(&[words, &[name, "--to", TARGET]].concat()).success();
        done.says(&["more than one replica named", &second, &vm.uuid]);
    }
    // Where nobody knows, both are named.
    Host::B.virt_replica(&["points", name, "--to", "/var/lib/virt-replica"]).exit(2).says(&[&vm.uuid, &second]);
    again(&second, &vm.uuid);
    Host::B.ok(&["rm", "-rf", &format!("/var/lib/virt-replica/replicas/{second}")]);
}

#[test]
fn a_directory_goes_to_the_other_host_with_all_that_is_in_it() {
    let _lab = Lab::get();
    let dir = format!("/lab/shared/tree-{}", std::process::id());
    let script = r#"mkdir -p "$1/from/sub/deep"; cd "$1/from"; head -c 100001 /dev/urandom >a.raw; echo x >.hidden
        head -c 70000 /dev/urandom >sub/deep/b.raw; ln -s sub/deep/b.raw link; mkfifo pipe; chmod 750 sub; touch -d @1000000 sub"#;
    Host::A.script(script, &[&dir]);
    let _gone = Undo(|| drop(Host::A.run(&["rm", "-rf", &dir])));
    let to = format!("{TARGET}{dir}/to/");
    let copy = |words: &[&str]| Host::A.virt_replica(&[&["copy"], words, &[&format!("{dir}/from/"), &to]].concat());
    copy(&["-r", "-a"])
        .success()
        .says(&["3 images, 3 directories, 1 link; left out: 1", "pipe is neither a file nor a directory"]);
    let list = r#"cd "$1"; find . ! -name pipe ! -path . -printf '%P %y %m %l\n' | sort; find . -type f | sort | xargs cat | sha256sum; stat -c %Y sub"#;
    let listed = |which: &str| Host::B.script(list, &[&format!("{dir}/{which}")]);
    assert_eq!(listed("to"), listed("from"));
    // Again, and nothing is left to do. Without -r the rest is named.
    let done = copy(&["-r", "-a", "--json"]).success();
    assert!(
        done.stdout.contains("\"message_type\":\"copy_summary\"") && !done.stdout.contains("\"equal\":false"),
        "{}",
        done.stdout
    );
    copy(&[]).success().says(&["1 image, 0 directories, 0 links; left out: 4", "sub is a directory: -r copies"]);
}

/// At its end a run asks the target whether the domain could be brought up there. A libvirt that never answers costs
/// the run some seconds. Nothing of the run may stay: its ssh did, for ten minutes.
#[test]
fn a_run_whose_last_question_is_not_answered_leaves_no_ssh_behind() {
    let lab = Lab::get();
    let vm = lab.domain("unanswered").disk(Disk::qcow2("16M").then("write -P 0x11 0 1M")).paused();
    let masters = || Host::A.run(&["pgrep", "-af", "^ssh .* -M "]).stdout;
    let before = masters();
    let libvirt = |signal: &str| Host::B.script("kill -\"$1\" $(cat /run/libvirtd.pid)", &[signal]);
    libvirt("STOP");
    let _goes_on = Undo(|| drop(libvirt("CONT")));
    vm.sync().sealed();
    let left: Vec<String> = masters().lines().filter(|line| !before.contains(line)).map(str::to_owned).collect();
    assert!(left.is_empty(), "left behind: {left:#?}");
}
