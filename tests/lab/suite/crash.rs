//! kill -9 at every numbered step of a run, of the driver and of the agent, on real libvirt, QEMU and sshd.
//!
//! What has to hold afterwards is in `crash_machine`: the guest runs, unheld; the head is the old or the new point,
//! whole; one `sync`, or one `doctor --repair`, brings the domain back onto its own images with every write that the
//! guest had flushed; the next run seals. docs/replication.md lists which number is borne by which test, and
//! `tests/it/failpoints.rs` keeps that list true.

use crate::crash_bench::{Driver, HELD_MAX, Lab, wait_for};
use crate::crash_machine::Machine;
use std::time::{Duration, Instant};

/// Nothing stands on an overlay yet, or the freeze is under way.
const TO_THE_FREEZE: [&str; 10] = ["1", "2", "3", "3c", "4a", "4b", "4c", "4d", "4e", "4f"];
const SHIP_AND_SEAL: [&str; 5] = ["5a", "5b", "5f", "6f", "6g"];
const COMMIT: [&str; 5] = ["7a", "7b", "7c", "7d", "7e"];
const PIVOT_AND_AFTER: [&str; 9] = ["7f", "7g", "7h", "7i", "7j", "7n", "8a", "8b", "8c"];
/// The vCPUs stand at these: the dead-man has to let them go.
const HELD: [&str; 4] = ["7e", "7f", "7g", "7h"];

#[derive(Clone, Copy, PartialEq)]
enum By {
    Sync,
    Doctor,
}

#[test]
fn killed_before_and_in_the_freeze() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "k4");
    for point in TO_THE_FREEZE {
        kill_and_recover(&mut machine, point, "", By::Sync);
        kill_and_recover(&mut machine, point, "", By::Doctor);
    }
}

#[test]
fn killed_while_shipping_and_sealing() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "k5");
    for point in SHIP_AND_SEAL {
        kill_and_recover(&mut machine, point, "", By::Sync);
        kill_and_recover(&mut machine, point, "", By::Doctor);
    }
}

#[test]
fn killed_while_committing() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "k7");
    for point in COMMIT {
        kill_and_recover(&mut machine, point, "4f=sleep:1000,", By::Sync);
        kill_and_recover(&mut machine, point, "4f=sleep:1000,", By::Doctor);
    }
}

#[test]
fn killed_while_pivoting_and_retiring() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "k8");
    for point in PIVOT_AND_AFTER {
        kill_and_recover(&mut machine, point, "4f=sleep:1000,", By::Sync);
        kill_and_recover(&mut machine, point, "4f=sleep:1000,", By::Doctor);
    }
}

/// One run killed at `point`, looked at, and mended. `before` gives the test time to write to the overlays.
fn kill_and_recover(machine: &mut Machine, point: &str, before: &str, by: By) {
    let why = format!("killed at {point}, mended by {}", if by == By::Sync { "sync" } else { "doctor" });
    eprintln!("{why}");
    let (points, _) = machine.points();
    let sealed = machine.sealed.clone();
    machine.write();
    let frozen = machine.model.clone();

    let watch = Watch::start(machine);
    let mut driver = machine.spawn_sync(&format!("{before}{point}=kill"));
    if !before.is_empty() {
        machine.write_to_overlays(&mut driver);
    }
    let ended = driver.wait();
    assert!(ended.killed(), "{why}: {ended:#?}");
    machine.check_let_go(ended.at, &why);
    if HELD.contains(&point) {
        watch.check_pause(machine, &why);
    }
    drop(watch);
    // The guest goes on writing, to whatever it stands on now.
    machine.write();
    machine.check_live(&why);
    machine.check_head(&points, &sealed, &frozen, &why);

    if by == By::Doctor {
        // Explaining changes nothing.
        let traces = machine.traces();
        let open = machine.record().is_some() || machine.record_in_metadata();
        let found = machine.doctor("", false);
        assert_eq!(found.code(), Some(i32::from(open)), "{why}: {found:#?}");
        assert_eq!(found.says("was cut short"), open, "{why}: {found:#?}");
        assert_eq!(machine.traces(), traces, "{why}: doctor without --repair changed something");
        machine.doctor("", true).ok(&why);
        machine.check_settled(&why);
    }
    machine.check_next_sync(&why);
    machine.check_settled(&why);
}

/// What QEMU itself says about when it stopped and went on.
struct Watch {
    driver: Driver,
}

