//! What a point promises: one instant of all disks, nothing acknowledged lost, only changes sent, nothing stored for
//! nothing; and the machine's description beside the disks.

use super::domain::{Disk, Domain, image_of};
use super::support::{Host, Lab};
use serde_json::Value;

/// The guest writes line N to the second disk right after the first; a point in which they are further apart was not
/// taken at one instant. Lines acknowledged before a run began must be in its point.
#[test]
fn two_disks_are_frozen_at_one_instant() {
    const ROUNDS: usize = 6;
    let lab = Lab::get();
    let disk = || Disk::ext4("24M", "qcow2");
    let vm = lab.domain("instant").guest().delay("0").disk(disk()).disk(disk()).running();
    let acked: Vec<u64> = (0..ROUNDS)
        .map(|_| {
            let acked = vm.acked();
            vm.sync().sealed();
            vm.assert_home();
            acked
        })
        .collect();
    vm.still_writes();
    let points = vm.points();
    assert_eq!(points.len(), ROUNDS);
    for (point, acked) in points.iter().zip(acked) {
        let (first, second) = (vm.lines(point, 0), vm.lines(point, 1));
        assert!(second <= first && first <= second + 1, "vda has {first} lines, vdb {second}");
        assert!(second >= acked, "line {acked} was acknowledged before the freeze, the point ends at {second}");
    }
}

/// 8 MiB that cannot be compressed, of which 4 KiB and two blocks change.
#[test]
fn a_second_run_sends_only_what_changed() {
    let lab = Lab::get();
    let random = Disk::made_by("raw", "head -c 8M /dev/urandom >\"$1\"; truncate -s 256M \"$1\"");
    let vm = lab.domain("changes").disk(random).paused();
    let first = vm.sync().sealed();
    let sent = first.bytes("vda", "bytes_sent");
    assert!((8 << 20..9 << 20).contains(&sent), "all of it, and no more: {sent}");
    assert_eq!(first.bytes("vda", "blocks_changed"), 128);

    let noise = format!("{}/noise", vm.dir);
    Host::A.ok(&["bash", "-c", "head -c 192k /dev/urandom >\"$1\"", "x", &noise]);
    vm.write(0, &format!("-s {noise} 1048576 131072"));
    vm.write(0, &format!("-s {noise} 4198400 4096"));
    let second = vm.sync().sealed();
    second.incremental("vda");
    assert!(!second.disk("vda")["reason"].as_str().unwrap().is_empty());
    assert_eq!(second.bytes("vda", "blocks_changed"), 3);
    let sent = second.bytes("vda", "bytes_sent");
    assert!((132 << 10..196 << 10).contains(&sent), "the three blocks at most: {sent}");
    assert!(second.bytes("vda", "bytes_read") <= 9 << 20, "holes are not read: {:#}", second.report);
    vm.compare_with_head();

    let third = vm.sync().sealed();
    assert_eq!(third.bytes("vda", "blocks_changed"), 0);
    assert!(third.bytes("vda", "bytes_sent") < 4096, "{:#}", third.report);
    vm.compare_with_head();

    let full = vm.sync_with("", &["--full"]).sealed();
    assert_eq!((full.mode("vda"), full.disk("vda")["reason"].as_str().unwrap()), ("full", "asked for by the operator"));
    assert!(full.bytes("vda", "bytes_sent") > 8 << 20);
    vm.compare_with_head();
    // Points are kept: every one of them is still what it was.
    assert_eq!(vm.points().len(), 4);
}

/// Bytes an image occupies on host b.
fn occupied(image: &str) -> u64 {
    Host::B.output(&["du", "-B1", image]).split_whitespace().next().unwrap().parse().unwrap()
}

fn thin(vm: &Domain, data_mib: u64) {
    vm.sync().sealed();
    let first = occupied(&image_of(&vm.head(), "vda"));
    assert!(first < (data_mib + 2) << 20, "{data_mib} MiB of data occupy {first} bytes");
    vm.compare_with_head();

    // Zeroes written, zeroes asked for, and a range given back: all of it travels as holes.
    for command in ["write -P 0 1M 1M", "write -z -u 2M 1M", "discard 3M 1M"] {
        vm.qemu_io(0, command);
    }
    let second = vm.sync().sealed();
    assert_eq!(second.bytes("vda", "blocks_changed"), 48, "3 MiB are zero now");
    assert!(second.bytes("vda", "bytes_sent") < 16 << 10, "{:#}", second.report);
    let grown = occupied(&image_of(&vm.head(), "vda"));
    assert!(grown < 1 << 20, "holes occupy {grown} bytes");
    vm.compare_with_head();
    vm.assert_home();
}

