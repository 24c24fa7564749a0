//! Planned failovers with two real hypervisors: a guest that writes all the time loses no line that it had
//! acknowledged, and the domain never runs twice, in whatever order somebody tries.

use super::crash_failover::OnB;
use super::domain::{Disk, Domain};
use super::runbooks::{lines, map_paths};
use super::support::{Done, Host, Job, Lab, STORE, TARGET, Undo, eventually};
use serde_json::Value;
use std::time::Duration;

/// A guest shuts down and boots under TCG, and runs go over a link.
pub const LONG: Duration = Duration::from_secs(150);

/// A domain of host a that goes to host b, and all that is left of it on either, gone with the test.
pub struct Traveller<'a> {
    pub vm: &'a Domain,
    pub there: OnB<'a>,
}

impl<'a> Traveller<'a> {
    pub fn of(vm: &'a Domain) -> Traveller<'a> {
        map_paths();
        Traveller { vm, there: OnB(vm) }
    }

    pub fn start(&self, failpoint: &str, command: &str, rest: &[&str]) -> Job {
        let mut words = vec!["virt-replica", command, &self.vm.name, "--to", TARGET, "--json"];
        words.extend(rest);
        let mut command = Host::A.command(&words);
        if !failpoint.is_empty() {
            command.env("VIRT_REPLICA_FAILPOINT", failpoint);
        }
        Job::start(command)
    }

    #[track_caller]
    pub fn failover(&self, failpoint: &str, rest: &[&str]) -> Done {
        self.start(failpoint, "failover", rest).wait(LONG)
    }

    pub fn image(&self) -> String {
        format!("{}/vda.qcow2", self.there.overlays())
    }

    #[track_caller]
    pub fn writes_there(&self) {
        self.there.writes(&self.image());
    }

    pub fn status(&self) -> Value {
        Host::A.json(&["status", &self.vm.name, "--json"])["domains"][0].clone()
    }

    /// Whether it starts with this host.
    pub fn autostart(&self, host: Host) -> bool {
        let info = host.run(&["virsh", "-q", "dominfo", &self.vm.name]).stdout;
        info.lines().any(|l| l.starts_with("Autostart") && l.ends_with("enable"))
    }
}

impl Drop for Traveller<'_> {
    fn drop(&mut self) {
        let script = r#"rm -rf "$2/source/recovery/handovers/${1:?}" "$2/source/recovery/failovers/${1:?}""#;
        for host in [Host::A, Host::B] {
            host.run(&["bash", "-c", script, "clear", &self.vm.uuid, STORE]);
        }
    }
}

/// The message of this kind that a command printed last.
#[track_caller]
pub fn message(done: &Done, kind: &str) -> Value {
    let lines = done.stdout.lines().rev().filter_map(|l| serde_json::from_str::<Value>(l).ok());
    lines.into_iter().find(|v| v["message_type"] == kind).unwrap_or_else(|| panic!("no {kind} in {}", done.stdout))
}

