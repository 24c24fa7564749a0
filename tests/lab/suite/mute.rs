//! A target that is alive and does not answer: what it holds up, and what it does not. Where a failpoint makes the
//! agent mute, it is a child of the run, over a store that both hosts see: a failpoint of the agent's is one of the
//! run's. An agent that is stopped, or behind a thin link, is on host b.

use crate::domain::{Disk, Domain};
use crate::support::{Host, Lab, PATIENCE, SyncResult, Undo, eventually};
use std::time::{Duration, Instant};

const LIMIT: [&str; 2] = ["--overlay-max-age", "2s"];

/// The limit, and what commit and a busy machine add to it.
const SOON: Duration = Duration::from_secs(20);

fn mute(lab: &Lab, name: &str) -> Domain {
    let mut vm = lab.domain(name).disk(Disk::qcow2("64M").then("write -P 0x61 0 4M")).paused();
    vm.to = format!("{}/store", vm.shared());
    vm.sync().sealed();
    vm.write(0, "-P 0x62 0 1M");
    vm
}

impl Domain {
    /// Waits until the run has put the guest onto its own images again.
    #[track_caller]
    fn comes_home(&self, run: &mut crate::support::Job) {
        let frozen = Instant::now();
        run.wait_step(7);
        eventually("the guest to be on its own images", PATIENCE, || (self.live_images() == self.images).then_some(()));
        assert!(frozen.elapsed() < SOON, "the guest was held for {:?}", frozen.elapsed());
    }
}

/// The end of a disk and an attachment: the limit ends the wait, the commit comes first, and only then the agent is
/// waited for.
#[test]
fn an_agent_that_is_mute_holds_no_guest() {
    let lab = Lab::get();
    let vm = mute(&lab, "mute");
    for (point, what) in [("5d", "for the target to finish disk 'vda'"), ("5e", "for the target to take domain")] {
        let mut run = vm.start_sync(&format!("{point}=sleep:300000"), &LIMIT);
        run.wait_step(5);
        vm.comes_home(&mut run);
        assert!(run.running(), "{point}: the run is still about to give up the point");
        // As an operator ends it who read the hint.
        Host::A.script("kill -9 $(pgrep -f \"agent .*--root $1\")", &[&vm.to]);
        let ended = SyncResult::of(run.wait_from_now(PATIENCE)).failed(130);
        ended.says(&["older than it may get, 2s", "it had waited", what]);
        vm.assert_home();
        assert_eq!(vm.points().len(), 1, "{point}: no point was made of it");
    }
    vm.sync().sealed().incremental("vda");
    vm.compare_with_head();
}

/// An honest target whose storage is slow: the guest goes home by the limit, and the point that is sealed later counts.
#[test]
fn a_seal_that_comes_after_the_limit_is_a_point() {
    let lab = Lab::get();
    let vm = mute(&lab, "slowseal");
    let mut run = vm.start_sync("6a=sleep:8000", &LIMIT);
    run.wait_step(6);
    vm.comes_home(&mut run);
    let sealed = SyncResult::of(run.wait(PATIENCE)).sealed();
    let warnings = sealed.report["warnings"].to_string();
    assert!(warnings.contains("older than it may get, 2s"), "{warnings}");
    assert!(warnings.contains("sealed the point all the same"), "{warnings}");
    assert_eq!(vm.points().len(), 2);
    vm.assert_home();
    vm.compare_with_head();
    // The bitmap that leads on from the late point was kept, and the older one is gone (I8).
    vm.write(0, "-P 0x63 8M 1M");
    // Nor does a report that cannot be kept decide how a run went.
    let dir = format!("/var/lib/virt-replica/source/domains/{}", vm.uuid);
    Host::A.script("cd \"$1\" && rm -f last.json history.jsonl && mkdir -p last.json/x history.jsonl/x", &[&dir]);
    let unkept = vm.sync().sealed();
    unkept.incremental("vda");
    assert!(unkept.report["warnings"].to_string().contains("could not be kept on this host"), "{:#}", unkept.report);
    Host::A.script("cd \"$1\" && rm -r last.json history.jsonl", &[&dir]);
    vm.sync().sealed();
    vm.compare_with_head();
}

