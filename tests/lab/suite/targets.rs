//! Targets that are not what they should be: each says what is wrong and what to do, and none costs the guest anything.

use super::domain::{Disk, Domain};
use super::support::{Host, Job, Lab, PATIENCE, SyncResult, Undo, eventually};
use std::time::Duration;

fn small() -> Disk {
    Disk::qcow2("32M").then("write -P 0x11 1M 3M")
}

/// `MIB` of noise at the beginning of a disk: it takes as long on the wire as on the disk.
fn noise(mib: u32, size: &str) -> Disk {
    Disk::made_by("raw", &format!("head -c {mib}M /dev/urandom >\"$1\"; truncate -s {size} \"$1\""))
}

/// Fills a part of a live disk with what does not compress.
fn write_noise(vm: &Domain, from_mib: u32, mib: u32) {
    let file = format!("{}/noise", vm.dir);
    Host::A.script("head -c 4M /dev/urandom >\"$1\"", &[&file]);
    vm.write(0, &format!("-s {file} {from_mib}M {mib}M"));
}

/// A target that cannot be used is found out before the freeze: there never was an overlay, nor a record.
fn never_frozen(vm: &Domain, result: &SyncResult) {
    assert!(result.step() <= 3, "step {} was begun", result.step());
    vm.assert_home();
}

/// Another sshd on host b, in which `virt-replica` is whatever `script` makes of it; ends when dropped.
struct OtherSshd {
    port: u16,
    known_hosts: String,
    pid_file: String,
}

impl OtherSshd {
    fn start(vm: &Domain, script: &str) -> OtherSshd {
        // Tests are processes: their ids keep the ports apart.
        let port = 20000 + (std::process::id() % 20000) as u16;
        let shared = vm.shared();
        let (known_hosts, pid_file) = (format!("{shared}/known_hosts"), format!("{shared}/sshd.pid"));
        Host::B.script(
            r#"mkdir -p "$1/bin"; cd "$1/bin"; eval "$4"
               /usr/sbin/sshd -p "$2" -o PidFile="$3" -o "SetEnv PATH=$1/bin:/usr/bin:/bin" -E "$1/sshd.log"
               printf '[192.0.2.2]:%s ' "$2" >"$1/known_hosts"
               cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub >>"$1/known_hosts""#,
            &[&shared, &port.to_string(), &pid_file, script],
        );
        eventually("the other sshd to listen", PATIENCE, || {
            let probe = format!("exec 3<>/dev/tcp/127.0.0.1/{port}");
            (Host::B.run(&["bash", "-c", &probe]).code == 0).then_some(())
        });
        OtherSshd { port, known_hosts, pid_file }
    }

    fn sync(&self, vm: &Domain) -> SyncResult {
        let to = format!("ssh://root@192.0.2.2:{}", self.port);
        let command = ["virt-replica", "sync", &vm.name, "--to", &to, "--json", "--known-hosts", &self.known_hosts];
        SyncResult::of(Host::A.run(&command))
    }
}

impl Drop for OtherSshd {
    fn drop(&mut self) {
        Host::B.run(&["bash", "-c", "kill $(cat \"$1\")", "kill", &self.pid_file]);
    }
}

#[test]
fn a_changed_host_key_is_refused() {
    let lab = Lab::get();
    let vm = lab.domain("hostkey").disk(small()).paused();
    let known = format!("{}/known_hosts", vm.shared());
    Host::A.script(
        "ssh-keygen -q -t ed25519 -N '' -f \"$1.key\"; echo \"192.0.2.2 $(cut -d' ' -f1,2 \"$1.key.pub\")\" >\"$1\"",
        &[&known],
    );
    let words = ["host key has changed", "ssh-keygen -R"];
    let result = vm.sync_with("", &["--known-hosts", &known]).exit(12).says(&words);
    never_frozen(&vm, &result);
    // Nothing makes it go on, least of all the wish to accept new ones.
    vm.sync_with("", &["--known-hosts", &known, "--accept-new-host-key"]).exit(12);
}