#[test]
fn a_writing_guest_is_handed_over_and_comes_back_and_no_acknowledged_line_is_lost() {
    let lab = Lab::get();
    let vm = lab.domain("handover").disk(Disk::ext4("64M", "qcow2")).guest().running();
    let t = Traveller::of(&vm);
    vm.virsh(&["autostart"]);
    vm.wait_acked(5);
    // There is no point yet: the first run is made while the guest works.
    let done = t.failover("", &[]).success();
    let report = message(&done, "handover");
    let acked = vm.acked();
    println!("down for {} ms, shut down in {} ms", report["downtime_ms"], report["shutdown_ms"]);
    assert!(report["downtime_ms"].as_f64().unwrap() > 0.0 && report["shutdown_ms"].as_f64().unwrap() > 0.0);
    assert_eq!(vm.head()["id"], report["point"]);
    assert_eq!(vm.head()["autostart"], true, "as before it was taken away for the handover");
    assert!(t.there.runs() && vm.state() == "shut off");
    assert!(t.autostart(Host::B) && !t.autostart(Host::A), "it starts with the host that it lives on");
    assert!(vm.virsh(&["dumpxml"]).contains("do not start it here"));

    // The source says where it lives, and does nothing with it.
    assert_eq!(t.status()["state"], "demoted");
    let lives = [format!("lives on {TARGET}")];
    Host::A.virt_replica(&["doctor", &vm.name]).success().says(&[&lives[0]]);
    vm.sync_with("", &[]).failed(1).says(&[&lives[0], "--abort"]);
    Host::A.virt_replica(&["plan", &vm.name, "--to", TARGET]).exit(1).says(&[&lives[0]]);
    t.start("", "migrate", &[]).wait(LONG).exit(1).says(&[&lives[0]]);
    t.failover("", &[]).success().says(&[report["point"].as_str().unwrap()]);

    // Somebody starts it here all the same.
    vm.virsh(&["start", "--paused"]);
    assert_eq!(t.status()["state"], "needs_attention");
    Host::A.virt_replica(&["doctor", &vm.name]).exit(1).says(&["RUNS ON BOTH SIDES", "virsh destroy"]);
    Host::A.virt_replica(&["status", &vm.name, "--nagios"]).exit(2).says(&["RUNS ON BOTH SIDES"]);
    let refused = vm.sync_with("", &[]).failed(1).says(&["RUNS ON BOTH SIDES"]);
    assert!(refused.report["alarms"][0].as_str().unwrap().contains("RUNS ON BOTH SIDES"), "{:#}", refused.report);
    t.failover("", &[]).exit(1).says(&["RUNS ON BOTH SIDES"]);
    vm.virsh(&["destroy"]);

    // It has booted there on what it wrote here, to the last line.
    t.writes_there();
    t.failover("", &["--abort"]).exit(1).says(&["would be lost", "--lose-its-writes"]);
    assert!(t.there.runs());
    Host::B.ok(&["virsh", "-q", "destroy", &vm.name]);
    let moved = lines(Host::B, &t.image());
    assert!(moved > acked, "line {acked} was acknowledged here, and {moved} are there");

    t.failover("", &["--abort", "--lose-its-writes"]).success().says(&["\"started\":true"]);
    assert!(!t.there.runs() && vm.state() == "running" && t.autostart(Host::A));
    assert!(!vm.virsh(&["dumpxml"]).contains("do not start it here"));
    vm.sync().sealed();
    vm.still_writes();
}

#[test]
fn a_guest_that_does_not_hear_its_power_button_is_left_alone_or_ended_on_request() {
    let lab = Lab::get();
    let vm = lab.domain("handover-deaf").disk(Disk::qcow2("16M").then("write -P 0x11 1M 3M")).paused();
    let t = Traveller::of(&vm);
    vm.sync().sealed();
    t.failover("", &["--timeout", "2s"]).exit(1).says(&["is paused", "virsh resume"]);
    vm.virsh(&["resume"]);
    t.failover("", &["--timeout", "2s"]).exit(1).says(&["did not shut down within 2 s", "--force-off"]);
    assert!(vm.state() == "running" && !t.there.runs());
    assert!(!vm.virsh(&["dumpxml"]).contains("do not start it here"));
    let point = vm.sync().sealed().report["id"].clone();
    let ready = |rest: &[&str]| Host::A.virt_replica(&[&["ready", &vm.name, "--to", TARGET], rest].concat());
    ready(&[]).success().says(&[&format!("can be brought up on {TARGET} from point")]);
    let answer: Value = serde_json::from_str(&ready(&["--json"]).success().stdout).unwrap();
    assert_eq!((&answer["point"], &answer["target"], &answer["ready"]), (&point, &TARGET.into(), &true.into()));
    ready(&["--point", "000099-00000000"]).exit(4);
    let done = t.failover("", &["--timeout", "2s", "--force-off"]).success();
    assert_eq!(message(&done, "handover")["forced_off"], true);
    ready(&[]).exit(1).says(&["cannot be brought up", "RED", "to do"]);
    assert!(vm.state() == "shut off" && t.there.runs());
}

