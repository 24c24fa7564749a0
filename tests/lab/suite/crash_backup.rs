//! kill -9 at every numbered step of a run by backup, and what else may end one: QEMU, libvirtd, the operator, a
//! scratch file's full file system. The machine is that of `crash_machine`, and so is what has to hold afterwards;
//! besides, no job runs and no scratch file, socket or record is left.

use crate::crash_bench::{Driver, Ended, Lab, wait_for};
use crate::crash_machine::Machine;
use std::time::Duration;

/// The numbers of the section "By backup" in docs/replication.md, and those steps of every run that stand between them.
const STEPS: [&str; 10] = ["b1", "b2", "b3", "5a", "5b", "5f", "6f", "b4", "b5", "b6"];

fn spawn(machine: &mut Machine, failpoint: &str) -> Driver {
    let name = machine.name.clone();
    machine.spawn(failpoint, &["sync", &name, "--to", Machine::TARGET, "--json", "--capture", "backup"])
}

fn sync(machine: &mut Machine, failpoint: &str) -> Ended {
    spawn(machine, failpoint).wait()
}

/// What libvirt calls the job that runs on the domain.
fn job(machine: &Machine) -> String {
    machine.virsh("domjobinfo", &[])
}

fn runs(machine: &Machine) -> bool {
    job(machine).contains("Backup")
}

fn record(machine: &Machine) -> bool {
    machine.backup_record().exists()
}

#[track_caller]
fn check_settled(machine: &Machine, why: &str) {
    machine.check_settled(why);
    assert!(!record(machine), "{why}: a record is left");
    let socket = "find /var/lib/libvirt/qemu -path \"*-$NAME/virt-replica-backup.sock\"";
    assert_eq!(machine.lab.sh("a", &format!("NAME={}; {socket}", machine.name)), "", "{why}: a socket is left");
    if machine.state() == "running" {
        assert!(!runs(machine), "{why}: {}", job(machine));
        let exports = machine.virsh("qemu-monitor-command", &["{\"execute\":\"query-block-exports\"}"]);
        assert!(exports.contains("\"return\":[]"), "{why}: {exports}");
    }
}

/// The next run by backup seals what the guest has flushed.
#[track_caller]
fn check_next_sync(machine: &mut Machine, why: &str) {
    sync(machine, "").ok(&format!("{why}: the next sync"));
    machine.sealed = machine.model.clone();
    let (_, images) = machine.points();
    Machine::check_files(machine.lab, "b", &images, &machine.model, &format!("{why}: the next point"));
    check_settled(machine, why);
}

/// The run stands at `point`, and dies there with its dead-man: nobody is left to end the job.
#[track_caller]
fn kill_both(machine: &mut Machine, point: &str) {
    let mut driver = spawn(machine, &format!("{point}=sleep:30000"));
    driver.stands_at(point);
    end_both(machine, driver);
}

#[track_caller]
fn end_both(machine: &Machine, driver: Driver) {
    machine.lab.sh("a", &format!("kill -9 $(pgrep -P {0} -f ' deadman ') {0}", driver.pid()));
    assert!(driver.wait().killed());
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Mended {
    /// The driver alone is killed: the dead-man ends the job, without any further command.
    Deadman,
    /// Both are: `doctor --repair`, or the next run.
    Doctor,
    Sync,
}

#[test]
fn killed_at_each_step_of_a_backup() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "kbackup");
    for (at, point) in STEPS.into_iter().enumerate() {
        if point.starts_with('b') {
            killed_at(&mut machine, point, Mended::Deadman);
        }
        killed_at(&mut machine, point, if at % 2 == 0 { Mended::Doctor } else { Mended::Sync });
    }
    // And by overlay it goes on where the backup left off.
    machine.write();
    machine.check_next_sync("by overlay");
    check_settled(&machine, "by overlay");
}

