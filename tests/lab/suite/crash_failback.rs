//! The way home, with two real hypervisors: a guest that was brought up on host b comes home to host a, which had an
//! old copy of it; with kill -9 at every numbered step (docs/recovery.md), and the same command after it. What is read
//! for it on host b is what was written there, if home has what the failover began from.

use super::crash_failover::OnB;
use super::domain::{Disk, Domain, Reference};
use super::handover::{LONG, Traveller, message};
use super::support::{Done, Host, Job, Lab, STORE, TARGET};
use serde_json::Value;

/// Host a, as host b calls it.
pub const HOME: &str = "ssh://root@192.0.2.1";

#[track_caller]
pub fn on(host: Host, failpoint: &str, words: &[&str]) -> Done {
    let mut all = vec!["virt-replica"];
    all.extend(words);
    let mut command = host.command(&all);
    if !failpoint.is_empty() {
        command.env("VIRT_REPLICA_FAILPOINT", failpoint);
    }
    Job::start(command).wait(LONG)
}

/// What coming home leaves on host a goes with the test.
pub struct AtHome<'a>(pub &'a Domain);

impl AtHome<'_> {
    fn overlays(&self) -> String {
        format!("/var/lib/libvirt/images/vr-failover-{}", self.0.uuid)
    }

    fn points(&self) -> Vec<Value> {
        let points = Host::A.json(&["points", &self.0.name, "--to", STORE, "--json"]);
        points["points"].as_array().expect("a list of points").clone()
    }

    /// How the points came about that were sent home since it gave way, oldest first: the disks of each.
    fn came(&self) -> Vec<Vec<Value>> {
        let (mut points, pins) = (self.points(), self.pins());
        let old = points.iter().rposition(|p| pins.iter().any(|pin| p["id"] == pin.as_str())).expect("it gave way");
        points.drain(..=old);
        points.iter().map(|p| p["disks"].as_array().expect("a point has disks").clone()).collect()
    }

    /// Home's newest point is what host b's disk was.
    #[track_caller]
    fn has(&self, disk: &str, wanted: &Reference) {
        let newest = self.points().pop().expect("home has a point");
        let image = super::domain::image_of(&newest, disk);
        Host::A.ok(&["qemu-img", "compare", "-f", "qcow2", "-F", "raw", &image, &wanted.file]);
        Host::A.ok(&["qemu-img", "check", "-q", &image]);
    }

    fn pins(&self) -> Vec<String> {
        let points = Host::A.json(&["points", &self.0.name, "--to", STORE, "--json"]);
        let pins = points["pins"].as_array().expect("a list of pins");
        pins.iter().map(|pin| pin["point"].as_str().expect("an id").to_owned()).collect()
    }
}

impl Drop for AtHome<'_> {
    fn drop(&mut self) {
        let script = r#"virsh -q destroy "$1" || true; virsh -q undefine --nvram "$1" || true
            rm -rf "${2:?}" "${2:?}".[0-9]* "$4/replicas/${3:?}""#;
        Host::A.run(&["bash", "-c", script, "clean", &self.0.name, &self.overlays(), &self.0.uuid, STORE]);
    }
}

fn is_defined(host: Host, name: &str) -> bool {
    host.output(&["virsh", "-q", "list", "--all", "--name"]).lines().any(|n| n.trim() == name)
}

/// The domain as it runs on host b, written to past any guest.
struct There<'a>(&'a Domain, OnB<'a>);

