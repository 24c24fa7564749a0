//! Every kind of image QEMU reads: what the guest sees is what the replica holds, first whole and then changed.
//!
//! The domains are paused and have no operating system: nobody but the test writes, so the domain itself is the
//! reference that a point is compared with.

use super::domain::{Disk, Domain, by_backup};
use super::support::{Host, Lab};

/// A first run and a second one after writes: a large aligned one, one within a block, and zeroes over data.
fn replicates(name: &str, disk: Disk) -> Domain {
    let lab = Lab::get();
    let vm = lab.domain(name).disk(disk).paused();
    first_and_second(&vm, &[]);
    vm
}

fn first_and_second(vm: &Domain, args: &[&str]) {
    let first = vm.sync_with("", args).sealed();
    assert_eq!(first.mode("vda"), "full");
    vm.compare_with_head();
    vm.assert_home();

    for what in ["-P 0x22 8M 128k", "-P 0x33 12345344 4k", "-z 1M 64k"] {
        vm.write(0, what);
    }
    let second = vm.sync_with("", args).sealed();
    second.incremental("vda");
    assert_eq!(second.bytes("vda", "blocks_changed"), 4, "two blocks, one in part, one of zeroes");
    assert!(second.bytes("vda", "bytes_sent") < 64 << 10, "patterns compress: {:#}", second.report);
    vm.compare_with_head();
    vm.assert_home();
}

/// The same content in every image: data, a hole, explicit zeroes, data up to the end.
const CONTENT: [&str; 3] = ["write -P 0x11 1M 3M", "write -P 0 5M 1M", "write -P 0x44 31M 1M"];

fn filled(disk: Disk) -> Disk {
    CONTENT.iter().fold(disk, |disk, command| disk.then(command))
}

/// A qcow2 converted from raw content: `$CONVERT` says how.
fn converted(options: &str) -> Disk {
    let fill: String = CONTENT.iter().map(|c| format!("-c '{c}' ")).collect();
    Disk::made_by(
        "qcow2",
        &format!(
            r#"truncate -s 32M "$2/raw"; qemu-io -f raw {fill} "$2/raw" >&2
               qemu-img convert {options} -f raw -O qcow2 "$2/raw" "$1"; rm "$2/raw""#
        ),
    )
}

#[test]
fn qcow2() {
    replicates("qcow2", filled(Disk::qcow2("32M")));
}

#[test]
fn qcow2_of_version_2() {
    replicates("v2", filled(Disk::qcow2_with("32M", "compat=0.10")));
}

#[test]
fn qcow2_with_small_clusters() {
    replicates("small", filled(Disk::qcow2_with("32M", "cluster_size=4096")));
}

/// 16 subclusters of 8 KiB per cluster: what is allocated is not what clusters say.
#[test]
fn qcow2_with_extended_l2() {
    replicates(
        "extl2",
        filled(Disk::qcow2_with("32M", "extended_l2=on,cluster_size=131072")).then("write -P 0x55 16781312 8k"),
    );
}

#[test]
fn qcow2_with_zstd_clusters() {
    replicates("zstd", converted("-c -o compression_type=zstd"));
}

#[test]
fn qcow2_with_deflated_clusters() {
    replicates("zlib", converted("-c"));
}

#[test]
fn qcow2_with_an_external_data_file() {
    let make = r#"qemu-img create -q -f qcow2 -o "data_file=$2/vda.data" "$1" 32M"#;
    replicates("datafile", filled(Disk::made_by("qcow2", make)));
}

#[test]
fn qcow2_with_a_raw_external_data_file() {
    let make = r#"qemu-img create -q -f qcow2 -o "data_file=$2/vda.data,data_file_raw=on" "$1" 32M"#;
    replicates("datafileraw", filled(Disk::made_by("qcow2", make)));
}

/// The active state counts, not the one a snapshot inside the image keeps.
#[test]
fn qcow2_with_a_snapshot_inside() {
    let disk = filled(Disk::qcow2("32M"));
    replicates("internal", disk.run("qemu-img snapshot -c before \"$1\"").then("write -P 0x77 2M 2M"));
}

/// A golden image below, shorter than what lies on it: behind its end there are zeroes.
#[test]
fn qcow2_on_a_golden_qcow2() {
    let vm = replicates("golden", golden("qcow2"));
    let chain = Host::A.output(&["qemu-img", "info", "-U", "--backing-chain", &vm.images[0]]);
    assert!(chain.contains("golden.qcow2"), "the domain's own chain stands as it was: {chain}");
}

#[test]
fn qcow2_on_a_golden_raw_image() {
    replicates("goldenraw", golden("raw"));
}

/// Data below, data above it, and zeroes that hide what is below.
fn golden(format: &str) -> Disk {
    let script = format!(
        r#"qemu-img create -q -f {format} "$2/golden.{format}" 24M
           qemu-io -f {format} -c 'write -P 0x11 0 4M' -c 'write -P 0x66 20M 4M' "$2/golden.{format}" >&2
           chmod 444 "$2/golden.{format}"
           qemu-img create -q -f qcow2 -F {format} -b "golden.{format}" "$1" 32M"#
    );
    Disk::made_by("qcow2", &script).then("write -P 0x12 2M 64k").then("write -z 3M 64k").then("write -P 0x44 30M 1M")
}

#[test]
fn raw() {
    replicates("raw", filled(Disk::raw("32M")));
}

/// Neither a multiple of our blocks nor of 4 KiB.
#[test]
fn raw_of_an_odd_size() {
    replicates("odd", filled(Disk::raw("33555456")).then("write -P 0x99 33554432 1024"));
}

#[test]
fn qcow2_of_an_odd_size() {
    replicates("oddqcow2", filled(Disk::qcow2("33555456")).then("write -P 0x99 33554432 1024"));
}

/// There is no place beside a device: its overlay lies in the directory for that.
#[test]
fn block_device() {
    let vm = replicates("device", filled(Disk::device("32M")));
    assert!(vm.images[0].starts_with("/dev/loop"), "{:?}", vm.images);
}

#[test]
fn overlays_lie_where_they_are_told_to() {
    let lab = Lab::get();
    let vm = lab.domain("overlaydir").disk(filled(Disk::device("32M"))).disk(filled(Disk::raw("32M"))).paused();
    let dir = format!("{}/overlays", vm.dir);
    Host::A.ok(&["mkdir", &dir]);
    let mut run = vm.start_sync("5f=sleep:1500", &["--overlay-dir", &dir]);
    run.wait_step(5);
    match by_backup() {
        true => assert_eq!(vm.virsh(&["backup-dumpxml"]).matches(&format!("<scratch file='{dir}/")).count(), 2),
        false => assert!(vm.live_images().iter().all(|i| i.starts_with(&dir)), "{:?}", vm.live_images()),
    }
    super::support::SyncResult::of(run.wait(super::support::PATIENCE)).sealed();
    vm.compare_with_head();
    vm.assert_home();
}