fn killed_at(machine: &mut Machine, point: &str, mended: Mended) {
    let why = format!("killed at {point}, mended by {mended:?}");
    eprintln!("{why}");
    let (points, _) = machine.points();
    let sealed = machine.sealed.clone();
    machine.write();
    let frozen = machine.model.clone();
    // Where the job runs already the guest writes before the end comes: the point must not have that.
    let late = ["5a", "5b", "5f", "6f", "b4", "b5", "b6"].contains(&point);
    let death = if mended == Mended::Deadman { "kill" } else { "sleep:30000" };
    let mut driver = spawn(machine, &format!("{}{point}={death}", if late { "b3=sleep:700," } else { "" }));
    if late {
        driver.stands_at("b3");
        assert!(runs(machine), "{why}: {}", job(machine));
        machine.write();
    }
    let left = !["3", "3c", "b6"].contains(&point);
    if mended == Mended::Deadman {
        assert!(driver.wait().killed(), "{why}");
        wait_for("the dead-man has ended the backup", || (!record(machine)).then_some(()));
        check_settled(machine, &why);
    } else {
        driver.stands_at(point);
        end_both(machine, driver);
        assert_eq!(record(machine), left, "{why}: the record");
        assert_eq!(runs(machine), ["b2", "b3", "5a", "5b", "5f", "6f"].contains(&point), "{why}: {}", job(machine));
    }
    // Nothing ever holds the guest.
    assert_eq!(machine.state(), "running", "{why}");
    machine.write();
    machine.check_live(&why);
    machine.check_head(&points, &sealed, &frozen, &why);
    if mended == Mended::Doctor {
        let traces = machine.traces();
        let found = machine.doctor("", false);
        assert_eq!(found.code(), Some(i32::from(left)), "{why}: {found:#?}");
        assert_eq!(found.says("was cut short while it read by backup"), left, "{why}: {found:#?}");
        assert_eq!((record(machine), machine.traces()), (left, traces), "{why}: doctor changed something");
        machine.doctor("", true).ok(&why);
        check_settled(machine, &why);
    }
    check_next_sync(machine, &why);
}

/// Two faults: the run is killed with its job running, its recovery at each of its own steps.
#[test]
fn recovery_of_a_backup_killed_too() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "kbackup2");
    for point in ["b4", "b5", "b6"] {
        let why = format!("killed at 5b, its recovery at {point}");
        machine.write();
        kill_both(&mut machine, "5b");
        assert!(machine.doctor(&format!("{point}=kill"), true).killed(), "{why}");
        check_next_sync(&mut machine, &why);
    }
}

/// The domain ends while it is read: no point, nothing left, and it starts with every write.
#[test]
fn the_domain_ends_under_a_backup() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "kbackup3");
    for orderly in [true, false] {
        let why = format!("the domain ends, orderly: {orderly}");
        let (points, _) = machine.points();
        machine.write();
        let mut driver = spawn(&mut machine, "b3=sleep:1500");
        driver.stands_at("b3");
        machine.write();
        match orderly {
            true => drop(machine.virsh("destroy", &["--graceful"])),
            false => machine.kill_qemu(),
        }
        let ended = driver.wait();
        assert!(matches!(ended.code(), Some(1..=11)), "{why}: {ended:#?}");
        assert_eq!(machine.points().0, points, "{why}: no point was made of it");
        check_settled(&machine, &why);
        machine.virsh("start", &[]);
        machine.check_live(&why);
        check_next_sync(&mut machine, &why);
    }
}

/// libvirtd dies: the job is QEMU's and goes on, and so does the run.
#[test]
fn libvirtd_killed_under_a_backup() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "kbackup4");
    machine.write();
    let mut driver = spawn(&mut machine, "b3=sleep:3000");
    driver.stands_at("b3");
    lab.lab(&["libvirtd", "a", "kill9"]);
    lab.lab(&["libvirtd", "a", "start"]);
    machine.write();
    driver.wait().ok("libvirtd was killed and came back");
    check_settled(&machine, "libvirtd was killed and came back");
    check_next_sync(&mut machine, "libvirtd was killed and came back");
}