impl There<'_> {
    #[track_caller]
    fn write(&self, disk: usize, what: &str) {
        let hmp = format!("qemu-io -d /machine/peripheral/virtio-disk{disk}/virtio-backend \"{what}\"");
        let said = Host::B.output(&["virsh", "-q", "qemu-monitor-command", &self.0.name, "--hmp", &hmp]);
        assert_eq!(said.trim(), "", "{hmp}");
    }

    fn restart(&self) {
        for verb in ["destroy", "start"] {
            Host::B.ok(&["virsh", "-q", verb, &self.0.name]);
        }
    }

    /// The names of the bitmaps in a disk's image, as they were last saved.
    fn bitmaps(&self, disk: &str) -> Vec<String> {
        let image = format!("{}/{disk}.qcow2", self.1.overlays());
        let info = Host::B.output(&["qemu-img", "info", "-U", "--output=json", &image]);
        let info: Value = serde_json::from_str(&info).expect("JSON of qemu-img");
        let all = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
        all.iter().map(|b| b["name"].as_str().expect("a name").to_owned()).collect()
    }

    /// A disk as it is now, by another reader than ours.
    fn copy(&self, disk: &str) -> Reference {
        let (image, file) =
            (format!("{}/{disk}.qcow2", self.1.overlays()), format!("{}/there-{disk}.raw", self.0.shared()));
        Host::B.ok(&["qemu-img", "convert", "-U", "-O", "raw", &image, &file]);
        Reference { file }
    }
}

fn is_of_a_failover(bitmap: &str) -> bool {
    bitmap.starts_with("vr-failover-")
}

/// The guest has no operating system: it hears no button.
const OFF: [&str; 3] = ["--timeout", "1s", "--force-off"];