/// What the target's own commands do in between, and what the source makes of it.
#[test]
fn whoever_tries_it_in_whatever_order_the_domain_runs_on_one_side() {
    let lab = Lab::get();
    let vm = lab.domain("handover-brain").disk(Disk::qcow2("16M").then("write -P 0x11 1M 3M")).off();
    let t = Traveller::of(&vm);
    vm.sync().sealed();
    let there = |words: &[&str]| Host::B.virt_replica(&[&["failover", &vm.name], words].concat());
    let undo = ["--undo", "--lose-its-writes"];

    // Brought up there by hand: nothing is handed over, and no run is accepted.
    there(&["--unplanned", "--source-is-dead"]).success();
    t.failover("", &[]).exit(1).says(&["brought up on the target"]);
    assert_eq!(t.status()["state"], "ok", "nothing was begun");
    vm.sync_with("", &[]).failed(1).says(&["brought up on the target"]);
    there(&undo).success();

    // Handed over, undone there: the next run lets it back, with a note.
    t.failover("", &[]).success();
    there(&["--unplanned", "--source-is-dead"]).success().says(&["runs here"]);
    vm.sync_with("", &[]).failed(1).says(&["lives on"]);
    there(&undo).success();
    assert!(!t.there.runs());
    let back = vm.sync_with("", &[]).sealed();
    assert!(back.report["warnings"].to_string().contains("is this host's again"), "{:#}", back.report);
    assert_eq!(t.status()["state"], "ok");

    // Undone there while nobody here knows: calling it off here finds nothing to end, and starts nothing that did not
    // run.
    t.failover("", &[]).success();
    there(&undo).success();
    t.failover("", &["--abort"]).success().says(&["\"started\":false"]);
    vm.sync().sealed();

    // Committed there: there is no way back.
    t.failover("", &[]).success();
    there(&["--commit"]).success();
    t.failover("", &["--abort", "--lose-its-writes"]).exit(1).says(&["committed"]);
    assert!(t.there.runs());
    vm.sync_with("", &[]).failed(1).says(&["lives on"]);
    assert_eq!(t.status()["state"], "demoted");
    Host::A.virt_replica(&["failover", &vm.name]).exit(2).says(&["--to TARGET", "--unplanned --source-is-dead"]);
}

/// The target falls silent just when it is asked: the answer is waited for, asked for again, and never guessed.
#[test]
fn a_target_that_is_cut_off_when_it_is_asked_is_asked_again_and_nothing_is_started_meanwhile() {
    let lab = Lab::alone();
    let vm = lab.domain("handover-cut").disk(Disk::qcow2("16M").then("write -P 0x11 1M 3M")).paused();
    let t = Traveller::of(&vm);
    vm.sync().sealed();
    vm.virsh(&["resume"]);
    let over = ["--timeout", "1s", "--force-off"];
    let _healed = Undo(|| drop(lab.tool(&["heal"])));

    // Nobody is there to call it off: the domain stays off.
    t.failover("h5=kill", &over).exit(137);
    lab.tool(&["cut"]);
    t.failover("", &["--abort", "--lose-its-writes"]).exit(1);
    assert_eq!(vm.state(), "shut off");
    lab.tool(&["heal"]);
    t.failover("", &["--abort"]).success();
    assert!(vm.state() == "running" && !t.there.runs());

    let mut job = t.start("h5=sleep:4000", "failover", &over);
    job.wait_line(LONG, "that it sends what is left", |line| line.contains("sending what is left"));
    eventually("the record to say that the target is asked", Duration::from_secs(30), || {
        let record = format!("{STORE}/source/recovery/handovers/{}/record.json", vm.uuid);
        Host::A.run(&["grep", "-q", "\"asked\": true", &record]).code.eq(&0).then_some(())
    });
    lab.tool(&["cut"]);
    job.wait_line(LONG, "that it asks again", |line| line.contains("asking again"));
    assert_eq!(vm.state(), "shut off");
    vm.sync_with("", &[]).failed(1).says(&["may run on"]);
    lab.tool(&["heal"]);
    job.wait_from_now(LONG).success();
    assert!(t.there.runs() && vm.state() == "shut off");
    assert_eq!(t.status()["state"], "demoted");
}