#[test]
fn an_unknown_host_key_is_refused_unless_accepted() {
    let lab = Lab::get();
    let vm = lab.domain("newhost").disk(small()).paused();
    let known = format!("{}/known_hosts", vm.shared());
    Host::A.ok(&["touch", &known]);
    let result = vm.sync_with("", &["--known-hosts", &known]).exit(12).says(&["host key is not known", "ssh-keyscan"]);
    never_frozen(&vm, &result);
    assert!(std::fs::read(Host::A.file("/root/.ssh/known_hosts")).is_ok_and(|k| !k.is_empty()));
    vm.sync_with("", &["--known-hosts", &known, "--accept-new-host-key"]).sealed();
    vm.sync_with("", &["--known-hosts", &known]).sealed();
}

#[test]
fn a_key_that_is_not_known_there_is_refused() {
    let lab = Lab::get();
    let vm = lab.domain("login").disk(small()).paused();
    let key = format!("{}/key", vm.shared());
    Host::A.ok(&["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", &key]);
    let result = vm.sync_with("", &["--identity", &key]).exit(12).says(&["no login", "authorized_keys"]);
    never_frozen(&vm, &result);
}

#[test]
fn a_host_without_the_program_is_told_what_to_install() {
    let lab = Lab::get();
    let vm = lab.domain("noagent").disk(small()).paused();
    let result = OtherSshd::start(&vm, "true").sync(&vm).exit(1).says(&["no virt-replica on 192.0.2.2", "install"]);
    never_frozen(&vm, &result);
}

#[test]
fn an_agent_of_another_version_is_named() {
    let lab = Lab::get();
    let vm = lab.domain("version").disk(small()).paused();
    let script = r#"printf '#!/bin/sh\necho "virt-replica agent protocol 999 version 99.0.0"\ncat >/dev/null\n' >virt-replica
        chmod 755 virt-replica"#;
    let words = ["99.0.0", "protocol 999", "install the same virt-replica"];
    let result = OtherSshd::start(&vm, script).sync(&vm).exit(1).says(&words);
    never_frozen(&vm, &result);
}

#[test]
fn an_unreachable_target_never_costs_an_overlay() {
    let lab = Lab::get();
    let mut vm = lab.domain("nowhere").guest().disk(Disk::ext4("24M", "qcow2")).running();
    for to in ["ssh://root@192.0.2.2:9", "ssh://root@192.0.2.77"] {
        vm.to = to.to_owned();
        let result = vm.sync().exit(1).says(&["cannot reach"]);
        assert!(result.done.time < Duration::from_secs(45), "{:?}", result.done.time);
        never_frozen(&vm, &result);
    }
    vm.still_writes();
}

#[test]
fn a_store_that_cannot_be_written_is_refused_before_the_freeze() {
    let lab = Lab::get();
    let mut vm = lab.domain("readonly").disk(small()).paused();
    let root = vm.own_store();
    Host::B.script("mkdir -p \"$1\"; mount -t tmpfs -o ro,size=64m tmpfs \"$1\"", &[&root]);
    let unmount = root.clone();
    let _undo = Undo(move || drop(Host::B.run(&["umount", &unmount])));
    never_frozen(&vm, &vm.sync().exit(1).says(&["Read-only file system", &root]));
    // Not even a directory.
    vm.to = format!("{}/etc/hostname", super::support::TARGET);
    never_frozen(&vm, &vm.sync().exit(1).says(&["Not a directory", "/etc/hostname"]));
}

#[test]
fn a_target_without_room_is_refused_before_the_freeze() {
    let lab = Lab::get();
    let mut vm = lab.domain("noroom").disk(noise(64, "64M")).paused();
    let root = vm.own_store();
    lab.tool(&["small-fs", "b", &root, "48M"]);
    let _undo = Undo(|| drop(lab.tool(&["small-fs", "b", &root, "off"])));
    let result = vm.sync().exit(1).says(&["room"]);
    never_frozen(&vm, &result);
    Host::B.script("! find \"$1\" -name '*.qcow2' | grep .", &[&root]);
}