fn failback<'a>(name: &'a str, rest: &[&'a str]) -> Vec<&'a str> {
    [&["failback", name, "--to", HOME, "--home-loses", "--json"], &OFF[..], rest].concat()
}

/// A disk of the newest point at home was sent by a bitmap: what was written, in whole blocks, and no more was read.
/// Zeros need no reading.
#[track_caller]
fn by_bitmap(disk: &Value, reason: &str, written: u64) {
    assert_eq!(disk["mode"], "bitmap", "{disk:#}");
    assert!(disk["reason"].as_str().unwrap().contains(reason), "{disk:#}");
    let read = disk["bytes_read"].as_u64().unwrap();
    assert_eq!(disk["blocks_changed"].as_u64(), Some(written / 65536), "{disk:#}");
    assert!(read <= 2 * written, "{written} bytes were written, {read} read: {disk:#}");
}

/// After a planned failover home has exactly what the failover began from: the first run home reads what was written
/// there, over restarts of the guest; and the next one goes on by its own bitmap, even if the first way home was called
/// off.
#[test]
fn after_a_planned_failover_only_what_was_written_there_is_read_for_the_way_home() {
    let lab = Lab::get();
    let data = "write -P 0x11 0 48M";
    let vm =
        lab.domain("failback-delta").disk(Disk::qcow2("64M").then(data)).disk(Disk::raw("64M").then(data)).paused();
    vm.virsh(&["resume"]);
    let (t, home) = (Traveller::of(&vm), AtHome(&vm));
    let there = There(&vm, OnB(&vm));
    let name = vm.name.as_str();
    t.failover("", &OFF).success();
    for disk in ["vda", "vdb"] {
        let bitmaps = there.bitmaps(disk);
        assert!(bitmaps.len() == 1 && is_of_a_failover(&bitmaps[0]), "{bitmaps:?}");
    }
    for (disk, at) in [(0, "5M"), (1, "50M")] {
        there.write(disk, &format!("write -P 0x55 {at} 256k"));
    }
    there.restart();
    there.write(0, "write -z 20M 64k");
    there.write(1, "write -P 0x66 30M 64k");

    on(Host::B, "", &failback(name, &["--keep-undo"])).success();
    // A run while it works, however young home's point is, and one after it was shut off.
    let came = home.came();
    assert_eq!(came.len(), 2, "{came:#?}");
    for (at, disk) in ["vda", "vdb"].into_iter().enumerate() {
        by_bitmap(&came[0][at], "what the failover began from", 320 << 10);
        by_bitmap(&came[1][at], "recorded every change since", 0);
        home.has(disk, &there.copy(disk));
        assert!(!there.bitmaps(disk).iter().any(|b| is_of_a_failover(b)), "it has done what it was for");
    }

    on(Host::B, "", &["failover", name, "--to", HOME, "--abort", "--lose-its-writes"]).success();
    there.write(0, "write -P 0x77 40M 128k");
    there.write(1, "write -P 0x77 41M 128k");
    there.write(0, "flush");
    there.write(1, "flush");
    let now = ["vda", "vdb"].map(|disk| (disk, there.copy(disk)));
    on(Host::B, "", &failback(name, &[])).success();
    let came = home.came();
    assert_eq!(came.len(), 4, "{came:#?}");
    came[2].iter().for_each(|disk| by_bitmap(disk, "recorded every change since", 128 << 10));
    came[3].iter().for_each(|disk| by_bitmap(disk, "recorded every change since", 0));
    for (disk, content) in &now {
        home.has(disk, content);
    }
    vm.sync().sealed();
    Host::B.virt_replica(&["verify", name, "--to", STORE]).success();
    drop(t);
}

/// What is copied into an overlay so that it stands alone changes nothing that the guest reads, and marks nothing.
#[test]
fn images_of_its_own_come_home_by_what_was_written_too() {
    let lab = Lab::get();
    let vm = lab.domain("failback-own").disk(Disk::qcow2("64M").then("write -P 0x11 0 48M")).paused();
    vm.virsh(&["resume"]);
    let (t, home) = (Traveller::of(&vm), AtHome(&vm));
    let there = There(&vm, OnB(&vm));
    let name = vm.name.as_str();
    t.failover("", &OFF).success();
    there.write(0, "write -P 0x55 5M 256k");
    on(Host::B, "", &["failover", name, "--commit"]).success();
    on(Host::B, "", &["detach", name]).success();
    there.write(0, "write -P 0x66 50M 64k");
    on(Host::B, "", &failback(name, &["--keep-undo"])).success();
    by_bitmap(&home.came()[0][0], "what the failover began from", 320 << 10);
    home.has("vda", &there.copy("vda"));
    assert!(!there.bitmaps("vda").iter().any(|b| is_of_a_failover(b)));
    drop(t);
}

#[test]
fn a_run_that_was_led_by_it_and_died_before_it_dropped_it_leaves_that_to_the_next_one() {
    let lab = Lab::get();
    let vm = lab.domain("failback-died").disk(Disk::qcow2("16M").then("write -P 0x11 0 12M")).off();
    let (t, home) = (Traveller::of(&vm), AtHome(&vm));
    let there = There(&vm, OnB(&vm));
    let name = vm.name.as_str();
    vm.sync().sealed();
    on(Host::B, "", &["failover", name, "--unplanned", "--source-is-dead"]).success();
    on(Host::A, "", &["give-way", name, "--lives-elsewhere"]).success();
    let sync = ["sync", name, "--to", HOME, "--json"];
    // One that seals nothing leaves it as it is.
    there.write(0, "write -P 0x55 5M 64k");
    assert_ne!(on(Host::B, "5f=error", &sync).code, 0);
    on(Host::B, "8a=kill", &sync).exit(137);
    assert!(there.bitmaps("vda").iter().any(|b| is_of_a_failover(b)));
    by_bitmap(&home.came()[0][0], "what the failover began from", 64 << 10);
    there.write(0, "write -P 0x66 7M 128k");
    on(Host::B, "", &sync).success();
    by_bitmap(&home.came()[1][0], "recorded every change since", 128 << 10);
    Host::B.ok(&["virsh", "-q", "destroy", name]);
    let left = there.bitmaps("vda");
    assert!(left.len() == 1 && !left.iter().any(|b| is_of_a_failover(b)), "{left:?}");
    home.has("vda", &there.copy("vda"));
    drop(t);
}

/// Home wrote on after the failover's point: what it has is compared, and comes out right. The failover had died after
/// its overlays were made, and they were made anew.
#[test]
fn a_home_that_has_something_else_is_compared() {
    let lab = Lab::get();
    let vm = lab.domain("failback-other").disk(Disk::qcow2("16M").then("write -P 0x11 0 12M")).paused();
    let (t, home) = (Traveller::of(&vm), AtHome(&vm));
    let there = There(&vm, OnB(&vm));
    let name = vm.name.as_str();
    vm.sync().sealed();
    vm.write(0, "-P 0x99 2M 1M");
    vm.virsh(&["destroy"]);
    let up = ["failover", name, "--unplanned", "--source-is-dead"];
    on(Host::B, "f3=kill", &up).exit(137);
    let first = there.bitmaps("vda");
    on(Host::B, "", &up).success();
    let bitmaps = there.bitmaps("vda");
    assert!(bitmaps.len() == 1 && is_of_a_failover(&bitmaps[0]) && bitmaps != first, "{first:?}, then {bitmaps:?}");
    there.write(0, "write -P 0x55 5M 256k");
    // A domain that home could not bring up takes nothing from home: it is asked before anything gives way.
    let memory = |kib: &str| Host::B.ok(&["virsh", "-q", "setmaxmem", name, kib, "--config"]);
    let before = Host::B.output(&["virsh", "-q", "dumpxml", name, "--inactive"]);
    let kib =
        before.split_once("<memory unit='KiB'>").and_then(|(_, rest)| rest.split_once('<')).expect("its memory").0;
    memory("1073741824");
    on(Host::B, "", &failback(name, &[])).exit(1).says(&["its home", "only", "are free"]);
    assert!(is_defined(Host::A, name));
    Host::A.virt_replica(&["points", name, "--to", STORE]).exit(4);
    memory(kib);
    on(Host::B, "", &failback(name, &["--keep-undo"])).success();
    // What home gave way with is young: it is compared all the same while the guest works, and not while it is down.
    let came = home.came();
    assert_eq!(came.len(), 2, "{came:#?}");
    by_bitmap(&came[1][0], "recorded every change since", 0);
    let disk = &came[0][0];
    assert_eq!((&disk["mode"], &disk["tracking_doubt"]), (&"digest".into(), &true.into()), "{disk:#}");
    assert!(disk["reason"].as_str().unwrap().contains("not what the failover began from"), "{disk:#}");
    home.has("vda", &there.copy("vda"));
    assert!(
        there.bitmaps("vda").iter().any(|b| is_of_a_failover(b)),
        "another target may still have what it began from"
    );
    drop(t);
}

/// Case G10: home's store already has what a plain run sent there, of a generation that home itself does not know.
#[test]
fn a_domain_comes_home_also_after_a_plain_run_to_its_home() {
    let lab = Lab::get();
    let vm = lab.domain("failback-plain").disk(Disk::qcow2("16M").then("write -P 0x11 0 12M")).off();
    let (t, home) = (Traveller::of(&vm), AtHome(&vm));
    let there = There(&vm, OnB(&vm));
    let name = vm.name.as_str();
    vm.sync().sealed();
    on(Host::B, "", &["failover", name, "--unplanned", "--source-is-dead"]).success();
    on(Host::B, "", &["failover", name, "--commit"]).success();
    there.write(0, "write -P 0x55 5M 256k");
    on(Host::B, "", &["sync", name, "--to", HOME, "--json"]).success();
    there.write(0, "write -P 0x66 7M 64k");
    on(Host::B, "", &failback(name, &["--keep-undo"])).success();
    assert_eq!(home.pins().len(), 1, "what home had is a point");
    home.has("vda", &there.copy("vda"));
    drop(t);
}

#[test]
fn a_writing_guest_comes_home_and_what_home_had_stays_as_a_point() {
    let lab = Lab::get();
    let vm = lab.domain("failback").disk(Disk::ext4("64M", "qcow2")).guest().running();
    let (t, home) = (Traveller::of(&vm), AtHome(&vm));
    let name = vm.name.as_str();
    vm.wait_acked(5);
    vm.sync().sealed();
    // Beforehand it is asked whether that could be done.
    let status = Host::A.json(&["status", name, "--to", TARGET, "--ready", "--json"]);
    assert_eq!(status["domains"][0]["ready"]["ready"], true, "{status:#}");
    Host::A.virt_replica(&["status", name, "--to", TARGET, "--ready"]).success().says(&["could bring it up"]);
    // What it writes now is lost by the failover, and home has it.
    vm.wait_acked(vm.acked() + 10);
    vm.virsh(&["destroy"]);
    on(Host::B, "", &["failover", name, "--unplanned", "--source-is-dead"]).success();
    t.writes_there();

    // Nobody loses anything by accident; and nobody gives way to himself.
    on(Host::B, "", &["failback", name, "--to", HOME]).exit(2).says(&["--home-loses"]);
    on(Host::B, "", &["give-way", name, "--lives-elsewhere"]).exit(1).says(&["runs on this host"]);
    vm.virsh(&["start", "--paused"]);
    on(Host::B, "", &["failback", name, "--to", HOME, "--home-loses"]).exit(1).says(&["runs on this host"]);
    vm.virsh(&["destroy"]);
    let done = on(Host::B, "", &["failback", name, "--to", HOME, "--home-loses", "--json"]).success();
    let told = message(&done, "failback");
    assert_eq!(told["generation"], 2, "{told:#}");
    assert_eq!(home.pins(), [told["old"].as_str().unwrap()]);
    assert!(told["handover"]["downtime_ms"].as_f64().unwrap() > 0.0, "{told:#}");
    assert!(vm.state() == "running" && !is_defined(Host::B, name));
    Host::B.ok(&["test", "!", "-e", &t.there.overlays()]);

    // Host b is its target again, and takes only what differs.
    let again = vm.sync().sealed();
    assert_eq!(again.report["generation"], 2, "{:#}", again.report);
    Host::B.virt_replica(&["verify", name, "--to", STORE]).success();
    Host::A.virt_replica(&["verify", name, "--to", STORE]).success();
    on(Host::A, "", &["detach", name]).success();
    vm.virsh(&["destroy"]);
    let lines = |point: &str| Host::A.output(&["/lab/tools/guest", "lines", point, "qcow2"]).lines().count();
    let now = lines(&format!("{}/vda.qcow2", home.overlays()));
    let points = Host::A.json(&["points", name, "--to", STORE, "--json"]);
    let points = points["points"].as_array().unwrap();
    let [old, came] =
        [&points[0], &points[points.len() - 1]].map(|p| lines(super::domain::image_of(p, "vda").as_str()));
    assert!(now >= came && came > 0 && old > 0, "{old} lines of old, {came} came home, {now} now");
}

#[test]
fn giving_way_and_coming_home_killed_at_each_step_are_finished_by_the_same_command() {
    let lab = Lab::get();
    let vm = lab.domain("crash-failback").disk(Disk::qcow2("16M").then("write -P 0x11 1M 3M")).off();
    let (t, home) = (Traveller::of(&vm), AtHome(&vm));
    let name = vm.name.as_str();
    vm.sync().sealed();
    on(Host::B, "f3=kill", &["failover", name, "--unplanned", "--source-is-dead"]).exit(137);
    on(Host::B, "", &["failover", name, "--unplanned", "--source-is-dead"]).success();

    let give_way = ["give-way", name, "--lives-elsewhere", "--json"];
    for step in ["k1", "k2", "k3"] {
        on(Host::A, &format!("{step}=kill"), &give_way).exit(137);
        assert_eq!(is_defined(Host::A, name), step != "k3", "{step}");
    }
    on(Host::A, "", &give_way).success().says(&["\"point\":null"]);
    assert!(!home.pins().is_empty());

    let failback = ["failback", name, "--to", HOME, "--home-loses", "--timeout", "1s", "--force-off", "--json"];
    for step in ["k4", "k5", "k6", "k7", "k8", "k9"] {
        on(Host::B, &format!("{step}=kill"), &failback).exit(137);
        assert!(is_defined(Host::A, name), "{step}");
        // Until everything is gone here, nobody is let in, and nobody brings it up here.
        if step < "k8" {
            vm.sync_with("", &[]).failed(1);
        }
    }
    on(Host::B, "", &failback).success().says(&["\"generation\":2"]);
    // Nobody had written anywhere: home had what the failover began from, and nothing was read.
    by_bitmap(&home.came()[0][0], "what the failover began from", 0);
    // Also where the domain has images of its own at home by now, and whoever asks has lost every answer.
    on(Host::A, "", &["detach", name]).success();
    on(Host::B, "", &failback).success().says(&["\"generation\":2", "\"old\":null"]);
    assert!(!is_defined(Host::B, name));
    vm.sync().sealed();
    Host::B.virt_replica(&["verify", name, "--to", STORE]).success();
    drop((t, home));
}
