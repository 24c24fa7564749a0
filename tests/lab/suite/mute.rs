//! A target that is alive and does not answer: what it holds up, and what it does not. The agent is a child of the
//! run here, over a store that both hosts see, and so a failpoint of the agent's is one of the run's.

use crate::domain::{Disk, Domain};
use crate::support::{Host, Lab, PATIENCE, SyncResult, eventually};
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