/// How much a comparison will find is not known beforehand, so this run fills the target in the middle.
#[test]
fn a_target_that_fills_up_keeps_its_old_point() {
    let lab = Lab::get();
    let mut vm = lab.domain("fills").disk(noise(8, "96M")).paused();
    let root = vm.own_store();
    lab.tool(&["small-fs", "b", &root, "96M"]);
    let _undo = Undo(|| drop(lab.tool(&["small-fs", "b", &root, "off"])));
    vm.sync().sealed();
    let before = vm.copy(0);
    let kept = format!("{}/before.raw", vm.shared());
    Host::A.ok(&["cp", "--sparse=always", &before.file, &kept]);
    // The dirty bitmap of a raw image ends with its QEMU, so this is a comparison by digest.
    vm.virsh(&["destroy"]);
    vm.start_paused();
    write_noise(&vm, 8, 88);
    let failed = vm.sync().exit(1).says(&["No space left on device", &root]);
    assert!(failed.step() >= 5, "it was found out in the middle");
    vm.assert_home();
    let points = vm.points();
    assert_eq!(points.len(), 1);
    vm.compare_with_frozen(&points[0], 0, &super::domain::Reference { file: kept });

    // With less to ship the next run gets through: what the failed one wrote is gone.
    vm.qemu_io(0, "write -z 8M 88M");
    vm.write(0, "-P 0x21 1M 1M");
    vm.sync().sealed();
    vm.compare_with_head();
    vm.assert_home();
}

/// The link goes while blocks travel. The run ends by itself within its deadlines (30 s of silence), the domain is back
/// on its own image, and the next run seals.
#[test]
fn a_link_cut_while_shipping_ends_the_run_in_time() {
    let lab = Lab::alone();
    let vm = lab.domain("cut").disk(noise(24, "24M")).paused();
    vm.sync().sealed();
    write_noise(&vm, 0, 24);
    lab.tool(&["link-rate", "a", "8mbit"]);
    let _undo = Undo(|| {
        lab.tool(&["heal"]);
        lab.tool(&["link-rate", "a", "off"]);
    });
    let mut run = vm.start_sync("", &[]);
    run.wait_line(PATIENCE, "progress", |line| line.contains("\"progress\"") && !line.contains("\"bytes_sent\":0"));
    lab.tool(&["cut"]);
    let failed = SyncResult::of(run.wait(Duration::from_secs(60))).exit(1).says(&["192.0.2.2"]);
    assert_eq!(failed.report["outcome"], "failed");
    vm.assert_home();
    lab.tool(&["heal"]);
    lab.tool(&["link-rate", "a", "off"]);
    assert_eq!(vm.points().len(), 1);
    // The agent of the cut session gives its lock up after 30 s of silence of its own; until then the next run is told
    // so.
    eventually("the next run seals", Duration::from_secs(60), || {
        let next = vm.sync();
        if next.report["outcome"] == "sealed" {
            return Some(());
        }
        next.exit(11).says(&["the replica is being written by"]);
        None
    });
    vm.compare_with_head();
    vm.assert_home();
}

/// sshd goes in the middle, for this one connection: noticed at once, not after a silence.
#[test]
fn a_connection_that_is_closed_while_shipping_ends_the_run_at_once() {
    let lab = Lab::get();
    let vm = lab.domain("closed").disk(small()).paused();
    let sshd = OtherSshd::start(&vm, "ln -s /usr/local/bin/virt-replica virt-replica");
    let to = format!("ssh://root@192.0.2.2:{}", sshd.port);
    let words = ["virt-replica", "sync", &vm.name, "--to", &to, "--json", "--known-hosts", &sshd.known_hosts];
    let mut command = Host::A.command(&words);
    command.env("VIRT_REPLICA_FAILPOINT", "5a=sleep:2000");
    let mut run = Job::start(command);
    run.wait_step(5);
    Host::B.script("pkill -KILL -P \"$(cat \"$1\")\"", &[&sshd.pid_file]);
    let failed = SyncResult::of(run.wait(PATIENCE)).exit(1).says(&["192.0.2.2"]);
    assert!(failed.done.time < Duration::from_secs(20), "{:?}", failed.done.time);
    vm.assert_home();
    assert_eq!(Host::A.virt_replica(&["points", &vm.name, "--to", &vm.to, "--json"]).code, 4, "there is no point");
    sshd.sync(&vm).sealed();
}

/// The source may be gone: the target lists and reads its own points.
#[test]
fn the_target_knows_its_points_without_the_source() {
    let lab = Lab::get();
    let vm = lab.domain("local").disk(small()).paused();
    vm.sync().sealed();
    vm.write(0, "-P 0x22 2M 64k");
    vm.sync().sealed();
    let from_a = vm.points();
    for name in [&vm.name, &vm.uuid] {
        let on_b = Host::B.json(&["points", name, "--to", "local:/var/lib/virt-replica", "--json"]);
        assert_eq!(on_b["points"].as_array().unwrap(), &from_a);
    }
}
