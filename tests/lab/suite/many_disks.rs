//! A domain with many disks: what the guest feels of a run does not grow with their number.

use super::domain::Disk;
use super::support::Lab;

/// Half of the bound at which the dead-man ends a run that holds the guest. With 12 disks it did.
const PAUSE_MAX_MS: f64 = 2500.0;

/// Far below the bound of the freeze, 10 s.
const FREEZE_MAX_MS: f64 = 5000.0;

#[test]
fn a_domain_with_sixteen_disks_is_paused_shortly() {
    let lab = Lab::get();
    let disks = (0..16).fold(lab.domain("sixteen"), |vm, _| vm.disk(Disk::qcow2("8M").then("write -P 0x11 0 64k")));
    let vm = disks.running();
    let run = vm.sync().sealed();
    let ms = |what: &str| run.report[what].as_f64().unwrap_or_else(|| panic!("no {what} in {:#}", run.report));
    println!("freeze {} ms, pause {} ms", ms("freeze_ms"), ms("pause_ms"));
    assert!(ms("pause_ms") > 0.0 && ms("pause_ms") < PAUSE_MAX_MS, "{:#}", run.report);
    let pauses = run.report["pauses"].as_u64().unwrap_or_else(|| panic!("no number of pauses in {:#}", run.report));
    let sum_ms = ms("pause_sum_ms");
    assert!(
        pauses >= 1 && ms("pause_ms") <= sum_ms && sum_ms <= ms("pause_ms") * pauses as f64 + 0.1,
        "{:#}",
        run.report
    );
    assert!(ms("freeze_ms") < FREEZE_MAX_MS, "{:#}", run.report);
    vm.assert_home();
    // Nobody writes: there is no operating system.
    vm.compare_with_head();
}