/// libvirtd dies at some moment inside the begin, and may come back with a job of which it knows nothing and which
/// nothing ends but the end of the domain and another libvirtd. Ours is settled in any case; a run is refused in words,
/// or seals; after a restart of the domain it seals.
#[test]
fn libvirtd_killed_inside_the_begin_of_a_backup() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "kbackup6");
    // The killer takes a moment to come.
    for delay_ms in [375, 385, 395, 405] {
        let why = format!("libvirtd killed {delay_ms} ms after b1, its begin at 400");
        machine.write();
        let mut driver = spawn(&mut machine, "b1=sleep:400,b2=sleep:2000");
        driver.stands_at("b1");
        std::thread::sleep(Duration::from_millis(delay_ms));
        lab.lab(&["libvirtd", "a", "kill9"]);
        lab.lab(&["libvirtd", "a", "start"]);
        let ended = driver.wait();
        eprintln!("{why}: the run ended with {:?}", ended.code());
        assert_eq!(machine.state(), "running", "{why}");
        wait_for("ours is settled", || (!record(&machine)).then_some(()));
        machine.check_settled(&why);
        if !machine.try_virsh("domjobinfo", &[]).status.success() {
            eprintln!("{why}: libvirt has a hollow job");
            let refused = sync(&mut machine, "");
            assert_eq!(refused.code(), Some(11), "{why}: {refused:#?}");
            assert!(refused.says("shut off and libvirtd restarted"), "{why}: {refused:#?}");
            machine.virsh("destroy", &["--graceful"]);
            lab.lab(&["libvirtd", "a", "restart"]);
            machine.virsh("start", &[]);
        }
        check_next_sync(&mut machine, &why);
    }
}

/// Somebody aborts our job: no point. Somebody's own job: refused, and left alone.
#[test]
fn other_hands_on_a_backup() {
    let lab = Lab::up();
    let mut machine = Machine::replicated(&lab, "kbackup5");
    let (points, _) = machine.points();
    machine.write();
    let mut driver = spawn(&mut machine, "b3=sleep:1500");
    driver.stands_at("b3");
    machine.virsh("domjobabort", &[]);
    let ended = driver.wait();
    assert!(matches!(ended.code(), Some(1..=11)), "{ended:#?}");
    assert_eq!(machine.points().0, points, "no point was made of it");
    check_settled(&machine, "aborted by hand");

    let theirs = format!("/lab/shared/{}-theirs.xml", machine.name);
    let xml = "<domainbackup mode=\"pull\"><server transport=\"unix\" socket=\"/tmp/theirs.sock\"/></domainbackup>";
    lab.sh("a", &format!("echo '{xml}' >{theirs}"));
    machine.virsh("backup-begin", &[&theirs]);
    // Also where a record of ours says that we had one.
    for recorded in [false, true] {
        if recorded {
            machine.virsh("domjobabort", &[]);
            wait_for("their job has ended", || (!runs(&machine)).then_some(()));
            kill_both(&mut machine, "b2");
            machine.virsh("domjobabort", &[]);
            wait_for("our job has ended", || (!runs(&machine)).then_some(()));
            machine.virsh("backup-begin", &[&theirs]);
        }
        let refused = sync(&mut machine, "");
        assert_eq!(refused.code(), Some(11), "{refused:#?}");
        assert!(refused.says("backup runs on the domain"), "{refused:#?}");
        assert!(machine.virsh("backup-dumpxml", &[]).contains("/tmp/theirs.sock"), "theirs goes on");
        assert!(!record(&machine), "what was ours is settled");
    }
    machine.virsh("domjobabort", &[]);
    wait_for("their job has ended", || (!runs(&machine)).then_some(()));
    check_next_sync(&mut machine, "after somebody's backup");
}
