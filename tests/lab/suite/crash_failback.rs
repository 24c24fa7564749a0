//! The way home, with two real hypervisors: a guest that was brought up on host b comes home to host a, which had an old copy of
//! it; with kill -9 at every numbered step (docs/recovery.md), and the same command after it.

use super::domain::{Disk, Domain};
use super::handover::{LONG, Traveller, message};
use super::support::{Done, Host, Job, Lab, STORE, TARGET};

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
    // Also where the domain has images of its own at home by now, and whoever asks has lost every answer.
    on(Host::A, "", &["detach", name]).success();
    on(Host::B, "", &failback).success().says(&["\"generation\":2", "\"old\":null"]);
    assert!(!is_defined(Host::B, name));
    vm.sync().sealed();
    Host::B.virt_replica(&["verify", name, "--to", STORE]).success();
    drop((t, home));
}
