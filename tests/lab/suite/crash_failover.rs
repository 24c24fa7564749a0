//! kill -9 at every numbered step of a failover, of its undoing and of its commit (docs/recovery.md). The same command
//! finishes what was begun, and whenever the domain runs on host b its source on host a is refused.

use super::crash_drill::Drills;
use super::domain::{Disk, Domain};
use super::support::{Host, Lab, STORE, eventually};
use std::time::Duration;

const UP: [&str; 7] = ["f1", "f2", "f3", "f4", "f5", "f6", "f7"];
const DOWN: [&str; 5] = ["f8", "f9", "f10", "f11", "f12"];
const COMMIT: [&str; 2] = ["f13", "f14"];

/// What a failover leaves on host b goes with the test, however that ends.
pub struct OnB<'a>(pub &'a Domain);

impl OnB<'_> {
    pub fn runs(&self) -> bool {
        Host::B.output(&["virsh", "-q", "list", "--name"]).lines().any(|name| name.trim() == self.0.name)
    }

    pub fn overlays(&self) -> String {
        format!("/var/lib/libvirt/images/vr-failover-{}", self.0.uuid)
    }

    /// The guest on b is up and writes: this image of its first disk changes from second to second.
    #[track_caller]
    pub fn writes(&self, image: &str) {
        let (mut last, mut changes) = (String::new(), 0);
        eventually("the guest to write on b", Duration::from_secs(90), || {
            std::thread::sleep(Duration::from_secs(1));
            let now = Host::B.output(&["stat", "-c", "%y", image]);
            changes = if now == last { 0 } else { changes + 1 };
            last = now;
            (changes > 6).then_some(())
        });
    }
}

/// The source is lost after its guest has written and two runs have sent that: there is something below the newest
/// point. Gives the last line that was acknowledged before them.
pub fn lost_after_two_points(vm: &Domain) -> (u64, Drills<'_>, OnB<'_>) {
    vm.wait_acked(5);
    let acked = vm.acked();
    vm.sync().sealed();
    vm.sync().sealed();
    let (b, there) = (Drills::of(vm), OnB(vm));
    vm.virsh(&["destroy"]);
    (acked, b, there)
}

impl Drop for OnB<'_> {
    fn drop(&mut self) {
        let script =
            r#"virsh -q destroy "$1" || true; virsh -q undefine --nvram "$1" || true; rm -rf "${2:?}" "${2:?}".[0-9]*"#;
        Host::B.run(&["bash", "-c", script, "clean", &self.0.name, &self.overlays()]);
    }
}

fn up(name: &str) -> Vec<&str> {
    vec!["failover", name, "--unplanned", "--source-is-dead", "--json"]
}

/// If it runs on b, or may be started there, no run of a's is accepted.
#[track_caller]
fn never_both(vm: &Domain, there: &OnB, step: &str) {
    let sync = vm.sync_with("", &[]);
    match there.runs() {
        true => drop(sync.failed(1).says(&["brought up on the target"])),
        false => assert!([0, 1].contains(&sync.done.code), "{step}: {:?}", sync.done),
    }
}

#[test]
fn a_failover_killed_at_each_step_is_finished_by_the_same_command() {
    let lab = Lab::get();
    let vm = lab.domain("crash-failover").disk(Disk::qcow2("16M").then("write -P 0x11 1M 3M")).off();
    vm.sync().sealed();
    let (b, there) = (Drills::of(&vm), OnB(&vm));
    let up = up(&vm.name);
    let undo = ["failover", &vm.name, "--undo", "--lose-its-writes", "--json"];
    for step in UP {
        b.run(&format!("{step}=kill"), &up).exit(137);
        never_both(&vm, &there, step);
        if step != "f7" {
            let told = ["was cut short", "--unplanned --source-is-dead", "needs_person"];
            b.run("", &["doctor", &vm.name, "--json"]).exit(1).says(&told);
        }
        b.run("", &up).success().says(&["\"action\":\"running\""]);
        assert!(there.runs(), "{step}");
        never_both(&vm, &there, step);
        b.run("", &undo).success();
        assert!(!there.runs(), "{step}");
    }
    for step in DOWN {
        b.run("", &up).success();
        b.run(&format!("{step}=kill"), &undo).exit(137);
        assert_eq!(there.runs(), step == "f8", "{step}");
        never_both(&vm, &there, step);
        match step {
            "f12" => drop(b.run("", &undo).exit(4)),
            _ => drop(b.run("", &undo).success()),
        }
        Host::B.ok(&["test", "!", "-e", &there.overlays()]);
        vm.sync().sealed();
    }
    b.run("", &up).success();
    let commit = ["failover", &vm.name, "--commit", "--json"];
    for step in COMMIT {
        b.run(&format!("{step}=kill"), &commit).exit(137);
        b.run("", &commit).success().says(&["\"generation\":2"]);
    }
    b.run("", &undo).exit(1).says(&["was committed"]);
    vm.sync_with("", &[]).failed(1).says(&["do not start it"]);
    Host::B.virt_replica(&["verify", &vm.name, "--to", STORE]).success();
}