/// The agent on host b that serves a store, which is one test's own.
fn signal_agent(root: &str, signal: &str) {
    Host::B.script("kill -$2 $(pgrep -f \"agent .*--root $1\")", &[root, signal]);
}

/// A stopped agent answers nothing, not even a ping, and its connection stays: the limit ends the wait, long before
/// the silence does (30 s).
#[test]
fn an_agent_that_is_stopped_holds_no_guest() {
    let lab = Lab::get();
    let mut vm = lab.domain("stopped").disk(Disk::qcow2("64M").then("write -P 0x61 0 4M")).paused();
    let root = vm.own_store();
    vm.sync().sealed();
    vm.write(0, "-P 0x62 0 1M");
    // The point is begun, the disk stands still, and nothing was asked about it yet. The sleep is for finding the
    // agent, and the limit leaves the run time to wait for it.
    let mut run = vm.start_sync("5a=sleep:2500", &["--overlay-max-age", "5s"]);
    run.wait_step(5);
    signal_agent(&root, "STOP");
    let mut again = Undo(|| signal_agent(&root, "CONT"));
    vm.comes_home(&mut run);
    assert!(run.running(), "the run is still about to give up the point");
    // As an operator does who does not want to wait for that either.
    Host::A.script("kill -INT $(pgrep -f \"^virt-replica sync $1 \")", &[&vm.name]);
    let ended = SyncResult::of(run.wait_from_now(PATIENCE)).failed(130);
    ended.says(&["older than it may get, 5s", "it had waited", "for the target to", "--overlay-max-age"]);
    vm.assert_home();
    (again.0)();
    std::mem::forget(again);
    // The agent finds that its run has gone, and gives up the point and its lock.
    eventually("the agent to end", PATIENCE, || {
        let gone = Host::B.run(&["bash", "-c", "! pgrep -f \"agent .*--root $1\"", "x", &root]);
        (gone.code == 0).then_some(())
    });
    assert_eq!(vm.points().len(), 1, "no point was made of it");
    vm.sync().sealed().incremental("vda");
    vm.compare_with_head();
}

/// All that the run waits for is the link: the limits hold there too, by age and by size.
#[test]
fn a_thin_link_holds_no_guest_beyond_the_limits() {
    let lab = Lab::alone();
    let vm = lab.domain("thin").disk(Disk::qcow2("64M").then("write -P 0x61 0 4M")).paused();
    vm.sync().sealed();
    vm.write(0, "-P 0x62 0 16M");
    let _undo = Undo(|| drop(lab.tool(&["link-rate", "a", "off"])));
    let large = ["--overlay-max-bytes", "4M"];
    for (limit, code, why) in [(LIMIT, 130, "older than it may get, 2s"), (large, 1, "more than the 4M it may")] {
        // Sixteen MiB take four minutes.
        lab.tool(&["link-rate", "a", "512kbit"]);
        let mut run = vm.start_sync("", &[&["--compress", "no"][..], &limit].concat());
        run.wait_step(5);
        if limit == large {
            vm.write(0, "-P 0x63 32M 8M");
            vm.flush(0);
        }
        vm.comes_home(&mut run);
        // What is on its way need not be waited for to learn how the run ends.
        lab.tool(&["link-rate", "a", "off"]);
        let ended = SyncResult::of(run.wait_from_now(PATIENCE)).failed(code);
        ended.says(&[why, limit[0]]);
        vm.assert_home();
        assert_eq!(vm.points().len(), 1, "{why}: no point was made of it");
    }
    vm.sync().sealed().incremental("vda");
    vm.compare_with_head();
}