impl Watch {
    fn start(machine: &mut Machine) -> Watch {
        let driver = machine.watch_qemu();
        Watch { driver }
    }

    /// Times of an event in seconds, oldest first.
    fn times(&self, event: &str) -> Vec<f64> {
        let said = self.driver.output();
        let of_event = said.lines().filter_map(|l| l.strip_prefix(&format!("event {event} at ")));
        of_event.map(|l| l.split(' ').next().unwrap().parse().unwrap()).collect()
    }

    /// I2 and I3, as QEMU's clock and the file system's saw them: held no longer than the bound; every overlay whose
    /// disk had pivoted had lost its name before the guest ran its next instruction.
    fn check_pause(&self, machine: &Machine, why: &str) {
        let resumed = wait_for("QEMU's word that it runs again", || self.times("RESUME").first().copied());
        let stopped = self.times("STOP")[0];
        assert!(resumed - stopped < HELD_MAX.as_secs_f64(), "{why}: held for {} s", resumed - stopped);
        eprintln!("  held for {:.0} ms", (resumed - stopped) * 1e3);
        let pivoted = self.times("BLOCK_JOB_COMPLETED").len();
        let retired = machine.retired_at();
        assert_eq!(retired.len(), pivoted, "{why}: overlays renamed away, of {pivoted} that were pivoted");
        for at in retired {
            assert!(at <= resumed, "{why}: the guest ran at {resumed} on a disk whose overlay had its name until {at}");
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.driver.kill();
    }
}

/// Steps 7k to 7m: the guest ends while the driver ships, so that the driver commits while it is off.
#[test]
fn killed_while_committing_what_is_off() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "koff");
    for point in ["7k", "7l", "7m"] {
        for by in [By::Sync, By::Doctor] {
            let why = format!("killed at {point} with the domain off");
            eprintln!("{why}");
            let mut driver = machine.spawn_sync(&format!("4f=sleep:1000,5b=sleep:3000,{point}=kill"));
            machine.write_to_overlays(&mut driver);
            driver.stands_at("5b");
            machine.virsh("destroy", &[]);
            let ended = driver.wait();
            assert!(ended.killed(), "{why}: {ended:#?}");
            match by {
                By::Sync => machine.check_next_sync(&why),
                By::Doctor => drop(machine.doctor("", true).ok(&why)),
            }
            machine.check_settled(&why);
            machine.virsh("start", &[]);
            machine.check_live(&why);
            machine.check_next_sync(&why);
            machine.check_settled(&why);
        }
    }
}

/// The agent dies at each of its own steps: the guest is on its own images when `sync` returns, and the head is one
/// point.
#[test]
fn agent_killed() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "agent");
    for point in [
        "3a",
        "3b",
        "5c",
        "5d",
        "5e",
        "6a",
        "6b",
        "6c",
        "6d.written",
        "6d.renamed",
        "6d",
        "6e.marked",
        "6e.applied",
        "6e",
    ] {
        let why = format!("agent killed at {point}");
        eprintln!("{why}");
        let (points, _) = machine.points();
        let sealed = machine.sealed.clone();
        machine.write();
        let frozen = machine.model.clone();
        lab.arm_agent(Some(&format!("{point}=kill")));
        let mut driver = machine.spawn_sync("4f=sleep:1000");
        if !point.starts_with('3') {
            machine.write_to_overlays(&mut driver);
        }
        let ended = driver.wait();
        lab.arm_agent(None);
        assert!(matches!(ended.code(), Some(1..=11)), "{why}: {ended:#?}");
        assert!(lab.agent_said().contains(&format!("failpoint {point}:")), "{why}: never came there");
        machine.check_settled(&why);
        machine.check_head(&points, &sealed, &frozen, &why);
        machine.check_next_sync(&why);
        machine.check_settled(&why);
    }
}

