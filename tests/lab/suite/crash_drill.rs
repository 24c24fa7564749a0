//! kill -9 at every numbered step of a drill (docs/recovery.md). Whatever is left, `doctor` explains it and changes
//! nothing; `doctor --repair`, or the next drill, removes it; and the point is what it was.

use super::domain::{Disk, Domain};
use super::support::{Done, Host, Job, Lab, PATIENCE};
use serde_json::Value;

const STEPS: [&str; 8] = ["d1", "d2", "d3", "d4", "d5", "d6", "d7", "d8"];

/// The commands of a test on host b, with a state of its own: other tests drill there too.
pub struct Drills<'a> {
    vm: &'a Domain,
}

impl Drills<'_> {
    pub fn of(vm: &Domain) -> Drills<'_> {
        // Kernel and initrd of the test guest are on both hosts at the same place.
        let mapping = Host::B.file("/").join("../../shared").join(&vm.name).join("recovery.yaml");
        std::fs::write(mapping, "paths: {/lab/guest: /lab/guest}\nnetworks: {user: none}\n")
            .expect("write the mapping");
        Drills { vm }
    }

    fn words(&self, rest: &[&str]) -> Vec<String> {
        let state = format!("{}/state", self.vm.shared());
        let mut words = vec!["virt-replica".to_owned(), "--state-dir".to_owned(), state];
        words.extend(rest.iter().map(|w| w.to_string()));
        words
    }

    pub fn start(&self, failpoint: &str, rest: &[&str]) -> Job {
        let mapping = format!("{}/recovery.yaml", self.vm.shared());
        let words = self.words(rest);
        let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
        if rest[0] != "doctor" {
            words.extend(["--mapping", &mapping]);
        }
        let mut command = Host::B.command(&words);
        if !failpoint.is_empty() {
            command.env("VIRT_REPLICA_FAILPOINT", failpoint);
        }
        Job::start(command)
    }

    pub fn run(&self, failpoint: &str, rest: &[&str]) -> Done {
        self.start(failpoint, rest).wait(PATIENCE)
    }

    /// The report of a drill that ended by itself.
    pub fn report(done: &Done) -> Value {
        let line = done.stdout.lines().last().expect("it printed something");
        serde_json::from_str(line).unwrap_or_else(|e| panic!("{e} in {line}"))
    }

    /// What drills of this domain have made on host b and have not removed: domains, networks, directories.
    pub fn left(&self) -> Vec<String> {
        let script = r#"
            virsh -q list --all --name | grep "^$1-vr-drill-" || true
            for id in $(ls "$2/recovery/drills" 2>/dev/null); do
                virsh -q net-list --all --name | grep "vr-drill-$id" || true
                find /var/lib/libvirt/images -maxdepth 1 -name "vr-drill-$id"
                [ ! -e "/run/netns/vr-drill-$id" ] || echo "/run/netns/vr-drill-$id"
                find "$2/recovery/drills/$id" -name record.json
            done"#;
        let left = Host::B.script(script, &[&self.vm.name, &format!("{}/state", self.vm.shared())]);
        left.lines().map(str::to_owned).collect()
    }
}

#[test]
fn a_drill_killed_at_each_step_is_explained_and_removed() {
    let lab = Lab::get();
    let vm = lab
        .domain("crash-drill")
        .disk(Disk::qcow2("16M").then("write -P 0x11 1M 3M"))
        .devices("<interface type='user'><model type='virtio'/></interface>")
        .off();
    vm.sync().sealed();
    let drills = Drills::of(&vm);
    let drill = ["drill", vm.name.as_str(), "--probe", "script:/bin/true", "--json"];
    for (at, step) in STEPS.iter().enumerate() {
        let mut killed = drill.to_vec();
        // Nobody answers it; it is there so that there is a foot in the network, which has to go too.
        if *step < "d5" {
            killed.extend(["--probe", "tcp:192.0.2.10/24:22"]);
        }
        drills.run(&format!("{step}=kill"), &killed).exit(137);
        let left = drills.left();
        // With the record everything else is gone, or still there: what counts is that it can be found.
        assert_eq!(left.is_empty(), *step == "d8", "{step}: {left:?}");
        assert_eq!(left.iter().any(|l| l.starts_with(&vm.name)), *step == "d4", "{step}: {left:?}");
        let foot = left.iter().any(|l| l.starts_with("/run/netns"));
        assert_eq!(foot, ["d3", "d4"].contains(step), "{step}: {left:?}");
        let explained = drills.run("", &["doctor", &vm.name, "--json"]);
        match *step {
            // libvirt of host b does not know the domain, and nothing of it is left.
            "d8" => drop(explained.exit(4)),
            _ => drop(explained.exit(1).says(&["a drill of point", "repairable"])),
        }
        assert_eq!(drills.left(), left, "{step}: doctor has changed something");
        match at % 2 {
            0 if *step != "d8" => {
                drop(drills.run("", &["doctor", &vm.name, "--repair", "--json"]).exit(0).says(&["repaired"]))
            }
            _ => {
                let report = Drills::report(&drills.run("", &drill).success());
                assert_eq!((&report["outcome"], &report["point_untouched"]), (&"passed".into(), &true.into()));
            }
        }
        assert_eq!(drills.left(), [""; 0], "{step}");
    }
    Host::B.virt_replica(&["verify", &vm.name, "--to", "/var/lib/virt-replica"]).success();
    // What a dead drill leased is released by time alone; nobody needs to wait for it but a prune.
    vm.sync().sealed();
}