#[test]
fn thin_qcow2_stays_thin() {
    let lab = Lab::get();
    let disk = Disk::qcow2("4G").then("write -P 0x11 1M 4M").then("write -P 0 16M 8M").then("write -P 0x22 4095M 1M");
    thin(&lab.domain("thin").disk(disk).paused(), 5);
}

#[test]
fn thin_raw_stays_thin() {
    let lab = Lab::get();
    let disk = Disk::raw("4G").then("write -P 0x11 1M 4M").then("write -P 0 16M 8M").then("write -P 0x22 4095M 1M");
    thin(&lab.domain("thinraw").disk(disk).paused(), 5);
}

/// A file that lies beside a point's disks on host b.
pub fn attachment(vm: &Domain, point: &Value, name: &str) -> Vec<u8> {
    let path = format!("{}/points/{}/{name}", vm.replica(), point["id"].as_str().unwrap());
    std::fs::read(Host::B.file(&path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Whoever starts a domain from a point's definition must find the domain as its owner made it: on its own images,
/// and without a word of the run that was under way.
#[test]
fn definitions_name_the_images_and_not_our_overlays() {
    let lab = Lab::get();
    let vm = lab.domain("xml").disk(Disk::qcow2("16M")).disk(Disk::device("16M")).paused();
    for _ in 0..2 {
        vm.sync().sealed();
        let head = vm.head();
        for name in ["domain.xml", "domain-live.xml"] {
            let xml = String::from_utf8(attachment(&vm, &head, name)).unwrap();
            assert!(xml.contains(&format!("<name>{}</name>", vm.name)), "{xml}");
            for image in &vm.images {
                assert!(xml.contains(&format!("'{image}'")), "{name} does not name {image}: {xml}");
            }
            assert!(!xml.contains(".vr-"), "{name} names an overlay: {xml}");
            assert!(!xml.contains("virt-replica"), "{name} holds the run's record: {xml}");
        }
    }
    vm.assert_home();
}

#[test]
fn secrets_travel_only_when_asked() {
    let lab = Lab::get();
    let vm = lab
        .domain("secrets")
        .disk(Disk::qcow2("16M"))
        .devices("<graphics type='vnc' port='-1' autoport='yes' listen='127.0.0.1' passwd='hunter2'/>")
        .paused();
    vm.sync().sealed();
    let without = vm.head();
    vm.sync_with("", &["--with-secrets"]).sealed();
    let with = vm.head();
    for name in ["domain.xml", "domain-live.xml"] {
        let holds = |point| String::from_utf8(attachment(&vm, point, name)).unwrap().contains("hunter2");
        assert_eq!((holds(&without), holds(&with)), (false, true), "{name}");
    }
}

/// A boot without its variables is another machine's boot.
#[test]
fn uefi_variables_travel() {
    let lab = Lab::get();
    let firmware = |xml: String, dir: &str| {
        let os =
            format!("<loader readonly='yes' type='pflash'>{dir}/code.fd</loader><nvram>{dir}/vars.fd</nvram></os>");
        xml.replace("</os>", &os)
    };
    let vm = lab.domain("nvram").disk(Disk::qcow2("16M")).xml(firmware).off();
    Host::A.script("head -c 4M /dev/zero >\"$1/code.fd\"; head -c 256k /dev/urandom >\"$1/vars.fd\"", &[&vm.dir]);
    vm.sync().sealed();
    let head = vm.head();
    assert!(head["attachments"].as_array().unwrap().contains(&"nvram".into()), "{head:#}");
    let own = std::fs::read(Host::A.file(format!("{}/vars.fd", vm.dir))).unwrap();
    assert!(attachment(&vm, &head, "nvram.fd") == own, "the variables differ");
}