/// What carries the session dies in mid-ship: the agent, the sshd session that runs it, the ssh master.
#[test]
fn session_killed_in_mid_ship() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "ssh");
    type Kill<'a> = &'a dyn Fn(&Driver);
    let kills: [(&str, Kill); 3] = [
        // A host of the lab has its own process ids: there is no other agent, session or master in sight.
        ("the agent", &|_| drop(lab.sh("b", "kill -9 $(pgrep -x virt-replica)"))),
        ("the sshd session", &|_| drop(lab.sh("b", "kill -9 $(pgrep -P $(cat /run/sshd.pid))"))),
        ("the ssh master", &|_| drop(lab.sh("a", "kill -9 $(pgrep -x ssh)"))),
    ];
    for (what, kill) in kills {
        let why = format!("{what} killed in mid-ship");
        eprintln!("{why}");
        let (points, _) = machine.points();
        let sealed = machine.sealed.clone();
        machine.write();
        let frozen = machine.model.clone();
        let mut driver = machine.spawn_sync("4f=sleep:1000,5b=sleep:1000");
        machine.write_to_overlays(&mut driver);
        driver.stands_at("5b");
        kill(&driver);
        let ended = driver.wait();
        assert!(matches!(ended.code(), Some(1..=11)), "{why}: {ended:#?}");
        machine.check_settled(&why);
        machine.check_head(&points, &sealed, &frozen, &why);
        machine.check_next_sync(&why);
    }
}

/// A driver that hangs: the dead-man ends it and lets the guest go, within the bound. Meanwhile whoever comes is told
/// who is at work.
#[test]
fn hanging_driver_is_ended() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "hang");
    for point in ["4c", "4d", "7d", "7e", "7f", "7g", "7h"] {
        for stopped in [false, true] {
            if stopped && !["4d", "7f"].contains(&point) {
                continue;
            }
            let why = format!("driver {} at {point}", if stopped { "stopped by SIGSTOP" } else { "asleep" });
            eprintln!("{why}");
            machine.write();
            let watch = Watch::start(&mut machine);
            let mut driver = machine.spawn_sync(&format!("4f=sleep:500,{point}=sleep:60000"));
            driver.stands_at(point);
            let since = Instant::now();
            if stopped {
                lab.sh("a", &format!("kill -STOP {}", driver.pid()));
            }
            let second = machine.sync("");
            assert_eq!(second.code(), Some(11), "{why}: {second:#?}");
            assert!(second.says(&format!("pid {}", driver.pid())), "{why}: names the holder: {second:#?}");
            let busy = machine.doctor("", true);
            assert!(busy.says("works on it right now"), "{why}: {busy:#?}");
            let ended = if stopped { driver.wait_stopped(&lab) } else { driver.wait() };
            assert!(ended.killed(), "{why}: {ended:#?}");
            // The dead-man looks at its clock only when the freeze's or the pause's own bound has passed.
            assert!(since.elapsed() < HELD_MAX + Duration::from_secs(5), "{why}: ended after {:?}", since.elapsed());
            machine.check_let_go(ended.at, &why);
            if HELD.contains(&point) {
                watch.check_pause(&machine, &why);
            }
            drop(watch);
            machine.write();
            machine.check_next_sync(&why);
            machine.check_settled(&why);
        }
    }
}

/// Two faults: the run is killed at N, its recovery at M.
#[test]
fn recovery_killed_too() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "twice");
    for first in ["4d", "7b", "7f", "7h"] {
        // The recovery of one disk left on its overlay goes through every step of a commit, whatever came before.
        for second in ["7a", "7b", "7c", "7d", "7e", "7f", "7g", "7h", "7i", "7j", "7n", "8a"] {
            let why = format!("killed at {first}, its recovery at {second}");
            eprintln!("{why}");
            let mut driver = machine.spawn_sync(&format!("4f=sleep:300,{first}=kill"));
            if first != "4d" {
                machine.write_to_overlays(&mut driver);
            }
            let ended = driver.wait();
            assert!(ended.killed(), "{why}: {ended:#?}");
            machine.check_let_go(ended.at, &why);
            machine.write();
            let one_is_left = !machine.named_overlays().is_empty();
            let recovery = machine.doctor(&format!("{second}=kill"), true);
            // At 7b one disk's commit is begun and the other's not; later both are. At 7f one is pivoted, at 7h as many
            // as the pause had time for; and the dead-man has let the guest go.
            let skipped = match first {
                "7f" | "7h" if one_is_left => ["7a", "7b"].contains(&second),
                "7h" => !["7n", "8a"].contains(&second),
                _ => false,
            };
            assert_eq!(recovery.killed(), !skipped, "{why}: {recovery:#?}");
            machine.check_let_go(recovery.at, &why);
            machine.write();
            machine.check_live(&why);
            machine.doctor("", true).ok(&why);
            machine.check_settled(&why);
        }
    }
    machine.check_next_sync("after all pairs");
}
